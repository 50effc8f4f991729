"""Exported files, read back by the runtimes and libraries they are for, against the models they were made from."""
from __future__ import annotations

import json
import runpy
import sys
import zipfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import timm
import torch
from mmengine.config import Config
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import adala_mm
from adala_mm import export, linearize
from adala_mm.export import graphs
from adala_mm.export.mask2former import symbolic_sizes
from adala_mm.export.parity import shapes
from adala_mm.registry import ATTENTIONS, MODELS
from adala_mm.utils.checkpoint import TRUST
from helpers import LINEAR, ROOT, tiny_vit
from helpers.layers import attention

ATTENTIONS.import_from_location()
SOFTMAX = dict(type='adala_mm.SoftmaxAttention')
SIZE_BOUND = ('NystromformerAttention', 'ViGAttention')  # tokens fall into segments, whose number is the graph's length
ONNX = ('LinearAttention', 'MLLAAttention')  # docs/export_detail.md has a record of all
SEGMENTOR = dict(
    type='EncoderDecoder', decode_head=dict(
        type='FCNHead', in_channels=32, channels=32, num_convs=0, concat_input=False, num_classes=4, dropout_ratio=0.0,
        align_corners=False, loss_decode=dict(type='CrossEntropyLoss')), test_cfg=dict(mode='whole'))


def config(backbone: dict, scope: str = 'mmseg', **model) -> Config:
    return Config(dict(default_scope=scope, model=dict(model or dict(type='adala_mm.FeatureAlignment'),
                                                       backbone=backbone)))


def awake(target: export.Target) -> export.Target:
    """With weights that make every part of the model visible."""
    for name, parameter in target.model.named_parameters():
        nn.init.normal_(parameter, mean=float('norm' in name and 'weight' in name), std=0.3)
    return target


def make(backbone: dict, part: str = 'backbone', scope: str = 'mmseg', **model) -> export.Target:
    return awake(export.assemble(config(backbone, scope, **model), part))


def compared(target: export.Target, run, dynamic: bool = True, tolerance: float = 1e-4) -> list[export.Difference]:
    found = export.differences(target.module, run, shapes(target.size, target.multiple, dynamic))
    export.check(found, tolerance)
    return found


class Unsafe(dict):
    """Weights in a class of one's own, which is unpickled for those who say so only."""


def tool(monkeypatch, *args) -> None:
    monkeypatch.setattr(sys, 'argv', ['export.py', *map(str, args)])
    runpy.run_path(str(ROOT / 'tools/export.py'), run_name='__main__')


@pytest.fixture
def trained(tmp_path) -> tuple[Path, Path]:
    """Config and checkpoint of a tiny linear segmentor."""
    cfg = config(tiny_vit(attention=LINEAR), **SEGMENTOR)
    cfg.dump(tmp_path / 'config.py')
    torch.save(dict(state_dict=awake(export.assemble(cfg, 'model')).model.state_dict()), tmp_path / 'weights.pth')
    return tmp_path / 'config.py', tmp_path / 'weights.pth'


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


CLASSIFIER = dict(type='ImageClassifier', head=dict(type='LinearClsHead', num_classes=5, in_channels=32))


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


def test_a_linearized_model_of_timm(tmp_path, monkeypatch, capsys):
    """Without a config: tokens at any size, or the classifier's logits at one."""
    import onnx
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


def test_names_of_classes(trained, tmp_path, monkeypatch):
    """They come from the checkpoint, where MMEngine's runner puts them."""
    import onnx
    cfg, weights = trained
    names = ['road', 'tree', 'sky', 'car']
    torch.save(torch.load(weights) | dict(meta=dict(dataset_meta=dict(classes=tuple(names)))), weights)
    tool(monkeypatch, cfg, weights, tmp_path / 'model.onnx', '--part', 'model', '--no-benchmark')
    notes = {entry.key: entry.value for entry in onnx.load(tmp_path / 'model.onnx').metadata_props}
    assert json.loads(notes['classes']) == names


def test_a_classifier(tmp_path):
    target = make(tiny_vit(attention=LINEAR, out_type='cls_token'), 'model', 'mmpretrain', **CLASSIFIER)
    run = export.export_onnx(target, tmp_path / 'model.onnx')
    compared(target, run)
    assert target.outputs == ('logits',) and run(torch.randn(2, 3, 32, 48))[0].shape == (2, 5)
    compared(target, export.export_torch(target, tmp_path / 'model.pt2', dynamic=False), dynamic=False)


@pytest.fixture(scope='module')
def mask2former() -> export.Target:
    """The demo's Mask2Former with one layer each, on a tiny ViT."""
    torch.manual_seed(0)
    cfg = Config.fromfile(ROOT / 'configs/demo/mask2former_demo_beacons.py')
    head = cfg.model.decode_head
    head.in_channels, head.num_queries, cfg.model.neck.embed_dim = [32] * 4, 5, 32
    head.pixel_decoder.encoder.num_layers = head.transformer_decoder.num_layers = 1
    cfg.model.backbone = Config(tiny_vit(attention=LINEAR, out_indices=[-1] * 4))._cfg_dict
    return awake(export.assemble(cfg, 'model'))


@torch.no_grad()
def test_our_pixel_decoder_is_mmdets(mask2former):
    decoder = mask2former.model.decode_head.pixel_decoder
    feats = [torch.randn(2, 32, 24 // step, 16 // step) for step in (1, 2, 4, 8)]
    wanted, maps = decoder(feats)
    with symbolic_sizes(mask2former.model):
        got, other = decoder(feats)
    assert torch.allclose(got, wanted, atol=1e-4) and len(maps) == len(other)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(maps, other, strict=True))
    assert 'forward' not in vars(decoder)


def test_mask2former(mask2former, tmp_path):
    assert mask2former.multiple == 16  # the pyramid halves the grid of 8 pixels
    run = export.export_onnx(mask2former, tmp_path / 'model.onnx')
    compared(mask2former, run)
    assert run(torch.randn(2, 3, 32, 48))[0].shape == (2, 6, 32, 48)


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


def test_graph_of_a_vit_with_queries(tmp_path):
    target = make(tiny_vit(type='adala_mm.QueryViT', attention=LINEAR, num_queries=3, query_blocks=1))
    assert target.outputs == ('features', 'queries')
    compared(target, export.export_torch(target, tmp_path / 'model.pt2', dynamic=False), dynamic=False)


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
    (['a.pt2'], r'names no weights \(init_cfg\): say a CHECKPOINT'),
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
