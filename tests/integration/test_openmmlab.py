"""What adala_mm changes outside of itself, and when: with `adala_mm.openmmlab`, and never before.

Nothing is imported here that would import adala_mm: a process of its own runs `probe` of this file, beside what
mmpretrain takes for transformers 5.
"""
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import ROOT

# What a user of the library imports.
LIBRARY = ['adala_mm', 'adala_mm.linearization', 'adala_mm.alignment', 'adala_mm.models', 'adala_mm.ops',
           'adala_mm.adapters', 'adala_mm.conversion', 'adala_mm.export', 'adala_mm.registry', 'adala_mm.serialization',
           'adala_mm.models.attentions.linear', 'adala_mm.utils.checkpoint']


def outside() -> dict[str, str]:
    """All that `adala_mm.openmmlab` changes."""
    import mmengine.runner.checkpoint as checkpoint
    from mmengine.fileio import LocalBackend
    from mmengine.runner.checkpoint import CheckpointLoader
    functions = {name: value for name, value in vars(checkpoint).items() if callable(value)}
    return {'schemes': str(CheckpointLoader._schemes), 'functions': str(functions),
            'writing': str((LocalBackend.put, LocalBackend.put_text)), 'ops': str(sys.modules.get('mmcv._ext')),
            'finders': str([finder for finder in sys.meta_path if type(finder).__module__.startswith('adala_mm')])}


def forked(function: Callable, *args: Any) -> Any:
    """What a function returns, or the error that it raises, without what it changes."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            answer = function(*args)
        except BaseException as error:
            answer = f'{type(error).__name__}: {error}'
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    os.wait()
    with open(reader) as file:
        return json.load(file)


def imports(name: str) -> str:
    importlib.import_module(name)
    return 'imported'


def reads_config() -> list:
    """What a tool of mmseg finds changed when it has read a config of ours, or a dumped one."""
    from mmengine.config import Config
    Config.fromfile(ROOT / 'configs/demo/teacher_demo_beacons.py')
    return [outside(), 'mmseg' in sys.modules]


def reads_dumped_config(path: str) -> list:
    from mmengine.config import Config
    Path(path).write_text("custom_imports = dict(imports=['adala_mm.openmmlab'])\n")
    Config.fromfile(path)
    return [outside(), 'mmseg' in sys.modules]


def load(path: str) -> str:
    """What MMEngine says to somebody else's checkpoint."""
    from mmengine.runner.checkpoint import CheckpointLoader
    try:
        return str(sorted(CheckpointLoader.load_checkpoint(path, map_location='cpu')))
    except ValueError as error:
        return str(error)


def probe(path: str) -> dict:
    import timm
    import torch
    found = {'unaided': forked(imports, 'mmpretrain.models'), 'at first': outside(), 'loaded at first': load(path)}
    found['config'] = forked(reads_config)
    found['dumped config'] = forked(reads_dumped_config, str(Path(path).with_name('dumped.py')))
    for name in LIBRARY:
        importlib.import_module(name)
    found['after imports'] = outside()
    from adala_mm import align, linearize
    teacher = timm.create_model('vit_tiny_patch16_224', depth=2, embed_dim=32, num_heads=2, img_size=32)
    for kind in ('linear', 'hedgehog', {'type': 'adala_mm.RALAAttention'}):
        student = linearize(teacher, kind)
        for stage in (1, 2):
            align(student, teacher, [torch.zeros(2, 3, 32, 32)], stage=stage, steps=1)
    found['after use'], found['loaded after use'] = outside(), load(path)
    from mmengine.registry import MODELS
    model = MODELS.build({'type': 'adala_mm.AdaLAViT', 'img_size': 32, 'embed_dim': 32, 'depth': 1, 'num_heads': 2})
    found['built'], found['openmmlab'] = type(model).__name__, outside()
    found['loaded in openmmlab'] = load(path)
    found['aided'] = forked(imports, 'mmpretrain.models'), forked(imports, 'mmseg.apis')
    return found


@pytest.fixture(scope='module')
def found(tmp_path_factory) -> dict:
    place = tmp_path_factory.mktemp('transformers_5')
    (place / 'transformers-5.0.0.dist-info').mkdir()
    (place / 'transformers-5.0.0.dist-info/METADATA').write_text('Metadata-Version: 2.1\nName: transformers\n'
                                                                 'Version: 5.0.0\n')
    (place / 'transformers').mkdir()
    (place / 'transformers/__init__.py').touch()  # what mmpretrain imports from there is gone
    somebodys = place / 'somebodys.pth'
    code = ('import sys; sys.path[:0] = "tests", "tests/integration"; '
            'import argparse, torch; torch.save({"state_dict": {}, "args": argparse.Namespace(lr=1)}, sys.argv[1]); '
            'import json, test_openmmlab; print(json.dumps(test_openmmlab.probe(sys.argv[1])))')
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code, str(somebodys)],
        capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | {'PYTHONPATH': str(place)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_library_changes_nothing_outside(found):
    assert found['after imports'] == found['at first']
    assert found['after use'] == found['at first']
    assert found['loaded at first'] == found['loaded after use'] == "['args', 'state_dict']"


def assert_switched_on(found: dict, now: dict) -> None:
    from adala_mm.utils.mmcv_ext import provide_mmcv_ops
    for part, before in found['at first'].items():
        if part != 'ops' or provide_mmcv_ops():  # compiled ops stay
            assert now[part] != before, part


def test_a_look_up_of_a_model_switches_all_of_it_on(found):
    assert found['built'] == 'AdaLAViT'
    assert_switched_on(found, found['openmmlab'])
    assert 'never unpickled' in found['loaded in openmmlab']


@pytest.mark.parametrize('config', ['config', 'dumped config'])
def test_a_config_switches_all_of_it_on_when_it_is_read(found, config):
    now, mmseg = found[config]
    assert_switched_on(found, now)
    assert mmseg is False  # ahead of the libraries that it helps


def test_mmpretrain_imports_beside_transformers_5(found):
    assert "from 'transformers'" in found['unaided']  # it clashes, as the real one does
    assert found['aided'] == ['imported', 'imported']
