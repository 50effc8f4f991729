"""The related linear attentions against slow float64 transcriptions of their published formulas.

Each says whose equation it is, and sees a layer's parameters alone (`without_code`). tests/test_transcriptions.py sees
that every attention has one.
"""
from __future__ import annotations

import copy
import math

import pytest
import torch
from test_baseline_attentions import without_code
from torch import nn
from torch.nn import functional as F

from adala_mm.models.attentions import build_attention

DIM, HEADS, D = 32, 4, 8
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


# Transcriptions. Weights are explicit N x N matrices w[b, h, i, j]; x, q, k, v enter as (B, N, C) or (B, H, N, D).


def split(x):
    return torch.stack([x[..., h * D:(h + 1) * D] for h in range(HEADS)], 1)


def merge(x):
    return torch.cat([x[:, h] for h in range(HEADS)], -1)


def affine(x, layer):
    return F.linear(x, layer.weight, layer.bias)


def places(hw, p):
    """(row, column) of each token; None for prefix tokens."""
    return [None] * p + [(y, x) for y in range(hw[0]) for x in range(hw[1])]


def dots(q, k):
    return torch.einsum('bhid,bhjd->bhij', q, k)


def turn(x, angles):
    """Channels (2 i, 2 i + 1) as a complex number, turned by angle i of the token."""
    angles = torch.tensor(angles, dtype=torch.float64)
    z = torch.complex(x[..., 0::2], x[..., 1::2]) * torch.exp(1j * angles)
    return torch.stack([z.real, z.imag], -1).flatten(-2)


def grid_angles(hw, p, frequencies):
    return [[t * f for t in place or (0, 0) for f in frequencies] for place in places(hw, p)]


def convolve(v, weight, bias, hw, p):
    """Zero-padded depth-wise cross-correlation of patches: v (B, N, C), weight (1 or B, C, s, s), 0 for prefixes."""
    reach, where, nothing = weight.shape[-1] // 2, places(hw, p), torch.zeros_like(weight[..., 0, 0])

    def tap(a, b):
        if a is None or b is None or max(abs(b[0] - a[0]), abs(b[1] - a[1])) > reach:
            return nothing
        return weight[..., b[0] - a[0] + reach, b[1] - a[1] + reach]

    taps = torch.stack([torch.stack([tap(a, b) for b in where]) for a in where])  # (N, N, 1 or B, C)
    out = torch.einsum('ijbc,bjc->bic', taps.expand(-1, -1, len(v), -1), v)
    return out if bias is None else out + torch.stack([bias * (place is not None) for place in where])


def table(weight, hw, mode='bicubic'):
    """(K, h0, w0) at another grid, as (N, K)."""
    if weight.shape[1:] != hw:
        weight = F.interpolate(weight[None], size=hw, mode=mode, align_corners=False)[0]
    return torch.stack([weight[:, y, x] for y in range(hw[0]) for x in range(hw[1])])


def rala(layer, q, k, v, hw, p, rotary=True):
    """Fan et al. 2025 (arXiv 2411.07635), the definition of RALA, by words: g, alpha, the rotation of numerators alone.

    Not from its code, which has no licence. The gate and the convolution are in `reference`.
    """
    q, k, v = F.elu(split(q)) + 1, F.elu(split(k)) + 1, split(v)
    n, g = q.shape[2], q.mean(2)
    alpha = n * torch.softmax(torch.einsum('bhd,bhnd->bhn', g, k) / math.sqrt(D), -1)
    k = alpha[..., None] * k
    angles = grid_angles(hw, p, [rotary * 10000 ** -(i / (D // 4 - 1)) for i in range(D // 4)])
    return merge((dots(turn(q, angles), turn(k, angles)) / n @ v) / (dots(q, k).mean(-1, keepdim=True) + 1e-6))


def inline(layer, q, k, v, hw, p, kernel='identity', local=True):
    """Han et al. 2024 (arXiv 2412.06590), eq. 5, with the scale D^-1/2 / N that the paper leaves out."""
    phi = {'identity': lambda x: x, 'relu': lambda x: x * (x > 0), 'exp': lambda x: torch.exp(x / 5),
           'leaky_relu': lambda x: x * torch.where(x > 0, 1.0, 0.01)}[kernel]
    q, k, v = phi(split(q)), phi(split(k)), split(v)
    return merge((1 / q.shape[2] + dots(q, k - k.mean(2, keepdim=True)) / math.sqrt(D) / q.shape[2]) @ v)


def vitality(layer, q, k, v, hw, p):
    """Dass et al. 2023 (arXiv 2211.05109), Algorithm 1; its code centres over channels, not over tokens."""
    q, k, v = split(q), split(k), split(v)
    k = k - k.mean(2, keepdim=True)
    total = v.sum(2, keepdim=True) + q @ (k.mT @ v) / math.sqrt(D)
    return merge(total / (q.shape[2] + q @ k.sum(2)[..., None] / math.sqrt(D)))


def focused(layer, q, k, v, hw, p, focus=3.0, kernel_size=5):
    """Han et al. 2023 (arXiv 2308.00442), section 4, eq. 5 and 6 in eq. 4; eq. 12's convolution is in `reference`."""
    k = k + F.pad(table(layer.position.weight, hw), (0, 0, p, 0))

    def f(x):
        t = (x.clamp(min=0) + 1e-6) / torch.log1p(torch.exp(layer.sharpen['scale']))
        return split(t ** focus / (t ** focus).square().sum(-1, True).sqrt() * t.square().sum(-1, True).sqrt())

    w = dots(f(q), f(k)) / q.shape[1]
    return merge(w @ split(v) / (w.sum(-1, True) + 1e-6))


def polaformer(layer, q, k, v, hw, p, alpha=4.0):
    """Meng et al. 2025 (arXiv 2501.15061), as its code has it (MIT, ``PolaLinearAttention``), gate in `reference`."""
    scale = torch.log1p(torch.exp(layer.polarity['scale']))
    q, k, v = split(q / scale), split((k + F.pad(table(layer.position.weight, hw), (0, 0, p, 0))) / scale), split(v)
    power = 1 + alpha / (1 + torch.exp(-layer.polarity['power']))
    q_pos, q_neg, k_pos, k_neg = (x.clamp(min=0) ** power for x in (q, -q, k, -k))
    same = (dots(q_pos, k_pos) + dots(q_neg, k_neg)) / q.shape[2]
    opposite = (dots(q_neg, k_pos) + dots(q_pos, k_neg)) / q.shape[2]
    return merge(torch.cat([w @ part / (w.sum(-1, True) + 1e-6)
                            for w, part in ((same, v[..., :D // 2]), (opposite, v[..., D // 2:]))], -1))


def agent(layer, q, k, v, hw, p, num_agents=49):
    """Han et al. 2024 (arXiv 2312.08874), the definition of agent attention by words: two softmaxes with biases."""
    (h, w), side = hw, math.isqrt(num_agents)
    q, k, v = split(q), split(k), split(v)
    patches = q[:, :, p:].unflatten(2, hw)
    agents = torch.stack([patches[:, :, i * h // side:-(-(i + 1) * h // side), j * w // side:-(-(j + 1) * w // side)]
                          .mean((2, 3)) for i in range(side) for j in range(side)], 2)

    def bias(module):  # (H, A, N)
        whole, rows, columns = (part.weight for part in module.tables)
        patch = table(whole, hw, 'bilinear').unflatten(0, hw)
        patch = patch + table(rows, (h, 1), 'bilinear')[:, None] + table(columns, (1, w), 'bilinear')
        return torch.cat([module.cls] * p + [patch.permute(2, 0, 1).reshape(HEADS, num_agents, h * w)], 2)

    answers = torch.softmax(dots(agents, k) / math.sqrt(D) + bias(layer.agent_bias), -1) @ v
    return merge(torch.softmax(dots(q, agents) / math.sqrt(D) + bias(layer.token_bias).mT, -1) @ answers)


def castling(layer, q, k, v, hw, p):
    """You et al. 2023 (arXiv 2211.10526), as its code has it (Apache-2.0, ``LinAngularAttention``).

    The paper's kernel has the constant 1/2 for all pairs, which code puts on the token's own value.
    """
    q, k = (split(x) / split(x).square().sum(-1, True).sqrt() for x in (q, k))
    out = split(v) / 2 + dots(q, k) / math.pi @ split(v)
    return merge(out / out.square().sum(-1, True).sqrt())


def vicinity(layer, q, k, v, hw, p, form='sum', se_reduction=1):
    """Sun et al. 2022 (arXiv 2206.10552), as its code has it (Apache-2.0); SE after the projection, in `reference`."""
    def nearness(a, b):
        cos_y, cos_x = (1.0 if a is None or b is None else math.cos(math.pi / 2 * (s - t) / side)
                        for s, t, side in zip(a or hw, b or hw, hw, strict=True))
        return cos_y + cos_x if form == 'sum' else cos_y * cos_x

    near = torch.tensor([[nearness(a, b) for b in places(hw, p)] for a in places(hw, p)], dtype=torch.float64)
    w = dots(split(q).clamp(min=0), split(k).clamp(min=0)) * near
    return merge(w @ split(v) / (w.sum(-1, True) + 1e-4))


def mlla(layer, q, k, v, hw, p):
    """Han et al. 2024 (arXiv 2405.16605), section 3.1, eq. 2, with rotation and LePE as its code has them (MIT)."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    angles = grid_angles(hw, p, [10000 ** -(i / (DIM // 4)) for i in range(DIM // 4)])
    w = dots(split(turn(q, angles)), split(turn(k, angles))) / q.shape[1]
    return merge(w @ split(v) / (dots(split(q), split(k)).mean(-1, True) + 1e-6))


def rmt(layer, q, k, v, hw, p, decay_range=4.0, decomposed=False):
    """Fan et al. 2024 (arXiv 2309.11523), section 3.2, eq. 4 to 6, the convolution of eq. 7 in `reference`.

    But for the decay: eq. 5 multiplies softmax's weights by it, published models add its logarithm to the scores.
    """
    where = places(hw, p)
    angles = [[max(n - p, 0) * 10000 ** -(i / (D // 2 - 1)) for i in range(D // 2)] for n in range(len(where))]
    q, k, v = turn(split(q), angles), turn(split(k), angles), split(v)
    gamma = torch.tensor([1 - 2 ** (-2 - decay_range * h / HEADS) for h in range(HEADS)], dtype=torch.float64)
    away = torch.tensor([[(0, 0) if a is None or b is None else (abs(a[0] - b[0]), abs(a[1] - b[1]))
                          for b in where] for a in where])  # (N, N, 2)
    scores = dots(q, k) / math.sqrt(D) + gamma.log()[:, None, None] * away.sum(-1)
    if not decomposed:
        return merge(scores.softmax(-1) @ v)
    in_row, in_column = (scores.masked_fill(away[..., axis] > 0, -math.inf).softmax(-1) for axis in (0, 1))
    return merge(in_column @ in_row @ v)


def fcvit(layer, q, k, v, hw, p):
    """Ma et al. 2022 (arXiv 2212.12552), as its code has it (Apache-2.0, ``GlobalContext`` with ``compete``)."""
    s = torch.einsum('bhd,bhnd->bhn', split(k).mean(2), split(q)) / math.sqrt(D)
    centred = s - s.mean((1, 2), keepdim=True)
    std = (centred.square().sum((1, 2), keepdim=True) / (s[0].numel() - 1)).sqrt()
    s = layer.similarity['weight'][..., 0] * centred / (std + 1e-5) + layer.similarity['bias'][..., 0]
    hidden = affine(v.mean(1), layer.context.fc1)
    first, second = hidden[:, :DIM // 8], hidden[:, DIM // 8:]
    context = affine(torch.where(first > second, first, second), layer.context.fc2)
    return merge(s[..., None] * split(context[:, None]))


def vig(layer, x, hw, p, conv_input=False):
    """Liao et al. 2024 (arXiv 2405.18425), as its code has it (MIT, ``GatedLinearAttention``), up to the projection."""
    local = convolve(x, layer.local.weight[None, :, 0], layer.local.bias, hw, p)
    local = torch.cat([x[:, :p], (local * local.sigmoid())[:, p:]], 1)
    source = local if conv_input else x
    q, k, v = (split(part) for part in affine(source, layer.qkv).chunk(3, -1))

    def one_way(gate, order):
        z = split(affine(affine(source, gate[0]), gate[1]))
        forget = torch.exp(-torch.logaddexp(torch.zeros_like(z), -z) / 16)  # sigmoid(z)^(1 / 16)
        state, out = 0, {}
        for t in order:
            state = forget[:, :, t, :, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
            out[t] = torch.einsum('bhd,bhde->bhe', q[:, :, t], state) / math.sqrt(D)
        return torch.stack([out[t] for t in sorted(out)], 2)

    def rms(o, norm):
        return merge(o / (o.square().mean(-1, True) + 1e-5).sqrt() * norm.weight)

    n, share = x.shape[1], affine(source, layer.swap).sigmoid()
    out = (one_way(layer.forget[0], range(n)) + one_way(layer.forget[1], reversed(range(n)))) / 2
    return share * rms(out, layer.norms[0]) + (1 - share) * rms(split(local), layer.norms[1])


CORES = dict(RALA=rala, InLine=inline, ViTALiTy=vitality, Focused=focused, PolaFormer=polaformer, Agent=agent,
             Castling=castling, Vicinity=vicinity, MLLA=mlla, RMT=rmt, FCViT=fcvit)
CONVS = dict(RALA=('lepe', 5, DIM), Focused=('dwc', 5, D), PolaFormer=('dwc', 5, D), Agent=('dwc', 3, DIM),
             MLLA=('lepe', 3, DIM), RMT=('lepe', 5, DIM), FCViT=('dwc', 11, DIM))


def generated_conv(layer, x, v, hw, p):
    """InLine's local term: layers grouped by head make the 3 x 3 kernels of this image from its mean token."""
    def grouped(x, conv):
        rows = conv.weight[..., 0].chunk(HEADS)
        return torch.cat([part @ row.T for part, row in zip(x.chunk(HEADS, -1), rows, strict=True)], -1) + conv.bias

    hidden = grouped(x.mean(1), layer.local.fc1)
    kernels = grouped(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2, layer.local.fc2)  # c owns 9 c ... 9 c + 8
    return convolve(v, kernels.unflatten(-1, (DIM, 3, 3)), None, hw, p)


def token_conv(v, weight):
    """Castling's: (H, 1, taps, 1) along the sequence."""
    n, reach = v.shape[1], weight.shape[2] // 2
    taps = torch.stack([torch.stack([weight[:, 0, j - i + reach, 0] if abs(j - i) <= reach else weight.new_zeros(HEADS)
                                     for j in range(n)]) for i in range(n)])  # (N, N, H)
    return merge(torch.einsum('ijh,bhjd->bhid', taps, split(v)))


def reference(name, layer, x, hw, p, bare=False, **options):
    """The layer by its formula in float64, from its own weights; ``bare`` without local terms and gates."""
    if name == 'ViG':
        return affine(vig(layer, x, hw, p, **options), layer.proj)
    q, k, v = affine(x, layer.qkv).chunk(3, -1)
    out = CORES[name](layer, q, k, v, hw, p, **options)
    if bare:
        return affine(out, layer.proj)
    if name in CONVS:
        key, size, channels = CONVS[name]
        conv, size = getattr(layer, key), options.get('kernel_size', size)
        assert conv.weight.shape == (channels, 1, size, size)
        shared = DIM // channels  # heads that share a kernel
        out = out + convolve(v, conv.weight[None, :, 0].repeat(1, shared, 1, 1), conv.bias.repeat(shared), hw, p)
    if name == 'Castling':
        out = out + token_conv(v, layer.dconv.weight)
    if name == 'InLine' and options.get('local', True):
        out = out + generated_conv(layer, x, v, hw, p)
    if name in ('RALA', 'PolaFormer'):
        out = out * affine(x, layer.gate)
    out = affine(out, layer.proj)
    if name == 'Vicinity' and options.get('se_reduction', 1):  # y = proj(attention), y + y * SE(x)
        hidden = x.mean(1, keepdim=True) @ layer.se[0].weight.T
        out = out + out / (1 + torch.exp(-hidden.clamp(min=0) @ layer.se[2].weight.T))
    return out


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
