"""Validation before the first step."""
from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from mmengine.registry import HOOKS
from torch import nn


@pytest.mark.parametrize(('iteration', 'runs'), [(0, 1), (1, 0), (500, 0)])
def test_validation_before_training(iteration, runs):
    model, calls = nn.Linear(1, 1).train(), []

    def validate():
        model.eval()  # as every validation loop does
        calls.append(runner.iter)

    runner = SimpleNamespace(iter=iteration, model=model, hooks=[], val_loop=SimpleNamespace(run=validate),
                             logger=logging.getLogger('test'))
    HOOKS.build({'type': 'adala_mm.ValBeforeTrainHook'}).before_train(runner)
    assert calls == [0] * runs
    assert model.training


def test_validation_before_training_needs_no_val_loop():
    runner = SimpleNamespace(iter=0, model=None, val_loop=None, logger=None)
    assert HOOKS.build({'type': 'adala_mm.ValBeforeTrainHook'}).before_train(runner) is None
