from adala_mm.models.backbones.vit import AdaLAViT

__all__ = ['AdaLAViT']
