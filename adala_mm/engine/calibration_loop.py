from __future__ import annotations

import itertools
from typing import Any

from mmengine.dist import get_world_size
from mmengine.model import is_model_wrapper
from mmengine.runner import IterBasedTrainLoop, Runner

from adala_mm.calibration import RIDGE, Calibration
from adala_mm.models.algorithms import FeatureAlignment
from adala_mm.pairing import find_pair
from adala_mm.registry import LOOPS


@LOOPS.register_module()
class CalibrationLoop(IterBasedTrainLoop):
    """Calibration as a training run: an iteration refits a block in closed form, `Calibration` says how.

    The model is that of stage 2 (`FeatureAlignment`), its backbone the student; checkpoints are those of stage 2, too,
    so that this can start from them. Images are read in the first iteration; a resumed run reads them again. An
    optimizer, which MMEngine asks for, has nothing to do; a mixed precision of its wrapper holds.

    Memory: 8 N C bytes of host memory an image for both streams in float32, a process holding its share (for a ViT-L at
    512 x 512, 1,025 tokens, 512 images are 4.0 GiB), and that of one block without gradients.

    Args:
        runner, dataloader: MMEngine's.
        max_iters: how many blocks, from the first on.
        images: how many to read, of all processes together, rounded up to whole batches; no more than an epoch.
        mlp, ridge, patches: as of `Calibration`.
        options: ``val_interval`` and whatever else MMEngine's loop takes.

    Logs ``rel_error`` and ``rel_error_before`` of `Calibration.refit`, and the square of the first as ``loss``.

    Raises:
        ValueError: for another model, more ``max_iters`` than blocks, ``images`` below 1, or an empty dataloader.
    """

    def __init__(self, runner: Runner, dataloader: Any, max_iters: int, images: int = 512, mlp: bool = False,
                 ridge: float = RIDGE, patches: int | None = None, **options: Any) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if not isinstance(model, FeatureAlignment):
            raise ValueError(f'CalibrationLoop needs the student and teacher of FeatureAlignment, not '
                             f'{type(model).__name__}')
        if max_iters > (depth := len(model.backbone.blocks)) or images < 1:
            raise ValueError(f'max_iters={max_iters} must not be above the {depth} blocks of the backbone, and images='
                             f'{images} not below 1')
        super().__init__(runner, dataloader, max_iters, **options)
        self.model, self.images = model, images
        self.settings = dict(mlp=mlp, ridge=ridge, patches=patches)
        self.calibration: Calibration | None = None
        self.dataloader_iterator = itertools.repeat({})  # of blocks; images are read by `begin`
        self.fast_forward_on_resume = True  # there is no batch to skip

    def begin(self) -> Calibration:
        """With all images read, in front of the block that is next."""
        vit, teacher, family = find_pair(self.model.backbone, self.model.frozen['teacher'])
        calibration = Calibration(vit, teacher, family, **self.settings)
        self.runner.logger.info(f'Reading {self.images} images in front of block {self._iter + 1}')
        left = self.images
        for batch in self.dataloader:
            inputs = self.model.data_preprocessor(batch)['inputs']
            calibration.read(inputs, self._iter)
            left -= len(inputs) * get_world_size()
            if left <= 0:
                break
        if left == self.images:
            raise ValueError('the dataloader is empty: are there fewer images than a batch, with drop_last?')
        return calibration

    def run_iter(self, data_batch: dict) -> None:
        runner = self.runner
        runner.call_hook('before_train_iter', batch_idx=self._iter, data_batch=data_batch)
        with runner.optim_wrapper.optim_context(runner.model):
            self.calibration = self.calibration or self.begin()
            figures = self.calibration.refit(self._iter)
        figures['loss'] = figures['rel_error'] ** 2
        runner.call_hook('after_train_iter', batch_idx=self._iter, data_batch=data_batch, outputs=figures)
        self._iter += 1
