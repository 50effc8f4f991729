"""Which networks are compared: their names, their teacher, and those that are refused."""
from __future__ import annotations

import argparse
import re

import pytest
import torch
from mmengine.config import Config

from adala_mm import analysis
from adala_mm.analysis.networks import teacher_config
from helpers import ROOT
from helpers.analysis import load


@pytest.mark.parametrize(('text', 'wanted'), [
    ('a/b.py', ('b', 'a/b.py', None)), ('b.py:w/x.pth', ('b x', 'b.py', 'w/x.pth')),
    ('stage 1=a/b.py:w.pth', ('stage 1', 'a/b.py', 'w.pth')), ('s=b.py:timm://vit', ('s', 'b.py', 'timm://vit')),
    ('dir=1/b.yaml', ('dir', '1/b.yaml', None)), ('x/lr=1/b.py', ('b', 'x/lr=1/b.py', None))])
def test_names_on_the_command_line(text, wanted):
    spec = analysis.Spec.parse(text)
    assert (spec.name, spec.config, spec.checkpoint) == wanted


@pytest.mark.parametrize('text', ['weights.pth', '', 'a=b'])
def test_what_is_no_name(text):
    with pytest.raises(argparse.ArgumentTypeError, match='CONFIG'):
        analysis.Spec.parse(text)


@pytest.mark.parametrize(('student', 'teacher'), [
    ('{stage1}', None), ('{stage2}', None), ('{stage3}:{near}', '{softmax}'), ('{stage3}:{near}', '{stage1}'),
    ('{stage3}:{near}', '{stage2}'), ('{task}:{near}', None), ('{stage3}:{near}', '{task}')])
def test_every_config_names_the_same_teacher(world, student, teacher, sharp_pretrained):
    found, (own,) = load(world, student, teacher=teacher)
    wanted = torch.load(sharp_pretrained['checkpoint'])
    assert found.model.num_softmax_blocks == 2 and own.model.num_softmax_blocks == 0
    assert all(torch.equal(value, wanted[key]) for key, value in found.model.state_dict().items())
    assert found.record['softmax_blocks'] == 2 and own.record['linear_blocks'] == 2
    assert not any(p.requires_grad for n in (found, own) for p in n.model.parameters()) and not own.model.training
    state = torch.load(world['near'])['state_dict'] if 'near' in student else wanted
    key = 'backbone.blocks.0.attn.qkv.weight' if 'near' in student else 'blocks.0.attn.qkv.weight'
    assert torch.equal(own.model.blocks[0].attn.qkv.weight, state[key])


@pytest.mark.parametrize(('students', 'teacher', 'message'), [
    (['{stage3}:{near}'], None, 'one teacher is needed, and these students name none'),
    (['{stage3}:{near}'], '{stage3}', 'no softmax attention in all of its blocks'),
    (['{stage3}:{near}'], '{stage1}:{near}', 'what a stage writes is a student'),
    (['{foreign}'], '{softmax}', 'backbone is ResNet, and only blocks of adala_mm.AdaLAViT'),
    (['{stage1}', '{stage1}'], None, 'more than one network is called stage1'),
    (['teacher={stage1}'], None, 'more than one network is called teacher'),
    (['{stage1}:absent.pth'], None, 'no checkpoint at absent.pth'),
    (['{stage1}:{deeper}'], None, 'cannot read the checkpoint'),
    (['absent.py'], None, 'no config at absent.py')])
def test_networks_that_are_refused(world, students, teacher, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        load(world, *students, teacher=teacher)


def test_two_teachers_are_one_too_many(world, tmp_path, pretrained):
    cfg = Config.fromfile(world['stage2'])
    cfg.model.teacher.init_cfg = pretrained
    cfg.dump(tmp_path / 'other.py')
    with pytest.raises(ValueError, match='name different teachers'):
        load(world, '{stage1}', str(tmp_path / 'other.py'))
    load(world, '{stage1}', str(tmp_path / 'other.py'), teacher='{stage1}')


def test_networks_that_cannot_be_compared(world, tmp_path):
    cfg = Config.fromfile(world['stage3'])
    cfg.model.backbone.update(depth=1)
    cfg.dump(tmp_path / 'shallow.py')
    state = {k: v for k, v in torch.load(world['near'])['state_dict'].items() if 'blocks.1' not in k}
    torch.save(state, tmp_path / 'shallow.pth')
    teacher, students = load(world, f'{tmp_path}/shallow.py:{tmp_path}/shallow.pth', teacher='{softmax}')
    analysis.require_equal(teacher, students, 'embed_dim', 'patch_size', 'num_prefix')
    with pytest.raises(ValueError, match=r'shallow shallow and the teacher differ in depth \(1 and 2\)'):
        analysis.require_equal(teacher, students, 'depth')


@pytest.mark.parametrize('name', ['stage1_dinov2l_plus_coco', 'stage2_dinov2l_plus_in22k', 'task_cls_dinov2l_in1k'])
def test_a_teacher_has_no_options_of_the_linear_attention(name):
    cfg = Config.fromfile(ROOT / f'configs/beyond/{name}.py')
    cfg.model.backbone.attention = dict(type='adala_mm.HedgehogAttention', variant='exp', dwconv=3)
    cfg.model.backbone.init_cfg.prefix = 'of_the_student.'
    teacher = teacher_config(cfg).model.backbone
    assert teacher.attention == dict(type='adala_mm.SoftmaxAttention') and teacher.depth == 24
    assert ('prefix' in teacher.init_cfg) == name.startswith('stage1')  # where both start from the same file
    assert cfg.model.backbone.attention.variant == 'exp'
