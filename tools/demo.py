"""Runs all three stages on the embedded data set, from scratch to a report, in minutes on a CPU.

    python tools/demo.py [--work-dir work_dirs/demo]

Each step is `tools/train.py` with a config of configs/demo/. Steps that do not need each other run in parallel, with
one thread each. At the end it writes report.md and report.html to the work dir.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from mmengine.config import Config

from adala_mm.utils.runs import Job, work_off

ROOT = Path(__file__).resolve().parents[1]


@dataclass(eq=False, kw_only=True)
class Run(Job):
    """One training run."""

    config: str
    process: subprocess.Popen | None = field(default=None, repr=False)

    def wait(self) -> None:
        """Until its process ends.

        Raises:
            subprocess.CalledProcessError: if it has failed.
        """
        if code := self.process.wait():
            raise subprocess.CalledProcessError(code, self.process.args)

    @cached_property
    def iterations(self) -> int:
        return Config.fromfile(ROOT / f'configs/demo/{self.config}.py').train_cfg.max_iters


# In the order of the longest way to the end. Costs: seconds on two cores of a 2024 server CPU.
RUNS = [
    Run('teacher', config='teacher_demo_beacons', cost=110, threads=2),
    Run('stage1', ('teacher',), config='stage1_demo_beacons', cost=25),
    Run('stage2_only', ('teacher',), config='stage2_demo_nostage1_beacons', cost=28),
    Run('stage2', ('stage1',), config='stage2_demo_beacons', cost=28),
    Run('swap', ('teacher',), config='fcn_demo_swap_beacons', cost=22),
    Run('coarse', ('teacher',), config='fcn_demo_coarse_beacons', cost=30),
    Run('stage1_only', ('stage1',), config='fcn_demo_stage1only_beacons', cost=22),
    Run('stage2_only_tuned', ('stage2_only',), config='fcn_demo_stage2only_beacons', cost=22),
    Run('both', ('stage2',), config='fcn_demo_beacons', cost=22),
    Run('mask2former', ('stage2',), config='mask2former_demo_beacons', cost=75),
    Run('softmax', ('teacher',), config='fcn_demo_softmax_beacons', cost=22),
]


def start(run: Run, out: Path, data_root: str) -> None:
    threads = str(min(run.threads, os.cpu_count() or 1))
    # Threads that sleep instead of spin: on a busy machine spinning ones slow each other down tenfold.
    environment = dict(os.environ, OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, OMP_WAIT_POLICY='PASSIVE')
    command = [sys.executable, str(ROOT / 'tools/train.py'), str(ROOT / f'configs/demo/{run.config}.py'),
               '--work-dir', str(out / run.name), '--data-root', data_root]
    (out / run.name).mkdir(parents=True)
    with open(out / run.name / 'console.log', 'w') as log:
        run.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=out.parents[1],
                                       env=environment)


def progress(run: Run, out: Path) -> tuple[int, int]:
    """(iteration, iterations) that the run has logged so far."""
    logged = sorted((out / run.name).glob('*/vis_data/scalars.json'))
    lines = [line for line in logged[-1].read_text().splitlines() if '"loss"' in line] if logged else []
    return (json.loads(lines[-1])['step'] if lines else 0), run.iterations


def clock(seconds: float) -> str:
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


def fail(run: Run, out: Path) -> None:
    tail = (out / run.name / 'console.log').read_text().splitlines()[-25:]
    print(f'\n{run.name} failed (full log: {out / run.name / "console.log"}):', *tail, sep='\n  ')
    for other in RUNS:
        if other.process and other.process.poll() is None:
            other.process.terminate()
    sys.exit(1)


def report_progress(out: Path, began: float, live: bool) -> None:
    states, worked = [], 0.0
    for run in RUNS:
        if run.state == 'done':
            worked += run.cost
        elif run.state == 'running':
            step, total = progress(run, out)
            worked += run.cost * step / total
            states.append(f'{run.name} {step}/{total}')
    elapsed, whole = time.time() - began, sum(run.cost for run in RUNS)
    eta = clock(elapsed * (whole - worked) / worked) if worked > 0.02 * whole else '...'
    ended = sum(run.state == 'done' for run in RUNS)
    line = f'[{clock(elapsed)}] {100 * worked / whole:3.0f} %  ETA {eta}  {ended}/{len(RUNS)} runs  now: ' \
           + ', '.join(states)
    print(f'\r{line:<118}'[:119] if live else line, end='' if live else '\n', flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work-dir', default='work_dirs/demo',
                        help='folder for runs and report (default: %(default)s)')
    parser.add_argument('--data-root', default='data',
                        help='folder in which the embedded data set is drawn, as beacons/ (default: %(default)s)')
    args = parser.parse_args()
    out = Path(args.work_dir).resolve()
    if out.parts[-2:] != ('work_dirs', 'demo'):
        parser.error('--work-dir must end in work_dirs/demo: the configs start each stage from checkpoints there')
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    data_root = str(Path(args.data_root).resolve())
    live, began, last_line = sys.stdout.isatty(), time.time(), 0.0
    print(f'{len(RUNS)} runs of tools/train.py, then a report: {out}/report.html')
    with ThreadPoolExecutor() as pool:

        def submit(run: Run) -> Future:
            start(run, out, data_root)
            return pool.submit(run.wait)

        for run in work_off(RUNS, submit, places=2, interval=0.5):
            if run and run.state == 'failed':
                fail(run, out)
            elif run and run.state == 'done':
                message = f'[{clock(time.time() - began)}] done: {run.name}'
                print(f'\r{message:<118}' if live else message, flush=True)
            if time.time() - last_line > (1 if live else 20):
                report_progress(out, began, live)
                last_line = time.time()
    print(f'\n[{clock(time.time() - began)}] all runs done; drawing the report')
    subprocess.run([sys.executable, str(ROOT / 'tools/demo_report.py'), str(out), '--data-root', data_root,
                    '--seconds', str(time.time() - began)], check=True, cwd=out.parents[1])


if __name__ == '__main__':
    main()
