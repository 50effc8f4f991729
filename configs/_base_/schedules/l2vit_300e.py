# L2ViT on ImageNet-1K: 300 epochs, AdamW, lr 4e-3 after 20 epochs of warm-up, then cosine, weight decay 0.05, EMA.
# 4096 images a step = 8 GPUs x 128 x 4 accumulated. No clipping, and no decay of norms and biases, as in ConvNeXt.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=4e-3, weight_decay=0.05),
    accumulative_counts=4,
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, end=20, by_epoch=True, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-6, begin=20, end=300, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=300)
# Averages once per step, the statistics of BatchNorm as well; checkpoints hold the averages.
custom_hooks = [dict(type='EMAHook', momentum=1e-4, interval=4, update_buffers=True, priority='ABOVE_NORMAL')]
auto_scale_lr = dict(enable=False, base_batch_size=1024)
