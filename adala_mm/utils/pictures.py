"""Pictures of features and of segmentations."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from torch import Tensor

REACHES = 8, 13, 20, 30, 44, 60, 80, 110, 150, 200  # from a point to its name, in pixels, that are tried


def shared_pca(maps: list[Tensor]) -> list[np.ndarray]:
    """First three principal components of feature maps, as RGB in [0, 1] (ViT-AdaLA Figs. 13 and 14).

    Components and value range come from the first entry, the teacher: equal colours mean equal features, across
    networks as well as across images.

    Args:
        maps: one tensor (B, C, h, w) per network, for the same B images.

    Returns:
        one array (B, h, w, 3) per network.
    """
    def rows(feature: Tensor) -> Tensor:
        return feature.float().permute(0, 2, 3, 1).flatten(0, 2)  # (B * h * w, C)

    reference = rows(maps[0])
    mean = reference.mean(dim=0)
    _, _, components = torch.linalg.svd(reference - mean, full_matrices=False)
    projected = (reference - mean) @ components[:3].T
    low, high = torch.quantile(projected, 0.02, dim=0), torch.quantile(projected, 0.98, dim=0)

    def colours(feature: Tensor) -> np.ndarray:
        b, _, h, w = feature.shape
        scaled = ((rows(feature) - mean) @ components[:3].T - low) / (high - low).clamp_min(1e-12)
        return scaled.clamp(0, 1).reshape(b, h, w, 3).cpu().numpy()

    return [colours(feature) for feature in maps]


def overlay(image: np.ndarray, label: np.ndarray, palette: list[list[int]], opacity: float = 0.8) -> np.ndarray:
    """Image (H, W, 3) uint8 with labels (H, W) painted over it; labels without a colour (255) stay unpainted."""
    colours = np.asarray(palette, dtype=float)
    known = label < len(colours)
    out = image.astype(float)
    out[known] = (1 - opacity) * out[known] + opacity * colours[label[known]]
    return out.round().astype(np.uint8)


def size_axis(axis: Axes, sizes: Sequence[int]) -> None:
    """Image sizes from left to right, a tick each, twice the size being the same step everywhere."""
    axis.set_xscale('log', base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a figure as PNG. A ``Figure`` that pyplot does not know needs no display and leaves no state behind."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format='png')


def picture_grid(path: str | Path, columns: dict[str, list[np.ndarray]], title: str = '', side: float = 2.2) -> None:
    """Pictures (H, W, 3) side by side as PNG: one row per picture, one titled column per entry.

    Args:
        columns: as many pictures each, of any resolution but one ratio of sides in a row.
        side: width of a picture in inches.
    """
    count = len(next(iter(columns.values())))
    ratios = [picture.shape[0] / picture.shape[1] for picture in next(iter(columns.values()))]
    figure = Figure(figsize=(side * len(columns) + 0.2, side * sum(ratios) + 0.45 + 0.35 * bool(title)),
                    layout='constrained')
    axes = figure.subplots(count, len(columns), squeeze=False, gridspec_kw=dict(height_ratios=ratios))
    for j, (name, pictures) in enumerate(columns.items()):
        axes[0, j].set_title(name, fontsize=9)
        for axis, picture in zip(axes[:, j], pictures, strict=True):
            axis.imshow(picture, interpolation='nearest')
            axis.set_axis_off()
    if title:
        figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def label_points(axis: Axes, points: Sequence[tuple[float, float, str]], colours: Sequence[str],
                 lines: Sequence[Line2D] = ()) -> None:
    """Writes a name beside each point (x, y, name), where it covers least of other names, of points and of ``lines``.

    Names are placed one after the other, so the first ones are nearest to their points; one that is far from its point
    gets a line to it. Draw everything else first: places are found in pixels.
    """
    figure = axis.figure
    figure.draw_without_rendering()  # lays the axes out,
    figure.set_layout_engine('none')  # and there they stay
    spots = axis.transData.transform(np.reshape([point[:2] for point in points], (-1, 2)))
    frame = axis.get_window_extent().extents
    around = np.concatenate([spots - 9, spots + 9], axis=1)  # a name there would seem to be the point's
    paths = [axis.transData.transform_path(line.get_path()).interpolated(30).vertices for line in lines]
    taken = np.concatenate([np.concatenate([path - 3, path + 3], axis=1) for path in [*paths, np.empty((0, 2))]])
    angles, reaches = (values.ravel() for values in np.meshgrid(np.linspace(0, 2 * np.pi, 24, endpoint=False), REACHES))
    halo = [withStroke(linewidth=2.5, foreground='white')]
    for i, (spot, (*place, name), colour) in enumerate(zip(spots, points, colours, strict=True)):
        text = axis.annotate(name, place, xytext=(0, 0), textcoords='offset points', color=colour, fontsize=9,
                             ha='center', va='center', zorder=5, path_effects=halo)
        half = np.array([text.get_window_extent().width / 2 + 2, text.get_window_extent().height / 2 + 1])
        offsets = np.stack([np.cos(angles), np.sin(angles)], axis=1) * (half + reaches[:, None])
        boxes = np.concatenate([spot + offsets - half, spot + offsets + half], axis=1)
        covered = overlap(boxes, np.concatenate([taken, np.delete(around, i, axis=0)])).sum(axis=1)
        outside = 4 * half.prod() - overlap(boxes, frame[None])[:, 0]
        best = np.argmin(covered + 3 * outside + 8 * reaches)
        taken, points_per_pixel = np.concatenate([taken, boxes[best:best + 1]]), 72 / figure.dpi
        text.set_position(offsets[best] * points_per_pixel)
        if reaches[best] > REACHES[0]:
            nearest = np.clip(0, offsets[best] - half, offsets[best] + half)
            way = spot + np.linspace(0.2, 1, 10)[:, None] * nearest  # later names keep off this line, too
            taken = np.concatenate([taken, np.concatenate([way - 3, way + 3], axis=1)])
            axis.annotate('', place, xytext=nearest * points_per_pixel, textcoords='offset points', zorder=1,
                          arrowprops=dict(arrowstyle='-', color=colour, lw=0.6, shrinkA=0, shrinkB=2))


def overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Areas (n, m) that boxes (n, 4) and (m, 4), of x0, y0, x1, y1 each, have in common."""
    low, high = np.maximum(one[:, None, :2], other[:, :2]), np.minimum(one[:, None, 2:], other[:, 2:])
    return (high - low).clip(min=0).prod(axis=2)
