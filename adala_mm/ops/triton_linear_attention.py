"""Triton kernels of linear attention, forward and backward.

Queries, keys and values are read where the qkv projection left them, by their strides, and phi is applied on the way:
phi(q) and phi(k) never exist in memory. Beside inputs and outputs there is the state, D (D + 1) floats per head. The
backward pass needs q, k, v and the state only.

Factors of products have the inputs' dtype; sums are float32, in a fixed order: equal inputs give equal bits. float16
has not the range for features and states: there they are divided by their largest number before a product and
multiplied by it afterwards.

The D channels of a head are one block of columns or two: 80 are 64 + 16, where one block would have 128. Names that end
in 2 are of the second block and stand for nothing if there is none. A state S = sum_j phi(k_j)^T v_j is kept as its
transpose in up to four blocks: s21 has the rows of the second values and the columns of the first features.

`maintenance/compile_kernels.py` tells what the kernels need on which GPU.
"""
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from adala_mm.ops import cpu_linear_attention
from adala_mm.ops.kernels import dense, strides

LOG2E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(1e-30)  # a largest number is never less: it divides
NUMBERS = ['H', 'N', 'NQ', 'NK', 'CHUNK', 'SPLITS']  # a kernel is not compiled again for other ones


@triton.jit
def _max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)  # a GPU's own maximum leaves NaN out


@triton.jit
def _min(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(x, axis: tl.constexpr = None):
    """Largest absolute value of those that are finite, by their bits, which have the same order."""
    bits = tl.abs(x).to(tl.int32, bitcast=True)
    return _max(tl.max(tl.where(bits < 0x7F800000, bits, 0), axis).to(tl.float32, bitcast=True), TINY)


@triton.jit
def _phi(x, MAP: tl.constexpr):
    if MAP == 'elu1':
        return _max(x + 1, tl.exp2(_min(x, 0.0) * LOG2E))
    elif MAP == 'relu':
        return _max(x, 0.0)
    elif MAP == 'softplus':
        e = tl.exp2(-tl.abs(x) * LOG2E)
        # log(1 + e) / e, 0 <= e <= 1, as the polynomial that is nearest at Chebyshev's points: off by 3e-7 of it.
        p = -0.00857467621 * e + 0.0442141923
        p = p * e - 0.107853679
        p = p * e + 0.17757024
        p = p * e - 0.244996117
        p = p * e + 0.332761766
        p = p * e - 0.499974494
        return _max(x, 0.0) + e * (p * e + 0.99999981)
    else:
        return x


@triton.jit
def _phi_grad(x, phi, MAP: tl.constexpr):
    if MAP == 'elu1':
        return _min(phi, 1.0)
    elif MAP == 'relu':
        return tl.where(x > 0, 1.0, 0.0)
    elif MAP == 'softplus':
        e = tl.exp2(-tl.abs(x) * LOG2E)
        return tl.where(x > 0, 1.0, e) / (1 + e)
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def _features(x, W: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr):
    phi = _phi(x.to(tl.float32), MAP)
    return phi if W == C else tl.where((tl.arange(0, C) < W)[None, :], phi, 0.0)


@triton.jit
def _inside(rows, count, W: tl.constexpr, C: tl.constexpr):
    """Which of the block's elements are there: the first ``count`` rows and W of its C columns."""
    mask = (rows < count)[:, None]
    return mask if W == C else mask & (tl.arange(0, C) < W)[None, :]


@triton.jit
def _load(ptr, stride, rows, count, W: tl.constexpr, C: tl.constexpr, OTHER: tl.constexpr = 0.0):
    return tl.load(ptr + rows[:, None] * stride + tl.arange(0, C)[None, :], mask=_inside(rows, count, W, C),
                   other=OTHER)


@triton.jit
def _load_whole(ptr, stride, rows, W: tl.constexpr, C: tl.constexpr):
    columns = tl.arange(0, C)[None, :]
    if W == C:
        return tl.load(ptr + rows[:, None] * stride + columns)
    return tl.load(ptr + rows[:, None] * stride + columns, mask=columns < W, other=0.0)


@triton.jit
def _store(ptr, stride, rows, count, x, W: tl.constexpr, C: tl.constexpr):
    tl.store(ptr + rows[:, None] * stride + tl.arange(0, C)[None, :], x.to(ptr.dtype.element_ty),
             mask=_inside(rows, count, W, C))


@triton.jit
def _head(ptr, stride_b, stride_h, stride_n, row, H):
    """Where head ``program_id(0)`` of B x H begins, at a row."""
    index = tl.program_id(0)
    return ptr + (index // H).to(tl.int64) * stride_b + (index % H).to(tl.int64) * stride_h + row.to(
        tl.int64) * stride_n


@triton.jit
def _add_product(s11, s12, s21, s22, unit, x1, x2, f1, f2, C2: tl.constexpr, ROWS: tl.constexpr,
                 PRECISION: tl.constexpr):
    """Adds x^T f, or f^T x if the state has features as rows, in units of the largest f so far."""
    dtype: tl.constexpr = x1.dtype
    if dtype == tl.float16:
        largest = _max(unit, _largest(f1))
        if C2:
            largest = _max(largest, _largest(f2))
        shrink, inverse, unit = unit / largest, 1.0 / largest, largest
        s11, f1 = s11 * shrink, f1 * inverse
        if C2:
            s12, s21, s22, f2 = s12 * shrink, s21 * shrink, s22 * shrink, f2 * inverse
    f1 = f1.to(dtype)
    s11 = _add_block(s11, x1, f1, ROWS, PRECISION)
    if C2:
        f2 = f2.to(dtype)
        s12 = _add_block(s12, x1, f2, ROWS, PRECISION)
        s21 = _add_block(s21, x2, f1, ROWS, PRECISION)
        s22 = _add_block(s22, x2, f2, ROWS, PRECISION)
    return s11, s12, s21, s22, unit


@triton.jit
def _add_block(s, x, f, ROWS: tl.constexpr, PRECISION: tl.constexpr):
    if ROWS:
        return tl.dot(tl.trans(x), f, s, input_precision=PRECISION)
    else:
        return tl.dot(tl.trans(f), x, s, input_precision=PRECISION)


@triton.jit
def _finish(s11, s12, s21, s22, unit, C2: tl.constexpr, ROWS: tl.constexpr):
    """The state with values as rows, in units of 1."""
    if ROWS == 0:
        s11 = tl.trans(s11)
        if C2:
            s12, s21, s22 = tl.trans(s12), tl.trans(s21), tl.trans(s22)
    if C2:
        s12, s21, s22 = s12 * unit, s21 * unit, s22 * unit
    return s11 * unit, s12, s21, s22


@triton.jit
def _no_state(C1: tl.constexpr, C2: tl.constexpr, R2: tl.constexpr, ROWS: tl.constexpr, dtype: tl.constexpr):
    """A state of zeros, and its unit."""
    s11, s12, s21, s22 = tl.zeros((C1, C1), tl.float32), 0.0, 0.0, 0.0
    if C2:
        s12 = tl.zeros((C1, C2) if ROWS else (C2, C1), tl.float32)
        s21 = tl.zeros((R2, C1) if ROWS else (C1, R2), tl.float32)
        s22 = tl.zeros((R2, C2), tl.float32)
    return s11, s12, s21, s22, TINY if dtype == tl.float16 else 1.0


@triton.jit
def _sum_state(k_ptr, v_ptr, kn, vn, count, D: tl.constexpr, W1: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
               R2: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, MAP: tl.constexpr,
               PRECISION: tl.constexpr):
    """``sum_j phi(k_j)^T v_j`` and ``sum_j phi(k_j)`` over ``count`` tokens.

    In half precision as ``sum_j (phi(k_j) - a)^T v_j + a^T sum_j v_j``, where a is the mean of some of the features:
    what is rounded is what distinguishes a key from others.
    """
    NOTHING: tl.constexpr = float('-inf') if MAP == 'elu1' or MAP == 'softplus' else 0.0  # phi of it is 0
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    rows = tl.arange(0, BN)
    s11, s12, s21, s22, unit = _no_state(C1, C2, R2, ROWS, dtype)
    t1, t2 = tl.zeros((BN, C1), tl.float32), 0.0
    # The tile that is not full comes first, so that none in the loop asks what is there.
    first = count - (tl.cdiv(count, BN) - 1) * BN
    k1 = _load(k_ptr, kn, rows, first, W1, C1, NOTHING)
    v1, v2 = _load(v_ptr, vn, rows, first, W1, C1), 0.0
    f1, f2 = _features(k1, W1, C1, MAP), 0.0
    t1 += f1
    a1, a2 = tl.sum(f1, axis=0) / first, 0.0
    if C2:
        k2 = _load(k_ptr + C1, kn, rows, first, D - C1, C2, NOTHING)
        v2 = _load(v_ptr + C1, vn, rows, first, D - C1, R2)
        f2 = _features(k2, D - C1, C2, MAP)
        t2 = f2
        a2 = tl.sum(f2, axis=0) / first
    h1, h2 = tl.zeros((C1, 16) if ROWS else (16, C1), tl.float32), 0.0
    if dtype != tl.float32:
        f1 -= a1[None, :]
        h1 = _add_block(h1, v1, tl.full((BN, 16), 1.0, tl.float32).to(dtype), ROWS, PRECISION)
        if C2:
            f2 -= a2[None, :]
            h2 = tl.zeros((R2, 16) if ROWS else (16, R2), tl.float32)
            h2 = _add_block(h2, v2, tl.full((BN, 16), 1.0, tl.float32).to(dtype), ROWS, PRECISION)
    s11, s12, s21, s22, unit = _add_product(s11, s12, s21, s22, unit, v1, v2, f1, f2, C2, ROWS, PRECISION)
    k_ptr += first.to(tl.int64) * kn
    v_ptr += first.to(tl.int64) * vn
    for _ in range(first, count, BN):
        k1 = _load_whole(k_ptr, kn, rows, W1, C1)
        v1 = _load_whole(v_ptr, vn, rows, W1, C1)
        f1 = _features(k1, W1, C1, MAP)
        t1 += f1
        if C2:
            k2 = _load_whole(k_ptr + C1, kn, rows, D - C1, C2)
            v2 = _load_whole(v_ptr + C1, vn, rows, D - C1, R2)
            f2 = _features(k2, D - C1, C2, MAP)
            t2 += f2
        if dtype != tl.float32:
            f1 -= a1[None, :]
            h1 = _add_block(h1, v1, tl.full((BN, 16), 1.0, tl.float32).to(dtype), ROWS, PRECISION)
            if C2:
                f2 -= a2[None, :]
                h2 = _add_block(h2, v2, tl.full((BN, 16), 1.0, tl.float32).to(dtype), ROWS, PRECISION)
        s11, s12, s21, s22, unit = _add_product(s11, s12, s21, s22, unit, v1, v2, f1, f2, C2, ROWS, PRECISION)
        k_ptr += BN * kn
        v_ptr += BN * vn
    t1 = tl.sum(t1, axis=0)
    if C2:
        t2 = tl.sum(t2, axis=0)
    s11, s12, s21, s22 = _finish(s11, s12, s21, s22, unit, C2, ROWS)
    if dtype != tl.float32:
        h1 = tl.sum(h1, axis=1 if ROWS else 0) / 16
        s11 = _add_mean(s11, h1, a1)
        if C2:
            h2 = tl.sum(h2, axis=1 if ROWS else 0) / 16
            s12, s21, s22 = _add_mean(s12, h1, a2), _add_mean(s21, h2, a1), _add_mean(s22, h2, a2)
    return s11, s12, s21, s22, t1, t2


@triton.jit
def _add_mean(s, h, a):
    """s + h^T a; where a value is infinite, so is its row, and not the difference of two infinite ones."""
    return tl.where((tl.abs(h) < float('inf'))[:, None], s + h[:, None] * a[None, :], h[:, None])


@triton.jit
def _halve(x):
    """Sums of rows i and i + 8, both of which a thread has: half as many registers."""
    return tl.sum(tl.reshape(x, (x.shape[0] // 16, 2, 8, x.shape[1])), axis=1)


@triton.jit
def _place(rows, columns, D: tl.constexpr, R: tl.constexpr, C: tl.constexpr, WR: tl.constexpr, WC: tl.constexpr):
    """Offsets and mask of a transposed block of a state in memory."""
    r, c = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    return rows + r + (columns + c) * D, (r < WR) & (c < WC)


@triton.jit
def _store_state(state_ptr, total_ptr, index, s11, s12, s21, s22, t1, t2, D: tl.constexpr, W1: tl.constexpr,
                 C1: tl.constexpr, C2: tl.constexpr, R2: tl.constexpr):
    state_ptr += index * D * D
    total_ptr += index * D
    place, mask = _place(0, 0, D, C1, C1, W1, W1)
    tl.store(state_ptr + place, s11, mask=mask)
    tl.store(total_ptr + tl.arange(0, C1), t1, mask=tl.arange(0, C1) < W1)
    if C2:
        place, mask = _place(0, C1, D, C1, C2, C1, D - C1)
        tl.store(state_ptr + place, s12, mask=mask)
        place, mask = _place(C1, 0, D, R2, C1, D - C1, C1)
        tl.store(state_ptr + place, s21, mask=mask)
        place, mask = _place(C1, C1, D, R2, C2, D - C1, D - C1)
        tl.store(state_ptr + place, s22, mask=mask)
        tl.store(total_ptr + C1 + tl.arange(0, C2), t2, mask=tl.arange(0, C2) < D - C1)


@triton.jit
def _sum_blocks(ptr, splits, step, place, mask):
    block = tl.load(ptr + place, mask=mask, other=0.0)
    for _ in range(1, splits):
        ptr += step
        block += tl.load(ptr + place, mask=mask, other=0.0)
    return block


@triton.jit
def _load_state(state_ptr, total_ptr, splits, D: tl.constexpr, W1: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
                R2: tl.constexpr):
    """Sum of the splits' states of head ``program_id(0)``, in their order."""
    index, heads = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    state_ptr += index * D * D
    place, mask = _place(0, 0, D, C1, C1, W1, W1)
    s11, s12, s21, s22 = _sum_blocks(state_ptr, splits, heads * D * D, place, mask), 0.0, 0.0, 0.0
    if C2:
        place, mask = _place(0, C1, D, C1, C2, C1, D - C1)
        s12 = _sum_blocks(state_ptr, splits, heads * D * D, place, mask)
        place, mask = _place(C1, 0, D, R2, C1, D - C1, C1)
        s21 = _sum_blocks(state_ptr, splits, heads * D * D, place, mask)
        place, mask = _place(C1, C1, D, R2, C2, D - C1, D - C1)
        s22 = _sum_blocks(state_ptr, splits, heads * D * D, place, mask)
    t1, t2 = _load_total(total_ptr, splits, D, W1, C1, C2)
    return s11, s12, s21, s22, t1, t2


@triton.jit
def _load_total(total_ptr, splits, D: tl.constexpr, W1: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr):
    index, heads = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    total_ptr += index * D
    t1, t2 = _sum_blocks(total_ptr, splits, heads * D, tl.arange(0, C1), tl.arange(0, C1) < W1), 0.0
    if C2:
        t2 = _sum_blocks(total_ptr, splits, heads * D, C1 + tl.arange(0, C2), tl.arange(0, C2) < D - C1)
    return t1, t2


@triton.jit
def _as_factor(s11, s12, s21, s22, dtype: tl.constexpr, C2: tl.constexpr):
    """A state in the dtype of products, and its unit."""
    unit = 1.0
    if dtype == tl.float16:
        unit = _largest(s11)
        if C2:
            unit = _max(_max(unit, _largest(s12)), _max(_largest(s21), _largest(s22)))
            s12, s21, s22 = s12 / unit, s21 / unit, s22 / unit
        s11 /= unit
    s11 = s11.to(dtype)
    if C2:
        s12, s21, s22 = s12.to(dtype), s21.to(dtype), s22.to(dtype)
    return s11, s12, s21, s22, unit


@triton.jit
def _center(s11, s12, s21, s22, t1, t2, C2: tl.constexpr):
    """A row m, and the state without total^T m, the most that a product of two vectors can take away from it.

    Gradients of q and k are what is left of values when their mean is taken away. Rounded to half precision before
    that, they would be lost in the last digits. Any m will do.
    """
    norm = tl.sum(t1 * t1, axis=0) + TINY
    m1, m2 = tl.sum(s11 * t1[None, :], axis=1), 0.0
    if C2:
        norm += tl.sum(t2 * t2, axis=0)
        m1 += tl.sum(s12 * t2[None, :], axis=1)
        m2 = _finite((tl.sum(s21 * t1[None, :], axis=1) + tl.sum(s22 * t2[None, :], axis=1)) / norm)
        s21 -= m2[:, None] * t1[None, :]
        s22 -= m2[:, None] * t2[None, :]
    m1 = _finite(m1 / norm)
    s11 -= m1[:, None] * t1[None, :]
    if C2:
        s12 -= m1[:, None] * t2[None, :]
    return s11, s12, s21, s22, m1, m2


@triton.jit
def _finite(x):
    return tl.where(tl.abs(x) < float('inf'), x, 0.0)


@triton.jit
def _rounded(f1, f2, dtype: tl.constexpr, C2: tl.constexpr):
    """Features in the dtype of products, and each row's unit."""
    row = 1.0
    if dtype == tl.float16:
        row = _largest(f1, 1)
        if C2:
            row = _max(row, _largest(f2, 1))
            f2 *= (1 / row)[:, None]
        f1 *= (1 / row)[:, None]
    return f1.to(dtype), f2.to(dtype) if C2 else f2, row


@triton.jit
def _times(x1, x2, s11, s21, C2: tl.constexpr, PRECISION: tl.constexpr):
    """x by a factor of two blocks of rows."""
    out = tl.dot(x1, s11, input_precision=PRECISION)
    return tl.dot(x2, s21, out, input_precision=PRECISION) if C2 else out


@triton.jit
def _weight(f1, f2, t1, t2, eps, C2: tl.constexpr):
    weight = tl.sum(f1 * t1[None, :], axis=1) + eps
    return weight + tl.sum(f2 * t2[None, :], axis=1) if C2 else weight


@triton.jit
def _in_two(t, dtype: tl.constexpr):
    """A factor with t in its first two columns: its first digits and the rest."""
    column = tl.arange(0, 16)[None, :]
    high = t.to(dtype)
    low = (t - high.to(tl.float32)).to(dtype)
    return tl.where(column == 0, high[:, None], tl.where(column == 1, low[:, None], 0.0)).to(dtype)


@triton.jit
def _answer(q_ptr, out_ptr, qn, on, count, s11, s12, s21, s22, t1, t2, eps, D: tl.constexpr, W1: tl.constexpr,
            C1: tl.constexpr, C2: tl.constexpr, R2: tl.constexpr, BN: tl.constexpr, MAP: tl.constexpr,
            PRECISION: tl.constexpr):
    """Writes ``phi(q) S / (phi(q)·total + eps)`` for ``count`` queries, with the same rounded phi(q) in both."""
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    rows = tl.arange(0, BN)
    s11, s12, s21, s22, unit = _as_factor(s11, s12, s21, s22, dtype, C2)
    t_unit = 1.0
    if dtype == tl.float16:
        t_unit = _largest(t1, 0)
        if C2:
            t_unit = _max(t_unit, _largest(t2, 0))
            t2 /= t_unit
        t1 /= t_unit
    if dtype != tl.float32:
        t1 = _in_two(t1, dtype)
        if C2:
            t2 = _in_two(t2, dtype)
    for start in range(0, count, BN):
        f1, f2 = _features(_load(q_ptr, qn, rows, count - start, W1, C1), W1, C1, MAP), 0.0
        if C2:
            f2 = _features(_load(q_ptr + C1, qn, rows, count - start, D - C1, C2), D - C1, C2, MAP)
        if dtype == tl.float32:
            inverse = 1.0 / _weight(f1, f2, t1, t2, eps, C2)
        else:
            f1, f2, row = _rounded(f1, f2, dtype, C2)
            inverse = unit / (tl.sum(_times(f1, f2, t1, t2, C2, PRECISION), axis=1) * t_unit + eps / row)
        _store(out_ptr, on, rows, count - start,
               _times(f1, f2, tl.trans(s11), tl.trans(s12) if C2 else s12, C2, PRECISION) * inverse[:, None], W1, C1)
        if C2:
            _store(out_ptr + C1, on, rows, count - start,
                   _times(f1, f2, tl.trans(s21), tl.trans(s22), C2, PRECISION) * inverse[:, None], D - C1, R2)
        q_ptr += BN * qn
        out_ptr += BN * on


@triton.jit(do_not_specialize=NUMBERS)
def _fused_kernel(q_ptr, k_ptr, v_ptr, out_ptr, state_ptr, total_ptr, qb, qh, qn, ob, oh, on, kb, kh, kn, vb, vh, vn,
                  H, NQ, NK, eps, D: tl.constexpr, W1: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
                  R2: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr):
    """One head per program, state in registers: everything is read and written once."""
    start = tl.program_id(1)  # 0
    s11, s12, s21, s22, t1, t2 = _sum_state(_head(k_ptr, kb, kh, kn, start, H), _head(v_ptr, vb, vh, vn, start, H), kn,
                                            vn, start + NK, D, W1, C1, C2, R2, ROWS, BN, MAP, PRECISION)
    _store_state(state_ptr, total_ptr, tl.program_id(0).to(tl.int64), s11, s12, s21, s22, t1, t2, D, W1, C1, C2, R2)
    if W1 < C1:  # features that are not there are 0, but times an infinite value they were not
        s11 = tl.where((tl.arange(0, C1) < W1)[None, :], s11, 0.0)
    if D - C1 < C2:
        s12 = tl.where((tl.arange(0, C2) < D - C1)[None, :], s12, 0.0)
        s22 = tl.where((tl.arange(0, C2) < D - C1)[None, :], s22, 0.0)
    tl.debug_barrier()
    t1, t2 = _load_total(total_ptr, 1, D, W1, C1, C2)  # as it was summed, phi(q) would be computed twice
    _answer(_head(q_ptr, qb, qh, qn, start, H), _head(out_ptr, ob, oh, on, start, H), qn, on, start + NQ, s11, s12, s21,
            s22, t1, t2, eps, D, W1, C1, C2, R2, BN, MAP, PRECISION)


@triton.jit(do_not_specialize=NUMBERS)
def _state_kernel(k_ptr, v_ptr, state_ptr, total_ptr, kb, kh, kn, vb, vh, vn, H, N, CHUNK, D: tl.constexpr,
                  W1: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, R2: tl.constexpr, ROWS: tl.constexpr,
                  BN: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr):
    """State of one chunk of one head's tokens."""
    begin = tl.program_id(1) * CHUNK
    s11, s12, s21, s22, t1, t2 = _sum_state(_head(k_ptr, kb, kh, kn, begin, H), _head(v_ptr, vb, vh, vn, begin, H), kn,
                                            vn, tl.minimum(N - begin, CHUNK), D, W1, C1, C2, R2, ROWS, BN, MAP,
                                            PRECISION)
    index = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    _store_state(state_ptr, total_ptr, index, s11, s12, s21, s22, t1, t2, D, W1, C1, C2, R2)


@triton.jit(do_not_specialize=NUMBERS)
def _out_kernel(q_ptr, out_ptr, parts_ptr, totals_ptr, state_ptr, total_ptr, qb, qh, qn, ob, oh, on, H, N, CHUNK,
                SPLITS, eps, D: tl.constexpr, W1: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, R2: tl.constexpr,
                ROWS: tl.constexpr, BN: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr):
    """Answers to a chunk of queries; the first of a head also writes the sum of its states."""
    s11, s12, s21, s22, t1, t2 = _load_state(parts_ptr, totals_ptr, SPLITS, D, W1, C1, C2, R2)
    if tl.program_id(1) == 0:
        _store_state(state_ptr, total_ptr, tl.program_id(0).to(tl.int64), s11, s12, s21, s22, t1, t2, D, W1, C1, C2, R2)
    begin = tl.program_id(1) * CHUNK
    _answer(_head(q_ptr, qb, qh, qn, begin, H), _head(out_ptr, ob, oh, on, begin, H), qn, on,
            tl.minimum(N - begin, CHUNK), s11, s12, s21, s22, t1, t2, eps, D, W1, C1, C2, R2, BN, MAP, PRECISION)


@triton.jit(do_not_specialize=NUMBERS)
def _grad_q_kernel(q_ptr, go_ptr, gq_ptr, state_ptr, total_ptr, gstate_ptr, gtotal_ptr, mean_ptr, qb, qh, qn, gb, gh,
                   gn, xb, xh, xn, H, N, CHUNK, eps, D: tl.constexpr, W1: tl.constexpr, C1: tl.constexpr,
                   C2: tl.constexpr, R2: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, MAP: tl.constexpr,
                   PRECISION: tl.constexpr):
    """Gradient of a chunk of queries, and their share of the state's: with w = phi(q)·total + eps, any row m and

    ``T = go (S - total^T m)^T / w``, ``c = go·(out - m) / w = (phi(q)·T - eps go·m / w) / w``:
    ``d phi(q) = T - c total``, ``d S = sum (phi(q) / w)^T go`` and ``d total + m d S^T = -sum c phi(q)``.
    """
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    rows = tl.arange(0, BN)
    s11, s12, s21, s22, t1, t2 = _load_state(state_ptr, total_ptr, 1, D, W1, C1, C2, R2)
    if dtype != tl.float32:
        s11, s12, s21, s22, m1, m2 = _center(s11, s12, s21, s22, t1, t2, C2)
        mean_ptr += tl.program_id(0).to(tl.int64) * D
        if tl.program_id(1) == 0:
            tl.store(mean_ptr + tl.arange(0, C1), m1, mask=tl.arange(0, C1) < W1)
            if C2:
                tl.store(mean_ptr + C1 + tl.arange(0, R2), m2, mask=tl.arange(0, R2) < D - C1)
    s11, s12, s21, s22, unit = _as_factor(s11, s12, s21, s22, dtype, C2)
    g11, g12, g21, g22, grad_unit = _no_state(C1, C2, R2, ROWS, dtype)
    u1, u2 = tl.zeros((BN // 16, 8, C1), tl.float32), 0.0
    if C2:
        u2 = tl.zeros((BN // 16, 8, C2), tl.float32)
    begin = tl.program_id(1) * CHUNK
    count = tl.minimum(N - begin, CHUNK)
    q_ptr = _head(q_ptr, qb, qh, qn, begin, H)
    go_ptr = _head(go_ptr, gb, gh, gn, begin, H)
    gq_ptr = _head(gq_ptr, xb, xh, xn, begin, H)
    for start in range(0, count, BN):
        q1, q2 = _load(q_ptr, qn, rows, count - start, W1, C1), 0.0
        go1, go2 = _load(go_ptr, gn, rows, count - start, W1, C1), 0.0
        f1, f2 = _features(q1, W1, C1, MAP), 0.0
        if C2:
            q2 = _load(q_ptr + C1, qn, rows, count - start, D - C1, C2)
            go2 = _load(go_ptr + C1, gn, rows, count - start, D - C1, R2)
            f2 = _features(q2, D - C1, C2, MAP)
        p1, p2 = _times(go1, go2, s11, s21, C2, PRECISION), 0.0
        if C2:
            p2 = _times(go1, go2, s12, s22, C2, PRECISION)
        # 0 p1 has threads compute features of the same elements as of p1, and not of others as well.
        weight = tl.sum(f1 * t1[None, :] + 0.0 * p1, axis=1) + eps
        if C2:
            weight += tl.sum(f2 * t2[None, :] + 0.0 * p2, axis=1)
        # Of queries that are not there only the weight could do harm, if it is 0.
        inverse = tl.where(rows < count - start, 1.0 / weight, 0.0)
        p1 *= (unit * inverse)[:, None]
        c = tl.sum(f1 * p1, axis=1)
        if C2:
            p2 *= (unit * inverse)[:, None]
            c += tl.sum(f2 * p2, axis=1)
        if dtype != tl.float32:
            gm = tl.sum(go1.to(tl.float32) * m1[None, :], axis=1)
            if C2:
                gm += tl.sum(go2.to(tl.float32) * m2[None, :], axis=1)
            c -= eps * inverse * gm
        c *= inverse
        _store(gq_ptr, xn, rows, count - start,
               (p1 - c[:, None] * t1[None, :]) * _phi_grad(q1.to(tl.float32), f1, MAP), W1, C1)
        u1 += _halve(f1 * c[:, None])
        f1 *= inverse[:, None]
        if C2:
            _store(gq_ptr + C1, xn, rows, count - start,
                   (p2 - c[:, None] * t2[None, :]) * _phi_grad(q2.to(tl.float32), f2, MAP), D - C1, C2)
            u2 += _halve(f2 * c[:, None])
            f2 *= inverse[:, None]
        g11, g12, g21, g22, grad_unit = _add_product(g11, g12, g21, g22, grad_unit, go1, go2, f1, f2, C2, ROWS,
                                                     PRECISION)
        q_ptr += BN * qn
        go_ptr += BN * gn
        gq_ptr += BN * xn
    u1 = -tl.sum(tl.sum(u1, axis=0), axis=0)
    if C2:
        u2 = -tl.sum(tl.sum(u2, axis=0), axis=0)
    g11, g12, g21, g22 = _finish(g11, g12, g21, g22, grad_unit, C2, ROWS)
    index = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    _store_state(gstate_ptr, gtotal_ptr, index, g11, g12, g21, g22, u1, u2, D, W1, C1, C2, R2)


@triton.jit(do_not_specialize=NUMBERS)
def _grad_kv_kernel(k_ptr, v_ptr, gk_ptr, gv_ptr, gstate_ptr, gtotal_ptr, mean_ptr, kb, kh, kn, vb, vh, vn, xb, xh,
                    xn, yb, yh, yn, H, N, CHUNK, SPLITS, D: tl.constexpr, W1: tl.constexpr, C1: tl.constexpr,
                    C2: tl.constexpr, R2: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, MAP: tl.constexpr,
                    PRECISION: tl.constexpr):
    """``d v = phi(k) d S``, ``d phi(k) = v d S^T + d total`` for a chunk of tokens; gtotal is d total + m d S^T."""
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    rows = tl.arange(0, BN)
    s11, s12, s21, s22, t1, t2 = _load_state(gstate_ptr, gtotal_ptr, SPLITS, D, W1, C1, C2, C2)
    s11, s12, s21, s22, unit = _as_factor(s11, s12, s21, s22, dtype, C2)
    if dtype != tl.float32:  # m d S^T with the digits that v d S^T has
        m1, m2 = _load_total(mean_ptr, 1, D, W1, C1, C2)
        t1 -= unit * tl.sum(m1[:, None] * s11.to(tl.float32), axis=0)
        if C2:
            t1 -= unit * tl.sum(m2[:, None] * s21.to(tl.float32), axis=0)
            t2 -= unit * (tl.sum(m1[:, None] * s12.to(tl.float32), axis=0) +
                          tl.sum(m2[:, None] * s22.to(tl.float32), axis=0))
    begin = tl.program_id(1) * CHUNK
    count = tl.minimum(N - begin, CHUNK)
    k_ptr, v_ptr = _head(k_ptr, kb, kh, kn, begin, H), _head(v_ptr, vb, vh, vn, begin, H)
    gk_ptr, gv_ptr = _head(gk_ptr, xb, xh, xn, begin, H), _head(gv_ptr, yb, yh, yn, begin, H)
    for start in range(0, count, BN):
        k1, k2 = _load(k_ptr, kn, rows, count - start, W1, C1), 0.0
        v1, v2 = _load(v_ptr, vn, rows, count - start, W1, C1), 0.0
        f1, f2 = _features(k1, W1, C1, MAP), 0.0
        if C2:
            k2 = _load(k_ptr + C1, kn, rows, count - start, D - C1, C2)
            v2 = _load(v_ptr + C1, vn, rows, count - start, D - C1, C2)
            f2 = _features(k2, D - C1, C2, MAP)
        p = _times(v1, v2, s11, s21, C2, PRECISION) * unit + t1[None, :]
        _store(gk_ptr, xn, rows, count - start, p * _phi_grad(k1.to(tl.float32), f1, MAP), W1, C1)
        if C2:
            p = _times(v1, v2, s12, s22, C2, PRECISION) * unit + t2[None, :]
            _store(gk_ptr + C1, xn, rows, count - start, p * _phi_grad(k2.to(tl.float32), f2, MAP), D - C1, C2)
        f1, f2, row = _rounded(f1, f2, dtype, C2)
        row *= unit
        p = _times(f1, f2, tl.trans(s11), tl.trans(s12) if C2 else s12, C2, PRECISION)
        _store(gv_ptr, yn, rows, count - start, p * row[:, None] if dtype == tl.float16 else p, W1, C1)
        if C2:
            p = _times(f1, f2, tl.trans(s21), tl.trans(s22), C2, PRECISION)
            _store(gv_ptr + C1, yn, rows, count - start, p * row[:, None] if dtype == tl.float16 else p, D - C1, C2)
        k_ptr += BN * kn
        v_ptr += BN * vn
        gk_ptr += BN * xn
        gv_ptr += BN * yn


INTERPRETED = not isinstance(_state_kernel, triton.runtime.JITFunction)
# Tokens of a tile, warps and stages for up to so many channels: without spills or with few, and within the shared
# memory of most GPUs. Where that does not suffice, a kernel gets less.
WIDE = {  # half precision, if 64 rows are multiplied at a time
    _state_kernel: {96: (64, 4, 3), 128: (64, 8, 3)},
    _fused_kernel: {96: (64, 4, 3), 128: (128, 8, 2)},
    _out_kernel: {96: (64, 4, 3), 128: (128, 8, 2)},
    _grad_q_kernel: {96: (64, 4, 3), 128: (128, 8, 2)},
    _grad_kv_kernel: {96: (64, 4, 3), 128: (128, 8, 2)},
}
HALF = {
    _state_kernel: {64: (64, 4, 3), 96: (32, 4, 3), 128: (32, 8, 2)},
    _fused_kernel: {96: (64, 4, 3), 128: (32, 8, 2)},
    _out_kernel: {96: (64, 4, 3), 128: (128, 8, 2)},
    _grad_q_kernel: {96: (64, 4, 3), 128: (32, 8, 2)},
    _grad_kv_kernel: {96: (64, 4, 3), 128: (128, 8, 2)},
}
FULL = {
    _state_kernel: {128: (32, 8, 2)},
    _fused_kernel: {96: (32, 8, 2), 128: (16, 8, 2)},
    _out_kernel: {64: (32, 4, 2), 128: (16, 8, 2)},
    _grad_q_kernel: {128: (16, 8, 2)},
    _grad_kv_kernel: {128: (16, 8, 2)},
}


class _Kernel:
    """One of the kernels for one device, dtype, head width and map."""

    def __init__(self, function, device: int | None, dtype: torch.dtype, dim: int, feature_map: str) -> None:
        first = max(16, triton.next_power_of_2(dim + 1) // 2)
        second = max(16, triton.next_power_of_2(dim - first)) if dim > first else 0
        if second == first:
            first, second = 2 * first, 0
        half = dtype != torch.float32
        # Hopper and Blackwell multiply 64 rows at a time: the second block of values gets as many.
        rows = 64 if half and first >= 64 and _multiplies_64_rows() else 0
        shape = dict(D=dim, W1=first if second else dim, C1=first, C2=second, R2=max(rows, second) if second else 0,
                     ROWS=rows, MAP=feature_map, PRECISION=None if half else 'ieee')
        tiles = (WIDE if rows else HALF if half else FULL)[function]
        tile, warps, stages = next(best for most, best in tiles.items() if dim <= most)
        if INTERPRETED:
            tile = 64  # fewer turns of Python
        self.function, self.slots = function, 0
        self.options = [shape | dict(BN=tile, num_warps=warps, num_stages=stages) for tile, stages in dict.fromkeys(
            [(tile, stages), (tile, 2), (max(16, tile // 2), 2), (max(16, tile // 2), 1), (16, 1)])]

    def launch(self, grid: tuple[int, int], *args, warmup: bool = False):
        """With the first options that fit the GPU; raises OutOfResources if none do. A warm-up only compiles."""
        while True:
            try:
                compiled = self.function.run(*args, grid=grid, warmup=warmup, **self.options[0])
                if warmup:
                    _ = compiled.run  # loads it, which is when it turns out what does not fit
                return compiled
            except OutOfResources:
                if len(self.options) == 1:
                    raise
                del self.options[0]

    def chunks(self, heads: int, tokens: int, start: float, each: float, *args) -> tuple[int, int]:
        """Tokens of a chunk, and chunks of a head, each of which is a program with such arguments; see `_chunk`."""
        if not self.slots:
            self.slots = 1 if INTERPRETED else _slots(self.launch((1, 1), *args, warmup=True))
        tile = self.options[0]['BN']
        chunk = tile * _chunk(triton.cdiv(tokens, tile), heads, self.slots, start, each)
        return chunk, max(1, triton.cdiv(tokens, chunk))


_kernel = functools.cache(_Kernel)


def _multiplies_64_rows() -> bool:
    if INTERPRETED:
        return True
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == 'cuda' and target.arch // 10 in (9, 10)


def _slots(compiled) -> int:
    """Programs that run at a time: what registers, shared memory and threads of all multiprocessors suffice for."""
    driver = triton.runtime.driver.active
    gpu = driver.utils.get_device_properties(driver.get_current_device())
    threads = compiled.metadata.num_warps * compiled.metadata.target.warp_size
    by_registers = 65536 // (max(8, -(-compiled.n_regs // 8) * 8) * threads)
    by_shared = (gpu['max_shared_mem'] + 1024) // (compiled.metadata.shared + 1024)  # 1 KiB is the driver's
    return max(1, min(by_registers, by_shared, 1536 // threads)) * gpu['multiprocessor_count']


@functools.cache
def _chunk(tiles: int, heads: int, slots: int, start: float, each: float) -> int:
    """Tiles of a chunk with which all programs, ``slots`` of them at a time, take the shortest time.

    Times are in those of a tile. A program takes ``start`` beside its tiles; whoever reads what chunks leave behind
    takes ``each`` for one, and another launch if there are several.
    """
    if INTERPRETED:
        return max(1, tiles if tiles <= 2 else triton.cdiv(tiles, 2))  # so that both ways are tested

    def time(chunks: int) -> float:
        again = 3 if each and chunks > 1 else 0
        return triton.cdiv(chunks * heads, slots) * (triton.cdiv(tiles, chunks) + start) + chunks * each + again

    return triton.cdiv(tiles, min(range(1, min(tiles, 256) + 1), key=time)) if tiles else 1


def forward(q: Tensor, k: Tensor, v: Tensor, feature_map: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, H, N, D), stored as (B, N, H, D) because that is what the output projection reads, and the state.

    One launch, or two if heads are too few to keep the GPU busy. What does not fit the GPU is left to PyTorch.

    Args:
        q, k, v: (B, H, N, D), best with unit stride over D; k and v may have another N than q.

    Returns:
        out, ``sum_j phi(k_j)^T v_j`` (B, H, D, D) and ``sum_j phi(k_j)`` (B, H, D), both float32.
    """
    try:
        with torch.cuda.device_of(q):  # Triton launches on the current one
            return _forward(q, k, v, feature_map, eps)
    except OutOfResources:
        return cpu_linear_attention.forward(q, k, v, feature_map, eps)


def _forward(q: Tensor, k: Tensor, v: Tensor, feature_map: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = dense(q, k, v)
    b, h, nq, d = q.shape
    nk, heads, kind = k.shape[2], b * h, (q.device.index, q.dtype, d, feature_map)
    out = q.new_empty(b, nq, h, d).transpose(1, 2)
    state, total = _empty_state(q, b, h)
    of_q, of_kv = strides(q, out), strides(k, v)
    kernel = _kernel(_state_kernel, *kind)
    chunk, splits = kernel.chunks(heads, nk, 1, d / 128, k, v, state, total, *of_kv, h, nk, nk)
    if splits == 1:
        _kernel(_fused_kernel, *kind).launch((heads, 1), q, k, v, out, state, total, *of_q, *of_kv, h, nq, nk, eps)
        return out, state, total
    states, totals = _empty_state(q, splits, b, h)
    kernel.launch((heads, splits), k, v, states, totals, *of_kv, h, nk, chunk)
    kernel, args = _kernel(_out_kernel, *kind), (q, out, states, totals, state, total, *of_q, h, nq)
    chunk, chunks = kernel.chunks(heads, nq, 1 + splits * d / 128, 0, *args, nq, splits, eps)
    kernel.launch((heads, chunks), *args, chunk, splits, eps)
    return out, state, total


def _empty_state(q: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    d = q.shape[-1]
    return (torch.empty(*shape, d, d, dtype=torch.float32, device=q.device),
            torch.empty(*shape, d, dtype=torch.float32, device=q.device))


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, state: Tensor, total: Tensor,
             grads: tuple[Tensor, Tensor, Tensor], feature_map: str, eps: float) -> None:
    """Writes the gradients of q, k and v into ``grads``, tensors of their shapes, by two launches."""
    try:
        with torch.cuda.device_of(q):
            _backward(grad, q, k, v, state, total, grads, feature_map, eps)
    except OutOfResources:
        cpu_linear_attention.backward(grad, q, k, v, state, total, grads, feature_map, eps)


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, state: Tensor, total: Tensor,
              grads: tuple[Tensor, Tensor, Tensor], feature_map: str, eps: float) -> None:
    q, k, v, grad = dense(q, k, v, grad)
    b, h, nq, d = q.shape
    nk, heads, kind = k.shape[2], b * h, (q.device.index, q.dtype, d, feature_map)
    gq, gk, gv = grads
    kernel, of_q = _kernel(_grad_q_kernel, *kind), (*strides(q, grad, gq), h, nq)
    chunk, splits = kernel.chunks(heads, nq, 1 + d / 128, d / 128, q, grad, gq, state, total, state, total, total,
                                  *of_q, nq, eps)
    (states, totals), mean = _empty_state(q, splits, b, h), torch.empty_like(total)
    kernel.launch((heads, splits), q, grad, gq, state, total, states, totals, mean, *of_q, chunk, eps)
    kernel, args = _kernel(_grad_kv_kernel, *kind), (k, v, gk, gv, states, totals, mean, *strides(k, v, gk, gv), h, nk)
    chunk, chunks = kernel.chunks(heads, nk, 1 + splits * d / 128, 0, *args, nk, splits)
    kernel.launch((heads, chunks), *args, chunk, splits)
