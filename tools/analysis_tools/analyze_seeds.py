"""Averages the scores of several runs that differ only in their seed, and shows the spread.

    python tools/analysis_tools/analyze_seeds.py work_dirs/run_seed0 work_dirs/run_seed1 ... [--metric mIoU] \
        [--json OUT.json] [--png OUT.png]

It takes the last validation of each run. It refuses to average runs with different configs; --ignore names entries that
may differ, such as the checkpoints of earlier stages with the same seeds.
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from mmengine.config import Config

from adala_mm.utils.pictures import save_figure
from adala_mm.utils.records import newest_log, read_scores, save
from adala_mm.utils.tables import markdown_table

# What may differ between runs of one config: places, and how often a run was taken up again.
NOT_COMPARED = ('randomness.seed', 'work_dir', 'launcher', 'resume')


def flat(node: Any, prefix: str = '') -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts and lists, named ``a.b.0.c``; empty containers are leaves."""
    if not isinstance(node, (dict, list, tuple)) or not node:
        yield prefix, node
        return
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield from flat(value, f'{prefix}.{key}' if prefix else str(key))


def read_run(folder: Path) -> dict:
    """Seed, compared config entries and last scores of a work dir.

    Raises:
        FileNotFoundError: if there is no log, or no config beside it.
    """
    log = newest_log(folder)
    dumped, facts = log.with_name('config.py'), log.parents[1] / 'run.json'
    if not dumped.is_file():
        raise FileNotFoundError(f'no config at {dumped}: what was run in {folder} cannot be told')
    config = Config.fromfile(dumped).to_dict()
    run = json.loads(facts.read_text()) if facts.is_file() else {}
    seed = (config.get('randomness') or {}).get('seed')
    if config.get('resume'):
        config['load_from'] = None  # where it was taken up again
    entries = dict(flat(config)) | ({'processes': run['processes']} if run else {})
    scores = read_scores(folder)
    return dict(folder=str(folder), seed=run.get('seed') if seed is None else seed, scores=scores[-1] if scores else {},
                config={key: value for key, value in entries.items() if key not in NOT_COMPARED},
                commit=run.get('source', {}).get('commit'))


def differences(runs: list[dict], ignored: list[str]) -> list[str]:
    """One line for each config entry that is not the same in all ``runs``."""
    def value(run: dict, key: str) -> str:
        return repr(run['config'][key]) if key in run['config'] else 'not there'

    known = [run for run in runs if 'processes' in run['config']]  # older runs did not write it down
    lines = []
    for key in sorted({key for run in runs for key in run['config']}):
        found = {value(run, key): run['folder'] for run in (known if key == 'processes' else runs)}
        if len(found) > 1 and not any(key == name or key.startswith(f'{name}.') for name in ignored):
            lines.append(f'{key}: ' + ', '.join(f'{text} ({folder})' for text, folder in found.items()))
    return lines


def summary(runs: list[dict], metrics: list[str]) -> dict[str, dict]:
    """Metric -> statistics over the runs that have it; the standard deviation has n - 1 in its denominator."""
    out = {}
    for metric in metrics:
        having = [run for run in runs if metric in run['scores']]
        values = [run['scores'][metric] for run in having]
        out[metric] = dict(
            n=len(values), mean=statistics.fmean(values), std=statistics.stdev(values) if len(values) > 1 else None,
            min=min(values), max=max(values), seeds=[run['seed'] for run in having], values=values,
            missing=[run['folder'] for run in runs if metric not in run['scores']])
    return out


def table(rows: dict[str, dict]) -> str:
    def number(value: float | None) -> str:
        return '-' if value is None else f'{value:.4g}'
    return markdown_table(
        ['metric', 'n', 'mean', 'standard deviation', 'min', 'max', 'value of each seed'],
        [[metric, str(row['n']), *[number(row[key]) for key in ('mean', 'std', 'min', 'max')],
          ', '.join(f'{seed}: {number(value)}' for seed, value in zip(row['seeds'], row['values'], strict=True))]
         for metric, row in rows.items()])


def draw(path: Path, rows: dict[str, dict]) -> None:
    """Each run as a point, their mean as a line within one standard deviation."""
    figure = Figure(figsize=(2.6 * len(rows) + 0.6, 3), layout='constrained')
    for axis, (metric, row) in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows.items(), strict=True):
        axis.axhline(row['mean'], color='tab:blue')
        if row['std'] is not None:
            axis.axhspan(row['mean'] - row['std'], row['mean'] + row['std'], color='tab:blue', alpha=0.15, lw=0)
        axis.scatter(range(row['n']), row['values'], color='black', zorder=2)
        axis.set_xticks(range(row['n']), [str(seed) for seed in row['seeds']])
        axis.set_xlabel('seed')
        axis.set_title(f'{metric}, mean {row["mean"]:.4g}', fontsize=9)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('runs', nargs='+', type=Path, help='work dirs of the runs')
    parser.add_argument('--metric', nargs='+', help='scores to average (default: all)')
    parser.add_argument('--ignore', nargs='+', default=[], metavar='KEY',
                        help='config entries that may differ, e.g. model.backbone.init_cfg')
    parser.add_argument('--json', type=Path, help='also write the figures to this file')
    parser.add_argument('--png', type=Path, help='also draw the figures into this file')
    args = parser.parse_args()
    twice = [str(path) for path, count in Counter(path.resolve() for path in args.runs).items() if count > 1]
    if twice:
        sys.exit(f'named more than once: {", ".join(twice)}')
    try:
        runs = [read_run(folder) for folder in args.runs]
    except FileNotFoundError as error:
        sys.exit(str(error))
    runs.sort(key=lambda run: (run['seed'] is None, run['seed'], run['folder']))
    if lines := differences(runs, args.ignore):
        sys.exit('\n  '.join(['these runs differ in more than their seed, so they have no mean:', *lines,
                              'If that is meant, name it after --ignore']))
    logged = list(dict.fromkeys(key for run in runs for key in run['scores'] if key != 'step'))
    if absent := [metric for metric in args.metric or [] if metric not in logged]:
        sys.exit(f'no run has a score {", ".join(absent)}; there are: {", ".join(logged) or "none"}')
    if not logged:
        sys.exit('none of these runs has been validated: there is nothing to average')
    steps = {run['folder']: run['scores']['step'] for run in runs if run['scores']}
    if len(set(steps.values())) > 1:
        sys.exit('the last validations were after different numbers of steps, finish the runs first: '
                 + ', '.join(f'{step} ({folder})' for folder, step in steps.items()))
    rows = summary(runs, args.metric or logged)
    print(table(rows))
    print(f'\nLast validation, step {next(iter(steps.values()))}. Standard deviation with n - 1.')
    for metric, row in rows.items():
        if row['missing']:
            print(f'Without {metric}: {", ".join(row["missing"])}')
    if again := [str(seed) for seed, count in Counter(run['seed'] for run in runs).items() if count > 1]:
        print(f'More than one run has seed {", ".join(again)}: the spread between seeds is underestimated.')
    if len(commits := sorted({run['commit'] for run in runs if run['commit']})) > 1:
        print(f'The code was not the same: commits {", ".join(commit[:8] for commit in commits)}')
    if args.json:
        save(args.json, dict(runs=[{key: run[key] for key in ('folder', 'seed', 'commit')} for run in runs],
                             step=next(iter(steps.values())), metrics=rows))
    if args.png:
        draw(args.png, rows)


if __name__ == '__main__':
    main()
