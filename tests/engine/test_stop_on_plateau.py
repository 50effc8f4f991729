"""Stage 2 ends when held-out scores stop improving, keeps its best weights, and a resumed run ends where it should."""
from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmpretrain.structures import DataSample
from PIL import Image
from torch.utils.data import Dataset

from adala_mm.engine import StopOnPlateauHook
from adala_mm.engine.stop_on_plateau import STATE
from adala_mm.evaluation import AlignmentMetric, KNNMetric
from adala_mm.registry import METRICS, MODELS
from adala_mm.utils.checkpoint import load_checkpoint
from helpers import LINEAR, ROOT, tiny_vit
from helpers.processes import put_back

ERROR = {'align/rel_error': 'less'}
PROBE = {'knn/agreement': 'greater'}
NUMBER = itertools.count()


@pytest.fixture(autouse=True)
def own_instances(monkeypatch):
    put_back(monkeypatch)
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)  # two after every epoch


def stand_in(iteration: int = 0) -> SimpleNamespace:
    lines: list[str] = []
    return SimpleNamespace(iter=iteration, val_loop=object(), train_loop=SimpleNamespace(stop_training=False),
                           message_hub=MessageHub(f'hub_{next(NUMBER)}'), lines=lines,
                           logger=SimpleNamespace(info=lines.append))


def stops_at(hook: StopOnPlateauHook, *scores: tuple[float, ...]) -> int | None:
    """Number of the validation, from 1, at which the run ends; ``scores`` are those of each validation."""
    runner = stand_in()
    for i, values in enumerate(scores, 1):
        runner.iter = 10 * i
        hook.after_val_epoch(runner, dict(zip(hook.monitor, values, strict=True), other=0.0))
        if runner.train_loop.stop_training:
            return i
    return None


@pytest.mark.parametrize(('options', 'errors', 'end'), [
    (dict(patience=2), [.5, .4, .4, .4, .1], 4),  # as good is not better
    (dict(patience=2), [.5, .6, .4, .45, .39, .38], None),  # never two in a row
    (dict(patience=1), [.5, .6], 2),
    (dict(patience=3), [.5, .6, .7], None),
    (dict(patience=2, min_delta=.1), [1., .95, .91, .5], 3),  # 9 percent in two validations, measured from the best
    (dict(patience=2, min_delta=.1), [1., .95, .89, .85, .79], None),
    (dict(patience=2), [0., 0., 0.], 3),
    (dict(patience=5), [.5, math.nan], 2),
    (dict(patience=5), [math.inf], 1),
], ids=str)
def test_one_score(options, errors, end):
    assert stops_at(StopOnPlateauHook(ERROR, **options), *((error,) for error in errors)) == end
    # The same of a score that is better when it is greater; the sign turns nothing else.
    mirrored = [(-error,) for error in errors]
    assert stops_at(StopOnPlateauHook({'probe': 'greater'}, **options), *mirrored) == end


@pytest.mark.parametrize(('scores', 'end'), [
    ([(.5, 50), (.6, 40), (.7, 30)], 3),  # neither
    ([(.5, 50), (.4, 40), (.6, 51), (.3, 40)], None),  # one or the other, always
    ([(.5, 50), (.6, 51), (.55, 50), (.51, 51)], 4),  # each has a best of its own, from before the last validation
    ([(.5, 50), (.4, math.nan)], 2),
], ids=str)
def test_several_scores_end_a_run_only_together(scores, end):
    assert stops_at(StopOnPlateauHook(ERROR | PROBE, patience=2), *scores) == end


def test_message_says_what_has_not_improved():
    hook, runner = StopOnPlateauHook(ERROR | PROBE, patience=1), stand_in()
    hook.after_val_epoch(runner, {'align/rel_error': .5, 'knn/agreement': 71.})
    assert not runner.lines
    runner.iter = 1
    hook.after_val_epoch(runner, {'align/rel_error': .6, 'knn/agreement': 70.})
    assert runner.lines == ['Early stopping: no better score in 1 validation(s) than align/rel_error = 0.5, '
                            'knn/agreement = 71']


def test_a_validation_that_is_repeated_counts_once():
    hook, runner = StopOnPlateauHook(ERROR, patience=2), stand_in()
    for iteration, error in ((1, .5), (2, .6), (2, .6), (2, .6)):
        runner.iter = iteration
        hook.after_val_epoch(runner, {'align/rel_error': error})
    assert not runner.train_loop.stop_training
    assert runner.message_hub.get_info(STATE) == dict(best={'align/rel_error': .5}, waited=1, iter=2)


@pytest.mark.parametrize(('arguments', 'message'), [
    (('align/rel_error',), "monitor='align/rel_error' must be a dict of scores"),
    (({},), 'must be a dict of scores'),
    (({'align/rel_error': 'lower'},), "the other rule is 'greater'"),
    ((ERROR, 0), 'patience=0 must be at least 1'),
    ((ERROR, 1, -.1), 'min_delta=-0.1 at least 0'),
])
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        StopOnPlateauHook(*arguments)


def test_a_score_that_validation_does_not_report_is_named():
    with pytest.raises(ValueError, match='monitors knn/agreement, which validation does not report; it reports: align'):
        StopOnPlateauHook(ERROR | PROBE).after_val_epoch(stand_in(), {'align/rel_error': .5})


def test_a_run_without_validation_is_refused():
    runner = stand_in()
    runner.val_loop = None
    with pytest.raises(ValueError, match='needs val_dataloader, val_evaluator and val_cfg'):
        StopOnPlateauHook(ERROR).before_train(runner)


class Numbers(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        return dict(inputs=torch.full((2,), float(index)), data_samples=index)


class Line(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        out = self.layer(torch.stack(inputs) if isinstance(inputs, list) else inputs)
        return dict(loss=out.square().mean()) if mode == 'loss' else list(out)


class Scripted(BaseMetric):
    """Reports the error that is foreseen for the iteration at which the run is."""

    runner: Runner

    def process(self, data_batch, data_samples) -> None:
        self.results.append(0)

    def compute_metrics(self, results) -> dict:
        return {'align/rel_error': ERRORS[self.runner.iter]}


class Watch(Hook):
    """Counts training steps; kills the run before one of them, or in the middle of a validation."""

    def __init__(self, before_iter: int | None = None, in_validation_of: int | None = None) -> None:
        self.before_iter, self.in_validation_of, self.steps = before_iter, in_validation_of, []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.before_iter:
            raise KeyboardInterrupt
        self.steps.append(runner.iter)

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.in_validation_of:
            raise KeyboardInterrupt


# Validated after every second step, which is an epoch of two batches. The best is that of step 6, the end at step 12.
ERRORS = dict(zip(range(2, 30, 2), [.9, .7, .5, .6, .55, .52, .1, .1, .1, .1, .1, .1, .1, .1], strict=True))


def run(folder: Path, watch: Watch, by_epoch: bool, interval: int = 1, resume: bool = False) -> Runner:
    loop = dict(by_epoch=True, max_epochs=14) if by_epoch else dict(
        type='IterBasedTrainLoop', max_iters=28, val_interval=2)
    script = Scripted()
    script.runner = runner = Runner(
        Line(), str(folder), train_dataloader=dict(
            batch_size=2, dataset=Numbers(), sampler=dict(type='DefaultSampler', shuffle=True)),
        train_cfg=loop, optim_wrapper=dict(optimizer=dict(type='SGD', lr=.01)),
        val_dataloader=dict(batch_size=2, dataset=Numbers(), sampler=dict(type='DefaultSampler', shuffle=False)),
        val_cfg={}, val_evaluator=[script], resume=resume, default_scope='mmengine',
        experiment_name=f'early_stopping_{next(NUMBER)}', randomness=dict(seed=0),
        default_hooks=dict(checkpoint=dict(
            type='CheckpointHook', by_epoch=by_epoch, interval=interval if by_epoch else 2 * interval,
            save_best='align/rel_error', rule='less')),
        custom_hooks=[dict(type='adala_mm.StopOnPlateauHook', monitor=ERROR, patience=3),
                      dict(type='adala_mm.ExactResumeHook'), watch])
    return runner


def best(folder: Path) -> list[str]:
    return [path.name for path in folder.glob('best_*.pth')]


@pytest.fixture(scope='module', params=[True, False], ids=['by_epoch', 'by_iteration'])
def by_epoch(request) -> bool:
    return request.param


# Where the run is killed, and how many validations are between two of its checkpoints.
@pytest.mark.parametrize(('kill', 'interval'), [
    (dict(before_iter=3), 1), (dict(before_iter=8), 2), (dict(before_iter=11), 1), (dict(in_validation_of=6), 1),
    (dict(in_validation_of=10), 2), (dict(in_validation_of=12), 1), (dict(in_validation_of=12), 2)], ids=str)
def test_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, by_epoch, kill, interval):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Watch(**kill), by_epoch, interval).train()
    again = Watch()
    run(tmp_path, again, by_epoch, interval, resume=True).train()
    assert again.steps[-1:] == [11] or kill == dict(in_validation_of=12)
    assert best(tmp_path) == ['best_align_rel_error_epoch_3.pth' if by_epoch else 'best_align_rel_error_iter_6.pth']
    end = Watch()
    run(tmp_path, end, by_epoch, interval, resume=True).train()  # has ended, and knows it
    last = max(load_checkpoint(path)['meta']['iter'] for path in tmp_path.glob('*_*.pth'))
    assert end.steps == list(range(last, 12))


def test_best_weights_are_those_of_the_best_step(tmp_path, by_epoch):
    watch = Watch()
    runner = run(tmp_path, watch, by_epoch)
    runner.train()
    assert watch.steps == list(range(12))
    (name,) = best(tmp_path)
    kept, then = (load_checkpoint(tmp_path / file)['state_dict'] for file in (
        name, 'epoch_3.pth' if by_epoch else 'iter_6.pth'))
    for key, value in runner.model.state_dict().items():
        assert torch.equal(kept[key], then[key]) and not torch.equal(kept[key], value)


def test_recipe_stops_and_keeps_the_best(tmp_path, sharp_pretrained):
    """The recipe of DINOv2 on a tiny ViT that does not learn: its first validation is never beaten."""
    cfg = Config.fromfile(ROOT / 'configs/adala/stage2_dinov2l_earlystop_in22k.py')
    assert cfg.custom_hooks == [dict(type='adala_mm.StopOnPlateauHook', monitor=ERROR, patience=3)]
    for folder, count in (('imagenet22k/n1', 4), ('imagenet/val/n2', 3)):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng([count, i]).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f'{i}.JPEG')
    cfg.model.backbone = tiny_vit(attention=LINEAR, init_cfg=sharp_pretrained)
    cfg.model.teacher = tiny_vit(init_cfg=sharp_pretrained)
    for loader, prefix in ((cfg.train_dataloader, 'imagenet22k'), (cfg.val_dataloader, 'imagenet')):
        loader.update(num_workers=0, persistent_workers=False, batch_size=2)
        assert loader.dataset.data_root == f'data/{prefix}'
        loader.dataset.data_root = str(tmp_path / prefix)
    cfg.train_dataloader.dataset.pipeline[1].scale = 32
    cfg.val_dataloader.dataset.pipeline[1].scale = cfg.val_dataloader.dataset.pipeline[2].crop_size = 32
    cfg.optim_wrapper.optimizer.lr = 0.0
    cfg.val_evaluator = [cfg.val_evaluator, dict(type='adala_mm.KNNMetric', k=2)]  # as docs/training.md shows
    cfg.custom_hooks[0].monitor.update(PROBE)
    cfg.work_dir, cfg.experiment_name = str(tmp_path / 'run'), f'early_stopping_{next(NUMBER)}'
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.epoch == 1 + 3  # of at most 30
    (name,) = best(tmp_path / 'run')
    assert name == 'best_align_rel_error_epoch_1.pth'
    state = runner.message_hub.get_info(STATE)
    assert 0 < state['best']['align/rel_error'] < 2 and 0 <= state['best']['knn/agreement'] <= 100
    student = MODELS.build(tiny_vit(attention=LINEAR, init_cfg=dict(
        type='Pretrained', checkpoint=str(tmp_path / 'run' / name))))
    student.init_weights()  # what stage 3 does


def scored(students: torch.Tensor, teachers: torch.Tensor, labels: list[int] | None, k: int) -> dict:
    metric = KNNMetric(k=k)
    for i, pair in enumerate(zip(students, teachers, strict=True)):
        sample = DataSample() if labels is None else DataSample().set_gt_label(labels[i])
        metric.process(dict(data_samples=[sample]), [dict(pooled=pair, error=0.)])
    return metric.evaluate(len(students))


@pytest.mark.parametrize('rows', [3, 1024])
def test_knn_equals_a_plain_count(rows, monkeypatch):
    monkeypatch.setattr('adala_mm.evaluation.knn.ROWS', rows)
    n, k = 11, 3
    students, teachers = torch.randn(2, n, 5).double()
    teachers[:6] = 3 * students[:6]  # only directions count
    labels = [0, 1, 2] * 3 + [0, 1]

    def nearest(features, i):
        cosine = {j: float(torch.cosine_similarity(features[i], features[j], dim=0)) for j in range(n) if j != i}
        return sorted(cosine, key=cosine.get, reverse=True)[:k]

    def right(features):
        count = 0
        for i in range(n):
            votes = [labels[j] for j in nearest(features, i)]
            count += max(votes, key=votes.count) == labels[i]  # max takes the first of equals
        return 100 * count / n

    shared = sum(len(set(nearest(students, i)) & set(nearest(teachers, i))) for i in range(n)) / (n * k)
    got = scored(students, teachers, labels, k)
    assert got == pytest.approx({'knn/agreement': 100 * shared, 'knn/accuracy': right(students),
                                 'knn/teacher_accuracy': right(teachers)})
    assert 0 < shared < 1
    assert scored(students, teachers, None, k) == pytest.approx({'knn/agreement': 100 * shared})
    assert scored(students, students, None, k) == {'knn/agreement': 100}


def test_knn_of_too_few_images_is_refused():
    with pytest.raises(ValueError, match=r'KNNMetric\(k=4\) needs more than 4 images, got 4'):
        scored(torch.randn(4, 2), torch.randn(4, 2), None, k=4)


def test_knn_of_a_model_without_a_teacher_is_refused():
    with pytest.raises(ValueError, match='which AttentionAlignment and FeatureAlignment have'):
        KNNMetric().process(dict(data_samples=[DataSample()]), [dict(pred_label=3)])


@pytest.mark.parametrize('vit', [dict(), dict(class_token=False)], ids=['class_token', 'patches'])
def test_what_metrics_read_of_a_model(vit, sharp_pretrained):
    model = MODELS.build(dict(type='adala_mm.FeatureAlignment', backbone=tiny_vit(attention=LINEAR, **vit),
                              teacher=tiny_vit(**vit))).eval()
    model.teacher_ready = True
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        samples = model(images, mode='predict')
        tokens = model.backbone.forward_features(images), model.teacher_features(images)
    for i, sample in enumerate(samples):
        for got, feature in zip(sample['pooled'], tokens, strict=True):
            wanted = feature[i, 0] if vit == {} else feature[i].mean(dim=0)
            torch.testing.assert_close(got, wanted)
    metric = METRICS.build(dict(type='AlignmentMetric'))
    assert isinstance(metric, AlignmentMetric)
    metric.process({}, samples)
    assert all(set(result) == {'error', 'energy', 'cosine'} for result in metric.results)  # no features are collected


def test_hook_is_found_by_its_prefix():
    assert isinstance(HOOKS.build(dict(type='adala_mm.StopOnPlateauHook', monitor=ERROR)), StopOnPlateauHook)
