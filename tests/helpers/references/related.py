"""Linear attentions that the paper does not compare with.

Weights are explicit N x N matrices w[b, h, i, j]; x, q, k, v enter as (B, N, C) or (B, H, N, D).
"""
from __future__ import annotations

import math

import torch
from torch.nn import functional as F

DIM, HEADS, D = 32, 4, 8


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
