from __future__ import annotations

from math import isfinite

from mmengine.hooks import Hook
from mmengine.runner import Runner

from adala_mm.registry import HOOKS

STATE = 'early_stopping'  # in the message hub, which every checkpoint holds: those of older runs call it so


@HOOKS.register_module()
class StopOnPlateauHook(Hook):
    """Ends a run when no monitored score has improved for ``patience`` validations (ViT-AdaLA section 4.3.1).

    Of several scores each has a best of its own, and one that still improves keeps the run going: features may come
    closer after a probe has peaked, and the other way round. A score improves if it beats its best by more than
    ``min_delta * |best|``. One that is no finite number ends the run at once.

    MMEngine's `EarlyStoppingHook` knows one score only and forgets its count when a run is resumed. Here, both
    travel in the checkpoint, which is written before a step's validation; `ExactResumeHook` makes up for that one, so a
    resumed run ends where an uninterrupted one does, and one that had ended ends again.

    Args:
        monitor: score -> ``less`` or ``greater``, whichever is better, for instance ``{'align/rel_error': 'less'}``.
        patience: validations without improvement after which training ends.
        min_delta: share of the best score by which a better one must differ to count.

    The best weights are kept by ``CheckpointHook(save_best='align/rel_error', rule='less')``.

    Raises:
        ValueError: for other arguments, a run that never validates, or a validation without a monitored score.
    """

    priority = 'LOWEST'  # CheckpointHook keeps the best weights first

    def __init__(self, monitor: dict[str, str], patience: int = 5, min_delta: float = 0.0) -> None:
        if not isinstance(monitor, dict) or not monitor or set(monitor.values()) - {'less', 'greater'}:
            raise ValueError(f"monitor={monitor!r} must be a dict of scores, {{'align/rel_error': 'less'}} for "
                             "instance; the other rule is 'greater'")
        if patience < 1 or min_delta < 0:
            raise ValueError(f'patience={patience} must be at least 1 and min_delta={min_delta} at least 0')
        self.monitor = dict(monitor)
        self.patience = patience
        self.min_delta = min_delta

    def before_train(self, runner: Runner) -> None:
        if runner.val_loop is None:
            raise ValueError('StopOnPlateauHook decides by held-out scores, but the config validates nothing: it needs '
                             'val_dataloader, val_evaluator and val_cfg')

    def improves(self, key: str, score: float, best: float | None) -> bool:
        """Whether ``score`` is a better one; the first finite score is."""
        if not isfinite(score):
            return False
        if best is None:
            return True
        gain = score - best if self.monitor[key] == 'greater' else best - score
        return gain > self.min_delta * abs(best)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        metrics = metrics or {}
        if missing := [key for key in self.monitor if key not in metrics]:
            raise ValueError(f'StopOnPlateauHook monitors {", ".join(missing)}, which validation does not report; it '
                             f'reports: {", ".join(metrics) or "nothing"}')
        hub = runner.message_hub
        state = hub.get_info(STATE) if STATE in hub.runtime_info else dict(best={}, waited=0, iter=None)
        if state['iter'] == runner.iter:
            return  # a step that is validated once more
        better = {key: float(metrics[key]) for key in self.monitor
                  if self.improves(key, metrics[key], state['best'].get(key))}
        best, waited = state['best'] | better, 0 if better else state['waited'] + 1
        hub.update_info(STATE, dict(best=best, waited=waited, iter=runner.iter))

        broken = [f'{key} = {metrics[key]}' for key in self.monitor if not isfinite(metrics[key])]
        if broken or waited >= self.patience:
            runner.train_loop.stop_training = True
            scores = ', '.join(f'{key} = {value:.4g}' for key, value in best.items())
            runner.logger.info(f'Early stopping: {", ".join(broken)}' if broken else
                               f'Early stopping: no better score in {waited} validation(s) than {scores}')
