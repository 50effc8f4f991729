# 160k iterations of 8 GPUs x 2 images, AdamW, lr 6e-5 after 1,500 iterations of warm-up, then linear, decay 0.01.
iters = 160000
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=6e-5, weight_decay=0.01))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, end=1500, by_epoch=False),
    dict(type='PolyLR', power=1.0, begin=1500, end=iters, by_epoch=False),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=iters, val_interval=16000)
log_processor = dict(by_epoch=False)
checkpoint_hook = dict(type='CheckpointHook', by_epoch=False, interval=16000, max_keep_ckpts=2)
logger_hook = dict(type='LoggerHook', interval=50, log_metric_by_epoch=False)
auto_scale_lr = dict(enable=False, base_batch_size=16)
