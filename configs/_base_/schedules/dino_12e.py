# mmdet's dino-4scale_r50_8xb2-12e_coco, which is DINO's own: 12 epochs, AdamW, lr 1e-4 (backbone x 0.1), a tenth of it
# in the last epoch, 8 GPUs x 2.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=1e-4),
    clip_grad=dict(max_norm=0.1, norm_type=2),
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1))))
param_scheduler = dict(type='MultiStepLR', milestones=[11], gamma=0.1, begin=0, end=12, by_epoch=True)
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12)
auto_scale_lr = dict(enable=False, base_batch_size=16)
