"""Alignment of a whole task model (ViT-AdaLA section 4.3.3): a fine-tuned segmentor or classifier becomes linear."""
from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from mmengine.config import ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from adala_mm.models.algorithms.attention_alignment import attention_mse
from adala_mm.models.algorithms.base import Distillation, relative_error
from adala_mm.models.algorithms.feature_alignment import check_attention_weight, check_last_block
from adala_mm.models.algorithms.feature_terms import feature_terms, term_weights, weighted_sum
from adala_mm.models.backbones.vit import AdaLAViT
from adala_mm.models.backbones.weights import misfits, note_loaded, positions_for
from adala_mm.registry import MODELS
from adala_mm.utils.checkpoint import read_state_dict

HEADS = ('decode_head', 'head')  # as mmseg and mmpretrain call them


@contextmanager
def outputs_of(modules: Mapping[str, nn.Module]) -> Iterator[dict]:
    """Keeps what each module returned last, by name. No hooks: mmseg's heads call their ``forward`` past them."""
    kept, before = {}, {name: vars(module).get('forward') for name, module in modules.items()}

    def watched(name: str, forward):
        def call(*args, **kwargs):
            kept[name] = forward(*args, **kwargs)
            return kept[name]
        return call

    try:
        for name, module in modules.items():
            module.forward = watched(name, module.forward)
        yield kept
    finally:
        for name, module in modules.items():
            if before[name] is None:
                vars(module).pop('forward', None)
            else:
                module.forward = before[name]


def as_tokens(feature: Tensor) -> Tensor:
    """A map (B, C, h, w), a vector (B, C) or tokens (B, N, C), as tokens."""
    return {2: lambda x: x[:, None], 3: lambda x: x, 4: lambda x: x.flatten(2).transpose(1, 2)}[feature.ndim](feature)


def class_divergence(student: Tensor, teacher: Tensor, dim: int, temperature: float) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))`` over ``dim``, the mean over everything else."""
    student, teacher = ((logits.float() / temperature).log_softmax(dim) for logits in (student, teacher))
    return temperature ** 2 * F.kl_div(student, teacher, reduction='none', log_target=True).sum(dim).mean()


def mask_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2`` times the mean of ``KL(Bernoulli(sigmoid(teacher / T)) || Bernoulli(sigmoid(student / T)))``."""
    student, teacher = student.float() / temperature, teacher.float() / temperature
    with torch.no_grad():
        wanted = teacher.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(teacher, wanted)
    return temperature ** 2 * (F.binary_cross_entropy_with_logits(student, wanted) - entropy)


def logits_divergence(student, teacher, temperature: float = 1.0) -> Tensor:
    """What a head's outputs have lost: 0 where they are the same.

    Args:
        student, teacher: logits (B, K) or (B, K, h, w), for `class_divergence`; or Mask2Former's, class logits
            (B, Q, K + 1) and mask logits (B, Q, h, w) of all decoder layers. These are compared query by query: both
            heads have the same queries. Classes and masks count the same, and all layers.
        temperature: T.
    """
    if isinstance(student, Tensor):
        return class_divergence(student, teacher, 1, temperature)
    (classes, masks), (wanted_classes, wanted_masks) = student, teacher
    parts = [class_divergence(got, wanted, -1, temperature)
             for got, wanted in zip(classes, wanted_classes, strict=True)]
    parts += [mask_divergence(got, wanted, temperature) for got, wanted in zip(masks, wanted_masks, strict=True)]
    return 2 * torch.stack(parts).mean()


@MODELS.register_module()
class TaskModelAlignment(Distillation):
    """Aligns a task model with linear attention with the fine-tuned softmax one (ViT-AdaLA section 4.3.3).

    ``loss = backbone features + pyramid + logits + task_weight * task loss + attention_weight * stage 1``, each if it
    has a weight, all against the frozen teacher but the task loss, which reads labels. Features are compared where the
    head reads them: what the backbone returns by its ``out_indices`` and ``out_type``. The paper compares them alone.

    A config of a segmentor or classifier becomes one of its alignment by ``type``, ``task_model`` and ``teacher``; all
    other keys stay what and where they are. So do the names of its weights: a checkpoint is one of the plain model, for
    its own config, ``tools/test.py`` and all else. Labels are read by ``task_weight`` and in validation, which scores
    the student by the metric of its task.

    The teacher is the same network with softmax attention in every block. What stands behind the backbone starts as a
    copy of the teacher's; the backbone starts from its own ``init_cfg``: the teacher's checkpoint, or better, that of
    stage 1 with the teacher's checkpoint as its ``init_cfg``.

    Args:
        task_model: type of the model, such as ``EncoderDecoder`` or ``ImageClassifier``.
        teacher: ``dict(type='Pretrained', checkpoint=<that of the whole fine-tuned softmax model>)``.
        features: weights of the terms on the backbone's outputs, as ``loss`` of `FeatureAlignment`; ``dict(mse=1.0)``
            unless given, ``{}`` for none. The mean over different outputs.
        pyramid: the same on the outputs of the neck.
        logits: weight of `logits_divergence`. Costs a pass through the teacher's head, and for Mask2Former memory for
            two sets of mask logits.
        temperature: of the logits.
        task_weight: weight of the model's own losses.
        attention_weight: of the loss of stage 1 (`attention_mse`: what it costs); with ``task_weight`` this is stage 3
            with attention alignment kept on, as in "Copy the Same, Distill the Difference" (50 there).
        trainable: regular expression; parameters of the model whose names it does not find are frozen. Only the
            backbone learns by default. A neck or head that nothing in the loss reads may not.
        **model: what else the model's config has.

    Rotary positions of the backbone are not disturbed in training: the teacher's are not.

    Logs the losses as ``loss_features``, ``loss_pyramid``, ``loss_logits``, ``loss_attention`` and ``task.*``, weights
    included, and ``rel_error = ||student - teacher|| / ||teacher||`` of the features.

    Raises:
        ValueError: for bad weights or terms, none at all, a ``pyramid`` without a neck, ``logits`` without a head, a
            ``trainable`` that matches nothing, or matches what gets no gradient (blocks behind the last of the
            backbone's ``out_indices``, for instance); in ``init_weights``, if the backbone has no pretrained weights,
            or the teacher's checkpoint does not fit, key by key.
    """

    def __init__(self, task_model: str, teacher: dict, features: Mapping[str, float] | None = None,
                 pyramid: Mapping[str, float] | None = None, logits: float = 0.0, temperature: float = 1.0,
                 task_weight: float = 0.0, attention_weight: float = 0.0, trainable: str | None = r'^backbone\.',
                 **model) -> None:
        if not isinstance(teacher, Mapping) or set(teacher) != {'type', 'checkpoint'} or (
                teacher['type'] != 'Pretrained'):
            raise ValueError("teacher must be dict(type='Pretrained', checkpoint=<that of the whole fine-tuned softmax "
                             f'model>), got {teacher}')
        twin = copy.deepcopy(model)
        # A new dict: MMEngine's `update` would keep the options of the linear attention.
        twin['backbone'] = dict(twin['backbone'], attention=dict(type='adala_mm.SoftmaxAttention'), init_cfg=None,
                                trainable=None, with_cp=False)
        if attention_weight:
            twin['backbone'].update(compile=False)  # see `attention_mse`
        task = MODELS.build(ConfigDict(model, type=task_model))  # mmseg reads attributes of test_cfg
        super().__init__(task.data_preprocessor)
        for name, part in task.named_children():
            setattr(self, name, part)
        # Its parts are ours, under the same names; as a submodule it would be there twice.
        object.__setattr__(self, 'task', task)
        self.freeze('teacher', MODELS.build(ConfigDict(twin, type=task_model)))
        self.checkpoint = teacher['checkpoint']

        self.features = term_weights('features', dict(mse=1.0) if features is None else features)
        self.pyramid = term_weights('pyramid', pyramid)
        numbers = dict(logits=logits, task_weight=task_weight, attention_weight=attention_weight)
        for name, weight in numbers.items():
            if not 0 <= weight < float('inf'):
                raise ValueError(f'{name}={weight} must be a number from 0 up')
        if not (self.features or self.pyramid or any(numbers.values())):
            raise ValueError('nothing to learn: give features, pyramid, logits, task_weight or attention_weight a '
                             'weight above 0')
        if temperature <= 0:
            raise ValueError(f'temperature={temperature} must be above 0')
        self.logits, self.task_weight, self.attention_weight = logits, task_weight, attention_weight
        self.temperature = temperature
        self.head_name = next((name for name in HEADS if getattr(self, name, None) is not None), None)
        if self.pyramid and getattr(self, 'neck', None) is None:
            raise ValueError(f'pyramid compares the outputs of a neck, and this {task_model} has none: compare the '
                             'features of its backbone, which the head reads')
        if logits and self.head_name is None:
            raise ValueError(f'logits compares the outputs of a {" or ".join(HEADS)}, and this {task_model} has none')
        self._choose_learners(trainable)
        check_attention_weight(attention_weight, self.backbone)
        if isinstance(self.backbone, AdaLAViT):
            check_last_block('out_indices', attention_weight, self.backbone)

    def _choose_learners(self, trainable: str | None) -> None:
        chosen = {name for name, _ in self.named_parameters() if trainable is None or re.search(trainable, name)}
        if not chosen:
            raise ValueError(f'trainable={trainable!r} matches no parameter of the model; names look like '
                             f'{next(name for name, _ in self.named_parameters())}')
        behind_head = bool(self.logits or self.task_weight)
        behind_neck = bool(behind_head or self.pyramid)
        read = {'backbone': bool(behind_neck or self.features), 'neck': behind_neck, self.head_name: behind_head}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name in chosen)
            part = name.split('.')[0]
            got = read.get(part, bool(self.task_weight)) or (self.attention_weight > 0 and '.attn.' in name)
            if parameter.requires_grad and not got:
                raise ValueError(f'trainable={trainable!r} lets {name} learn, and no loss reads it. For a backbone, '
                                 'give features, pyramid, logits or task_weight a weight above 0; for a neck, one of '
                                 'the last three; for a head, one of the last two. Or let trainable leave it out')

    def init_weights(self) -> None:
        self.prepare_teacher()
        if self._is_init:
            return
        self.require_pretrained('backbone', self.backbone)
        self.backbone.init_weights()
        behind = {key: value for key, value in self.frozen['teacher'].state_dict().items()
                  if not key.startswith('backbone.')}
        self.load_state_dict(behind, strict=False)  # the backbone's are missing, and the teacher has no others
        self._is_init = True

    def read_teacher(self) -> dict[str, Tensor]:
        """The weights of the teacher's file, with positions for the grid of this model."""
        state = read_state_dict(self.checkpoint)
        return positions_for(self.frozen['teacher'], state)

    def load_teacher(self) -> None:
        teacher, state = self.frozen['teacher'], self.read_teacher()
        if table := misfits({key: tuple(value.shape) for key, value in state.items()},
                            {key: tuple(value.shape) for key, value in teacher.state_dict().items()}):
            raise ValueError(f'{self.checkpoint} does not fit the teacher, which is this model with softmax attention:'
                             f'\n{table}\nIs it the fine-tuned model, as a whole, of the same config?')
        teacher.load_state_dict(state)
        note_loaded(teacher, state)

    def train(self, mode: bool = True) -> TaskModelAlignment:
        """Parts of which nothing learns stay in eval mode: copies of the teacher's, they answer as the teacher's do."""
        super().train(mode)
        for part in self.children():
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        self.task.training = mode
        return self

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = 'tensor'):
        """As of the task model, but ``mode='loss'`` is `loss`."""
        return self.loss(inputs, data_samples) if mode == 'loss' else self.task(inputs, data_samples, mode=mode)

    def _run(self, model: nn.Module, images: Tensor, samples: list | None, task_loss: bool) -> tuple[dict, dict]:
        """What is compared, by name, and the model's own losses, in one pass that goes no further than it must."""
        head = getattr(model, self.head_name or '', None)
        watched = dict(features=model.backbone) | (dict(pyramid=model.neck) if self.pyramid else {}) | (
            dict(logits=head) if self.logits else {})
        losses = {}
        with outputs_of(watched) as kept:
            if task_loss:
                losses = model.loss(images, samples)
            elif self.logits:
                wants_samples = 'batch_data_samples' in inspect.signature(type(head).forward).parameters
                head(model.extract_feat(images), *([samples] if wants_samples else []))
            elif self.pyramid:
                model.extract_feat(images)
            else:
                model.backbone(images)
        return kept, losses

    def loss(self, images: Tensor, data_samples: list | None = None) -> dict[str, Tensor]:
        """Losses under names with ``loss``, which add up; all other keys are for reading only."""
        self.prepare_teacher()
        losses, teacher = {}, self.frozen['teacher']
        reports = attention_mse(self.backbone, teacher.backbone) if self.attention_weight else nullcontext()
        with reports as attention, torch.no_grad():
            wanted, _ = self._run(teacher, images, data_samples, task_loss=False)
        got, own = self._run(self.task, images, data_samples, task_loss=self.task_weight > 0)
        for name, weights in (('features', self.features), ('pyramid', self.pyramid)):
            if weights:
                losses[f'loss_{name}'] = self._compare(got[name], wanted[name], weights)
        if self.logits:
            losses['loss_logits'] = self.logits * logits_divergence(got['logits'], wanted['logits'], self.temperature)
        if self.attention_weight:
            losses['loss_attention'] = self.attention_weight * torch.stack(attention).mean()
        for name, value in own.items():
            if 'loss' in name:
                value = [self.task_weight * v for v in value] if isinstance(value, list) else self.task_weight * value
            losses[f'task.{name}'] = value
        errors = [relative_error(*pair) for pair in zip(got['features'], wanted['features'], strict=True)]
        return losses | {'rel_error': torch.stack(errors).mean()}

    def _compare(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], weights: dict[str, float]) -> Tensor:
        # A backbone may hand one and the same output to several levels of a pyramid: it counts once.
        pairs = {id(got): (as_tokens(got), as_tokens(wanted)) for got, wanted in zip(student, teacher, strict=True)}
        sums = [weighted_sum(weights, feature_terms(weights, *pair)) for pair in pairs.values()]
        return torch.stack(sums).mean()
