"""tools/convert_vfm.py: what it writes, checks and refuses."""
from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

import adala_mm
from adala_mm.conversion import FAMILIES, convert, metadata, write
from adala_mm.registry import MODELS
from helpers import ROOT
from helpers.sources import DEPTH, HEADS, SOFTMAX, WIDTH, difference, original, randomise


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location('convert_vfm', ROOT / 'tools/convert_vfm.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool, monkeypatch, capsys):
    """Runs the command; returns what it printed."""
    def run(*arguments) -> str:
        monkeypatch.setattr(sys, 'argv', ['convert_vfm.py', *map(str, arguments)])
        tool.main()
        return capsys.readouterr().out
    return run


@pytest.fixture
def src(tmp_path) -> Path:
    path = tmp_path / 'src.safetensors'
    save_file({key: value.contiguous() for key, value in original('timm', 'deit')[0].items()}
              | {'head.weight': torch.randn(5, WIDTH)}, path)
    return path


@torch.no_grad()
def test_the_command(run, src, tmp_path):
    out = tmp_path / 'new' / 'out.safetensors'
    printed = run(src, out, '--family', 'deit', '--patch-size', 8, '--img-size', 48, 64, '--check')
    for line in ('| loaded | 30 | timm |', '| dropped | 1 | classifier or projection: head.weight |',
                 '| resampled | 1 | patch kernel 16 -> 8, flexi |',
                 '| resampled | 1 | positions 4x4 -> 6x8, bicubic, antialiased |'):
        assert line in printed
    assert re.search(r'photograph of matplotlib at native size: tokens differ by at most \S+ from timm 1', printed)

    with safe_open(out, 'pt') as file:
        notes, keys = file.metadata(), file.keys()
    assert all(key.startswith('backbone.') for key in keys) and len(keys) == 30
    mean, std = FAMILIES['deit'].normalise
    assert notes == {
        'format': 'pt', 'adala_mm': adala_mm.__version__, 'source': 'timm: src.safetensors', 'family': 'deit',
        'sha256': hashlib.sha256(src.read_bytes()).hexdigest(), 'licence': 'Apache-2.0', 'patch_size': '8',
        'mean': json.dumps(mean), 'std': json.dumps(std), 'position_grid': '6x8',
        'resampled': 'patch kernel 16 -> 8, flexi; positions 4x4 -> 6x8, bicubic, antialiased'}

    # The printed config loads the file, strictly, and gives the features of timm's ViT at patch 8.
    scope: dict = {}
    exec(printed[printed.index('preprocessor = '):], scope)
    assert scope['preprocessor'] == dict(mean=list(mean), std=list(std))
    assert scope['backbone']['attention'] == {'type': 'adala_mm.LinearAttention'}
    model = MODELS.build(scope['backbone'] | {'attention': SOFTMAX})
    model.init_weights()
    theirs = VisionTransformer(img_size=32, patch_size=8, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=0,
                               dynamic_img_size=True).eval()
    state = original('timm', 'deit')[0]
    theirs.load_state_dict(checkpoint_filter_fn(dict(state), theirs))
    image = torch.randn(1, 3, 48, 64)
    assert difference(model.eval().forward_features(image), theirs.forward_features(image)) < 1e-4


def test_check_on_a_given_image(run, src, tmp_path):
    from PIL import Image
    Image.new('L', (50, 30), 128).save(tmp_path / 'grey.png')
    printed = run(src, tmp_path / 'out.safetensors', '--family', 'deit', '--check', tmp_path / 'grey.png')
    assert f'{tmp_path / "grey.png"} at native size' in printed
    with pytest.raises(SystemExit, match=r'absent\.png'):
        run(src, tmp_path / 'out2.safetensors', '--family', 'deit', '--check', tmp_path / 'absent.png')
    assert not (tmp_path / 'out2.safetensors').exists()


def test_nothing_is_written_if_the_features_differ(run, tool, src, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, 'compare', lambda *_: ('timm', 0.3, 2.0))
    with pytest.raises(SystemExit, match='features are not those of the source'):
        run(src, tmp_path / 'out.safetensors', '--family', 'deit', '--check')
    assert not (tmp_path / 'out.safetensors').exists()


def test_nothing_is_overwritten(run, src, tmp_path, capsys):
    out = tmp_path / 'out.safetensors'
    out.write_text('precious')
    with pytest.raises(SystemExit):
        run(src, out, '--family', 'deit')
    assert 'nothing is overwritten' in capsys.readouterr().err and out.read_text() == 'precious'
    converted = convert(original('timm', 'deit')[0], 'deit')
    with pytest.raises(FileExistsError):  # nor if it appears in the meantime
        write(converted, out, metadata(converted, 'x', ''))
    assert out.read_text() == 'precious'


@pytest.mark.parametrize(('arguments', 'message'), [
    (['out.pth'], r'the result is a \.safetensors file'), (['o.safetensors', '--family', 'vit'], 'invalid choice'),
    (['o.safetensors', '--img-size', '1', '2', '3'], 'one or two numbers, not 3'),
    (['o.safetensors', '--patch-size', '0'], '--patch-size must be positive')])
def test_bad_arguments(run, src, arguments, message, capsys):
    with pytest.raises(SystemExit):
        run(src, *arguments)
    assert re.search(message, capsys.readouterr().err)


def test_bad_files_are_named(run, src, tmp_path):
    (tmp_path / 'cut.safetensors').write_bytes(src.read_bytes()[:5000])
    (tmp_path / 'page.pth').write_text('<html>404</html>')
    torch.save({'conv1.weight': torch.ones(3)}, tmp_path / 'resnet.pth')
    for name, message in (('cut.safetensors', 'truncated'), ('page.pth', 'not a checkpoint'),
                          ('absent.pth', 'no checkpoint'), ('resnet.pth', 'no known source'),
                          (src.name, 'choose with --family')):
        with pytest.raises(SystemExit, match=f'{name}(?s:.*){message}'):
            run(tmp_path / name, tmp_path / 'out.safetensors')
    assert not (tmp_path / 'out.safetensors').exists()


def test_a_file_with_more_than_tensors_needs_trust(run, tmp_path):
    path, out = tmp_path / 'src.pth', tmp_path / 'out.safetensors'
    torch.save({'model': original('timm', 'deit')[0], 'args': argparse.Namespace(lr=1)}, path)
    with pytest.raises(SystemExit, match='--trust-checkpoint'):
        run(path, out, '--family', 'deit')
    assert not out.exists()
    assert '| loaded | 30 | timm |' in run(path, out, '--family', 'deit', '--trust-checkpoint')


def test_a_name_of_timm(run, tmp_path, monkeypatch):
    path = tmp_path / 'model.safetensors'
    save_file(randomise(timm.create_model('vit_tiny_patch16_224')).state_dict(), path)
    monkeypatch.setattr('huggingface_hub.hf_hub_download', lambda repo, file: str(path))
    name = 'vit_tiny_patch16_224.augreg_in21k_ft_in1k'
    out = tmp_path / 'out.safetensors'
    printed = run(f'timm://{name}', out, '--check')
    assert f'from timm {timm.__version__} {name} ' in printed
    with safe_open(out, 'pt') as file:
        notes = file.metadata()
    assert notes['family'] == 'augreg' and notes['licence'] == 'apache-2.0 (timm)'
    assert notes['source'] == f'timm: {name}'


@torch.no_grad()
def test_deit_tiny_and_its_head_classify_as_timm(run, shared_data, tmp_path):
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config
    path, out = shared_data / 'weights/deit_tiny_patch16_224.safetensors', tmp_path / 'deit.safetensors'
    printed = run(path, out, '--family', 'deit', '--check')
    assert float(re.search(r'at most (\S+) from timm', printed)[1]) < 1e-4
    theirs = timm.create_model('deit_tiny_patch16_224').eval()
    theirs.load_state_dict(load_file(path))
    model = MODELS.build({'type': 'adala_mm.AdaLAViT', 'embed_dim': 192, 'num_heads': 3, 'attention': SOFTMAX,
                          'out_type': 'cls_token', 'init_cfg': {'type': 'Pretrained', 'checkpoint': str(out)}})
    model.init_weights()
    model.eval()
    transform = create_transform(**resolve_model_data_config(theirs))
    pictures = sorted((shared_data / 'coco_permissive53').rglob('*.jpg'))
    assert len(pictures) > 40
    images = torch.stack([transform(Image.open(picture).convert('RGB')) for picture in pictures])
    classes, wanted = theirs.head(model(images)[0]), theirs(images)
    assert (classes.argmax(1) == wanted.argmax(1)).all() and len(wanted.argmax(1).unique()) > 10
    assert (classes - wanted).abs().max() < 1e-4
