from adala_mm.adapters.base import Adapter, Layout, Packed
from adala_mm.adapters.families import FAMILIES, Family, find_vit

__all__ = ['FAMILIES', 'Adapter', 'Family', 'Layout', 'Packed', 'find_vit']
