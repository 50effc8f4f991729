"""Measures quality and cost of ViTs at many image sizes, after alignment at one size (ViT-AdaLA Fig. 9).

    python tools/analysis_tools/evaluate_resolution.py [NAME=]CONFIG[:CHECKPOINT] ... [--teacher CONFIG[:CHECKPOINT]]
        [--sizes S ...] [--images PATH ...] [--num-images N] [--out DIR]

Quality is the distance to the teacher's features at the same size. Cost is multiply-adds, time and peak memory of
teacher and students for one image. Writes resolution.json and resolution.png; docs/analysis.md explains them.
"""
from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.utils import ProgressBar

from adala_mm.analysis import (
    Network,
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
from adala_mm.analysis.comparison import Sums, cosine, squares
from adala_mm.utils.cli import one_message
from adala_mm.utils.cost import multiply_adds
from adala_mm.utils.machine import total_memory
from adala_mm.utils.pictures import save_figure, size_axis
from adala_mm.utils.stopwatch import Allowance, failure, peak_memory, take_turns, wall_timer
from adala_mm.utils.tables import markdown_table

SIZES = [128, 256, 512, 1024, 2048]
SHARE = 0.8  # of the device's memory that a call may take unless told otherwise
ACTIVATIONS = 12  # float32 numbers per token and channel that a block holds at most, its MLP included


def first_guess(network: Network, tokens: int) -> int:
    """Bytes that a forward pass of one image may take, before any was measured: activations and attention matrices."""
    matrices = max(block.attn.num_heads * block.attn.is_softmax for block in network.model.blocks)
    return 4 * (ACTIVATIONS * tokens * network.model.embed_dim + matrices * tokens ** 2)


class Measurements:
    """Rows of the table, and what may be run next.

    Args:
        networks: the teacher first.
        memory: bytes that a call may take.
        allowance: of seconds for one call.
        seconds: of timing for each size.
    """

    def __init__(self, networks: Sequence[Network], device: torch.device, memory: float, allowance: Allowance,
                 seconds: float) -> None:
        self.networks, self.device, self.memory = networks, device, memory
        self.allowance, self.seconds = allowance, seconds
        self.on_meta = [copy.deepcopy(network.model).to('meta') for network in networks]
        self.peaks: dict[str, tuple[int, int, int]] = {}  # bytes, tokens and multiply-adds of the last size
        self.rows: list[dict] = []

    @torch.no_grad()
    def measure(self, size: int, images: Sequence[np.ndarray], progress: ProgressBar) -> None:
        """All networks at one size; what is not allowed or fails has a ``note`` in the place of figures."""
        rows, calls = {}, {}
        for network, skeleton in zip(self.networks, self.on_meta, strict=True):
            vit, name = network.model, network.name
            tokens = (size // vit.patch_size) ** 2 + vit.num_prefix
            empty = torch.empty(1, 3, size, size, device='meta')
            macs = multiply_adds(functools.partial(skeleton.forward_features, empty))
            rows[name] = dict(name=name, size=size, tokens=tokens, gmac=macs / 1e9)
            call = functools.partial(vit.forward_features, normalise(images[:1], network.preprocessor, self.device))
            if note := self.refusal(network, tokens, macs) or failure(call, self.device):
                rows[name]['note'] = note
            else:
                calls[name] = call
        self.distances(rows, [network for network in self.networks if network.name in calls], images, progress)
        times = take_turns(calls, wall_timer(self.device), self.seconds, least=3) if calls else {}
        for name, call in calls.items():
            peak, macs = peak_memory(call, self.device), round(1e9 * rows[name]['gmac'])
            self.peaks[name] = peak, rows[name]['tokens'], macs
            self.allowance.learn(name, macs, times[name])
            rows[name].update(ms=1000 * times[name], mib=peak / 2 ** 20)
        self.rows += rows.values()

    def refusal(self, network: Network, tokens: int, macs: int) -> str:
        """Why a network should not be run at a size; empty if it may."""
        if network.name in self.peaks:
            peak, fewer, less = self.peaks[network.name]
            # Attention matrices, where they are kept at all, grow faster than the work around them does.
            wanted = peak * ((tokens / fewer) ** 2 if network.model.num_softmax_blocks else macs / less)
        else:
            wanted = first_guess(network, tokens)
        if wanted > self.memory:
            return f'skipped: about {wanted / 2 ** 30:.2g} GiB, {self.memory / 2 ** 30:.2g} are allowed'
        slow = self.allowance.refuse(network.name, macs)
        return slow and f'{slow}, {self.allowance.seconds:g} are allowed'

    def distances(self, rows: dict[str, dict], runnable: Sequence[Network], images: Sequence[np.ndarray],
                  progress: ProgressBar) -> None:
        """Error and cosine of all final tokens, where the teacher could be run as well."""
        teacher, names = self.networks[0], [network.name for network in runnable]
        sums = {name: Sums() for name in names if name != teacher.name}
        if teacher.name not in names:
            progress.update(len(images))
            return
        for image in images:
            tokens = {n.name: n.model.forward_features(normalise([image], n.preprocessor, self.device))
                      for n in runnable}
            for name, total in sums.items():
                total.add(**squares(tokens[name], tokens[teacher.name], 'final'),
                          cosine=cosine(tokens[name], tokens[teacher.name]))
            progress.update()
        for name, total in sums.items():
            rows[name].update(rel_error=total.distance('final'), cosine=total.values['cosine'] / len(images))


def table(rows: Sequence[dict]) -> str:
    def cell(row: dict, key: str, form: str) -> str:
        return format(row[key], form) if key in row else '-'
    return markdown_table(
        ['pixels', 'tokens', 'network', 'relative error', 'cosine', 'GMAC', 'ms', 'peak MiB', ''],
        [[str(row['size']), f'{row["tokens"]:,}', row['name'], cell(row, 'rel_error', '.3f'),
          cell(row, 'cosine', '.3f'), cell(row, 'gmac', '.2f'), cell(row, 'ms', '.1f'), cell(row, 'mib', ',.0f'),
          row.get('note', '')]
         for row in rows])


def draw(path: Path, rows: Sequence[dict], aligned: Sequence[int]) -> None:
    """Quality and cost over the side of the image; ``aligned`` is the ViT's own size."""
    panels = {'rel_error': 'relative error of features', 'cosine': 'cosine of features', 'gmac': 'multiply-adds, G',
              'rate': 'images/s', 'mib': 'peak memory beyond weights, MiB'}
    figure = Figure(figsize=(11, 6), layout='constrained')
    axes = figure.subplots(2, 3).flat
    names, sizes = list(dict.fromkeys(row['name'] for row in rows)), sorted({row['size'] for row in rows})
    for axis, (key, title) in zip(axes, panels.items(), strict=False):
        for i, name in enumerate(names):
            own = [row | ({'rate': 1000 / row['ms']} if 'ms' in row else {}) for row in rows if row['name'] == name]
            points = [(row['size'], row[key]) for row in own if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), 'o-', color=f'C{i - 1}' if i else 'black', label=name)
        size_axis(axis, sizes)
        if key in ('rel_error', 'cosine'):
            axis.margins(y=0.2)
            axis.set_ylim(0, None if key == 'rel_error' else 1.02)
        else:
            axis.set_yscale('log')
        axis.axvline(aligned[0], color='grey', linestyle=':')
        axis.set(title=title, xlabel='side of the image, pixels')
        axis.grid(alpha=0.3)
    legend = axes[5]
    legend.set_axis_off()
    for i, name in enumerate(names):
        legend.plot([], [], 'o-', color=f'C{i - 1}' if i else 'black', label=name)
    legend.plot([], [], ':', color='grey', label="the ViT's own size")
    legend.legend(loc='upper left')
    notes = [f'{row["name"]}, {row["size"]} px: {row["note"]}' for row in rows if 'note' in row]
    legend.text(0.02, 0.02, '\n'.join(notes), fontsize=8, va='bottom', transform=legend.transAxes, wrap=True)
    save_figure(figure, path)


def main() -> None:
    parser = analysis_parser(__doc__, num_images=8)
    parser.add_argument('--sizes', type=positive, nargs='+', default=SIZES, metavar='S',
                        help=f'sides of the square images (default: {" ".join(map(str, SIZES))})')
    parser.add_argument('--memory', type=float, metavar='GIB',
                        help=f"skip what is estimated to take more (default: {SHARE} of the device's memory)")
    parser.add_argument('--time-limit', type=float, default=60.0, metavar='S',
                        help='skip what is estimated to take more seconds for one image (default: %(default)s)')
    parser.add_argument('--seconds', type=float, default=3.0, help='seconds to time each size (default: %(default)s)')
    args = parser.parse_args()
    with one_message():
        run(args)


def run(args: argparse.Namespace) -> None:
    json_path, png_path = outputs(args, 'resolution')
    device, sizes = torch.device(args.device), sorted(set(args.sizes))
    teacher, students = open_networks(args)
    require_equal(teacher, students, 'embed_dim', 'patch_size', 'num_prefix')
    if odd := [size for size in sizes if size % teacher.model.patch_size]:
        raise ValueError(f'--sizes: {", ".join(map(str, odd))} are not multiples of the patch size '
                         f'{teacher.model.patch_size}')
    paths = find_images(args, students)
    limit = args.memory * 2 ** 30 if args.memory else SHARE * total_memory(device)
    measurements = Measurements((teacher, *students), device, limit, Allowance(args.time_limit), args.seconds)
    progress = ProgressBar(len(sizes) * len(paths))
    for size in sizes:
        measurements.measure(size, [read_image(path, (size, size)) for path in paths], progress)
    print()
    rows = measurements.rows
    settings = dict(own_size=teacher.size, sizes=sizes, num_images=len(paths), memory_gib=limit / 2 ** 30,
                    time_limit=args.time_limit)
    write(json_path, dict(rows=rows, images=paths, settings=settings), args.device, [teacher, *students])
    draw(png_path, rows, teacher.size)
    print(table(rows), f'{png_path}\n{json_path}', sep='\n\n')


if __name__ == '__main__':
    main()
