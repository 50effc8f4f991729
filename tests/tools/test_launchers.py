"""tools/dist_train.sh, dist_test.sh and slurm_train.sh: one command on every machine, and no process left behind."""
from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config

from adala_mm.registry import MODELS
from adala_mm.utils.checkpoint import load_checkpoint
from adala_mm.utils.cli import join_cpu_processes
from adala_mm.utils.records import curve
from helpers import ROOT
from helpers.distributed import draw, free_port, furnished, ranks, run_in_processes

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='compares runs on the CPU')
STAGE1 = str(ROOT / 'configs/demo/stage1_demo_beacons.py')


def part_of_nothing(place: Path, **variables: str) -> dict[str, str]:
    """An environment in which nothing but ``variables`` says what a script is part of; commands in ``place`` win."""
    environment = {key: value for key, value in os.environ.items() if key not in (
        'RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'NNODES', 'NODE_RANK')}
    return environment | dict(PATH=f'{place}:{Path(sys.executable).parent}:{os.environ["PATH"]}', PYTHONPATH=str(place),
                              OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', **variables)


def write_command(path: Path, text: str) -> None:
    path.write_text(f'#!/usr/bin/env bash\n{text}\n')
    path.chmod(0o755)


def called(place: Path, command: str, script: str, *words: str, **variables: str) -> list[str]:
    """MASTER_PORT and the words with which a script of tools/ calls ``command``."""
    write_command(place / command, 'printf "%s\\n" "${MASTER_PORT:-}" "$@"')
    done = subprocess.run(['bash', str(ROOT / 'tools' / script), *words], cwd=place, text=True, check=True,
                          env=part_of_nothing(place, **variables), stdout=subprocess.PIPE)
    return done.stdout.splitlines()


@contextlib.contextmanager
def launched(script: str, *words: str, place: Path, **variables: str) -> Iterator[subprocess.Popen]:
    """A script of tools/ in an environment of nothing but ``variables``; its processes end with the block."""
    environment = part_of_nothing(place, **variables)
    with open(place / f'console_{time.monotonic_ns()}.log', 'w+') as log:
        process = subprocess.Popen(['bash', str(ROOT / 'tools' / script), *words], cwd=place, env=environment,
                                   stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        process.log = Path(log.name)
        try:
            yield process
        finally:
            if process.poll() is None:  # something went wrong: torchrun hands this on to its processes
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(timeout=600)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    return furnished(tmp_path_factory.mktemp('distributed'))


@pytest.fixture(scope='module')
def demo(place) -> list[str]:
    """Options that bring the demo's stage 1 down to one step on a dozen images, for any of the scripts."""
    data = draw(place / 'pictures', side=80)
    backbone = Config.fromfile(STAGE1).model.backbone
    teacher = MODELS.build(backbone.to_dict() | dict(attention=dict(type='adala_mm.SoftmaxAttention'), init_cfg=None))
    teacher.init_weights()
    torch.save(teacher.state_dict(), place / 'teacher.pth')
    return ['--data-root', str(data), '--cfg-options', f'model.backbone.init_cfg.checkpoint={place}/teacher.pth',
            'train_cfg.max_iters=1', 'train_dataloader.batch_size=2', 'default_hooks.logger.interval=1']


def torchrun(port: str, machines: int = 1, machine: int = 0, processes: int = 1) -> list[str]:
    return ['-m', 'torch.distributed.run', f'--nnodes={machines}', f'--node_rank={machine}',
            f'--nproc_per_node={processes}', '--master_addr=127.0.0.1', f'--master_port={port}']


@pytest.fixture(scope='module')
def two_machines(place, demo, tmp_path_factory) -> Path:
    """Where dist_train.sh has left its results, called once on each of two machines."""
    port, run = free_port(), place / 'two_machines'
    for machine in range(2):
        _, *words = called(tmp_path_factory.mktemp('machine'), 'python', 'dist_train.sh', STAGE1, '1', '--work-dir',
                           str(run), *demo, NNODES='2', NODE_RANK=str(machine), MASTER_ADDR='127.0.0.1', PORT=port)
        assert words[:7] == torchrun(port, machines=2, machine=machine) and words[9:11] == ['--launcher', 'pytorch']
    first = run_in_processes(*words[7:], place=place, name='two_machines', environments=[  # as torchrun starts them
        environment | dict(LOCAL_RANK='0') for environment in ranks(2)])
    assert 'MMDistributedDataParallel' in first and 'Distributed training: True' in first and 'GPU number: 2' in first
    return run


def test_dist_train_on_two_machines(place, two_machines):
    (loss,) = curve(two_machines, 'loss')[1]
    assert np.isfinite(loss) and loss > 0
    before = torch.load(place / 'teacher.pth')
    state = load_checkpoint(two_machines / 'iter_1.pth')['state_dict']
    changed = {key for key, value in before.items() if not torch.equal(value, state[f'backbone.{key}'])}
    assert changed == {key for key in before if '.attn.qkv.' in key}


def test_dist_test_scores_what_dist_train_has_left(place, demo, two_machines, tmp_path):
    run = place / 'scored'
    _, *words = called(tmp_path, 'python', 'dist_test.sh', STAGE1, str(two_machines / 'iter_1.pth'), '2', '--work-dir',
                       str(run), *demo, PORT='12345')
    assert words[:7] == torchrun('12345', processes=2) and words[10:12] == ['--launcher', 'pytorch']
    assert 'Distributed launcher: pytorch' in run_in_processes(
        *words[7:], place=place, name='scored', environments=ranks(2))
    (scores,) = run.glob('*/[0-9]*.json')
    wanted = curve(two_machines, 'align/rel_error')[1][-1]
    assert json.loads(scores.read_text())['align/rel_error'] == pytest.approx(wanted, rel=1e-5)


def test_one_lost_process_ends_all_of_them(place, demo):
    run = place / 'lost'
    with launched('dist_train.sh', STAGE1, '2', '--work-dir', str(run), *demo, 'train_cfg.max_iters=100000',
                  'custom_hooks.0.type=diary.Here', place=place, PORT=free_port()) as process:
        ranks = [run / f'rank{rank}' for rank in range(2)]
        while not all(path.exists() and path.read_text() for path in ranks):
            assert process.poll() is None, process.log.read_text()[-5000:]
            time.sleep(0.1)
        ours = [int(path.read_text()) for path in ranks]
        os.kill(ours[1], signal.SIGKILL)
        assert process.wait(timeout=600) != 0
        with pytest.raises(ProcessLookupError):
            os.kill(ours[0], 0)
    assert not list(run.glob('*.pth'))


def test_slurm_train(place, demo, tmp_path):
    run, wanted_port = place / 'slurm', free_port()
    port, *words = called(tmp_path, 'srun', 'slurm_train.sh', 'gpus', 'a job', STAGE1, str(run), *demo,
                          PORT=wanted_port, NNODES='2', GPUS_PER_NODE='4', CPUS_PER_TASK='3',
                          SRUN_ARGS='--quiet --time=10')
    first = words.index('python')
    assert words[:first] == ['-p', 'gpus', '--job-name=a job', '--nodes=2', '--gres=gpu:4', '--ntasks=8',
                             '--ntasks-per-node=4', '--cpus-per-task=3', '--kill-on-bad-exit=1', '--quiet', '--time=10']
    assert words[first + 1] == '-u' and port == wanted_port
    assert words[first + 3:first + 6] == [STAGE1, f'--work-dir={run}', '--launcher=slurm']
    # A cluster of one machine without GPUs: both tasks of a job as Slurm would start them.
    write_command(tmp_path / 'scontrol', '[ "$*" = "show hostname cluster-[7]" ] && echo 127.0.0.1')
    task = dict(PATH=f'{tmp_path}:{os.environ["PATH"]}', MASTER_PORT=port, SLURM_NTASKS='2',
                SLURM_NODELIST='cluster-[7]')
    out = run_in_processes(*words[first + 2:], place=place, name='slurm', environments=[
        task | dict(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)) for rank in range(2)])
    assert 'Distributed launcher: slurm' in out and 'GPU number: 2' in out
    assert len(curve(run, 'loss')[1]) == 1 and (run / 'iter_1.pth').exists()


def test_slurm_launcher_outside_of_a_job_is_named(monkeypatch):
    monkeypatch.delenv('SLURM_PROCID', raising=False)
    with pytest.raises(ValueError, match='not started by srun; use tools/slurm_train.sh'):
        join_cpu_processes(Config(dict(launcher='slurm')))
