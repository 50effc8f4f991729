# Table 5: AdamW, lr 1e-4 (backbone x 0.1) falling polynomially (0.9), weight decay 0.05, 20 epochs, 8 GPUs x 8.
# Gradient clipping and no decay on the head's norms and queries are mmseg's Mask2Former recipe.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=0.01, norm_type=2),
    paramwise_cfg=dict(
        custom_keys=dict(
            backbone=dict(lr_mult=0.1),
            query_embed=dict(decay_mult=0.0),
            query_feat=dict(decay_mult=0.0),
            level_embed=dict(decay_mult=0.0)),
        norm_decay_mult=0.0))
param_scheduler = dict(type='PolyLR', power=0.9, end=20, by_epoch=True, convert_to_iter_based=True)
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=20)
auto_scale_lr = dict(enable=False, base_batch_size=64)
