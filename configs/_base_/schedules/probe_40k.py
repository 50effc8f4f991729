# DINOv2's linear probe of segmentation (Oquab et al. 2024), on mmseg's 40k schedule: 40k iterations of 8 GPUs x 2
# images, AdamW, lr 1e-3 after 1,500 iterations of warm-up, then linear, weight decay 1e-4. The rate of the LayerNorm of
# the backbone is stage 3's, a tenth.
iters = 40000
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=1e-4),
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1))))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, end=1500, by_epoch=False),
    dict(type='PolyLR', power=1.0, begin=1500, end=iters, by_epoch=False),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=iters, val_interval=4000)
log_processor = dict(by_epoch=False)
checkpoint_hook = dict(type='CheckpointHook', by_epoch=False, interval=4000, max_keep_ckpts=2)
logger_hook = dict(type='LoggerHook', interval=50, log_metric_by_epoch=False)
auto_scale_lr = dict(enable=False, base_batch_size=16)
