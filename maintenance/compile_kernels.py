"""Compiles the Triton kernels for named GPUs on a machine that needs none, and says what came out.

    python maintenance/compile_kernels.py [--targets sm_80 sm_90] [--dtypes bf16 fp32] [--dims 64 80 128]
        [--maps elu1] [--cases linear_backward] [--jobs 2] [--out kernels.jsonl]

The launchers themselves run, on CPU tensors; only Triton's driver is replaced, by one that names a GPU and its limits,
loads nothing and launches nothing. So what is compiled is what that GPU would be given. Nothing here is measured:
registers, stack and instructions are the compiler's, and the share of issue slots is a model of them,

    instructions of a warp in a loop / bytes that it moves there
    ------------------------------------------------------------,
    4 x multiprocessors x clock / copy speed

what the four schedulers of each multiprocessor issue for a byte of global memory, against what they could issue in the
time in which a copy moves that byte, at nine tenths of the data sheet's bandwidth. Above 100 % a kernel cannot keep up
with the memory whatever else it does well; below, it can if nothing else is in its way. The loops are those that hold
matrix products (the whole kernel if none does). Their bytes are those of `TILES`; of a kernel that is not there, those
of its loads and stores by the width of the instructions, where what is masked out counts as moved.

Needs torch and Triton, whose wheel has the assemblers and disassemblers. Compiled kernels go to Triton's own cache
(TRITON_CACHE_DIR), from which the GPU that they are for loads them.
"""
from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.pop('TRITON_INTERPRET', None)  # read when Triton is first imported

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from adala_mm.utils.machine import cores
from adala_mm.utils.tables import markdown_table

TOOLS = Path(triton.__file__).parent / 'backends/nvidia/bin'
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
COPY = 0.9  # of the memory's bandwidth is what a copy reaches


class GPU(NamedTuple):
    """What a launcher asks for, and the data sheet's speeds of the card that stands for a target."""
    card: str
    shared: int  # KiB that a program may have
    processors: int
    clock: float = 0.0  # GHz
    bandwidth: float = 0.0  # GB/s


GPUS = {
    'sm_80': GPU('A100 80 GB', 163, 108, 1.41, 2039),
    'sm_86': GPU('RTX 3090', 99, 82, 1.70, 936),
    'sm_89': GPU('RTX 4090', 99, 128, 2.52, 1008),
    'sm_90': GPU('H200', 227, 132, 1.98, 4800),
    'sm_100': GPU('B200', 227, 148, 1.97, 8000),
    'sm_120': GPU('RTX 5090', 99, 170, 2.41, 1792),
    'gfx90a': GPU('MI250X', 64, 110),
    'gfx942': GPU('MI300X', 64, 304),
}

Case = Callable[[torch.dtype, int, str], object]


def _linear(dtype: torch.dtype, dim: int, feature_map: str, heads: int, tokens: int, backward: bool) -> None:
    from adala_mm.ops import triton_linear_attention as module

    def parts() -> tuple[Tensor, ...]:
        return torch.empty(1, tokens, 3, heads, dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)

    q, k, v = parts()
    if backward:
        state, total = torch.empty(1, heads, dim, dim), torch.empty(1, heads, dim)
        grad = torch.empty(1, tokens, heads, dim, dtype=dtype).transpose(1, 2)
        module.backward(grad, q, k, v, state, total, parts(), feature_map, 1e-6)
    else:
        module.forward(q, k, v, feature_map, 1e-6)


def _coarse(dtype: torch.dtype, dim: int, feature_map: str, heads: int, side: int, backward: bool) -> None:
    from adala_mm.ops import triton_coarse_to_fine as module

    n, grid, options = side * side, [side, side], dict(tile=4, num_open=16, block=8)
    q, k, v = torch.empty(1, n + 1, 3, heads, dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    if backward:
        out, grad = torch.empty(2, 1, n, heads, dim, dtype=dtype).transpose(2, 3).unbind(0)
        opened = torch.arange(16, dtype=torch.int32).expand(2, 1, heads, n // 64, -1).contiguous()
        lse, cells = torch.empty(1, heads, n), torch.empty(2, 1, heads, n // 16 + 1, dim, dtype=dtype)
        module.backward(grad, q[:, :, 1:], k, v, out, opened, lse, cells, torch.empty(n // 16 + 64), grid, **options)
    else:
        module.forward(q[:, :, 1:], k, v, grid, **options)


# Name: what calls a launcher for inputs of a dtype and head width, on tensors as the product has them.
CASES: dict[str, Case] = {
    'linear_forward': functools.partial(_linear, heads=16, tokens=4096, backward=False),
    'linear_forward_short': functools.partial(_linear, heads=16, tokens=64, backward=False),
    'linear_backward': functools.partial(_linear, heads=16, tokens=4096, backward=True),
    'coarse_forward': functools.partial(_coarse, heads=16, side=64, backward=False),
    'coarse_backward': functools.partial(_coarse, heads=16, side=64, backward=True),
}


# Of how many tensors the loops of a kernel together move a tile in a turn, D channels of BN tokens.
TILES = dict(_state_kernel=2, _out_kernel=2, _fused_kernel=4, _grad_q_kernel=3, _grad_kv_kernel=4)


class NamedDriver(DriverBase):
    """Names a GPU; loads and launches nothing, and notes what it was to launch."""

    def __init__(self, target: str) -> None:
        self.target, self.utils, self.launches = target, self, []

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        if self.target.startswith('sm_'):
            return GPUTarget('cuda', int(self.target[3:]), 32)
        return GPUTarget('hip', self.target, 64)

    def get_active_torch_device(self) -> torch.device:
        return torch.device('cpu')

    def get_benchmarker(self):
        raise NotImplementedError('nothing is launched')

    def get_current_device(self) -> str:
        return self.target

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_device_properties(self, device: str) -> dict[str, int]:
        gpu = GPUS[self.target]
        return dict(max_shared_mem=gpu.shared * 1024, multiprocessor_count=gpu.processors)

    def load_binary(self, name: str, binary: bytes, shared: int, device: str) -> tuple:
        return 0, 0, _usage(binary)[0] if self.target.startswith('sm_') else 128, 0, 1024

    def launcher_cls(self, src, metadata) -> Callable:
        return lambda *args: self.launches.append((metadata.name, args[:3]))


def compile_case(target: str, case: str, dtype: str, dim: int, feature_map: str) -> list[dict]:
    """A row for each kernel that the case launches, with how often, or would if it did fit the GPU.

    What a launcher raises is in its last row, as ``error``.
    """
    driver, rows, run = NamedDriver(target), {}, JITFunction.run
    about = dict(target=target, case=case, dtype=dtype, dim=dim, map=feature_map)

    def note(self, *args, grid, warmup, **options):
        error, before = None, len(driver.launches)
        try:
            compiled = run(self, *args, grid=grid, warmup=warmup, **options)
        except OutOfResources as raised:
            error, compiled = raised, next(reversed(self.device_caches[target][0].values()))
        if id(compiled) not in rows:
            made = compiled.metadata
            numbers = {self.arg_names[path[0]]: value for path, value in compiled.src.constants.items()}
            row = about | dict(kernel=made.name, launches=0, warps=made.num_warps, stages=made.num_stages,
                               tile=numbers.get('BN'), shared=made.shared, limit=GPUS[target].shared * 1024)
            if made.target.backend == 'hip':
                row |= _amd_facts(compiled.asm['amdgcn'])
            else:
                row |= _nvidia_facts(compiled.asm['ptx'], compiled.asm['cubin'])
                if made.name in TILES:
                    row['bytes'] = TILES[made.name] * numbers['BN'] * dim * DTYPES[dtype].itemsize // made.num_warps
                row['issue_share'] = _issue_share(row['instructions'], row['bytes'], GPUS[target])
            rows[id(compiled)] = row
        rows[id(compiled)]['launches'] += len(driver.launches) - before
        if error:
            raise error
        return compiled

    triton.runtime.driver.set_active(driver)
    JITFunction.run = note
    try:
        CASES[case](DTYPES[dtype], dim, feature_map)
    except Exception as error:  # of a compiler or a launcher: a finding, like others
        rows['error'] = about | dict(error=f'{type(error).__name__}: {error}'[:500])
    finally:
        JITFunction.run = run
    # Without those that were compiled to see how many of them run at a time.
    return [row for row in rows.values() if 'error' in row or row['launches'] or row['shared'] > row['limit']]


def _read(binary: bytes, *command: str) -> str:
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(binary)
        file.flush()
        return subprocess.run([TOOLS / command[0], *command[1:], file.name], capture_output=True, text=True,
                              check=True).stdout


@functools.lru_cache
def _usage(binary: bytes) -> tuple[int, ...]:
    """Registers and bytes of stack of a thread."""
    return tuple(map(int, re.search(r'REG:(\d+) STACK:(\d+)', _read(binary, 'cuobjdump', '-res-usage')).groups()))


def _nvidia_facts(ptx: str, cubin: bytes) -> dict:
    registers, stack = _usage(cubin)
    extrema = re.findall(r'\b(?:min|max)\.[\w.]*f(?:16|32|64)\w*', ptx)
    loops = _loops(_read(cubin, 'nvdisasm', '-c'))
    return dict(registers=registers, stack=stack, products=_products(ptx),
                async_copies=[loop['LDGSTS'] + loop['UBLKCP'] + loop['UTMALDG'] for loop in loops],
                extrema=len(extrema), extrema_without_nan=sum('.NaN' not in name for name in extrema),
                instructions=[loop['all'] for loop in loops], bytes=sum(loop['bytes'] for loop in loops))


def _products(ptx: str) -> list[str]:
    """Kinds of matrix products, as ``wgmma m64n64k16 bf16``; none if they are made of multiply-adds."""
    kinds = {f'{kind} {shape} {operand}' for kind, shape, operand in re.findall(
        r'\b(wgmma|mma)\.(?:mma_async\.)?sync\.aligned\.(m\d+n\d+k\d+)\.(?:row\.col\.)?f32\.(\w+)', ptx)}
    return sorted(kinds | set(re.findall(r'tcgen05\.mma\.cta_group::\d\.kind::\w+', ptx)))


def _loops(code: str) -> list[Counter]:
    """Instructions by name, all of them and bytes moved by a warp, of the innermost loops with products, in order.

    The whole code if no loop has any.
    """
    lines, labels = [], {}
    for line in code.splitlines():
        if label := re.match(r'\s*(\.L_x_\d+):', line):
            labels[label[1]] = len(lines)
        elif found := re.match(r'\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*)', line):
            lines.append(found.groups())
    spans = {(labels[to[1]], i + 1) for i, (name, rest) in enumerate(lines)
             if name.startswith('BRA') and (to := re.search(r'`\((\.L_x_\d+)\)', rest)) and labels[to[1]] <= i}
    inner = [a for a in spans if not any(b != a and b[0] >= a[0] and b[1] <= a[1] for b in spans)]
    loops = [count for begin, end in sorted(inner) if _multiplies(count := _count(lines[begin:end]))]
    return loops or [_count(lines)]


def _multiplies(count: Counter) -> bool:
    return bool(count['HMMA'] + count['HGMMA'] + count['UTCHMMA']) or count['FFMA'] + count['FFMA2'] >= 64


def _count(lines: list[tuple[str, str]]) -> Counter:
    count = Counter(all=len(lines))
    for name, _ in lines:
        kind, *modifiers = name.split('.')
        count[kind] += 1
        if kind in ('LDG', 'STG', 'LDGSTS'):
            widths = [int(m) for m in modifiers if m in ('32', '64', '128')] or [8 * int(m[1:]) for m in modifiers
                                                                                if re.fullmatch(r'[US](8|16)', m)]
            count['bytes'] += 32 * ({8: 1, 64: 2, 16: 2, 128: 16}.get(widths[0], 4) if widths else 4)
    return count


def _issue_share(instructions: list[int], moved: int, gpu: GPU) -> float:
    slots = 4 * gpu.processors * gpu.clock / (COPY * gpu.bandwidth)  # for a byte
    return round(sum(instructions) / moved / slots, 3) if moved else float('nan')


def _amd_facts(code: str) -> dict:
    def metadata(name: str) -> int:
        return int(re.search(rf'\.{name}:\s*(\d+)', code)[1])
    return dict(registers=metadata('vgpr_count'), stack=metadata('private_segment_fixed_size'),
                products=sorted(set(re.findall(r'v_mfma_(\w+)', code))))


def compile_all(jobs: list[tuple[str, str, str, int, str]], workers: int) -> Iterator[list[dict]]:
    """Rows of each (target, case, dtype, dim, map), in their order, by processes that are forked off this one.

    A process for each, because launchers remember what they found out of a GPU.
    """
    with multiprocessing.get_context('fork').Pool(workers, torch.set_num_threads, (1,), maxtasksperchild=1) as pool:
        yield from pool.imap(functools.partial(_apply, compile_case), jobs, chunksize=1)


def _apply(function: Callable, arguments: tuple):
    return function(*arguments)


def table(rows: list[dict]) -> str:
    """Markdown, a line for each row."""
    header = ['target', 'dtype', 'D', 'map', 'case', 'kernel', 'launches', 'warps', 'registers', 'stack, B',
              'shared, KiB', 'limit, KiB', 'issue slots', 'loop', 'products', 'async copies', 'min/max without NaN']
    return markdown_table(header, [list(map(str, cells(row))) for row in rows])


def cells(row: dict) -> list:
    head = [row['target'], row['dtype'], row['dim'], row['map'], row['case']]
    if 'error' in row:
        return [*head, row['error'].splitlines()[0][:120], *[''] * 11]
    share = row.get('issue_share')
    return [*head, row['kernel'].strip('_').removesuffix('_kernel'), row['launches'], row['warps'], row['registers'],
            row['stack'], f'{row["shared"] / 1024:.0f}', row['limit'] // 1024, '' if share is None else f'{share:.0%}',
            '+'.join(map(str, row.get('instructions', []))), ', '.join(row['products']) or 'none',
            '+'.join(map(str, row.get('async_copies', []))), row.get('extrema_without_nan', '')]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--targets', nargs='+', choices=GPUS, default=['sm_80', 'sm_89', 'sm_90'])
    parser.add_argument('--dtypes', nargs='+', choices=DTYPES, default=['bf16', 'fp32'])
    parser.add_argument('--dims', nargs='+', type=int, default=[64, 80, 128], help='channels of a head')
    parser.add_argument('--maps', nargs='+', default=['elu1'])
    parser.add_argument('--cases', nargs='+', choices=CASES, default=list(CASES))
    parser.add_argument('--jobs', type=int, default=cores(), help='processes')
    parser.add_argument('--out', type=Path, help='JSON-lines file that gets the rows as they are found')
    args = parser.parse_args()
    jobs = [(target, case, dtype, dim, name) for target in args.targets for dtype in args.dtypes for dim in args.dims
            for name in args.maps for case in args.cases]
    rows = []
    with open(args.out or os.devnull, 'a') as out:
        for found in compile_all(jobs, min(args.jobs, len(jobs))):
            rows += found
            out.writelines(json.dumps(row) + '\n' for row in found)
            out.flush()
    print(table(rows))
    sys.exit(any('error' in row for row in rows))


if __name__ == '__main__':
    main()
