"""Runs the benchmarks of one GPU part by part, each part in its own process with its own budget of seconds.

    benchmarks/run_gpu.sh [--out DIR] [--parts NAME ...] [--processes 16] [--dry-run]

Each part writes <part>.jsonl to DIR. What a part leaves of its budget goes to the parts after it. run.jsonl says how
each part ended, and run.log holds their output.

Exit status: 0 if every part is done; 10 + i if part i (counted from 0) is the first that failed or exceeded its time;
1 if there is no GPU; 2 for a wrong option.
"""
from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import torch

from adala_mm.utils.machine import cores, default_device, hardware
from adala_mm.utils.row_log import RowLog

ROOT = Path(__file__).resolve().parents[1]
STACK = ('mmengine', 'mmcv', 'mmseg', 'mmdet', 'timm')  # OpenMMLab's packages, and what comes with them
# The CPU only, Triton's interpreter, nothing compiled; threads would fight about tensors that are tiny.
DRY = dict(CUDA_VISIBLE_DEVICES='', TRITON_INTERPRET='1', TORCHDYNAMO_DISABLE='1', OMP_NUM_THREADS='1')
Run = Callable[[list[str], float, Path, dict[str, str]], str]


class Part(NamedTuple):
    name: str
    seconds: float
    tool: str
    options: str
    dry: str  # options that come after, where a CPU only walks through
    needs: tuple[str, ...] = ()


CORE = '--dtype bf16 --heads 16 --batch 8 32 1 --tokens 1024 4096 16384 --passes forward backward --competitors '
TINY_CORE = '--dtype fp32 --heads 2 --batch 1 --dim 16 --tokens 16 --seconds 1e-9 '
PARTS = (
    # Kernels of what is measured below are compiled side by side, by whoever calls them first.
    Part('compile', 60, 'benchmark_attention', f'{CORE} ours coarse compiled fbi_la --warm-up {{processes}}',
         f'{TINY_CORE} --competitors ours coarse compiled'),
    Part('check', 50, 'check_kernels', '--dtype bf16 --dims 64 80 128 --tokens 197 4097 --processes {processes}',
         '--dims 16 --tokens 17 --processes 1'),
    # The batches are in the order of their worth, should time be up: 128, 512, 16 heads in flight.
    Part('core', 130, 'benchmark_attention',
         f'{CORE} sdpa flash cudnn efficient math ours coarse compiled fbi_la --seconds 0.3',
         f'{TINY_CORE} --competitors sdpa flash cudnn efficient math ours coarse compiled fbi_la'),
    Part('model', 130, 'benchmark_model',
         '--arch L --dtype bf16 --sizes 224 384 512 768 1024 1536 2048 --attentions LinearAttention '
         'CoarseToFineAttention --cuda-graph --best-batch --seconds 0.3 --time-limit 3',
         '--arch T --sizes 32 --dtype fp32 --seconds 1e-9 --time-limit 0.1', STACK),
    Part('training', 90, 'benchmark_training',
         '--arch L --size 512 --batch 8 --dtype bf16 --stages 1 2 3 --seconds 3',
         '--arch T --size 32 --batch 1 --dtype fp32 --seconds 1e-9 --head mask2former_demo_beacons', STACK),
    Part('spot', 40, 'check_kernels', '--dtype fp16 fp32 --dims 64 80 128 --tokens 197 4097 --processes {processes}',
         '--dims 16 --tokens 17 --processes 1'),
)


def run(command: list[str], seconds: float, log: Path, environment: dict[str, str]) -> str:
    """Runs a command and what it starts, for so long at most. Empty if it ends well, else how it ended."""
    with open(log, 'ab') as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                                   env=os.environ | environment)
    try:
        status = process.wait(max(seconds, 0))
        return f'failed: exit status {status}' if status else ''
    except subprocess.TimeoutExpired:
        return f'stopped: its {seconds:.0f} s were up'
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(argv: Sequence[str] | None = None, run: Run = run) -> int:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog='run_gpu.sh', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, help='folder of the records; benchmarks/results/<name of the GPU>')
    parser.add_argument('--parts', nargs='+', choices=names, default=names, metavar='NAME',
                        help=f'only some of {", ".join(names)}')
    parser.add_argument('--processes', type=int, default=cores(), help='that compile and check side by side')
    parser.add_argument('--dry-run', action='store_true',
                        help='walk through all parts with tiny sizes on the CPU; without --out, nothing is kept')
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        print('no CUDA device: --dry-run walks through all parts on the CPU', file=sys.stderr)
        return 1
    environment = DRY if args.dry_run else {}
    machine = hardware(torch.device('cpu') if args.dry_run else default_device())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended, too
    with ExitStack() as stack:
        out = args.out or (Path(stack.enter_context(tempfile.TemporaryDirectory())) if args.dry_run else
                           ROOT / 'benchmarks/results' / re.sub(r'\W+', '_', machine['device'].lower()))
        out.mkdir(parents=True, exist_ok=True)
        try:
            log = RowLog(out / 'run.jsonl', ['part'], machine, dict(parts=args.parts, dry_run=args.dry_run))
        except ValueError as error:
            parser.error(str(error))
        outcomes = run_parts(args, out, log, environment, run)
    wrong = {name: outcome for name, outcome in outcomes.items() if outcome.startswith(('failed', 'stopped'))}
    if wrong:
        print('; '.join(f'{name} {outcome}' for name, outcome in wrong.items()), file=sys.stderr)
    return 10 + names.index(next(iter(wrong))) if wrong else 0


def run_parts(args: argparse.Namespace, out: Path, log: RowLog, environment: dict[str, str], run: Run
              ) -> dict[str, str]:
    """How each part ended."""
    outcomes, begin, budget = {}, time.monotonic(), 0.0
    patience = 10 if args.dry_run else 1  # a CPU may have other things to do
    for part in PARTS:
        if part.name not in args.parts:
            continue
        start, budget = time.monotonic(), budget + patience * part.seconds
        missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
        if missing:
            outcome = f'skipped: {", ".join(missing)} not installed'
        else:
            options = f'{part.options} {part.dry if args.dry_run else ""}'.format(processes=args.processes).split()
            command = [sys.executable, '-W', 'ignore', str(ROOT / f'tools/analysis_tools/{part.tool}.py'), *options,
                       '--out', str(out / f'{part.name}.jsonl')]
            print(f'=== {part.name}: at most {begin + budget - start:.0f} s', flush=True)
            (out / 'run.log').touch()
            told = (out / 'run.log').stat().st_size
            outcome = run(command, begin + budget - start, out / 'run.log', environment) or 'done'
            print((out / 'run.log').read_bytes()[told:].decode(errors='replace'), end='')
        seconds = round(time.monotonic() - start, 1)
        log.add(dict(part=part.name, outcome=outcome, seconds=seconds, budget=part.seconds))
        print(f'=== {part.name}: {outcome}, {seconds} s', flush=True)
        outcomes[part.name] = outcome
    print(f'=== {time.monotonic() - begin:.0f} s, records in {out}', flush=True)
    return outcomes


if __name__ == '__main__':
    sys.exit(main())
