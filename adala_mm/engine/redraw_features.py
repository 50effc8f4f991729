from __future__ import annotations

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from adala_mm.registry import HOOKS


@HOOKS.register_module()
class RedrawFeaturesHook(Hook):
    """Draws new random features for attentions that have them (Performer), each after its ``redraw_interval``.

    The draw depends on seed, iteration and layer only: the same on every process, and in a resumed run. A layer could
    count its own calls, but activation checkpointing calls it twice, the second time in the backward pass.
    """

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        if runner.iter == 0:
            return
        for i, layer in enumerate(m for m in runner.model.modules() if hasattr(m, 'redraw')):
            if layer.redraw_interval and runner.iter % layer.redraw_interval == 0:
                seed = (runner.seed or 0) + 1000 * runner.iter + i
                layer.redraw(torch.Generator().manual_seed(seed))
