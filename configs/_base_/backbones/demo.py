# A ViT small enough to train in minutes on a CPU: 0.7 M parameters, 100 patches and a class token.
softmax = dict(type='adala_mm.SoftmaxAttention')
linear = dict(type='adala_mm.LinearAttention')
backbone = dict(
    type='adala_mm.AdaLAViT', img_size=80, patch_size=8, embed_dim=96, depth=6, num_heads=3, attention=softmax)
