"""Whole models, head included, on pictures of one's own."""
from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from adala_mm.analysis.images import named_images
from adala_mm.analysis.outputs import require_free
from adala_mm.export import assemble, load
from adala_mm.registry import DATASETS
from adala_mm.utils.checkpoint import load_checkpoint
from adala_mm.utils.cli import load_config
from adala_mm.utils.fingerprint import file_sha256
from adala_mm.utils.image_files import open_image

KINDS = {'EncoderDecoder': 'segmentor', 'ImageClassifier': 'classifier'}


class Output(NamedTuple):
    """An image and the picture that is made of it."""

    image: str
    picture: Path


def load_predictor(args: argparse.Namespace, kind: str) -> nn.Module:
    """Segmentor or classifier of ``args.config`` with all weights of ``args.checkpoint``, ready for inference.

    ``cfg`` and ``dataset_meta`` are what mmseg's ``inference_model`` asks for, ``_config`` and ``_dataset_meta`` what
    mmpretrain's inferencer does; ``record`` is for results. The names and colours of classes are the checkpoint's,
    else those of the config's data set, else numbers.

    Args:
        kind: ``EncoderDecoder`` or ``ImageClassifier``.

    Raises:
        ValueError: if the config is of another kind, or the checkpoint does not fit.
        FileNotFoundError: if there is no such config or checkpoint.
    """
    options = dict(launcher='none', local_rank=0, work_dir=None) | vars(args)
    cfg = load_config(argparse.Namespace(**options))
    found = str((cfg.get('model') or {}).get('type')).split('.')[-1]
    if found != kind:
        raise ValueError(f'{args.config} describes a {found}, which is no {KINDS[kind]}: a config of stage 3 is needed')
    target = assemble(cfg, 'model')
    load(target, cfg, args.checkpoint)
    model = target.model.to(args.device)
    head = model.decode_head if kind == 'EncoderDecoder' else model.head
    meta = class_names(cfg, args.checkpoint, head.num_classes)
    cfg = copy.deepcopy(cfg)
    cfg.setdefault('test_pipeline', cfg.test_dataloader.dataset.pipeline)
    model.cfg = model._config = cfg
    model.dataset_meta = model._dataset_meta = meta
    model.record = dict(config=args.config, checkpoint=args.checkpoint, sha256=file_sha256(args.checkpoint),
                        attention=target.notes['attention'])
    return model


def segment(model: nn.Module, image: str) -> np.ndarray:
    """Labels (H, W) of an image file, through the config's test pipeline and mode (whole or slide)."""
    from mmseg.apis import inference_model
    with DefaultScope.overwrite_default_scope(model.cfg.get('default_scope')):
        return inference_model(model, image).pred_sem_seg.data[0].cpu().numpy()


def classify(model: nn.Module, image: str) -> Tensor:
    """Scores (K,) of an image file, through the config's test pipeline."""
    from mmpretrain.apis import ImageClassificationInferencer
    with DefaultScope.overwrite_default_scope(model.cfg.get('default_scope')):
        inferencer = ImageClassificationInferencer(model)
        return inferencer.forward(next(inferencer.preprocess([image])))[0].pred_score.cpu()


def class_names(cfg: Config, checkpoint: str, count: int) -> dict:
    """``classes`` and ``palette`` of a model, from its checkpoint, its config's data set, or as numbers."""
    dataset = (cfg.get('test_dataloader') or cfg.get('val_dataloader') or {}).get('dataset', {})
    with DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
        kind = registry.get(dataset['type']) if dataset else None
    known = [(load_checkpoint(checkpoint).get('meta') or {}).get('dataset_meta') or {},
             dict(getattr(kind, 'METAINFO', {})) | dict(dataset.get('metainfo') or {})]
    classes = next((meta['classes'] for meta in known if len(meta.get('classes') or ()) == count), range(count))
    palette = next((meta['palette'] for meta in known if len(meta.get('palette') or ()) == count), None)
    if palette is None:
        palette = [[round(255 * channel) for channel in colormaps['turbo'](i / max(count - 1, 1))[:3]]
                   for i in range(count)]
    return dict(classes=[str(name) for name in classes], palette=[list(colour) for colour in palette])


def output_paths(args: argparse.Namespace, ending: str, name: str) -> tuple[list[Output], Path]:
    """Every image of the command line with the place of its picture, ``<out>/<its name><ending>.png``; ``<name>.json``.

    Raises:
        FileNotFoundError: for an image that is not there.
        FileExistsError: if a picture would replace an image, or without ``--overwrite`` anything else.
        ValueError: if two pictures would have the same name, or a file is not a whole image.
    """
    images = named_images(args.images)
    for image in images:  # all of them, before a long work begins
        open_image(image)
    found = [Output(image, args.out / f'{Path(image).stem}{ending}.png') for image in images]
    inputs = {Path(image).resolve() for image in images}
    taken: dict[Path, str] = {}
    for image, picture in found:
        if picture.resolve() in inputs:
            raise FileExistsError(f'{picture} is one of the images: say another --out')
        if picture in taken:
            raise ValueError(f'{taken[picture]} and {image} would both become {picture}: do them one after the other, '
                             'with different --out')
        taken[picture] = image
    data = args.out / f'{name}.json'
    for path in (*taken, data):
        require_free(path, args.overwrite)
    return found, data
