# L2ViT on ImageNet-22K: 90 epochs of 8 GPUs x 128 images, AdamW, lr 1e-3 after 5 epochs of warm-up from 1e-6, then
# cosine to 1e-5, weight decay 0.05 (none of norms and biases, as in ConvNeXt), no EMA.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, end=5, by_epoch=True, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, begin=5, end=90, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=90, val_interval=10)
auto_scale_lr = dict(enable=False, base_batch_size=1024)
