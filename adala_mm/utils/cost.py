"""What running a network costs, measured: multiply-adds and peak memory."""
from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


def convolution_backward_flops(
        grad_output: torch.Size, input: torch.Size, weight: torch.Size, bias_sizes: Sequence[int] | None,
        stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], transposed: bool,
        output_padding: Sequence[int], groups: int, output_mask: Sequence[bool], **_: object) -> int:
    """FLOPs of ``aten.convolution_backward``, whose parameters these are, tensors being their shapes.

    The gradients of input and weight cost as much as the convolution, each, where they are asked for. PyTorch's own
    formula counts the weight's of a grouped convolution as if there was one group.
    """
    positions = math.prod((input if transposed else grad_output)[2:])
    return 2 * grad_output[0] * positions * math.prod(weight) * (output_mask[0] + output_mask[1])


@contextlib.contextmanager
def flop_counter() -> Iterator[FlopCounterMode]:
    """PyTorch's counter, for operators as they are dispatched, with softmax attention taken apart.

    Of the fused kernels of softmax attention it knows CUDA's only.
    """
    own = {torch.ops.aten.convolution_backward: convolution_backward_flops}
    # With gradients on, fused attention is one operator, whose cost is known, and not the calls that it consists of.
    with (FlopCounterMode(display=False, custom_mapping=own) as counter, sdpa_kernel(SDPBackend.MATH),
          torch.enable_grad()):
        yield counter


def multiply_adds(function: Callable[[], object]) -> int:
    """Multiply-adds of the matrix products and convolutions that ``function`` runs, as `flop_counter` sees them."""
    with flop_counter() as counter:
        function()
    return counter.get_total_flops() // 2


def by_part(function: Callable[[], object], parts: dict[str, nn.Module], clock: Callable[[], float],
            rest: str) -> dict[str, float]:
    """How far ``clock`` moves in the forward pass of each part while ``function`` runs, and under ``rest`` outside.

    No part may contain another. A clock is `time.process_time`, or the ``get_total_flops`` of a `flop_counter`.
    """
    spent, started, handles = dict.fromkeys([*parts, rest], 0.0), {}, []
    for name, module in parts.items():
        def begin(*_: object, name: str = name) -> None:
            started[name] = clock()

        def end(*_: object, name: str = name) -> None:
            spent[name] += clock() - started[name]

        handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    start = clock()
    try:
        function()
    finally:
        for handle in handles:
            handle.remove()
    spent[rest] = clock() - start - sum(spent.values())
    return spent


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes that ``function`` holds at a time on the CPU, beyond what was there before, temporaries included."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
            function()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == '[memory]']
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
