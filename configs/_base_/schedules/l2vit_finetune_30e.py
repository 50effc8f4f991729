# L2ViT of ImageNet-22K on ImageNet-1K: 30 epochs, AdamW, lr 4e-5 after 5 epochs of warm-up from 4e-8, then cosine to
# 4e-7, weight decay 1e-8, EMA. 1024 images a step = 8 GPUs x 64 x 2 accumulated.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=4e-5, weight_decay=1e-8),
    accumulative_counts=2,
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, end=5, by_epoch=True, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=4e-7, begin=5, end=30, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=30)
# Averages once per step, the statistics of BatchNorm as well; checkpoints hold the averages.
custom_hooks = [dict(type='EMAHook', momentum=1e-4, interval=2, update_buffers=True, priority='ABOVE_NORMAL')]
auto_scale_lr = dict(enable=False, base_batch_size=512)
