"""Linear attention in chunks on the CPU and by Triton's kernels, against a slow transcription.

Triton's kernels run in its interpreter (see conftest), or on the GPU if there is one.
"""
from __future__ import annotations

import itertools

import pytest
import torch

from adala_mm.ops import linear_attention, linear_attention_packed, linear_attention_reference
from helpers.kernels import KINDS, LAYOUTS, MAPS, WHAT, check, directly, exact, fenced, qkv, with_grads

# By NumPy in Triton's interpreter: in tokens of a block that are not there, and where sigmoid or float16 saturate.
pytestmark = pytest.mark.filterwarnings('ignore:(overflow|invalid value) encountered in')
DIMS = [32, 40, 64, 80, 96, 128]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float64: 1e-12}


def packed_views(inputs, upstream):
    """The same as views of a projection (B, N, 3, H, D), with a gradient of that, its views, and a strided upstream."""
    whole = torch.stack([x.transpose(1, 2) for x in inputs], dim=2)
    grads = torch.full_like(whole, torch.nan)
    views = [x.permute(2, 0, 3, 1, 4).unbind(0) for x in (whole, grads)]
    return views[0], upstream.transpose(1, 2).contiguous().transpose(1, 2), views[1]


def autograd_errors(inputs, upstream, name, eps, wanted):
    got = with_grads(lambda *x: linear_attention_reference(*x, name, eps), inputs, upstream)
    return [float((a.cpu().double() - b).abs().max()) for a, b in zip(got, wanted, strict=True)]


# The formula.


@pytest.mark.parametrize('dim', DIMS)
@pytest.mark.parametrize('name', MAPS)
def test_cpu_values_and_gradients(name, dim, cpu):
    lengths = [1, 2, 63, 64, 65, 129, 257]
    for n, m in [*zip(lengths, lengths, strict=True), *zip(lengths, lengths[::-1], strict=True)]:
        for eps in (1e-6, 20.0):
            inputs, upstream = qkv(name, 2, 2, n, m, dim)
            wanted = exact(inputs, upstream, name, eps)
            # With one key the output is that key's value, so that q and k have no gradient to be relative to.
            floor = float(n) if m == 1 else 0.0
            if n == m:
                views, go, grads = packed_views(inputs, upstream)
                check(directly(cpu, views, go, name, eps, grads), wanted, 1e-5, floor)
            check(directly(cpu, inputs, upstream, name, eps), wanted, 1e-5, floor)


def test_cpu_values_and_gradients_of_several_chunks(cpu):
    for n, m in [(385, 384), (384, 385), (769, 769)]:
        inputs, upstream = qkv('elu1', 1, 2, n, m, 32)
        check(directly(cpu, inputs, upstream, 'elu1'), exact(inputs, upstream, 'elu1'), 1e-5)


@pytest.mark.parametrize(('name', 'dim', 'n', 'm'), [
    ('elu1', 32, 1, 1), ('elu1', 40, 65, 65), ('elu1', 64, 129, 129), ('elu1', 80, 64, 257), ('elu1', 96, 257, 63),
    ('elu1', 128, 63, 2), ('relu', 64, 2, 2), ('relu', 80, 129, 65), ('softplus', 40, 65, 1), ('softplus', 96, 63, 63),
    ('identity', 32, 64, 64), ('identity', 128, 65, 129)])
def test_triton_values_and_gradients(name, dim, n, m, triton):
    eps = 20.0 if n < m else 1e-6
    inputs, upstream = qkv(name, 2 if n < 100 else 1, 2, n, m, dim, device=triton.device)
    wanted, floor = exact(inputs, upstream, name, eps), float(n) if m == 1 else 0.0
    if n == m:
        views, go, grads = packed_views(inputs, upstream)
        check(directly(triton, views, go, name, eps, grads), wanted, 1e-5, floor)
    else:
        check(directly(triton, inputs, upstream, name, eps), wanted, 1e-5, floor)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', ['elu1', 'softplus', 'relu'])
def test_sizes_of_inputs(name, kind, dtype, engine):
    eps = 1e-30 if kind == 'negative' else 1e-6  # of which the denominator of elu1 is about 1e-14 there
    inputs, upstream = qkv(name, 1, 1, 33, 40, 40, kind, dtype, engine.device)
    wanted = exact(inputs, upstream, name, eps)
    # Around 0 all keys have nearly the same features, and q's gradient is what is left when they cancel.
    errors = [3 * e if kind == 'tiny' else 0.0 for e in autograd_errors(inputs, upstream, name, eps, wanted)]
    check(directly(engine, inputs, upstream, name, eps), wanted, TOLERANCE[dtype], errors=errors)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
def test_features_that_vanish(dtype, engine):
    """Keys that float16's smallest numbers cannot tell apart, and queries with features of 0."""
    (q, k, v), upstream = qkv('elu1', 1, 1, 33, 40, 40, dtype=dtype, device=engine.device)
    wanted = exact((q, k - 12, v), upstream, 'elu1')
    check(directly(engine, (q, k - 12, v), upstream, 'elu1'), wanted, TOLERANCE[dtype])
    got = directly(engine, (-q.abs(), k, v), upstream, 'relu')
    assert all((x == 0).all() for x in got)


@pytest.mark.parametrize('name', MAPS)
def test_eps_of_zero(name, engine):
    inputs, upstream = qkv(name, 1, 1, 65, 70, 40, device=engine.device)
    check(directly(engine, inputs, upstream, name, 0.0), exact(inputs, upstream, name, 0.0), 1e-5)


@pytest.mark.parametrize('tokens', [2, 3, 5])
def test_number_of_splits(tokens, triton, monkeypatch):
    """Also when there are more of them than blocks."""
    inputs, upstream = qkv('elu1', 1, 2, 150, 140, 40, device=triton.device)
    results = []
    for splits in (1, tokens):
        monkeypatch.setattr(triton.module, '_chunk', lambda tiles, *rest, splits=splits: -(-tiles // splits))
        results.append(directly(triton, inputs, upstream, 'elu1'))
    check(results[1], [x.cpu().double() for x in results[0]], 2e-6)


@pytest.mark.parametrize(('n', 'm'), [(65, 70), (150, 140)])
@pytest.mark.parametrize('dim', [40, 64])
def test_reads_and_writes_nothing_outside(n, m, dim, engine, poisoned):
    tensors, upstream = qkv('elu1', 1, 2, n, m, dim, device=engine.device)
    inputs = [fenced(x)[1] for x in tensors]
    fields, grads = zip(*(fenced(torch.zeros_like(x)) for x in tensors), strict=True)
    for x in grads:
        x.fill_(torch.nan)
    got = directly(engine, inputs, fenced(upstream)[1], 'elu1', grads=grads)
    check(got, exact(tensors, upstream, 'elu1'), 1e-5)
    assert [int(field.isfinite().sum()) for field in fields] == [x.numel() for x in tensors]


@pytest.mark.parametrize(('n', 'm'), [(65, 70), (150, 140)])
def test_everything_is_written(n, m, engine, poisoned):
    inputs, upstream = qkv('relu', 1, 2, n, m, 40, device=engine.device)
    check(with_grads(lambda *x: linear_attention(*x, 'relu'), inputs, upstream), exact(inputs, upstream, 'relu'), 1e-5)
    whole = torch.randn(1, n, 3, 2, 40, device=engine.device, requires_grad=True)
    out = linear_attention_packed(whole)
    assert out.isfinite().all() and torch.autograd.grad(out.sum(), whole)[0].isfinite().all()


# The Triton kernels where they have two blocks of columns, or products in half precision.


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(('name', 'dim', 'n', 'm'), [
    ('elu1', 80, 1, 1), ('elu1', 80, 131, 131), ('softplus', 72, 70, 1), ('relu', 64, 131, 70),
    ('identity', 96, 33, 150), ('softplus', 128, 65, 65)])
def test_half_precision(name, dim, n, m, dtype, triton):
    inputs, upstream = qkv(name, 1, 2, n, m, dim, dtype=dtype, device=triton.device)
    wanted, floor = exact(inputs, upstream, name), float(n) if m == 1 else 0.0
    if n == m:
        views, go, grads = packed_views(inputs, upstream)
        check(directly(triton, views, go, name, grads=grads), wanted, TOLERANCE[dtype], floor)
    else:
        check(directly(triton, inputs, upstream, name), wanted, TOLERANCE[dtype], floor)


@pytest.mark.parametrize('dim', [64, 80])
@pytest.mark.parametrize('layout', ['tokens first', 'channels not last', 'every second channel', 'one head'])
def test_half_precision_of_any_layout(layout, dim, triton):
    inputs, upstream = qkv('elu1', 1, 2, 70, 67, dim, dtype=torch.bfloat16, device=triton.device)
    inputs, upstream = [LAYOUTS[layout](x) for x in inputs], LAYOUTS[layout](upstream)
    check(directly(triton, inputs, upstream, 'elu1'), exact(inputs, upstream, 'elu1'), 1e-2)


def test_float16_of_sums_that_it_cannot_hold(triton):
    """Values of 10 of 16,385 keys add up to more than 65,504, and their features alone to more than 16,384."""
    inputs, upstream = qkv('elu1', 1, 1, 130, 16385, 64, dtype=torch.float16, device=triton.device)
    inputs[2] += 10
    wanted = exact(inputs, upstream, 'elu1')
    out, state, _ = triton.module.forward(*inputs, 'elu1', 1e-6)
    assert state.max() > torch.finfo(torch.float16).max
    assert (out.cpu() - wanted[0]).norm() < 3e-4 * wanted[0].norm()
    check(directly(triton, inputs, upstream, 'elu1'), wanted, 1e-2)


def test_gpu_with_too_little_memory(triton, monkeypatch):
    """A kernel gets less and less, and what does not fit at all is computed by PyTorch."""
    from triton.runtime.errors import OutOfResources
    tried = []

    class Function:
        def run(self, *args, grid, warmup, **options):
            tried.append((options['BN'], options['num_stages']))
            raise OutOfResources(10 ** 6, 10 ** 5, 'shared memory')
    inputs, upstream = qkv('elu1', 1, 2, 70, 65, 40, device=triton.device)
    wanted = exact(inputs, upstream, 'elu1')
    monkeypatch.setattr(triton.module, '_kernel', lambda function, *kind: vars(
        kernel := triton.module._Kernel(function, *kind)).update(function=Function()) or kernel)
    check(directly(triton, inputs, upstream, 'elu1'), wanted, 1e-5)
    assert tried[0][0] == 64 and tried[-1] == (16, 1)


@pytest.mark.parametrize(('name', 'dtype'), [*itertools.product(MAPS, [torch.float32]), ('elu1', torch.bfloat16),
                                            ('softplus', torch.float16)], ids=str)
def test_nan_stays(name, dtype, engine):
    """One NaN in q, k, v or the gradient is in all numbers that are made of it, and infinities do what they would."""
    for which, number in itertools.product(range(4), (torch.nan, torch.inf)):
        inputs, upstream = qkv(name, 1, 2, 10, 70, 40, dtype=dtype, device=engine.device)
        tensors = [*inputs, upstream]
        tensors[which][0, 1, 6, 5] = number
        wanted = exact(inputs, upstream, name)
        for what, got, right in zip(WHAT, directly(engine, inputs, upstream, name), wanted, strict=True):
            lost = right.isnan() & ~got.cpu().isnan() if number != number else ~right.isfinite() & got.cpu().isfinite()
            assert not lost.any(), f'{what} after {number} in {"qkvg"[which]}'
            assert got[0, 0].isfinite().all()
    inputs, upstream = qkv(name, 1, 1, 20, 20, 40, dtype=dtype, device=engine.device)
    inputs[2][0, 0, :, 7] = torch.inf
    out = directly(engine, inputs, upstream, name)[0]
    if name != 'relu':  # of which some features are 0, and 0 times infinity NaN
        assert (out[..., 7] == torch.inf).all()
    assert out[..., :7].isfinite().all()
