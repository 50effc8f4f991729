"""Blocks that keep softmax attention, and the tool that ranks them."""
from __future__ import annotations

import copy
import json
import runpy
import sys

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

from adala_mm.registry import MODELS
from helpers import LINEAR, ROOT, tiny_vit
from helpers.options import SOFTMAX, images, stage1, stage2, step
from helpers.processes import put_back


def test_retained_softmax_blocks(pretrained):
    kept = [SOFTMAX, LINEAR]
    for model in (stage1(pretrained, kept), stage2(pretrained, student=dict(attention=kept))):
        assert model.backbone.num_softmax_blocks == 1
        step(model)
    full = stage2(pretrained, student=dict(attention=SOFTMAX))
    assert full.loss(images())['rel_error'] < 1e-5


@pytest.fixture
def rank_blocks(monkeypatch) -> dict:
    """tools/analysis_tools/rank_blocks.py; what it leaves in the process is put back."""
    put_back(monkeypatch)
    return runpy.run_path(str(ROOT / 'tools/analysis_tools/rank_blocks.py'))


def test_ranking_against_networks_with_these_blocks(sharp_pretrained, rank_blocks):
    model = stage1(sharp_pretrained)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.02 * torch.randn_like(parameter)  # as after a short stage 1
    batches = [images(3), images(2)]
    ranking = rank_blocks['Ranking'](model, batches)
    before = copy.deepcopy(model.backbone)

    def reference(kept: set[int]) -> float:
        vit = copy.deepcopy(before).eval()
        for i in kept:
            vit.blocks[i].attn = model.frozen['attentions'][i]
        with torch.no_grad():
            pairs = [(vit.forward_features(x), model.teacher_features(x)) for x in batches]
        got, wanted = (torch.cat(x) for x in zip(*pairs, strict=True))
        return ((got - wanted).norm() / wanted.norm()).item()

    errors = {kept: ranking.feature_error(kept) for kept in [(), (0,), (1,), (0, 1)]}
    assert errors == {kept: pytest.approx(reference(set(kept)), rel=1e-3, abs=1e-6) for kept in errors}
    assert errors[()] > 0.01 and errors[0, 1] < 1e-5
    assert all(block.attn is ranking.linear[i] for i, block in enumerate(model.backbone.blocks))  # put back
    best = min((0, 1), key=lambda i: errors[i,])
    assert ranking.greedy(5) == [(best, errors[best,]), (1 - best, pytest.approx(0, abs=1e-5))]
    x = torch.cat([batches[0], batches[0]])
    model.eval().loss(x)
    assert rank_blocks['Ranking'](model, [batches[0]]).block_errors() == {
        i: pytest.approx(model.block_errors[i].item(), rel=1e-4) for i in (0, 1)}


def test_rank_blocks_from_the_command_line(sharp_pretrained, rank_blocks, tmp_path, monkeypatch, capsys):
    (tmp_path / 'photos/more').mkdir(parents=True)
    for i in range(12):
        photo = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / f'photos/{"more/" * (i % 2)}{i}.png'), photo)
    config = Config.fromfile(ROOT / 'configs/real/stage1_deitt_caltech.py')
    config.model.update(backbone=tiny_vit(attention=LINEAR, init_cfg=sharp_pretrained), head=None)
    config.dump(str(tmp_path / 'stage1_tiny.py'))

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, 'argv', ['rank_blocks.py', str(tmp_path / 'stage1_tiny.py'), '--images',
                                          str(tmp_path / 'photos'), '--steps', '3', '--batch-size', '4', *words])
        rank_blocks['main']()
        return capsys.readouterr().out

    out = run('--measure', '8', '--keep', '1', '--json', str(tmp_path / 'blocks.json'))
    found = json.loads((tmp_path / 'blocks.json').read_text())
    assert found['images'] == 8 and [row['block'] for row in found['blocks']] == [0, 1]
    (kept,) = found['kept']
    assert kept['feature_error'] == min(row['feature_error_kept'] for row in found['blocks'])
    assert f'attention=[softmax if i in ({kept["block"]},) else linear for i in range(2)]' in out
    assert '(0 softmax / 2 linear blocks)' in out
    # Of a finished stage 1 nothing is trained: its errors are those of the weights in the file.
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(config.model)
    model.init_weights()
    torch.nn.init.zeros_(model.backbone.blocks[0].attn.qkv.weight)
    torch.nn.init.zeros_(model.backbone.blocks[0].attn.qkv.bias)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'stage1.pth')
    out = run('--measure', '12', '--keep', '1', '--checkpoint', str(tmp_path / 'stage1.pth'), '--json',
              str(tmp_path / 'still.json'))  # no image is left for training
    still = json.loads((tmp_path / 'still.json').read_text())
    bias = model.backbone.blocks[0].attn.proj.bias.norm() > 0  # the output of a block that reads nothing is its bias
    assert bias and still['blocks'][0]['stage1'] != still['blocks'][0]['swap']
    assert still['blocks'][1]['stage1'] == still['blocks'][1]['swap']  # which reads what the teacher's reads
    assert '| aligned |' in out and still['checkpoint'].endswith('stage1.pth') and 'steps' not in still
    for words, message in [(['--measure', '9'], 'has 12 images, and --measure 9 and one batch of 4 need more'),
                           (['--keep', '0'], '--keep must be at least 1, got 0'),
                           (['--cfg-options', 'model.type=adala_mm.FeatureAlignment'], 'is no config of stage 1')]:
        with pytest.raises(SystemExit):
            run(*words)
        assert message in capsys.readouterr().err
