"""Counts the multiply-adds of a training step from shapes alone, without weights or data."""
from __future__ import annotations

import copy

import torch
from mmengine.registry import MODELS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from adala_mm.models.algorithms.base import Alignment, Distillation
from adala_mm.preflight.memory import Features, fake_network, one_thread, samples
from adala_mm.preflight.plan import Plan
from adala_mm.preflight.report import Skipped
from adala_mm.utils.cost import multiply_adds


def training_multiply_adds(plan: Plan, height: int, width: int) -> int:
    """Of one image: forward and backward pass of all that learns, and the forward pass of a teacher.

    What is known by shapes runs on fake tensors. Heads look at values, so they run on the CPU, on made-up features.

    Raises:
        Skipped: for a model that is neither an alignment stage nor a segmentor or classifier.
    """
    mode = FakeTensorMode()
    if isinstance(plan.model, Alignment):
        stage = fake_network(plan.model, mode)
        stage.teacher_ready = True  # no checkpoint is read for shapes
        with mode:
            return multiply_adds(lambda: stage(torch.empty(1, 3, height, width), mode='loss')['loss'].backward())
    if not plan.heads or isinstance(plan.model, Distillation):
        raise Skipped(f'no count for a {type(plan.model).__name__}')
    shapes = []

    def backbone() -> None:
        outputs = network(torch.empty(1, 3, height, width))
        shapes.extend(output.shape[1:] for output in outputs)
        if any(output.requires_grad for output in outputs):
            sum(output.sum() for output in outputs).backward()

    network = fake_network(plan.model.backbone, mode)
    with mode:
        count = multiply_adds(backbone)
    cfg = copy.deepcopy(plan.cfg.model)
    cfg.backbone = dict(type=Features)
    model = MODELS.build(cfg).train()
    images = 2 if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()) else 1  # it needs two
    model.backbone.outputs = tuple(torch.randn(images, *shape).requires_grad_() for shape in shapes)

    def head() -> None:
        losses = model.loss(torch.zeros(images, 3, height, width), samples(plan, images, height, width))
        model.parse_losses(losses)[0].backward()

    with one_thread():
        return count + multiply_adds(head) // images
