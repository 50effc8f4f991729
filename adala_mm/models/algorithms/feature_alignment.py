"""Stage 2 of ViT-AdaLA: the whole linear ViT learns to end where the softmax ViT ends."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from adala_mm.models.algorithms.attention_alignment import attention_mse
from adala_mm.models.algorithms.base import Alignment, relative_error
from adala_mm.models.algorithms.feature_terms import feature_terms, term_weights, weighted_sum
from adala_mm.registry import MODELS


def random_patches(count: int, grid: tuple[int, int], ratio: float, device: torch.device) -> Tensor:
    """(count, h w) with ``ratio`` of the patches of each image true, at least one."""
    patches = grid[0] * grid[1]
    order = torch.rand(count, patches, device=device).argsort(dim=1)
    return order < max(1, round(ratio * patches))


def hide_patches(images: Tensor, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
    """``images`` with hidden (B, h w) patches set to 0, which is the mean colour once images are normalised."""
    shown = (~hidden).to(images.dtype).unflatten(1, grid)[:, None]  # (B, 1, h, w)
    return images * F.interpolate(shown, size=images.shape[-2:], mode='nearest')


@MODELS.register_module()
class FeatureAlignment(Alignment):
    """Feature alignment (ViT-AdaLA section 3.2, eq. 4).

    ``loss = loss_scale * mean_{n,c} (student(image) - teacher(image))^2`` on the final tokens after the last
    LayerNorm, class and register tokens included. All other options go beyond the paper, and are off by default.

    Args:
        backbone: the student, with ``init_cfg`` naming a stage-1 checkpoint (or the pretrained one, to skip stage 1).
        teacher: the softmax ViT, with ``init_cfg`` naming the pretrained checkpoint.
        loss_scale: 5 for DINOv2, 1 for SigLIP, 4000 for CLIP, 1 for IN-1K (Table 5).
        head, data_preprocessor: see `Alignment`.
        loss: weights of the terms that are compared, ``dict(mse=1.0)`` unless given; `feature_terms` says what each
            is. IronViT's are ``dict(cosine=0.9, smooth_l1=0.1, class_token=1.0)``, whatever the scale of features:
            loss_scale is made for mse.
        layers: blocks whose outputs are compared, negative ones counted from the end; the loss is the mean over them.
            Each passes the network's own final LayerNorm first, as `AdaLAViT` hands it to a head: name the head's
            ``out_indices`` to align what the head will read. Blocks behind the last of them must not learn.
        mask_ratio: share of the patches, drawn anew for each image, that the student does not see; the teacher sees
            all. A hidden patch has the mean colour (0 once normalised), so that its embedding is the bias of the patch
            embedding plus its position. No mask token is learnt: nothing has to be kept out of the checkpoint.
        masked_only: let mse, cosine and smooth_l1 compare hidden patches only.
        attention_weight: lambda; adds ``lambda * loss of stage 1`` (not times loss_scale), for all blocks that are not
            softmax. `attention_mse` says what it costs; the teacher's blocks are not compiled then.

    All of the student learns, unless its ``trainable`` says otherwise (``attn\\.qkv\\.`` for the ablation of A.7). Its
    rotary positions are not disturbed (``rotary=dict(rescale=...)``): the teacher's are not.
    Logs ``rel_error = ||student - teacher|| / ||teacher||`` of the batch, the mean over ``layers`` (of what the student
    made of images with hidden patches, if there are any), and the terms, unweighted, if there are several.

    Raises:
        ValueError: if student and teacher differ in width, patch or prefix tokens, or in depth where that matters; for
            an unknown term or block, blocks that learn behind the last of ``layers``, weights that are below 0 or all
            0, a ``mask_ratio`` outside [0, 1), a ``masked_only`` without one, or an ``attention_weight`` where no
            attention learns.
    """

    def __init__(self, backbone: dict, teacher: dict, loss_scale: float = 1.0, head: dict | None = None,
                 data_preprocessor: dict | None = None, loss: Mapping[str, float] | None = None,
                 layers: Sequence[int] = (-1,), mask_ratio: float = 0.0, masked_only: bool = False,
                 attention_weight: float = 0.0) -> None:
        super().__init__(backbone, head, data_preprocessor)
        self.loss_scale = loss_scale
        self.weights = term_weights('loss', dict(mse=1.0) if loss is None else loss)
        if not self.weights:
            raise ValueError('loss: at least one term needs a weight above 0')
        if not 0 <= mask_ratio < 1:
            raise ValueError(f'mask_ratio={mask_ratio} must lie in [0, 1): it is the share of patches that are hidden')
        if masked_only and not mask_ratio:
            raise ValueError('masked_only=True compares hidden patches only, and mask_ratio=0 hides none')
        self.mask_ratio, self.masked_only = mask_ratio, masked_only
        self.attention_weight = attention_weight
        # A hook reads what the attentions of the teacher do; a compiled block would not call it.
        self.freeze('teacher', MODELS.build(dict(teacher, compile=False) if attention_weight else teacher))
        for fact in ('embed_dim', 'class_token', 'num_prefix', 'patch_size'):
            ours, theirs = getattr(self.backbone, fact), getattr(self.frozen['teacher'], fact)
            if ours != theirs:
                raise ValueError(f'student and teacher differ in {fact} ({ours} and {theirs}): their final features '
                                 'cannot be compared')
        depth, theirs = len(self.backbone.blocks), len(self.frozen['teacher'].blocks)
        self.layers = list(layers)
        if not self.layers or not all(-depth <= i < depth for i in self.layers):
            raise ValueError(f'layers={self.layers}: name at least one block, from {-depth} to {depth - 1} in a ViT '
                             f'of depth={depth}')
        if depth != theirs and (self.layers != [-1] or attention_weight):
            raise ValueError(f'student and teacher differ in depth ({depth} and {theirs}): layers={self.layers} and '
                             f'attention_weight={attention_weight} compare them block by block')
        for vit in (self.backbone, self.frozen['teacher']):
            vit.out_indices = [i % len(vit.blocks) for i in self.layers]
        check_attention_weight(attention_weight, self.backbone)
        check_last_block('layers', attention_weight, self.backbone)

    def load_teacher(self) -> None:
        self.require_pretrained('teacher', self.frozen['teacher'])
        self.frozen['teacher'].init_weights()

    def loss(self, images: Tensor) -> dict[str, Tensor]:
        vit, teacher, seen, chosen = self.backbone, self.frozen['teacher'], images, None
        reports = attention_mse(vit, teacher) if self.attention_weight else nullcontext()
        with reports as attention_losses, torch.no_grad():
            wanted = layer_tokens(teacher, images)
        if self.mask_ratio:
            grid = tuple(side // vit.patch_size for side in images.shape[-2:])
            hidden = random_patches(len(images), grid, self.mask_ratio, images.device)
            seen, chosen = hide_patches(images, hidden, grid), hidden if self.masked_only else None
        got = layer_tokens(vit, seen)
        terms = [feature_terms(self.weights, student, target, vit.num_prefix, vit.class_token, chosen)
                 for student, target in zip(got, wanted, strict=True)]
        terms = {name: torch.stack([layer[name] for layer in terms]).mean() for name in self.weights}
        loss = self.loss_scale * weighted_sum(self.weights, terms)
        log = dict(rel_error=torch.stack([relative_error(*pair) for pair in zip(got, wanted, strict=True)]).mean())
        if len(terms) > 1:
            log |= {name: term.detach() for name, term in terms.items()}
        if self.attention_weight:
            attention = torch.stack(attention_losses).mean()
            loss = loss + self.attention_weight * attention
            log['attention_mse'] = attention.detach()
        return {'loss': loss} | log

    @torch.no_grad()
    def teacher_features(self, images: Tensor) -> Tensor:
        return self.frozen['teacher'].forward_features(images)


def layer_tokens(vit: torch.nn.Module, images: Tensor) -> list[Tensor]:
    """Normalised tokens (B, N, C) after each of the ViT's ``out_indices``."""
    kept = vit.run_blocks(*vit.embed(images))
    return [vit.norm(kept[i]) for i in vit.out_indices]


def check_attention_weight(weight: float, vit: torch.nn.Module) -> None:
    """ValueError for a negative weight of the loss of stage 1, or one that nothing would learn from."""
    if weight < 0:
        raise ValueError(f'attention_weight={weight} must not be negative')
    if weight and not any(parameter.requires_grad for block in vit.blocks if not block.attn.is_softmax
                          for parameter in block.attn.parameters()):
        raise ValueError(f'attention_weight={weight}: no linear attention of the backbone learns (all blocks are '
                         'softmax, or trainable leaves them out)')


def check_last_block(option: str, attention_weight: float, vit: torch.nn.Module) -> None:
    """ValueError for parameters behind the last of the ViT's ``out_indices``, the option, that learn from no loss."""
    last = max(vit.out_indices)
    for i, block in enumerate(vit.blocks[last + 1:], start=last + 1):
        for name, parameter in block.named_parameters():
            has_loss = attention_weight > 0 and name.startswith('attn.') and not block.attn.is_softmax
            if parameter.requires_grad and not has_loss:
                raise ValueError(f'{option}={vit.out_indices}: nothing behind block {last} is compared, and blocks.{i}.'
                                 f'{name} would learn: add -1 to {option}, or let trainable leave it out')
