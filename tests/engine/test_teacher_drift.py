"""A teacher that changes in the middle of a run is noticed."""
from __future__ import annotations

import pytest
import torch
from mmengine.model import BaseModel
from torch import nn

from adala_mm.engine import TeacherDriftHook
from helpers.processes import apart
from helpers.stages import Norms, in_training, make_runner, pictures, stage

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='compares runs on the CPU')


@pytest.fixture(autouse=True)
def isolated():
    with apart():
        yield


def teacher_of(model: BaseModel) -> nn.Module:
    return model.frozen['teacher'] if 'teacher' in model.frozen else model.frozen['attentions']


def flip_one_bit(model):
    value = next(iter(teacher_of(model).parameters())).data.flatten()
    value[0] = torch.nextafter(value[0], value[0] + 1)


DRIFTS = {
    'weight': (flip_one_bit, 'changed: frozen '),
    'bias': (lambda model: [p.data.mul_(0.99) for p in teacher_of(model).parameters() if p.ndim == 1],
             'changed: frozen '),
    'gradient': (lambda model: next(teacher_of(model).parameters()).requires_grad_(), 'with gradients: frozen '),
    'mode': (lambda model: teacher_of(model).train(), 'in training mode: frozen '),
}


@pytest.mark.parametrize('number', [1, 2])
@pytest.mark.parametrize('kind', DRIFTS)
def test_drift_of_the_teacher_is_found(number, kind, sharp_pretrained):
    model, hook = stage(number, sharp_pretrained).train(), TeacherDriftHook(interval=10)
    hook.before_train(in_training(model))
    hook.after_train_iter(in_training(model), 0)
    change, message = DRIFTS[kind]
    change(model)
    hook.after_train_iter(in_training(model, 10), 0)  # not the moment to look
    for moment in (in_training(model, 19), in_training(model, 10, max_iters=11)):  # the interval; the last iteration
        with pytest.raises(RuntimeError, match=rf'iteration \d+: the teacher .* process 0: {message}'):
            hook.after_train_iter(moment, 0)


def test_drift_of_other_frozen_weights_and_of_buffers_is_found(sharp_pretrained):
    model, hook = stage(1, sharp_pretrained), TeacherDriftHook(interval=1)
    teacher_of(model)[0].register_buffer('scale', torch.ones(2, dtype=torch.bfloat16))
    hook.before_train(in_training(model))
    model.backbone.blocks[0].attn.qkv.weight.data += 1  # which is what stage 1 is for
    hook.after_train_iter(in_training(model), 0)
    model.backbone.blocks[1].mlp.fc1.weight.data += 1
    teacher_of(model)[0].scale[1] = 2
    with pytest.raises(RuntimeError, match='changed: backbone.blocks.1.mlp.fc1.weight, frozen attentions.0.scale. Is'):
        hook.after_train_iter(in_training(model), 0)


@pytest.mark.parametrize('number', [1, 2])
def test_training_does_not_move_the_teacher(number, sharp_pretrained, tmp_path):
    model = stage(number, sharp_pretrained)
    make_runner(tmp_path, model, pictures(4), hooks=(TeacherDriftHook(interval=1),)).train()


def test_models_without_anything_frozen_have_no_drift():
    hook, model = TeacherDriftHook(interval=1), Norms()
    hook.before_train(in_training(model))
    next(model.parameters()).data += 1
    hook.after_train_iter(in_training(model), 0)
