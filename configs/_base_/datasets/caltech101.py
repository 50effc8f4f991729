# Photographs of Caltech-101 as plain images: alignment needs no labels. Lists are relative to data/caltech101.
train_pipeline = [
    dict(type='adala_mm.LoadImageFromFile'),
    dict(type='mmpretrain.RandomResizedCrop', scale=224, crop_ratio_range=(0.25, 1.0), interpolation='bicubic'),
    dict(type='mmpretrain.RandomFlip', prob=0.5),
    dict(type='mmpretrain.ColorJitter', brightness=0.4, contrast=0.4, saturation=0.4),
    dict(type='mmpretrain.PackInputs'),
]
test_pipeline = [
    dict(type='adala_mm.LoadImageFromFile'),
    dict(type='mmpretrain.ResizeEdge', scale=256, edge='short', interpolation='bicubic'),
    dict(type='mmpretrain.CenterCrop', crop_size=224),
    dict(type='mmpretrain.PackInputs'),
]
train_dataloader = dict(
    batch_size=16,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='mmpretrain.CustomDataset', data_root='data/caltech101', ann_file='unlabelled.txt', with_label=False,
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=36,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='mmpretrain.CustomDataset', data_root='data/caltech101', ann_file='test.txt', pipeline=test_pipeline))
val_evaluator = [dict(type='adala_mm.AlignmentMetric'), dict(type='adala_mm.KNNMetric', k=1)]
val_cfg = dict(type='ValLoop')
test_dataloader, test_evaluator, test_cfg = val_dataloader, val_evaluator, dict(type='TestLoop')
