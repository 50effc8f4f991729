"""Estimates what training a config would cost: multiply-adds, memory of a GPU, disk for checkpoints.

    python tools/analysis_tools/estimate_costs.py stage1_dinov2l_coco stage2_dinov2l_in22k [--gpus 8] [--images N] \
        [--out costs.json]

The estimate follows from shapes alone; it needs neither data nor weights nor a GPU. docs/costs.md shows it for the
paper's recipes.
"""
from __future__ import annotations

import argparse
import logging
from types import SimpleNamespace

from mmengine.registry import DefaultScope

from adala_mm.preflight import Plan
from adala_mm.preflight.cost import training_multiply_adds
from adala_mm.preflight.disk import checkpoints
from adala_mm.preflight.memory import GIB, estimate
from adala_mm.preflight.sizes import training_size
from adala_mm.utils.cli import load_config, one_message
from adala_mm.utils.records import save
from adala_mm.utils.tables import markdown_table


def costs(config: str, gpus: int) -> dict:
    """Facts of one training run; memory is estimated for float32, and for bfloat16 as ``--amp`` has it."""
    cfg = load_config(SimpleNamespace(config=config, local_rank=0, launcher='none', work_dir=None, data_root=None,
                                      cfg_options=None, trust_checkpoint=False))
    memory = []
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmseg')):
        plan = Plan(cfg, processes=gpus)
        height, width = training_size(plan)
        batch, loop = cfg.train_dataloader.batch_size, cfg.train_cfg
        facts = dict(
            config=config, height=height, width=width, batch=batch, gpus=gpus, epochs=loop.get('max_epochs'),
            iterations=loop.get('max_iters'), training_multiply_adds=training_multiply_adds(plan, height, width),
            checkpoints=checkpoints(plan))
        for wrapper in ({}, dict(type='AmpOptimWrapper', dtype='bfloat16')):
            cfg.optim_wrapper.update(wrapper)
            memory.append(round(estimate(Plan(cfg, processes=gpus))(batch, height, width) / GIB, 1))
    return facts | dict(gib=memory)


def table(rows: list[dict], images: int | None) -> str:
    """A row a run; the whole of it, in 10^15 multiply-adds, where the length of an epoch is known or not needed."""
    def whole(row: dict) -> str:
        seen = row['iterations'] and row['iterations'] * row['batch'] * row['gpus']
        seen = seen or (images and row['epochs'] * images)
        return f'{seen * row["training_multiply_adds"] / 1e15:,.2f}' if seen else 'say --images'

    return markdown_table(
        ['config', 'image', '10⁹ multiply-adds an image', '10¹⁵ in all', 'GiB a GPU, float32 / bfloat16',
         'checkpoints'],
        [[row['config'], f'{row["height"]} x {row["width"]}', f'{row["training_multiply_adds"] / 1e9:,.1f}', whole(row),
          ' / '.join(map(str, row['gib'])), '{} x {:.2f} GB'.format(row['checkpoints'][0], row['checkpoints'][1] / 1e9)]
         for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', nargs='+', help='configs, as in tools/train.py')
    parser.add_argument('--gpus', type=int, default=8,
                        help='processes of a run (default: %(default)s, as in the paper)')
    parser.add_argument('--images', type=int, help='images in an epoch; needed if the config counts epochs')
    parser.add_argument('--out', help='also write the figures to this JSON file')
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    with one_message():
        rows = [costs(config, args.gpus) for config in args.configs]
    print(table(rows, args.images))
    if args.out:
        save(args.out, dict(rows=rows))


if __name__ == '__main__':
    main()
