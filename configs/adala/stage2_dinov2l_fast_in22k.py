# Stage 2 of DINOv2-L with what keeps a GPU busy: bfloat16, compiled blocks, fused AdamW, more loaders.
# For fewer pixels at first: custom_hooks = [dict(type='adala_mm.ProgressiveResolutionHook', sizes={0: 256, 3: 512})]
from mmengine.config import read_base

with read_base():
    from .stage2_dinov2l_in22k import *

model['backbone'].update(compile=True)
model['teacher'].update(compile=True)
model['backbone'].update(init_cfg=dict(type='Pretrained', checkpoint='work_dirs/stage1_dinov2l_fast_coco/epoch_4.pth'))
optim_wrapper.update(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0)
optim_wrapper['optimizer'].update(fused=True)
train_dataloader.update(num_workers=12, prefetch_factor=4, pin_memory=True)
