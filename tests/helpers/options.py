"""Both stages with options, and one step of them."""
from __future__ import annotations

import math

import torch
from mmengine.optim import build_optim_wrapper

from adala_mm.registry import MODELS
from helpers import LINEAR, tiny_vit

SOFTMAX = dict(type='adala_mm.SoftmaxAttention')
DWCONV = LINEAR | dict(dwconv=3)
ADAMW = dict(optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.5))


def stage1(pretrained: dict, attention: dict | list[dict] = LINEAR, **options) -> torch.nn.Module:
    model = MODELS.build(dict(type='adala_mm.AttentionAlignment',
                              backbone=tiny_vit(attention=attention, init_cfg=pretrained), **options))
    model.init_weights()
    return model


def stage2(pretrained: dict, vit: dict | None = None, student: dict | None = None, init: bool = True,
           **options) -> torch.nn.Module:
    vit = vit or {}
    model = MODELS.build(dict(
        type='adala_mm.FeatureAlignment', teacher=tiny_vit(**vit, init_cfg=pretrained), **options,
        backbone=tiny_vit(**{'attention': LINEAR, 'init_cfg': pretrained} | vit | (student or {}))))
    if init:
        model.init_weights()
    return model


def images(count: int = 3, side: int | tuple[int, int] = 32) -> torch.Tensor:
    return torch.randn(count, 3, *(side if isinstance(side, tuple) else (side, side)))


def step(model: torch.nn.Module) -> dict:
    """One step of training; what learns must change, and nothing else."""
    before = {key: value.clone() for key, value in model.named_parameters()}
    wrapper = build_optim_wrapper(model, ADAMW)
    model.train().loss(images())['loss'].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name  # DDP waits for all of them
    log = model.train_step(dict(inputs=images()), wrapper)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    assert all(math.isfinite(value) for value in log.values())
    return log


def train(model: torch.nn.Module, images: torch.Tensor, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """The loss of each step on the same images."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.loss(images)['loss']
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
