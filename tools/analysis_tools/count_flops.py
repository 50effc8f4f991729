"""Counts parameters and multiply-adds of whole backbones, attention included (ViT-AdaLA Tables 1, 2, 4, 10 to 12).

    python tools/analysis_tools/count_flops.py [CONFIG ...] [--sizes 512 1024] [--out flops.json]

PyTorch counts them from shapes as it dispatches operators. This takes seconds and needs neither data nor weights nor a
GPU. Without configs, it counts DINOv2-L with softmax attention, linear attention and the seven baselines. "Mixing" is
what the attention adds to a ViT without any attention: patch embedding, projections and MLPs are the same in all rows.
Savings compare with the first row.
"""
from __future__ import annotations

import argparse
import logging

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from adala_mm.models.backbones import AdaLAViT
from adala_mm.utils.cli import find_config, one_message
from adala_mm.utils.cost import multiply_adds
from adala_mm.utils.records import save
from adala_mm.utils.tables import markdown_table

BASELINES = ('hedgehog', 'lolcats', 'linformer', 'performer', 'cosformer', 'nystromformer', 'monarch')
CONFIGS = ['mask2former_dinov2l_softmax_ade20k', 'mask2former_dinov2l_ade20k',
           *(f'mask2former_dinov2l_{name}_ade20k' for name in BASELINES)]


class NoMixing(nn.Module):
    """The projections of an attention and nothing between them."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.qkv, self.proj = attention.qkv, attention.proj

    def forward(self, x: torch.Tensor, *layout: object) -> torch.Tensor:
        return self.proj(self.qkv(x).chunk(3, dim=-1)[0])


@torch.no_grad()
def count(config: str, sizes: list[int]) -> dict:
    """Facts of one backbone: attention, parameters, and by size the multiply-adds of all, and of mixing.

    Positions are stored as the config has them; images of other sizes resample them, which adds no parameter.

    Raises:
        ValueError: if the backbone is another than AdaLAViT, whose blocks can do without mixing.
    """
    cfg = Config.fromfile(find_config(config))
    kind = MODELS.get(cfg.model.backbone.type)
    if kind is None or not issubclass(kind, AdaLAViT):
        raise ValueError(f'{config}: only AdaLAViT is counted, and the backbone is {cfg.model.backbone.type}')
    with FakeTensorMode():
        backbone = MODELS.build(cfg.model.backbone).eval()
        row = dict(config=config, attention=type(backbone.blocks[0].attn).__name__,
                   parameters=sum(p.numel() for p in backbone.parameters()), total={}, mixing={})
        images = {size: torch.empty(1, 3, size, size) for size in sizes}
        for size, image in images.items():
            row['total'][str(size)] = multiply_adds(lambda image=image: backbone(image))
        for block in backbone.blocks:
            block.attn = NoMixing(block.attn)
        for size, image in images.items():
            rest = multiply_adds(lambda image=image: backbone(image))
            row['mixing'][str(size)] = row['total'][str(size)] - rest
    return row


def table(rows: list[dict]) -> str:
    """A row a backbone; for each size its multiply-adds, those of mixing, and the saving against the first row."""
    sizes, first = list(rows[0]['total']), rows[0]
    header = ['attention', 'parameters (M)']
    for size in sizes:
        header += [f'{size} px: 10⁹ multiply-adds', 'of these mixing', 'saved']
    return markdown_table(header, [
        [row['attention'].removesuffix('Attention'), f'{row["parameters"] / 1e6:.2f}',
         *(cell for size in sizes for cell in (
             f'{row["total"][size] / 1e9:,.2f}', f'{row["mixing"][size] / 1e9:,.2f}',
             f'{100 * (1 - row["total"][size] / first["total"][size]):.1f} %'))] for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', nargs='*', default=CONFIGS,
                        help='files or names of configs (default: those of DINOv2-L)')
    parser.add_argument('--sizes', nargs='+', type=int, default=[512, 1024],
                        help='sides of the image in pixels (default: 512 1024)')
    parser.add_argument('--out', help='also write the figures to this JSON file')
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    with one_message():
        rows = [count(config, args.sizes) for config in args.configs]
    print(table(rows))
    if args.out:
        save(args.out, dict(rows=rows))


if __name__ == '__main__':
    main()
