"""Time and memory of functions that are to be compared."""
from __future__ import annotations

import re
import time
from collections.abc import Callable
from statistics import median

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adala_mm.utils.cost import peak_bytes

Call = Callable[[], object]
Timer = Callable[[Call], float]
CACHE = 2 ** 28  # bytes, more than any L2 cache has


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def wall_timer(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Timer:
    """Seconds from a call until the device is done, launches included: what one waits for."""
    def seconds(function: Call) -> float:
        synchronize(device)
        start = clock()
        function()
        synchronize(device)
        return clock() - start
    return seconds


def gpu_timer(device: torch.device) -> Timer:
    """Seconds that a GPU works on a call, from a cold cache and without waiting for launches.

    The cache is flushed by reading: lines that were written would have to go back to memory while the call runs.
    """
    cold = torch.zeros(CACHE // 4, device=device)

    def seconds(function: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(10_000_000)  # cycles, some 5 ms, in which all launches queue up
        cold.sum()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    return seconds


def cuda_graph(function: Call) -> Call:
    """The launches of ``function``, recorded once and replayed, without what Python and PyTorch do on the way.

    A replay reads inputs where they were, and writes results where it wrote them before.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are compiled and loaded, libraries get their workspaces
            function()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def take_turns(functions: dict[str, Call], timer: Timer, seconds: float, least: int = 5,
               most: int = 50) -> dict[str, float]:
    """Median seconds of each function. All take turns, in the reverse order every other round.

    The first round warms up and does not count. Rounds end after ``most``, or sooner when ``seconds`` have been
    measured in all and each function had ``least`` turns.
    """
    order, times, spent = list(functions), {name: [] for name in functions}, 0.0
    for name in order:
        timer(functions[name])
    for turn in range(most):
        if turn >= least and spent >= seconds:
            break
        for name in order:
            times[name].append(timer(functions[name]))
            spent += times[name][-1]
        order.reverse()
    return {name: median(values) for name, values in times.items()}


def failure(function: Call, device: torch.device) -> str:
    """Why ``function`` cannot run here; empty if it can."""
    try:
        function()
        synchronize(device)
        return ''
    except torch.OutOfMemoryError:
        reason = 'out of memory'
    except Exception as error:
        reason = f'failed: {type(error).__name__}'
        print(f'{reason}: {error}', flush=True)
    if device.type == 'cuda':
        synchronize(device)  # raises if the device is lost to this process: whatever came next would be wrong
        torch.cuda.empty_cache()
    return reason


def peak_memory(function: Call, device: torch.device) -> int:
    """Most bytes that ``function`` holds at a time, beyond what was there before."""
    if device.type == 'cpu':
        return peak_bytes(function)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def softmax_kernels(function: Call) -> str:
    """Which of PyTorch's kernels ``scaled_dot_product_attention`` takes in ``function``: flash, cudnn, efficient, math.

    Empty if it is not called, or called where ``function`` is compiled or runs in inference mode.
    """
    found: dict[str, None] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if fused := re.match(r'aten::_scaled_dot_product_(?:fused_)?(\w+?)_attention', op.name()):
                found[fused[1]] = None
            elif op.name() == 'aten::_safe_softmax':  # what is left of it when it is taken apart
                found['math'] = None
            return op(*args, **(kwargs or {}))

    with Watch():
        function()
    return ', '.join(found)


class Allowance:
    """How many seconds and bytes a call may take, and a forecast of its seconds from the last that were measured."""

    def __init__(self, seconds: float, nbytes: float = float('inf')) -> None:
        self.seconds = seconds
        self.nbytes = nbytes
        self.rates: dict[str, float] = {}

    def refuse(self, name: str, work: float, nbytes: float = 0) -> str:
        """Why ``name`` should not do ``work`` units of work; empty if it may."""
        forecast = work * self.rates.get(name, 0)
        if nbytes > self.nbytes:
            return f'skipped: {nbytes / 2 ** 30:.0f} GiB'
        return f'skipped: {forecast:.1f} s' if forecast > self.seconds else ''

    def learn(self, name: str, work: float, seconds: float) -> None:
        self.rates[name] = seconds / work
