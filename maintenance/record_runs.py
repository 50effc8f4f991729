"""Records finished runs for the tables of the docs: scores, checkpoint hash, machine.

    python maintenance/record_runs.py work_dirs/stage1_deitt_caltech --out docs/results/real.json
"""
from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from adala_mm.utils.checkpoint import load_checkpoint
from adala_mm.utils.fingerprint import file_sha256
from adala_mm.utils.machine import machine
from adala_mm.utils.records import read_scores, save


def record(run: Path) -> dict:
    """What a table needs to know about one work dir."""
    newest = run / Path((run / 'last_checkpoint').read_text().strip()).name
    config = next(run.glob('*.py'))
    return dict(config=config.stem, seed=int(re.search(r'seed=(\d+)', config.read_text())[1]),
                iterations=load_checkpoint(newest)['meta']['iter'],  # the log may end before: it has an interval
                scores=read_scores(run), checkpoint=newest.name, sha256=file_sha256(newest)[:16])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('runs', nargs='+', type=Path, help='work dirs of finished runs')
    parser.add_argument('--out', type=Path, required=True, help='JSON file; runs recorded in it before are kept')
    args = parser.parse_args()
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    for run in args.runs:
        known[run.name] = record(run) | dict(machine=machine())
        print(run.name, known[run.name]['scores'][-1])
    save(args.out, known)


if __name__ == '__main__':
    main()
