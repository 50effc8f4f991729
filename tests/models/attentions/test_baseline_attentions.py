"""The baselines of ViT-AdaLA against slow float64 transcriptions of their published formulas."""
from __future__ import annotations

import pytest
import torch
from torch import nn

from adala_mm.registry import MODELS
from helpers import tiny_vit
from helpers.layers import LAYOUTS, WIDTH, build, error, qkv, tokens, weights
from helpers.references.baselines import LAYERS, LORA, compare, linear, linformer, monarch, nystrom, scaled, softmax

CASES = [(name, options) for name, (_, choices) in LAYERS.items() for options in choices]
every_case = pytest.mark.parametrize(('name', 'options'), CASES, ids=str)
every_layout = pytest.mark.parametrize(('hw', 'num_prefix'), LAYOUTS, ids=str)


@pytest.mark.parametrize(('name', 'options'), [*CASES, ('Nystromformer', dict(num_landmarks=21, conv_kernel=33))],
                         ids=str)
@every_layout
def test_values_and_gradients(name, options, hw, num_prefix):
    compare(LAYERS[name][0], build(name, hw, num_prefix, **options), hw, num_prefix)


@pytest.mark.parametrize(('core', 'options'), [
    (softmax, {}), *((linear, dict(feature_map=name, eps=0.5)) for name in ('elu1', 'relu', 'softplus', 'softmax')),
    (linear, dict(feature_map='exp', eps=1e-15)), (linear, dict(feature_map='efficient', dwconv=3)),
    (linear, dict(feature_map='efficient', center_keys=True)), (linear, dict(dwconv=3))],
    ids=lambda value: getattr(value, '__name__', str(value)))
@every_layout
def test_values_and_gradients_of_softmax_and_vanilla_linear_attention(core, options, hw, num_prefix):
    compare(core, build(core.__name__.capitalize(), hw, num_prefix, **options), hw, num_prefix)


@every_case
def test_whether_places_and_other_images_matter(name, options):
    layer, x = build(name, (3, 5), 5, **options), tokens((3, 5), 5, batch=3)
    order = torch.cat([torch.arange(5), 5 + torch.randperm(15)])
    out, shuffled, *alone = (layer(t, (3, 5), 5) for t in (x, x[:, order], *x.split(1)))
    moved, mixed_up = error(shuffled, out[:, order]), error(torch.cat(alone), out)
    assert moved > 1e-3 if layer.positional else moved < 1e-9
    assert layer.positional == (name not in ('Hedgehog', 'LoLCATS', 'Performer'))
    assert mixed_up > 1e-6 if options.get('pinv_init') == 'original' else mixed_up < 1e-9


@pytest.mark.parametrize(('name', 'options'), [
    case for case in CASES if case[0] not in ('Linformer', 'Nystromformer') and 'dwconv' not in case[1]], ids=str)
def test_rows_sum_to_one(name, options):
    q, k, v = (x.abs() for x in qkv(21))  # cosFormer: no query and no key without a positive channel
    out = build(name, (4, 4), 5, **options).mix(q, k, torch.ones_like(v), (4, 4), 5)
    torch.testing.assert_close(out, torch.ones_like(v), rtol=0, atol=1e-12 if name == 'Monarch' else 1e-9)


@every_case
@pytest.mark.parametrize('zeros', ['one query', 'everything'])
def test_zero_queries_are_finite(name, options, zeros):
    layer, inputs = build(name, (3, 5), 1, dtype=torch.float32, **options), [t.float() for t in qkv(16)]
    inputs[0][:, :, 3] = 0
    inputs = [(t * (zeros != 'everything')).requires_grad_() for t in inputs]
    out = layer.mix(*inputs, (3, 5), 1)
    assert all(t.isfinite().all() for t in (out, *torch.autograd.grad(out.square().sum() + out.sum(), inputs)))


@pytest.mark.parametrize(('name', 'options'), [
    *((name, {}) for name in LAYERS), ('Hedgehog', dict(variant='joint')), ('Hedgehog', dict(variant='exp')),
    ('Cosformer', dict(cls_policy='neutral')), ('Nystromformer', dict(landmarks='grid', conv_kernel=33))], ids=str)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_at_4097_tokens(name, options, dtype):
    layer = build(name, (64, 64), 1, dim=16, heads=2, dtype=dtype, **options)
    x = 3 * torch.randn(1, 4097, 16).to(dtype)
    with torch.no_grad():
        out, wanted = layer(x, (64, 64), 1), layer.double()(x.double(), (64, 64), 1)
    assert out.dtype == dtype and out.isfinite().all()
    # Queries and keys of std 4 are rounded before anything else, which moves sharp weights by some per cent.
    assert (out.double() - wanted).square().mean().sqrt() < 0.1 * wanted.square().mean().sqrt()


def test_lora_starts_at_zero_and_merges():
    options, x = dict(variant='exp', feature_dim=5), tokens((3, 5), 1)
    fresh, plain = build('LoLCATS', random=False, **options), build('Hedgehog', **options)
    fresh.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(fresh(x, (3, 5), 1), plain(x, (3, 5), 1), rtol=0, atol=0)
    layer = build('LoLCATS', **LORA, **options)
    before = layer(x, (3, 5), 1)
    layer.merge_lora()
    assert list(layer.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(layer.state_dict())
    for merged in (layer, plain):
        assert error(merged(x, (3, 5), 1), before) < 1e-12


@pytest.mark.parametrize('share_kv', [False, True])
@pytest.mark.parametrize('hw', [(8, 8), (2, 2), (6, 5), (3, 7)], ids=str)
def test_linformer_on_another_grid(share_kv, hw):
    layer = build('Linformer', (4, 4), 5, rank=6, share_kv=share_kv)
    compare(linformer, layer, hw, 5)
    part = layer.token_proj['kv' if share_kv else 'v']
    nn.init.constant_(part.patches.weight, 0.25)
    mass = part(torch.ones(1, 1, 5 + hw[0] * hw[1], 1, dtype=torch.float64), hw).flatten()
    torch.testing.assert_close(mass, 4 + part.prefix.sum(1))  # 16 cells of 0.25
    with pytest.raises(ValueError, match='built for 5 .* got 1'):
        layer(tokens(hw, 1), hw, 1)


def test_linformer_loaded_at_another_grid_keeps_row_mass(tmp_path):
    attention = dict(type='adala_mm.LinformerAttention', rank=6)
    small = MODELS.build(tiny_vit(attention=attention))
    torch.save(small.state_dict(), tmp_path / 'small.pth')
    large = MODELS.build(tiny_vit(attention=attention, img_size=64,
                                  init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'small.pth'))))
    large.init_weights()
    eye = torch.eye(65)[None, None]  # 8 x 8 patches and the class token
    got, wanted = (model.blocks[0].attn.token_proj['k'](eye, (8, 8)) for model in (large, small))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize('draw', ['gaussian', 'own'])
def test_performer_converges_to_softmax(draw):
    q, k, _ = qkv(16, std=0.3)
    exact, errors = scaled(q, k).softmax(-1), []
    for features in (64, 65536):
        layer = build('Performer', num_features=features, eps=1e-6)
        if draw == 'gaussian':
            nn.init.normal_(layer.feature_map.projection)
        errors.append(error(weights(layer, q, k, (4, 4), 0), exact))
    assert errors[1] < min(0.02, errors[0] / 10), errors


def test_nystrom_makes_exactly_six_iterations():
    layer, x = build('Nystromformer', num_landmarks=6), qkv(17)
    errors = [error(layer.mix(*x, (4, 4), 1), nystrom(layer, *x, (4, 4), 1, iterations)) for iterations in (5, 6, 7)]
    assert errors[1] < 1e-9 and min(errors[0], errors[2]) > 1e-3


@pytest.mark.parametrize(('kind', 'm'), [('segments', 17), ('segments', 128), ('grid', 128), ('grid', 16)])
def test_nystrom_with_a_landmark_per_token_is_softmax(kind, m):
    q, k, v = qkv(17)  # on the grid, 16 patches and the class token make 17 landmarks
    layer = build('Nystromformer', num_landmarks=m, landmarks=kind)
    assert error(layer.mix(q, k, v, (4, 4), 1), scaled(q, k).softmax(-1) @ v) < 1e-9


@every_layout
@pytest.mark.parametrize('steps', [1, 2, 4])
@pytest.mark.parametrize('tile', [(1, 1), (4, 5), (9, 7)], ids=str)
def test_monarch_of_one_block_or_one_token_is_softmax(hw, num_prefix, steps, tile):
    q, k, v = qkv(num_prefix + hw[0] * hw[1], std=2)
    layer = build('Monarch', num_steps=steps, tile=tile)
    wanted = nn.functional.scaled_dot_product_attention(q, k, v)
    assert error(layer.mix(q, k, v, hw, num_prefix), wanted) < 1e-12


@pytest.mark.parametrize(('options', 'num_prefix'), [({}, 1), (dict(tile=(5, 17), num_steps=2), 5),
                                                     (dict(exact_prefix=False), 1)], ids=str)
def test_monarch_on_one_patch_and_on_many(options, num_prefix):
    layer = build('Monarch', dim=8, heads=1, **options)
    for hw in ((1, 1), (16, 64)):
        x = [torch.randn(1, 1, num_prefix + hw[0] * hw[1], WIDTH, dtype=torch.float64) for _ in range(3)]
        assert error(layer.mix(*x, hw, num_prefix), monarch(layer, *x, hw, num_prefix)) < 1e-9


@every_layout
@pytest.mark.parametrize('tile', [None, (1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize('exact_prefix', [False, True])
def test_monarch_climbs_towards_softmax(hw, num_prefix, tile, exact_prefix):
    q, k, _ = qkv(num_prefix + hw[0] * hw[1], std=2)
    scores, values = scaled(q, k), []
    for steps in (1, 2, 3, 6):
        layer = build('Monarch', num_steps=steps, tile=tile, exact_prefix=exact_prefix)
        matrix = weights(layer, q, k, hw, num_prefix)
        assert (matrix >= 0).all() and (matrix.sum(-1) - 1).abs().max() < 1e-12
        values.append((matrix * scores - torch.xlogy(matrix, matrix)).sum((2, 3)))
    rises = torch.stack([*values, torch.logsumexp(scores, -1).sum(-1)]).diff(dim=0)  # the last one to the optimum
    assert (rises > -1e-10).all() and rises[:3].sum() > 1e-3 and (rises[3] > 1e-6).all()


def test_monarch_of_the_paper_has_prefix_tokens_in_a_block():
    """What the configs of the baselines say; the class token's row is not softmax's then."""
    q, k, v = qkv(17)
    softmax = nn.functional.scaled_dot_product_attention(q, k, v)
    apart = [error(build('Monarch', exact_prefix=exact).mix(q, k, v, (4, 4), 1)[:, :, 0], softmax[:, :, 0])
             for exact in (True, False)]
    assert apart[0] < 1e-12 and apart[1] > 1e-2


@pytest.mark.parametrize(('name', 'options', 'message'), [
    ('Hedgehog', dict(variant='odd'), "'odd'.*softmax, half, joint, exp"), ('LoLCATS', dict(variant='odd'), "'odd'"),
    ('Hedgehog', dict(feature_dim=0), 'feature_dim=0'), ('Hedgehog', dict(feature_dim=-2), 'feature_dim=-2'),
    ('LoLCATS', dict(rank=-1), 'rank=-1'), ('LoLCATS', dict(rank=33), 'rank=33 .* 32'),
    ('Linformer', dict(rank=0), 'rank=0'), ('Linformer', dict(grid=None), 'LinformerAttention.*grid'),
    ('Performer', dict(num_features=0), 'num_features=0'),
    ('Performer', dict(kernel='odd'), "'odd'.*softmax, relu"),
    ('Cosformer', dict(cls_policy='odd'), "'odd'.*index, neutral"),
    ('Nystromformer', dict(pinv_init='odd'), "pinv_init 'odd'.*exact, original"),
    ('Nystromformer', dict(landmarks='odd'), "landmarks 'odd'.*segments, grid"),
    ('Nystromformer', dict(num_landmarks=0), 'num_landmarks=0'),
    ('Nystromformer', dict(conv_kernel=4), 'kernel_size=4'),
    ('Monarch', dict(num_steps=0), 'num_steps=0'), ('Monarch', dict(tile=(0, 2)), r'tile=\(0, 2\)'),
    ('Monarch', dict(tile=(2, 2, 2)), r'tile=\(2, 2, 2\)'), ('Monarch', dict(dwconv=4), 'kernel_size=4'),
], ids=str)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)
