"""The comparison of attentions in a pretrained ViT: resumable rows, frozen heads, and a table that says what counts."""
from __future__ import annotations

import argparse
import itertools
import json
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import compare_attentions
import cv2
import make_tables
import numpy as np
import pytest
import timm
import torch
from compare_attentions import described, differences, parse_attentions
from safetensors.torch import save_file

from adala_mm.evaluation.likeness import fit_head, mean_iou, moved, shares_of
from adala_mm.models.attentions import InLineAttention
from adala_mm.utils import frontier
from helpers import ROOT

COSTS = 'vit_ms', 'vit_mib', 'vit_gmac', 'layer_ms', 'layer_mib', 'layer_gmac', 'parameters'


def write_images(folder: Path, count: int, seed: int, size: int = 24) -> list[str]:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        smooth = cv2.resize(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), (size + 8, size))
        cv2.imwrite(str(folder / f'{i:02d}.png'), smooth)
    return [f'{folder.name}/{i:02d}.png' for i in range(count)]


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    """Weights of a small ViT of timm, random but not degenerate, and generated images."""
    root = tmp_path_factory.mktemp('data')
    torch.manual_seed(0)
    model = timm.create_model('test_vit', img_size=32)
    save_file({name: value + 0.1 * torch.randn_like(value) for name, value in model.state_dict().items()},
              root / 'vit.safetensors')
    (root / 'pictures').mkdir()
    (root / 'pictures/all.txt').write_text('\n'.join(write_images(root / 'pictures/unlabelled', 20, 0)))
    names = write_images(root / 'pictures/images', 6, 1)
    (root / 'pictures/known.txt').write_text(''.join(f'{name} {i // 2}\n' for i, name in enumerate(names)))
    for split, seed in (('train', 2), ('val', 3)):
        write_images(root / f'scenes/images/{split}', 3, seed)
        (root / f'scenes/labels/{split}').mkdir(parents=True)
        for i in range(3):
            ids = np.repeat(np.arange(3, dtype=np.uint8), 8)[:, None].repeat(32, 1)
            ids[0] = 255
            cv2.imwrite(str(root / f'scenes/labels/{split}/{i:02d}.png'), np.roll(ids, i, axis=0))
    return root


@pytest.fixture
def call(place, tmp_path, monkeypatch, capsys):
    """The command on few, small things, with a thread in place of its processes; returns what it said."""
    monkeypatch.setattr(compare_attentions, 'ProcessPoolExecutor', lambda jobs, mp_context: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(torch, 'set_num_threads', lambda count: None)  # this process has other tests to run
    measured = itertools.count(1)

    def costs(setting, attentions, size):
        return {label: dict.fromkeys(COSTS, float(next(measured))) for label in attentions}

    monkeypatch.setattr(compare_attentions, 'measure_costs', costs)

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, 'argv', [
            'compare_attentions.py', '--model', 'test_vit', '--weights', str(place / 'vit.safetensors'), '--data-root',
            str(place), '--align-list', 'pictures/all.txt', '--labelled', 'pictures/known.txt', '--segmentation', '',
            '--batch', '4', '--images', '5', '--jobs', '1', '--sizes', '32', '--stage1', '2', '--stage2', '1', '--out',
            str(tmp_path / 'out.json'), '--png', str(tmp_path / 'out.png'), '--work-dir', str(tmp_path / 'work'),
            *words])
        compare_attentions.main()
        return capsys.readouterr().out

    return run


def arguments(place: Path, *words: str) -> argparse.Namespace:
    return compare_attentions.parser().parse_args([
        '--model', 'test_vit', '--weights', str(place / 'vit.safetensors'), '--data-root', str(place), '--align-list',
        'pictures/all.txt', '--labelled', 'pictures/known.txt', '--segmentation', '', '--batch', '4', *words])


def rows_in(path: Path) -> dict[str, dict]:
    return json.loads(path.read_text())['rows']


def test_rows_are_recorded_and_not_made_again(call, tmp_path, monkeypatch):
    said = call('--attentions', 'linear', '--segmentation', 'scenes')
    assert '1 attentions at 32 px: 3 jobs to go' in said and 'ETA' in said
    rows = rows_in(tmp_path / 'out.json')
    assert list(rows) == ['Linear/32/seed0/0+0', 'Linear/32/seed0/2+0', 'Linear/32/seed0/2+1', 'softmax/32/seed0/0+0']
    teacher = rows.pop('softmax/32/seed0/0+0')
    assert teacher['agreement'] == 100 and teacher['rel_error'] < 1e-5 and teacher['miou'] > 0
    assert teacher['moved']['rel_error'] > 0.01 and 0 <= teacher['moved']['agreement'] <= 100
    assert all(row['rel_error'] > 0.01 and 0 <= row['knn'] <= 100 for row in rows.values())
    assert rows['Linear/32/seed0/2+1']['settings']['batch'] == 4
    assert (tmp_path / 'out.png').read_bytes().startswith(b'\x89PNG')
    assert '| softmax | 100.0 | 0.00 |' in said and '| 32 | as is | ' in said

    before = (tmp_path / 'out.json').read_bytes()
    monkeypatch.setattr(compare_attentions, 'run_job', None)  # it would fail
    assert '0 jobs to go' in call('--attentions', 'linear', '--segmentation', 'scenes')
    assert (tmp_path / 'out.json').read_bytes() == before


def test_processes_side_by_side_read_one_reference(place, tmp_path, monkeypatch):
    made = []

    def make(*args) -> dict:
        made.append(args)
        time.sleep(0.2)  # the other one arrives meanwhile
        return {}

    monkeypatch.setattr(compare_attentions, 'make_reference', make)
    setting = compare_attentions.make_setting(arguments(place, '--work-dir', str(tmp_path)))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compare_attentions.write_reference, [setting] * 2, [32] * 2))
    assert len(made) == 1 and setting.reference(32).is_file()


def test_costs_of_layer_and_network(place, monkeypatch):
    monkeypatch.setattr(compare_attentions, 'take_turns', lambda calls, timer, seconds: {
        name: timer(call) for name, call in calls.items()})
    setting = compare_attentions.make_setting(arguments(place))
    costs = compare_attentions.measure_costs(
        setting, dict(softmax=None, broken=dict(type='RALA'), plus=dict(type='HedgehogAttention', dwconv=3)), 64)
    assert set(costs) == {'softmax', 'plus'} and set(costs['plus']) == set(COSTS)
    assert all(value > 0 for name, value in costs['softmax'].items() if name != 'parameters')
    n, c, depth, mlp = 1 + 4 * 4, 64, 6, 3  # of timm's test_vit at 64 px
    assert costs['softmax']['layer_gmac'] == (n * 4 * 384 ** 2 + 2 * n ** 2 * 384) / 1e9
    assert costs['softmax']['vit_gmac'] == pytest.approx(
        (depth * (n * (4 + 2 * mlp) * c ** 2 + 2 * n ** 2 * c) + (n - 1) * 16 ** 2 * 3 * c + 1000 * c) / 1e9)
    assert costs['softmax']['parameters'] == 0
    assert costs['plus']['parameters'] == depth * (c * (9 + 1) + 2 * 2 * 32 ** 2)  # convolution; maps of two heads


def test_other_attentions_add_rows_and_all_costs_are_of_one_run(call, tmp_path):
    call('--attentions', 'linear', '--stage1', '0', '--stage2', '0')
    first = json.loads((tmp_path / 'out.json').read_text())
    call('--attentions', 'again=LinearAttention:eps=1e-3', '--stage1', '0', '--stage2', '0')
    both = json.loads((tmp_path / 'out.json').read_text())
    assert first['rows'].items() <= both['rows'].items() and 'again/32/seed0/0+0' in both['rows']
    assert set(both['costs']['32']['rows']) == {'Linear', 'again', 'softmax'}
    assert both['costs']['32']['rows']['Linear'] != first['costs']['32']['rows']['Linear']


def test_changed_settings_are_noticed(call, tmp_path):
    call('--attentions', 'linear', '--stage1', '0', '--stage2', '0')
    before = (tmp_path / 'out.json').read_bytes()
    with pytest.raises(SystemExit, match=r"softmax/32/seed0/0\+0 is recorded in .*out.json with other settings, "
                                         "photographs '2, .* and not '1, .*: name another --out"):
        call('--attentions', 'linear', '--images', '1')
    with pytest.raises(SystemExit, match=r'Linear/32/seed0/0\+0 is recorded .* settings, eps 1e-06 and not 0.5: name'):
        call('--attentions', 'Linear=LinearAttention:eps=0.5')
    assert (tmp_path / 'out.json').read_bytes() == before


def test_options_that_an_attention_has_got_since_are_no_change_unless_they_are_given():
    was, now = (dict(attention=attention, images=5) for attention in (
        dict(type='A', steps=3), dict(type='A', steps=3, exact=False)))
    assert differences(was, now, dict(type='A')) == ''
    assert differences(was, now, dict(type='A', exact=False)) == 'exact None and not False'
    now['attention']['steps'] = 1  # another default
    assert differences(was, now, dict(type='A')) == 'steps 3 and not 1'
    assert differences(was | dict(attention=None), now | dict(attention=None, images=6), {}) == 'images 5 and not 6'


def test_a_row_that_fails_is_told_and_the_others_go_on(call, tmp_path, monkeypatch):
    align = compare_attentions.align

    def broken(student, *args, **kwargs):
        if isinstance(student.blocks[0].attn, InLineAttention):
            raise RuntimeError('it says why')
        return align(student, *args, **kwargs)

    monkeypatch.setattr(compare_attentions, 'align', broken)
    words = '--attentions', 'inline', 'linear', '--stage2', '0'
    with pytest.raises(SystemExit, match='1 jobs failed; the same command tries them again'):
        call(*words)
    assert {name.partition('/seed0/')[::2] for name in rows_in(tmp_path / 'out.json')} == {
        ('InLine/32', '0+0'), ('Linear/32', '0+0'), ('Linear/32', '2+0'), ('softmax/32', '0+0')}
    assert 'InLine/32/seed0/2+0' not in rows_in(tmp_path / 'out.json')
    assert 'RuntimeError: it says why' in (tmp_path / 'work/InLine_32_seed0.log').read_text()
    monkeypatch.setattr(compare_attentions, 'align', align)
    assert '1 jobs to go' in call(*words) and 'InLine/32/seed0/2+0' in rows_in(tmp_path / 'out.json')


def test_alignment_goes_on_from_the_weights_of_stage_1(call, tmp_path, monkeypatch):
    call('--attentions', 'linear', '--stage2', '0')
    steps = []

    def align(*args, **kwargs):
        steps.append((args[3], [line['step'] for line in original(*args, **kwargs)]))

    original = compare_attentions.align
    monkeypatch.setattr(compare_attentions, 'align', align)
    monkeypatch.setattr('adala_mm.alignment._attention_loss', None)  # stage 1 would fail if it trained
    call('--attentions', 'linear')
    assert steps == [(1, [2]), (2, [1])]


def test_no_alignment_trains_on_what_is_scored(place):
    args = arguments(place)
    setting = compare_attentions.make_setting(args)
    assert [path.name for path in setting.scored] == ['07.png', '15.png']
    assert len(setting.alignment) == 18 and not set(setting.scored) & set(setting.alignment)
    args.score_list = 'pictures/known.txt'
    other = compare_attentions.make_setting(args)
    assert [path.parent.name for path in other.scored] == ['images'] * 6 and other.alignment == setting.alignment
    args.align_list = 'pictures/unlabelled'  # a folder
    assert compare_attentions.make_setting(args).alignment == setting.alignment
    assert pickle.loads(pickle.dumps(setting)) == setting  # for other processes
    args.labelled = ['pictures/all.txt']
    with pytest.raises(ValueError, match=r'00.png has no class; a line is "path class-id"'):
        compare_attentions.make_setting(args)
    args.align_list = 'nowhere.txt'
    with pytest.raises(FileNotFoundError, match=r'no list or folder of images at .*nowhere.txt; .*--data-root DIR'):
        compare_attentions.make_setting(args)


def test_real_photographs(shared_data):
    setting = compare_attentions.make_setting(compare_attentions.parser().parse_args(
        ['--data-root', str(shared_data), '--images', '250']))
    assert (len(setting.scored), len(setting.labelled), len(setting.alignment)) == (250, 250, 3930 - 3930 // 8)
    assert (len(setting.training), len(setting.validation)) == (250, 101)
    assert not set(setting.scored) & set(setting.alignment)
    assert len({number for _, number in setting.labelled}) == 99 and all(image.is_file() for image in setting.scored)
    assert all(image.is_file() and ids.is_file() for image, ids in setting.training + setting.validation)


def test_words_for_attentions(tmp_path):
    (tmp_path / 'own.yml').write_text('one step: {type: adala_mm.MonarchAttention, num_steps: 1}\n')
    found = parse_attentions([str(tmp_path / 'own.yml'), 'LinearAttention', 'linear:feature_map=relu,dwconv=3',
                              'mine=adala_mm.HedgehogAttention:variant=exp'])
    assert list(found) == ['one step', 'Linear', 'Linear, feature_map relu, dwconv 3', 'mine']
    assert found['one step'] == dict(type='MonarchAttention', num_steps=1)
    assert found['Linear, feature_map relu, dwconv 3'] == dict(type='LinearAttention', feature_map='relu', dwconv=3)
    assert described(found['mine']) == dict(described(dict(type='HedgehogAttention')), variant='exp')
    assert described(found['Linear'])['feature_map'] == 'elu1'
    (tmp_path / 'own.yml').write_text('- LinearAttention\n')
    with pytest.raises(ValueError, match='own.yml is no list of attentions; write one a line, label: {type: NAME'):
        parse_attentions([str(tmp_path / 'own.yml')])
    everything = parse_attentions(['all', str(ROOT / 'configs/real/frontier.yml')])
    assert {'Linear', 'Monarch', 'plus'} <= set(everything) and 'Softmax' not in everything
    assert set(make_tables.APPROXIMATIONS) <= set(everything)  # else a row would be missing for its name
    assert len({json.dumps(cfg, sort_keys=True) for cfg in everything.values()}) == len(everything)


@pytest.mark.parametrize(('words', 'message'), [
    (['LinearAtention'], 'unknown attention type .*Did you mean adala_mm.LinearAttention'),
    (['agent:num_agents=50'], "'AgentAttention'.*}: num_agents=50 is not a square"),
    (['linear:epsilon=1'], "unexpected keyword argument 'epsilon'"), (['a=b=c'], "'a=b=c' is no attention; write all"),
    (['Linear', 'linear'], "'Linear' is the label of two attentions"), (['softmax=Linear'], "'softmax' is the label")])
def test_words_that_are_no_attentions(words, message):
    with pytest.raises(ValueError, match=message):
        parse_attentions(words)


def test_images_are_moved_by_a_pixel():
    images = torch.arange(6).view(1, 1, 1, 6)
    reference = dict.fromkeys(('top', 'features', 'mean', 'std'), images) | dict(images=images)
    assert moved(reference)['images'].flatten().tolist() == [0, 0, 1, 2, 3, 4]


def test_head_and_iou_by_hand():
    ids = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 255], [2, 2, 2, 2], [2, 2, 2, 2]], dtype=torch.uint8)
    shares = shares_of(ids, 3, 2)
    assert shares[0].tolist() == [[1, 0, 0], [0, 0.75, 0], [0, 0, 1], [0, 0, 1]]
    tokens = torch.eye(4)
    weight, bias = fit_head(tokens, shares[0])
    logits = tokens @ weight.T + bias
    assert logits.argmax(dim=1).tolist() == [0, 1, 2, 2]
    assert mean_iou(10 * shares, [ids[:2].repeat_interleave(2, 0)[:, :4]]) < 60  # the lower half is elsewhere
    # One pixel a patch: 1 of 2 pixels of class 0, and 2 of 3 that are or are called class 1; class 2 is nowhere.
    found = torch.tensor([[0, 1, 1, 1]])
    truth = torch.tensor([[0, 0], [1, 1]], dtype=torch.uint8)
    assert mean_iou(torch.nn.functional.one_hot(found, 3).float(), [truth]) == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
    truth[0, 1] = 255
    assert mean_iou(torch.nn.functional.one_hot(found, 3).float(), [truth]) == 100


@pytest.fixture
def data() -> dict:
    """Made-up records: three attentions, of which c is slower than softmax; a has two seeds."""
    rows, cost = {}, dict(layer_ms=1.0, vit_mib=2.0, vit_gmac=1.25, parameters=1234)
    for label, seed, stage1, agreement in (('softmax', 0, 0, 100.0), ('a', 0, 0, 10.0), ('a', 0, 50, 60.0),
                                           ('a', 1, 50, 70.0), ('b', 0, 0, 20.0), ('b', 0, 50, 50.0),
                                           ('c', 0, 0, 90.0), ('c', 0, 50, 95.0)):
        rows[f'{label}/224/seed{seed}/{stage1}+0'] = dict(
            label=label, size=224, seed=seed, stage1=stage1, stage2=0, agreement=agreement, rel_error=0.5, knn=70.0)
    times = dict(softmax=10.0, a=8.0, b=4.0, c=12.0)
    return dict(rows=rows, costs={'224': dict(rows={label: cost | dict(vit_ms=ms) for label, ms in times.items()})})


def test_table_and_advice(data):
    lines = frontier.table(data).splitlines()
    assert lines[2].startswith('| attention | agreement (%): as is / stage 1: 50 | feature error | 1-NN (%) | time |')
    assert lines[4:] == [
        '| softmax | 100.0 | 0.50 | 70.0 | 1.00 | 1.00 | 1.00 | 1.25 | 1,234 |',
        '| c | 90.0 / 95.0 | 0.50 / 0.50 | 70.0 / 70.0 | 1.20 | 1.00 | 1.00 | 1.25 | 1,234 |',
        '| a | 10.0 / 65.0 | 0.50 / 0.50 | 70.0 / 70.0 | 0.80 | 1.00 | 1.00 | 1.25 | 1,234 |',
        '| b | 20.0 / 50.0 | 0.50 / 0.50 | 70.0 / 70.0 | 0.40 | 1.00 | 1.00 | 1.25 | 1,234 |']
    assert frontier.advice(data).splitlines()[2:] == [
        '| 224 | as is | c: 90.0 %, 1.20 | b: 20.0 %, 0.40 | b: 20.0 %, 0.40 |',
        '| 224 | stage 1: 50 | c: 95.0 %, 1.20 | a: 65.0 %, 0.80 | b: 50.0 %, 0.40 |']
    data['rows']['softmax/224/seed0/0+0']['moved'] = dict(agreement=85.44, rel_error=0.352)
    assert frontier.table(data).endswith('moved to the right by one pixel: agreement 85.4 %, feature error 0.35.')
    del data['costs']['224']['rows']['b']  # not measured: in the table, and never recommended
    assert '| b | 20.0 / 50.0 | 0.50 / 0.50 | 70.0 / 70.0 |  |  |  |  |  |' in frontier.table(data)
    assert frontier.advice(data).splitlines()[-1].endswith('| a: 65.0 %, 0.80 | softmax |')


def test_agreements(data):
    assert frontier.agreements(data, ['b', 'unrecorded', 'a'], 224).splitlines() == [
        '| agreement (%) of | as is | stage 1: 50 | time, softmax = 1 |', '|---|---|---|---|',
        '| b | 20.0 | 50.0 | 0.40 |', '| a | 10.0 | 65.0 | 0.80 |']
    data['rows']['softmax/224/seed0/0+0']['moved'] = dict(agreement=97.5, rel_error=0.2)
    last = frontier.agreements(data, ['b'], 224).splitlines()[-1]
    assert last == '| softmax, moved by one pixel | 97.5 | - | - |'
    del data['rows']['softmax/224/seed0/0+0']['moved']
    del data['rows']['b/224/seed0/50+0'], data['costs']['224']['rows']['b']  # neither aligned nor timed
    data['rows']['a/224/seed0/50+0']['size'] = data['rows']['a/224/seed1/50+0']['size'] = 512
    assert frontier.agreements(data, ['b', 'a'], 224).splitlines()[2:] == ['| b | 20.0 | - | - |',
                                                                           '| a | 10.0 | - | 0.80 |']
    assert frontier.agreements(data, ['b', 'a'], 512).splitlines()[2:] == ['| a | 65.0 | - |']
    for row in data['rows'].values():
        row.update(rel_error=3e-6 if row['label'] == 'a' else row['rel_error'])  # softmax by another name
    assert [line[:4] for line in frontier.agreements(data, ['a', 'b'], 224).splitlines()[2:]] == ['| b ']


def test_front():
    one, two, three, four = (frontier.Point(label, *place) for label, place in (
        ('one', (0.5, 50)), ('two', (0.8, 40)), ('three', (0.9, 60)), ('four', (0.5, 45))))
    assert frontier.pareto([three, four, two, one]) == [one, three]


def test_names_in_the_picture_do_not_cover_each_other(data, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(frontier, 'save_figure', lambda figure, path: figures.append(figure))
    for i in range(8):  # a crowd at one place
        data['rows'] |= {f'{i}/{stage1}': data['rows'][f'a/224/seed0/{stage1}+0'] | dict(label=f'attention {i}')
                         for stage1 in (0, 50)}
        data['costs']['224']['rows'][f'attention {i}'] = data['costs']['224']['rows']['a']
    data['rows']['softmax/224/seed0/0+0']['moved'] = dict(agreement=85.44, rel_error=0.352)
    frontier.draw(tmp_path / 'picture.png', data)
    panel, = figures[0].axes
    assert panel.get_title() == '224 x 224 pixels, stage 1: 50 iterations'
    names = [text for text in panel.texts if text.get_text() and ' ' not in text.get_text().removeprefix('attention ')]
    assert {text.get_text() for text in names} == {'softmax', 'a', 'b', 'c', *(f'attention {i}' for i in range(8))}
    boxes = [text.get_window_extent() for text in names]
    assert not [1 for i, one in enumerate(boxes) for other in boxes[:i] if one.overlaps(other)]
    frame = panel.get_window_extent()
    assert all(frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1 for box in boxes)
