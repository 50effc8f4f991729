from __future__ import annotations

import functools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.dist import broadcast_object_list, get_rank, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.utils.data import BatchSampler, IterableDataset, Sampler

from adala_mm.engine.calibration_loop import CalibrationLoop
from adala_mm.engine.data_position import KEY, DataPosition
from adala_mm.registry import HOOKS
from adala_mm.utils.atomic import PART
from adala_mm.utils.checkpoint import load_checkpoint
from adala_mm.utils.randomness import seed_all

SAMPLES, STEPS = range(2)  # what a key is for


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Makes a resumed run compute what an uninterrupted run computes; on a CPU, with equal bits.

    No state of a random generator is saved. Each random number follows from the place where it is used: a training step
    draws from (seed, iteration, process), the pipeline of a sample from (seed, epoch, position of the sample in it). So
    the number of workers and restarts change nothing, and processes that share a batch augment it as one process does.

    On resume

    - the newest complete checkpoint is taken; the files themselves say how old they are. Damaged and half-written files
      are skipped with a message;
    - the sampler starts at the next sample, also inside an epoch, without reading what was seen;
    - a validation that was due when the checkpoint was written, and may have been lost, is done (again) first.

    ``max_keep_ckpts=1`` becomes 2: the only checkpoint would be deleted before the next one is written.

    Raises:
        ValueError: if no checkpoint of a work dir can be read.
    """

    saved: dict[str, int] | None = None  # of the checkpoint that was loaded
    position: DataPosition | None = None  # of this run; a stream of samples has none

    priority = 'LOWEST'  # a step's seed is set after every other hook, a due validation done when they are ready

    def before_run(self, runner: Runner) -> None:
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook) and hook.max_keep_ckpts == 1:
                runner.logger.warning('CheckpointHook deletes old checkpoints before it writes a new one: with '
                                      'max_keep_ckpts=1 nothing would be left if that fails. Keeping 2')
                hook.max_keep_ckpts = 2
        if runner._resume and runner._load_from is None:
            found = [newest_checkpoint(Path(runner.work_dir), runner.logger.warning) if is_main_process() else None]
            broadcast_object_list(found)
            if found[0] is None:
                runner.logger.info(f'nothing to resume in {runner.work_dir}: starting at the beginning')
            else:
                runner._load_from = str(found[0])

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.saved = checkpoint.get('meta', {}).get(KEY)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if self.position is not None:
            checkpoint['meta'][KEY] = self.position.entry(checkpoint['meta']['iter'])

    def before_train(self, runner: Runner) -> None:
        loop, loader = runner.train_loop, runner.train_dataloader
        if isinstance(loader.dataset, IterableDataset):
            runner.logger.warning('a stream of samples has no positions: a resumed run reads it from its beginning')
            return
        batches = loader.batch_sampler
        if not runner._randomness_cfg.get('diff_rank_seed') and hasattr(batches.sampler, 'seed'):
            batches.sampler.seed = runner.seed  # that of the checkpoint, where the config has none
        self.position = position = DataPosition(runner, self.saved if runner.iter else None)
        for note in position.notes:
            runner.logger.warning(note)
        batches.sampler = stream = PositionedSampler(batches.sampler)
        loader.dataset.__getitems__ = functools.partial(draw_samples, loader.dataset, runner.seed)
        if runner.iter == 0:
            return
        if isinstance(loop, EpochBasedTrainLoop):
            stream.start = position.start
            count_from(loop, position.batch)
            last = runner.iter + (loop.max_epochs - runner.epoch) * len(loader) - position.batch
            if last != loop.max_iters:
                loop._max_iters = last
                runner.optim_wrapper.initialize_count_status(runner.model, runner.iter, last)
        elif isinstance(loop, CalibrationLoop):
            pass  # it reads its images anew
        elif isinstance(loop, IterBasedTrainLoop) and type(batches) is BatchSampler:
            loop.dataloader_iterator.skip_iter = lambda iterations: stream.skip_to(position.begin.epoch, position.start)
            loop.dataloader_iterator._epoch = position.begin.epoch
        if validation_is_due(runner, position):
            runner.logger.info('Validation that was due when the checkpoint was written:')
            runner.val_loop.run()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        seed_all(STEPS, runner.seed, runner.iter, get_rank())


class Position(int):
    """Index of a sample that also knows where it stands: ``key`` is (epoch, position among all processes' samples)."""

    key: tuple[int, int]


class PositionedSampler(Sampler):
    """What another sampler yields, as `Position`; can start anywhere in it."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.start = 0

    def __iter__(self) -> Iterator[Position]:
        epoch, rank, world = getattr(self.sampler, 'epoch', 0), get_rank(), get_world_size()
        start, self.start = self.start, 0
        already_there = hasattr(self.sampler, 'skip')
        for i, index in enumerate(self.sampler, start if already_there else 0):
            if i >= start:
                position = Position(index)
                position.key = epoch, i * world + rank
                yield position

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)  # its data set and its set_epoch, which batch samplers and hooks ask for

    def skip_to(self, epoch: int, start: int) -> None:
        if hasattr(self.sampler, 'skip'):
            self.sampler.skip(start)
        else:
            self.sampler.set_epoch(epoch)
        self.start = start


def draw_samples(dataset: Any, seed: int, positions: list[Position]) -> list:
    """The dataset's ``__getitems__``, which PyTorch calls in whichever process loads a batch."""
    samples = []
    for position in positions:
        seed_all(SAMPLES, seed, *position.key)
        samples.append(dataset[int(position)])
    return samples


def count_from(loop: EpochBasedTrainLoop, seen: int) -> None:
    """Makes hooks see the first epoch's batches numbered from ``seen``: the loop counts what the loader yields."""
    epoch, run_iter = loop.epoch, loop.run_iter
    loop.run_iter = lambda idx, batch: run_iter(idx + seen if loop.epoch == epoch else idx, batch)


def validation_is_due(runner: Runner, position: DataPosition) -> bool:
    """Whether an uninterrupted run would validate now, between two steps; a checkpoint is written before that."""
    loop = runner.train_loop
    by_epoch = isinstance(loop, EpochBasedTrainLoop)
    if runner.val_loop is None or (by_epoch and position.begin.seen):
        return False
    loop._decide_current_val_interval()
    done, end = (runner.epoch, loop.max_epochs) if by_epoch else (runner.iter, loop.max_iters)
    return done >= loop.val_begin and (done % loop.val_interval == 0 or done == end)


class Standing(NamedTuple):
    """Where a run stood when a checkpoint was written, as the file itself says: copying changes none of it."""

    time: str  # %Y%m%d_%H%M%S, local
    iter: int
    whole: bool  # with the optimizer's state, which MMEngine leaves out of the best ones


def newest_checkpoint(work_dir: Path, warn: Any) -> Path | None:
    """The newest checkpoint of a run that can be read from end to end, or None if there is no checkpoint at all.

    It is the one that was written last by its own account, whatever it is called. Those without the optimizer's state
    come after all others. Half-written files are deleted. ``warn`` is called with a line for each file that is passed
    over.

    Raises:
        ValueError: if there are checkpoints, and none of them can be read.
    """
    for part in work_dir.glob(f'*.pth{PART}'):
        warn(f'deleted {part}: a process was stopped while it wrote it')
        part.unlink()
    found, problems = {}, []
    for path in sorted(work_dir.glob('*.pth')):
        try:
            if (standing := standing_of(path)) is not None:
                found[path] = standing
        except (OSError, ValueError) as error:
            problems.append(f'{path} is damaged ({str(error).splitlines()[0]})')
            warn(f'{problems[-1]}: taking another one')

    def order(path: Path) -> tuple:
        return found[path].whole, found[path].time, found[path].iter

    for path in sorted(found, key=order, reverse=True):
        if (problem := damage(path)) is None:
            if not found[path].whole:
                warn(f'{path} has no state of the optimizer, which begins anew: the run will not be what it would have '
                     'been')
            for other in (other for other in found if found[other].whole and found[other].iter > found[path].iter):
                warn(f'{other} stands at iteration {found[other].iter}, further than {path.name} at '
                     f'{found[path].iter}, but was written before: it is taken for one of an earlier run. To go on '
                     f'from it instead: --resume {other}')
            return path
        problems.append(f'{path} is damaged ({problem})')
        warn(f'{problems[-1]}: taking the one before it')
        del found[path]
    if problems:
        raise ValueError(f'none of the {len(problems)} checkpoints in {work_dir} can be read ({"; ".join(problems)}): '
                         'move them away to start at the beginning')
    return None


def standing_of(path: Path) -> Standing | None:
    """Where a run stood; None for a file of another kind, such as weights alone. Tensors are not read.

    Raises:
        ValueError: as `load_checkpoint`.
    """
    state = load_checkpoint(path, map_location='meta')
    meta = state.get('meta') if isinstance(state, dict) else None
    if not isinstance(meta, dict) or not isinstance(meta.get('iter'), int):
        return None
    return Standing(str(meta.get('time', '')), meta['iter'], 'optimizer' in state)


def damage(path: Path) -> str | None:
    """What is wrong with a file of ``torch.save``, all of which is read; None if nothing is."""
    try:
        if not zipfile.is_zipfile(path):  # torn, or of PyTorch < 1.6
            load_checkpoint(path)
            return None
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        return f'its part {broken} has a wrong checksum' if broken else None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        return str(error).splitlines()[0]
