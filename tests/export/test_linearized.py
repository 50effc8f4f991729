"""Exported models of timm and transformers that `linearize` made."""
from __future__ import annotations

import json

import onnx
import pytest
import timm
import torch
from torch import nn

import adala_mm
from adala_mm import export, linearize
from adala_mm.export import graphs
from adala_mm.registry import ATTENTIONS
from adala_mm.utils.checkpoint import TRUST
from helpers.exporting import compared, tool

ATTENTIONS.import_from_location()


class Unsafe(dict):
    """Weights in a class of one's own, which is unpickled for those who say so only."""


def test_a_linearized_model_of_timm(tmp_path, monkeypatch, capsys):
    """Without a config: tokens at any size, or the classifier's logits at one."""
    options = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5)
    model = linearize(timm.create_model('vit_tiny_patch16_224', dynamic_img_size=True, **options), 'agent').eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    adala_mm.save(model, tmp_path / 'model.safetensors')
    tool(monkeypatch, tmp_path / 'model.safetensors', tmp_path / 'tokens.onnx')
    image = torch.randn(2, 3, 24, 40)
    assert torch.allclose(graphs.session(tmp_path / 'tokens.onnx')(image)[0], model.forward_features(image), atol=1e-4)
    assert 'backbone with AgentAttention, any batch, sizes: multiples of 8' in capsys.readouterr().out
    tool(monkeypatch, tmp_path / 'model.safetensors', tmp_path / 'logits.onnx', '--part', 'model', '--size', 48, 32,
         '--fixed-size')
    image = torch.randn(2, 3, 48, 32)
    assert torch.allclose(graphs.session(tmp_path / 'logits.onnx')(image)[0], model(image), atol=1e-4)
    notes = {entry.key: entry.value for entry in onnx.load(tmp_path / 'logits.onnx').metadata_props}
    assert json.loads(notes['preprocessing'])['mean'] == [127.5] * 3

    model = linearize(timm.create_model('vit_tiny_patch16_224', **options | dict(num_classes=0)), 'linear')
    with pytest.raises(ValueError, match='takes images of 32 x 32 only: say --fixed-size, or make it with dynamic'):
        export.of_linearized(model)
    with pytest.raises(ValueError, match='VisionTransformer has no classifier'):
        export.of_linearized(model, 'model', fixed=True)


def test_options_of_a_linearized_model(tmp_path, monkeypatch, capsys):
    """Weights that need trust get it, whatever their file is called; what would change nothing is refused."""
    monkeypatch.setenv(TRUST, '')
    model = linearize(timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=32, depth=1,
                                        num_heads=4, num_classes=5), 'linear')
    timm.models.save_for_hf(model, tmp_path / 'folder', safe_serialization=False)
    weights = tmp_path / 'folder/pytorch_model.bin'
    torch.save(Unsafe(torch.load(weights)), weights)
    words = (tmp_path / 'folder', tmp_path / 'a.pt2', '--fixed-size')
    with pytest.raises(SystemExit, match='--trust-checkpoint of a tool'):
        tool(monkeypatch, *words)
    tool(monkeypatch, *words, '--trust-checkpoint')
    adala_mm.save(model, tmp_path / 'model.bin')
    tool(monkeypatch, tmp_path / 'model.bin', tmp_path / 'b.pt2', '--fixed-size')
    assert (tmp_path / 'a.pt2').is_file() and (tmp_path / 'b.pt2').is_file()
    capsys.readouterr()
    for option in (['--cfg-options', 'a=1'], ['--family', 'dinov2'], ['--data-root', 'data'], ['--benchmark', '32']):
        with pytest.raises(SystemExit):
            tool(monkeypatch, tmp_path / 'model.bin', tmp_path / 'c.pt2', *option)
        assert f'{option[0]}: for configs only' in capsys.readouterr().err


def test_a_linearized_classifier_of_transformers(tmp_path):
    transformers = pytest.importorskip('transformers')
    names = {0: 'cat', 1: 'dog'}
    config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32,
                                       patch_size=8, id2label=names, label2id={name: i for i, name in names.items()})
    model = linearize(transformers.Dinov2ForImageClassification(config), 'linear')
    target = export.of_linearized(model, 'model', fixed=True)
    compared(target, export.export_torch(target, tmp_path / 'model.pt2', dynamic=False), dynamic=False)
    assert json.loads(target.notes['classes']) == ['cat', 'dog'] and target.outputs == ('logits',)


def test_classifiers_of_transformers_resize_their_positions(tmp_path):
    from helpers.hf_models import AROUND, eomt
    target = export.of_linearized(linearize(AROUND['classifier'][0]()), 'model', size=(24, 40))
    compared(target, export.export_torch(target, tmp_path / 'model.pt2', dynamic=False), dynamic=False)
    with pytest.raises(ValueError, match='EomtForUniversalSegm.* takes images of 32 x 32 only: say --fixed-size$'):
        export.of_linearized(linearize(eomt()))
    target = export.of_linearized(linearize(eomt()), fixed=True)
    assert target.module(torch.randn(1, 3, *target.size))[0].shape == (1, 3 + 16, 32)  # tokens without queries
    with pytest.raises(ValueError, match='takes images of 32 x 32 only: leave the size out$'):
        export.of_linearized(linearize(eomt()), size=(40, 40), fixed=True)
