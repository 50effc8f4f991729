"""Entropy of attention, against its definition."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from adala_mm import analysis
from adala_mm.analysis import attention_maps
from adala_mm.models.attentions import build_attention
from helpers import LINEAR

SOFTMAX = dict(type='adala_mm.SoftmaxAttention')


# --- attention maps


def entropy_by_definition(attn: nn.Module, h: torch.Tensor, kernel) -> np.ndarray:
    b, n, c = h.shape
    qkv = (h.double() @ attn.qkv.weight.T.double() + attn.qkv.bias.double()).detach().numpy()
    q, k, _ = qkv.reshape(b, n, 3, attn.num_heads, -1).transpose(2, 0, 3, 1, 4)
    weights = kernel(q, k)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return -(weights * np.log(weights)).sum(axis=-1).mean(axis=(0, 2)) / np.log(n)


@pytest.mark.parametrize(('options', 'kernel'), [
    (SOFTMAX, lambda q, k: np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]))),
    (LINEAR, lambda q, k: np.where(q > 0, q + 1, np.exp(q)) @ np.where(k > 0, k + 1, np.exp(k)).swapaxes(-1, -2)),
    (LINEAR | dict(feature_map='softplus'),
     lambda q, k: np.log1p(np.exp(q)) @ np.log1p(np.exp(k)).swapaxes(-1, -2)),
    (LINEAR | dict(feature_map='exp'), lambda q, k: np.exp(q) @ np.exp(k).swapaxes(-1, -2)),
], ids=['softmax', 'elu1', 'softplus', 'exp'])
def test_entropy(options, kernel, monkeypatch):
    attn = build_attention(options, 24, 3)
    nn.init.normal_(attn.qkv.weight, std=0.4)
    h = torch.randn(2, 13, 24)
    wanted = entropy_by_definition(attn, h, kernel)
    found = analysis.attention_entropy(attn, h, (3, 4), 1)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4)
    assert 0.05 < wanted.min() and wanted.max() < 0.999
    monkeypatch.setattr(attention_maps, 'QUERIES', 5)
    np.testing.assert_allclose(analysis.attention_entropy(attn, h, (3, 4), 1).numpy(), found.numpy(), rtol=1e-5)


def test_entropy_of_equal_weights_is_one_and_of_unknown_ones_is_none():
    h = torch.randn(2, 17, 24)
    for options in (SOFTMAX, LINEAR, dict(type='adala_mm.HedgehogAttention')):
        attn = build_attention(options, 24, 3)
        nn.init.zeros_(attn.qkv.weight)
        nn.init.zeros_(attn.qkv.bias)
        torch.testing.assert_close(analysis.attention_entropy(attn, h, (4, 4), 1), torch.ones(3))
    for options in (dict(type='adala_mm.MonarchAttention'), LINEAR | dict(feature_map='identity')):
        assert analysis.attention_entropy(build_attention(options, 24, 3, grid=(4, 4)), h, (4, 4), 1) is None
