"""mmdet's pixel decoder with symbolic sizes: its own forward reads them out of tensors, which no tracer follows."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adala_mm.models.attentions.parts import grid_places
from adala_mm.ops import ms_deform_attn

Sizes = list[tuple[int, int]]


@contextmanager
def symbolic_sizes(model: nn.Module) -> Iterator[None]:
    """While it lasts, mmdet's ``MSDeformAttnPixelDecoder`` in ``model``, if there is one, runs `pixel_decoder`."""
    decoder = getattr(getattr(model, 'decode_head', None), 'pixel_decoder', None)
    if type(decoder).__name__ != 'MSDeformAttnPixelDecoder':
        yield
        return
    decoder.forward = partial(pixel_decoder, decoder)
    try:
        yield
    finally:
        del decoder.forward


def pixel_decoder(decoder: nn.Module, feats: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What ``decoder(feats)`` gives (Cheng et al. 2022): the mask features and the maps of the coarsest levels first.

    Args:
        decoder: ``MSDeformAttnPixelDecoder``.
        feats: (B, C, h, w), fine to coarse.
    """
    tokens, positions, places, sizes = [], [], [], []
    coarse_first = feats[::-1]
    for i, project in enumerate(decoder.input_convs):
        feat = project(coarse_first[i])
        h, w = feat.shape[-2:]
        position = decoder.postional_encoding(feat.new_zeros(feat.shape[0], h, w, dtype=torch.bool))
        positions.append(to_tokens(position + decoder.level_encoding.weight[i].view(1, -1, 1, 1)))
        y, x = grid_places(*((torch.arange(side, device=feat.device, dtype=feat.dtype) + 0.5) / side
                             for side in (h, w)))
        places.append(torch.stack([x, y], dim=-1))  # (h w, 2)
        tokens.append(to_tokens(feat))
        sizes.append((h, w))
    x, position, place = torch.cat(tokens, dim=1), torch.cat(positions, dim=1), torch.cat(places)
    for layer in decoder.encoder.layers:
        x = layer.norms[0](deformable_attention(layer.self_attn, x, position, place, sizes))
        x = layer.norms[1](layer.ffn(x))
    maps = [part.transpose(1, 2).unflatten(2, hw) for part, hw
            in zip(x.split([h * w for h, w in sizes], dim=1), sizes, strict=True)]
    for feat, lateral, output in zip(coarse_first[len(sizes):], decoder.lateral_convs, decoder.output_convs,
                                     strict=True):
        side = lateral(feat)
        maps.append(output(side + F.interpolate(maps[-1], size=side.shape[-2:], mode='bilinear', align_corners=False)))
    return decoder.mask_feature(maps[-1]), maps[:decoder.num_outs]


def deformable_attention(attn: nn.Module, x: Tensor, position: Tensor, place: Tensor, sizes: Sizes) -> Tensor:
    """mmcv's ``MultiScaleDeformableAttention`` of all tokens to all, with its residual: (B, N, C) to (B, N, C).

    Args:
        position: what is added to the queries, (B, N, C).
        place: of the tokens, (x, y) in [0, 1], (N, 2).
        sizes: (h, w) of the levels.
    """
    query = x + position
    value = attn.value_proj(x).unflatten(-1, (attn.num_heads, -1))
    offsets = attn.sampling_offsets(query).unflatten(-1, (attn.num_heads, attn.num_levels, attn.num_points, 2))
    weights = attn.attention_weights(query).unflatten(-1, (attn.num_heads, -1)).softmax(-1)
    relative = torch.stack([torch.stack([level[..., 0] / w, level[..., 1] / h], dim=-1)
                            for level, (h, w) in zip(offsets.unbind(3), sizes, strict=True)], dim=3)
    out = ms_deform_attn(value, sizes, place[None, :, None, None, None] + relative,
                         weights.unflatten(-1, (attn.num_levels, -1)))
    return attn.output_proj(out) + x


def to_tokens(grid: Tensor) -> Tensor:
    """(B, C, h, w) to (B, h w, C)."""
    return grid.flatten(2).transpose(1, 2)
