"""The configs of detectors against mmdet's, and the detectors trained on rectangles and discs."""
from __future__ import annotations

import copy
import functools
import math
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

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

from adala_mm.preflight.images import label_loader
from helpers import ROOT, tiny_vit
from helpers.detection import CLASSES, draw_split, mmdets

NAMES = ['dino_dinov2l_coco', 'dino_dinov2l_softmax_coco', 'maskrcnn_dinov2l_1024_coco',
         'maskrcnn_dinov2l_softmax_1024_coco']
DINO, _, MASKRCNN, _ = NAMES
every_config = pytest.mark.parametrize('name', NAMES)
EPOCHS = {DINO: 15, MASKRCNN: 10}  # on the toy set, of three steps each
each_detector = pytest.mark.parametrize('name', [DINO, MASKRCNN])
STAGE2 = 'stage2_dinov2l_in22k'
DIM = 64


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
