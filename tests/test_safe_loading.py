"""A checkpoint that would write a file when it is unpickled does not, whichever way it comes in."""
import runpy
import shutil
import sys
from pathlib import Path

import mmengine.runner.checkpoint as mmengine_checkpoint
import pytest
import torch
from conftest import LINEAR, ROOT, tiny_vit
from mmengine.config import Config

from adala_mm.registry import MODELS
from adala_mm.utils.checkpoint import TRUST, read_state_dict


class Touch:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def victim(tmp_path) -> Path:
    return tmp_path / 'victim'


@pytest.fixture
def evil(tmp_path, victim) -> str:
    """A complete checkpoint of a tiny ViT, with one object too many."""
    state = {f'backbone.{key}': value for key, value in MODELS.build(tiny_vit()).state_dict().items()}
    torch.save({'state_dict': state, 'evil': Touch(victim)}, tmp_path / 'evil.pth')
    return str(tmp_path / 'evil.pth')


def run_tool(name: str, *words: str) -> None:
    sys.argv = [name, *words]
    runpy.run_path(str(ROOT / f'tools/{name}.py'), run_name='__main__')


def by_init_cfg(path, tmp_path, monkeypatch):
    MODELS.build(tiny_vit(init_cfg=dict(type='Pretrained', checkpoint=path))).init_weights()


def by_head_of_an_alignment(path, tmp_path, monkeypatch):
    good = tmp_path / 'good.pth'
    torch.save(MODELS.build(tiny_vit()).state_dict(), good)
    MODELS.build(dict(type='adala_mm.AttentionAlignment', head=dict(checkpoint=path), backbone=tiny_vit(
        attention=LINEAR, init_cfg=dict(type='Pretrained', checkpoint=str(good))))).init_weights()


def by_load_from_and_resume(path, tmp_path, monkeypatch):
    mmengine_checkpoint._load_checkpoint(path, map_location='cpu')  # what Runner calls for both


def by_url(path, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda url, to, **options: shutil.copy(path, to))
    mmengine_checkpoint._load_checkpoint('https://example.org/model.pth?download=1', map_location='cpu')


def by_inferencer(path, tmp_path, monkeypatch):
    from mmseg.apis import init_model
    cfg = Config.fromfile(ROOT / 'configs/demo/teacher_demo_beacons.py')
    cfg.model.backbone = tiny_vit()
    cfg.model.decode_head.update(in_channels=32, channels=32)
    init_model(cfg, path, device='cpu')


def by_convert_vfm(path, tmp_path, monkeypatch):
    run_tool('convert_vfm', path, str(tmp_path / 'out.safetensors'))


def by_merge_lora(path, tmp_path, monkeypatch):
    run_tool('merge_lora', path, str(tmp_path / 'out.pth'))


ENTRIES = [by_init_cfg, by_head_of_an_alignment, by_load_from_and_resume, by_url, by_inferencer, by_convert_vfm,
           by_merge_lora]


@pytest.mark.parametrize('enter', ENTRIES, ids=lambda entry: entry.__name__)
def test_nothing_is_unpickled(enter, evil, victim, tmp_path, monkeypatch):
    torch.load(evil, weights_only=False)
    assert victim.exists()  # the attack is real
    victim.unlink()
    monkeypatch.setattr(sys, 'argv', sys.argv)
    with pytest.raises((ValueError, SystemExit)) as info:
        enter(evil, tmp_path, monkeypatch)
    assert not victim.exists()
    if isinstance(info.value, ValueError):
        assert 'never unpickled' in str(info.value) and '--trust-checkpoint' in str(info.value)
    else:
        assert info.value.code not in (0, None)
    assert not list(tmp_path.glob('out.*'))


def test_the_user_may_trust_a_file(evil, victim, monkeypatch):
    assert 'backbone.pos_embed' in read_state_dict(evil, trust=True) and victim.exists()
    victim.unlink()
    monkeypatch.setenv(TRUST, '1')  # what --trust-checkpoint sets, for this process and its children
    mmengine_checkpoint._load_checkpoint(evil, map_location='cpu')
    assert victim.exists()
