"""Stage 2 of ViT-AdaLA: the whole linear ViT learns to end where the softmax ViT ends."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from adala_mm.models.algorithms.base import Alignment, relative_error
from adala_mm.registry import MODELS


@MODELS.register_module()
class FeatureAlignment(Alignment):
    """Feature alignment (ViT-AdaLA section 3.2, eq. 4).

    ``loss = loss_scale * mean_{n,c} (student(image) - teacher(image))^2`` on the final tokens after the last
    LayerNorm, class and register tokens included.

    Args:
        backbone: the student, with ``init_cfg`` naming a stage-1 checkpoint (or the pretrained one, to skip stage 1).
        teacher: the softmax ViT, with ``init_cfg`` naming the pretrained checkpoint.
        loss_scale: 5 for DINOv2, 1 for SigLIP, 4000 for CLIP, 1 for IN-1K (Table 5).
        head, data_preprocessor: see `Alignment`.

    All of the student learns, unless its ``trainable`` says otherwise (``attn\\.qkv\\.`` for the ablation of A.7).
    Logs ``rel_error = ||student - teacher|| / ||teacher||`` of the batch.

    Raises:
        ValueError: if student and teacher differ in width, patch or prefix tokens.
    """

    def __init__(self, backbone: dict, teacher: dict, loss_scale: float = 1.0, head: dict | None = None,
                 data_preprocessor: dict | None = None) -> None:
        super().__init__(backbone, head, data_preprocessor)
        self.loss_scale = loss_scale
        self.freeze('teacher', MODELS.build(teacher))
        for fact in ('embed_dim', 'class_token', 'num_prefix', 'patch_size'):
            ours, theirs = getattr(self.backbone, fact), getattr(self.frozen['teacher'], fact)
            if ours != theirs:
                raise ValueError(f'student and teacher differ in {fact} ({ours} and {theirs}): their final features '
                                 'cannot be compared')

    def load_teacher(self) -> None:
        self.require_pretrained('teacher', self.frozen['teacher'])
        self.frozen['teacher'].init_weights()

    def loss(self, images: Tensor) -> dict[str, Tensor]:
        teacher = self.teacher_features(images)
        student = self.backbone.forward_features(images)
        mse = F.mse_loss(student.float(), teacher.float())
        return {'loss': self.loss_scale * mse, 'rel_error': relative_error(student, teacher)}

    @torch.no_grad()
    def teacher_features(self, images: Tensor) -> Tensor:
        return self.frozen['teacher'].forward_features(images)
