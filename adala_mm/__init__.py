"""adala_mm: linear attention for pretrained Vision Transformers, inside OpenMMLab.

Importing this package loads neither mmseg, mmdet, mmpretrain nor timm. It only compares the installed versions with
the tested ones, so that a missing package is named here and not by a traceback three libraries deep, and sees to it
that mmpretrain, once it is imported, survives transformers 5.
"""
from adala_mm.utils.mmpretrain_compat import tolerate_transformers_5
from adala_mm.utils.stack import warn_about_stack

__version__ = '0.1.0'

warn_about_stack()
tolerate_transformers_5()


def __getattr__(name: str):
    if name not in ('align', 'linearize'):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from adala_mm.align import align
    from adala_mm.linearize import linearize
    globals().update(align=align, linearize=linearize)  # both: importing them has put their modules there
    return globals()[name]
