"""Checks that an exported file computes what the model computes."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adala_mm.utils.tables import markdown_table

Run = Callable[[Tensor], Sequence[Tensor]]


class Difference(NamedTuple):
    """Greatest absolute difference of all outputs for one shape of images, and the greatest value."""

    batch: int
    height: int
    width: int
    error: float
    greatest: float


def shapes(size: tuple[int, int], multiple: int, dynamic: bool) -> list[tuple[int, int, int]]:
    """Shapes (B, H, W) to compare at: two batch sizes, and if the size is free a second size that is not square."""
    height, width = size
    narrow = max(2, width // 2 // multiple) * multiple
    sizes = [size, (height + multiple, narrow)] if dynamic else [size]
    return [(batch, *other) for other in sizes for batch in (1, 3)]


@torch.no_grad()
def differences(model: Run, exported: Run, images: Iterable[tuple[int, int, int]]) -> list[Difference]:
    """Compares two functions on random images of the shapes (B, H, W).

    Raises:
        ValueError: if ``exported`` does not run at one of them.
    """
    generator, found = torch.Generator().manual_seed(0), []
    for batch, height, width in images:
        image = torch.randn(batch, 3, height, width, generator=generator)
        wanted = model(image)
        try:
            got = exported(image)
        except Exception as error:  # of any runtime
            raise ValueError(f'the exported graph does not run on {batch} images of {height} x {width} '
                             f'({last_line(error)}); --fixed-size ties it to one size') from error
        error = max((a - b).abs().max().item() if a.shape == b.shape else float('inf')
                    for a, b in zip(wanted, got, strict=True))
        found.append(Difference(batch, height, width, error, max(a.abs().max().item() for a in wanted)))
    return found


def check(found: list[Difference], tolerance: float) -> None:
    """Raises ValueError unless all errors are within ``tolerance`` of the greatest value, or of 1 if that is less."""
    for row in found:
        if not row.error <= tolerance * max(1.0, row.greatest):
            raise ValueError(f'the exported file differs by {row.error:.2e} from the model on {row.batch} images of '
                             f'{row.height} x {row.width}, whose greatest output is {row.greatest:.3g}; --tolerance '
                             f'{tolerance:g} allows {tolerance * max(1.0, row.greatest):.2e}. Nothing is written')


def difference_table(found: list[Difference]) -> str:
    return markdown_table(['images', 'pixels', 'greatest difference', 'greatest value'],
                          [[str(row.batch), f'{row.height} x {row.width}', f'{row.error:.1e}', f'{row.greatest:.3g}']
                           for row in found])


def last_line(error: BaseException) -> str:
    """The end of the first paragraph of a long message, which in PyTorch and ONNX Runtime says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0][-240:]
