"""Writes model-index.yml and configs/*/metafile.yml, what OpenMMLab's tools know of this repository's configs.

    python maintenance/make_metafiles.py [--check]

Everything comes from the configs and from the records in docs/results/. No weights are published, so none are named; a
config has results only if a recorded run of it has.
"""
from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path
from unittest import mock

import torch
import yaml
from generated import Files, keep
from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from mmseg.structures import SegDataSample
from torch import nn

from adala_mm.models.attentions import Attention
from adala_mm.utils.cost import multiply_adds

ROOT = Path(__file__).resolve().parents[1]
HEADER = """\
# Written by maintenance/make_metafiles.py. Parameters: of backbone, neck and head; of an alignment stage, of the
# student. FLOPs: their multiply-adds for one image of Image Size, attention included.
"""
# Collection -> its paper, and the folder whose README tells more.
PAPERS = {
    'ViT-AdaLA': ('adala', dict(Title='ViT-AdaLA: Adapting Vision Transformers with Linear Attention',
                                URL='https://arxiv.org/abs/2603.16063')),
    'Linear': ('baselines', dict(
        Title='Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention')),
    'Hedgehog': ('baselines', dict(
        Title='The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry')),
    'LoLCATS': ('baselines', dict(Title='LoLCATs: On Low-Rank Linearizing of Large Language Models')),
    'Linformer': ('baselines', dict(Title='Linformer: Self-Attention with Linear Complexity',
                                    URL='https://arxiv.org/abs/2006.04768')),
    'Performer': ('baselines', dict(Title='Rethinking Attention with Performers')),
    'Cosformer': ('baselines', dict(Title='cosFormer: Rethinking Softmax in Attention')),
    'Nystromformer': ('baselines', dict(
        Title='Nyströmformer: A Nyström-Based Algorithm for Approximating Self-Attention')),
    'Monarch': ('baselines', dict(
        Title='MonarchAttention: Zero-Shot Conversion to Fast, Hardware-Aware Structured Attention',
        URL='https://arxiv.org/abs/2505.18698')),
    'L2ViT': ('l2vit', dict(Title='The Linear Attention Resurrection in Vision Transformer',
                            URL='https://arxiv.org/abs/2501.16182')),
}
# What the last word of a config's name stands for.
DATASETS = dict(ade20k='ADE20K', cityscapes='Cityscapes', in1k='ImageNet-1k', in22k='ImageNet-22k', coco='COCO',
                beacons='Beacons', caltech='Caltech-101', camvid='CamVid')
TASKS = {'adala_mm.AttentionAlignment': 'Attention Alignment', 'adala_mm.FeatureAlignment': 'Feature Alignment',
         'EncoderDecoder': 'Semantic Segmentation', 'ImageClassifier': 'Image Classification'}
# Config of the demo -> the row of its record that it ended in, and the column.
DEMO_ROWS = dict(
    teacher_demo_beacons=('softmax teacher', 'as_is'), fcn_demo_softmax_beacons=('softmax teacher', 'tuned'),
    fcn_demo_swap_beacons=('swap only', 'tuned'), fcn_demo_coarse_beacons=('swap, coarse to fine', 'tuned'),
    fcn_demo_stage1only_beacons=('stage 1 only', 'tuned'),
    fcn_demo_stage2only_beacons=('stage 2 only', 'tuned'), fcn_demo_beacons=('stage 1 + 2', 'tuned'))
DEMO_ERRORS = dict(stage1_demo_beacons='stage1', stage2_demo_nostage1_beacons='stage2_only',
                   stage2_demo_beacons='stage2')


def recorded_scores() -> dict[str, dict[str, float]]:
    """Config name -> metrics at the end of its recorded run."""
    demo = json.loads((ROOT / 'docs/results/demo.json').read_text())
    rows = {row['name']: row for row in demo['rows']}
    scores = {name: dict(mIoU=rows[row][column]) for name, (row, column) in DEMO_ROWS.items() if row in rows}
    scores |= {name: {'align/rel_error': demo['rel_error'][run][-1]} for name, run in DEMO_ERRORS.items()}
    scores['mask2former_demo_beacons'] = dict(mIoU=demo['mask2former'])
    for run in json.loads((ROOT / 'docs/results/real.json').read_text()).values():
        scores[run['config']] = {key: value for key, value in run['scores'][-1].items() if key != 'step'}
    return {name: {key: float(f'{value:.4g}') for key, value in metrics.items()} for name, metrics in scores.items()}


def build(cfg: dict, scope: str, device: str) -> nn.Module:
    with DefaultScope.overwrite_default_scope(scope), torch.device(device):
        model = MODELS.build(ConfigDict(cfg)).eval().requires_grad_(False)
    if 'backbone' in cfg:  # a whole detector, with any backbone: its own is counted by itself
        model.backbone = nn.Identity()
    return model


def architecture(cfg: Config) -> dict:
    """The modules of the config's model that predict, without where their weights come from.

    An alignment stage has its student alone: what is called its head are weights that score it. A detector of mmdet is
    no sequence of modules: it stands here as a whole, and takes features.
    """
    parts = cfg.to_dict()['model']
    if cfg.default_scope == 'mmdet':
        stand_in = dict(type='adala_mm.AdaLAViT', depth=1)
        parts = dict(backbone=parts['backbone'], detector=parts | dict(backbone=stand_in))
    return {key: {option: value for option, value in parts[key].items() if option != 'init_cfg'}
            for key in ('backbone', 'neck', 'decode_head', 'head', 'detector') if 'type' in parts.get(key, ())}


def image_size(cfg: Config) -> int:
    """Side of the square images that the config trains on."""
    if 'crop_size' in cfg:
        return cfg.crop_size[0]
    if cfg.default_scope == 'mmdet':
        return 1024  # as many pixels as 1333 x 800
    return cfg.model.backbone.get('img_size') or next(
        step['scale'] for step in cfg.train_dataloader.dataset.pipeline if step['type'] == 'RandomResizedCrop')


@functools.cache
def inspect(part: str, scope: str) -> tuple[int, list[str]]:
    """Number of parameters, and names of the attentions, of a module whose config is the JSON ``part``."""
    model = build(json.loads(part), scope, 'meta')
    attentions = {type(module).__name__ for module in model.modules() if isinstance(module, Attention)}
    return sum(p.numel() for p in model.parameters()), sorted(attentions)


@functools.cache
def count_flops(parts: str, scope: str, side: int) -> int:
    """Multiply-adds of an `architecture`, as JSON, for one image.

    The backbone runs on the meta device, which takes no time, neck and head on the CPU: deformable attention reads its
    shapes from tensors.
    """
    parts, features = json.loads(parts), []
    backbone = build(parts.pop('backbone'), scope, 'meta')
    image = torch.empty(1, 3, side, side, device='meta')
    with mock.patch.object(torch, 'autocast', lambda *args, **kwargs: contextlib.nullcontext()):  # knows no meta device
        flops = multiply_adds(lambda: features.extend(backbone(image)))
    shapes = tuple(tuple(feature.shape) for feature in features)
    return flops + count_rest(json.dumps(parts), scope, side, shapes)


@functools.cache
def count_rest(parts: str, scope: str, side: int, shapes: tuple[tuple[int, ...], ...]) -> int:
    """Multiply-adds of neck and head on features of these shapes."""
    modules = {key: build(part, scope, 'cpu') for key, part in json.loads(parts).items()}
    sample = SegDataSample(metainfo=dict(img_shape=(side, side)))

    def run() -> None:
        features = tuple(torch.zeros(shape) for shape in shapes)
        if 'detector' in modules:
            seen = DetDataSample(metainfo=dict(img_shape=(side, side), batch_input_shape=(side, side)))
            modules['detector'](features, [seen], mode='tensor')
        if 'neck' in modules:
            features = modules['neck'](features)
        for name in {'head', 'decode_head'} & set(modules):
            extra = [[sample]] if 'Mask2Former' in type(modules[name]).__name__ else []
            modules[name](features, *extra)
    return multiply_adds(run)


def metadata(cfg: Config, name: str, with_flops: bool = True) -> dict:
    """What is known of a config without training it."""
    side, scope, parts = image_size(cfg), cfg.default_scope, architecture(cfg)
    kinds = [part['type'].split('.')[-1] for part in parts.values()]
    found = [inspect(json.dumps(part), scope) for part in parts.values()]  # the backbone comes first
    facts = {'Training Data': DATASETS[name.split('_')[-1]], 'Architecture': [kinds[0], *found[0][1], *kinds[1:]],
             'Image Size': side, 'Parameters': sum(count for count, _ in found)}
    return facts | ({'FLOPs': count_flops(json.dumps(parts), scope, side)} if with_flops else {})


def collection(path: Path, attentions: list[str]) -> str:
    """Of the paper whose method the config is: baselines stand with the papers of their attentions."""
    if path.parent.name == 'l2vit':
        return 'L2ViT'
    return attentions[0].removesuffix('Attention') if path.parent.name == 'baselines' else 'ViT-AdaLA'


def model_entry(path: Path, scores: dict[str, dict[str, float]], with_flops: bool = True) -> dict:
    cfg = Config.fromfile(path)
    facts = metadata(cfg, path.stem, with_flops)
    attentions = [part for part in facts['Architecture'] if part.endswith('Attention')]
    entry = {'Name': path.stem, 'In Collection': collection(path, attentions),
             'Config': path.relative_to(ROOT).as_posix(), 'Metadata': facts}
    if path.stem in scores:
        task = TASKS[cfg.model.type.removeprefix('mmseg.').removeprefix('mmpretrain.')]
        entry['Results'] = [dict(Task=task, Dataset=facts['Training Data'], Metrics=scores[path.stem])]
    return entry


def config_folders() -> list[Path]:
    return sorted({path.parent for path in (ROOT / 'configs').glob('*/*.py') if path.parent.name != '_base_'})


def as_text(data: dict) -> str:
    return HEADER + yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)


def model_index() -> str:
    # File by file: MMEngine's get_config reads no patterns.
    return yaml.safe_dump(dict(Import=[f'configs/{folder.name}/metafile.yml' for folder in config_folders()]))


def metafile(folder: Path, with_flops: bool = True) -> dict:
    scores = recorded_scores()
    # A collection is stated once, in the folder that is its own.
    collections = [dict(Name=name, README=f'configs/{home}/README.md', Paper=paper)
                   for name, (home, paper) in PAPERS.items() if home == folder.name]
    return (dict(Collections=collections) if collections else {}) | dict(
        Models=[model_entry(path, scores, with_flops) for path in sorted(folder.glob('*.py'))])


def files() -> Files:
    yield 'model-index.yml', model_index()
    for folder in config_folders():
        name = f'configs/{folder.name}/metafile.yml'
        print(f'{name} ...', flush=True)  # counting takes a minute for the larger folders
        yield name, as_text(metafile(folder))


def main() -> None:
    keep(ROOT, make_metafiles=files)


if __name__ == '__main__':
    main()
