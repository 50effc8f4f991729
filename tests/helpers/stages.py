"""Short runs of both stages on a few drawn pictures."""
from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import nn

from adala_mm.engine import DeadLossHook, NonFiniteHook, TeacherDriftHook
from adala_mm.registry import MODELS
from helpers import LINEAR, tiny_vit

NUMBER = itertools.count()
BATCH = 2
SGD = dict(type='SGD', lr=0.1)
ADAMW = dict(type='AdamW', lr=0.01, weight_decay=0.1)


class Pictures(torch.utils.data.Dataset):
    """``numbers[i]`` is what picture i shows, equal numbers being equal pictures; a negative one has a NaN pixel."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict:
        number = self.numbers[index]
        image = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(abs(number)))
        if number < 0:
            image[1, 5, 7] = float('nan')
        return dict(inputs=image, data_samples=BaseDataElement(metainfo=dict(img_path=f'{number}.jpg')))


def pictures(batches: int, bad: tuple[int, ...] = ()) -> list[int]:
    """Numbers of as many batches, those in ``bad`` (from 1) with a NaN in their second picture."""
    numbers = list(range(1, batches * BATCH + 1))
    for batch in bad:
        numbers[batch * BATCH - 1] *= -1
    return numbers


class Act(Hook):
    """Calls ``act(runner)`` before every iteration."""

    def __init__(self, act: Callable[[Runner], None]) -> None:
        self.act = act

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.act(runner)


class Norms(BaseModel):
    """A network with batch norm."""

    def __init__(self) -> None:
        super().__init__(dict(type='ImgDataPreprocessor'))
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1))

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return {'loss': self.layers(inputs).square().mean()}


def stage(number: int, init_cfg: dict) -> BaseModel:
    teacher = dict(teacher=tiny_vit(init_cfg=init_cfg)) if number == 2 else {}
    model = MODELS.build(dict(
        type=f'adala_mm.{("Attention", "Feature")[number - 1]}Alignment', **teacher,
        data_preprocessor=dict(type='ImgDataPreprocessor'), backbone=tiny_vit(attention=LINEAR, init_cfg=init_cfg)))
    model.init_weights()
    return model


def make_runner(place: Path, model: BaseModel, numbers: list[int], hook: dict | None = None, optimizer: dict = SGD,
                hooks: tuple[Hook, ...] = (), save_every: int = 1, launcher: str = 'none', kind: type[Runner] = Runner,
                **wrapper) -> Runner:
    """A runner that takes the pictures in their order, once, with the checks that all configs have."""
    return kind(
        model, str(place), experiment_name=f'watchdogs_{next(NUMBER)}', launcher=launcher, default_scope='mmengine',
        cfg=dict(model_wrapper_cfg=dict(type='MMDistributedDataParallel', device_ids=None)),
        train_dataloader=dict(dataset=Pictures(numbers), batch_size=BATCH, num_workers=0,
                              sampler=dict(type='DefaultSampler', shuffle=False)),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=len(numbers) // BATCH // (2 if launcher != 'none' else 1)),
        optim_wrapper=dict(type='OptimWrapper', optimizer=optimizer) | wrapper, log_level='WARNING',
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=save_every)),
        custom_hooks=[NonFiniteHook(**(hook or {})), TeacherDriftHook(), DeadLossHook(), *hooks])


def in_training(model: nn.Module, iteration: int = 9, max_iters: int = 1000) -> SimpleNamespace:
    lines: list[str] = []
    return SimpleNamespace(model=model, iter=iteration, max_iters=max_iters, lines=lines, _resume=False,
                           _load_from=None, logger=SimpleNamespace(warning=lines.append, info=lines.append))
