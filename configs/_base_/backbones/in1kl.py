# ViT-L/16 supervised on ImageNet-21K and 1K (Steiner et al. 2021, augreg), Apache-2.0.
softmax = dict(type='adala_mm.SoftmaxAttention')
linear = dict(type='adala_mm.LinearAttention')
preprocessor = dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5])
pretrained = dict(type='Pretrained', checkpoint='timm://vit_large_patch16_224.augreg_in21k_ft_in1k')
backbone = dict(
    type='adala_mm.AdaLAViT',
    img_size=512,
    patch_size=16,
    embed_dim=1024,
    depth=24,
    num_heads=16,
    norm_eps=1e-6,
    attention=linear,
    init_cfg=pretrained)
