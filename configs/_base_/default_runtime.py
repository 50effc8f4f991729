# Shared by every config: MMEngine's usual hooks, and quiet, resumable runs.
# Tools and inferencers of mmseg, mmpretrain and mmdet know nothing of adala_mm until they build a model, and mmdet
# cannot be imported without mmcv's compiled ops: what stands in for them has to be there when a config is read. MMEngine
# heeds custom_imports in a dumped config only, so that this file does it itself.
custom_imports = dict(imports=['adala_mm.openmmlab'])
__import__('adala_mm.openmmlab')
default_scope = 'mmseg'
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'))  # gloo where there is no GPU
vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(type='SegLocalVisualizer', vis_backends=vis_backends, name='visualizer')
log_processor = dict(by_epoch=True)
log_level = 'INFO'
load_from = None
resume = False
randomness = dict(seed=0)
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=3),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    config=dict(type='adala_mm.ConfigCheckHook'),
    labels=dict(type='adala_mm.LabelCheckHook'),
    weights=dict(type='adala_mm.WeightsCheckHook'),
    corrupt=dict(type='adala_mm.CorruptImagesHook'),
    pending=dict(type='adala_mm.PendingGradientsHook'),
    preemption=dict(type='adala_mm.PreemptionHook'),
    resume=dict(type='adala_mm.ExactResumeHook'),
    provenance=dict(type='adala_mm.ProvenanceHook'),
    redraw=dict(type='adala_mm.RedrawFeaturesHook'),  # for attentions with random features
    non_finite=dict(type='adala_mm.NonFiniteHook', policy='stop'),
    drift=dict(type='adala_mm.TeacherDriftHook', interval=1000),
    dead_loss=dict(type='adala_mm.DeadLossHook', policy='warn'),
    visualization=dict(type='mmseg.SegVisualizationHook'))
