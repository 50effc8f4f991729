"""Compares students with their teacher, block by block and as a whole, on images without labels.

    python tools/analysis_tools/evaluate_alignment.py [NAME=]CONFIG[:CHECKPOINT] ... [--teacher CONFIG[:CHECKPOINT]]
        [--images PATH ...] [--num-images N] [--size H [W]] [--out DIR]

It measures the relative error and the cosine of every block, accumulated and of the block alone, CKA, the entropy of
attention maps, and the agreement of neighbours and of a linear probe. Writes alignment.json and alignment.png;
docs/analysis.md explains them.
"""
from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from mmengine.utils import ProgressBar

from adala_mm.analysis import (
    Comparison,
    add_size,
    analysis_parser,
    find_images,
    normalise,
    open_networks,
    outputs,
    positive,
    read_image,
    require_equal,
    write,
)
from adala_mm.analysis.comparison import SMALLEST
from adala_mm.utils.cli import one_message
from adala_mm.utils.pictures import save_figure
from adala_mm.utils.tables import markdown_table


def table(data: dict) -> str:
    """One row per student: the final features, then means over blocks."""
    def mean(row: dict, key: str) -> str:
        values = [block[key] for block in row['blocks']]
        return '-' if None in values else f'{sum(values) / len(values):.3f}'

    ks = list(data['students'][0]['knn'])
    header = ['student', 'relative error', 'cosine', 'attention error', 'CKA', 'entropy',
              *(f'{k}-NN agreement (%)' for k in ks), 'probe (%)']
    rows = [['teacher', '0', '1', '0', '1', mean(data['teacher'], 'entropy'), *['100'] * len(ks),
             f'{data["students"][0]["probe"]["teacher"]:.1f}']]
    rows += [[row['name'], f'{row["rel_error"]:.3f}', f'{row["cosine"]:.3f}',
              *(mean(row, key) for key in ('attention_error', 'cka', 'entropy')),
              *(f'{row["knn"][k]:.1f}' for k in ks), f'{row["probe"]["student"]:.1f}'] for row in data['students']]
    return markdown_table(header, rows)


def draw(path: Path, data: dict) -> None:
    figure = Figure(figsize=(12, 6.4), layout='constrained')
    (error, local, cosine), (cka, entropy, bars) = figure.subplots(2, 3)
    students, depth = data['students'], len(data['teacher']['blocks'])
    blocks = range(1, depth + 1)

    def line(axis, row: dict, key: str, **style) -> None:
        values = [block[key] for block in row['blocks']]
        if None not in values:
            axis.plot(blocks, values, marker='.', **style)

    for i, row in enumerate(students):
        style = dict(color=f'C{i}', label=row['name'])
        line(error, row, 'rel_error', **style)
        line(local, row, 'attention_error', **style)
        line(local, row, 'block_error', color=f'C{i}', linestyle='--')
        for axis, key in ((cosine, 'cosine'), (cka, 'cka'), (entropy, 'entropy')):
            line(axis, row, key, **style)
    line(entropy, data['teacher'], 'entropy', color='black', label='teacher')
    local.plot([], [], color='grey', label='attention alone')
    local.plot([], [], '--', color='grey', label='whole block')
    error.set(title='error of features, accumulated', ylim=(0, None))
    local.set(title="error of a block given the teacher's input", ylim=(0, None))
    cosine.set(title='cosine of features, accumulated', ylim=(None, 1.02))
    cka.set(title='CKA', ylim=(None, 1.02))
    entropy.set(title='entropy of attention maps, of log N', ylim=(None, 1.02))
    for axis in (error, local, cosine, cka, entropy):
        axis.set_xlabel('block')
        axis.set_xticks(range(1, depth + 1, max(1, depth // 12)))
        axis.grid(alpha=0.3)
    for axis in (error, local, entropy):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    names = [f'{k}-NN' for k in students[0]['knn']] + ['linear\nprobe']
    width = 0.8 / len(students)
    for i, row in enumerate(students):
        values = [*row['knn'].values(), row['probe']['student']]
        places = [j + (i - (len(students) - 1) / 2) * width for j in range(len(names))]
        bars.bar(places, values, width, color=f'C{i}')
        for place, value in zip(places, values, strict=True):
            bars.text(place, value + 1, f'{value:.0f}', ha='center', fontsize=7)
    probe = students[0]['probe']
    for share, text, line_style in ((probe['teacher'], "probe on the teacher's own features", ':'),
                                    (probe['largest'], 'largest class of the probe', '--')):
        bars.hlines(share, len(names) - 1.45, len(names) - 0.55, color='black', linestyle=line_style, label=text)
    bars.legend(fontsize=8, loc='upper left')
    bars.set_xticks(range(len(names)), names)
    bars.set(title='agreement with the teacher (%)', ylim=(0, 125))
    save_figure(figure, path)


def main() -> None:
    parser = analysis_parser(__doc__, num_images=64)
    add_size(parser)
    parser.add_argument('--batch-size', type=positive, default=16, metavar='B',
                        help='images in a batch; CKA needs at least 4 (default: %(default)s)')
    parser.add_argument('--k', type=positive, nargs='+', default=[1, 10], help='numbers of neighbours (default: 1 10)')
    parser.add_argument('--clusters', type=positive, default=16,
                        help="clusters of the teacher's patches: classes of the linear probe (default: %(default)s)")
    parser.add_argument('--no-entropy', action='store_true',
                        help='skip the entropy of attention maps, which is quadratic in tokens')
    args = parser.parse_args()
    with one_message():
        run(args)


def run(args: argparse.Namespace) -> None:
    json_path, png_path = outputs(args, 'alignment')
    if args.batch_size < SMALLEST:
        raise ValueError(f'--batch-size {args.batch_size}: CKA is estimated within batches of at least {SMALLEST} '
                         'images')
    teacher, students = open_networks(args)
    require_equal(teacher, students, 'embed_dim', 'depth', 'patch_size', 'num_prefix')
    paths = find_images(args, students)
    if len(paths) <= max(args.k):
        raise ValueError(f'{len(paths)} images are too few for {max(args.k)} neighbours: more --images or '
                         '--num-images, or a smaller --k')
    comparison, progress = Comparison(teacher, students, not args.no_entropy), ProgressBar(len(paths))
    for first in range(0, len(paths), args.batch_size):
        images = [read_image(path, teacher.size) for path in paths[first:first + args.batch_size]]
        comparison.update([normalise(images, network.preprocessor, args.device) for network in (teacher, *students)])
        progress.update(len(images))
    print()
    data = comparison.results(args.k, args.clusters)
    settings = dict(size=teacher.size, num_images=len(paths), batch_size=args.batch_size, clusters=args.clusters)
    write(json_path, data | dict(images=paths, settings=settings), args.device, [teacher, *students])
    draw(png_path, data)
    print(table(data), f'{png_path}\n{json_path}', sep='\n\n')


if __name__ == '__main__':
    main()
