"""Renames the keys of a file to ours. A named rule may drop a key; any other key raises an error that names it."""
from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from adala_mm.conversion.from_dinov2 import DINOV2
from adala_mm.conversion.from_dinov3 import DINOV3_SOURCES
from adala_mm.conversion.from_mmpretrain import MMPRETRAIN
from adala_mm.conversion.from_openai import OPENAI
from adala_mm.conversion.from_timm import TIMM
from adala_mm.conversion.from_transformers import TRANSFORMERS_CLIP, TRANSFORMERS_DINOV2
from adala_mm.conversion.from_transformers_vit import TRANSFORMERS_VIT
from adala_mm.conversion.source import Source, reason_to_drop
from adala_mm.models.attentions.marks import MARK
from adala_mm.utils.checkpoint import recorded_linear
from adala_mm.utils.timm_models import PE_CORE

SOURCES = (TIMM, DINOV2, OPENAI, TRANSFORMERS_VIT, TRANSFORMERS_DINOV2, TRANSFORMERS_CLIP, MMPRETRAIN,
           *DINOV3_SOURCES)
SWIGLU = 'the gate and the values of its MLP are one matrix (SwiGLU of DINOv2 ViT-g), and those of AdaLAViT are two'
NAFLEX = ("timm's NaFlexVit, which embeds flattened patches of images of any aspect; convert the same weights as "
          'transformers has them, such as google/siglip2-base-patch16-naflex')
ROTARY = 'rotary positions other than those of DINOv3 (EVA-02, PE), which AdaLAViT lacks'
POOLED = 'its last norm comes after pooling, so that the backbone has none'
# Keys that no plain ViT has, by their beginning, and why they are refused.
REFUSED = {re.compile(pattern): reason for pattern, reason in {
    r'backbone\.(blocks|patch_embed\.proj)\.':
        'these are under our own keys already; name the file as init_cfg.checkpoint',
    r'visual\.trunk\.': 'an OpenCLIP model around a timm ViT; save model.visual.trunk.state_dict() and convert that',
    r'embeds\.': NAFLEX,
    r'.*\.mlp\.(w12|weights_in)\.|.*\.ffn\.w12\.': SWIGLU,
    r'(.*\.)?(rope\.|rel_pos|relative_position)':
        'relative positions (BEiT), or rotary positions other than those of DINOv3 (EVA), which AdaLAViT lacks',
    r'.*\.(q_norm|k_norm)\.': 'queries and keys are normalised, which AdaLAViT does not do',
}.items()}


def refuse(state: dict[str, Tensor]) -> None:
    """Raises ValueError, with the key and the reason, for what is known not to fit `AdaLAViT`."""
    marked = [key for key in state if key.endswith(f'.{MARK}')]
    if marked or recorded_linear(state):
        told = f'with keys such as {marked[0]}' if marked else 'as the file records'
        raise ValueError(f'cannot convert weights of a linearized model ({told}), which would pass for softmax. Name '
                         'the file as init_cfg.checkpoint of an AdaLAViT with the same attention'
                         + (', or give it to adala_mm.load' if marked else ''))
    if PE_CORE <= state.keys():
        raise ValueError(f'cannot convert weights with {", ".join(sorted(PE_CORE))}: PE core has {ROTARY}')
    for key, value in state.items():
        reason = next((reason for pattern, reason in REFUSED.items() if pattern.match(key)), None)
        if key.endswith('.mlp.fc1.weight'):
            back = state.get(key.replace('fc1', 'fc2'))
            if back is not None and len(value) == 2 * back.shape[-1]:  # gate and value
                reason = ROTARY if key.replace('mlp.fc1.weight', 'attn.q_bias') in state else SWIGLU
        elif key.endswith('.mlp.fc1_g.weight') and 'pos_embed' in state:
            reason = ROTARY
        elif key.startswith('fc_norm.') and 'norm.weight' not in state:
            reason = POOLED
        if reason:
            raise ValueError(f'cannot convert weights with {key}: {reason}')


def recognise(state: dict[str, Tensor]) -> tuple[Source, str]:
    """Finds the source whose marks the keys have, and the prefix of the keys; a ValueError if none or several fit."""
    found = [(source, prefix) for source in SOURCES for prefix in source.prefixes
             if source.mark({key.removeprefix(prefix) for key in state if key.startswith(prefix)})]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError('weights of several models in one file: ' + ', '.join(
            f'{source.name} under {prefix + "*"!r}' for source, prefix in found) + '; save one of them')
    parts = [(part, source.name) for part in dict.fromkeys(key.partition('.')[0] for key in state)
             for source in SOURCES if source.mark({key[len(part) + 1:] for key in state if key.startswith(f'{part}.')})]
    inside = ''.join(f'. What stands under {part}.* is of {name}: --key {part}' for part, name in parts)
    raise ValueError(f'weights of no known source ({"; ".join(source.name for source in SOURCES)}); the '
                     f'{len(state)} keys are {some(state)}{inside}')


def rename(state: dict[str, Tensor], source: Source, prefix: str) -> tuple[dict[str, Tensor], list]:
    """Returns tensors under our keys and in our shapes, and a report. A ValueError names keys that nothing explains."""
    ours: dict[str, Tensor] = {}
    dropped, unexplained, converted = defaultdict(list), [], 0
    for key, value in state.items():
        inside, short = key.startswith(prefix), key.removeprefix(prefix)
        new = source.our_key(short) if inside else None
        reason = reason_to_drop(short, source.drop if inside else source.outside)
        if new is not None:
            if new in ours:
                raise ValueError(f'two keys of {source.name} weights are {new}, one of them {key}')
            converted += value.dtype != torch.float32
            ours[new] = value.float()
        elif reason is not None:
            dropped[reason].append(key)
        else:
            unexplained.append(key)
    if unexplained:
        raise ValueError(f'{len(unexplained)} keys of {source.name} weights that nothing explains: '
                         f'{some(unexplained)}. Is it a plain ViT?')
    report = [('loaded', len(ours), f'{source.name}' + (f', keys under {prefix}' if prefix else ''))]
    joined = join_qkv(ours, source)
    if joined:
        report.append(('joined', 3 * joined, f'q, k and v to {joined} tensors qkv'))
    report += settle_biases(ours, source)
    for key in ('cls_token', 'reg_token', 'pos_embed'):
        if key in ours:
            ours[key] = ours[key].reshape(1, -1, ours[key].shape[-1])
    if converted:
        report.append(('cast', converted, 'to float32'))
    report += [('dropped', len(keys), f'{reason}: {some(keys, 2)}') for reason, keys in dropped.items()]
    return ours, report


def join_qkv(ours: dict[str, Tensor], source: Source) -> int:
    """Puts ``attn.q``, ``attn.k`` and ``attn.v`` together as ``attn.qkv``, in place; returns how many it made."""
    parts = sorted({re.sub(r'\.attn\.[qkv]\.', '.attn.{}.', key) for key in ours if re.search(r'\.attn\.[qkv]\.', key)})
    for template in parts:
        names = [template.format(part) for part in 'qkv']
        if not source.key_bias and template.endswith('.bias') and names[0] in ours:
            ours[names[1]] = torch.zeros_like(ours[names[0]])
        require(ours, names, source)
        ours[template.format('qkv')] = torch.cat([ours.pop(name) for name in names])
    return len(parts)


def settle_biases(ours: dict[str, Tensor], source: Source) -> list[tuple[str, int, str]]:
    """Sets the biases of keys to zero, in place, for a source whose keys have none; returns a report.

    If the biases of queries and values are zero too, as in the published weights of DINOv3, all are left out.
    """
    biases = [key for key in ours if key.endswith('.attn.qkv.bias')]
    if source.key_bias or not biases:
        return []
    for key in biases:
        q, k, v = ours[key].chunk(3)
        ours[key] = torch.cat([q, torch.zeros_like(k), v])
    if any(ours[key].any() for key in biases):
        return []
    for key in biases:
        del ours[key]
    return [('left out', len(biases), 'biases of queries, keys and values, which are zero')]


def require(ours: dict[str, Tensor], keys: Iterable[str], source: Source) -> None:
    """Raises ValueError with the source's names of missing keys: the file is cut, or not of a whole ViT."""
    missing = [source.own_key(key) for key in keys if key not in ours]
    if missing:
        raise ValueError(f'{len(missing)} keys of {source.name} weights are missing: {some(missing)}. Is it '
                         'cut off, or one shard of several?')


def some(names: Iterable[str], count: int = 6) -> str:
    """The first ``count`` names as text."""
    names = list(names)
    return ', '.join(names[:count]) + (', ...' if len(names) > count else '')
