from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import EpochBasedTrainLoop, Runner

from adala_mm.models.algorithms.base import Alignment
from adala_mm.registry import HOOKS


@HOOKS.register_module()
class ProgressiveResolutionHook(Hook):
    """Aligns on small images first and at full size last, so most of the training costs a fraction.

    Images of a batch are resized (bicubic, antialiased) after loading, for student and teacher alike.

    Args:
        sizes: epoch (from 0) from which a side in pixels holds, for instance ``{0: 256, 20: 384, 26: 512}``.

    Raises:
        ValueError: if there is none for epoch 0, a side is no multiple of the backbone's patch, the model is no
            alignment stage, or the training loop counts no epochs.
    """

    def __init__(self, sizes: dict[int, int]) -> None:
        if 0 not in sizes:
            raise ValueError(f'sizes={sizes} says nothing about epoch 0')
        self.sizes = dict(sorted(sizes.items()))

    def before_train(self, runner: Runner) -> None:
        loop = runner.train_loop
        if not isinstance(loop, EpochBasedTrainLoop):
            raise ValueError(f'ProgressiveResolutionHook changes the size by epoch, and {type(loop).__name__} counts '
                             "none: use train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=...)")

    def before_train_epoch(self, runner: Runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if not isinstance(model, Alignment):
            raise ValueError(f'ProgressiveResolutionHook is for AttentionAlignment and FeatureAlignment, not for '
                             f'{type(model).__name__}')
        for side in self.sizes.values():
            if side % model.backbone.patch_size:
                raise ValueError(f'sizes={self.sizes}: {side} is no multiple of the patch size '
                                 f'{model.backbone.patch_size}')
        model.resolution = next(side for epoch, side in reversed(self.sizes.items()) if epoch <= runner.epoch)
