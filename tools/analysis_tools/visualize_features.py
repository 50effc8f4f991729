"""Draws the patch features of a teacher and its students in shared colours (ViT-AdaLA Figs. 13 and 14).

    python tools/analysis_tools/visualize_features.py [NAME=]CONFIG[:CHECKPOINT] ... [--teacher CONFIG[:CHECKPOINT]]
        [--images PATH ...] [--num-images N] [--size H [W]] [--block I] [--out DIR]

The first three principal components of the teacher's features become red, green and blue. The students' features are
projected on the same components, so equal colours mean equal features. Writes features.png and features.json;
docs/analysis.md explains them.
"""
from __future__ import annotations

import argparse

import torch
from mmengine.utils import ProgressBar
from torch import Tensor

from adala_mm.analysis import (
    Network,
    add_size,
    analysis_parser,
    find_images,
    normalise,
    open_networks,
    outputs,
    read_image,
    require_equal,
    write,
)
from adala_mm.models.algorithms.base import relative_error
from adala_mm.utils.cli import one_message
from adala_mm.utils.pictures import picture_grid, shared_pca
from adala_mm.utils.tables import markdown_table


@torch.no_grad()
def feature_map(network: Network, images: Tensor, block: int) -> Tensor:
    """Patch features (B, C, h, w) after a block and the final LayerNorm."""
    vit = network.model
    x, hw = vit.embed(images)
    layout = vit.layout(x, hw)
    for layer in vit.blocks[:block]:
        x = layer(x, *layout)
    return vit.norm(x)[:, vit.num_prefix:].transpose(1, 2).unflatten(2, hw)


def explained(features: Tensor) -> list[float]:
    """Shares of the variance of (B, C, h, w) that the first three principal components have."""
    rows = features.double().permute(0, 2, 3, 1).flatten(0, 2)
    variance = torch.linalg.eigvalsh(torch.cov(rows.T)).flip(0)
    return (variance[:3] / variance.sum().clamp_min(1e-12)).tolist()


def main() -> None:
    parser = analysis_parser(__doc__, num_images=4)
    add_size(parser)
    parser.add_argument('--block', type=int, metavar='I',
                        help='draw the features after this block, counted from 1 (default: the last)')
    args = parser.parse_args()
    with one_message():
        run(args)


def run(args: argparse.Namespace) -> None:
    json_path, png_path = outputs(args, 'features')
    teacher, students = open_networks(args)
    require_equal(teacher, students, 'embed_dim')
    depth = min(len(network.model.blocks) for network in (teacher, *students))
    if args.block is not None and not 1 <= args.block <= depth:
        raise ValueError(f'--block {args.block}: blocks are 1 to {depth}')
    paths = find_images(args, students)
    images = [read_image(path, teacher.size) for path in paths]
    maps, progress = [], ProgressBar((1 + len(students)) * len(images))
    for network in (teacher, *students):
        parts = []
        for image in images:  # one at a time: no size is too large for many images
            batch = normalise([image], network.preprocessor, args.device)
            parts.append(feature_map(network, batch, args.block or len(network.model.blocks)).float().cpu())
            progress.update()
        maps.append(torch.cat(parts))
    print()
    rows = []
    for student, features in zip(students, maps[1:], strict=True):
        row = dict(name=student.name)
        if features.shape == maps[0].shape:
            row |= dict(rel_error=relative_error(features, maps[0]).item(),
                        cosine=torch.cosine_similarity(features, maps[0], dim=1).mean().item())
        rows.append(row)
    titles = ['teacher'] + [f'{row["name"]}\nerror {row["rel_error"]:.2f}' if 'rel_error' in row else row['name']
                            for row in rows]
    picture_grid(png_path, {'image': images} | {
        title: list(picture) for title, picture in zip(titles, shared_pca(maps), strict=True)})
    write(json_path, dict(students=rows, explained_variance=explained(maps[0]), images=paths,
                          settings=dict(size=teacher.size, block=args.block)), args.device, [teacher, *students])
    print(markdown_table(['student', 'relative error of patch features', 'cosine'],
                         [[row['name'], *(f'{row[key]:.3f}' if key in row else '-' for key in ('rel_error', 'cosine'))]
                          for row in rows]), f'{png_path}\n{json_path}', sep='\n\n')


if __name__ == '__main__':
    main()
