# Table 5: AdamW, lr 1e-3 falling polynomially (0.9), weight decay 0.05, 8 GPUs x 16 images; epochs differ by model.
epochs = 30
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05))
param_scheduler = dict(type='PolyLR', power=0.9, end=epochs, by_epoch=True, convert_to_iter_based=True)
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=epochs)
auto_scale_lr = dict(enable=False, base_batch_size=128)
