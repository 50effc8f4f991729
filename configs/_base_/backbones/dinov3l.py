# DINOv3 ViT-L/16 (Siméoni et al. 2025), LVD-1689M, DINOv3 License. Rotary positions: any size is a native one.
softmax = dict(type='adala_mm.SoftmaxAttention')
linear = dict(type='adala_mm.LinearAttention')
preprocessor = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
pretrained = dict(type='Pretrained', checkpoint='timm://vit_large_patch16_dinov3.lvd1689m')
backbone = dict(
    type='adala_mm.AdaLAViT',
    img_size=512,
    patch_size=16,
    embed_dim=1024,
    depth=24,
    num_heads=16,
    norm_eps=1e-5,
    qkv_bias=False,
    num_registers=4,
    layer_scale=1e-5,
    rotary=dict(),
    attention=linear,
    init_cfg=pretrained)
