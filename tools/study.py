"""Runs a study: configs x seeds, each run started from the one that it comes after; taken up again where it stopped.

    python tools/study.py configs/real/study.yml [--data-root DIR] [--jobs 2] [--seeds 0 1 2] [--only NAME ...] \
        [--out docs/results/study.json]

The study file names ``runs``, each with a ``config`` of the folder that the study is in, and perhaps with the run that
it comes ``after`` and starts from, a number of ``iterations``, ``options`` as of --cfg-options, and a ``label``.
``seeds`` and ``amp`` are for all. A run's work dir is ``work_dirs/study/<name>/seed<n>``. What is finished is recorded
in ``--out`` at once, which keeps the records that it has. Recorded runs are not run again, unless another one starts
from weights that are no longer there.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from record_runs import record

from adala_mm.models.algorithms.base import Alignment
from adala_mm.registry import MODELS
from adala_mm.utils.atomic import write_atomically
from adala_mm.utils.cost import multiply_adds
from adala_mm.utils.records import machine

TOOLS = Path(__file__).parent
KEYS = ('config', 'after', 'iterations', 'options', 'label')
Run = tuple[str, int]  # name, seed


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def training_cost(config: Config) -> int | None:
    """Multiply-adds that one image costs an alignment in training: teacher, student, backward pass.

    Convolutions count three times what they cost forwards: of the backward pass of depth-wise ones PyTorch's counter
    makes too much, as if they were dense.
    """
    kind = MODELS.get(config.model.type)
    if kind is None or not issubclass(kind, Alignment):  # heads of mmseg are none of ours
        return None
    model = MODELS.build(config.model)
    model.train().teacher_ready = True  # what anything costs does not depend on the weights
    vit = model.backbone
    images = torch.randn(1, 3, *(cells * vit.patch_size for cells in vit.pos_grid))
    products = multiply_adds(lambda: model.loss(images)['loss'].backward(), convolutions=False)
    forward = torch.no_grad()(lambda: model.loss(images))
    return products + 3 * (multiply_adds(forward) - multiply_adds(forward, convolutions=False))


def read_study(path: Path) -> Config:
    """The study, its runs in an order in which each comes after the one that it starts from.

    Raises:
        FileNotFoundError: for a study or a config that does not exist.
        ValueError: for an unknown key of a run, and for a run after one that is not named before it.
    """
    if not path.is_file():
        raise FileNotFoundError(f'no study at {path}')
    study, known = Config.fromfile(path), []
    for name, run in study.runs.items():
        if extra := set(run) - set(KEYS):
            raise ValueError(f'{path}: run {name!r} has an unknown key {extra.pop()!r}; there are {", ".join(KEYS)}')
        if not (config := path.with_name(f'{run.config}.py')).is_file():
            raise FileNotFoundError(f'{path}: run {name!r} needs {config}, which does not exist')
        if 'after' in run and run.after not in known:
            raise ValueError(f'{path}: run {name!r} comes after {run.after!r}, which is not among the runs before it: '
                             f'{", ".join(known) or "none"}')
        known.append(name)
    return study


def wanted(study: Config, seeds: list[int], only: list[str]) -> list[Run]:
    """All runs that ``only`` needs (everything if empty), seed by seed, so that whole seeds are done early.

    Raises:
        ValueError: for a name that the study does not have.
    """
    needed: set[str] = set()
    for name in only or study.runs:
        if name not in study.runs:
            raise ValueError(f'the study has no run {name!r}; it has {", ".join(study.runs)}')
        while name:
            needed.add(name)
            name = study.runs[name].get('after')
    return [(name, seed) for seed in seeds for name in study.runs if name in needed]


class Study:
    def __init__(self, path: Path, out: Path, data_root: str | None, threads: int) -> None:
        self.path, self.out, self.data_root, self.threads = path, out, data_root, threads
        self.plan = read_study(path)
        self.records = json.loads(out.read_text()) if out.exists() else {}

    def key(self, run: Run) -> str:
        return f'{run[0]}/seed{run[1]}'

    def work_dir(self, run: Run) -> Path:
        return Path('work_dirs/study', self.key(run))

    def config(self, run: Run) -> Path:
        return self.path.with_name(f'{self.plan.runs[run[0]].config}.py')

    def before(self, run: Run) -> Run | None:
        after = self.plan.runs[run[0]].get('after')
        return None if after is None else (after, run[1])

    def options(self, run: Run) -> dict[str, Any]:
        """Config entries of this run alone: where it starts, and how long it is."""
        options = dict(self.plan.runs[run[0]].get('options', {}))
        if before := self.before(run):
            options['model.backbone.init_cfg.checkpoint'] = str(self.weights(before))
        if iterations := self.plan.runs[run[0]].get('iterations'):
            names = ['train_cfg.max_iters', 'train_cfg.val_interval', 'default_hooks.checkpoint.interval']
            schedule = Config.fromfile(self.config(run)).get('param_scheduler')
            options |= dict.fromkeys(names + ['param_scheduler.end'] * isinstance(schedule, dict), iterations)
        return options

    def train(self, run: Run) -> dict:
        """Trains, or goes on training, and says what came of it.

        Raises:
            RuntimeError: if training fails; the message has the end of its output.
        """
        folder = self.work_dir(run)
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, TOOLS / 'train.py', self.config(run), '--work-dir', folder, '--seed', run[1],
                   *['--amp'] * bool(self.plan.get('amp')), *['--resume'] * (folder / 'last_checkpoint').exists()]
        if self.data_root:
            command += ['--data-root', self.data_root]
        if options := self.options(run):
            command += ['--cfg-options', *(f'{key}={value}' for key, value in options.items())]
        threads = dict.fromkeys(('OMP_NUM_THREADS', 'MKL_NUM_THREADS'), str(self.threads))
        start = time.monotonic()
        with open(folder / 'output.txt', 'w') as output:
            done = subprocess.run([str(word) for word in command], stdout=output, stderr=subprocess.STDOUT,
                                  env=os.environ | threads)
        if done.returncode:
            said = (folder / 'output.txt').read_text().rstrip()
            raise RuntimeError(f'training failed, and {folder / "output.txt"} ends with\n{said[-1500:]}')
        minutes = round((time.monotonic() - start) / 60, 1)
        before, config = self.before(run), Config.fromfile(next(folder.glob('*.py')))  # as it ran
        vit = MODELS.build(config.model.backbone)
        return record(folder) | dict(
            after=before and self.key(before), amp=bool(self.plan.get('amp')), minutes=minutes,
            machine=machine() | dict(threads=self.threads), batch_size=config.train_dataloader.batch_size,
            softmax_blocks=vit.num_softmax_blocks, linear_blocks=len(vit.blocks) - vit.num_softmax_blocks,
            training_multiply_adds=training_cost(config))

    def keep(self, run: Run, result: dict) -> None:
        if self.out.exists():  # another process may have run other parts of the study
            self.records = json.loads(self.out.read_text()) | self.records
        self.records[self.key(run)] = result
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.out, (json.dumps(self.records, indent=1, sort_keys=True) + '\n').encode())

    def outstanding(self, runs: list[Run]) -> list[Run]:
        """Those of ``runs`` that are not recorded, and those that they start from if the weights are not there."""
        todo = {run for run in runs if self.key(run) not in self.records}
        for run in list(todo):
            while (run := self.before(run)) and run not in todo and not self.weights(run).exists():
                print(f'{self.key(run)}: recorded, but {self.weights(run)} is not there')
                todo.add(run)
        return [run for run in runs if run in todo]

    def weights(self, run: Run) -> Path:
        return self.work_dir(run) / self.records[self.key(run)]['checkpoint']

    def run(self, runs: list[Run], jobs: int) -> int:
        """Runs what is outstanding, ``jobs`` at a time; returns how many failed or had nothing to start from."""
        todo = self.outstanding(runs)
        print(f'{len(runs)} runs, {len(runs) - len(todo)} of them recorded in {self.out}')
        count, failed, running = 0, set(), {}
        with ThreadPoolExecutor(jobs) as pool:
            while todo or running:
                for run in list(todo):
                    if self.before(run) in failed:
                        failed.add(run)
                        todo.remove(run)
                        print(f'{self.key(run)}: skipped, what it comes after failed', flush=True)
                ready = [run for run in todo if self.before(run) not in [*todo, *running.values()]]
                for run in ready[:jobs - len(running)]:
                    todo.remove(run)
                    running[pool.submit(self.train, run)] = run
                    print(f'{self.key(run)}: started, {self.work_dir(run)}', flush=True)
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run, count = running.pop(future), count + 1
                    if not self.finish(run, future, f'{count} done, {len(todo) + len(running)} to go'):
                        failed.add(run)
        return len(failed)

    def finish(self, run: Run, future: Future, progress: str) -> bool:
        try:
            result = future.result()
        except Exception as error:  # whatever it is, the other runs go on
            print(f'{self.key(run)}: {type(error).__name__}: {error}\n({progress})', file=sys.stderr, flush=True)
            return False
        self.keep(run, result)
        scores = ', '.join(f'{key} {value:.4g}' for key, value in result['scores'][-1].items() if key != 'step')
        print(f'{self.key(run)}: {scores} ({result["minutes"]} min; {progress})', flush=True)
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('study', type=Path, help='study file, for instance configs/real/study.yml')
    parser.add_argument('--data-root', help='use this folder wherever the configs say data/')
    parser.add_argument('--jobs', type=int, default=1, help='runs at a time; they share the cores')
    parser.add_argument('--seeds', type=int, nargs='+', help='instead of those of the study')
    parser.add_argument('--only', nargs='+', default=[], metavar='NAME', help='these runs, and what they come after')
    parser.add_argument('--out', type=Path, default=Path('docs/results/study.json'), help='where runs are recorded')
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f'--jobs must be at least 1, got {args.jobs}')
    try:
        study = Study(args.study, args.out, args.data_root, max(1, cores() // args.jobs))
        runs = wanted(study.plan, list(dict.fromkeys(args.seeds or study.plan.seeds)), args.only)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    if failed := study.run(runs, args.jobs):
        sys.exit(f'{failed} runs failed; the same command tries them again and goes on')


if __name__ == '__main__':
    main()
