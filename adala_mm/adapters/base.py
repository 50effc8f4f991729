"""What turns one attention of a foreign ViT into a layer of ours, in place of its own softmax."""
from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.multiprocessing.reductions import StorageWeakRef

from adala_mm.models.attentions import Attention, LinearAttention, build_attention
from adala_mm.models.attentions.marks import add_mark, last_of, options_of
from adala_mm.ops import Rotation

PARTS = ('_modules', '_parameters', '_buffers')  # what makes up an nn.Module
TESTED = 'timm 1.0.31, transformers 4.57 and 5.23, mmpretrain 1.3.6'
# Names of the projections in the attentions of all architectures, where they are apart.
QUERIES, KEYS, VALUES = ((f'{name[0]}_proj', f'attention.{name}') for name in ('query', 'key', 'value'))
OUTPUTS = ('proj', 'o_proj', 'out_proj', 'output.dense')


class Layout:
    """Where the tokens of the image in hand lie: one per model, shared by its adapters.

    A forward hook on the convolution that cuts the patches, which sees the grid (h, w) whichever method of the model
    is called, padded or not. The last image counts, so one model must not run in two threads at a time. Activation
    checkpointing repeats a block in the backward pass, when that may be another image: the grid is then the one that
    the block's tokens have had before (`enter`).

    Args:
        num_prefix: number of class and register tokens.
    """

    def __init__(self, num_prefix: int) -> None:
        self.num_prefix = num_prefix
        self.hw: tuple[int, int] | None = None
        self.kept: dict[tuple[StorageWeakRef, int], tuple[int, int]] = {}  # grids of tokens that are still there
        self.repeated: tuple[int, int] | None = None  # of the block that is being repeated

    def __reduce__(self):
        return Layout, (self.num_prefix,), {'hw': self.hw}

    def __call__(self, conv: nn.Module, args: tuple, output: Tensor) -> None:
        self.hw = tuple(output.shape[-2:])
        if is_eager():
            self.kept = {place: hw for place, hw in self.kept.items() if not place[0].expired()}

    def enter(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook of each block. Checkpointing keeps its tokens, and gives them back as another tensor."""
        x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if x is None or not is_eager():
            return
        try:
            place = StorageWeakRef(x.untyped_storage()), x.storage_offset()
        except (NotImplementedError, RuntimeError):  # those of torch.func have none
            return
        if in_backward():
            self.repeated = self.kept.get(place)
        else:
            self.kept[place] = self.hw

    def of(self, x: Tensor) -> tuple[tuple[int, int], int]:
        """Patch grid and number of prefix tokens of x (B, N, C), or a ValueError if they do not give N."""
        if torch.jit.is_tracing():  # sizes are symbols there, and a comparison would only raise a warning
            return self.hw, self.num_prefix
        if is_eager() and in_backward():
            return self.again(x.shape[1]), self.num_prefix
        if not self.fits(self.hw, x.shape[1]):
            raise ValueError(f'{x.shape[1]} tokens, where the patch embedding has announced a grid of {self.hw}, and '
                             f'{self.num_prefix} class and register tokens: linearized attentions need all patches (no '
                             'patch dropout), from the patch embedding of their own model')
        return self.hw, self.num_prefix

    def fits(self, hw: tuple[int, int] | None, tokens: int) -> bool:
        return hw is not None and tokens == self.num_prefix + hw[0] * hw[1]

    def again(self, tokens: int) -> tuple[int, int]:
        """The grid of a block that is repeated in the backward pass.

        Raises:
            ValueError: if the block's own call is not repeated, and grids differ that have so many tokens.
        """
        known, self.repeated = self.repeated, None
        if self.fits(known, tokens):
            return known
        grids = sorted({hw for place, hw in self.kept.items() if self.fits(hw, tokens) and not place[0].expired()}
                       | ({self.hw} if self.fits(self.hw, tokens) else set()))
        if len(grids) != 1:
            raise ValueError(f'activation checkpointing repeats a block of {tokens} tokens, of images with '
                             f'{" or ".join(f"{h} x {w}" for h, w in grids) or "an unknown grid of"} patches: which '
                             'ones it does not say. Let it repeat the call of each block alone (set_grad_checkpointing '
                             'of timm, gradient_checkpointing_enable of transformers, checkpoint_wrapper of torch), or '
                             'go backward after each size of images')
        return grids[0]


def is_eager() -> bool:
    """Whether modules are just called: compilers and exporters take grids for constants, and repeat nothing."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def in_backward() -> bool:
    """Whether autograd is running, as torch.utils.checkpoint asks it."""
    return torch._C._current_graph_task_id() != -1


class Packed:
    """Stands in for `Attention.qkv` where a model has one projection each for queries, keys and values."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        self.linears = linears

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([linear(x) for linear in self.linears], dim=-1)  # (B, N, 3 C)

    @property
    def weight(self) -> Tensor:
        return torch.cat([linear.weight for linear in self.linears])

    @property
    def bias(self) -> Tensor | None:
        if all(linear.bias is None for linear in self.linears):
            return None
        return torch.cat([linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias
                          for linear in self.linears])


class Adapter:
    """Mixed into one of our attentions, it makes this the attention of a foreign model.

    The layer takes over the parameters and submodules of the attention it replaces, under their own names, beside
    what it adds. So state dicts of the model still load, and one of a timm ViT has the keys of `AdaLAViT`. A subclass
    serves one architecture: it has the signature of its attention, and does what that does before and after mixing.
    """

    options: tuple[str, ...] = ()  # plain attributes of the model's attention that are needed

    @staticmethod
    def check(source: nn.Module) -> str | None:
        """Why ``source`` cannot be replaced, or None."""
        return None

    @staticmethod
    def core(source: nn.Module) -> nn.Module:
        """The part of ``source`` that knows its number of heads and its dropout of attention weights."""
        return source

    @staticmethod
    def finishes(theirs: frozenset[str]) -> bool:
        """Whether `finish` does anything, if the model's attention has these parts."""
        return False

    @classmethod
    def replace(cls, source: nn.Module, cfg: dict, layout: Layout, grid: tuple[int, int] | None) -> Attention:
        """The layer that ``cfg`` describes, with the weights, device, dtype and mode of ``source``.

        Raises:
            TypeError: for an attention with another width inside than outside, with grouped queries, or whose names
                clash with those that the layer adds; for options that are no plain values.
            ValueError: for one that drops attention weights: a linear one has none.
        """
        proj, core = find_part(source, OUTPUTS), cls.core(source)
        if proj.in_features != proj.out_features or getattr(source, 'num_kv_groups', 1) > 1:
            raise TypeError(f'{type(source).__name__} has {proj.in_features} channels inside and {proj.out_features} '
                            f'outside, {getattr(source, "num_kv_groups", 1)} heads of queries for one of keys: only '
                            'plain multi-head attention can be replaced')
        for name in ('attn_drop', 'attention_dropout', 'dropout', 'dropout_prob'):
            rate = getattr(getattr(core, name, 0.0), 'p', getattr(core, name, 0.0))  # a number or nn.Dropout
            if rate:
                raise ValueError(f'{type(source).__name__} drops attention weights ({name}={rate}), which '
                                 'linear attention never forms: set this dropout to 0')
        if problem := cls.check(source):
            raise TypeError(f'{type(source).__name__} {problem}')
        heads = getattr(core, 'num_heads', None) or core.num_attention_heads
        layer = build_attention(cfg, proj.in_features, heads, grid=grid, num_prefix=layout.num_prefix)
        options_of(*layer.built_from)  # raises for what no state dict could hold
        del layer.qkv, layer.proj
        layer.to(proj.weight)
        theirs = frozenset(name for kind in PARTS for name, part in getattr(source, kind).items()
                           if part is not None and not isinstance(part, nn.Identity))
        if clash := theirs & {name for kind in PARTS for name in getattr(layer, kind)}:
            raise TypeError(f'{type(layer).__name__} and {type(source).__name__} both have {", ".join(clash)}: they '
                            'cannot share a module')
        for kind in PARTS:
            getattr(layer, kind).update((name, part) for name, part in getattr(source, kind).items() if name in theirs)
        layer._non_persistent_buffers_set |= source._non_persistent_buffers_set
        for name in cls.options:
            setattr(layer, name, getattr(source, name))
        layer.theirs, layer.layout = theirs, layout
        # The short cut of this one does not call `project`, and thus not `finish`.
        layer.long_way = cls.finishes(theirs) and type(layer).attend is LinearAttention.attend
        layer.__class__ = _join(cls, type(layer))
        layer.register_state_dict_post_hook(mark_state)
        return layer.train(source.training)

    @property
    def qkv(self) -> nn.Module | Packed:
        return self._modules.get('qkv') or Packed([find_part(self, names) for names in (QUERIES, KEYS, VALUES)])

    @property
    def proj(self) -> nn.Module:
        return find_part(self, OUTPUTS)

    def apply_their(self, name: str, x: Tensor) -> Tensor:
        """x through a submodule taken over from the model's attention, or x itself if there is none."""
        return self._modules[name](x) if name in self.theirs else x

    def finish(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the model does to its queries, keys and values (B, H, N, D) before it mixes them."""
        return q, k, v

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.finish(*super().project(x))

    def attend(self, x: Tensor, *layout: Any) -> Tensor:
        return Attention.attend(self, x, *layout) if self.long_way else super().attend(x, *layout)

    def mixed(self, x: Tensor, *rotation: Rotation) -> Tensor:
        """Our layer, with its output projection, (B, N, C) to (B, N, C); with one ``rotation`` if the model has any."""
        return super().forward(x, *self.layout.of(x), *rotation)

    def __reduce_ex__(self, protocol: int):  # the class is made at run time: copies and pickles name its two parts
        return _blank, type(self).__bases__, self.__dict__


def mark_state(layer: Adapter, state: dict[str, Any], prefix: str, metadata: dict) -> None:
    """A hook of ``state_dict()``, which MMEngine's ``get_state_dict`` calls, too: that walks over modules itself."""
    own = (state.get(f'{prefix}{name}') for name, _ in layer.named_parameters())
    if layer.is_softmax or any(isinstance(value, nn.Parameter) for value in own):
        return  # with keep_vars, tracers ask for the parameters themselves
    add_mark(state, prefix, layer.adala_mm, last_of(layer.proj, layer))


@cache
def _join(adapter: type[Adapter], layer: type[Attention]) -> type:
    return type(f'{adapter.__name__}{layer.__name__}', (adapter, layer),
                {'__module__': __name__, 'forward': _as_leaf(adapter.forward)})


def _as_leaf(forward: Callable) -> Callable:
    """``forward`` of a module that torch.fx takes for one operation, as it does with those of ``torch.nn``.

    What happens inside depends on the size of the image, which a symbolic trace does not know.
    """
    @wraps(forward)
    def record(self, *args, **kwargs):
        proxy = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, Proxy)), None)
        if proxy is None:
            return forward(self, *args, **kwargs)
        return proxy.tracer.create_proxy('call_module', proxy.tracer.path_of_module(self), args, kwargs)

    return record


def _blank(adapter: type[Adapter], layer: type[Attention]) -> Adapter:
    cls = _join(adapter, layer)
    return cls.__new__(cls)


def find_part(module: nn.Module, paths: tuple[str, ...]) -> nn.Module:
    """The first submodule that there is of these, whatever properties the class has of such a name.

    Raises:
        TypeError: if there is none.
    """
    for path in paths:
        part = module
        for name in path.split('.'):
            part = part and part._modules.get(name)
        if part is not None:
            return part
    raise TypeError(f'{type(module).__name__} has no {" or ".join(paths)}: is it of another version of its library '
                    f'than the tested ones ({TESTED})?')


def refuse(what: str, given: object) -> None:
    """ValueError if ``given`` is anything but None or False."""
    if given is not None and given is not False:
        raise ValueError(f'{what} needs attention weights, which a linearized block never forms: leave it out, or keep '
                         'softmax in all blocks')
