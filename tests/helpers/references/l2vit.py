"""L2ViT, token by token."""
from __future__ import annotations

import math

import torch
from mmengine.optim import OptimWrapper
from torch import nn


def one_head(layer, x, head):
    """q, k, v (N, D) of one head of one image x (N, C), and the key and value of a zero token."""
    c = x.shape[1]
    d = c // layer.num_heads
    bias = torch.zeros(3 * c, dtype=x.dtype) if layer.qkv.bias is None else layer.qkv.bias
    rows = [slice(part * c + head * d, part * c + (head + 1) * d) for part in range(3)]
    return [x @ layer.qkv.weight[r].T + bias[r] for r in rows], [bias[r] for r in rows[1:]]


def naive_global(layer, x, floor):
    """Zheng 2025 (arXiv 2501.16182), as its code has it (MIT): all pairs of tokens, before the projection.

    Also says what it divided by, before the floor.
    """
    images, weights = [], []
    for image in x:
        heads = []
        for head in range(layer.num_heads):
            (q, k, v), _ = one_head(layer, image, head)
            score = torch.relu(q) @ torch.relu(k).T  # (N, N)
            weight = score.sum(1, keepdim=True)
            heads.append(layer.tau['scale'][head, 0, 0] * (score / torch.clamp(weight, min=floor)) @ v)
            weights.append(weight.detach())
        images.append(torch.cat(heads, dim=1))
    return torch.stack(images), torch.stack(weights)


def naive_conv(grid, weight, bias):
    """Depth-wise convolution of (B, C, h, w), output by output."""
    h, w, r = *grid.shape[-2:], weight.shape[-1] // 2
    cells = []
    for y in range(h):
        for x in range(w):
            cell = bias.expand(len(grid), -1)
            for i in range(max(0, y - r), min(h, y + r + 1)):
                for j in range(max(0, x - r), min(w, x + r + 1)):
                    cell = cell + weight[:, 0, i - y + r, j - x + r] * grid[:, :, i, j]
            cells.append(cell)
    return torch.stack(cells, dim=2).reshape(grid.shape)


def naive_local(lcm, x, hw, num_prefix=0):
    grid = x[:, num_prefix:].transpose(1, 2).reshape(len(x), -1, *hw)
    y = naive_conv(grid, lcm.conv1.weight, lcm.conv1.bias)
    y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    if isinstance(lcm.norm, nn.BatchNorm2d):
        mean, var, eps = (s[:, None, None] for s in (lcm.norm.running_mean, lcm.norm.running_var,
                                                     torch.full_like(lcm.norm.running_var, 1e-5)))
    else:
        mean, var, eps = y.mean(1, keepdim=True), y.var(1, unbiased=False, keepdim=True), 1e-6
    y = (y - mean) / (var + eps).sqrt() * lcm.norm.weight[:, None, None] + lcm.norm.bias[:, None, None]
    y = naive_conv(y, lcm.conv2.weight, lcm.conv2.bias)
    return torch.cat([torch.zeros_like(x[:, :num_prefix]), y.flatten(2).transpose(1, 2)], dim=1)


def naive_window(layer, x, hw, num_prefix=0):
    """Zheng 2025 (arXiv 2501.16182), as its code has it (MIT): every token looks up whom it sees."""
    (h, w), s = hw, layer.window_size
    images = []
    for image in x:
        heads = []
        for head in range(layer.num_heads):
            (q, k, v), (pad_k, pad_v) = one_head(layer, image, head)
            outs = []
            for i in range(len(image)):
                if i < num_prefix:
                    keys, values = k, v
                else:
                    top, left = (i - num_prefix) // w // s * s, (i - num_prefix) % w // s * s
                    cells = [(y, z) for y in range(top, top + s) for z in range(left, left + s)]
                    seen = [*range(num_prefix), *(num_prefix + y * w + z for y, z in cells if y < h and z < w)]
                    padding = 0 if layer.mask_padding else s * s - len(seen) + num_prefix
                    keys = torch.cat([k[seen], pad_k.expand(padding, -1)])
                    values = torch.cat([v[seen], pad_v.expand(padding, -1)])
                score = torch.exp(keys @ q[i] / math.sqrt(len(q[i])))
                outs.append(score @ values / score.sum())
            heads.append(torch.stack(outs))
        images.append(torch.cat(heads, dim=1))
    return torch.stack(images)


SMALL = dict(embed_dims=(8, 12, 16, 24), depths=(2, 1, 3, 2), num_heads=(1, 2, 2, 3))


def randomise(module, std=0.5):
    """Every parameter and statistic visible in the output, in float64."""
    for name, value in module.double().state_dict().items():
        if name.endswith('running_var'):
            value.uniform_(0.5, 2)
        elif value.is_floating_point():
            value.normal_(std=std)
    return module


def project(layer, x):
    return x @ layer.proj.weight.T + layer.proj.bias


def step(model, data):
    """One step of training: the losses, and the parameters that did not move."""
    model.init_weights()
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = model.train_step(data, OptimWrapper(torch.optim.AdamW(model.parameters(), lr=1e-2)))
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    # BatchNorm takes off what these biases add: nothing but the rounding of their gradients can move them.
    return losses, still - {f'backbone.downsamples.0.conv.{i}.bias' for i in (0, 3)}
