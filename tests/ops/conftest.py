"""The two fast paths of linear attention."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from adala_mm.ops import cpu_linear_attention, fused_linear_attention
from helpers.kernels import handle_bfloat16


@pytest.fixture
def cpu() -> SimpleNamespace:
    return SimpleNamespace(name='cpu', module=cpu_linear_attention, device='cpu')


@pytest.fixture
def triton(monkeypatch) -> SimpleNamespace:
    """The Triton kernels, also behind the public functions."""
    pytest.importorskip('triton')
    from adala_mm.ops import triton_linear_attention
    if torch.cuda.is_available():
        return SimpleNamespace(name='triton', module=triton_linear_attention, device='cuda')
    handle_bfloat16(monkeypatch)
    monkeypatch.setattr(fused_linear_attention, '_engine', lambda x: triton_linear_attention)
    return SimpleNamespace(name='triton', module=triton_linear_attention, device='cpu')


@pytest.fixture(params=['cpu', 'triton'])
def engine(request) -> SimpleNamespace:
    return request.getfixturevalue(request.param)
