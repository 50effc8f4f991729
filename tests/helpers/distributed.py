"""Runs of several processes on the CPU, and what the scripts that launch them would call."""
from __future__ import annotations

import socket
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from adala_mm.datasets.beacons import draw_scene
from helpers.processes import start_script, wait_for

# Hooks that runs find by their import path. Rank 0 logs its own loss only: Diary notes what all ranks do together.
DIARY = '''
import json
import os
import time
from pathlib import Path
import torch
from mmengine.dist import all_gather_object, all_reduce, get_rank, is_main_process
from mmengine.hooks import Hook


class Diary(Hook):
    def before_train(self, runner):
        self.steps = []
        if is_main_process():
            model = getattr(runner.model, 'module', runner.model)
            torch.save(model.state_dict(), Path(runner.work_dir, 'start.pth'))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        loss = outputs['loss'].detach().clone()
        all_reduce(loss, op='mean')
        images = all_gather_object([Path(sample.img_path).name for sample in data_batch['data_samples']])
        # What is there after an iteration has been accumulated, and waits for the next.
        waiting = all_gather_object(sum(p.grad.double().abs().sum().item() for p in runner.model.parameters()
                                        if p.grad is not None))
        self.steps.append(dict(loss=loss.item(), images=images, waiting=waiting))

    def after_train(self, runner):
        weights = all_gather_object(sum(p.double().sum().item() for p in runner.model.parameters()))
        if is_main_process():
            Path(runner.work_dir, 'diary.json').write_text(json.dumps(dict(steps=self.steps, weights=weights)))


class Shares(Hook):
    """How much of the student, and of its optimizer's state, each process holds."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        def held(tensors):
            return sum(getattr(t, '_local_tensor', t).numel() for t in tensors)

        moments = [part['exp_avg'] for part in runner.optim_wrapper.optimizer.state.values()]
        teacher = runner.model.frozen['teacher']
        shares = all_gather_object([held(runner.model.parameters()), held(moments), held(teacher.parameters())])
        if is_main_process():
            Path(runner.work_dir, 'shares.json').write_text(json.dumps(shares))


class Here(Hook):
    """Tells which process this is, once all of them train."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        Path(runner.work_dir, f'rank{get_rank()}').write_text(str(os.getpid()))
        time.sleep(0.1)
'''
# Mask2Former compares masks at random points. Here each mask gets the same ones, whatever is in a batch beside it.
POINTS = '''
import torch

TABLE = torch.rand(4096, 2, generator=torch.Generator().manual_seed(0))


def rand(*size, **options):
    size = size[0] if isinstance(size[0], tuple) else size
    assert len(size) == 3 and size[-1] == 2, f'chance that this test does not know of: {size}'
    return TABLE[:size[1]].repeat(size[0], 1, 1)


torch.rand = rand
'''


def draw(root: Path, side: int) -> Path:
    """A dozen images, and five to validate on: an odd number does not split evenly.

    Label maps have three classes each: Mask2Former weighs the classes of an image by how many there are on a process.
    """
    for split, count in (('train', 12), ('val', 5)):
        images, labels = (root / f'beacons/{kind}/{split}' for kind in ('images', 'labels'))
        for folder in (images, labels):
            folder.mkdir(parents=True)
        for i in range(count):
            rng = np.random.default_rng([count, i])
            Image.fromarray(draw_scene(rng, side)[0]).save(images / f'{i:04d}.png')
            bands = np.repeat(rng.permutation(6)[:3], [side // 4, side // 4, side // 2])
            cv2.imwrite(str(labels / f'{i:04d}.png'), np.tile(bands.astype(np.uint8), (side, 1)))
    return root


def furnished(place: Path) -> Path:
    """The same folder, with images, and with the hooks, which are on Python's path there."""
    draw(place / 'data', side=32)
    (place / 'diary.py').write_text(DIARY)
    (place / 'points.py').write_text(POINTS)
    return place


def free_port() -> str:
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return str(free.getsockname()[1])


def run_in_processes(script: str, *words: str, place: Path, name: str, environments: list[dict[str, str]]) -> str:
    """A script in one process for each environment; what the first prints."""
    logs = [place / f'{name}_rank{rank}.log' for rank in range(len(environments))]
    codes = wait_for(*(start_script(script, *words, place=place, log=log, **environment)
                       for log, environment in zip(logs, environments, strict=True)))
    assert codes == [0] * len(logs), '\n'.join(log.read_text()[-3000:] for log in logs)
    return logs[0].read_text()


def ranks(count: int) -> list[dict[str, str]]:
    """What torchrun puts into the environment of each of ``count`` processes."""
    port = free_port()
    return [dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
            for rank in range(count)]
