# mmdet's 1x with L2ViT's optimizer: 12 epochs of 8 GPUs x 2 images, AdamW, lr 1e-4 after 500 iterations of warm-up, a
# tenth of it after 8 and a hundredth after 11 epochs, weight decay 0.05 of all parameters (Swin's spares norms).
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, begin=0, end=500, by_epoch=False),
    dict(type='MultiStepLR', milestones=[8, 11], gamma=0.1, begin=0, end=12, by_epoch=True),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12)
auto_scale_lr = dict(enable=False, base_batch_size=16)
