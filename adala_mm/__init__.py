"""adala_mm: linear attention for pretrained Vision Transformers, inside OpenMMLab.

Importing this package loads neither mmseg, mmdet, mmpretrain nor timm. It only compares the installed versions with
the tested ones, so that a missing package is named here and not by a traceback three libraries deep.
"""
from adala_mm.utils.stack import warn_about_stack

__version__ = '0.1.0'

warn_about_stack()
