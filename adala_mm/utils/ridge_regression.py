"""Ridge regression whose data come in parts."""
from __future__ import annotations

import torch
from mmengine.dist import all_reduce
from torch import Tensor

ROWS = 4096  # in float64 at a time


class NormalEquations:
    """A ridge regression that keeps only sums of its data, in float64.

    The data are features f (T, I), with a 1 appended if ``bias``, and residuals r (T, O) that the features explain.
    The sums are ``gram = sum w f f^T`` and ``moment = sum w f r^T``; they take 8 (I+1) (I+1+O) bytes.

    Args:
        inputs, outputs: I and O.
        bias: whether there is a constant.
        device: where the sums are.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True, device: torch.device | str = 'cpu') -> None:
        self.bias = bias
        self.gram = torch.zeros(inputs + bias, inputs + bias, dtype=torch.float64, device=device)
        self.moment = torch.zeros(inputs + bias, outputs, dtype=torch.float64, device=device)

    def add(self, features: Tensor, residuals: Tensor, weights: Tensor | None = None) -> None:
        """Adds rows (..., I) and (..., O) with weights (...), all 1 unless given."""
        weights = features.new_ones(features.shape[:-1]) if weights is None else weights
        columns = features.flatten(0, -2), residuals.flatten(0, -2), weights.reshape(-1, 1)
        for part in zip(*(column.split(ROWS) for column in columns), strict=True):
            f, r, w = (column.double() for column in part)
            if self.bias:
                f = torch.cat([f, f.new_ones(len(f), 1)], dim=1)
            weighted = (w * f).T
            self.gram.addmm_(weighted, f)
            self.moment.addmm_(weighted, r)

    def all_reduce(self) -> None:
        """Sums over processes."""
        for part in (self.gram, self.moment):
            all_reduce(part)

    def solve(self, ridge: float, scale: Tensor | None = None) -> Tensor:
        """The change X (I or I+1, O) that minimises ``sum w |r - s * (f X)|^2 + mu |X|^2``.

        ``mu = ridge * mean diag(gram) * mean s^2``: the penalty is the same for all outputs, so an output that the
        stream hardly hears (s near 0) is left as it is. Each has a system of its own, ``(s^2 gram + mu) x = s moment``;
        one decomposition of ``gram`` serves all.

        Args:
            ridge: above 0, relative to the mean energy of a feature.
            scale: s (O,), of outputs on their way to where r is measured; 1 unless given.

        Raises:
            FloatingPointError: if the sums are not finite.
        """
        if not (self.gram.isfinite().all() and self.moment.isfinite().all()):
            raise FloatingPointError('the stream of student or teacher is not finite: are the images? float16 '
                                     'may overflow, so use float32 or bfloat16')
        s = self.moment.new_ones(self.moment.shape[1]) if scale is None else scale.detach().to(self.moment)
        penalty = (ridge * self.gram.diagonal().mean() * s.square().mean()).clamp_min(torch.finfo(s.dtype).tiny)
        values, vectors = torch.linalg.eigh(self.gram)
        values = values.clamp_min(0)[:, None]
        return vectors @ (s * (vectors.T @ self.moment) / (s.square() * values + penalty))
