"""Writes the weights of a backbone for timm and transformers; `adala_mm.linearize` makes their models linear."""
from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save, save_file
from timm.layers import LayerScale, SwiGLU
from torch import Tensor, nn

from adala_mm.adapters import find_vit
from adala_mm.conversion.families import FAMILIES
from adala_mm.conversion.from_timm import ACTIVATIONS, TIMM, timm_vit
from adala_mm.conversion.from_transformers import CLASSES, TRANSFORMERS_CLIP, TRANSFORMERS_DINOV2, in_files, pretrained
from adala_mm.conversion.source import Converted, Source
from adala_mm.export.linearized import OwnLogits
from adala_mm.export.parity import Run
from adala_mm.export.target import Target
from adala_mm.linearization import linearize_blocks
from adala_mm.models.attentions.marks import add_mark
from adala_mm.models.backbones import AdaLAViT, QueryViT
from adala_mm.models.backbones.weights import is_extra
from adala_mm.serialization import load

POOLING = {'cls_token': 'token', 'avg_featmap': 'avg'}  # of our backbone, as timm names it
OWN_PARAMETERS = re.compile(r'(?!qkv\.|proj\.)')
OUTPUT = re.compile(r'(.*\.(\d+)\.(?:attention|self_attn)\.)(output\.dense\.bias|out_proj\.bias)$')  # of an attention


def export_timm(target: Target, path: Path, family: str | None = None) -> Run:
    """Writes a safetensors file with the weights of timm's ``VisionTransformer``, and returns timm's model with it.

    With linear blocks, it is a state dict of `linearize`'s model, which the softmax model refuses.

    Returns:
        Images to final tokens, as `AdaLAViT.forward_features`, or to logits if the target is a classifier.

    Raises:
        ValueError: if the backbone is no plain ViT, timm lacks its family, or the head is of another kind.
    """
    converted = describe(target, TIMM, tuple(FAMILIES), family)
    head = linear_head(target)
    notes = {'format': 'pt', **target.notes, 'family': converted.family_name,
             'position_grid': 'x'.join(map(str, converted.grid)),
             'architecture': json.dumps(converted.config), 'attentions': json.dumps(target.attentions)}
    shape = () if head is None else (head.out_features, POOLING[target.backbone.out_type])
    state = dict(converted.state)
    if head is not None:
        state |= {f'head.{key}': value for key, value in head.state_dict().items()}
        notes['head'] = json.dumps(dict(zip(('num_classes', 'global_pool'), shape, strict=True), fc_norm=False))
    model = linearized(timm_vit(converted, *shape), target)
    model.load_state_dict(state)
    path.write_bytes(save({key: value.contiguous() for key, value in model.state_dict().items()}, notes))
    twin = linearized(timm_vit(converted, *shape), target)
    twin.load_state_dict(load_file(path))
    return features(twin) if head is None else logits(twin)


def export_transformers(target: Target, folder: Path, family: str | None = None) -> Run:
    """Writes a folder for `adala_mm.load`, without linear blocks for ``from_pretrained``, and returns its model.

    A classifier becomes ``Dinov2ForImageClassification``, whose head sees the class token and the mean of the patches:
    the weights of the one that ours does not see are 0.

    Returns:
        Images of the native size to final tokens, as `AdaLAViT.forward_features`, or to logits if it is a classifier.

    Raises:
        ImportError: without transformers.
        ValueError: for a backbone that no model of transformers here is, or for the classifier of another family than
            DINOv2.
    """
    head = linear_head(target)
    names = tuple(dict.fromkeys((*TRANSFORMERS_DINOV2.families, *TRANSFORMERS_CLIP.families, *CLASSES)))
    ours = describe(target, TRANSFORMERS_CLIP, names, family)
    if ours.family_name in TRANSFORMERS_DINOV2.families:
        ours = describe(target, TRANSFORMERS_DINOV2, names, ours.family_name)
    state = their_names(ours)
    written = pretrained(ours, state)
    state = in_files(state)
    if head is not None:
        written, state = with_head(written, state, head, target)
    written.config.architectures = [type(written).__name__]
    written.config.save_pretrained(folder)
    for key in [key for key in state if OUTPUT.match(key)]:
        prefix, block, last = OUTPUT.match(key).groups()
        layer = target.backbone.blocks[int(block)].attn
        state |= {f'{prefix}{name}': value for name, value in layer.state_dict().items() if OWN_PARAMETERS.match(name)}
        if not layer.is_softmax:
            add_mark(state, prefix, layer.adala_mm, last)
    # Not their own save_pretrained: its keys differ between versions.
    save_file({key: value.contiguous() for key, value in state.items()}, folder / 'model.safetensors', {'format': 'pt'})
    (folder / 'adala_mm.json').write_text(json.dumps(target.notes | {'attentions': target.attentions}, indent=1))
    read = type(written).from_pretrained(folder) if target.is_softmax else load(folder)
    return features(read) if head is None else OwnLogits(read.eval())


def with_head(model: nn.Module, state: dict[str, Tensor], head: nn.Linear,
              target: Target) -> tuple[nn.Module, dict[str, Tensor]]:
    """transformers' classifier for the ViT ``model``, without its weights, and all weights under the names of files."""
    import transformers
    kind = type(model).__name__.removesuffix('Model')
    if not kind.startswith('Dinov2'):
        raise ValueError(f'the classifier of transformers for {type(model).__name__} does not pool normalised tokens '
                         f'as ours ({target.backbone.out_type}): leave out --part model, or write .onnx')
    names = json.loads(target.notes.get('classes', '[]')) or [f'LABEL_{i}' for i in range(head.out_features)]
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    classifier = getattr(transformers, f'{kind}ForImageClassification')(model.config)
    unseen = torch.zeros_like(head.weight)
    halves = (head.weight, unseen) if target.backbone.out_type == 'cls_token' else (unseen, head.weight)
    return classifier, {f'{classifier.base_model_prefix}.{key}': value for key, value in state.items()} | {
        'classifier.weight': torch.cat(halves, dim=1), 'classifier.bias': head.bias}


def linearized(model: nn.Module, target: Target) -> nn.Module:
    """The softmax ViT, with the attentions of the backbone."""
    linearize_blocks(model, [None if str(kind['type']).endswith('SoftmaxAttention') else kind
                             for kind in target.attentions])
    return model


def linear_head(target: Target) -> nn.Linear | None:
    """The linear layer of a classifier on pooled tokens; None if the target is a backbone.

    Raises:
        ValueError: for a head or neck of another kind.
    """
    model = target.model
    if model is target.backbone:
        return None
    fc = getattr(getattr(model, 'head', None), 'fc', None)
    pooling = target.backbone.out_type
    if not isinstance(fc, nn.Linear) or getattr(model, 'neck', None) is not None or pooling not in POOLING:
        raise ValueError(f'{type(model).__name__} on out_type={pooling!r}: timm and transformers have one linear layer '
                         f'on {" or ".join(POOLING)}, and no other heads of OpenMMLab; .onnx and .pt2 hold any')
    return fc


def describe(target: Target, source: Source, names: tuple[str, ...], family: str | None) -> Converted:
    """The backbone as `adala_mm.conversion` describes one, of the first fitting family of ``names``."""
    vit = target.backbone
    if not isinstance(vit, AdaLAViT) or isinstance(vit, QueryViT):
        raise ValueError(f'{type(vit).__name__} is no plain ViT: timm and transformers have no such model; .onnx and '
                         '.pt2 hold any')
    block, patch = vit.blocks[0], vit.patch_size
    if vit.rotary is not None or isinstance(block.mlp, SwiGLU):
        raise ValueError('rotary positions and gated MLPs (DINOv3) are not written for timm and transformers: .onnx '
                         'and .pt2 hold any ViT, and AdaLAViT reads the file as it is')
    act = type(block.mlp.act).__name__
    facts = {'act': ACTIVATIONS.get(act, act), 'norm_eps': vit.norm.eps}
    structure = {'class token': vit.class_token, 'registers': vit.reg_token is not None,
                 'LayerScale': isinstance(block.ls1, LayerScale),
                 'norm before the first block': isinstance(vit.norm_pre, nn.LayerNorm),
                 'rotary positions': False, 'positions for patches only': vit.no_embed_class}
    fitting = [name for name in names if FAMILIES[name].structure == structure
               and (FAMILIES[name].act, FAMILIES[name].norm_eps) == tuple(facts.values())]
    if not fitting or family not in (None, *fitting):
        seen = ', '.join(f'{"" if there else "no "}{part}' for part, there in structure.items())
        library = source.name.partition(',')[0]
        raise ValueError(f'a ViT with {seen}, act {facts["act"]} and norm eps {facts["norm_eps"]:g} is '
                         + (f'not of the family {family} but of {" or ".join(fitting)}' if fitting else
                            f'no model of {library} among {", ".join(names)} (docs/weights.md)'))
    height, width = (patch * side for side in vit.pos_grid)
    config = {'img_size': height if height == width else (height, width), 'patch_size': patch,
              'embed_dim': vit.embed_dim, 'depth': len(vit.blocks), 'num_heads': block.attn.num_heads,
              'mlp_ratio': block.mlp.fc1.out_features / vit.embed_dim}
    if vit.reg_token is not None:
        config['num_registers'] = vit.reg_token.shape[1]
    name = family or fitting[0]
    return Converted(vit.state_dict(), source, '', name, FAMILIES[name].licence, config, vit.pos_grid, ())


def their_names(ours: Converted) -> dict[str, Tensor]:
    """State dict of ``ours`` with the keys and shapes of its source, by the rules of conversion read backwards.

    It leaves out the parameters that only our attentions have.
    """
    state = {}
    for key, value in ours.state.items():
        if is_extra(key):
            continue
        parts = {key.replace('.qkv.', f'.{part}.'): value.chunk(3)[i] for i, part in enumerate('qkv')
                 } if '.qkv.' in key else {key: value}
        state |= {ours.source.own_key(name): part for name, part in parts.items()}
    position = ours.source.own_key('pos_embed')
    if ours.family.registers:  # theirs has a position for the class token as well
        first = torch.zeros_like(state[position][:, :1])
        state[position] = torch.cat([first, state[position]], dim=1)
        state['embeddings.mask_token'] = first[:, 0].clone()  # never used, always wanted
    if ours.source is TRANSFORMERS_CLIP:
        state[position] = state[position][0]
        if ours.family.class_token:
            token = ours.source.own_key('cls_token')
            state[token] = state[token].flatten()
    return {key: value.contiguous() for key, value in state.items()}


def logits(model: nn.Module) -> Run:
    """Images to class logits, in a tuple."""
    model.eval()
    return lambda image: (model(image),)


def features(model: nn.Module) -> Run:
    """Images to final normalised tokens, in a tuple."""
    vit, architecture = find_vit(model.eval())
    return lambda image: (architecture.features(vit, image),)
