"""adala_mm: linear attention for pretrained Vision Transformers, inside OpenMMLab.

Importing this package loads neither mmseg, mmdet, mmpretrain nor timm, and changes nothing in them. It only compares
the installed versions with the tested ones, so that a missing package is named here and not by a traceback three
libraries deep. What runs of MMEngine need is in `adala_mm.openmmlab`.
"""
from importlib import import_module
from typing import TYPE_CHECKING

from adala_mm.utils.stack import warn_about_stack
from adala_mm.version import __version__ as __version__

if TYPE_CHECKING:
    from adala_mm.alignment import align
    from adala_mm.calibration import calibrate
    from adala_mm.linearization import linearize
    from adala_mm.serialization import load, save

__all__ = ['align', 'calibrate', 'linearize', 'load', 'save']
EXPORTED = {'align': 'adala_mm.alignment', 'calibrate': 'adala_mm.calibration',
            'linearize': 'adala_mm.linearization',
            'load': 'adala_mm.serialization', 'save': 'adala_mm.serialization'}

warn_about_stack()


def __getattr__(name: str):  # importing the package must not import torch
    if name not in EXPORTED:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(EXPORTED[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *EXPORTED]
