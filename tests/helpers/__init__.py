"""What many tests use: where the repository is, and the smallest of models."""
from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMAGES = 10  # of `scenes`, to train on


def tiny_vit(**changes) -> dict:
    """Config of a ViT of depth 2 and width 32 on 32 x 32 images, softmax unless told otherwise."""
    return dict(type='adala_mm.AdaLAViT', img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4,
                attention=dict(type='adala_mm.SoftmaxAttention')) | changes


LINEAR = dict(type='adala_mm.LinearAttention')
