"""Builds the part of a config that is exported, backbone or whole model, as one function of the image."""
from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from adala_mm.models.backbones import AdaLAViT
from adala_mm.models.backbones.weights import load_vit
from adala_mm.registry import MODELS
from adala_mm.utils.checkpoint import load_checkpoint, local_file, read_state_dict
from adala_mm.version import __version__

PARTS = ('backbone', 'model')
L2VIT_STRIDE = 32


@dataclass(frozen=True)
class Target:
    """A model to be exported.

    Args:
        model: the backbone, classifier or segmentor, in evaluation mode.
        module: images (B, 3, H, W), normalised, to a tuple of outputs.
        outputs: their names.
        multiple: H and W must be multiples of this number of pixels.
        size: (H, W) of the example.
        attentions: config of the attention of each block; empty if the backbone offers no choice.
        notes: what a reader of the file should know.
    """

    model: nn.Module
    module: nn.Module
    outputs: tuple[str, ...]
    multiple: int
    size: tuple[int, int]
    attentions: tuple[dict, ...]
    notes: dict[str, str]

    @property
    def backbone(self) -> nn.Module:
        return getattr(self.model, 'backbone', self.model)

    @property
    def is_softmax(self) -> bool:
        return all(str(cfg['type']).endswith('SoftmaxAttention') for cfg in self.attentions)


class Size(tuple):
    """(H, W), possibly symbolic: mmseg's samples copy their metadata, which symbols do not survive."""

    def __deepcopy__(self, memo: dict) -> Size:
        return self


class Features(nn.Module):
    """Outputs of a backbone."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return self.backbone(image)


class Logits(nn.Module):
    """Class logits (B, K) of an mmpretrain classifier."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor]:
        return (self.model(image, mode='tensor'),)


class SegLogits(nn.Module):
    """Logits (B, K, H, W) of an mmseg segmentor at the image's size, the whole image at once.

    Mask2Former's are sums of mask probabilities, as mmseg has them: their argmax is the label map.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor]:
        return (self.model.encode_decode(image, [dict(img_shape=Size(image.shape[2:]))]),)


class HalfPrecision(nn.Module):
    """A copy of a target's module in float16, whose images and outputs stay float32.

    What the model itself computes in float32, such as the sums of linear attention over all tokens, stays in float32.
    The graph contains these casts; a converter of finished graphs would not know of them.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).half()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(output.float() for output in self.module(image.half()))


def assemble(cfg: Config, part: str = 'backbone', size: Sequence[int] | None = None, softmax: bool = False,
             fixed: bool = False) -> Target:
    """Builds what a config describes, without any weights.

    Args:
        cfg: of a classifier, a segmentor, or stage 1 or 2, whose student is taken.
        part: ``backbone``, or ``model`` for backbone and head.
        size: (H, W) of the example; None for the backbone's ``img_size``.
        softmax: whether to use softmax attention in all blocks.
        fixed: a plain ViT is built for images of that size alone. Its positions and the tables over its grid are
            resampled when weights are loaded, so that a graph of it resizes none.

    Raises:
        ValueError: for a model without a head, or a size that does not fit.
    """
    model_cfg = copy.deepcopy(cfg.model)
    kind = str(model_cfg.type).removeprefix('adala_mm.')
    if part == 'model' and 'decode_head' not in model_cfg and 'head' not in model_cfg:
        raise ValueError(f'{kind} has no head, so there is only its backbone to export: leave out --part model')
    backbone_cfg = model_cfg.backbone
    backbone_cfg.pop('compile', None)
    if softmax:
        backbone_cfg.attention = dict(type='adala_mm.SoftmaxAttention')
    if fixed and size is not None and str(backbone_cfg.type).endswith(('AdaLAViT', 'QueryViT')):
        backbone_cfg.img_size = tuple(size)
    for holder in model_cfg.values():  # weights come later, all from one place
        if isinstance(holder, dict):
            holder.pop('init_cfg', None)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        model = MODELS.build(backbone_cfg if part == 'backbone' else model_cfg)
    model.eval()
    model.requires_grad_(False)  # neither in a chain: mmpretrain's return nothing
    backbone = getattr(model, 'backbone', model)
    if part == 'backbone':
        backbone.out_indices = sorted(set(backbone.out_indices))
        module = Features(model)
        outputs = tuple(f'features_{i}' for i in backbone.out_indices) if len(backbone.out_indices) > 1 else (
            'features', *['queries'] * hasattr(backbone, 'query_embed'))
    else:
        module, outputs = (SegLogits(model), ('seg_logits',)) if 'decode_head' in model_cfg else (
            Logits(model), ('logits',))
    is_vit = hasattr(backbone, 'patch_size')
    multiple = backbone.patch_size if is_vit else L2VIT_STRIDE
    neck = getattr(model, 'neck', None)
    smallest = Fraction(min(getattr(neck, 'rescales', None) or [1])).limit_denominator(64)
    multiple *= ceil(1 / smallest)  # a pyramid that halves the grid needs an even one
    if size is None:
        native = [side * backbone.patch_size for side in backbone.pos_grid] if is_vit else [224, 224]
        size = [max(1, round(side / multiple)) * multiple for side in native]
    height, width = size
    if height % multiple or width % multiple or min(size) < 1:
        fits = ' x '.join(str(max(1, round(side / multiple)) * multiple) for side in size)
        raise ValueError(f'{height} x {width} pixels are not a multiple of {multiple}; {fits} are')
    attention = backbone_cfg.get('attention') or dict(type='adala_mm.LinearAttention')
    attentions = ([attention] * len(backbone.blocks) if isinstance(attention, dict) else attention) if is_vit else []
    preprocessor = model_cfg.get('data_preprocessor') or {}
    known = {key: preprocessor[key] for key in ('mean', 'std', 'bgr_to_rgb', 'to_rgb') if key in preprocessor}
    kinds = sorted({str(entry['type']).removeprefix('adala_mm.') for entry in attentions})
    notes = {'adala_mm': __version__, 'part': part, 'multiple': str(multiple),
             'attention': ', '.join(kinds) or type(backbone).__name__, 'preprocessing': json.dumps(known)}
    return Target(model, module, outputs, multiple, (height, width), tuple(dict(entry) for entry in attentions), notes)


def load(target: Target, cfg: Config, checkpoint: str | Path | None) -> None:
    """Loads ``checkpoint`` strictly; without one, a backbone gets the weights that ``init_cfg`` names.

    Raises:
        FileNotFoundError, ValueError: if there is no file, or if it cannot be read or does not fit.
    """
    init_cfg = dict(type='Pretrained', checkpoint=str(checkpoint)) if checkpoint else cfg.model.backbone.get('init_cfg')
    if target.model is target.backbone:
        if not init_cfg:
            raise ValueError("the config's backbone names no weights (init_cfg): give a CHECKPOINT")
        target.model.init_cfg = init_cfg
        target.model.init_weights()
        return
    if checkpoint is None:
        raise ValueError('a head has no weights without a CHECKPOINT: give the one that training wrote, or leave out '
                         '--part model')
    state = read_state_dict(str(checkpoint))
    if isinstance(target.backbone, AdaLAViT):  # it may be of another size than the weights
        load_vit(target.backbone, init_cfg)
        own = {f'backbone.{key}': value for key, value in target.backbone.state_dict().items()}
        state = {**state, **own}  # and without what the file says of its grid
    try:
        target.model.load_state_dict(state)
    except RuntimeError as error:
        problems = '\n'.join(line[:300] for line in str(error).splitlines()[1:9])
        raise ValueError(f'{checkpoint} does not fit the model of the config:\n{problems}\nIs it of another config, '
                         'or of a backbone alone (leave out --part model)?') from error


def name_classes(target: Target, checkpoint: str | Path | None) -> None:
    """Copies the names of the classes from a checkpoint of training into ``target.notes``."""
    if target.model is target.backbone or checkpoint is None:
        return
    meta = load_checkpoint(local_file(str(checkpoint))).get('meta')
    classes = ((meta.get('dataset_meta') if isinstance(meta, dict) else None) or {}).get('classes')
    if classes:
        target.notes['classes'] = json.dumps(list(classes))
