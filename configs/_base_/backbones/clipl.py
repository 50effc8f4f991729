# CLIP ViT-L/14 (Radford et al. 2021), the image tower with quick-GELU and a norm before the first block, MIT.
# Run at patch 16, as the paper's token counts imply: the 14 x 14 kernel is resampled when it is loaded.
softmax = dict(type='adala_mm.SoftmaxAttention')
linear = dict(type='adala_mm.LinearAttention')
preprocessor = dict(mean=[122.7709383, 116.7460125, 104.09373615], std=[68.5005327, 66.6321579, 70.32316305])
pretrained = dict(type='Pretrained', checkpoint='timm://vit_large_patch14_clip_quickgelu_224.openai')
backbone = dict(
    type='adala_mm.AdaLAViT',
    img_size=512,
    patch_size=16,
    embed_dim=1024,
    depth=24,
    num_heads=16,
    norm_eps=1e-5,
    pre_norm=True,
    act='quick_gelu',
    attention=linear,
    init_cfg=pretrained)
