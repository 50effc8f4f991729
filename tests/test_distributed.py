"""Two processes on the CPU do what one process does with the same total batch: tools/dist_train.sh against train.py."""
from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LINEAR, ROOT, tiny_vit
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmengine.runner.checkpoint import CheckpointLoader
from mmseg.visualization import SegLocalVisualizer
from PIL import Image

from adala_mm.datasets.beacons import draw_scene
from adala_mm.registry import MODELS
from adala_mm.utils.checkpoint import load_checkpoint
from adala_mm.utils.records import curve

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='compares runs on the CPU')

STEPS = 4
# Rank 0 logs its own loss only. This hook, found by its import path, notes what all ranks do together.
DIARY = '''
import json
from pathlib import Path
from mmengine.dist import all_gather_object, all_reduce, is_main_process
from mmengine.hooks import Hook


class Diary(Hook):
    def before_train(self, runner):
        self.steps = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        loss = outputs['loss'].detach().clone()
        all_reduce(loss, op='mean')
        images = all_gather_object([Path(sample.img_path).name for sample in data_batch['data_samples']])
        self.steps.append(dict(loss=loss.item(), images=images))

    def after_train(self, runner):
        weights = all_gather_object(sum(p.double().sum().item() for p in runner.model.parameters()))
        if is_main_process():
            Path(runner.work_dir, 'diary.json').write_text(json.dumps(dict(steps=self.steps, weights=weights)))
'''


def draw(root: Path, side: int) -> Path:
    """A dozen images, and five to validate on: an odd number does not split evenly."""
    for split, count in (('train', 12), ('val', 5)):
        folder = root / 'beacons/images' / split
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(draw_scene(np.random.default_rng([count, i]), side)[0]).save(folder / f'{i:04d}.png')
    return root


def tiny_config(place: Path, stage: int, init_cfg: dict) -> Path:
    """The demo's config of a stage, on a tiny ViT, in a fixed order of images, and free of chance."""
    cfg = Config.fromfile(ROOT / f'configs/demo/stage{stage}_demo_beacons.py')
    for loader, split in ((cfg.train_dataloader, 'train'), (cfg.val_dataloader, 'val')):
        loader.sampler = dict(type='DefaultSampler', shuffle=False)
        loader.dataset.update(data_root=str(place / 'data/beacons'), data_prefix=f'images/{split}', pipeline=[
            dict(type='LoadImageFromFile'), dict(type='mmpretrain.PackInputs')])
    cfg.train_dataloader.batch_size = 2
    cfg.val_dataloader.batch_size = 2
    cfg.model.backbone = tiny_vit(attention=LINEAR, init_cfg=init_cfg)
    if stage == 2:
        cfg.model.teacher = tiny_vit(init_cfg=init_cfg)
    # AdamW would magnify rounding in gradients that are next to nothing.
    cfg.optim_wrapper.optimizer = dict(type='SGD', lr=0.1, momentum=0.9)
    cfg.param_scheduler = None
    cfg.train_cfg.update(max_iters=STEPS, val_interval=STEPS)
    cfg.default_hooks.checkpoint.interval = STEPS
    cfg.default_hooks.logger.interval = 1
    cfg.custom_hooks.append(dict(type='diary.Diary'))
    path = place / f'tiny_stage{stage}.py'
    cfg.dump(str(path))
    return path


@pytest.fixture(scope='module')
def pretrained(pretrained, tmp_path_factory) -> dict:
    """The shared checkpoint with LayerNorm weights around 1: around 0 there is little to align."""
    state = torch.load(pretrained['checkpoint'])
    path = tmp_path_factory.mktemp('weights') / 'sharp_softmax.pth'
    torch.save({key: value + 1 if 'norm' in key and 'weight' in key else value for key, value in state.items()}, path)
    return pretrained | dict(checkpoint=str(path))


def train_alone(*words: str) -> None:
    """`tools/train.py` in this process; what it leaves here (scope, loggers, loading scheme) is put back."""
    with pytest.MonkeyPatch.context() as patch:
        for manager in (DefaultScope, MMLogger, MessageHub, SegLocalVisualizer):
            patch.setattr(manager, '_instance_dict', manager._instance_dict.copy())
        patch.setattr(CheckpointLoader, '_schemes', CheckpointLoader._schemes.copy())
        patch.setattr('mmengine.runner.runner.collect_env', dict)  # asks compilers for their versions
        patch.setattr(sys, 'argv', ['train.py', *words])
        patch.setenv('LOCAL_RANK', '0')  # the tool sets it and leaves it
        runpy.run_path(str(ROOT / 'tools/train.py'), run_name='__main__')


def train_together(place: Path, *words: str) -> str:
    """`tools/dist_train.sh` with two processes; returns what they print."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key not in (
        'RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'NNODES', 'NODE_RANK')}
    environment |= dict(PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}', PORT=str(port),
                        PYTHONPATH=str(place), OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE')
    process = subprocess.Popen(
        ['bash', str(ROOT / 'tools/dist_train.sh'), words[0], '2', *words[1:]], cwd=place, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        printed, _ = process.communicate(timeout=300)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)  # the launcher's children as well
        raise
    assert process.returncode == 0, printed[-5000:]
    return printed


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with images, and with the hook on Python's path."""
    place = tmp_path_factory.mktemp('distributed')
    draw(place / 'data', side=32)
    (place / 'diary.py').write_text(DIARY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place)
        yield place


@pytest.mark.parametrize('stage', [1, 2])
def test_two_processes_equal_one(place, pretrained, stage):
    config = tiny_config(place, stage, pretrained)
    one, two = (place / f'stage{stage}_{name}' for name in ('one', 'two'))
    train_alone(str(config), '--work-dir', str(one), '--cfg-options', 'train_dataloader.batch_size=4')
    train_together(place, str(config), '--work-dir', str(two))
    alone, together = (json.loads((run / 'diary.json').read_text()) for run in (one, two))

    # DefaultSampler deals images out in turn, so the batches of both ranks make up the batch of one process.
    assert [len(step['images']) for step in alone['steps']] == [1] * STEPS
    assert [[len(part) for part in step['images']] for step in together['steps']] == [[2, 2]] * STEPS
    for single, double in zip(alone['steps'], together['steps'], strict=True):
        assert sorted(sum(single['images'], [])) == sorted(sum(double['images'], []))
        assert double['loss'] == pytest.approx(single['loss'], rel=1e-5)
    first, *_, again = together['steps']  # twelve images are three steps, then they come round
    assert again['images'] == first['images'] and again['loss'] < 0.95 * first['loss']

    assert together['weights'][0] == together['weights'][1]  # the ranks agree to the last bit
    start = torch.load(pretrained['checkpoint'])
    weights = [load_checkpoint(run / f'iter_{STEPS}.pth')['state_dict'] for run in (one, two)]
    assert weights[0].keys() == weights[1].keys() == {f'backbone.{key}' for key in start}
    moved = torch.cat([(weights[0][f'backbone.{key}'] - value).flatten() for key, value in start.items()])
    apart = torch.cat([(weights[0][key] - weights[1][key]).flatten() for key in weights[0]])
    assert moved.norm() > 0.05 and apart.norm() < 1e-4 * moved.norm()

    assert curve(two, 'loss')[1] == pytest.approx(curve(one, 'loss')[1], rel=1e-4)  # as a person reads it in the log

    for key in ('align/rel_error', 'align/cosine'):  # over all five images, none counted twice
        assert curve(two, key)[0] == [0, STEPS]
        assert curve(two, key)[1] == pytest.approx(curve(one, key)[1], rel=1e-5)


def test_demo_config_trains_on_two_processes(place, tmp_path):
    data = draw(tmp_path / 'pictures', side=80)
    config = ROOT / 'configs/demo/stage1_demo_beacons.py'
    teacher = MODELS.build(Config.fromfile(config).backbone)
    teacher.init_weights()
    torch.save(teacher.state_dict(), tmp_path / 'teacher.pth')
    printed = train_together(
        place, str(config), '--work-dir', str(tmp_path / 'run'), '--data-root', str(data), '--cfg-options',
        f'model.backbone.init_cfg.checkpoint={tmp_path}/teacher.pth', 'train_cfg.max_iters=1',
        'train_dataloader.batch_size=2', 'default_hooks.logger.interval=1')
    assert 'MMDistributedDataParallel' in printed and 'Distributed training: True' in printed
    (loss,) = curve(tmp_path / 'run', 'loss')[1]
    assert np.isfinite(loss) and loss > 0
    state = load_checkpoint(tmp_path / 'run/iter_1.pth')['state_dict']
    changed = {key for key, value in teacher.state_dict().items() if not torch.equal(value, state[f'backbone.{key}'])}
    assert changed == {key for key in teacher.state_dict() if '.attn.qkv.' in key}
