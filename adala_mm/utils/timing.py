"""Time and memory of functions that are to be compared, and the words in which a benchmark tells them."""
from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adala_mm.utils.atomic import write_atomically
from adala_mm.utils.cost import peak_bytes
from adala_mm.utils.records import machine
from adala_mm.utils.tables import markdown_table

Call = Callable[[], object]
Timer = Callable[[Call], float]

CACHE = 2 ** 28  # bytes, more than any L2 cache has


def default_device() -> torch.device:
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def wall_timer(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Timer:
    """Seconds from a call until the device is done, launches included: what one waits for."""
    def seconds(function: Call) -> float:
        synchronize(device)
        start = clock()
        function()
        synchronize(device)
        return clock() - start
    return seconds


def gpu_timer(device: torch.device) -> Timer:
    """Seconds that a GPU works on a call, from a cold cache and without waiting for launches.

    The cache is flushed by reading: lines that were written would have to go back to memory while the call runs.
    """
    cold = torch.zeros(CACHE // 4, device=device)

    def seconds(function: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(10_000_000)  # cycles, some 5 ms, in which all launches queue up
        cold.sum()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    return seconds


def cuda_graph(function: Call) -> Call:
    """The launches of ``function``, recorded once and replayed, without what Python and PyTorch do on the way.

    A replay reads inputs where they were, and writes results where it wrote them before.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are compiled and loaded, libraries get their workspaces
            function()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def take_turns(functions: dict[str, Call], timer: Timer, seconds: float, least: int = 5,
               most: int = 50) -> dict[str, float]:
    """Median seconds of each function. All take turns, in the reverse order every other round.

    The first round warms up and does not count. Rounds end after ``most``, or sooner when ``seconds`` have been
    measured in all and each function had ``least`` turns.
    """
    order, times, spent = list(functions), {name: [] for name in functions}, 0.0
    for name in order:
        timer(functions[name])
    for turn in range(most):
        if turn >= least and spent >= seconds:
            break
        for name in order:
            times[name].append(timer(functions[name]))
            spent += times[name][-1]
        order.reverse()
    return {name: median(values) for name, values in times.items()}


def failure(function: Call, device: torch.device) -> str:
    """Why ``function`` cannot run here; empty if it can."""
    try:
        function()
        synchronize(device)
        return ''
    except torch.OutOfMemoryError:
        reason = 'out of memory'
    except Exception as error:
        reason = f'failed: {type(error).__name__}'
        print(f'{reason}: {error}', flush=True)
    if device.type == 'cuda':
        synchronize(device)  # raises if the device is lost to this process: whatever came next would be wrong
        torch.cuda.empty_cache()
    return reason


def peak_memory(function: Call, device: torch.device) -> int:
    """Most bytes that ``function`` holds at a time, beyond what was there before."""
    if device.type == 'cpu':
        return peak_bytes(function)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def softmax_kernels(function: Call) -> str:
    """Which of PyTorch's kernels ``scaled_dot_product_attention`` takes in ``function``: flash, cudnn, efficient, math.

    Empty if it is not called, or called where ``function`` is compiled or runs in inference mode.
    """
    found: dict[str, None] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if fused := re.match(r'aten::_scaled_dot_product_(?:fused_)?(\w+?)_attention', op.name()):
                found[fused[1]] = None
            elif op.name() == 'aten::_safe_softmax':  # what is left of it when it is taken apart
                found['math'] = None
            return op(*args, **(kwargs or {}))

    with Watch():
        function()
    return ', '.join(found)


def total_memory(device: torch.device) -> int:
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')


class Allowance:
    """How many seconds and bytes a call may take, and a forecast of its seconds from the last that were measured."""

    def __init__(self, seconds: float, nbytes: float = float('inf')) -> None:
        self.seconds = seconds
        self.nbytes = nbytes
        self.rates: dict[str, float] = {}

    def refuse(self, name: str, work: float, nbytes: float = 0) -> str:
        """Why ``name`` should not do ``work`` units of work; empty if it may."""
        forecast = work * self.rates.get(name, 0)
        if nbytes > self.nbytes:
            return f'skipped: {nbytes / 2 ** 30:.0f} GiB'
        return f'skipped: {forecast:.1f} s' if forecast > self.seconds else ''

    def learn(self, name: str, work: float, seconds: float) -> None:
        self.rates[name] = seconds / work


def hardware(device: torch.device) -> dict[str, str | int]:
    """`machine`, and the device with what drives it."""
    facts = machine() | dict(threads=torch.get_num_threads())
    if device.type == 'cpu':
        return facts | dict(device=facts['cpu'])
    try:
        driver = subprocess.run(['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'], check=False,
                                capture_output=True, text=True).stdout.split('\n')[0]
    except OSError:
        driver = ''
    triton = importlib.import_module('triton').__version__ if importlib.util.find_spec('triton') else 'none'
    return facts | dict(device=torch.cuda.get_device_name(device), driver=driver or 'unknown', cuda=torch.version.cuda,
                        cudnn=torch.backends.cudnn.version(), triton=triton)


def settings(args: argparse.Namespace) -> dict:
    """The options that a record depends on: all but places on this machine."""
    return {name: value for name, value in vars(args).items() if name not in ('out', 'data_root', 'config')}


def save(path: str | Path, data: dict) -> None:
    write_atomically(path, (json.dumps(data, indent=1, sort_keys=True) + '\n').encode())


def exit_if_failed(rows: Iterable[dict]) -> None:
    """Ends the program with a message if one of ``rows`` failed; one that memory or patience forbade did not."""
    failed = [row for row in rows if row.get('note', '').startswith('failed')]
    if failed:
        raise SystemExit(f'{len(failed)} rows failed, the first: {failed[0]}')


def speedup(baseline: float, own: float) -> str:
    """How many times less time than the baseline is needed; says so where it is more."""
    text = f'{baseline / own:.2f}x'
    return f'{text}, slower' if float(text[:-1]) < 1 else text


def attention_speed_table(data: dict) -> str:
    """What benchmark_attention.py found: one row per pass, shape and length, one column per competitor."""
    names = list(dict.fromkeys(row['name'] for row in data['rows']))
    passes = list(dict.fromkeys(row['pass'] for row in data['rows']))
    shapes = list(dict.fromkeys(shape_of(row) for row in data['rows']))
    cells = {(row['pass'], *shape_of(row), row['tokens'], row['name']): row for row in data['rows']}
    table = []
    for key in sorted(dict.fromkeys(key[:-1] for key in cells), key=lambda key: (passes.index(key[0]), *key[1:])):
        own, sdpa = (cells.get((*key, name), {}) for name in ('ours', 'sdpa'))
        texts = [time_cell(cells[(*key, name)], sdpa) if (*key, name) in cells else '' for name in names]
        share = [f'{own["gb_per_s"]:.1f}', f'{100 * own["copy_share"]:.0f} %'] if 'ms' in own else ['', '']
        memory = ' / '.join(f'{row["mib"]:,.1f}' if 'mib' in row else '-' for row in (own, sdpa))
        shape = [' x '.join(map(str, key[1:-1]))] * (len(shapes) > 1)
        table.append([key[0], *shape, f'{key[-1]:,}', *texts, *share, memory])
    shape = ['images x heads x channels'] * (len(shapes) > 1)
    return markdown_table(['pass', *shape, 'tokens', *names, 'ours, GB/s', 'of a copy', 'MiB, ours / sdpa'], table)


def shape_of(row: dict) -> tuple[int, ...]:
    """Images, heads and channels of a head; earlier records have those of all rows in their settings."""
    return tuple(row[name] for name in ('batch', 'heads', 'dim') if name in row)


def time_cell(row: dict, baseline: dict) -> str:
    if 'ms' not in row:
        return row['note']
    text = f'{row["ms"]:.3g} ms' if row['ms'] < 1000 else f'{row["ms"]:,.0f} ms'
    if row.get('backend') and row is baseline:
        text += f' ({row["backend"]})'
    return f'{text}, {speedup(baseline["ms"], row["ms"])}' if 'ms' in baseline and row is not baseline else text


def check_table(data: dict) -> str:
    """What check_kernels.py found: one row per case."""
    return markdown_table(
        ['core', 'dtype', 'channels', 'tokens', 'error', 'of the gradient', 'bound', 'NaN stays NaN', ''],
        [[row['name'], row['dtype'], str(row['dim']), f'{row["tokens"]:,}',
          *(f'{row[name]:.1e}' if name in row else '' for name in ('error', 'gradient_error', 'bound')),
          {True: 'yes', False: 'no'}.get(row.get('nan_stays'), ''), row.get('note', '')] for row in data['rows']])


def model_speed_table(data: dict) -> str:
    """What benchmark_model.py found: one row per ViT, image size, mode and attention; then where linear gets faster."""
    batches = any('best_batch' in row for row in data['rows'])
    table = []
    for row in data['rows']:
        cells = [f'ViT-{row["arch"]}', str(row['size']), row['mode'], row['attention'].removesuffix('Attention'),
                 f'{row["softmax_blocks"]} / {row["linear_blocks"]}']
        if 'ms' in row:
            cells += [f'{row["ms"]:.1f}', f'{1000 / row["ms"]:.2f}', against(row), f'{row["mib"]:,.0f}']
        else:
            cells += [row['note'], '', '', '']
        cells += [f'{row["gmac"]:.1f}', f'{row["parameters"] / 1e6:.1f}']
        if batches:
            cells += [str(row['best_batch']), f'{row["best_images_per_s"]:.2f}'] if 'best_batch' in row else ['', '']
        table.append(cells)
    header = ['model', 'pixels', 'mode', 'attention', 'softmax / linear blocks', 'ms', 'images/s', 'against softmax',
              'peak MiB', 'GMAC', 'M parameters']
    lines = [f'- {line}' for line in crossovers(data['rows'])]
    return '\n'.join([markdown_table(header + (['best batch', 'images/s with it'] if batches else []), table), '',
                      *lines])


def against(row: dict) -> str:
    if row['attention'] == 'SoftmaxAttention':
        return '1'
    return speedup(row['softmax_ms'], row['ms']) if row.get('softmax_ms') else ''


def crossovers(rows: list[dict]) -> list[str]:
    """Per ViT, mode and attention: the smallest measured size from which on it is faster than softmax."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if row.get('softmax_ms') and row['attention'] != 'SoftmaxAttention':
            groups.setdefault((row['arch'], row['mode'], row['attention']), []).append(row)
    lines = []
    for (arch, mode, attention), found in groups.items():
        found = sorted(found, key=lambda row: row['size'])
        slower = [row['size'] for row in found if row['ms'] >= row['softmax_ms']]
        faster = [row['size'] for row in found if row['size'] > max(slower, default=0)]
        what = (f'faster than softmax from {faster[0]} pixels on' if slower else 'faster at every measured size'
                ) if faster else 'slower at the largest measured size' if len(slower) < len(found) else (
                    'slower at every measured size')
        lines.append(f'ViT-{arch}, {mode}, {attention.removesuffix("Attention")}: {what}')
    return lines


def head_share_table(data: dict) -> str:
    """What benchmark_model.py --configs found: of each segmentor and size the whole, and the share of each part."""
    parts = ['backbone', 'neck', 'pixel decoder', 'head']
    kinds = dict(gmac='{:,.1f} GMAC', seconds='{:,.2f} s of CPU')
    rows = sorted(((kind, row) for row in data['rows'] for kind in kinds if kind in row),
                  key=lambda found: list(kinds).index(found[0]))
    return markdown_table(
        ['config', 'softmax / linear blocks', 'pixels', 'whole', *parts, 'all but the backbone'],
        [[f'`{row["config"]}`', f'{row.get("softmax_blocks", "")} / {row.get("linear_blocks", "")}', f'{row["size"]:,}',
          kinds[kind].format(whole := sum(row[kind].values())),
          *(percent(row[kind][part] / whole) if part in row[kind] else '' for part in parts),
          percent(1 - row[kind]['backbone'] / whole)] for kind, row in rows])


def percent(share: float) -> str:
    return f'{100 * share:.0f} %' if share >= 0.095 else f'{100 * share:.1f} %'


def training_speed_table(data: dict) -> str:
    """What benchmark_training.py found: one row per stage and version."""
    table = []
    for row in data['rows']:
        baseline = next(other for other in data['rows'] if other['stage'] == row['stage'])  # the first
        cells = [str(row['stage']), row['version']]
        if 'ms' not in row:
            table.append([*cells, row['note'], '', '', ''])
            continue
        ratios = [speedup(baseline['ms'], row['ms']), f'{row["mib"] / baseline["mib"]:.2f}'
                  ] if 'ms' in baseline and row is not baseline else ['', '']
        batch = row.get('batch') or data['settings']['batch']  # earlier records have it in their settings
        table.append([*cells, f'{1000 * batch / row["ms"]:.2f}', ratios[0], f'{row["mib"]:,.0f}',
                      ratios[1]])
    return markdown_table(['stage', 'version', 'images/s', 'against straightforward', 'peak MiB', 'of straightforward'],
                          table)


def depth_table(data: dict) -> str:
    """Memory of a step of stage 1, by depth of the ViT."""
    versions = list(dict.fromkeys(row['version'] for row in data['depths']))
    kinds = dict(held_mib='weights and optimizer', step_mib='step')
    cells = {(row['depth'], row['version']): row for row in data['depths']}
    return markdown_table(
        ['blocks', *(f'{version}: {kind}, MiB' for version in versions for kind in kinds.values())],
        [[str(depth), *(f'{cells[depth, version][key]:,.0f}' for version in versions for key in kinds)]
         for depth in sorted({key[0] for key in cells})])
