"""What the command lines of `tools/` share, in the grammar of mmseg."""
from __future__ import annotations

import argparse
import difflib
import gc
import multiprocessing
import os
import subprocess
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction

import adala_mm.openmmlab  # noqa: F401  safe loading and the rest, for every tool
from adala_mm.utils.checkpoint import TRUST
from adala_mm.utils.compose import CONFIGS, composable, composed
from adala_mm.utils.inert_lines import refuse_inert_lines
from adala_mm.utils.stack import import_quietly, require_stack
from adala_mm.utils.weight_files import UnreadableCheckpoint


def base_parser(description: str) -> argparse.ArgumentParser:
    """Parser with the options that all tools share which read a config."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file, or name of a config of adala_mm, such as stage1_dinov2l_coco')
    parser.add_argument('--work-dir',
                        help='folder for logs, checkpoints and results (default: ./work_dirs/<config name>)')
    parser.add_argument('--data-root', help='use this folder where the config says data/')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='override entries of the config, as train_dataloader.batch_size=4 model.backbone.depth=2')
    parser.add_argument('--trust-checkpoint', action='store_true',
                        help='unpickle whatever a checkpoint holds, which can run any code; for your own files only')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none',
                        help='how the processes are started; the shell scripts set this (default: %(default)s)')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


def find_config(name: str) -> Path:
    """A config file, or one of adala_mm's own by name: ``demo/stage1_demo_beacons.py``, or ``stage1_demo_beacons``.

    A file comes first. What stands in a folder of another name than ours is a file, or a mistake. Names that have no
    file, ``mask2former_clipl_linformer_native_ade20k``, are composed (`adala_mm.utils.compose`).

    Raises:
        FileNotFoundError: if there is neither, with names that look alike.
    """
    if Path(name).is_file():
        return Path(name)
    wanted = Path(name.removeprefix('adala_mm::').removeprefix('configs/'))
    own = {path.relative_to(CONFIGS).with_suffix(''): path.resolve() for path in CONFIGS.glob('[!_]*/*.py')}
    for short, path in own.items():
        if wanted.with_suffix('') in (short, Path(short.name)):
            print(f'config: {path}', flush=True)
            return path
    if (key := str(wanted.with_suffix(''))) in composable():
        print(f'config: {key}, composed from {composable()[key][0]}', flush=True)
        return composed(key)
    near = difflib.get_close_matches(wanted.stem, [*(short.name for short in own), *composable()])
    raise FileNotFoundError(f'no config at {name}, and adala_mm has none of that name'
                            + (f'; names like it: {", ".join(near)}' if near else ''))


def load_config(args: argparse.Namespace) -> Config:
    """Config of the command line: file, then ``--data-root``, then ``--cfg-options``.

    Raises:
        FileNotFoundError: if there is no such config.
        ValueError: if a line of it, or an option, would change nothing, or an option does not fit.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    path = find_config(args.config)
    require_stack()
    if args.trust_checkpoint:
        os.environ[TRUST] = '1'
    try:
        cfg = Config.fromfile(path)
    except NameError as error:
        if error.name != 'backbone':
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"{place.filename}, line {place.lineno}: {error}. A finished config has its network in model['backbone'] "
            "and nowhere else: model['backbone']['attention'] = dict(type=...)") from error
    refuse_inert_lines(cfg, args.cfg_options or ())
    scopes = dict.fromkeys(('mmpretrain', 'mmseg', cfg.get('default_scope', 'mmseg')))  # every run imports these
    import_quietly(*(f'{scope}.datasets' for scope in scopes))
    if args.data_root:
        cfg.merge_from_dict(relocate(cfg.to_dict(), args.data_root))
    for key, value in (args.cfg_options or {}).items():
        try:
            cfg.merge_from_dict({key: value})
        except (IndexError, KeyError, TypeError) as error:
            raise ValueError(f'--cfg-options {key}={value} does not fit the config: {error}') from error
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'./work_dirs/{Path(args.config).stem}'
    join_cpu_processes(cfg)
    return cfg


def relocate(node: Any, root: str) -> Any:
    """A copy of ``node`` in which every string ``data`` or ``data/...`` starts at ``root`` instead."""
    if isinstance(node, dict):
        return {key: relocate(value, root) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(relocate(value, root) for value in node)
    if isinstance(node, str) and (node == 'data' or node.startswith('data/')):
        return root.rstrip('/') + node[len('data'):]
    return node


def absent_data(cfg: Config, loader: str) -> Iterator[tuple[Path, str]]:
    """What a loader's data set names that is not there: paths, with 'does not exist' or 'is empty'.

    The embedded data set draws itself and is left to itself.
    """
    dataset = (cfg.get(loader) or {}).get('dataset', {})
    while 'dataset' in dataset:  # wrappers such as RepeatDataset
        dataset = dataset['dataset']
    if not dataset.get('data_root') or dataset.get('type') == 'adala_mm.BeaconsDataset':
        return
    root = Path(dataset['data_root'])
    prefix = dataset.get('data_prefix') or ''
    parts = [*(prefix.values() if isinstance(prefix, dict) else [prefix]), dataset.get('ann_file') or '']
    if str(dataset.get('type')).endswith('ImageNet'):
        parts.append(dataset.get('split') or '')
    inside = [root / part for part in parts if part]
    for path in ([root] if not root.exists() else inside or [root]):
        if not path.exists():
            yield path, 'does not exist'
        elif path.is_dir() and not any(path.iterdir()):
            yield path, 'is empty'


def data_advice(loader: str) -> str:
    """What to do about data that `absent_data` misses."""
    return ('Put the data set there (configs/adala/README.md shows the layouts), or name its place with --data-root '
            f'DIR or --cfg-options {loader}.dataset.data_root=DIR')


def check_data(cfg: Config, loaders: tuple[str, ...]) -> None:
    """Raises FileNotFoundError, naming loader, path and fix, for the first thing that `absent_data` misses."""
    for loader in loaders:
        for path, state in absent_data(cfg, loader):
            raise FileNotFoundError(f'{loader}: {path} {state}. {data_advice(loader)}')


@contextmanager
def one_message() -> Iterator[None]:
    """Ends the program with one message, not a traceback, if what the user named is not there or does not fit."""
    try:
        yield
    except (ImportError, OSError, ValueError, TypeError) as error:
        raise SystemExit(f'error: {error}') from error


@contextmanager
def message_for_files() -> Iterator[None]:
    """Ends the program with one message for a file that is not there, or a checkpoint that cannot be read.

    Other errors keep their traceback, as they may come from code of the user's.
    """
    try:
        yield
    except (FileNotFoundError, UnreadableCheckpoint) as error:
        raise SystemExit(f'error: {error}') from error


def scale_learning_rate(cfg: Config, parser: argparse.ArgumentParser) -> None:
    """What ``--auto-scale-lr`` asks for; ends the program if the config has no batch that its rate is meant for."""
    if 'auto_scale_lr' not in cfg:
        parser.error(f'--auto-scale-lr: {cfg.filename} does not say which total batch its learning rate is for; add '
                     'auto_scale_lr = dict(enable=False, base_batch_size=...)')
    cfg.auto_scale_lr.enable = True


def join_cpu_processes(cfg: Config) -> None:
    """Connects the processes of a run without GPUs by gloo; MMEngine itself would ask CUDA for a device.

    Raises:
        ValueError: if the launcher is Slurm, but srun has not started this process.
    """
    if cfg.launcher not in ('pytorch', 'slurm') or torch.cuda.is_available():
        return
    if cfg.launcher == 'slurm':
        if 'SLURM_PROCID' not in os.environ:
            raise ValueError('--launcher slurm: this process was not started by srun; use tools/slurm_train.sh')
        for name, source in dict(RANK='PROCID', LOCAL_RANK='LOCALID', WORLD_SIZE='NTASKS').items():
            os.environ[name] = os.environ[f'SLURM_{source}']
        os.environ.setdefault('MASTER_PORT', '29500')
        if 'MASTER_ADDR' not in os.environ:
            hosts = subprocess.check_output(['scontrol', 'show', 'hostname', os.environ['SLURM_NODELIST']], text=True)
            os.environ['MASTER_ADDR'] = hosts.split()[0]
    torch.distributed.init_process_group('gloo')
    cfg.sync_bn = None  # PyTorch's synchronised BatchNorm is for GPUs only
    cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False,
                                 find_unused_parameters=cfg.get('find_unused_parameters', False))


def leave_processes() -> None:
    """Ends a distributed run in step; the caller must hold nothing of it any more.

    A process that just exits makes the others' open connections abort. A model that is still there at the
    interpreter's end holds its process group, whose threads then abort the process itself. And a model that is the last
    to hold the group destroys it under Python's lock, for which a thread of gloo may be waiting: both would wait for
    ever. So models go first, and the group last, which PyTorch destroys without that lock.
    """
    if torch.distributed.is_initialized():
        for child in multiprocessing.active_children():
            if child.daemon:  # a loader's worker: it would be waited for, five seconds, when the loader is collected
                child.terminate()
        gc.collect()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
