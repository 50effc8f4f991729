"""`linearize`: a pretrained ViT of timm, transformers or mmpretrain gets linear attention."""
from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from torch import nn

from adala_mm.adapters import Adapter, Architecture, Layout, find_vit
from adala_mm.models.attentions import Attention
from adala_mm.models.attentions.build import require_rotation
from adala_mm.registry import ATTENTIONS

Model = TypeVar('Model', bound=nn.Module)
FEW_PATCHES = 32 * 32  # with fewer, most of the tiles of 4 x 4 patches would be open, or all


def linearize(model: Model, attention: str | dict[str, Any] | type[Attention] = 'linear',
              keep_softmax: Iterable[int] = (), inplace: bool = False) -> Model:
    """Replaces the softmax attentions of a pretrained ViT.

    ``out = proj(mix(q, k, v))``, where mix is the new attention's and everything else the model's own: projections and
    their names, norms and rotary positions of queries and keys, LayerScale, dropout of outputs, call signatures and
    results. A state dict of the original loads (``strict=False`` if the attention has parameters of its own, which
    stand beside the projections), and one of a timm ViT has the keys of `AdaLAViT`. Any image size that the model
    takes. Without training, the new model knows little of the old one: see `adala_mm.align`.

    Args:
        model: timm ``VisionTransformer`` or ``Eva``; transformers ``ViTModel``, ``DeiTModel``, ``Dinov2Model``,
            ``Dinov2WithRegistersModel``, ``DINOv3ViTModel``, their ``...Backbone``, ``CLIPVisionModel``,
            ``SiglipVisionModel``, ``DPTModel`` or ``EomtForUniversalSegmentation``; mmpretrain ``VisionTransformer``;
            our ``AdaLAViT``; or a model with one of them inside, such as a classifier, Depth Anything or ``CLIPModel``.
        attention: class name without "Attention" in any case (``linear``, ``hedgehog``, ``coarse-to-fine``, ...), a
            registered name, ``dict(type=..., <options>)``, or a subclass of `adala_mm.models.attentions.Attention`.
            ``auto`` takes what `advised` says for the image size that the model was built for, ``dict(type='auto',
            grid=(64, 64))`` for another one, in patches.
        keep_softmax: blocks that stay as they are, negative ones counted from the end. So do blocks that have been
            replaced before: two calls give two kinds of attention. In EoMT, the blocks that queries have joined always
            stay, and do not count.
        inplace: change ``model`` instead of a copy. Hooks on the replaced attentions are lost either way.

    Returns:
        The model, with ``num_linear_blocks`` as an attribute. Only softmax attention can serve masks, causal attention
        and ``output_attentions``: they raise ValueError when asked for.

    Raises:
        TypeError: for a model that is not supported, or an attention in it that is not; for a new one whose own methods
            do not take the rotary positions that the model has.
        ValueError: for an unknown attention, a block that does not exist, a model without softmax blocks, or one that
            drops attention weights in training; for ``auto`` without a patch grid.
    """
    vit, architecture = find_vit(model if inplace else (model := copy.deepcopy(model)))
    attentions = architecture.attentions_of(vit)
    depth, keep = len(attentions), list(keep_softmax)
    if wrong := [i for i in keep if not -depth <= i < depth]:
        raise ValueError(f'keep_softmax={keep}: there is no block {wrong[0]} in a ViT of {depth} blocks')
    if all(is_replaced(attn) for attn in attentions):
        raise ValueError(f'no block of {type(vit).__name__} has its softmax attention any more: nothing to replace')
    chosen = [i for i in range(depth) if i not in keep and i - depth not in keep and not is_replaced(attentions[i])]
    for i in chosen:
        _check_supported(attentions[i], i, architecture)

    layout = next((attn.layout for attn in attentions if isinstance(attn, Adapter)), None)
    new_layout = layout is None
    layout = Layout(architecture.num_prefix(vit)) if new_layout else layout
    cfg, grid = find_attention(attention), architecture.grid(vit)
    if cfg.get('type') == 'auto':
        cfg = advised(**{'grid': grid} | {key: value for key, value in cfg.items() if key != 'type'})
    replaced = {i: architecture.adapter.replace(attentions[i], cfg, layout, grid) for i in chosen}
    for i, attn in replaced.items():
        if architecture.rotary(vit) is not None:
            require_rotation(attn)
        architecture.check(vit, i, attn)
    for i, attn in replaced.items():  # only now that all have been built
        setattr(architecture.blocks_of(vit)[i], architecture.attention, attn)
    if replaced and new_layout:
        architecture.listen(model, vit, layout)
    model.num_linear_blocks = sum(is_linear(attn) for attn in architecture.attentions_of(vit))
    say(f'{type(vit).__name__}: {model.num_linear_blocks} of {depth} blocks linear')
    return model


def linearize_blocks(model: nn.Module, attentions: Sequence[dict[str, Any] | None]) -> None:
    """Gives each block of a softmax ViT, in place, the attention that is listed for it; None leaves it as it is."""
    for i, kind in enumerate(attentions):
        if kind is not None and kind not in attentions[:i]:
            others = [j for j, other in enumerate(attentions) if other != kind]
            linearize(model, kind, keep_softmax=others, inplace=True)


def advised(grid: tuple[int, int] | None) -> dict[str, Any]:
    """The attention that ``auto`` stands for, for images of ``grid`` (h, w) patches; logs which, and why.

    It is `CoarseToFineAttention`, which comes nearest to softmax without training (docs/pick_attention.md). From 32 x
    32 patches on (512 px in patches of 16), 16 tiles of 4 x 4 patches are open. This is faster than softmax. With
    ``num_open=24`` it is nearer to softmax, and faster than it only at larger images. Below 32 x 32 patches, 16 tiles
    of 2 x 2 patches are open, for blocks of 4 x 4: an image of 14 x 14 patches (224 px) has only 16 tiles of 4 x 4, and
    with all of them open the attention would be softmax at a higher price. At 8 x 8 patches and less, 16 tiles of 2 x 2
    are all as well. Softmax is faster at such sizes. The cost grows faster than N; name another attention if it must be
    O(N).

    Raises:
        ValueError: if ``grid`` is not two numbers from 1 on.
    """
    if not isinstance(grid, Sequence) or len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"attention 'auto' depends on the patch grid of the images, and that is {grid}: say which, "
                         "as in dict(type='auto', grid=(32, 32))")
    few = grid[0] * grid[1] < FEW_PATCHES
    options = dict(tile=2, num_open=16, block=4) if few else dict(tile=4, num_open=16, block=8)
    told = ', '.join(f'{name}={value}' for name, value in options.items())
    say(f'auto: CoarseToFineAttention with {told} for {grid[0]} x {grid[1]} patches, the kind that comes nearest to '
        'softmax' + (', which itself is faster at so few patches' if few else ''))
    return {'type': 'CoarseToFineAttention', **options}


def find_attention(attention: str | dict[str, Any] | type[Attention]) -> dict[str, Any]:
    """What `build_attention` takes, for a short name, a registered name, a dict or a class; ``auto`` stays."""
    if isinstance(attention, dict):
        return {**attention, **find_attention(attention['type'])} if 'type' in attention else attention
    ATTENTIONS.import_from_location()
    short = str(attention).removeprefix('adala_mm.').lower().replace('_', '').replace('-', '').removesuffix('attention')
    names = {name.lower().removesuffix('attention'): name for name in ATTENTIONS.module_dict} | {'auto': 'auto'}
    return {'type': names.get(short, attention) if isinstance(attention, str) else attention}


def is_linear(attn: nn.Module) -> bool:
    return isinstance(attn, Attention) and not attn.is_softmax


def is_replaced(attn: nn.Module) -> bool:
    return isinstance(attn, Adapter) or is_linear(attn)


def say(message: str) -> None:
    """Logs to ``adala_mm``, and to stderr if nobody has set logging up."""
    logger = logging.getLogger('adala_mm')
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
    logger.info(message)


def _check_supported(attn: nn.Module | None, i: int, architecture: Architecture) -> None:
    kind = type(attn)
    if f'{kind.__module__}.{kind.__qualname__}' not in architecture.attentions:
        names = ' or '.join(name.rsplit('.', 1)[1] for name in architecture.attentions)
        raise TypeError(f'block {i} has {kind.__name__ if attn is not None else f"no {architecture.attention}"} where '
                        f'{names} is supported ({architecture.name}): name it in keep_softmax')
