from adala_mm.models import algorithms, attentions, backbones, necks

__all__ = ['algorithms', 'attentions', 'backbones', 'necks']
