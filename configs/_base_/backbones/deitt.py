# DeiT-tiny (Touvron et al. 2021): ViT-Ti/16 at 224 px, ImageNet-1K, Apache-2.0.
# timm deit_tiny_patch16_224.fb_in1k; its model.safetensors goes to data/weights/deit_tiny_patch16_224.safetensors
softmax = dict(type='adala_mm.SoftmaxAttention')
linear = dict(type='adala_mm.LinearAttention')
preprocessor = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
pretrained = dict(type='Pretrained', checkpoint='data/weights/deit_tiny_patch16_224.safetensors')
backbone = dict(
    type='adala_mm.AdaLAViT',
    img_size=224,
    patch_size=16,
    embed_dim=192,
    depth=12,
    num_heads=3,
    norm_eps=1e-6,
    attention=linear,
    init_cfg=pretrained)
