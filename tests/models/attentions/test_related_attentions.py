"""The related linear attentions against slow float64 transcriptions of their published formulas."""
from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adala_mm.models.attentions import build_attention
from helpers.layers import without_code
from helpers.references.related import DIM, HEADS, D, reference

BUILT = (4, 4)  # the grid of the tables; on any other they are resampled
NAMES = ['RALA', 'InLine', 'ViTALiTy', 'Focused', 'PolaFormer', 'Agent', 'Castling', 'Vicinity', 'MLLA', 'ViG', 'RMT',
         'FCViT']
CASES = [(name, {}) for name in NAMES]
CASES += [('InLine', dict(kernel=kernel, local=local)) for kernel in ('identity', 'relu', 'leaky_relu', 'exp')
          for local in (True, False)]
CASES += [('Vicinity', dict(form=form, se_reduction=r)) for form in ('sum', 'product') for r in (2, None)]
CASES += [('ViG', dict(conv_input=True)), ('RMT', dict(decomposed=True)), ('RMT', dict(decay_range=6.0)),
          ('Agent', dict(num_agents=4)), ('Focused', dict(focus=2.0, kernel_size=3)), ('PolaFormer', dict(alpha=2.0)),
          ('RALA', dict(rotary=False))]

every_layer = pytest.mark.parametrize('name', NAMES)
every_case = pytest.mark.parametrize(('name', 'options'), CASES, ids=str)


def build(name, std=0.3, keep=(), grid=BUILT, **options):
    """In eval; all parameters random, extra ones too so that they matter, but those under names that ``keep`` has."""
    layer = build_attention({'type': f'adala_mm.{name}Attention', **options}, DIM, HEADS, grid=grid).eval()
    for key, parameter in layer.named_parameters():
        if not key.startswith(tuple(keep)):
            nn.init.normal_(parameter, std=std)
    return layer


def tokens(hw, p, batch=2):
    return torch.randn(batch, p + hw[0] * hw[1], DIM)


def with_grads(layer, function, x, upstream):
    """Output and gradients with respect to the input and every parameter."""
    inputs = [x.clone().requires_grad_(), *layer.parameters()]
    out = function(inputs[0])
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype), materialize_grads=True)]


def compare(layer, x, hw, p, reference):
    """The layer in float64 and float32 against ``reference(layer, x)`` in float64, values and gradients."""
    exact, upstream = copy.deepcopy(layer).double(), torch.randn(x.shape)
    bare = without_code(exact)
    wanted = with_grads(exact, lambda x: reference(bare, x), x.double(), upstream)
    peak = max(float(grad.abs().max()) for grad in wanted[1:])
    for model, inputs, tolerance in ((exact, x.double(), 1e-9), (layer, x, 1e-4)):
        got = with_grads(model, lambda x, model=model: model(x, hw, p), inputs, upstream)
        for what, a, b in zip(('out', 'x', *dict(layer.named_parameters())), got, wanted, strict=True):
            floor = 0 if what == 'out' else 1e-2 * peak  # a bias of the keys has about no gradient, where they cancel
            assert a.dtype == inputs.dtype, what
            assert float((a.double() - b).abs().max()) <= tolerance * max(float(b.abs().max()), floor), what


@every_layer
def test_every_extra_parameter_matters(name):
    layer = build(name)
    layer(tokens((3, 5), 1), (3, 5), 1).square().sum().backward()
    for key, parameter in layer.named_parameters():
        assert key.startswith(('qkv.', 'proj.')) or parameter.grad.abs().max() > 1e-4, key


@every_case
@pytest.mark.parametrize('hw', [(4, 4), (3, 5)], ids=str)
@pytest.mark.parametrize('p', [0, 1, 5])
def test_values_and_gradients(name, options, hw, p):
    if p and options.get('decomposed'):
        pytest.skip('rows and columns have no place for prefix tokens')
    layer = build(name, **options)
    compare(layer, tokens(hw, p), hw, p, lambda m, x: reference(name, m, x, hw, p, **options))


@pytest.mark.parametrize('p', [0, 1])
def test_vig_over_many_tokens_with_strong_gates(p):
    layer = build('ViG')
    for gate in layer.forget:
        nn.init.normal_(gate[1].weight, std=20)
    compare(layer, tokens((7, 7), p), (7, 7), p, lambda m, x: reference('ViG', m, x, (7, 7), p))


@pytest.mark.parametrize('name', ['Focused', 'PolaFormer', 'Agent'])
@pytest.mark.parametrize(('built', 'hw'), [((3, 5), (3, 5)), ((3, 5), (5, 3)), ((2, 3), (6, 7)), ((8, 8), (3, 5))],
                         ids=str)
def test_tables_over_the_grid(name, built, hw):
    layer, x = build(name, grid=built), tokens(hw, 1)
    compare(layer, x, hw, 1, lambda m, x: reference(name, m, x, hw, 1))


@pytest.mark.parametrize('name', [name for name in NAMES if name != 'ViG'])
def test_as_built_local_terms_and_gates_are_neutral(name):
    options = dict(se_reduction=None) if name == 'Vicinity' else {}  # its gate of 1 to 2 is the published one
    layer, x = build(name, keep=('',), **options).double(), tokens((3, 5), 1).double()
    torch.testing.assert_close(layer(x, (3, 5), 1), reference(name, layer, x, (3, 5), 1, bare=True, **options))


def test_vig_as_built_is_half_attention_half_input():
    layer, x = build('ViG', keep=('',)).double(), tokens((3, 5), 1).double()
    nn.init.zeros_(layer.norms[0].weight)  # nothing of attention: the other half is left
    local = torch.cat([x[:, :1], F.silu(x[:, 1:])], 1).unflatten(-1, (HEADS, D))
    wanted = (local / (local.square().mean(-1, True) + 1e-5).sqrt()).flatten(2) / 2
    torch.testing.assert_close(layer.attend(x, (3, 5), 1), wanted)


def constant_values(name, hw=(3, 5), p=1, **options):
    """What leaves attention when all values are 1, with neutral local terms and gates."""
    layer = build(name, keep=('dwc', 'lepe', 'dconv', 'local', 'gate'), **options).double()
    with torch.no_grad():
        layer.qkv.weight[2 * DIM:] = 0
        layer.qkv.bias[2 * DIM:] = 1
        layer.qkv.bias[:2 * DIM] += 1  # no query without a positive channel: it would get 0
        return layer.attend(tokens(hw, p).double(), hw, p)


@pytest.mark.parametrize(('name', 'options'), [
    ('InLine', dict(kernel='exp')), ('InLine', dict(kernel='relu')), ('ViTALiTy', {}), ('Focused', dict(eps=1e-30)),
    ('PolaFormer', dict(eps=1e-30)), ('RMT', {}), ('RMT', dict(decomposed=True, p=0)), ('Agent', {}),
    ('Vicinity', dict(se_reduction=None, eps=1e-30)),
    # Where nothing is turned: prefix tokens and the patch at (0, 0).
    ('MLLA', dict(hw=(1, 1), p=5, eps=0.0)), ('RALA', dict(hw=(1, 1), p=5, eps=0.0)),
    ('RALA', dict(rotary=False, eps=0.0))], ids=str)
def test_weights_sum_to_one(name, options):
    out = constant_values(name, **options)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-12)


@pytest.mark.parametrize('name', ['Castling', 'MLLA', 'RALA', 'ViG', 'FCViT'])
def test_weights_do_not_sum_to_one(name):
    out = constant_values(name)
    assert (out - 1).abs().max() > 0.01
    if name == 'Castling':
        norms = out.unflatten(-1, (HEADS, D)).norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones_like(norms))


@every_layer
def test_positional_is_true_to_fact(name):
    layer, x, p = build(name).double(), tokens((4, 4), 2).double(), 2
    order = torch.cat([torch.arange(p), p + torch.randperm(16)])
    with torch.no_grad():
        moved = (layer(x[:, order], (4, 4), p) - layer(x, (4, 4), p)[:, order]).abs().max()
    assert moved > 1e-3 if layer.positional else moved < 1e-10


def test_inline_without_local_term_is_not_positional_and_equals_vitality():
    inline_layer, vitality_layer = build('InLine', local=False).double(), build('ViTALiTy').double()
    vitality_layer.load_state_dict(inline_layer.state_dict())
    x, order = tokens((3, 5), 1).double(), torch.cat([torch.zeros(1, dtype=int), 1 + torch.randperm(15)])
    out = inline_layer(x, (3, 5), 1)
    torch.testing.assert_close(out, vitality_layer(x, (3, 5), 1))
    torch.testing.assert_close(inline_layer(x[:, order], (3, 5), 1), out[:, order])


def test_rmt_along_rows_and_columns_refuses_prefix_tokens():
    with pytest.raises(ValueError, match='5 class and register.*decomposed=False'):
        build('RMT', decomposed=True)(tokens((3, 5), 5), (3, 5), 5)


@pytest.mark.parametrize('name', ['Focused', 'PolaFormer', 'Agent'])
def test_tables_need_a_grid(name):
    with pytest.raises(ValueError, match=f'{name}Attention.*grid='):
        build(name, grid=None)


@pytest.mark.parametrize(('name', 'options', 'value'), [
    ('InLine', dict(kernel='elu'), "'elu'.*identity, relu"), ('Vicinity', dict(form='max'), "'max'.*sum, product"),
    ('Agent', dict(num_agents=50), 'num_agents=50'), ('Agent', dict(num_agents=0), 'num_agents=0'),
    ('Vicinity', dict(se_reduction=0), 'se_reduction=0'), ('Vicinity', dict(se_reduction=64), 'se_reduction=64'),
    ('FCViT', dict(reduction=0), 'reduction=0'), ('RMT', dict(decay_range=-8.0), 'decay_range=-8'),
    *((name, dict(kernel_size=4), 'kernel_size=4') for name in ('Focused', 'PolaFormer', 'Castling', 'FCViT'))],
    ids=str)
def test_options_that_do_not_fit(name, options, value):
    with pytest.raises(ValueError, match=value):
        build(name, **options)


@pytest.mark.parametrize(('name', 'dim', 'heads', 'value'), [
    ('RALA', 24, 4, '6'), ('MLLA', 30, 5, '30'), ('RMT', 12, 4, '3'), ('PolaFormer', 12, 4, '3')])
def test_widths_that_do_not_fit(name, dim, heads, value):
    with pytest.raises(ValueError, match=rf'\b{value}\b'):
        build_attention({'type': f'adala_mm.{name}Attention'}, dim, heads, grid=BUILT)


@every_layer
def test_images_are_independent_and_eval_is_deterministic(name):
    layer, x = build(name).double(), tokens((3, 5), 1, batch=3).double()
    with torch.no_grad():
        out = layer(x, (3, 5), 1)
        assert torch.equal(out, layer(x, (3, 5), 1))
        other = torch.cat([x[:1] * 100, x[1:2], x[2:] + 3])
        for again in (layer(x[1:2], (3, 5), 1), layer(other, (3, 5), 1)[1:2]):
            torch.testing.assert_close(again, out[1:2])


@every_layer
@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_at_1090_tokens(name, dtype, autocast):
    layer, x = build(name, std=0.2), tokens((33, 33), 1, batch=1)
    with torch.no_grad():
        wanted = layer(x, (33, 33), 1)
    if not autocast:
        layer, x = layer.to(dtype), x.to(dtype)
    with torch.autocast('cpu', dtype=dtype, enabled=autocast):
        out = layer(x, (33, 33), 1)
    assert out.dtype == dtype and out.isfinite().all()
    assert (out - wanted).norm() < 0.05 * wanted.norm()
    out.float().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@every_layer
@pytest.mark.parametrize('zero', ['q', 'k', 'qkv'])
def test_zero_projections_are_finite(name, zero):
    layer, x = build(name), tokens((3, 5), 1).requires_grad_()
    with torch.no_grad():
        for part in zero:
            rows = 'qkv'.index(part) * DIM + torch.arange(DIM)
            layer.qkv.weight[rows], layer.qkv.bias[rows] = 0, 0
    out = layer(x, (3, 5), 1)
    grads = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
    assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize('focus', [3.0, 4.0, 8.0])
def test_focused_tokens_without_a_positive_channel(focus):
    layer, x = build('Focused', focus=focus), tokens((3, 5), 1)
    with torch.no_grad():
        layer.qkv.bias[:DIM] = -100
        out, exact = layer(x, (3, 5), 1), copy.deepcopy(layer).double()(x.double(), (3, 5), 1)
    assert (out - exact).abs().max() < 1e-4 * exact.abs().max()
