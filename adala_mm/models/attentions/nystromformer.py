from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adala_mm.models.attentions.base import Attention
from adala_mm.models.attentions.parts import require_odd
from adala_mm.ops import exporting, in_float32
from adala_mm.registry import ATTENTIONS

PINV_ITERATIONS = 6  # no more: the unconverged inverse regularises; converged, outputs grow a hundredfold
PINV_INITS = ('exact', 'original')
LANDMARKS = ('segments', 'grid')


def segment_means(x: Tensor, count: int) -> Tensor:
    """Means (..., M, D) of M contiguous segments of the tokens (..., N, D): the last N mod M are one token longer."""
    if exporting() and isinstance(x.shape[-2], torch.SymInt):
        raise ValueError('segments are means of N / M tokens, so that a graph holds for one number of tokens')
    n = int(x.shape[-2])  # a traced graph holds for this number, and `split` refuses another
    size, longer = divmod(n, count)
    first, last = x.split([(count - longer) * size, longer * (size + 1)], dim=-2)
    parts = [first.unflatten(-2, (count - longer, size)), last.unflatten(-2, (longer, size + 1))]
    return torch.cat([part.mean(dim=-2) for part in parts if part.shape[-2]], dim=-2)


def iterative_pinv(a: Tensor, init: str = 'exact') -> Tensor:
    """Moore-Penrose inverse of row-stochastic matrices (..., M, M) by 6 steps of a third-order Newton iteration.

    ``Z0 = A^T / c``, ``Z <- Z / 4 (13 I - A Z (15 I - A Z (7 I - A Z)))``, c being the largest column sum: of each
    matrix (``exact``), or of the whole batch (``original``).
    """
    column = a.sum(dim=-2)
    scale = column.amax(-1)[..., None, None] if init == 'exact' else F.pad(column.flatten(), (0, 1)).max()  # 0 for none
    z = a.transpose(-2, -1) / scale
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(PINV_ITERATIONS):
        az = a @ z
        z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return z


@ATTENTIONS.register_module()
class NystromformerAttention(Attention):
    """Softmax attention by way of M landmarks, the Nystrom method (Xiong et al. 2021, arXiv 2102.03902).

    ``out = K1 pinv(K2) (K3 v)`` with ``K1 = softmax(q ql^T)``, ``K2 = softmax(ql kl^T)``, ``K3 = softmax(ql k^T)``, all
    scaled by D^-1/2; landmarks ql, kl are means of segments. With as many landmarks as tokens: softmax attention
    itself. Class and register tokens are the first of the sequence, as published, or landmarks of their own
    (``grid``). In float32 throughout: the iteration diverges in half precision.

    Args:
        dim, num_heads, qkv_bias: as in `Attention`.
        num_landmarks: M, at most the number of tokens.
        pinv_init: ``exact``, or ``original``, by which the images of a batch influence each other.
        landmarks: means over ``segments`` of the sequence, or over cells of the ``grid``, about M of them.
        conv_kernel: odd size of a convolution of v over the sequence that is added per head; None for none.

    Raises:
        ValueError: for an unknown ``pinv_init`` or ``landmarks``, an even ``conv_kernel``, or less than one landmark.
    """

    formula = 'softmax(q ql ᵀ) pinv(softmax(ql klᵀ)) softmax(ql kᵀ) v, M landmarks'
    cost = '4NMD + 24M³'
    positional = True
    reference = 'Xiong et al., AAAI 2021'

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, num_landmarks: int = 128,
                 pinv_init: str = 'exact', landmarks: str = 'segments', conv_kernel: int | None = None) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        for name, value, known in (('pinv_init', pinv_init, PINV_INITS), ('landmarks', landmarks, LANDMARKS)):
            if value not in known:
                raise ValueError(f'unknown {name} {value!r}; choose one of {", ".join(known)}')
        if num_landmarks < 1:
            raise ValueError(f'num_landmarks={num_landmarks}: at least one is needed')
        self.num_landmarks = num_landmarks
        self.pinv_init = pinv_init
        self.landmarks = landmarks
        self.conv = None
        if conv_kernel is not None:
            require_odd(conv_kernel)
            self.conv = nn.Conv2d(num_heads, num_heads, (conv_kernel, 1), padding=(conv_kernel // 2, 0),
                                  groups=num_heads, bias=False)
            nn.init.zeros_(self.conv.weight)

    def pool(self, x: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        """Landmarks (B, H, M, D) of the tokens (B, H, N, D)."""
        if self.landmarks == 'segments':
            return segment_means(x, min(self.num_landmarks, int(x.shape[2])))
        if torch.jit.is_tracing():
            raise ValueError("landmarks='grid' are as many as the grid asks for, which a traced graph would not see: "
                             "use torch.export with a fixed size, or landmarks='segments'")
        rows = min(hw[0], max(1, round((self.num_landmarks * hw[0] / hw[1]) ** 0.5)))
        columns = min(hw[1], max(1, round(self.num_landmarks / rows)))
        patches = x[:, :, num_prefix:].transpose(2, 3).unflatten(3, hw).flatten(0, 1)  # (B H, D, h, w)
        means = F.adaptive_avg_pool2d(patches, (rows, columns)).flatten(2).transpose(1, 2)
        return torch.cat([x[:, :, :num_prefix], means.unflatten(0, x.shape[:2])], dim=2)

    @in_float32
    def mix(self, q: Tensor, k: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        ql, kl = self.pool(q, hw, num_prefix), self.pool(k, hw, num_prefix)  # (B, H, M, D)
        if ql.shape[2] == q.shape[2]:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            scale = q.shape[-1] ** -0.5
            inverse = iterative_pinv((scale * ql @ kl.transpose(-2, -1)).softmax(-1), self.pinv_init)
            kernel1 = (scale * q @ kl.transpose(-2, -1)).softmax(-1)  # (B, H, N, M)
            out = kernel1 @ (inverse @ F.scaled_dot_product_attention(ql, k, v))
        if self.conv is not None:
            out = out + F.conv2d(v, self.conv.weight.to(v.dtype), padding=self.conv.padding, groups=self.num_heads)
        return out
