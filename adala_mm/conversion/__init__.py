"""Converts pretrained weights of other libraries for `AdaLAViT`; `tools/convert_vfm.py` is the command."""
from adala_mm.conversion.convert import PATCH_METHODS, compare, convert, resample
from adala_mm.conversion.families import FAMILIES, Family
from adala_mm.conversion.keys import SOURCES
from adala_mm.conversion.output import config_text, metadata, report_table, write
from adala_mm.conversion.source import Converted

__all__ = ['FAMILIES', 'PATCH_METHODS', 'SOURCES', 'Converted', 'Family', 'compare', 'config_text', 'convert',
           'metadata', 'report_table', 'resample', 'write']
