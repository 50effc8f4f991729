"""tools/analysis_tools/benchmark_loader.py: what it records, and its verdicts."""
from __future__ import annotations

import importlib
import json
import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch

from helpers import ROOT
from helpers.photographs import NAMES
from helpers.processes import put_back


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Where runs write; what they leave in the process is put back."""
    put_back(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- the benchmark


@pytest.fixture
def bench(place, monkeypatch, capsys, photos):
    """Runs tools/analysis_tools/benchmark_loader.py on the photographs; its record and what it printed."""
    monkeypatch.syspath_prepend(ROOT / 'tools/analysis_tools')
    module = importlib.import_module('benchmark_loader')
    threads, method = torch.get_num_threads(), multiprocessing.get_start_method(allow_none=True)
    opencv = cv2.getNumThreads()
    data = place / 'data'
    (data / 'coco').mkdir(parents=True)
    shutil.copytree(photos / 'images', data / 'coco/train2017')

    def run(*options: str) -> tuple[dict, str]:
        monkeypatch.setattr(sys, 'argv', [
            module.__file__, str(ROOT / 'configs/adala/stage1_dinov2l_coco.py'), '--data-root', str(data), '--out',
            'loader.json', '--seconds', '1e-9', '--cfg-options', 'train_dataloader.dataset.pipeline.1.scale=32',
            *options])
        module.main()
        return json.loads(Path('loader.json').read_text()), capsys.readouterr().out
    run.module, run.data = module, data
    yield run
    torch.set_num_threads(threads)
    cv2.setNumThreads(opencv)
    multiprocessing.set_start_method(method, force=True)


def test_benchmark(bench):
    (bench.data / 'coco/train2017' / NAMES[0]).write_bytes(b'')
    record, text = bench('--workers', '0', '1', '--batch', '3')
    assert record['config'] == 'stage1_dinov2l_coco' and record['images'] == 6 and record['settings']['batch'] == 3
    assert [row['workers'] for row in record['rows']] == [0, 1]
    for row in record['rows']:
        assert row['images'] == 3 and row['images_per_s'] > 0 and row['corrupt'] <= 1
        assert row['images_per_s'] == pytest.approx(row['images'] / row['seconds'])
        assert row['images_per_s_per_core'] == pytest.approx(row['images'] / max(row['core_seconds'], 0.01))
    assert bench.module.loader_table(record['rows']) in text and '6 images' in text
    assert {'cpu', 'cores', 'commit'} <= set(record['machine'])


def test_benchmark_reads_shards_and_compares(bench):
    Path('training.json').write_text(json.dumps(dict(settings=dict(batch=8), rows=[
        dict(stage=1, version='ours', ms=2 ** -20), dict(stage=2, version='ours', ms=2 ** 20),
        dict(stage=2, version='straightforward', note='out of memory')])))
    record, text = bench('train_dataloader.dataset.shards=part-{000..001}.tar', '--workers', '0', '--batch', '2',
                         '--training', 'training.json')
    assert record['images'] == 6 and record['demands'] == {
        'stage 1, ours': 8000 * 2.0 ** 20, 'stage 2, ours': 8000 / 2 ** 20}
    assert '- stage 1, ours, 8388608000.0 images/s: would wait for data 100 % of the time with 0 workers' in text
    assert '- stage 2, ours, 0.0 images/s: the loader keeps up with 0 workers (1 cores)' in text


def test_benchmark_verdicts(bench):
    rows = [dict(workers=n, images_per_s=s, images_per_s_per_core=s / max(n, 1))
            for n, s in ((0, 100.0), (2, 180.0), (4, 320.0))]
    verdict = bench.module.verdict
    assert verdict('a', 150.0, rows) == 'a, 150.0 images/s: the loader keeps up with 2 workers (2 cores)'
    assert verdict('b', 640.0, rows) == ('b, 640.0 images/s: would wait for data 50 % of the time with 4 workers; '
                                         'needs 7 cores at the measured speed of one')


def test_processor_time_counts_workers_and_leaves_out_waiting(bench, monkeypatch):
    spend = 'import time\nwhile time.process_time() < 0.3: pass\ntime.sleep(60)'
    before = bench.module.core_seconds(0.0, 1)
    child = subprocess.Popen([sys.executable, '-S', '-c', spend])
    try:
        monkeypatch.setattr(multiprocessing, 'active_children', lambda: [child])
        while (spent := bench.module.core_seconds(0.0, 1) - before) < 0.3:
            pass
    finally:
        child.kill()
        child.wait()
    assert spent < 60
    monkeypatch.setattr(bench.module, 'Path', lambda name: Path('/nowhere') / name[1:])
    assert bench.module.core_seconds(3.0, 0) == 3.0  # of one process


def test_benchmark_mistakes(bench, capsys):
    with pytest.raises(SystemExit, match='error: 6 images do not fill a batch of 32: give a smaller --batch'):
        bench('--workers', '0')
    with pytest.raises(SystemExit):
        bench('--training', 'none.json')
    assert 'no record at none.json' in capsys.readouterr().err
    Path('other.json').write_text('{"rows": [{"ms": 1}]}')
    with pytest.raises(SystemExit, match='--training other.json: no record of benchmark_training.py'):
        bench('--training', 'other.json')
    shutil.rmtree(bench.data)
    with pytest.raises(SystemExit, match='error: train_dataloader: .* does not exist'):
        bench()
