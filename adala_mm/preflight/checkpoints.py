"""Checks every checkpoint that the run starts from: it exists, is safe to read, and fits the model."""
from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from adala_mm.models.algorithms.base import Alignment
from adala_mm.models.algorithms.task_model_alignment import TaskModelAlignment
from adala_mm.models.backbones import AdaLAViT, L2ViT
from adala_mm.models.backbones.weights import load_vit, misfits, positions_for
from adala_mm.preflight.plan import Plan
from adala_mm.preflight.report import ERROR, OK, WARNING, Finding, one_line
from adala_mm.utils.checkpoint import TIMM, hub_file, hub_url, read_state_dict
from adala_mm.utils.normalisation import other_normalisation, stated_normalisation

FAMILY = 'name a file of the family that the config describes; tools/convert_vfm.py converts (docs/weights.md)'


def checkpoints(plan: Plan) -> Iterator[Finding]:
    """Pretrained weights of all networks, of the teacher's classification head, and ``load_from``."""
    nothing = True
    for name, network in plan.networks.items():
        init = getattr(network, 'init_cfg', None)
        for one in init if isinstance(init, (list, tuple)) else [init]:
            if (one or {}).get('type') == 'Pretrained':
                nothing = False
                yield pretrained(plan, name, network, one)
    if isinstance(plan.model, Alignment):
        for role in ('backbone', 'teacher'):
            network = plan.networks.get(role)
            if network is not None and (network.init_cfg or {}).get('type') != 'Pretrained':
                nothing = False
                yield Finding(f'checkpoint of {role}', ERROR, 'no pretrained weights: alignment would distil noise',
                              f'--cfg-options model.{role}.init_cfg.type=Pretrained '
                              f'model.{role}.init_cfg.checkpoint=FILE')
        if plan.model.head is not None:
            nothing = False
            yield teacher_head(plan, plan.model.head['checkpoint'])
    if isinstance(plan.model, TaskModelAlignment):
        nothing = False
        yield fine_tuned(plan)
    if plan.cfg.get('load_from'):
        nothing = False
        yield whole_model(plan, plan.cfg.load_from)
    if nothing:
        yield Finding('checkpoint', OK, 'none: training starts from random weights')


def normalisation(plan: Plan) -> Iterator[Finding]:
    """The images are normalised as those were that the networks were pretrained on, where their files say it."""
    preprocessor = plan.cfg.model.get('data_preprocessor') or plan.cfg.get('data_preprocessor') or {}
    mean, std = preprocessor.get('mean'), preprocessor.get('std')
    named = {str(init['checkpoint']) for network in plan.networks.values()
             for init in [getattr(network, 'init_cfg', None)] if isinstance(init, dict) and init.get('checkpoint')}
    stated = sorted(path for path in named if stated_normalisation(path))
    found = [difference for path in stated if (difference := other_normalisation(path, mean, std))]
    for difference, fix in found:
        yield Finding('normalisation', WARNING, difference, fix)
    if stated and mean is not None and not found:
        yield Finding('normalisation', OK, f'mean and std are those of {", ".join(stated)}')


def pretrained(plan: Plan, name: str, network: nn.Module, init: dict) -> Finding:
    """One network's ``init_cfg``: loaded for real, by the network's own rules, into memory that is freed again."""
    title, path = f'checkpoint of {name}', str(init.get('checkpoint'))
    if absent := not_here(plan, title, path):
        return absent
    try:
        if isinstance(network, AdaLAViT):
            doubts = load_vit(copy.deepcopy(network).to_empty(device='cpu'), init)
            return Finding(title, WARNING if doubts else OK, '; '.join([f'{path} fits', *doubts]))
        if isinstance(network, L2ViT):
            copy.deepcopy(network).to_empty(device='cpu').init_weights()
            return Finding(title, OK, f'{path} fits')
        state, prefix = read_state_dict(path), init.get('prefix', '')
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        return fit(title, path, network, state)
    except Exception as error:  # as training would raise it
        message = one_line(error)
        return Finding(title, ERROR, message if path in message else f'{path}: {message}', FAMILY)


def teacher_head(plan: Plan, path: str) -> Finding:
    title = "checkpoint of the teacher's head"
    if absent := not_here(plan, title, path):
        return absent
    if 'head.weight' not in read_state_dict(path):
        return Finding(title, ERROR, f'{path} has no classification head (head.weight, head.bias)',
                       'leave out model.head, or name a file with one')
    return Finding(title, OK, f'{path} has one')


def fine_tuned(plan: Plan) -> Finding:
    title, path = 'checkpoint of the teacher', plan.model.checkpoint
    if absent := not_here(plan, title, path):
        return absent
    state, wanted = plan.model.read_teacher(), plan.model.frozen['teacher'].state_dict()
    if table := misfits(*({key: tuple(value.shape) for key, value in one.items()} for one in (state, wanted))):
        return Finding(title, ERROR, f'{path} does not fit:\n{table}', 'name the fine-tuned softmax model, as a whole, '
                       'of the same config: --cfg-options model.teacher.checkpoint=FILE')
    return Finding(title, OK, f'{path} fits')


def whole_model(plan: Plan, path: str) -> Finding:
    title = 'load_from'
    if '://' in path:
        return Finding(title, WARNING, f'{path} will be downloaded on first use; unchecked', '')
    if absent := not_here(plan, title, path):
        return absent
    state = CheckpointLoader.load_checkpoint(path, map_location='cpu')
    return fit(title, path, plan.model, positions_for(plan.model, state.get('state_dict', state)))


def fit(title: str, path: str, network: nn.Module, state: dict) -> Finding:
    """Compares the keys and shapes of a file with a network's; MMEngine would load only those that fit."""
    wanted = network.state_dict()
    reshaped = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    missing, left = [key for key in wanted if key not in state], [key for key in state if key not in wanted]
    if reshaped or len(missing) == len(wanted):
        keys = ', '.join((reshaped or missing)[:3])
        return Finding(title, ERROR, f'{path} does not fit: {keys} {"have another shape" if reshaped else "missing"}',
                       FAMILY)
    if missing or left:
        return Finding(title, WARNING, f'{path} fits in part: {len(missing)} tensors missing, {len(left)} not used '
                       f'({", ".join((missing or left)[:3])})', 'if that is not meant, name another file')
    return Finding(title, OK, f'{path} fits')


def not_here(plan: Plan, title: str, path: str) -> Finding | None:
    """A finding for a file that cannot be looked into; None if it can."""
    if path.startswith(TIMM):
        return not_downloaded(title, path)
    file = Path(path).expanduser()
    if file.exists():
        return None
    made = sorted(file.parent.glob('*.pth'), key=lambda other: other.stat().st_mtime)
    config = writer(file, Path(plan.cfg.filename))
    if config is None:
        return Finding(title, ERROR, f'no checkpoint at {path}',
                       'check the path, or name another file with --cfg-options model....checkpoint=FILE')
    config, option = config
    command = f'python tools/train.py {config}' if plan.processes == 1 else \
        f'bash tools/dist_train.sh {config} {plan.processes}'
    found = f'{path} has not been written yet' + (f'; there is {made[-1].name}' if made else '')
    stage = config.stem.split('_')[0]
    first = {'stage1': 'run stage 1 first', 'stage2': 'run stage 2 first'}.get(stage, f'run {config.stem} first')
    return Finding(title, ERROR, found, f'{first}: {command}{option}{" --resume" if made else ""}')


def not_downloaded(title: str, path: str) -> Finding | None:
    name = path.removeprefix(TIMM)
    try:
        repository, file = hub_file(name)
    except ValueError as error:
        found, _, fix = str(error).partition('; ')
        return Finding(title, ERROR, found, fix)
    if isinstance(huggingface_hub.try_to_load_from_cache(repository, file), str):
        return None
    try:
        size = huggingface_hub.get_hf_file_metadata(hub_url(name), timeout=10).size
    except Exception as error:  # no connection, no such file, offline mode: half a dozen types
        return Finding(title, ERROR, f'{path} is not here and cannot be downloaded ({type(error).__name__})',
                       f'fetch {hub_url(name)} and name that file with --cfg-options '
                       'model....init_cfg.checkpoint=FILE')
    return Finding(title, WARNING, f'{path} is not here yet: {size / 1e9:.1f} GB to download on first use, unchecked',
                   f'hf download {repository} {file}')


def writer(file: Path, config: Path) -> tuple[Path, str] | None:
    """The config whose run writes ``file``, by the name of its folder, and the option that it then needs."""
    name, config = file.parent.name, config.resolve()
    root = next((folder for folder in config.parents if folder.name == 'configs'), config.parent)
    for found in sorted(root.rglob(f'{name}.py')):
        if '_base_' not in found.parts:
            return shown(found), ''
    beside = sorted(config.parent.glob(f'{name}_*.py'), key=lambda path: len(path.name))
    return (shown(beside[0]), f' --work-dir {file.parent}') if name and beside else None


def shown(path: Path) -> Path:
    """Relative to here, if it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
