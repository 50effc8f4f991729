"""Rotary positions in all stages: teacher and student see the same ones."""
from __future__ import annotations

import pytest
import torch

import adala_mm
from adala_mm import align, linearize
from adala_mm.registry import ATTENTIONS, MODELS
from helpers import tiny_vit
from helpers.rotary import awake, narrow, own, softmax_file

ATTENTIONS.import_from_location()


@pytest.mark.parametrize(('target', 'attention', 'trainable'), [
    ('output', 'LinearAttention', None), ('heads', 'InLineAttention', 'qkv'),
    ('weights', 'HedgehogAttention', 'feature_map')])
def test_stage_1_turns_teacher_and_student(target, attention, trainable, tmp_path):
    init_cfg, teacher = softmax_file(tmp_path / 'softmax.pth')
    backbone = dict(tiny_vit(num_registers=4, layer_scale=1.0, qkv_bias=False, rotary=dict(rescale=2.0)),
                    attention=dict(type=f'adala_mm.{attention}'), trainable=trainable, init_cfg=init_cfg)
    model = MODELS.build(dict(type='adala_mm.AttentionAlignment', target=target, backbone=backbone)).train()
    model.init_weights()
    images = torch.randn(2, 3, 24, 40)
    found = model(images, mode='loss')
    found['loss'].backward()
    with torch.no_grad():
        x, hw = teacher.embed(images)
        layout, losses = teacher.layout(x, hw), []  # the stream is not disturbed
        assert len(layout) == 3
        for block, student in zip(teacher.blocks, model.backbone.blocks, strict=True):
            h = block.norm1(x)
            if target == 'weights':
                (q, k, _), (wanted_q, wanted_k, _) = (a.turned(h, *layout) for a in (student.attn, block.attn))
                wanted = (wanted_q @ wanted_k.mT / 8 ** 0.5).softmax(-1)
                losses.append(-(wanted * student.attn.weights(q, k).log()).sum(-1).mean())
            else:
                got, wanted = ((a if target == 'output' else a.attend)(h, *layout)
                               for a in (student.attn, block.attn))
                losses.append((got - wanted).square().mean())
            x = block(x, *layout)
        torch.testing.assert_close(found['loss'], torch.stack(losses).mean())
        torch.testing.assert_close(model.teacher_features(images), teacher.forward_features(images))


def test_stage_2_with_the_loss_of_stage_1(tmp_path):
    init_cfg, teacher = softmax_file(tmp_path / 'softmax.pth')
    backbone = dict(tiny_vit(num_registers=4, layer_scale=1.0, qkv_bias=False, rotary=dict()), init_cfg=init_cfg)
    model = MODELS.build(dict(type='adala_mm.FeatureAlignment', teacher=backbone, attention_weight=1.0, backbone=dict(
        backbone, attention=dict(type='adala_mm.WindowAttention', window_size=9))))  # a window of all is softmax
    model.init_weights()
    losses = model.train()(torch.randn(2, 3, 24, 40), mode='loss')
    assert losses['loss'].item() < 1e-10 and losses['attention_mse'].item() < 1e-10


def a_window_of_all(rotary: dict, path) -> tuple[dict, dict]:
    """Configs of a teacher and of a student that is its teacher by another name."""
    init_cfg, _ = softmax_file(path)
    teacher = dict(tiny_vit(num_registers=4, layer_scale=1.0, qkv_bias=False, rotary=rotary), init_cfg=init_cfg)
    return teacher, dict(teacher, attention=dict(type='adala_mm.WindowAttention', window_size=9))


DISTURBED = dict(shift=0.5, jitter=2.0, rescale=2.0)


def test_positions_stay_where_they_are_in_feature_alignment(tmp_path):
    teacher, student = a_window_of_all(DISTURBED, tmp_path / 'softmax.pth')
    model = MODELS.build(dict(type='adala_mm.FeatureAlignment', teacher=teacher, backbone=student))
    model.init_weights()
    model.eval()
    assert model.train()(torch.randn(2, 3, 24, 40), mode='loss')['rel_error'] < 1e-5
    assert model.backbone.training and model.backbone.blocks.training


def test_positions_stay_where_they_are_in_the_alignment_of_a_task_model(tmp_path):
    teacher, student = a_window_of_all(DISTURBED, tmp_path / 'softmax.pth')
    whole, path = MODELS.build(dict(type='mmpretrain.ImageClassifier', backbone=teacher)), tmp_path / 'model.pth'
    whole.backbone.init_weights()
    torch.save(whole.state_dict(), path)
    model = MODELS.build(dict(type='adala_mm.TaskModelAlignment', task_model='mmpretrain.ImageClassifier',
                              teacher=dict(type='Pretrained', checkpoint=str(path)), backbone=student))
    model.init_weights()
    assert model.train()(torch.randn(2, 3, 24, 40), mode='loss')['rel_error'] < 1e-5


@pytest.mark.parametrize('make', [lambda: own(rotary=DISTURBED), lambda: narrow(
    **{f'rope_{name}_coords': value for name, value in DISTURBED.items()})], ids=['ours', 'timm'])
def test_positions_stay_where_they_are_in_align(make):
    teacher, images = awake(make()), torch.randn(2, 3, 24, 40)
    student = linearize(teacher, dict(type='adala_mm.WindowAttention', window_size=9)).train()
    with torch.no_grad():
        assert not torch.allclose(student.forward_features(images), teacher.forward_features(images), rtol=0.1)
    for stage in (1, 2):
        (record,) = align(student, teacher, [images], stage=stage, steps=1, lr=1e-12)
        assert record['rel_error'] < 1e-5 and all(module.training for module in student.modules()), stage


@pytest.mark.parametrize('stage', [1, 2])
def test_align_save_and_load(stage, tmp_path):
    teacher = awake(own(swiglu=True, mlp_ratio=2.7, rotary=dict(base=50.0, rescale=2.0)))
    student = linearize(teacher)
    first, last = (line['rel_error'] for line in align(student, teacher, [torch.randn(2, 3, 24, 40)], stage=stage,
                                                       steps=8, lr=1e-3, log_interval=4))
    assert last < first
    adala_mm.save(student, tmp_path / 'student.safetensors')
    twin, images = adala_mm.load(tmp_path / 'student.safetensors').eval(), torch.randn(2, 3, 40, 24)
    assert torch.equal(twin.forward_features(images), student.eval().forward_features(images))
    assert all(getattr(twin.rotary, name) == getattr(teacher.rotary, name) for name in ('base', 'rescale', 'shift'))
