"""What Triton makes of the kernels for GPUs that are not here; the interpreter sees none of it.

Compiled by `maintenance/compile_kernels.py` in a process of its own, since this one interprets kernels.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from helpers import ROOT

pytest.importorskip('triton')

LINEAR = dict(linear_forward=['_state_kernel', '_out_kernel'], linear_forward_short=['_fused_kernel'],
              linear_backward=['_grad_q_kernel', '_grad_kv_kernel'])
COARSE = dict(coarse_forward=['_cells_kernel', '_share_kernel', '_open_kernel', '_forward_kernel'],
              coarse_backward=['_open_kernel', '_grad_q_kernel', '_grad_cells_kernel', '_grad_tokens_kernel'])
# Targets, dtypes, channels and maps: every kernel once for each generation of matrix products, for one and for two
# blocks of columns, and where shared memory is least. The tool sweeps over the rest.
RUNS = [('sm_90', 'bf16', 64, 'elu1'), ('sm_80', 'bf16', 80, 'elu1'), ('sm_89', 'bf16', 128, 'elu1'),
        ('sm_89', 'fp32', 64, 'softplus')]
COARSE_RUNS = RUNS[::3]
# Bytes of stack a thread: where there is not none, with the reason.
STACK = {('sm_80', 'bf16', 80): 800, ('sm_89', 'bf16', 128): 800}  # gradients of states of more than 64 x 64
PRODUCTS = {('sm_90', 'bf16'): 'wgmma m64n64k16 bf16', ('sm_80', 'bf16'): 'mma m16n8k16 bf16',
            ('sm_89', 'bf16'): 'mma m16n8k16 bf16'}


COMPILE = """
import json, sys
from compile_kernels import compile_all
jobs = json.loads(sys.argv[1])
print(json.dumps([row for rows in compile_all(jobs, 2) for row in rows]))
"""


@pytest.fixture(scope='module')
def rows() -> list[dict]:
    path = f'{ROOT / "maintenance"}:{ROOT}'
    environment = {key: value for key, value in os.environ.items() if key != 'TRITON_INTERPRET'} | {'PYTHONPATH': path}
    jobs = [(run[0], case, *run[1:]) for run in RUNS for case in (*LINEAR, *(COARSE if run in COARSE_RUNS else []))]
    done = subprocess.run([sys.executable, '-c', COMPILE, json.dumps(jobs)], check=True, env=environment,
                          capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_every_kernel_is_launched(rows):
    assert all('error' not in row for row in rows), [row['error'] for row in rows if 'error' in row]
    launched = {}
    for row in rows:
        launched.setdefault((row['target'], row['dtype'], row['dim'], row['case']), []).extend(
            [row['kernel']] * row['launches'])
    assert {key[:3] for key in launched} == {run[:3] for run in RUNS}
    assert {key[-1] for key in launched} == {*LINEAR, *COARSE}
    for (*_, case), kernels in launched.items():
        assert kernels == (LINEAR | COARSE)[case]


def test_what_is_launched_fits(rows):
    for row in rows:
        if row['launches']:
            assert row['shared'] <= row['limit']
            assert row['stack'] <= STACK.get((row['target'], row['dtype'], row['dim']), 0), row


def test_matrix_products_and_copies(rows):
    for row in rows:
        kind = PRODUCTS.get((row['target'], row['dtype']))
        if row['kernel'] in ('_cells_kernel', '_open_kernel'):  # sums, and marks: no products
            continue
        if row['kernel'] == '_grad_tokens_kernel' and kind:  # for the few tokens of a tile
            kind = 'mma m16n8k16 bf16'
        assert kind in row['products'] if kind else not row['products'], row
        if row['stages'] > 1:
            assert all(row['async_copies']), row


def test_nan_goes_through_minimum_and_maximum(rows):
    # The maximum of a softmax is what its logits are shifted by: NaN goes through these themselves.
    rows = [row for row in rows if row['case'] in LINEAR]
    assert {row['extrema'] > 0 for row in rows} == {True}
    assert [row for row in rows if row['extrema_without_nan']] == []
