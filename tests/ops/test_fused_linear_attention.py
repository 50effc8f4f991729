"""The fast paths of linear attention, CPU chunks and Triton kernels and their operators, against a slow transcription.

Triton's kernels run in its interpreter (see conftest), or on the GPU if there is one.
"""
from __future__ import annotations

import copy
import functools
import itertools
import pickle
import shutil
import threading
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from adala_mm.models.attentions import build_attention
from adala_mm.models.attentions.heads import merge_heads
from adala_mm.ops import (
    FEATURE_MAPS,
    cpu_linear_attention,
    fused_linear_attention,
    linear_attention,
    linear_attention_packed,
    linear_attention_reference,
    weighted_sums,
)
from adala_mm.registry import MODELS
from helpers import LINEAR, tiny_vit
from helpers.kernels import fenced, handle_bfloat16

# By NumPy in Triton's interpreter: in tokens of a block that are not there, and where sigmoid or float16 saturate.
pytestmark = pytest.mark.filterwarnings('ignore:(overflow|invalid value) encountered in')

PHI = {
    'elu1': lambda x: F.elu(x) + 1,
    'relu': torch.relu,
    'softplus': lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    'identity': lambda x: x,
}
MAPS = list(PHI)
WHAT = ('out', 'grad q', 'grad k', 'grad v')
DIMS = [32, 40, 64, 80, 96, 128]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float64: 1e-12}
KINDS = {
    'random': lambda *shape: torch.randn(shape),
    'large': lambda *shape: 30 * torch.randn(shape),
    'tiny': lambda *shape: 1e-4 * torch.randn(shape),
    'negative': lambda *shape: torch.randn(shape) - 20,
}


LAYOUTS = {
    'tokens first': lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    'channels not last': lambda x: x.mT.contiguous().mT,
    'every second channel': lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    'one head': lambda x: x[:, :1].expand(x.shape),
    'one token': lambda x: x[:, :, :1].expand(x.shape),
    'one channel': lambda x: x[..., :1].expand(x.shape),
    'one number': lambda x: x[:1, :1, :1, :1].expand(x.shape),
}


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


def naive(q, k, v, name, eps):
    """The formula with its N x N weights."""
    weights = torch.einsum('bhid,bhjd->bhij', PHI[name](q), PHI[name](k))
    return torch.einsum('bhij,bhjd->bhid', weights / (weights.sum(-1, keepdim=True) + eps), v)


def with_grads(function, inputs, upstream):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]


def exact(inputs, upstream, name, eps=1e-6):
    return with_grads(lambda *x: naive(*x, name, eps), [x.cpu().double() for x in inputs], upstream.cpu())


def qkv(name, batch, heads, n, m, dim, kind='random', dtype=torch.float32, device='cpu'):
    """Queries, keys and values, and a gradient of the output."""
    q, k = (KINDS[kind](batch, heads, length, dim) for length in (n, m))
    if name == 'identity':  # features that are there already
        q, k = (x.abs() + 0.1 * x.abs().mean() for x in (q, k))
    v, upstream = (torch.randn(batch, heads, length, dim) for length in (m, n))
    return [x.to(device, dtype) for x in (q, k, v)], upstream.to(device, dtype)


def directly(engine, inputs, upstream, name, eps=1e-6, grads=None):
    """Output and gradients by an engine's two functions."""
    out, state, total = engine.module.forward(*inputs, name, eps)
    assert state.dtype == total.dtype == torch.promote_types(out.dtype, torch.float32)
    grads = [torch.full_like(x, torch.nan, memory_format=torch.contiguous_format) for x in inputs] \
        if grads is None else grads
    engine.module.backward(upstream, *inputs, state, total, grads, name, eps)
    return [out, *grads]


def check(got, wanted, tolerance, floor=0.0, errors=(0.0, 0.0, 0.0, 0.0)):
    """Errors relative to the largest value, or to ``floor`` if q and k have no gradient; or no more than ``errors``."""
    assert len(got) == len(wanted) == len(WHAT)
    for what, a, b, allowed in zip(WHAT, got, wanted, errors, strict=True):
        assert a.shape == b.shape
        scale = max(float(b.abs().max()), floor if what in WHAT[1:3] else 0.0)
        limit = max(tolerance * scale, allowed) + torch.finfo(a.dtype).tiny * torch.finfo(a.dtype).eps
        error = float((a.detach().cpu().double() - b).abs().max())
        assert error <= limit, f'{what}: {error:.1e} > {limit:.1e}, of {scale:.1e}'


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


# What PyTorch sees.

def test_same_bits_and_untouched_inputs(engine):
    inputs, upstream = qkv('elu1', 1, 2, 150, 140, 40, device=engine.device)
    whole = torch.randn(1, 150, 3, 2, 40, device=engine.device)
    before = copy.deepcopy([*inputs, upstream, whole])
    runs = [[*with_grads(linear_attention, inputs, upstream),
             *with_grads(linear_attention_packed, [whole], upstream.transpose(1, 2))] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, [*inputs, upstream, whole], strict=True))


def test_memory_layout(engine):
    inputs, _ = qkv('elu1', 2, 2, 65, 70, 32, device=engine.device)
    out = linear_attention(*inputs)
    assert out.transpose(1, 2).is_contiguous() and merge_heads(out).data_ptr() == out.data_ptr()
    apart = torch.randn(3, 2, 65, 2, 32, device=engine.device, requires_grad=True).permute(1, 2, 0, 3, 4)
    for whole in (apart, apart.detach().contiguous().requires_grad_()):
        out = linear_attention_packed(whole)
        assert out.is_contiguous()
        grad, = torch.autograd.grad(out.sum(), whole)
        assert grad.is_contiguous() and grad.shape == whole.shape


def layer_and_input(device='cpu', tokens=70, **options):
    layer = build_attention(LINEAR | options, 64, 2).to(device)
    return layer, torch.randn(2, tokens, 64, device=device, requires_grad=True)


def layer_grads(layer, x, function=None):
    out = (layer if function is None else function)(x, (10, 7), 0)
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize('name', MAPS[:3])
def test_gradients_of_a_layer(name, engine):
    layer, x = layer_and_input(engine.device, feature_map=name)
    twin = copy.deepcopy(layer).cpu().double()

    def transcribed(x, hw, num_prefix):
        q, k, v = twin.qkv(x).chunk(3, dim=-1)
        heads = [y.view(2, 70, 2, 32).transpose(1, 2) for y in (q, k, v)]
        return twin.proj(torch.cat(naive(*heads, name, 1e-6).unbind(1), dim=-1))
    wanted = layer_grads(twin, x.detach().cpu().double().requires_grad_(), transcribed)
    for a, b in zip(layer_grads(layer, x), wanted, strict=True):
        assert (a.cpu().double() - b).abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize('wants_grad', [False, True])
def test_opcheck(wants_grad, engine):
    ops = fused_linear_attention
    (q, k, v), upstream = qkv('elu1', 1, 2, 17, 19, 16, device=engine.device)
    whole = torch.randn(2, 17, 3, 2, 16, device=engine.device)
    state, total = engine.module.forward(q, k, v, 'elu1', 1e-6)[1:]
    packed_state = ops.packed(whole, 'elu1', 1e-6)[1:]
    checks = [(ops.fused, [q, k, v]), (ops.packed, [whole])]
    if engine.name == 'cpu':
        checks.append((ops.fused, [q.mT.contiguous().mT, k[:, :1].expand_as(k), v[:, :, :1].expand_as(v)]))
    if not wants_grad:
        checks += [(ops.fused_backward, [upstream, q, k, v, state, total]),
                   (ops.packed_backward, [torch.randn(2, 17, 2, 16, device=engine.device), whole, *packed_state])]
    which = ('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic')
    for op, tensors in checks:  # what AOTAutograd makes of the operators is the same for both engines
        torch.library.opcheck(op, (*(x.requires_grad_(wants_grad) for x in tensors), 'elu1', 1e-6),
                              test_utils=which if engine.name == 'cpu' else which[:3])


def test_compiled_graph_holds_the_operator(cpu):
    from torch._dynamo.testing import EagerAndRecordGraphs
    layer, x = layer_and_input()
    recorder = EagerAndRecordGraphs()
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend=recorder)
    torch.testing.assert_close(compiled(x, (10, 7), 0), layer(x, (10, 7), 0))
    assert [node for graph in recorder.graphs for node in graph.graph.nodes if 'adala_mm.linear' in str(node.target)]


@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile on a CPU needs a C++ compiler')
def test_compiled_layer_is_the_same_layer(cpu, monkeypatch):
    # Not asking which vector instructions there are: the answer takes 10 s.
    monkeypatch.setattr('torch._inductor.cpu_vec_isa.valid_vec_isa_list', list)
    layer, x = layer_and_input()
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, options={'cpp_cache_precompile_headers': False})
    for a, b in zip(layer_grads(layer, x, compiled), layer_grads(layer, x), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_export_does_not_need_this_package(cpu):
    layer, x = layer_and_input()
    for strict in (False, True):
        program = torch.export.export(layer, (x.detach(), (10, 7), 0), strict=strict)
        assert 'adala_mm' not in ''.join(str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(x, (10, 7), 0), layer(x, (10, 7), 0))


def test_autocast_keeps_float32(engine):
    inputs, upstream = qkv('elu1', 1, 2, 150, 140, 40, device=engine.device)
    wanted = with_grads(linear_attention, inputs, upstream)
    with torch.autocast(engine.device, dtype=torch.bfloat16):
        got = with_grads(linear_attention, inputs, upstream)  # also its backward pass
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    layer, x = layer_and_input(engine.device)
    with torch.autocast(engine.device, dtype=torch.bfloat16):
        whole = layer.qkv(x).unflatten(-1, (3, 2, 32))
        out = linear_attention_packed(whole)
    assert whole.dtype == out.dtype == torch.bfloat16
    wanted = naive(*whole.detach().cpu().double().permute(2, 0, 3, 1, 4), 'elu1', 1e-6).transpose(1, 2)
    # Half a unit in the last of bfloat16's 8 digits, on the CPU; Triton rounds the features of the keys as well.
    limit = wanted.abs() * 2 ** -8 * 1.01 + 1e-6 if engine.name == 'cpu' else 1e-2 * wanted.abs().max()
    assert ((out.detach().cpu().double() - wanted).abs() < limit).all()


def test_threads_keep_their_autocast_settings(cpu, monkeypatch):
    """One thread is within the operator while another, under autocast, comes and stays longer."""
    (q, k, v), _ = qkv('identity', 1, 1, 5, 5, 4)
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    enabled = {}

    def phi(x, out, spare):
        if threading.current_thread().name == 'first':
            first_is_in.set()
            assert second_is_in.wait(600)
        else:
            second_is_in.set()
            assert first_is_out.wait(600)
        out.copy_(x)

    def first():
        cpu.module.forward(q, k, v, 'identity', 1e-6)
        enabled['first'] = torch.is_autocast_enabled('cpu')
        first_is_out.set()

    def second():
        assert first_is_in.wait(600)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            cpu.module.forward(q, k, v, 'identity', 1e-6)
            enabled['second'] = torch.is_autocast_enabled('cpu')
    monkeypatch.setitem(cpu.module.PHI, 'identity', (phi, torch.ones_like))
    threads = [threading.Thread(target=target, name=target.__name__) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert enabled == {'first': False, 'second': True}


def test_checkpointing(engine):
    layer, x = layer_and_input(engine.device)
    got = layer_grads(layer, x, lambda *args: checkpoint(layer, *args, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(got, layer_grads(layer, x), strict=True))


def unpacked(x: torch.Tensor) -> torch.Tensor:
    return linear_attention(*x.permute(2, 0, 3, 1, 4), eps=0.1).transpose(1, 2)


def packed(x: torch.Tensor) -> torch.Tensor:
    return linear_attention_packed(x, eps=0.1)


def formula(x: torch.Tensor) -> torch.Tensor:
    return naive(*x.permute(2, 0, 3, 1, 4), 'elu1', 0.1).transpose(1, 2)


def projection(engine, tokens: int = 20, **options) -> torch.Tensor:
    return torch.randn(2, tokens, 3, 2, 16, device=engine.device, **options)


both = pytest.mark.parametrize('function', [unpacked, packed])


@pytest.fixture
def dispatched(monkeypatch) -> list[str]:
    """Which of the operators are called, and in which order, whoever calls them."""
    called = []
    for name in ('fused', 'packed', 'fused_backward', 'packed_backward'):
        operator = getattr(fused_linear_attention, name)
        monkeypatch.setattr(fused_linear_attention, name, lambda *args, name=name, operator=operator: (
            called.append(name), operator(*args))[1])
    return called


@both
def test_the_operator_is_saved_where_nobody_looks_on(function, engine, dispatched):
    """With and without gradients; and the values are those of the operator, to the bit."""
    x = projection(engine)
    operator = fused_linear_attention.fused if function is unpacked else fused_linear_attention.packed
    inputs = x.permute(2, 0, 3, 1, 4).unbind(0) if function is unpacked else (x,)
    wanted = operator(*inputs, 'elu1', 0.1)[0]
    wanted = wanted.transpose(1, 2) if function is unpacked else wanted
    dispatched.clear()
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        outputs = [function(x), function(leaf), function(torch.nn.Parameter(x))]
    with torch.inference_mode():
        outputs.append(function(x))
    with torch.autocast(engine.device, dtype=torch.bfloat16):
        outputs.append(function(x))
    outputs += [function(x), function(leaf)]
    assert outputs[-1].requires_grad and not any(out.requires_grad for out in outputs[:-1])
    assert all(torch.equal(out, wanted) for out in outputs)
    upstream = torch.randn_like(wanted)
    grad, = torch.autograd.grad(outputs[-1], leaf, upstream)
    assert not dispatched
    with FlopCounterMode(display=False):
        out = function(leaf)
    by_operator, = torch.autograd.grad(out, leaf, upstream)
    assert len(dispatched) == 1 and torch.equal(by_operator, grad) and torch.equal(out, wanted)


@both
@pytest.mark.parametrize('wants_grad', [False, True])
def test_modes_see_an_operator(function, wants_grad, engine, dispatched):
    """What they cannot see inside of is told to them by the operator's formula, in both passes."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    x, forward = projection(engine, requires_grad=wants_grad), 2 * 2 * 2 * 16 * (2 * 20 * 16 + 20)
    names = ['fused', 'fused_backward'] if function is unpacked else ['packed', 'packed_backward']
    with torch.set_grad_enabled(wants_grad), FlopCounterMode(display=False) as counter:
        out = function(x)
    assert counter.get_total_flops() == forward and dispatched == names[:1]
    if wants_grad:  # also if the mode comes for the backward pass only
        for result in (out, function(x)):
            dispatched.clear()
            with FlopCounterMode(display=False) as counter:
                result.sum().backward()
            assert counter.get_total_flops() == 2 * forward and dispatched == names[1:]
    dispatched.clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        out = function(fake.from_tensor(x))
    assert type(out).__name__ == 'FakeTensor' and out.shape == (2, 20, 2, 16) and dispatched == names[:1]


@both
def test_compiled_graphs_hold_operators_in_both_passes(function, cpu):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    graphs = []

    def keep(graph, inputs):
        graphs.append(str(graph.code))
        return make_boxed_func(graph)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    x = projection(cpu, requires_grad=True)
    got, wanted = (torch.autograd.grad(f(x).sin().sum(), x)[0] for f in (compiled, function))
    torch.testing.assert_close(got, wanted)
    name = 'adala_mm.linear_attention' + '_packed' * (function is packed)
    assert len(graphs) == 2 and f'{name}.' in graphs[0] and f'{name}_backward.' in graphs[1]


@both
def test_derivatives_of_every_kind(function, engine):
    """Forward mode, second derivatives and batched gradients, as the formula has them.

    Where somebody differentiates or batches, there are no kernels, but the plain formula.
    """
    x = projection(engine)
    tangent, upstream = torch.randn_like(x), torch.randn(2, 20, 2, 16, device=engine.device)

    def dual(function, x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent.to(x.dtype)))).tangent

    def dual_upstream(function, x):
        x = x.requires_grad_()
        out = function(x)
        with forward_ad.dual_level():
            go = forward_ad.make_dual(upstream.to(x.dtype), 2 * upstream.to(x.dtype))
            return forward_ad.unpack_dual(torch.autograd.grad(out, x, go)[0]).tangent

    def energy(function):
        return lambda x: function(x).square().sum()

    def second(function, x):
        return torch.autograd.functional.hvp(energy(function), x, tangent.to(x.dtype))[1]

    def batched(function, x):
        x = x.requires_grad_()
        go = torch.stack([upstream, -upstream]).to(x.dtype)
        return torch.autograd.grad(function(x), x, go, is_grads_batched=True)[0]

    def upstream_by_func(function, x):
        x = x.requires_grad_()
        out, go = function(x), upstream.to(x.dtype)
        return torch.func.jvp(lambda go: torch.autograd.grad(out, x, go, retain_graph=True)[0], (go,), (2 * go,))[1]

    def per_image(function, x):
        return torch.func.vmap(torch.func.grad(lambda one: energy(function)(one[None])))(x)

    def compiled(function, x):
        torch._dynamo.reset()
        return torch.compile(functools.partial(per_image, function), backend='eager')(x)
    ways = [dual, dual_upstream, second, batched, upstream_by_func, per_image, compiled,
            lambda function, x: torch.func.jvp(function, (x,), (tangent.to(x.dtype),))[1],
            lambda function, x: torch.func.jvp(torch.func.grad(energy(function)), (x,), (tangent.to(x.dtype),))[1]]
    for way in ways:
        got, wanted = way(function, x.clone()), way(formula, x.double())
        assert wanted.abs().max() > 1e-3
        assert (got.double() - wanted).abs().max() < 1e-5 * wanted.abs().max(), way.__name__


@both
def test_derivatives_by_differences(function, cpu):
    """Against differences of the function and of its gradients."""
    x = torch.randn(1, 9, 3, 1, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(function, x, check_forward_ad=True, check_batched_grad=True,
                                    check_batched_forward_grad=True)
    assert torch.autograd.gradgradcheck(function, x)


def test_one_tensor_in_three_places(engine):
    """Its gradient is the sum of three, of the first and of the second order."""
    x = torch.randn(1, 2, 20, 16, device=engine.device, requires_grad=True)
    results = []
    exactly = x.detach().double().requires_grad_()
    for function, leaf in ((linear_attention, x), (lambda *x: naive(*x, 'elu1', 1e-6), exactly)):
        first, = torch.autograd.grad(function(leaf, leaf, leaf).sin().sum(), leaf, create_graph=True)
        results.append([first, *torch.autograd.grad(first.cos().sum(), leaf)])
    for a, b in zip(*results, strict=True):
        assert (a.double() - b).abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize('name', ['fused', 'packed', 'fused_backward', 'packed_backward'])
def test_the_operators_themselves_refuse_what_they_would_get_wrong(name, engine):
    """A tangent was lost in silence, and `vmap` of `grad` ended in the depths of PyTorch."""
    operator, x = getattr(fused_linear_attention, name), projection(engine)
    q, k, v = x.permute(2, 0, 3, 1, 4)
    out, *state = fused_linear_attention.packed(x, 'elu1', 0.1)
    first, *rest = dict(fused=[q, k, v], packed=[x], fused_backward=[out.transpose(1, 2), q, k, v, *state],
                        packed_backward=[out, x, *state])[name]

    def call(first: torch.Tensor) -> torch.Tensor:
        result = operator(first, *rest, 'elu1', 0.1)
        return result if isinstance(result, torch.Tensor) else result[0]
    refused = functools.partial(pytest.raises, NotImplementedError, match='nor a rule for torch.func: call adala_mm')
    with forward_ad.dual_level():
        call(first)  # nobody has a tangent
        with refused():
            call(forward_ad.make_dual(first, first))
    with refused():
        torch.func.jvp(call, (first,), (first,))
    with refused():
        torch.func.vmap(torch.func.grad(lambda x: call(x).sum()))(first[None])


def test_inference_mode(engine):
    inputs, upstream = qkv('elu1', 1, 2, 70, 65, 16, device=engine.device)
    with torch.inference_mode():
        out = linear_attention(*inputs)
        linear_attention_packed(torch.randn(1, 70, 3, 2, 16, device=engine.device))
    check([out, *exact(inputs, upstream, 'elu1')[1:]], exact(inputs, upstream, 'elu1'), 1e-5)


@pytest.mark.parametrize('which', [(0,), (1,), (2,), (0, 1, 2)], ids=['q', 'k', 'v', 'all'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts_of_inputs(layout, which, engine):
    inputs, upstream = qkv('elu1', 1, 2, 20, 23, 16, device=engine.device)
    inputs = [LAYOUTS[layout](x) if i in which else x for i, x in enumerate(inputs)]
    floor = 0.0 if layout in list(LAYOUTS)[:4] else 1.0  # equal keys, values, or features of a key: no gradient
    for go in (upstream, LAYOUTS[layout](upstream)) if len(which) == 3 else (upstream,):
        check(with_grads(linear_attention, inputs, go), exact(inputs, go, 'elu1'), 1e-5, floor)


@pytest.mark.parametrize('which', itertools.product([False, True], repeat=3), ids=str)
def test_gradients_of_some_inputs(which, engine):
    inputs, upstream = qkv('elu1', 1, 2, 20, 23, 16, device=engine.device)
    wanted = exact(inputs, upstream, 'elu1')
    for x, wants_grad in zip(inputs, which, strict=True):
        x.requires_grad_(wants_grad)
    out = linear_attention(*inputs)
    assert out.requires_grad == any(which)
    if any(which):
        out.backward(upstream)
    for x, wants_grad, grad in zip(inputs, which, wanted[1:], strict=True):
        assert (x.grad is not None) == wants_grad
        assert not wants_grad or (x.grad.cpu() - grad).abs().max() < 1e-5 * grad.abs().max()


@pytest.mark.parametrize('what', ['fewer values than keys', 'keys of one image', 'wider values'])
def test_shapes_that_do_not_fit(what, engine):
    """They are refused, or broadcast as by the plain formula, but not answered from memory of something else."""
    (q, k, v), _ = qkv('elu1', 2, 2, 40, 40, 16, device=engine.device)
    k, v = {'fewer values than keys': (k, v[:, :, :-3]), 'keys of one image': (k[:1], v[:1]),
            'wider values': (k, torch.cat([v, -v], dim=-1))}[what]
    try:
        out = linear_attention(q, k, v)
    except (RuntimeError, ValueError, IndexError):
        return
    wanted = naive(*(x.cpu().double() for x in (q, k, v)), 'elu1', 1e-6)  # an error if there is no such thing
    assert out.shape == wanted.shape and (out.cpu().double() - wanted).abs().max() < 1e-5


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtype_of_the_values(dtype, engine):
    """As `linear_attention` promises, and as the plain formula has it."""
    (q, k, v), _ = qkv('elu1', 1, 2, 40, 40, 16, device=engine.device)
    out = linear_attention(q, k, v.to(dtype))
    wanted = naive(*(x.cpu().double() for x in (q, k, v.to(dtype))), 'elu1', 1e-6)
    assert out.dtype == dtype and (out.cpu().double() - wanted).abs().max() < 1e-2


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
