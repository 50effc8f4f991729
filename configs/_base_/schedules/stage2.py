# Table 5: AdamW, lr 1e-3 falling polynomially (0.9), weight decay 0.05, 8 GPUs x 16 images; epochs differ by model.
epochs = 30
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05))
param_scheduler = dict(type='PolyLR', power=0.9, end=epochs, by_epoch=True, convert_to_iter_based=True)
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=epochs)
auto_scale_lr = dict(enable=False, base_batch_size=128)
# Section 4.3.1: "performance eventually saturates after reaching a peak. Consequently, we adopt an early stopping
# strategy for Stage 2", by what and after how long it does not say: 3 epochs without a lower held-out error are ours.
# Recipes that want it put it into custom_hooks; the others train for the epochs that the paper has arrived at.
stop_on_plateau = dict(type='adala_mm.StopOnPlateauHook', monitor={'align/rel_error': 'less'}, patience=3)
