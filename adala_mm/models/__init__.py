from adala_mm.models import algorithms, attentions, backbones

__all__ = ['algorithms', 'attentions', 'backbones']
