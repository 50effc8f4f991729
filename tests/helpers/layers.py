"""Attention layers with random weights, their inputs, and how they are compared."""
from __future__ import annotations

import copy

import torch
from torch import nn

from adala_mm.models.attentions import build_attention

DIM, HEADS, WIDTH = 32, 4, 8
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


OPTIONS = {'WindowAttention': dict(window_size=3), 'WindowedLinearAttention': dict(window_size=3),
           'NystromformerAttention': dict(num_landmarks=9), 'AgentAttention': dict(num_agents=9),
           'CoarseToFineAttention': dict(tile=2, num_open=3, block=2)}


def attention(name: str) -> dict:
    return dict(type=f'adala_mm.{name}', **OPTIONS.get(name, {}))
