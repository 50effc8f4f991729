from __future__ import annotations

from collections.abc import Sequence

from mmengine.evaluator import BaseMetric

from adala_mm.registry import METRICS


@METRICS.register_module()
class AlignmentMetric(BaseMetric):
    """How far a linear ViT is from its softmax teacher on held-out images.

    Reports ``align/rel_error`` = ||student - teacher|| / ||teacher|| over the final tokens of all images (0 =
    identical), ``align/cosine`` (mean over tokens, 1 = identical direction), and, if the algorithm has the teacher's
    classification head, ``align/top1_agreement``: the percentage of images that both put into the same class.
    """

    default_prefix = 'align'

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        keys = ('error', 'energy', 'cosine', 'agree')
        self.results.extend({key: sample[key] for key in keys if key in sample} for sample in data_samples)

    def compute_metrics(self, results: list[dict]) -> dict[str, float]:
        def mean(key: str) -> float:
            return sum(r[key] for r in results) / len(results)

        scores = {'rel_error': (mean('error') / max(mean('energy'), 1e-12)) ** 0.5, 'cosine': mean('cosine')}
        if 'agree' in results[0]:
            scores['top1_agreement'] = 100 * mean('agree')
        return scores
