"""The Triton kernels of coarse-to-fine attention, and what uses them, against dense weights in float64.

They run in Triton's interpreter (see conftest), or on the GPU if there is one.
"""
from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from adala_mm.ops import coarse_to_fine as ops
from helpers.coarse_kernels import DEVICE, TOLERANCE, check, qkv
from helpers.kernels import fenced, handle_bfloat16
from helpers.layers import build, error, with_grads

pytest.importorskip('triton')
# By NumPy in Triton's interpreter: log of no token beyond the last cell.
pytestmark = pytest.mark.filterwarnings('ignore:(overflow|invalid value|divide by zero) encountered in|All-NaN slice')

# Grid, prefix tokens, tile, num_open, block: no multiple, one, of blocks and tiles; more to open than there are; blocks
# and tiles larger than the grid, and than what a program has at a time.
GEOMETRIES = [((4, 4), 0, 2, 2, 4), ((3, 5), 1, 2, 2, 2), ((3, 5), 5, 4, 16, 8), ((9, 20), 5, 4, 3, 8),
              ((16, 16), 1, 4, 4, 8), ((9, 10), 0, 9, 1, 9)]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    handle_bfloat16(monkeypatch)


@pytest.mark.parametrize(('hw', 'num_prefix', 'tile', 'num_open', 'block'), GEOMETRIES, ids=str)
def test_values_and_gradients(hw, num_prefix, tile, num_open, block):
    check(qkv(hw, num_prefix), hw, tile, num_open, block)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(('hw', 'num_prefix', 'tile', 'num_open', 'block'), GEOMETRIES[1:4:2], ids=str)
def test_half_precision(hw, num_prefix, tile, num_open, block, dtype):
    check(qkv(hw, num_prefix, dtype=dtype), hw, tile, num_open, block)


@pytest.mark.parametrize(('dim', 'heads', 'batch'), [(20, 2, 1), (32, 1, 2), (80, 1, 1)])
def test_channels_heads_and_images(dim, heads, batch):
    check(qkv((3, 5), 1, dim=dim, heads=heads, batch=batch), (3, 5), 2, 2, 4)


def own(inputs, hw, tile, num_open, block, upstream):
    return with_grads(lambda *x: ops.fused(*x, list(hw), tile, num_open, block)[0], inputs, upstream)


@pytest.mark.parametrize('which', [0, 1, 2], ids=['q', 'k', 'v'])
def test_nan_stays_nan(which, monkeypatch):
    """Also where the largest of some numbers leaves NaN out, as on a GPU, and unlike in the interpreter."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder
    monkeypatch.setattr(InterpreterBuilder, 'create_maxnumf', lambda self, a, b: self.binary_op(a, b, np.fmax))
    inputs, geometry = qkv((3, 5), 1), ((3, 5), 2, 2, 4)
    inputs[which][0, 0, 7, 3] = torch.nan
    out, *grads = own(inputs, *geometry, torch.ones_like(inputs[0]))
    assert not out.isfinite().all()
    everything = [torch.ones_like(x, dtype=torch.bool) for x in (out, *grads)]
    if which == 0:
        for wanted in everything[:2]:  # no other query and none of their gradients
            wanted[:] = False
            wanted[:, :, 7] = True
    elif which == 2:
        everything[0][:] = False
        everything[0][..., 3] = True
        everything[3][:] = False  # that of v does not depend on v
    for got, wanted in zip((out, *grads), everything, strict=True):
        assert torch.equal(got.isnan(), wanted)


@pytest.mark.usefixtures('poisoned')
def test_strided_inputs_and_nothing_outside_of_them():
    """Views of a projection and of a field of NaN; what is not written would be NaN as well."""
    geometry = ((3, 5), 2, 2, 4)
    inputs = qkv((3, 5), 1, heads=2)
    upstream = torch.randn_like(inputs[0])
    wanted = own(inputs, *geometry, upstream)
    projection = torch.stack([x.transpose(1, 2) for x in (F.pad(inputs[0], (0, 0, 1, 0)), *inputs[1:])], dim=2)
    q, k, v = projection.permute(2, 0, 3, 1, 4).unbind(0)
    for views, go in (((q[:, :, 1:], k, v), upstream.transpose(1, 2).contiguous().transpose(1, 2)),
                      ([fenced(x)[1] for x in inputs], fenced(upstream)[1]),
                      ([x.mT.contiguous().mT for x in inputs], upstream.mT.contiguous().mT)):
        got = ops.fused(*views, [3, 5], 2, 2, 4)
        grads = ops.fused_backward(go, *views, *got, [3, 5], 2, 2, 4)
        assert all(torch.equal(a, b) for a, b in zip([got[0], *grads], wanted, strict=True))  # and the same bits
    assert got[0].transpose(1, 2).is_contiguous() and all(g.transpose(1, 2).is_contiguous() for g in grads)


def test_what_pytorch_sees():
    inputs = [x.requires_grad_() for x in qkv((3, 5), 1)]
    options = [3, 5], 2, 2, 4
    torch.library.opcheck(ops.fused, (*inputs, *options),
                          test_utils=('test_schema', 'test_autograd_registration', 'test_faketensor'))
    inputs = [x.detach() for x in inputs]
    saved = ops.fused(*inputs, *options)
    torch.library.opcheck(ops.fused_backward, (torch.randn_like(inputs[0]), *inputs, *saved, *options),
                          test_utils=('test_schema', 'test_faketensor'))


# The layer.

def test_compiled_graph_holds_the_operator(monkeypatch):
    from torch._dynamo.testing import EagerAndRecordGraphs
    monkeypatch.setattr(ops, 'supports', lambda q: True)
    layer = build('CoarseToFine', tile=2, num_open=2, block=4, dtype=torch.float32).to(DEVICE)
    recorder = EagerAndRecordGraphs()
    x = torch.randn(1, 17, 32, device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend=recorder)
    assert torch.equal(compiled(x, (4, 4), 1), layer(x, (4, 4), 1))
    assert any('adala_mm.coarse_to_fine' in str(node.target) for node in recorder.graphs[0].graph.nodes)


@pytest.mark.parametrize('num_prefix', [0, 5])
def test_layer_is_the_plain_one(num_prefix, monkeypatch):
    layer = build('CoarseToFine', tile=2, num_open=2, block=4, dtype=torch.float32).to(DEVICE)
    inputs = [(2 * torch.randn(1, 2, num_prefix + 15, 8)).to(DEVICE) for _ in range(3)]
    upstream = torch.randn_like(inputs[0])

    def mix(*inputs):
        return layer.mix(*inputs, (3, 5), num_prefix)
    wanted = with_grads(mix, [x.cpu().double() for x in inputs], upstream.cpu())
    monkeypatch.setattr(ops, 'supports', lambda q: True)
    with FlopCounterMode(display=False) as counter:
        got = with_grads(mix, inputs, upstream)
    assert 'adala_mm.coarse_to_fine' in {str(op) for op in counter.get_flop_counts()['Global']}
    assert all(error(a.cpu(), b, floor=1) < TOLERANCE[torch.float32] for a, b in zip(got, wanted, strict=True))
    for name in ('fused', 'fused_backward'):  # without the operators
        monkeypatch.setattr(ops, name, lambda *args: pytest.fail('nobody looks on'))
    assert all(torch.equal(a, b) for a, b in zip(with_grads(mix, inputs, upstream), got, strict=True))
    with torch.no_grad():
        assert torch.equal(mix(*inputs), got[0])


@pytest.mark.parametrize('watched', [False, True])
def test_further_derivatives_are_refused(watched):
    """They would be lost in silence."""
    q, k, v = qkv((3, 5), 1)
    q.requires_grad_()
    with FlopCounterMode(display=False) if watched else nullcontext():
        out = ops.coarse_to_fine(q, k, v, (3, 5), 2, 2, 4)
        grad, = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match='no autograd formula' if watched else 'once_differentiable'):
            grad.sum().backward()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match='first derivatives.*float64'):
        upstream = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        torch.autograd.grad(ops.coarse_to_fine(q, k, v, (3, 5), 2, 2, 4), q, upstream)


def test_flops_are_those_of_the_plain_way():
    layer, (q, k, v) = build('CoarseToFine', tile=2, num_open=3, block=4, dtype=torch.float32), qkv((8, 8), 0, heads=2)
    with FlopCounterMode(display=False) as plain, sdpa_kernel(SDPBackend.MATH):  # the counter sees its products
        layer.mix(q, k, v, (8, 8), 0)
    with FlopCounterMode(display=False) as fused, torch._subclasses.FakeTensorMode() as mode:
        inputs = [mode.from_tensor(x).requires_grad_() for x in (q, k, v)]
        out = ops.coarse_to_fine(*inputs, (8, 8), 2, 3, 4)
    assert fused.get_total_flops() == plain.get_total_flops()
    with FlopCounterMode(display=False) as back:
        out.sum().backward()
    choice = 2 * 2 * 64 * 16 * 8
    assert back.get_total_flops() == (fused.get_total_flops() - choice) * 5 // 2


def test_who_takes_the_kernels(monkeypatch):
    """GPUs, one level, one float dtype of those that the kernels know; nothing that differentiates otherwise."""
    def queries(device='cuda', dtype=torch.bfloat16, dim=64):
        return torch.empty(1, 1, 4, dim, dtype=dtype, device=device)
    with torch._subclasses.FakeTensorMode():
        assert ops.supports(queries()) and ops.supports(queries(dtype=torch.float32, dim=128))
        assert not ops.supports(queries(dtype=torch.float64)) and not ops.supports(queries(dim=129))
        assert not ops.supports(queries('cpu'))
        torch.func.vmap(lambda x: x if not ops.supports(x) else pytest.fail('in a transform'))(queries()[None])
        monkeypatch.setattr(ops, 'exporting', lambda: True)
        assert not ops.supports(queries())


def test_several_levels_take_the_plain_way(monkeypatch):
    monkeypatch.setattr(ops, 'supports', lambda q: True)
    monkeypatch.setattr(ops, 'coarse_to_fine', lambda *args: pytest.fail('the kernels have one level'))
    layer = build('CoarseToFine', tile=1, num_open=2, block=3, levels=2)
    layer.mix(*(torch.randn(1, 1, 16, 8, dtype=torch.float64) for _ in range(3)), (4, 4), 0)
