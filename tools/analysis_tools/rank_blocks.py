"""Measures which blocks lose most by linear attention, and which ones should keep softmax attention.

    python tools/analysis_tools/rank_blocks.py configs/adala/stage1_dinov2l_coco.py --images DIR \
        [--keep 2] [--steps 50 | --checkpoint STAGE1.pth] [--batch-size 8] [--measure 32] [--json OUT.json]

CONFIG is a config of stage 1. The script first measures each block's relative error of the attention output,
||linear - softmax|| / ||softmax||: right after linear attention is put in, and again after a short stage 1, or with the
weights of a finished one. With these attentions it then measures the relative error of the network's final features:
with all blocks linear, with each block softmax in turn, and with blocks made softmax one after the other. Each time it
chooses the block that leaves the smallest error.

The script does not know what stage 2 would repair. So --images should show what the model is for, and the gain of a
block counts, not its error.

The images are drawn from DIR, searched recursively, and resized to the config's size. Images that are measured are not
trained on here. Choose a DIR without the images on which a --checkpoint was trained. The optimizer is the config's.
"""
from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from itertools import cycle, islice
from pathlib import Path

import torch
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, DefaultScope
from torch import Tensor

from adala_mm.models.algorithms import AttentionAlignment
from adala_mm.utils.checkpoint import read_state_dict
from adala_mm.utils.cli import base_parser, load_config, one_message
from adala_mm.utils.records import save
from adala_mm.utils.tables import markdown_table


def draw_images(folder: str, side: int, count: int, seed: int = 0) -> list[Tensor]:
    """Up to ``count`` images (3, side, side), BGR, drawn from a folder.

    Raises:
        FileNotFoundError: if there are none.
    """
    pipeline = [dict(type='adala_mm.LoadImageFromFile'),
                dict(type='mmpretrain.ResizeEdge', scale=math.ceil(side * 8 / 7), edge='short'),
                dict(type='mmpretrain.CenterCrop', crop_size=side), dict(type='mmpretrain.PackInputs')]
    dataset = DATASETS.build(dict(type='adala_mm.ImageFiles', data_root=folder, pipeline=pipeline))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return [dataset[i]['inputs'] for i in order[:count].tolist()]


class Ranking:
    """The measurements, on one set of batches.

    Args:
        model: stage 1, with its weights loaded.
        batches: normalised images (B, 3, H, W).
    """

    def __init__(self, model: AttentionAlignment, batches: list[Tensor]) -> None:
        self.model, self.batches = model, batches
        self.linear = {i: block.attn for i, block in enumerate(model.backbone.blocks) if not block.attn.is_softmax}
        self.softmax = model.frozen['attentions']
        self.wanted = [model.teacher_features(images) for images in batches]

    @torch.no_grad()
    def block_errors(self) -> dict[int, float]:
        """Relative error of each linear block's attention output, where it reads what the teacher's reads."""
        self.model.eval()
        errors = []
        for images in self.batches:
            self.model.loss(images)
            errors.append(self.model.block_errors)
        return dict(zip(self.linear, torch.stack(errors).mean(dim=0).tolist(), strict=True))

    @torch.no_grad()
    def feature_error(self, kept: Iterable[int] = ()) -> float:
        """Relative error of the final features, over all images, if the ``kept`` blocks have their softmax attention.

        Raises:
            FloatingPointError: if it is not finite.
        """
        self.model.eval()
        blocks = self.model.backbone.blocks
        try:
            for i in kept:
                blocks[i].attn = self.softmax[i]
            pairs = [(self.model.backbone.forward_features(images), wanted)
                     for images, wanted in zip(self.batches, self.wanted, strict=True)]
        finally:
            for i in kept:
                blocks[i].attn = self.linear[i]
        error, energy = (sum(x.float().square().sum().item() for x in parts)
                         for parts in ((a - b for a, b in pairs), self.wanted))
        if not math.isfinite(error):
            raise FloatingPointError('the final features are not finite: train stage 1 for longer, or with a lower lr')
        return math.sqrt(error / energy)

    def greedy(self, keep: int) -> list[tuple[int, float]]:
        """The blocks to keep, best first, and the feature error that is left with each and those before it."""
        chosen = []
        for _ in range(min(keep, len(self.linear))):
            kept = [i for i, _ in chosen]
            errors = {i: self.feature_error([*kept, i]) for i in self.linear if i not in kept}
            best = min(errors, key=errors.get)
            chosen.append((best, errors[best]))
        return chosen


def main() -> None:
    parser = base_parser(__doc__.splitlines()[0])
    parser.add_argument('--images', required=True, help='folder with images, searched recursively')
    parser.add_argument('--keep', type=int, default=2,
                        help='number of blocks that keep softmax attention (default: %(default)s)')
    parser.add_argument('--steps', type=int, default=50,
                        help='steps of stage 1 before the second measurement (default: %(default)s)')
    parser.add_argument('--checkpoint', help='checkpoint of a finished stage 1 of CONFIG; no steps are taken')
    parser.add_argument('--batch-size', type=int, default=8, help='images in a step (default: %(default)s)')
    parser.add_argument('--measure', type=int, default=32, help='images to measure on (default: %(default)s)')
    parser.add_argument('--json', type=Path, help='also write the measurements to this file')
    args = parser.parse_args()
    for name in ('keep', 'steps', 'batch_size', 'measure'):
        if getattr(args, name) < 1:
            parser.error(f'--{name.replace("_", "-")} must be at least 1, got {getattr(args, name)}')
    with one_message():
        run(args, parser)


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    cfg = load_config(args)
    if str(cfg.model.type).removeprefix('adala_mm.') != 'AttentionAlignment':
        parser.error(f'{args.config} is no config of stage 1: its model is {cfg.model.type}')
    MMLogger.get_instance('rank_blocks', log_level='WARNING')  # MMEngine says of every parameter how it was initialised
    torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    trained = args.checkpoint and read_state_dict(args.checkpoint)
    steps = 0 if trained else args.steps
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        model.init_weights()
        model.to(device)
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        size = model.backbone.pos_grid[0] * model.backbone.patch_size
        images = draw_images(args.images, size, args.measure + steps * args.batch_size)
    if len(images) < args.measure + (args.batch_size if steps else 0):
        parser.error(f'{args.images} has {len(images)} images, and --measure {args.measure} '
                     + (f'and one batch of {args.batch_size} need more' if steps else 'needs more'))

    def normalised(some: list[Tensor]) -> Tensor:
        return model.data_preprocessor(dict(inputs=some), False)['inputs']

    held_out, train = images[:args.measure], images[args.measure:]
    ranking = Ranking(model, [normalised(held_out[i:i + args.batch_size])
                              for i in range(0, args.measure, args.batch_size)])
    swapped, swapped_features = ranking.block_errors(), ranking.feature_error()
    endless, stage1 = cycle(train), 'aligned' if trained else f'after {steps} steps'
    model.train()
    if trained:
        model.load_state_dict(trained)
    for _ in range(steps):
        model.train_step(dict(inputs=list(islice(endless, args.batch_size))), wrapper)
    aligned, features = ranking.block_errors(), ranking.feature_error()
    alone = {i: ranking.feature_error([i]) for i in ranking.linear}
    chosen = ranking.greedy(args.keep)

    gains = {i: features - alone[i] for i in alone}
    print(markdown_table(
        ['block', 'error: swap', stage1, 'feature error with it softmax', 'gain'],
        [[str(i), f'{swapped[i]:.3f}', f'{aligned[i]:.3f}', f'{alone[i]:.4f}', f'{gains[i]:+.4f}']
         for i in sorted(gains, key=lambda i: -gains[i])]))
    depth = len(model.backbone.blocks)
    kept = {i for i in range(depth) if i not in ranking.linear}
    print(f'\nfeature error: swap {swapped_features:.4f}, {stage1} {features:.4f} '
          f'({len(kept)} softmax / {depth - len(kept)} linear blocks)')
    for i, error in chosen:
        kept.add(i)
        print(f'  + block {i}: {error:.4f} ({len(kept)} / {depth - len(kept)})')
    print('attention=[softmax if i in ' + f'{tuple(sorted(kept))} else linear for i in range({depth})]')
    if args.json:
        save(args.json, dict(
            config=Path(args.config).stem, images=len(held_out), batch_size=args.batch_size,
            **(dict(checkpoint=args.checkpoint) if trained else dict(steps=args.steps)),
            feature_error=dict(swap=swapped_features, stage1=features),
            blocks=[dict(block=i, swap=swapped[i], stage1=aligned[i], feature_error_kept=alone[i]) for i in gains],
            kept=[dict(block=i, feature_error=error) for i, error in chosen]))


if __name__ == '__main__':
    main()
