"""Measures the images/s that the data loader of a config delivers, for several numbers of worker processes.

    python tools/analysis_tools/benchmark_loader.py configs/adala/stage2_dinov2l_in22k.py [--workers 0 1 2 4 8]
        [--data-root DATA] [--cfg-options KEY=VALUE ...] [--training work_dirs/benchmarks/training.json]

It measures the training data of the config: reading, decoding and augmentation. The clock starts when the workers have
filled their queues. Images/s per core are images per second of processor time, summed over all processes. They also
hold on a busy machine, and exceed images/s if the workers wait for the disk. With --training, a record of
benchmark_training.py, it says whether training would wait for the loader. The first run also lists the images and keeps
the list, if the config has an ``index_dir``. Writes JSON.
"""
from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.utils.dl_utils import set_multi_processing
from torch.utils.data import DataLoader, Dataset

from adala_mm.registry import DATASETS
from adala_mm.utils.cli import check_data, find_config, one_message, relocate
from adala_mm.utils.inert_lines import refuse_inert_lines
from adala_mm.utils.machine import cores, hardware
from adala_mm.utils.records import save, settings
from adala_mm.utils.tables import markdown_table


def core_seconds(wall: float, workers: int) -> float:
    """Processor time that this process and its workers have had so far; without /proc, as if none ever waited."""
    if not Path('/proc/self/stat').exists():
        return wall * min(max(workers, 1), cores())
    ticks = 0
    for pid in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
        ticks += int(fields[11]) + int(fields[12])  # in user and in system mode
    return ticks / os.sysconf('SC_CLK_TCK')


def open_dataset(config: str, data_root: str | None, options: dict | None = None) -> tuple[Config, Dataset]:
    """A config, with another place for its data and other options, and the data set that it trains on.

    Raises:
        FileNotFoundError: if the data are not there.
        ValueError: if the config has no training data, or an option would change nothing.
    """
    cfg = Config.fromfile(find_config(config))
    refuse_inert_lines(cfg, options or ())
    if data_root:
        cfg.merge_from_dict(relocate(cfg.to_dict(), data_root))
    cfg.merge_from_dict(options or {})
    if not cfg.get('train_dataloader'):
        raise ValueError(f'{config} has no train_dataloader')
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    check_data(cfg, ('train_dataloader',))
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    dataset.full_init()
    return cfg, dataset


def make_loader(cfg: Config, dataset: Dataset, workers: int, batch: int | None) -> DataLoader:
    options = cfg.train_dataloader.to_dict() | dict(dataset=dataset, num_workers=workers)
    options['batch_size'] = batch or options['batch_size']
    if not workers:  # there is nobody to keep or to read ahead
        options = {key: value for key, value in options.items() if key not in ('persistent_workers', 'prefetch_factor')}
    return Runner.build_dataloader(options, seed=0)


def endless(loader: DataLoader) -> Iterator[dict]:
    for epoch in itertools.count():
        if hasattr(loader.sampler, 'set_epoch'):
            loader.sampler.set_epoch(epoch)
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError(f'{len(loader.dataset):,} images do not fill a batch of {loader.batch_size}: give a '
                             'smaller --batch')


def measure(loader: DataLoader, seconds: float) -> dict:
    """Images/s once the workers' queues are full, and how many of them stand in for unreadable ones."""
    stream, workers = endless(loader), loader.num_workers
    for _ in range(1 + workers * (loader.prefetch_factor or 0)):  # what was read before it was asked for
        next(stream)
    images = corrupt = 0
    start, busy = time.perf_counter(), core_seconds(time.perf_counter(), workers)
    for batch in stream:
        images += len(batch['inputs'])
        corrupt += sum('corrupt' in sample for sample in batch.get('data_samples') or [])
        if (spent := time.perf_counter() - start) >= seconds:
            break
    busy = core_seconds(time.perf_counter(), workers) - busy
    del stream  # ends the workers
    return dict(workers=workers, images=images, seconds=spent, core_seconds=busy, corrupt=corrupt,
                images_per_s=images / spent, images_per_s_per_core=images / max(busy, 0.01))


def loader_table(rows: list[dict]) -> str:
    return markdown_table(['workers', 'images/s', 'images/s per core', 'unreadable'],
                          [[str(row['workers']), f'{row["images_per_s"]:.1f}', f'{row["images_per_s_per_core"]:.1f}',
                            f'{row["corrupt"]:,} of {row["images"]:,}'] for row in rows])


def demands(record: Path) -> dict[str, float]:
    """Images/s that each training step of a record of benchmark_training.py takes.

    Raises:
        ValueError: for another file.
    """
    try:
        training = json.loads(record.read_text())
        return {f'stage {row["stage"]}, {row["version"]}': 1000 * training['settings']['batch'] / row['ms']
                for row in training['rows'] if 'ms' in row}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'--training {record}: no record of benchmark_training.py ({error!r})') from error


def verdict(name: str, wanted: float, rows: list[dict]) -> str:
    """Whether the measured loader keeps up with a training step, and how many cores would."""
    best = max(rows, key=lambda row: row['images_per_s'])
    needed = math.ceil(wanted / max(row['images_per_s_per_core'] for row in rows))
    text = f'{name}, {wanted:.1f} images/s: '
    if best['images_per_s'] >= wanted:
        enough = min(row['workers'] for row in rows if row['images_per_s'] >= wanted)
        return text + f'the loader keeps up with {enough} workers ({needed} cores)'
    waiting = 100 * (1 - best['images_per_s'] / wanted)
    return text + (f'would wait for data {waiting:.0f} % of the time with {best["workers"]} workers; '
                   f'needs {needed} cores at the measured speed of one')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config, as in tools/train.py; its train_dataloader is measured')
    parser.add_argument('--workers', nargs='+', type=int,
                        help='numbers of worker processes (default: 0, 1, 2, 4 ... up to the number of cores)')
    parser.add_argument('--batch', type=int, help="images in a batch (default: the config's)")
    parser.add_argument('--seconds', type=float, default=10.0,
                        help='seconds to measure each number of workers (default: %(default)s)')
    parser.add_argument('--data-root', help='use this folder where the config says data/')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='override entries of the config')
    parser.add_argument('--training', help='record of benchmark_training.py; shows whether its steps would wait')
    parser.add_argument('--out', default='work_dirs/benchmarks/loader.json',
                        help='file to write (default: %(default)s)')
    args = parser.parse_args()
    if args.training and not Path(args.training).is_file():
        parser.error(f'--training: no record at {args.training}; tools/analysis_tools/benchmark_training.py writes one')
    args.workers = args.workers or [0] + [2 ** i for i in range(cores().bit_length())]
    with one_message():
        run(args)


def run(args: argparse.Namespace) -> None:
    training = args.training and demands(Path(args.training))
    cfg, dataset = open_dataset(args.config, args.data_root, args.cfg_options)
    set_multi_processing(**cfg.get('env_cfg', {}).get('mp_cfg', {}))
    torch.set_num_threads(1)  # as in the workers
    print(f'{len(dataset):,} images, {cores()} cores', flush=True)
    rows = []
    for workers in args.workers:
        rows.append(measure(make_loader(cfg, dataset, workers, args.batch), args.seconds))
        print(f'{workers} workers: {rows[-1]["images_per_s"]:.1f} images/s', flush=True)
    record = dict(config=Path(args.config).stem, images=len(dataset), rows=rows, machine=hardware(torch.device('cpu')),
                  settings={key: value for key, value in settings(args).items() if key != 'training'} | dict(
                      batch=args.batch or cfg.train_dataloader.batch_size), cores=cores())
    print(loader_table(rows))
    if args.training:
        record['demands'] = training
        for name, wanted in record['demands'].items():
            print(f'- {verdict(name, wanted, rows)}')
    save(args.out, record)


if __name__ == '__main__':
    main()
