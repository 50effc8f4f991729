"""Times and kernels of a GPU, as far as they can be seen without one."""
from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adala_mm.utils import stopwatch

CPU = torch.device('cpu')


def test_cold_caches_are_clean(monkeypatch):
    """What flushes a cache reads: lines that it wrote would be written back while a kernel is timed."""
    log = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            log.append('record')

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return 2.0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            written = args[0] if op._schema.is_mutable else out
            log.append((max(x.nbytes for x in (*args, out) if isinstance(x, torch.Tensor)), written.nbytes))
            return out

    monkeypatch.setattr(torch.cuda, 'Event', Event)
    monkeypatch.setattr(torch.cuda, '_sleep', lambda cycles: None)
    monkeypatch.setattr(stopwatch, 'CACHE', 2 ** 20)
    timer = stopwatch.gpu_timer(CPU)
    with Watch():
        assert timer(lambda: log.append('call')) == 0.002
    *flush, first, call, last = log
    assert (first, call, last) == ('record', 'call', 'record') and flush
    assert max(touched for touched, _ in flush) == 2 ** 20 and max(written for _, written in flush) < 1000


def test_kernels_of_softmax_attention_are_seen():
    def attention(x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    x = torch.randn(1, 2, 8, 4)
    assert stopwatch.softmax_kernels(lambda: attention(x)) == 'flash'
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert stopwatch.softmax_kernels(lambda: attention(x.requires_grad_())) == 'math'
    assert stopwatch.softmax_kernels(lambda: x.softmax(-1)) == ''
