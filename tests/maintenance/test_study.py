"""maintenance/study.py: order, seeds, what a run starts from, what is recorded, what failures lead to; a real one."""
from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import score_study
from mmengine.config import Config
from study import Study, locked, main, read_study, training_cost, wanted

from helpers import LINEAR, ROOT, tiny_vit

CONFIG = '''
model = dict(type='adala_mm.{kind}', data_preprocessor=dict(type='ImgDataPreprocessor', mean=[128] * 3, std=[64] * 3),
             **{networks})
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(type='mmpretrain.CustomDataset', data_root='data/pictures', ann_file='list.txt', with_label=False,
                 pipeline=[dict(type='LoadImageFromFile'), dict(type='mmpretrain.PackInputs')]))
val_dataloader = dict(train_dataloader, sampler=dict(type='DefaultSampler', shuffle=False))
val_evaluator = dict(type='adala_mm.AlignmentMetric')
val_cfg = dict(type='ValLoop')
test_dataloader, test_evaluator, test_cfg = val_dataloader, val_evaluator, dict(type='TestLoop')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
param_scheduler = dict(type='PolyLR', power=0.9, end=7, by_epoch=False)
train_cfg = dict(type='IterBasedTrainLoop', max_iters=7, val_interval=7)
default_hooks = dict(logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False), checkpoint=dict(
    type='CheckpointHook', by_epoch=False, interval=7))
log_processor = dict(by_epoch=False)
custom_hooks = [dict(type='adala_mm.ProvenanceHook')]
randomness = dict(seed=0)
'''


def write_study(folder: Path, **runs: dict) -> Path:
    for run in runs.values():
        (folder / f'{run["config"]}.py').touch()
    path = folder / 'study.py'
    path.write_text(f'seeds = [0, 1]\nruns = {runs!r}\n')
    return path


CHAIN = dict(one=dict(config='a'), two=dict(config='b', after='one', iterations=5),
             three=dict(config='b', after='two', options={'model.layers': [0, 1]}),
             other=dict(config='a', label='another'))


def test_seeds_are_done_one_after_the_other_and_runs_bring_what_they_need(tmp_path):
    study = read_study(write_study(tmp_path, **CHAIN))
    assert wanted(study, [3, 1], []) == [(name, seed) for seed in (3, 1) for name in CHAIN]
    assert wanted(study, [0], ['two', 'other']) == [('one', 0), ('two', 0), ('other', 0)]
    with pytest.raises(ValueError, match="has no run 'four'; it has one, two, three, other"):
        wanted(study, [0], ['four'])


@pytest.mark.parametrize(('runs', 'message'), [
    (dict(one=dict(config='a'), two=dict(config='a', after='one', swap='x')), 'has a label swap, and comes after'),
    (dict(one=dict(config='a', lr=1)), "run 'one' has an unknown key 'lr'; there are config, after, "
     'iterations, options, amp, label, swap'),
    (dict(one=dict(config='a', after='two'), two=dict(config='a')), "'one' comes after 'two', which is not among the "
                                                                    'runs before it: none')])
def test_studies_that_cannot_be(runs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_study(write_study(tmp_path, **runs))


def test_unknown_keys_of_a_study_are_named(tmp_path):
    path = write_study(tmp_path, **CHAIN)
    path.write_text(path.read_text() + 'Amp = True\nseed = 1\namp = True\n')
    with pytest.raises(ValueError, match='study.py has unknown keys: Amp, seed; there are runs, seeds, amp$'):
        read_study(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='no study at .*nowhere.py'):
        read_study(tmp_path / 'nowhere.py')
    path = write_study(tmp_path, **CHAIN)
    (tmp_path / 'b.py').unlink()
    with pytest.raises(FileNotFoundError, match=r"run 'two' needs .*b\.py, which does not exist"):
        read_study(path)


def test_where_a_run_starts_and_how_long_it_is(tmp_path):
    study = Study(write_study(tmp_path, **CHAIN), tmp_path / 'out.json', None, 1)
    (tmp_path / 'b.py').write_text("param_scheduler = dict(type='PolyLR', end=9)\n")
    study.records = {'one/seed1': dict(checkpoint='iter_3.pth'), 'two/seed1': dict(checkpoint='iter_5.pth')}
    assert study.options(('one', 1)) == {}
    start = 'model.backbone.init_cfg.checkpoint'
    assert study.options(('two', 1)) == {
        start: 'work_dirs/study/one/seed1/iter_3.pth', 'train_cfg.max_iters': 5, 'train_cfg.val_interval': 5,
        'param_scheduler.end': 5}
    (tmp_path / 'b.py').write_text("param_scheduler = [dict(type='LinearLR', end=2), dict(type='PolyLR', end=9)]\n")
    with pytest.raises(ValueError, match=r'two/seed1: iterations cannot be set, for .*b.py has a schedule of several'):
        study.options(('two', 1))
    assert study.options(('three', 1)) == {start: 'work_dirs/study/two/seed1/iter_5.pth', 'model.layers': [0, 1]}


@pytest.mark.parametrize('jobs', [1, 2, 3])
def test_order_records_and_failures(jobs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path, out = write_study(tmp_path, **CHAIN), tmp_path / 'results/out.json'
    trained = []

    def train(study: Study, broken: tuple = ()):
        def result(run):
            before = study.before(run)
            assert before is None or study.key(before) in json.loads(out.read_text())  # recorded before it is used
            trained.append(run)
            if run in broken:
                raise RuntimeError('it says why')
            study.work_dir(run).mkdir(parents=True, exist_ok=True)
            (study.work_dir(run) / 'last.pth').touch()
        study.describe = lambda run: dict(scores=[dict(step=1, score=0.5)], minutes=1.0, checkpoint='last.pth',
                                          plan=study.stated(run))
        study.train = result

    study = Study(path, out, None, 1)
    train(study, broken=(('two', 0),))
    assert study.run(wanted(study.plan, [0, 1], []), jobs) == 2  # two, and three that comes after it
    assert set(trained) == {(name, seed) for name in CHAIN for seed in (0, 1)} - {('three', 0)}
    said = capsys.readouterr()
    assert 'two/seed0: RuntimeError: it says why' in said.err
    assert 'three/seed0: skipped, what it comes after failed' in said.out
    assert 'other/seed1: score 0.5 (1.0 min' in said.out
    assert len(json.loads(out.read_text())) == 6

    trained.clear()
    study = Study(path, out, None, 1)
    train(study)
    assert study.run(wanted(study.plan, [0, 1], []), jobs) == 0
    assert trained == [('two', 0), ('three', 0)]  # nothing else again
    assert '8 runs, 6 of them recorded' in capsys.readouterr().out

    # Weights that a run starts from are made again if they are gone, those that nobody asks for are not.
    trained.clear()
    for gone in ('one/seed0', 'two/seed0', 'one/seed1', 'other/seed1'):
        (tmp_path / 'work_dirs/study' / gone / 'last.pth').unlink()
    records = json.loads(out.read_text())
    del records['three/seed0']
    out.write_text(json.dumps(records))
    study = Study(path, out, None, 1)
    train(study)
    assert study.run(wanted(study.plan, [0, 1], []), jobs) == 0
    assert trained == [('one', 0), ('two', 0), ('three', 0)]
    assert 'one/seed0: recorded, but work_dirs/study/one/seed0/last.pth is not there' in capsys.readouterr().out


def test_what_another_process_recorded_meanwhile_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, out = write_study(tmp_path, **CHAIN), tmp_path / 'out.json'
    ours, theirs = Study(path, out, None, 1), Study(path, out, None, 1)
    theirs.keep(('one', 0), dict(score=1))
    ours.keep(('other', 0), dict(score=2))
    theirs.keep(('one', 1), dict(score=3))
    out.write_text(json.dumps({key: value for key, value in json.loads(out.read_text()).items() if key != 'one/seed0'}))
    ours.keep(('other', 1), dict(score=4))  # and what somebody removed stays removed
    assert json.loads(out.read_text()) == {'other/seed0': dict(score=2), 'one/seed1': dict(score=3),
                                           'other/seed1': dict(score=4)}


@pytest.mark.parametrize(('there', 'resumed'), [
    (('last_checkpoint', 'iter_4.pth'), True), (('last_checkpoint',), False), (('preempted.pth',), True),
    (('last_checkpoint', 'preempted.pth'), True), ((), False)])
def test_training_goes_on_from_a_checkpoint_that_is_there(there, resumed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = Study(write_study(tmp_path, **CHAIN), tmp_path / 'out.json', 'elsewhere', 3)
    folder, commands = study.work_dir(('one', 0)), []
    folder.mkdir(parents=True)
    for name in there:
        (folder / name).write_text('/another/machine/iter_4.pth\n')

    def run(command: list[str], env: dict, **kwargs) -> SimpleNamespace:
        commands.append(command)
        assert env['OMP_NUM_THREADS'] == '3'
        kwargs['stdout'].write('what it says')
        return SimpleNamespace(returncode=len(commands) - 1)

    monkeypatch.setattr('study.subprocess.run', run)
    study.train(('one', 0))
    assert commands[0][2:] == [str(tmp_path / 'a.py'), '--work-dir', str(folder), '--seed', '0',
                               *['--resume'] * resumed, '--data-root', 'elsewhere']
    with pytest.raises(RuntimeError, match='training failed, and .*output.txt ends with\nwhat it says'):
        study.train(('one', 0))


def test_two_processes_do_not_train_one_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = Study(write_study(tmp_path, **CHAIN), tmp_path / 'out.json', None, 1)
    study.work_dir(('one', 0)).mkdir(parents=True)
    with (locked(study.work_dir(('one', 0)) / 'lock'),
          pytest.raises(RuntimeError, match='work_dirs/study/one/seed0: another process trains this run')):
        study.train(('one', 0))


def test_a_recorded_run_that_was_another_one(tmp_path):
    study = Study(write_study(tmp_path, **CHAIN), tmp_path / 'out.json', None, 1)
    study.records = {'two/seed0': dict(plan=dict(config='b', after='one', iterations=4), checkpoint='last.pth')}
    with pytest.raises(ValueError, match="two/seed0 is recorded in .* as .*'iterations': 4.*, and the study says .*"
                                         "'iterations': 5.*: rename it, or remove"):
        study.run([('one', 0), ('two', 0)], 1)


def test_a_recorded_run_of_another_precision(tmp_path):
    path = write_study(tmp_path, **CHAIN)
    path.write_text(path.read_text() + 'amp = True\n')
    study, run = Study(path, tmp_path / 'out.json', None, 1), ('one', 0)
    for amp in (dict(amp=True), {}):  # what a record does not say is not held against it
        study.records = {'one/seed0': dict(plan=dict(config='a'), **amp)}
        assert study.outstanding([run]) == []
    study.records = {'one/seed0': dict(plan=dict(config='a'), amp=False)}
    with pytest.raises(ValueError, match="one/seed0 is recorded in .*'amp': False.*, and the study says .*'amp': True"):
        study.outstanding([run])


def test_a_run_may_have_a_precision_of_its_own(tmp_path):
    path = write_study(tmp_path, one=dict(config='a', amp=False), two=dict(config='a'))
    path.write_text(path.read_text() + 'amp = True\n')
    study = Study(path, tmp_path / 'out.json', None, 1)
    assert [study.amp((name, 0)) for name in ('one', 'two')] == [False, True]


@pytest.mark.parametrize('name', ['real/study', 'demo/demo_seeds'])
def test_nothing_recorded_is_outstanding(name):
    path = ROOT / f'configs/{name}.yml'
    study = Study(path, ROOT / f'docs/results/{path.stem}.json', None, 1)
    recorded = [run for run in wanted(study.plan, study.plan.seeds, []) if study.key(run) in study.records]
    assert recorded and study.outstanding(recorded) == []


@pytest.mark.parametrize('dwconv', [None, 3])
@pytest.mark.parametrize('kind', ['AttentionAlignment', 'FeatureAlignment'])
def test_training_cost(kind, dwconv):
    """Counted by hand: a product costs as much again for each factor that needs a gradient."""
    softmax, linear = tiny_vit(), tiny_vit(attention=LINEAR | dict(dwconv=dwconv))
    n, c, d, depth = 1 + 16, 32, 8, 2
    kernels = depth * 3 * 3 * (n - 1) * c if dwconv else 0
    products = depth * 12 * n * c * c + depth * 2 * n * n * c  # qkv, proj, MLP of ratio 4; softmax attention
    attention = depth * (2 * n * d * c + n * c)
    patches = 16 * c * 3 * 8 * 8
    if kind == 'AttentionAlignment':
        # The softmax ViT once; linear attentions with both their projections, backwards through proj to qkv's weights.
        model = dict(backbone=linear)
        count = products + depth * (4 + 1 + 3) * n * c * c + 3 * attention + patches
    else:
        model = dict(backbone=linear, teacher=softmax)
        count = products + 3 * (depth * 12 * n * c * c + attention) + 3 * patches
    assert training_cost(Config(dict(model=model | dict(type=f'adala_mm.{kind}')))) == count + 3 * kernels


@pytest.mark.parametrize('kind', ['EncoderDecoder', 'mmseg.EncoderDecoder', 'adala_mm.TaskModelAlignment'])
def test_what_is_no_alignment_of_features_has_no_price(kind):
    assert training_cost(Config(dict(model=dict(type=kind)))) is None


def test_two_stages_for_real(pretrained, tmp_path, monkeypatch, capsys):
    """By the command line, and again: what is recorded is what was run, and is not run twice."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'there/pictures').mkdir(parents=True)
    for i in range(3):
        cv2.imwrite(str(tmp_path / f'there/pictures/{i}.png'), np.random.default_rng(i).integers(0, 256, (32, 32, 3)))
    (tmp_path / 'there/pictures/list.txt').write_text('0.png\n1.png\n2.png\n')
    student = tiny_vit(attention=LINEAR, init_cfg=pretrained)
    networks = dict(a=dict(backbone=student), b=dict(backbone=student, teacher=tiny_vit(init_cfg=pretrained)))
    path = write_study(tmp_path, one=dict(config='a', iterations=3), two=dict(config='b', after='one', iterations=2))
    for name, kind in (('a', 'AttentionAlignment'), ('b', 'FeatureAlignment')):
        (tmp_path / f'{name}.py').write_text(CONFIG.format(kind=kind, networks=networks[name]))
    command = ['study.py', str(path), '--data-root', 'there', '--seeds', '4', '--out', 'out.json']
    monkeypatch.setattr(sys, 'argv', command)
    main()
    records = json.loads((tmp_path / 'out.json').read_text())
    assert set(records) == {'one/seed4', 'two/seed4'}
    one, two = records['one/seed4'], records['two/seed4']
    assert (one['seed'], one['iterations'], two['iterations']) == (4, 3, 2)
    assert one['scores'][-1]['step'] == 3 and two['scores'][-1]['align/rel_error'] > 0
    assert (two['after'], two['softmax_blocks'], two['linear_blocks']) == ('one/seed4', 0, 2)
    started = Config.fromfile(tmp_path / 'work_dirs/study/two/seed4/b.py').model.backbone.init_cfg.checkpoint
    assert started == 'work_dirs/study/one/seed4/iter_3.pth'
    before = (tmp_path / 'out.json').read_bytes()
    main()
    assert (tmp_path / 'out.json').read_bytes() == before

    # Scored again on one image less, by weights that are still there.
    (tmp_path / 'there/pictures/one.txt').write_text('0.png\n')
    Path('work_dirs/study/one/seed4/iter_3.pth').unlink()
    monkeypatch.setattr(sys, 'argv', [
        'score_study.py', str(path), '--name', 'fewer', '--data-root', 'there', '--records', 'out.json',
        '--out', 'fewer.json', '--cfg-options', 'test_dataloader.dataset.ann_file=one.txt'])
    score_study.main()
    assert 'one/seed4/iter_3.pth is not there' in capsys.readouterr().out
    (key, again), = json.loads((tmp_path / 'fewer.json').read_text()).items()
    assert key == 'two/seed4' and set(again) == set(two) | {'options'} and again['sha256'] == two['sha256']
    assert again['scores'][0]['step'] == 2 and again['scores'][0]['align/rel_error'] > 0
    assert again['scores'][0]['align/rel_error'] != two['scores'][-1]['align/rel_error']
    score_study.main()
    assert '1 of them recorded' in capsys.readouterr().out
    sys.argv[-1] += 'x'
    with pytest.raises(SystemExit, match='fewer.json has two/seed4 with the options .*one.txt: say another --name'):
        score_study.main()
