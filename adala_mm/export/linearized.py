"""Prepares a linearized model of timm, transformers or mmpretrain for export, without a config."""
from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from adala_mm.adapters import Architecture, find_vit
from adala_mm.export.target import Target
from adala_mm.models.attentions import Attention
from adala_mm.version import __version__


class Tokens(nn.Module):
    """Final normalised tokens (B, N, C) of the ViT inside."""

    def __init__(self, vit: nn.Module, architecture: Architecture) -> None:
        super().__init__()
        self.vit = vit
        self.features = architecture.features

    def forward(self, image: Tensor) -> tuple[Tensor]:
        return (self.features(self.vit, image),)


class OwnLogits(nn.Module):
    """The model's own output: a tensor, or the ``logits`` of transformers' results.

    Args:
        resize: whether to ask the model to resize its positions, if it takes such an argument.
    """

    def __init__(self, model: nn.Module, resize: bool = False) -> None:
        super().__init__()
        self.model = model
        tell = resize and 'interpolate_pos_encoding' in inspect.signature(model.forward).parameters
        self.options = {'interpolate_pos_encoding': True} if tell else {}

    def forward(self, image: Tensor) -> tuple[Tensor]:
        found = self.model(image, **self.options)
        return (found if isinstance(found, Tensor) else found.logits,)


def of_linearized(model: nn.Module, part: str = 'backbone', size: Sequence[int] | None = None,
                  fixed: bool = False) -> Target:
    """A model from `adala_mm.load` or `linearize`, put into evaluation mode.

    Args:
        part: ``backbone`` for the final normalised tokens of the ViT, ``model`` for class logits.
        size: (H, W) of the example; None for the size that the model was built for.
        fixed: whether the graph will be tied to that size.

    Raises:
        TypeError: for a model without a supported ViT inside.
        ValueError: for a model without a classifier, a size that does not fit, or a free size of a model of timm that
            takes one only.
    """
    model.eval()
    model.requires_grad_(False)
    vit, architecture = find_vit(model)
    side = vit.patch_size if architecture.patches is None else vit.get_submodule(architecture.patches).kernel_size[0]
    native = tuple(cells * side for cells in architecture.grid(vit))
    size = native if size is None else tuple(size)
    if any(pixels % side or pixels < side for pixels in size):
        raise ValueError(f'{size[0]} x {size[1]} pixels are not a multiple of the patch, {side}')
    if one_size := architecture.one_size(vit):
        of_timm = hasattr(vit, 'set_input_size')
        if not fixed or (size != native and not of_timm):
            advice = 'leave the size out' if fixed else 'say --fixed-size'
            raise ValueError(f'{type(vit).__name__} takes images of {native[0]} x {native[1]} only: {advice}' + (
                ', or make it with dynamic_img_size=True before adala_mm.save' if of_timm else ''))
        if size != native:
            vit.set_input_size(img_size=size)
    if part == 'model' and not has_classes(model):
        raise ValueError(f'{type(model).__name__} has no classifier, so there are only its tokens to export: leave out '
                         '--part model')
    module, outputs = (Tokens(vit, architecture), ('features',)) if part != 'model' else (
        OwnLogits(model, not one_size), ('logits',))
    attentions = tuple(attn.adala_mm if isinstance(attn, Attention) else {'type': 'adala_mm.SoftmaxAttention'}
                       for attn in architecture.attentions_of(vit))
    kinds = sorted({kind['type'].removeprefix('adala_mm.') for kind in attentions})
    notes = {'adala_mm': __version__, 'part': part, 'multiple': str(side), 'attention': ', '.join(kinds),
             'preprocessing': json.dumps(preprocessing(model)), **names_of_classes(model)}
    return Target(model, module, outputs, side, size, attentions, notes)


def has_classes(model: nn.Module) -> bool:
    """Whether the model ends in a classifier: timm's, or one of transformers' ``...ForImageClassification``."""
    return getattr(model, 'num_classes', 0) > 0 or 'ForImageClassification' in type(model).__name__


def preprocessing(model: nn.Module) -> dict[str, Any]:
    """Mean and std of RGB pixels from 0 to 255, as timm's model states them; empty if it states none."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    if not cfg.get('mean') or not cfg.get('std'):
        return {}
    return {part: [255 * value for value in cfg[part]] for part in ('mean', 'std')} | {'to_rgb': True}


def names_of_classes(model: nn.Module) -> dict[str, str]:
    """Those of a config of transformers, unless they are its LABEL_0, LABEL_1, ..."""
    names = getattr(getattr(model, 'config', None), 'id2label', None) or {}
    if not has_classes(model) or all(str(name).startswith('LABEL_') for name in names.values()):
        return {}
    return {'classes': json.dumps([names[i] for i in sorted(names)])}
