# ImageNet-1K's validation images, none of which is in ImageNet-22K: how well does alignment hold on unseen ones?
val_dataloader = dict(
    batch_size=16,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='mmpretrain.CustomDataset', data_root='data/imagenet', data_prefix='val', pipeline=[
            dict(type='adala_mm.LoadImageFromFile'),
            dict(type='mmpretrain.ResizeEdge', scale=585, edge='short', interpolation='bicubic'),
            dict(type='mmpretrain.CenterCrop', crop_size=512),
            dict(type='mmpretrain.PackInputs'),
        ]))
val_evaluator = dict(type='adala_mm.AlignmentMetric')
val_cfg = dict(type='ValLoop')
test_dataloader, test_evaluator, test_cfg = val_dataloader, val_evaluator, dict(type='TestLoop')
