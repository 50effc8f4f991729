"""Open tiles and means of closed ones, query by query."""
from __future__ import annotations

import math

import torch

from helpers.layers import HEADS, WIDTH


def squares(hw, side):
    """Patches by the square that they are in."""
    found = {}
    for i in range(hw[0] * hw[1]):
        found.setdefault((i // hw[1] // side, i % hw[1] // side), []).append(i)
    return found


def terms_of(layer, queries, k, v, hw):
    """Key, value and number of tokens of all that a block of queries meets, for one head."""
    levels = [squares(hw, layer.tile << level) for level in range(layer.levels)]
    candidates, total, terms = list(levels[-1]), None, []
    for level in reversed(range(layer.levels)):
        cells = [levels[level][place] for place in candidates]
        means = [(k[cell].mean(0), v[cell].mean(0), len(cell)) for cell in cells]
        logits = torch.stack([queries @ key + math.log(n) for key, _, n in means], dim=-1)
        total = logits.exp().sum(-1, keepdim=True) if total is None else total
        costs = (logits.exp() / total).sum(0) * torch.stack([k[cell].var(0, correction=0).sum() for cell in cells])
        chosen = costs.topk(min(layer.num_open, len(cells))).indices.tolist()
        terms += [mean for i, mean in enumerate(means) if i not in chosen]
        opened = [candidates[i] for i in chosen]
        if level:
            candidates = [(y, x) for y, x in levels[level - 1] if (y // 2, x // 2) in opened]
    return terms + [(k[i], v[i], 1) for place in opened for i in levels[0][place]]


def coarse_to_fine(layer, q, k, v, hw, p):
    """Of our own: the weights of the layer's docstring, block by block."""
    q, out = q / math.sqrt(WIDTH), torch.zeros_like(q)
    for b, h in torch.cartesian_prod(torch.arange(q.shape[0]), torch.arange(HEADS)).tolist():
        out[b, h, :p] = (q[b, h, :p] @ k[b, h].T).softmax(-1) @ v[b, h]
        patches = [x[b, h, p:] for x in (q, k, v)]
        for block in squares(hw, layer.block).values():
            terms = [(k[b, h, i], v[b, h, i], 1) for i in range(p)] + terms_of(
                layer, patches[0][block], *patches[1:], hw)
            keys, values = (torch.stack([term[i] for term in terms]) for i in (0, 1))
            bias = torch.tensor([math.log(n) for *_, n in terms], dtype=q.dtype)
            weights = (patches[0][block] @ keys.T + bias).softmax(-1)
            for place, i in enumerate(block):
                out[b, h, p + i] = weights[place] @ values
    return out
