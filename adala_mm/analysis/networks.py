"""Teacher and students of an analysis, each named by a config and a checkpoint."""
from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config

from adala_mm.export import assemble, load
from adala_mm.models.backbones import AdaLAViT
from adala_mm.utils.checkpoint import checkpoint_sha256
from adala_mm.utils.cli import load_config

SPEC = re.compile(r'(?:(?P<name>[^=/:]+)=)?(?P<config>.+?\.(?:py|json|ya?ml))(?::(?P<checkpoint>.+))?')
SOFTMAX = dict(type='adala_mm.SoftmaxAttention')
STAGES = ('AttentionAlignment', 'FeatureAlignment', 'TaskModelAlignment')  # what learns from a teacher in its config


@dataclass(frozen=True)
class Spec:
    """What the command line says of a network: ``[NAME=]CONFIG[:CHECKPOINT]``."""

    name: str
    config: str
    checkpoint: str | None

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Reads one; without a name it is that of the config's file, with the checkpoint's if there is one.

        Raises:
            argparse.ArgumentTypeError: for anything else.
        """
        match = SPEC.fullmatch(text)
        if match is None:
            raise argparse.ArgumentTypeError(f'{text!r} is not [NAME=]CONFIG[:CHECKPOINT] with a config in .py, .json '
                                             'or .yaml')
        name, config, checkpoint = match.groups()
        parts = [Path(config).stem] + ([Path(checkpoint).stem] if checkpoint else [])
        return cls(name or ' '.join(parts), config, checkpoint)


@dataclass(frozen=True)
class Network:
    """A ViT to be looked into.

    Args:
        name: in tables and pictures.
        model: in evaluation mode, frozen.
        preprocessor: ``data_preprocessor`` of its config.
        size: (H, W) for which its position embeddings are stored.
        cfg: the whole config.
        record: where it came from, for the JSON file.
    """

    name: str
    model: AdaLAViT
    preprocessor: dict
    size: tuple[int, int]
    cfg: Config
    record: dict


def read_config(spec: Spec, args: argparse.Namespace) -> Config:
    """The config that ``spec`` names, with the command line's ``--data-root`` and ``--cfg-options``."""
    options = dict(launcher='none', local_rank=0, work_dir=None) | vars(args) | dict(config=spec.config)
    return load_config(argparse.Namespace(**options))


def open_network(name: str, cfg: Config, spec: Spec, size: Sequence[int] | None = None) -> Network:
    """Builds the backbone that ``cfg`` has, of any stage, and loads it strictly.

    Args:
        size: (H, W) that the patch must divide; None for no other than its own.

    Raises:
        ValueError: if there is no backbone of ours, or its weights or ``size`` do not fit.
        FileNotFoundError: if there is no such checkpoint.
    """
    kind = ((cfg.get('model') or {}).get('backbone') or {}).get('type')
    if str(kind).removeprefix('adala_mm.') != 'AdaLAViT':
        raise ValueError(f'{spec.config}: its backbone is {kind or "missing"}, and only blocks of adala_mm.AdaLAViT '
                         'can be looked into')
    try:
        target = assemble(cfg, size=size)
        load(target, cfg, spec.checkpoint)
    except (OSError, ValueError) as error:
        raise type(error)(f'{name} ({spec.config}): {error}') from error
    model = target.model
    file = spec.checkpoint or cfg.model.backbone.init_cfg.checkpoint
    record = dict(name=name, config=spec.config, checkpoint=file, sha256=checkpoint_sha256(file),
                  fingerprint=model.loaded[1], attention=target.notes['attention'],
                  **model.block_counts)
    return Network(name, model, dict(cfg.model.get('data_preprocessor') or {}), target.size, cfg, record)


def teacher_config(cfg: Config) -> Config | None:
    """``cfg`` with the softmax ViT as its backbone that it aligns with or, outside of a stage, is; None without one."""
    model = cfg.get('model') or {}
    kind = str(model.get('type')).removeprefix('adala_mm.')
    cfg = copy.deepcopy(cfg)
    if kind == 'FeatureAlignment':
        cfg.model.backbone = cfg.model.teacher
    elif kind == 'AttentionAlignment':  # new dicts: MMEngine's `update` would keep the old ones' options
        cfg.model.backbone = dict(cfg.model.backbone, attention=SOFTMAX, trainable=None)
    elif kind == 'TaskModelAlignment':  # the backbone of the fine-tuned model
        cfg.model.backbone = dict(cfg.model.backbone, attention=SOFTMAX, trainable=None, init_cfg=cfg.model.teacher)
    else:
        attention = (model.get('backbone') or {}).get('attention')
        layers = [attention] if isinstance(attention, dict) else attention or []
        if not layers or any(str(layer['type']) != SOFTMAX['type'] for layer in layers):
            return None
    return cfg


def is_stage(cfg: Config) -> bool:
    return str((cfg.get('model') or {}).get('type')).endswith(STAGES)


def load_networks(teacher: Spec | None, students: Sequence[Spec], args: argparse.Namespace,
                  size: Sequence[int] | None = None) -> tuple[Network, list[Network]]:
    """Teacher and students, on the command line's device.

    Without a ``teacher`` it is the one that the students' stage configs name.

    Raises:
        ValueError: for names that are not distinct, students of different teachers or none at all, a teacher that is
            not softmax in all blocks, and as `open_network`.
    """
    require_distinct('network', [spec.name for spec in students] + ['teacher'])
    configs = [read_config(spec, args) for spec in students]
    if teacher is None:
        found = {}
        for spec, cfg in zip(students, configs, strict=True):
            if is_stage(cfg) and (own := teacher_config(cfg)):
                found.setdefault(str((own.model.backbone.get('init_cfg') or {}).get('checkpoint')), (spec, own))
        if len(found) != 1:
            what = f'different teachers ({", ".join(found)})' if found else 'none: no config is of an alignment'
            raise ValueError(f'one teacher is needed, and these students name {what}. Say --teacher '
                             'CONFIG[:CHECKPOINT]')
        (spec, cfg), = found.values()
        spec = Spec('teacher', spec.config, None)
    else:
        spec, base = Spec('teacher', teacher.config, teacher.checkpoint), read_config(teacher, args)
        if is_stage(base) and teacher.checkpoint:
            raise ValueError(f'--teacher {teacher.config}: what a stage writes is a student. Leave out the checkpoint, '
                             'and the teacher of the stage is taken')
        cfg = teacher_config(base)
        if cfg is None:
            raise ValueError(f'--teacher {teacher.config}: its backbone has no softmax attention in all of its blocks, '
                             'so it is a student')
    device = torch.device(args.device)
    opened = [open_network('teacher', cfg, spec, size),
              *(open_network(spec.name, cfg, spec, size) for spec, cfg in zip(students, configs, strict=True))]
    for network in opened:
        network.model.to(device)
    return opened[0], opened[1:]


def require_distinct(what: str, names: Sequence[str], form: str = 'CONFIG:CHECKPOINT') -> None:
    """Raises ValueError if two of what the command line names, each as NAME=``form``, are called alike."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f'more than one {what} is called {", ".join(twice)}: give them names, NAME={form}')


def require_equal(teacher: Network, students: Sequence[Network], *facts: str) -> None:
    """Raises ValueError, naming the fact, if a student and the teacher cannot be compared.

    Args:
        facts: of ``embed_dim``, ``depth``, ``patch_size``, ``num_prefix``.
    """
    for student in students:
        for fact in facts:
            ours, theirs = (len(n.model.blocks) if fact == 'depth' else getattr(n.model, fact)
                            for n in (student, teacher))
            if ours != theirs:
                raise ValueError(f'{student.name} and the teacher differ in {fact} ({ours} and {theirs}): they cannot '
                                 'be compared')
