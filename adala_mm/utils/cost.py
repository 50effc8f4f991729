"""What running a network costs, measured: multiply-adds and peak memory."""
from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
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
