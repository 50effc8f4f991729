from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.runner import Runner

from adala_mm.engine.ema import start_average
from adala_mm.registry import HOOKS


@HOOKS.register_module()
class ValBeforeTrainHook(Hook):
    """Validates once before the first training step; a resumed run has done this already.

    MMEngine has no such switch, and "what did this stage gain?" needs the score before it.
    """

    priority = 'VERY_LOW'

    def before_train(self, runner: Runner) -> None:
        if runner.val_loop is not None and runner.iter == 0:
            runner.logger.info('Validation before the first training step:')
            start_average(runner)
            runner.val_loop.run()
            runner.model.train()
