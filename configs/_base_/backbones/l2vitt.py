# L2ViT-T (Zheng 2025), trained here from scratch: there is no converter for the published weights.
preprocessor = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
widths = [96, 192, 384, 768]
backbone = dict(type='adala_mm.L2ViT', arch='tiny')
