"""Measures mIoU and time of segmentors at many sizes of the test images (ViT-AdaLA Fig. 9).

    python tools/analysis_tools/evaluate_segmentation.py [NAME=]CONFIG:CHECKPOINT ... [--sizes S ...] [--num-images N]
        [--data-root DATA] [--out DIR]

A size is the short side of the image. Each model sees whole images of its config's test set, scaled to the size, even
if the config says sliding windows. Predictions are scored at the size of the labels. Writes segmentation.json and
segmentation.png; see docs/predictions.md.
"""
from __future__ import annotations

import argparse
import copy
import functools
import statistics
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.utils import ProgressBar
from torch import nn
from torch.utils.data import DataLoader

from adala_mm.analysis import (
    Spec,
    analysis_parser,
    load_predictor,
    outputs,
    positive,
    require_distinct,
    write,
)
from adala_mm.analysis.images import spread
from adala_mm.engine import LabelCheckHook
from adala_mm.registry import DATASETS
from adala_mm.utils.cli import check_data, one_message
from adala_mm.utils.pictures import save_figure, size_axis
from adala_mm.utils.stopwatch import failure, wall_timer
from adala_mm.utils.tables import markdown_table

SIZES = [128, 256, 512, 1024]
LONGEST = 16  # times the short side: no image is that long


def at_size(pipeline: Sequence[dict], size: int) -> list[dict]:
    """A test pipeline that scales the image's short side to ``size``, and not the labels.

    Raises:
        ValueError: for a pipeline that does not begin by reading an image.
    """
    kinds = [str(step['type']).split('.')[-1] for step in pipeline]
    if not kinds or kinds[0] != 'LoadImageFromFile':
        raise ValueError(f'the test pipeline begins with {", ".join(kinds[:1]) or "nothing"}, not LoadImageFromFile')
    rest = [step for step, kind in zip(pipeline, kinds, strict=True) if 'Resize' not in kind]
    return [rest[0], dict(type='Resize', scale=(LONGEST * size, size), keep_ratio=True), *rest[1:]]


def test_images(cfg: Config, size: int, count: int | None) -> DataLoader:
    """The test set of a config, scaled; ``count`` images of it, spread evenly, or all."""
    loader = copy.deepcopy(cfg.test_dataloader.to_dict())
    loader['dataset']['pipeline'] = at_size(loader['dataset']['pipeline'], size)
    dataset = DATASETS.build(loader['dataset'])
    if count is not None:
        dataset.full_init()
        dataset = dataset.get_subset(spread(len(dataset), count))
    return Runner.build_dataloader(loader | dict(dataset=dataset, batch_size=1))


@torch.no_grad()
def score(model: nn.Module, loader: DataLoader, device: torch.device, progress: ProgressBar) -> dict:
    """mIoU and pixel accuracy in percent, and median milliseconds of an image; or a ``note`` why there are none.

    Raises:
        ValueError: if the config's test evaluator gives something else, or labels are no classes of the model.
    """
    evaluator, timer, samples, seconds = Evaluator(model.cfg.test_evaluator), wall_timer(device), [], []
    evaluator.dataset_meta = model.dataset_meta

    def step(batch: dict) -> None:
        seconds.append(timer(lambda: samples.append(model.test_step(batch))))

    for batch in loader:
        LabelCheckHook().before_test_iter(SimpleNamespace(model=model), 0, batch)
        if note := failure(functools.partial(step, batch), device):
            return dict(note=note)
        evaluator.process(data_samples=samples.pop(), data_batch=batch)
        progress.update()
    scores = evaluator.evaluate(len(loader.dataset))
    if absent := {'mIoU', 'aAcc'} - set(scores):
        raise ValueError(f'test_evaluator gives {", ".join(scores)}, and no {" and no ".join(sorted(absent))}')
    return dict(miou=float(scores['mIoU']), accuracy=float(scores['aAcc']), ms=1000 * statistics.median(seconds))


def table(rows: Sequence[dict]) -> str:
    return markdown_table(
        ['short side', 'segmentor', 'softmax / linear blocks', 'mIoU', 'pixel accuracy', 'ms', ''],
        [[str(row['size']), row['name'], f'{row.get("softmax_blocks", "-")} / {row.get("linear_blocks", "-")}',
          *(format(row[key], form) if key in row else '-'
            for key, form in (('miou', '.2f'), ('accuracy', '.2f'), ('ms', '.1f'))), row.get('note', '')]
         for row in rows])


def draw(path: Path, rows: Sequence[dict]) -> None:
    """mIoU and time over the short side, a line a segmentor."""
    figure = Figure(figsize=(9, 3.6), layout='constrained')
    sizes = sorted({row['size'] for row in rows})
    for axis, key, title in zip(figure.subplots(1, 2), ('miou', 'ms'), ('mIoU (%)', 'ms per image'), strict=True):
        for i, name in enumerate(dict.fromkeys(row['name'] for row in rows)):
            points = [(row['size'], row[key]) for row in rows if row['name'] == name and key in row]
            if points:
                axis.plot(*zip(*points, strict=True), 'o-', color=f'C{i}', label=name)
        size_axis(axis, sizes)
        axis.set_yscale('linear' if key == 'miou' else 'log')
        axis.set(xlabel='short side of the image, pixels', ylabel=title)
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save_figure(figure, path)


def main() -> None:
    parser = analysis_parser(__doc__)
    parser.add_argument('segmentors', nargs='+', type=Spec.parse, metavar='[NAME=]CONFIG:CHECKPOINT',
                        help='config and checkpoint of a segmentor')
    parser.add_argument('--sizes', type=positive, nargs='+', default=SIZES, metavar='S',
                        help=f'short sides of the images (default: {" ".join(map(str, SIZES))})')
    parser.add_argument('--num-images', type=positive, metavar='N',
                        help='use this many images of the test set, spread evenly (default: all)')
    args = parser.parse_args()
    with one_message():
        run(args)


def open_segmentor(spec: Spec, args: argparse.Namespace) -> nn.Module:
    """A segmentor of the command line that sees images as a whole; see `load_predictor`.

    Raises:
        ValueError: if no checkpoint is named.
    """
    if spec.checkpoint is None:
        raise ValueError(f'{spec.config}: say CONFIG:CHECKPOINT, heads have no weights of their own')
    model = load_predictor(argparse.Namespace(**vars(args) | dict(config=spec.config, checkpoint=spec.checkpoint)),
                           'EncoderDecoder')
    check_data(model.cfg, ('test_dataloader',))
    model.test_cfg = type(model.cfg.model)(model.test_cfg or {}, mode='whole')
    model.record.update(name=spec.name, **getattr(model.backbone, 'block_counts', {}))  # L2ViT counts stages
    return model


def run(args: argparse.Namespace) -> None:
    json_path, png_path = outputs(args, 'segmentation')
    require_distinct('segmentor', [spec.name for spec in args.segmentors])
    models = [open_segmentor(spec, args) for spec in args.segmentors]
    device, rows = torch.device(args.device), []
    for size in sorted(set(args.sizes)):
        for model in models:
            with DefaultScope.overwrite_default_scope(model.cfg.get('default_scope')):
                loader = test_images(model.cfg, size, args.num_images)
                print(f'{model.record["name"]}, {size} pixels:')
                found = score(model, loader, device, ProgressBar(len(loader)))
            print()
            counts = {key: model.record[key] for key in ('name', 'softmax_blocks', 'linear_blocks')
                      if key in model.record}
            rows.append(counts | dict(size=size, num_images=len(loader)) | found)
            write(json_path, dict(rows=rows, models=[model.record for model in models]), args.device)
    draw(png_path, rows)
    print(table(rows), f'{png_path}\n{json_path}', sep='\n\n')


if __name__ == '__main__':
    main()
