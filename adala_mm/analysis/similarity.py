"""How alike two representations of the same images are, beyond the distance between them."""
from __future__ import annotations

import numpy as np
import torch
from scipy.cluster.vq import kmeans2, vq
from torch import Tensor

from adala_mm.evaluation import KNNMetric

RIDGE = 0.01  # of the number of samples, features having unit variance


def unbiased_hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741  the literature's name
    """Unbiased estimate of the Hilbert-Schmidt independence criterion (Song et al. 2012, eq. 5).

    ``[tr(K L) + 1'K1 1'L1 / ((n-1)(n-2)) - 2 1'K L1 / (n-2)] / (n (n-3))``, K and L with their diagonals set to 0.

    Args:
        k, l: Gram matrices (n, n), n > 3, of the same n examples in two representations.
    """
    n = len(k)
    k, l = k - k.diag().diag(), l - l.diag().diag()  # noqa: E741
    rows = k.sum(dim=0), l.sum(dim=0)
    total = (k * l).sum() + rows[0].sum() * rows[1].sum() / ((n - 1) * (n - 2)) - 2 * rows[0] @ rows[1] / (n - 2)
    return total / (n * (n - 3))


class MinibatchCKA:
    """Linear centred kernel alignment over minibatches, with an unbiased estimate in each (Nguyen et al. 2021, eq. 3).

    ``mean HSIC(K, L) / sqrt(mean HSIC(K, K) mean HSIC(L, L))`` with K = X X' and L = Y Y', means over batches. An
    example is an image with all of its tokens side by side, as in Raghu et al. 2021. 1 if one representation is the
    other but for a rotation, a scale and a shift; around 0, of either sign, if they have nothing in common.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Adds a batch (B, ...) of B > 3 images."""
        k, l = gram(x), gram(y)  # noqa: E741
        self.sums += torch.stack([unbiased_hsic(k, l), unbiased_hsic(k, k), unbiased_hsic(l, l)]).cpu()

    def value(self) -> float | None:
        """CKA of all batches; None before the first one."""
        cross, own, other = self.sums.tolist()
        return cross / (own * other) ** 0.5 if own * other > 0 else None


def gram(x: Tensor) -> Tensor:
    """Inner products (B, B) of the examples of (B, ...), float64."""
    x = x.flatten(1).double()
    return x @ x.T


def knn_agreement(student: Tensor, teacher: Tensor, k: int) -> float:
    """Share of the teacher's ``k`` nearest neighbours among the images that are the student's too, in percent.

    Args:
        student, teacher: one feature per image, (n, C), n > k; see `KNNMetric`.
    """
    pairs = [(*pair, None) for pair in zip(student, teacher, strict=True)]
    return KNNMetric(k).compute_metrics(pairs)['agreement']


def probe_agreement(student: np.ndarray, teacher: np.ndarray, fit: np.ndarray,
                    clusters: int) -> dict[str, float]:
    """How well a linear probe on the student's features finds the teacher's classes, without labels.

    The classes are ``clusters`` of the teacher's features (k-means on the samples to fit with). Ridge regression to
    their indicators, on features of unit variance, is fitted to the student's features of those samples; it is scored
    on the others, whose class is that of the teacher's nearest cluster. The same probe on the teacher's own features
    says how much can be had.

    Args:
        student, teacher: features (n, C) of the same samples.
        fit: which samples to fit with, (n,) bool; the rest is held out.
        clusters: number of classes.

    Returns:
        in percent: ``student`` and ``teacher`` (the probe's accuracy), ``largest`` (the share of the most frequent
        class: what a constant answer has).

    Raises:
        ValueError: if there are fewer samples to fit with than clusters.
    """
    if fit.sum() < clusters or fit.all():
        raise ValueError(f'{int(fit.sum())} samples to fit with and {int((~fit).sum())} held out are too few for '
                         f'{clusters} clusters: take more images')
    scale = teacher[fit].std(axis=0) + 1e-12
    centres, _ = kmeans2(teacher[fit] / scale, clusters, minit='++', seed=0)
    classes, _ = vq(teacher / scale, centres)

    def accuracy(features: np.ndarray) -> float:
        features = features.astype(np.float64)
        mean, spread = features[fit].mean(axis=0), features[fit].std(axis=0) + 1e-12
        features = (features - mean) / spread
        targets = np.eye(clusters)[classes[fit]]
        x, y = features[fit], targets - targets.mean(axis=0)
        weights = np.linalg.solve(x.T @ x + RIDGE * len(x) * np.eye(x.shape[1]), x.T @ y)
        found = (features[~fit] @ weights + targets.mean(axis=0)).argmax(axis=1)
        return 100 * float((found == classes[~fit]).mean())

    largest = np.bincount(classes[~fit]).max() / (~fit).sum()
    return dict(student=accuracy(student), teacher=accuracy(teacher), largest=100 * float(largest))
