"""Fixtures shared by all tests. Everything runs on the CPU, offline, and from fixed seeds."""
from __future__ import annotations

import gc
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.utils.data._utils

pytest.register_assert_rewrite('helpers')  # their assertions say what they compared, as those of tests do

from helpers import IMAGES, ROOT, tiny_vit  # noqa: E402

os.environ['HF_HUB_OFFLINE'] = '1'
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')  # read when Triton is first imported: its kernels run on the CPU

SHARED_DATA = ROOT.parent / 'shared' / 'data'


def pytest_configure():
    import adala_mm.openmmlab  # noqa: F401  once and for all, so that no fixture takes a part of it back
    # PyTorch's fake tensors pretend that there is a GPU. An autograd that first starts after that makes threads for it,
    # and refuses to work in forked processes, of which some tests have several.
    torch.ones(1, requires_grad=True).backward()
    # A runner keeps its loader's iterator in a cycle. When that is collected, the thread that would have told the
    # workers to stop is gone already, and they are waited for, this many seconds each.
    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.1


@pytest.fixture(autouse=True, scope='module')
def small_heap():
    """Datasets and runners collect garbage: not again and again among what earlier files and the libraries keep."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def logging_as_before():
    """Tools silence it for their own process."""
    yield
    logging.disable(logging.NOTSET)


def own_default_scope():
    """Runners, inferencers and tools set MMEngine's default scope and leave it to whoever comes next."""
    from mmengine.registry import DefaultScope
    before = DefaultScope._instance_dict.copy()
    yield
    DefaultScope._instance_dict = before


of_each_test = pytest.fixture(autouse=True)(own_default_scope)
of_each_file = pytest.fixture(autouse=True, scope='module')(own_default_scope)  # what its fixtures set


@pytest.fixture(scope='session')
def shared_data() -> Path:
    """Folder with small real weights and photographs; tests that need it are skipped without it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f'no real weights and photographs at {SHARED_DATA}')
    return SHARED_DATA


@pytest.fixture(scope='module')
def scenes(tmp_path_factory) -> Path:
    """Images and labels of the demo's kind, 32 x 32 pixels."""
    from PIL import Image

    from adala_mm.datasets.beacons import draw_scene
    root = tmp_path_factory.mktemp('scenes')
    for split, count in (('train', IMAGES), ('val', 3)):
        for kind in ('images', 'labels'):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            image, label = draw_scene(np.random.default_rng([count, i]), 32)
            Image.fromarray(image).save(root / f'images/{split}/{i:04d}.png')
            Image.fromarray(label).save(root / f'labels/{split}/{i:04d}.png')
    return root


@pytest.fixture(scope='module')
def corrupt_scenes(scenes) -> Path:
    """The same scenes, two of them empty files; beside the others, under the name that `corrupt_skipped` knows."""
    root = scenes.with_name(f'{scenes.name}_corrupt')
    shutil.copytree(scenes, root)
    for name in ('0003.png', '0008.png'):
        (root / 'images/train' / name).write_bytes(b'')
    return root


@pytest.fixture
def poisoned():
    """``torch.empty`` and its like give NaN."""
    settings = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all() and torch.empty_like(torch.zeros(3)).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    settings.fill_uninitialized_memory = before[1]


@pytest.fixture(scope='session')
def pretrained(tmp_path_factory) -> dict:
    """``init_cfg`` of a tiny softmax ViT with random, but not degenerate, weights."""
    from adala_mm.registry import MODELS
    torch.manual_seed(1)
    model = MODELS.build(tiny_vit())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp('weights') / 'tiny_softmax.pth'
    torch.save(model.state_dict(), path)
    return dict(type='Pretrained', checkpoint=str(path))


@pytest.fixture(scope='session')
def sharp_pretrained(pretrained, tmp_path_factory) -> dict:
    """The same with LayerNorm weights around 1: around 0 all attention is close to a plain average."""
    state = torch.load(pretrained['checkpoint'])
    path = tmp_path_factory.mktemp('weights') / 'sharp_softmax.pth'
    torch.save({key: value + 1 if 'norm' in key and 'weight' in key else value for key, value in state.items()}, path)
    return pretrained | {'checkpoint': str(path)}


@pytest.fixture(scope='session')
def photos(tmp_path_factory) -> Path:
    """Photographs without labels, for tests that leave them as they are."""
    from helpers.photographs import lay_out
    return lay_out(tmp_path_factory.mktemp('photos'))
