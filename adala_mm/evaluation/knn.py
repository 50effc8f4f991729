from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.evaluator import BaseMetric
from torch import Tensor
from torch.nn import functional as F

from adala_mm.registry import METRICS

ROWS = 1024  # images whose similarity to all others is in memory at a time


@METRICS.register_module()
class KNNMetric(BaseMetric):
    """Whether held-out images keep their neighbours when the softmax teacher becomes a linear student: a cheap probe.

    An image's feature is its final class token, or the mean of its patches where there is none; its neighbours are the
    ``k`` other images of the set whose features have the largest cosine. Reports, in percent,

    - ``knn/agreement``: the share of the teacher's neighbours that are the student's too (100 = all of them);
    - ``knn/accuracy`` and ``knn/teacher_accuracy``, if the images have labels: how often the majority of neighbours has
      the image's own label; of equally frequent labels the one of the nearest neighbour counts.

    Nothing is trained. The cost is quadratic in the number of images: for thousands of them, not for millions.

    Args:
        k: number of neighbours.

    Raises:
        ValueError: if there are no more than ``k`` images, or the model is no alignment stage.
    """

    default_prefix = 'knn'

    def __init__(self, k: int = 10, collect_device: str = 'cpu', prefix: str | None = None) -> None:
        super().__init__(collect_device, prefix)
        self.k = k

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        for sample, score in zip(data_batch['data_samples'], data_samples, strict=True):
            if 'pooled' not in score:
                raise ValueError('KNNMetric compares a student with its teacher, which AttentionAlignment and '
                                 'FeatureAlignment have')
            label = int(sample.gt_label[0]) if 'gt_label' in sample else None
            self.results.append((*score['pooled'], label))

    def compute_metrics(self, results: list[tuple[Tensor, Tensor, int | None]]) -> dict[str, float]:
        if len(results) <= self.k:
            raise ValueError(f'KNNMetric(k={self.k}) needs more than {self.k} images, got {len(results)}')
        students, teachers, labels = zip(*results, strict=True)
        student, teacher = (self.neighbours(torch.stack(features)) for features in (students, teachers))
        shared = (student[:, :, None] == teacher[:, None, :]).any(dim=2).float().mean()
        scores = {'agreement': 100 * shared.item()}
        if None not in labels:
            truth = torch.tensor(labels)
            scores |= {'accuracy': self.accuracy(student, truth), 'teacher_accuracy': self.accuracy(teacher, truth)}
        return scores

    def neighbours(self, features: Tensor) -> Tensor:
        """Indices (n, k) of the nearest other images, the nearest first."""
        features, found = F.normalize(features.float(), dim=1), []
        for first in range(0, len(features), ROWS):
            cosine = features[first:first + ROWS] @ features.T
            cosine.diagonal(first).fill_(-torch.inf)
            found.append(cosine.topk(self.k).indices)
        return torch.cat(found)

    @staticmethod
    def accuracy(neighbours: Tensor, truth: Tensor) -> float:
        votes = truth[neighbours]  # (n, k)
        counts = (votes[:, :, None] == votes[:, None, :]).sum(dim=2)  # how many agree with each neighbour
        winner = votes.gather(1, counts.argmax(dim=1, keepdim=True))[:, 0]  # argmax: the first, so the nearest
        return 100 * (winner == truth).float().mean().item()
