"""Shows which classes a classifier sees in your pictures.

    python tools/analysis_tools/classify_image.py CONFIG CHECKPOINT IMAGE ... [--top 5] [--out DIR]

Writes <name>_classified.png for each image, with the probabilities of the most likely classes, and classified.json. An
IMAGE is a file or a folder. No image is ever replaced.
"""
from __future__ import annotations

import argparse
from pathlib import Path

import mmcv
import numpy as np
from matplotlib.figure import Figure
from mmengine.utils import track_iter_progress

from adala_mm.analysis import analysis_parser, classify, load_predictor, output_paths, positive, write
from adala_mm.utils.cli import one_message
from adala_mm.utils.pictures import save_figure


def draw(path: Path, image: np.ndarray, found: list[dict]) -> None:
    """The image, and its likeliest classes as bars."""
    figure = Figure(figsize=(8.5, 3.4), layout='constrained')
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    left.imshow(image)
    left.set_axis_off()
    values = [100 * row['probability'] for row in found]
    right.barh(range(len(found)), values, color='C0')
    for place, value in enumerate(values):
        right.text(value + 1, place, f'{value:.1f} %', va='center', fontsize=8)
    right.set_yticks(range(len(found)), [row['name'] for row in found])
    right.invert_yaxis()
    right.set(xlim=(0, 118), xlabel='probability (%)')
    right.set_xticks(range(0, 101, 20))
    right.spines[['top', 'right']].set_visible(False)
    save_figure(figure, path)


def main() -> None:
    parser = analysis_parser(__doc__)
    parser.add_argument('config', help='config of a classifier')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='files and folders')
    parser.add_argument('--top', type=positive, default=5, metavar='K',
                        help='number of classes to show (default: %(default)s)')
    args = parser.parse_intermixed_args()
    with one_message():
        run(args)


def run(args: argparse.Namespace) -> None:
    wanted, json_path = output_paths(args, '_classified', 'classified')
    model = load_predictor(args, 'ImageClassifier')
    classes, rows = model.dataset_meta['classes'], []
    for source, picture in track_iter_progress(wanted):
        top = classify(model, source).topk(min(args.top, len(classes)))
        found = [dict(index=i, name=classes[i], probability=value)  # ImageNet has two classes called crane
                 for value, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)]
        draw(picture, mmcv.imread(source, channel_order='rgb'), found)
        rows.append(dict(image=source, picture=str(picture), classes=found))
    write(json_path, dict(rows=rows, model=model.record), args.device)
    for row in rows:
        print(f'{row["picture"]}: ' + ', '.join(f'{one["name"]} {one["probability"]:.1%}' for one in row['classes']))


if __name__ == '__main__':
    main()
