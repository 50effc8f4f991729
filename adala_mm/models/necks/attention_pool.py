"""The attention pool that SigLIP has in the place of a class token."""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from mmengine.model import BaseModule
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from adala_mm.models.backbones.weights import note_loaded, read_backbone
from adala_mm.registry import MODELS


@MODELS.register_module()
class AttentionPool(BaseModule):
    """One vector of an image: a learnt query asks all tokens by softmax attention, then an MLP with a residual.

    timm's pool, ``global_pool='map'``, of which SigLIP models have the weights (Zhai et al. 2023). One query costs
    O(N), whatever the backbone's attention is. It reads a backbone with ``out_type='raw'``, whose tokens have passed
    the last norm as timm's pool expects.

    Args:
        dim: channels C.
        num_heads: heads of the pool; must divide ``dim``.
        mlp_ratio: hidden channels of the MLP relative to C.
        norm_eps: epsilon of its LayerNorm.
        init_cfg: ``dict(type='Pretrained', checkpoint=<file or timm://name>)``; the pool's names begin with ``prefix``,
            ``attn_pool.`` if there is none. Without it, timm's default initialisation.

    Raises:
        ValueError: if the checkpoint has no such pool, or one of another shape (in `init_weights`).
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, norm_eps: float = 1e-6,
                 init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        self.attn_pool = AttentionPoolLatent(dim, num_heads=num_heads, mlp_ratio=mlp_ratio,
                                             norm_layer=partial(nn.LayerNorm, eps=norm_eps))

    def init_weights(self) -> None:
        """Loads ``init_cfg``'s checkpoint strictly, or leaves what the constructor has drawn."""
        if self.init_cfg:
            path, state, found = read_backbone({'prefix': 'attn_pool.'} | self.init_cfg)
            if not found:
                raise ValueError(f'{path} has no attention pool: name a file of a SigLIP model as timm has it, such as '
                                 'timm://vit_large_patch16_siglip_256.webli, or leave out init_cfg of the neck')
            try:
                self.attn_pool.load_state_dict(state)
            except RuntimeError as error:
                raise ValueError(f'the attention pool of {path} does not fit this one: check dim, num_heads and '
                                 f'mlp_ratio of the neck ({error})') from error
            note_loaded(self.attn_pool, state)
        self._is_init = True

    def forward(self, tokens: Sequence[Tensor]) -> tuple[Tensor]:
        """Outputs (B, N, C) of a backbone, of which the last counts, to (B, C)."""
        return (self.attn_pool(tokens[-1]),)
