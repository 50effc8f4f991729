"""`save` and `load`: a linearized model in one file that says what it is."""
from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from adala_mm.adapters import ARCHITECTURES, Adapter, find_vit
from adala_mm.linearization import Model, linearize_blocks, say
from adala_mm.models.attentions import Attention
from adala_mm.models.attentions.marks import MARK, add_mark, decode, last_of, take_mark
from adala_mm.registry import ATTENTIONS
from adala_mm.utils.atomic import write_atomically
from adala_mm.utils.checkpoint import file_notes, load_checkpoint
from adala_mm.version import __version__

# What is set on a model and not built into it.
SWITCHES = ('name_or_path', 'training', 'num_linear_blocks', 'grad_checkpointing', 'gradient_checkpointing', 'with_cp',
            'compile_mode', 'trainable', 'loaded', 'built_from', 'rope')
NO_PART = ('quantization_config', 'auto_map')  # of the architecture that a config of transformers tells
WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
MODELS = tuple(name for architecture in ARCHITECTURES for name in architecture.models)
# Modules of transformers with the ViTs, and with what has one of their backbones inside.
AROUND = ('depth_anything', 'prompt_depth_anything', 'mask2former', 'oneformer', 'upernet')
TRANSFORMERS = tuple(dict.fromkeys([
    *(name.rpartition('.')[0] for name in MODELS if name.startswith('transformers.')),
    *(f'transformers.models.{name}.modeling_{name}' for name in AROUND)]))


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


# --- what a base is ---------------------------------------------------------------------------------------------------

def describe_base(model: nn.Module, model_args: dict[str, Any]) -> dict[str, Any] | str:
    """How `build` gets the softmax model again: library, name and arguments; or why it cannot."""
    vit, _ = find_vit(model)
    cls = type(model)
    name = f'{cls.__module__}.{cls.__qualname__}'
    if architecture := (getattr(model, 'pretrained_cfg', None) or {}).get('architecture'):
        now = {'num_classes': getattr(model, 'num_classes', None), 'global_pool': getattr(model, 'global_pool', None),
               'img_size': vit.patch_embed.img_size, 'in_chans': vit.patch_embed.proj.in_channels}
        args = getattr(model, '_model_args', {}) | {key: value for key, value in now.items() if value is not None}
        base = {'library': 'timm', 'name': architecture, 'args': args | model_args}
    elif cls.__module__ in TRANSFORMERS:
        base = {'library': 'transformers', 'name': name, 'args': model.config.to_dict() | model_args}
    elif name in MODELS:
        base = {'library': cls.__module__.partition('.')[0], 'name': name,
                'args': ARGUMENTS.get(name, lambda vit: {})(vit) | model_args}
    else:
        theirs = name.startswith('transformers.')
        return f'{name} is {"no class that load builds" if theirs else "a class of your own"}'
    try:
        return json.loads(json.dumps(base))
    except TypeError as error:
        return f'its arguments are not plain values: {error}'


def build(base: Mapping[str, Any]) -> nn.Module:
    """The softmax model, with random weights, that a file tells of.

    Raises:
        ValueError: for anything but the supported models.
    """
    known, told = False, base if isinstance(base, dict) else {}
    library, name, args = (told.get(key) for key in ('library', 'name', 'args'))
    if isinstance(name, str) and isinstance(args, dict):
        if library == 'timm' and '.' not in name:
            import timm
            known = timm.is_model(name)
        elif library == 'transformers':
            known = name.rpartition('.')[0] in TRANSFORMERS
        else:
            known = name in MODELS and not names_classes(args)
    if not known:
        raise ValueError(f'the file asks for {library} {name!r} with {args!r}, which is none of the models that can be '
                         'linearized')
    with torch.random.fork_rng(devices=[]):
        if library == 'timm' and '.' not in name:
            return timm.create_model(name, pretrained=False, checkpoint_path='', **args)
        module, _, kind = name.rpartition('.')
        cls = getattr(importlib.import_module(module), kind, None)
        if library == 'transformers':
            from transformers import PreTrainedModel
            if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel) and cls.config_class is not None):
                raise ValueError(f'the file asks for {name}, which is no model of transformers')
            if fetched := fetched_backbone(args):
                raise ValueError(f'the file asks for {kind} with a backbone from elsewhere, {fetched}')
            return cls(cls.config_class.from_dict(without_private(args)))
        softmax = {'attention': {'type': 'adala_mm.SoftmaxAttention'}} if library == MARK else {}
        return cls(**args, **softmax)


def names_classes(args: Any) -> bool:
    """Whether a registry of MMEngine would be asked for a class, which it imports from anywhere."""
    if isinstance(args, dict):
        return 'type' in args or any(map(names_classes, args.values()))
    return isinstance(args, list) and any(map(names_classes, args))


def fetched_backbone(config: dict[str, Any]) -> str | None:
    """The repository from which transformers would take a part of the model while it is built."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return next((part['backbone'] for part in parts if part.get('backbone')), None)


def without_private(config: Any) -> Any:
    """A config of transformers without what is no part of the architecture, such as kernels from the hub."""
    if not isinstance(config, dict):
        return config
    return {key: without_private(value) for key, value in config.items()
            if not key.startswith('_') and 'attn_implementation' not in key and key not in NO_PART}


def difference(model: nn.Module, base: dict[str, Any], state: dict[str, Tensor]) -> str | None:
    """Where the model that ``base`` gives, with the same attentions, is another one than ``model``; None if nowhere."""
    try:
        twin = build(base)
        linearize_as(twin, {block_of(name): module_kind(model, name) for name in state if name.endswith(f'.{MARK}')})
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return f'{type(error).__name__}: {error}'
    names, others = (dict(net.named_modules()) for net in (model, twin))
    if missing := sorted(names.keys() ^ others.keys()):
        return f'{missing[0]} is only in one of them'
    for name, module in names.items():
        here, there = facts(module), facts(others[name])
        for key in here.keys() | there.keys():
            if here.get(key) != there.get(key):
                return f'{f"{name}." if name else ""}{key} is {here.get(key)}, not {there.get(key)}'
    return None


def module_kind(model: nn.Module, name: str) -> dict[str, Any]:
    """What `linearize` takes for the attention that has the key ``name``."""
    cls, options = model.get_submodule(name.rpartition('.')[0]).built_from
    return {'type': cls, **options}


def facts(module: nn.Module) -> dict[str, Any]:
    """Class, plain attributes and shapes of a module."""
    plain = {key: json.dumps(value) for key, value in vars(module).items()
             if not key.startswith('_') and key not in SWITCHES and is_plain(value)}
    shapes = {key: tuple(value.shape) for key, value in [*module.named_parameters(recurse=False),
                                                         *module.named_buffers(recurse=False)]}
    return {'class': type(module).__qualname__, **plain, **shapes}


def is_plain(value: Any) -> bool:
    return all(map(is_plain, value)) if isinstance(value, (tuple, list)) else isinstance(
        value, (bool, int, float, str, type(None)))


def adala_arguments(vit: nn.Module) -> dict[str, Any]:
    from adala_mm.conversion.from_timm import ACTIVATIONS
    block, patch, act = vit.blocks[0], vit.patch_size, type(vit.blocks[0].mlp.act).__name__
    gated, hidden = hasattr(block.mlp, 'fc1_g'), block.mlp.fc2.in_features
    rotary = vit.rotary and {name: getattr(vit.rotary, name) for name in ('base', 'shift', 'jitter', 'rescale')}
    return dict(
        img_size=[side * patch for side in vit.pos_grid], patch_size=patch,
        in_channels=vit.patch_embed.proj.in_channels, embed_dim=vit.embed_dim, depth=len(vit.blocks),
        num_heads=block.attn.num_heads, mlp_ratio=hidden / vit.embed_dim, qkv_bias=block.attn.qkv.bias is not None,
        rotary=rotary, swiglu=gated, swiglu_align_to=1 if hidden % 8 else 8,
        class_token=vit.class_token, num_registers=vit.num_prefix - vit.class_token, no_embed_class=vit.no_embed_class,
        pre_norm=isinstance(vit.norm_pre, nn.LayerNorm), act='gelu' if gated else ACTIVATIONS.get(act, act),
        norm_eps=vit.norm.eps, layer_scale=getattr(block.ls1, 'init_values', None),
        drop_path_rate=vit.blocks[-1].drop_path.drop_prob, out_indices=vit.out_indices, out_type=vit.out_type)


def query_arguments(vit: nn.Module) -> dict[str, Any]:
    plain = {name: value for name, value in adala_arguments(vit).items() if name not in ('out_indices', 'out_type')}
    return plain | dict(num_queries=vit.query_embed.num_embeddings, query_blocks=vit.query_blocks)


def mmpretrain_arguments(vit: nn.Module) -> dict[str, Any]:
    return dict(arch=vit.arch_settings, img_size=vit.img_size, patch_size=vit.patch_embed.projection.kernel_size[0],
                in_channels=vit.patch_embed.projection.in_channels, out_type=vit.out_type, out_indices=vit.out_indices,
                final_norm=vit.final_norm, with_cls_token=vit.cls_token is not None,
                layer_scale_init_value=0.0 if isinstance(vit.layers[0].ffn.gamma2, nn.Identity) else 1.0)


ARGUMENTS: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    'adala_mm.models.backbones.vit.AdaLAViT': adala_arguments,
    'adala_mm.models.backbones.query_vit.QueryViT': query_arguments,
    'mmpretrain.models.backbones.vision_transformer.VisionTransformer': mmpretrain_arguments}


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
