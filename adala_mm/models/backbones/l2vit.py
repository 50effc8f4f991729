"""L2ViT: a hierarchical ViT of local windows and global linear attention in turn (Zheng 2025, arXiv 2501.16182)."""
from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from adala_mm.models.attentions.l2vit import L2ViTAttention, LocalConcentration, WindowAttention
from adala_mm.models.backbones.weights import note_loaded, read_backbone
from adala_mm.registry import MODELS

ARCHS = {
    'tiny': dict(embed_dims=(96, 192, 384, 768), depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    'small': dict(embed_dims=(96, 192, 384, 768), depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    'base': dict(embed_dims=(128, 256, 512, 1024), depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
}
OUT_TYPES = ('featmap', 'avg_featmap')


def to_tokens(grid: Tensor) -> Tensor:
    """(B, C, h, w) to (B, h w, C)."""
    return grid.flatten(2).transpose(1, 2)


def to_grid(tokens: Tensor, hw: tuple[int, int]) -> Tensor:
    """(B, h w, C) to (B, C, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, hw)


def pad_to_multiple(grid: Tensor, size: int) -> Tensor:
    """Zeros at the right and bottom of (B, C, h, w)."""
    h, w = grid.shape[-2:]
    return F.pad(grid, (0, -w % size, 0, -h % size))


class Stem(nn.Module):
    """Image to a fourth of its size: two convolutions 3 x 3 of stride 2 with BatchNorm, then LayerNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(3, dim // 2, 3, stride=2, padding=1), nn.BatchNorm2d(dim // 2), nn.ReLU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1), nn.BatchNorm2d(dim))
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor, hw: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        grid = self.conv(pad_to_multiple(image, 4))
        return self.norm(to_tokens(grid)), tuple(grid.shape[-2:])


class Downsample(nn.Module):
    """Tokens to half the grid: LayerNorm, then a convolution 2 x 2 of stride 2."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.conv = nn.Conv2d(dim, out_dim, 2, stride=2)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        grid = self.conv(pad_to_multiple(to_grid(self.norm(x), hw), 2))
        return to_tokens(grid), tuple(grid.shape[-2:])


class PositionEncoding(nn.Module):
    """``x + dwconv3x3(x)``: where a token stands, for grids of any size."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        return x + to_tokens(self.conv(to_grid(x, hw)))


class LocalBlock(nn.Module):
    """Position, ``x + window(norm1(x))``, position, ``x + mlp(norm2(x))``."""

    def __init__(self, dim: int, num_heads: int, window_size: int, drop_path: float) -> None:
        super().__init__()
        self.cpe1 = PositionEncoding(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window_size=window_size, mask_padding=False)
        self.cpe2 = PositionEncoding(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        x = self.cpe1(x, hw)
        x = x + self.drop_path(self.attn(self.norm1(x), hw, 0))
        x = self.cpe2(x, hw)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class GlobalBlock(nn.Module):
    """Position, ``x + linear(norm1(x))``, ``x + LCM(norm3(x))``, ``x + mlp(norm2(x))``."""

    def __init__(self, dim: int, num_heads: int, denom_floor: float, drop_path: float) -> None:
        super().__init__()
        self.cpe = PositionEncoding(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = L2ViTAttention(dim, num_heads, denom_floor=denom_floor)
        self.norm3 = nn.LayerNorm(dim)
        self.lcm = LocalConcentration(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        x = self.cpe(x, hw)
        x = x + self.drop_path(self.attn(self.norm1(x), hw, 0))
        x = x + self.drop_path(self.lcm(self.norm3(x), hw))
        return x + self.drop_path(self.mlp(self.norm2(x)))


@MODELS.register_module()
class L2ViT(BaseModule):
    """L2ViT for mmseg and mmdet (feature maps at strides 4, 8, 16 and 32) and mmpretrain (their mean over tokens).

    In each stage even blocks attend within windows and odd ones globally, in linear time. Images of any size: image
    and grids are padded with zeros at the right and bottom. Each output passes a LayerNorm of its own; that of the
    last stage is the classifier's final norm, so a classifier's checkpoint starts a segmentor and vice versa.

    Args:
        arch: ``tiny``, ``small`` or ``base`` (29, 50 and 89 M parameters with a head of 1,000 classes), or
            ``dict(embed_dims=..., depths=..., num_heads=...)`` with four numbers each.
        window_size: side of a window in tokens; 12 for images of 384.
        drop_path_rate: stochastic depth, rising linearly to this rate in the last block.
        out_indices: stages to return, ``(3,)`` for a classifier.
        out_type: ``featmap`` (B, C, h, w), or ``avg_featmap``, its mean over tokens (B, C).
        with_cp: recompute block activations in the backward pass (non-reentrant checkpointing).
        denom_floor: of `L2ViTAttention`.
        init_cfg: ``dict(type='Pretrained', checkpoint=<file>)``, one that was trained here.

    Raises:
        ValueError: for an unknown ``arch`` or ``out_type``, a stage that does not exist, or widths that do not fit.
    """

    def __init__(self, arch: str | dict = 'tiny', window_size: int = 7, drop_path_rate: float = 0.0,
                 out_indices: Sequence[int] = (0, 1, 2, 3), out_type: str = 'featmap', with_cp: bool = False,
                 denom_floor: float = 100.0, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        if isinstance(arch, str) and arch not in ARCHS:
            raise ValueError(f'unknown arch {arch!r}; choose one of {", ".join(ARCHS)}, or give a dict with '
                             f'{", ".join(ARCHS["tiny"])}')
        facts = ARCHS[arch] if isinstance(arch, str) else dict(arch)
        if set(facts) != set(ARCHS['tiny']) or any(len(numbers) != 4 for numbers in facts.values()):
            raise ValueError(f'arch={facts} must have four numbers for each of {", ".join(ARCHS["tiny"])}')
        if out_type not in OUT_TYPES:
            raise ValueError(f'unknown out_type {out_type!r}; choose one of {", ".join(OUT_TYPES)}')
        if not set(out_indices) <= set(range(4)):
            raise ValueError(f'out_indices={tuple(out_indices)}: the stages are 0, 1, 2 and 3')
        dims, heads, self.depths = facts['embed_dims'], facts['num_heads'], tuple(facts['depths'])
        if dims[0] % 2:
            raise ValueError(f'embed_dims={tuple(dims)}: the stem has half the first width, which must be even')
        self.with_cp = with_cp
        self.out_indices = tuple(out_indices)
        self.out_type = out_type

        self.downsamples = nn.ModuleList([Stem(dims[0]), *(Downsample(*dims[i:i + 2]) for i in range(3))])
        rates = iter(np.linspace(0, drop_path_rate, sum(self.depths)).tolist())
        self.stages = nn.ModuleList(nn.ModuleList(
            GlobalBlock(dims[i], heads[i], denom_floor, next(rates)) if j % 2 else
            LocalBlock(dims[i], heads[i], window_size, next(rates)) for j in range(self.depths[i])) for i in range(4))
        self.norms = nn.ModuleDict({str(i): nn.LayerNorm(dims[i]) for i in sorted(set(out_indices))})

    def init_weights(self) -> None:
        """Loads ``init_cfg``'s checkpoint strictly, or draws the published initialisation if there is none."""
        if self.init_cfg:
            self._load(self.init_cfg)
        else:
            for module in self.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    trunc_normal_(module.weight, std=0.02)
                    nn.init.zeros_(module.bias)
        self._is_init = True

    def _load(self, init_cfg: dict) -> None:
        """Every key below ``backbone.`` (all, if there are none) is used; only norms of outputs may be on one side."""
        path, state, _ = read_backbone(init_cfg)
        own = {key: value for key, value in self.state_dict().items() if key.startswith('norms.')}
        unused = [key for key in state if re.match(r'norms\.[0-3]\.', key) and key not in own]
        new = [key for key in own if key not in state]
        state = {key: value for key, value in {**own, **state}.items() if key not in unused}
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            problems = '\n'.join(line[:300] for line in str(error).splitlines()[1:20])
            raise ValueError(f'{path} does not fit this L2ViT:\n{problems}\nDoes arch name the size that was '
                             'trained?') from error
        note_loaded(self, [key for key in state if key not in new])
        print_log(f'L2ViT: {len(state) - len(new)} tensors from {path}'
                  + (f'; dropped {", ".join(unused)}' if unused else '')
                  + (f'; new: {", ".join(new)}' if new else ''), logger='current')

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Image (B, 3, H, W) to one output per ``out_indices``, in the form of ``out_type``."""
        x, hw, done = image, tuple(image.shape[-2:]), {}
        for i, (downsample, blocks) in enumerate(zip(self.downsamples, self.stages, strict=True)):
            x, hw = downsample(x, hw)
            for block in blocks:
                if self.with_cp and self.training and torch.is_grad_enabled():
                    x = checkpoint(block, x, hw, use_reentrant=False,
                                   context_fn=lambda block=block: (nullcontext(), frozen_statistics(block)))
                else:
                    x = block(x, hw)
            if i in self.out_indices:
                out = self.norms[str(i)](x)
                done[i] = out.mean(dim=1) if self.out_type == 'avg_featmap' else to_grid(out, hw).contiguous()
        return tuple(done[i] for i in self.out_indices)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter for layer-wise lr decay, mmpretrain's convention.

        Returns:
            (id, number of ids): 0 for the stem, 1 and up for the blocks, a stage's first block including the
            convolution before it, and the last for output norms and what is outside of this model.
        """
        total = sum(self.depths) + 2
        match = re.match(r'(downsamples|stages)\.(\d+)\.(\d*)', param_name.removeprefix(prefix))
        if not param_name.startswith(prefix) or not match:
            return total - 1, total
        kind, stage, block = match.groups()
        if kind == 'downsamples' and stage == '0':
            return 0, total
        return 1 + sum(self.depths[:int(stage)]) + int(block or 0), total


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Lets BatchNorm see a batch again, in a recomputation, without counting it twice."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # Not `track_running_stats`, without which fewer tensors would be saved than in the first run.
        norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, kept in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = kept
