"""A plain Vision Transformer with a free choice of attention per block, and timm's key names."""
from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from timm.layers import DropPath, LayerScale, Mlp, SwiGLU, get_act_layer, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adala_mm.models.attentions import Attention, build_attention
from adala_mm.models.attentions.build import require_rotation
from adala_mm.models.backbones.weights import is_extra, load_vit, read_grid, record_facts, resample_positions
from adala_mm.ops import RotaryPositions, same_grid
from adala_mm.registry import MODELS

OUT_TYPES = ('featmap', 'cls_token', 'avg_featmap', 'raw')
CUDA_GRAPH_MODES = ('reduce-overhead', 'max-autotune')
COMPILE_MODES = ('default', *CUDA_GRAPH_MODES, 'max-autotune-no-cudagraphs')


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens, by one strided convolution named ``proj`` as in timm."""

    def __init__(self, patch_size: int, in_channels: int, dim: int, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size, bias=bias)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image)  # (B, C, h, w)


class Block(nn.Module):
    """Pre-norm transformer block: ``x + LS1(attn(norm1(x)))``, then ``x + LS2(mlp(norm2(x)))``."""

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, norm_eps: float, layer_scale: float | None,
                 drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attn
        self.ls1 = LayerScale(dim, layer_scale) if layer_scale is not None else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = mlp
        self.ls2 = LayerScale(dim, layer_scale) if layer_scale is not None else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def add_residuals(self, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of the block, once its attention output is known (stage 1 puts the teacher's here)."""
        x = x + self.drop_path(self.ls1(attended))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))

    def forward(self, x: Tensor, *layout: Any) -> Tensor:
        """Tokens (B, N, C) after the block; ``layout`` is `AdaLAViT.layout` of the images."""
        return self.add_residuals(x, self.attn(self.norm1(x), *layout))


class Blocks(nn.ModuleList):
    """The blocks one after the other, as a module of its own so that `torch.compile` can take them in one piece."""

    def forward(self, x: Tensor, layout: tuple, wanted: Sequence[int], with_cp: bool) -> list[Tensor | None]:
        """Outputs of the blocks that ``wanted`` names and of the last one, by block; others are None."""
        kept: list[Tensor | None] = [None] * len(self)
        for i, block in enumerate(self):
            if with_cp and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, *layout, use_reentrant=False)
            else:
                x = block(x, *layout)
            if i in wanted or i == len(self) - 1:
                kept[i] = x
        return kept


def pooled(tokens: Tensor, num_prefix: int, class_token: bool) -> Tensor:
    """One feature per image (B, C) of tokens (B, N, C): the class token, or the mean of all but ``num_prefix``."""
    return tokens[:, 0] if class_token else tokens[:, num_prefix:].mean(dim=1)


def compile_mode(compile: bool | str) -> str | None:
    """The mode of ``torch.compile`` that a backbone's ``compile`` asks for; None for no compilation.

    Raises:
        ValueError: for what is neither True, False nor a mode; the message lists the modes.
    """
    if isinstance(compile, bool):
        return 'default' if compile else None
    if compile not in COMPILE_MODES:
        raise ValueError(f'compile={compile!r}: choose True, False, or a mode of torch.compile: '
                         f'{", ".join(COMPILE_MODES)}')
    return compile


@MODELS.register_module()
class AdaLAViT(BaseModule):
    """Plain ViT for mmseg (feature maps) and mmpretrain (tokens), softmax, linear or mixed.

    Covers DINOv2 (LayerScale, registers), DINOv3 (``rotary``, ``swiglu``), CLIP (``pre_norm``, quick-GELU), SigLIP (no
    class token), augreg/DeiT.
    State dicts of timm load strictly; see `load_vit` for what is resampled and dropped.

    Args:
        img_size: side, or (height, width), in pixels, for which ``pos_embed`` is stored. Other sizes are resampled
            on the fly (bicubic with antialiasing, as timm does). With ``rotary``, what is stored are the tables of
            attentions that have some.
        patch_size: P; images must have sides that P divides.
        in_channels: of the images; a pretrained kernel of RGB is fitted to it, as timm does (`load_vit`).
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias: the usual.
        class_token: whether there is a class token.
        num_registers: register tokens between the class token and the patches.
        no_embed_class: position embeddings for patches only (DINOv2 with registers).
        pre_norm: LayerNorm before the first block, and no bias in the patch embedding (CLIP).
        act: activation of the MLP, a timm name (``gelu``, ``quick_gelu``, ``gelu_tanh``).
        norm_eps: epsilon of every LayerNorm.
        layer_scale: initial LayerScale, or None for none.
        rotary: options of `RotaryPositions` (DINOv3), ``dict()`` for its own: queries and keys are turned by the place
            of their patch, and there is no ``pos_embed``. None for position embeddings.
        swiglu: whether the MLP is gated, ``fc2(silu(fc1_g(x)) * fc1_x(x))``; then ``act`` is not used.
        swiglu_align_to: its hidden channels, ``mlp_ratio`` times the width, are rounded up to a multiple of this.
        attention: ``dict(type='adala_mm.LinearAttention')`` for all blocks, or a list of ``depth`` such dicts.
        drop_path_rate: stochastic depth, rising linearly to this rate in the last block.
        with_cp: recompute block activations in the backward pass (non-reentrant checkpointing).
        compile: run blocks through ``torch.compile``: True, or one of its modes, of which ``default`` is the same as
            True. They share one compilation per image size. In the modes that record CUDA graphs (``reduce-overhead``,
            ``max-autotune``) all blocks are compiled as one function, which takes longer: a graph's outputs last until
            the next compiled call, so that one block's could not be the next one's input.
        out_indices: blocks to return, negative ones counted from the end; a block may be named more than once.
        out_type: ``featmap`` (B, C, h, w); ``cls_token`` (B, C); ``avg_featmap`` mean over patches (B, C); ``raw``
            all tokens (B, N, C), class and registers first.
        trainable: regular expression; parameters whose names it does not find are frozen. ``attn\\.qkv\\.`` tunes only
            the projections (ViT-AdaLA A.7), ``\\.lora\\.`` only LoRA's matrices. None trains everything.
        init_cfg: ``dict(type='Pretrained', checkpoint=<file or timm://name>)``; ``key``, ``prefix`` and ``grid`` of
            `load_vit` say what the file does not show.

    Every output has passed the final LayerNorm, so blocks are comparable in scale (DINOv2's own convention for dense
    tasks).

    Raises:
        ValueError: for an unknown attention, ``out_type``, ``compile`` or block index, a class token asked of a model
            without one, a list of attentions of the wrong length, a ``trainable`` that matches nothing, or an image
            that the patch does not divide.
    """

    def __init__(self, img_size: int | Sequence[int] = 224, patch_size: int = 16, in_channels: int = 3,
                 embed_dim: int = 768, depth: int = 12, num_heads: int = 12, mlp_ratio: float = 4.0,
                 qkv_bias: bool = True, class_token: bool = True, num_registers: int = 0,
                 no_embed_class: bool = False, pre_norm: bool = False, act: str = 'gelu', norm_eps: float = 1e-6,
                 layer_scale: float | None = None, rotary: dict | None = None, swiglu: bool = False,
                 swiglu_align_to: int = 8, attention: dict | Sequence[dict] | None = None,
                 drop_path_rate: float = 0.0, with_cp: bool = False, compile: bool | str = False,
                 out_indices: Sequence[int] = (-1,), out_type: str = 'featmap', trainable: str | None = None,
                 init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        attention = dict(type='adala_mm.LinearAttention') if attention is None else attention
        attentions = [attention] * depth if isinstance(attention, dict) else list(attention)
        if len(attentions) != depth:
            raise ValueError(f'attention lists {len(attentions)} layers, but the ViT has depth={depth}')
        if out_type not in OUT_TYPES:
            raise ValueError(f'unknown out_type {out_type!r}; choose one of {", ".join(OUT_TYPES)}')
        if out_type == 'cls_token' and not class_token:
            raise ValueError("out_type='cls_token' asked of a ViT without a class token; use 'avg_featmap'")
        for i in out_indices:
            if not -depth <= i < depth:
                raise ValueError(f'out_indices={tuple(out_indices)}: there is no block {i} in a ViT of depth={depth}')
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.patch_size = patch_size
        self.pos_grid = self._grid(height, width)
        self.embed_dim = embed_dim
        self.class_token = class_token
        self.num_prefix = int(class_token) + num_registers
        self.no_embed_class = no_embed_class
        self.with_cp = with_cp
        self.compile_mode = compile_mode(compile)
        self.out_indices = [i % depth for i in out_indices]
        self.out_type = out_type

        self.patch_embed = PatchEmbed(patch_size, in_channels, embed_dim, bias=not pre_norm)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, num_registers, embed_dim)) if num_registers else None
        positions = self.pos_grid[0] * self.pos_grid[1] + (0 if no_embed_class else self.num_prefix)
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, embed_dim)) if rotary is None else None
        self.rotary = None if rotary is None else RotaryPositions(embed_dim // num_heads, **rotary)
        self.norm_pre = nn.LayerNorm(embed_dim, eps=norm_eps) if pre_norm else nn.Identity()
        self.blocks = Blocks(
            Block(embed_dim,
                  build_attention(attentions[i], embed_dim, num_heads, qkv_bias, self.pos_grid, self.num_prefix),
                  SwiGLU(embed_dim, int(embed_dim * mlp_ratio), align_to=swiglu_align_to) if swiglu else
                  Mlp(embed_dim, int(embed_dim * mlp_ratio), act_layer=get_act_layer(act)),
                  norm_eps, layer_scale, drop_path=drop_path_rate * i / max(depth - 1, 1))
            for i in range(depth))
        for i, block in enumerate(self.blocks):
            self.check_attention(i, block.attn)
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.register_state_dict_post_hook(record_facts)
        self.register_load_state_dict_pre_hook(read_grid)
        if self.compile_mode:
            for module in [self.blocks] if self.compile_mode in CUDA_GRAPH_MODES else self.blocks:
                module.compile(mode=self.compile_mode)  # in place: keys and classes stay what they are
        self.trainable = trainable
        if trainable is not None:
            chosen = [bool(re.search(trainable, name)) for name, _ in self.named_parameters()]
            if not any(chosen):
                raise ValueError(f'trainable={trainable!r} matches no parameter of the ViT; names look like '
                                 f'{next(name for name, _ in self.blocks.named_parameters(prefix="blocks"))}')
            for parameter, learns in zip(self.parameters(), chosen, strict=True):
                parameter.requires_grad_(learns)

    def check_attention(self, i: int, attn: Attention) -> None:
        """TypeError or ValueError for an attention that block ``i`` cannot have, from a config or from `linearize`."""
        if self.rotary is not None:
            require_rotation(attn)

    @property
    def num_softmax_blocks(self) -> int:
        """How many blocks keep the softmax attention of the pretrained ViT."""
        return sum(block.attn.is_softmax for block in self.blocks)

    @property
    def block_counts(self) -> dict[str, int]:
        """``softmax_blocks`` and ``linear_blocks``, as every record and table has them."""
        return dict(softmax_blocks=self.num_softmax_blocks, linear_blocks=len(self.blocks) - self.num_softmax_blocks)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        p = self.patch_size
        if height % p or width % p:
            fix = tuple(max(p, round(s / p) * p) for s in (height, width))
            raise ValueError(f'image of {height} x {width} pixels cannot be cut into patches of {p}: resize, crop or '
                             f'pad it to a multiple of {p}, for instance {fix[0]} x {fix[1]}')
        return height // p, width // p

    def init_weights(self) -> None:
        """Loads ``init_cfg``'s checkpoint strictly, or draws timm's default initialisation if there is none."""
        if self.init_cfg:
            load_vit(self, self.init_cfg)
        else:
            self._random_init()
        self._is_init = True

    def _random_init(self) -> None:
        for name, module in self.named_modules():
            # What a variant adds to its attention has an initialisation of its own.
            if isinstance(module, nn.Linear) and not is_extra(name):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)

    def embed(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Image (B, in_channels, H, W) to the input of the first block: tokens (B, N, C) and the patch grid (h, w)."""
        channels = self.patch_embed.proj.in_channels
        if image.shape[1] != channels:
            raise ValueError(f'images of {image.shape[1]} channels for a ViT of {channels}: set in_channels='
                             f'{image.shape[1]} (weights of RGB are fitted to it), or load images as RGB')
        hw = self._grid(*image.shape[-2:])
        x = self.patch_embed(image).flatten(2).transpose(1, 2)  # (B, hw, C)
        prefix = [t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        position = self.pos_embed
        if position is None:
            return self.norm_pre(torch.cat([*prefix, x], dim=1)), hw
        if not same_grid(hw, self.pos_grid):
            position = resample_positions(position, self.pos_grid, hw, 0 if self.no_embed_class else self.num_prefix)
        if self.no_embed_class:
            x = torch.cat([*prefix, x + position], dim=1)
        else:
            x = torch.cat([*prefix, x], dim=1) + position
        return self.norm_pre(x), hw

    def layout(self, x: Tensor, hw: tuple[int, int]) -> tuple:
        """What blocks and attentions are told beside tokens: grid, number of prefix tokens, rotation if there is one.

        Of tokens x (B, N, C) on the device of the blocks, and a patch grid (h, w). In training mode of `rotary` the
        rotation is drawn anew, if it is disturbed at all: one for all blocks of a call.
        """
        if self.rotary is None:
            return hw, self.num_prefix
        return hw, self.num_prefix, self.rotary(hw, x.device)

    def run_blocks(self, x: Tensor, hw: tuple[int, int]) -> list[Tensor]:
        """Outputs of all blocks that ``out_indices`` names and of the last one, by block; others are None."""
        return self.blocks(x, self.layout(x, hw), self.out_indices, self.with_cp)

    def forward_features(self, image: Tensor) -> Tensor:
        """Final normalised tokens (B, N, C), prefix tokens first: what stage 2 aligns (ViT-AdaLA eq. 4)."""
        return self.norm(self.run_blocks(*self.embed(image))[-1])

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Image (B, 3, H, W) to one output per ``out_indices``, in the form of ``out_type``."""
        x, hw = self.embed(image)
        kept = self.run_blocks(x, hw)
        done = {i: self._format(self.norm(kept[i]), hw) for i in set(self.out_indices)}
        return tuple(done[i] for i in self.out_indices)

    def _format(self, tokens: Tensor, hw: tuple[int, int]) -> Tensor:
        if self.out_type == 'raw':
            return tokens
        if self.out_type != 'featmap':
            return pooled(tokens, self.num_prefix, self.out_type == 'cls_token')
        return tokens[:, self.num_prefix:].transpose(1, 2).unflatten(2, hw).contiguous()  # (B, C, h, w)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter for layer-wise lr decay, mmpretrain's convention.

        Returns:
            (id, number of ids): 0 for everything before the blocks, i + 1 for block i, and depth + 1 for what comes
            after them, in this model and outside of it; there are depth + 2 ids.
        """
        total = len(self.blocks) + 2
        if not param_name.startswith(prefix):
            return total - 1, total
        name = param_name[len(prefix):]
        if name.startswith('blocks.'):
            return int(name.split('.')[1]) + 1, total
        return (total - 1, total) if name.startswith('norm.') else (0, total)
