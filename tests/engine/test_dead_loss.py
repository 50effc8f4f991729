"""Blocks that do not learn are named."""
from __future__ import annotations

import pytest
import torch
from mmengine.model import BaseModel

from adala_mm.engine import DeadLossHook
from adala_mm.registry import MODELS
from adala_mm.utils.checkpoint import load_checkpoint
from helpers import LINEAR, tiny_vit
from helpers.processes import apart
from helpers.stages import ADAMW, Act, in_training, make_runner, stage

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='compares runs on the CPU')


@pytest.fixture(autouse=True)
def isolated():
    with apart():
        yield


def test_block_that_does_not_learn_is_named(sharp_pretrained, tmp_path):
    hook = DeadLossHook(patience=10, policy='stop', momentum=0.3)
    numbers = [1, 2] * 10
    make_runner(tmp_path / 'alive', stage(1, sharp_pretrained), numbers, optimizer=ADAMW, hooks=(hook,)).train()

    def act(runner):
        if runner.iter == 0:
            model.backbone.blocks[1].attn.register_forward_hook(lambda module, args, output: output.detach() + 0 * sum(
                p.sum() for p in module.parameters()))

    model, hook = stage(1, sharp_pretrained), DeadLossHook(patience=10, policy='stop', momentum=0.3)
    runner = make_runner(tmp_path / 'dead', model, numbers, optimizer=ADAMW | dict(weight_decay=0.0),
                         hooks=(hook, Act(act)))
    with pytest.raises(RuntimeError, match=r'iteration 10: the error of 1 of 2 blocks has not fallen by 5%.*: block 1 '
                                           r'\(0\.\d+ at first, now 0\.\d+\)\. Most likely the learning rate'):
        runner.train()


def feed(hook: DeadLossHook, model: BaseModel, errors: list[list[float]], start: int = 0) -> list[str]:
    """Warnings of the hook while blocks have these errors."""
    said = []
    for i, row in enumerate(errors):
        model.block_errors = torch.tensor(row)
        runner = in_training(model, start + i)
        hook.after_train_iter(runner, 0)
        said += runner.lines
    return said


@pytest.fixture(scope='module')
def aligning(sharp_pretrained) -> BaseModel:
    return stage(1, sharp_pretrained)


def falling(count: int) -> list[float]:
    return [0.9 ** i for i in range(count)]


def test_dead_loss_warns_of_what_does_not_fall(aligning):
    rows = [[a, b] for a, b in zip(falling(40), [0.5, 0.7] * 20, strict=True)]  # noise is no progress
    said = feed(DeadLossHook(patience=20), aligning, rows)
    assert len(said) == 2 and all('1 of 2 blocks' in line and 'block 1 (0.5 at first' in line for line in said)
    assert 'iteration 20:' in said[0] and 'iteration 40:' in said[1]
    assert not feed(DeadLossHook(patience=20), aligning, [[a, a] for a in falling(40)])
    assert not feed(DeadLossHook(patience=20), aligning, [[a, a] for a in falling(10) + [0.4] * 90])  # has converged


def test_dead_loss_survives_batches_of_nan(aligning):
    rows = [[float('nan')] * 2] + [[a, a] for a in falling(20)] + [[float('nan')] * 2] + [[0.1, 0.1]] * 18
    assert not feed(DeadLossHook(patience=20), aligning, rows)


def test_dead_loss_goes_on_after_a_resume(aligning, tmp_path):
    hook, again, fresh = (DeadLossHook(patience=10) for _ in range(3))
    rows = [[a, a] for a in falling(30)]
    assert not feed(hook, aligning, rows)
    checkpoint = {}
    hook.before_save_checkpoint(in_training(aligning), checkpoint)
    torch.save(checkpoint, tmp_path / 'saved.pth')
    resumed = in_training(aligning)
    resumed._resume = True
    again.after_load_checkpoint(resumed, load_checkpoint(tmp_path / 'saved.pth'))
    fresh.after_load_checkpoint(in_training(aligning), load_checkpoint(tmp_path / 'saved.pth'))  # only loaded from
    flat = [[0.04, 0.04]] * 10  # low, but no longer falling
    assert not feed(again, aligning, flat, start=30)
    assert feed(fresh, aligning, flat, start=30)


def test_dead_loss_counts_blocks_of_hybrids_as_the_network_does(pretrained):
    model = MODELS.build(dict(type='adala_mm.AttentionAlignment', backbone=tiny_vit(
        attention=[dict(type='adala_mm.SoftmaxAttention'), LINEAR], init_cfg=pretrained)))
    said = feed(DeadLossHook(patience=5), model, [[0.5]] * 5)
    assert '1 of 1 blocks' in said[0] and 'block 1 (' in said[0]


def test_dead_loss_is_for_stage_1(sharp_pretrained):
    assert not feed(DeadLossHook(patience=1), stage(2, sharp_pretrained), [[1.0]] * 3)
