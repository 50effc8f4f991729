"""What every attention of a plain ViT shares: the projections, and the place for its mixing rule."""
from __future__ import annotations

import difflib
import pkgutil
from collections import Counter
from typing import Any

from torch import Tensor, nn

from adala_mm.models.attentions.marks import MARK, describe, last_of, options_of, take_mark
from adala_mm.registry import ATTENTIONS


class Attention(nn.Module):
    """Multi-head self-attention whose way of mixing tokens is left to the subclass.

    Keys are timm's (``qkv``, ``proj``), so the weights of a softmax ViT load into any subclass. A new variant
    implements `mix` (or `attend`, if it looks at the input itself), keeps parameters of its own in submodules, and
    registers itself in ``ATTENTIONS``. For the table of attentions it may say more in its class attributes.

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

    def attend(self, x: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        """Attention before the output projection, (B, N, C) to (B, N, C)."""
        return merge_heads(self.mix(*self.project(x), hw, num_prefix))

    def forward(self, x: Tensor, hw: tuple[int, int], num_prefix: int) -> Tensor:
        """Attention with its output projection, (B, N, C) to (B, N, C)."""
        return self.proj(self.attend(x, hw, num_prefix))

    @property
    def adala_mm(self) -> dict[str, Any] | None:
        """``dict(type=..., <all options>)`` if known; what state dicts of linearized models have under this key."""
        return self.built_from and options_of(*self.built_from)

    def take_mark(self, state: dict[str, Any], prefix: str) -> str | None:
        """Takes off, in place, what a linearized model adds to weights; says so if they are another attention's."""
        if f'{prefix}{MARK}' not in state:  # FSDP may hold no parameter of the projection here
            return None
        saved = take_mark(state, prefix, last_of(self.proj, self))
        if self.built_from is not None and saved != self.adala_mm:
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


def blocks_by_attention(model: nn.Module) -> dict[str, str]:
    """``12 of 24 blocks LinearAttention, 12 SoftmaxAttention`` for each part of a model, a frozen teacher included."""
    told, frozen = {}, {f'frozen {name}': part for name, part in getattr(model, 'frozen', {}).items()}
    for name, part in [*model.named_children(), *frozen.items()]:
        layers = sorted((m for m in part.modules() if isinstance(m, Attention)), key=lambda layer: layer.is_softmax)
        if layers:
            (kind, count), *others = Counter(type(layer).__name__ for layer in layers).items()
            told[name] = ', '.join([f'{count} of {len(layers)} blocks {kind}', *(f'{n} {k}' for k, n in others)])
    return told


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) to (B, H, N, D)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) to (B, N, C)."""
    return x.transpose(1, 2).flatten(2)


def build_attention(cfg: dict, dim: int, num_heads: int, qkv_bias: bool = True,
                    grid: tuple[int, int] | None = None, num_prefix: int = 0) -> Attention:
    """Builds one attention layer from ``dict(type=..., <own arguments>)``.

    ``type`` is a registered name (``adala_mm.LinearAttention``), the path of any importable subclass
    (``my_module.MyAttention``), or the class itself. A layer with tables over tokens `needs` the ViT's ``grid`` and
    ``num_prefix`` and gets them here, unless its config names others.

    Raises:
        ValueError: for an unknown type; the message lists the registered ones.
        TypeError: for an option that the type does not have.
    """
    options = dict(cfg)
    layer = _find(options.pop('type', None))
    layout = dict(grid=grid, num_prefix=num_prefix)
    attention = layer(dim, num_heads, qkv_bias=qkv_bias, **{name: layout[name] for name in layer.needs} | options)
    attention.built_from = layer, options
    return attention


def _find(kind: str | type | None) -> type[Attention]:
    ATTENTIONS.import_from_location()
    known = ATTENTIONS.module_dict
    name = str(kind).removeprefix('adala_mm.')
    if name in known:
        return known[name]
    if isinstance(kind, str) and '.' in kind:
        try:
            kind = pkgutil.resolve_name(kind)
        except AttributeError:
            pass
        except ModuleNotFoundError as error:
            if not f'{kind}.'.startswith(f'{error.name}.'):
                raise  # the module is there, and what it imports is not
    if isinstance(kind, type) and issubclass(kind, Attention):
        return kind
    close = difflib.get_close_matches(name, known, n=1)
    hint = f' Did you mean adala_mm.{close[0]}?' if close else ''
    raise ValueError(f'unknown attention type {kind!r}.{hint} Registered: '
                     f'{", ".join(f"adala_mm.{n}" for n in sorted(known))}; or give the path of an importable '
                     'subclass of adala_mm.models.attentions.Attention, such as my_module.MyAttention')
