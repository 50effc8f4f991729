"""What a block adds to its stream: ``m = x + s1 * proj(f)``, then ``m + s2 * fc2(g)``, and where f, g and s are."""
from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

from torch import Tensor, nn

from adala_mm.adapters.base import OUTPUTS, find_part
from adala_mm.models.attentions import Attention

HIDDEN = ('mlp.fc2', 'mlp.weights_out', 'mlp.down_proj', 'output.dense', 'ffn.layers.1', 'ffn.w3')
HF = 'transformers.models.'
# Class of the block -> what reads m, and the LayerScales s1 and s2, if the model has them.
BLOCKS = {
    'timm.models.vision_transformer.Block': ('norm2', 'ls1.gamma', 'ls2.gamma'),
    'timm.models.eva.EvaBlock': ('norm2', 'gamma_1', 'gamma_2'),
    f'{HF}dinov2.modeling_dinov2.Dinov2Layer': ('norm2', 'layer_scale1.lambda1', 'layer_scale2.lambda1'),
    f'{HF}dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersLayer': (
        'norm2', 'layer_scale1.lambda1', 'layer_scale2.lambda1'),
    f'{HF}dinov3_vit.modeling_dinov3_vit.DINOv3ViTLayer': ('norm2', 'layer_scale1.lambda1', 'layer_scale2.lambda1'),
    f'{HF}eomt.modeling_eomt.EomtLayer': ('norm2', 'layer_scale1.lambda1', 'layer_scale2.lambda1'),
    f'{HF}vit.modeling_vit.ViTLayer': ('layernorm_after', '', ''),
    f'{HF}deit.modeling_deit.DeiTLayer': ('layernorm_after', '', ''),
    f'{HF}dpt.modeling_dpt.DPTViTLayer': ('layernorm_after', '', ''),
    f'{HF}clip.modeling_clip.CLIPEncoderLayer': ('layer_norm2', '', ''),
    f'{HF}siglip.modeling_siglip.SiglipEncoderLayer': ('layer_norm2', '', ''),
    'mmpretrain.models.backbones.vision_transformer.TransformerEncoderLayer': (
        'ln2', 'attn.gamma1.weight', 'ffn.gamma2.weight'),
    'adala_mm.models.backbones.vit.Block': ('norm2', 'ls1.gamma', 'ls2.gamma'),
}


@dataclass(frozen=True)
class Residual:
    """A layer whose output (B, N, C) is added to the stream, ``scale`` (C,) times if there is one."""

    layer: nn.Linear
    scale: Tensor | None


def middle_of(block: nn.Module) -> nn.Module:
    """What reads the stream between attention and MLP.

    Raises:
        TypeError: for a block of another kind, whose stream is not such a sum.
    """
    return block.get_submodule(_names_of(block)[0])


def residuals_of(block: nn.Module, attn: nn.Module) -> tuple[Residual, Residual]:
    """The output projection of the attention and the second matrix of the MLP.

    Raises:
        TypeError: as `middle_of`; for an attention that does more after its projection, or layers that are no
            ``nn.Linear`` (quantized, with LoRA).
    """
    late = tuple(attn.after_proj) if isinstance(attn, Attention) else ()
    if found := [name for name, _ in attn.named_parameters() if late and name.startswith(late)]:
        raise TypeError(f'{type(attn).__name__} does not end in its output projection ({found[0]} comes after it): it '
                        'has no closed form. LoRA can be merged first (merge_lora)')
    _, *scales = _names_of(block)
    layers = find_part(attn, OUTPUTS), find_part(block, HIDDEN)
    for layer in layers:
        if not (isinstance(layer, nn.Linear) and layer.weight.is_floating_point()):
            raise TypeError(f'{type(layer).__name__} stands where {type(block).__name__} has nn.Linear: only plain '
                            'matrices can be refitted')
    return tuple(Residual(layer, _parameter(block, name)) for layer, name in zip(layers, scales, strict=True))


def _names_of(block: nn.Module) -> tuple[str, str, str]:
    kind = f'{type(block).__module__}.{type(block).__qualname__}'
    if kind not in BLOCKS:
        raise TypeError(f'a block of class {kind} is none whose stream is known to be a sum: calibration supports '
                        f'{", ".join(name.rsplit(".", 1)[1] for name in BLOCKS)}')
    return BLOCKS[kind]


def _parameter(block: nn.Module, path: str) -> Tensor | None:
    return reduce(lambda part, name: getattr(part, name, None), path.split('.'), block) if path else None
