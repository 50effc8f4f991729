"""Weights in the layouts of timm and transformers, read back by these libraries."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import adala_mm
from adala_mm import export, linearize
from adala_mm.registry import ATTENTIONS
from helpers import LINEAR, tiny_vit
from helpers.exporting import CLASSIFIER, SEGMENTOR, SOFTMAX, compared, config, make
from helpers.layers import attention

ATTENTIONS.import_from_location()


@pytest.mark.parametrize(('out_type', 'pooling'), [('cls_token', 'token'), ('avg_featmap', 'avg')])
def test_a_classifier_of_timm(out_type, pooling, tmp_path):
    target = make(tiny_vit(attention=[SOFTMAX, LINEAR], out_type=out_type), 'model', 'mmpretrain', **CLASSIFIER)
    compared(target, export.export_timm(target, tmp_path / 'model.safetensors'))
    with safe_open(tmp_path / 'model.safetensors', 'pt') as file:
        head = json.loads(file.metadata()['head'])
    assert head == dict(num_classes=5, global_pool=pooling, fc_norm=False)
    model = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4,
                              **head)
    linearize(model, 'linear', keep_softmax=[0], inplace=True)
    model.load_state_dict(load_file(tmp_path / 'model.safetensors'))
    image = torch.randn(2, 3, 32, 32)
    assert torch.allclose(model.eval()(image), target.module(image)[0], atol=1e-5)


@pytest.mark.parametrize('changes', [dict(out_type='cls_token', attention=LINEAR), dict(
    out_type='avg_featmap', attention=SOFTMAX, num_registers=3, no_embed_class=True)])
def test_a_classifier_of_transformers(changes, tmp_path):
    pytest.importorskip('transformers')
    target = make(tiny_vit(layer_scale=1.0, **changes), 'model', 'mmpretrain', **CLASSIFIER)
    target.notes['classes'] = json.dumps(list('abcde'))
    compared(target, export.export_transformers(target, tmp_path / 'model'), dynamic=False)
    assert json.loads((tmp_path / 'model/config.json').read_text())['id2label']['4'] == 'e'


def test_heads_that_transformers_has_not(tmp_path):
    pytest.importorskip('transformers')
    target = make(tiny_vit(out_type='cls_token', **FAMILIES['clip_openai']), 'model', 'mmpretrain', **CLASSIFIER)
    with pytest.raises(ValueError, match='the classifier of transformers for CLIPVisionModel does not pool'):
        export.export_transformers(target, tmp_path / 'model')


def test_heads_that_timm_has_not():
    with pytest.raises(ValueError, match="EncoderDecoder on out_type='featmap': timm and transformers have one linear"):
        export.export_timm(make(tiny_vit(attention=LINEAR), 'model', **SEGMENTOR), Path('model.safetensors'))


@pytest.mark.parametrize('name', ['SoftmaxAttention', 'LinearAttention', 'RALAAttention', 'AgentAttention'])
def test_timm(name, tmp_path):
    """The file in a model that timm makes by name; parameters of the attention's own included."""
    target = make(tiny_vit(attention=[SOFTMAX, attention(name)]))
    compared(replace_module(target), export.export_timm(target, tmp_path / 'model.safetensors'))
    model = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4,
                              num_classes=0, dynamic_img_size=True)
    if name != 'SoftmaxAttention':
        with pytest.raises(RuntimeError, match=r'blocks\.1\.attn\.adala_mm'):
            model.load_state_dict(load_file(tmp_path / 'model.safetensors'))
        linearize(model, attention(name), keep_softmax=[0], inplace=True)
    model.load_state_dict(load_file(tmp_path / 'model.safetensors'))
    image = torch.randn(2, 3, 24, 40)
    assert torch.allclose(model.eval().forward_features(image), target.backbone.forward_features(image), atol=1e-5)
    with safe_open(tmp_path / 'model.safetensors', 'pt') as file:
        assert json.loads(file.metadata()['architecture'])['num_heads'] == 4
        assert json.loads(file.metadata()['attentions'])[1]['type'] == f'adala_mm.{name}'


FAMILIES = {
    'dinov2': dict(layer_scale=1.0), 'dinov2_reg': dict(layer_scale=1.0, num_registers=3, no_embed_class=True),
    'clip_openai': dict(pre_norm=True, act='quick_gelu', norm_eps=1e-5),
    'siglip_tanh': dict(class_token=False, act='gelu_tanh'), 'siglip': dict(class_token=False),
}


def replace_module(target: export.Target) -> export.Target:
    """The same, of final tokens."""
    return replace(target, module=lambda image: (target.backbone.forward_features(image),))


@pytest.mark.parametrize('family', FAMILIES)
def test_transformers(family, tmp_path):
    pytest.importorskip('transformers')
    target = make(tiny_vit(attention=[SOFTMAX, attention('RALAAttention')], **FAMILIES[family]))
    run = export.export_transformers(target, tmp_path / 'model')
    compared(replace_module(target), run, dynamic=False)
    model = adala_mm.load(tmp_path / 'model')
    assert model.num_linear_blocks == 1
    with pytest.raises(RuntimeError, match='size mismatch|ignore_mismatched_sizes'):
        type(model).from_pretrained(tmp_path / 'model')


@pytest.mark.parametrize('family', FAMILIES)
def test_softmax_for_transformers(family, tmp_path):
    """Both transformers 4 and 5 load the names in these files."""
    target = make(tiny_vit(attention=SOFTMAX, **FAMILIES[family]))
    compared(replace_module(target), export.export_transformers(target, tmp_path / 'model'), dynamic=False)
    assert json.loads((tmp_path / 'model/config.json').read_text())['architectures']
    keys = load_file(tmp_path / 'model/model.safetensors')
    assert all(key.startswith('vision_model.') for key in keys) == ('dinov2' not in family)
    assert 'dinov2' not in family or 'encoder.layer.0.attention.output.dense.weight' in keys


def test_what_timm_and_transformers_cannot_hold(tmp_path):
    plain = make(tiny_vit(attention=LINEAR))
    with pytest.raises(ValueError, match='act gelu and norm eps 1e-06 is no model of transformers among dinov2'):
        export.export_transformers(plain, tmp_path / 'model')
    with pytest.raises(ValueError, match='is not of the family clip_openai but of augreg or deit'):
        export.export_timm(plain, tmp_path / 'model.safetensors', 'clip_openai')
    pyramid = export.assemble(config(dict(type='adala_mm.L2ViT')))
    queries = make(tiny_vit(type='adala_mm.QueryViT', attention=LINEAR, query_blocks=1))
    for target, name in ((pyramid, 'L2ViT'), (queries, 'QueryViT')):
        with pytest.raises(ValueError, match=f'{name} is no plain ViT.*pt2 hold any'):
            export.export_timm(target, tmp_path / 'model.safetensors')
    with pytest.raises(ValueError, match='QueryViT is no plain ViT'):
        export.export_transformers(queries, tmp_path / 'model')
    assert not list(tmp_path.iterdir())
