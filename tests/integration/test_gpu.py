"""What only a GPU can show. Skipped without one; a machine with one has to run only this file."""
from __future__ import annotations

import pytest
import torch

from adala_mm.models.attentions import build_attention
from adala_mm.ops import FEATURE_MAPS, linear_attention
from adala_mm.ops.deformable_attention import ms_deform_attn
from adala_mm.registry import ATTENTIONS
from helpers import LINEAR, ROOT, tiny_vit
from helpers.coarse_kernels import check as check_coarse_to_fine
from helpers.coarse_kernels import qkv as coarse_qkv

ATTENTIONS.import_from_location()
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('feature_map', FEATURE_MAPS)
def test_linear_attention(feature_map, dtype):
    q, k, v = (3 * torch.randn(3, 1, 2, 16385, 64, device='cuda')).to(dtype).unbind(0)
    inputs = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    with torch.autocast('cuda', dtype=torch.bfloat16):
        out = linear_attention(*inputs, feature_map)
    out.float().square().sum().backward()
    wanted = linear_attention(q.double(), k.double(), v.double(), feature_map)
    assert out.dtype == dtype
    assert (out - wanted).norm() < 2 * torch.finfo(dtype).eps * wanted.norm() + 1e-5 * wanted.norm()
    assert all(t.grad.isfinite().all() for t in inputs)


@pytest.mark.parametrize('dim', [64, 80])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_coarse_to_fine(dtype, dim):
    check_coarse_to_fine(coarse_qkv((40, 36), 1, dim, heads=4, dtype=dtype), (40, 36), 4, 16, 8)


@pytest.mark.parametrize('name', sorted(ATTENTIONS.module_dict))
def test_every_attention_as_on_the_cpu(name):
    layer = build_attention(dict(type=name), 128, 4, grid=(24, 20), num_prefix=1).eval()
    x = torch.randn(2, 481, 128)
    wanted = layer(x, (24, 20), 1)
    layer.cuda()
    out = layer(x.cuda(), (24, 20), 1)
    assert (out.cpu() - wanted).norm() < 1e-3 * wanted.norm()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast('cuda', dtype=dtype):
            half = layer(x.cuda(), (24, 20), 1)
        half.float().square().mean().backward()
        assert (half.float().cpu() - wanted).norm() < 0.05 * wanted.norm()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_deformable_attention_as_on_the_cpu():
    shapes = torch.tensor([[8, 6], [4, 3]])
    inputs = [torch.randn(2, 60, 4, 8), torch.rand(2, 10, 4, 2, 3, 2) * 1.4 - 0.2, torch.rand(2, 10, 4, 2, 3)]
    results = []
    for device in ('cpu', 'cuda'):
        value, locations, weights = (t.to(device).requires_grad_() for t in inputs)
        out = ms_deform_attn(value, shapes.to(device), locations, weights)
        grads = torch.autograd.grad(out.square().sum(), (value, locations, weights))
        results.append([out, *grads])
    for cpu, gpu in zip(*results, strict=True):
        assert torch.allclose(cpu, gpu.cpu(), atol=1e-4)


@pytest.mark.parametrize('stage', ['AttentionAlignment', 'FeatureAlignment'])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_amp_step_of_each_stage(stage, dtype, pretrained):
    from mmengine.optim import build_optim_wrapper

    from adala_mm.registry import MODELS
    teacher = dict(teacher=tiny_vit(init_cfg=pretrained)) if stage == 'FeatureAlignment' else {}
    model = MODELS.build(dict(type=f'adala_mm.{stage}', backbone=tiny_vit(attention=LINEAR, init_cfg=pretrained),
                              data_preprocessor=dict(type='ImgDataPreprocessor'), **teacher)).cuda()
    model.init_weights()
    wrapper = build_optim_wrapper(model, dict(type='AmpOptimWrapper', dtype=dtype, loss_scale='dynamic',
                                              optimizer=dict(type='AdamW', lr=1e-3)))
    before = model.backbone.blocks[0].attn.qkv.weight.detach().clone()
    for _ in range(3):
        log = model.train_step({'inputs': list(torch.rand(4, 3, 32, 32))}, wrapper)
        assert log['loss'].isfinite()
    assert not torch.equal(before, model.backbone.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize('amp', [False, True])
def test_mask2former_step(amp):
    """The flagship's head on the GPU, through mmcv's own ops or through their stand-in."""
    from mmengine.config import Config
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import init_default_scope
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    from adala_mm.registry import MODELS
    cfg = Config.fromfile(ROOT / 'configs/demo/mask2former_demo_beacons.py')
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model).cuda()
    model.init_weights()
    kind = dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0) if amp else dict(type='OptimWrapper')
    wrapper = build_optim_wrapper(model, dict(optimizer=dict(type='AdamW', lr=1e-3), **kind))
    label = torch.zeros(1, 80, 80, dtype=torch.long)
    label[:, 20:50, 30:60] = 4
    sample = SegDataSample(metainfo=dict(img_shape=(80, 80), ori_shape=(80, 80), pad_shape=(80, 80)),
                           gt_sem_seg=PixelData(data=label))
    data = dict(inputs=[torch.randint(256, (3, 80, 80), dtype=torch.uint8)] * 2, data_samples=[sample] * 2)
    for _ in range(2):
        log = model.train_step(data, wrapper)
        assert log['loss'].isfinite()
    assert model.eval().test_step(data)[0].pred_sem_seg.data.shape == (1, 80, 80)
