"""What every attention of a plain ViT shares: the projections, and the place for its mixing rule."""
from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from adala_mm.models.attentions.heads import merge_heads, split_heads
from adala_mm.models.attentions.marks import MARK, describe, last_of, options_of, take_mark
from adala_mm.ops import Rotation, turn


class Attention(nn.Module):
    """Multi-head self-attention whose way of mixing tokens is left to the subclass.

    Keys are timm's (``qkv``, ``proj``), so the weights of a softmax ViT load into any subclass. A new variant
    implements `mix` (or `attend`, if it looks at the input itself), keeps parameters of its own in submodules, and
    registers itself in ``ATTENTIONS``. For the table of attentions it may say more in its class attributes.

    In a ViT with rotary positions (`adala_mm.ops.RotaryPositions`) `mix` gets queries and keys that are turned already:
    positions of its own (distances, tables, rotations) come on top, means of keys are means of turned ones. Values and
    the layer's input are not turned.

    Args:
        dim: channels C.
        num_heads: heads H; must divide ``dim``.
        qkv_bias: whether the query, key and value projections have biases.

    Raises:
        ValueError: if ``num_heads`` does not divide ``dim``.
    """

    is_softmax = False  # whether this is the teacher's own attention, of which stage 1 has nothing to learn
    needs: tuple[str, ...] = ()  # of 'grid' and 'num_prefix' of the ViT: what the constructor wants beside its options
    after_proj: tuple[str, ...] = ()  # parameters, by the beginning of their names, of which `attend` knows nothing
    formula = ''  # in one line
    cost = ''  # multiply-adds of its matrix products per head: N tokens, D channels of a head, h x w patches
    positional = False  # whether it matters where a token stands
    reference = ''
    built_from: tuple[type[Attention], dict[str, Any]] | None = None  # class and options that `build_attention` used

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f'num_heads={num_heads} does not divide the width {dim}')
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        """Mixes the values over tokens.

        Args:
            q, k, v: (B, H, N, D) with N = num_prefix + h * w; patches are row-major, prefix tokens come first.
            hw: the patch grid (h, w).
            num_prefix: number of class and register tokens.

        Returns:
            (B, H, N, D).
        """
        raise NotImplementedError

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of (B, N, C), each (B, H, N, D)."""
        return split_heads(self.qkv(x), 3 * self.num_heads).chunk(3, dim=1)

    def turned(self, x: Tensor, hw: tuple[int, int], num_prefix: int,
               rotation: Rotation | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """`project`, and queries and keys of patches turned by the ViT's rotary positions, if it has any."""
        q, k, v = self.project(x)
        if rotation is None:
            return q, k, v
        return turn(q, rotation, num_prefix).to(v.dtype), turn(k, rotation, num_prefix).to(v.dtype), v

    def attend(self, x: Tensor, hw: tuple[int, int], num_prefix: int, rotation: Rotation | None = None) -> Tensor:
        """Attention before the output projection, (B, N, C) to (B, N, C)."""
        return merge_heads(self.mix(*self.turned(x, hw, num_prefix, rotation), hw, num_prefix))

    def forward(self, x: Tensor, hw: tuple[int, int], num_prefix: int, rotation: Rotation | None = None) -> Tensor:
        """Attention with its output projection, (B, N, C) to (B, N, C).

        `attend` is told a rotation only if there is one: a subclass may have one that takes none.
        """
        layout = (hw, num_prefix) if rotation is None else (hw, num_prefix, rotation)
        return self.project_out(self.attend(x, *layout))

    def project_out(self, attended: Tensor) -> Tensor:
        """The output projection of (B, N, C)."""
        return self.proj(attended)

    @property
    def adala_mm(self) -> dict[str, Any] | None:
        """``dict(type=..., <all options>)`` if known; what state dicts of linearized models have under this key."""
        return self.built_from and options_of(*self.built_from)

    def take_mark(self, state: dict[str, Any], prefix: str) -> str | None:
        """Takes off, in place, what a linearized model adds to weights; says so if they are another attention's."""
        if self.is_softmax and f'{prefix}{MARK}' not in state:
            return None
        # A broadcast from rank 0 (torch.distributed.checkpoint) gives parameters without their mark to the other ranks.
        saved = take_mark(state, prefix, last_of(self.proj, self))
        if saved is None or self.built_from is None:
            return None
        # Options that are newer than the file have their defaults.
        if options_of(self.built_from[0], saved) != self.adala_mm:
            return f'{prefix.rstrip(".")} was saved as {describe(saved)}, and is {describe(self.adala_mm)} here'
        return None

    def _load_from_state_dict(self, state_dict: dict, prefix: str, local_metadata: dict, strict: bool,
                              missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str]) -> None:
        """Weights of a linearized model load into the same attention with the same options only."""
        if problem := self.take_mark(state_dict, prefix):
            error_msgs.append(problem)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                                      error_msgs)

    def __prepare_scriptable__(self):
        raise TypeError(f'torch.jit.script does not compile {type(self).__name__}: use torch.jit.trace, which holds '
                        'for other batches and sizes, or torch.export')
