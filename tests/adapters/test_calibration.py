"""Calibration: its solution against NumPy's least squares, blocks against autograd, and runs over their whole life."""
from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import nn

from adala_mm import align, calibrate, linearize
from adala_mm.adapters import find_vit
from adala_mm.adapters.base import OUTPUTS, find_part
from adala_mm.calibration import Calibration
from adala_mm.models.attentions import Attention, MonarchAttention
from adala_mm.registry import MODELS
from adala_mm.utils.checkpoint import load_checkpoint
from adala_mm.utils.records import read_scalars
from adala_mm.utils.ridge_regression import NormalEquations
from helpers.align_runs import Interrupted, equal, shuffled
from helpers.processes import fresh_process
from helpers.resuming import config
from helpers.saboteur import Killed
from helpers.vits import Exact, batches, build, every_family, run, timm_vit

HIDDEN = ('mlp.fc2', 'mlp.weights_out', 'mlp.down_proj', 'output.dense', 'ffn.layers.1')


def rows(count: int = 60, inputs: int = 5, outputs: int = 3) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(1)
    return (torch.randn(count, inputs, generator=draw), torch.randn(count, outputs, generator=draw),
            torch.rand(count, generator=draw) + 0.5, torch.tensor([0.7, -2.0, 0.05])[:outputs])


@pytest.mark.parametrize('bias', [True, False])
def test_solution_is_that_of_least_squares(bias):
    """Ridge regression towards 0 is least squares with rows ``sqrt(mu) I`` more; each output has its own scale."""
    f, r, w, s = rows()
    sums = NormalEquations(5, 3, bias)
    sums.add(f, r, w)
    found = sums.solve(0.1, s).numpy()
    f, r, w, s = (x.double().numpy() for x in (f, r, w, s))
    f = np.column_stack([f, np.ones(len(f))]) if bias else f
    mu = 0.1 * np.mean([(w * column ** 2).sum() for column in f.T]) * np.mean(s ** 2)
    for i in range(3):
        system = np.vstack([np.sqrt(w)[:, None] * s[i] * f, np.sqrt(mu) * np.eye(f.shape[1])])
        wanted, *_ = np.linalg.lstsq(system, np.concatenate([np.sqrt(w) * r[:, i], np.zeros(f.shape[1])]), rcond=None)
        np.testing.assert_allclose(found[:, i], wanted, rtol=1e-9, atol=1e-12)


def test_parts_are_as_good_as_the_whole(monkeypatch):
    f, r, w, s = rows()
    whole, parts = NormalEquations(5, 3), NormalEquations(5, 3)
    whole.add(f, r, w)
    for part in zip(f.split(7), r.split(7), w.split(7), strict=True):
        parts.add(*part)
    torch.testing.assert_close(parts.solve(1e-2, s), whole.solve(1e-2, s), rtol=1e-12, atol=0)
    monkeypatch.setattr('adala_mm.utils.ridge_regression.ROWS', 7)
    images = NormalEquations(5, 3)
    images.add(f.view(4, 15, 5), r.view(4, 15, 3), w.view(4, 15))
    torch.testing.assert_close(images.gram, whole.gram, rtol=1e-12, atol=0)


def test_what_is_ill_conditioned_does_not_explode():
    """Features that say the same, or hardly anything, and an output that the stream does not hear."""
    f, r, *_ = rows()
    f = torch.cat([f, f[:, :1], 1e-9 * f[:, 1:2], torch.zeros(60, 1)], dim=1)
    sums = NormalEquations(8, 3)
    sums.add(f, r)
    change = sums.solve(1e-3, torch.tensor([1.0, 1e-12, 0.0]))
    assert change.abs().max() < 2 and change[:, 1].abs().max() < 1e-8 and not change[:, 2].any()
    assert not change[7].any() and torch.allclose(change[0], change[5])
    for nothing in (sums.solve(1e-3, torch.zeros(3)), NormalEquations(8, 3).solve(1e-3)):
        assert not nothing.any()
    sums.add(torch.full((1, 8), torch.nan), r[:1])
    with pytest.raises(FloatingPointError, match='not finite'):
        sums.solve(1e-3)


def parts_of(model: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The first block, its output projection and the second matrix of its MLP."""
    vit, family = find_vit(model)
    return family.blocks_of(vit)[0], find_part(family.attentions_of(vit)[0], OUTPUTS), find_part(
        family.blocks_of(vit)[0], HIDDEN)


def stream(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What the first block gives, differentiable."""
    found = []
    handle = parts_of(model)[0].register_forward_hook(lambda block, args, output: found.append(output))
    run(model, images)
    handle.remove()
    return found[0][0] if isinstance(found[0], tuple) else found[0]


def gradient(model: nn.Module, teacher: nn.Module, layer: nn.Linear) -> torch.Tensor:
    """Of the squared distance between the streams behind the first block."""
    error = sum((stream(model, images) - stream(teacher, images).detach()).square().sum() for images in DOUBLE)
    return torch.cat([part.flatten() for part in torch.autograd.grad(error, list(layer.parameters()))])


DOUBLE = [images.double() for images in batches(3)]


@every_family
def test_the_first_block_is_at_its_optimum(family):
    """With hardly a ridge, no step on the projection brings the stream nearer to the teacher's, LayerScale or not."""
    torch.manual_seed(0)
    teacher = build(family).double()
    for part in parts_of(teacher)[2].parameters():
        nn.init.zeros_(part)  # the block then ends with the stream behind its attention
    student = linearize(teacher, 'linear')
    before = copy.deepcopy(student)
    history = calibrate(student, teacher, DOUBLE, epochs=1, ridge=1e-9)
    assert [line['block'] for line in history] == [1, 2, 3] and history[0]['rel_error'] < history[0]['rel_error_before']
    old, new = (gradient(model, teacher, parts_of(model)[1]).norm() for model in (before, student))
    assert new < 1e-4 * old
    # Nothing but that has changed.
    others = before.state_dict()
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, others[name])}
    assert len(changed) == 3 * len(list(parts_of(student)[1].parameters())) and all(
        any(f'.{path}.' in name for path in OUTPUTS) for name in changed)


@every_family
def test_the_mlp_of_the_first_block_is_at_its_optimum(family):
    torch.manual_seed(0)
    teacher = build(family).double()
    student = linearize(teacher, 'linear')
    calibrate(half := copy.deepcopy(student), teacher, DOUBLE, epochs=1, ridge=1e-9)
    history = calibrate(student, teacher, DOUBLE, epochs=1, ridge=1e-9, mlp=True)
    assert history[0]['rel_error'] < history[0]['rel_error_before']
    old, new = (gradient(model, teacher, parts_of(model)[2]).norm() for model in (half, student))
    assert new < 1e-4 * old


def test_what_a_projection_can_undo_is_undone():
    """Block after block, and on images that the student has not been calibrated on."""
    teacher = build('adala')
    student = linearize(teacher, Exact)
    with torch.no_grad():
        for block in student.blocks:
            for part in block.attn.qkv.parameters():
                part[64:] *= 0.5  # values
    before, unseen = copy.deepcopy(student), torch.randn(4, 3, 32, 32)
    history = calibrate(student, teacher, batches(8, (4, 3, 32, 32)), epochs=1, ridge=1e-6)
    assert all(line['rel_error'] < 1e-3 * line['rel_error_before'] for line in history)
    with torch.no_grad():
        wanted, old, new = (run(model, unseen) for model in (teacher, before, student))
    assert (new - wanted).norm() < 1e-3 * (old - wanted).norm()
    torch.testing.assert_close(student.blocks[2].attn.proj.weight, 2 * before.blocks[2].attn.proj.weight,
                               rtol=0.01, atol=1e-3)


def test_where_nothing_differs_nothing_changes():
    teacher = build('adala')
    student = linearize(teacher, Exact)
    before = copy.deepcopy(student)
    assert calibrate(student, teacher, batches(), epochs=1, mlp=True)[-1] == dict(
        block=3, rel_error=0.0, rel_error_before=0.0)
    assert equal(student, before)
    hybrid = linearize(teacher, keep_softmax=[0])  # its first block is the teacher's
    before = copy.deepcopy(hybrid)
    calibrate(hybrid, teacher, batches(), epochs=1, mlp=True)
    assert equal(hybrid.blocks[0], before.blocks[0]) and not equal(hybrid.blocks[1], before.blocks[1])
    assert not equal(hybrid.blocks[1].mlp, before.blocks[1].mlp)


def test_some_patches_stand_for_all(monkeypatch):
    """And class and register tokens always count."""
    teacher, seen = build('dinov2_reg4'), []
    monkeypatch.setattr(NormalEquations, 'add', lambda self, f, r, w: seen.append((f, w)))
    calibrate(linearize(teacher), teacher, batches(), epochs=1, patches=4)
    assert {(tuple(f.shape), tuple(w.shape)) for f, w in seen} == {((2, 9, 32), (2, 9))}
    for _, weights in seen:
        assert weights[0].tolist() == [1.0] * 5 + [4.0] * 4  # 16 patches
    assert not torch.equal(seen[0][0], seen[1][0])
    seen.clear()
    calibrate(linearize(teacher), teacher, batches(), epochs=1, patches=100)
    assert {tuple(f.shape) for f, _ in seen} == {(2, 21, 32)}


def test_modes_and_flags_are_put_back_and_half_precision_will_do():
    teacher = build('augreg')
    student = linearize(teacher).train()
    student.norm.requires_grad_(False)
    hooks = dict(student.blocks[0]._forward_pre_hooks)
    history = calibrate(student, teacher, batches(), steps=3, bf16=True, mlp=True)
    assert history[0]['rel_error'] < history[0]['rel_error_before']
    assert student.training and not teacher.training and all(p.requires_grad for p in teacher.parameters())
    assert not any(p.requires_grad for p in student.norm.parameters())
    assert student.blocks[0].mlp.fc2.weight.requires_grad
    assert dict(student.blocks[0]._forward_pre_hooks) == hooks
    half = [model.to(torch.bfloat16) for model in (teacher, student)]
    calibrate(half[1], half[0], batches(), epochs=1)
    assert student.blocks[0].attn.proj.weight.dtype == torch.bfloat16


def test_compiled_blocks_are_seen():
    """A compiled block calls no hook that was not there when it was compiled."""
    teacher = build('adala')
    student = linearize(teacher)
    plain = copy.deepcopy(student)
    wanted = calibrate(plain, teacher, batches(), epochs=1)
    for model in (student, teacher):
        for block in model.blocks:
            block.compile(backend='eager')
        run(model, batches()[0])
    assert calibrate(student, teacher, batches(), epochs=1) == wanted and equal(student, plain)


@pytest.mark.parametrize('stop', [1, 2])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(stop, tmp_path, caplog):
    caplog.set_level(logging.INFO, 'adala_mm')
    teacher, path = build('augreg'), tmp_path / 'run.pt'
    start, options = linearize(teacher), dict(steps=3, mlp=True, patches=9, checkpoint=path)

    def go(model: nn.Module, seed: int, **more):
        torch.manual_seed(seed)
        return calibrate(model, teacher, shuffled(), **options, **more)

    whole = copy.deepcopy(start)
    wanted = go(whole, 1)
    path.unlink()

    def interrupt(model):
        raise Interrupted

    with pytest.raises(Interrupted):
        go(copy.deepcopy(start), 1, validate=interrupt, val_interval=stop + 1)
    assert load_checkpoint(path)['block'] == stop
    resumed = linearize(teacher)
    assert go(resumed, 2, resume=True) == wanted and equal(resumed, whole)
    assert any(f'goes on after block {stop}/3' in message for message in caplog.messages)
    assert go(copy.deepcopy(start), 3, resume=True) == wanted  # it is done already
    assert sorted(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r'is of another run, with ridge=1\.0, not 2\.0'):
        go(start, 1, ridge=2.0, resume=True)


def test_the_stage_of_align(caplog):
    caplog.set_level(logging.INFO, 'adala_mm')
    teacher = build('augreg')
    one, two = linearize(teacher), linearize(teacher)
    wanted = calibrate(one, teacher, batches(), epochs=1)
    found = align(two, teacher, batches(), stage='calibrate', epochs=1, val_interval=2,
                  validate=lambda model: {'accuracy': 0.5})
    assert equal(one, two) and [line for line in found if 'accuracy' not in line] == wanted
    assert [line for line in found if 'accuracy' in line] == [dict(block=2, accuracy=0.5), dict(block=3, accuracy=0.5)]
    assert any('block 3/3  rel_error' in message and 'ETA 00:00:00' in message for message in caplog.messages)


class Gated(MonarchAttention):
    """A layer that reads its projection's weight, but does not call it."""

    def forward(self, x, hw, num_prefix):
        return nn.functional.linear(self.attend(x, hw, num_prefix), self.proj.weight)


def test_what_has_no_closed_form_is_refused():
    teacher, data = build('augreg'), batches()
    for options, message in ((dict(ridge=0.0), r'ridge=0\.0 must be above 0'), (dict(patches=0), 'patches=0'),
                             (dict(epochs=2, steps=2), 'either steps')):
        with pytest.raises(ValueError, match=message):
            calibrate(linearize(teacher), teacher, data, **dict(epochs=1) | options)
    with pytest.raises(ValueError, match="lr=1.0: stage='calibrate' takes no gradient steps"):
        align(linearize(teacher), teacher, data, stage='calibrate', epochs=1, lr=1.0)
    for attention, message in (('lolcats', r'lora\.a\.o comes after it.*merge_lora'), ('vicinity', 'se.* comes after'),
                               (Gated, 'block 0 does not call its output projection')):
        student = linearize(build('adala') if attention is Gated else teacher, attention)
        before = copy.deepcopy(student)
        with pytest.raises(TypeError, match=message):
            calibrate(student, build('adala') if attention is Gated else teacher, data, epochs=1)
        assert equal(student, before)
    from timm.models.vision_transformer import ResPostBlock
    other = timm_vit(block_fn=ResPostBlock)
    with pytest.raises(TypeError, match=r'ResPostBlock is none whose stream is known.*Block, EvaBlock'):
        calibrate(linearize(other), other, data, epochs=1)
    student = linearize(teacher)
    student.blocks[1].mlp.fc2 = nn.Sequential(student.blocks[1].mlp.fc2)
    with pytest.raises(TypeError, match='Sequential stands where Block has nn.Linear'):
        calibrate(student, teacher, data, epochs=1)
    with pytest.raises(FloatingPointError, match='block 0: the stream of student or teacher is not finite'):
        calibrate(linearize(teacher), teacher, [data[0] * torch.nan], epochs=1)


def test_lora_can_be_merged_first():
    teacher = build('augreg')
    student = linearize(teacher, 'lolcats')
    for module in student.modules():
        if isinstance(module, Attention):
            module.merge_lora()
    history = calibrate(student, teacher, batches(), epochs=1)
    assert history[0]['rel_error'] < history[0]['rel_error_before']


def loop_config(scenes, init_cfg: dict, **settings) -> Config:
    """Stage 2 of the demo on a tiny ViT, its training replaced by calibration."""
    cfg = config('stage2', scenes, init_cfg, by_epoch=False)
    cfg.train_cfg = dict(type='adala_mm.CalibrationLoop', max_iters=2, val_interval=1, images=7, mlp=True, ridge=0.1,
                         patches=9) | settings
    cfg.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.0))
    cfg.param_scheduler = None
    cfg.default_hooks.checkpoint.interval = cfg.default_hooks.logger.interval = 1
    return cfg


def train(cfg: Config, work_dir, resume: bool = False) -> Runner:
    with fresh_process():
        cfg = cfg.copy()
        cfg.work_dir, cfg.resume, cfg.experiment_name = str(work_dir), resume, f'{work_dir.parent.name}{work_dir.name}'
        init_default_scope(cfg.default_scope)
        runner = Runner.from_cfg(cfg)
        runner.train()
    return runner


@pytest.fixture
def whole(scenes, sharp_pretrained, tmp_path, monkeypatch) -> SimpleNamespace:
    """An uninterrupted run, and the images that it has read."""
    images, read = [], Calibration.read
    monkeypatch.setattr(Calibration, 'read', lambda self, batch, begin: (
        images.append(batch), read(self, batch, begin)))
    cfg = loop_config(scenes, sharp_pretrained)
    return SimpleNamespace(cfg=cfg, images=images, work_dir=tmp_path / 'run', runner=train(cfg, tmp_path / 'run'))


def built(cfg: Config, model: dict) -> nn.Module:
    with fresh_process():
        init_default_scope(cfg.default_scope)
        network = MODELS.build(model)
        network.init_weights()
    return network


def test_loop_does_what_calibrate_does(whole, scenes, sharp_pretrained):
    """And writes what stage 2 starts from."""
    cfg, model, saved = whole.cfg, whole.runner.model, load_checkpoint(whole.work_dir / 'iter_2.pth')
    assert [len(batch) for batch in whole.images] == [2] * 4  # 7 images in whole batches
    student = built(cfg, cfg.model.backbone)
    figures = calibrate(student, model.frozen['teacher'], whole.images, epochs=1, mlp=True, ridge=0.1, patches=9)
    assert equal(student, model.backbone)
    curves = read_scalars(whole.work_dir)
    steps = [row for row in curves if 'loss' in row]
    assert [{key: row[key] for key in ('rel_error', 'rel_error_before')} for row in steps] == [
        {key: pytest.approx(row[key]) for key in ('rel_error', 'rel_error_before')} for row in figures]
    assert [row['step'] for row in curves if 'align/rel_error' in row] == [0, 1, 2]
    assert saved['meta']['iter'] == 2 and (whole.work_dir / 'iter_1.pth').is_file()
    stage2 = config('stage2', scenes, sharp_pretrained, by_epoch=False)
    stage2.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(whole.work_dir / 'iter_2.pth'))
    assert equal(built(stage2, stage2.model).backbone, model.backbone)


def test_loop_resumes(whole, tmp_path):
    cfg = whole.cfg.copy()
    cfg.custom_hooks = [*cfg.custom_hooks, dict(type='Saboteur', what='raise', when='step', at=0)]
    first, whole.images[:] = list(whole.images), []
    with pytest.raises(Killed):
        train(cfg, tmp_path / 'pieces')
    assert not (tmp_path / 'pieces/iter_2.pth').exists()
    whole.images.clear()
    resumed = train(whole.cfg, tmp_path / 'pieces', resume=True)
    assert all(map(torch.equal, whole.images, first)) and len(whole.images) == len(first)
    assert equal(resumed.model, whole.runner.model)
    whole.images.clear()
    done = train(whole.cfg, tmp_path / 'pieces', resume=True)  # nothing is left to do
    assert equal(done.model, whole.runner.model) and not whole.images


def test_loop_refuses(scenes, sharp_pretrained, tmp_path):
    for settings, message in ((dict(max_iters=3), 'max_iters=3 must not be above the 2 blocks'),
                              (dict(images=0), 'images=0 not below 1'), (dict(ridge=-1.0), 'ridge=-1.0')):
        with pytest.raises(ValueError, match=message):
            train(loop_config(scenes, sharp_pretrained, **settings), tmp_path / 'run')
    cfg = loop_config(scenes, sharp_pretrained)
    cfg.model.type = 'adala_mm.AttentionAlignment'
    cfg.model.pop('teacher')
    with pytest.raises(ValueError, match='CalibrationLoop needs the student and teacher of FeatureAlignment'):
        train(cfg, tmp_path / 'run')
