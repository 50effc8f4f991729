"""Mask2Former of mmseg and mmdet, with what half precision cannot hold in float32, and for sliding windows."""
from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from mmdet.models.layers import MSDeformAttnPixelDecoder as MMDetPixelDecoder
from mmengine.structures import InstanceData
from mmengine.utils import apply_to
from mmseg.models.decode_heads.mask2former_head import Mask2FormerHead as MMSegMask2FormerHead
from torch import Tensor

from adala_mm.registry import MODELS

LARGEST_LOGIT = 1e4  # as far as matching is concerned: sums of more could overflow float32 too


def outside_autocast(method: Callable) -> Callable:
    """Decorator: the method's half-precision tensors come in as float32, and it runs outside of autocast."""
    @functools.wraps(method)
    def wide(self, *args):
        args = apply_to(args, lambda a: isinstance(a, Tensor) and a.dtype in (torch.float16, torch.bfloat16),
                        Tensor.float)
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            return method(self, *args)
    return wide


@MODELS.register_module()
class MSDeformAttnPixelDecoder(MMDetPixelDecoder):
    """mmdet's pixel decoder, in float32: in half precision a sampling point misses its place by a good part of a pixel.

    bfloat16 tells apart 256 places along the side of a map, and mmcv's compiled op does not take it at all.
    """

    forward = outside_autocast(MMDetPixelDecoder.forward)


@MODELS.register_module()
class Mask2FormerHead(MMSegMask2FormerHead):
    """mmseg's Mask2Former head under mixed precision: the transformer decoder in half, the rest in float32.

    Mask logits are sums over channels, and the costs by which masks are matched sums over up to 12,544 points: in
    float16 they overflow from a mean logit of 5. Weights have the same names as in mmseg's head.

    Without a cost the matching itself would raise an error, on one process of many; so logits that are not finite
    count as 0 in it, and the loss, which is not finite either, says so (`NonFiniteHook`).

    ``test_cfg=dict(mode='slide', ...)`` works: mmseg's head gives its answer to a crop the size of the whole image.
    """

    _forward_head = outside_autocast(MMSegMask2FormerHead._forward_head)
    loss_by_feat = outside_autocast(MMSegMask2FormerHead.loss_by_feat)

    def _get_targets_single(self, cls_score: Tensor, mask_pred: Tensor, gt_instances: InstanceData,
                            img_meta: dict) -> tuple[Tensor]:
        logits = (logits.nan_to_num(0, 0, 0).clamp(-LARGEST_LOGIT, LARGEST_LOGIT) for logits in (cls_score, mask_pred))
        return super()._get_targets_single(*logits, gt_instances, img_meta)

    def forward(self, x: list[Tensor], batch_data_samples: list | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """As mmdet's, which takes samples and does not read them: what counts FLOPs has none."""
        return super().forward(x, batch_data_samples)

    def predict(self, x: tuple[Tensor], batch_img_metas: list[dict], test_cfg: dict) -> Tensor:
        """Logits (B, K, H, W), sums of mask probabilities, at the size of the image or crop that ``x`` is of."""
        first, *others = batch_img_metas
        if isinstance(first['img_shape'], torch.Size):  # how mmseg tells its heads the size of a crop
            first = first | dict(pad_shape=first['img_shape'])
        return super().predict(x, [first, *others], test_cfg)
