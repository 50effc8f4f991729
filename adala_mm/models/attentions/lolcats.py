from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adala_mm.models.attentions.heads import split_heads
from adala_mm.models.attentions.hedgehog import HedgehogAttention
from adala_mm.registry import ATTENTIONS

TARGETS = ('q', 'k', 'v', 'o')


class LoRA(nn.Module):
    """Low-rank updates ``scale B A`` of the four square projections, zero at first (Hu et al. 2022).

    q, k and v have an update of rank r each, although one matrix holds all three. A is drawn as Kaiming-uniform.
    """

    def __init__(self, dim: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.a = nn.ParameterDict({name: nn.Parameter(torch.empty(rank, dim)) for name in TARGETS})
        self.b = nn.ParameterDict({name: nn.Parameter(torch.zeros(dim, rank)) for name in TARGETS})
        for matrix in self.a.values():
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))

    def delta(self, names: str) -> Tensor:
        """Update (len(names) C, C) of the rows that hold the named projections."""
        return self.scale * torch.cat([self.b[name] @ self.a[name] for name in names])


@ATTENTIONS.register_module()
class LoLCATSAttention(HedgehogAttention):
    """Hedgehog's feature maps, and low-rank updates of q, k, v and o (Zhang et al. 2025, LoLCATS).

    ``W' = W + (alpha / r) B A`` for each projection. The recipe has two steps: the feature maps learn softmax
    attention's output (stage 1 with ``trainable='feature_map'`` and ``target='heads'``), then the task is learnt with
    ``trainable=r'\\.lora\\.'``. The updates take the place of new weights: `merge_lora` adds them to ``qkv`` and
    ``proj`` and leaves a plain `HedgehogAttention`.

    Pure linear attention: the sliding softmax window of the published code exists for causal language models only.
    Its maps start Kaiming-uniform there, ours as Hedgehog's identity.

    Args:
        dim, num_heads, qkv_bias, feature_dim, variant, eps, center_keys, shared_map: as in `HedgehogAttention`.
        rank: r; 0 for none.
        alpha: numerator of the scale.
    """

    after_proj = ('lora.a.o', 'lora.b.o')
    formula = 'Hedgehog; W + (α/r)BA for q, k, v, o'
    reference = 'Zhang et al., ICLR 2025'

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, feature_dim: int | None = None,
                 variant: str = 'softmax', eps: float = 1e-12, rank: int = 8, alpha: float = 16.0,
                 center_keys: bool = False, shared_map: bool = False) -> None:
        super().__init__(dim, num_heads, qkv_bias, feature_dim, variant, eps, center_keys=center_keys,
                         shared_map=shared_map)
        if rank < 0 or rank > dim:
            raise ValueError(f'rank={rank} of LoRA does not lie between 0 and the width {dim}')
        self.lora = LoRA(dim, rank, alpha) if rank else None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.lora is None:
            return super().project(x)
        qkv = F.linear(x, self.qkv.weight + self.lora.delta('qkv'), self.qkv.bias)
        return split_heads(qkv, 3 * self.num_heads).chunk(3, dim=1)

    def project_out(self, attended: Tensor) -> Tensor:
        if self.lora is None:
            return super().project_out(attended)
        return F.linear(attended, self.proj.weight + self.lora.delta('o'), self.proj.bias)

    def merge_lora(self) -> None:
        """Adds the updates to the projections and drops them: the same function, and a state dict of Hedgehog's."""
        if self.lora is not None:
            alpha = self.lora.scale * len(self.lora.a['q'])
            merged = merge_lora(self.state_dict(), alpha)
            self.lora = None
            self.load_state_dict(merged)


def merge_lora(state: dict[str, Tensor], alpha: float = 16.0) -> dict[str, Tensor]:
    """A state dict, of a layer or of a model around many, with LoRA's matrices added to the weights they update.

    Raises:
        ValueError: if there are none.
    """
    merged = OrderedDict((key, value) for key, value in state.items() if '.lora.' not in f'.{key}')
    merged._metadata = getattr(state, '_metadata', OrderedDict())  # the position grid, for one
    found = [key.removesuffix('lora.a.q') for key in state if f'.{key}'.endswith('.lora.a.q')]
    if not found:
        raise ValueError('there is no LoRA to merge: no key ends in lora.a.q')
    for prefix in found:
        rank = len(state[f'{prefix}lora.a.q'])
        q, k, v, o = (alpha / rank * state[f'{prefix}lora.b.{x}'] @ state[f'{prefix}lora.a.{x}'] for x in TARGETS)
        merged[f'{prefix}qkv.weight'] = merged[f'{prefix}qkv.weight'] + torch.cat([q, k, v])
        merged[f'{prefix}proj.weight'] = merged[f'{prefix}proj.weight'] + o
    return merged


