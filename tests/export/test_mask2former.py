"""Exported Mask2Former, whose pixel decoder is ours in place of mmdet's."""
from __future__ import annotations

import pytest
import torch
from mmengine.config import Config

from adala_mm import export
from adala_mm.export.mask2former import symbolic_sizes
from adala_mm.registry import ATTENTIONS
from helpers import LINEAR, ROOT, tiny_vit
from helpers.exporting import awake, compared

ATTENTIONS.import_from_location()


@pytest.fixture(scope='module')
def mask2former() -> export.Target:
    """The demo's Mask2Former with one layer each, on a tiny ViT."""
    torch.manual_seed(0)
    cfg = Config.fromfile(ROOT / 'configs/demo/mask2former_demo_beacons.py')
    head = cfg.model.decode_head
    head.in_channels, head.num_queries, cfg.model.neck.embed_dim = [32] * 4, 5, 32
    head.pixel_decoder.encoder.num_layers = head.transformer_decoder.num_layers = 1
    cfg.model.backbone = Config(tiny_vit(attention=LINEAR, out_indices=[-1] * 4))._cfg_dict
    return awake(export.assemble(cfg, 'model'))


@torch.no_grad()
def test_our_pixel_decoder_is_mmdets(mask2former):
    decoder = mask2former.model.decode_head.pixel_decoder
    feats = [torch.randn(2, 32, 24 // step, 16 // step) for step in (1, 2, 4, 8)]
    wanted, maps = decoder(feats)
    with symbolic_sizes(mask2former.model):
        got, other = decoder(feats)
    assert torch.allclose(got, wanted, atol=1e-4) and len(maps) == len(other)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(maps, other, strict=True))
    assert 'forward' not in vars(decoder)


def test_mask2former(mask2former, tmp_path):
    assert mask2former.multiple == 16  # the pyramid halves the grid of 8 pixels
    run = export.export_onnx(mask2former, tmp_path / 'model.onnx')
    compared(mask2former, run)
    assert run(torch.randn(2, 3, 32, 48))[0].shape == (2, 6, 32, 48)
