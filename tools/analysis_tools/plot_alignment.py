"""Draws the curves of stages 1 and 2 of several runs, and errors by block (ViT-AdaLA Figs. 5, 7, 8, 10 and 12).

    python tools/analysis_tools/plot_alignment.py [NAME=]RUN_DIR ... [--evaluation alignment.json ...] [--out DIR]

It reads loss, relative error and validation scores from the logs in the runs' work dirs. Runs of one stage share their
panels. With results of evaluate_alignment.py, it also draws the error of each block, and how it accumulates over depth.
Writes curves.png and curves.json.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from mmengine.config import Config

from adala_mm.analysis import outputs, require_distinct, write
from adala_mm.utils.cli import one_message
from adala_mm.utils.pictures import save_figure
from adala_mm.utils.records import curve, newest_log
from adala_mm.utils.tables import markdown_table

STAGES = {'AttentionAlignment': 'stage 1', 'FeatureAlignment': 'stage 2'}
# What is logged, its title, and whether its axis is logarithmic.
CURVES = {'loss': ('loss', True), 'rel_error': ('relative error, training', False),
          'align/rel_error': ('relative error of features, validation', False),
          'align/top1_agreement': ('top-1 agreement (%), validation', False)}


class Run(NamedTuple):
    name: str
    folder: Path

    @classmethod
    def parse(cls, text: str) -> Run:
        """Reads ``[NAME=]RUN_DIR``; without a name it is that of the folder."""
        name, sign, folder = text.partition('=')
        if not sign or '/' in name:
            name, folder = '', text
        return cls(name or Path(folder).name, Path(folder))


def read_run(run: Run) -> dict:
    """Stage and curves of a work dir, from before and after a restart.

    Raises:
        FileNotFoundError: if there is no log, or no config beside it.
        ValueError: if it is no run of stage 1 or 2, or has logged nothing.
    """
    log = newest_log(run.folder)
    dumped = log.with_name('config.py')
    if not dumped.is_file():
        raise FileNotFoundError(f'no config at {dumped}: what was run in {run.folder} cannot be told')
    config = Config.fromfile(dumped)
    kind = str((config.get('model') or {}).get('type')).removeprefix('adala_mm.')
    if kind not in STAGES:
        raise ValueError(f'{run.folder} is a run of {kind}: only those of stage 1 and 2 '
                         f'({", ".join(STAGES)}) have these curves')
    curves = {key: values for key in CURVES if (values := curve(run.folder, key))[0]}
    if not curves:
        raise ValueError(f'{run.folder} has logged none of {", ".join(CURVES)} yet')
    return dict(name=run.name, folder=str(run.folder), stage=STAGES[kind],
                curves={key: dict(steps=steps, values=values) for key, (steps, values) in curves.items()})


def read_evaluation(path: Path) -> list[dict]:
    """Students of a file that evaluate_alignment.py wrote.

    Raises:
        FileNotFoundError, ValueError: if it is not there or something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f'--evaluation {path}: there is no such file')
    try:
        students = [dict(name=row['name'], blocks=[{key: block[key] for key in ('attention_error', 'rel_error')}
                                                   for block in row['blocks']])
                    for row in json.loads(path.read_text())['students']]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'--evaluation {path}: no result of evaluate_alignment.py ({error!r})') from error
    if not students:
        raise ValueError(f'--evaluation {path}: it has no students')
    return students


def draw_curves(figure: SubFigure, runs: Sequence[dict], keys: Sequence[str], title: str) -> None:
    """Panels of one stage: a run is a line of the same colour in all of them, validations have marks."""
    figure.suptitle(title, fontsize=11)
    for axis, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        label, logarithmic = CURVES[key]
        for i, run in enumerate(runs):
            if key in run['curves']:
                line = run['curves'][key]
                axis.plot(line['steps'], line['values'], marker='.' if '/' in key else None, color=f'C{i}',
                          label=run['name'])
        if logarithmic:
            axis.set_yscale('log')
            values = [value for run in runs if key in run['curves'] for value in run['curves'][key]['values']]
            wide = max(values) > 5 * min(values)  # else there may be no tick at all
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(5))
            axis.yaxis.set_major_formatter('{x:.3g}')
            axis.yaxis.set_minor_locator(NullLocator())
        axis.set_title(label, fontsize=9)
        axis.set_xlabel('iteration')
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)


def draw_blocks(figure: SubFigure, students: Sequence[dict]) -> None:
    """Errors of the blocks: attention by itself as bars, accumulated as lines."""
    figure.suptitle('errors by block', fontsize=11)
    bars, lines = figure.subplots(1, 2)
    width = 0.8 / len(students)
    for i, student in enumerate(students):
        blocks = range(1, len(student['blocks']) + 1)
        places = [block + (i - (len(students) - 1) / 2) * width for block in blocks]
        bars.bar(places, [block['attention_error'] for block in student['blocks']], width, color=f'C{i}',
                 label=student['name'])
        lines.plot(blocks, [block['rel_error'] for block in student['blocks']], '.-', color=f'C{i}',
                   label=student['name'])
    bars.set_title("relative error of attention, given the teacher's input", fontsize=9)
    lines.set_title('relative error of features, accumulated', fontsize=9)
    depth = max(len(student['blocks']) for student in students)
    for axis in (bars, lines):
        axis.set(xlabel='block', ylim=(0, None))
        axis.set_xticks(range(1, depth + 1, max(1, depth // 12)))
        axis.grid(alpha=0.3, axis='y')
        axis.legend(fontsize=8)


def draw(path: Path, runs: Sequence[dict], students: Sequence[dict]) -> None:
    stages = {stage: own for stage in STAGES.values() if (own := [run for run in runs if run['stage'] == stage])}
    shown = {stage: [key for key in CURVES if any(key in run['curves'] for run in own)]
             for stage, own in stages.items()}
    rows = len(stages) + bool(students)
    figure = Figure(figsize=(max([3.6 * len(keys) for keys in shown.values()] + [9.0 * bool(students)]), 3.3 * rows),
                    layout='constrained')
    parts = iter(figure.subfigures(rows, 1, squeeze=False)[:, 0])
    for stage, own in stages.items():
        draw_curves(next(parts), own, shown[stage], stage)
    if students:
        draw_blocks(next(parts), students)
    save_figure(figure, path)


def summary(runs: Sequence[dict]) -> str:
    def last(run: dict, key: str) -> str:
        return f'{run["curves"][key]["values"][-1]:.4g}' if key in run['curves'] else '-'
    return markdown_table(['run', 'stage', 'last step', *CURVES],
                          [[run['name'], run['stage'], str(max(line['steps'][-1] for line in run['curves'].values())),
                            *(last(run, key) for key in CURVES)] for run in runs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('runs', nargs='*', type=Run.parse, metavar='[NAME=]RUN_DIR', help='work dirs of stages 1 and 2')
    parser.add_argument('--evaluation', nargs='+', type=Path, default=[], metavar='JSON',
                        help='results of evaluate_alignment.py')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/analysis'), metavar='DIR',
                        help='folder for the JSON and PNG files (default: %(default)s)')
    parser.add_argument('--overwrite', action='store_true', help='replace earlier results in that folder')
    args = parser.parse_args()
    if not args.runs and not args.evaluation:
        parser.error('nothing to draw: name the work dir of a run, or results with --evaluation')
    with one_message():
        run(args)


def run(args: argparse.Namespace) -> None:
    json_path, png_path = outputs(args, 'curves')
    require_distinct('run', [run.name for run in args.runs], '...')
    runs = [read_run(run) for run in args.runs]
    students = [student for path in args.evaluation for student in read_evaluation(path)]
    require_distinct('student of these evaluations', [student['name'] for student in students], '...')
    draw(png_path, runs, students)
    write(json_path, dict(runs=runs, students=students))
    if runs:
        print(summary(runs), end='\n\n')
    print(png_path, json_path, sep='\n')


if __name__ == '__main__':
    main()
