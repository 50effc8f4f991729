import adala_mm.openmmlab  # noqa: F401  mmpretrain is imported below, and hooks save
from adala_mm.engine.calibration_loop import CalibrationLoop
from adala_mm.engine.config_check import ConfigCheckHook
from adala_mm.engine.corrupt_images import CorruptImagesHook
from adala_mm.engine.cpu_amp import CPUAmpOptimWrapper
from adala_mm.engine.dead_loss import DeadLossHook
from adala_mm.engine.exact_resume import ExactResumeHook
from adala_mm.engine.label_check import LabelCheckHook
from adala_mm.engine.layer_decay import LayerDecayOptimWrapperConstructor
from adala_mm.engine.non_finite import NonFiniteHook
from adala_mm.engine.pending_gradients import PendingGradientsHook
from adala_mm.engine.preemption import PreemptionHook
from adala_mm.engine.progressive_resolution import ProgressiveResolutionHook
from adala_mm.engine.provenance import ProvenanceHook
from adala_mm.engine.redraw_features import RedrawFeaturesHook
from adala_mm.engine.sharded_runner import ShardedRunner
from adala_mm.engine.stop_on_plateau import StopOnPlateauHook
from adala_mm.engine.teacher_drift import TeacherDriftHook
from adala_mm.engine.val_before_train import ValBeforeTrainHook
from adala_mm.engine.weights_check import WeightsCheckHook

__all__ = ['CPUAmpOptimWrapper', 'CalibrationLoop', 'ConfigCheckHook', 'CorruptImagesHook', 'DeadLossHook',
           'StopOnPlateauHook', 'ExactResumeHook', 'LabelCheckHook', 'LayerDecayOptimWrapperConstructor',
           'NonFiniteHook', 'PendingGradientsHook', 'PreemptionHook', 'ProgressiveResolutionHook', 'ProvenanceHook',
           'RedrawFeaturesHook', 'ShardedRunner', 'TeacherDriftHook', 'ValBeforeTrainHook', 'WeightsCheckHook']
