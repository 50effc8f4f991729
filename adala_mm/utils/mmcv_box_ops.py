"""What mmdet's detectors call of mmcv's compiled ops, on torchvision's kernels: CPU and CUDA, mmcv's signatures.

Numbers are widened to float32 at least: torchvision has no kernels for bfloat16.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torchvision import ops


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes (N, 4) that non-maximum suppression keeps, best first.

    Args:
        offset: 1 if a box includes the pixels at ``x2`` and ``y2``, else 0.
    """
    boxes = _wide(boxes)
    return ops.nms(boxes + boxes.new_tensor([0, 0, offset, offset]), _wide(scores), iou_threshold)


def _roi_align(features: Tensor, rois: Tensor, size: tuple[int, int], spatial_scale: float, sampling_ratio: int,
               pool_mode: int, aligned: bool) -> Tensor:
    if pool_mode != 1:
        raise NotImplementedError("RoIAlign(pool_mode='max') needs an mmcv with compiled ops; without them there is "
                                  "pool_mode='avg', the default")
    return ops.roi_align(features, rois, size, spatial_scale, sampling_ratio, aligned)


def roi_align_forward(features: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor,
                      aligned_height: int, aligned_width: int, spatial_scale: float, sampling_ratio: int,
                      pool_mode: int, aligned: bool) -> None:
    """RoIAlign of features (B, C, h, w) in boxes (K, 5), the image's index first, into ``output``.

    Raises:
        NotImplementedError: for max pooling (``pool_mode`` 0).
    """
    output.copy_(_roi_align(_wide(features), _wide(rois), (aligned_height, aligned_width), spatial_scale,
                            sampling_ratio, pool_mode, aligned))


def roi_align_backward(grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor,
                       aligned_height: int, aligned_width: int, spatial_scale: float, sampling_ratio: int,
                       pool_mode: int, aligned: bool) -> None:
    """Gradient of `roi_align_forward` with respect to the features, into ``grad_input``."""
    # RoIAlign is linear in the features: its gradient is the same wherever it is taken.
    features = torch.zeros_like(_wide(grad_input), requires_grad=True)
    with torch.enable_grad():
        output = _roi_align(features, _wide(rois), (aligned_height, aligned_width), spatial_scale, sampling_ratio,
                            pool_mode, aligned)
    grad_input.copy_(torch.autograd.grad(output, features, _wide(grad_output))[0])


def _sigmoid_focal_loss(logits: Tensor, labels: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    if weight.numel():
        raise NotImplementedError('sigmoid_focal_loss with weights of classes needs an mmcv with compiled ops: leave '
                                  'the weights out, or install one')
    classes = torch.arange(logits.shape[1], device=logits.device)
    return ops.sigmoid_focal_loss(logits, (labels[:, None] == classes).to(logits.dtype), alpha, gamma)


def sigmoid_focal_loss_forward(logits: Tensor, labels: Tensor, weight: Tensor, output: Tensor, gamma: float,
                               alpha: float) -> None:
    """Focal loss (Lin et al. 2017, eq. 5) of logits (N, C) and labels (N), C being no class, into ``output`` (N, C).

    mmdet calls it on GPUs only; on the CPU it has a formula of its own.

    Raises:
        NotImplementedError: for weights of classes, which mmdet does not use.
    """
    output.copy_(_sigmoid_focal_loss(_wide(logits), labels, weight, gamma, alpha))


def sigmoid_focal_loss_backward(logits: Tensor, labels: Tensor, weight: Tensor, grad_input: Tensor, gamma: float,
                                alpha: float) -> None:
    """Derivative of each element of `sigmoid_focal_loss_forward` with respect to its logit, into ``grad_input``."""
    logits = _wide(logits.detach()).requires_grad_()
    with torch.enable_grad():
        loss = _sigmoid_focal_loss(logits, labels, weight, gamma, alpha).sum()
    grad_input.copy_(torch.autograd.grad(loss, logits)[0])
