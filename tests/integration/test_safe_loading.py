"""A checkpoint that would write a file, or make an object of any address, does not, whichever way it comes in."""
import re
import runpy
import shutil
import struct
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import mmengine.runner.checkpoint as mmengine_checkpoint
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import CheckpointLoader
from mmengine.runner import load_checkpoint as mmengine_load_checkpoint

import adala_mm
from adala_mm.analysis.prediction import class_names
from adala_mm.evaluation.likeness import load_teacher
from adala_mm.export.target import assemble, load
from adala_mm.preflight import Plan
from adala_mm.preflight.checkpoints import teacher_head, whole_model
from adala_mm.registry import MODELS
from adala_mm.utils.checkpoint import TRUST, read_state_dict
from adala_mm.utils.run_checkpoint import read_run
from helpers import LINEAR, ROOT, tiny_vit


class Touch:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Forge:
    """An array of objects over bytes of the file: those are the address of one."""

    def __init__(self, address):
        self.address = address

    def __reduce__(self):
        return np.ndarray, ((1,), 'O', bytearray(struct.pack('P', self.address)))


@pytest.fixture
def victim(tmp_path) -> Path:
    return tmp_path / 'victim'


def write(path: Path, evil: object) -> str:
    """A complete checkpoint of a tiny ViT, with one object too many."""
    state = {f'backbone.{key}': value for key, value in MODELS.build(tiny_vit()).state_dict().items()}
    torch.save({'state_dict': state, 'evil': evil}, path)
    return str(path)


@pytest.fixture
def evil(tmp_path, victim) -> str:
    return write(tmp_path / 'evil.pth', Touch(victim))


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


def by_publish_model(path, tmp_path, monkeypatch):
    run_tool('publish_model', path, str(tmp_path / 'out'))


def by_loading_a_linearized_model(path, tmp_path, monkeypatch):
    adala_mm.load(path)


def by_resuming_align(path, tmp_path, monkeypatch):
    read_run(path, {}, resume=True)


def by_export(path, tmp_path, monkeypatch):
    cfg = Config(dict(model=dict(type='adala_mm.FeatureAlignment', backbone=tiny_vit())))
    load(assemble(cfg), cfg, path)


def by_analysis(path, tmp_path, monkeypatch):
    class_names(Config({}), path, 3)


def by_check(path, tmp_path, monkeypatch):
    whole_model(Plan(Config(dict(model={}))), path)


def by_check_of_a_head(path, tmp_path, monkeypatch):
    teacher_head(Plan(Config(dict(model={}))), path)


def by_comparison(path, tmp_path, monkeypatch):
    load_teacher('deit_tiny_patch16_224', 32, path)


def by_mmengine(path, tmp_path, monkeypatch):
    mmengine_load_checkpoint(MODELS.build(tiny_vit()), path, map_location='cpu')


def by_object_store(path, tmp_path, monkeypatch):
    class Store:
        @contextmanager
        def get_local_path(self, name):
            yield path

    monkeypatch.setattr('adala_mm.utils.checkpoint.get_file_backend', lambda name, backend_args: Store())
    CheckpointLoader.load_checkpoint('s3://bucket/model.pth', map_location='cpu')


def by_models_of_openmmlab(path, tmp_path, monkeypatch):
    monkeypatch.setattr(mmengine_checkpoint, 'get_external_models', lambda: {'vit': Path(path).name})
    monkeypatch.setattr(mmengine_checkpoint, '_get_mmengine_home', lambda: str(tmp_path))
    CheckpointLoader.load_checkpoint('open-mmlab://vit', map_location='cpu')


ENTRIES = [by_init_cfg, by_head_of_an_alignment, by_load_from_and_resume, by_url, by_inferencer, by_convert_vfm,
           by_merge_lora, by_publish_model, by_loading_a_linearized_model, by_resuming_align, by_export, by_analysis,
           by_check, by_check_of_a_head, by_comparison, by_mmengine, by_object_store, by_models_of_openmmlab]


@pytest.mark.parametrize('enter', ENTRIES, ids=lambda entry: entry.__name__)
def test_nothing_is_unpickled(enter, evil, victim, tmp_path, monkeypatch):
    torch.load(evil, weights_only=False)
    assert victim.exists()  # the attack is real
    victim.unlink()
    secret = object()
    forged = write(tmp_path / 'forged.pth', Forge(id(secret)))
    assert torch.load(forged, weights_only=False)['evil'][0] is secret
    for path in (evil, forged):
        assert_refused(enter, path, victim, tmp_path, monkeypatch)


def assert_refused(enter, evil, victim, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', sys.argv)
    with pytest.raises((ValueError, SystemExit)) as info:
        enter(evil, tmp_path, monkeypatch)
    assert not victim.exists()
    if isinstance(info.value, ValueError):
        assert 'never unpickled' in str(info.value) and '--trust-checkpoint' in str(info.value)
    else:
        assert info.value.code not in (0, None)
    assert not list(tmp_path.glob('out.*'))


def test_one_door():
    """What reads pickles is called by the door alone, and for two files that the same run has just written."""
    reads = re.compile(r'torch\.(?:jit\.|hub\.|export\.)?load\w*\(|pickle\.(?:loads?|Unpickler)|allow_pickle|'
                       r'load_state_dict_from|joblib|dill|shelve|marshal')
    sources = [path for folder in ('adala_mm', 'tools', 'maintenance', 'configs', 'benchmarks', 'docs')
               for path in (ROOT / folder).rglob('*.py')]
    found = Counter((path.relative_to(ROOT).as_posix(), match) for path in sources
                    for match in reads.findall(path.read_text()))
    assert len(sources) > 150 and found == {('adala_mm/utils/checkpoint.py', 'torch.load('): 1,
                                            ('tools/analysis_tools/compare_attentions.py', 'torch.load('): 1,
                                            ('adala_mm/export/graphs.py', 'torch.export.load('): 1}


def test_the_user_may_trust_a_file(evil, victim, monkeypatch):
    assert 'backbone.pos_embed' in read_state_dict(evil, trust=True) and victim.exists()
    victim.unlink()
    monkeypatch.setenv(TRUST, '1')  # what --trust-checkpoint sets, for this process and its children
    mmengine_checkpoint._load_checkpoint(evil, map_location='cpu')
    assert victim.exists()
