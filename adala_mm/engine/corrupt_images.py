from __future__ import annotations

from pathlib import Path

from mmengine.dist import all_gather_object, is_main_process
from mmengine.runner import Runner

from adala_mm.engine.gathering import GatheringHook
from adala_mm.registry import HOOKS
from adala_mm.utils.folders import printable

FEW = 1000  # draws after which a share of them means something


@HOOKS.register_module()
class CorruptImagesHook(GatheringHook):
    """Counts and lists the images that `adala_mm.ImageFiles` could not read, and stops a run that has too many.

    Each is listed once, with what is wrong with it, in ``corrupt_images.txt`` in the work dir. A line in the log tells
    of new ones, another at the end of each epoch the number. Samples bring the notes along (``data_samples.corrupt``),
    so that it does not matter which process read them, and what was only read ahead does not count.

    Args:
        max_corrupt: largest share of drawn images that may be unreadable, from 0 (none) to 1 (all). The first 1,000
            draws count as 1,000.
        interval: iterations from one look at all processes' notes to the next.

    The numbers of drawn and of unreadable images are kept in checkpoints, and go on in a resumed run.

    Raises:
        ValueError: if more are unreadable, naming the first few; in all processes at once.
    """

    def __init__(self, max_corrupt: float = 0.01, interval: int = 50) -> None:
        if not 0 <= max_corrupt <= 1:
            raise ValueError(f'max_corrupt={max_corrupt} is no share: give a number from 0 to 1')
        self.max_corrupt, self.interval = max_corrupt, interval
        self.drawn = self.replaced = 0  # samples, in all processes
        self.new: list[dict[str, str]] = []  # a note per sample drawn by this process since the last look
        self.before_validation: dict[str, int] | None = None  # what is saved until training goes on: it is done again
        self.listed: dict[str, str] = {}

    def before_run(self, runner: Runner) -> None:
        self.path = Path(runner.work_dir) / 'corrupt_images.txt'
        if self.path.exists():
            lines = self.path.read_text(errors='surrogateescape').splitlines()
            self.listed = dict(line.split('\t', 1) for line in lines if '\t' in line)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if runner._resume and 'corrupt_images' in checkpoint:
            self.drawn, self.replaced = (checkpoint['corrupt_images'][key] for key in ('drawn', 'replaced'))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint['corrupt_images'] = self.before_validation or self.counts()

    def counts(self) -> dict[str, int]:
        return dict(drawn=self.drawn, replaced=self.replaced)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        self.before_validation = None

    def before_val_epoch(self, runner: Runner) -> None:
        super().before_val_epoch(runner)
        self.before_validation = self.counts()

    def _after_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: object = None,
                    mode: str = 'train') -> None:
        samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
        if samples and isinstance(samples[0], (list, tuple)):  # test-time augmentation: views of the same images
            samples = samples[0]
        for sample in samples if isinstance(samples, (list, tuple)) else []:
            self.new.append(sample.get('corrupt', {}))
        if self.every_n_inner_iters(batch_idx, self.interval):
            self.gather(runner)

    def _after_epoch(self, runner: Runner, mode: str = 'train') -> None:
        self.gather(runner)
        if self.replaced:
            runner.logger.warning(self.summary())

    def after_train(self, runner: Runner) -> None:  # in iteration-based runs no epoch ends
        self._after_epoch(runner)

    def gather(self, runner: Runner) -> None:
        """Adds up what all processes have drawn since the last look; all must call it at the same time."""
        new = {}
        for drawn, notes in all_gather_object((len(self.new), [note for note in self.new if note])):
            self.drawn += drawn
            self.replaced += len(notes)
            new.update((path, problem) for note in notes for path, problem in note.items() if path not in self.listed)
        self.new = []
        if new:
            self.listed.update(new)
            if is_main_process():
                with self.path.open('a', errors='surrogateescape') as file:
                    file.writelines(f'{path}\t{problem}\n' for path, problem in new.items())
            runner.logger.warning(f'{self.summary()}; new: {few(new)}')
        if self.replaced > self.max_corrupt * max(self.drawn, FEW):
            raise ValueError(f'{self.summary()}, more than max_corrupt={self.max_corrupt:g} allows: '
                             f'{few(self.listed)}. Mend the data, or raise max_corrupt of adala_mm.CorruptImagesHook')

    def summary(self) -> str:
        return (f'{self.replaced:,} of {self.drawn:,} images drawn were unreadable and skipped '
                f'({100 * self.replaced / max(self.drawn, 1):.2g} %), listed in {self.path}')


def few(images: dict[str, str]) -> str:
    first = [f'{path} ({problem})' for path, problem in list(images.items())[:3]]
    return printable(', '.join(first)) + (f' and {len(images) - 3:,} more' if len(images) > 3 else '')
