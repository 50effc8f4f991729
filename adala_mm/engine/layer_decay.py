from __future__ import annotations

from functools import partial

from torch import nn

from adala_mm.registry import OPTIM_WRAPPER_CONSTRUCTORS
from adala_mm.utils.stack import import_quietly

import_quietly('mmpretrain.datasets')

from mmpretrain.engine.optimizers import LearningRateDecayOptimWrapperConstructor  # noqa: E402


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(LearningRateDecayOptimWrapperConstructor):
    """mmpretrain's layer-wise learning-rate decay, for segmentors and detectors too.

    ``lr(layer i) = lr * layer_decay_rate ** (number of layers - 1 - i)``, layers being counted by the backbone's
    ``get_layer_depth``; everything outside of the backbone has the full rate. mmpretrain's own constructor asks the
    *model* for that method, which only its classifiers have, and mmseg's knows two backbones by name.

    Use: ``optim_wrapper.update(constructor='adala_mm.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.9))``.
    """

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', get_layer_depth=None,
                   **kwargs) -> None:
        if get_layer_depth is None and not hasattr(module, 'get_layer_depth'):
            get_layer_depth = partial(module.backbone.get_layer_depth, prefix='backbone.')
        super().add_params(params, module, prefix=prefix, get_layer_depth=get_layer_depth, **kwargs)
