"""Every config file loads, builds as written, states the paper's schedule, and starts where its predecessor ended."""
from __future__ import annotations

import contextlib
import copy
import functools
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, METRICS, MODELS, DefaultScope
from mmseg.structures import SegDataSample

from adala_mm.datasets import BeaconsDataset
from adala_mm.models.backbones.weights import plain_names
from adala_mm.utils.inert_lines import refuse_inert_lines
from helpers import ROOT

# configs/l2vit trains another kind of network, by other rules; task models have
# tests/models/algorithms/test_task_alignment.py, detectors tests/configs/test_detection.py.
PATHS = sorted(path for path in ROOT.glob('configs/**/*.py')
               if not {'_base_', 'l2vit', 'detection'} & set(path.relative_to(ROOT).parts)
               and not path.name.startswith('task_'))
FOLDERS = {path.stem: path.parent.name for path in PATHS}
NAMES = list(FOLDERS)
# The paper's models at full size; of its own recipe (Table 5) are all but the one trained from scratch.
FULL_SIZE = [name for name, folder in FOLDERS.items() if folder in ('adala', 'baselines')]
TABLE5_NAMES = [name for name in FULL_SIZE if not name.startswith('scratch_')]
# The one checkpoint that is neither a stage's nor timm's by name; its config says which timm model it is.
DEIT = 'data/weights/deit_tiny_patch16_224.safetensors'
# What a config may be named after instead of the linear attention of the paper -> the class of its layers.
ATTENTIONS = dict(softmax='SoftmaxAttention', hedgehog='HedgehogAttention', lolcats='LoLCATSAttention',
                  linformer='LinformerAttention', performer='PerformerAttention', cosformer='CosformerAttention',
                  nystromformer='NystromformerAttention', monarch='MonarchAttention')
# Recipes and an option of docs/beyond.md that have another attention than the paper.
OURS = dict(plus='HedgehogAttention', expmaps='HedgehogAttention', coarse='CoarseToFineAttention')
# Options beyond the paper, docs/beyond.md -> whether stage 1 has them already.
BEYOND = dict(dwconv=True, retain2=True, cosine=False, masked=False, multilayer=False, keepattn=False)
GRAMMAR = re.compile(r'(?P<stage>stage1|calibrate|stage2|mask2former|eomt|cls|probe|fcn|teacher|scratch)'
                     r'_(?P<vfm>dinov[23][sbl]|clipl|siglipl|siglip2[bl]|in1kl|deitt|demo)'
                     rf'(_(?P<attention>{"|".join(ATTENTIONS | OURS)}))?'
                     r'(?P<changes>(_(1024|fast|fsdp|earlystop|native|scratch|swap|nostage1|stage1only|stage2only|qkv|task|'
                     rf'last4|{"|".join(BEYOND)}))*)'
                     r'_(?P<dataset>ade20k|cityscapes|in1k|in22k|coco|beacons|caltech|camvid)')
# ViT-AdaLA, Table 5. Batch sizes are per GPU, of which the paper has 8.
TABLE5 = {'stage1': dict(epochs=4, batch=32, lr=1e-2), 'stage2': dict(batch=16, lr=1e-3),
          'mask2former': dict(epochs=20, batch=8, lr=1e-4), 'cls': dict(epochs=10, batch=8, lr=1e-4)}
TABLE5_STAGE2 = {'dinov2l': dict(epochs=30, scale=5), 'dinov2b': dict(epochs=30, scale=5),
                 'siglipl': dict(epochs=10, scale=1), 'clipl': dict(epochs=15, scale=4000),
                 'in1kl': dict(epochs=20, scale=1)}
# Models that the paper has not, with the numbers of the nearest that it has; of small ones there are three configs.
NEAREST = dict(dinov3l='dinov2l', dinov3b='dinov2b', siglip2l='siglipl')
SMALL = dict(dinov2s='dinov2b', dinov3s='dinov2b', siglip2b='siglipl')
STAGE2 = TABLE5_STAGE2 | {vfm: TABLE5_STAGE2[other] for vfm, other in (NEAREST | SMALL).items()}
VFMS = [vfm for vfm in STAGE2 if vfm not in SMALL]
# The one alignment that keeps to its own paper's schedule.
LOLCATS_TRANSFER = 'stage1_dinov2l_lolcats_native_coco'
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
every_config = pytest.mark.parametrize('name', NAMES)


def path_of(name: str) -> Path:
    return ROOT / 'configs' / FOLDERS[name] / f'{name}.py'


@functools.cache
def parsed(name: str) -> Config:
    return Config.fromfile(path_of(name))


def config(name: str) -> Config:
    """A copy that a test may change; of a fast recipe without what needs a GPU."""
    cfg = copy.deepcopy(parsed(name))
    if '_fast_' in name:
        assert cfg.optim_wrapper.pop('dtype') == 'bfloat16' and cfg.optim_wrapper.pop('loss_scale') == 1.0
        assert cfg.optim_wrapper.type == 'AmpOptimWrapper' and cfg.optim_wrapper.optimizer.pop('fused')
        cfg.optim_wrapper.type = 'OptimWrapper'
        for network in (cfg.model.backbone, cfg.model.get('teacher', cfg.model.backbone)):
            assert network.pop('compile', True)
    return cfg


def parts(name: str) -> dict[str, str | None]:
    return GRAMMAR.fullmatch(name).groupdict()


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


@contextlib.contextmanager
def scope_of(cfg: Config) -> Iterator[None]:
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        yield


@functools.cache
def model_of(name: str) -> torch.nn.Module:
    """The model at full size, in no time and memory: parameters have shapes only. For all tests; leave it as it is."""
    cfg = config(name)
    with scope_of(cfg), torch.device('meta'):
        return MODELS.build(cfg.model)


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


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    # Three log lines for each of up to 640 parameters take longer than the construction that they describe.
    monkeypatch.setattr('mmengine.optim.optimizer.default_constructor.print_log', lambda *args, **kwargs: None)


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


@pytest.mark.parametrize('name', TABLE5_NAMES)
def test_table_5(name):
    cfg = config(name)
    facts = parts(name)
    stage, vfm = facts['stage'], facts['vfm']
    row = dict(decay=0.05) | TABLE5[stage] | (STAGE2[vfm] if stage == 'stage2' else {})
    if name == LOLCATS_TRANSFER:
        row.update(epochs=2, decay=0.0)
    assert cfg.train_cfg == dict(type='EpochBasedTrainLoop', max_epochs=row['epochs'])
    assert cfg.train_dataloader.batch_size == row['batch']
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=8 * row['batch'])
    assert cfg.optim_wrapper.optimizer == dict(type='AdamW', lr=row['lr'], weight_decay=row['decay'])
    if stage == 'stage1':
        assert cfg.get('param_scheduler') is None
    else:
        assert cfg.param_scheduler == dict(type='PolyLR', power=0.9, end=row['epochs'], by_epoch=True,
                                           convert_to_iter_based=True)
    if stage == 'stage2':
        assert cfg.model.loss_scale == row['scale']
        assert model_of(name).loss_scale == row['scale']
    datasets = dict(coco='data/coco', in22k='data/imagenet22k', in1k='data/imagenet', cityscapes='data/cityscapes',
                    ade20k='data/ade/ADEChallengeData2016')
    for loader in LOADERS:
        if cfg.get(loader):
            held_out = '_earlystop' in facts['changes'] and loader != 'train_dataloader'
            assert cfg[loader].dataset.data_root == datasets['in1k' if held_out else facts['dataset']]
    side = 1024 if '1024' in facts['changes'] else 512
    assert cfg.model.backbone.img_size == 512  # at 1024 positions are resampled: the paper's parameters are as many
    assert cfg.get('crop_size', (side, side)) == (side, side)


def test_scratch_schedule():
    cfg = config('scratch_in1kl_in1k')
    assert cfg.train_cfg.max_epochs == 200  # all that A.6 says
    assert cfg.train_dataloader.batch_size == 128
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=8 * 128)
    assert cfg.optim_wrapper.optimizer == dict(type='AdamW', lr=1e-3, weight_decay=0.05)
    warmup, cosine = cfg.param_scheduler
    assert (warmup.type, cosine.type) == ('LinearLR', 'CosineAnnealingLR')
    assert (warmup.end, cosine.begin, cosine.end) == (5, 5, 200)
    assert cfg.model.backbone.img_size == 224 and cfg.model.backbone.init_cfg is None
    assert not list(checkpoints(cfg.model.to_dict()))


def test_numbers_of_the_baselines():
    """Those that the paper states, and those that follow from its Table 10."""
    layers = {kind: model_of(f'stage1_dinov2l_{kind}_coco').backbone.blocks[0].attn for kind in ATTENTIONS
              if kind != 'softmax'}
    assert [p.shape for p in layers['hedgehog'].feature_map.parameters()] == [(16, 64, 64)] * 2
    assert {p.shape for p in layers['lolcats'].lora.parameters()} == {(8, 1024), (1024, 8)}
    assert layers['lolcats'].lora.scale == 16 / 8
    tables = sum(p.numel() for p in layers['linformer'].token_proj.parameters())
    assert tables == 2 * (1024 + 1) * 32  # the class token has a row as well
    assert layers['performer'].feature_map.projection.shape == (64, 64)
    assert layers['nystromformer'].num_landmarks == 128
    monarch = layers['monarch']
    assert (monarch.num_steps, monarch.exact_prefix, monarch.tile) == (3, False, None)  # blocks as wide as the grid


# What sets a run apart from the one on the same schedule with the paper's linear attention and stages.
APART = re.compile(f'_({"|".join(ATTENTIONS)}|expmaps|native|scratch|swap|nostage1|stage[12]only|qkv)(?=_)')
TWINS = [name for name in NAMES if APART.search(name) and not re.match('stage1_.*_native_', name)]


@pytest.mark.parametrize('name', TWINS)
def test_twin_differs_only_in_attention_and_weights(name):
    facts, twin, linear = parts(name), config(name), config(APART.sub('', name))
    if facts['attention']:
        assert twin.model.backbone.attention.type == f'adala_mm.{(ATTENTIONS | OURS)[facts["attention"]]}'
    assert linear.model.backbone.attention == dict(type='adala_mm.LinearAttention')
    if facts['attention'] == 'softmax':
        # The demo's teacher is trained by the demo itself; all others come from the pretrained model.
        pretrained = twin.get('pretrained') or twin.teacher_init
        assert twin.model.backbone.init_cfg == pretrained != linear.model.backbone.init_cfg
    contents = []
    for cfg in (twin.to_dict(), linear.to_dict()):
        if '_lolcats_native' in name:  # whose updates learn at the rate of the head
            cfg['optim_wrapper']['paramwise_cfg']['custom_keys'].pop('attn.lora', None)
        for key in ('attention', 'init_cfg', 'trainable'):
            cfg['model']['backbone'].pop(key, None)
        contents.append({key: value for key, value in cfg.items() if key not in ATTENTIONS})
    assert contents[0] == contents[1]


@pytest.mark.parametrize('vfm', VFMS)
@pytest.mark.parametrize(('stage', 'dataset'), [
    ('stage1', 'coco'), ('stage2', 'in22k'), ('mask2former', 'ade20k'), ('cls', 'in1k')])
def test_coarse_is_the_papers_run_but_for_what_it_states(stage, dataset, vfm):
    ours, paper = (config(f'{stage}_{vfm}{kind}_{dataset}').to_dict() for kind in ('_coarse', ''))
    depth = ours['model']['backbone']['depth']
    assert ours['model']['backbone'].pop('attention') == {'type': 'adala_mm.CoarseToFineAttention'}
    if stage == 'stage2':
        assert ours['model'].pop('layers') == list(range(depth))
        terms = ours['model'].pop('loss', dict(mse=1.0))
        assert terms.pop('mse') * ours['model'].pop('loss_scale') == paper['model'].pop('loss_scale')
        assert terms == (dict(class_token=1.0) if paper['model']['backbone'].get('class_token', True) else {})
    if stage.startswith('stage'):
        assert ours['optim_wrapper']['optimizer'].pop('lr') < paper['optim_wrapper']['optimizer'].pop('lr')
        assert ours.pop('param_scheduler')['end'] == paper['train_cfg']['max_epochs']
        paper.pop('param_scheduler', None)
    for cfg in (ours, paper):
        cfg['model']['backbone'].pop('init_cfg')
        cfg['model']['backbone'].pop('attention', None)
        cfg.pop('coarse_attention', None)
    assert ours == paper


@pytest.mark.parametrize('vfm', VFMS)
def test_calibration_of_coarse_has_the_student_of_its_stages(vfm):
    calibration = config(f'calibrate_{vfm}_coarse_coco')
    assert calibration.train_cfg == dict(type='adala_mm.CalibrationLoop', images=512,
                                         max_iters=calibration.model.backbone.depth)
    images = config(f'stage1_{vfm}_coarse_coco').train_dataloader
    assert calibration.train_dataloader == images and calibration.get('param_scheduler') is None
    assert calibration.model.teacher == config(f'stage2_{vfm}_coarse_in22k').model.teacher


@pytest.mark.parametrize(('attention', 'target'), [('hedgehog', 'weights'), ('lolcats', 'heads')])
def test_native_alignment_differs_only_in_target_and_what_learns(attention, target):
    native, ours = config(f'stage1_dinov2l_{attention}_native_coco'), config(f'stage1_dinov2l_{attention}_coco')
    assert native.model.pop('target') == target
    for cfg in (native, ours):
        cfg.model.backbone.pop('trainable', None)
    assert native.model == ours.model
    assert native.train_dataloader == ours.train_dataloader  # `test_table_5` says what holds for the schedule


@functools.cache
def demo_runs() -> dict:
    """Runs of tools/demo.py by name."""
    return {run.name: run for run in runpy.run_path(str(ROOT / 'tools/demo.py'))['RUNS']}


def checkpoints(node) -> Iterator[str]:
    """Every checkpoint that a model config names."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == 'checkpoint':
                yield value
            else:
                yield from checkpoints(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from checkpoints(value)


def last_checkpoint(name: str) -> str:
    """File that a finished run of the config leaves in its default work dir."""
    loop = parsed(name).train_cfg
    if loop.type == 'EpochBasedTrainLoop':
        return f'work_dirs/{name}/epoch_{loop.max_epochs}.pth'
    return f'work_dirs/{name}/iter_{loop.max_iters}.pth'


@every_config
def test_checkpoint_of_the_last_step_is_saved(name):
    cfg = config(name)
    hook = cfg.default_hooks.checkpoint
    by_epoch = cfg.train_cfg.type == 'EpochBasedTrainLoop'
    length = cfg.train_cfg.max_epochs if by_epoch else cfg.train_cfg.max_iters
    assert hook.get('by_epoch', True) == by_epoch == cfg.log_processor.by_epoch
    assert length % hook.interval == 0
    for scheduler in [cfg.param_scheduler] if isinstance(cfg.get('param_scheduler'), dict) else \
            cfg.get('param_scheduler') or []:
        assert scheduler.by_epoch == by_epoch and scheduler.end <= length
        assert scheduler.type != 'PolyLR' or scheduler.end == length


# name of a config -> the configs whose results it starts from, for all that do not follow the general rule below
PREVIOUS = {
    'fcn_demo_beacons': {'stage2_demo_beacons', 'teacher_demo_beacons'},
    'fcn_demo_softmax_beacons': {'teacher_demo_beacons'},
    'fcn_demo_swap_beacons': {'teacher_demo_beacons'},
    'fcn_demo_coarse_beacons': {'teacher_demo_beacons'},
    'fcn_demo_stage1only_beacons': {'stage1_demo_beacons', 'teacher_demo_beacons'},
    'fcn_demo_stage2only_beacons': {'stage2_demo_nostage1_beacons', 'teacher_demo_beacons'},
    'mask2former_demo_beacons': {'stage2_demo_beacons'},
    'stage1_demo_beacons': {'teacher_demo_beacons'},
    'stage2_demo_beacons': {'stage1_demo_beacons', 'teacher_demo_beacons'},
    'stage2_demo_nostage1_beacons': {'teacher_demo_beacons'},
    'stage2_dinov2l_last4_in22k': {'stage1_dinov2l_last4_coco'},
    'eomt_dinov2l_last4_ade20k': {'stage2_dinov2l_last4_in22k'},
    'eomt_dinov2l_last4_1024_cityscapes': {'stage2_dinov2l_last4_in22k'},
    'teacher_demo_beacons': set(),
    'stage2_deitt_caltech': {'stage1_deitt_caltech'},
    'stage2_deitt_nostage1_caltech': set(),
    'mask2former_deitt_camvid': {'stage2_deitt_caltech'},
    'probe_deitt_camvid': {'stage2_deitt_caltech'},
    'stage1_deitt_task_camvid': {'mask2former_deitt_softmax_camvid'},
    'calibrate_deitt_plus_caltech': {'stage1_deitt_plus_caltech'},
    'calibrate_dinov2l_plus_coco': {'stage1_dinov2l_plus_coco'},
    'stage1_dinov2l_task_ade20k': {'mask2former_dinov2l_softmax_ade20k'},
    'stage1_dinov2l_task_in1k': {'cls_dinov2l_softmax_in1k'},
    'stage2_dinov2l_nostage1_in22k': set(),
    'stage2_dinov2l_qkv_in22k': {'stage1_dinov2l_coco'},
    'mask2former_dinov2l_swap_ade20k': set(),
    'mask2former_dinov2l_stage1only_ade20k': {'stage1_dinov2l_coco'},
    'mask2former_dinov2l_stage2only_ade20k': {'stage2_dinov2l_nostage1_in22k'},
    'mask2former_dinov2l_stage2only_cityscapes': {'stage2_dinov2l_nostage1_in22k'},
    'cls_dinov2l_stage2only_in1k': {'stage2_dinov2l_nostage1_in22k'},
    'mask2former_dinov2l_qkv_ade20k': {'stage2_dinov2l_qkv_in22k'},
    'cls_dinov2l_qkv_in1k': {'stage2_dinov2l_qkv_in22k'},
}
for _change, _early in (BEYOND | dict(expmaps=True, plus=True, plus_retain2=True, coarse=True)).items():
    for _vfm, _first, _second, _third in (('dinov2l', 'coco', 'in22k', 'ade20k'),
                                          ('deitt', 'caltech', 'caltech', 'camvid')):
        PREVIOUS[f'stage2_{_vfm}_{_change}_{_second}'] = {f'stage1_{_vfm}{f"_{_change}" * _early}_{_first}'}
        for _head in ('mask2former', 'probe'):
            PREVIOUS[f'{_head}_{_vfm}_{_change}_{_third}'] = {f'stage2_{_vfm}_{_change}_{_second}'}
for _head in ('mask2former', 'probe'):
    PREVIOUS[f'{_head}_deitt_coarse_camvid'] = {'stage1_deitt_coarse_caltech'}
for _vfm in VFMS:  # calibrated between stages 1 and 2
    PREVIOUS[f'calibrate_{_vfm}_coarse_coco'] = {f'stage1_{_vfm}_coarse_coco'}
    PREVIOUS[f'stage2_{_vfm}_coarse_in22k'] = {f'calibrate_{_vfm}_coarse_coco'}


def previous(name: str) -> set[str]:
    facts = parts(name)
    vfm, attention = facts['vfm'], facts['attention']
    if name in PREVIOUS:
        return PREVIOUS[name]
    if facts['stage'] in ('stage1', 'scratch') or attention == 'softmax':
        return set()
    if '_scratch' in facts['changes']:
        return {f'scratch_{vfm}_in1k'}
    if '_native' in facts['changes']:  # only these two are aligned before they learn the task
        return {f'stage1_{vfm}_{attention}_native_coco'} if attention in ('hedgehog', 'lolcats') else set()
    model = f'{vfm}_{attention}' if attention else vfm
    if '_fast' in facts['changes']:
        model += '_fast'
    return {f'stage1_{model}_coco' if facts['stage'] == 'stage2' else f'stage2_{model}_in22k'}


@every_config
def test_starts_from_what_the_previous_stage_writes(name):
    cfg = config(name)
    named = set(checkpoints(cfg.model.to_dict()))
    stages = {path for path in named if path.startswith('work_dirs/')}
    assert previous(name) <= set(NAMES)
    if FOLDERS[name] == 'demo':
        runs = {run.config: run for run in demo_runs().values()}
        wanted = {last_checkpoint(stage).replace(f'work_dirs/{stage}/', f'work_dirs/demo/{runs[stage].name}/')
                  for stage in previous(name)}
        # tools/demo.py waits for the run that a run starts from; what that one needed is there as well.
        reachable, todo = set(), list(runs[name].needs)
        while todo:
            reachable.add(todo.pop())
            todo += [need for run in reachable for need in demo_runs()[run].needs if need not in reachable]
        assert {demo_runs()[run].config for run in reachable} >= previous(name)
    else:
        wanted = {last_checkpoint(stage) for stage in previous(name)}
    assert stages == wanted
    vfm = cfg.get('pretrained', {}).get('checkpoint')
    assert named - stages <= {vfm} and (vfm is None or vfm.startswith('timm://') or vfm == DEIT)
    assert named or parts(name)['stage'] in ('teacher', 'scratch')
    # Strict loading needs the same ViT on both sides. In the demo, runs start from the softmax teacher as well.
    free = ['init_cfg', 'img_size', 'out_indices', 'out_type', 'trainable', 'drop_path_rate', 'with_cp']
    free += ['attention'] * (FOLDERS[name] == 'demo' or '_task_' in name)
    free += ['type', 'num_queries', 'query_blocks'] * name.startswith('eomt')
    for stage in previous(name):
        ours, theirs = cfg.model.backbone.to_dict(), config(stage).model.backbone.to_dict()
        for key in free:
            ours.pop(key, None), theirs.pop(key, None)
        assert ours == theirs


@pytest.mark.parametrize('name', [name for name in NAMES if name.startswith(('calibrate_', 'stage2_'))])
def test_stage_2_has_the_teacher_of_stage_1(name):
    cfg = config(name)
    teacher, student = cfg.model.teacher.to_dict(), cfg.model.backbone.to_dict()
    assert teacher.pop('attention') == dict(type='adala_mm.SoftmaxAttention')
    stage1 = config(re.sub(r'^(?:calibrate|stage2)_(\w+?)'
                           r'(_nostage1|_qkv|_fsdp|_earlystop|_cosine|_masked|_multilayer|_keepattn)?_(in22k|coco|caltech|beacons)$',
                           lambda m: f'stage1_{m[1]}_{m[3].replace("in22k", "coco")}', name))
    assert teacher.pop('init_cfg') == stage1.model.backbone.init_cfg.to_dict()
    for key in ('attention', 'init_cfg', 'trainable', 'with_cp'):  # what the student has of its own
        student.pop(key, None)
    assert teacher == student
    assert cfg.model.data_preprocessor == stage1.model.data_preprocessor


def normalisation(cfg: Config) -> tuple[list[float], list[float]]:
    """Mean and std, in RGB from 0 to 255, that the pretrained model was trained with."""
    if cfg.get('pretrained') is None:  # the demo's own
        return [110.0] * 3, [55.0] * 3
    checkpoint = cfg.pretrained.checkpoint
    name = 'deit_tiny_patch16_224.fb_in1k' if checkpoint == DEIT else checkpoint.removeprefix('timm://')
    facts = timm.get_pretrained_cfg(name)
    assert facts is not None, name
    return [255 * m for m in facts.mean], [255 * s for s in facts.std]


@every_config
def test_images_are_normalised_as_in_pretraining(name):
    cfg = config(name)
    mean, std = normalisation(cfg)
    assert cfg.model.data_preprocessor.mean == pytest.approx(mean, abs=1e-3)
    assert cfg.model.data_preprocessor.std == pytest.approx(std, abs=1e-3)
    # And in RGB, while files are read as BGR: 1, 2 and 3 deviations above the mean of R, G and B come out as such.
    with scope_of(cfg):
        preprocessor = MODELS.build(dict(cfg.model.data_preprocessor))
    colour = torch.tensor([m + i * s for i, m, s in zip((1, 2, 3), mean, std, strict=True)]).flip(0)
    data = dict(inputs=[colour[:, None, None].expand(3, 96, 96)])
    if cfg.model.type == 'EncoderDecoder':  # pads, and wants to note it down
        data.update(data_samples=[SegDataSample()])
    out = preprocessor(data)['inputs']
    torch.testing.assert_close(out, torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1).expand_as(out), atol=1e-3, rtol=0)


@pytest.mark.parametrize('name', FULL_SIZE)
def test_patch_16(name):
    cfg = config(name)
    vits = [cfg.model.backbone] + ([cfg.model.teacher] if 'teacher' in cfg.model else [])
    assert [vit.patch_size for vit in vits] == [16] * len(vits)


@pytest.mark.parametrize('name', [name for name in NAMES if name.startswith('stage1_') and 'demo' not in name
                                  and not parts(name)['attention'] and '_dwconv_' not in name])
def test_backbone_is_the_pretrained_model(name):
    cfg = config(name)
    checkpoint = cfg.pretrained.checkpoint
    with torch.device('meta'):
        ours = MODELS.build(dict(cfg.model.backbone, type='adala_mm.AdaLAViT'))
        theirs = timm.create_model('deit_tiny_patch16_224' if checkpoint == DEIT else
                                   checkpoint.removeprefix('timm://'))
    ours_state, theirs_state = ours.state_dict(), plain_names(theirs.state_dict())
    heads = re.compile(r'(head|fc_norm|attn_pool)\.')
    assert set(ours_state) == {key for key in theirs_state if not heads.match(key)}
    resized = {'pos_embed', 'patch_embed.proj.weight'}
    assert all(ours_state[key].shape == theirs_state[key].shape for key in set(ours_state) - resized)
    block, twin = ours.blocks[0], theirs.blocks[0]
    assert block.attn.num_heads == twin.attn.num_heads
    x = torch.linspace(-4, 4, 50)
    if 'siglip2b' not in name:  # which timm runs with exact GELU, and the base file as it was trained
        torch.testing.assert_close(block.mlp.act(x), twin.mlp.act(x))
    assert block.norm1.eps == twin.norm1.eps == ours.norm.eps
    assert ours.num_prefix == theirs.num_prefix_tokens
