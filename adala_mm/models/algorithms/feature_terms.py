"""The terms that a loss between features of student and teacher may have, and their weights."""
from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from adala_mm.models.algorithms.base import mean_squared_error
from adala_mm.models.backbones.vit import pooled

BETA = 1.0  # of smooth L1: quadratic for differences below it, linear above; PyTorch's default


def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


def _smooth_l1(student: Tensor, teacher: Tensor) -> Tensor:
    return F.smooth_l1_loss(student, teacher, beta=BETA)


# name -> (the tokens that it compares, the distance)
TERMS: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    'mse': ('all', mean_squared_error), 'cosine': ('patches', _cosine), 'smooth_l1': ('patches', _smooth_l1),
    'class_token': ('class', _cosine)}


def term_weights(key: str, weights: Mapping[str, float] | None) -> dict[str, float]:
    """``weights`` without those that are 0; ``key`` is what messages call them.

    Raises:
        ValueError: for an unknown term, or a weight that is no number or below 0.
    """
    weights = dict(weights or {})
    if unknown := [name for name in weights if name not in TERMS]:
        raise ValueError(f'{key} has no term {unknown[0]!r}; it may have {", ".join(TERMS)}, each with a weight, for '
                         f'instance {key}=dict(mse=1.0)')
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float('inf'):
            raise ValueError(f'{key}: the weight of {name} is {weight!r}; it must be a number from 0 up')
    return {name: weight for name, weight in weights.items() if weight > 0}


def feature_terms(weights: Mapping[str, float], student: Tensor, teacher: Tensor, num_prefix: int = 0,
                  class_token: bool = False, chosen: Tensor | None = None) -> dict[str, Tensor]:
    """Each term of ``weights`` by itself, unweighted, in float32.

    - ``mse``: mean squared difference over all tokens and channels, prefix tokens included (ViT-AdaLA eq. 4);
    - ``cosine``: mean over patches of ``1 - cos(student, teacher)``;
    - ``smooth_l1``: mean over patches and channels of ``d^2 / 2`` where ``|d| < 1`` and ``|d| - 1/2`` elsewhere;
    - ``class_token``: mean over images of 1 - cos of the class tokens, or of the mean patches where there are none.

    Args:
        student, teacher: (B, N, C), prefix tokens first.
        num_prefix: number of class and register tokens.
        class_token: whether the first of them is a class token.
        chosen: (B, N - num_prefix), as many true in each image; if given, mse, cosine and smooth_l1 compare these
            patches and no other token.
    """
    pair = [tokens.float() for tokens in (student, teacher)]
    patches = [tokens[:, num_prefix:] for tokens in pair]
    views = {'class': [pooled(tokens, num_prefix, class_token) for tokens in pair]}
    if chosen is None:
        views.update(all=pair, patches=patches)
    else:
        views.update(dict.fromkeys(('all', 'patches'), [tokens[chosen] for tokens in patches]))
    return {name: TERMS[name][1](*views[TERMS[name][0]]) for name in weights}


def weighted_sum(weights: Mapping[str, float], terms: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([weight * terms[name] for name, weight in weights.items()]).sum()
