"""A training step of every stage and head in half precision, on the CPU: finite, and close to the one in float32."""
from __future__ import annotations

import copy
import runpy
import sys

import numpy as np
import pytest
import torch
from mmdet.models.task_modules.assigners import AssignResult
from mmengine.config import Config
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.runner.checkpoint import CheckpointLoader
from mmengine.structures import PixelData
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample
from PIL import Image
from torch import Tensor, nn

from adala_mm.datasets.beacons import draw_scene
from adala_mm.engine import CPUAmpOptimWrapper
from adala_mm.models.algorithms.attention_alignment import differentiate
from adala_mm.registry import MODELS
from adala_mm.utils.checkpoint import load_checkpoint
from adala_mm.utils.records import curve
from helpers import LINEAR, ROOT, tiny_vit
from helpers.processes import apart

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='autocast of the CPU; test_gpu.py has the other')

KINDS = ['stage 1', 'stage 2', 'linear classifier', 'linear segmentor', 'Mask2Former']
# bfloat16 rounds to 8 bits, 0.4 %, float16 to 11, 0.05 %: per operation, and a loss is behind some dozens of them. In
# gradients of deep parameters, differences of large terms, the same errors show several times larger.
PRECISIONS = {'bfloat16': dict(loss=0.02, gradients=0.1), 'float16': dict(loss=0.003, gradients=0.05)}


def alignment(kind: str, init_cfg: dict) -> dict:
    teacher = dict(teacher=tiny_vit(init_cfg=init_cfg)) if kind == 'stage 2' else {}
    return dict(type=f'adala_mm.{"Feature" if teacher else "Attention"}Alignment', **teacher,
                backbone=tiny_vit(attention=LINEAR, init_cfg=init_cfg), data_preprocessor=dict(
                    type='ImgDataPreprocessor', mean=[120.0, 110.0, 100.0], std=[60.0, 50.0, 40.0]))


def build(kind: str, init_cfg: dict) -> nn.Module:
    torch.manual_seed(3)
    if kind.startswith('stage'):
        model = MODELS.build(alignment(kind, init_cfg))
    elif kind == 'linear classifier':
        cfg = Config.fromfile(ROOT / 'configs/adala/cls_dinov2l_in1k.py').model
        cfg.backbone = tiny_vit(attention=LINEAR, init_cfg=init_cfg, out_type='cls_token')
        cfg.head.in_channels = 32
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            model = MODELS.build(cfg)
    else:
        name = 'fcn' if kind.startswith('linear') else 'mask2former'
        cfg = Config.fromfile(ROOT / f'configs/demo/{name}_demo_beacons.py').model
        cfg.backbone = tiny_vit(attention=LINEAR, init_cfg=init_cfg, out_indices=[-1] * 4 if 'neck' in cfg else [-1])
        if 'neck' in cfg:
            cfg.neck.update(embed_dim=32, norm_cfg=dict(type='GN', num_groups=4))
            cfg.decode_head.in_channels = [32] * 4
        else:
            cfg.decode_head.update(in_channels=32, channels=32, init_cfg=None)
        with DefaultScope.overwrite_default_scope('mmseg'):
            model = MODELS.build(cfg)
    model.init_weights()
    return model.train()


def batch(kind: str) -> dict:
    inputs = list(torch.randint(256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(5), dtype=torch.uint8))
    if kind.startswith('stage'):
        return dict(inputs=[image.float() for image in inputs])
    if kind == 'linear classifier':
        return dict(inputs=torch.stack(inputs), data_samples=[DataSample().set_gt_label(i) for i in (3, 700)])
    label = torch.zeros(1, 32, 32, dtype=torch.long)
    label[:, 8:20, 10:30] = 4
    meta = dict(img_shape=(32, 32), ori_shape=(32, 32), pad_shape=(32, 32))
    return dict(inputs=inputs, data_samples=[
        SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=label.roll(i, 1))) for i in (0, 5)])


class FirstComeFirstServed:
    """Query i meets mask i."""

    def assign(self, pred_instances, gt_instances, **kwargs) -> AssignResult:
        queries, masks = len(pred_instances), len(gt_instances)
        met, labels = torch.zeros(queries, dtype=torch.long), torch.full((queries,), -1)
        met[:masks], labels[:masks] = torch.arange(1, masks + 1), gt_instances.labels
        return AssignResult(masks, met, None, labels=labels)


def without_decisions(head: nn.Module) -> None:
    """Mask2Former decides by thresholds and ranks, which rounding tips over: whom it asks, where it looks, where not.

    Its gradients jump then, on one processor and not on another. Here all is decided beforehand.
    """
    forward, head.assigner, head.importance_sample_ratio = head._forward_head, FirstComeFirstServed(), 0.0

    def look_everywhere(*args):
        scores, masks, hidden = forward(*args)
        return scores, masks, torch.zeros_like(hidden)

    head._forward_head = look_everywhere


def step(kind: str, init_cfg: dict, dtype: str | None = None) -> tuple[float, dict[str, Tensor], nn.Module]:
    """Loss and gradients of one training step, and the model after it."""
    model = build(kind, init_cfg)
    if kind == 'Mask2Former':
        without_decisions(model.decode_head)
    # A power of two leaves the gradients what they are.
    options = {None: dict(type='OptimWrapper'),
               'bfloat16': dict(type='adala_mm.CPUAmpOptimWrapper', dtype='bfloat16', loss_scale=1.0),
               'float16': dict(type='adala_mm.CPUAmpOptimWrapper', dtype='float16',
                               loss_scale=dict(init_scale=2.0 ** 10))}[dtype]
    wrapper = build_optim_wrapper(model, options | dict(optimizer=dict(type='AdamW', lr=1e-3)))
    gradients = {}

    def keep(optimizer, args, kwargs):
        gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    wrapper.optimizer.register_step_pre_hook(keep)
    torch.manual_seed(7)  # Mask2Former compares masks at random points
    loss = model.train_step(batch(kind), wrapper)['loss'].item()
    return loss, gradients, model


@pytest.fixture(scope='module')
def in_float32(sharp_pretrained) -> dict:
    return {kind: step(kind, sharp_pretrained) for kind in KINDS}


@pytest.mark.parametrize('dtype', PRECISIONS)
@pytest.mark.parametrize('kind', KINDS)
def test_step_in_half_precision(kind, dtype, in_float32, sharp_pretrained):
    loss, gradients, model = step(kind, sharp_pretrained, dtype)
    wanted, wanted_gradients, _ = in_float32[kind]
    assert loss == pytest.approx(wanted, rel=PRECISIONS[dtype]['loss']) and loss != wanted  # it was in half precision
    assert gradients.keys() == wanted_gradients.keys() and gradients
    assert all(grad.isfinite().all() for grad in gradients.values())
    error = sum((gradients[name] - grad).square().sum() for name, grad in wanted_gradients.items()).sqrt()
    norm = sum(grad.square().sum() for grad in wanted_gradients.values()).sqrt()
    assert error < PRECISIONS[dtype]['gradients'] * norm
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    before = build(kind, sharp_pretrained).state_dict()
    changed = [name for name in gradients if not torch.equal(model.state_dict()[name], before[name])]
    assert len(changed) > 0.5 * len(gradients)  # the scaler let the step happen
    assert all(value.isfinite().all() for value in model.state_dict().values())


def head_loss(model: nn.Module, dtype: torch.dtype | None, scale: float = 1.0) -> dict[str, Tensor]:
    """Losses of a Mask2Former whose mask features are ``scale`` times as large."""
    handle = model.decode_head.pixel_decoder.register_forward_hook(lambda m, args, out: (scale * out[0], out[1]))
    torch.manual_seed(7)
    with torch.autocast('cpu', dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        losses = model(**model.data_preprocessor(batch('Mask2Former'), True), mode='loss')
    handle.remove()
    return losses


def plain_head(model: nn.Module) -> nn.Module:
    """The same with mmseg's head and mmdet's pixel decoder as they are."""
    plain = copy.deepcopy(model)
    for module in (plain.decode_head, plain.decode_head.pixel_decoder):
        module.__class__ = type(module).__mro__[1]
    return plain


@pytest.fixture(scope='module')
def mask2former(sharp_pretrained) -> nn.Module:
    return build('Mask2Former', sharp_pretrained)


def test_mask2former_is_mmsegs_in_float32(mask2former):
    plain = plain_head(mask2former)
    assert type(plain.decode_head).__module__.startswith('mmseg.')
    assert type(plain.decode_head.pixel_decoder).__module__.startswith('mmdet.')
    got, wanted = head_loss(mask2former, None), head_loss(plain, None)
    assert got.keys() == wanted.keys() and all(torch.equal(got[key], value) for key, value in wanted.items())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_what_mask2former_keeps_in_float32(mask2former, dtype):
    seen = {}

    def watch(name):
        def keep(module, args, output):
            seen[name] = output
        return keep

    head = mask2former.decode_head
    parts = dict(backbone=mask2former.backbone.blocks[0].mlp.fc1, pixel=head.pixel_decoder.encoder.layers[0].ffn,
                 offsets=head.pixel_decoder.encoder.layers[0].self_attn.sampling_offsets, logits=head.cls_embed,
                 decoder=head.transformer_decoder.layers[0].ffn.layers[0][0])
    handles = [part.register_forward_hook(watch(name)) for name, part in parts.items()]
    losses = head_loss(mask2former, dtype)
    for handle in handles:
        handle.remove()
    assert {name: output.dtype for name, output in seen.items()} == dict(
        backbone=dtype, decoder=dtype, pixel=torch.float32, offsets=torch.float32, logits=torch.float32)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}


@pytest.mark.parametrize('scale', [100, 3000])
def test_matching_survives_large_logits_in_float16(mask2former, scale):
    if scale == 3000:
        with pytest.raises(ValueError, match='infeasible'):  # costs of inf: what our head is for
            head_loss(plain_head(mask2former), torch.float16, scale)
    got, wanted = (sum(head_loss(mask2former, dtype, scale).values()) for dtype in (torch.float16, None))
    assert got.item() == pytest.approx(wanted.item(), rel=PRECISIONS['float16']['loss'])
    got.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in mask2former.parameters())
    mask2former.zero_grad()


@pytest.mark.parametrize('scale', [float('nan'), float('inf'), 1e38])
def test_matching_leaves_what_is_not_finite_to_the_loss(mask2former, scale):
    assert not sum(head_loss(mask2former, None, scale).values()).isfinite()


def test_scaled_gradients_of_stage_1_that_parameters_share():
    first, second, bias = (nn.Parameter(torch.randn(3)) for _ in range(3))
    loss = (first + second).square().sum() + bias.sum()  # autograd has one tensor for two of them, one number for bias
    differentiate(loss, [first, second, bias], 8.0).backward()
    for parameter, wanted in ((first, 2 * (first + second)), (second, 2 * (first + second)), (bias, torch.ones(3))):
        torch.testing.assert_close(parameter.grad, wanted.detach())


@pytest.mark.parametrize(('options', 'match'), [
    (dict(dtype='float32'), "dtype='float32': mixed precision is bfloat16 or float16"),
    (dict(loss_scale=4), "loss_scale=4: give 'dynamic', a float or a dict"),
    (dict(loss_scale='static'), "loss_scale='static': give 'dynamic'")])
def test_cpu_wrapper_rejects(options, match):
    with pytest.raises(ValueError, match=match):
        CPUAmpOptimWrapper(optimizer=torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0), **options)


def test_cpu_wrapper_scales_accumulates_and_resumes():
    layer, twin = nn.Linear(8, 4), nn.Linear(8, 4)
    twin.load_state_dict(layer.state_dict())
    amp = CPUAmpOptimWrapper(optimizer=torch.optim.SGD(layer.parameters(), lr=0.1), dtype='float16',
                             loss_scale=dict(init_scale=256.0, growth_interval=1), accumulative_counts=2)
    plain = OptimWrapper(torch.optim.SGD(twin.parameters(), lr=0.1), accumulative_counts=2)
    for model, wrapper in ((layer, amp), (twin, plain)):
        for images in torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1)):
            with wrapper.optim_context(model):
                out = model(images)
            assert out.dtype == (torch.float16 if wrapper is amp else torch.float32)
            wrapper.update_params(out.float().square().mean())
    torch.testing.assert_close(layer.weight, twin.weight, rtol=1e-2, atol=1e-4)
    assert amp.loss_scaler.get_scale() == 512
    again = CPUAmpOptimWrapper(optimizer=torch.optim.SGD(layer.parameters(), lr=0.1), dtype='float16')
    again.load_state_dict(amp.state_dict())
    assert again.loss_scaler.get_scale() == 512


def test_amp_option_of_the_training_tool(sharp_pretrained, tmp_path):
    for i in range(4):
        folder = tmp_path / 'data/beacons/images/train'
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_scene(np.random.default_rng(i), 32)[0]).save(folder / f'{i}.png')
    cfg = Config.fromfile(ROOT / 'configs/demo/stage1_demo_beacons.py')
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=False)
    cfg.train_dataloader.batch_size = 2
    cfg.train_dataloader.dataset.update(data_root=str(tmp_path / 'data/beacons'), data_prefix='images/train', pipeline=[
        dict(type='LoadImageFromFile'), dict(type='mmpretrain.PackInputs')])
    cfg.model.backbone = tiny_vit(attention=LINEAR, init_cfg=sharp_pretrained)
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=2)
    cfg.default_hooks.checkpoint.interval = 2
    cfg.default_hooks.logger.interval = 1
    cfg.update(val_dataloader=None, val_cfg=None, val_evaluator=None, custom_hooks=[], param_scheduler=None)
    cfg.dump(str(tmp_path / 'config.py'))
    losses = {}
    for name, options in (('float32', []), ('amp', ['--amp'])):
        words = ['train.py', str(tmp_path / 'config.py'), '--work-dir', str(tmp_path / name), *options]
        with apart(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(CheckpointLoader, '_schemes', CheckpointLoader._schemes.copy())
            patch.setattr(sys, 'argv', words)
            patch.setenv('LOCAL_RANK', '0')  # the tool sets it and leaves it
            runpy.run_path(str(ROOT / 'tools/train.py'), run_name='__main__')
        losses[name] = curve(tmp_path / name, 'loss')[1]
    assert losses['amp'] == pytest.approx(losses['float32'], rel=PRECISIONS['bfloat16']['loss'])
    assert losses['amp'] != losses['float32']
    saved = load_checkpoint(tmp_path / 'amp/iter_2.pth')
    assert saved['optimizer']['loss_scaler']['scale'] == 1.0
    assert {value.dtype for value in saved['state_dict'].values()} == {torch.float32}
