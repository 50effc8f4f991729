from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from torch import nn

from adala_mm.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(AmpOptimWrapper):
    """MMEngine's automatic mixed precision without a GPU, which its own wrapper insists on.

    For trying and testing a recipe where there is none; on a GPU use ``AmpOptimWrapper``, whose options these are.

    Args:
        loss_scale: ``dynamic``, a fixed factor, or a dict of options of ``torch.amp.GradScaler``.
        dtype: ``bfloat16`` or ``float16``.
        **kwargs: of ``OptimWrapper``.

    Raises:
        ValueError: for another ``dtype`` or ``loss_scale``.
    """

    def __init__(self, loss_scale: str | float | dict = 'dynamic', dtype: str = 'bfloat16', **kwargs) -> None:
        if dtype not in ('bfloat16', 'float16'):
            raise ValueError(f'dtype={dtype!r}: mixed precision is bfloat16 or float16')
        if loss_scale != 'dynamic' and not isinstance(loss_scale, (float, dict)):
            raise ValueError(f"loss_scale={loss_scale!r}: give 'dynamic', a float or a dict of options")
        OptimWrapper.__init__(self, **kwargs)
        self._scale_update_param = loss_scale if isinstance(loss_scale, float) else None
        options = dict(init_scale=loss_scale) if isinstance(loss_scale, float) else loss_scale
        self.loss_scaler = torch.amp.GradScaler('cpu', **({} if options == 'dynamic' else options))
        self.cast_dtype = getattr(torch, dtype)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with OptimWrapper.optim_context(self, model), torch.autocast('cpu', dtype=self.cast_dtype):
            yield
