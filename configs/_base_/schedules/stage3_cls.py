# Table 5: AdamW, lr 1e-4 (backbone x 0.1) falling polynomially (0.9), weight decay 0.05, 10 epochs, 8 GPUs x 8.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1))))
param_scheduler = dict(type='PolyLR', power=0.9, end=10, by_epoch=True, convert_to_iter_based=True)
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=10)
auto_scale_lr = dict(enable=False, base_batch_size=64)
