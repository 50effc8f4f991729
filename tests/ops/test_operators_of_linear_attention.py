"""The fast paths of linear attention as operators of PyTorch: compiled, traced, differentiated, in any layout."""
from __future__ import annotations

import copy
import functools
import itertools
import shutil
import threading

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from adala_mm.models.attentions.heads import merge_heads
from adala_mm.ops import fused_linear_attention, linear_attention, linear_attention_packed
from helpers.kernels import LAYOUTS, MAPS, check, exact, layer_and_input, layer_grads, naive, qkv, with_grads

# By NumPy in Triton's interpreter: in tokens of a block that are not there, and where sigmoid or float16 saturate.
pytestmark = pytest.mark.filterwarnings('ignore:(overflow|invalid value) encountered in')


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
