"""The baselines of ViT-AdaLA against slow float64 transcriptions of their published formulas.

Each says whose equation it is, and sees a layer's parameters alone (`without_code`). tests/test_transcriptions.py sees
that every attention has one.
"""
from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import tiny_vit
from torch import nn

from adala_mm.models.attentions import build_attention
from adala_mm.ops import gated_linear_attention
from adala_mm.registry import MODELS

DIM, HEADS, WIDTH = 32, 4, 8
LORA = dict(rank=3, alpha=5)
LAYOUTS = [(hw, num_prefix) for hw in ((4, 4), (3, 5)) for num_prefix in (0, 1, 5)]


def build(name, hw=(4, 4), num_prefix=1, dim=DIM, heads=HEADS, random=True, dtype=torch.float64, **options):
    """A layer of which no parameter is zero or the identity, unless ``random`` is False."""
    cfg = dict(type=f'adala_mm.{name}Attention', **options)
    layer = build_attention(cfg, dim, heads, grid=hw, num_prefix=num_prefix).to(dtype)
    for parameter in layer.parameters() if random else ():
        nn.init.normal_(parameter, std=0.3)
    return layer


def tokens(hw, num_prefix, batch=2):
    return torch.randn(batch, num_prefix + hw[0] * hw[1], DIM, dtype=torch.float64)


def qkv(n, std=1.0):
    return [torch.randn(2, HEADS, n, WIDTH, dtype=torch.float64) * std for _ in range(3)]


def weights(layer, q, k, hw, num_prefix):
    """The layer's N x N matrix: what it makes of the unit vectors as values."""
    n = q.shape[2]
    return layer.mix(q, k, torch.eye(n, dtype=q.dtype).expand(*q.shape[:2], n, n), hw, num_prefix)


def with_grads(function, inputs, upstream, parameters=()):
    """Output and gradients with respect to the inputs and to parameters that the function knows of."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, [*inputs, *parameters], upstream.to(out.dtype))]


def error(got, wanted, floor=0.0):
    """Largest difference relative to the largest value, or to ``floor`` where that is about zero."""
    return float((got.double() - wanted).detach().abs().max() / max(float(wanted.detach().abs().max()), floor))


def without_code(layer):
    """The layer's parameters, buffers and options under their names, in modules that can do nothing."""
    bare = copy.deepcopy(layer, {id(parameter): parameter for parameter in layer.parameters()})
    containers = nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterDict
    for module in bare.modules():
        module.__class__ = next((kind for kind in containers if isinstance(module, kind)), nn.Module)
    return bare


def compare(core, layer, hw, num_prefix):
    x = tokens(hw, num_prefix)
    upstream = torch.randn_like(x)
    bare = without_code(layer)
    wanted = with_grads(lambda t: reference(core, bare, t, hw, num_prefix), [x], upstream, layer.parameters())
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        own = copy.deepcopy(layer).to(dtype)
        got = with_grads(lambda t, own=own: own(t, hw, num_prefix), [x.to(dtype)], upstream, own.parameters())
        for what, a, b in zip(('out', 'x', *dict(layer.named_parameters())), got, wanted, strict=True):
            assert a.dtype == dtype and a.shape == b.shape
            assert not b.numel() or error(a, b) < tolerance, (what, dtype)  # a table of no prefix token is empty


def scaled(q, k):
    return q @ k.mT / math.sqrt(WIDTH)


def reference(core, layer, x, hw, num_prefix):
    matrices = [*layer.qkv.weight.split(DIM), layer.proj.weight]
    if hasattr(layer, 'lora'):
        matrices = [w + LORA['alpha'] / LORA['rank'] * layer.lora.b[name] @ layer.lora.a[name]
                    for w, name in zip(matrices, 'qkvo', strict=True)]
    q, k, v = (torch.stack([(x @ w.T + b)[..., h * WIDTH:(h + 1) * WIDTH] for h in range(HEADS)], dim=1)
               for w, b in zip(matrices[:3], layer.qkv.bias.split(DIM), strict=True))
    mixed = core(layer, q, k, v, hw, num_prefix)
    return torch.cat([mixed[:, h] for h in range(HEADS)], dim=-1) @ matrices[3].T + layer.proj.bias


def softmax(layer, q, k, v, hw, num_prefix):
    """Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.1, eq. 1."""
    scores = torch.exp(scaled(q, k))
    return scores / scores.sum(-1, keepdim=True) @ v


def linear(layer, q, k, v, hw, num_prefix):
    """Katharopoulos et al. 2020 (arXiv 2006.16236), section 3.2, eq. 4, with phi of eq. 7 or of ViT-AdaLA, A.3.

    ``efficient``: Shen et al. 2021 (arXiv 1812.01243), softmax normalisation, as its code has it (MIT).
    """
    def normalised(x, dim):
        return x.exp() / x.exp().sum(dim, keepdim=True)
    k = k - k.mean(2, keepdim=True) if layer.center_keys else k
    phi = {'elu1': lambda x: torch.where(x > 0, x + 1, x.exp()), 'relu': lambda x: x * (x > 0), 'exp': torch.exp,
           'softplus': lambda x: torch.log1p(x.exp()), 'softmax': lambda x: normalised(x, 3),
           'efficient': lambda x: normalised(x, 3 if x is q else 2)}[layer.feature_map]
    scores = torch.einsum('bhid,bhjd->bhij', phi(q), phi(k))
    out = scores / (scores.sum(-1, keepdim=True) + layer.eps) @ v
    return out if layer.dwconv is None else out + convolved(v, layer.dwconv, hw, num_prefix)


def hedgehog(layer, q, k, v, hw, num_prefix):
    """LoLCATs (arXiv 2410.10254), section 3.1, eq. 5, not causal, with the maps of Hedgehog (arXiv 2402.04347).

    ``softmax`` and ``half`` as LoLCATs' code has them (Apache-2.0), ``joint`` as flash-linear-attention's (MIT), and
    ``exp`` as Hedgehog's paper.
    """
    def phi(x, matrices):
        y = torch.stack([x[:, h] @ matrices[h] for h in range(HEADS)], dim=1)
        return {'softmax': torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1).clamp(min=1e-12),
                'half': y.softmax(-1).clamp(min=1e-12), 'joint': torch.cat([2 * y, -2 * y], dim=-1).softmax(-1),
                'exp': torch.cat([y, -y], dim=-1).exp()}[layer.variant]
    maps = layer.feature_map
    scores = phi(q, maps.q) @ phi(k, maps.q if maps.k is None else maps.k).mT
    return scores / (scores.sum(-1, keepdim=True) + 1e-12) @ v


def token_matrix(part, hw):
    """E (R, N): bicubic where the grid is another, the patches' entries times N0 / N."""
    table = part.patches.weight
    if table.shape[1:] != hw:
        scale = table[0].numel() / (hw[0] * hw[1])
        table = scale * nn.functional.interpolate(table[None], hw, mode='bicubic', align_corners=False)[0]
    return torch.cat([part.prefix, table.flatten(1)], dim=1)


def linformer(layer, q, k, v, hw, num_prefix):
    """Wang et al. 2020 (arXiv 2006.04768), section 4, eq. 7, with E and F for all heads ("headwise sharing")."""
    parts = layer.token_proj
    e, f = (token_matrix(parts[name if name in parts else 'kv'], hw) for name in 'kv')
    return scaled(q, e @ k).softmax(-1) @ (f @ v)


def performer(layer, q, k, v, hw, num_prefix):
    """Choromanski et al. 2021 (arXiv 2009.14794), section 2, eq. 4 and 5, with f_1 of Lemma 1 (eq. 7) or ReLU.

    The shift, eps and D^-1/4 are the published code's (Apache-2.0); the paper omits the last and has not the others.
    """
    omega, eps = layer.feature_map.projection, layer.feature_map.eps

    def phi(x, over):
        x = x / WIDTH ** 0.25
        wx = x @ omega.T
        if layer.feature_map.kernel == 'relu':
            return (wx.clamp(min=0) + eps) / math.sqrt(len(omega))
        shift = wx.amax(over, keepdim=True).detach()
        return (torch.exp(wx - (x * x).sum(-1, keepdim=True) / 2 - shift) + eps) / math.sqrt(len(omega))
    scores = phi(q, (3,)) @ phi(k, (2, 3)).mT
    return scores / scores.sum(-1, keepdim=True) @ v


def cosformer(layer, q, k, v, hw, num_prefix):
    """Qin et al. 2022 (arXiv 2202.08791), section "cos-based re-weighting mechanism", as its code has it (Apache-2.0).

    relu(Q_i) relu(K_j)^T cos(pi / 2 x (i - j) / M), divided by its sum over j, which is at least 1e-6.
    """
    n = q.shape[2]
    skip = num_prefix if layer.cls_policy == 'neutral' else 0
    cosines = torch.tensor([[math.cos(math.pi / 2 * (i - j) / (n - skip)) if min(i, j) >= skip else 1.0
                             for j in range(n)] for i in range(n)], dtype=q.dtype)
    scores = q.clamp(min=0) @ k.clamp(min=0).mT * cosines
    return scores / scores.sum(-1, keepdim=True).clamp(min=1e-6) @ v


def landmarks(layer, x, hw, num_prefix):
    """Xiong et al. 2021, eq. 16, for any N as its code for vision has it (Apache-2.0); cells of the grid are ours."""
    n, m = x.shape[2], layer.num_landmarks
    if layer.landmarks == 'segments':
        ends = [0]
        for size in [n // m] * (m - n % m) + [n // m + 1] * (n % m):
            ends.append(ends[-1] + size)
        groups = [range(*pair) for pair in zip(ends, ends[1:], strict=False)]
    else:  # m = 6 becomes 2 x 3 cells on either grid
        def cells(size, count):
            return [range(i * size // count, math.ceil((i + 1) * size / count)) for i in range(count)]
        groups = [[i] for i in range(num_prefix)]
        groups += [[num_prefix + y * hw[1] + x for y in ys for x in xs] for ys in cells(hw[0], 2)
                   for xs in cells(hw[1], 3)]
    return torch.stack([sum(x[:, :, i] for i in group) / len(group) for group in groups], dim=2)


def nystrom(layer, q, k, v, hw, num_prefix, iterations=6):
    """Xiong et al. 2021 (arXiv 2102.03902), eq. 13, the inverse by eq. 14 and the Z_0 below it, together eq. 17.

    Of a row-stochastic matrix the largest row sum in Z_0 is 1. The convolution of v is that of its figure 4.
    """
    if layer.num_landmarks >= q.shape[2]:
        out = scaled(q, k).softmax(-1) @ v
    else:
        ql, kl = (landmarks(layer, x, hw, num_prefix) for x in (q, k))
        kernel1, kernel2, kernel3 = (scaled(a, b).softmax(-1) for a, b in ((q, kl), (ql, kl), (ql, k)))
        columns = kernel2.sum(2)
        c = columns.max() if layer.pinv_init == 'original' else columns.amax(-1)[..., None, None]
        z, one = kernel2.transpose(2, 3) / c, torch.eye(kernel2.shape[-1], dtype=q.dtype)
        for _ in range(iterations):
            kz = kernel2 @ z
            z = z @ (13 * one - kz @ (15 * one - kz @ (7 * one - kz))) / 4
        out = kernel1 @ z @ kernel3 @ v
    if layer.conv is not None:
        taps = layer.conv.weight[:, 0, :, 0]  # (H, size)
        n, half = q.shape[2], taps.shape[1] // 2
        out = out + torch.stack([sum(taps[:, t, None] * v[:, :, i + t - half]
                                     for t in range(taps.shape[1]) if 0 <= i + t - half < n) for i in range(n)], dim=2)
    return out


def monarch_matrix(q, k, token, steps, single=()):
    """Dense (B, H, N, N) of the maximisation of <M, S> + H(M), alternating over L[j, m, t] and R[m, j, i].

    Query j of block t meets key i of block m; ``token`` says which stands there, places that are padded left out.
    Tokens in ``single`` are blocks of one key for the others, and as queries see all keys with softmax's weights.
    """
    q = q / math.sqrt(WIDTH)
    blocks, places = sorted({m for m, _ in token}), sorted({i for _, i in token})
    zero = torch.zeros(q.shape[:2], dtype=q.dtype)
    left, right = {(j, m, t): zero + (m == t) for j in places for m in blocks for t in blocks}, {}
    alone = {}
    for _ in range(steps):
        for j in places:
            queries, mean_key, s = [t for t in blocks if (t, j) in token], {}, {}
            for m in blocks:
                keys = torch.stack([k[:, :, token[m, i]] for i in places if (m, i) in token], dim=2)
                c = sum((left[j, m, t] for t in queries), zero)[..., None]
                a = sum((left[j, m, t][..., None] * q[:, :, token[t, j]] for t in queries), 0 * q[:, :, 0])
                a = torch.where(c > 0, a / c.clamp(min=1e-300), 0)  # nobody attends to the block: R is uniform
                r = right[m, j] = torch.einsum('bhd,bhid->bhi', a, keys).softmax(-1)
                mean_key[m], s[m] = torch.einsum('bhi,bhid->bhd', r, keys), torch.xlogy(r, r).sum(-1)
            for t in queries:
                scores = [(q[:, :, token[t, j]] * mean_key[m]).sum(-1) - s[m] for m in blocks]
                scores += [(q[:, :, token[t, j]] * k[:, :, n]).sum(-1) for n in single]
                shares = torch.stack(scores, dim=-1).softmax(-1)
                left |= {(j, m, t): shares[..., i] for i, m in enumerate(blocks)}
                alone |= {(j, n, t): shares[..., len(blocks) + i] for i, n in enumerate(single)}
    matrix = torch.zeros(*q.shape[:3], k.shape[2], dtype=q.dtype)
    for n in single:
        matrix[:, :, n] = torch.einsum('bhd,bhid->bhi', q[:, :, n], k).softmax(-1)
    for (t, j), query in token.items():
        for m in blocks:
            keys = [token[m, i] for i in places if (m, i) in token]
            matrix[:, :, query, keys] = left[j, m, t][..., None] * right[m, j]
        for n in single:
            matrix[:, :, query, n] = alone[j, n, t]
    return matrix


def monarch(layer, q, k, v, hw, num_prefix):
    """Yaras et al. 2025 (arXiv 2505.18698), from the definition alone, the variational form of softmax.

    Not from its code, whose licence forbids that.
    """
    (h, w), (rows, columns) = hw, layer.tile or (1, hw[1])
    across = -(-w // columns)
    token = {(y // rows * across + x // columns, y % rows * columns + x % columns): num_prefix + y * w + x
             for y in range(h) for x in range(w)}
    single = range(num_prefix)
    if not layer.exact_prefix:  # in front, at the end of blocks of their own
        size, single = rows * columns, ()
        token |= {divmod(n - num_prefix, size): n for n in range(num_prefix)}
    tau = 1 if layer.tau is None else layer.tau['scale']
    out = monarch_matrix(q * tau, k, token, layer.num_steps, single) @ v
    return out if layer.dwconv is None else out + convolved(v, layer.dwconv, hw, num_prefix)


def convolved(v, conv, hw, num_prefix):
    """Depth-wise convolution of the patches, tap by tap; nothing for prefix tokens."""
    taps, side = conv.weight[:, 0], conv.weight.shape[-1] // 2
    out, channels = torch.zeros_like(v), torch.arange(DIM).view(HEADS, WIDTH)
    grid = [(y, x) for y in range(hw[0]) for x in range(hw[1])]
    for n, (y, x) in enumerate(grid):
        near = [(m, a - y + side, b - x + side) for m, (a, b) in enumerate(grid)
                if max(abs(a - y), abs(b - x)) <= side]
        out[:, :, num_prefix + n] = conv.bias[channels] + sum(
            taps[channels, dy, dx] * v[:, :, num_prefix + m] for m, dy, dx in near)
    return out


LAYERS = {
    'Hedgehog': (hedgehog, [{}, dict(variant='joint', feature_dim=6), dict(variant='exp', feature_dim=11),
                            dict(variant='half', feature_dim=6, shared_map=True)]),
    'LoLCATS': (hedgehog, [LORA]),
    'Linformer': (linformer, [dict(rank=6), dict(rank=30, share_kv=True)]),
    'Performer': (performer, [{}, dict(num_features=5, eps=1e-2), dict(kernel='relu', eps=1e-3)]),
    'Cosformer': (cosformer, [{}, dict(cls_policy='neutral')]),
    'Nystromformer': (nystrom, [dict(num_landmarks=6), dict(num_landmarks=7, pinv_init='original'),
                                dict(num_landmarks=6, landmarks='grid'), dict(num_landmarks=4, conv_kernel=5)]),
    'Monarch': (monarch, [{}, dict(num_steps=3, exact_prefix=False), dict(num_steps=2, tile=(1, 2), exact_prefix=False),
                          dict(num_steps=3, tile=(2, 3)), dict(tile=(5, 2), temperature=True, dwconv=3)]),
}
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


def recurrence(q, k, log_gate, v):
    state, outputs = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=v.dtype), []
    for t in range(q.shape[2]):
        state = log_gate[:, :, t, :, None].exp() * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append((q[:, :, t, :, None] * state).sum(2))
    return torch.stack(outputs, dim=2)


@pytest.mark.parametrize('n', [1, 15, 16, 17, 50])
@pytest.mark.parametrize('gate', ['usual', 'open', 'closed', 'mixed'])
def test_gated_linear_attention(n, gate):
    q, k, g, v = (torch.randn(2, 3, n, width, dtype=torch.float64) for width in (6, 6, 6, 10))
    g = {'usual': nn.functional.logsigmoid(g) / 16, 'open': 0 * g, 'closed': -100 + 0 * g,
         'mixed': torch.where(g > 1, -100.0, -g.abs() / 10)}[gate]
    upstream = torch.randn(2, 3, n, 10, dtype=torch.float64)
    wanted = with_grads(recurrence, (q, k, g, v), upstream)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        got = with_grads(gated_linear_attention, [t.to(dtype) for t in (q, k, g, v)], upstream)
        for what, a, b in zip(('out', 'q', 'k', 'gate', 'v'), got, wanted, strict=True):
            assert a.isfinite().all() and error(a, b, floor=1) < tolerance, what
