from adala_mm.models.backbones.l2vit import L2ViT
from adala_mm.models.backbones.query_vit import QueryViT
from adala_mm.models.backbones.vit import AdaLAViT

__all__ = ['AdaLAViT', 'L2ViT', 'QueryViT']
