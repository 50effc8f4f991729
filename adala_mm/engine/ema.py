"""Corrections for MMEngine's EMAHook, which swaps the model's weights with their average to validate and to save."""
from __future__ import annotations

from mmengine.hooks import EMAHook
from mmengine.runner import Runner


def ema_hooks(runner: Runner) -> list[EMAHook]:
    """Those of the run; usually none or one."""
    return [hook for hook in runner.hooks if isinstance(hook, EMAHook)]


def start_average(runner: Runner) -> None:
    """Before the first step the average is the model itself; the hook copies it before its weights are loaded."""
    for hook in ema_hooks(runner):
        hook.ema_model.module.load_state_dict(hook.src_model.state_dict())


def leave_validation(runner: Runner) -> None:
    """Gives the model its own weights back, which the hook has swapped for the average while it is validated."""
    for hook in ema_hooks(runner):
        hook.after_val_epoch(runner)
