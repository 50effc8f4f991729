"""What was loaded is what trains, on every process."""
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from adala_mm.engine import WeightsCheckHook
from adala_mm.registry import MODELS
from adala_mm.utils.fingerprint import fingerprint
from helpers import LINEAR, tiny_vit
from helpers.stages import in_training, stage


def runner_of(model, resume=False, load_from=None) -> SimpleNamespace:
    lines: list[str] = []
    return SimpleNamespace(model=model, _resume=resume, _load_from=load_from, lines=lines,
                           logger=SimpleNamespace(info=lines.append))


@pytest.fixture
def stage2(pretrained):
    model = MODELS.build(dict(type='adala_mm.FeatureAlignment', teacher=tiny_vit(init_cfg=pretrained),
                              backbone=tiny_vit(attention=LINEAR, init_cfg=pretrained)))
    model.init_weights()
    return model


def test_fingerprint_sees_every_bit():
    tensors = {'a': torch.randn(3, 4), 'b': torch.zeros(2, dtype=torch.bfloat16)}
    assert fingerprint(tensors) == fingerprint(dict(reversed(tensors.items())))
    for changed in ({'a': tensors['a'].T}, {'a': tensors['a'].reshape(4, 3)}, {'b': -tensors['b']},
                    {'b': tensors['b'].half()}):
        assert fingerprint(tensors | changed) != fingerprint(tensors)
    assert fingerprint({'x': tensors['a'], 'b': tensors['b']}) != fingerprint(tensors)


def test_what_was_loaded_passes(stage2):
    runner = runner_of(stage2)
    WeightsCheckHook().before_train(runner)
    assert 'fingerprint of all weights' in runner.lines[0] and '1 process' in runner.lines[0]


def test_student_initialised_again_is_noticed(stage2):
    stage2.backbone._random_init()
    with pytest.raises(RuntimeError, match='backbone: its weights have changed since they were loaded'):
        WeightsCheckHook().before_train(runner_of(stage2))
    WeightsCheckHook().before_train(runner_of(stage2, resume=True))  # a resumed run has moved on


@pytest.mark.parametrize('resume', [False, True])
def test_teacher_that_changed_is_noticed(stage2, resume):
    stage2.frozen['teacher'].blocks[0].mlp.fc1.weight.data += 1e-3
    with pytest.raises(RuntimeError, match='frozen teacher: its weights have changed'):
        WeightsCheckHook().before_train(runner_of(stage2, resume=resume))


def test_processes_that_differ_are_named(stage2, monkeypatch):
    monkeypatch.setattr('adala_mm.engine.weights_check.all_gather_object', lambda own: [own, own, 'other', own])
    with pytest.raises(RuntimeError, match=r'processes \[2\] hold other weights than process 0'):
        WeightsCheckHook().before_train(runner_of(stage2))


def test_weights_that_change_in_the_first_forward_are_noticed(sharp_pretrained):
    model, images = stage(2, sharp_pretrained), torch.randn(1, 3, 32, 32)
    WeightsCheckHook().before_train(in_training(model))
    handles = len(model._forward_hooks)
    model(images)
    assert len(model._forward_hooks) == handles - 1  # one look, then never again
    WeightsCheckHook().before_train(in_training(model))

    def initialise_again(module: nn.Module, args: tuple) -> None:
        nn.init.normal_(module.norm1.weight)

    model.backbone.blocks[0].register_forward_pre_hook(initialise_again)
    with pytest.raises(RuntimeError, match='process 0: the weights have changed in the first forward'):
        model(images)
