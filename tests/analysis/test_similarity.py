"""Measures of similarity against independent computations."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from adala_mm import analysis
from helpers.analysis import hsic_by_definition


@pytest.mark.parametrize('n', [4, 5, 7])
def test_unbiased_hsic(n):
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(n, 3)) + 2, rng.normal(size=(n, 5)) - 1
    found = analysis.unbiased_hsic(torch.tensor(x @ x.T), torch.tensor(y @ y.T)).item()
    assert found == pytest.approx(hsic_by_definition(x @ x.T, y @ y.T), rel=1e-9)


def test_minibatch_cka_averages_over_batches_before_it_divides():
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(size, 2, 4)) for size in (6, 5)]
    others = [batch @ rng.normal(size=(4, 3)) + rng.normal(size=(len(batch), 2, 3)) for batch in batches]
    sums, cka = np.zeros(3), analysis.MinibatchCKA()
    assert cka.value() is None
    for x, y in zip(batches, others, strict=True):
        cka.update(torch.tensor(x), torch.tensor(y))
        k, l = (a.reshape(len(a), -1) @ a.reshape(len(a), -1).T for a in (x, y))  # noqa: E741
        sums += [hsic_by_definition(k, l), hsic_by_definition(k, k), hsic_by_definition(l, l)]
    assert cka.value() == pytest.approx(sums[0] / np.sqrt(sums[1] * sums[2]), rel=1e-9)


def test_cka_does_not_mind_rotation_scale_and_shift():
    x = torch.randn(12, 8) + 3
    turn = torch.linalg.qr(torch.randn(8, 8))[0]
    for y, wanted in ((x, 1), (3 * x @ turn - 5, 1)):
        cka = analysis.MinibatchCKA()
        cka.update(x, y)
        assert cka.value() == pytest.approx(wanted, abs=1e-5)
    nothing = analysis.MinibatchCKA()
    for _ in range(60):
        nothing.update(torch.randn(12, 8), torch.randn(12, 8))
    assert abs(nothing.value()) < 0.1  # unbiased: the usual estimate would be about 0.4


@pytest.mark.parametrize('k', [1, 4])
def test_knn_agreement(k):
    rng = np.random.default_rng(k)
    teacher = rng.normal(size=(15, 6))
    student = teacher + 0.7 * rng.normal(size=teacher.shape)

    def nearest(features: np.ndarray) -> list[set[int]]:
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        similarity = unit @ unit.T
        np.fill_diagonal(similarity, -2)
        return [set(np.argsort(-row)[:k]) for row in similarity]

    wanted = 100 * np.mean([len(a & b) / k for a, b in zip(nearest(student), nearest(teacher), strict=True)])
    found = analysis.knn_agreement(torch.tensor(student), torch.tensor(teacher), k)
    assert 0 < wanted < 100 and found == pytest.approx(wanted, abs=1e-4)


def test_probe_finds_planted_classes():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 200)
    teacher = 20 * np.eye(6)[truth] + rng.normal(size=(200, 6))
    fit = np.arange(200) < 100
    turned = analysis.probe_agreement(teacher @ rng.normal(size=(6, 6)) + 7, teacher, fit, 4)
    assert turned['student'] > 97 and turned['teacher'] > 97
    # What k-means finds is what was planted, so its most frequent class is known, too.
    assert turned['largest'] == pytest.approx(100 * np.bincount(truth[~fit]).max() / 100)
    noise = analysis.probe_agreement(rng.normal(size=(200, 6)), teacher, fit, 4)
    assert noise['student'] < 50 and noise['teacher'] == turned['teacher']
    half = teacher.copy()
    half[150:] = teacher[rng.permutation(50) + 150]  # what is held out: 50 right, 50 shuffled
    assert 50 < analysis.probe_agreement(half, teacher, fit, 4)['student'] < 85


def test_probe_is_ridge_regression_to_indicators():
    rng = np.random.default_rng(1)
    teacher = 20 * np.eye(5)[rng.integers(0, 3, 90)] + rng.normal(size=(90, 5))
    student = teacher @ rng.normal(size=(5, 60)) + 40 * rng.normal(size=(90, 60))  # more channels than samples
    fit = np.arange(90) % 2 == 0
    classes = np.unique(teacher[:, :3].argmax(axis=1), return_inverse=True)[1]
    x = (student - student[fit].mean(axis=0)) / student[fit].std(axis=0)
    penalty = np.sqrt(0.01 * 45) * np.eye(61)[:60]  # none on the bias
    rows = np.vstack([np.hstack([x[fit], np.ones((45, 1))]), penalty])
    weights = np.linalg.lstsq(rows, np.vstack([np.eye(3)[classes[fit]], np.zeros((60, 3))]), rcond=None)[0]
    found = (x[~fit] @ weights[:60] + weights[60]).argmax(axis=1)
    wanted = 100 * (found == classes[~fit]).mean()
    assert 40 < wanted < 100
    assert analysis.probe_agreement(student, teacher, fit, 3)['student'] == pytest.approx(wanted)


def test_probe_needs_samples():
    with pytest.raises(ValueError, match='2 samples to fit with and 2 held out are too few for 3 clusters'):
        analysis.probe_agreement(np.eye(4), np.eye(4), np.arange(4) < 2, 3)
