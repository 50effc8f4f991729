"""mmdet, Mask2Former and deformable attention with an mmcv that was installed without its compiled ops.

Nothing is imported here that would import adala_mm: subprocesses run `probe` of this file in the order they test.
"""
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from helpers import LINEAR, ROOT, tiny_vit

CLASSES = 4
# What a user imports first, and second; the last one meets adala_mm only through the prefix of its backbone.
ORDERS = [('adala_mm.openmmlab', 'mmseg.models'), ('mmseg.apis', 'adala_mm.openmmlab'), ('mmseg.models', None)]


def mask2former_head() -> dict:
    """mmseg's own Mask2Former head for ADE20K, made small."""
    import mmseg
    from mmengine.config import Config
    path = Path(mmseg.__file__).parent / '.mim/configs/mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py'
    # Its custom_imports would bring mmdet in, ahead of whatever the order under test imports first.
    head = Config.fromfile(path, import_custom_modules=False).model.decode_head
    head.update(in_channels=[32] * 4, feat_channels=64, out_channels=64, num_classes=CLASSES, num_queries=6)
    head.loss_cls.class_weight = [1.0] * CLASSES + [0.1]
    head.train_cfg.num_points = 64
    head.positional_encoding.num_feats = head.pixel_decoder.positional_encoding.num_feats = 32
    for layers, depth in ((head.pixel_decoder.encoder, 1), (head.transformer_decoder, 2)):
        layers.num_layers = depth
        for name, part in layers.layer_cfg.items():
            part.embed_dims = 64
            if name == 'ffn_cfg':
                part.feedforward_channels = 128
    return head


def segmentor() -> dict:
    from mmengine.config import ConfigDict
    return ConfigDict(
        type='EncoderDecoder', train_cfg={}, test_cfg={'mode': 'whole'}, decode_head=mask2former_head(),
        data_preprocessor={'type': 'SegDataPreProcessor'},
        backbone=tiny_vit(img_size=64, patch_size=16, attention=LINEAR, out_indices=[-1] * 4),
        neck={'type': 'Feature2Pyramid', 'embed_dim': 32, 'rescales': [4, 2, 1, 0.5],
              'norm_cfg': {'type': 'GN', 'num_groups': 4}})


def train_and_predict() -> dict:
    """Builds the segmentor, takes the gradient of one loss and predicts; all of it from one seed."""
    from mmengine.registry import init_default_scope
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample
    init_default_scope('mmseg')  # as every runner and inferencer of mmseg does
    torch.manual_seed(0)
    model = MODELS.build(segmentor())
    model.init_weights()
    images = torch.randn(2, 3, 64, 64)
    samples = []
    for _ in images:
        sample = SegDataSample(metainfo={'img_shape': (64, 64), 'ori_shape': (64, 64), 'pad_shape': (64, 64)})
        sample.gt_sem_seg = PixelData(data=torch.randint(CLASSES, (1, 64, 64)))
        samples.append(sample)
    losses = model(images, samples, mode='loss')
    sum(losses.values()).backward()
    gradients = {name: p.grad is not None and 0 < p.grad.norm().item() < float('inf')
                 for name, p in model.named_parameters()}
    model.eval()
    with torch.no_grad():
        predicted = torch.stack([p.pred_sem_seg.data for p in model(images, samples, mode='predict')])
    return {'losses': {name: loss.item() for name, loss in losses.items()},
            'learns': [name for name, has_gradient in gradients.items() if has_gradient],
            'shape': list(predicted.shape), 'classes': predicted.unique().tolist()}


def probe(first: str, then: str | None) -> dict:
    """What a process finds that imports ``first``, then ``then``."""
    found = {}
    importlib.import_module(first)
    if then is None:
        assert 'adala_mm' not in sys.modules
        found['run'] = train_and_predict()
    else:
        importlib.import_module(then)
    from mmdet.models.dense_heads import Mask2FormerHead
    from mmseg.registry import MODELS
    found["mmdet's"] = issubclass(MODELS.get('Mask2FormerHead'), Mask2FormerHead)
    head = MODELS.build(mask2former_head())
    found['head'] = type(head) is MODELS.get('Mask2FormerHead')
    found['layers'] = [len(head.pixel_decoder.encoder.layers), len(head.transformer_decoder.layers)]
    if then is not None:
        found['run'] = train_and_predict()
    return found


@pytest.fixture(scope='module', params=ORDERS, ids=lambda order: ' then '.join(filter(None, order)))
def found(request) -> dict:
    code = ('import sys; sys.path[:0] = "tests", "tests/utils"; '
            f'import json, test_mmcv_ext; print(json.dumps(test_mmcv_ext.probe{request.param}))')
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code],
                          capture_output=True, text=True, check=False, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_mask2former_head_is_mmdets(found):
    assert found["mmdet's"] and found['head'] and found['layers'] == [1, 2]


def test_mask2former_trains_and_predicts(found):
    run = found['run']
    names = ['loss_cls', 'loss_mask', 'loss_dice']
    # One set for the queries themselves, one for each decoder layer but the last, one for the last.
    prefixes = ['', 'd0.', 'd1.']
    assert sorted(run['losses']) == sorted(f'decode.{prefix}{name}' for prefix in prefixes for name in names)
    assert all(0 < loss < 100 for loss in run['losses'].values())
    for part in ('backbone.blocks.0.attn.qkv.weight', 'backbone.patch_embed.proj.weight', 'neck.upsample_4x.0.weight',
                 'decode_head.pixel_decoder.encoder.layers.0.self_attn.sampling_offsets.weight',
                 'decode_head.pixel_decoder.encoder.layers.0.self_attn.value_proj.weight',
                 'decode_head.query_feat.weight', 'decode_head.cls_embed.weight'):
        assert part in run['learns'], part
    assert run['shape'] == [2, 1, 64, 64] and set(run['classes']) <= set(range(CLASSES))


@pytest.fixture
def stand_in():
    from adala_mm.utils.mmcv_ext import provide_mmcv_ops
    if not provide_mmcv_ops():
        pytest.skip('this mmcv has compiled ops')
    return sys.modules['mmcv._ext']


def test_deformable_attention_equals_mmcvs_own(stand_in):
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch
    shapes = torch.tensor([[5, 7], [3, 4], [1, 2]])
    starts = torch.tensor([0, 35, 47])
    value = torch.randn(2, 49, 4, 8, dtype=torch.float64)
    where = torch.rand(2, 6, 4, 3, 5, 2, dtype=torch.float64) * 1.4 - 0.2  # also beside the image
    weights = torch.rand(2, 6, 4, 3, 5, dtype=torch.float64)
    upstream = torch.randn(2, 6, 32, dtype=torch.float64)

    def run(function):
        inputs = [x.clone().requires_grad_() for x in (value, where, weights)]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]

    got = run(lambda v, loc, w: MultiScaleDeformableAttnFunction.apply(v, shapes, starts, loc, w, 64))
    wanted = run(lambda v, loc, w: multi_scale_deformable_attn_pytorch(v, shapes, loc, w))
    assert len(got) == 4 and all(tensor.abs().max() > 0.1 for tensor in wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def call_soft_nms():
    from mmcv.ops import soft_nms
    soft_nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)


def call_roi_pool():
    from mmcv.ops import roi_pool
    roi_pool(torch.ones(1, 1, 4, 4), torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0]]), 2)


def call_modulated_deform_conv():
    from mmcv.ops import ModulatedDeformConv2dPack
    ModulatedDeformConv2dPack(1, 1, 3)(torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize(('call', 'name'), [
    (call_soft_nms, 'softnms'),
    (call_roi_pool, 'roi_pool_forward'),
    (call_modulated_deform_conv, 'modulated_deform_conv_forward'),
])
def test_other_ops_say_which_one_is_missing(stand_in, call, name):
    from adala_mm.utils.mmcv_ext import MissingOp
    with pytest.raises(MissingOp, match=f'"{name}" needs compiled'):
        call()


def test_stand_in_is_put_in_place_once(stand_in):
    from adala_mm.utils.mmcv_ext import provide_mmcv_ops
    assert provide_mmcv_ops() and sys.modules['mmcv._ext'] is stand_in


def test_loaded_compiled_ops_are_left_alone(monkeypatch):
    from adala_mm.utils.mmcv_ext import provide_mmcv_ops
    compiled = ModuleType('mmcv._ext')
    monkeypatch.setitem(sys.modules, 'mmcv._ext', compiled)
    assert provide_mmcv_ops() is False
    assert sys.modules['mmcv._ext'] is compiled


def test_installed_compiled_ops_are_left_alone(monkeypatch, tmp_path):
    import mmcv

    from adala_mm.utils.mmcv_ext import provide_mmcv_ops
    (tmp_path / '_ext.py').touch()
    monkeypatch.setattr(mmcv, '__path__', [*mmcv.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, 'mmcv._ext', raising=False)
    assert provide_mmcv_ops() is False
    assert 'mmcv._ext' not in sys.modules
