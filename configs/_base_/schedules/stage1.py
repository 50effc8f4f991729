# Table 5: AdamW, lr 1e-2 fixed, weight decay 0.05, 4 epochs of 8 GPUs x 32 images.
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.05))
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=4)
auto_scale_lr = dict(enable=False, base_batch_size=256)
