"""Describes the softmax model from which a linearized one was made, in plain values, and builds it again from them."""
from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from adala_mm.adapters import ARCHITECTURES, find_vit
from adala_mm.models.attentions.marks import MARK

# What is set on a model and not built into it.
SWITCHES = ('name_or_path', 'training', 'num_linear_blocks', 'grad_checkpointing', 'gradient_checkpointing', 'with_cp',
            'compile_mode', 'trainable', 'loaded', 'built_from', 'rope')
NO_PART = ('quantization_config', 'auto_map')  # of the architecture that a config of transformers tells
MODELS = tuple(name for architecture in ARCHITECTURES for name in architecture.models)
# Modules of transformers with the ViTs, and with what has one of their backbones inside.
AROUND = ('depth_anything', 'prompt_depth_anything', 'mask2former', 'oneformer', 'upernet')
TRANSFORMERS = tuple(dict.fromkeys([
    *(name.rpartition('.')[0] for name in MODELS if name.startswith('transformers.')),
    *(f'transformers.models.{name}.modeling_{name}' for name in AROUND)]))


def describe_base(model: nn.Module, model_args: dict[str, Any]) -> dict[str, Any] | str:
    """What `build` needs to make the softmax model again (library, name and arguments), or why it cannot be made."""
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
    """The softmax model that a file describes, with random weights.

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
    """The repository from which transformers would load a part of the model while it builds the rest; None if none."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return next((part['backbone'] for part in parts if part.get('backbone')), None)


def without_private(config: Any) -> Any:
    """A config of transformers without entries that do not describe the architecture, such as kernels of the hub."""
    if not isinstance(config, dict):
        return config
    return {key: without_private(value) for key, value in config.items()
            if not key.startswith('_') and 'attn_implementation' not in key and key not in NO_PART}


def first_difference(model: nn.Module, twin: nn.Module) -> str | None:
    """Where ``twin`` is made of other modules than ``model``, or of other options and shapes; None if nowhere."""
    names, others = (dict(net.named_modules()) for net in (model, twin))
    if missing := sorted(names.keys() ^ others.keys()):
        return f'{missing[0]} is only in one of them'
    for name, module in names.items():
        here, there = facts(module), facts(others[name])
        for key in here.keys() | there.keys():
            if here.get(key) != there.get(key):
                return f'{f"{name}." if name else ""}{key} is {here.get(key)}, not {there.get(key)}'
    return None


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
