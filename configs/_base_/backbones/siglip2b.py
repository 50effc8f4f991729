# SigLIP 2 ViT-B/16 (Tschannen et al. 2025) at 512 px, without class token and attention pool, Apache-2.0.
# timm runs this one with exact GELU; tanh is what it was trained with, and what transformers runs.
softmax = dict(type='adala_mm.SoftmaxAttention')
linear = dict(type='adala_mm.LinearAttention')
preprocessor = dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5])
pretrained = dict(type='Pretrained', checkpoint='timm://vit_base_patch16_siglip_512.v2_webli')
backbone = dict(
    type='adala_mm.AdaLAViT',
    img_size=512,
    patch_size=16,
    embed_dim=768,
    depth=12,
    num_heads=12,
    norm_eps=1e-6,
    class_token=False,
    act='gelu_tanh',
    attention=linear,
    init_cfg=pretrained)
