"""The mask head of a ViT that has its queries inside: no pixel decoder, no transformer decoder."""
from __future__ import annotations

import torch
from mmdet.registry import TASK_UTILS
from mmengine.model import BaseModule
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from adala_mm.models.heads.mask2former import Mask2FormerHead, outside_autocast
from adala_mm.registry import MODELS


@MODELS.register_module()
class EncoderMaskHead(Mask2FormerHead):
    """Masks and classes of the queries of a `QueryViT` (EoMT; Kerssies et al., CVPR 2025).

    ``mask_q = mlp(query_q) · upscale(map)`` at ``2^upscales`` times the size of the map, ``class_q = linear(query_q)``,
    K classes and "none". Queries are matched to segments, penalised and put together to a prediction as Mask2Former's.

    In EoMT's training a query attends, in each block, only where its mask of the block before is, ever less often as
    training goes on and never in the end. That is left out: queries see the whole image from the first step on, as in
    its prediction. It would need softmax attention and a mask from this head within the backbone.

    Args:
        in_channels: C of map and queries.
        num_classes: K.
        num_queries: of the backbone.
        upscales: how often the map is doubled; 2 bring patches of 16 to stride 4.
        loss_cls, loss_mask, loss_dice, train_cfg: of Mask2Former.

    Raises:
        ValueError: for features that are no pairs of map and queries, or another number of queries.
    """

    def __init__(self, in_channels: int, num_classes: int, loss_cls: dict, loss_mask: dict, loss_dice: dict,
                 num_queries: int = 100, upscales: int = 2, train_cfg: dict | None = None,
                 test_cfg: dict | None = None, align_corners: bool = False, ignore_index: int = 255,
                 init_cfg: dict | None = None) -> None:
        BaseModule.__init__(self, init_cfg)  # what Mask2Former builds is what this head does without
        self.num_classes = self.out_channels = num_classes
        self.num_queries = num_queries
        self.align_corners = align_corners
        self.ignore_index = ignore_index
        self.train_cfg, self.test_cfg = train_cfg, test_cfg
        if train_cfg:
            self.assigner = TASK_UTILS.build(train_cfg['assigner'])
            self.sampler = TASK_UTILS.build(train_cfg['sampler'], default_args=dict(context=self))
            for name in ('num_points', 'oversample_ratio', 'importance_sample_ratio'):
                setattr(self, name, train_cfg[name])
        self.class_weight = loss_cls['class_weight']
        self.loss_cls, self.loss_mask, self.loss_dice = map(MODELS.build, (loss_cls, loss_mask, loss_dice))

        dim = in_channels
        self.cls_embed = nn.Linear(dim, num_classes + 1)
        self.mask_embed = nn.Sequential(
            nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.upscale = nn.Sequential(*(layer for _ in range(upscales) for layer in (
            nn.ConvTranspose2d(dim, dim, 2, stride=2), nn.GELU(),
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False), LayerNorm2d(dim))))

    init_weights = BaseModule.init_weights

    @outside_autocast
    def _masks(self, weights: Tensor, features: Tensor) -> Tensor:
        return torch.einsum('bqc,bchw->bqhw', weights, features)

    def forward(self, x: tuple[Tensor, ...], batch_data_samples: list | None = None
                ) -> tuple[list[Tensor], list[Tensor]]:
        """Pairs of map (B, C, h, w) and queries (B, Q, C) to class logits (B, Q, K + 1) and mask logits
        (B, Q, h * 2^upscales, w * 2^upscales), one of each for a pair."""
        if len(x) % 2 or {f.shape[1] for f in x[1::2]} != {self.num_queries}:
            raise ValueError(f'EncoderMaskHead takes pairs of a map and {self.num_queries} queries, as QueryViT with '
                             f'num_queries={self.num_queries} returns them; got {[tuple(f.shape) for f in x]}')
        classes = [self.cls_embed(queries) for queries in x[1::2]]
        masks = [self._masks(self.mask_embed(queries), self.upscale(features))
                 for features, queries in zip(x[::2], x[1::2], strict=True)]
        return classes, masks
