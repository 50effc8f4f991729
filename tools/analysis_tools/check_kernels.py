"""Tests the kernels of this machine's GPU: compares values and gradients of our attention cores with float64.

    python tools/analysis_tools/check_kernels.py [--dtype bf16] [--dims 64 80 128] [--tokens 197 4097] [--processes 16]

It needs torch and Triton; coarse-to-fine attention also needs OpenMMLab's packages. Errors are relative, in the 2-norm.
The cases are shared out among the processes, and each case stands alone. It fails if an error exceeds its bound, or if
a NaN is lost.
"""
from __future__ import annotations

import argparse
import itertools
from math import ceil, isqrt

import torch
from benchmark_attention import DTYPES, OURS, Core, coarse_to_fine, competitors, plain
from torch import Tensor

from adala_mm.utils.machine import default_device, hardware
from adala_mm.utils.records import exit_if_failed, save, settings
from adala_mm.utils.row_log import open_log
from adala_mm.utils.side_by_side import side_by_side
from adala_mm.utils.stopwatch import failure

KEY = ('name', 'dtype', 'dim', 'tokens')
BOUNDS = dict(fp32=1e-4, fp16=0.005, bf16=0.02)  # of output and gradient


EXACT: dict[str, Core] = dict(ours=plain, coarse=coarse_to_fine)


def check(job: dict) -> dict:
    """Errors of one case, or why there are none."""
    device, name = default_device(), job['name']
    if name not in (cores := competitors([name], device)):
        return dict(note='not installed')
    found: dict = {}

    def compare() -> None:
        qkv = inputs(job['tokens'], job['dim'], device).to(DTYPES[job['dtype']]).requires_grad_()
        found.update(errors(cores[name], EXACT[name], qkv), nan_stays=nan_stays(cores[name], qkv))

    if note := failure(compare, device):
        return dict(note=note)
    bound = BOUNDS[job['dtype']]
    wrong = [what for what in ('error', 'gradient_error') if not found[what] < bound]
    wrong += ['NaN is lost'] * (not found['nan_stays'])
    return found | dict(bound=bound) | (dict(note=f'failed: {", ".join(wrong)}') if wrong else {})


def inputs(tokens: int, dim: int, device: torch.device) -> Tensor:
    """qkv (2, N, 3, 4, D) by which coarse-to-fine attention opens the same tiles in every precision.

    Of the 4 x 4 tiles of the largest square grid, the 16 that it opens have keys that all queries like, by e^2.5: at
    4,097 tokens about as much weight as all others have together. With 64 channels or more that is far beyond chance.
    """
    torch.manual_seed(0)
    qkv, side = torch.randn(2, tokens, 3, 4, dim, device=device), isqrt(tokens)
    y, x = (torch.arange(side, device=device) // 4).expand(side, side).T, torch.arange(side, device=device) // 4
    tile, number = (y * ceil(side / 4) + x).flatten(), ceil(side / 4) ** 2
    liked = torch.cat([tile.new_zeros(tokens - side ** 2, dtype=torch.bool), tile % max(1, number // 16) == 0])
    qkv[:, :, 0] += 8 * dim ** -0.5
    qkv[:, liked, 1] += 2.5 / 8
    return qkv


def errors(core: Core, exact_core: Core, qkv: Tensor) -> dict[str, float]:
    """Of the output and of the gradient, against the same in float64."""
    exact = qkv.detach().double().requires_grad_()
    out, wanted = core(qkv), exact_core(exact)
    upstream = torch.randn_like(out)
    grad, = torch.autograd.grad(out, qkv, upstream)
    wanted_grad, = torch.autograd.grad(wanted, exact, upstream.double())
    return dict(error=((out - wanted).norm() / wanted.norm()).item(),
                gradient_error=((grad - wanted_grad).norm() / wanted_grad.norm()).item())


def nan_stays(core: Core, qkv: Tensor) -> bool:
    """Whether what a NaN spoils is NaN, and nothing else: of one query its answer, of one key all of that head.

    Both spoil the gradients of all other keys and values of their heads.
    """
    spoilt = qkv.detach().clone()
    spoilt[0, -1, 0, 0] = spoilt[1, -1, 1, 0] = torch.nan
    spoilt.requires_grad_()
    out = core(spoilt)
    wanted = torch.zeros(out.shape[:3], dtype=torch.bool, device=out.device)
    wanted[0, -1, 0] = wanted[1, :, 0] = True
    grad = torch.autograd.grad(out, spoilt, torch.ones_like(out))[0]
    lost = out.isnan()
    return bool((lost == wanted.unsqueeze(-1)).all() and grad[:, :-1, 1:, 0].isnan().all()
                and not grad[:, :, :, 1:].isnan().any())


def main() -> None:
    device = default_device()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--dtype', nargs='+', choices=DTYPES, default=['bf16'], help='precision (default: bf16)')
    parser.add_argument('--dims', nargs='+', type=int, default=[64, 80, 128],
                        help='channels of a head (default: 64 80 128)')
    parser.add_argument('--tokens', nargs='+', type=int, default=[197, 4097],
                        help='sequence lengths (default: 197 4097)')
    parser.add_argument('--processes', type=int, default=1,
                        help='processes that check in parallel (default: %(default)s)')
    parser.add_argument('--out', default='work_dirs/benchmarks/kernels.json',
                        help='file to write (default: %(default)s)')
    args = parser.parse_args()
    log = open_log(parser, args, KEY, device)
    jobs = [dict(zip(KEY, values, strict=True))
            for values in itertools.product(OURS, args.dtype, args.dims, args.tokens)]
    for row in side_by_side(check, [job for job in jobs if not log.has(**job)], args.processes):
        log.add(row)
        print(row, flush=True)
    rows = list(log.rows.values())
    if not log.appends:
        save(args.out, dict(rows=rows, settings=settings(args), machine=hardware(device)))
    exit_if_failed(rows)


if __name__ == '__main__':
    main()
