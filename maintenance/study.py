"""Runs a study: configs x seeds, each run started from the one that it comes after; taken up again when stopped.

    python maintenance/study.py configs/real/study.yml [--data-root DIR] [--jobs 2] [--seeds 0 1 2] [--only NAME ...] \
        [--out docs/results/<study>.json]

The study file names ``runs``, each with a ``config`` of the folder that the study is in, and perhaps with the run that
it comes ``after`` and starts from, a number of ``iterations``, ``options`` as of --cfg-options, a ``label`` for tables,
and one for its scores before training, ``swap``, if nothing comes before it. ``seeds`` are for all, and so is ``amp``
where a run has none of its own. A run's work dir is ``work_dirs/<study>/<name>/seed<n>``; <study> is the file's name,
which no other study may have. What is finished is recorded in ``--out`` at once, which keeps the records that it has.
Recorded runs are not run again, unless another one starts from weights that are no longer there.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from record_runs import record

from adala_mm.engine.preemption import FILE as PREEMPTED
from adala_mm.models.algorithms.base import Alignment
from adala_mm.registry import MODELS
from adala_mm.utils.cost import multiply_adds
from adala_mm.utils.machine import cores, machine
from adala_mm.utils.records import logs_of_run, newest_log, save
from adala_mm.utils.runs import Job, locked, work_off

TOOLS = Path(__file__).resolve().parents[1] / 'tools'
WORDS = ('label', 'swap')  # what tables call a run, which may change
KEYS = ('config', 'after', 'iterations', 'options', 'amp', *WORDS)
STUDY_KEYS = ('runs', 'seeds', 'amp')
Run = tuple[str, int]  # name, seed


def minutes(log: Path) -> float:
    """From the start of a run that a log is of to its last line: a run that was killed has no other end."""
    started = json.loads((log.parents[1] / 'run.json').read_text())['started']
    return (log.stat().st_mtime - datetime.fromisoformat(started.replace('Z', '+00:00')).timestamp()) / 60


def training_cost(config: Config) -> int | None:
    """Multiply-adds that one image costs an alignment in training: teacher, student, backward pass."""
    kind = MODELS.get(config.model.type)
    if kind is None or not issubclass(kind, Alignment):  # heads of mmseg are none of ours
        return None
    model = MODELS.build(config.model)
    model.train().teacher_ready = True  # what anything costs does not depend on the weights
    vit = model.backbone
    images = torch.randn(1, 3, *(cells * vit.patch_size for cells in vit.pos_grid))
    return multiply_adds(lambda: model.loss(images)['loss'].backward())


def read_study(path: Path) -> Config:
    """The study, its runs in an order in which each comes after the one that it starts from.

    Raises:
        FileNotFoundError: for a study or a config that does not exist.
        ValueError: for what a study or a run must have and has not, for a key that there is not, and for a run after
            one that is not before it.
    """
    if not path.is_file():
        raise FileNotFoundError(f'no study at {path}')
    study, known = Config.fromfile(path), []
    if absent := {'runs', 'seeds'} - set(study):
        raise ValueError(f'{path} has no {" and no ".join(sorted(absent))}')
    if extra := set(study) - set(STUDY_KEYS):
        raise ValueError(f'{path} has unknown keys: {", ".join(sorted(extra))}; there are {", ".join(STUDY_KEYS)}')
    for name, run in study.runs.items():
        if extra := set(run) - set(KEYS):
            raise ValueError(f'{path}: run {name!r} has an unknown key {extra.pop()!r}; there are {", ".join(KEYS)}')
        if 'config' not in run:
            raise ValueError(f'{path}: run {name!r} has no config')
        if not (config := path.with_name(f'{run.config}.py')).is_file():
            raise FileNotFoundError(f'{path}: run {name!r} needs {config}, which does not exist')
        if 'after' in run and run.after not in known:
            raise ValueError(f'{path}: run {name!r} comes after {run.after!r}, which is not among the runs before it: '
                             f'{", ".join(known) or "none"}')
        if 'swap' in run and 'after' in run:
            raise ValueError(f'{path}: run {name!r} has a label swap, and comes after {run.after!r}: only what a study '
                             'begins with starts from a swap')
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
        self.folder = Path('work_dirs') / path.stem
        self.plan = read_study(path)
        self.records = json.loads(out.read_text()) if out.exists() else {}

    def amp(self, run: Run) -> bool:
        return bool(self.plan.runs[run[0]].get('amp', self.plan.get('amp')))

    def key(self, run: Run) -> str:
        return f'{run[0]}/seed{run[1]}'

    def work_dir(self, run: Run) -> Path:
        return self.folder / self.key(run)

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
            schedule = Config.fromfile(self.config(run)).get('param_scheduler')
            if isinstance(schedule, list):
                raise ValueError(f'{self.key(run)}: iterations cannot be set, for {self.config(run)} has a schedule of '
                                 'several parts; make it a config of its own')
            names = ['train_cfg.max_iters', 'train_cfg.val_interval'] + ['param_scheduler.end'] * bool(schedule)
            options |= dict.fromkeys(names, iterations)
        return options

    def train(self, run: Run) -> None:
        """Trains, or goes on from the last checkpoint.

        Raises:
            RuntimeError: if training fails, with the end of what it said, and if another process is at it.
        """
        folder = self.work_dir(run)
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, TOOLS / 'train.py', self.config(run), '--work-dir', folder, '--seed', run[1],
                   *['--amp'] * self.amp(run)]
        newest = folder / 'last_checkpoint'
        if (folder / PREEMPTED).exists() or (
                newest.exists() and (folder / Path(newest.read_text().strip()).name).exists()):
            command += ['--resume']
        if self.data_root:
            command += ['--data-root', self.data_root]
        if options := self.options(run):
            command += ['--cfg-options', *(f'{key}={value}' for key, value in options.items())]
        with locked(folder / 'lock', wait=False) as lock, open(folder / 'output.txt', 'w') as output:
            # The training inherits the lock, and keeps it if this process is killed.
            done = subprocess.run([str(word) for word in command], stdout=output, stderr=subprocess.STDOUT,
                                  env=self.environment(), pass_fds=[lock])
        if done.returncode:
            said = (folder / 'output.txt').read_text().rstrip()
            raise RuntimeError(f'training failed, and {folder / "output.txt"} ends with\n{said[-1500:]}')

    def environment(self) -> dict[str, str]:
        """Of processes that have this study's share of the cores."""
        return os.environ | dict.fromkeys(('OMP_NUM_THREADS', 'MKL_NUM_THREADS'), str(self.threads))

    def machine(self, source: dict) -> dict:
        """What ran, and where; ``source`` is the state of the code (`git_state`)."""
        return machine() | dict(threads=self.threads, commit=str(source['commit'])[:7], dirty=source['dirty'])

    def describe(self, run: Run) -> dict:
        """What is recorded of a finished run."""
        folder, before = self.work_dir(run), self.before(run)
        config = Config.fromfile(newest_log(folder).with_name('config.py'))  # as it ran
        source = json.loads((newest_log(folder).parents[1] / 'run.json').read_text())['source']
        return record(folder) | dict(
            after=before and self.key(before), plan=self.stated(run), amp=self.amp(run),
            minutes=round(sum(map(minutes, logs_of_run(folder))), 1),
            machine=self.machine(source),
            batch_size=config.train_dataloader.batch_size, training_multiply_adds=training_cost(config),
            **MODELS.build(config.model.backbone).block_counts)

    def stated(self, run: Run) -> dict:
        """What the study says of a run, but for its labels."""
        return {key: value for key, value in self.plan.runs[run[0]].to_dict().items() if key not in WORDS}

    def keep(self, run: Run, result: dict) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / 'lock'):  # another process may run other parts of the study
            self.records = (json.loads(self.out.read_text()) if self.out.exists() else {}) | {self.key(run): result}
            save(self.out, self.records)

    def outstanding(self, runs: list[Run]) -> list[Run]:
        """Those of ``runs`` that are not recorded, and those that they start from if the weights are not there.

        Raises:
            ValueError: for a run that is recorded, and was another one.
        """
        todo = {run for run in runs if self.key(run) not in self.records}
        for run in set(runs) - todo:
            known = self.records[self.key(run)]
            was = dict(known['plan'], amp=known.get('amp', self.amp(run)))  # one that says nothing of it may stay
            if was != (now := dict(self.stated(run), amp=self.amp(run))):
                raise ValueError(f'{self.key(run)} is recorded in {self.out} as {was}, and the study says {now}: '
                                 f'rename it, or remove the record and {self.work_dir(run)}')
        for run in list(todo):
            while (run := self.before(run)) and run not in todo and not self.weights(run).exists():
                print(f'{self.key(run)}: recorded, but {self.weights(run)} is not there')
                todo.add(run)
        return [run for run in runs if run in todo]

    def weights(self, run: Run) -> Path:
        return self.work_dir(run) / self.records[self.key(run)]['checkpoint']

    def run(self, runs: list[Run], places: int) -> int:
        """Runs what is outstanding, ``places`` at a time; returns how many failed or had nothing to start from."""
        todo = self.outstanding(runs)
        print(f'{len(runs)} runs, {len(runs) - len(todo)} of them recorded in {self.out}')
        by_key, count = {self.key(run): run for run in todo}, 0
        jobs = [Job(key, tuple(self.key(before) for before in [self.before(run)] if before in todo))
                for key, run in by_key.items()]
        with ThreadPoolExecutor(places) as pool:
            for job in work_off(jobs, lambda job: pool.submit(self.train, by_key[job.name]), places):
                if job.state == 'running':
                    print(f'{job.name}: started, {self.work_dir(by_key[job.name])}', flush=True)
                elif job.state == 'skipped':
                    print(f'{job.name}: skipped, what it comes after failed', flush=True)
                else:
                    count += 1
                    left = sum(job.state in ('waiting', 'running') for job in jobs)
                    if not self.finish(by_key[job.name], job.future, f'{count} done, {left} to go'):
                        job.state = 'failed'
        return sum(job.state != 'done' for job in jobs)

    def finish(self, run: Run, future: Future, progress: str) -> bool:
        try:
            future.result()
            result = self.describe(run)
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
    parser.add_argument('--out', type=Path, help='where runs are recorded; docs/results/<study>.json if unset')
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f'--jobs must be at least 1, got {args.jobs}')
    try:
        out = args.out or Path(f'docs/results/{args.study.stem}.json')
        study = Study(args.study, out, args.data_root, max(1, cores() // args.jobs))
        seeds = list(dict.fromkeys(args.seeds or study.plan.seeds))
        failed = study.run(wanted(study.plan, seeds, args.only), args.jobs)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    if failed:
        sys.exit(f'{failed} runs failed; the same command tries them again and goes on')


if __name__ == '__main__':
    main()
