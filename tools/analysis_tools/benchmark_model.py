"""Measures speed and memory of whole ViTs at growing image sizes, with softmax, linear or any other attention.

    python tools/analysis_tools/benchmark_model.py [--quick] [--arch S B L] [--attentions all | paper]
        [--dtype fp32 bf16] [--compile [MODE ...]] [--cuda-graph] [--best-batch]
    python tools/analysis_tools/benchmark_model.py --configs CONFIG ... [--count-only] [--sizes 512 1024 2048]

The ViTs have random weights, patch 16 and batch 1, unless --best-batch is given. All attentions of one size take turns.
Times are what a caller waits for, launches included; with --cuda-graph, also for the same launches recorded once and
replayed. Writes JSON, and says from which size on linear attention is faster.
If --out ends in .jsonl, each row is written as soon as it is measured, and rows that the file has are skipped.

With --configs, it measures the parts of the segmentors of these configs: the share of backbone, neck and head in the
multiply-adds and in the time. On a CPU, this is the processor time of all threads, which other programs do not change.
"""
from __future__ import annotations

import argparse
import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.utils import import_modules_from_strings
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from adala_mm.export.mask2former import symbolic_sizes
from adala_mm.models.backbones import AdaLAViT
from adala_mm.models.backbones.vit import COMPILE_MODES, CUDA_GRAPH_MODES
from adala_mm.registry import ATTENTIONS, MODELS
from adala_mm.utils.benchmark_tables import head_share_table, model_speed_table
from adala_mm.utils.cli import find_config, one_message
from adala_mm.utils.compose import paper_attentions
from adala_mm.utils.cost import by_part, flop_counter, multiply_adds
from adala_mm.utils.machine import default_device, hardware, total_memory
from adala_mm.utils.records import exit_if_failed, save, settings
from adala_mm.utils.row_log import open_log
from adala_mm.utils.stopwatch import (
    Allowance,
    Call,
    Timer,
    cuda_graph,
    failure,
    peak_memory,
    softmax_kernels,
    synchronize,
    take_turns,
    wall_timer,
)

ARCHS = dict(T=dict(embed_dim=192, depth=12, num_heads=3), S=dict(embed_dim=384, depth=12, num_heads=6),
             B=dict(embed_dim=768, depth=12, num_heads=12), L=dict(embed_dim=1024, depth=24, num_heads=16))
SIZES = [224, 384, 512, 768, 1024, 1536, 2048]
QUICK_SIZES = [224, 512, 1024]
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16)
SOFTMAX = 'SoftmaxAttention'
KEY = ('arch', 'size', 'mode', 'attention')
SEGMENTOR_SIZES = [512, 1024, 2048]

Model = tuple[AdaLAViT, bool]  # and whether its launches are recorded in a CUDA graph


def build(arch: str, size: int, attention: str, compile: bool | str = False) -> AdaLAViT:
    model = AdaLAViT(img_size=size, **ARCHS[arch], compile=compile,
                     attention=paper_attentions().get(attention) or dict(type=attention))
    return model.eval().requires_grad_(False)


def count(arch: str, size: int, attention: str) -> dict:
    """What does not depend on the device: blocks, parameters, multiply-adds."""
    with torch.device('meta'):
        model, image = build(arch, size, attention), torch.empty(1, 3, size, size)
    return dict(**model.block_counts, parameters=sum(p.numel() for p in model.parameters()),
                gmac=multiply_adds(lambda: model(image)) / 1e9)


def compiled(modes: list[str] | None) -> dict[str, str | bool]:
    """``compile`` of the ViTs that --compile asks for, by what is added to a row's name; first of all none."""
    wanted = [] if modes is None else modes or ['default']
    return {'': False} | {', compiled' if mode == 'default' else f', compiled ({mode})': mode for mode in wanted}


def variants(args: argparse.Namespace) -> list[tuple[str, str | bool, bool]]:
    """(what is added to a row's dtype, ``compile`` of the ViT, whether a CUDA graph is recorded)."""
    found = []
    for name, compile in compiled(args.compile).items():
        found.append((name, compile, False))
        if args.cuda_graph and compile not in CUDA_GRAPH_MODES:  # those have graphs of their own
            found.append((f'{name}, CUDA graph', compile, True))
    return found


def add_compile_option(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument('--compile', nargs='*', choices=COMPILE_MODES, metavar='MODE',
                        help=f'{what} in these modes: {", ".join(COMPILE_MODES)} (default: the first)')


def start(models: dict[str, Model], images: Tensor) -> tuple[dict[str, Call], dict[str, str]]:
    """Calls of the models that have been made once, by name; and what went wrong with each, if anything."""
    calls = {}

    def first_call(name: str) -> None:
        model, graph = models[name]
        call = functools.partial(model, images)
        calls[name] = cuda_graph(call) if graph else call
        calls[name]()

    notes = {name: failure(functools.partial(first_call, name), images.device) for name in models}
    return {name: call for name, call in calls.items() if not notes[name]}, notes


@torch.no_grad()
def measure(args: argparse.Namespace, arch: str, size: int, dtype: str, device: torch.device,
            allowance: Allowance) -> list[dict]:
    """One row per attention and mode. All models have the softmax ViT's weights, in one place."""
    image = torch.randn(1, 3, size, size, device=device, dtype=DTYPES[dtype])
    timer, shared, models, rows = wall_timer(device), None, {}, {}
    torch.compiler.reset()
    counts = {attention: count(arch, size, attention) for attention in args.attentions}
    for variant, compile, graph in variants(args):
        for attention in args.attentions:
            mode = dtype + variant
            row = dict(arch=arch, size=size, mode=mode, attention=attention) | counts[attention]
            name = f'{arch} {mode} {attention}'
            rows[name] = row
            absent = 'needs a GPU' if graph and device.type != 'cuda' else ''
            if note := absent or allowance.refuse(name, row['gmac']):
                row['note'] = note
                continue
            with torch.device(device):
                model = build(arch, size, attention, compile).to(DTYPES[dtype])
            shared = shared or model.state_dict()
            model.load_state_dict(shared, strict=False, assign=True)
            models[name] = model, graph
    calls, notes = start(models, image)
    for name in notes.keys() - calls.keys():
        rows[name]['note'] = notes[name]
        del models[name]
    seconds = take_turns(calls, timer, args.seconds)
    backends = {attention: softmax_kernels(functools.partial(models[name][0], image)) for attention in args.attentions
                if (name := f'{arch} {dtype} {attention}') in models}
    # A graph holds what the calls hold that it recorded, and its replay asks for nothing.
    peaks = {name: peak_memory(functools.partial(model, image), device) for name, (model, _) in models.items()}
    for name, own in seconds.items():
        allowance.learn(name, rows[name]['gmac'], own)
        weights = sum(p.nbytes for p in models[name][0].parameters())
        softmax = seconds.get(f'{arch} {rows[name]["mode"]} {SOFTMAX}')
        rows[name].update(ms=1000 * own, softmax_ms=1000 * softmax if softmax else None,
                          mib=(weights + peaks[name]) / 2 ** 20)
        if backend := backends.get(rows[name]['attention']):
            rows[name]['backend'] = backend
    if args.best_batch:
        for name, (batch, rate) in best_batches(models, image, seconds, peaks, timer, args).items():
            rows[name].update(best_batch=batch, best_images_per_s=rate)
    print(f'ViT-{arch}, {size} pixels: ' + ', '.join(f'{name.split(" ", 1)[1]} {1000 * own:.1f} ms'
                                                     for name, own in seconds.items()), flush=True)
    return list(rows.values())


def best_batches(models: dict[str, Model], image: Tensor, seconds: dict[str, float],
                 peaks: dict[str, int], timer: Timer, args: argparse.Namespace) -> dict[str, tuple[int, float]]:
    """Batch size and images/s: doubled until memory or patience ends, or images/s no longer rise by 2 %."""
    device, going, batch = image.device, list(models), 2
    best = {name: (1, 1 / own) for name, own in seconds.items()}
    while going:
        images = image.expand(batch, -1, -1, -1).contiguous()
        calls, _ = start({name: models[name] for name in going if batch * peaks[name] < 0.9 * total_memory(device)
                          and batch / best[name][1] < args.time_limit}, images)
        rates = {name: batch / own for name, own in take_turns(calls, timer, args.seconds).items()}
        going = [name for name, rate in rates.items() if rate > 1.02 * best[name][1]]
        best.update({name: (batch, rates[name]) for name in going})
        batch *= 2
    return best


def segmentor(path: str, size: int) -> nn.Module:
    """The network of a config for square images, with random weights.

    Raises:
        ValueError: if the config is no segmentor.
    """
    cfg = Config.fromfile(path)
    if 'decode_head' not in cfg.get('model', {}):
        raise ValueError(f'{Path(path).stem} is no segmentor; --configs measures backbone, neck and decode head')
    import_modules_from_strings(f'{cfg.default_scope}.models')
    cfg.model.backbone.init_cfg = None
    if 'img_size' in cfg.model.backbone:  # elsewhere positions do not depend on it
        cfg.model.backbone.img_size = size
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model).eval().requires_grad_(False)


def run_parts(model: nn.Module, image: Tensor, clock: Callable[[], float]) -> dict[str, float]:
    """What ``clock`` says of one prediction, by part: the head is what is neither backbone, neck nor pixel decoder."""
    decoder = getattr(model.decode_head, 'pixel_decoder', None)
    parts = dict(backbone=model.backbone, neck=model.neck if model.with_neck else None) | {'pixel decoder': decoder}
    meta = dict(img_shape=tuple(image.shape[-2:]), ori_shape=tuple(image.shape[-2:]))
    return by_part(functools.partial(model.encode_decode, image, [meta]),
                   {name: part for name, part in parts.items() if part is not None}, clock, rest='head')


def count_parts(path: str, size: int) -> dict:
    """Blocks and multiply-adds of a segmentor, from shapes alone."""
    with FakeTensorMode():
        model = segmentor(path, size)
        with symbolic_sizes(model), flop_counter() as counter:
            parts = run_parts(model, torch.empty(1, 3, size, size), counter.get_total_flops)
    blocks = getattr(model.backbone, 'block_counts', {})  # L2ViT has stages of both kinds instead
    return dict(config=Path(path).stem, size=size, **blocks,
                gmac={name: flops / 2e9 for name, flops in parts.items()})


@torch.no_grad()
def measure_parts(paths: list[str], size: int, seconds: float, device: torch.device) -> list[dict[str, float]]:
    """Median seconds of each part, for each config; all take turns."""
    def gpu_clock() -> float:
        synchronize(device)
        return time.perf_counter()

    clock = time.process_time if device.type == 'cpu' else gpu_clock
    image, runs = torch.randn(1, 3, size, size, device=device), {path: [] for path in paths}

    def call(path: str, model: nn.Module) -> float:
        runs[path].append(run_parts(model, image, clock))
        return sum(runs[path][-1].values())

    take_turns({path: functools.partial(call, path, segmentor(path, size).to(device)) for path in paths},
               lambda function: function(), seconds, least=2)
    return [{part: median(run[part] for run in found[1:]) for part in found[0]} for found in runs.values()]


def compare_parts(args: argparse.Namespace, device: torch.device) -> None:
    """What --configs asks for."""
    rows = []
    with one_message():
        paths = [find_config(config) for config in args.configs]
        for size in sorted(args.sizes or SEGMENTOR_SIZES):
            found = [count_parts(path, size) for path in paths]
            if not args.count_only:
                for row, times in zip(found, measure_parts(paths, size, args.seconds, device), strict=True):
                    row.update(seconds=times)
            rows += found
            print(f'{size} pixels are done', flush=True)
    chosen = {name: getattr(args, name) for name in ('sizes', 'seconds', 'count_only')}
    data = dict(rows=rows, settings=chosen, machine=hardware(device))
    save(args.out, data)
    print(head_share_table(data))


def main() -> None:
    ATTENTIONS.import_from_location()
    known = sorted(ATTENTIONS.module_dict)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--quick', action='store_true', help='measure a ViT-S at three sizes for a short time each')
    parser.add_argument('--arch', nargs='+', choices=ARCHS,
                        help='sizes of the ViT: T S B L (default: S B L; with --quick S)')
    parser.add_argument('--sizes', nargs='+', type=int, help='sides of the image in pixels (default: 224 ... 2048)')
    parser.add_argument('--attentions', nargs='+', metavar='NAME', default=['LinearAttention'],
                        help='attentions to compare with softmax attention: registered names, or "all" of them; names '
                        'in configs/_base_/attentions.py, or "paper" for LinearAttention and all of these')
    parser.add_argument('--dtype', nargs='+', choices=DTYPES, default=['fp32'], help='precision (default: fp32)')
    add_compile_option(parser, 'also measure compiled models,')
    parser.add_argument('--cuda-graph', action='store_true', help='also measure a CUDA graph of the model')
    parser.add_argument('--best-batch', action='store_true', help='also measure images/s at the best batch size')
    parser.add_argument('--configs', nargs='+', metavar='CONFIG', help='measure the parts of these segmentors instead')
    parser.add_argument('--count-only', action='store_true',
                        help='with --configs: count multiply-adds and measure no time')
    parser.add_argument('--time-limit', type=float, default=20.0,
                        help='skip a call that would take more seconds (default: %(default)s)')
    parser.add_argument('--seconds', type=float, help='seconds to measure each size (default: 3; with --quick 1)')
    parser.add_argument('--out', default='work_dirs/benchmarks/model.json', help='file to write (default: %(default)s)')
    args = parser.parse_args()
    groups = dict(all=known, paper=['LinearAttention', *paper_attentions()])
    names = [name.removeprefix('adala_mm.') for word in args.attentions for name in groups.get(word, [word])]
    if unknown := set(names) - {*known, *paper_attentions()}:
        parser.error(f'{", ".join(sorted(unknown))}: no registered attention; there are {", ".join(known)}, and with '
                     f'the options of the paper {", ".join(paper_attentions())}')
    args.attentions = list(dict.fromkeys([SOFTMAX, *names]))
    args.seconds = args.seconds or (1.0 if args.quick else 3.0)
    # Each attention compiles the block anew; beyond the limit PyTorch would silently run what it was to compile.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(known))
    device = default_device()
    if args.count_only and not args.configs:
        parser.error('--count-only is about the segmentors of --configs')
    if args.configs:
        logging.disable(logging.INFO)
        return compare_parts(args, device)
    log = open_log(parser, args, KEY, device)
    for arch in args.arch or ('S' if args.quick else 'SBL'):
        for dtype in args.dtype:
            allowance = Allowance(args.time_limit)
            for size in sorted(args.sizes or (QUICK_SIZES if args.quick else SIZES)):
                keys = [dict(arch=arch, size=size, mode=dtype + variant, attention=attention)
                        for variant, *_ in variants(args) for attention in args.attentions]
                if not all(log.has(**key) for key in keys):
                    for row in measure(args, arch, size, dtype, device, allowance):
                        log.add(row)
    data = dict(rows=list(log.rows.values()), settings=settings(args), machine=hardware(device))
    if not log.appends:
        save(args.out, data)
    print(model_speed_table(data))
    exit_if_failed(row for row in data['rows'] if row['attention'] != SOFTMAX)


if __name__ == '__main__':
    main()
