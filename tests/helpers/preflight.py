"""`tools/check.py` in this process, and its findings."""
from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from adala_mm.preflight import ERROR, memory
from helpers import ROOT
from helpers.pictures import photo
from helpers.recipes import arguments, mask2former

CLASSIFIER = """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier', data_preprocessor=dict(type='ClsDataPreprocessor', num_classes=3, mean=[120] * 3,
                                                  std=[60] * 3),
    backbone=dict(type='adala_mm.AdaLAViT', img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=4,
                  out_type='cls_token'),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=32, loss=dict(type='CrossEntropyLoss')))
steps = [dict(type='LoadImageFromFile'), dict(type='RandomResizedCrop', scale=32), dict(type='PackInputs')]
train_dataloader = dict(batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='CustomDataset', data_root='data/pets', data_prefix='train', pipeline=steps))
val_dataloader = dict(batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='CustomDataset', data_root='data/pets', data_prefix='val', pipeline=steps))
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9))
train_cfg = dict(by_epoch=True, max_epochs=1)
val_cfg = dict()
val_evaluator = dict(type='Accuracy', topk=(1,))
"""


def check(config: str | Path, *words: object, options: dict | None = None) -> tuple[int, dict[str, list[dict]]]:
    """Exit code of the tool and its findings by name."""
    path = config if isinstance(config, Path) else next(ROOT.glob(f'configs/*/{config}.py'))
    line = ['tools/check.py', path, '--json', 'findings.json', *words,
            *(['--cfg-options', *arguments(options)] if options else [])]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, 'argv', [str(word) for word in line])
        runpy.run_path(str(ROOT / 'tools/check.py'), run_name='__main__')
    findings: dict[str, list[dict]] = {}
    for finding in json.loads(Path('findings.json').read_text())['findings']:
        findings.setdefault(finding['name'], []).append(finding)
    return end.value.code, findings


def red(result: tuple[int, dict[str, list[dict]]]) -> list[dict]:
    code, findings = result
    wrong = [finding for group in findings.values() for finding in group if finding['status'] == ERROR]
    assert code == bool(wrong)
    return wrong


FLAGSHIP, STAGE1, STAGE2 = 'mask2former_dinov2l_ade20k', 'stage1_dinov2l_coco', 'stage2_dinov2l_in22k'
ESTIMATE, HEAD_LINE = memory.estimate, memory.head_line
RANDOM = {'model.backbone.init_cfg': None}
BATCHES = {'train_dataloader.batch_size': 2}
FOLDER = Path('ade/ADEChallengeData2016')


def flagship(root: Path, *words: object, **options: object) -> tuple[int, dict[str, list[dict]]]:
    return check(FLAGSHIP, '--data-root', root, *words, options=mask2former() | RANDOM | options)


def assert_one_red(result: tuple[int, dict], name: str, *words: object, fix: str) -> None:
    wrong = red(result)
    assert [finding['name'] for finding in wrong] == [name], wrong
    missing = [str(word) for word in words if str(word) not in wrong[0]['found']]
    assert not missing, f'{missing} not in: {wrong[0]["found"]}'
    assert fix in wrong[0]['fix']


def classifier(place: Path, val_classes: int = 3) -> Path:
    for split, count in (('train', 3), ('val', val_classes)):
        for i in range(count):
            photo(place / 'data/pets' / split / f'kind{i}' / 'a.png')
    path = place / 'pets.py'
    path.write_text(CLASSIFIER)
    return path
