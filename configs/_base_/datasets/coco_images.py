# COCO train2017 as plain images (stage 1). Crop area: our choice, the paper says "random cropping and color jitter".
train_pipeline = [
    dict(type='adala_mm.LoadImageFromFile'),
    dict(type='mmpretrain.RandomResizedCrop', scale=512, crop_ratio_range=(0.25, 1.0), interpolation='bicubic'),
    dict(type='mmpretrain.RandomFlip', prob=0.5),
    dict(type='mmpretrain.ColorJitter', brightness=0.4, contrast=0.4, saturation=0.4),
    dict(type='mmpretrain.PackInputs'),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=8,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='adala_mm.ImageFiles', data_root='data/coco', data_prefix='train2017', pipeline=train_pipeline))
