"""Converts weights for `AdaLAViT`: finds structure and family, resizes, and compares with the source."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from timm.layers import resample_patch_embed
from torch import Tensor
from torch.nn import functional as F

from adala_mm.conversion import from_dinov3
from adala_mm.conversion.families import FAMILIES, Family
from adala_mm.conversion.from_dinov3 import TIMM_DINOV3
from adala_mm.conversion.from_timm import TIMM, facts, load_trunk, timm_vit
from adala_mm.conversion.keys import recognise, refuse, rename, require, some
from adala_mm.conversion.source import Converted, Source
from adala_mm.models.backbones.vit import AdaLAViT
from adala_mm.models.backbones.weights import resample_positions
from adala_mm.utils.checkpoint import recorded_grid
from adala_mm.utils.timm_models import refuse_other_rotary

PATCH_METHODS = ('flexi', 'bicubic')
# Heads by (width, width of the MLP) of the published plain ViTs; no weight shows them.
HEADS = {(192, 768): 3, (256, 1024): 4, (384, 1536): 6, (512, 2048): 8, (640, 2560): 10, (768, 3072): 12,
         (1024, 4096): 16, (1152, 4304): 16, (1280, 5120): 16, (1408, 6144): 16, (1536, 6144): 16, (1664, 8192): 16}


def convert(state: dict[str, Tensor], family: str | None = None, num_heads: int | None = None,
            img_size: tuple[int, int] | None = None, name: str | None = None,
            grid: tuple[int, int] | None = None) -> Converted:
    """Weights of any of `SOURCES` at their native size.

    Args:
        state: all tensors of the file, from `read_state_dict`.
        family: key of `FAMILIES`; needed where keys and shapes fit several.
        num_heads: needed for ViTs of unusual width only.
        img_size: (height, width) in pixels; it determines a grid of positions that is not square.
        name: timm's name of the model, whose facts are then timm's own.
        grid: (h, w) of the position embeddings in patches; None for what the file records, or the numbers allow.

    Raises:
        ValueError: for weights of no source or of several, unexplained, missing or mis-shaped keys, an architecture
            that `AdaLAViT` is not, and for a family that is ambiguous, unknown or another one.
    """
    if name is not None:
        refuse_other_rotary(name)
    refuse(state)
    source, prefix = recognise(state)
    ours, report = rename(state, source, prefix)
    report += arrange(ours, source)
    known = facts(name) if name and source in (TIMM, TIMM_DINOV3) else None
    config, grid = read_structure(ours, source, img_size, grid or recorded_grid(state, prefix))
    family_name = choose_family(ours, grid, source, family, known)
    chosen = FAMILIES[family_name]
    width, hidden = config['embed_dim'], ours['blocks.0.mlp.fc2.weight'].shape[1]
    usual = HEADS | from_dinov3.HEADS if chosen.rotary else HEADS
    heads = num_heads or (known and known['num_heads']) or usual.get((width, hidden))
    if heads is None:
        raise ValueError(f'a ViT of width {width} with an MLP of {hidden} is none of the published ones, and no weight '
                         'shows how many heads it has: give the number with --num-heads')
    config |= {'num_heads': heads, 'norm_eps': source.norm_eps or chosen.norm_eps}
    for key in ('class_token', 'no_embed_class', 'pre_norm', 'layer_scale', 'act'):
        if getattr(chosen, key) != getattr(Family, key):
            config[key] = getattr(chosen, key)
    if chosen.registers:
        config['num_registers'] = ours['reg_token'].shape[1]
        position = ours.get('pos_embed')
        if position is not None and position.shape[1] == grid[0] * grid[1] + 1:  # official, transformers: cls + pos[0]
            ours['cls_token'], ours['pos_embed'] = ours['cls_token'] + position[:, :1], position[:, 1:]
            report.append(('added', 1, "the class token's position is part of cls_token now"))
    if chosen.rotary:
        config |= {'qkv_bias': any(key.endswith('.attn.qkv.bias') for key in ours), 'rotary': {}}
        from_dinov3.check_periods(state, width // heads)
    check_exactly(ours, config, source)
    licence = f'{known["licence"]} (timm)' if known and known['licence'] else chosen.licence
    return Converted(ours, source, prefix, family_name, licence, config, grid, tuple(report))


def arrange(ours: dict[str, Tensor], source: Source) -> list[tuple[str, int, str]]:
    """Brings tensors that some sources store in another form into that of `AdaLAViT`, in place; returns report lines.

    The tokens are the same: a kernel over flattened patches (row, column, channel; SigLIP 2 NaFlex) is one of a
    convolution, and a distillation token, which stands behind the class token and has a position as that has, is a
    register, once the positions of both are added to them.

    Raises:
        ValueError: for flattened patches that are not square and of RGB.
    """
    report = []
    kernel = ours.get('patch_embed.proj.weight')
    if kernel is not None and kernel.ndim == 2:
        patch = math.isqrt(kernel.shape[1] // 3)
        if kernel.shape[1] != 3 * patch * patch:
            raise ValueError(f'{source.own_key("patch_embed.proj.weight")} has the shape {tuple(kernel.shape)}: not '
                             'flattened square patches of RGB images')
        ours['patch_embed.proj.weight'] = kernel.reshape(-1, patch, patch, 3).permute(0, 3, 1, 2)
        report.append(('reshaped', 1, f'patch kernel of flattened patches to one of {patch} x {patch} pixels'))
    if 'dist_token' in ours:
        require(ours, ('cls_token', 'pos_embed'), source)
        position = ours['pos_embed']
        ours['cls_token'] = ours['cls_token'] + position[:, :1]
        ours['reg_token'] = ours.pop('dist_token') + position[:, 1:2]
        ours['pos_embed'] = position[:, 2:]
        report.append(('added', 2, 'the positions of class and distillation token are part of them now, and the '
                                   'latter is a register'))
    return report


def read_structure(ours: dict[str, Tensor], source: Source, img_size: tuple[int, int] | None,
                   grid: tuple[int, int] | None = None) -> tuple[dict[str, Any], tuple[int, int]]:
    """Size of the ViT as arguments of `AdaLAViT`, and the grid of its position embeddings."""
    rotary, gated = FAMILIES[source.families[0]].rotary, any('.mlp.fc1_' in key for key in ours)
    require(ours, ('patch_embed.proj.weight', *(() if rotary else ('pos_embed',)), 'blocks.0.mlp.fc2.weight'), source)
    kernel, hidden = ours['patch_embed.proj.weight'], ours['blocks.0.mlp.fc2.weight'].shape[-1]
    width = kernel.shape[0]
    if kernel.ndim != 4 or kernel.shape[1] != 3 or kernel.shape[2] != kernel.shape[3]:
        raise ValueError(f'{source.own_key("patch_embed.proj.weight")} has the shape {tuple(kernel.shape)}: not square '
                         'patches of RGB images (in_channels=3)')
    patch = kernel.shape[-1]
    grid = grid_of(ours, source, patch, img_size, grid) if not rotary else grid or (from_dinov3.NATIVE // patch,) * 2
    depth = 1 + max(int(key.split('.')[1]) for key in ours if key.startswith('blocks.'))
    size = grid[0] * patch, grid[1] * patch
    config = {'img_size': size[0] if size[0] == size[1] else size, 'patch_size': patch, 'embed_dim': width,
              'depth': depth}
    if hidden != 4 * width:
        ratio = hidden / width
        config['mlp_ratio'] = ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
    if gated:
        config['swiglu'] = True
        if hidden % 8:
            config['swiglu_align_to'] = 1
    return config, grid


def grid_of(ours: dict[str, Tensor], source: Source, patch: int, img_size: tuple[int, int] | None,
            grid: tuple[int, int] | None) -> tuple[int, int]:
    """Grid (h, w) of the position embeddings: the one that is said, or the only one that their number allows."""
    positions = ours['pos_embed'].shape[1]
    counts = [positions - prefix for prefix in sorted({0, int('cls_token' in ours)})]
    squares = [(side, side) for count in counts if (side := math.isqrt(count)) ** 2 == count]
    wanted = img_size and (img_size[0] // patch, img_size[1] // patch)
    if grid is None:
        fits = wanted is not None and math.prod(wanted) in counts
        if fits and squares and wanted not in squares:
            raise ValueError(f'{source.own_key("pos_embed")} has {positions} entries, which may be a grid of '
                             f'{squares[0][0]}x{squares[0][1]} or, as --img-size has it, {wanted[0]}x{wanted[1]}: say '
                             f'which the file has with --grid HEIGHT WIDTH, in patches')
        grid = squares[0] if squares else wanted if fits else (0, 0)
    if math.prod(grid) not in counts or not grid[0]:
        token = f'{"a" if "cls_token" in ours else "no"} class token ({source.own_key("cls_token")})'
        stated = f'not a grid of {grid[0]}x{grid[1]}' if grid[0] else (
            'no square grid. If the ViT is not square, say its native size with --img-size HEIGHT WIDTH, or its grid '
            'with --grid HEIGHT WIDTH')
        raise ValueError(f'{source.own_key("pos_embed")} has {positions} entries, and there is {token}: that is '
                         f'{stated}')
    return grid


def choose_family(ours: dict[str, Tensor], grid: tuple[int, int], source: Source, family: str | None,
                  known: dict[str, Any] | None) -> str:
    """The only family that fits keys, shapes and timm's facts; raises ValueError if several fit, or none."""
    registers, class_token = 'reg_token' in ours, 'cls_token' in ours
    rotary = 'pos_embed' not in ours
    bare = not rotary and ours['pos_embed'].shape[1] == math.prod(grid)
    structure = {'class token': class_token, 'registers': registers,
                 'LayerScale': any(key.endswith('ls1.gamma') for key in ours),
                 'norm before the first block': any(key.startswith('norm_pre.') for key in ours),
                 'rotary positions': rotary,
                 # see `convert` for registers
                 'positions for patches only': class_token and not rotary and (registers or bare)}
    fitting = {name: row for name, row in FAMILIES.items() if row.structure == structure}
    seen = ', '.join(f'{"" if present else "no "}{part}' for part, present in structure.items())
    if family is not None and family not in FAMILIES:
        raise ValueError(f'unknown family {family!r}; choose one of {", ".join(FAMILIES)}')
    if not any(name in source.families for name in fitting):
        raise ValueError(f'a ViT with {seen} is of no known family of {source.name} weights '
                         f'({", ".join(source.families)}), so that none fits as --family')
    if family is not None:
        if family not in fitting:
            raise ValueError(f'these weights are not of the family {family}: they have {seen}. '
                             f'Families like that: {", ".join(fitting)}')
        return family
    width = ours['patch_embed.proj.weight'].shape[0]
    fitting = {name: row for name, row in fitting.items()
               if name in source.families and (not row.widths or width in row.widths)}
    if known is not None:
        if 'quickgelu' in known['notes'] and known['act'] != 'quick_gelu':
            raise ValueError(f'timm runs {known["name"]} with GELU, but notes: {known["notes"]}. Convert that one, or '
                             'choose with --family')
        fitting = {name: row for name, row in fitting.items() if same_facts(row, known)}
        for word in ('openai', 'mae'):  # not the same as OpenCLIP and DeiT by their licences alone
            if len(fitting) > 1:
                fitting = {name: row for name, row in fitting.items() if (word in name) == (word in known['name'])}
    if len(fitting) == 1:
        return next(iter(fitting))
    if not fitting:
        raise ValueError(f'timm says act {known["act"]}, norm eps {known["norm_eps"]:g} and mean, std '
                         f'{known["normalise"]}, which is no known family: choose the closest with --family')
    raise ValueError('the weights do not show of which family they are; choose with --family:\n'
                     + '\n'.join(f'  {name}: {replace(row, norm_eps=source.norm_eps or row.norm_eps)}'
                                 for name, row in fitting.items()))


def same_facts(family: Family, known: dict[str, Any]) -> bool:
    """Whether activation, norm and normalisation are those that timm states."""
    return (family.act == known['act'] and family.norm_eps == known['norm_eps']
            and torch.allclose(torch.tensor(family.normalise), torch.tensor(known['normalise']), atol=1e-3))


def check_exactly(ours: dict[str, Tensor], config: dict[str, Any], source: Source) -> None:
    """Raises ValueError, with the source's names, unless keys and shapes are those of the ViT that ``config`` makes."""
    with torch.device('meta'):
        wanted = AdaLAViT(**config, attention=dict(type='adala_mm.SoftmaxAttention')).state_dict()
    require(ours, wanted, source)
    extra = [source.own_key(key) for key in ours if key not in wanted]
    if extra:
        raise ValueError(f'{len(extra)} keys of {source.name} weights that this ViT has no place for: {some(extra)}')
    reshaped = [f'{source.own_key(key)} {tuple(ours[key].shape)} instead of {tuple(value.shape)}'
                for key, value in wanted.items() if ours[key].shape != value.shape]
    if reshaped:
        raise ValueError(f'{len(reshaped)} tensors of {source.name} weights have another shape: {some(reshaped)}')


def resample(converted: Converted, patch_size: int | None = None, method: str = 'flexi',
             img_size: tuple[int, int] | None = None) -> Converted:
    """Resamples a ViT for another patch size and another image size.

    Args:
        patch_size: P; None keeps it.
        method: ``flexi``, the pseudo-inverse of FlexiViT as in timm: tokens of a resized image stay what they were.
            ``bicubic`` resizes the kernel as a picture: tokens grow by about the ratio of the patch areas.
        img_size: (height, width) to which the position embeddings are resized, bicubic with antialiasing as in timm.
            None keeps their grid, so another patch size changes the image size.

    Raises:
        ValueError: for an unknown method, or a size that the patch does not divide.
    """
    if method not in PATCH_METHODS:
        raise ValueError(f'unknown patch method {method!r}; choose one of {", ".join(PATCH_METHODS)}')
    state, report, old = dict(converted.state), list(converted.report), converted.config['patch_size']
    patch = patch_size or old
    if patch != old:
        key = 'patch_embed.proj.weight'
        state[key] = (resample_patch_embed(state[key], [patch, patch]) if method == 'flexi' else
                      F.interpolate(state[key], size=(patch, patch), mode='bicubic', align_corners=False))
        report.append(('resampled', 1, f'patch kernel {old} -> {patch}, {method}'))
    grid = converted.grid
    if img_size is not None:
        if any(side < patch or side % patch for side in img_size):
            fits = ' x '.join(str(max(patch, round(side / patch) * patch)) for side in img_size)
            raise ValueError(f'an image of {img_size[0]} x {img_size[1]} cannot be cut into patches of {patch}; '
                             f'{fits} can')
        grid = img_size[0] // patch, img_size[1] // patch
    if grid != converted.grid and 'pos_embed' in state:
        prefix = 1 if 'cls_token' in state and not converted.family.no_embed_class else 0
        state['pos_embed'] = resample_positions(state['pos_embed'], converted.grid, grid, prefix)
        report.append(('resampled', 1, f'positions {"x".join(map(str, converted.grid))} -> '
                                       f'{"x".join(map(str, grid))}, bicubic, antialiased'))
    size = grid[0] * patch, grid[1] * patch
    config = converted.config | {'patch_size': patch, 'img_size': size[0] if size[0] == size[1] else size}
    return replace(converted, state=state, config=config, grid=grid, report=tuple(report))


@torch.no_grad()
def compare(converted: Converted, state: dict[str, Tensor], image: Tensor, name: str | None = None
            ) -> tuple[str, float, float]:
    """Final tokens of `AdaLAViT` against those of the source library's model with the same weights.

    Args:
        converted: what `convert` made of ``state``, at native size.
        image: (B, 3, H, W), normalised.
        name: timm's name of the model, if known.

    Returns:
        With what it was compared, the greatest difference, and the greatest value.
    """
    note, theirs = reference_of(converted, state, name)
    ours = AdaLAViT(**converted.config, attention=dict(type='adala_mm.SoftmaxAttention'))
    ours.load_state_dict(converted.state)
    wanted = theirs(image)
    difference = (ours.eval().forward_features(image) - wanted).abs().max()
    return note, difference.item(), wanted.abs().max().item()


def reference_of(converted: Converted, state: dict[str, Tensor], name: str | None = None
                 ) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The source library's model; timm's with the converted weights where that library is missing."""
    try:
        return converted.source.reference(converted, state, name)
    except ImportError as error:
        twin = (from_dinov3.converted_in_timm(converted) if converted.family.rotary else
                load_trunk(timm_vit(converted), converted.state))
        return f'timm with the converted weights, as {error.name or error} is not installed', twin
