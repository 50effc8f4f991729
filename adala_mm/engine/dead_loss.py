from __future__ import annotations

from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor

from adala_mm.models.algorithms import AttentionAlignment
from adala_mm.registry import HOOKS

POLICIES = ('warn', 'stop')
IMPROVEMENT = 0.05  # as a share of the first error


@HOOKS.register_module()
class DeadLossHook(Hook):
    """Stage 1: names the blocks that do not learn, which the mean over all blocks would hide.

    Every ``patience`` iterations, a block's relative error, smoothed over iterations and averaged over processes, must
    be below its error before the first step by `IMPROVEMENT`. Other models are left alone.

    Args:
        patience: iterations between two looks, the first of which comes after as many.
        policy: ``warn`` or ``stop``.
        momentum: of the smoothing, ``smooth += momentum * (error - smooth)``; 0.05 is a mean over some 20 iterations.

    First and smoothed errors are kept in checkpoints, and go on in a resumed run.

    Raises:
        ValueError: for an unknown ``policy``.
        RuntimeError: if the policy is ``stop``.
    """

    def __init__(self, patience: int = 200, policy: str = 'warn', momentum: float = 0.05) -> None:
        if policy not in POLICIES:
            raise ValueError(f'unknown policy {policy!r}; choose one of {", ".join(POLICIES)}')
        self.patience, self.policy, self.momentum = patience, policy, momentum
        self.first: Tensor | None = None
        self.smooth: Tensor | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if runner._resume and 'dead_loss' in checkpoint:
            self.first, self.smooth = checkpoint['dead_loss']['first'], checkpoint['dead_loss']['smooth']

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if self.first is not None:
            checkpoint['dead_loss'] = dict(first=self.first.cpu(), smooth=self.smooth.cpu())

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None,
                         outputs: dict | None = None) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if not isinstance(model, AttentionAlignment):
            return
        errors = model.block_errors.clone()
        all_reduce(errors, op='mean')
        if self.first is None:
            if not errors.isfinite().all():
                return
            self.first, self.smooth = errors, errors.clone()
        # A batch of NaN is not learnt from, and says nothing of a block.
        new = self.smooth.to(errors).lerp(errors, self.momentum)
        self.smooth = new.where(new.isfinite(), self.smooth.to(errors))
        if self.every_n_train_iters(runner, self.patience):
            self.look(runner, model)

    def look(self, runner: Runner, model: AttentionAlignment) -> None:
        """Warns of blocks that do not learn, or stops the run."""
        learners = [i for i, block in enumerate(model.backbone.blocks) if not block.attn.is_softmax]
        rows = zip(learners, self.first.tolist(), self.smooth.tolist(), strict=True)
        dead = [f'block {i} ({first:.4g} at first, now {now:.4g})' for i, first, now in rows
                if not now <= (1 - IMPROVEMENT) * first]
        if not dead:
            return
        message = (f'iteration {runner.iter + 1}: the error of {len(dead)} of {len(learners)} blocks has not fallen by '
                   f'{IMPROVEMENT:.0%} since training began: {", ".join(dead)}. Most likely the learning rate '
                   'is much too low, or so high that they do not settle')
        if self.policy == 'stop':
            raise RuntimeError(message)
        runner.logger.warning(message)
