"""From the config of an attention to the layer."""
from __future__ import annotations

import difflib
import inspect
import pkgutil

from adala_mm.models.attentions.base import Attention
from adala_mm.registry import ATTENTIONS


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


def require_rotation(attn: Attention) -> None:
    """TypeError for a layer whose own methods do not take rotary positions, and would leave them out."""
    kind = type(attn) if attn.built_from is None else attn.built_from[0]
    for name in ('attend', 'forward'):
        taken = inspect.signature(getattr(kind, name)).parameters
        if 'rotation' not in taken and all(p.kind is not p.VAR_POSITIONAL for p in taken.values()):
            raise TypeError(f'{kind.__name__}.{name} takes no rotation, and the ViT has rotary positions: give '
                            f'{name} the argument rotation=None, and let it call turned(x, hw, num_prefix, rotation) '
                            'where it calls project(x)')


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
