"""The configs by name, and what their names say."""
from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from helpers import ROOT

# configs/l2vit trains another kind of network, by other rules; task models have
# tests/configs/test_task_models.py, detectors tests/configs/test_detection.py.
PATHS = sorted(path for path in ROOT.glob('configs/**/*.py')
               if not {'_base_', 'l2vit', 'detection'} & set(path.relative_to(ROOT).parts)
               and not path.name.startswith('task_'))
FOLDERS = {path.stem: path.parent.name for path in PATHS}
NAMES = list(FOLDERS)
# The paper's models at full size; of its own recipe (Table 5) are all but the one trained from scratch.
FULL_SIZE = [name for name, folder in FOLDERS.items() if folder in ('adala', 'baselines')]
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
TABLE5_STAGE2 = {'dinov2l': dict(epochs=30, scale=5), 'dinov2b': dict(epochs=30, scale=5),
                 'siglipl': dict(epochs=10, scale=1), 'clipl': dict(epochs=15, scale=4000),
                 'in1kl': dict(epochs=20, scale=1)}
# Models that the paper has not, with the numbers of the nearest that it has; of small ones there are three configs.
NEAREST = dict(dinov3l='dinov2l', dinov3b='dinov2b', siglip2l='siglipl')
SMALL = dict(dinov2s='dinov2b', dinov3s='dinov2b', siglip2b='siglipl')
STAGE2 = TABLE5_STAGE2 | {vfm: TABLE5_STAGE2[other] for vfm, other in (NEAREST | SMALL).items()}
VFMS = [vfm for vfm in STAGE2 if vfm not in SMALL]
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
