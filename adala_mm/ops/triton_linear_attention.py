"""Triton kernels of linear attention, forward and backward.

Queries, keys and values are read where the qkv projection left them, by their strides, and phi is applied on the way:
phi(q) and phi(k) never exist in memory. Beside inputs and outputs there is the state, D (D + 1) floats per head. Sums
are float32, in a fixed order: equal inputs give equal bits. The backward pass needs q, k, v and the state only.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAPS = ('elu1', 'relu', 'softplus', 'identity')
MAX_HEAD_DIM = 128
BLOCK = 64  # tokens that a program has in registers at a time


@triton.jit
def _phi(x, MAP: tl.constexpr):
    if MAP == 'elu1':
        return tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))
    elif MAP == 'relu':
        return tl.maximum(x, 0.0)
    elif MAP == 'softplus':
        e = tl.exp(-tl.abs(x))
        return tl.maximum(x, 0.0) + tl.where(e < 1e-3, e * (1 - e * (0.5 - e / 3)), tl.log(1 + e))  # log1p(e)
    else:
        return x


@triton.jit
def _phi_grad(x, MAP: tl.constexpr):
    if MAP == 'elu1':
        return tl.where(x > 0, 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif MAP == 'relu':
        return tl.where(x > 0, 1.0, 0.0)
    elif MAP == 'softplus':
        return tl.sigmoid(x)
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def _load(ptr, stride_n, tokens, dims, N, D: tl.constexpr):
    """Rows ``tokens`` of a (N, D) matrix as float32, zero outside."""
    mask = (tokens < N)[:, None] & (dims < D)[None, :]
    return tl.load(ptr + tokens[:, None].to(tl.int64) * stride_n + dims[None, :], mask=mask, other=0.0), mask


@triton.jit
def _features(x, mask, MAP: tl.constexpr):
    return tl.where(mask, _phi(x.to(tl.float32), MAP), 0.0)


@triton.jit
def _state_of(k_ptr, v_ptr, k_stride, v_stride, begin, end, N, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
              MAP: tl.constexpr, PRECISION: tl.constexpr):
    """``sum_j phi(k_j)^T v_j`` and ``sum_j phi(k_j)`` over tokens begin ... end."""
    dims = tl.arange(0, BD)
    state = tl.zeros((BD, BD), tl.float32)
    total = tl.zeros((BD,), tl.float32)
    for start in range(begin, end, BN):
        tokens = start + tl.arange(0, BN)
        limit = tl.minimum(end, N)
        k, mask = _load(k_ptr, k_stride, tokens, dims, limit, D)
        v, _ = _load(v_ptr, v_stride, tokens, dims, limit, D)
        phi = _features(k, mask, MAP)
        state += tl.dot(tl.trans(phi), v.to(tl.float32), input_precision=PRECISION)
        total += tl.sum(phi, axis=0)
    return state, total


@triton.jit
def _answer(q, mask, state, total, eps, MAP: tl.constexpr, PRECISION: tl.constexpr):
    phi = _features(q, mask, MAP)
    weight = tl.sum(phi * total[None, :], axis=1) + eps
    return tl.dot(phi, state, input_precision=PRECISION) / weight[:, None]


@triton.jit
def _heads(ptr, stride_b, stride_h, H):
    """Where head ``program_id(0)`` of B x H begins."""
    index = tl.program_id(0)
    return ptr + (index // H).to(tl.int64) * stride_b + (index % H).to(tl.int64) * stride_h


@triton.jit
def _fused_kernel(q_ptr, k_ptr, v_ptr, out_ptr, state_ptr, total_ptr, qb, qh, qn, kb, kh, kn, vb, vh, vn, ob, oh, on,
                  H, NQ, NK, eps, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MAP: tl.constexpr,
                  PRECISION: tl.constexpr):
    """One head per program, state in registers: everything is read and written once."""
    dims = tl.arange(0, BD)
    q_ptr, out_ptr = _heads(q_ptr, qb, qh, H), _heads(out_ptr, ob, oh, H)
    state, total = _state_of(_heads(k_ptr, kb, kh, H), _heads(v_ptr, vb, vh, H), kn, vn, 0, NK, NK, D, BD, BN, MAP,
                             PRECISION)
    index = tl.program_id(0).to(tl.int64)
    square = (dims < D)[:, None] & (dims < D)[None, :]
    tl.store(state_ptr + index * D * D + dims[:, None] * D + dims[None, :], state, mask=square)
    tl.store(total_ptr + index * D + dims, total, mask=dims < D)
    for start in range(0, NQ, BN):
        tokens = start + tl.arange(0, BN)
        q, mask = _load(q_ptr, qn, tokens, dims, NQ, D)
        out = _answer(q, mask, state, total, eps, MAP, PRECISION)
        tl.store(out_ptr + tokens[:, None].to(tl.int64) * on + dims[None, :], out.to(q.dtype), mask=mask)


@triton.jit
def _state_kernel(k_ptr, v_ptr, state_ptr, total_ptr, kb, kh, kn, vb, vh, vn, H, N, CHUNK, D: tl.constexpr,
                  BD: tl.constexpr, BN: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr):
    """State of one chunk of one head's tokens."""
    dims = tl.arange(0, BD)
    begin = tl.program_id(1) * CHUNK
    state, total = _state_of(_heads(k_ptr, kb, kh, H), _heads(v_ptr, vb, vh, H), kn, vn, begin, begin + CHUNK, N, D, BD,
                             BN, MAP, PRECISION)
    index = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    square = (dims < D)[:, None] & (dims < D)[None, :]
    tl.store(state_ptr + index * D * D + dims[:, None] * D + dims[None, :], state, mask=square)
    tl.store(total_ptr + index * D + dims, total, mask=dims < D)


@triton.jit
def _load_state(state_ptr, total_ptr, dims, D: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    square = (dims < D)[:, None] & (dims < D)[None, :]
    state = tl.load(state_ptr + index * D * D + dims[:, None] * D + dims[None, :], mask=square, other=0.0)
    return state, tl.load(total_ptr + index * D + dims, mask=dims < D, other=0.0)


@triton.jit
def _out_kernel(q_ptr, out_ptr, state_ptr, total_ptr, qb, qh, qn, ob, oh, on, H, N, eps, D: tl.constexpr,
                BD: tl.constexpr, BN: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr):
    """Answers to one block of queries."""
    dims = tl.arange(0, BD)
    state, total = _load_state(state_ptr, total_ptr, dims, D)
    tokens = tl.program_id(1) * BN + tl.arange(0, BN)
    q, mask = _load(_heads(q_ptr, qb, qh, H), qn, tokens, dims, N, D)
    out = _answer(q, mask, state, total, eps, MAP, PRECISION)
    tl.store(_heads(out_ptr, ob, oh, H) + tokens[:, None].to(tl.int64) * on + dims[None, :], out.to(q.dtype), mask=mask)


@triton.jit
def _grad_q_kernel(q_ptr, go_ptr, gq_ptr, state_ptr, total_ptr, gstate_ptr, gtotal_ptr, qb, qh, qn, gb, gh, gn, xb, xh,
                   xn, H, N, CHUNK, eps, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MAP: tl.constexpr,
                   PRECISION: tl.constexpr):
    """Gradient of a chunk of queries, and their share of the state's: with w = phi(q)·total + eps,

    ``d phi(q) = (go / w) state^T - (go·out / w) total``, ``d state = sum phi(q)^T go / w``,
    ``d total = -sum phi(q) (go·out / w)``.
    """
    dims = tl.arange(0, BD)
    state, total = _load_state(state_ptr, total_ptr, dims, D)
    q_ptr = _heads(q_ptr, qb, qh, H)
    go_ptr, gq_ptr = _heads(go_ptr, gb, gh, H), _heads(gq_ptr, xb, xh, H)
    grad_state = tl.zeros((BD, BD), tl.float32)
    grad_total = tl.zeros((BD,), tl.float32)
    begin = tl.program_id(1) * CHUNK
    limit = tl.minimum(begin + CHUNK, N)
    for start in range(begin, begin + CHUNK, BN):
        tokens = start + tl.arange(0, BN)
        q, mask = _load(q_ptr, qn, tokens, dims, limit, D)
        go, _ = _load(go_ptr, gn, tokens, dims, limit, D)
        x = q.to(tl.float32)
        phi = _features(q, mask, MAP)
        weight = tl.where(tokens < limit, tl.sum(phi * total[None, :], axis=1) + eps, 1.0)
        grad_sum = go.to(tl.float32) / weight[:, None]
        # The stored output may be rounded to half precision; a product more costs less than reading it.
        out = tl.dot(phi, state, input_precision=PRECISION) / weight[:, None]
        grad_weight = -tl.sum(grad_sum * out, axis=1)
        grad_phi = tl.dot(grad_sum, tl.trans(state), input_precision=PRECISION) + grad_weight[:, None] * total[None, :]
        tl.store(gq_ptr + tokens[:, None].to(tl.int64) * xn + dims[None, :],
                 (grad_phi * _phi_grad(x, MAP)).to(q.dtype), mask=mask)
        grad_state += tl.dot(tl.trans(phi), grad_sum, input_precision=PRECISION)
        grad_total += tl.sum(phi * grad_weight[:, None], axis=0)
    index = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    square = (dims < D)[:, None] & (dims < D)[None, :]
    tl.store(gstate_ptr + index * D * D + dims[:, None] * D + dims[None, :], grad_state, mask=square)
    tl.store(gtotal_ptr + index * D + dims, grad_total, mask=dims < D)


@triton.jit
def _grad_kv_kernel(k_ptr, v_ptr, gk_ptr, gv_ptr, gstate_ptr, gtotal_ptr, kb, kh, kn, vb, vh, vn, xb, xh, xn, yb, yh,
                    yn, H, N, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MAP: tl.constexpr,
                    PRECISION: tl.constexpr):
    """``d v = phi(k) d state``, ``d phi(k) = v d state^T + d total`` for one block of tokens."""
    dims = tl.arange(0, BD)
    grad_state, grad_total = _load_state(gstate_ptr, gtotal_ptr, dims, D)
    tokens = tl.program_id(1) * BN + tl.arange(0, BN)
    k, mask = _load(_heads(k_ptr, kb, kh, H), kn, tokens, dims, N, D)
    v, _ = _load(_heads(v_ptr, vb, vh, H), vn, tokens, dims, N, D)
    grad_v = tl.dot(_features(k, mask, MAP), grad_state, input_precision=PRECISION)
    grad_phi = tl.dot(v.to(tl.float32), tl.trans(grad_state), input_precision=PRECISION) + grad_total[None, :]
    place = tokens[:, None].to(tl.int64)
    tl.store(_heads(gv_ptr, yb, yh, H) + place * yn + dims[None, :], grad_v.to(v.dtype), mask=mask)
    tl.store(_heads(gk_ptr, xb, xh, H) + place * xn + dims[None, :],
             (grad_phi * _phi_grad(k.to(tl.float32), MAP)).to(k.dtype), mask=mask)


def _shape(q: Tensor, feature_map: str) -> dict:
    """What all kernels are compiled for."""
    dim = q.shape[-1]
    # Half-precision inputs meet float32 sums in TensorFloat-32, which has their digits and float32's range.
    return dict(D=dim, BD=max(16, triton.next_power_of_2(dim)), BN=BLOCK, MAP=feature_map,
                PRECISION='ieee' if q.dtype == torch.float32 else 'tf32', num_warps=4 if dim <= 64 else 8)


def _strides(*tensors: Tensor) -> list[int]:
    """Strides over image, head and token of (B, H, N, D); channels are next to each other."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _splits(q: Tensor, tokens: int) -> int:
    """In how many chunks a head's tokens are summed: enough to give every multiprocessor two programs."""
    if not q.is_cuda:
        return 2 if tokens > 2 * BLOCK else 1  # under the interpreter: so that both ways are tested
    programs = 2 * torch.cuda.get_device_properties(q.device).multi_processor_count
    return max(1, min(triton.cdiv(programs, max(1, q.shape[0] * q.shape[1])), triton.cdiv(tokens, 4 * BLOCK)))


def _chunk(tokens: int, splits: int) -> int:
    """Tokens of a chunk, whole blocks."""
    return triton.cdiv(triton.cdiv(tokens, splits), BLOCK) * BLOCK


def forward(q: Tensor, k: Tensor, v: Tensor, feature_map: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, H, N, D), stored as (B, N, H, D) because that is what the output projection reads, and the state.

    Args:
        q, k, v: (B, H, N, D) with unit stride over D; k and v may have another N than q.

    Returns:
        out, ``sum_j phi(k_j)^T v_j`` (B, H, D, D) and ``sum_j phi(k_j)`` (B, H, D), both float32.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    b, h, nq, d = q.shape
    nk = k.shape[2]
    out = q.new_empty(b, nq, h, d).transpose(1, 2)
    shape = _shape(q, feature_map)
    splits = _splits(q, nk)
    state = torch.empty(splits, b, h, d, d, dtype=torch.float32, device=q.device)
    total = torch.empty(splits, b, h, d, dtype=torch.float32, device=q.device)
    if splits == 1:
        _fused_kernel[(b * h,)](q, k, v, out, state, total, *_strides(q, k, v, out), h, nq, nk, eps, **shape)
        return out, state[0], total[0]
    _state_kernel[(b * h, splits)](k, v, state, total, *_strides(k, v), h, nk, _chunk(nk, splits), **shape)
    state, total = state.sum(0), total.sum(0)
    _out_kernel[(b * h, triton.cdiv(nq, BLOCK))](q, out, state, total, *_strides(q, out), h, nq, eps, **shape)
    return out, state, total


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, state: Tensor, total: Tensor,
             grads: tuple[Tensor, Tensor, Tensor], feature_map: str, eps: float) -> None:
    """Writes the gradients of q, k and v into ``grads``, tensors of their shapes."""
    q, k, v, grad = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, grad))
    b, h, nq, d = q.shape
    nk = k.shape[2]
    gq, gk, gv = grads
    shape = _shape(q, feature_map)
    splits = _splits(q, nq)
    grad_state = torch.empty(splits, b, h, d, d, dtype=torch.float32, device=q.device)
    grad_total = torch.empty(splits, b, h, d, dtype=torch.float32, device=q.device)
    _grad_q_kernel[(b * h, splits)](q, grad, gq, state, total, grad_state, grad_total, *_strides(q, grad, gq), h, nq,
                                    _chunk(nq, splits), eps, **shape)
    _grad_kv_kernel[(b * h, triton.cdiv(nk, BLOCK))](k, v, gk, gv, grad_state.sum(0), grad_total.sum(0),
                                                     *_strides(k, v, gk, gv), h, nk, **shape)
