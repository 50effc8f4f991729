"""Free disk space against the checkpoints that a run keeps."""
from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from adala_mm.preflight.memory import ema_bytes, held_by, optimizer_bytes
from adala_mm.preflight.plan import Plan
from adala_mm.preflight.report import ERROR, OK, WARNING, Finding, Skipped


def checkpoints(plan: Plan) -> tuple[int, int]:
    """How many a run holds at a time, the one included that is written before one goes, and the bytes of one.

    Raises:
        Skipped: if it writes none.
    """
    hook = (plan.cfg.get('default_hooks') or {}).get('checkpoint')
    if not hook:
        raise Skipped('the config has no CheckpointHook')
    one = held_by(plan.model.state_dict().values()) + ema_bytes(plan)
    if hook.get('save_optimizer', True):
        one += optimizer_bytes(plan)
    kept = hook.get('max_keep_ckpts', -1)
    if kept < 0:  # all of them
        length = plan.cfg.train_cfg.get('max_iters') or plan.cfg.train_cfg.get('max_epochs') or 1
        kept = length // max(hook.get('interval', 1), 1)
    best = hook.get('save_best') or []
    return kept + 1 + (1 if isinstance(best, str) else len(best)), one


def disk(plan: Plan) -> Iterator[Finding]:
    """The work dir can be written, and has room for all checkpoints."""
    count, one = checkpoints(plan)
    work_dir = Path(plan.cfg.work_dir).absolute()
    there = next(folder for folder in (work_dir, *work_dir.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    found = (f'{free / 1e9:.1f} GB free in {plan.cfg.work_dir}; {count} checkpoints of {one / 1e9:.2f} GB make '
             f'{count * one / 1e9:.1f} GB')
    fix = ('free some space, name another disk with --work-dir, or keep fewer: --cfg-options '
           'default_hooks.checkpoint.max_keep_ckpts=1')
    if free < count * one:
        yield Finding('disk', ERROR, found, fix)
    elif free < 1.2 * count * one:
        yield Finding('disk', WARNING, found + ', which leaves little for logs and pictures', fix)
    else:
        yield Finding('disk', OK, found)
