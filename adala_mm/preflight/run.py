"""Checks that loops, optimizer, schedulers and hooks can be built, and that they act within the run."""
from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from mmengine.hooks import CheckpointHook, EarlyStoppingHook
from mmengine.optim.scheduler.param_scheduler import INF, LinearParamScheduler, MultiStepParamScheduler
from mmengine.runner import BaseLoop, IterBasedTrainLoop

from adala_mm.engine import StopOnPlateauHook
from adala_mm.preflight.plan import TRAIN, VAL, Plan
from adala_mm.preflight.rehearsal import Rehearsal
from adala_mm.preflight.report import ERROR, OK, WARNING, Finding, Skipped, findings_of

FEW = 10  # steps of an epoch
VALIDATION = VAL, 'val_evaluator', 'val_cfg'


def run(plan: Plan) -> Iterator[Finding]:
    """What the runner builds before the first step, part by part; a part that fails does not hide the others."""
    runner = Rehearsal(plan)
    for name, check, fix in (
            ('loops', loops, 'correct train_cfg, val_cfg and val_evaluator'),
            ('optimizer', optimizer, "correct optim_wrapper: the optimizer's name and options, or paramwise_cfg"),
            ('schedule', schedule, 'let each scheduler begin before it ends, and a warm-up end well before the run'),
            ('hooks', hooks, 'correct default_hooks and custom_hooks')):
        yield from findings_of(name, functools.partial(check, runner), fix)


def unit(loop: BaseLoop) -> str:
    return 'iterations' if isinstance(loop, IterBasedTrainLoop) else 'epochs'


def length(loop: BaseLoop) -> int:
    """Of the run, in its `unit`."""
    return loop.max_iters if unit(loop) == 'iterations' else loop.max_epochs


def loops(runner: Rehearsal) -> Iterator[Finding]:
    """Training and validation have all of their parts; an epoch is more than a few steps; validation takes place."""
    absent = [key for key in VALIDATION if runner.cfg.get(key) is None]
    if 0 < len(absent) < len(VALIDATION):
        yield Finding('loops', ERROR, f'validation needs {", ".join(VALIDATION)}, and the config has no '
                      f'{" and no ".join(absent)}', 'give all of them, or none')
        return
    loop = runner.trained
    findings = [*short_epochs(runner, loop), *([] if absent else rare_validation(loop))]
    with contextlib.suppress(Skipped):  # without data: told by their checks
        runner.validated  # noqa: B018  is built here, with its metrics
    yield from findings
    if not findings:
        epochs = '' if unit(loop) == 'iterations' else f'{loop.max_epochs} epochs x {len(loop.dataloader)} = '
        yield Finding('loops', OK, f'{epochs}{loop.max_iters} steps'
                      + ('' if absent else f', validation every {loop.val_interval} {unit(loop)}'))


def short_epochs(runner: Rehearsal, loop: BaseLoop) -> Iterator[Finding]:
    steps, images = len(loop.dataloader), len(loop.dataloader.dataset)
    if unit(loop) == 'epochs' and steps < FEW:
        yield Finding(
            'loops', WARNING, f'an epoch is {steps} step{"s" * (steps > 1)}, the run {loop.max_iters}: {images} images '
            f'for {runner.world_size} processes x {runner.cfg[TRAIN].batch_size}',
            f'a smaller {TRAIN}.batch_size, fewer processes, or more epochs (train_cfg.max_epochs)')


def rare_validation(loop: BaseLoop) -> Iterator[Finding]:
    end, counted = length(loop), unit(loop)
    if loop.val_begin > end:
        yield Finding('loops', WARNING, f'val_begin={loop.val_begin}, but the run has {end} {counted}: it never '
                      'validates', 'lower train_cfg.val_begin')
    elif loop.val_interval > end:
        yield Finding('loops', WARNING, f'val_interval={loop.val_interval}, but the run has {end} {counted}: it '
                      'validates at its end only', 'lower train_cfg.val_interval')


def optimizer(runner: Rehearsal) -> Iterator[Finding]:
    """The optimizer takes all parameters that learn, in groups as its constructor makes them."""
    wrapper = runner.optimized
    groups = wrapper.param_groups if hasattr(wrapper, 'param_groups') else []
    rates = sorted({group['lr'] for group in groups})
    shown = f'{rates[0]:g}' + (f' to {rates[-1]:g}' if len(rates) > 1 else '') if rates else 'of several optimizers'
    yield Finding('optimizer', OK, f'{type(getattr(wrapper, "optimizer", wrapper)).__name__}, {len(groups)} groups of '
                  f'parameters, lr {shown}')


def schedule(runner: Rehearsal) -> Iterator[Finding]:
    """Schedulers can be built, and begin, turn and end within the run."""
    loop, schedulers = runner.part('trained'), runner.scheduled
    findings = [finding for scheduler in schedulers for finding in misplaced(scheduler, loop)]
    for name in dict.fromkeys(scheduler.param_name for scheduler in schedulers):
        findings += unfinished([scheduler for scheduler in schedulers if scheduler.param_name == name], loop)
    yield from findings
    if not findings:
        yield Finding('schedule', OK, ', '.join(f'{title(one)} {one.begin} to {min(one.end, total(one, loop))} of '
                                                f'{total(one, loop)} {steps_of(one)}' for one in schedulers)
                      or 'the learning rate is constant')


def title(scheduler: Any) -> str:
    return type(scheduler).__name__


def steps_of(scheduler: Any) -> str:
    return 'epochs' if scheduler.by_epoch else 'steps'


def total(scheduler: Any, loop: BaseLoop) -> int:
    """Of the run, in the unit in which ``scheduler`` steps."""
    return loop.max_epochs if scheduler.by_epoch else loop.max_iters


def warms_up(scheduler: Any) -> bool:
    return isinstance(scheduler, LinearParamScheduler) and scheduler.start_factor < scheduler.end_factor


def misplaced(scheduler: Any, loop: BaseLoop) -> Iterator[Finding]:
    """What of a scheduler lies beyond the run, and a warm-up that takes up much of it."""
    end, kind, steps = total(scheduler, loop), title(scheduler), steps_of(scheduler)
    if scheduler.begin >= end:
        yield Finding('schedule', WARNING, f'{kind} begins at {scheduler.begin}, but the run has {end} {steps}',
                      'let it begin earlier, or leave it out')
    elif warms_up(scheduler) and 2 * (scheduler.end - scheduler.begin) > end:
        yield Finding('schedule', WARNING, f'the warm-up ({kind}) takes {scheduler.end - scheduler.begin} of {end} '
                      f'{steps}: more than half of the run', f'end={max(1, end // 20)}, for instance')
    if isinstance(scheduler, MultiStepParamScheduler):
        late = sorted(step for step in scheduler.milestones if step >= end)
        if late:
            yield Finding('schedule', WARNING, f'milestones {", ".join(map(str, late))} of {kind} never come: the run '
                          f'has {end} {steps}', 'give them in the unit and within the length of the run')


def unfinished(schedulers: list, loop: BaseLoop) -> Iterator[Finding]:
    """The last scheduler of a parameter that ends before the run, or would go on after it."""
    falling = [one for one in schedulers if not warms_up(one) and not isinstance(one, MultiStepParamScheduler)
               and one.end != INF and one.begin < total(one, loop)]
    if not falling:
        return
    last = max(falling, key=lambda one: one.end / total(one, loop))
    end, steps, name = total(last, loop), steps_of(last), last.param_name
    if last.end < end:
        yield Finding('schedule', WARNING, f'{title(last)} ends at {last.end} of {end} {steps}: the {name} stays as it '
                      'is from then on', 'let `end` be the length of the run, or leave it out')
    elif last.end > end:
        yield Finding('schedule', WARNING, f'{title(last)} ends at {last.end}, but the run has {end} {steps}: the '
                      f'{name} never reaches its last value', 'let `end` be the length of the run, or leave it out')


def hooks(runner: Rehearsal) -> Iterator[Finding]:
    """Hooks can be built, save within the run, and have the validation that they decide by."""
    built, findings = runner.hooked, []
    validates = bool(runner.cfg.get(VAL))
    for hook in built:
        kind = type(hook).__name__
        if isinstance(hook, (StopOnPlateauHook, EarlyStoppingHook)) and not validates:
            findings.append(Finding('hooks', ERROR, f'{kind} decides by held-out scores, but the config validates '
                                    'nothing', f'give {", ".join(VALIDATION)}, or leave the hook out'))
        if isinstance(hook, CheckpointHook):
            if hook.save_best and not validates:
                findings.append(Finding(
                    'hooks', WARNING, f'{kind} keeps the best {", ".join(hook.key_indicators)}, but the config '
                    'validates nothing', f'give {", ".join(VALIDATION)}, or leave save_best out'))
            with contextlib.suppress(Skipped):  # nobody knows how long the run is
                findings += saving(hook, runner.part('trained'))
    yield from findings
    if not findings:
        yield Finding('hooks', OK, f'{len(built)}, all of them can be built')


def saving(hook: CheckpointHook, loop: BaseLoop) -> Iterator[Finding]:
    """Checkpoints are written during the run, in its unit."""
    if hook.by_epoch and unit(loop) == 'iterations':
        yield Finding('hooks', WARNING, 'CheckpointHook counts epochs, and the run counts iterations',
                      'by_epoch=False and an interval in iterations in default_hooks.checkpoint')
        return
    end, counted = (loop.max_epochs, 'epochs') if hook.by_epoch else (loop.max_iters, 'steps')
    if hook.interval > end:
        yield Finding('hooks', WARNING, f'CheckpointHook saves every {hook.interval} {counted}, and the run has {end}: '
                      + ('at its end only' if hook.save_last else 'nothing is saved'),
                      'lower the interval in default_hooks.checkpoint')
