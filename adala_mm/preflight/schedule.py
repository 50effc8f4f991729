"""Effective batch and learning rate against the recipe that the config states."""
from __future__ import annotations

from collections.abc import Iterator

from adala_mm.preflight.plan import TRAIN, Plan
from adala_mm.preflight.report import OK, WARNING, Finding, Skipped

# ViT-AdaLA, Table 5: images in a step on 8 GPUs, learning rate of AdamW.
TABLE5 = {'AttentionAlignment': (256, 1e-2), 'FeatureAlignment': (128, 1e-3)}
STAGE3 = (64, 1e-4)


def schedule(plan: Plan) -> Iterator[Finding]:
    """As many images go into a step as the learning rate was chosen for.

    The recipe is what the config's file says: ``auto_scale_lr.base_batch_size`` images on all processes, times its own
    accumulation, and its learning rate. Command-line options are compared to it; a learning rate that was scaled along
    with the batch is as good.
    """
    cfg, written = plan.cfg, plan.written
    if cfg.train_cfg.get('type') == 'adala_mm.CalibrationLoop':
        raise Skipped('calibration takes no steps of an optimizer')
    batch, wrapper, old = cfg[TRAIN].batch_size, cfg.optim_wrapper, written.optim_wrapper
    counts, lr, old_lr = wrapper.get('accumulative_counts', 1), wrapper.optimizer.lr, old.optimizer.lr
    images = batch * counts * plan.processes
    found = f'{batch} images x {plan.processes} processes' + (f' x {counts} accumulated' if counts > 1 else '')
    found = f'{found} = {images} a step, lr {lr:g}'
    base = (cfg.get('auto_scale_lr') or {}).get('base_batch_size')
    if not base:
        paper = TABLE5.get(type(plan.model).__name__, STAGE3)
        yield Finding('batch and lr', OK, f'{found}; the config names no base batch size (the paper: '
                      f'{paper[0]} images, lr {paper[1]:g})')
        return
    wanted = base * old.get('accumulative_counts', 1)
    right = old_lr * images / wanted
    if cfg.auto_scale_lr.get('enable'):
        lr *= batch * plan.processes / base  # MMEngine's rule, which knows nothing of accumulation
        found = f'{found}, scaled to {lr:g}'
    if abs(lr - right) <= 0.01 * right:
        yield Finding('batch and lr', OK, f'{found}, as the recipe ({wanted} images, lr {old_lr:g})')
        return
    scales = counts == old.get('accumulative_counts', 1) and lr == old_lr and not cfg.auto_scale_lr.get('enable')
    more = max(1, round(wanted / (batch * plan.processes)))
    yield Finding('batch and lr', WARNING, f'{found}; the recipe is {wanted} images a step with lr {old_lr:g}',
                  ('--auto-scale-lr or ' if scales else '')
                  + f'--cfg-options optim_wrapper.optimizer.lr={right:g}'
                  + (f', or keep the lr and set optim_wrapper.accumulative_counts={more}' if more > 1 else ''))
