"""Which of its paths `linear_attention` takes."""
from __future__ import annotations

import copy
import pickle
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from adala_mm.models.attentions import build_attention
from adala_mm.ops import (
    FEATURE_MAPS,
    fused_linear_attention,
    linear_attention,
    linear_attention_packed,
    linear_attention_reference,
    weighted_sums,
)
from adala_mm.registry import MODELS
from helpers import LINEAR, tiny_vit
from helpers.kernels import MAPS, check, directly, exact, layer_and_input, layer_grads, qkv, with_grads

# By NumPy in Triton's interpreter: in tokens of a block that are not there, and where sigmoid or float16 saturate.
pytestmark = pytest.mark.filterwarnings('ignore:(overflow|invalid value) encountered in')


# Who does what.


def forbid(monkeypatch, *names):
    for name in names:
        def fail(*args, name=name):
            raise AssertionError(f'{name} was called')
        monkeypatch.setattr(fused_linear_attention, name, fail)


@pytest.mark.parametrize('name', MAPS)
def test_few_tokens_on_the_cpu(name, cpu, monkeypatch):
    inputs, upstream = qkv(name, 2, 3, 31, 31, 32)
    whole = torch.stack([x.transpose(1, 2) for x in inputs], dim=2)
    by_state = directly(cpu, inputs, upstream, name)
    forbid(monkeypatch, 'attend')
    with FlopCounterMode(display=False) as counter:
        linear_attention(*inputs, name)
    assert counter.get_total_flops() == 2 * 2 * 2 * 3 * 31 * 31 * 32
    check(with_grads(lambda *x: linear_attention(*x, name), inputs, upstream), [x.double() for x in by_state], 1e-6)
    out, grad = with_grads(lambda x: linear_attention_packed(x, name), [whole], upstream.transpose(1, 2))
    check([out.transpose(1, 2), *grad.permute(2, 0, 3, 1, 4)], [x.double() for x in by_state], 1e-6)


@pytest.mark.parametrize(('n', 'm', 'fuses'), [(31, 31, False), (32, 32, True), (33, 33, True), (17, 300, True),
                                               (16, 300, False), (300, 16, False), (1, 5000, False)])
def test_how_many_tokens_are_few(n, m, fuses, cpu, monkeypatch):
    """The operator has the cost of the linear order; the plain formula takes over where the other one is cheaper."""
    inputs, _ = qkv('elu1', 1, 1, n, m, 32)
    calls, attend = [], fused_linear_attention.attend
    monkeypatch.setattr(fused_linear_attention, 'attend', lambda *args: (calls.append(1), attend(*args))[1])
    linear_attention(*inputs)
    assert bool(calls) == fuses == (n * m * 2 >= (n + m) * 32)


@pytest.mark.parametrize(('n', 'm', 'f', 'd'), [(7, 7, 8, 8), (8, 8, 8, 8), (9, 9, 8, 8), (4, 40, 8, 8), (5, 40, 8, 8),
                                                (40, 4, 8, 8), (20, 20, 64, 16), (20, 20, 16, 64), (30, 30, 16, 64)])
def test_weighted_sums_take_the_cheaper_order(n, m, f, d):
    q, k, v = torch.rand(2, 3, n, f), torch.rand(2, 3, m, f), torch.randn(2, 3, m, d)
    with FlopCounterMode(display=False) as counter:
        total, weight = weighted_sums(q, k, v)
    by_scores, by_state = n * m * (f + d), (n + m) * f * d
    sums = 0 if by_scores < by_state else n * f  # of the denominators
    assert counter.get_total_flops() == 2 * 2 * 3 * (min(by_scores, by_state) + sums)
    scores = torch.einsum('bhif,bhjf->bhij', q.double(), k.double())
    torch.testing.assert_close(total.double(), torch.einsum('bhij,bhjd->bhid', scores, v.double()), rtol=0, atol=1e-4)
    torch.testing.assert_close(weight.double(), scores.sum(-1, keepdim=True), rtol=1e-5, atol=0)


@pytest.mark.parametrize('name', sorted(set(FEATURE_MAPS) - set(MAPS)))
def test_other_maps_take_the_plain_formula(name, cpu, monkeypatch):
    forbid(monkeypatch, 'attend')
    inputs, upstream = qkv(name, 1, 2, 40, 40, 16)
    wanted = with_grads(lambda *x: linear_attention_reference(*x, name), inputs, upstream)
    got = with_grads(lambda *x: linear_attention(*x, name), inputs, upstream)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    whole = torch.stack([x.transpose(1, 2) for x in inputs], dim=2)
    torch.testing.assert_close(linear_attention_packed(whole, name).transpose(1, 2), wanted[0])


@pytest.mark.parametrize('name', MAPS)
def test_float64_stays_float64(name, cpu):
    inputs, upstream = qkv(name, 1, 2, 40, 45, 16, dtype=torch.float64)
    got = with_grads(lambda *x: linear_attention(*x, name), inputs, upstream)
    assert {x.dtype for x in got} == {torch.float64}
    check(got, exact(inputs, upstream, name), 1e-12)
    leaves = [x[:, :1, :12, :4].clone().requires_grad_() for x in inputs]
    if name != 'relu':  # whose kink the differences may step over
        assert torch.autograd.gradcheck(lambda *x: fused_linear_attention.fused(*x, name, 0.1)[0], leaves)


@pytest.mark.parametrize('function', [lambda x, name: linear_attention(*x.permute(2, 0, 3, 1, 4), feature_map=name),
                                      lambda x, name: linear_attention_packed(x, feature_map=name)])
def test_unknown_map(function):
    with pytest.raises(ValueError, match="'gelu'") as info:
        function(torch.randn(1, 5, 3, 2, 4), 'gelu')
    assert all(name in str(info.value) for name in FEATURE_MAPS)


@pytest.mark.parametrize('images', [0, 2])
def test_no_images_and_no_tokens(images, cpu):
    for n, m in [(0, 40), (40, 0), (40, 40)]:
        inputs, upstream = qkv('elu1', images, 2, n, m, 16)
        out, *grads = with_grads(linear_attention, inputs, upstream)
        assert out.shape == (images, 2, n, 16) and all(g.shape == x.shape for g, x in zip(grads, inputs, strict=True))
        if m == 0:
            assert (out == 0).all()


# The layer and the ViT.


def test_vit_equals_the_plain_formula(cpu, monkeypatch):
    vit = MODELS.build(tiny_vit(attention=LINEAR)).double()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images, results, calls = torch.randn(2, 3, 32, 32, dtype=torch.float64), [], []

    def plain(whole, feature_map='elu1', eps=1e-6):
        calls.append(1)
        return linear_attention_reference(*whole.permute(2, 0, 3, 1, 4), feature_map, eps).transpose(1, 2)
    for patched in (False, True):
        if patched:
            monkeypatch.setattr('adala_mm.models.attentions.linear.linear_attention_packed', plain)
        features = vit.forward_features(images)
        results.append([features, *torch.autograd.grad(features.sin().sum(), list(vit.parameters()))])
        assert len(calls) == 2 * patched
    for a, b in zip(*results, strict=True):
        assert b.abs().max() > 1e-6 and (a - b).abs().max() < 1e-9 * b.abs().max()


def test_layer_can_be_stored_and_copied(cpu):
    layer, x = layer_and_input(feature_map='relu', eps=0.5)
    wanted = layer_grads(layer, x)
    assert sorted(layer.state_dict()) == ['proj.bias', 'proj.weight', 'qkv.bias', 'qkv.weight']
    assert not any(isinstance(value, ModuleType) for value in vars(layer).values())
    fresh = build_attention(LINEAR | dict(feature_map='relu', eps=0.5), 64, 2)
    fresh.load_state_dict(layer.state_dict())
    for twin in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert all(torch.equal(a, b) for a, b in zip(layer_grads(twin, x), wanted, strict=True))
