"""configs/l2vit: every config builds, has the published recipe, and starts where its predecessor ended."""
from __future__ import annotations

import copy
import functools
import math

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS, PARAM_SCHEDULERS, DefaultScope
from mmengine.runner import Runner
from torch import nn

from adala_mm.models.backbones.l2vit import ARCHS
from adala_mm.preflight import memory
from adala_mm.utils.cli import base_parser, load_config
from helpers import ROOT
from helpers.detection import CLASSES, draw_split, mmdets
from helpers.pictures import photo
from helpers.preflight import check, red
from helpers.recipes import Recorder
from helpers.recipes import apart as in_folder
from helpers.references.l2vit import SMALL, step

NAMES = [f'{kind}_l2vit{size}_{data}' for kind, data in (('cls', 'in1k'), ('upernet', 'ade20k'),
                                                        ('mask2former', 'ade20k')) for size in 'tsb']
DETECTORS = [f'maskrcnn_l2vit{size}_{length}x_coco' for length in (1, 3) for size in 'tsb']
IN22K = ['cls_l2vitb_in22k', 'cls_l2vitb_384_in1k']
SIZES = {'t': 'tiny', 's': 'small', 'b': 'base'}
every_config = pytest.mark.parametrize('name', NAMES)


@functools.cache
def parsed(name):
    return Config.fromfile(ROOT / 'configs/l2vit' / f'{name}.py')


def config(name):
    return copy.deepcopy(parsed(name))


@functools.cache
def model_of(name):
    """At full size, without memory: parameters have shapes only."""
    cfg = config(name)
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device('meta'):
        return MODELS.build(cfg.model)


def test_every_config_is_listed():
    names = NAMES + DETECTORS + IN22K
    assert {path.stem for path in (ROOT / 'configs/l2vit').glob('*.py')} == set(names)
    before = {name: parsed(name).to_dict() for name in names}
    for name in reversed(names):  # they edit dicts of shared base files
        assert Config.fromfile(ROOT / 'configs/l2vit' / f'{name}.py').to_dict() == before[name], name


@pytest.mark.parametrize('name', ['cls_l2vits_in1k', 'upernet_l2vitb_ade20k', 'mask2former_l2vitb_ade20k'])
def test_dump_and_reload(name, tmp_path):
    config(name).dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py').to_dict() == parsed(name).to_dict()


@every_config
def test_sizes_differ_in_the_model_only(name):
    kind, size = name.split('_')[0], name.split('_')[1][-1]
    cfg, twin = config(name).to_dict(), config(name.replace(f'l2vit{size}', 'l2vitt')).to_dict()
    backbone = cfg['model']['backbone']
    assert (backbone['type'], backbone['arch']) == ('adala_mm.L2ViT', SIZES[size])
    published = 0.3 if kind != 'cls' or size == 'b' else {'t': 0.1, 's': 0.2}[size]
    assert backbone['drop_path_rate'] == published
    if kind == 'cls':
        assert 'init_cfg' not in backbone
    else:
        assert_starts_from(name, f'cls_l2vit{size}_in1k')
    del cfg['model'], twin['model']
    assert cfg == twin


def assert_starts_from(name, classifier):
    """The classifier's last file is named, and fits: only output norms differ."""
    epochs = parsed(classifier).train_cfg.max_epochs
    assert parsed(name).model.backbone.init_cfg == dict(
        type='Pretrained', checkpoint=f'work_dirs/{classifier}/epoch_{epochs}.pth')
    ours, theirs = (model_of(config).backbone.state_dict() for config in (name, classifier))
    assert set(theirs) <= set(ours)
    assert all(key.startswith('norms.') for key in set(ours) - set(theirs))
    assert all(ours[key].shape == value.shape for key, value in theirs.items())


@every_config
def test_features_fit_the_head(name):
    cfg, model = config(name), model_of(name).eval()
    if cfg.default_scope == 'mmpretrain':
        assert model(torch.empty(1, 3, 224, 224, device='meta'), mode='tensor').shape == (1, 1000)
        assert model.head.fc.in_features == ARCHS[cfg.model.backbone.arch]['embed_dims'][-1]
        return
    images = torch.empty(1, 3, 512, 512, device='meta')
    features = model.extract_feat(images)
    assert [f.shape[1] for f in features] == cfg.model.decode_head.in_channels
    assert [512 // f.shape[2] for f in features] == [4, 8, 16, 32]
    if 'auxiliary_head' in cfg.model:
        assert features[cfg.model.auxiliary_head.in_index].shape[1] == cfg.model.auxiliary_head.in_channels
        assert model(images, mode='tensor').shape == (1, 150, 128, 128)
    else:
        assert cfg.model.decode_head.strides == [4, 8, 16, 32] and 'neck' not in cfg.model
        assert cfg.model.decode_head.loss_cls.class_weight == [1.0] * 150 + [0.1]


@every_config
def test_schedule_and_optimizer(name, monkeypatch):
    monkeypatch.setattr('mmengine.optim.optimizer.default_constructor.print_log', lambda *args, **kwargs: None)
    cfg, model, kind = config(name), model_of(name), name.split('_')[0]
    lr, decay = dict(cls=(4e-3, 0.05), upernet=(6e-5, 0.01), mask2former=(1e-4, 0.05))[kind]
    assert cfg.optim_wrapper.optimizer == dict(type='AdamW', lr=lr, weight_decay=decay)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    groups = {id(p): group for group in wrapper.optimizer.param_groups for p in group['params']}
    assert {id(p) for p in model.parameters()} == set(groups)
    norms = {f'{prefix}.{key}' for prefix, module in model.named_modules() for key, _ in module.named_parameters()
             if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d))}
    for key, p in model.named_parameters():
        slow = kind == 'mask2former' and key.startswith('backbone.')
        assert groups[id(p)]['lr'] == pytest.approx(0.1 * lr if slow else lr)
        if kind == 'cls':
            spared = key in norms or key.endswith('.bias')
            assert groups[id(p)].get('weight_decay', decay) == (0 if spared else decay), key
    if kind == 'cls':
        # 8 GPUs; the hook that averages the weights counts iterations, not steps.
        assert 8 * cfg.train_dataloader.batch_size * cfg.optim_wrapper.accumulative_counts == 4096
        assert cfg.auto_scale_lr.base_batch_size == 8 * cfg.train_dataloader.batch_size
        assert cfg.custom_hooks[0].interval == cfg.optim_wrapper.accumulative_counts
        assert cfg.train_cfg == dict(type='EpochBasedTrainLoop', max_epochs=300)
    elif kind == 'upernet':
        assert cfg.train_cfg == dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=16000)
        assert 8 * cfg.train_dataloader.batch_size == 16 == cfg.auto_scale_lr.base_batch_size
        assert cfg.train_dataloader.sampler.type == 'InfiniteSampler' and cfg.sync_bn == 'torch'
        hook = cfg.default_hooks.checkpoint
        assert not hook.by_epoch and not cfg.log_processor.by_epoch and 160000 % hook.interval == 0
    else:
        assert cfg.train_cfg == dict(type='EpochBasedTrainLoop', max_epochs=20)
        assert 8 * cfg.train_dataloader.batch_size == 64


def rates(cfg, iterations, epoch_length):
    """Learning rates of a run, iteration by iteration."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=cfg.optim_wrapper.optimizer.lr)
    schedulers = []
    for options in cfg.param_scheduler:
        options = dict(options)
        kind = PARAM_SCHEDULERS.get(options.pop('type'))
        if options.pop('convert_to_iter_based', False):
            schedulers.append(kind.build_iter_from_epoch(optimizer=optimizer, epoch_length=epoch_length, **options))
        else:
            schedulers.append(kind(optimizer=optimizer, **options))
    found = []
    for _ in range(iterations):
        found.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return found


def test_learning_rates():
    found = rates(config('cls_l2vitt_in1k'), 601, epoch_length=2)
    assert found[0] == pytest.approx(4e-6) and found[40] == pytest.approx(4e-3) == max(found)
    assert found[320] == pytest.approx((4e-3 + 1e-6) / 2, rel=1e-2) and found[600] == pytest.approx(1e-6, abs=1e-7)
    found = rates(config('upernet_l2vitt_ade20k'), 3100, epoch_length=1)
    assert found[0] == pytest.approx(6e-11) and found[750] == pytest.approx(3e-5, rel=1e-2)
    assert found[1500] == pytest.approx(6e-5, rel=1e-3)
    assert found[1500] - found[3085] == pytest.approx(6e-5 / 100, rel=1e-2)  # a hundredth of what is left


def test_averaging_hook_builds():
    cfg = config('cls_l2vitt_in1k')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        hook = HOOKS.build({key: value for key, value in cfg.custom_hooks[0].items() if key != 'priority'})
        average = MODELS.build(dict(hook.ema_cfg), default_args=dict(model=nn.BatchNorm1d(3)))
    assert average.interval == 4 and average.momentum == 1e-4 and average.update_buffers


@every_config
def test_datasets_pipelines_and_metrics_build(name):
    cfg = config(name)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            options = loader.dataset.to_dict()
            assert len(Compose(copy.deepcopy(options['pipeline'])).transforms) == len(options['pipeline'])
            dataset = DATASETS.build(dict(options, lazy_init=True))
            head = cfg.model.get('decode_head') or cfg.model.head
            assert len(dataset.metainfo['classes']) == head.num_classes
        METRICS.build(cfg.val_evaluator.to_dict())
        mean, std = (cfg.model.data_preprocessor[key] for key in ('mean', 'std'))
    assert (mean, std) == ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    if cfg.default_scope == 'mmseg':
        assert cfg.model.data_preprocessor.size == (512, 512) == tuple(cfg.crop_size)


def test_classification_pipelines_and_batch(tmp_path):
    """Random augmentation, mixup and label smoothing meet in one step of a small twin."""
    photo = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / 'photo.jpg'), photo)
    cfg = config('cls_l2vitt_in1k')
    cfg.model.backbone.arch = SMALL
    cfg.model.head.in_channels = 24
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        batches = {}
        for loader in ('train_dataloader', 'val_dataloader'):
            pipeline = Compose(copy.deepcopy(cfg[loader].dataset.to_dict()['pipeline']))
            items = [pipeline(dict(img_path=str(tmp_path / 'photo.jpg'), gt_label=i)) for i in (1, 2)]
            assert all(item['inputs'].shape == (3, 224, 224) for item in items)
            batches[loader] = dict(inputs=torch.stack([item['inputs'] for item in items]),
                                   data_samples=[item['data_samples'] for item in items])
        model = MODELS.build(cfg.model)
        losses, _ = step(model, batches['train_dataloader'])
        with torch.no_grad():
            results = model.eval().val_step(batches['val_dataloader'])
    assert losses['loss'].isfinite() and results[0].pred_score.shape == (1000,)
    assert abs(model.head.fc.bias).max() <= 0.011  # zero before its first step
    assert model.head.init_cfg['std'] == 0.02


# --- Mask R-CNN, and ImageNet-22K


@pytest.mark.parametrize('name', DETECTORS)
def test_detectors_have_the_published_recipe(name, monkeypatch):
    """That of the authors' configs: drop path, optimizer, steps; mmdet's model but for the backbone."""
    monkeypatch.setattr('mmengine.optim.optimizer.default_constructor.print_log', lambda *args, **kwargs: None)
    _, vit, length, _ = name.split('_')
    size, cfg, model = vit[-1], config(name), model_of(name)
    assert_starts_from(name, f'cls_{vit}_in1k')
    assert cfg.model.backbone.arch == SIZES[size]
    assert cfg.model.backbone.drop_path_rate == {'1x': dict(t=0.1, s=0.1, b=0.2),
                                                 '3x': dict(t=0.2, s=0.2, b=0.3)}[length][size]
    epochs, steps = {'1x': (12, [8, 11]), '3x': (36, [27, 33])}[length]
    warmup, multi_step = cfg.param_scheduler
    assert (warmup.start_factor, warmup.end, warmup.by_epoch) == (0.001, 500, False)
    assert (multi_step.milestones, multi_step.end, multi_step.gamma) == (steps, epochs, 0.1)
    assert cfg.train_cfg == dict(type='EpochBasedTrainLoop', max_epochs=epochs)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    assert {(group['lr'], group['weight_decay']) for group in groups} == {(1e-4, 0.05)}
    assert 'clip_grad' not in cfg.optim_wrapper and cfg.sync_bn == 'torch'
    assert 8 * cfg.train_dataloader.batch_size == 16 == cfg.auto_scale_lr.base_batch_size
    maps = model.neck(model.backbone.eval()(torch.empty(1, 3, 128, 96, device='meta')))
    assert [tuple(f.shape[1:]) for f in maps] == [(256, 128 // s, math.ceil(96 / s)) for s in (4, 8, 16, 32, 64)]
    theirs = mmdets('_base_/models/mask-rcnn_r50_fpn.py').model
    for part in (cfg.model, theirs):
        part.pop('backbone')
        part.neck.pop('in_channels')
    assert cfg.model == theirs
    flip, mosaic = cfg.train_dataloader.dataset.pipeline[2:4]
    whole, cropped = mosaic.transforms
    assert flip.type == 'RandomFlip' and [scale[1] for scale in whole[0].scales] == [1333] * 11
    assert cropped[0].scales == [(400, 1333), (500, 1333), (600, 1333)] and cropped[1].crop_size == (384, 600)
    assert cfg.train_dataloader.dataset.pipeline[1].with_mask and cfg.val_evaluator.metric == ['bbox', 'segm']


def cut(name, **places):
    """The config as a file, for a tiny network from random weights on a few small pictures in ``places``."""
    cfg = config(name)
    cfg.model.backbone.update(arch=SMALL, init_cfg=None)
    cfg.train_cfg.max_epochs, cfg.param_scheduler = 1, None
    for loader, batch in (('train_dataloader', 2), ('val_dataloader', 1), ('test_dataloader', 1)):
        cfg[loader].update(num_workers=0, persistent_workers=False, batch_size=batch)
        cfg[loader].dataset.update(places)
    return cfg


@pytest.fixture
def no_estimate(monkeypatch):
    """Of memory, which takes a second in each of many runs, and is tested elsewhere."""
    monkeypatch.setattr(memory, 'estimate', lambda plan: lambda batch, height, width: 0)
    monkeypatch.setattr(memory, 'head_line', lambda plan: lambda pixels: 0)


def check_and_train(cfg, place):
    cfg.dump(place / 'cut.py')
    assert not red(check(place / 'cut.py', '--data-root', place))
    cfg = load_config(base_parser('').parse_args([str(place / 'cut.py'), '--data-root', str(place)]))
    cfg.experiment_name = cfg.visualizer.name = place.name
    run, record = Runner.from_cfg(cfg), Recorder()
    run.register_hook(record)
    run.train()
    assert len(record.losses) == 2 and all(0 < loss < 1e3 for loss in record.losses)
    key = 'backbone.stages.0.0.attn.qkv.weight'
    assert not torch.equal(run.model.state_dict()[key], record.state[key])


@pytest.mark.parametrize('name', ['maskrcnn_l2vitt_1x_coco'])
def test_a_detector_is_checked_and_trained(name, tmp_path, no_estimate):
    draw_split(tmp_path / 'coco', 'train2017', count=4, seed=0)
    draw_split(tmp_path / 'coco', 'val2017', count=1, seed=1)
    cfg = cut(name, metainfo=dict(classes=CLASSES))
    heads, narrow = cfg.model.roi_head, 32
    cfg.model.neck.update(in_channels=list(SMALL['embed_dims']), out_channels=narrow)
    cfg.model.rpn_head.update(in_channels=narrow, feat_channels=narrow)
    heads.bbox_head.update(in_channels=narrow, fc_out_channels=narrow)
    heads.mask_head.update(in_channels=narrow, conv_out_channels=narrow)
    for part in (heads.bbox_roi_extractor, heads.mask_roi_extractor):
        part.out_channels = narrow
    heads.bbox_head.num_classes = heads.mask_head.num_classes = len(CLASSES)
    cfg.train_dataloader.dataset.filter_cfg.min_size = 4
    cfg.train_dataloader.dataset.pipeline[3] = dict(type='RandomResize', scale=(96, 96), ratio_range=(0.8, 1))
    for loader in ('val_dataloader', 'test_dataloader'):
        cfg[loader].dataset.pipeline[1].scale = (96, 96)
    with in_folder(tmp_path):
        check_and_train(cfg, tmp_path)


@pytest.mark.parametrize('name', IN22K)
def test_imagenet_22k_is_checked_and_trained(name, tmp_path, no_estimate):
    pretraining = name == 'cls_l2vitb_in22k'
    cfg, classes = cut(name), 5
    for split in ('imagenet22k', 'imagenet22k_val') if pretraining else ('imagenet/train', 'imagenet/val'):
        for i in range(classes):  # and one left over in an epoch of batches of two
            photo(tmp_path / split / f'n{i:08d}' / f'{i}.JPEG')
    cfg.model.head.update(in_channels=24, num_classes=classes)
    cfg.model.data_preprocessor.num_classes = classes
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        if not pretraining:
            cfg[loader].dataset.metainfo = dict(classes=[f'kind {i}' for i in range(classes)])
        cfg[loader].dataset.pipeline[1].scale = 64 if cfg[loader].dataset.pipeline[1].type != 'Resize' else (64, 64)
    with in_folder(tmp_path):
        check_and_train(cfg, tmp_path)


def test_recipe_of_imagenet_22k():
    """The authors' commands: batch 1024, 90 epochs, then 30 at 384 px with windows of 12."""
    first, second = (config(name) for name in IN22K)
    assert_starts_from(IN22K[1], IN22K[0])
    assert model_of(IN22K[0]).head.fc.out_features == 21841 == first.model.data_preprocessor.num_classes
    for cfg, counts, epochs, side in ((first, 1, 90, 224), (second, 2, 30, 384)):
        assert 8 * cfg.train_dataloader.batch_size * counts == 1024
        assert cfg.optim_wrapper.get('accumulative_counts', 1) == counts
        assert cfg.auto_scale_lr.base_batch_size == 8 * cfg.train_dataloader.batch_size
        assert cfg.train_cfg.max_epochs == epochs == cfg.param_scheduler[-1].end
        assert cfg.model.backbone.arch == 'base' and cfg.model.backbone.drop_path_rate == 0.2
        assert cfg.train_dataloader.dataset.pipeline[1].scale == side
    assert (first.optim_wrapper.optimizer, second.optim_wrapper.optimizer) == (
        dict(type='AdamW', lr=1e-3, weight_decay=0.05), dict(type='AdamW', lr=4e-5, weight_decay=1e-8))
    assert second.model.backbone.window_size == 12 and 'custom_hooks' not in first
    assert second.custom_hooks[0].interval == 2
    for cfg, start, top, end in ((first, 1e-6, 1e-3, 1e-5), (second, 4e-8, 4e-5, 4e-7)):
        found = rates(cfg, 2 * cfg.train_cfg.max_epochs + 1, epoch_length=2)
        assert (found[0], found[10], found[-1]) == pytest.approx((start, top, end), rel=0.1)  # close to its end
