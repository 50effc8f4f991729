"""The benchmarks run, record what they claim to, and say so where something is slower. No time is asserted."""
import importlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from adala_mm.utils import benchmark_tables as tables
from adala_mm.utils.benchmark_tables import crossovers, speedup
from adala_mm.utils.machine import hardware
from adala_mm.utils.stopwatch import Allowance, failure, peak_memory, take_turns, wall_timer
from helpers import LINEAR, ROOT, tiny_vit

CPU = torch.device('cpu')


@pytest.fixture
def tool(monkeypatch):
    """A benchmark as a module, on the CPU and with a tiny ViT in place of ViT-S."""
    def load(name: str):
        monkeypatch.syspath_prepend(ROOT / 'tools/analysis_tools')
        module = importlib.import_module(f'benchmark_{name}')
        monkeypatch.setattr(module, 'default_device', lambda: CPU)
        if name != 'attention':
            tiny = {key: value for key, value in tiny_vit().items() if key in ('embed_dim', 'depth', 'num_heads')}
            monkeypatch.setitem(module.ARCHS, 'S', tiny)
        return module
    yield load


@pytest.fixture
def bench(tool, tmp_path, monkeypatch, capsys):
    """Runs a benchmark's command line; its record and what it printed."""
    def run(name: str, *options: str) -> tuple[dict, str]:
        module, out = tool(name), tmp_path / f'{name}.json'
        monkeypatch.setattr(sys, 'argv', [module.__file__, *options, '--seconds', '1e-9', '--out', str(out)])
        module.main()
        return json.loads(out.read_text()), capsys.readouterr().out
    return run


class FakeClock:
    """Moves on only when somebody works."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, []

    def __call__(self) -> float:
        return self.now

    def worker(self, name: str, *durations: float):
        """A function that takes ``durations``, one after the other, the last one for ever."""
        left = list(durations)

        def work() -> None:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]
        return work


def test_medians_without_the_warm_up():
    clock = FakeClock()
    functions = dict(a=clock.worker('a', 100, 1, 3, 2), b=clock.worker('b', 0, 5))
    times = take_turns(functions, wall_timer(CPU, clock), seconds=0, least=3)
    assert times == dict(a=2, b=5)


def test_turns_alternate():
    clock = FakeClock()
    take_turns({name: clock.worker(name, 1) for name in 'abc'}, wall_timer(CPU, clock), seconds=0, least=3)
    assert ''.join(clock.log) == 'abc' + 'abc' + 'cba' + 'abc'


@pytest.mark.parametrize(('seconds', 'rounds'), [(0, 3), (8, 4), (9, 5), (1e9, 7)])
def test_rounds_end_with_the_time_for_them(seconds, rounds):
    clock = FakeClock()
    functions = {name: clock.worker(name, 1) for name in 'ab'}
    take_turns(functions, wall_timer(CPU, clock), seconds, least=3, most=7)
    assert len(clock.log) == 2 * (rounds + 1)


def test_nothing_to_measure():
    assert take_turns({}, wall_timer(CPU), seconds=1) == {}


def test_failures_are_named(capsys):
    def exhausted():
        raise torch.OutOfMemoryError('too much')

    def broken():
        raise KeyError('x')

    assert failure(lambda: None, CPU) == '' and failure(exhausted, CPU) == 'out of memory'
    assert failure(broken, CPU) == 'failed: KeyError' and "failed: KeyError: 'x'" in capsys.readouterr().out


def test_allowance_forecasts_from_the_last_measurement():
    allowance = Allowance(seconds=2.0, nbytes=2 ** 30)
    assert allowance.refuse('a', work=1e12) == ''  # nothing is known yet
    allowance.learn('a', work=4, seconds=1.0)
    assert allowance.refuse('a', work=8) == '' and allowance.refuse('b', work=1e12) == ''
    assert allowance.refuse('a', work=10) == 'skipped: 2.5 s'
    allowance.learn('a', work=8, seconds=1.0)
    assert allowance.refuse('a', work=10) == ''
    assert allowance.refuse('a', work=1, nbytes=3 * 2 ** 30) == 'skipped: 3 GiB'


def test_peak_memory_is_beyond_what_was_there():
    x = torch.ones(2 ** 18)  # 1 MiB
    assert 2 ** 21 <= peak_memory(lambda: (x + 1) * (x + 2), CPU) < 2 ** 23


@pytest.mark.parametrize(('own', 'text'), [(0.5, '2.00x'), (1.0, '1.00x'), (1.004, '1.00x'), (1.25, '0.80x, slower'),
                                           (1.01, '0.99x, slower')])
def test_slower_is_called_slower(own, text):
    assert speedup(1.0, own) == text


@pytest.mark.parametrize(('times', 'text'), [
    ((2, 2, 2), 'slower at every measured size'), ((0.5, 0.5, 0.5), 'faster at every measured size'),
    ((2, 0.5, 0.5), 'faster than softmax from 512 pixels on'),
    ((0.5, 2, 0.5), 'faster than softmax from 1024 pixels on'),
    ((0.5, 0.5, 2), 'slower at the largest measured size')])
def test_crossover(times, text):
    rows = [dict(arch='S', mode='fp32', attention='AAttention', size=size, ms=ms, softmax_ms=1)
            for size, ms in zip((224, 512, 1024), times, strict=True)]
    assert crossovers(rows[::-1]) == [f'ViT-S, fp32, A: {text}']
    skipped = dict(rows[0], size=2048, softmax_ms=None)
    assert crossovers([*rows, skipped, dict(rows[0], attention='SoftmaxAttention')]) == crossovers(rows)


def test_hardware_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'A GPU')
    answer = SimpleNamespace(stdout='1.2.3\n1.2.3\n', returncode=0)
    monkeypatch.setattr('adala_mm.utils.machine.subprocess.run', lambda *args, **options: answer)
    facts = hardware(torch.device('cuda'))
    assert facts['device'] == 'A GPU' and facts['driver'] == '1.2.3' and {'cuda', 'triton', 'commit'} <= set(facts)
    assert hardware(CPU)['device'] == facts['cpu'] and facts['threads'] == torch.get_num_threads()


def test_attention_core(bench, tmp_path):
    data, text = bench('attention', '--tokens', '128', '64', '--heads', '2', '--dim', '16', '--competitors', 'sdpa',
                       'math', 'ours', 'plain', 'fla')
    assert [(row['pass'], row['tokens']) for row in data['rows'][::4]] == [
        (what, n) for n in (64, 128) for what in ('forward', 'forward + backward')]
    assert [row['name'] for row in data['rows'][:4]] == ['sdpa', 'math', 'ours', 'plain']
    for row in data['rows']:
        moved = {'forward': 4, 'forward + backward': 11}[row['pass']] * row['tokens'] * 2 * 16 * 4
        assert row['gb_per_s'] * row['ms'] * 1e6 == pytest.approx(moved)
        assert row['mib'] > 0 and row['copy_share'] > 0
    assert data['settings']['tokens'] == [64, 128] and {'device', 'torch', 'commit', 'threads'} <= set(data['machine'])
    assert 'fla is left out: for GPUs only' in text and tables.attention_speed_table(data) in text
    assert (tmp_path / 'attention.png').read_bytes().startswith(b'\x89PNG')


def test_attention_core_says_what_was_skipped(bench, tool, monkeypatch):
    fake = dict(copy=0.001, sdpa=1.0, math=1.5, ours=2.0)
    monkeypatch.setattr(tool('attention'), 'take_turns', lambda calls, *_: {name: fake[name] for name in calls})
    monkeypatch.setattr(tool('attention'), 'total_memory', lambda device: 2 * 2 ** 20)
    data, text = bench('attention', '--tokens', '64', '128', '512', '--heads', '2', '--dim', '16', '--time-limit', '5',
                       '--competitors', 'sdpa', 'math', 'ours')
    assert '| forward | 64 | 1,000 ms (flash) | 1,500 ms, 0.67x, slower | 2,000 ms, 0.50x, slower |' in text
    assert '| forward | 512 | skipped: 16.0 s | skipped: 0 GiB | skipped: 8.0 s |  |  | - / - |' in text
    assert [row.get('note') for row in data['rows'][12:15]] == ['skipped: 16.0 s', 'skipped: 0 GiB', 'skipped: 8.0 s']


def test_attention_core_needs_torch_alone(tmp_path):
    code = ("import runpy, sys; sys.modules.update(dict.fromkeys(['mmengine', 'mmcv', 'mmseg', 'timm', 'matplotlib']));"
            'sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")')
    out = tmp_path / 'a.json'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, 'tools/analysis_tools/benchmark_attention.py',
                           '--tokens', '64', '--seconds', '1e-9', '--competitors', 'ours', 'coarse', '--out', str(out)],
                          cwd=ROOT, env=os.environ | {'PYTHONPATH': str(ROOT)}, capture_output=True, text=True,
                          check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert {row['name'] for row in json.loads(out.read_text())['rows']} == {'ours'} and 'no picture' in done.stdout
    assert 'coarse is left out: No module named' in done.stdout


def test_models(bench, tool, monkeypatch):
    def timer(call) -> float:  # twice the images in the same time, once
        call()
        return 0.01 * max(1, len(call.args[0]) / 2)

    monkeypatch.setattr(tool('model'), 'wall_timer', lambda device: timer)
    data, text = bench('model', '--arch', 'S', '--sizes', '64', '32', '--best-batch', '--attentions', 'RALAAttention',
                       'adala_mm.LinearAttention', '--dtype', 'fp32', 'bf16')
    names = ['SoftmaxAttention', 'RALAAttention', 'LinearAttention']
    assert [(row['mode'], row['size'], row['attention']) for row in data['rows']] == [
        (mode, size, name) for mode in ('fp32', 'bf16') for size in (32, 64) for name in names]
    for row in data['rows']:
        blocks = (2, 0) if row['attention'] == 'SoftmaxAttention' else (0, 2)
        assert (row['softmax_blocks'], row['linear_blocks']) == blocks
        assert row['ms'] == row['softmax_ms'] == 10 and row['gmac'] > 0
        assert row['best_batch'] == 2 and row['best_images_per_s'] == pytest.approx(200)
        assert row['mib'] > row['parameters'] * (2 if row['mode'] == 'bf16' else 4) / 2 ** 20
    plain, rala, linear = data['rows'][3:6]
    assert plain['parameters'] == linear['parameters'] < rala['parameters'] and plain['gmac'] > linear['gmac']
    assert tables.model_speed_table(data) in text and 'ViT-S, bf16, Linear: ' in text


def test_counts_are_of_segmentors(bench, capsys):
    with pytest.raises(SystemExit):
        bench('model', '--count-only')
    assert '--count-only is about the segmentors of --configs' in capsys.readouterr().err


@pytest.mark.parametrize('options', [[], ['--count-only']], ids=['times', 'counts'])
def test_parts_of_segmentors(bench, options):
    data, text = bench('model', '--configs', 'mask2former_deitt_camvid', 'probe_deitt_softmax_camvid', '--sizes', '32',
                       *options)
    full, probe = data['rows']
    assert (full['config'], full['size'], full['softmax_blocks'], full['linear_blocks']) == (
        'mask2former_deitt_camvid', 32, 0, 12)
    assert set(full['gmac']) == {'backbone', 'neck', 'pixel decoder', 'head'} and min(full['gmac'].values()) > 0
    assert set(probe['gmac']) == {'backbone', 'head'} and probe['softmax_blocks'] == 12
    # By hand: 11 classes of 192 channels at each of four patches; patch 16, and 12 blocks of 12 C² + softmax a token.
    assert 1e9 * probe['gmac']['head'] == 4 * 192 * 11
    tokens, width = 5, 192
    assert 1e9 * probe['gmac']['backbone'] == 4 * 768 * width + 12 * tokens * (12 * width ** 2 + 2 * tokens * width)
    assert all(set(row.get('seconds', row['gmac'])) == set(row['gmac']) for row in data['rows'])
    assert all(('seconds' in row) != bool(options) for row in data['rows'])
    assert tables.head_share_table(data) in text and text.count(' s of CPU |') == 2 * (not options)


@pytest.mark.parametrize('name', ['cls_dinov2l_in1k', 'stage1_dinov2l_coco', 'maskrcnn_dinov2l_1024_coco'])
def test_other_configs_are_no_segmentors(bench, name):
    with pytest.raises(SystemExit, match=f'{name} is no segmentor'):
        bench('model', '--configs', name, '--sizes', '32', '--count-only')


def test_segmentors_whose_backbone_has_no_size(bench):
    data, text = bench('model', '--configs', 'upernet_l2vitt_ade20k', '--sizes', '64', '--count-only')
    assert min(data['rows'][0]['gmac'].values()) > 0 and '`upernet_l2vitt_ade20k`' in text


@pytest.mark.parametrize(('linear', 'words'), [(2.0, '0.50x, slower'), (0.5, '2.00x')])
def test_models_say_which_is_slower(bench, tool, monkeypatch, linear, words):
    monkeypatch.setattr(tool('model'), 'take_turns', lambda calls, *_: {
        name: linear if 'Linear' in name else 1.0 for name in calls})
    data, text = bench('model', '--arch', 'S', '--sizes', '32', '64')
    assert text.count(f'| {words} |') == 2
    assert f'ViT-S, fp32, Linear: {"slower" if linear > 1 else "faster"} at every measured size' in text
    assert data['rows'][1]['ms'] == 1000 * linear and data['rows'][1]['softmax_ms'] == 1000


def test_models_beyond_the_time_limit_are_skipped(bench, tool, monkeypatch):
    monkeypatch.setattr(tool('model'), 'take_turns', lambda calls, *_: dict.fromkeys(calls, 1.0))
    data, text = bench('model', '--arch', 'S', '--sizes', '32', '256', '--time-limit', '2')
    assert 'ms' in data['rows'][0] and data['rows'][2]['note'].startswith('skipped: ') and '| skipped: ' in text


def test_all_attentions_have_counts_without_being_run(tool):
    from adala_mm.registry import ATTENTIONS
    count = tool('model').count
    assert len(ATTENTIONS.module_dict) > 20
    for name in ATTENTIONS.module_dict:
        facts = count('S', 64, name)
        assert facts['gmac'] > 0 and facts['softmax_blocks'] == (2 if name == 'SoftmaxAttention' else 0), name


def test_the_papers_attentions_have_its_options(bench, tool, monkeypatch):
    module = tool('model')
    monkeypatch.setattr(module, 'take_turns', lambda calls, *_: dict.fromkeys(calls, 1.0))
    data, _ = bench('model', '--arch', 'S', '--sizes', '32', '--attentions', 'paper')
    assert [row['attention'] for row in data['rows']] == [
        'SoftmaxAttention', 'LinearAttention', 'hedgehog', 'lolcats', 'linformer', 'performer', 'cosformer',
        'nystromformer', 'monarch']
    assert all(row['mib'] > 0 for row in data['rows'])
    layers = {name: module.build('S', 32, name).blocks[0].attn for name in module.paper_attentions()}
    assert layers['monarch'].num_steps == 3 and layers['linformer'].token_proj['k'].prefix.shape[0] == 32


def test_compiled_models_and_cuda_graphs(bench, tool, monkeypatch):
    module, built = tool('model'), []
    build = module.build
    monkeypatch.setattr(module, 'build', lambda arch, size, attention, compile=False: (
        built.append(compile), build(arch, size, attention))[1])
    data, text = bench('model', '--arch', 'S', '--sizes', '32', '--attentions', 'SoftmaxAttention', '--compile',
                       'default', 'reduce-overhead', '--cuda-graph')
    assert {row['mode']: row.get('note') for row in data['rows']} == {
        'fp32': None, 'fp32, CUDA graph': 'needs a GPU', 'fp32, compiled': None,
        'fp32, compiled, CUDA graph': 'needs a GPU', 'fp32, compiled (reduce-overhead)': None}
    assert built[1:] == [False, 'default', 'reduce-overhead']  # after the one that is counted


def test_modes_with_cuda_graphs_of_their_own(tool):
    variants = tool('model').variants
    assert variants(SimpleNamespace(compile=None, cuda_graph=True)) == [
        ('', False, False), (', CUDA graph', False, True)]
    assert variants(SimpleNamespace(compile=[], cuda_graph=False)) == [
        ('', False, False), (', compiled', 'default', False)]
    assert variants(SimpleNamespace(compile=['default', 'max-autotune'], cuda_graph=True))[2:] == [
        (', compiled', 'default', False), (', compiled, CUDA graph', 'default', True),
        (', compiled (max-autotune)', 'max-autotune', False)]


def test_cuda_graphs_are_replayed(tool, monkeypatch):
    """What is timed is the replay; what fails while it is recorded is a row's note."""
    module, log, images = tool('model'), [], torch.zeros(1)

    def record(call):
        call()
        return lambda: log.append('replay')
    monkeypatch.setattr(module, 'cuda_graph', record)
    models = dict(eager=(lambda x: log.append('eager'), False), graph=(lambda x: log.append('recorded'), True),
                  broken=(lambda x: 1 / 0, True))
    calls, notes = module.start(models, images)
    assert log == ['eager', 'recorded', 'replay']
    assert notes == dict(eager='', graph='', broken='failed: ZeroDivisionError')
    calls['graph']()
    assert log[3:] == ['replay'] and calls.keys() == {'eager', 'graph'}


def test_unknown_attention_is_named(bench, capsys):
    with pytest.raises(SystemExit):
        bench('model', '--attentions', 'LinearAtention')
    assert 'LinearAtention: no registered attention' in capsys.readouterr().err


def test_training(bench, tmp_path):
    for i in range(4):
        path = tmp_path / f'data/beacons/images/train/{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (80, 80), (60 * i, 0, 0)).save(path)
    config = str(ROOT / 'configs/demo/stage1_demo_beacons.py')
    data, text = bench('training', '--arch', 'S', '--size', '32', '--batch', '2', '--depths', '2', '3', '--config',
                       config, '--data-root', str(tmp_path / 'data'), '--seconds', '0.2')
    assert [(row['stage'], row['version']) for row in data['rows']] == [
        (stage, version) for stage in (1, 2) for version in ('straightforward', 'ours, fp32')]
    assert all(row['ms'] > 0 and row['mib'] > row['held_mib'] > 0 for row in data['rows'])
    assert [(row['depth'], row['version']) for row in data['depths']] == [
        (depth, version) for depth in (2, 3) for version in ('straightforward', 'ours, fp32')]
    assert data['loader']['images_per_s'] > 0 and data['loader']['config'] == 'stage1_demo_beacons'
    assert tables.training_speed_table(data) in text and tables.depth_table(data) in text


def test_training_says_which_is_slower(bench, tool, monkeypatch):
    monkeypatch.setattr(tool('training'), 'take_turns', lambda calls, *_: {
        name: 2.0 if name.startswith('ours') else 1.0 for name in calls})
    _, text = bench('training', '--arch', 'S', '--size', '32', '--batch', '2')
    assert text.count('| 1.00 | 0.50x, slower |') == 2 and text.count('| straightforward | 2.00 |  |') == 2


def test_training_loops_do_the_same_work(tool, sharp_pretrained):
    """The baseline learns what ours learns: it is slower or larger, not easier."""
    module = tool('training')
    vit, images = dict(module.ARCHS['S'], img_size=32, patch_size=8), torch.randn(2, 3, 32, 32)
    for stage in (1, 2):
        theirs = module.two_networks(stage, vit, sharp_pretrained, images)
        ours = module.registered(stage, vit, sharp_pretrained, images, 'fp32', False)
        student, backbone = theirs.modules[1], ours.modules[0].backbone
        learning, wanted = ({name for name, p in network.named_parameters() if p.requires_grad}
                            for network in (student, backbone))
        assert learning == wanted
        before = student.blocks[0].attn.qkv.weight.clone()
        theirs.step()
        ours.step()
        step = student.blocks[0].attn.qkv.weight - before
        assert step.abs().max() > 0
        # Adam's first step is the sign of the gradient: the scale of the loss, a sum or a mean, does not matter.
        same = torch.isclose(step, backbone.blocks[0].attn.qkv.weight - before, rtol=0.05).float().mean()
        assert same > 0.9
        assert theirs.held_bytes() > ours.held_bytes() if stage == 1 else theirs.held_bytes() == ours.held_bytes()


def test_mixed_precision_needs_a_gpu(bench, capsys):
    with pytest.raises(SystemExit):
        bench('training', '--dtype', 'bf16')
    assert 'mixed precision needs a GPU' in capsys.readouterr().err


def test_baseline_attention_is_the_same_function(tool):
    from adala_mm.models.attentions import build_attention
    layer = build_attention(LINEAR, 32, 4)
    plain = build_attention(dict(type=tool('training').PlainLinearAttention), 32, 4)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 17, 32)
    torch.testing.assert_close(plain(x, (4, 4), 1), layer(x, (4, 4), 1))
