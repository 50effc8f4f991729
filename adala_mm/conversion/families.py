"""Facts that files of weights do not contain: one row for each family of pretrained ViTs."""
from __future__ import annotations

from dataclasses import dataclass

HALF = ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5))
IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
CLIP = ((122.7709383, 116.7460125, 104.09373615), (68.5005327, 66.6321579, 70.32316305))
SATELLITE = ((109.65, 104.805, 75.48), (54.315, 39.78, 36.465))
OF_THE_WEIGHTS = 'of the weights (LAION, DataComp: MIT; MetaCLIP: CC-BY-NC-4.0; DFN: Apple)'


@dataclass(frozen=True)
class Family:
    """Facts of one family of ViTs.

    Args:
        about: a short description.
        normalise: (mean, std) of the images, per RGB channel of 0 ... 255.
        licence: of the published weights.
        patch: patch sizes of the published weights.
        norm_eps: epsilon of every LayerNorm.
        act: activation of the MLP, as `AdaLAViT` names it.
        layer_scale: initial LayerScale, or None for none; the value itself comes with the weights.
        class_token, registers, no_embed_class, pre_norm, rotary: as in `AdaLAViT`; ``registers`` and ``rotary`` say
            whether there are any.
        widths: of the published weights, where another family has the same structure in more of them.
        configs: files of ``configs/_base_/backbones`` that state the same facts.
    """

    about: str
    normalise: tuple[tuple[float, ...], tuple[float, ...]]
    licence: str
    patch: str
    norm_eps: float = 1e-6
    act: str = 'gelu'
    layer_scale: float | None = None
    class_token: bool = True
    registers: bool = False
    no_embed_class: bool = False
    pre_norm: bool = False
    rotary: bool = False
    widths: tuple[int, ...] = ()
    configs: tuple[str, ...] = ()

    @property
    def structure(self) -> dict[str, bool]:
        """The facts of a family that the keys and shapes of a file show."""
        return {'class token': self.class_token, 'registers': self.registers,
                'LayerScale': self.layer_scale is not None, 'norm before the first block': self.pre_norm,
                'rotary positions': self.rotary, 'positions for patches only': self.no_embed_class}

    def __str__(self) -> str:
        mean, std = ('/'.join(f'{value:g}' for value in values) for values in self.normalise)
        return f'{self.about}; {self.act}, norm eps {self.norm_eps:g}, mean {mean}, std {std}'


FAMILIES = {
    'augreg': Family('supervised ViT of Steiner et al. 2021', HALF, 'Apache-2.0', '8, 16, 32', configs=('in1kl',)),
    'deit': Family('DeiT and other plain ViTs with ImageNet mean and std', IMAGENET, 'Apache-2.0', '16',
                   configs=('deitt',)),
    'deit_distilled': Family('distilled DeiT; the distillation token is a register', IMAGENET, 'Apache-2.0', '16',
                             registers=True, no_embed_class=True),
    'mae': Family('encoder of MAE', IMAGENET, 'CC-BY-NC-4.0', '14, 16'),
    'dinov2': Family('DINOv2', IMAGENET, 'Apache-2.0', '14', layer_scale=1e-5,
                     configs=('dinov2b', 'dinov2l', 'dinov2s')),
    'dinov2_reg': Family('DINOv2 with registers', IMAGENET, 'Apache-2.0', '14', layer_scale=1e-5, registers=True,
                         no_embed_class=True),
    'dinov3': Family('DINOv3, pretrained on LVD-1689M', IMAGENET, 'DINOv3 License', '16', 1e-5, layer_scale=1e-5,
                     registers=True, rotary=True, configs=('dinov3b', 'dinov3l', 'dinov3s')),
    'dinov3_sat': Family('DINOv3 ViT-L and 7B, pretrained on satellite images (SAT-493M)', SATELLITE, 'DINOv3 License',
                         '16', 1e-5, layer_scale=1e-5, registers=True, rotary=True, widths=(1024, 4096)),
    'clip_openai': Family("OpenAI's CLIP", CLIP, 'MIT', '14, 16, 32', 1e-5, 'quick_gelu', pre_norm=True,
                          configs=('clipl',)),
    'openclip': Family('OpenCLIP', CLIP, OF_THE_WEIGHTS, '14, 16, 32', 1e-5, pre_norm=True),
    'openclip_quickgelu': Family('OpenCLIP models named quickgelu', CLIP, OF_THE_WEIGHTS, '14, 16, 32', 1e-5,
                                 'quick_gelu', pre_norm=True),
    'openclip_half': Family('OpenCLIP ViT-L/14 on LAION-2B, with mean and std of 1/2', HALF, 'MIT', '14', 1e-5,
                            pre_norm=True),
    'siglip': Family('SigLIP and SigLIP 2 with exact GELU, as timm runs B/16, So400m/14, and L/16 below 512 px', HALF,
                     'Apache-2.0', '14, 16', class_token=False, configs=('siglipl',)),
    'siglip_tanh': Family('SigLIP and SigLIP 2 with tanh GELU, as trained and as transformers runs all of them', HALF,
                          'Apache-2.0', '14, 16, 32', act='gelu_tanh', class_token=False,
                          configs=('siglip2b', 'siglip2l')),
}
