"""Fixtures shared by all tests. Everything runs on the CPU, offline, and from fixed seeds."""
from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.utils.data._utils

os.environ['HF_HUB_OFFLINE'] = '1'
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')  # read when Triton is first imported: its kernels run on the CPU

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / 'shared' / 'data'
IMAGES = 10  # of `scenes`, to train on


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


def put_back(patch: pytest.MonkeyPatch) -> None:
    """What MMEngine keeps for a process' lifetime is put back when ``patch`` ends; until then, short runs are short."""
    from mmengine.logging import MessageHub, MMLogger
    from mmengine.registry import DefaultScope
    from mmengine.runner.checkpoint import CheckpointLoader
    from mmengine.visualization import Visualizer
    from mmseg.visualization import SegLocalVisualizer  # noqa: F401  one of the subclasses
    for manager in (DefaultScope, MMLogger, MessageHub, Visualizer, *Visualizer.__subclasses__()):
        patch.setattr(manager, '_instance_dict', manager._instance_dict.copy())
    patch.setattr(CheckpointLoader, '_schemes', CheckpointLoader._schemes.copy())
    # Most of their time: compilers are asked for their versions, and the config is laid out for log and checkpoints.
    patch.setattr('mmengine.runner.runner.collect_env', dict)
    patch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **kwargs: (text, True))


def gloo_threads() -> list[Path]:
    """Of this process."""
    return [thread for thread in Path('/proc/self/task').iterdir() if 'gloo' in (thread / 'comm').read_text()]


def _run_script(script: Path, words: list[str], place: Path, log: Path, environment: dict[str, str]) -> None:
    from mmengine.logging import MessageHub, MMLogger
    from mmengine.registry import DefaultScope
    from mmengine.visualization import Visualizer
    with open(log, 'w') as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, 'w', buffering=1, closefd=False) for number in (1, 2))
    os.environ.update(environment)
    os.chdir(place)
    sys.path.insert(0, str(place))
    torch.set_num_threads(1)
    for manager in (DefaultScope, MMLogger, MessageHub, Visualizer, *Visualizer.__subclasses__()):
        manager._instance_dict.clear()  # of runs before this one
    sys.argv = [script.name, *words]
    with pytest.MonkeyPatch.context() as patch:
        put_back(patch)
        patch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)  # two at the end of every epoch
        runpy.run_path(str(script), run_name='__main__')
    print(f'{len(gloo_threads())} threads of gloo are left')  # the end of the interpreter would meet them


def start_script(script: str, *words: str, place: Path, log: Path, **environment: str) -> multiprocessing.Process:
    """A script of this repository with ``words``, in a process forked off this one, where all imports are done.

    Starting up takes several seconds of a process of its own: those are for tests of what is imported, and in which
    order. Fork after all imports.

    Args:
        place: its working directory, where it may import from.
        log: file that gets what it prints.
        environment: what its launcher would add.
    """
    process = multiprocessing.get_context('fork').Process(
        target=_run_script, args=(ROOT / script, list(map(str, words)), place, log, environment))
    process.start()
    return process


def wait_for(*processes: multiprocessing.Process) -> list[int]:
    """Exit codes of processes, of which none is left."""
    try:
        for process in processes:
            process.join(timeout=600)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def exit_codes(target: Callable[..., None], *args: object) -> list[int]:
    """Of two processes forked off this one, where all imports are done: each calls ``target(rank, *args)``."""
    processes = [multiprocessing.get_context('fork').Process(target=target, args=(rank, *args)) for rank in range(2)]
    for process in processes:
        process.start()
    return wait_for(*processes)


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


def tiny_vit(**changes) -> dict:
    """Config of a ViT of depth 2 and width 32 on 32 x 32 images, softmax unless told otherwise."""
    return dict(type='adala_mm.AdaLAViT', img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4,
                attention=dict(type='adala_mm.SoftmaxAttention')) | changes


LINEAR = dict(type='adala_mm.LinearAttention')


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
