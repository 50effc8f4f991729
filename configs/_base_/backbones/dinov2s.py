# DINOv2 ViT-S/14 (Oquab et al. 2024), LVD-142M, Apache-2.0.
# Run at patch 16, as the larger ones: the 14 x 14 kernel is resampled when it is loaded.
softmax = dict(type='adala_mm.SoftmaxAttention')
linear = dict(type='adala_mm.LinearAttention')
preprocessor = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
pretrained = dict(type='Pretrained', checkpoint='timm://vit_small_patch14_dinov2.lvd142m')
backbone = dict(
    type='adala_mm.AdaLAViT',
    img_size=512,
    patch_size=16,
    embed_dim=384,
    depth=12,
    num_heads=6,
    norm_eps=1e-6,
    layer_scale=1e-5,
    attention=linear,
    init_cfg=pretrained)
