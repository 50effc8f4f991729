from adala_mm.adapters.architectures import ARCHITECTURES, Architecture, find_vit
from adala_mm.adapters.base import Adapter, Layout, Packed

__all__ = ['ARCHITECTURES', 'Adapter', 'Architecture', 'Layout', 'Packed', 'find_vit']
