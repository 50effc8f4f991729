from adala_mm.engine.val_before_train import ValBeforeTrainHook

__all__ = ['ValBeforeTrainHook']
