"""tools/export.py: what it writes and refuses."""
from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from mmengine.config import Config
from torch import nn

from adala_mm import export
from adala_mm.export import graphs
from adala_mm.registry import ATTENTIONS, MODELS
from helpers import LINEAR, tiny_vit
from helpers.exporting import make, tool, write_segmentor

ATTENTIONS.import_from_location()


@pytest.fixture
def trained(tmp_path) -> tuple[Path, Path]:
    return write_segmentor(tmp_path)


def test_names_of_classes(trained, tmp_path, monkeypatch):
    """They come from the checkpoint, where MMEngine's runner puts them."""
    cfg, weights = trained
    names = ['road', 'tree', 'sky', 'car']
    torch.save(torch.load(weights) | dict(meta=dict(dataset_meta=dict(classes=tuple(names)))), weights)
    tool(monkeypatch, cfg, weights, tmp_path / 'model.onnx', '--part', 'model', '--no-benchmark')
    notes = {entry.key: entry.value for entry in onnx.load(tmp_path / 'model.onnx').metadata_props}
    assert json.loads(notes['classes']) == names


def test_the_command(trained, tmp_path, monkeypatch, capsys):
    cfg, weights = trained
    out = tmp_path / 'out/model.onnx'
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 1)
    tool(monkeypatch, cfg, '--part', 'model', weights, out, '--benchmark', 30, 64, '--size', 32, 48)
    said = capsys.readouterr().out
    assert '| 3 | 40 x 24 |' in said and 'any batch, sizes: multiples of 8' in said
    assert '| 32 x 32 |' in said and '| 64 x 64 |' in said and 'x' in said.split('64 x 64')[1]
    assert [file.name for file in out.parent.iterdir()] == ['model.onnx']
    image = torch.randn(2, 3, 24, 40)
    model = MODELS.build(Config.fromfile(cfg).model.backbone)
    assert graphs.session(out)(image)[0].shape == (2, 4, 24, 40) and isinstance(model, nn.Module)
    before = out.read_bytes()
    with pytest.raises(SystemExit):
        tool(monkeypatch, cfg, weights, out)
    assert 'nothing is overwritten' in capsys.readouterr().err and out.read_bytes() == before
    tool(monkeypatch, cfg, weights, out, '--no-benchmark', '--overwrite')  # the backbone alone, out of the same file
    assert out.read_bytes() != before


@pytest.mark.parametrize(('args', 'said'), [
    (['none.pth', 'a.pt2'], 'no checkpoint at none.pth'),
    (['a.pt2'], r'names no weights \(init_cfg\): give a CHECKPOINT'),
    (['a.pt2', '--part', 'model'], 'a head has no weights without a CHECKPOINT'),
    (['{weights}', 'a.pt2', '--size', '30', '32'], '30 x 32 pixels are not a multiple of 8; 32 x 32 are'),
    (['{weights}', 'a.onnx', '--opset', '17'], 'from opset 18 on'),
    (['{weights}', 'a.pt2', '--cfg-options', 'model.backbone.depth=1'], 'blocks.1'),
    (['{weights}', 'a.pt2', '--part', 'model', '--cfg-options', 'model.decode_head.num_classes=7'],
     'does not fit the model of the config'),
    (['{weights}', 'a.safetensors', '--tolerance', '-1'], 'Nothing is written'),
])
def test_refusals_leave_nothing(args, said, trained, tmp_path, monkeypatch):
    cfg, weights = trained
    (tmp_path / 'empty').mkdir()
    monkeypatch.chdir(tmp_path / 'empty')
    with pytest.raises(SystemExit) as error:
        tool(monkeypatch, cfg, *(str(arg).format(weights=weights) for arg in args))
    assert error.match(said) and not list(Path().iterdir())


@pytest.mark.parametrize(('args', 'said'), [
    (['a.bin'], 'the suffix says the format'), (['a.safetensors', '--half'], 'model.half() makes them float16 there')])
def test_wrong_options(args, said, trained, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        tool(monkeypatch, trained[0], trained[1], *args)
    assert said in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(graphs, 'PACKAGES', ('onnx', 'no_such_package'))
    with pytest.raises(ImportError, match='ONNX files need no_such_package: pip install onnx no_such_package'):
        graphs.require_packages()


def test_stage_configs_have_a_backbone_only():
    with pytest.raises(ValueError, match='FeatureAlignment has no head'):
        make(tiny_vit(attention=LINEAR), 'model')


def test_speed_says_where_it_is_slower():
    rows = [dict(height=64, width=64, softmax_ms=1.0, own_ms=2.0), dict(height=8, width=8, note='skipped: 9 GiB')]
    text = export.speed_report(rows, 'LinearAttention')
    assert '| 64 x 64 | 1.0 | 2.0 | 0.50x, slower |' in text and 'skipped: 9 GiB' in text
