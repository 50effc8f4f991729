"""Estimates the memory of a training step from shapes alone, without weights, data or a GPU.

    weights, frozen ones too + optimizer state + EMA copy + DDP's gradient buckets + max(step, optimizer)

*step* is the most bytes that forward and backward pass hold at a time, gradients included. The backbone, or a whole
alignment stage, runs on fake tensors at its true batch and image size: every operator's output is counted while it
lives, fused attentions being one operator as on a GPU. Heads look at values (matching of queries to segments), so they
run on the CPU at two small image sizes; what they hold is linear in pixels and images. *optimizer* is gradients plus
the temporaries of its foreach loop, as large again.

Left out: the CUDA context (0.5 GiB), workspaces of cuDNN and cuBLAS, fragmentation. Compiled blocks and fused
optimizers need less than this says.
"""
from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from mmengine.registry import MODELS, OPTIMIZERS
from mmengine.structures import PixelData
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adala_mm.models.algorithms.base import Alignment, Distillation
from adala_mm.preflight.plan import TRAIN, Plan
from adala_mm.preflight.report import ERROR, OK, WARNING, Finding, Skipped
from adala_mm.preflight.sizes import training_size
from adala_mm.utils.machine import default_device, total_memory

GIB = 2 ** 30
TIGHT = 0.9  # of the device: what an estimate may come to before it is no longer safe


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that operators make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._alive:  # else a view, or an operator in place
                    self._alive.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return out

    def _free(self, key: int, nbytes: int) -> None:
        self._alive.discard(key)
        self.now -= nbytes


class Features(nn.Module):
    """Stands in for a backbone whose outputs are known."""

    outputs: tuple[Tensor, ...] = ()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.outputs


def binary(nbytes: float) -> str:
    return f'{nbytes / GIB:.1f} GiB' if nbytes >= GIB else f'{nbytes / 2 ** 20:.0f} MiB'


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Many small operators take a fifth of the time without threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def held_by(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def trainable_bytes(plan: Plan) -> int:
    return held_by(p for p in plan.model.parameters() if p.requires_grad)


def optimizer_bytes(plan: Plan) -> int:
    """Of the optimizer's state, by what a step of it keeps for one small parameter."""
    optimizer = (plan.cfg.get('optim_wrapper') or {}).get('optimizer')
    if not optimizer:
        return 0
    parameter = nn.Parameter(torch.zeros(16, 16))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = OPTIMIZERS.build(dict(optimizer, params=[parameter]))
    optimizer.step()
    kept = held_by(t for state in optimizer.state.values() for t in state.values()
                   if isinstance(t, Tensor) and t.numel() > 1)
    return kept // held_by([parameter]) * trainable_bytes(plan)


def ema_bytes(plan: Plan) -> int:
    """Of the running average that an EMAHook keeps beside the model."""
    hooks = plan.cfg.get('custom_hooks') or []
    return held_by(plan.model.state_dict().values()) * sum(hook.get('type') == 'EMAHook' for hook in hooks)


def precision(plan: Plan) -> contextlib.AbstractContextManager:
    """Autocast as the run has it."""
    wrapper = plan.cfg.get('optim_wrapper') or {}
    if wrapper.get('type') != 'AmpOptimWrapper':
        return contextlib.nullcontext()
    return torch.autocast('cpu', getattr(torch, wrapper.get('dtype') or 'float16'))


def fake_network(network: nn.Module, mode: FakeTensorMode) -> nn.Module:
    network = copy.deepcopy(network)
    with mode:
        return network._apply(lambda t: torch.empty(t.shape, dtype=t.dtype)).train()


def alignment_step(plan: Plan, shape: tuple[int, ...]) -> int:
    mode = FakeTensorMode()
    stage = fake_network(plan.model, mode)
    stage.teacher_ready = True  # no checkpoint is read for shapes
    with mode, Held() as held:
        with precision(plan):
            loss = stage(torch.empty(shape), mode='loss')['loss']
        loss.backward()
        return held.peak


def backbone_step(plan: Plan, shape: tuple[int, ...]) -> tuple[int, int, list[torch.Size]]:
    """Bytes after the forward pass, the most at any time, and shapes of the outputs."""
    mode = FakeTensorMode()
    backbone = fake_network(plan.model.backbone, mode)
    with mode, Held() as held:
        with precision(plan):
            outputs = backbone(torch.empty(shape))
        kept, shapes = held.now, [output.shape for output in outputs]
        if any(output.requires_grad for output in outputs):
            sum(output.float().sum() for output in outputs).backward()
        return kept, held.peak, shapes


def samples(plan: Plan, count: int, height: int, width: int) -> list:
    """Labels of made-up images: ten horizontal bands of classes, or one class each."""
    if hasattr(plan.model, 'decode_head'):
        from mmseg.structures import SegDataSample
        bands = (torch.arange(height) * 10 // height % plan.model.decode_head.num_classes)[None, :, None]
        facts = dict(img_shape=(height, width), ori_shape=(height, width), pad_shape=(height, width))
        return [SegDataSample(gt_sem_seg=PixelData(data=bands.expand(1, height, width).clone()), metainfo=facts)
                for _ in range(count)]
    from mmpretrain.structures import DataSample
    return [DataSample().set_gt_label(0) for _ in range(count)]


def head_line(plan: Plan) -> Callable[[int], int]:
    """The most bytes that everything behind the backbone holds, loss and gradients included, by pixels of a batch."""
    cfg = copy.deepcopy(plan.cfg.model)
    cfg.backbone = dict(type=Features)
    model, points = MODELS.build(cfg).train(), []
    count = 2 if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()) else 1  # it needs two
    for side in (64, 128) if plan.patch is None else (4 * plan.patch, 8 * plan.patch):
        shape = (count, 3, side, side)
        model.backbone.outputs = tuple(torch.randn(size).requires_grad_() for size in backbone_step(plan, shape)[2])
        with one_thread(), Held() as held:
            with precision(plan):
                losses = model.loss(torch.zeros(shape), samples(plan, count, side, side))
            model.parse_losses(losses)[0].backward()
            points.append((count * side * side, held.peak))
        model.zero_grad()
    (x1, y1), (x2, y2) = points
    return lambda pixels: round(y1 + (y2 - y1) / (x2 - x1) * (pixels - x1))


def step_bytes(plan: Plan) -> Callable[[int, int, int], int]:
    """Most bytes that forward and backward pass hold, weights not counted, by images, height and width.

    Raises:
        Skipped: for a model that is neither an alignment stage nor a segmentor or classifier.
    """
    if isinstance(plan.model, Alignment):
        return lambda batch, height, width: alignment_step(plan, (batch, 3, height, width))
    if not plan.heads or isinstance(plan.model, Distillation):
        raise Skipped(f'no estimate for a {type(plan.model).__name__}')
    head = head_line(plan)

    def both(batch: int, height: int, width: int) -> int:
        kept, peak, _ = backbone_step(plan, (batch, 3, height, width))
        return max(peak, kept + head(batch * height * width))

    return both


def fixed_bytes(plan: Plan) -> int:
    """What a process holds all the time: weights, optimizer state, running average, DDP's buckets."""
    networks = [plan.model, *getattr(plan.model, 'frozen', {}).values()]
    weights = held_by(t for network in networks for t in (*network.parameters(), *network.buffers()))
    buckets = trainable_bytes(plan) if plan.processes > 1 else 0
    return weights + optimizer_bytes(plan) + ema_bytes(plan) + buckets


def estimate(plan: Plan) -> Callable[[int, int, int], int]:
    """Bytes of a training step in all, by images, height and width."""
    fixed, step, update = fixed_bytes(plan), step_bytes(plan), 2 * trainable_bytes(plan)
    return lambda batch, height, width: fixed + max(step(batch, height, width), update)


def memory(plan: Plan) -> Iterator[Finding]:
    """A training step fits into the device."""
    size = training_size(plan)
    if size is None:
        raise Skipped('training images have no common size')
    if plan.patch and (size[0] % plan.patch or size[1] % plan.patch):
        raise Skipped(f'the patch size does not divide {size[0]} x {size[1]}')
    batch = plan.cfg[TRAIN].batch_size
    needed = estimate(plan)
    total = plan.device_memory * GIB if plan.device_memory else total_memory(default_device())
    where = 'the planned device' if plan.device_memory else ('the GPU' if torch.cuda.is_available() else
                                                           'this machine (no GPU visible)')
    nbytes = needed(batch, *size)
    found = (f'about {binary(nbytes)} (an estimate) for {batch} x {size[0]} x {size[1]}, '
             f'{binary(total)} on {where}')
    fits = batch
    while fits and needed(fits, *size) > TIGHT * total:
        fits //= 2
    fix = (f'--cfg-options train_dataloader.batch_size={fits} optim_wrapper.accumulative_counts='
           f'{-(-batch // fits) * plan.cfg.optim_wrapper.get("accumulative_counts", 1)} keeps the effective batch'
           if fits else 'not one image fits: take smaller images, --amp, model.backbone.with_cp=True or another device')
    if nbytes > total:
        yield Finding('memory', ERROR, found, fix)
    elif nbytes > TIGHT * total:
        yield Finding('memory', WARNING, found + ': tight', fix)
    else:
        yield Finding('memory', OK, found)
