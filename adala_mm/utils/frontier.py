"""Quality against cost of attentions in a pretrained ViT: table, advice and picture of recorded rows.

Records are those of tools/analysis_tools/compare_attentions.py: ``rows`` by key, each a network (``label``) at an image
``size`` with a ``seed`` after ``stage1`` and ``stage2`` iterations of alignment, with its scores; and ``costs`` by
size.
"""
from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from adala_mm.utils.pictures import label_points, save_figure
from adala_mm.utils.tables import markdown_table

SOFTMAX = 'softmax'  # the teacher's label
SCORES = {'agreement': ('agreement (%)', 1), 'rel_error': ('feature error', 2), 'knn': ('1-NN (%)', 1),
          'miou': ('mIoU', 1)}
Training = tuple[int, int]  # iterations of stages 1 and 2
UNTRAINED = (0, 0)
EXACT = 1e-3  # a feature error that rounding explains
# How long the whole ViT may take, as a multiple of softmax's time at the same size.
LIMITS = {'at any time': float('inf'), 'in the time of softmax': 1.0, 'in half of its time': 0.5}


class Point(NamedTuple):
    """An attention in the picture: where it is cheap and where it is good."""

    label: str
    time: float  # of the whole ViT, softmax = 1
    agreement: float  # percent


def sizes_of(data: dict) -> list[int]:
    return sorted({row['size'] for row in data['rows'].values()})


def trainings_of(data: dict, size: int) -> list[Training]:
    """All that were recorded at a size, the shortest first."""
    return sorted({(row['stage1'], row['stage2']) for row in data['rows'].values() if row['size'] == size})


def describe(training: Training) -> str:
    """Iterations in words."""
    return ' + '.join(f'stage {stage}: {steps}' for stage, steps in enumerate(training, 1) if steps) or 'as is'


def scores(data: dict, label: str, size: int, training: Training) -> dict[str, float]:
    """Means over the seeds; empty if there is no row."""
    rows = [row for row in data['rows'].values()
            if (row['label'], row['size'], row['stage1'], row['stage2']) == (label, size, *training)]
    return {name: statistics.fmean(row[name] for row in rows) for name in SCORES if rows and name in rows[0]}


def labels_of(data: dict, size: int) -> list[str]:
    """Of a size: softmax first, then by agreement after the longest training, the best first."""
    labels = dict.fromkeys(row['label'] for row in data['rows'].values() if row['size'] == size)

    def rank(label: str) -> tuple[bool, float]:
        found = [found for training in trainings_of(data, size) if (found := scores(data, label, size, training))]
        return label != SOFTMAX, -found[-1]['agreement']

    return sorted(labels, key=rank)


def yardstick(data: dict, size: int) -> dict[str, float]:
    """Agreement and feature error of softmax with itself, on photographs moved by one pixel; empty if not recorded."""
    rows = [row for row in data['rows'].values() if row['label'] == SOFTMAX and row['size'] == size]
    return rows[0].get('moved', {}) if rows else {}


def relative(data: dict, size: int, label: str, cost: str) -> float | None:
    """A cost as a multiple of softmax's; None if it was not measured."""
    rows = data['costs'].get(str(size), {}).get('rows', {})
    return rows[label][cost] / rows[SOFTMAX][cost] if label in rows and SOFTMAX in rows else None


def points(data: dict, size: int, training: Training) -> list[Point]:
    """All attentions that have gone through ``training``, without softmax, and what is softmax by a longer way."""
    return [Point(label, time, found['agreement']) for label in labels_of(data, size) if label != SOFTMAX
            and (found := scores(data, label, size, training)) and found['rel_error'] > EXACT
            and (time := relative(data, size, label, 'vit_ms')) is not None]


def pareto(candidates: Iterable[Point]) -> list[Point]:
    """Those that no other beats in time without being worse in agreement, the quickest first."""
    front: list[Point] = []
    for point in sorted(candidates, key=lambda point: (point.time, -point.agreement)):
        if not front or point.agreement > front[-1].agreement:
            front.append(point)
    return front


def advice(data: dict) -> str:
    """Which attention for which size, training and time: the best agreement among those within the limit."""
    rows = []
    for size in sizes_of(data):
        for training in trainings_of(data, size):
            cells = []
            for limit in LIMITS.values():
                allowed = [point for point in points(data, size, training) if point.time <= limit]
                best = max(allowed, key=lambda point: point.agreement, default=None)
                cells.append(f'{best.label}: {best.agreement:.1f} %, {best.time:.2f}' if best else 'softmax')
            rows.append([str(size), describe(training), *cells])
    return markdown_table(['pixels', 'training', *LIMITS], rows)


def table(data: dict) -> str:
    """A table for each size, a row for each attention, the best first; scores of all trainings side by side."""
    return each_size(data, lambda size: size_table(data, size))


def each_size(data: dict, content: Callable[[int], str]) -> str:
    return '\n\n'.join(f'**{size} x {size} pixels**\n\n{content(size)}' for size in sizes_of(data))


def agreements(data: dict, labels: Iterable[str], size: int) -> str:
    """Agreement of some attentions at a size, a column for each training, and their time.

    Left out is what was not recorded, and what is softmax itself at this size.
    """
    trainings, rows = trainings_of(data, size), []
    for label in labels:
        found = [scores(data, label, size, training) for training in trainings]
        if any(score['rel_error'] > EXACT for score in found if score):
            time = relative(data, size, label, 'vit_ms')
            rows.append([label, *(f'{score["agreement"]:.1f}' if score else '-' for score in found),
                         '-' if time is None else f'{time:.2f}'])
    if beside := yardstick(data, size):
        rows.append(['softmax, moved by one pixel', f'{beside["agreement"]:.1f}', *['-'] * len(trainings)])
    return markdown_table(['agreement (%) of', *map(describe, trainings), 'time, softmax = 1'], rows)


def size_table(data: dict, size: int) -> str:
    trainings, costs = trainings_of(data, size), data['costs'].get(str(size), {}).get('rows', {})
    names = [name for name in SCORES if any(name in row for row in data['rows'].values() if row['size'] == size)]
    rows = []
    for label in labels_of(data, size):
        found = [scores(data, label, size, training) for training in trainings[:1 if label == SOFTMAX else None]]
        cells = [' / '.join(f'{score[name]:.{SCORES[name][1]}f}' if name in score else '-' for score in found)
                 for name in names]
        if own := costs.get(label):
            times = [relative(data, size, label, cost) for cost in ('vit_ms', 'layer_ms', 'vit_mib')]
            cells += [*(f'{time:.2f}' for time in times), f'{own["vit_gmac"]:.2f}', f'{own["parameters"]:,}']
        else:
            cells += [''] * 5
        rows.append([label, *cells])
    told = ' / '.join(map(describe, trainings))
    header = [f'{SCORES[name][0]}{": " + told if name == names[0] and len(trainings) > 1 else ""}' for name in names]
    found = markdown_table(['attention', *header, 'time', 'of a layer', 'memory', 'GMAC', 'extra parameters'], rows)
    if beside := yardstick(data, size):
        found += ('\n\nSoftmax and itself on the same photographs, moved to the right by one pixel: agreement '
                  f'{beside["agreement"]:.1f} %, feature error {beside["rel_error"]:.2f}.')
    return found


def draw(path: str | Path, data: dict) -> None:
    """Agreement against time, a panel a size, each attention named at its point; the front is a line.

    A point is what its longest training made of an attention, hollow if others were trained longer; the foot of its
    stem is what it was as is.
    """
    sizes = [size for size in sizes_of(data) if any(points(data, size, it) for it in trainings_of(data, size))]
    figure = Figure(figsize=(7.5 * max(1, len(sizes)), 8.5), layout='constrained')
    panels = figure.subplots(1, max(1, len(sizes)), sharey=True, squeeze=False)[0]
    panels[0].set_ylabel('photographs on which it agrees with softmax (%)', fontsize=12)
    figure.supxlabel('Blue: no other is both faster and nearer to softmax.  Foot of a stem, and hollow: untrained.',
                     fontsize=10, color='0.35')
    names = [draw_panel(axis, data, size) for axis, size in zip(panels, sizes, strict=False)]
    for axis, (named, colours, line) in zip(panels, names, strict=False):
        label_points(axis, named, colours, [line])
    save_figure(figure, path)


def draw_panel(axis: Axes, data: dict, size: int) -> tuple[list[tuple[float, float, str]], list[str], Line2D]:
    """All but the names: returns them at their points, their colours, and the front."""
    trainings, softmax = trainings_of(data, size), Point(SOFTMAX, 1.0, 100.0)
    found, longest = [{p.label: p for p in points(data, size, training)} for training in trainings], {}
    for trained in found:
        longest |= trained
    shown = list(longest.values())
    front = pareto(shown)
    for point in shown:
        start = found[0].get(point.label, point)
        axis.plot([point.time] * 2, [start.agreement, point.agreement], color='0.88', lw=1.5, zorder=0)
    ends = zip(front, [*front[1:], front[-1]], strict=True)
    steps = [place for point, later in ends for place in (point[1:], (later.time, point.agreement))]
    line, = axis.plot(*zip(*steps, strict=True), color='C0', lw=1.5)
    others = [point for point in shown if point not in front]
    for group, colour, width in ((others, '0.55', 5), (front, 'C0', 8), ([softmax], 'black', 8)):
        axis.plot([p.time for p in group], [p.agreement for p in group], 'o', color=colour, ms=width)
        less = [p for p in group if p.label != SOFTMAX and p.label not in found[-1]]
        axis.plot([p.time for p in less], [p.agreement for p in less], 'o', color='white', ms=width - 2)
    axis.set_xscale('log')
    axis.set_ylim(-4, 106)
    axis.margins(x=0.12)
    low, high = axis.get_xlim()
    axis.axvspan(1, high, color='C3', alpha=0.06, lw=0, zorder=0)
    axis.text(0.99, 0.01, 'slower than softmax', transform=axis.transAxes, ha='right', color='C3', fontsize=11)
    axis.set_xlim(low, high)
    if beside := yardstick(data, size):
        axis.axhline(beside['agreement'], color='0.35', lw=1, ls='--', zorder=0)
        axis.text(0.01, beside['agreement'] + 0.6, 'softmax, photographs moved by one pixel', color='0.35', fontsize=9,
                  transform=axis.get_yaxis_transform())
    ticks = [tick for tick in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20) if low <= tick <= high]
    axis.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
    axis.minorticks_off()
    length = ' iterations' if trainings[-1] != UNTRAINED else ''
    axis.set_title(f'{size} x {size} pixels, {describe(trainings[-1])}{length}', fontsize=13)
    axis.set_xlabel('time of the whole ViT, softmax = 1', fontsize=12)
    axis.grid(alpha=0.25)
    named = [softmax, *front, *others]
    colours = ['black', *['C0'] * len(front), *['0.25'] * len(others)]
    return [(p.time, p.agreement, p.label) for p in named], colours, line
