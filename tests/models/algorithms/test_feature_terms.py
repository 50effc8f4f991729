"""The terms of the loss of stage 2 against their formulas."""
from __future__ import annotations

import pytest
import torch

from adala_mm.models.algorithms.feature_terms import TERMS, feature_terms, term_weights
from helpers.options import images, stage2


def transcribed(name: str, student: torch.Tensor, teacher: torch.Tensor, prefix: int, class_token: bool,
                chosen: torch.Tensor | None) -> torch.Tensor:
    """A term in float64, token by token."""
    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return 1 - (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())

    batch, n, _ = student.shape
    if name == 'class_token':
        pairs = [(x[0], y[0]) if class_token else (x[prefix:].mean(0), y[prefix:].mean(0))
                 for x, y in zip(student, teacher, strict=True)]
        return sum(distance(*pair) for pair in pairs) / batch
    first = prefix if name != 'mse' or chosen is not None else 0
    pairs = [(student[b, i], teacher[b, i]) for b in range(batch) for i in range(first, n)
             if chosen is None or chosen[b, i - prefix]]
    if name == 'cosine':
        return sum(distance(*pair) for pair in pairs) / len(pairs)
    differences = torch.stack([a - b for a, b in pairs])
    if name == 'mse':
        return differences.square().mean()
    size = differences.abs()
    return torch.where(size < 1, size.square() / 2, size - 0.5).mean()


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize(('prefix', 'class_token'), [(0, False), (1, True), (5, True), (4, False)])
@pytest.mark.parametrize('name', TERMS)
def test_terms_against_their_formulas(name, prefix, class_token, masked):
    student, teacher = (2 * torch.randn(2, prefix + 6, 8) for _ in range(2))
    student.requires_grad_()
    chosen = torch.tensor([[True, False, False, True, True, False], [False, True, True, True, False, False]])
    chosen = chosen if masked else None
    got = feature_terms({name: 1.0}, student, teacher, prefix, class_token, chosen)
    assert list(got) == [name]
    wide = student.detach().double().requires_grad_()
    wanted = transcribed(name, wide, teacher.double(), prefix, class_token, chosen)
    assert got[name].item() == pytest.approx(wanted.item(), rel=1e-5)
    ours, theirs = torch.autograd.grad(got[name], student)[0], torch.autograd.grad(wanted, wide)[0]
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)
    assert theirs.abs().max() > 0
    same = feature_terms({name: 1.0}, teacher, teacher, prefix, class_token, chosen)
    assert abs(same[name].item()) < 1e-6


def test_loss_is_the_weighted_sum_of_its_terms(pretrained):
    weights, x = dict(cosine=0.9, smooth_l1=0.1, class_token=1.0), images()
    model = stage2(pretrained, loss=weights | dict(mse=0), loss_scale=3.0).train()
    out = model.loss(x)
    assert set(out) == {'loss', 'rel_error', *weights}  # a weight of 0 turns a term off
    assert out['loss'].item() == pytest.approx(3 * sum(w * out[name].item() for name, w in weights.items()), rel=1e-5)
    single = stage2(pretrained).train().loss(x)
    assert set(single) == {'loss', 'rel_error'}
    student, teacher = model.backbone.forward_features(x), model.teacher_features(x)
    for name in weights:
        wanted = transcribed(name, student.double(), teacher.double(), 1, True, None)
        assert out[name].item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-7)
    total, log = model.parse_losses(out)
    assert total.item() == out['loss'].item()  # the parts are for reading


@pytest.mark.parametrize(('weights', 'message'), [
    (dict(mes=1.0), r"loss has no term 'mes'; it may have mse, cosine, smooth_l1, class_token"),
    (dict(mse=-1.0), 'loss: the weight of mse is -1.0'), (dict(mse=True), 'loss: the weight of mse is True'),
    (dict(mse='1'), "loss: the weight of mse is '1'"), (dict(mse=float('nan')), 'loss: the weight of mse is nan')])
def test_bad_terms_raise(weights, message):
    with pytest.raises(ValueError, match=message):
        term_weights('loss', weights)
