# ViTDet: 100 epochs of 64 images (here 8 GPUs x 8), AdamW, lr 1e-4 after 250 steps of warm-up, weight decay 0.1 (none
# on position embeddings), a tenth of the rate after 88.9 and a hundredth after 96.3 epochs. Of our own is the rate of
# the backbone, x 0.1 as in stage 3: ViTDet, which starts from MAE, has 0.8 per layer
# (adala_mm.LayerDecayOptimWrapperConstructor).
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.1),
    paramwise_cfg=dict(
        custom_keys={'backbone': dict(lr_mult=0.1), 'backbone.pos_embed': dict(lr_mult=0.1, decay_mult=0.0)}))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, begin=0, end=250, by_epoch=False),
    dict(type='MultiStepLR', milestones=[89, 96], gamma=0.1, begin=0, end=100, by_epoch=True),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=100, val_interval=5)
auto_scale_lr = dict(enable=False, base_batch_size=64)
