"""Registries of adala_mm, children of MMEngine's.

MMEngine imports ``<scope>.registry`` when it meets a prefixed type, so ``type='adala_mm.AdaLAViT'`` resolves in any
mmseg, mmpretrain or mmdet config without ``custom_imports``. Always write the prefix. The first look-up imports the
registry's locations, and with heads, data sets and hooks `adala_mm.openmmlab`; importing this module does not.
"""
from __future__ import annotations

from collections.abc import Callable

from adala_mm.utils.stack import CORE, require_stack

require_stack(CORE)

from mmengine.registry import DATASETS as MMENGINE_DATASETS  # noqa: E402
from mmengine.registry import HOOKS as MMENGINE_HOOKS  # noqa: E402
from mmengine.registry import LOOPS as MMENGINE_LOOPS  # noqa: E402
from mmengine.registry import METRICS as MMENGINE_METRICS  # noqa: E402
from mmengine.registry import MODELS as MMENGINE_MODELS  # noqa: E402
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_CONSTRUCTORS  # noqa: E402
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS  # noqa: E402
from mmengine.registry import RUNNERS as MMENGINE_RUNNERS  # noqa: E402
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS  # noqa: E402
from mmengine.registry import Registry  # noqa: E402

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='adala_mm',
                  locations=['adala_mm.models', 'adala_mm.models.heads'])
DATASETS = Registry('dataset', parent=MMENGINE_DATASETS, scope='adala_mm', locations=['adala_mm.datasets'])
TRANSFORMS = Registry('transform', parent=MMENGINE_TRANSFORMS, scope='adala_mm', locations=['adala_mm.datasets'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='adala_mm', locations=['adala_mm.engine'])
LOOPS = Registry('loop', parent=MMENGINE_LOOPS, scope='adala_mm', locations=['adala_mm.engine'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry('optim_wrapper_constructor', parent=MMENGINE_CONSTRUCTORS, scope='adala_mm',
                                      locations=['adala_mm.engine'])
OPTIM_WRAPPERS = Registry('optim_wrapper', parent=MMENGINE_OPTIM_WRAPPERS, scope='adala_mm',
                          locations=['adala_mm.engine'])
METRICS = Registry('metric', parent=MMENGINE_METRICS, scope='adala_mm', locations=['adala_mm.evaluation'])
RUNNERS = Registry('runner', parent=MMENGINE_RUNNERS, scope='adala_mm', locations=['adala_mm.engine'])


class AttentionRegistry(Registry):
    """What may stand in ``attention=dict(type=...)``, and nothing else; all of it is in `MODELS` as well."""

    def register_module(self, name: str | list[str] | None = None, force: bool = False,
                        module: type | None = None) -> type | Callable[[type], type]:
        if module is None:
            return lambda layer: self.register_module(name, force, layer)
        MODELS.register_module(name, force, module)  # first: a name that it has is taken, and nothing is registered
        return super().register_module(name, force, module)


ATTENTIONS = AttentionRegistry('attention', scope='adala_mm', locations=['adala_mm.models.attentions'])
