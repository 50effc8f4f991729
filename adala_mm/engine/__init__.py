from adala_mm.engine.label_check import LabelCheckHook
from adala_mm.engine.layer_decay import LayerDecayOptimWrapperConstructor
from adala_mm.engine.progressive_resolution import ProgressiveResolutionHook
from adala_mm.engine.redraw_features import RedrawFeaturesHook
from adala_mm.engine.val_before_train import ValBeforeTrainHook
from adala_mm.engine.weights_check import WeightsCheckHook

__all__ = ['LabelCheckHook', 'LayerDecayOptimWrapperConstructor', 'ProgressiveResolutionHook', 'RedrawFeaturesHook',
           'ValBeforeTrainHook', 'WeightsCheckHook']
