"""Makes mmdet and Mask2Former work where mmcv was installed without its compiled ops.

Without ``mmcv._ext``, ``import mmcv.ops`` fails, mmdet with it, and mmseg then quietly builds its Mask2FormerHead on
an empty base class. A stand-in ``mmcv._ext`` cures all three: deformable attention runs in PyTorch, non-maximum
suppression, RoIAlign and the focal loss on torchvision, all of them on any device, and every other compiled op raises
an error that names it. A compiled mmcv is left untouched.
"""
from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType

from adala_mm.ops.deformable_attention import ms_deform_attn_backward, ms_deform_attn_forward
from adala_mm.utils import mmcv_box_ops


class MissingOp(RuntimeError):
    """A compiled mmcv op was called, and this mmcv has none."""


def _missing(name: str) -> Callable:
    def op(*args, **kwargs):
        raise MissingOp(f'mmcv op "{name}" needs compiled CUDA/C++ code, and the installed mmcv has none. Install an '
                        'mmcv built for your torch and CUDA (onedl-mmcv wheels: https://mmwheels.onedl.ai; or build '
                        'from source with MMCV_WITH_OPS=1 pip install --no-build-isolation onedl-mmcv).')
    op.__name__ = name
    return op


class _StandIn(ModuleType):
    """``mmcv._ext`` without compiled code: ops that PyTorch and torchvision have, and named errors for the rest."""

    ms_deform_attn_forward = staticmethod(ms_deform_attn_forward)
    ms_deform_attn_backward = staticmethod(ms_deform_attn_backward)
    nms = staticmethod(mmcv_box_ops.nms)
    roi_align_forward = staticmethod(mmcv_box_ops.roi_align_forward)
    roi_align_backward = staticmethod(mmcv_box_ops.roi_align_backward)
    sigmoid_focal_loss_forward = staticmethod(mmcv_box_ops.sigmoid_focal_loss_forward)
    sigmoid_focal_loss_backward = staticmethod(mmcv_box_ops.sigmoid_focal_loss_backward)
    # mmcv's collect_env, which every Runner logs, asks these two.
    get_compiler_version = staticmethod(lambda: 'n/a')
    get_compiling_cuda_version = staticmethod(lambda: 'n/a')

    def __getattr__(self, name: str) -> Callable:
        if name.startswith('__'):
            raise AttributeError(name)
        return _missing(name)


def provide_mmcv_ops() -> bool:
    """Puts the stand-in in place unless mmcv has compiled ops.

    Returns:
        True if the stand-in is (or already was) in use, False if mmcv has its own compiled ops, or is not installed.
    """
    present = sys.modules.get('mmcv._ext')
    if present is not None:
        return isinstance(present, _StandIn)
    if importlib.util.find_spec('mmcv') is None or importlib.util.find_spec('mmcv._ext') is not None:
        return False
    stand_in = _StandIn('mmcv._ext')
    stand_in.__spec__ = ModuleSpec('mmcv._ext', loader=None)
    sys.modules['mmcv._ext'] = stand_in
    _repair_importers()
    return True


def _repair_importers() -> None:
    """Gives mmseg and mmdet the ops they missed, if they were imported before the stand-in was there.

    MMSegInferencer and mmseg's own scripts import ``mmseg.models`` first and meet adala_mm only when they build the
    backbone; the decode head is built after it. mmdet puts a stub in place of each op that it cannot import, and
    mmseg an empty base class under its Mask2FormerHead.
    """
    importers = [m for name, m in list(sys.modules.items()) if name.startswith(('mmdet.', 'mmseg.'))]
    if not importers:
        return
    ops = importlib.import_module('mmcv.ops')
    for module in importers:
        for name, value in list(vars(module).items()):
            if hasattr(ops, name) and _is_stub(value, module):
                setattr(module, name, getattr(ops, name))
    head = sys.modules.get('mmseg.models.decode_heads.mask2former_head')
    if head is not None:
        from mmseg.registry import MODELS
        MODELS._module_dict.pop('Mask2FormerHead', None)
        importlib.reload(head)


def _is_stub(value: object, module: ModuleType) -> bool:
    """Whether ``value`` is mmdet's placeholder for an op: defined on the spot, and good for one error message only."""
    if getattr(value, '__module__', None) != module.__name__:
        return False
    function = value.__init__ if isinstance(value, type) else value
    return 'requires mmcv to be compiled' in str(getattr(getattr(function, '__code__', None), 'co_consts', ''))
