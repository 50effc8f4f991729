"""Measures memory and multiply-adds of every attention module against sequence length (ViT-AdaLA Fig. 3).

    python tools/analysis_tools/attention_costs.py [--tokens 64 256 1024 4096] [--dim 1024] [--heads 16] [--out DIR]

The layers are those that the configs build, with their projections; the paper's baselines have its settings
(configs/_base_/attentions.py). Multiply-adds are counted from shapes. Memory is measured in a forward pass of one
sequence without gradients: the peak beyond weights and input. A GPU's peak comes from PyTorch's allocator, a CPU's from
the sum of the allocations in PyTorch's profiler. A length is skipped if the memory, extrapolated from the shorter
lengths, would exceed half of the device's. Softmax appears twice: with the fused kernel that PyTorch chooses, and by
its formula with the N x N matrix. Writes attention_costs.json after each length, and attention_costs.png.
"""
from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from math import isqrt
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from adala_mm.models.attentions import build_attention
from adala_mm.registry import ATTENTIONS
from adala_mm.utils.compose import paper_attentions
from adala_mm.utils.cost import multiply_adds
from adala_mm.utils.machine import default_device, hardware, total_memory
from adala_mm.utils.pictures import label_points, save_figure
from adala_mm.utils.records import save, settings
from adala_mm.utils.stopwatch import peak_memory
from adala_mm.utils.tables import markdown_table

UNFUSED = 'softmax, N x N matrix'
SOFTMAX = 'softmax, fused kernel'
LINEAR = 'linear (ViT-AdaLA)'
PROBES = (64, 256)
PANELS = {'mib': 'memory of a forward pass (MiB)', 'mixing': 'multiply-adds (10⁹), without the four projections'}


def attentions() -> dict[str, dict]:
    """Every attention by the name of its line: softmax, linear, the paper's baselines, all others."""
    ATTENTIONS.import_from_location()
    found = {UNFUSED: dict(type='adala_mm.SoftmaxAttention'), SOFTMAX: dict(type='adala_mm.SoftmaxAttention'),
             LINEAR: dict(type='adala_mm.LinearAttention'), **paper_attentions()}
    known = {cfg['type'].removeprefix('adala_mm.') for cfg in found.values()}
    return found | {name.removesuffix('Attention'): dict(type=f'adala_mm.{name}')
                    for name in sorted(ATTENTIONS.module_dict) if name not in known}


def layer(cfg: dict, tokens: int, args: argparse.Namespace) -> nn.Module:
    side = isqrt(tokens)
    return build_attention(cfg, args.dim, args.heads, grid=(side, side), num_prefix=0).eval().requires_grad_(False)


def forecast(tokens: int, before: list[dict]) -> float:
    """MiB at a length, as a N + b N² through the last two of the rows of smaller lengths; 0 with fewer."""
    rates = [(row['tokens'], row['mib'] / row['tokens']) for row in before if 'mib' in row][-2:]
    if len(rates) < 2:
        return 0
    (short, first), (long, second) = rates
    return tokens * (second + max((second - first) / (long - short), 0) * (tokens - long))


@torch.no_grad()
def cost(name: str, cfg: dict, tokens: int, args: argparse.Namespace, device: torch.device,
         before: list[dict]) -> dict:
    """Counted multiply-adds and measured memory of one layer at one length; a ``note`` where it cannot run.

    ``before`` are its rows of smaller lengths, whose growth says whether this length would fit.
    """
    row, side = dict(name=name, tokens=tokens), isqrt(tokens)

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        return module(x, (side, side), 0)

    try:
        with FakeTensorMode():
            module, x = layer(cfg, tokens, args), torch.empty(1, tokens, args.dim)
            row['multiply_adds'] = multiply_adds(lambda: forward(module, x)) / 1e9
            row['mixing'] = row['multiply_adds'] - 4 * tokens * args.dim ** 2 / 1e9
        if (mib := forecast(tokens, before)) * 2 ** 20 > total_memory(device) / 2:
            return row | dict(note=f'skipped: {mib / 1024:,.0f} GiB')
        module, x = layer(cfg, tokens, args).to(device), torch.randn(1, tokens, args.dim, device=device)
        with sdpa_kernel(SDPBackend.MATH) if name == UNFUSED else contextlib.nullcontext():
            return row | dict(mib=peak_memory(lambda: forward(module, x), device) / 2 ** 20)
    except torch.OutOfMemoryError:
        return row | dict(note='out of memory')
    except (ValueError, RuntimeError) as error:  # a layer that cannot have this grid says so
        return row | dict(note=f'failed: {str(error).splitlines()[0]}')


def measure(args: argparse.Namespace, device: torch.device) -> Iterator[list[dict]]:
    """Rows of one length at a time; those of `PROBES` that nobody asked for only say how memory grows."""
    layers, most = attentions(), max(args.tokens)
    before = {name: [] for name in layers}
    for tokens in sorted({*args.tokens, *(probe for probe in PROBES if probe < most)}):
        rows = [cost(name, cfg, tokens, args, device, before[name]) for name, cfg in layers.items()]
        for row in rows:
            before[row['name']].append(row)
        if tokens in args.tokens:
            print(f'{tokens} tokens: done', flush=True)
            yield rows


def line(data: dict, name: str, key: str) -> tuple[list[int], list[float]]:
    found = [row for row in data['rows'] if row['name'] == name and key in row]
    return [row['tokens'] for row in found], [row[key] for row in found]


def draw_panel(axis: Axes, data: dict, key: str, paper: list[str]) -> None:
    """Softmax black, linear blue, the paper's baselines in colours and named at their ends, all others grey."""
    names = list(dict.fromkeys(row['name'] for row in data['rows']))
    styles = {UNFUSED: dict(color='black', lw=2.5), SOFTMAX: dict(color='black', lw=2, ls=(0, (4, 1.5))),
              LINEAR: dict(color='C0', lw=2.5)}
    colours = ['C1', 'C2', 'C3', 'C4', 'C5', 'C6', 'C8']
    styles |= {name: dict(color=colour, lw=1.2) for name, colour in zip(paper, colours, strict=True)}
    ends, lines = [], []
    for name in [name for name in names if name not in styles] + [name for name in names if name in styles]:
        tokens, values = line(data, name, key)
        if not tokens or (name == SOFTMAX and key == 'mixing'):  # which the kernel does not change
            continue
        drawn, = axis.plot(tokens, values, **styles.get(name, dict(color='0.85', lw=1, zorder=0)))
        if name in styles:
            shown = 'softmax' if name == UNFUSED and key == 'mixing' else name
            ends.append(((tokens[-1], values[-1], shown), styles[name]['color']))
            lines.append(drawn)
    axis.set(xscale='log', yscale='log', xlabel='tokens')
    low, high = min(row['tokens'] for row in data['rows']), max(row['tokens'] for row in data['rows'])
    axis.set_xlim(low, high * (high / low) ** 0.4)
    ticks = sorted({row['tokens'] for row in data['rows']})
    axis.set_xticks(ticks, [f'{tick:,}' for tick in ticks])
    axis.minorticks_off()
    axis.set_title(PANELS[key])
    axis.grid(alpha=0.25)
    order = ['softmax', UNFUSED, SOFTMAX, LINEAR, *paper]
    ends.sort(key=lambda end: order.index(end[0][2]))
    label_points(axis, [end[0] for end in ends], [end[1] for end in ends], lines)


def draw(path: Path, data: dict) -> None:
    paper = [name for name in attentions() if name not in (UNFUSED, SOFTMAX, LINEAR) and name.islower()]
    figure = Figure(figsize=(13, 6), layout='constrained')
    s, most = data['settings'], max(row['tokens'] for row in data['rows'])

    def at(name: str, key: str) -> float:
        tokens, values = line(data, name, key)
        return values[tokens.index(most)] if most in tokens else float('nan')

    shares = [at(UNFUSED, 'mib') / at(LINEAR, 'mib'), at(SOFTMAX, 'mib') / at(LINEAR, 'mib'),
              at(SOFTMAX, 'mixing') / at(LINEAR, 'mixing')]
    figure.suptitle(f'One attention layer, {s["dim"]} channels, {s["heads"]} heads; {data["machine"]["device"]}. Grey: '
                    f'other attentions of adala_mm.\nAt {most:,} tokens softmax takes {shares[0]:.1f} times the memory '
                    f'of linear attention, by a fused kernel {shares[1]:.1f} times, and {shares[2]:.0f} times the '
                    'multiply-adds.', fontsize=11)
    panels = figure.subplots(1, 2)
    figure.draw_without_rendering()
    for axis, key in zip(panels, PANELS, strict=True):
        draw_panel(axis, data, key, paper)
    save_figure(figure, path)


def table(data: dict) -> str:
    lengths = sorted({row['tokens'] for row in data['rows']})
    cells = {(row['name'], row['tokens']): f'{row["mib"]:.1f} / {row["multiply_adds"]:.2f}' if 'mib' in row
             else row['note'] for row in data['rows']}
    return markdown_table(['MiB / 10⁹ multiply-adds', *(f'{tokens:,}' for tokens in lengths)],
                          [[name, *(cells[name, tokens] for tokens in lengths)]
                           for name in dict.fromkeys(row['name'] for row in data['rows'])])


def square(text: str) -> int:
    tokens = int(text) if text.isdecimal() else 0
    if tokens < 1 or isqrt(tokens) ** 2 != tokens:
        raise argparse.ArgumentTypeError(f'{text} tokens are no square grid; take 64, 256, 1024 ...')
    return tokens


def main() -> None:
    device = default_device()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--tokens', nargs='+', type=square,
                        help='sequence lengths, which must be squares (default: 64 ... 4,096; on a GPU 64 ... 65,536)',
                        default=[4 ** i for i in range(3, 9 if device.type == 'cuda' else 7)])
    parser.add_argument('--dim', type=int, default=1024, help='channels (default: %(default)s, as in a ViT-L)')
    parser.add_argument('--heads', type=int, default=16, help='attention heads (default: %(default)s)')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/analysis'), metavar='DIR',
                        help='folder for the results (default: %(default)s)')
    args = parser.parse_args()
    if args.heads < 1 or args.dim < 1 or args.dim % args.heads:
        parser.error(f'--dim {args.dim} --heads {args.heads}: heads share the channels equally; take 1024 and 16')
    data = dict(rows=[], settings=settings(args), machine=hardware(device))
    for rows in measure(args, device):
        data['rows'] += rows
        save(args.out / 'attention_costs.json', data)
    draw(args.out / 'attention_costs.png', data)
    print(table(data))


if __name__ == '__main__':
    main()
