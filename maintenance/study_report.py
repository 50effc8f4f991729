"""What a study found: its table, and quality against the compute that was spent on it, as a picture.

    python maintenance/study_report.py [--study configs/real/study.yml] [--records docs/results/<study>.json] \
        [--png docs/images/<study>.png]

There is a picture where there are alignments.
"""
from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path

from matplotlib.figure import Figure
from mmengine.config import Config

from adala_mm.utils.pictures import label_points, save_figure
from adala_mm.utils.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
ALIGNMENT = {'align/top1_agreement': ('top-1 agreement (%)', 1), 'align/rel_error': ('relative feature error', 3),
             'align/cosine': ('cosine', 3), 'knn/accuracy': ('1-NN accuracy (%)', 1)}
DRAWN = {'align/top1_agreement': None, 'knn/accuracy': 'knn/teacher_accuracy'}  # with what the teacher has; 100 if None
# Of the picture: colour of recipes whose label begins like that, and what it is called.
FAMILIES = {'the paper: stages': ('C0', "the paper's recipe"), 'plus: stages': ('C3', 'plus'),
            'coarse: stages': ('C2', 'coarse')}
OTHERS = ('0.45', None)
SEGMENTATION = {'mIoU': ('mIoU', 2), 'aAcc': ('pixel accuracy', 2)}


def chain(records: dict[str, dict], key: str | None) -> list[dict]:
    """A recorded run and all that it goes back to, the first one first."""
    return [] if key is None else chain(records, records[key]['after']) + [records[key]]


def lengths(runs: list[dict], steps: int) -> list[int]:
    """Iterations of a chain: all of every run but the last, of that ``steps``."""
    return [run['iterations'] for run in runs[:-1]] + [steps]


def compute(runs: list[dict], steps: int) -> float:
    """10^12 multiply-adds of a chain in training, teacher and student, up to ``steps`` of its last run."""
    return sum(n * run['batch_size'] * run['training_multiply_adds'] / 1e12
               for n, run in zip(lengths(runs, steps), runs, strict=True))


def seeds_of(records: dict[str, dict], name: str) -> list[str]:
    return sorted(key for key in records if key.rpartition('/')[0] == name)


def spread(values: list[float], digits: int) -> str:
    """Mean, and standard deviation (n - 1) where there is more than one value."""
    text = f'{statistics.fmean(values):.{digits}f}'
    return f'{text} ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else text


def shown(records: dict[str, dict], names: Iterable[str], columns: Iterable[str]) -> list[dict]:
    """Those records that `table` shows: of the runs ``names``, with the scores of ``columns``."""
    runs = [records[key] for name in names for key in seeds_of(records, name)]
    return [run for run in runs if set(columns) <= set(run['scores'][-1])]


def table(records: dict[str, dict], plan: dict[str, dict], columns: dict[str, tuple[str, int]]) -> str:
    """A row for each run of ``plan`` with records that have the scores of ``columns``: mean and spread.

    A row of the scores before training is above it where the plan has a label for that. Where all runs are alignments,
    rows say what they cost in training.
    """
    rows, priced = [], 'align/rel_error' in columns
    for name, which, label in labels(plan):
        if not (runs := shown(records, [name], columns)):
            continue
        whole, steps = chain(records, seeds_of(records, name)[0]), runs[0]['scores'][which]['step']
        if which == 0 and steps:  # there was no validation before training
            continue
        scores = [spread([run['scores'][which][metric] for run in runs], digits)
                  for metric, (_, digits) in columns.items()]
        rows.append([label, f'{runs[0]["softmax_blocks"]} / {runs[0]["linear_blocks"]}',
                     ' + '.join(map(str, lengths(whole, steps))),
                     *([f'{compute(whole, steps):.1f}'] if priced else []), *scores, str(len(runs))])
    return markdown_table(['recipe', 'softmax / linear blocks', 'iterations', *['10¹² multiply-adds'] * priced,
                           *(title for title, _ in columns.values()), 'seeds'], rows)


def progress(chains: list[list[dict]], metric: str) -> list[tuple[float, float]]:
    """10^12 multiply-adds spent on a chain, and its score, at every validation: means over the seeds."""
    return [(compute(chains[0][:last], score['step']),
             statistics.fmean(runs[last - 1]['scores'][i][metric] for runs in chains))
            for last, run in enumerate(chains[0], 1) for i, score in enumerate(run['scores'])
            if score['step'] or last == 1]  # where a later stage starts is where the one before it ended


def draw(path: Path, records: dict[str, dict], plan: dict[str, dict]) -> None:
    """Scores over the compute spent by then, means over the seeds: lines for `FAMILIES`, points for others' ends.

    Those have their names in the first panel alone. Recipes are the alignments that no other alignment goes on from.
    """
    records = {key: run for key, run in records.items() if set(ALIGNMENT) <= set(run['scores'][-1])}
    figure = Figure(figsize=(13, 7), layout='constrained')
    panels = figure.subplots(1, len(DRAWN), width_ratios=[1.5] + [1] * (len(DRAWN) - 1))  # names are in the first
    recipes = [name for name in plan if seeds_of(records, name)
               and not any(run['after'] in seeds_of(records, name) for run in records.values())]
    marks = []
    for axis, (metric, teacher) in zip(panels, DRAWN.items(), strict=True):
        names, colours, lines = [], [], []
        for name in recipes:
            chains = [chain(records, key) for key in seeds_of(records, name)]
            curve, label = progress(chains, metric), plan[name].get('label', name)
            color, family = next((style for start, style in FAMILIES.items() if label.startswith(start)), OTHERS)
            if family:
                lines += axis.plot(*zip(*curve, strict=True), marker='.', color=color, lw=2)
                label = f'{family}, {" + ".join(map(str, lengths(chains[0], chains[0][-1]["iterations"])))}'
            else:
                axis.plot(*curve[-1], 'o', color=color, ms=4)
            if family or axis is panels[0]:
                names.append((*curve[-1], label))
                colours.append(color)
        for height in {run['scores'][-1].get(teacher, 100) for run in records.values()}:
            lines += [axis.axhline(height, color='black', lw=1, ls=':')]
            axis.text(0.02, height, 'softmax teacher', transform=axis.get_yaxis_transform(), va='bottom', fontsize=10)
        axis.set_xlabel('10¹² multiply-adds in training', fontsize=12)
        axis.set_ylabel(ALIGNMENT[metric][0], fontsize=12)
        axis.margins(x=0.08, y=0.08)
        axis.grid(alpha=0.3)
        marks.append((names, colours, lines))
    for axis, (names, colours, lines) in zip(panels, marks, strict=True):
        label_points(axis, names, colours, lines)
    save_figure(figure, path)


def labels(plan: dict[str, dict]) -> Iterator[tuple[str, int, str]]:
    """Rows of a table: a run, which of its validations, and what to call it."""
    for name, run in plan.items():
        if 'swap' in run:
            yield name, 0, run['swap']
        yield name, -1, run.get('label', name)


def read_plan(study: Path) -> dict[str, dict]:
    return Config.fromfile(study).runs.to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--study', type=Path, default=ROOT / 'configs/real/study.yml')
    parser.add_argument('--records', type=Path, help='docs/results/<study>.json if unset')
    parser.add_argument('--png', type=Path, help='docs/images/<study>.png if unset')
    args = parser.parse_args()
    records = json.loads((args.records or ROOT / f'docs/results/{args.study.stem}.json').read_text())
    plan = read_plan(args.study)
    print(table(records, plan, ALIGNMENT), table(records, plan, SEGMENTATION), sep='\n\n')
    if shown(records, plan, ALIGNMENT):
        draw(args.png or ROOT / f'docs/images/{args.study.stem}.png', records, plan)


if __name__ == '__main__':
    main()
