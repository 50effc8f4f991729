"""Measures speed and memory of the attention core: ours, PyTorch's softmax attention, and other linear ones.

    python tools/analysis_tools/benchmark_attention.py [--quick] [--heads 12 --dim 64 --batch 1] [--dtype bf16]
        [--passes forward backward] [--warm-up 16]

The input is the output of a ViT's qkv projection, (B, N, 3, H, D). The output is the input of its output projection.
All competitors take turns. On a GPU, the times are those of the kernels alone, with a cold cache. Writes JSON and a
picture beside it. If --out ends in .jsonl, each row is written as soon as it is measured, and rows that the file has
are skipped.
"""
from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from math import isqrt, prod
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from adala_mm.ops import elu1, linear_attention_packed, linear_attention_reference
from adala_mm.utils.benchmark_tables import attention_speed_table
from adala_mm.utils.machine import default_device, hardware, total_memory
from adala_mm.utils.records import exit_if_failed, save, settings
from adala_mm.utils.row_log import RowLog, open_log
from adala_mm.utils.side_by_side import side_by_side
from adala_mm.utils.stopwatch import (
    Allowance,
    Call,
    failure,
    gpu_timer,
    peak_memory,
    softmax_kernels,
    synchronize,
    take_turns,
    wall_timer,
)

TOKENS = [2 ** i for i in range(6, 17)]
QUICK_TOKENS = [64, 256, 1024, 4096, 8192, 32768]
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
# What must be moved, in units of one of q, k, v: these in and the output out; on the way back these and the output's
# gradient in and three gradients out. The latter alone finds the output there already.
UNITS = {'forward': 4, 'backward': 7, 'forward + backward': 11}
KEY = ('pass', 'tokens', 'batch', 'heads', 'dim', 'dtype', 'name')
BACKENDS = dict(flash=SDPBackend.FLASH_ATTENTION, cudnn=SDPBackend.CUDNN_ATTENTION,
                efficient=SDPBackend.EFFICIENT_ATTENTION, math=SDPBackend.MATH)
SOFTMAX = ('sdpa', *BACKENDS)
OURS = ('ours', 'coarse')
# Linear attention of other libraries, under the names that they have had; the first that is there is taken.
LIBRARIES = dict(fbi_la=('fbi_la.ops.linear_attn.attention:linear_attention',
                         'flash_bla.ops.linear_attn.fused:linear_attention'),
                 fla=('fla.ops.linear_attn:chunk_linear_attn',))
NAMES = (*SOFTMAX, *OURS, 'plain', 'compiled', *LIBRARIES)
COMPILING = (*OURS, 'compiled', *LIBRARIES)

Core = Callable[[Tensor], Tensor]


def parts(qkv: Tensor) -> list[Tensor]:
    """(B, N, 3, H, D) to views (B, H, N, D)."""
    return list(qkv.permute(2, 0, 3, 1, 4).unbind(0))


def sdpa(qkv: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*parts(qkv)).transpose(1, 2)


def sdpa_by(backend: SDPBackend, qkv: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(qkv)


def plain(qkv: Tensor) -> Tensor:
    return linear_attention_reference(*parts(qkv)).transpose(1, 2)


def formula(qkv: Tensor) -> Tensor:
    """The same in the input's own precision, as one would hand it to ``torch.compile``."""
    q, k, v = parts(qkv)
    q, k = elu1(q), elu1(k)
    return (q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1))).transpose(1, 2)


def coarse_to_fine(qkv: Tensor) -> Tensor:
    """On the largest square grid that there are tokens for; those that are left over are class and register tokens."""
    from adala_mm.models.attentions import CoarseToFineAttention
    tokens, heads, dim = qkv.shape[1], *qkv.shape[3:]
    with torch.device('meta'):  # its projections are not asked for
        layer = CoarseToFineAttention(heads * dim, heads)
    side = isqrt(tokens)
    return layer.mix(*parts(qkv), (side, side), tokens - side ** 2).transpose(1, 2)


def fbi_la(function: Callable, qkv: Tensor) -> Tensor:
    q, k, v = parts(qkv)
    return function(elu1(q), elu1(k), v).transpose(1, 2)


def fla(function: Callable, qkv: Tensor) -> Tensor:
    q, k, v = qkv.unbind(2)
    return function(elu1(q), elu1(k), v, normalize=True)[0]  # causal: another result, the same work


def library(name: str) -> Callable:
    """Function of another library, whose kernels do not tune themselves: that takes minutes at each length.

    Raises:
        ImportError: if it is not installed.
    """
    for place in LIBRARIES[name]:
        module, _, function = place.partition(':')
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        pin(name, vars(found))
        return getattr(found, function)
    raise ImportError('not installed')


def pin(name: str, kernels: dict[str, object]) -> None:
    """Leaves one configuration to kernels that have several: of those with four warps, as we use, the last."""
    from triton.runtime import Autotuner
    for kernel in kernels.values():
        if isinstance(kernel, Autotuner):
            kernel.configs = [([c for c in kernel.configs if c.num_warps == 4] or kernel.configs)[-1]]
            print(f'{name}: {kernel.base_fn.__name__} with {kernel.configs[0]}', flush=True)


def competitors(names: list[str], device: torch.device) -> dict[str, Core]:
    """Functions (B, N, 3, H, D) -> (B, N, H, D). What is not there is told and left out."""
    cores = dict(sdpa=sdpa, **{name: functools.partial(sdpa_by, backend) for name, backend in BACKENDS.items()},
                 ours=linear_attention_packed, plain=plain, compiled=torch.compile(formula, dynamic=False))
    for name, call in (('fbi_la', fbi_la), ('fla', fla)):
        if name in names:
            try:
                if device.type != 'cuda':
                    raise ImportError('for GPUs only')
                cores[name] = functools.partial(call, library(name))
            except Exception as error:  # whatever importing somebody's kernels may end in
                print(f'{name} is left out: {error}', flush=True)
    if 'coarse' in names:
        try:
            importlib.import_module('adala_mm.models.attentions')
            cores['coarse'] = coarse_to_fine
        except ModuleNotFoundError as error:  # OpenMMLab's packages
            print(f'coarse is left out: {error}', flush=True)
    return {name: cores[name] for name in NAMES if name in names and name in cores}


def one_pass(what: str, core: Core, qkv: Tensor, grad: Tensor | None) -> Call:
    """The pass as a function of nothing."""
    if what == 'forward':
        def forward() -> Tensor:
            with torch.no_grad():
                return core(qkv)
        return forward
    if what == 'forward + backward':
        return lambda: torch.autograd.grad(core(qkv), qkv, grad)
    # The forward pass is made once, by the first call. Compiled ones would give its results' memory away otherwise.
    importlib.import_module('torch._functorch.config').donated_buffer = False
    out = functools.cache(functools.partial(core, qkv))
    return lambda: torch.autograd.grad(out(), qkv, grad, retain_graph=True)


def make_inputs(what: str, cell: dict, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """qkv (B, N, 3, H, D), and the output's gradient (B, N, H, D) if the pass wants one."""
    b, n, h, d = (cell[name] for name in ('batch', 'tokens', 'heads', 'dim'))
    options = dict(device=device, dtype=DTYPES[cell['dtype']])
    if what == 'forward':
        return torch.randn(b, n, 3, h, d, **options), None
    return torch.randn(b, n, 3, h, d, **options, requires_grad=True), torch.randn(b, n, h, d, **options)


def cells(args: argparse.Namespace) -> Iterator[dict]:
    """What is measured at a time: pass and shape."""
    for batch, n, what in itertools.product(args.batch, args.tokens, args.passes):
        yield dict(zip(KEY, (what, n, batch, args.heads, args.dim, args.dtype), strict=False))


def measure(args: argparse.Namespace, log: RowLog) -> None:
    device = default_device()
    cores = competitors(args.competitors, device)
    timer = (gpu_timer if device.type == 'cuda' else wall_timer)(device)
    allowances = {what: Allowance(args.time_limit, total_memory(device) / 2) for what in args.passes}
    for cell in cells(args):
        if not all(log.has(**cell, name=name) for name in cores):
            torch.compiler.reset()  # each shape is compiled for itself
            try:
                for row in measure_cell(cell, cores, device, timer, allowances[cell['pass']], args.seconds):
                    log.add(row)
            except torch.OutOfMemoryError:  # not of one call: there is no room for what they all work on
                for name in cores:
                    if not log.has(**cell, name=name):
                        log.add(cell | dict(name=name, note='out of memory'))


def measure_cell(cell: dict, cores: dict[str, Core], device: torch.device, timer: Callable, allowance: Allowance,
                 limit: float) -> Iterator[dict]:
    """One row per competitor, all of them in turns."""
    what, n, heads = cell['pass'], cell['tokens'], cell['batch'] * cell['heads']
    qkv, grad = make_inputs(what, cell, device)
    moved = UNITS[what] * qkv.nbytes // 3
    source = torch.ones(moved // 2, dtype=torch.int8, device=device)
    calls: dict[str, Call] = dict(copy=functools.partial(torch.empty_like(source).copy_, source))
    notes, work = {}, {name: heads * (n ** 2 if name in SOFTMAX else n) for name in cores}
    for name, core in cores.items():
        call = one_pass(what, core, qkv, grad)
        scores = 3 * heads * n ** 2 * 4 if name == 'math' else 0
        notes[name] = allowance.refuse(name, work[name], scores) or failure(call, device)
        if not notes[name]:
            calls[name] = call
    seconds = take_turns(calls, timer, limit)
    print(f'{what}, {n} tokens, {heads} heads: ' + ', '.join(f'{name} {1000 * s:.3g} ms'
                                                             for name, s in seconds.items()), flush=True)
    for name, core in cores.items():
        row = cell | dict(name=name)
        if notes[name]:
            yield row | dict(note=notes[name])
            continue
        allowance.learn(name, work[name], seconds[name])
        backend = softmax_kernels(functools.partial(core, qkv)) if name in (*SOFTMAX, 'coarse') else ''
        yield row | dict(ms=1000 * seconds[name], mib=peak_memory(calls[name], device) / 2 ** 20,
                         gb_per_s=moved / seconds[name] / 1e9, copy_share=seconds['copy'] / seconds[name],
                         **dict(backend=backend) if backend else {})


def warm_up(args: argparse.Namespace, log: RowLog) -> None:
    """Calls once, in several processes, what has to be compiled, so that whoever comes next finds it in the caches."""
    jobs = [cell | dict(name=name) for cell in cells(args) for name in COMPILING if name in args.competitors]
    os.environ['TORCHINDUCTOR_COMPILE_THREADS'] = '1'  # there are processes enough
    for row in side_by_side(first_call, jobs, args.warm_up):  # those that the log has too: its machine may be another
        log.add(row)


def first_call(job: dict) -> dict:
    """Seconds of a call in a process that may not have made one before, or why there are none."""
    device = default_device()
    if job['name'] not in (cores := competitors([job['name']], device)):
        return dict(note='not installed')
    if prod(job[name] for name in ('batch', 'tokens', 'heads', 'dim')) > 2 ** 28:
        return dict(note='left to who measures: several of these would not fit the memory')

    def call() -> None:
        one_pass(job['pass'], cores[job['name']], *make_inputs(job['pass'], job, device))()

    synchronize(device)
    start = time.perf_counter()
    note = failure(call, device)
    seconds = time.perf_counter() - start
    if device.type == 'cuda':
        torch.cuda.empty_cache()  # for the other processes
    return dict(note=note) if note else dict(seconds=round(seconds, 2))


def draw(path: Path, data: dict) -> None:
    """Time against length, log-log."""
    try:
        import matplotlib
    except ImportError:
        print('no picture: matplotlib is not installed')
        return
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    s = data['settings']
    figure, axes = plt.subplots(1, len(s['passes']), figsize=(6 * len(s['passes']), 5), sharey=True, squeeze=False)
    for axis, what in zip(axes[0], s['passes'], strict=True):
        for name in dict.fromkeys(row['name'] for row in data['rows']):
            found = [row for row in data['rows'] if (row['name'], row['pass'], row['batch']) == (
                name, what, s['batch'][0]) and 'ms' in row]
            axis.plot([row['tokens'] for row in found], [row['ms'] for row in found], 'o-', label=name,
                      lw=2.5 if name == 'ours' else 1, ms=4)
        axis.set(xscale='log', yscale='log', xlabel='tokens', title=what)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel('ms')
    axes[0, 0].legend()
    figure.suptitle(f'{data["machine"]["device"]}: batch {s["batch"][0]}, {s["heads"]} heads of {s["dim"]}, '
                    f'{s["dtype"]}')
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    device = default_device()
    gpu = device.type == 'cuda'
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--quick', action='store_true', help='measure few lengths for a short time each')
    parser.add_argument('--tokens', nargs='+', type=int, help='sequence lengths (default: 64 ... 65,536)')
    parser.add_argument('--batch', nargs='+', type=int, default=[1], help='images in a batch (default: 1)')
    parser.add_argument('--heads', type=int, default=12, help='attention heads (default: %(default)s)')
    parser.add_argument('--dim', type=int, default=64, help='channels of a head (default: %(default)s)')
    parser.add_argument('--dtype', choices=DTYPES, default='bf16' if gpu else 'fp32',
                        help='precision (default: bf16 on a GPU, otherwise fp32)')
    parser.add_argument('--passes', nargs='+', choices=UNITS, default=['forward', 'forward + backward'],
                        help='"forward", "backward", "forward + backward" (default: the first and the last)')
    parser.add_argument('--competitors', nargs='+', metavar='NAME', choices=NAMES,
                        default=NAMES if gpu else ['sdpa', 'math', 'ours', 'plain'],
                        help=f'{", ".join(NAMES)} (default: all; on a CPU sdpa math ours plain)')
    parser.add_argument('--warm-up', type=int, metavar='PROCESSES',
                        help='measure nothing, but compile the kernels in this '
                        'many processes, so that a later run finds them in the cache')
    parser.add_argument('--time-limit', type=float, default=2.0,
                        help='skip a call that would take more seconds (default: %(default)s)')
    parser.add_argument('--seconds', type=float, help='seconds to measure each length (default: 2; with --quick 0.5)')
    parser.add_argument('--out', default='work_dirs/benchmarks/attention.json',
                        help='file to write (default: %(default)s)')
    args = parser.parse_args()
    args.tokens = sorted(args.tokens or (QUICK_TOKENS if args.quick else TOKENS))
    args.seconds = args.seconds or (0.5 if args.quick else 2.0)
    log = open_log(parser, args, KEY, device)
    (warm_up if args.warm_up else measure)(args, log)
    data = dict(rows=list(log.rows.values()), settings=settings(args), machine=hardware(device))
    if not log.appends:
        save(args.out, data)
    if not args.warm_up:
        print(attention_speed_table(data))
        if not log.appends:
            draw(Path(args.out).with_suffix('.png'), data)
    exit_if_failed(row for row in data['rows'] if row['name'] in OURS)


if __name__ == '__main__':
    main()
