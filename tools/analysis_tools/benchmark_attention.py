"""Speed and memory of the attention core: ours against PyTorch's softmax attention and other linear ones.

    python tools/analysis_tools/benchmark_attention.py [--quick] [--heads 12 --dim 64 --batch 1] [--dtype bf16]

Input is what a ViT's qkv projection leaves, (B, N, 3, H, D); output what its output projection reads. All competitors
take turns. On a GPU, times are those of the kernels alone, from a cold cache. Writes JSON and a picture beside it.
"""
from __future__ import annotations

import argparse
import functools
import pkgutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from adala_mm.ops import elu1, linear_attention_packed, linear_attention_reference
from adala_mm.utils.timing import (
    Allowance,
    attention_speed_table,
    default_device,
    failure,
    gpu_timer,
    hardware,
    peak_memory,
    save,
    settings,
    take_turns,
    total_memory,
    wall_timer,
)

TOKENS = [2 ** i for i in range(6, 17)]
QUICK_TOKENS = [64, 256, 1024, 4096, 8192, 32768]
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
# What must be moved, in units of one of q, k, v: these in and the output out; on the way back these and the output's
# gradient in and three gradients out.
UNITS = {'forward': 4, 'forward + backward': 11}
QUADRATIC = ('sdpa', 'math')
LIBRARIES = dict(flash_bla='flash_bla.ops.linear_attn.fused:linear_attention',
                 fla='fla.ops.linear_attn:chunk_linear_attn')

Core = Callable[[Tensor], Tensor]


def parts(qkv: Tensor) -> list[Tensor]:
    """(B, N, 3, H, D) to views (B, H, N, D)."""
    return list(qkv.permute(2, 0, 3, 1, 4).unbind(0))


def sdpa(qkv: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*parts(qkv)).transpose(1, 2)


def math(qkv: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return sdpa(qkv)


def plain(qkv: Tensor) -> Tensor:
    return linear_attention_reference(*parts(qkv)).transpose(1, 2)


def flash_bla(function: Callable, qkv: Tensor) -> Tensor:
    q, k, v = parts(qkv)
    return function(elu1(q), elu1(k), v).transpose(1, 2)


def fla(function: Callable, qkv: Tensor) -> Tensor:
    q, k, v = qkv.unbind(2)
    return function(elu1(q), elu1(k), v, normalize=True)[0]  # causal: another result, the same work


def competitors(names: list[str], device: torch.device) -> dict[str, Core]:
    """Functions (B, N, 3, H, D) -> (B, N, H, D). Libraries that are not there are told and left out."""
    cores = dict(sdpa=sdpa, math=math, ours=linear_attention_packed, plain=plain,
                 compiled=torch.compile(plain, dynamic=False))
    for name, call in (('flash_bla', flash_bla), ('fla', fla)):
        if name in names:
            try:
                if device.type != 'cuda':
                    raise ImportError('for GPUs only')
                cores[name] = functools.partial(call, pkgutil.resolve_name(LIBRARIES[name]))
            except Exception as error:  # whatever importing somebody's kernels may end in
                print(f'{name} is left out: {error}', flush=True)
    return {name: core for name, core in cores.items() if name in names}


def run(core: Core, qkv: Tensor, grad: Tensor | None) -> None:
    """One pass: forward, and backward too if there is the gradient of the output."""
    with torch.set_grad_enabled(grad is not None):
        out = core(qkv)
    if grad is not None:
        torch.autograd.grad(out, qkv, grad)


def measure(args: argparse.Namespace, device: torch.device) -> list[dict]:
    cores = competitors(args.competitors, device)
    timer = (gpu_timer if device.type == 'cuda' else wall_timer)(device)
    rows = []
    for what, units in UNITS.items():
        allowance = Allowance(args.time_limit, total_memory(device) / 2)
        for n in args.tokens:
            torch.compiler.reset()  # each length is compiled for itself
            shape = (args.batch, n, args.heads, args.dim)
            qkv = torch.randn(*shape[:2], 3, *shape[2:], device=device, dtype=DTYPES[args.dtype],
                              requires_grad=what != 'forward')
            grad = torch.randn(shape, device=device, dtype=qkv.dtype) if qkv.requires_grad else None
            moved = units * qkv.nbytes // 3
            source = torch.ones(moved // 2, dtype=torch.int8, device=device)
            calls = dict(copy=functools.partial(torch.empty_like(source).copy_, source))
            notes, work = {}, {name: n ** 2 if name in QUADRATIC else n for name in cores}
            for name, core in cores.items():
                call = functools.partial(run, core, qkv, grad)
                scores = 3 * args.batch * args.heads * n ** 2 * 4 if name == 'math' else 0
                notes[name] = allowance.refuse(name, work[name], scores) or failure(call, device)
                if not notes[name]:
                    calls[name] = call
            seconds = take_turns(calls, timer, args.seconds)
            for name in cores:
                row = {'pass': what, 'tokens': n, 'name': name}
                if notes[name]:
                    rows.append(row | dict(note=notes[name]))
                    continue
                allowance.learn(name, work[name], seconds[name])
                rows.append(row | dict(ms=1000 * seconds[name], mib=peak_memory(calls[name], device) / 2 ** 20,
                                       gb_per_s=moved / seconds[name] / 1e9,
                                       copy_share=seconds['copy'] / seconds[name]))
            print(f'{what}, {n} tokens: ' + ', '.join(f'{name} {1000 * s:.3g} ms' for name, s in seconds.items()),
                  flush=True)
    return rows


def draw(path: Path, data: dict) -> None:
    """Time against length, log-log."""
    try:
        import matplotlib
    except ImportError:
        print('no picture: matplotlib is not installed')
        return
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    for axis, what in zip(axes, UNITS, strict=True):
        for name in dict.fromkeys(row['name'] for row in data['rows']):
            found = [row for row in data['rows'] if row['name'] == name and row['pass'] == what and 'ms' in row]
            axis.plot([row['tokens'] for row in found], [row['ms'] for row in found], 'o-', label=name,
                      lw=2.5 if name == 'ours' else 1, ms=4)
        axis.set(xscale='log', yscale='log', xlabel='tokens', title=what)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel('ms')
    axes[0].legend()
    s = data['settings']
    figure.suptitle(f'{data["machine"]["device"]}: batch {s["batch"]}, {s["heads"]} heads of {s["dim"]}, {s["dtype"]}')
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    device = default_device()
    gpu = device.type == 'cuda'
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--quick', action='store_true', help='few lengths, little time for each')
    parser.add_argument('--tokens', nargs='+', type=int, help='lengths, instead of 64 ... 65,536')
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--heads', type=int, default=12)
    parser.add_argument('--dim', type=int, default=64, help='channels of a head')
    parser.add_argument('--dtype', choices=DTYPES, default='bf16' if gpu else 'fp32')
    parser.add_argument('--competitors', nargs='+', metavar='NAME',
                        choices=['sdpa', 'math', 'ours', 'plain', 'compiled', *LIBRARIES],
                        default=['sdpa', 'math', 'ours', 'plain', *(['compiled', *LIBRARIES] if gpu else [])],
                        help='some of sdpa, math, ours, plain, compiled, flash_bla, fla; on a CPU the first four')
    parser.add_argument('--time-limit', type=float, default=2.0, help='skip what would take more seconds for one call')
    parser.add_argument('--seconds', type=float, help='of measurements for each length; 2, with --quick 0.5')
    parser.add_argument('--out', default='work_dirs/benchmarks/attention.json')
    args = parser.parse_args()
    args.tokens = sorted(args.tokens or (QUICK_TOKENS if args.quick else TOKENS))
    args.seconds = args.seconds or (0.5 if args.quick else 2.0)
    data = dict(rows=measure(args, device), settings=settings(args), machine=hardware(device))
    save(args.out, data)
    draw(Path(args.out).with_suffix('.png'), data)
    print(attention_speed_table(data))


if __name__ == '__main__':
    main()
