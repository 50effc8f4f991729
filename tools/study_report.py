"""What a study found: its table, and quality against the compute that was spent on it, as a picture.

    python tools/study_report.py [--study configs/real/study.yml] [--records docs/results/<study>.json] \
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

from adala_mm.utils.pictures import save_figure
from adala_mm.utils.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
ALIGNMENT = {'align/top1_agreement': ('top-1 agreement (%)', 1), 'align/rel_error': ('relative feature error', 3),
             'align/cosine': ('cosine', 3), 'knn/accuracy': ('1-NN accuracy (%)', 1)}
DRAWN = {'align/top1_agreement': None, 'knn/accuracy': 'knn/teacher_accuracy'}  # with what the teacher has; 100 if None
# Of the picture: colour, width of the line and legend of recipes whose label begins like that.
FAMILIES = {'the paper: stages': ('C0', 2.0, "the paper's recipe"), 'plus:': ('C3', 2.0, 'plus'),
            'plus,': ('C1', 1.0, 'plus with one change')}
OTHERS = ('C7', 1.0, "the paper's recipe with one change")
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


def progress(runs: list[dict], metric: str) -> list[tuple[float, float]]:
    """10^12 multiply-adds spent on a chain, and its score, at every validation."""
    return [(compute(runs[:last], score['step']), score[metric])
            for last, run in enumerate(runs, 1) for score in run['scores']
            if score['step'] or last == 1]  # where a later stage starts is where the one before it ended


def draw(path: Path, records: dict[str, dict], plan: dict[str, dict]) -> None:
    """Scores at each validation over the compute spent by then: a line a seed, a colour a family of recipes.

    Recipes are the alignments that no other alignment goes on from; `FAMILIES` go by the beginning of their labels.
    """
    records = {key: run for key, run in records.items() if set(ALIGNMENT) <= set(run['scores'][-1])}
    figure = Figure(figsize=(9, 4.2), layout='constrained')
    panels = figure.subplots(1, len(DRAWN))
    ends = [name for name in plan if not any(run['after'] in seeds_of(records, name) for run in records.values())]
    for name in ends:
        label = plan[name].get('label', name)
        color, width, family = next((style for start, style in FAMILIES.items() if label.startswith(start)), OTHERS)
        for key in seeds_of(records, name):
            for axis, metric in zip(panels, DRAWN, strict=True):
                axis.plot(*zip(*progress(chain(records, key), metric), strict=True), marker='.', color=color, lw=width,
                          label=family)
    for axis, (metric, teacher) in zip(panels, DRAWN.items(), strict=True):
        for height in {run['scores'][-1].get(teacher, 100) for run in records.values()}:
            axis.axhline(height, color='black', lw=1, ls=':', label='softmax teacher')
        axis.set_xlabel('10¹² multiply-adds in training', fontsize=12)
        axis.set_ylabel(ALIGNMENT[metric][0], fontsize=12)
        axis.tick_params(labelsize=11)
        axis.grid(alpha=0.3)
    lines = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))  # one of each label
    figure.legend(lines.values(), lines, loc='outside upper center', fontsize=12, ncols=2)
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
