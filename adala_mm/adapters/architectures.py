"""The ViTs that can be linearized: where their parts are, and how their attentions are called."""
from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adala_mm.adapters.base import TESTED, Adapter, Layout, find_part, refuse
from adala_mm.models.attentions import Attention, build_attention
from adala_mm.models.attentions.heads import split_heads
from adala_mm.ops import Rotation


class Timm(Adapter):
    """timm's ``Attention``: query, key and output norms, and a sigmoid gate, if the model has them."""

    @staticmethod
    def finishes(theirs: frozenset[str]) -> bool:
        return not theirs.isdisjoint(('q_norm', 'k_norm'))

    def finish(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.apply_their('q_norm', q), self.apply_their('k_norm', k), v

    def attend(self, x: Tensor, *layout: Any) -> Tensor:
        out = self.apply_their('norm', super().attend(x, *layout))
        return out * self._modules['gate'](x).sigmoid() if 'gate' in self.theirs else out

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
                *rotation: Rotation) -> Tensor:
        refuse('attn_mask', attn_mask)
        refuse('is_causal', is_causal)
        return self.apply_their('proj_drop', self.mixed(x, *rotation))


class TimmRotary(Timm):
    """timm's ``EvaAttention`` and ``AttentionRope``: separate biases, and patches of q and k turned by their place."""

    options = ('rotate_half',)

    @staticmethod
    def finishes(theirs: frozenset[str]) -> bool:
        return 'q_bias' in theirs or Timm.finishes(theirs)

    def finish(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if 'q_bias' in self.theirs:  # keys have none
            q, v = (x + split_heads(bias[None, None], self.num_heads) for x, bias in
                    ((q, self.q_bias), (v, self.v_bias)))
        return super().finish(q, k, v)

    def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None,
                is_causal: bool = False) -> Tensor:
        rotation = [] if rope is None else [self.rotation(rope)]
        return super().forward(x, attn_mask, is_causal, *rotation)

    def rotation(self, rope: Tensor) -> Rotation:
        """Of timm's table (..., n, 2 D) of sines and cosines, in which each stands twice."""
        sin, cos = rope.chunk(2, dim=-1)
        once = slice(0, sin.shape[-1] // 2) if self.rotate_half else slice(0, None, 2)
        return Rotation(cos[..., once], sin[..., once], interleaved=not self.rotate_half)


class Transformers(Adapter):
    """Attentions of transformers: three projections, and a second result where attention weights would be: None.

    Those of ViT, DeiT and DINOv2 of transformers 4, and of DPT, have their projections in one submodule, that of
    outputs with a dropout in another, and no second result. Their second argument is a mask of heads. DINOv3's are told
    cosines and sines (h w, D) of the places of patches, each of which stands twice.
    """

    @staticmethod
    def core(source: nn.Module) -> nn.Module:
        return source._modules.get('attention', source)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None,
                position_embeddings: tuple[Tensor, Tensor] | None = None, **kwargs) -> Tensor | tuple[Tensor, None]:
        if not torch.compiler.is_exporting():  # `refuse_weights` has seen what the caller gave
            refuse('attention_mask', attention_mask)
        for name in ASK_FOR_WEIGHTS[1:]:
            refuse(name, kwargs.get(name))
        rotation = [Rotation(*(x.chunk(2, dim=-1)[0] for x in position_embeddings))] if position_embeddings else []
        out = self.mixed(hidden_states, *rotation)
        return self._modules['output'].dropout(out) if 'output' in self.theirs else (out, None)


ASK_FOR_WEIGHTS = ('attention_mask', 'causal_attention_mask', 'head_mask', 'output_attentions')


def refuse_weights(vit: nn.Module, args: tuple, kwargs: dict, names: tuple[str, ...] = ASK_FOR_WEIGHTS) -> None:
    """Hook of the whole model, for what transformers does not tell its attentions.

    Some models collect attention weights behind their backs. In a graph there is a mask even if the caller gives none.
    """
    # Decorators take arguments that the signature has not (return_dict).
    asked = dict(zip(inspect.signature(vit.forward).parameters, args, strict=False)) | kwargs
    if asked.get('output_attentions') is None:
        asked['output_attentions'] = vit.config.output_attentions
    for name in names:
        refuse(name, asked.get(name))


class MMPretrain(Adapter):
    """mmpretrain's ``MultiheadAttention``, which has LayerScale and drop path inside."""

    @staticmethod
    def check(source: nn.Module) -> str | None:
        return 'adds its values to its output (v_shortcut)' if source.v_shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        for name in ('proj_drop', 'gamma1', 'out_drop'):
            x = self.apply_their(name, self.mixed(x) if name == 'proj_drop' else x)
        return x


class Own:
    """`AdaLAViT` tells its layers the grid itself: they need no adapter."""

    @staticmethod
    def replace(source: Attention, cfg: dict, layout: Layout, grid: tuple[int, int]) -> Attention:
        layer = build_attention(cfg, source.proj.in_features, source.num_heads, grid=grid,
                                num_prefix=layout.num_prefix).to(source.proj.weight)
        layer.qkv, layer.proj = source.qkv, source.proj
        return layer.train(source.training)


@dataclass(frozen=True)
class Architecture:
    """Where the parts of a ViT are.

    Args:
        name: for messages.
        models, attentions: qualified names of classes, subclasses of the models included, of the attentions not.
        adapter: for its attentions.
        blocks: names of the list of blocks in the model, which differ between versions of a library: one of them is
            there.
        attention, patches: names of the attention in a block, and of the convolution that cuts patches, None if the
            blocks are told the grid.
        grid: patch grid (h, w) of the images that the model was built for, or None.
        num_prefix: number of class and register tokens.
        features: final normalised tokens (B, N, C) of images (B, 3, H, W).
        rotary: the part that says by what its attentions turn queries and keys of patches, which some move at random
            in training; None if they do not turn.
        depth: how many of the blocks, from the first one on, are those of a plain ViT; None if all.
        one_size: whether the model takes images of no other size than it was built for.
        check: raises an error for an attention that the block of that index cannot have in this model.
    """

    name: str
    models: tuple[str, ...]
    attentions: tuple[str, ...]
    adapter: type[Adapter] | type[Own]
    blocks: tuple[str, ...]
    attention: str
    patches: str | None
    grid: Callable[[nn.Module], tuple[int, int] | None]
    num_prefix: Callable[[nn.Module], int]
    features: Callable[[nn.Module, Tensor], Tensor]
    rotary: Callable[[nn.Module], nn.Module | None] = lambda vit: None
    depth: Callable[[nn.Module], int | None] = lambda vit: None
    one_size: Callable[[nn.Module], bool] = lambda vit: False
    check: Callable[[nn.Module, int, nn.Module], None] = lambda vit, i, attn: None

    def attentions_of(self, vit: nn.Module) -> list[nn.Module | None]:
        """The attention of each block."""
        return [getattr(block, self.attention, None) for block in self.blocks_of(vit)]

    def blocks_of(self, vit: nn.Module) -> nn.ModuleList:
        return find_part(vit, self.blocks)[:self.depth(vit)]

    def listen(self, model: nn.Module, vit: nn.Module, layout: Layout) -> None:
        """Hooks by which the layers of the ``vit`` in ``model`` know with what it has been called."""
        if self.patches is not None:
            vit.get_submodule(self.patches).register_forward_hook(layout)
            for block in self.blocks_of(vit):
                block.register_forward_pre_hook(layout.enter, with_kwargs=True)
        if self.adapter is Transformers:
            vit.register_forward_pre_hook(refuse_weights, with_kwargs=True)
            # Their collectors of weights replace `forward` of softmax blocks, and an error inside would leave it so.
            for shell in self.shells_of(model, vit):
                shell.register_forward_pre_hook(partial(refuse_weights, names=('output_attentions',)), with_kwargs=True)

    def shells_of(self, model: nn.Module, vit: nn.Module) -> list[nn.Module]:
        """Models of the same file as the attentions in which the ViT lies: these hand on to it what they are asked."""
        files = {name.rpartition('.')[0] for name in self.attentions}
        return [module for module in model.modules() if module is not vit and vit in module.modules()
                and any(name.rpartition('.')[0] in files for name in _classes_of(module))]

    def holds(self, module: nn.Module) -> bool:
        """Whether this is one of the models; in transformers 4 some are shells around another of them."""
        return not _classes_of(module).isdisjoint(self.models) and any(
            getattr(module, blocks.split('.')[0], None) is not None for blocks in self.blocks)


def _classes_of(module: nn.Module) -> set[str]:
    return {f'{cls.__module__}.{cls.__qualname__}' for cls in type(module).__mro__}


def _config_grid(vit: nn.Module) -> tuple[int, int]:
    sides = ((side, side) if isinstance(side, int) else side for side in (vit.config.image_size, vit.config.patch_size))
    return tuple(image // patch for image, patch in zip(*sides, strict=True))


def _mmpretrain_features(vit: nn.Module, images: Tensor) -> Tensor:
    found = []  # what the model returns depends on its out_type
    last = vit.ln1 if vit.final_norm else vit.layers[-1]
    handle = last.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        vit(images)
    finally:
        handle.remove()
    return found[-1]


def _resizing_features(vit: nn.Module, images: Tensor) -> Tensor:
    """Of models that resize their positions if told so, which they can if they were built for square images."""
    return vit(pixel_values=images, interpolate_pos_encoding=not _is_oblong(vit))[0]


def _is_oblong(vit: nn.Module) -> bool:
    rows, columns = _config_grid(vit)
    return rows != columns


def _backbone_features(vit: nn.Module, images: Tensor) -> Tensor:
    """Of a model, or of its twin that answers with maps of the stages in ``config.out_features``."""
    if not hasattr(vit, 'out_features'):
        return vit(pixel_values=images)[0]
    found = vit(pixel_values=images, output_hidden_states=True, return_dict=True)
    return find_part(vit, ('layernorm', 'norm'))(found.hidden_states[-1])


def _eomt_features(vit: nn.Module, images: Tensor) -> Tensor:
    """What the queries join, normalised: the tokens of the image behind the blocks that are without queries."""
    tokens = vit.embeddings(images)
    for block in vit.layers[:_without_queries(vit)]:
        tokens = block(tokens)
    return vit.layernorm(tokens)


def _without_queries(vit: nn.Module) -> int:
    return vit.config.num_hidden_layers - vit.config.num_blocks


def _timm(name: str, models: tuple[str, ...], attentions: tuple[str, ...], adapter: type[Adapter]) -> Architecture:
    return Architecture(name, models, attentions, adapter, ('blocks',), 'attn', 'patch_embed.proj',
                        grid=lambda vit: vit.patch_embed.grid_size, num_prefix=lambda vit: vit.num_prefix_tokens,
                        features=lambda vit, images: vit.forward_features(images),
                        rotary=lambda vit: getattr(vit, 'rope', None),
                        one_size=lambda vit: not getattr(vit, 'dynamic_img_size', True))


def _hf(module: str, *classes: str) -> tuple[str, ...]:
    return tuple(f'transformers.models.{module}.modeling_{module}.{name}' for name in classes)


def _transformers(name: str, models: tuple[str, ...], attentions: tuple[str, ...], blocks: tuple[str, ...],
                  attention: str = 'attention', patches: str = 'embeddings.patch_embeddings.projection',
                  **options) -> Architecture:
    return Architecture(f'transformers {name}', models, attentions, Transformers, blocks, attention, patches,
                        grid=_config_grid, **options)


ARCHITECTURES = (
    _timm('timm VisionTransformer', ('timm.models.vision_transformer.VisionTransformer',),
          ('timm.layers.attention.Attention',), Timm),
    _timm('timm Eva (DINOv3, EVA-02, PE)', ('timm.models.eva.Eva',),
          ('timm.models.eva.EvaAttention', 'timm.layers.attention.AttentionRope'), TimmRotary),
    _transformers(
        'ViTModel, DeiTModel', _hf('vit', 'ViTModel') + _hf('deit', 'DeiTModel'),
        _hf('vit', 'ViTAttention') + _hf('deit', 'DeiTAttention'), ('encoder.layer', 'layers'),
        num_prefix=lambda vit: 1 + hasattr(vit.embeddings, 'distillation_token'), features=_resizing_features,
        one_size=_is_oblong),
    _transformers(
        'Dinov2Model, Dinov2WithRegistersModel and their Backbones',
        _hf('dinov2', 'Dinov2Model', 'Dinov2Backbone')
        + _hf('dinov2_with_registers', 'Dinov2WithRegistersModel', 'Dinov2WithRegistersBackbone'),
        _hf('dinov2', 'Dinov2Attention') + _hf('dinov2_with_registers', 'Dinov2WithRegistersAttention'),
        ('encoder.layer',), num_prefix=lambda vit: 1 + getattr(vit.config, 'num_register_tokens', 0),
        features=_backbone_features),
    _transformers(
        'DINOv3ViTModel, DINOv3ViTBackbone', _hf('dinov3_vit', 'DINOv3ViTModel', 'DINOv3ViTBackbone'),
        _hf('dinov3_vit', 'DINOv3ViTAttention'), ('layer', 'model.layer'), patches='embeddings.patch_embeddings',
        num_prefix=lambda vit: 1 + vit.config.num_register_tokens, features=_backbone_features,
        rotary=lambda vit: vit.rope_embeddings),
    _transformers(
        'CLIPVisionModel', _hf('clip', 'CLIPVisionModel', 'CLIPVisionTransformer'), _hf('clip', 'CLIPAttention'),
        ('encoder.layers',), attention='self_attn', patches='embeddings.patch_embedding', num_prefix=lambda vit: 1,
        features=lambda vit, images: vit.post_layernorm(_resizing_features(vit, images))),
    _transformers(
        'SiglipVisionModel', _hf('siglip', 'SiglipVisionModel', 'SiglipVisionTransformer'),
        _hf('siglip', 'SiglipAttention'), ('encoder.layers',), attention='self_attn',
        patches='embeddings.patch_embedding', num_prefix=lambda vit: 0, features=_resizing_features),
    _transformers(
        'DPTModel', _hf('dpt', 'DPTModel'), _hf('dpt', 'DPTViTAttention'), ('encoder.layer',),
        num_prefix=lambda vit: 1, features=lambda vit, images: vit(pixel_values=images)[0]),
    _transformers(
        'EomtForUniversalSegmentation (blocks without queries)', _hf('eomt', 'EomtForUniversalSegmentation'),
        _hf('eomt', 'EomtAttention'), ('layers',), num_prefix=lambda vit: 1 + vit.config.num_register_tokens,
        features=_eomt_features, depth=_without_queries, one_size=lambda vit: True),
    Architecture('mmpretrain VisionTransformer', ('mmpretrain.models.backbones.vision_transformer.VisionTransformer',),
                 ('mmpretrain.models.utils.attention.MultiheadAttention',), MMPretrain, ('layers',), 'attn',
                 'patch_embed.projection', grid=lambda vit: tuple(vit.patch_resolution),
                 num_prefix=lambda vit: vit.num_extra_tokens, features=_mmpretrain_features),
    Architecture('AdaLAViT', ('adala_mm.models.backbones.vit.AdaLAViT', 'adala_mm.models.backbones.query_vit.QueryViT'),
                 ('adala_mm.models.attentions.softmax.SoftmaxAttention',), Own, ('blocks',), 'attn', None,
                 grid=lambda vit: vit.pos_grid, num_prefix=lambda vit: vit.num_prefix,
                 features=lambda vit, images: vit.forward_features(images), rotary=lambda vit: vit.rotary,
                 check=lambda vit, i, attn: vit.check_attention(i, attn)),
)


# Why models that look like one of these are none.
REFUSED = {
    **dict.fromkeys(_hf('vit_mae', 'ViTMAEModel'), (
        'ViTMAEModel shuffles the patches of each image and leaves most of them out, so they lie on no grid: load its '
        "weights into a ViTModel, as in ViTModel.from_pretrained('facebook/vit-mae-base', add_pooling_layer=False)")),
    **dict.fromkeys(_hf('siglip2', 'Siglip2VisionModel', 'Siglip2VisionTransformer'), (
        'Siglip2VisionModel (NaFlex) pads images of several shapes to one length and masks the padding, which linear '
        'attention cannot: checkpoints of SigLIP 2 for one resolution are SiglipVisionModel')),
    **dict.fromkeys(_hf('dpt', 'DPTViTHybridEmbeddings'), (
        'DPTModel with is_hybrid=True has the patches of a convolutional network in front of its blocks')),
}


def find_vit(model: nn.Module) -> tuple[nn.Module, Architecture]:
    """The one supported ViT in ``model``, which may be that ViT itself, and its architecture.

    Raises:
        TypeError: if there is none, or more than one.
    """
    names = {name: None for module in model.modules() for name in _classes_of(module)}
    if reasons := [reason for name, reason in REFUSED.items() if name in names]:
        raise TypeError(f'{type(model).__name__} cannot be linearized. {reasons[0]}')
    found = [(module, one) for module in model.modules() for one in ARCHITECTURES if one.holds(module)]
    if len(found) != 1:
        raise TypeError(f'{type(model).__name__} holds {len(found) or "no"} ViTs that can be linearized'
                        f'{", pass one of them" if found else ""}. Supported: '
                        f'{"; ".join(one.name for one in ARCHITECTURES)}; or a model with one of them inside. Tested '
                        f'with {TESTED}')
    return found[0]
