"""Triton kernels of coarse-to-fine attention on one level, forward and backward.

Queries, keys and values are read where the qkv projection left them: a kernel finds the patches of a tile, or of a
block of queries, by their places in the grid. Cells are what all blocks may meet: means of the T tiles, then the P
prefix tokens. Weights are in registers only. In memory there are, beside inputs and outputs, the cells, the
log-sum-exp of each query and, for each block and tile, its share and bias: N^2 / (tile block)^2 numbers a head. Sums
are float32, in a fixed order: equal inputs give equal bits.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adala_mm.ops.kernels import PADDED, dense, strides

LOG2E = tl.constexpr(1.4426950408889634)
# A kernel is not compiled again for other ones.
NUMBERS = ['H', 'P', 'L', 'K', 'columns', 'block_columns']


@triton.jit
def _place(square, inner, SIDE: tl.constexpr, columns, h, w):
    """Number of the patch ``inner`` of a square of the grid, and whether there is such a patch."""
    y = square // columns * SIDE + inner // SIDE
    x = square % columns * SIDE + inner % SIDE
    return y * w + x, (y < h) & (x < w) & (inner < SIDE * SIDE)


@triton.jit
def _count(cells, T, TILE: tl.constexpr, columns, h, w):
    """Number of tokens behind a cell."""
    rows = tl.minimum(h - cells // columns * TILE, TILE)
    return tl.where(cells < T, rows * tl.minimum(w - cells % columns * TILE, TILE), 1)


@triton.jit
def _head(ptr, index, stride_b, stride_h, H):
    return ptr + (index // H).to(tl.int64) * stride_b + (index % H).to(tl.int64) * stride_h


@triton.jit
def _mask(real, D: tl.constexpr, BD: tl.constexpr):
    if D == BD:
        return real[:, None]
    else:
        return real[:, None] & (tl.arange(0, BD) < D)[None, :]


@triton.jit
def _load(ptr, stride, rows, real, D: tl.constexpr, BD: tl.constexpr):
    """Rows of a (N, D) matrix, zero where not ``real``."""
    return tl.load(ptr + rows[:, None].to(tl.int64) * stride + tl.arange(0, BD)[None, :], mask=_mask(real, D, BD),
                   other=0.0)


@triton.jit
def _store(ptr, stride, rows, real, value, D: tl.constexpr, BD: tl.constexpr):
    tl.store(ptr + rows[:, None].to(tl.int64) * stride + tl.arange(0, BD)[None, :], value.to(ptr.dtype.element_ty),
             mask=_mask(real, D, BD))


@triton.jit(do_not_specialize=NUMBERS)
def _cells_kernel(k_ptr, v_ptr, ck_ptr, cv_ptr, variance_ptr, size_ptr, kb, kh, kn, vb, vh, vn, H, h, w, P, T, C,
                  columns, TILE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    """Keys, values and, of tiles, variances of some cells of one head; for all heads, logarithms of their sizes."""
    chunks = C // BN
    index = tl.program_id(0) // chunks
    cells = tl.program_id(0) % chunks * BN + tl.arange(0, BN)
    k_ptr, v_ptr = _head(k_ptr, index, kb, kh, H), _head(v_ptr, index, vb, vh, H)
    prefix = (cells >= T) & (cells < T + P)
    k = _load(k_ptr, kn, cells - T, prefix, D, BD).to(tl.float32)
    v = _load(v_ptr, vn, cells - T, prefix, D, BD).to(tl.float32)
    for inner in range(TILE * TILE):
        place, real = _place(cells, inner, TILE, columns, h, w)
        k += _load(k_ptr, kn, P + place, real & (cells < T), D, BD).to(tl.float32)
        v += _load(v_ptr, vn, P + place, real & (cells < T), D, BD).to(tl.float32)
    count = _count(cells, T, TILE, columns, h, w).to(tl.float32)
    tl.store(size_ptr + cells, tl.where(cells < T + P, tl.log2(count), float('-inf')), mask=index == 0)
    share = 1 / count
    k *= share[:, None]
    begin = index.to(tl.int64) * (T + P) * D
    _store(ck_ptr + begin, D, cells, cells < T + P, k, D, BD)
    _store(cv_ptr + begin, D, cells, cells < T + P, v * share[:, None], D, BD)
    variance = tl.zeros((BN,), tl.float32)
    for inner in range(TILE * TILE):
        place, real = _place(cells, inner, TILE, columns, h, w)
        apart = tl.where(real[:, None], _load(k_ptr, kn, P + place, real & (cells < T), D, BD).to(tl.float32) - k, 0.0)
        variance += tl.sum(apart * apart, axis=1)
    tl.store(variance_ptr + index.to(tl.int64) * T + cells, variance * share, mask=cells < T)


@triton.jit
def _tile_logits(q, ck_ptr, size_ptr, tiles, T, scale, D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr):
    """Of queries and closed tiles, (BM, BN), to the base 2."""
    k = _load(ck_ptr, D, tiles, tiles < T, D, BD)
    bias = tl.where(tiles < T, tl.load(size_ptr + tiles), float('-inf'))
    return tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias[None, :]


@triton.jit(do_not_specialize=NUMBERS)
def _share_kernel(q_ptr, ck_ptr, size_ptr, share_ptr, qb, qh, qn, H, h, w, P, T, C, L, block_columns, scale,
                  BLOCK: tl.constexpr, CHUNKS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
                  BN: tl.constexpr, PRECISION: tl.constexpr):
    """Sum of the shares that the queries of a chunk of a block give to each tile while all are closed."""
    pid = tl.program_id(0)
    index = pid // (L * CHUNKS)
    place, real = _place(pid // CHUNKS % L, pid % CHUNKS * BM + tl.arange(0, BM), BLOCK, block_columns, h, w)
    q = _load(_head(q_ptr, index, qb, qh, H), qn, place, real, D, BD)
    ck_ptr += index.to(tl.int64) * (T + P) * D
    share_ptr += pid.to(tl.int64) * T
    high = tl.full((BM,), float('-inf'), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for begin in range(0, T, BN):
        logits = _tile_logits(q, ck_ptr, size_ptr, begin + tl.arange(0, BN), T, scale, D, BD, PRECISION)
        top = tl.maximum(high, tl.max(logits, axis=1))
        total = total * tl.exp2(high - top) + tl.sum(tl.exp2(logits - top[:, None]), axis=1)
        high = top
    total = tl.where(real, high + tl.log2(total), float('inf'))
    for begin in range(0, T, BN):
        tiles = begin + tl.arange(0, BN)
        logits = _tile_logits(q, ck_ptr, size_ptr, tiles, T, scale, D, BD, PRECISION)
        tl.store(share_ptr + tiles, tl.sum(tl.exp2(logits - total[:, None]), axis=0), mask=tiles < T)


@triton.jit(do_not_specialize=NUMBERS)
def _open_kernel(chosen_ptr, size_ptr, opened_ptr, bias_ptr, C, K, columns, TILE: tl.constexpr, BK: tl.constexpr,
                 BN: tl.constexpr, CORNERS: tl.constexpr):
    """What a block adds to the logits of cells: the sizes, and minus infinity for open tiles and behind the last cell.

    With ``CORNERS``, also the numbers of its open tiles and their first patches, x + 2^16 y.
    """
    row = tl.program_id(0).to(tl.int64)
    chosen_ptr += row * K
    if CORNERS:
        for begin in range(0, K, BK):
            numbers = begin + tl.arange(0, BK)
            tiles = tl.load(chosen_ptr + numbers, mask=numbers < K, other=0).to(tl.int32)
            tl.store(opened_ptr + row * K + numbers, tiles, mask=numbers < K)
            tl.store(opened_ptr + (row + tl.num_programs(0)) * K + numbers,
                     tiles % columns * TILE + (tiles // columns * TILE << 16), mask=numbers < K)
    for first in range(0, C, BN):
        cells = first + tl.arange(0, BN)
        opened = tl.zeros((BN,), tl.int32)
        for begin in range(0, K, BK):
            numbers = begin + tl.arange(0, BK)
            tiles = tl.load(chosen_ptr + numbers, mask=numbers < K, other=-1).to(tl.int32)
            opened |= tl.max((cells[:, None] == tiles[None, :]).to(tl.int32), axis=1)
        tl.store(bias_ptr + row * C + cells, tl.where(opened > 0, float('-inf'), tl.load(size_ptr + cells)))


@triton.jit
def _open_tokens(corner_ptr, numbers, K, P, h, w, TILE: tl.constexpr, EVEN: tl.constexpr):
    """Rows of the tokens of K open tiles, by their ``numbers`` in the list of these, and whether they are there.

    Tiles are given by their first patches, so that no lane divides by the number of columns.
    """
    inner = numbers % (TILE * TILE)
    # EVEN: all tiles are in the grid, and all numbers in the list.
    there = tl.full(numbers.shape, 1, tl.int1) if EVEN else numbers < K * TILE * TILE
    corner = tl.load(corner_ptr + numbers // (TILE * TILE), mask=there, other=0)
    y = (corner >> 16) + inner // TILE
    x = (corner & 0xFFFF) + inner % TILE
    if not EVEN:
        there = there & (y < h) & (x < w)
    return P + y * w + x, there


@triton.jit
def _meet(q, k, v, bias, scale, high, total, out, PRECISION: tl.constexpr):
    """Some more keys and values in the softmax of (BM,) queries, whose greatest logit so far is ``high``."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias[None, :]
    top = tl.maximum(high, tl.max(logits, axis=1))
    weights = tl.exp2(logits - top[:, None])
    shrink = tl.exp2(high - top)
    out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
    return top, total * shrink + tl.sum(weights, axis=1), out


@triton.jit(do_not_specialize=NUMBERS)
def _forward_kernel(q_ptr, k_ptr, v_ptr, ck_ptr, cv_ptr, corner_ptr, bias_ptr, out_ptr, lse_ptr, qb, qh, qn, kb, kh, kn,
                    vb, vh, vn, ob, oh, on, H, h, w, P, T, C, L, K, block_columns, scale, TILE: tl.constexpr,
                    EVEN: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    """Answers to a chunk of a block of queries, and the binary logarithms of their denominators."""
    row = tl.program_id(0) // CHUNKS  # of all blocks of all heads
    index = row // L
    place, real = _place(row % L, tl.program_id(0) % CHUNKS * BM + tl.arange(0, BM), BLOCK, block_columns, h, w)
    q = _load(_head(q_ptr, index, qb, qh, H), qn, place, real, D, BD)
    k_ptr, v_ptr = _head(k_ptr, index, kb, kh, H), _head(v_ptr, index, vb, vh, H)
    ck_ptr += index.to(tl.int64) * (T + P) * D
    cv_ptr += index.to(tl.int64) * (T + P) * D
    corner_ptr += row.to(tl.int64) * K
    bias_ptr += row.to(tl.int64) * C
    high = tl.full((BM,), float('-inf'), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    out = tl.zeros((BM, BD), tl.float32)
    # Tokens come first: the first tile that is open has some, so that ``high`` is a number from then on.
    for begin in range(0, K * TILE * TILE, BN):
        rows, there = _open_tokens(corner_ptr, begin + tl.arange(0, BN), K, P, h, w, TILE, EVEN)
        k, v = _load(k_ptr, kn, rows, there, D, BD), _load(v_ptr, vn, rows, there, D, BD)
        high, total, out = _meet(q, k, v, tl.where(there, 0.0, float('-inf')), scale, high, total, out, PRECISION)
    for begin in range(0, T + P, BN):
        cells = begin + tl.arange(0, BN)
        k, v = _load(ck_ptr, D, cells, cells < T + P, D, BD), _load(cv_ptr, D, cells, cells < T + P, D, BD)
        bias = tl.load(bias_ptr + cells)
        high, total, out = _meet(q, k, v, bias, scale, high, total, out, PRECISION)
    _store(_head(out_ptr, index, ob, oh, H), on, place, real, out / total[:, None], D, BD)
    tl.store(lse_ptr + index.to(tl.int64) * h * w + place, high + tl.log2(total), mask=real)


@triton.jit
def _grad_logits(q, k, v, go, bias, lse, delta, scale, PRECISION: tl.constexpr):
    """(BM, BN): ``w (go·v - go·out)`` with the weights w = exp(q·k + bias - lse)."""
    weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias[None, :] - lse[:, None])
    return weights * (tl.dot(go, tl.trans(v), input_precision=PRECISION) - delta[:, None])


@triton.jit(do_not_specialize=NUMBERS)
def _grad_q_kernel(q_ptr, k_ptr, v_ptr, ck_ptr, cv_ptr, corner_ptr, bias_ptr, out_ptr, go_ptr, lse_ptr, delta_ptr,
                   gq_ptr, qb, qh, qn, kb, kh, kn, vb, vh, vn, ob, oh, on, gb, gh, gn, xb, xh, xn, H, h, w, P, T, C, L,
                   K, block_columns, scale, TILE: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
                   CHUNKS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                   PRECISION: tl.constexpr):
    """Gradient of a chunk of a block of queries, and their ``delta = go·out``."""
    row = tl.program_id(0) // CHUNKS
    index = row // L
    place, real = _place(row % L, tl.program_id(0) % CHUNKS * BM + tl.arange(0, BM), BLOCK, block_columns, h, w)
    q = _load(_head(q_ptr, index, qb, qh, H), qn, place, real, D, BD)
    go = _load(_head(go_ptr, index, gb, gh, H), gn, place, real, D, BD)
    out = _load(_head(out_ptr, index, ob, oh, H), on, place, real, D, BD)
    delta = tl.sum(go.to(tl.float32) * out.to(tl.float32), axis=1)
    begin = index.to(tl.int64) * h * w
    lse = tl.load(lse_ptr + begin + place, mask=real, other=0.0)
    tl.store(delta_ptr + begin + place, delta, mask=real)
    k_ptr, v_ptr = _head(k_ptr, index, kb, kh, H), _head(v_ptr, index, vb, vh, H)
    ck_ptr += index.to(tl.int64) * (T + P) * D
    cv_ptr += index.to(tl.int64) * (T + P) * D
    corner_ptr += row.to(tl.int64) * K
    bias_ptr += row.to(tl.int64) * C
    gq = tl.zeros((BM, BD), tl.float32)
    for begin in range(0, K * TILE * TILE, BN):
        rows, there = _open_tokens(corner_ptr, begin + tl.arange(0, BN), K, P, h, w, TILE, EVEN)
        k, v = _load(k_ptr, kn, rows, there, D, BD), _load(v_ptr, vn, rows, there, D, BD)
        gs = _grad_logits(q, k, v, go, tl.where(there, 0.0, float('-inf')), lse, delta, scale, PRECISION)
        gq = tl.dot(gs.to(k.dtype), k, gq, input_precision=PRECISION)
    for begin in range(0, T + P, BN):
        cells = begin + tl.arange(0, BN)
        k, v = _load(ck_ptr, D, cells, cells < T + P, D, BD), _load(cv_ptr, D, cells, cells < T + P, D, BD)
        gs = _grad_logits(q, k, v, go, tl.load(bias_ptr + cells), lse, delta, scale, PRECISION)
        gq = tl.dot(gs.to(k.dtype), k, gq, input_precision=PRECISION)
    _store(_head(gq_ptr, index, xb, xh, H), xn, place, real, gq * (scale / LOG2E), D, BD)


@triton.jit
def _met_by(q, go, k, v, bias, lse, delta, scale, gk, gv, PRECISION: tl.constexpr):
    """Gradients of some keys and values, with the share of some more queries added to them."""
    weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale + bias[:, None] - lse[None, :])
    gv = tl.dot(weights.to(go.dtype), go, gv, input_precision=PRECISION)
    gs = weights * (tl.dot(v, tl.trans(go), input_precision=PRECISION) - delta[None, :])
    return tl.dot(gs.to(q.dtype), q, gk, input_precision=PRECISION), gv


@triton.jit(do_not_specialize=NUMBERS)
def _grad_cells_kernel(q_ptr, ck_ptr, cv_ptr, bias_ptr, go_ptr, lse_ptr, delta_ptr, gck_ptr, gcv_ptr, gk_ptr, gv_ptr,
                       qb, qh, qn, gb, gh, gn, xb, xh, xn, yb, yh, yn, H, h, w, P, T, C, L, block_columns, scale,
                       BLOCK: tl.constexpr, CHUNKS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
                       BN: tl.constexpr, PRECISION: tl.constexpr):
    """Gradients of some cells; those of prefix tokens are what is wanted of their keys and values."""
    programs = tl.cdiv(T + P, BN)
    index = tl.program_id(0) // programs
    cells = tl.program_id(0) % programs * BN + tl.arange(0, BN)
    begin = index.to(tl.int64) * (T + P) * D
    k = _load(ck_ptr + begin, D, cells, cells < T + P, D, BD)
    v = _load(cv_ptr + begin, D, cells, cells < T + P, D, BD)
    q_ptr, go_ptr = _head(q_ptr, index, qb, qh, H), _head(go_ptr, index, gb, gh, H)
    lse_ptr += index.to(tl.int64) * h * w
    delta_ptr += index.to(tl.int64) * h * w
    row = index.to(tl.int64) * L
    gk = tl.zeros((BN, BD), tl.float32)
    gv = tl.zeros((BN, BD), tl.float32)
    for chunk in range(L * CHUNKS):
        place, real = _place(chunk // CHUNKS, chunk % CHUNKS * BM + tl.arange(0, BM), BLOCK, block_columns, h, w)
        q, go = _load(q_ptr, qn, place, real, D, BD), _load(go_ptr, gn, place, real, D, BD)
        lse = tl.load(lse_ptr + place, mask=real, other=0.0)
        delta = tl.load(delta_ptr + place, mask=real, other=0.0)
        bias = tl.load(bias_ptr + (row + chunk // CHUNKS) * C + cells)
        gk, gv = _met_by(q, go, k, v, bias, lse, delta, scale, gk, gv, PRECISION)
    gk *= scale / LOG2E
    _store(gck_ptr + begin, D, cells, cells < T, gk, D, BD)
    _store(gcv_ptr + begin, D, cells, cells < T, gv, D, BD)
    prefix = (cells >= T) & (cells < T + P)
    _store(_head(gk_ptr, index, xb, xh, H), xn, cells - T, prefix, gk, D, BD)
    _store(_head(gv_ptr, index, yb, yh, H), yn, cells - T, prefix, gv, D, BD)


@triton.jit(do_not_specialize=NUMBERS)
def _grad_tokens_kernel(q_ptr, k_ptr, v_ptr, order_ptr, ends_ptr, go_ptr, lse_ptr, delta_ptr, gck_ptr, gcv_ptr, gk_ptr,
                        gv_ptr, qb, qh, qn, kb, kh, kn, vb, vh, vn, gb, gh, gn, xb, xh, xn, yb, yh, yn, H, h, w, P, T,
                        C, L, K, columns, block_columns, scale, TILE: tl.constexpr, BLOCK: tl.constexpr,
                        CHUNKS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                        PRECISION: tl.constexpr):
    """Gradients of a chunk of a tile's tokens: from the blocks that opened it, and their part in that of the mean."""
    programs = tl.cdiv(TILE * TILE, BN)
    row = tl.program_id(0) // programs  # of all tiles of all heads
    index = row // T
    tile = row % T
    place, there = _place(tile, tl.program_id(0) % programs * BN + tl.arange(0, BN), TILE, columns, h, w)
    k = _load(_head(k_ptr, index, kb, kh, H), kn, P + place, there, D, BD)
    v = _load(_head(v_ptr, index, vb, vh, H), vn, P + place, there, D, BD)
    q_ptr, go_ptr = _head(q_ptr, index, qb, qh, H), _head(go_ptr, index, gb, gh, H)
    lse_ptr += index.to(tl.int64) * h * w
    delta_ptr += index.to(tl.int64) * h * w
    order_ptr += index.to(tl.int64) * L * K
    begin = tl.load(ends_ptr + row - 1, mask=tile > 0, other=0)
    dims = tl.arange(0, BD)
    cell = (index.to(tl.int64) * (T + P) + tile) * D + dims
    share = 1 / _count(tile, T, TILE, columns, h, w).to(tl.float32)
    gk = tl.zeros((BN, BD), tl.float32)
    gv = tl.zeros((BN, BD), tl.float32)
    bias = tl.where(there, 0.0, float('-inf'))
    for chunk in range(begin * CHUNKS, tl.load(ends_ptr + row) * CHUNKS):
        block = tl.load(order_ptr + chunk // CHUNKS).to(tl.int32) // K
        place_q, real = _place(block, chunk % CHUNKS * BM + tl.arange(0, BM), BLOCK, block_columns, h, w)
        q, go = _load(q_ptr, qn, place_q, real, D, BD), _load(go_ptr, gn, place_q, real, D, BD)
        lse = tl.load(lse_ptr + place_q, mask=real, other=0.0)
        delta = tl.load(delta_ptr + place_q, mask=real, other=0.0)
        gk, gv = _met_by(q, go, k, v, bias, lse, delta, scale, gk, gv, PRECISION)
    gk = gk * (scale / LOG2E) + (tl.load(gck_ptr + cell, mask=dims < D, other=0.0) * share)[None, :]
    gv += (tl.load(gcv_ptr + cell, mask=dims < D, other=0.0) * share)[None, :]
    _store(_head(gk_ptr, index, xb, xh, H), xn, P + place, there, gk, D, BD)
    _store(_head(gv_ptr, index, yb, yh, H), yn, P + place, there, gv, D, BD)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


class _Shape:
    """Sizes of a call, and what kernels are compiled for."""

    def __init__(self, q: Tensor, k: Tensor, grid: list[int], tile: int, num_open: int, block: int) -> None:
        (self.h, self.w), dim = grid, q.shape[-1]
        tile, block = (min(side, max(grid)) for side in (tile, block))  # the same squares, none of them for nothing
        self.columns, self.block_columns = _ceil(self.w, tile), _ceil(self.w, block)
        self.tiles = _ceil(self.h, tile) * self.columns
        self.blocks = _ceil(self.h, block) * self.block_columns
        self.cells = self.tiles + k.shape[2] - self.h * self.w
        self.padded = _ceil(self.cells, PADDED) * PADDED
        self.num_open = min(num_open, self.tiles)
        half, wide = q.dtype != torch.float32, dim > 64
        most = 64 if half else 32
        rows = min(most, max(16, triton.next_power_of_2(block * block)))  # queries of a program
        keys = most // 2 if wide else most  # at a time
        tokens = min(keys, max(16, triton.next_power_of_2(tile * tile)))  # of a tile, of a program
        # Two gradients in registers: few queries at a time, so that nothing is spilled, and many cells, for wgmma.
        met, cells = (min(rows, 32), 64) if half else (rows, keys)
        self.chunks = _ceil(block * block, rows)
        even = self.h % tile == self.w % tile == self.num_open * tile * tile % keys == 0
        heads = q.shape[0] * q.shape[1]
        self.programs = dict(cells=(heads * self.padded // 32,), queries=(heads * self.blocks * self.chunks,),
                             cells_met=(heads * _ceil(self.cells, cells),),
                             tokens=(heads * self.tiles * _ceil(tile * tile, tokens),))
        self.scale = dim ** -0.5 * LOG2E.value
        self.width = dict(D=dim, BD=max(16, triton.next_power_of_2(dim)), num_warps=4 if half and not wide else 8,
                          num_stages=2 if wide else 3)
        self.tile, self.even = dict(TILE=tile), dict(EVEN=even)
        self.queries = self.width | dict(BLOCK=block, CHUNKS=self.chunks, BM=rows, BN=keys,
                                         PRECISION='tf32' if half else 'ieee')
        self.tokens = self.queries | self.tile | dict(BN=tokens)
        self.met = self.queries | dict(BM=met, CHUNKS=_ceil(block * block, met), BN=cells)
        self.rows = heads * self.blocks
        self.sizes = q.shape[1], self.h, self.w, self.cells - self.tiles, self.tiles, self.padded

    def bias(self, chosen: Tensor, sizes: Tensor, opened: Tensor, corners: bool) -> Tensor:
        """(B H L, C): what blocks add to the logits of cells."""
        bias = sizes.new_empty(self.rows, self.padded)
        _open_kernel[(self.rows,)](chosen, sizes, opened, bias, self.padded, self.num_open, self.columns, BK=16,
                                   BN=PADDED, CORNERS=corners, **self.tile)
        return bias


def forward(q: Tensor, k: Tensor, v: Tensor, grid: list[int], tile: int, num_open: int,
            block: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output (B, H, h w, D), stored as (B, h w, H, D), and what the backward pass wants.

    Args:
        q: (B, H, h w, D).
        k, v: (B, H, P + h w, D).

    Returns:
        out; open tiles (2, B, H, L, K), int32, their numbers and first patches; log-sum-exp (B, H, h w), to the base 2;
        keys and values of cells, (2, B, H, T + P, D); binary logarithms of their numbers of tokens, (C,).
    """
    q, k, v = dense(q, k, v)
    (batch, heads, n, dim), s = q.shape, _Shape(q, k, grid, tile, num_open, block)
    cells, sizes = q.new_empty(2, batch, heads, s.cells, dim), q.new_empty(s.padded, dtype=torch.float32)
    variances = q.new_empty(batch, heads, 1, s.tiles, dtype=torch.float32)
    _cells_kernel[s.programs['cells']](k, v, *cells, variances, sizes, *strides(k, v), *s.sizes, s.columns, BN=32,
                                       **s.tile, **s.width)
    share = q.new_empty(batch, heads, s.blocks, s.chunks, s.tiles, dtype=torch.float32)
    _share_kernel[s.programs['queries']](q, cells[0], sizes, share, *strides(q), *s.sizes, s.blocks, s.block_columns,
                                         s.scale, **s.queries)
    share = share[:, :, :, 0] if s.chunks == 1 else share.sum(3)
    chosen = (share * variances).topk(s.num_open, sorted=False).indices
    opened = torch.empty(2, *chosen.shape, dtype=torch.int32, device=q.device)
    bias = s.bias(chosen, sizes, opened, corners=True)
    out = q.new_empty(batch, n, heads, dim).transpose(1, 2)
    lse = q.new_empty(batch, heads, n, dtype=torch.float32)
    _forward_kernel[s.programs['queries']](
        q, k, v, *cells, opened[1], bias, out, lse, *strides(q, k, v, out), *s.sizes, s.blocks,
        s.num_open, s.block_columns, s.scale, **s.tile, **s.even, **s.queries)
    return out, opened, lse, cells, sizes


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, opened: Tensor, lse: Tensor, cells: Tensor,
             sizes: Tensor, grid: list[int], tile: int, num_open: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, stored as (B, N, H, D)."""
    q, k, v, grad = dense(q, k, v, grad)
    s = _Shape(q, k, grid, tile, num_open, block)
    grads = gq, gk, gv = [torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
                          for x in (q, k, v)]
    bias, delta = s.bias(opened[0], sizes, opened, corners=False), torch.empty_like(lse)
    grad_cells = torch.empty_like(cells, dtype=torch.float32)
    _grad_q_kernel[s.programs['queries']](
        q, k, v, *cells, opened[1], bias, out, grad, lse, delta, gq, *strides(q, k, v, out, grad, gq), *s.sizes,
        s.blocks, s.num_open, s.block_columns, s.scale, **s.tile, **s.even, **s.queries | dict(num_stages=2))
    _grad_cells_kernel[s.programs['cells_met']](
        q, *cells, bias, grad, lse, delta, *grad_cells, gk, gv, *strides(q, grad, gk, gv), *s.sizes, s.blocks,
        s.block_columns, s.scale, **s.met)
    # Tile after tile, the places of the list of open tiles where it is, block after block; and where those of it end.
    tiles, order = opened[0].flatten(2).sort(dim=-1, stable=True)
    numbers = torch.arange(1, s.tiles + 1, dtype=torch.int32, device=q.device).expand(*tiles.shape[:2], -1)
    ends = torch.searchsorted(tiles, numbers.contiguous(), out_int32=True)
    _grad_tokens_kernel[s.programs['tokens']](
        q, k, v, order, ends, grad, lse, delta, *grad_cells, gk, gv, *strides(q, k, v, grad, gk, gv), *s.sizes,
        s.blocks, s.num_open, s.columns, s.block_columns, s.scale, **s.tokens)
    return tuple(grads)
