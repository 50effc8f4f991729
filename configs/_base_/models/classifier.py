# mmpretrain's classifier with one linear layer on the class token.
default_scope = 'mmpretrain'
visualizer = dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
visualization_hook = dict(type='VisualizationHook', enable=False)
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(type='ClsDataPreprocessor', num_classes=1000, to_rgb=True),
    head=dict(
        type='LinearClsHead', num_classes=1000, in_channels=1024,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0)))
