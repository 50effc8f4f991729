"""Checkpoints that do not fit, lack, or are cut off."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS

from adala_mm.preflight import ERROR, memory
from adala_mm.preflight.checkpoints import not_downloaded
from helpers import ROOT, tiny_vit
from helpers.pictures import photo
from helpers.preflight import BATCHES, ESTIMATE, FLAGSHIP, RANDOM, STAGE1, STAGE2, assert_one_red, check, flagship
from helpers.recipes import mask2former, pretrained_file, stage1, stage2


def test_checkpoint_of_another_family(root):
    path = Path('other.pth')
    torch.save(MODELS.build(tiny_vit(class_token=False)).state_dict(), path)
    result = check(STAGE1, '--data-root', root, options=stage1() | {'model.backbone.init_cfg.checkpoint': path})
    assert_one_red(result, 'checkpoint of backbone', 'other.pth', 'Check class_token', fix='docs/weights.md')


def test_truncated_checkpoint(root):
    path = pretrained_file(Path('half.safetensors'))
    path.write_bytes(path.read_bytes()[:-100])
    result = check(STAGE1, '--data-root', root, options=stage1() | {'model.backbone.init_cfg.checkpoint': path})
    assert_one_red(result, 'checkpoint of backbone', 'half.safetensors', 'truncated', fix='docs/weights.md')


def test_the_teacher_of_a_task_model(monkeypatch):
    monkeypatch.setattr(memory, 'estimate', ESTIMATE)
    name, title = 'task_mask2former_deitt_camvid', 'checkpoint of the teacher'
    (finding,) = check(name)[1][title]
    assert finding['status'] == ERROR and 'run mask2former_deitt_softmax_camvid first' in finding['fix']
    torch.save({'backbone.cls_token': torch.zeros(1, 1, 32)}, 'other.pth')
    _, findings = check(name, options={'model.teacher.checkpoint': 'other.pth'})
    assert 'other shape  backbone.cls_token' in findings[title][0]['found']
    assert findings['memory'][0]['found'] == 'no estimate for a TaskModelAlignment'


def test_the_stage_before_has_not_run(root):
    options = mask2former()
    result = check(FLAGSHIP, '--data-root', root, options=options)
    assert_one_red(result, 'checkpoint of backbone', f'work_dirs/{STAGE2}/epoch_30.pth', 'has not been written',
                   fix=f'run stage 2 first: python tools/train.py {ROOT}/configs/adala/{STAGE2}.py')


def test_the_stage_before_is_not_done(root):
    weights = Path(f'work_dirs/{STAGE1}/epoch_2.pth')
    weights.parent.mkdir(parents=True)
    weights.touch()
    (root / 'imagenet22k').mkdir()
    photo(root / 'imagenet22k/a.JPEG')
    result = check(STAGE2, '--data-root', root, '--gpus', 8, '--device-memory', 80, options=stage2() | {
        'train_dataloader.drop_last': False,
        'model.teacher.init_cfg.checkpoint': pretrained_file(Path('teacher.safetensors'))})
    assert_one_red(result, 'checkpoint of backbone', 'there is epoch_2.pth',
                   fix=f'run stage 1 first: bash tools/dist_train.sh {ROOT}/configs/adala/{STAGE1}.py 8 --resume')


def test_load_from(root):
    path = Path('run.pth')
    torch.save({'state_dict': {'some.weight': torch.ones(2)}}, path)
    assert_one_red(flagship(root, **BATCHES, load_from=path), 'load_from', 'run.pth does not fit', fix='family')
    assert_one_red(flagship(root, '--resume', 'absent.pth', **BATCHES), 'load_from', 'no checkpoint at absent.pth',
                   fix='check the path')


@pytest.mark.parametrize(('name', 'found', 'fix'), [
    ('vit_large_patch14_clip_quickgelu_224.openai', 'is not here and cannot be downloaded (OSError)',
     'fetch https://huggingface.co/timm/vit_large_patch14_clip_224.openai/resolve/main/model.safetensors and name'),
    ('vit_large_patch14_clip_quickgelu.openai', 'knows no weights on the Hugging Face hub for timm://vit_large_patch14_',
     'did you mean timm://vit_large_patch14_clip_quickgelu_'),
])
def test_weights_that_are_not_here(name, found, fix, monkeypatch):
    def refuse(url: str, timeout: float) -> None:
        raise OSError(url)

    monkeypatch.setattr('huggingface_hub.try_to_load_from_cache', lambda repository, file: None)
    monkeypatch.setattr('huggingface_hub.get_hf_file_metadata', refuse)
    finding = not_downloaded('checkpoint of backbone', f'timm://{name}')
    assert finding.status == ERROR and found in finding.found and finding.fix.startswith(fix)


def test_no_pretrained_weights_to_align_with(root):
    assert_one_red(check(STAGE1, '--data-root', root, options=stage1() | RANDOM), 'checkpoint of backbone',
                   'no pretrained weights', fix='--cfg-options model.backbone.init_cfg.type=Pretrained '
                                                'model.backbone.init_cfg.checkpoint=FILE')
