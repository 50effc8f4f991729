"""Mean and std of images that pretrained weights were trained with, against those of a config."""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from timm.models import get_pretrained_cfg

from adala_mm.utils.checkpoint import TIMM, file_notes

Values = Sequence[float]
TOLERANCE = 0.5  # of 255: mean and std are often rounded


def stated_normalisation(checkpoint: str) -> tuple[Values, Values] | None:
    """(mean, std) per RGB channel of 0 ... 255, as a file of tools/convert_vfm.py, or timm of a name, says; or None."""
    if checkpoint.startswith(TIMM):
        facts = get_pretrained_cfg(checkpoint.removeprefix(TIMM))
        return facts and tuple([255 * value for value in part] for part in (facts.mean, facts.std))
    notes = file_notes(Path(checkpoint).expanduser())
    ours = {'adala_mm', 'mean', 'std'} <= notes.keys()  # others may write anything under these names
    return (json.loads(notes['mean']), json.loads(notes['std'])) if ours else None


def other_normalisation(checkpoint: str, mean: Values | None, std: Values | None) -> tuple[str, str] | None:
    """How the normalisation of a config differs from that of the weights, and the fix; None if it does not.

    Args:
        checkpoint: as of ``init_cfg``.
        mean, std: of a data_preprocessor; None if it does not normalise, which the pipeline may do. A single value is
            compared with the mean over RGB; other channels are not those of the weights, and pass.
    """
    stated = stated_normalisation(checkpoint)
    if stated is None or mean is None or std is None or not len(mean) == len(std) in (1, len(stated[0])):
        return None
    wanted = [[sum(right) / len(right)] if len(ours) == 1 else right
              for ours, right in zip((mean, std), stated, strict=True)]
    if all(abs(a - b) <= TOLERANCE for ours, right in zip((mean, std), wanted, strict=True)
           for a, b in zip(ours, right, strict=True)):
        return None
    shown = [[f'{name}=[{",".join(f"{value:.6g}" for value in values)}]' for name, values in zip(
        ('mean', 'std'), both, strict=True)] for both in ((mean, std), wanted)]
    fix = ' '.join(f'model.data_preprocessor.{value}' for value in shown[1])
    return (f'the data_preprocessor normalises by {" ".join(shown[0])}, and {checkpoint} was trained with '
            f'{" ".join(shown[1])}', f'--cfg-options {fix}')
