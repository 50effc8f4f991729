"""Pre-flight check: finds before a training run starts what would fail later."""
from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator

from mmengine.registry import DefaultScope

from adala_mm.models.attentions import blocks_by_attention
from adala_mm.preflight import checkpoints, data, disk, memory, run, schedule, sizes, world
from adala_mm.preflight.plan import Plan
from adala_mm.preflight.report import ERROR, OK, SKIPPED, WARNING, Finding, findings_of, write_finding
from adala_mm.utils.mmpretrain_compat import too_new_transformers

__all__ = ['ERROR', 'OK', 'SKIPPED', 'WARNING', 'Finding', 'Plan', 'preflight', 'write_finding']


def model(plan: Plan) -> Iterator[Finding]:
    """The model can be built at all."""
    parameters = list(plan.model.parameters())
    learn = sum(p.numel() for p in parameters if p.requires_grad)
    blocks = ''.join(f'; {name}: {kinds}' for name, kinds in blocks_by_attention(plan.model).items())
    yield Finding('model', OK, f'{type(plan.model).__name__}, {sum(p.numel() for p in parameters) / 1e6:.1f} M '
                  f'parameters, {learn / 1e6:.1f} M learn{blocks}')


def libraries() -> Iterator[Finding]:
    """Tools that know nothing of adala_mm can import mmseg and mmpretrain."""
    if found := too_new_transformers():
        yield Finding('libraries', WARNING, f'transformers {found}: mmpretrain cannot be imported beside it, and mmseg '
                      'neither, unless adala_mm.openmmlab comes first: our tools do that, those of mmseg and '
                      'mmpretrain end with TypeError', 'pip install "transformers<5" "huggingface_hub<1"')


def preflight(plan: Plan) -> Iterator[Finding]:
    """Yields all findings as they are made: libraries, model, each data set, checkpoints, sizes and resources."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ('libraries', libraries), ('model', functools.partial(model, plan))]
    for loader in plan.loaders:
        checks += [(f'{loader} {check.__name__}', functools.partial(check, plan, loader))
                   for check in (data.folders, data.counts, data.images, data.labels, data.batch)]
    checks += [(name, functools.partial(check, plan)) for name, check in (
        ('classes', data.classes), ('checkpoint', checkpoints.checkpoints),
        ('normalisation', checkpoints.normalisation), ('image sizes', sizes.sizes),
        ('memory', memory.memory), ('disk', disk.disk), ('batch and lr', schedule.schedule), ('run', run.run),
        ('processes', world.world))]
    before = logging.root.manager.disable
    with DefaultScope.overwrite_default_scope(plan.cfg.get('default_scope', 'mmseg')), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        logging.disable(logging.WARNING)  # what MMEngine says of a part is for those who run it
        try:
            for name, check in checks:
                yield from findings_of(name, check)
        finally:
            logging.disable(before)
