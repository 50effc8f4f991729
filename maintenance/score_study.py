"""Scores the alignments of a study again, on other images.

    python maintenance/score_study.py configs/real/study.yml --name unseen [--data-root DATA] [--only NAME ...] \
        --cfg-options test_dataloader.dataset.ann_file=train.txt

Recipes that were chosen by their scores look better on those images than they are. The test set, with the options
given here, should be images that neither training nor any choice has seen. Takes the weights that the study has left in
work_dirs; runs without are told and left out. Writes docs/results/<study>_<name>.json, run by run, in the form of the
study's own records: what is there already is not done again.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from study import TOOLS, Run, Study

from adala_mm.utils.cli import one_message
from adala_mm.utils.machine import cores, git_state
from adala_mm.utils.records import save


def score(study: Study, run: Run, options: list[str]) -> dict:
    """What tools/test.py says of a run's last checkpoint.

    Raises:
        ValueError: if it fails, with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, TOOLS / 'test.py', study.config(run), study.weights(run), '--work-dir', folder,
                   *(['--data-root', study.data_root] if study.data_root else []), '--cfg-options', *options]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=study.environment())
        if done.returncode:
            raise ValueError(f'{study.key(run)}: testing failed:\n{(done.stdout + done.stderr)[-1500:]}')
        (found,) = Path(folder).glob('*/[0-9]*.json')
        return json.loads(found.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('study', type=Path, help='study file, for instance configs/real/study.yml')
    parser.add_argument('--name', required=True, help='of these images, in the name of the records')
    parser.add_argument('--cfg-options', nargs='+', required=True, metavar='KEY=VALUE',
                        help='of every config, such as those that name the images')
    parser.add_argument('--data-root', help='use this folder wherever the configs say data/')
    parser.add_argument('--only', nargs='+', metavar='NAME', help='these runs; all alignments if unset')
    parser.add_argument('--records', type=Path, help="the study's; docs/results/<study>.json if unset")
    parser.add_argument('--out', type=Path, help='docs/results/<study>_<name>.json if unset')
    args = parser.parse_args()
    with one_message():
        run(args)


def run(args: argparse.Namespace) -> None:
    records = args.records or Path(f'docs/results/{args.study.stem}.json')
    out = args.out or records.with_name(f'{args.study.stem}_{args.name}.json')
    study = Study(args.study, records, args.data_root, cores())
    if unknown := set(args.only or ()) - set(study.plan.runs):
        raise ValueError(f'the study has no run {", ".join(sorted(unknown))}; it has {", ".join(study.plan.runs)}')
    known = json.loads(out.read_text()) if out.exists() else {}
    for key, before in known.items():
        if before['options'] != args.cfg_options:
            raise ValueError(f'{out} has {key} with the options {" ".join(before["options"])}: say another --name')
    runs = [tuple(key.split('/seed')) for key, record in study.records.items()
            if 'align/rel_error' in record['scores'][-1] and (not args.only or key.split('/')[0] in args.only)]
    runs = [(name, int(seed)) for name, seed in runs]
    todo = [run for run in runs if study.key(run) not in known]
    print(f'{len(runs)} runs, {len(runs) - len(todo)} of them recorded in {out}')
    for number, run in enumerate(todo, 1):
        key = study.key(run)
        if not study.weights(run).is_file():
            print(f'{key}: {study.weights(run)} is not there')
            continue
        scores, told = score(study, run, args.cfg_options), study.records[key]
        known[key] = told | dict(scores=[scores | dict(step=told['iterations'])], options=args.cfg_options,
                                 machine=study.machine(git_state()))
        save(out, known)
        print(f'{key}: ' + ', '.join(f'{name} {value:.4g}' for name, value in scores.items())
              + f' ({number} of {len(todo)})', flush=True)


if __name__ == '__main__':
    main()
