"""Records in a checkpoint where a run stands in its data: counts of iterations depend on the number of processes."""
from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from mmengine.dist import get_world_size
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import BatchSampler

KEY = 'data_position'  # in a checkpoint's meta


@dataclass(frozen=True)
class Stream:
    """How samples are distributed: number of processes, images in a batch, and batches in an epoch."""

    samples: int
    batches: int
    batch_size: int
    processes: int
    accumulative_counts: int

    def __str__(self) -> str:
        accumulated = f' x {self.accumulative_counts} accumulated' if self.accumulative_counts > 1 else ''
        return f'{self.processes} process(es) x {self.batch_size}{accumulated}'


class Progress(NamedTuple):
    """``seen`` samples of ``epoch`` are done, by all processes together; a sampler without end stays in epoch 0."""

    epoch: int
    seen: int


class DataPosition:
    """Follows a run through its samples.

    Attributes:
        begin: where it starts, or is taken up.
        start: samples of each process that are skipped there.
        batch: the number that the first batch has in its epoch.
        notes: what is done twice, or not as before, for the log.
    """

    def __init__(self, runner: Runner, saved: dict[str, Any] | None) -> None:
        """``saved`` is what a checkpoint's meta has of `entry`; None if it has nothing, or the run begins."""
        loader = runner.train_dataloader
        batches, self.iter, self.notes = loader.batch_sampler, runner.iter, []
        # Some samplers of others have several, or none: for them there are whole epochs only.
        size = batches.batch_size if isinstance(getattr(batches, 'batch_size', None), int) else 0
        self.stream = Stream(len(loader.dataset), len(loader), size, get_world_size(),
                             getattr(runner.optim_wrapper, '_accumulative_counts', 1))
        self.endless = hasattr(batches.sampler, 'skip')  # MMEngine's word for it
        self.by_epoch, self.regular = isinstance(runner.train_loop, EpochBasedTrainLoop), type(batches) is BatchSampler
        self.begin = self.after(saved) if saved else self.counted(runner)
        if self.by_epoch and self.begin == (runner.epoch + 1, 0):  # written at the last step, before the epoch's end
            self.begin = Progress(runner.epoch, self.epoch_size)
        if self.by_epoch and not self.regular and (self.begin.seen or not size and runner.iter):
            self.anew(f'{type(batches).__name__} deals out batches in its own way')
        self.start, self.batch = self.begin.seen // self.stream.processes, 0
        if self.begin.seen and not self.endless and self.regular:
            self.start = min(self.start, len(batches.sampler))
            left = len(batches.sampler) - self.start
            left = left // size if batches.drop_last else -(-left // size)
            self.batch = self.stream.batches - left

    @property
    def step_size(self) -> int:
        """Samples of an iteration."""
        return self.stream.batch_size * self.stream.processes

    @property
    def epoch_size(self) -> int:
        """Samples of all iterations of an epoch, the last of which may be a smaller one."""
        return self.stream.batches * self.step_size

    def anew(self, reason: str) -> None:
        self.notes.append(f'{reason}: epoch {self.begin.epoch + 1} starts anew, {self.begin.seen} of its samples are '
                          'seen twice')
        self.begin = Progress(self.begin.epoch, 0)

    def after(self, saved: dict[str, Any]) -> Progress:
        """The position that a checkpoint names, whatever it was written with."""
        before, now = Stream(**{name: saved[name] for name in asdict(self.stream)}), self.stream
        self.begin = Progress(saved['epoch'], saved['seen'])
        if before.samples != now.samples:
            reason = f'The data set has {now.samples} samples, and had {before.samples}'
            if self.endless:
                self.notes.append(f'{reason}: their order is another one, samples may be seen twice or left out')
            elif self.begin.seen:
                self.anew(reason)
        if str(before) != str(now) and not (self.by_epoch or self.regular):
            self.notes.append(f'{now} go on where {before} were, and batches are dealt out in a way of their own: as '
                              'many are skipped as there were, of the size that they have now')
        elif str(before) != str(now):
            twice = self.begin.seen % now.processes
            self.notes.append(
                f'{now} go on where {before} were: after {self.begin.seen} samples'
                f'{"" if self.endless else f" of epoch {self.begin.epoch + 1}"}'
                f'{f", the last {twice} of which are seen twice" if twice else ""}. Schedules count iterations, which '
                f'have {before.batch_size * before.processes} samples before and {now.batch_size * now.processes} '
                'after: adapt their ends, and the learning rate')
        return self.begin

    def counted(self, runner: Runner) -> Progress:
        """The position by counts of iterations, which hold if nothing has changed since a file that does not say."""
        if self.endless:
            return Progress(0, runner.iter * self.step_size)
        length = max(self.stream.batches, 1)
        epoch, batches = divmod(runner.iter, length)
        if self.by_epoch:
            epoch, batches = runner.epoch, runner.iter - runner.epoch * length
        if not 0 <= batches <= length:
            self.notes.append(f'The checkpoint has {epoch} epochs and {runner.iter} iterations, and an epoch has '
                              f'{length} now: it was written with other batches or processes, and does not say how far '
                              f'it was in epoch {epoch + 1}, which starts anew')
            batches = 0
        return Progress(epoch, batches * self.step_size)

    def at(self, iteration: int) -> Progress:
        """After so many iterations of the run."""
        done = iteration - self.iter
        if not self.endless:
            turns, batches = divmod(self.batch + done, self.stream.batches)
            if turns:
                return Progress(self.begin.epoch + turns, batches * self.step_size)
        return Progress(self.begin.epoch, self.start * self.stream.processes + done * self.step_size)

    def entry(self, iteration: int) -> dict[str, int]:
        """For a checkpoint's meta."""
        return asdict(self.stream) | self.at(iteration)._asdict()
