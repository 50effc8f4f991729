"""A wheel is the whole product: package, types, configs, tools and index, and it works where no clone is."""
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import adala_mm
from helpers import ROOT

BUILD = '''
import sys, tarfile
from setuptools import build_meta
name = build_meta.build_sdist('.')
with tarfile.open(name) as sdist:
    sdist.extractall('.')
import os
os.chdir(name.removesuffix('.tar.gz'))
build_meta.build_wheel('..')
'''


@pytest.fixture(scope='module')
def built(tmp_path_factory) -> Path:
    """Folder with an sdist of this tree, and the wheel that is built from it."""
    tree = tmp_path_factory.mktemp('tree')
    for name in ('adala_mm', 'benchmarks', 'configs', 'docs', 'maintenance', 'requirements', 'tests', 'tools'):
        shutil.copytree(ROOT / name, tree / name, symlinks=True)
    for name in ('LICENSE', 'MANIFEST.in', 'Makefile', 'README.md', 'model-index.yml', 'pyproject.toml', 'setup.py'):
        shutil.copy(ROOT / name, tree)
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', BUILD], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return tree


@pytest.fixture(scope='module')
def wheel(built) -> Path:
    (path,) = built.glob('*.whl')
    return path


def test_wheel_carries_what_openmmlab_looks_for(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in ROOT.glob('adala_mm/**/*.py')}
    configs = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'configs').rglob('*.*') if path.suffix != '.pyc'}
    tools = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'tools').rglob('*.*') if path.suffix != '.pyc'}
    assert len(configs) > 200 and len(tools) > 25
    wanted = {*modules, *(f'adala_mm/.mim/{name}' for name in {*configs, *tools, 'model-index.yml'}),
              *(f'adala_mm/{name}' for name in configs if name.endswith('.py')), 'adala_mm/py.typed'}
    info = f'adala_mm-{adala_mm.__version__}.dist-info'
    assert wanted == {name for name in held if not name.startswith(info)}
    assert f'{info}/licenses/LICENSE' in held


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f'adala_mm-{adala_mm.__version__}.dist-info/METADATA').decode()
    metadata = HeaderParser().parsestr(text)
    assert metadata['Version'] == adala_mm.__version__ and metadata['License-Expression'] == 'Apache-2.0'
    assert metadata['Requires-Python'] == '>=3.10' and 'Typing :: Typed' in metadata.get_all('Classifier')
    assert metadata.get_payload() == (ROOT / 'README.md').read_text(encoding='utf-8')
    assert metadata.get_all('Provides-Extra') == ['onedl', 'openmmlab', 'tests']
    declared = [line.split('; extra == ') for line in metadata.get_all('Requires-Dist')]
    for name in ('runtime', 'onedl', 'openmmlab', 'tests'):
        marker = [] if name == 'runtime' else [f'"{name}"']
        found = {Requirement(line) for line, *extra in declared if extra == marker}
        lines = (ROOT / f'requirements/{name}.txt').read_text().splitlines()
        assert found == {Requirement(line) for line in lines if not line.startswith('#')}


def test_sdist_can_be_tested(built):
    (path,) = built.glob('*.tar.gz')
    with tarfile.open(path) as archive:
        held = {member.name.partition('/')[2] for member in archive}
    assert {'LICENSE', 'Makefile', 'README.md', 'configs/demo/metafile.yml', 'docs/images/study.png',
            'docs/notebooks/quickstart.ipynb', 'requirements/constraints.txt', 'setup.py', 'tests/helpers/__init__.py',
            'tests/integration/test_wheel.py', 'tools/train.py'} < held
    assert not any(name.endswith('.pyc') for name in held)


DEMO = '''
import runpy
import sys
from pathlib import Path

import numpy
import timm
import torch
from PIL import Image

import adala_mm.openmmlab
from adala_mm import linearize

package = Path(adala_mm.__file__).parent
print('package', package)
print('blocks', linearize(timm.create_model('vit_tiny_patch16_224', img_size=32, depth=2)).num_linear_blocks)

from mmengine.config import Config
from mmengine.hub import get_config

from adala_mm.datasets.beacons import draw_scene
from adala_mm.registry import MODELS

cfg = get_config('adala_mm::demo/stage1_demo_beacons.py')
mine = Config.fromfile('mine.py')
print('inherited', mine.model == cfg.model and mine.train_cfg.max_iters)

for split in ('train', 'val'):
    folder = Path('data/beacons/images', split)
    folder.mkdir(parents=True)
    for number in range(4):
        Image.fromarray(draw_scene(numpy.random.default_rng(number))[0]).save(folder / f'{number}.png')
Path('work_dirs/demo/teacher').mkdir(parents=True)
backbone = cfg.model.backbone
torch.save(MODELS.build(backbone).state_dict(), backbone.init_cfg.checkpoint)
sys.argv[1:] = ['stage1_demo_beacons', '--cfg-options', 'train_cfg.max_iters=2', 'train_cfg.val_interval=2',
                'default_hooks.checkpoint.interval=2', 'train_dataloader.batch_size=4']
runpy.run_path(str(package / '.mim/tools/train.py'), run_name='__main__')
'''

MINE = '''
from mmengine.config import read_base

with read_base():
    from adala_mm.configs.demo.stage1_demo_beacons import *

train_cfg.update(max_iters=7)
'''


def test_demo_stage_1_runs_from_a_wheel_alone(wheel, tmp_path):
    site, work = tmp_path / 'site', tmp_path / 'work'
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)  # as pip does
    work.mkdir()
    (work / 'mine.py').write_text(MINE)
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', DEMO], cwd=work, capture_output=True, text=True,
                          env=os.environ | {'PYTHONPATH': str(site)}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert 'OneDL' not in done.stdout + done.stderr
    assert f'package {site}/adala_mm' in said and 'blocks 2' in said and 'inherited 7' in said
    assert f'config: {site}/adala_mm/configs/demo/stage1_demo_beacons.py' in said
    assert re.search(r'Iter\(val\).*align/rel_error: 0\.\d+', done.stdout)
    (run,) = map(json.loads, map(Path.read_text, work.glob('work_dirs/stage1_demo_beacons/*/run.json')))
    assert run['source'] == dict(commit=None, dirty=None)
    assert (work / 'work_dirs/stage1_demo_beacons/iter_2.pth').is_file()
