"""ViTDet's feature pyramid for a backbone that has one scale only."""
from __future__ import annotations

from collections.abc import Sequence

from mmengine.model import BaseModule
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from adala_mm.registry import MODELS


def rescale(dim: int, scale: float) -> tuple[list[nn.Module], int]:
    """Layers that change the size of a map of ``dim`` channels by ``scale``, and the channels that they leave."""
    if scale == 4:
        return [nn.ConvTranspose2d(dim, dim // 2, 2, stride=2), LayerNorm2d(dim // 2), nn.GELU(),
                nn.ConvTranspose2d(dim // 2, dim // 4, 2, stride=2)], dim // 4
    if scale == 2:
        return [nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)], dim // 2
    if scale == 1:
        return [], dim
    if scale == 0.5:
        return [nn.MaxPool2d(2)], dim
    raise ValueError(f'scales: {scale} is none of 4, 2, 1 and 0.5')


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Several scales from the last map of a plain ViT (Li et al., ECCV 2022, "simple feature pyramid").

    Each scale is made on its own, by transposed convolutions that halve the channels or by max pooling, and brought to
    ``out_channels`` by a 1 x 1 and a 3 x 3 convolution, each with a LayerNorm over channels. Further maps beyond the
    coarsest scale take every other pixel of the one before.

    Maps come out in float32 under mixed precision too: mmdet's RoI extractors round boxes to the type of the features,
    and bfloat16 knows every fourth pixel only at a place above 512.

    Args:
        in_channels: channels of the backbone's map.
        out_channels: channels of every scale.
        scales: sizes relative to the backbone's map, of 4, 2, 1 and 0.5.
        num_outs: maps to return, at least ``len(scales)``.

    Raises:
        ValueError: for any other scale, or fewer maps than scales.
    """

    def __init__(self, in_channels: int, out_channels: int = 256, scales: Sequence[float] = (4, 2, 1, 0.5),
                 num_outs: int = 5, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        if num_outs < len(scales):
            raise ValueError(f'num_outs={num_outs} is less than the {len(scales)} scales')
        self.num_outs = num_outs
        self.stages = nn.ModuleList()
        for scale in scales:
            layers, channels = rescale(in_channels, scale)
            self.stages.append(nn.Sequential(
                *layers,
                nn.Conv2d(channels, out_channels, 1, bias=False), LayerNorm2d(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False), LayerNorm2d(out_channels)))

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps (B, C, h, w), of which the last counts, to ``num_outs`` maps (B, out_channels, h * scale, w * scale)."""
        maps = [stage(features[-1]).float() for stage in self.stages]
        while len(maps) < self.num_outs:
            maps.append(F.max_pool2d(maps[-1], kernel_size=1, stride=2))
        return tuple(maps)
