"""The pages for users of timm and of transformers run as they are written."""
from __future__ import annotations

import re

import timm
import torch
from PIL import Image

import adala_mm
from helpers import ROOT
from helpers.vits import IMAGES, SMALL, awaken, build


def run_page(page: str, folder, monkeypatch) -> dict:
    """The code of a page as it stands, in a folder with a few images, in one step an epoch."""
    for i in range(33):
        (folder / 'images/class').mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 40), 50 + i).convert('RGB').save(folder / f'images/class/{i}.png')
    monkeypatch.chdir(folder)
    code = re.findall(r'^```python\n(.*?)^```$', (ROOT / page).read_text(encoding='utf-8'), re.DOTALL | re.MULTILINE)
    scope: dict = {}
    for block in code:
        exec(block.replace('epochs=30', 'epochs=1').replace('epochs=4', 'epochs=1'), scope)
    return scope


def test_page_for_timm(tmp_path, monkeypatch):
    create = timm.create_model

    def small(name, **options):
        if not options.pop('pretrained'):
            return create(name, **options)
        model = awaken(create(name, **options | SMALL))
        model.pretrained_cfg = {**model.pretrained_cfg, 'input_size': (3, 32, 32)}
        return model

    monkeypatch.setattr(timm, 'create_model', small)
    scope = run_page('docs/timm.md', tmp_path, monkeypatch)
    assert scope['model'].num_linear_blocks == 2 and scope['model'].num_classes == 10
    wanted = adala_mm.load(tmp_path / 'folder')
    assert torch.equal(wanted.forward_features(IMAGES), scope['model'].eval().forward_features(IMAGES))
    assert callable(scope['stage_1'])


def test_page_for_transformers(tmp_path, monkeypatch):
    import transformers

    from helpers.hf_models import depth_anything
    load = transformers.Dinov2Model.from_pretrained
    processor = transformers.BitImageProcessor(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
    monkeypatch.setattr(transformers.AutoImageProcessor, 'from_pretrained', lambda name, **options: processor)
    monkeypatch.setattr(transformers.Dinov2Model, 'from_pretrained',
                        lambda name, **options: load(name, **options) if options else build('hf_dinov2'))
    monkeypatch.setattr(transformers.DepthAnythingForDepthEstimation, 'from_pretrained',
                        lambda name: awaken(depth_anything()))
    monkeypatch.setattr(transformers.ViTModel, 'from_pretrained', lambda name, add_pooling_layer: build('hf_vit'))
    scope = run_page('docs/transformers.md', tmp_path, monkeypatch)
    assert scope['model'].num_linear_blocks == scope['classifier'].num_linear_blocks == 2
    assert torch.equal(scope['classifier'].dinov2(IMAGES)[0], scope['model'].eval()(IMAGES)[0])
    assert scope['depth_model'].num_linear_blocks == 4 and scope['mae'].num_linear_blocks == 3
