"""Detection: mmcv's ops on torchvision, the pyramid, the configs, and the detectors on rectangles and discs."""
from __future__ import annotations

import copy
import functools
import json
import math
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import cv2
import mmdet
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.hooks import Hook
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import nn
from torch.nn import functional as F

from adala_mm.models.necks import SimpleFeaturePyramid
from adala_mm.preflight.images import label_loader
from adala_mm.utils.mmcv_ext import provide_mmcv_ops
from helpers import ROOT
from helpers import tiny_vit
from helpers.detection import CLASSES
from helpers.detection import draw_split
from helpers.detection import mmdets

NAMES = ['dino_dinov2l_coco', 'dino_dinov2l_softmax_coco', 'maskrcnn_dinov2l_1024_coco',
         'maskrcnn_dinov2l_softmax_1024_coco']
DINO, _, MASKRCNN, _ = NAMES
every_config = pytest.mark.parametrize('name', NAMES)
EPOCHS = {DINO: 15, MASKRCNN: 10}  # on the toy set, of three steps each
each_detector = pytest.mark.parametrize('name', [DINO, MASKRCNN])
STAGE2 = 'stage2_dinov2l_in22k'
DIM = 64


# --- mmcv's ops -------------------------------------------------------------------------------------------------------

@pytest.fixture
def stand_in():
    """For what compiled ops treat otherwise, or not on the CPU."""
    if not provide_mmcv_ops():
        pytest.skip('this mmcv has compiled ops')


def random_boxes(count: int, size: float) -> torch.Tensor:
    corners = torch.rand(count, 2, 2, dtype=torch.float64).sort(dim=1).values * size
    return corners.flatten(1)


def iou(a, b, offset):
    w = min(a[2], b[2]) - max(a[0], b[0]) + offset
    h = min(a[3], b[3]) - max(a[1], b[1]) + offset
    both = max(w, 0) * max(h, 0)
    areas = sum((c[2] - c[0] + offset) * (c[3] - c[1] + offset) for c in (a, b))
    return both / (areas - both)


@pytest.mark.parametrize('offset', [0, 1])
def test_nms_by_definition(offset):
    from mmcv.ops import nms
    boxes, scores = random_boxes(60, 8), torch.rand(60, dtype=torch.float64)
    kept = []
    for i in scores.argsort(descending=True).tolist():
        if all(iou(boxes[i].tolist(), boxes[j].tolist(), offset) <= 0.3 for j in kept):
            kept.append(i)
    found, indices = nms(boxes, scores, 0.3, offset=offset)
    assert indices.tolist() == kept and 5 < len(kept) < 50
    torch.testing.assert_close(found, torch.cat([boxes[kept], scores[kept, None]], dim=1))


def test_the_offset_of_nms_matters():
    from mmcv.ops import nms
    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 2]])  # IoU 1 / 2, or 4 / 6
    counts = [len(nms(boxes, torch.tensor([0.9, 0.8]), 0.6, offset=offset)[1]) for offset in (0, 1)]
    assert counts == [2, 1]


def test_nms_of_no_boxes_and_of_half_precision(stand_in):
    from mmcv.ops import nms
    assert nms(torch.zeros(0, 4), torch.zeros(0), 0.5)[1].tolist() == []
    boxes = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 7], [20, 20, 30, 30]], dtype=torch.bfloat16)
    assert nms(boxes, torch.tensor([0.5, 0.75, 0.25], dtype=torch.bfloat16), 0.5)[1].tolist() == [1, 2]


def test_batched_nms_keeps_classes_apart():
    from mmcv.ops import batched_nms
    boxes = torch.tensor([[0.0, 0, 8, 8]]).repeat(4, 1)
    _, kept = batched_nms(boxes, torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0, 1, 0, 2]),
                          dict(type='nms', iou_threshold=0.5))
    assert kept.tolist() == [0, 1, 3]


def sample(image, y, x):
    """Bilinear value (C) of one image (C, h, w); zero from one pixel outside of it on."""
    height, width = image.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return image.new_zeros(len(image))
    y, x = max(y, 0), max(x, 0)
    top, left = min(int(y), height - 1), min(int(x), width - 1)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    fy, fx = (0 if top == height - 1 else y - top), (0 if left == width - 1 else x - left)
    return ((1 - fy) * ((1 - fx) * image[:, top, left] + fx * image[:, top, right])
            + fy * ((1 - fx) * image[:, bottom, left] + fx * image[:, bottom, right]))


def naive_roi_align(features, rois, size, scale, ratio, aligned):
    out = []
    for index, *box in rois.tolist():
        x1, y1, x2, y2 = (c * scale - 0.5 * aligned for c in box)
        w, h = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1), max(y2 - y1, 1))
        ny, nx = (ratio, ratio) if ratio else (math.ceil(h / size[0]), math.ceil(w / size[1]))
        out.append(torch.stack([torch.stack([
            sum(sample(features[int(index)], y1 + (i + (a + 0.5) / ny) * h / size[0],
                       x1 + (j + (b + 0.5) / nx) * w / size[1]) for a in range(ny) for b in range(nx)) / (ny * nx)
            for j in range(size[1])], dim=-1) for i in range(size[0])], dim=-2))
    return torch.stack(out)


@pytest.mark.parametrize(('ratio', 'aligned'), [(0, True), (2, True), (2, False)])
def test_roi_align_by_definition(ratio, aligned):
    from mmcv.ops import roi_align
    features = torch.randn(2, 3, 6, 9, dtype=torch.float64, requires_grad=True)
    rois = torch.cat([torch.tensor([[0.0], [1], [1], [0]], dtype=torch.float64), random_boxes(4, 26) - 2], dim=1)
    rois[3, 1:] = torch.tensor([30.0, -9.0, 60.0, 20.0])  # beside the image for the most part
    found = roi_align(features, rois, (3, 2), 0.5, ratio, 'avg', aligned)
    naive = naive_roi_align(features, rois, (3, 2), 0.5, ratio, aligned)
    torch.testing.assert_close(found, naive)
    upstream = torch.randn_like(naive)
    (wanted,) = torch.autograd.grad(naive, features, upstream)
    torch.testing.assert_close(torch.autograd.grad(found, features, upstream)[0], wanted)
    assert wanted.abs().max() > 0.1


def test_roi_align_of_half_precision(stand_in):
    from mmcv.ops import roi_align
    features = torch.randn(1, 2, 8, 8).bfloat16().requires_grad_()
    rois = torch.tensor([[0.0, 1, 1, 6, 6]], dtype=torch.bfloat16)
    found = roi_align(features, rois, 2)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), roi_align(features.float(), rois.float(), 2), rtol=1e-2, atol=1e-2)
    found.sum().backward()
    assert features.grad.dtype == torch.bfloat16 and features.grad.float().sum() == pytest.approx(8, rel=2e-2)


def test_focal_loss_by_definition(stand_in):
    """On GPUs mmdet calls the op, on the CPU its own formula; here both run on the CPU."""
    from mmcv.ops import sigmoid_focal_loss
    logits = (3 * torch.randn(7, 4, dtype=torch.float64)).requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 4, 4, 0])  # 4: no class
    p = logits.sigmoid()
    hit = F.one_hot(labels, 5)[:, :4].bool()
    naive = torch.where(hit, -0.3 * (1 - p) ** 1.5 * p.log(), -0.7 * p ** 1.5 * (1 - p).log())
    for reduction, reduced in (('none', naive), ('sum', naive.sum()), ('mean', naive.sum() / 7)):
        found = sigmoid_focal_loss(logits, labels, 1.5, 0.3, None, reduction)
        torch.testing.assert_close(found, reduced)
        upstream = torch.randn_like(reduced)
        (wanted,) = torch.autograd.grad(reduced, logits, upstream, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(found, logits, upstream)[0], wanted)


def test_what_torchvision_has_not(stand_in):
    from mmcv.ops import roi_align, sigmoid_focal_loss
    with pytest.raises(NotImplementedError, match=r"pool_mode='max'\) needs an mmcv with compiled ops"):
        roi_align(torch.ones(1, 1, 4, 4), torch.tensor([[0.0, 0, 0, 2, 2]]), 2, 1.0, 0, 'max')
    with pytest.raises(NotImplementedError, match='weights of classes needs an mmcv with compiled ops'):
        sigmoid_focal_loss(torch.zeros(1, 2), torch.tensor([0]), 2.0, 0.25, torch.ones(2))


# --- the pyramid ------------------------------------------------------------------------------------------------------

def channel_norm(x, norm):
    mean, var = x.mean(dim=1, keepdim=True), x.var(dim=1, keepdim=True, unbiased=False)
    return (x - mean) / (var + 1e-6).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def doubled(x, deconv):
    """A transposed convolution of kernel and stride 2, pixel by pixel."""
    out = torch.einsum('bchw,cdij->bdhiwj', x, deconv.weight)
    return out.flatten(4, 5).flatten(2, 3) + deconv.bias[:, None, None]


def test_pyramid_by_definition():
    neck = SimpleFeaturePyramid(8, 5).double()
    for parameter in neck.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 8, 4, 6, dtype=torch.float64)
    four, two, one, half = neck.stages
    wanted = []
    for stage, y in [
            (four[4:], doubled(F.gelu(channel_norm(doubled(x, four[0]), four[1])), four[3])),
            (two[1:], doubled(x, two[0])), (one, x), (half[1:], x.unfold(2, 2, 2).unfold(3, 2, 2).amax(dim=(4, 5)))]:
        reduce, norm1, conv, norm2 = stage
        y = channel_norm(torch.einsum('bchw,dcij->bdhw', y, reduce.weight), norm1)
        wanted.append(channel_norm(F.conv2d(F.pad(y, (1, 1, 1, 1)), conv.weight), norm2))
    wanted.append(wanted[-1][:, :, ::2, ::2])
    found = neck.forward([torch.zeros_like(x), x])  # the last of the backbone's maps counts
    assert [f.shape[2:] for f in found] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    for ours, naive in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), naive, rtol=1e-5, atol=1e-5)


def test_pyramid_is_float32_under_mixed_precision():
    neck = SimpleFeaturePyramid(8, 4)
    with torch.autocast('cpu', torch.bfloat16):
        assert {f.dtype for f in neck([torch.randn(1, 8, 4, 4)])} == {torch.float32}


@pytest.mark.parametrize(('options', 'message'), [
    (dict(scales=[4, 3]), 'scales: 3 is none of 4, 2, 1 and 0.5'),
    (dict(num_outs=3), 'num_outs=3 is less than the 4 scales')])
def test_pyramid_names_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        SimpleFeaturePyramid(8, **options)


# --- configs ----------------------------------------------------------------------------------------------------------

@functools.cache
def parsed(name: str) -> Config:
    folder = 'detection' if name in NAMES else 'adala'
    return Config.fromfile(ROOT / f'configs/{folder}/{name}.py')


def config(name: str) -> Config:
    return copy.deepcopy(parsed(name))


@functools.cache
def model_of(name: str) -> nn.Module:
    """At full size, without memory: parameters have shapes only."""
    with DefaultScope.overwrite_default_scope('mmdet'), torch.device('meta'):
        return MODELS.build(config(name).model)


def test_every_config_is_listed():
    assert sorted(path.stem for path in (ROOT / 'configs/detection').glob('*.py')) == NAMES
    before = {name: parsed(name).to_dict() for name in NAMES}
    for name in reversed(NAMES):  # they edit dicts of shared base files
        assert Config.fromfile(ROOT / f'configs/detection/{name}.py').to_dict() == before[name], name


@each_detector
def test_dump_and_reload(name, tmp_path):
    config(name).dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py').to_dict() == parsed(name).to_dict()


@every_config
def test_model_and_optimizer_build(name, monkeypatch):
    # Three log lines for each of up to 700 parameters take longer than the construction that they describe.
    monkeypatch.setattr('mmengine.optim.optimizer.default_constructor.print_log', lambda *args, **kwargs: None)
    cfg, model = config(name), model_of(name)
    wanted = 'SoftmaxAttention' if '_softmax_' in name else 'LinearAttention'
    assert {type(block.attn).__name__ for block in model.backbone.blocks} == {wanted}
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    groups = {id(p): group for group in optimizer.param_groups for p in group['params']}
    for key, parameter in model.named_parameters():
        group = groups[id(parameter)]
        assert group['lr'] == pytest.approx(1e-5 if key.startswith('backbone.') else 1e-4), key
        decay = 0 if 'pos_embed' in key and 'maskrcnn' in name else cfg.optim_wrapper.optimizer.weight_decay
        assert group['weight_decay'] == decay, key


@pytest.mark.parametrize(('name', 'strides'), [(DINO, [8, 16, 32, 64]), (MASKRCNN, [4, 8, 16, 32, 64])])
def test_strides(name, strides):
    vit, neck = parsed(name).model.backbone, model_of(name).neck
    assert vit.patch_size == 16 and vit.img_size == 1024
    maps = neck([torch.empty(1, vit.embed_dim, 64, 48, device='meta')])
    assert [tuple(f.shape[1:]) for f in maps] == [(256, 1024 // s, 768 // s) for s in strides]
    if name == MASKRCNN:
        model = parsed(name).model
        assert model.rpn_head.anchor_generator.strides == strides
        for extractor in (model.roi_head.bbox_roi_extractor, model.roi_head.mask_roi_extractor):
            assert extractor.featmap_strides == strides[:4]
    # What an image is padded to has a whole number of patches, and of pixels on every map but the last.
    assert parsed(name).model.data_preprocessor.pad_size_divisor == (32 if name == DINO else 1024)


@every_config
def test_starts_from_stage_2(name):
    cfg, stage2 = config(name), config(STAGE2)
    assert cfg.model.data_preprocessor.mean == stage2.model.data_preprocessor.mean
    assert cfg.model.data_preprocessor.std == stage2.model.data_preprocessor.std
    assert cfg.model.data_preprocessor.bgr_to_rgb
    wanted = f'work_dirs/{STAGE2}/epoch_{stage2.train_cfg.max_epochs}.pth'
    if '_softmax_' in name:
        wanted = stage2.pretrained.checkpoint
    assert cfg.model.backbone.init_cfg == dict(type='Pretrained', checkpoint=wanted)
    ours, theirs = cfg.model.backbone.to_dict(), stage2.model.backbone.to_dict()
    for key in ['init_cfg', 'img_size', 'drop_path_rate'] + ['attention'] * ('_softmax_' in name):
        ours.pop(key, None), theirs.pop(key, None)
    assert ours == theirs


@each_detector
def test_twin_differs_only_in_attention_and_weights(name):
    linear, twin = parsed(name).to_dict(), parsed(name.replace('dinov2l', 'dinov2l_softmax')).to_dict()
    for cfg in (linear, twin):
        for key in ('attention', 'init_cfg'):
            cfg['model']['backbone'].pop(key)
    assert linear == twin


def test_dino_is_mmdets_but_for_the_backbone():
    ours, theirs = config(DINO), mmdets('dino/dino-4scale_r50_8xb2-12e_coco.py')
    for model in (ours.model, theirs.model):
        for key in ('backbone', 'neck'):
            model.pop(key)
        model.data_preprocessor.pop('pad_size_divisor')
    assert ours.model == theirs.model
    assert ours.optim_wrapper == theirs.optim_wrapper
    assert [ours.param_scheduler] == theirs.param_scheduler
    assert ours.train_cfg.max_epochs == theirs.train_cfg.max_epochs == ours.param_scheduler.end
    assert ours.auto_scale_lr.base_batch_size == theirs.auto_scale_lr.base_batch_size == 8 * 2
    assert ours.train_dataloader.batch_size == theirs.train_dataloader.batch_size
    for loader in ('train_dataloader', 'val_dataloader'):
        for step in theirs[loader].dataset.pipeline:
            step.pop('backend_args', None)
        assert ours[loader].dataset.pipeline == theirs[loader].dataset.pipeline
        assert ours[loader].dataset.ann_file == theirs[loader].dataset.ann_file


def test_mask_rcnn_is_mmdets_but_for_what_vitdet_changed():
    ours, theirs = config(MASKRCNN), mmdets('_base_/models/mask-rcnn_r50_fpn.py')
    for model in (ours.model, theirs.model):
        for key in ('backbone', 'neck'):
            model.pop(key)
    theirs.model.data_preprocessor.pad_size_divisor = 1024
    theirs.model.rpn_head.num_convs = 2
    norm = dict(type='mmpretrain.LN2d')
    theirs.model.roi_head.bbox_head.update(type='Shared4Conv1FCBBoxHead', conv_out_channels=256, norm_cfg=norm)
    theirs.model.roi_head.mask_head.update(norm_cfg=norm)
    assert ours.model == theirs.model
    norms = [m for m in model_of(MASKRCNN).roi_head.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 4 + 4
    # ViTDet's numbers: 184,375 steps of 64 images, lr / 10 from 163,889 and 177,546 on.
    assert ours.train_cfg.max_epochs == 100 and ours.auto_scale_lr.base_batch_size == 8 * 8
    assert ours.train_dataloader.batch_size == 8
    warmup, steps = ours.param_scheduler
    assert (warmup.end, warmup.start_factor, warmup.by_epoch) == (250, 0.001, False)
    assert steps.milestones == [math.ceil(100 * step / 184375 - 0.5) for step in (163889, 177546)]
    assert ours.optim_wrapper.optimizer == dict(type='AdamW', lr=1e-4, weight_decay=0.1)
    assert 'clip_grad' not in ours.optim_wrapper
    assert (ours.model.data_preprocessor.pad_size_divisor,) * 2 == ours.crop_size == (1024, 1024)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('shape', [(1024, 683), (1000, 1024), (1024, 1024)])
def test_mask_rcnn_sees_as_much_padding_in_training_as_later(shape, training):
    with DefaultScope.overwrite_default_scope('mmdet'):
        preprocessor = MODELS.build(config(MASKRCNN).model.data_preprocessor)
    sample = DetDataSample(metainfo=dict(img_shape=shape, ori_shape=shape))
    sample.gt_instances = InstanceData(masks=BitmapMasks([], *shape))
    out = preprocessor(dict(inputs=[torch.zeros(3, *shape, dtype=torch.uint8)], data_samples=[sample]), training)
    assert out['inputs'].shape == (1, 3, 1024, 1024)
    assert (out['data_samples'][0].gt_instances.masks.height == 1024) == (training or shape[0] == 1024)


# --- a toy set --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def toys(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('data') / 'coco'
    draw_split(root, 'train2017', count=12, seed=0)
    draw_split(root, 'val2017', count=6, seed=1)
    return root


def shrink(name: str, root: Path | str) -> Config:
    """The config with a tiny ViT and narrow heads for 96 px, on the toy set; the recipe's steps stay what they are."""
    cfg = config(name)
    model = cfg.model
    model.backbone = dict(tiny_vit(img_size=96, patch_size=16, embed_dim=DIM), attention=model.backbone.attention)
    model.neck.update(in_channels=DIM, out_channels=DIM)
    if name.startswith('dino'):
        model.update(num_queries=20)
        model.bbox_head.num_classes = len(CLASSES)
        model.encoder.num_layers, model.decoder.num_layers = 1, 2
        for part in (model.encoder, model.decoder):
            for key in part.layer_cfg:
                part.layer_cfg[key].embed_dims = DIM
            part.layer_cfg.ffn_cfg.feedforward_channels = 2 * DIM
        model.positional_encoding.num_feats = DIM // 2
        model.bbox_head.embed_dims = DIM
        model.dn_cfg.group_cfg.num_dn_queries = 10
        model.test_cfg.max_per_img = 20
        cfg.train_dataloader.dataset.pipeline[3] = dict(type='RandomResize', scale=(96, 96), ratio_range=(0.8, 1))
    else:
        model.data_preprocessor.pad_size_divisor = 96
        model.rpn_head.update(in_channels=DIM, feat_channels=DIM)
        heads = model.roi_head
        heads.bbox_head.update(in_channels=DIM, conv_out_channels=DIM, fc_out_channels=2 * DIM)
        heads.mask_head.update(in_channels=DIM, conv_out_channels=DIM)
        for part in (heads.bbox_roi_extractor, heads.mask_roi_extractor):
            part.out_channels = DIM
        heads.bbox_head.num_classes = heads.mask_head.num_classes = len(CLASSES)
        model.train_cfg.rcnn.sampler.num = 32
        model.train_cfg.rpn_proposal.update(nms_pre=200, max_per_img=50)
        model.test_cfg.rpn.update(nms_pre=100, max_per_img=50)
        resize, crop = cfg.train_dataloader.dataset.pipeline[3:5]
        resize.update(scale=(96, 96), ratio_range=(0.8, 1.2))
        crop.crop_size = (96, 96)
        cfg.train_dataloader.dataset.filter_cfg.min_size = 4
    for loader, size in (('train_dataloader', 4), ('val_dataloader', 1), ('test_dataloader', 1)):
        cfg[loader].update(num_workers=0, persistent_workers=False, batch_size=size)
        cfg[loader].dataset.update(data_root=str(root), metainfo=dict(classes=CLASSES))
        if size == 1:
            cfg[loader].dataset.pipeline[1].scale = (96, 96)
    for evaluator in ('val_evaluator', 'test_evaluator'):
        cfg[evaluator].ann_file = f'{root}/annotations/instances_val2017.json'
    return cfg


# RoI heads are trained on what the RPN proposes, which gets harder: their losses need not fall, their scores rise.
FALLS = {DINO: 'loss', MASKRCNN: 'loss_rpn_cls'}


class Losses(Hook):
    def __init__(self) -> None:
        self.values: dict[str, list[float]] = defaultdict(list)

    def before_train(self, runner):
        self.backbone = {key: value.clone() for key, value in runner.model.backbone.state_dict().items()}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        for key, value in outputs.items():
            self.values[key].append(float(value))


@pytest.fixture(scope='module')
def stage2(tmp_path_factory) -> Path:
    """What stage 2 leaves: a checkpoint of the whole algorithm, student and teacher."""
    torch.manual_seed(3)
    cfg = config(STAGE2).model
    for vit in (cfg.backbone, cfg.teacher):
        vit.update(tiny_vit(img_size=64, patch_size=16, embed_dim=DIM, attention=vit.attention), layer_scale=None,
                   init_cfg=None)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg)
    model.backbone.init_weights()
    path = tmp_path_factory.mktemp('stage2') / 'epoch_30.pth'
    torch.save(dict(meta={}, state_dict=model.state_dict()), path)
    return path


@pytest.fixture(scope='module')
def trained(toys, stage2, tmp_path_factory):
    """Each detector validated, trained and validated again, once for all tests."""
    @functools.cache
    def train(name: str) -> tuple[Runner, Losses, Path]:
        scopes = DefaultScope._instance_dict.copy()
        torch.manual_seed(0)
        cfg = shrink(name, toys)
        cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(stage2))
        cfg.work_dir = str(tmp_path_factory.mktemp(name))
        epochs = EPOCHS[name]
        cfg.experiment_name = f'toys_{name}'
        cfg.train_cfg.update(max_epochs=epochs, val_interval=epochs)
        cfg.custom_hooks = [dict(type='adala_mm.ValBeforeTrainHook')]
        cfg.default_hooks.checkpoint.interval = epochs
        cfg.optim_wrapper.optimizer.lr = 2e-3
        cfg.optim_wrapper.paramwise_cfg.custom_keys.backbone.lr_mult = 1.0  # this one has learnt nothing yet
        cfg.param_scheduler = None
        cfg.log_level = 'ERROR'
        runner = Runner.from_cfg(cfg)
        losses = Losses()
        runner.register_hook(losses)
        runner.train()
        DefaultScope._instance_dict = scopes
        return runner, losses, Path(cfg.work_dir) / f'epoch_{epochs}.pth'
    return train


@each_detector
def test_training_lowers_the_loss(trained, name):
    losses = trained(name)[1].values
    assert all(len(values) == 3 * EPOCHS[name] and all(map(math.isfinite, values)) for values in losses.values())
    falling = losses[FALLS[name]]
    assert sum(falling[-3:]) < 0.75 * sum(falling[:3])


@each_detector
def test_backbone_starts_with_stage_2(trained, stage2, name):
    start = trained(name)[1].backbone
    saved = torch.load(stage2)['state_dict']
    same = [key for key in start if torch.equal(start[key], saved[f'backbone.{key}'])]
    # Position embeddings are resampled from 4 x 4 to 6 x 6 patches; all else is as it was.
    assert set(start) - set(same) == {'pos_embed'} and start['pos_embed'].shape == (1, 37, DIM)
    end = trained(name)[0].model.backbone.state_dict()
    assert all(not torch.equal(start[key], end[key].cpu()) for key in start)  # every one of them learns


@each_detector
def test_evaluation(trained, name):
    runner = trained(name)[0]
    for kind in ['bbox'] if name == DINO else ['bbox', 'segm']:
        *untrained, score = runner.message_hub.get_scalar(f'val/coco/{kind}_mAP_50').data[0]
        assert max(untrained, default=0) < 0.05 and 0.1 < score <= 1, kind  # no value where nothing is found
        assert 0 < runner.message_hub.get_scalar(f'val/coco/{kind}_mAP').current() < score


@each_detector
def test_checkpoint_predicts_the_same_on_images_that_are_not_square(trained, toys, name):
    from mmdet.apis import inference_detector, init_detector
    runner, _, checkpoint = trained(name)
    model = init_detector(copy.deepcopy(runner.cfg), str(checkpoint), device='cpu')
    assert model.dataset_meta['classes'] == CLASSES
    for picture, (height, width) in (('1', (64, 96)), ('2', (96, 64))):
        found = inference_detector(model, str(toys / f'val2017/{picture}.png')).pred_instances
        assert len(found) and (found.scores[:-1] >= found.scores[1:]).all()
        limit = torch.tensor([width, height] * 2)
        assert (found.bboxes >= 0).all() and (found.bboxes <= limit).all() and found.bboxes.max() > 20
        assert set(found.labels.tolist()) <= set(range(len(CLASSES)))
        if name == MASKRCNN:
            assert found.masks.shape == (len(found), height, width) and found.masks.any()
        data = pseudo_collate([runner.val_loop.dataloader.dataset[int(picture) - 1]])
        with torch.no_grad():
            (again,) = runner.model.eval().val_step(data)
        torch.testing.assert_close(again.pred_instances.bboxes, found.bboxes)


@each_detector
def test_pipelines_at_full_size(toys, name):
    cfg = config(name)
    with DefaultScope.overwrite_default_scope('mmdet'):
        for loader in (cfg.train_dataloader, cfg.val_dataloader):
            toy = dict(data_root=str(toys), metainfo=dict(classes=CLASSES))
            dataset = DATASETS.build(loader.dataset.to_dict() | toy)
            assert label_loader(dataset) is None  # tools/check.py is to look for no label maps
            out = dataset[0]
            height, width = out['inputs'].shape[1:]
            truth = out['data_samples'].gt_instances
            assert out['inputs'].dtype == torch.uint8 and out['data_samples'].img_path.endswith('1.png')
            assert ('masks' in truth) == (name == MASKRCNN)
            if loader is cfg.val_dataloader:
                assert (height, width) == ((800, 1200) if name == DINO else (683, 1024)) and len(truth) == 2
            else:
                assert max(height, width) <= (1333 if name == DINO else 1024)
        model = MODELS.build(dict(cfg.model.data_preprocessor))
        for image in (torch.zeros(3, 683, 1024), torch.zeros(3, 480, 639)):
            sides = model(dict(inputs=[image], data_samples=None))['inputs'].shape[2:]
            step = 32 if name == DINO else 1024
            assert all(side % step == 0 and side - small < step
                       for side, small in zip(sides, image.shape[1:], strict=True))


@each_detector
def test_mixed_precision(trained, name):
    """As --amp: bfloat16. The same batch, the same random numbers."""
    runner = trained(name)[0]
    dataset = runner.val_loop.dataloader.dataset
    model = copy.deepcopy(runner.model).train()
    totals = []
    for enabled in (False, True):
        torch.manual_seed(1)
        data = model.data_preprocessor(pseudo_collate([dataset[0], dataset[1]]), True)
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            loss, _ = model.parse_losses(model(**data, mode='loss'))
        loss.backward()
        totals.append(loss.item())
    assert totals[0] != totals[1] and totals[1] == pytest.approx(totals[0], rel=0.1)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


MMDET_FIRST = '''
import sys
import mmdet.apis
assert 'adala_mm' not in sys.modules and 'mmcv._ext' not in sys.modules
from mmengine.config import Config
Config.fromfile(sys.argv[1])  # all that brings adala_mm in
inferencer = mmdet.apis.DetInferencer(Config.fromfile(sys.argv[2]), sys.argv[3], device='cpu', show_progress=False)
print(len(inferencer(sys.argv[4])['predictions'][0]['bboxes']))
'''


def test_mmdets_inferencer_in_a_process_of_its_own(trained, toys):
    runner, _, checkpoint = trained(MASKRCNN)
    (dumped,) = checkpoint.parent.glob('*.py')
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', MMDET_FIRST, str(ROOT / f'configs/detection/{MASKRCNN}.py'), str(dumped),
         str(checkpoint), str(toys / 'val2017/1.png')],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(re.findall(r'^\d+$', done.stdout, re.M)[-1]) > 0
