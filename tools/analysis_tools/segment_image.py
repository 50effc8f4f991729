"""Paints what a segmentor sees over your pictures.

    python tools/analysis_tools/segment_image.py CONFIG CHECKPOINT IMAGE ... [--out DIR] [--opacity 0.6]

Writes <name>_segmented.png for each image, with a legend of the classes found, and segmented.json with their shares of
the image. An IMAGE is a file or a folder. No image is ever replaced.
"""
from __future__ import annotations

import argparse
from pathlib import Path

import mmcv
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from mmengine.utils import track_iter_progress

from adala_mm.analysis import analysis_parser, load_predictor, output_paths, segment, write
from adala_mm.utils.cli import one_message
from adala_mm.utils.pictures import overlay, save_figure

SHOWN = 20  # classes in a legend


def draw(path: Path, image: np.ndarray, label: np.ndarray, meta: dict, opacity: float) -> dict[str, float]:
    """Image, overlay and legend; returns the share of each class that is there, the largest first."""
    numbers, counts = np.unique(label, return_counts=True)
    order = np.argsort(-counts)
    shares = {meta['classes'][n]: float(c / label.size) for n, c in zip(numbers[order], counts[order], strict=True)}
    handles = [Patch(color=np.array(meta['palette'][n]) / 255, label=f'{meta["classes"][n]}  {c / label.size:.1%}')
               for n, c in zip(numbers[order], counts[order], strict=True)]
    ratio = image.shape[0] / image.shape[1]
    figure = Figure(figsize=(10, max(2.2, 4 * ratio)), layout='constrained')
    for axis, picture in zip(figure.subplots(1, 2), (image, overlay(image, label, meta['palette'], opacity)),
                             strict=True):
        axis.imshow(picture)
        axis.set_axis_off()
    figure.legend(handles=handles[:SHOWN], loc='outside right upper', fontsize=8)
    save_figure(figure, path)
    return shares


def main() -> None:
    parser = analysis_parser(__doc__)
    parser.add_argument('config', help='config of a segmentor')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='files and folders')
    parser.add_argument('--opacity', type=float, default=0.6,
                        help='opacity of the colours, from 0 to 1 (default: %(default)s)')
    args = parser.parse_intermixed_args()
    if not 0 <= args.opacity <= 1:
        parser.error(f'--opacity {args.opacity}: between 0 and 1')
    with one_message():
        run(args)


def run(args: argparse.Namespace) -> None:
    wanted, json_path = output_paths(args, '_segmented', 'segmented')
    model = load_predictor(args, 'EncoderDecoder')
    rows = []
    for source, picture in track_iter_progress(wanted):
        image = mmcv.imread(source, channel_order='rgb')
        shares = draw(picture, image, segment(model, source), model.dataset_meta, args.opacity)
        rows.append(dict(image=source, picture=str(picture), classes=shares))
    write(json_path, dict(rows=rows, model=model.record), args.device)
    for row in rows:
        print(f'{row["picture"]}: ' + ', '.join(f'{name} {share:.0%}' for name, share in row['classes'].items()))


if __name__ == '__main__':
    main()
