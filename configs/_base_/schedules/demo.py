# Iteration-based runs with frequent log lines; `iters` is the only thing that the demo's runs differ in.
iters = 100
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, end=20, by_epoch=False),
    dict(type='PolyLR', power=0.9, begin=20, end=iters, by_epoch=False),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=iters, val_interval=iters)
custom_hooks = [dict(type='adala_mm.ValBeforeTrainHook')]
log_processor = dict(by_epoch=False)
checkpoint_hook = dict(type='CheckpointHook', by_epoch=False, interval=iters, max_keep_ckpts=2)
logger_hook = dict(type='LoggerHook', interval=10, log_metric_by_epoch=False)
auto_scale_lr = dict(enable=False, base_batch_size=32)  # on one process
