"""benchmarks/run_gpu.py: all parts on a CPU with tiny sizes, what is kept when they are stopped, and its tables."""
from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adala_mm.ops import linear_attention_reference
from adala_mm.utils import stopwatch
from adala_mm.utils.row_log import RowLog, latest_rows, read_runs
from helpers import ROOT, tiny_vit

CPU = torch.device('cpu')
MACHINE = dict(device='A GPU', commit='abc', torch='2.11', driver='1', cuda='13.0', triton='3.6')


@pytest.fixture
def load(monkeypatch):
    """A tool, or run_gpu, as a module; on the CPU, with nothing compiled."""
    def load(name: str):
        module = importlib.import_module(name)
        if hasattr(module, 'default_device'):
            monkeypatch.setattr(module, 'default_device', lambda: CPU)
        return module
    for folder in ('benchmarks', 'tools/analysis_tools'):
        monkeypatch.syspath_prepend(ROOT / folder)
    with torch._dynamo.config.patch(disable=True):
        yield load


@pytest.fixture
def run_gpu(load, monkeypatch):
    """``run_gpu.main`` with every part a call in this process, and a ViT of two blocks."""
    module, called = load('run_gpu'), []
    tiny = {key: value for key, value in tiny_vit().items() if key in ('embed_dim', 'depth', 'num_heads')}
    monkeypatch.setitem(load('benchmark_model').ARCHS, 'T', tiny)
    before = signal.getsignal(signal.SIGTERM)

    def call(command: list[str], seconds: float, log: Path, environment: dict[str, str]) -> str:
        called.append(seconds)
        monkeypatch.setattr(sys, 'argv', command[3:])
        try:
            load(Path(command[3]).stem).main()
        except SystemExit as end:
            return f'failed: {end.code}' if end.code else ''
        return ''

    def main(*options: str) -> int:
        return module.main(['--dry-run', '--processes', '1', *options], call)
    main.seconds = called
    yield main
    signal.signal(signal.SIGTERM, before)


def rows_of(path: Path) -> list[dict]:
    return latest_rows(path)[0]


def test_dry_run(run_gpu, load, tmp_path, capsys):
    assert run_gpu('--out', str(tmp_path)) == 0, capsys.readouterr().err
    parts = load('run_gpu').PARTS
    assert sum(part.seconds for part in parts) == 500 and len(run_gpu.seconds) == len(parts)
    assert {path.name for path in tmp_path.iterdir()} == {'run.jsonl', 'run.log', *(f'{p.name}.jsonl' for p in parts)}
    assert {row['part']: row['outcome'] for row in rows_of(tmp_path / 'run.jsonl')} == {p.name: 'done' for p in parts}
    for path in tmp_path.glob('*.jsonl'):
        (head, rows), = read_runs(path)
        assert {'device', 'torch', 'commit', 'cpu'} <= head['machine'].keys() and len(head['sources']) == 16 and rows

    assert {row['name'] for row in rows_of(tmp_path / 'compile.jsonl')} == {'ours', 'coarse', 'compiled'}
    for part, dtypes in dict(check={'bf16'}, spot={'fp16', 'fp32'}).items():
        rows = rows_of(tmp_path / f'{part}.jsonl')
        assert {(row['name'], row['dtype']) for row in rows} == {(a, b) for a in ('ours', 'coarse') for b in dtypes}
        assert all(row['error'] < row['bound'] and row['nan_stays'] for row in rows)

    core = {(row['pass'], row['name']): row for row in rows_of(tmp_path / 'core.jsonl')}
    assert {name for _, name in core} == {'sdpa', 'flash', 'cudnn', 'efficient', 'math', 'ours', 'coarse', 'compiled'}
    for what in ('forward', 'backward'):
        assert [core[what, name]['backend'] for name in ('sdpa', 'flash', 'math')] == ['flash', 'flash', 'math']
        assert 'note' in core[what, 'cudnn'] and core[what, 'ours']['copy_share'] > 0 < core[what, 'compiled']['ms']

    model = rows_of(tmp_path / 'model.jsonl')
    assert [row['note'] for row in model if 'CUDA graph' in row['mode']] == ['needs a GPU'] * 3
    measured = [row for row in model if 'ms' in row]
    assert [row['attention'] for row in measured] == ['SoftmaxAttention', 'LinearAttention', 'CoarseToFineAttention']
    assert measured[0]['backend'] == 'flash' and 'backend' not in measured[1] and measured[0]['best_batch'] >= 1
    training = rows_of(tmp_path / 'training.jsonl')
    assert [(row['stage'], row['version']) for row in training] == [
        (stage, version) for stage in (1, 2, 3) for version in ('straightforward', 'ours, fp32')]
    assert all(row['ms'] > 0 for row in training)


def test_without_openmmlab(run_gpu, load, tmp_path, monkeypatch, capsys):
    """What needs torch and Triton is run, the rest is named; nothing has failed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'mmseg' else find(name))
    assert run_gpu('--out', str(tmp_path), '--parts', 'check', 'model', 'training') == 0
    assert [row['outcome'] for row in rows_of(tmp_path / 'run.jsonl')] == [
        'done', *['skipped: mmseg not installed'] * 2]
    assert '=== model: skipped: mmseg not installed' in capsys.readouterr().out


def test_second_run_goes_on(run_gpu, load, tmp_path, monkeypatch):
    """Rows that are there are not measured again, those that a kill took are, and whatever was written stays."""
    options = '--out', str(tmp_path), '--parts', 'core'
    assert run_gpu(*options) == 0
    path = tmp_path / 'core.jsonl'
    lines = path.read_text().splitlines()
    kept = '\n'.join(lines[:-3]) + '\n' + lines[-3][:25]  # killed within a line of the last cell
    path.write_text(kept)
    measured, tool = [], load('benchmark_attention')
    measure_cell = tool.measure_cell
    monkeypatch.setattr(tool, 'measure_cell', lambda cell, *others: (
        measured.append(cell['pass']), measure_cell(cell, *others))[1])
    assert run_gpu(*options) == 0
    assert measured == ['backward'] and path.read_text().startswith(kept + '\n')
    assert [len(rows) for _, rows in read_runs(path)] == [len(lines) - 4, 8] and len(rows_of(path)) == 16


def test_rows_of_a_gpu_are_safe_from_a_dry_run(run_gpu, tmp_path, capsys):
    options = '--out', str(tmp_path), '--parts', 'core'
    RowLog(tmp_path / 'core.jsonl', ['part'], MACHINE, {})
    assert run_gpu(*options) > 10 and 'core.jsonl holds rows of A GPU, this is ' in capsys.readouterr().err
    RowLog(tmp_path / 'other/run.jsonl', ['part'], MACHINE, {})
    with pytest.raises(SystemExit, match='2'):
        run_gpu('--out', str(tmp_path / 'other'))
    assert 'run.jsonl holds rows of A GPU, this is ' in capsys.readouterr().err


def test_our_failure_is_the_exit_status(run_gpu, load, tmp_path, monkeypatch, capsys):
    """Those of other people's kernels are not: in a dry run, cuDNN fails always."""
    tool = load('benchmark_attention')
    monkeypatch.setattr(tool, 'linear_attention_packed', lambda qkv: 1 / 0)
    names = [part.name for part in load('run_gpu').PARTS]
    assert run_gpu('--out', str(tmp_path), '--parts', 'core', 'spot') == 10 + names.index('core')
    assert 'core failed: ' in (text := capsys.readouterr().err) and 'ZeroDivisionError' in text and 'spot' in text
    assert rows_of(tmp_path / 'run.jsonl')[0]['outcome'].startswith('failed: ')


@pytest.mark.parametrize(('core', 'words'), [
    (lambda qkv: 1.1 * exact(qkv), 'error, gradient_error'),
    (lambda qkv: exact(qkv) + 0.01 * exact(qkv).detach(), 'error'),
    (lambda qkv: exact(qkv) + 0.1 * (exact(qkv) - exact(qkv).detach()), 'gradient_error'),
    (lambda qkv: exact(qkv.nan_to_num()), 'NaN is lost')])
def test_check_sees(load, monkeypatch, core, words):
    tool = load('check_kernels')
    monkeypatch.setattr(tool, 'competitors', lambda names, device: dict(ours=core))
    assert tool.check(dict(name='ours', dtype='fp32', dim=16, tokens=17))['note'] == f'failed: {words}'


def exact(qkv: torch.Tensor) -> torch.Tensor:
    return linear_attention_reference(*qkv.permute(2, 0, 3, 1, 4).unbind(0)).transpose(1, 2)


def test_same_tiles_are_open_in_every_precision(load):
    """Else the check of coarse-to-fine attention would stand on whichever of two tiles weighs a little more."""
    tool = load('check_kernels')
    row = tool.check(dict(name='coarse', dtype='bf16', dim=64, tokens=1025))
    assert row['error'] < 0.005 and row['gradient_error'] < 0.01 and 'note' not in row


def test_part_is_ended_with_all_that_it_started(load, tmp_path, monkeypatch):
    """Nothing is left to keep the GPU busy."""
    module, log, pid = load('run_gpu'), tmp_path / 'run.log', tmp_path / 'pid'

    class Process(subprocess.Popen):
        def wait(self, timeout: float | None = None) -> int:
            if timeout is None:
                return super().wait()
            wait_for(pid.exists)
            raise subprocess.TimeoutExpired(self.args, timeout)
    monkeypatch.setattr(module.subprocess, 'Popen', Process)
    command = ['bash', '-c', f'echo begun; sleep 600 & {write_pid("$!", pid)}; wait']
    assert module.run(command, 7, log, {}) == 'stopped: its 7 s were up' and log.read_text() == 'begun\n'
    wait_for(lambda: ended(pid))


def test_whoever_ends_the_script_ends_its_part(load, tmp_path):
    """By SIGTERM, as those do who lend a machine."""
    module, pid, before = load('run_gpu'), tmp_path / 'pid', signal.getsignal(signal.SIGTERM)

    def end() -> None:
        wait_for(pid.exists)
        os.kill(os.getpid(), signal.SIGTERM)

    def run(command: list[str], *others) -> str:
        threading.Thread(target=end).start()
        return module.run(['bash', '-c', f'{write_pid("$$", pid)}; sleep 600'], *others)
    try:
        with pytest.raises(SystemExit, match='143'):
            module.main(['--dry-run', '--out', str(tmp_path), '--parts', 'core'], run)
    finally:
        signal.signal(signal.SIGTERM, before)
    wait_for(lambda: ended(pid))


def write_pid(number: str, path: Path) -> str:
    return f'echo {number} > {path}.part; mv {path}.part {path}'


def ended(pid: Path) -> bool:
    state = Path(f'/proc/{pid.read_text().strip()}/stat')
    return not state.exists() or state.read_text().rpartition(')')[2].split()[0] == 'Z'


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail('it does not happen within a minute')


def test_how_parts_end(load, tmp_path):
    run = load('run_gpu').run
    assert run(['bash', '-c', 'test $X = 1'], 600, tmp_path / 'log', dict(X='1')) == ''
    assert run(['bash', '-c', 'exit 3'], 600, tmp_path / 'log', {}) == 'failed: exit status 3'
    assert run(['bash', '-c', 'kill -SEGV $$'], 600, tmp_path / 'log', {}) == f'failed: exit status {-signal.SIGSEGV}'


def test_what_a_part_leaves_is_there_for_the_next(load, tmp_path, monkeypatch):
    module, limits, now = load('run_gpu'), [], [0.0]
    monkeypatch.setattr(module.time, 'monotonic', lambda: now[0])

    def run(command, seconds, log, environment) -> str:
        limits.append(seconds)
        now[0] += 10
        return ''
    monkeypatch.setattr(module.signal, 'signal', lambda *_: None)
    assert module.main(['--dry-run', '--out', str(tmp_path), '--parts', 'compile', 'check', 'core'], run) == 0
    assert limits == [600, 1090, 2380]  # ten times the budgets, in a dry run


def test_script_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip('there is a GPU')
    done = subprocess.run(['bash', str(ROOT / 'benchmarks/run_gpu.sh')], env=os.environ | {'PYTHON': sys.executable},
                          capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 1 and 'no CUDA device: --dry-run' in done.stderr and not done.stdout


def test_other_libraries(load, monkeypatch, capsys):
    """The newest name first; kernels that tune themselves are left one configuration, the last with four warps."""
    import types

    import triton
    tool = load('benchmark_attention')

    @triton.autotune([triton.Config(dict(B=b), num_warps=w) for b in (16, 32) for w in (2, 4, 8)], key=[])
    @triton.jit
    def kernel(x, B: triton.language.constexpr):
        pass

    def linear_attention(q, k, v):
        return linear_attention_reference(q, k, v, 'identity')
    module = types.SimpleNamespace(kernel=kernel, linear_attention=linear_attention)
    modules = {'flash_bla.ops.linear_attn.fused': module}

    def imported(name: str):
        if name not in modules:
            raise ModuleNotFoundError(name)
        return modules[name]
    monkeypatch.setattr(tool.importlib, 'import_module', imported)
    cores = tool.competitors(['fbi_la', 'ours'], torch.device('cuda'))
    assert [(c.kwargs['B'], c.num_warps) for c in kernel.configs] == [(32, 4)]
    assert 'fbi_la: kernel with B: 32, num_warps: 4' in capsys.readouterr().out
    qkv = torch.randn(2, 9, 3, 2, 8)
    torch.testing.assert_close(cores['fbi_la'](qkv), exact(qkv))
    modules['fbi_la.ops.linear_attn.attention'] = types.SimpleNamespace(linear_attention='the newest')
    assert tool.library('fbi_la') == 'the newest'
    modules.clear()
    assert list(tool.competitors(['fbi_la', 'ours'], torch.device('cuda'))) == ['ours']
    assert 'fbi_la is left out: not installed' in capsys.readouterr().out


def test_competitors_are_the_same_function(load):
    tool = load('benchmark_attention')
    qkv = torch.randn(2, 9, 3, 2, 8, requires_grad=True)
    for core in (tool.formula, tool.plain, tool.linear_attention_packed):
        torch.testing.assert_close(core(qkv), exact(qkv))
    softmax = tool.sdpa(qkv)
    torch.testing.assert_close(tool.coarse_to_fine(qkv), softmax)  # all tiles of so small a grid are open
    grad = torch.randn_like(softmax)
    whole, = tool.one_pass('forward + backward', tool.formula, qkv, grad)()
    backward = tool.one_pass('backward', tool.formula, qkv, grad)
    for _ in range(2):
        torch.testing.assert_close(backward()[0], whole)
    assert not tool.one_pass('forward', tool.formula, qkv, None)().requires_grad


def test_tables_of_a_gpu(tmp_path, monkeypatch):
    """From made-up records: two runs, of which the later one measured a cell again."""
    monkeypatch.syspath_prepend(ROOT / 'maintenance')
    tables = importlib.import_module('make_tables')
    monkeypatch.setattr(tables, 'ROOT', tmp_path)
    assert tables.gpu() == 'No GPU has measured these yet.'
    folder = tmp_path / 'benchmarks/results/a_gpu'

    def write(part: str, key: tuple, rows: list[dict], **facts) -> None:
        log = RowLog(folder / f'{part}.jsonl', key, MACHINE | facts, {})
        for row in rows:
            log.add(row)
    write('run', ('part',), [dict(part='core', outcome='done'), dict(part='spot', outcome='stopped: its 40 s were up')])
    write('check', ('name', 'dtype', 'dim', 'tokens'), [
        dict(name='ours', dtype='bf16', dim=64, tokens=4097, error=0.0012, gradient_error=0.0034, nan_stays=True,
             bound=0.02), dict(name='coarse', dtype='bf16', dim=64, tokens=4097, note='not installed')])
    core = [{'pass': what, 'tokens': 1024, 'batch': batch, 'heads': 16, 'dim': 64, 'dtype': 'bf16', 'name': name,
             'ms': ms, 'gb_per_s': 1000.0, 'copy_share': 0.5, 'mib': 1.0} | dict(
                 dict(backend='cudnn') if name == 'sdpa' else {})
            for what in ('forward', 'backward') for batch in (8, 1) for name, ms in (('sdpa', 2.0), ('ours', 1.0))]
    write('core', ('pass', 'tokens', 'batch', 'name'), core)
    write('core', ('pass', 'tokens', 'batch', 'name'), [core[1] | dict(ms=0.5)], commit='def', driver='2')
    write('model', ('arch', 'size', 'mode', 'attention'), [dict(
        arch='L', size=512, mode='bf16, CUDA graph', attention=name, softmax_blocks=0, linear_blocks=24, ms=ms,
        softmax_ms=4.0, mib=9.0, gmac=1.0, parameters=3e8, best_batch=8, best_images_per_s=777.0)
        for name, ms in (('SoftmaxAttention', 4.0), ('LinearAttention', 2.0))])
    write('training', ('stage', 'version'), [dict(stage=3, version=name, batch=8, ms=ms, mib=9.0)
                                             for name, ms in (('straightforward', 80.0), ('ours, bf16', 40.0))])
    text = tables.gpu()
    for words in (
            '### Measured on A GPU', '| ours | bf16 | 64 | 4,097 | 1.2e-03 | 3.4e-03 | 2.0e-02 | yes |  |',
            '| coarse | bf16 | 64 | 4,097 |  |  |  |  | not installed |',
            '| forward | 8 x 16 x 64 | 1,024 | 2 ms (cudnn) | 0.5 ms, 4.00x | 1000.0 | 50 % | 1.0 / 1.0 |',
            '| backward | 1 x 16 x 64 | 1,024 | 2 ms (cudnn) | 1 ms, 2.00x |',
            'driver 1, CUDA 13.0, torch 2.11, Triton 3.6, commit abc; driver 2,', 'commit def.',
            '| ViT-L | 512 | bf16, CUDA graph | Linear | 0 / 24 | 2.0 | 500.00 | 2.00x |',
            '| 3 | ours, bf16 | 200.00 | 2.00x |', 'The part "spot" stopped: its 40 s were up.'):
        assert words in text, text


def test_too_small_a_gpu(run_gpu, load, tmp_path, monkeypatch):
    """Where not even the inputs fit, rows say so, and what is smaller is still measured."""
    tool = load('benchmark_attention')
    make_inputs = tool.make_inputs

    def allocate(what: str, cell: dict, device: torch.device) -> tuple:
        if what == 'forward':
            raise torch.OutOfMemoryError('too much')
        return make_inputs(what, cell, device)
    monkeypatch.setattr(tool, 'make_inputs', allocate)
    assert run_gpu('--out', str(tmp_path), '--parts', 'compile', 'core') == 0
    for part, figure in (('compile', 'seconds'), ('core', 'ms')):
        rows = [row for row in rows_of(tmp_path / f'{part}.jsonl') if row['name'] == 'ours']
        assert [(row['pass'], row.get('note'), figure in row) for row in rows] == [
            ('forward', 'out of memory', False), ('backward', None, True)]


def test_lost_device_ends_the_benchmark(monkeypatch):
    """After an illegal access every call fails: rows that say so of innocent kernels would count as measured."""
    class Device:
        type = 'cuda'
    lost = []
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device: 1 / 0 if lost else None)
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: None)

    def broken() -> None:
        raise RuntimeError('an illegal memory access')
    assert stopwatch.failure(broken, Device()) == 'failed: RuntimeError'
    lost.append(True)
    with pytest.raises(ZeroDivisionError):
        stopwatch.failure(broken, Device())
