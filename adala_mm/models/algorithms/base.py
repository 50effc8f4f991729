"""What all alignments share: a frozen teacher beside the student, the losses and errors, and a common score."""
from __future__ import annotations

import torch
from mmengine.dist import all_reduce_dict
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.nn import functional as F

from adala_mm.models.backbones.vit import pooled
from adala_mm.ops import RotaryPositions
from adala_mm.registry import MODELS
from adala_mm.utils.checkpoint import read_state_dict


def in_full_precision(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32, or in float64 if the teacher is."""
    wide = torch.promote_types(teacher.dtype, torch.float32)
    return student.to(wide), teacher.to(wide)


def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean (student - teacher)^2`` over all elements: what stages 1 and 2 make small.

    For the outputs of the attentions of block l it is the term of that block in ViT-AdaLA eq. 3, ``mean_{n,c}
    (linear_l(h_l) - softmax_l(h_l))^2``; the loss of stage 1 is the mean of these terms over blocks. For final tokens
    it is eq. 4, the loss of stage 2.
    """
    return F.mse_loss(*in_full_precision(student, teacher))


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """``||student - teacher|| / ||teacher||`` over all elements: 0 is identical, 1 is as bad as all zeros."""
    student, teacher = in_full_precision(student.detach(), teacher.detach())
    return (student - teacher).norm() / teacher.norm().clamp_min(1e-12)


class Distillation(BaseModel):
    """A model that learns from a frozen teacher.

    The teacher is kept in a plain dict (`frozen`), not as a submodule. So it is by construction in no optimizer, no
    DDP bucket, no checkpoint, and no ``train()`` call reaches it; it only follows the model's device and dtype.
    Rotary positions of the student stay where the teacher's are: they are not disturbed in training.
    """

    def __init__(self, data_preprocessor: dict | nn.Module | None = None) -> None:
        super().__init__(data_preprocessor)
        self.frozen: dict[str, nn.Module] = {}
        self.teacher_ready = False

    def train(self, mode: bool = True) -> Distillation:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, RotaryPositions):
                module.eval()
        return self

    def freeze(self, name: str, module: nn.Module) -> None:
        """Holds ``module`` as a frozen part of the teacher."""
        self.frozen[name] = module.requires_grad_(False).eval()

    def _apply(self, fn, recurse: bool = True):  # what .to(), .cuda() and .half() call
        for module in self.frozen.values():
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def prepare_teacher(self) -> None:
        """Loads the teacher from its own checkpoint, once; testing a student's checkpoint needs it as training does."""
        if not self.teacher_ready:
            self.load_teacher()
            self.teacher_ready = True

    def load_teacher(self) -> None:
        """Loads what is kept in `frozen`."""
        raise NotImplementedError

    @staticmethod
    def require_pretrained(role: str, network: nn.Module) -> None:
        """Raises ValueError if ``network`` would start from random weights: there is nothing to align with."""
        if (network.init_cfg or {}).get('type') != 'Pretrained':
            raise ValueError(f"the {role} has no pretrained weights: alignment would distil noise. Give its config "
                             "init_cfg=dict(type='Pretrained', checkpoint=...)")

    def parse_losses(self, losses: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """As MMEngine's, but what is logged is the mean over all processes, not the share of the first."""
        loss, log = super().parse_losses(losses)
        log = {key: value.detach().clone() for key, value in log.items()}
        all_reduce_dict(log, op='mean')
        return loss, log


class Alignment(Distillation):
    """Base of both stages.

    Args:
        backbone: config of the student, with ``init_cfg=dict(type='Pretrained', ...)``.
        head: optional classification head of the teacher, ``dict(checkpoint=..., out_type='cls_token' |
            'avg_featmap')``; validation then reports how often student and teacher agree on the top class.
        data_preprocessor: normalisation of the images, MMEngine's ``ImgDataPreprocessor`` or another one.

    Raises:
        ValueError: for a ``head`` with other keys or an ``out_type`` that the backbone has not, and in
            ``init_weights``, if a network has no pretrained weights to start from.
    """

    def __init__(self, backbone: dict, head: dict | None = None, data_preprocessor: dict | None = None) -> None:
        super().__init__(data_preprocessor)
        self.backbone = MODELS.build(backbone)
        self.resolution: int | None = None  # side to which training images are brought; None leaves them as they are
        self.head = None
        if head is not None:
            self.head = {'out_type': 'cls_token', **head}
            kinds = ('cls_token', 'avg_featmap') if self.backbone.class_token else ('avg_featmap',)
            if set(self.head) != {'checkpoint', 'out_type'} or self.head['out_type'] not in kinds:
                raise ValueError(f'head must be dict(checkpoint=<file>, out_type=<{" or ".join(kinds)}>), got {head}')

    def init_weights(self) -> None:
        self.require_pretrained('backbone', self.backbone)
        self.prepare_teacher()
        super().init_weights()

    def prepare_teacher(self) -> None:
        if self.head is not None and not self.teacher_ready:
            state = read_state_dict(self.head['checkpoint'])
            if 'head.weight' not in state:
                raise ValueError(f'{self.head["checkpoint"]} has no classification head (head.weight, head.bias): name '
                                 'a file that has one, or leave head out')
            weight, bias = state['head.weight'], state.get('head.bias')
            classifier = nn.Linear(*reversed(weight.shape), bias=bias is not None)
            classifier.load_state_dict({'weight': weight} | ({} if bias is None else {'bias': bias}))
            self.freeze('head', classifier.to(next(self.parameters())))
        super().prepare_teacher()

    def teacher_features(self, images: Tensor) -> Tensor:
        """Final normalised tokens (B, N, C) of the frozen softmax ViT."""
        raise NotImplementedError

    def loss(self, images: Tensor) -> dict[str, Tensor]:
        """The stage's loss under ``loss``; all other keys are for reading only."""
        raise NotImplementedError

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = 'tensor'):
        """Images (B, 3, H, W) to final tokens (``tensor``), losses (``loss``) or one score per image (``predict``)."""
        if mode in ('loss', 'predict'):
            self.prepare_teacher()
        if mode == 'loss':
            if self.resolution is not None:
                inputs = F.interpolate(inputs, (self.resolution,) * 2, mode='bicubic', antialias=True)
            return self.loss(inputs)
        features = self.backbone.forward_features(inputs)
        if mode == 'tensor':
            return features
        if mode == 'predict':
            return self.compare(features, self.teacher_features(inputs))
        raise ValueError(f'unknown mode {mode!r}; choose one of loss, predict, tensor')

    def compare(self, student: Tensor, teacher: Tensor) -> list[dict]:
        """What metrics read of each image.

        For `AlignmentMetric` squared error and norm of the tokens, mean cosine, agreement; for `KNNMetric` one feature
        (C,) of both, ``pooled``.
        """
        student, teacher = student.float(), teacher.float()
        columns = {
            'error': (student - teacher).square().sum(dim=(1, 2)),
            'energy': teacher.square().sum(dim=(1, 2)),
            'cosine': torch.cosine_similarity(student, teacher, dim=-1).mean(dim=1),
        }
        if 'head' in self.frozen:
            columns['agree'] = (self._top_class(student) == self._top_class(teacher)).float()
        # A row that is a view would be sent to other processes with all tokens of the batch.
        vit = self.backbone
        pairs = zip(*([row.clone() for row in pooled(tokens, vit.num_prefix, vit.class_token).cpu()]
                      for tokens in (student, teacher)), strict=True)
        return [dict(zip(columns, row, strict=True), pooled=pair)
                for row, pair in zip(zip(*(c.tolist() for c in columns.values()), strict=True), pairs, strict=True)]

    def _top_class(self, tokens: Tensor) -> Tensor:
        feature = pooled(tokens, self.backbone.num_prefix, self.head['out_type'] == 'cls_token')
        return self.frozen['head'](feature).argmax(dim=-1)
