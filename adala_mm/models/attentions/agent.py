from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adala_mm.models.attentions.base import Attention
from adala_mm.models.attentions.parts import DepthwiseConv, GridTable, grid_means, require_grid
from adala_mm.registry import ATTENTIONS


class AgentBias(nn.Module):
    """Bias between A agents and tokens, (H, A, N): a 7 x 7 table stretched over the grid + row + column; own for CLS.

    All class and register tokens share the class token's bias.
    """

    def __init__(self, num_heads: int, num_agents: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.num_heads = num_heads
        channels = num_heads * num_agents
        self.tables = nn.ModuleList(GridTable(channels, shape, std=0.02, mode='bilinear')
                                    for shape in ((7, 7), (grid[0], 1), (1, grid[1])))
        self.cls = nn.Parameter(torch.randn(num_heads, num_agents, 1) * 0.02)

    def forward(self, hw: tuple[int, int], num_prefix: int) -> Tensor:
        whole, rows, columns = self.tables
        patches = whole(hw) + rows((hw[0], 1)) + columns((1, hw[1]))  # (H A, h, w)
        patches = patches.flatten(1).unflatten(0, (self.num_heads, -1))
        return torch.cat([self.cls.expand(-1, -1, num_prefix), patches], dim=2)


@ATTENTIONS.register_module()
class AgentAttention(Attention):
    """Softmax attention by way of A agents, which ask all tokens and answer all (Han et al. 2024, arXiv 2312.08874).

    Agents are means of the patch queries over a sqrt(A) x sqrt(A) grid.
    ``va = softmax(agents k^T / sqrt D + b1) v``, ``out = softmax(q agents^T / sqrt D + b2) va + dwconv3x3(v)``.

    Class and register tokens are keys and queries, but no part of agents, and see no convolution (which starts at 0).
    The biases are resampled to other grids; published code does so for their 7 x 7 part only.

    Args:
        dim, num_heads, qkv_bias: as in `Attention`.
        num_agents: A, a square number.
        grid: patch grid (h, w) of the biases by row and column; a ViT gives its own.

    Raises:
        ValueError: without a ``grid``, or if A is not a square.
    """

    needs = ('grid',)
    formula = 'softmax(q aᵀ/√D + b₂) softmax(a kᵀ/√D + b₁) v + dwconv v, a = A pooled queries'
    cost = '4NAD'
    positional = True
    reference = 'Han et al., ECCV 2024'

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, num_agents: int = 49,
                 grid: tuple[int, int] | None = None) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        grid = require_grid('AgentAttention', grid)
        self.side = round(num_agents ** 0.5)
        if num_agents < 1 or self.side ** 2 != num_agents:
            raise ValueError(f'num_agents={num_agents} is not a square number: agents lie on a square grid')
        self.agent_bias = AgentBias(num_heads, num_agents, grid)  # b1
        self.token_bias = AgentBias(num_heads, num_agents, grid)  # b2
        self.dwc = DepthwiseConv(dim, 3)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        patches = q[:, :, num_prefix:].transpose(2, 3).unflatten(3, hw).flatten(0, 1)  # (B H, D, h, w)
        agents = grid_means(patches, self.side).flatten(2).transpose(1, 2).unflatten(0, (-1, q.shape[1]))
        to_agents = self.agent_bias(hw, num_prefix).to(q.dtype)  # (H, A, N)
        to_tokens = self.token_bias(hw, num_prefix).to(q.dtype).transpose(1, 2)  # (H, N, A)
        answers = F.scaled_dot_product_attention(agents, k, v, attn_mask=to_agents[None])
        return F.scaled_dot_product_attention(q, agents, answers, attn_mask=to_tokens[None]) + self.dwc(
            v, hw, num_prefix)
