"""The demo's plan agrees with its configs, its runs are started in order, and its report says what the runs logged."""
import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from PIL import Image

from adala_mm.datasets.beacons import draw_scene
from adala_mm.registry import MODELS
from helpers import ROOT

CONFIGS = ROOT / 'configs/demo'


def tool(name: str, monkeypatch):
    """A fresh copy of a tool: its runs remember what was started."""
    spec = importlib.util.spec_from_file_location(f'tool_{name}', ROOT / f'tools/{name}.py')
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def demo(monkeypatch):
    return tool('demo', monkeypatch)


@pytest.fixture
def report(monkeypatch):
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield tool('demo_report', monkeypatch)


def by_name(demo) -> dict:
    return {run.name: run for run in demo.RUNS}


def ancestors(demo, name: str) -> set[str]:
    needs = by_name(demo)[name].needs
    return set(needs).union(*(ancestors(demo, need) for need in needs))


def checkpoints(node) -> set[str]:
    if isinstance(node, dict):
        return set().union(*(checkpoints(value) if key != 'checkpoint' else {value} for key, value in node.items()))
    if isinstance(node, (list, tuple)):
        return set().union(*map(checkpoints, node))
    return set()


def test_runs_form_a_plan_that_can_be_worked_off(demo):
    names = [run.name for run in demo.RUNS]
    assert len(set(names)) == len(names)
    done: set[str] = set()
    while len(done) < len(names):
        ready = {run.name for run in demo.RUNS if run.name not in done and done.issuperset(run.needs)}
        assert ready, f'{set(names) - done} wait for each other or for {[run.needs for run in demo.RUNS]}'
        done |= ready
    assert all(run.cost > 0 and 1 <= run.threads <= 2 for run in demo.RUNS)


def test_every_demo_config_is_run_once(demo):
    assert sorted(run.config for run in demo.RUNS) == sorted(path.stem for path in CONFIGS.glob('*.py'))


@pytest.mark.parametrize('config', sorted(path.stem for path in CONFIGS.glob('*.py')))
def test_runs_start_from_what_their_needs_write(demo, config):
    (run,) = (run for run in demo.RUNS if run.config == config)
    written = {name: f'work_dirs/demo/{name}/iter_{by_name(demo)[name].iterations}.pth' for name in by_name(demo)}
    used = checkpoints(Config.fromfile(CONFIGS / f'{config}.py').model.to_dict())
    assert used <= {written[name] for name in ancestors(demo, run.name)}
    assert used >= {written[name] for name in run.needs}  # nothing is waited for in vain


@pytest.mark.parametrize('config', sorted(path.stem for path in CONFIGS.glob('*.py')))
def test_runs_write_the_checkpoint_that_is_asked_for(demo, config):
    (run,) = (run for run in demo.RUNS if run.config == config)
    cfg = Config.fromfile(CONFIGS / f'{config}.py')
    assert cfg.train_cfg.type == 'IterBasedTrainLoop' and cfg.train_cfg.max_iters == run.iterations
    hook = cfg.default_hooks.checkpoint
    assert hook.by_epoch is False and run.iterations % hook.interval == 0
    assert run.iterations % cfg.train_cfg.val_interval == 0  # scored as it ends
    assert cfg.param_scheduler[-1].end == run.iterations
    assert run.iterations % cfg.default_hooks.logger.interval == 0


def test_rows_of_the_table_are_runs_that_are_scored_before_and_after(demo, report):
    for name, _, softmax, linear in report.ROWS:
        cfg = Config.fromfile(CONFIGS / f'{by_name(demo)[name].config}.py')
        assert 'adala_mm.ValBeforeTrainHook' in [hook.type for hook in cfg.custom_hooks], name
        kinds = cfg.model.backbone.attention
        assert (linear, softmax)[kinds.type == 'adala_mm.SoftmaxAttention'] == cfg.model.backbone.depth
        assert (softmax, linear)[kinds.type == 'adala_mm.SoftmaxAttention'] == 0
    schedules = {json.dumps([cfg.train_cfg.to_dict(), cfg.optim_wrapper.to_dict(), cfg.param_scheduler], sort_keys=True)
                 for cfg in (Config.fromfile(CONFIGS / f'{by_name(demo)[name].config}.py') for name, *_ in report.ROWS)}
    assert len(schedules) == 1  # else the rows could not be compared


def test_coarse_to_fine_is_put_in_untrained_and_leaves_most_tiles_closed(demo, report):
    assert [name for name, *_ in report.ROWS].count('coarse') == 1
    coarse, swap = (Config.fromfile(CONFIGS / f'{by_name(demo)[name].config}.py').to_dict()
                    for name in ('coarse', 'swap'))
    attention = coarse['model']['backbone'].pop('attention')
    swap['model']['backbone'].pop('attention')
    assert coarse == swap  # weights of the teacher, and nothing else differs
    grid = coarse['model']['backbone']['img_size'] // coarse['model']['backbone']['patch_size']
    assert attention['type'] == 'adala_mm.CoarseToFineAttention'
    assert attention['num_open'] < 0.4 * (grid / attention['tile']) ** 2


@pytest.mark.parametrize(('seconds', 'shown'), [(0, '0:00'), (59.9, '0:59'), (60, '1:00'), (605, '10:05'),
                                               (3661, '61:01')])
def test_clock(demo, seconds, shown):
    assert demo.clock(seconds) == shown


@pytest.fixture
def stage(demo, tmp_path, monkeypatch):
    """Makes ``demo.main`` launch ``commands[run]`` (default: end at once); returns what it did."""
    out = tmp_path / 'work_dirs/demo'
    events: list[tuple] = []
    commands: dict[str, str] = {}
    seen_busy: list[int] = []

    def start(run, out, data_root):
        finished = {other.name for other in demo.RUNS if other.process and other.process.poll() is not None}
        events.append(('start', run.name, finished))
        seen_busy.append(run.threads + sum(r.threads for r in demo.RUNS if r.state == 'running'))
        (out / run.name).mkdir(parents=True)
        with open(out / run.name / 'console.log', 'w') as log:
            run.process = subprocess.Popen(['sh', '-c', commands.get(run.name, 'true')], stdout=log,
                                           stderr=subprocess.STDOUT)

    def run_report(command, **options):
        events.append(('report', command, options))

    sleep = time.sleep
    monkeypatch.setattr(demo, 'start', start)
    monkeypatch.setattr(demo.subprocess, 'run', run_report)
    monkeypatch.setattr(demo.time, 'sleep', lambda seconds: sleep(0.01))
    monkeypatch.setattr(sys, 'argv', ['demo.py', '--work-dir', str(out), '--data-root', str(tmp_path / 'pictures')])
    demo.out, demo.events, demo.commands, demo.seen_busy = out, events, commands, seen_busy
    yield demo
    for run in demo.RUNS:
        if run.process and run.process.poll() is None:
            run.process.kill()


def test_all_runs_in_order_then_the_report(stage, tmp_path, capsys):
    (tmp_path / 'work_dirs/demo/stage1').mkdir(parents=True)  # of an earlier demo
    (tmp_path / 'work_dirs/demo/stage1/iter_150.pth').touch()
    stage.commands.update(stage1='sleep 0.3')  # long enough for others to overtake it
    stage.main()
    started = [event for event in stage.events if event[0] == 'start']
    assert sorted(name for _, name, _ in started) == sorted(by_name(stage))
    for _, name, finished in started:
        assert finished.issuperset(by_name(stage)[name].needs), name
    assert max(stage.seen_busy) <= 2
    assert not (stage.out / 'stage1/iter_150.pth').exists()
    kind, command, options = stage.events[-1]
    assert kind == 'report' and options['check']
    assert command[1:3] == [str(ROOT / 'tools/demo_report.py'), str(stage.out)]
    assert command[command.index('--data-root') + 1] == str(tmp_path / 'pictures')
    assert float(command[command.index('--seconds') + 1]) > 0
    printed = capsys.readouterr().out
    assert all(f'done: {name}\n' in printed for name in by_name(stage)) and 'all runs done' in printed


def test_report_finds_the_checkpoints_of_this_demo(stage, tmp_path, monkeypatch):
    # Configs name checkpoints relative to the folder above work_dirs/, wherever the demo was called from.
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    stage.main()
    _, _, options = stage.events[-1]
    assert (Path(options.get('cwd') or Path.cwd()) / 'work_dirs/demo').resolve() == stage.out


def test_relative_folders_are_those_of_the_caller(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['demo.py'])
    stage.main()
    _, command, _ = stage.events[-1]
    assert command[2] == str(tmp_path / 'work_dirs/demo')
    assert command[command.index('--data-root') + 1] == str(tmp_path / 'data')


def test_a_failing_run_ends_the_demo_and_shows_its_log(stage, capsys):
    stage.commands.update(stage1='for i in $(seq 40); do echo line $i; done; echo the reason >&2; exit 3')
    with pytest.raises(SystemExit) as info:
        stage.main()
    assert info.value.code == 1
    printed = capsys.readouterr().out
    assert 'stage1 failed' in printed and str(stage.out / 'stage1/console.log') in printed
    assert 'the reason' in printed and 'line 40\n' in printed and 'line 17\n' in printed
    assert 'line 10\n' not in printed  # the tail alone
    assert 'report' not in {event[0] for event in stage.events}
    assert not {'stage2', 'both'} & {name for _, name, _ in stage.events}


def test_a_failing_run_takes_the_others_down(stage):
    stage.commands.update(stage1='exec sleep 100', stage2_only='exit 3')
    with pytest.raises(SystemExit):
        stage.main()
    assert by_name(stage)['stage1'].process.wait(timeout=600) != 0


def test_a_killed_run_is_a_failure(stage, capsys):
    stage.commands.update(teacher='kill -9 $$')
    with pytest.raises(SystemExit) as info:
        stage.main()
    assert info.value.code == 1 and 'teacher failed' in capsys.readouterr().out


def test_work_dir_must_be_where_the_configs_look(demo, tmp_path, monkeypatch, capsys):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/precious').touch()
    monkeypatch.setattr(sys, 'argv', ['demo.py', '--work-dir', str(tmp_path / 'mine')])
    with pytest.raises(SystemExit) as info:
        demo.main()
    assert info.value.code == 2 and 'work_dirs/demo' in capsys.readouterr().err
    assert (tmp_path / 'mine/precious').exists()


def test_start_trains_in_the_folder_above_the_work_dirs(demo, tmp_path, monkeypatch):
    # A stand-in for Python notes what it is called with.
    python = tmp_path / 'python'
    python.write_text('#!/bin/sh\npwd; echo "threads $OMP_NUM_THREADS $MKL_NUM_THREADS"; for a; do echo "$a"; done\n')
    python.chmod(0o755)
    monkeypatch.setattr(demo.sys, 'executable', str(python))
    out = tmp_path / 'work_dirs/demo'
    run = by_name(demo)['stage1']
    demo.start(run, out, '/pictures')
    assert run.process.wait(timeout=600) == 0
    place, threads, script, config, *options = (out / 'stage1/console.log').read_text().splitlines()
    assert Path(place).resolve() == tmp_path.resolve() and threads == 'threads 1 1'
    assert Path(script) == ROOT / 'tools/train.py' and Path(config) == CONFIGS / 'stage1_demo_beacons.py'
    assert options == ['--work-dir', str(out / 'stage1'), '--data-root', '/pictures']


def write_log(run: Path, *rows: dict) -> None:
    path = run / '20260101_000000/vis_data/scalars.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def test_progress(demo, tmp_path, capsys, monkeypatch):
    run = by_name(demo)['stage1']
    assert demo.progress(run, tmp_path) == (0, run.iterations)
    write_log(tmp_path / 'stage1', {'align/rel_error': 1.2, 'step': 0})
    assert demo.progress(run, tmp_path) == (0, run.iterations)
    write_log(tmp_path / 'stage1', {'loss': 0.5, 'step': 10}, {'loss': 0.4, 'step': 75}, {'align/x': 1, 'step': 150})
    assert demo.progress(run, tmp_path) == (75, run.iterations)

    by_name(demo)['teacher'].state, run.state = 'done', 'running'
    whole = sum(r.cost for r in demo.RUNS)
    worked = by_name(demo)['teacher'].cost + run.cost * 75 / run.iterations
    monkeypatch.setattr(demo.time, 'time', lambda: 1060.0)
    demo.report_progress(tmp_path, 1000.0, live=False)
    line = capsys.readouterr().out
    assert f'{100 * worked / whole:3.0f} %' in line and f'stage1 75/{run.iterations}' in line
    assert f'1/{len(demo.RUNS)} runs' in line
    eta = re.search(r'ETA (\d+):(\d\d)', line)
    assert int(eta[1]) * 60 + int(eta[2]) == pytest.approx(60 * (whole - worked) / worked, abs=2)


def made_up_demo(out: Path, report) -> None:
    """Logs as the runs of a demo leave them; row i is scored 10 i below the teacher before, 5 i after."""
    for i, (name, *_) in enumerate(report.ROWS):
        write_log(out / name, {'mIoU': 80.0 - 10 * i, 'step': 0}, {'loss': 0.5, 'decode.loss_ce': 0.5, 'step': 10},
                  {'loss': 0.3, 'decode.loss_ce': 0.3, 'step': 100}, {'mIoU': 82.0 - 5 * i, 'step': 100})
    write_log(out / 'mask2former', {'loss': 30.0, 'step': 60}, {'mIoU': 55.5, 'step': 60})
    for name, first, last in (('stage1', 1.2, 0.9), ('stage2_only', 1.2, 0.6), ('stage2', 0.9, 0.5)):
        write_log(out / name, {'align/rel_error': first, 'step': 0}, {'loss': 0.3, 'step': 10},
                  {'align/rel_error': last, 'step': 150})


def test_results(report, tmp_path):
    made_up_demo(tmp_path, report)
    data = report.results(tmp_path, seconds=123.4)
    assert [row['name'] for row in data['rows']] == [name for _, name, *_ in report.ROWS]
    assert [row['as_is'] for row in data['rows']] == [80, 70, 60, 50, 40, 30]
    assert [row['tuned'] for row in data['rows']] == [82, 77, 72, 67, 62, 57]
    # Both columns are shares of the teacher as it is, before its own fine-tuning.
    assert [row['as_is_kept'] for row in data['rows']] == [100, 87.5, 75, 62.5, 50, 37.5]
    assert data['rows'][-1]['tuned_kept'] == pytest.approx(71.25) and data['rows'][0]['tuned_kept'] == 102.5
    assert {row['iterations'] for row in data['rows']} == {100}
    assert data['mask2former'] == 55.5 and data['seconds'] == 123
    assert data['rel_error'] == {'stage1': [1.2, 0.9], 'stage2_only': [1.2, 0.6], 'stage2': [0.9, 0.5]}
    assert set(data['machine']) == {'cpu', 'cores', 'python', 'torch', 'commit'}
    assert json.loads(json.dumps(data)) == data


def test_table(report, tmp_path):
    made_up_demo(tmp_path, report)
    header, rule, *rows = report.table(report.results(tmp_path, 0)).splitlines()
    assert rule == '|' + '---|' * (header.count('|') - 1)
    assert rows[0] == '| softmax teacher | 6 / 0 | 80.00 | 100.0 % | 82.00 | 102.5 % |'
    assert rows[1] == '| swap only | 0 / 6 | 70.00 | 87.5 % | 77.00 | 96.2 % |'
    assert rows[2] == '| swap, coarse to fine | 0 / 6 | 60.00 | 75.0 % | 72.00 | 90.0 % |'
    assert len(rows) == len(report.ROWS)


def test_page_needs_nothing_else(report, tmp_path):
    made_up_demo(tmp_path, report)
    for name in ('features', 'segmentations', 'curves', 'times'):
        Image.new('RGB', (4, 4)).save(tmp_path / f'{name}.png')
    data = report.results(tmp_path, 99)
    data['machine']['cpu'] = 'A <fast> & new CPU'
    markdown = report.text(data)
    page = report.as_html(markdown, tmp_path)
    sources = re.findall(r'src="(.*?)"', page)
    assert len(sources) == 4 and all(source.startswith('data:image/png;base64,iVBOR') for source in sources)
    assert not re.search(r'https?://|<link|<script|@import|url\(|href=', page)
    assert page.count('<tr>') == 1 + len(report.ROWS) and page.count('<th>') == 6
    assert page.count('<td>') == 6 * len(report.ROWS)
    assert '<h1>From softmax to linear attention' in page and '<em>As is</em>' in page
    assert 'A &lt;fast&gt; &amp; new CPU' in page and '<fast>' not in page
    assert '||student - teacher|| / ||teacher||' in page
    for figure in ('82.00', '62.00', '55.50', 'swap 1.20', 'stage 1 0.90', 'only 0.60', '1 + 2 0.50', '99 s'):
        assert figure in page, figure
    assert '**' not in page and '![' not in page


def test_missing_picture_is_an_error(report, tmp_path):
    with pytest.raises(FileNotFoundError):
        report.as_html('# Title\n\n![features](features.png)', tmp_path)


def test_images_are_prepared_as_in_training(report, tmp_path):
    # The report reads RGB; the configs' pipeline reads BGR and turns it round.
    image, label = draw_scene(np.random.default_rng(0))
    for kind, array in (('image', image), ('label', label)):
        Image.fromarray(array).save(tmp_path / f'{kind}.png')
    cfg = Config.fromfile(CONFIGS / 'teacher_demo_beacons.py')
    preprocess = MODELS.build(cfg.model).data_preprocessor
    item = Compose(cfg.test_pipeline)({
        'img_path': str(tmp_path / 'image.png'), 'seg_map_path': str(tmp_path / 'label.png'), 'seg_fields': [],
        'reduce_zero_label': False, 'label_map': None})
    trained = preprocess({key: [value] for key, value in item.items()})['inputs']
    got = preprocess(report.batch([image, image]))['inputs']
    assert got.shape == (2, 3, 80, 80)
    torch.testing.assert_close(got[:1], trained)
    assert not torch.allclose(got[:1], trained.flip(1))


def test_networks_as_they_started_and_ended(report, tmp_path, monkeypatch):
    # A run's config and checkpoint are found in its work dir; labels are drawn at full size.
    cfg = Config.fromfile(CONFIGS / 'fcn_demo_beacons.py')
    cfg.model.backbone.depth = 1
    teacher = MODELS.build(cfg.model)
    teacher.init_cfg = cfg.model.decode_head.init_cfg = cfg.model.backbone.init_cfg = None
    started, ended = ({key: torch.randn_like(value) * 0.2 for key, value in teacher.state_dict().items()}
                      for _ in range(2))
    monkeypatch.chdir(tmp_path)
    out = tmp_path / 'work_dirs/demo'
    start = {'type': 'Pretrained', 'checkpoint': 'work_dirs/demo/teacher/iter_1.pth'}
    cfg.model.backbone.init_cfg, cfg.model.decode_head.init_cfg = start, {**start, 'prefix': 'decode_head.'}
    for run, state in (('teacher', started), ('both', ended)):
        (out / run).mkdir(parents=True)
        torch.save({'state_dict': state}, out / run / 'iter_1.pth')
    cfg.dump(str(out / 'both/fcn_demo_beacons.py'))
    images = [draw_scene(np.random.default_rng(i))[0] for i in range(2)]
    maps = []
    for tuned, state in ((False, started), (True, ended)):
        model = report.segmentor(out, 'both', tuned)
        assert not model.training
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        maps.append(report.labels(model, images))
        assert [(label.shape, label.dtype) for label in maps[-1]] == [((80, 80), np.uint8)] * 2
        assert max(label.max() for label in maps[-1]) < 6
    assert not np.array_equal(maps[0], maps[1])


def test_pictures_are_drawn(report, tmp_path):
    made_up_demo(tmp_path, report)
    report.draw_curves(tmp_path / 'curves.png', tmp_path)
    times = report.measure_attentions(tokens=(16, 32))
    assert times['tokens'] == [16, 32] and all(min(times[name]) > 0 and len(times[name]) == 2
                                               for name in ('softmax', 'linear'))
    report.draw_times(tmp_path / 'times.png', times)
    image = draw_scene(np.random.default_rng(0))[0]
    report.picture_grid(tmp_path / 'grid.png', {'one': [image] * 2, 'two': [image] * 2}, 'title')
    for name in ('curves', 'times', 'grid'):
        pixels = np.asarray(Image.open(tmp_path / f'{name}.png').convert('RGB'))
        assert min(pixels.shape[:2]) > 100 and pixels.std() > 5  # not blank
