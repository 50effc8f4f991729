"""`save` and `load`: a linearized model in one file, which also says what the model is."""
from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, overload

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from adala_mm.adapters import Adapter, find_vit
from adala_mm.bases import TRANSFORMERS, build, describe_base, first_difference
from adala_mm.linearization import Model, linearize_blocks, say
from adala_mm.models.attentions import Attention
from adala_mm.models.attentions.marks import MARK, add_mark, decode, last_of, take_mark
from adala_mm.registry import ATTENTIONS
from adala_mm.utils.atomic import write_atomically
from adala_mm.utils.checkpoint import file_notes, load_checkpoint
from adala_mm.version import __version__

WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)


def save(model: nn.Module, path: str | Path, model_args: dict[str, Any] | None = None) -> None:
    """Writes a linearized model to a safetensors file: weights, attention of each block, and how to build its base.

    No library takes the file for the softmax model: see `adala_mm.models.attentions.marks`. Weights that several names
    share (tied embeddings) are written once, and are shared again in what `load` builds. The base is built again and
    compared with ``model``, so what the file says of it is true. If it cannot be built, which a warning tells, `load`
    has to be given a model.

    Args:
        model: from `linearize`; or `AdaLAViT`. Of a wrapper (``torch.compile``, DDP, ``DataParallel``, averaging) what
            is inside is written.
        path: new file; an existing one is replaced once the new one is whole.
        model_args: further arguments with which the model was made, plain values: of ``timm.create_model``, or of the
            class, for a ``VisionTransformer`` of timm or mmpretrain that was called directly.

    Raises:
        TypeError: for a model without a supported ViT inside.
        ValueError: if it has no linear block, or ``model_args`` do not give such a model.
        OSError: if there is no space.
    """
    from safetensors.torch import save as to_bytes
    model = unwrapped(model)
    state = dict(model.state_dict())
    for name, layer in model.named_modules():
        if isinstance(layer, Attention) and not layer.is_softmax and not isinstance(layer, Adapter):
            add_mark(state, f'{name}.' if name else '', layer.adala_mm, last_of(layer.proj, layer))
    if not any(name.endswith(f'.{MARK}') for name in state):
        raise ValueError(f'{type(model).__name__} has no linear block: its own library saves it')
    base = describe_base(model, model_args or {})
    problem = base if isinstance(base, str) else difference(model, base, state)
    if problem and model_args:
        raise ValueError(f'model_args={model_args} do not make this {type(model).__name__}: {problem}')
    if problem:
        say(f'{path}: {type(model).__name__} cannot be built from what it tells of itself ({problem}): load will need '
            'one, as in load(path, model), unless you give save its arguments as model_args')
    ties = ties_of(state)
    about = {'base': None if problem else base, 'problem': problem, 'ties': ties, 'version': __version__}
    write_atomically(path, to_bytes(apart({name: value for name, value in state.items() if name not in ties}),
                                    {'format': MARK, MARK: json.dumps(about)}))


@overload
def load(path: str | Path, model: Model, attentions: Iterable[type[Attention]] = ()) -> Model: ...


@overload
def load(path: str | Path, model: None = None, attentions: Iterable[type[Attention]] = ()) -> Any: ...


def load(path: str | Path, model: nn.Module | None = None, attentions: Iterable[type[Attention]] = ()) -> nn.Module:
    """The linearized model of a file or folder, in evaluation mode, on the CPU.

    Nothing is unpickled, imported or called by the word of the file, but supported models of timm, transformers,
    mmpretrain and this package, and registered attentions.

    Args:
        path: a file of `save`; a folder that transformers' ``save_pretrained`` or timm's ``save_for_hf`` wrote of a
            linearized model; or, if ``model`` is given, any file of its ``state_dict``.
        model: the softmax model of the same making, for a base that the file cannot tell. It is changed in place, and
            stays on its device and in its dtype; what it shares between names stays shared.
        attentions: attention classes of your own that the model has and that are not registered.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: for a file that is not of a linearized model, tells no base, names what is not supported, or does
            not fit.
    """
    path = Path(path).expanduser()
    state, base, ties = read_folder(path) if path.is_dir() else read_file(path)
    marks = {name[:-len(MARK)]: decode(value) for name, value in state.items() if name.endswith(f'.{MARK}')}
    if not marks:
        raise ValueError(f'{path} holds no linearized model: nothing in it has a key .{MARK}. Its own library loads it')
    own = model is None
    if model is None:
        if isinstance(base, str):
            raise ValueError(f'{path} does not tell how to build its model ({base}): give load one, as in '
                             'load(path, model)')
        model = build(base)
    kinds = {block_of(prefix): trusted(kind, attentions) for prefix, kind in marks.items()}
    softmax_names = model.state_dict().keys()
    linearize_as(model, kinds)
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
    try:
        if own and base['library'] == 'transformers' and state.keys() - model.state_dict().keys():
            model, state = renamed(model, kinds, state, softmax_names)
        else:
            fill_in(state, ties_of(model.state_dict()))
        vit, architecture = find_vit(model)
        for prefix, layer in zip(prefixes(model), architecture.attentions_of(vit), strict=True):
            if f'{prefix}{MARK}' in state:
                take_mark(state, prefix, last_of(layer.proj, layer))
        if own and len(dtypes) == 1:
            model.to(*dtypes)
        model.load_state_dict(state, assign=own and len(dtypes) > 1)
        if own:
            tie(model, ties)
    except RuntimeError as error:
        first = '\n'.join(str(error).splitlines()[:4])  # it has a line for each parameter
        raise ValueError(f'{path} does not fit {type(model).__name__}, or was written with another version of its '
                         f'library: {first}') from error
    model.eval()  # not in a chain: mmpretrain's returns None
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, whose names and class are its own."""
    while isinstance(model, WRAPPERS) or '_orig_mod' in model._modules:
        model = model.module if isinstance(model, WRAPPERS) else model._orig_mod
    return model


def difference(model: nn.Module, base: dict[str, Any], state: dict[str, Tensor]) -> str | None:
    """Where the model that ``base`` gives, with the same attentions, is another one than ``model``; None if nowhere."""
    try:
        twin = build(base)
        linearize_as(twin, {block_of(name): module_kind(model, name) for name in state if name.endswith(f'.{MARK}')})
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return f'{type(error).__name__}: {error}'
    return first_difference(model, twin)


def module_kind(model: nn.Module, name: str) -> dict[str, Any]:
    """What `linearize` takes for the attention that has the key ``name``."""
    cls, options = model.get_submodule(name.rpartition('.')[0]).built_from
    return {'type': cls, **options}


# --- what a file says -------------------------------------------------------------------------------------------------

def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | str, dict[str, str]]:
    """Tensors; the base or why there is none; and which names are those of others."""
    state, about = dict(load_checkpoint(path)), json.loads(file_notes(path).get(MARK, '{}'))
    ties = about.get('ties')
    ties = {str(name): str(other) for name, other in ties.items()} if isinstance(ties, dict) else {}
    fill_in(state, ties)
    return state, about.get('base') or about.get('problem') or 'it was not written by adala_mm.save', ties


def read_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | str, dict[str, str]]:
    """The same for a folder of transformers or of timm."""
    config = path / 'config.json'
    if not config.is_file():
        raise FileNotFoundError(f'{path} has no config.json: it is no folder of save_pretrained or save_for_hf')
    state = dict(load_checkpoint(path))
    about = json.loads(config.read_text(encoding='utf-8'))
    if 'architecture' in about:
        return state, {'library': 'timm', 'name': about['architecture'], 'args': about.get('model_args', {})}, {}
    name, = about.get('architectures') or ['']
    module = next((module for module in TRANSFORMERS if hasattr(importlib.import_module(module), name)), None)
    if module is None:
        return state, f'config.json names the class {name!r}', {}
    return state, {'library': 'transformers', 'name': f'{module}.{name}', 'args': about}, {}


# --- weights with several names ---------------------------------------------------------------------------------------

def ties_of(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are one with a former one in memory, each with the first name of it."""
    first: dict[tuple, str] = {}
    names = {name: first.setdefault((value.device, value.data_ptr(), value.dtype, value.shape, value.stride()), name)
             for name, value in state.items() if isinstance(value, Tensor) and value.data_ptr()}
    return {name: other for name, other in names.items() if name != other}


def apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous, each in memory of its own, which safetensors asks for."""
    taken, alone = set(), {}
    for name, value in state.items():
        value = value.contiguous()
        place = value.device, value.untyped_storage().data_ptr()
        alone[name] = value.clone() if place in taken else value
        taken.add(place)
    return alone


def fill_in(state: dict[str, Tensor], ties: Mapping[str, str]) -> None:
    """Puts what one of the names in ``ties`` has under those that are missing, in place."""
    for name, other in [*((other, name) for name, other in ties.items()), *ties.items()]:
        if name not in state and other in state:
            state[name] = state[other]


def tie(model: nn.Module, ties: Mapping[str, str]) -> None:
    """Gives parameters and buffers under the names in ``ties`` to the others as well."""
    names = model.state_dict().keys()
    for name, other in ties.items():
        if not {name, other} <= names:  # transformers has renamed and tied them
            continue
        (owner, _, leaf), (source, _, wanted) = name.rpartition('.'), other.rpartition('.')
        setattr(model.get_submodule(owner), leaf, getattr(model.get_submodule(source), wanted))


def renamed(model: nn.Module, kinds: dict[int, dict[str, Any]], state: dict[str, Tensor],
            softmax_names: Iterable[str]) -> tuple[nn.Module, dict[str, Tensor]]:
    """Model and state dict for a file whose names are not those in memory: transformers maps them while it loads.

    Raises:
        RuntimeError: if it does not know all of them.
    """
    inside, names, added = prefixes(model), model.state_dict().keys() - softmax_names, {}
    theirs = dict(state)
    for prefix in [name[:-len(MARK)] for name in state if name.endswith(f'.{MARK}')]:
        here = inside[block_of(prefix)]
        for name in [name for name in state if name.startswith(prefix)]:
            value = theirs.pop(name)
            if f'{here}{name[len(prefix):]}' in names:
                added[f'{here}{name[len(prefix):]}'] = value
            else:
                theirs[name] = value.squeeze(0) if value.ndim > (1 if name.endswith('bias') else 2) else value
    plain, info = type(model).from_pretrained(None, config=model.config, state_dict=theirs, output_loading_info=True)
    if problems := {what: sorted(names) for what, names in info.items() if names}:
        raise RuntimeError(f'transformers does not load these weights: {problems}')
    linearize_as(plain, kinds)
    return plain, {**plain.state_dict(), **added}


def trusted(kind: dict[str, Any], attentions: Iterable[type[Attention]]) -> dict[str, Any]:
    """``kind`` with a class that is registered here or that the caller has named.

    Raises:
        ValueError: for any other.
    """
    own = {f'{cls.__module__}.{cls.__qualname__}': cls for cls in attentions}
    if kind['type'] in own:
        return kind | {'type': own[kind['type']]}
    ATTENTIONS.import_from_location()
    if kind['type'].removeprefix('adala_mm.') in ATTENTIONS.module_dict:
        return kind
    raise ValueError(f'the file has blocks with {kind["type"]}, which is not registered here: pass the class, as in '
                     'load(path, attentions=[MyAttention])')


def linearize_as(model: nn.Module, kinds: dict[int, dict[str, Any]]) -> None:
    """Gives blocks of the softmax model, by their index, the attentions that a file names."""
    vit, architecture = find_vit(model)
    linearize_blocks(model, [kinds.get(i) for i in range(len(architecture.blocks_of(vit)))])


def prefixes(model: nn.Module) -> list[str]:
    """What the names of parameters begin with in the attention of each block."""
    vit, architecture = find_vit(model)
    names = {module: f'{name}.' for name, module in model.named_modules()}
    return [names[attn] for attn in architecture.attentions_of(vit)]


def block_of(prefix: str) -> int:
    """Index of the block whose attention has its parameters there; what stands before differs between versions.

    Raises:
        ValueError: if no block has.
    """
    numbers = re.findall(r'\.(\d+)\.', prefix)
    if not numbers:
        raise ValueError(f'{prefix} is no attention of a block')
    return int(numbers[-1])
