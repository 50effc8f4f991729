"""Measures time and memory of functions, so that they can be compared."""
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
    """Waits until the device has finished its work."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def wall_timer(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Timer:
    """A timer of the seconds from a call until the device has finished, launches included: the time that one waits."""
    def seconds(function: Call) -> float:
        synchronize(device)
        start = clock()
        function()
        synchronize(device)
        return clock() - start
    return seconds


def gpu_timer(device: torch.device) -> Timer:
    """A timer of the seconds that a GPU works on a call. The cache is cold, and no launch is waited for.

    The cache is flushed by reading. Had it been written to, the GPU would copy it back to memory while the call runs.
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
    """Records the launches of ``function`` once; the result replays them without the work of Python and PyTorch.

    A replay reads its inputs from the same memory, and writes its results to the same memory.
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
    """Median seconds of each function. The functions take turns, and every other round has the reverse order.

    The first round warms up and does not count. There are ``most`` rounds, or fewer: measuring ends once it has taken
    ``seconds`` in total and each function has had ``least`` turns.
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
    """Runs ``function``, and returns why it cannot run here; an empty string if it can."""
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
    """The greatest number of bytes that ``function`` holds at a time, beyond those that were in use before."""
    if device.type == 'cpu':
        return peak_bytes(function)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def softmax_kernels(function: Call) -> str:
    """Which kernel PyTorch takes for ``scaled_dot_product_attention`` in ``function``: flash, cudnn, efficient or math.

    The result is empty if that is not called, and if ``function`` is compiled or runs in inference mode.
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
    """How many seconds and bytes a call may take. The seconds are forecast from the last ones that were measured."""

    def __init__(self, seconds: float, nbytes: float = float('inf')) -> None:
        self.seconds = seconds
        self.nbytes = nbytes
        self.rates: dict[str, float] = {}

    def refuse(self, name: str, work: float, nbytes: float = 0) -> str:
        """Why ``name`` must not do ``work`` units of work; an empty string if it may."""
        forecast = work * self.rates.get(name, 0)
        if nbytes > self.nbytes:
            return f'skipped: {nbytes / 2 ** 30:.0f} GiB'
        return f'skipped: {forecast:.1f} s' if forecast > self.seconds else ''

    def learn(self, name: str, work: float, seconds: float) -> None:
        self.rates[name] = seconds / work
