"""The baselines of ViT-AdaLA."""
from __future__ import annotations

import copy
import math

import torch
from torch import nn

from helpers.layers import DIM, HEADS, WIDTH, error, tokens, with_grads, without_code

LORA = dict(rank=3, alpha=5)


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
