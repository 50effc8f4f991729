"""A ViT in whose last blocks learnt queries attend together with the patches."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from adala_mm.models.attentions import Attention
from adala_mm.models.backbones.vit import CUDA_GRAPH_MODES, AdaLAViT, compile_mode
from adala_mm.registry import MODELS


@MODELS.register_module()
class QueryViT(AdaLAViT):
    """`AdaLAViT` for an encoder-only mask head (EoMT; Kerssies et al., CVPR 2025), see `EncoderMaskHead`.

    Queries stand before the class token and go through the last ``query_blocks`` blocks with all other tokens, so that
    no decoder is needed. The blocks before them see the image alone. A file of `AdaLAViT` or timm loads as it is: only
    ``query_embed`` is new.

    Args:
        num_queries: Q, one mask and one class each.
        query_blocks: blocks in which they take part.
        **vit: of `AdaLAViT`, without ``out_indices`` and ``out_type``.

    Raises:
        ValueError: if there are no blocks before or none for the queries, if one of the latter has tables over tokens,
            which have no rows for queries, for a ``compile`` that takes all blocks as one function, or for an option
            that says what to return.
    """

    def __init__(self, num_queries: int = 100, query_blocks: int = 4, **vit) -> None:
        if told := {'out_indices', 'out_type'} & set(vit):
            raise ValueError(f'{", ".join(sorted(told))}: QueryViT returns maps and queries of its last blocks')
        if (mode := compile_mode(vit.get('compile', False))) in CUDA_GRAPH_MODES:
            raise ValueError(f'compile={mode!r} compiles all blocks as one function, which queries join halfway: '
                             'choose True')
        self.query_blocks = query_blocks  # before the blocks, whose attentions are checked as they are built
        super().__init__(**vit)
        if not 0 < query_blocks < len(self.blocks):
            raise ValueError(f'query_blocks={query_blocks} must be less than depth={len(self.blocks)}, and at least 1')
        self.query_embed = nn.Embedding(num_queries, self.embed_dim)

    def check_attention(self, i: int, attn: Attention) -> None:
        super().check_attention(i, attn)
        if attn.needs and i >= len(self.blocks) - self.query_blocks:
            raise ValueError(f'{type(attn).__name__} in block {i} has tables over tokens, which have no rows for '
                             f'queries: choose another attention for the last {self.query_blocks} blocks')

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Image (B, in_channels, H, W) to a map (B, C, h, w) and queries (B, Q, C), both after the final LayerNorm.

        In training, for deep supervision, there are as many such pairs as query blocks and one more: what goes into
        the first of them, and what comes out of each.
        """
        x, hw = self.embed(image)
        before, after = self.blocks[:-self.query_blocks], self.blocks[-self.query_blocks:]
        _, num_prefix, *rotation = layout = self.layout(x, hw)
        x = before(x, layout, (), self.with_cp)[-1]
        count = self.query_embed.num_embeddings
        x = torch.cat([self.query_embed.weight.expand(x.shape[0], -1, -1), x], dim=1)
        wanted = range(self.query_blocks) if self.training else ()
        outputs = [x] * self.training + [
            out for out in after(x, (hw, count + num_prefix, *rotation), wanted, self.with_cp) if out is not None]
        pairs = []
        for tokens in map(self.norm, outputs):
            pairs += [self._format(tokens[:, count:], hw), tokens[:, :count]]
        return tuple(pairs)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """As of `AdaLAViT`; queries are as new as the head."""
        if param_name == f'{prefix}query_embed.weight':
            param_name = f'{prefix}norm.weight'
        return super().get_layer_depth(param_name, prefix)
