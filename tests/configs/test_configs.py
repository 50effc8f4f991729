"""Every config file has a name by the rules, loads, and builds as written."""
from __future__ import annotations

import contextlib
import copy
import re

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, METRICS

from adala_mm.datasets import BeaconsDataset
from adala_mm.utils.inert_lines import refuse_inert_lines
from helpers.configs import (
    ATTENTIONS,
    FOLDERS,
    FULL_SIZE,
    GRAMMAR,
    LOADERS,
    NAMES,
    OURS,
    PATHS,
    SMALL,
    VFMS,
    config,
    every_config,
    model_of,
    parsed,
    parts,
    path_of,
    scope_of,
)


def tuned(name: str) -> str:
    """Regular expression of the backbone's parameters that a run trains."""
    facts = parts(name)
    lolcats = facts['attention'] == 'lolcats'
    if facts['stage'] == 'stage1':
        return r'blocks\.\d+\.attn\.' + (
            r'feature_map\.[qk]' if lolcats or '_native' in facts['changes'] else r'(?!proj\.).+')
    if facts['stage'] == 'stage2' and '_qkv' in facts['changes']:
        return r'blocks\.\d+\.attn\.qkv\..+'
    # Probes are frozen, but for what a linear head could do.
    if facts['stage'] == 'probe':
        return r'norm\..+'
    return r'blocks\.\d+\.attn\.lora\..+' if lolcats else '.+'


def shape_of(name: str) -> str:
    """What a network and its optimizer are made of: configs that differ in data and schedule only have it in common."""
    cfg = copy.deepcopy(parsed(name).to_dict())
    model = {key: value for key, value in cfg['model'].items() if key not in ('data_preprocessor', 'test_cfg')}
    head = model.get('decode_head') or {}
    for key in ('num_classes', 'loss_cls'):  # as many as the data have; see `test_datasets_pipelines_and_metrics_build`
        head.pop(key, None)
    for network in ('backbone', 'teacher'):
        model.get(network, {}).pop('init_cfg', None)
    return repr((parts(name)['changes'], model, cfg['optim_wrapper'], FOLDERS[name] in ('demo', 'real')))


# One config of each shape, for what is built at full size.
SHAPES = list({shape_of(name): name for name in reversed(NAMES)}.values())
every_shape = pytest.mark.parametrize('name', SHAPES)


def test_the_list_is_complete():
    assert len(NAMES) == len(PATHS) >= 120  # as many names as files: no name stands in two folders
    assert 'mask2former_dinov2l_ade20k' in FULL_SIZE
    for stage, dataset in [('stage1', 'coco'), ('stage2', 'in22k'), ('cls', 'in1k'), ('mask2former', 'ade20k'),
                           ('mask2former', 'cityscapes'), ('mask2former', '1024_cityscapes')]:
        for vfm in VFMS + list(SMALL) * (dataset in ('coco', 'in22k', 'ade20k')):
            assert f'{stage}_{vfm}_{dataset}' in FULL_SIZE
            assert stage.startswith('stage') or vfm in SMALL or f'{stage}_{vfm}_softmax_{dataset}' in FULL_SIZE
        for attention in ATTENTIONS:
            if attention != 'softmax' and '1024' not in dataset:
                assert f'{stage}_dinov2l_{attention}_{dataset}' in FULL_SIZE
                assert stage.startswith('stage') or f'{stage}_dinov2l_{attention}_native_{dataset}' in FULL_SIZE


@every_config
def test_name_and_length(name):
    assert GRAMMAR.fullmatch(name), 'a config is named {head or stage}_{vfm}[_{attention or change}...]_{dataset}.py'
    text = path_of(name).read_text()
    assert text.startswith('# ')  # what the run is for
    # A recipe is assembled from _base_; one that changes another recipe states that change and nothing else.
    shortest = 10 if '_base_.default_runtime' in text else 5
    assert shortest <= len(text.splitlines()) <= 40


# Formatting takes 0.3 s a file, and the other configs of these folders differ from the chosen ones in numbers only.
SAMPLES = dict(adala='_dinov2l_(softmax_|fsdp_|fast_)?(ade20k|in1k|in22k|coco)', beyond='plus|dinov2b_coarse',
               baselines='scratch_in1kl|_lolcats_native_', demo='_demo_(beacons|softmax_beacons)',
               real='_deitt_(camvid|caltech|softmax_camvid)')


@pytest.mark.parametrize('name', [name for name, folder in FOLDERS.items() if re.search(SAMPLES.get(folder, ''), name)])
def test_dump_and_reload(name, tmp_path):
    cfg = config(name)
    cfg.dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py').to_dict() == cfg.to_dict()


@every_config
def test_no_line_changes_nothing(name):
    refuse_inert_lines(parsed(name))
    assert 'backbone' not in parsed(name)  # a second one beside model.backbone would look as if it were read


def test_configs_do_not_leak_into_each_other():
    # They edit the dicts of shared base files: after all the others have been read, each must still read the same.
    before = {name: parsed(name).to_dict() for name in NAMES}
    for name in reversed(NAMES):
        assert Config.fromfile(path_of(name)).to_dict() == before[name], name


@every_shape
def test_model_and_optimizer_build(name):
    cfg, model, facts = config(name), model_of(name), parts(name)
    assert cfg.custom_imports == dict(imports=['adala_mm.openmmlab'])  # for tools that know nothing of adala_mm
    attentions = {type(block.attn).__name__ for block in model.backbone.blocks}
    default = 'SoftmaxAttention' if facts['stage'] == 'teacher' else 'LinearAttention'
    softmax_blocks = {'_retain2': 2, '_last4': 4}.get(next(iter(re.findall('_retain2|_last4', name)), None), 0)
    retained = {'SoftmaxAttention'} if softmax_blocks else set()
    assert attentions == {(ATTENTIONS | OURS).get(facts['attention'], default)} | retained
    assert not retained or model.backbone.num_softmax_blocks == softmax_blocks

    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    base = cfg.optim_wrapper.optimizer
    fine_tuned = facts['stage'] in ('mask2former', 'eomt', 'cls', 'probe', 'fcn')
    groups = {id(p): group for group in wrapper.optimizer.param_groups for p in group['params']}
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert {id(p) for p in trained.values()} <= set(groups)
    kept = tuple(f'blocks.{i}.attn.' for i, block in enumerate(model.backbone.blocks)
                 if retained and facts['stage'] == 'stage1' and block.attn.is_softmax)
    ours = {f'backbone.{key}' for key, _ in model.backbone.named_parameters()
            if re.fullmatch(tuned(name), key) and not key.startswith(kept)}
    assert ours and ours == {key for key in trained if key.startswith('backbone.')}
    for key, parameter in trained.items():
        full_rate = '_native' in facts['changes'] and '.lora.' in key or key == 'backbone.query_embed.weight'
        ratio = 0.1 if fine_tuned and key.startswith('backbone.') and not full_rate else 1.0
        assert groups[id(parameter)]['lr'] == pytest.approx(ratio * base.lr), key
    # Weight decay: on everything, but in the flagship's head not on norms and queries (Mask2Former's own recipe), and
    # from scratch on matrices only.
    norms = {f'{prefix}.{key}' for prefix, module in model.named_modules()
             if isinstance(module, (torch.nn.LayerNorm, torch.nn.GroupNorm)) for key, _ in module.named_parameters()}
    spared, left_open = set(), set()
    if facts['stage'] == 'scratch':
        spared = {key for key, parameter in trained.items() if parameter.ndim == 1}
    if facts['stage'] in ('mask2former', 'eomt') and FOLDERS[name] not in ('demo', 'real'):
        left_open = {key for key in norms if key.startswith('backbone.')}
        spared = {key for key in trained if re.search(r'query_embed|query_feat|level_embed', key)} | norms - left_open
        assert len(spared) > (50 if facts['stage'] == 'mask2former' else 4)
    for key in set(trained) - left_open:
        decay = groups[id(trained[key])]['weight_decay']
        assert decay == (0 if key in spared else base.weight_decay), key


@every_shape
def test_features_fit_the_head(name, monkeypatch):
    cfg, model, facts = config(name), model_of(name), parts(name)
    # torch.autocast does not know the meta device, on which shapes are all there is.
    monkeypatch.setattr(torch, 'autocast', lambda *args, **kwargs: contextlib.nullcontext())
    if facts['stage'] == 'eomt':
        side, vit = cfg.crop_size[0], cfg.model.backbone
        classes, masks = model.decode_head(model.backbone(torch.empty(1, 3, side, side, device='meta')))
        assert len(classes) == len(masks) == vit.query_blocks + 1 and vit.img_size == 512
        assert {tuple(c.shape) for c in classes} == {(1, vit.num_queries, cfg.model.decode_head.num_classes + 1)}
        assert {tuple(m.shape) for m in masks} == {(1, vit.num_queries, side // 4, side // 4)}
        return
    # One block has the shapes of all. (As an attribute it could not be undone: a module's children are none to pytest.)
    monkeypatch.setitem(model.backbone._modules, 'blocks', model.backbone.blocks[:1])
    monkeypatch.setattr(model.backbone, 'out_indices', [0] * len(model.backbone.out_indices))
    side = cfg.get('crop_size', [cfg.model.backbone.img_size])[0]
    images = torch.empty(1, 3, side, side, device='meta')
    if facts['stage'] in ('stage1', 'calibrate', 'stage2'):
        vit = cfg.model.backbone
        tokens = vit.get('class_token', True) + vit.get('num_registers', 0) + (side // vit.patch_size) ** 2
        assert model(images, mode='tensor').shape == (1, tokens, vit.embed_dim)
    elif facts['dataset'] == 'in1k':
        assert model(images, mode='tensor').shape == (1, 1000)
    elif facts['stage'] == 'mask2former':
        head = cfg.model.decode_head
        features = model.extract_feat(images)
        assert [f.shape[1] for f in features] == head.in_channels
        assert [f.shape[2] * s for f, s in zip(features, head.strides, strict=True)] == [side] * 4
    else:
        assert model(images, mode='tensor').shape[1] == cfg.model.decode_head.num_classes


@every_config
def test_datasets_pipelines_and_metrics_build(name):
    cfg = config(name)
    loaders = [cfg[loader] for loader in LOADERS if cfg.get(loader)]
    assert loaders
    head = cfg.model.get('decode_head') or cfg.model.get('head') or {}
    with scope_of(cfg):
        for loader in loaders:
            options = loader.dataset.to_dict()
            assert len(Compose(copy.deepcopy(options['pipeline'])).transforms) == len(options['pipeline']) >= 2
            if options['type'] == 'adala_mm.BeaconsDataset':  # building it would draw it
                classes = BeaconsDataset.METAINFO['classes']
            else:
                dataset = DATASETS.build(dict(options, lazy_init=True))
                assert dataset.data_root == options['data_root']
                classes = dataset.metainfo.get('classes')
            if 'num_classes' in head:
                assert len(classes) == head.num_classes
            if parts(name)['stage'] in ('mask2former', 'eomt'):
                assert head.loss_cls.class_weight == [1.0] * head.num_classes + [0.1]  # "no object" comes last
        for evaluator in ('val_evaluator', 'test_evaluator'):
            if cfg.get(evaluator):
                metrics = cfg[evaluator] if isinstance(cfg[evaluator], list) else [cfg[evaluator]]
                assert all(METRICS.build(metric.to_dict()) for metric in metrics)


def test_every_pipeline_yields_what_the_model_takes(tmp_path):
    """Each distinct pipeline, run once on a JPEG with 9 labels."""
    photo, labels = np.random.default_rng(0).integers(0, 256, (2, 96, 128, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / 'photo.jpg'), photo)
    cv2.imwrite(str(tmp_path / 'labels.png'), labels[..., 0] % 9)
    sample = dict(img_path=str(tmp_path / 'photo.jpg'), gt_label=3, seg_map_path=str(tmp_path / 'labels.png'),
                  label_map=None)
    done = set()
    for name in NAMES:
        cfg = config(name)
        for loader in (cfg[loader] for loader in LOADERS if cfg.get(loader)):
            steps = loader.dataset.pipeline
            key = (cfg.default_scope, repr(steps))
            if key in done:
                continue
            done.add(key)
            reduce_zero = any(step.get('reduce_zero_label') for step in steps)
            with scope_of(cfg):
                out = Compose(copy.deepcopy(steps))(dict(sample, reduce_zero_label=reduce_zero, seg_fields=[]))
            sides = tuple(out['inputs'].shape[1:])
            assert out['inputs'].dtype == torch.uint8 and len(out['inputs']) == 3, name
            if loader is cfg.train_dataloader:
                size = cfg.get('crop_size') or [cfg.model.backbone.img_size] * 2
                # Demo scenes and small photographs of the test are cropped by no more than there is.
                assert sides == (96, 128) if 'beacons' in name else all(
                    0 < a <= b for a, b in zip(sides, size, strict=True)), name
            truth = out['data_samples']
            if 'gt_sem_seg' in truth:
                found = set(truth.gt_sem_seg.data.unique().tolist())
                # Scores are computed at the size of the label file.
                assert tuple(truth.gt_sem_seg.shape) == (sides if loader is cfg.train_dataloader else (96, 128)), name
                assert found <= ({*range(8), 255} if reduce_zero else {*range(9)}), name
            assert truth.img_path == sample['img_path'], name  # what error messages and pictures name
    assert len(done) >= 10
