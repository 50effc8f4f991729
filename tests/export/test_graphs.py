"""Exported graphs, read back by the runtimes they are for, against the models they were made from."""
from __future__ import annotations

import json
import runpy
import sys
import zipfile
from contextlib import nullcontext
from dataclasses import replace

import onnx
import pytest
import torch
from mmengine.config import Config

from adala_mm import export
from adala_mm.registry import ATTENTIONS
from helpers import LINEAR, ROOT, tiny_vit
from helpers.exporting import CLASSIFIER, SOFTMAX, awake, compared, config, make
from helpers.layers import attention

ATTENTIONS.import_from_location()
SIZE_BOUND = ('NystromformerAttention', 'ViGAttention')  # tokens fall into segments, whose number is the graph's length
ONNX = ('LinearAttention', 'MLLAAttention')  # docs/export_detail.md has a record of all


@pytest.mark.parametrize('name', sorted(ATTENTIONS.module_dict))
def test_every_attention_through_torch_export(name, tmp_path):
    dynamic = name not in SIZE_BOUND
    target = make(tiny_vit(attention=attention(name), depth=1, img_size=64 if dynamic else 32))
    if not dynamic and name == 'NystromformerAttention':
        with pytest.raises(ValueError, match='NystromformerAttention: torch.export cannot hold this model with a free'):
            export.export_torch(target, tmp_path / 'free.pt2')
    run = export.export_torch(target, tmp_path / 'model.pt2', dynamic)
    compared(target, run, dynamic)
    assert not [node for node in run.graph.nodes if 'adala_mm' in str(node.target)]


@pytest.mark.parametrize('name', ONNX)
def test_attentions_through_onnx(name, tmp_path):
    target = make(tiny_vit(attention=attention(name), depth=1))
    compared(target, export.export_onnx(target, tmp_path / 'model.onnx'))


def test_onnx_of_several_blocks_and_registers(tmp_path):
    """What a user finds in the file: names, free sides and notes; and what becomes of the rest of an image."""
    target = make(tiny_vit(attention=[SOFTMAX, LINEAR], out_indices=(0, 1, 1), num_registers=2, layer_scale=1.0))
    run = export.export_onnx(target, tmp_path / 'model.onnx', opset=20)
    compared(target, run)
    file = onnx.load(tmp_path / 'model.onnx')
    assert [output.name for output in file.graph.output] == ['features_0', 'features_1']
    sides = [side.dim_param or side.dim_value for side in file.graph.input[0].type.tensor_type.shape.dim]
    assert sides == ['batch', 3, 'height', 'width']
    assert {entry.domain for entry in file.opset_import} == {''} and file.opset_import[0].version == 20
    notes = {entry.key: entry.value for entry in file.metadata_props}
    assert notes['attention'] == 'LinearAttention, SoftmaxAttention' and notes['size'] == 'any multiple of 8'
    image = torch.randn(1, 3, 45, 31)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in
               zip(run(image), target.module(image[..., :40, :24]), strict=True))


def test_the_sizes_that_a_file_promises(tmp_path):
    """torch.export takes a side of one patch for a constant; ONNX does not."""
    target = make(tiny_vit(img_size=24, attention=LINEAR))
    promised = {}
    for kind, write in {'.pt2': export.export_torch, '.onnx': export.export_onnx}.items():
        run = write(target, path := tmp_path / f'model{kind}')
        compared(target, run)  # 3 patches, half of which are 1
        notes = (json.loads(zipfile.ZipFile(path).read(next(
            name for name in zipfile.ZipFile(path).namelist() if name.endswith('adala_mm.json'))))
            if kind == '.pt2' else {entry.key: entry.value for entry in onnx.load(path).metadata_props})
        promised[kind] = notes['size']
        run(torch.zeros(1, 3, 16, 40))
        with nullcontext() if kind == '.onnx' else pytest.raises(AssertionError, match='Guard failed'):
            run(torch.zeros(1, 3, 8, 40))
    assert promised == {'.pt2': 'any multiple of 8 from 16 on', '.onnx': 'any multiple of 8'}


def test_a_fixed_size(tmp_path):
    target = make(tiny_vit(attention=LINEAR, depth=1))
    run = export.export_onnx(target, tmp_path / 'model.onnx', dynamic=False)
    compared(target, run, dynamic=False)
    with pytest.raises(ValueError, match='does not run on 1 images of 40 x 16 .*--fixed-size'):
        compared(target, run, dynamic=True)


@pytest.mark.parametrize('name', ['LinearAttention', 'AgentAttention'])
def test_a_graph_of_one_size_resizes_nothing(name, tmp_path):
    """At another size than the checkpoint's: positions and tables are resampled when they are loaded."""
    import onnx
    cfg = config(tiny_vit(attention=attention(name), depth=1, img_size=256))  # too many positions to be folded
    free = awake(export.assemble(cfg))
    torch.save(free.model.state_dict(), tmp_path / 'weights.pth')
    target = export.assemble(cfg, size=(192, 320), fixed=True)
    export.load(target, cfg, tmp_path / 'weights.pth')
    run = export.export_onnx(target, tmp_path / 'model.onnx', dynamic=False)
    found = export.differences(free.module, run, [(1, 192, 320)])  # the model that resamples itself
    export.check(found, 1e-4)
    assert 'Resize' not in {node.op_type for node in onnx.load(tmp_path / 'model.onnx').graph.node}


def test_a_segmentor_of_one_size(trained):
    """Its backbone's positions are resampled as well, and its head has none."""
    path, weights = trained
    cfg = Config.fromfile(path)
    free, fixed = export.assemble(cfg, 'model'), export.assemble(cfg, 'model', (48, 64), fixed=True)
    for target in (free, fixed):
        export.load(target, cfg, weights)
    assert fixed.backbone.pos_grid == (6, 8)
    image = torch.randn(1, 3, 48, 64)
    assert torch.allclose(fixed.module(image)[0], free.module(image)[0], atol=1e-5)


def test_half_precision(tmp_path):
    """Sums over 4,096 tokens leave float16's range, and stay float32 in the graph."""
    import onnx
    target = make(tiny_vit(attention=LINEAR, depth=1, img_size=512))
    half = replace(target, module=export.HalfPrecision(target.module))
    run = export.export_onnx(half, tmp_path / 'model.onnx')
    found = export.differences(target.module, run, [(1, 512, 512)])
    export.check(found, 1e-2)
    graph = onnx.load(tmp_path / 'model.onnx').graph
    weights = {entry.data_type for entry in graph.initializer if len(entry.dims) == 2}
    assert weights == {onnx.TensorProto.FLOAT16}
    assert all(entry.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for entry in (*graph.input, *graph.output))


def test_what_precision_costs(tmp_path, monkeypatch, capsys):
    """A graph and its int8 copy, on images in a folder; a graph without our notes is refused."""
    import onnx
    from PIL import Image
    target = make(tiny_vit(attention=LINEAR, depth=1, out_type='cls_token'), 'model', 'mmpretrain', **CLASSIFIER)
    export.export_onnx(target, tmp_path / 'model.onnx')
    for i in range(3):
        Image.effect_noise((40, 32), 60).save(tmp_path / f'{i}.png')
    arguments = ['--images', str(tmp_path), '--size', '32', '32', '--seconds', '0']
    monkeypatch.setattr(sys, 'argv', ['x', str(tmp_path / 'model.onnx'), '--int8', *arguments])
    script = str(ROOT / 'tools/analysis_tools/benchmark_onnx.py')
    runpy.run_path(script, run_name='__main__')
    rows = {row.split('|')[1].strip(): row.split('|') for row in capsys.readouterr().out.splitlines() if '|' in row}
    assert float(rows['model.onnx'][4]) == 0 and rows['model.onnx'][5].strip() == '100.0 %'
    assert 0 < float(rows['int8'][4]) < 0.5 and float(rows['int8'][2]) < float(rows['model.onnx'][2]) + 0.1
    bare = onnx.load(tmp_path / 'model.onnx')
    del bare.metadata_props[:]
    onnx.save(bare, tmp_path / 'bare.onnx')
    monkeypatch.setattr(sys, 'argv', ['x', str(tmp_path / 'bare.onnx'), *arguments])
    with pytest.raises(SystemExit):
        runpy.run_path(script, run_name='__main__')
    assert 'has no notes on mean and std' in capsys.readouterr().err


def test_a_classifier(tmp_path):
    target = make(tiny_vit(attention=LINEAR, out_type='cls_token'), 'model', 'mmpretrain', **CLASSIFIER)
    run = export.export_onnx(target, tmp_path / 'model.onnx')
    compared(target, run)
    assert target.outputs == ('logits',) and run(torch.randn(2, 3, 32, 48))[0].shape == (2, 5)
    compared(target, export.export_torch(target, tmp_path / 'model.pt2', dynamic=False), dynamic=False)


def test_graph_of_a_vit_with_queries(tmp_path):
    target = make(tiny_vit(type='adala_mm.QueryViT', attention=LINEAR, num_queries=3, query_blocks=1))
    assert target.outputs == ('features', 'queries')
    compared(target, export.export_torch(target, tmp_path / 'model.pt2', dynamic=False), dynamic=False)
