"""A killed and resumed run computes what an uninterrupted one computes: every weight, to the last bit."""
from __future__ import annotations

import errno
import json
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dist import all_gather_object
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper
from mmengine.registry import DATA_SAMPLERS
from mmengine.runner import Runner
from torch.utils.data import BatchSampler

from adala_mm.datasets import LoadImageFromFile
from adala_mm.engine import PreemptionHook
from adala_mm.engine.exact_resume import newest_checkpoint, standing_of
from adala_mm.utils import torch_files
from adala_mm.utils.atomic import write_atomically
from adala_mm.utils.checkpoint import load_checkpoint
from adala_mm.utils.randomness import seed_all
from adala_mm.utils.records import curve
from helpers import IMAGES
from helpers.processes import exit_codes
from helpers.resuming import (
    BATCH,
    CELLS,
    STEPS,
    assert_same_end,
    assert_same_run,
    config,
    diary,
    last,
    strike_and_resume,
    train,
    with_features,
)
from helpers.saboteur import Killed


def kill(cfg: Config, work_dir: Path, at: int, when: str = 'step') -> None:
    with pytest.raises(Killed):
        train(cfg, work_dir, harm=dict(what='raise', when=when, at=at))


LOOPS = pytest.mark.parametrize('by_epoch', [False, True], ids=['iterations', 'epochs'])


@pytest.fixture(scope='module')
def whole_runs(tmp_path_factory):
    """Uninterrupted runs by config, each made once."""
    runs: dict[tuple, Path] = {}

    def run(cfg: Config, *key) -> Path:
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp('whole') / 'run'
            train(cfg, runs[key])
        return runs[key]
    return run


@pytest.mark.parametrize(('name', 'by_epoch', 'last_step'), [
    ('stage1', False, 2), ('stage1', False, 4), ('stage1', True, 13), ('stage2', False, 13), ('stage2', True, 4),
    ('stage2', True, 7)])
def test_killed_and_resumed(scenes, sharp_pretrained, tmp_path, whole_runs, name, by_epoch, last_step):
    cfg = config(name, scenes, sharp_pretrained, by_epoch)
    whole = whole_runs(cfg, name, by_epoch)
    kill(cfg, tmp_path / 'run', at=last_step)
    train(cfg, tmp_path / 'run', resume=True)
    assert_same_run(whole, tmp_path / 'run', last(by_epoch))


@LOOPS
def test_terminated_in_the_middle_and_resumed(scenes, sharp_pretrained, tmp_path, whole_runs, by_epoch):
    """SIGTERM saves where the run is, inside an epoch too: no step is done twice, and none left out."""
    cfg = config('stage2', scenes, sharp_pretrained, by_epoch)
    whole, work_dir = whole_runs(cfg, 'stage2', by_epoch), tmp_path / 'run'
    with pytest.raises(SystemExit) as left:
        train(cfg, work_dir, harm=dict(what='terminate', when='step', at=6))
    assert left.value.code == 128 + signal.SIGTERM and (work_dir / 'preempted.pth').is_file()
    train(cfg, work_dir, resume=True)
    assert_same_run(whole, work_dir, last(by_epoch))
    assert len((work_dir / 'diary.jsonl').read_text().splitlines()) == STEPS
    assert not (work_dir / 'preempted.pth').exists()  # three newer ones are there


def one_in_validation(rank: int, place: Path) -> None:
    """Is told to stop in its own iteration of a validation whose every iteration needs all processes."""
    torch.distributed.init_process_group('gloo', f'file://{place}/meeting', rank=rank, world_size=2)
    saved = []
    runner = SimpleNamespace(work_dir=str(place), epoch=1, iter=5, hooks=[], logger=SimpleNamespace(warning=print),
                             save_checkpoint=lambda *args, meta, **kwargs: saved.append(meta['iter']))
    hook = PreemptionHook(interval=4)
    hook.before_train(runner)
    with pytest.raises(SystemExit) as left:
        for i in range(12):
            if i == (5, 9)[rank]:
                os.kill(os.getpid(), signal.SIGTERM)
            assert all_gather_object(i) == [i, i]
            hook.after_val_iter(runner, i)
    (place / f'{rank}.json').write_text(json.dumps([left.value.code, i, saved]))
    torch.distributed.destroy_process_group()


def test_processes_leave_a_validation_together(tmp_path):
    assert exit_codes(one_in_validation, tmp_path) == [0, 0]
    left = [json.loads((tmp_path / f'{rank}.json').read_text()) for rank in range(2)]
    assert left == [[128 + signal.SIGTERM, 7, [5]]] * 2


@LOOPS
def test_terminated_in_validation(scenes, sharp_pretrained, tmp_path, whole_runs, by_epoch):
    """A single process leaves at once."""
    cfg = config('stage2', scenes, sharp_pretrained, by_epoch)
    whole, work_dir = whole_runs(cfg, 'stage2', by_epoch), tmp_path / 'run'
    with pytest.raises(SystemExit):
        train(cfg, work_dir, harm=dict(what='terminate', when='validation', at=10))
    train(cfg, work_dir, resume=True)
    assert_same_run(whole, work_dir, last(by_epoch))
    assert len((work_dir / 'diary.jsonl').read_text().splitlines()) == STEPS


@LOOPS
def test_killed_in_validation(scenes, sharp_pretrained, tmp_path, whole_runs, by_epoch):
    """The checkpoint is older than the validation that follows it: a resumed run does that first."""
    cfg = config('stage2', scenes, sharp_pretrained, by_epoch)
    whole, work_dir = whole_runs(cfg, 'stage2', by_epoch), tmp_path / 'run'
    kill(cfg, work_dir, at=10, when='validation')
    train(cfg, work_dir, resume=True)
    assert_same_run(whole, work_dir, last(by_epoch))
    scores, wanted = (dict(zip(*curve(run, 'align/rel_error'), strict=True)) for run in (work_dir, whole))
    assert {10, 15} <= scores.keys() and scores.items() <= wanted.items()


@pytest.mark.parametrize(('by_epoch', 'what', 'when', 'at'), [
    (False, 'raise', 'step', 7), (True, 'raise', 'validation', 10), (False, 'terminate', 'validation', 10),
    (True, 'terminate', 'step', 6)])
def test_averaged_weights_resume(scenes, sharp_pretrained, tmp_path, whole_runs, by_epoch, what, when, at):
    """MMEngine's EMAHook swaps weights with their average to validate and to save: both go on as they were."""
    cfg = config('stage2', scenes, sharp_pretrained, by_epoch)
    plain = whole_runs(cfg, 'stage2', by_epoch)
    cfg.custom_hooks = [*cfg.custom_hooks, dict(type='EMAHook', momentum=0.2)]
    whole, work_dir = whole_runs(cfg, 'average', by_epoch), tmp_path / 'run'
    with pytest.raises((Killed, SystemExit)):
        train(cfg, work_dir, harm=dict(what=what, when=when, at=at))
    train(cfg, work_dir, resume=True)
    assert_same_run(whole, work_dir, last(by_epoch))
    ours, wanted = (load_checkpoint(run / last(by_epoch))['ema_state_dict'] for run in (work_dir, whole))
    assert all(torch.equal(value, ours[key]) for key, value in wanted.items())
    before, of_average = (dict(zip(*curve(run, 'align/rel_error'), strict=True)) for run in (plain, whole))
    assert of_average[0] == before[0] and of_average[10] != before[10]  # no step, nothing to average


@pytest.mark.parametrize(('by_epoch', 'what', 'when', 'at'), [
    (True, 'raise', 'step', 7), (True, 'raise', 'validation', 10), (True, 'terminate', 'validation', 5),
    (True, 'terminate', 'step', 6), (False, 'raise', 'step', 8), (False, 'terminate', 'validation', 10)])
def test_sums_of_gradients_go_on(scenes, sharp_pretrained, tmp_path, whole_runs, by_epoch, what, when, at):
    """Five iterations of an epoch, in updates of three: every checkpoint but the last falls between two of them."""
    cfg = config('stage2', scenes, sharp_pretrained, by_epoch)
    cfg.optim_wrapper.accumulative_counts = 3
    whole, work_dir = whole_runs(cfg, 'accumulated', by_epoch), tmp_path / 'run'
    with pytest.raises((Killed, SystemExit)):
        train(cfg, work_dir, harm=dict(what=what, when=when, at=at))
    saved = [load_checkpoint(path) for path in work_dir.glob('*.pth')]
    assert {checkpoint['meta']['iter'] % 3 for checkpoint in saved} - {0}
    for checkpoint in saved:
        assert checkpoint.get('pending_gradients', {}).get('steps', 0) == checkpoint['meta']['iter'] % 3
    train(cfg, work_dir, resume=True)
    assert_same_run(whole, work_dir, last(by_epoch))
    assert 'pending_gradients' not in load_checkpoint(work_dir / last(by_epoch))


def test_sums_of_another_accumulation_are_left_out(scenes, sharp_pretrained, tmp_path):
    cfg = config('stage2', scenes, sharp_pretrained, by_epoch=True)
    cfg.optim_wrapper.accumulative_counts = 3
    kill(cfg, tmp_path / 'run', at=6)
    cfg.optim_wrapper.accumulative_counts = 2
    train(cfg, tmp_path / 'run', resume=True)
    log = log_of(tmp_path / 'run')
    assert 'gradients of 2 iterations that wait for an update. They are left out: accumulative_counts is 2, and was 3' \
        in log
    assert load_checkpoint(tmp_path / 'run' / last(True))['meta']['iter'] == STEPS


def log_of(work_dir: Path) -> str:
    return ''.join(path.read_text() for path in sorted(work_dir.glob('*/*.log')))


@pytest.mark.parametrize('batch', [1, 4])
@pytest.mark.parametrize('sampler', ['DefaultSampler', 'InfiniteSampler', 'epochs'])
def test_another_batch_goes_on_at_the_next_sample(scenes, sharp_pretrained, tmp_path, sampler, batch, monkeypatch):
    """After 16 of 30 samples."""
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)
    cfg = config('stage2', scenes, sharp_pretrained, by_epoch=sampler == 'epochs')
    if sampler != 'epochs':
        cfg.train_dataloader.sampler.type = sampler
    train(cfg, tmp_path / 'whole')
    order = [name for _, images, *_ in diary(tmp_path / 'whole').values() for name in images]
    with pytest.raises(SystemExit):
        train(cfg, tmp_path / 'run', harm=dict(what='terminate', when='step', at=6))
    cfg.train_dataloader.batch_size = batch
    if sampler != 'epochs':
        cfg.train_cfg.max_iters = 8 + 14 // batch
    train(cfg, tmp_path / 'run', resume=True)
    steps = list(diary(tmp_path / 'run').items())
    numbers, batches = [step for step, _ in steps], [number for _, (number, *_) in steps]
    seen = [name for _, (_, images, *_) in steps for name in images]
    assert numbers == list(range(len(steps)))
    assert seen == order[:len(seen)] and len(seen) >= 28  # a finite sampler's last batch of an epoch may be small
    if sampler == 'epochs':
        assert len(seen) == 30
        assert batches == [*range(5), 0, 1, 2, *(range(6, 10) if batch == 1 else [2]), *range(-(-10 // batch))]
    place = '16 samples.' if sampler == 'InfiniteSampler' else '6 samples of epoch 2.'
    assert f'1 process(es) x {batch} go on where 1 process(es) x 2 were: after {place}' in log_of(tmp_path / 'run')
    final = load_checkpoint(max(tmp_path.glob('run/*.pth'), key=os.path.getmtime))
    assert final['meta']['data_position']['batch_size'] == batch


@pytest.mark.parametrize(('pair', 'cell'), list(zip([
    ('averaged weights', 'accumulation'), ('mixed precision', 'early stopping'), ('redrawn features', 'corrupt images'),
    ('activation checkpointing', 'redrawn features'), ('progressive resolution', 'averaged weights'),
    ('accumulation', 'mixed precision'), ('accumulation', 'best weights kept')], CELLS, strict=True)),
    ids='-'.join)
def test_pairs_of_features(scenes, corrupt_scenes, sharp_pretrained, tmp_path, pair, cell):
    """A sample of what `make test-faults` does with every pair."""
    cfg = with_features(pair, scenes, sharp_pretrained)
    train(cfg, tmp_path / 'whole')
    strike_and_resume(cfg, tmp_path / 'run', CELLS[cell])
    assert_same_end(tmp_path / 'whole', tmp_path / 'run')


@LOOPS
def test_workers_do_not_show(scenes, sharp_pretrained, tmp_path, whole_runs, by_epoch):
    """Two workers, killed and resumed, draw the same augmentation as none."""
    cfg = config('stage2', scenes, sharp_pretrained, by_epoch)
    whole = whole_runs(cfg, 'stage2', by_epoch)
    cfg = config('stage2', scenes, sharp_pretrained, by_epoch, workers=2)
    kill(cfg, tmp_path / 'run', at=7)
    train(cfg, tmp_path / 'run', resume=True)
    assert_same_run(whole, tmp_path / 'run', last(by_epoch))


def test_finite_sampler_in_an_iteration_based_run(scenes, sharp_pretrained, tmp_path, whole_runs, monkeypatch):
    """Epochs come round inside the run; the images that were seen are not read again."""
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)
    cfg = config('stage2', scenes, sharp_pretrained, by_epoch=False)
    cfg.train_dataloader.sampler.type = 'DefaultSampler'
    whole = whole_runs(cfg, 'finite')
    kill(cfg, tmp_path / 'run', at=11)
    read = []
    load = LoadImageFromFile.transform
    monkeypatch.setattr(LoadImageFromFile, 'transform', lambda self, results: read.append(1) or load(self, results))
    train(cfg, tmp_path / 'run', resume=True)
    assert_same_run(whole, tmp_path / 'run', last(False))
    assert len(read) == BATCH * 5 + 2 * 3  # five steps and two validations


@DATA_SAMPLERS.register_module(force=True)
class Neighbours(BatchSampler):
    """Deals out batches in its own way, as mmdet's AspectRatioBatchSampler: looks into the data set, and pairs."""

    def __init__(self, sampler, batch_size: int) -> None:
        super().__init__(sampler, batch_size, drop_last=False)

    def __iter__(self):
        assert len(self.sampler.dataset) == IMAGES
        waiting: dict[int, int] = {}
        for index in self.sampler:
            if (other := waiting.pop(index // 2, None)) is None:
                waiting[index // 2] = index
            else:
                yield [other, index]


def test_batches_of_another_kind(scenes, sharp_pretrained, tmp_path):
    """They are shuffled anew in each epoch; inside of one nothing can be skipped, which is said."""
    cfg = config('stage2', scenes, sharp_pretrained, by_epoch=True)
    cfg.train_dataloader.batch_sampler = dict(type='Neighbours')
    train(cfg, tmp_path / 'whole')
    steps = [images for _, images, *_ in diary(tmp_path / 'whole').values()]
    pairs = [[sorted(images) for images in steps[epoch:epoch + 5]] for epoch in (0, 5, 10)]
    assert sorted(pairs[0]) == sorted(pairs[1]) == sorted(pairs[2]) and pairs[0] != pairs[1]
    kill(cfg, tmp_path / 'run', at=6)
    train(cfg, tmp_path / 'run', resume=True)
    assert_same_run(tmp_path / 'whole', tmp_path / 'run', last(True))
    with pytest.raises(SystemExit):
        train(cfg, tmp_path / 'other', harm=dict(what='terminate', when='step', at=6))
    train(cfg, tmp_path / 'other', resume=True)
    assert len((tmp_path / 'other/diary.jsonl').read_text().splitlines()) == STEPS + 3  # it left after eight
    assert 'Neighbours deals out batches in its own way' in ''.join(
        path.read_text() for path in (tmp_path / 'other').glob('*/*.log'))


def test_mask2former_resumes(scenes, sharp_pretrained, tmp_path):
    """Its loss samples random points on the device."""
    cfg = config('mask2former', scenes, sharp_pretrained, by_epoch=False)
    train(cfg, tmp_path / 'whole')
    kill(cfg, tmp_path / 'run', at=6)
    train(cfg, tmp_path / 'run', resume=True)
    assert_same_run(tmp_path / 'whole', tmp_path / 'run', last(False))


def test_the_scale_of_mixed_precision_goes_on(scenes, sharp_pretrained, tmp_path):
    cfg = config('stage2', scenes, sharp_pretrained, by_epoch=True)
    scale = dict(init_scale=2.0 ** 10, growth_interval=4)
    cfg.optim_wrapper.update(type='adala_mm.CPUAmpOptimWrapper', dtype='float16', loss_scale=scale)
    train(cfg, tmp_path / 'whole')
    kill(cfg, tmp_path / 'run', at=8)
    train(cfg, tmp_path / 'run', resume=True)
    assert_same_run(tmp_path / 'whole', tmp_path / 'run', last(True))
    scalers = [load_checkpoint(tmp_path / run / last(True))['optimizer']['loss_scaler'] for run in ('whole', 'run')]
    assert scalers[0] == scalers[1] and scalers[0]['scale'] > 2.0 ** 10


@LOOPS
def test_the_newest_whole_checkpoint_is_taken(scenes, sharp_pretrained, tmp_path, whole_runs, by_epoch):
    cfg = config('stage2', scenes, sharp_pretrained, by_epoch)
    whole, work_dir = whole_runs(cfg, 'stage2', by_epoch), tmp_path / 'run'
    kill(cfg, work_dir, at=11)
    newest, before = sorted(work_dir.glob('*.pth'), key=lambda path: int(path.stem.split('_')[-1]), reverse=True)
    newest.write_bytes(newest.read_bytes()[:-1000])
    (work_dir / 'last_checkpoint').write_text('')  # killed while writing that one, too
    (work_dir / f'{newest.name}.part').write_bytes(b'half')
    train(cfg, work_dir, resume=True)
    printed = ''.join(path.read_text() for path in work_dir.glob('*/*.log'))
    assert f'{newest} is damaged' in printed and f'Load checkpoint from {before}' in printed
    assert f'deleted {newest}.part' in printed
    assert_same_run(whole, work_dir, last(by_epoch))


def write_checkpoint(path: Path, steps: int, minute: int, modified: int = 0) -> Path:
    """By the runner that writes them in training, on a clock that stands at ``minute``."""
    runner = SimpleNamespace(
        epoch=1, iter=steps, train_loop=SimpleNamespace(_epoch=1), model=torch.nn.Linear(20, 20, bias=False), seed=0,
        cfg=Config(), experiment_name='one', train_dataloader=SimpleNamespace(dataset=None),
        message_hub=MessageHub('one'), call_hook=lambda *args, **kwargs: None, get_hooks_info=str)
    torch.nn.init.constant_(runner.model.weight, float(steps))
    runner.optim_wrapper = OptimWrapper(torch.optim.SGD(runner.model.parameters(), lr=1.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mmengine.runner.runner.time.strftime', lambda *args: f'20260102_03{minute:02}00')
        Runner.save_checkpoint(runner, str(path.parent), path.name, by_epoch=False, save_param_scheduler=False,
                               save_optimizer='best' not in path.name, meta=dict(epoch=1, iter=steps))
    os.utime(path, (modified, modified))
    return path


@pytest.mark.parametrize(('files', 'newest', 'told'), [
    # name, iteration, minute of writing, time of modification
    ([('epoch_9.pth', 9, 1, 20), ('epoch_11.pth', 11, 2, 10)], 'epoch_11.pth', ''),  # copied in another order
    ([('epoch_9.pth', 9, 1, 0), ('epoch_10.pth', 10, 2, 0)], 'epoch_10.pth', ''),
    ([('preempted.pth', 5, 1, 20), ('step=7.pth', 7, 2, 10)], 'step=7.pth', ''),  # by another filename_tmpl
    ([('preempted.pth', 8, 3, 0), ('step=7.pth', 7, 2, 10)], 'preempted.pth', ''),
    ([('iter_5.pth', 5, 1, 0), ('iter_7.pth', 7, 1, 0), ('epoch_3.pth', 6, 1, 9)], 'iter_7.pth', ''),  # in one second
    ([('epoch_2.pth', 6, 1, 0), ('best_mIoU_epoch_2.pth', 6, 2, 9)], 'epoch_2.pth', ''),
    ([('epoch_1.pth', 3, 1, 0), ('best_mIoU_epoch_2.pth', 6, 2, 0)], 'epoch_1.pth', ''),
    ([('best_mIoU_epoch_1.pth', 3, 1, 0)], 'best_mIoU_epoch_1.pth', 'has no state of the optimizer'),
    ([('epoch_11.pth', 11, 1, 0), ('epoch_3.pth', 3, 2, 0)], 'epoch_3.pth',  # the run was started anew
     'epoch_11.pth stands at iteration 11, further than epoch_3.pth at 3, but was written before')])
def test_which_checkpoint_is_the_newest(files, newest, told, tmp_path):
    warnings: list[str] = []
    for name, *facts in files:
        write_checkpoint(tmp_path / name, *facts)
    torch.save(dict(weight=torch.zeros(2)), tmp_path / 'teacher.pth')  # weights are no checkpoint of a run
    assert newest_checkpoint(tmp_path, warnings.append) == tmp_path / newest
    assert len(warnings) == bool(told) and told in ''.join(warnings)


def test_damage_anywhere_in_a_file_is_found(tmp_path):
    warnings: list[str] = []
    assert newest_checkpoint(tmp_path, warnings.append) is None
    paths = [write_checkpoint(tmp_path / f'iter_{i}.pth', i, i) for i in range(3)]
    assert newest_checkpoint(tmp_path, warnings.append) == paths[2] and not warnings
    whole = bytearray(paths[2].read_bytes())
    whole[whole.index(torch.tensor(2.0).numpy().tobytes() * 10) + 500] ^= 1  # one bit of one weight
    paths[2].write_bytes(whole)
    paths[1].write_bytes(b'')
    assert newest_checkpoint(tmp_path, warnings.append) == paths[0]
    assert 'iter_1.pth is damaged' in warnings[0]
    assert 'iter_2.pth is damaged' in warnings[1] and 'checksum' in warnings[1]
    paths[0].write_bytes(b'PK')
    with pytest.raises(ValueError, match=r'none of the 3 checkpoints .*iter_0.pth is damaged .* move them away'):
        newest_checkpoint(tmp_path, warnings.append)


def test_where_a_run_stood_is_read_without_its_tensors(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / 'iter_4.pth', 4, 1)
    monkeypatch.setattr(torch_files, '_read_bytes', lambda *args: pytest.fail('a tensor was read'))
    assert standing_of(path) == ('20260102_030100', 4, True)


def test_nothing_to_resume_starts_at_the_beginning(scenes, sharp_pretrained, tmp_path, whole_runs):
    cfg = config('stage2', scenes, sharp_pretrained, by_epoch=True)
    train(cfg, tmp_path / 'run', resume=True)
    assert_same_run(whole_runs(cfg, 'stage2', True), tmp_path / 'run', last(True))


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    write_atomically(tmp_path / 'iter_1.pth', b'good')

    def full(*args):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr('os.fsync', full)
    with pytest.raises(OSError, match=r'no space for .*iter_1.pth: it needs .* MiB, .* untouched.*--resume'):
        write_atomically(tmp_path / 'iter_1.pth', b'newer')
    assert [path.name for path in tmp_path.iterdir()] == ['iter_1.pth']
    assert (tmp_path / 'iter_1.pth').read_bytes() == b'good'


def test_one_kept_checkpoint_becomes_two(scenes, sharp_pretrained, tmp_path):
    cfg = config('stage2', scenes, sharp_pretrained, by_epoch=False)
    cfg.default_hooks.checkpoint.max_keep_ckpts = 1
    train(cfg, tmp_path / 'run')
    assert sorted(path.name for path in tmp_path.glob('run/*.pth')) == ['iter_10.pth', 'iter_15.pth']


def test_keys_give_unrelated_and_repeatable_numbers():
    def draw(*key):
        seed_all(*key)
        return random.random(), np.random.rand(), torch.rand(()).item()

    drawn = [draw(0, seed, i) for seed in range(3) for i in range(50)]
    assert len({value for numbers in drawn for value in numbers}) == 3 * len(drawn)
    assert np.abs(np.corrcoef(np.array(drawn).T)[0, 1:]).max() < 0.3
    assert draw(0, 1, 7) == drawn[57] and draw(1, 1, 7) != drawn[57]
