# The scenes of the embedded data set as plain images: alignment reads no labels. The teacher's run draws them.
image_norm = dict(mean=[110.0, 110.0, 110.0], std=[55.0, 55.0, 55.0], bgr_to_rgb=True)
train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='mmpretrain.CustomDataset', data_root='data/beacons', data_prefix='images/train', with_label=False,
        pipeline=[
            dict(type='adala_mm.LoadImageFromFile'),
            dict(type='mmpretrain.RandomFlip', prob=[0.25, 0.25], direction=['horizontal', 'vertical']),
            dict(type='mmpretrain.PackInputs'),
        ]))
val_dataloader = dict(
    batch_size=50,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='mmpretrain.CustomDataset', data_root='data/beacons', data_prefix='images/val', with_label=False,
        pipeline=[dict(type='adala_mm.LoadImageFromFile'), dict(type='mmpretrain.PackInputs')]))
val_evaluator = dict(type='adala_mm.AlignmentMetric')
val_cfg = dict(type='ValLoop')
test_dataloader, test_evaluator, test_cfg = val_dataloader, val_evaluator, dict(type='TestLoop')
