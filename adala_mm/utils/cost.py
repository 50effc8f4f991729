"""What a forward pass costs, measured: multiply-adds and peak memory."""
from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


def convolution_backward_flops(grad: torch.Size, x: torch.Size, weight: torch.Size, *rest: object,
                               **_: object) -> int:
    """The gradients of input and weight cost as much as the convolution, each, and none that nobody asks for.

    PyTorch's own formula counts those of grouped convolutions as if there was one group.
    """
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, needed = rest
    positions = math.prod((x if transposed else grad)[2:])
    return 2 * grad[0] * positions * math.prod(weight) * (needed[0] + needed[1])


def multiply_adds(function: Callable[[], object], convolutions: bool = True) -> int:
    """Multiply-adds of the matrix products (and convolutions) that ``function`` runs.

    Counted by PyTorch as operators are dispatched, with softmax attention taken apart: of its fused kernels the
    counter knows CUDA's only.
    """
    own = {torch.ops.aten.convolution_backward: convolution_backward_flops}
    # With gradients on, fused attention is one operator, whose cost is known, and not the calls that it consists of.
    with (FlopCounterMode(display=False, custom_mapping=own) as counter, sdpa_kernel(SDPBackend.MATH),
          torch.enable_grad()):
        function()
    counts = counter.get_flop_counts().get('Global', {})
    return sum(flops for op, flops in counts.items() if convolutions or 'conv' not in str(op)) // 2


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
