"""Pictures of features and of segmentations."""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def shared_pca(maps: list[Tensor]) -> list[np.ndarray]:
    """First three principal components of feature maps, as RGB in [0, 1] (ViT-AdaLA Figs. 13 and 14).

    Components and value range come from the first entry, the teacher: equal colours mean equal features, across
    networks as well as across images.

    Args:
        maps: one tensor (B, C, h, w) per network, for the same B images.

    Returns:
        one array (B, h, w, 3) per network.
    """
    def rows(feature: Tensor) -> Tensor:
        return feature.float().permute(0, 2, 3, 1).flatten(0, 2)  # (B * h * w, C)

    reference = rows(maps[0])
    mean = reference.mean(dim=0)
    _, _, components = torch.linalg.svd(reference - mean, full_matrices=False)
    projected = (reference - mean) @ components[:3].T
    low, high = torch.quantile(projected, 0.02, dim=0), torch.quantile(projected, 0.98, dim=0)

    def colours(feature: Tensor) -> np.ndarray:
        b, _, h, w = feature.shape
        scaled = ((rows(feature) - mean) @ components[:3].T - low) / (high - low).clamp_min(1e-12)
        return scaled.clamp(0, 1).reshape(b, h, w, 3).cpu().numpy()

    return [colours(feature) for feature in maps]


def overlay(image: np.ndarray, label: np.ndarray, palette: list[list[int]], opacity: float = 0.8) -> np.ndarray:
    """Image (H, W, 3) uint8 with labels (H, W) painted over it; labels without a colour (255) stay unpainted."""
    colours = np.asarray(palette, dtype=float)
    known = label < len(colours)
    out = image.astype(float)
    out[known] = (1 - opacity) * out[known] + opacity * colours[label[known]]
    return out.round().astype(np.uint8)
