"""maintenance/make_tables.py: the tables of the docs say what the records say."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import cv2
import pytest

from helpers import ROOT
from helpers.records import MACHINE
from helpers.scripts import load_script

RECORDS = [ROOT / 'docs/results' / name for name in (
    'demo.json', 'real.json', 'study.json', 'frontier.json', 'faults.json', 'compiled_kernels.json')]
RECORDS += [ROOT / 'benchmarks/results/cpu' / name for name in ('attention.json', 'model.json', 'training.json')]


def alignment(step: int, agreement: float, error: float) -> dict:
    return {'align/top1_agreement': agreement, 'align/rel_error': error, 'align/cosine': 1 - error / 2, 'step': step}


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """maintenance/make_tables.py in a repository of made-up records."""
    root = tmp_path / 'repository'
    (root / 'docs/results').mkdir(parents=True)
    demo_rows = [{'name': 'softmax teacher', 'softmax_blocks': 6, 'linear_blocks': 0, 'as_is': 80.0, 'tuned': 81.0,
                  'as_is_kept': 100.0, 'tuned_kept': 101.26},
                 {'name': 'swap only', 'softmax_blocks': 0, 'linear_blocks': 6, 'as_is': 20.123, 'tuned': 60.456,
                  'as_is_kept': 25.154, 'tuned_kept': 75.57}]
    (root / 'docs/results/demo.json').write_text(json.dumps(
        {'rows': demo_rows, 'seconds': 432, 'machine': MACHINE}))
    scores = {'stage1_deitt_caltech': [alignment(0, 1.77, 1.22), alignment(200, 15.0, 0.9)],
              'stage2_deitt_caltech': [alignment(0, 15.0, 0.9), alignment(300, 33.3, 0.7), alignment(600, 44.4, 0.6)],
              'mask2former_deitt_camvid': [{'mIoU': 41.5, 'aAcc': 82.25, 'step': 400}],
              'mask2former_deitt_softmax_camvid': [{'mIoU': 50.5, 'aAcc': 88.75, 'step': 400}]}
    runs = {name: {'config': name, 'seed': 0, 'iterations': 400, 'sha256': '0123456789abcdef', 'scores': rows,
                   'checkpoint': 'iter_400.pth', 'machine': MACHINE} for name, rows in scores.items()}
    (root / 'docs/results/real.json').write_text(json.dumps(runs))
    (root / 'README.md').write_text(marked('demo'))
    write_costs(root / 'docs')
    write_study(root)
    (root / 'docs/results.md').write_text(marked('real_alignment', 'real_camvid', 'study_alignment',
                                                 'study_segmentation'))
    cost = dict(vit_ms=4.0, layer_ms=1.0, vit_mib=8.0, vit_gmac=1.0, parameters=0)
    row = dict(size=224, seed=0, stage1=0, stage2=0, rel_error=0.25, knn=50.0, settings=dict(
        model='a_vit', photographs='250, abc'), machine=MACHINE | dict(dirty=False))
    rows = {label: row | dict(label=label, agreement=share) for label, share in (('softmax', 100), ('A', 87))}
    (root / 'docs/results/frontier.json').write_text(json.dumps(dict(
        rows=rows, costs={'224': dict(rows=dict(softmax=cost, A=cost | dict(vit_ms=3.0)), machine=MACHINE | dict(
            dirty=True))})))
    (root / 'docs/frontier.md').write_text(marked('frontier'))
    (root / 'docs/pick_attention.md').write_text(marked('advice'))
    (root / 'docs/attentions.md').write_text('')
    (root / 'docs/approximations.md').write_text(marked('approximations'))
    faults = [['disk full', 'an error', 'an error'],
              ['a x b', 'equal', 'equal after SIGKILL in one, SIGTERM in another']]
    (root / 'docs/results/faults.json').write_text(json.dumps(dict(rows=faults, machine=MACHINE)))
    (root / 'docs/reproducibility.md').write_text(marked('faults'))
    write_benchmarks(root / 'benchmarks/results/cpu')
    (root / 'docs/results/heads.json').write_text(json.dumps(dict(rows=[
        {key: value for key, value in HEADS.items() if key != 'seconds'}])))
    (root / 'docs/performance.md').write_text(marked(*BENCHMARKS))
    (root / 'docs/kernels.md').write_text(marked('speed_gpu'))
    (root / 'docs/weights.md').write_text(marked('families'))
    module = load_script('maintenance/make_tables')
    monkeypatch.setattr(module, 'ROOT', root)
    return module


def write_costs(docs) -> None:
    """Made-up costs: an epoch of stage 1 takes six hours of two GPUs, one of stage 2 a day."""
    row = dict(epochs=5, training_multiply_adds=16, gib=[3.5, 2.5], checkpoints=[4, 10 ** 9])
    rows = [row | dict(config=config) for config in ('stage1_a_x', 'stage1_b_x', 'stage2_a_y', 'head_a_y')]
    rows[1].update(training_multiply_adds=64)
    rows[3].update(training_multiply_adds=4)
    for name, record in dict(
            costs=dict(rows=rows), paper_times=dict(source='A table', gpus=2, seconds_per_epoch=dict(
                stage1_a_x=21600, stage2_a_y=86400)),
            datasets=dict(x=dict(images=100), y=dict(images=3000))).items():
        (docs / f'results/{name}.json').write_text(json.dumps(record))
    (docs / 'costs.md').write_text(marked('costs'))


BENCHMARKS = ('speed_attention', 'speed_model', 'speed_training', 'memory_by_depth', 'head_times')


def write_study(root) -> None:
    """Records of two seeds of a stage 1 and of its stage 2, of one seed of a head, and none of the last run."""
    shared = dict(batch_size=2, machine=MACHINE | dict(threads=1, dirty=False), softmax_blocks=1, linear_blocks=11)

    def run(agreement: float, after: str | None, iterations: int) -> dict:
        scores = [alignment(0, 1.0, 1.5), alignment(iterations, agreement, 0.5)]
        for row in scores:
            row['knn/accuracy'] = agreement / 2
        return shared | dict(scores=scores, after=after, iterations=iterations, training_multiply_adds=10 ** 12)

    records = {f'one/seed{seed}': run(20.0 + 2 * seed, None, 10) for seed in (0, 1)}
    records |= {f'two/seed{seed}': run(60.0 + 2 * seed, f'one/seed{seed}', 30) for seed in (0, 1)}
    records['head/seed0'] = shared | dict(scores=[dict(mIoU=43.21, aAcc=87.65, step=7)], after='two/seed0',
                                          iterations=7, training_multiply_adds=None,
                                          machine=MACHINE | dict(threads=3, dirty=True, commit='def5678'))
    (root / 'docs/results/study.json').write_text(json.dumps(records))
    (root / 'configs/real').mkdir(parents=True)
    (root / 'configs/real/study.yml').write_text(
        'runs:\n  one: {config: a, swap: none, label: first}\n  two: {config: b, after: one, label: both}\n'
        '  head: {config: c, after: two}\n  later: {config: b, after: two}\n')


def test_tables_of_a_study(tables):
    rows = tables.TABLES['study_alignment']().splitlines()
    assert len(rows) == 2 + 3 + 2  # head, two recipes and what one starts from, a line about the machine
    same = '0.500 ± 0.000 | 0.750 ± 0.000'
    assert rows[2] == '| none | 1 / 11 | 0 | 0.0 | 1.0 ± 0.0 | 1.500 ± 0.000 | 0.250 ± 0.000 | 10.5 ± 0.7 | 2 |'
    assert rows[3] == f'| first | 1 / 11 | 10 | 20.0 | 21.0 ± 1.4 | {same} | 10.5 ± 0.7 | 2 |'
    assert rows[4] == f'| both | 1 / 11 | 10 + 30 | 80.0 | 61.0 ± 1.4 | {same} | 30.5 ± 0.7 | 2 |'
    rows = tables.TABLES['study_segmentation']().splitlines()
    assert rows[2:-2] == ['| head | 1 / 11 | 10 + 30 + 7 | 43.21 | 87.65 | 1 |']
    assert '3 of them a run' in rows[-1] and 'Commits def5678+ (' in rows[-1]


def test_agreement_of_the_readme(tables):
    path = tables.ROOT / 'docs/results/study.json'
    records = json.loads(path.read_text())
    for name in ('paper_1', 'paper_250', 'paper_1200', 'coarse_1', 'coarse_1200'):
        recipe, end = name.split('_')
        for seed in (0, 1):
            second = records[f'two/seed{seed}'] | dict(after=f'{recipe}_1/seed{seed}')
            records[f'{name}/seed{seed}'] = records[f'one/seed{seed}'] if end == '1' else second
    path.write_text(json.dumps(records))
    assert rows_of(tables.TABLES['agreement']()) == [
        ['agreement with the teacher (%), by iterations', 'untrained', '10', '10 + 30', '10 + 30'], ['---'] * 5,
        ['softmax teacher', *['100'] * 4], ['*coarse*', '1', '21', '', '61'],
        ["the paper's recipe", '1', '21', '61', '61']]


def test_scores_in_the_picture_are_means_over_the_seeds(tables):
    records = json.loads((tables.ROOT / 'docs/results/study.json').read_text())
    report = load_script('maintenance/study_report')
    chains = [report.chain(records, f'two/seed{seed}') for seed in (0, 1)]
    assert report.progress(chains, 'align/top1_agreement') == [(0.0, 1.0), (20.0, 21.0), (80.0, 61.0)]


def test_frontier(tables):
    *lines, about = tables.TABLES['frontier']().splitlines()
    assert lines[4:6] == ['| softmax | 100.0 | 0.25 | 50.0 | 1.00 | 1.00 | 1.00 | 1.00 | 0 |',
                          '| A | 87.0 | 0.25 | 50.0 | 0.75 | 1.00 | 1.00 | 1.00 | 0 |']
    *_, row, _, same = tables.TABLES['advice']().splitlines()
    assert row == '| 224 | as is | A: 87.0 %, 0.75 | A: 87.0 %, 0.75 | softmax |' and same == about
    assert about.startswith('a_vit, 250 photographs; seeds 0; 2 cores (A CPU)')
    assert about.endswith('Commits abc1234, abc1234+ (+: files were changed).')


def test_approximations(tables):
    path = tables.ROOT / 'docs/results/frontier.json'
    data = json.loads(path.read_text())
    data['rows']['A']['label'] = 'Monarch'
    data['costs']['224']['rows']['Monarch'] = data['costs']['224']['rows']['A']
    path.write_text(json.dumps(data))
    title, *lines, about = tables.TABLES['approximations']().splitlines()
    assert title == '**224 x 224 pixels**' and '| Monarch | 87.0 | 0.75 |' in lines
    assert len(rows_of('\n'.join(lines))) == 3  # others are not recorded; softmax is what they are measured by
    assert about == tables.TABLES['frontier']().splitlines()[-1]


def test_days_are_the_papers_or_at_its_rate(tables):
    _, _, *rows = rows_of(tables.costs())
    assert [row[3] for row in rows] == [
        '2.50',  # 5 epochs x 6 h x 2 GPUs
        '≈ 10.00',  # four times as much as stage 1 of the paper
        '10.00',  # 5 epochs x 24 h x 2 GPUs
        '> 2.50']  # a quarter of stage 2 of the paper
    assert rows[0] == ['`stage1_a_x`', '5 x 100', '0.000', '2.50', '3.5 / 2.5', '4.0']


def test_costs_of_the_paper():
    module = load_script('maintenance/make_tables')
    found = {row['config']: row for row in module.priced()[0]}
    stage2 = found['stage2_dinov2l_in22k']
    assert stage2['days'] / 8 == pytest.approx(13.5, abs=0.05)  # 30 epochs of 10 h 48 min 46 s
    # 24 blocks of N (12 D^2 + 2 D 64) for the student, thrice, and of N (12 D^2 + 2 N D) for the teacher, once.
    tokens, dim = 1025, 1024
    both = 24 * tokens * dim * (3 * (12 * dim + 128) + 12 * dim + 2 * tokens)
    assert stage2['training_multiply_adds'] == pytest.approx(both, rel=0.005)


def test_picture_of_a_study(tables, monkeypatch, capsys):
    module, png = load_script('maintenance/study_report'), tables.ROOT / 'docs/images/study.png'
    monkeypatch.setattr(module, 'ROOT', tables.ROOT)
    monkeypatch.setattr(sys, 'argv', ['study_report.py', '--study', str(tables.ROOT / 'configs/real/study.yml')])
    module.main()
    assert '| both |' in capsys.readouterr().out
    picture = cv2.imread(str(png)).astype(int)
    paper, other = (31, 119, 180)[::-1], (115, 115, 115)  # matplotlib's C0, and its grey of 0.45
    assert (abs(picture - paper).sum(-1) < 30).sum() == 0
    assert (abs(picture - other).sum(-1) < 30).sum() > 20  # "both", which is of no family, and goes on from stage 1

    records = json.loads((tables.ROOT / 'docs/results/study.json').read_text())
    (tables.ROOT / 'docs/results/heads.json').write_text(json.dumps(
        {'head/seed0': records['head/seed0'] | dict(after=None)}))
    (tables.ROOT / 'configs/heads.yml').write_text('runs:\n  head: {config: c, swap: nothing before}\n')
    monkeypatch.setattr(sys, 'argv', ['study_report.py', '--study', str(tables.ROOT / 'configs/heads.yml')])
    module.main()
    said = capsys.readouterr().out
    assert '| head |' in said and 'nothing before' not in said  # it was not scored before it was trained
    assert not (tables.ROOT / 'docs/images/heads.png').exists()  # there is no alignment to draw


HEADS = dict(config='a_head', size=1024, softmax_blocks=0, linear_blocks=12,
             gmac=dict(backbone=60.0, head=30.0) | {'pixel decoder': 10.0},
             seconds=dict(backbone=1.0, head=0.98) | {'pixel decoder': 0.02})


def write_benchmarks(folder) -> None:
    """Made-up records of the three benchmarks."""
    folder.mkdir(parents=True)
    core = dict(tokens=64, mib=1.0, gb_per_s=2.0, copy_share=0.5) | {'pass': 'forward'}
    vit = dict(arch='S', size=224, mode='fp32', softmax_ms=6.0, mib=80.0, gmac=4.6, parameters=22_000_000)
    step = dict(stage=1, held_mib=10.0, mib=30.0)
    records = dict(
        attention=dict(rows=[core | dict(name='sdpa', ms=3.0), core | dict(name='ours', ms=1.5)]),
        model=dict(rows=[
            vit | dict(attention='SoftmaxAttention', softmax_blocks=12, linear_blocks=0, ms=6.0),
            vit | dict(attention='LinearAttention', softmax_blocks=0, linear_blocks=12, ms=8.0)]),
        heads=dict(rows=[HEADS]),
        training=dict(rows=[step | dict(version='straightforward', ms=500.0), step | dict(version='ours', ms=250.0)],
                      depths=[dict(depth=12, version='ours', held_mib=10.0, step_mib=21.0)], settings=dict(batch=2)))
    for name, data in records.items():
        (folder / f'{name}.json').write_text(json.dumps(data | dict(machine=MACHINE | dict(threads=1, device='A CPU'))))


def marked(*names: str, between='') -> str:
    return ('# A page\n\nProse before, | with | bars |.\n\n'
            + ''.join(f'<!-- table: {name} -->\n{between}<!-- end -->\n\nProse after {name}.\n' for name in names))


def make_tables(module, monkeypatch, *options: str) -> None:
    monkeypatch.setattr(sys, 'argv', ['make_tables.py', *options])
    module.main()


def pages(module) -> dict[str, str]:
    return {page: (module.ROOT / page).read_text() for page in module.PAGES}


@pytest.mark.parametrize('between', ['', 'old\n', '| a |\n|---|\n| 1 |\n\nA footnote.\n'])
def test_fill_replaces_marked_tables_alone(tables, between):
    filled = tables.fill(marked('demo', 'real_camvid', between=between))
    for name in ('demo', 'real_camvid'):
        assert f'<!-- table: {name} -->\n{tables.TABLES[name]()}\n<!-- end -->\n\nProse after {name}.\n' in filled
    assert filled.startswith('# A page\n\nProse before, | with | bars |.\n\n<!-- table: demo -->\n| backbone')
    assert not between or between not in filled
    outside = re.sub(r'(?s)<!-- table.*?<!-- end -->', '', filled)
    assert outside == re.sub(r'(?s)<!-- table.*?<!-- end -->', '', marked('demo', 'real_camvid'))


def test_fill_is_idempotent(tables):
    once = tables.fill(marked('demo', 'real_alignment', 'real_camvid', between='x\n'))
    assert tables.fill(once) == once
    assert tables.fill('no table here\n') == 'no table here\n'


def rows_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines()
            if line.startswith('|')]


@pytest.mark.parametrize('name', ['demo', 'real_alignment', 'real_camvid', *BENCHMARKS])
def test_tables_are_markdown(tables, name):
    header, rule, *rows = rows_of(tables.TABLES[name]())
    assert set(rule) == {'---'} and rows
    assert {len(row) for row in rows} == {len(rule)} == {len(header)}


def test_demo_table_says_what_the_record_says(tables):
    text = tables.demo()
    assert rows_of(text)[2:] == [['softmax teacher', '6 / 0', '80.00', '100.0 %', '81.00', '101.3 %'],
                                 ['swap only', '0 / 6', '20.12', '25.2 %', '60.46', '75.6 %']]
    footnote = text.split('\n\n')[1]
    assert all(str(fact) in footnote for fact in (432, *MACHINE.values()))


def test_alignment_table_says_what_the_records_say(tables):
    text = tables.real_alignment()
    cells = [row[1:5] for row in rows_of(text)[2:]]
    assert cells == [['12 / 0', '100', '0', '1'], ['0 / 12', '1.8', '1.220', '0.390'],
                     ['0 / 12', '15.0', '0.900', '0.550'], ['0 / 12', '33.3', '0.700', '0.650'],
                     ['0 / 12', '44.4', '0.600', '0.700']]
    assert [row[0] for row in rows_of(text)[5:]] == ['stage 1 + 2, iteration 300', 'stage 1 + 2, iteration 600']
    assert '`stage1_deitt_caltech`, 400 it., 01234567' in text and 'seed 0' in text and 'abc1234' in text


def test_camvid_table_does_not_mix_up_the_twins(tables):
    (_, _, softmax, linear) = rows_of(tables.real_camvid())
    assert softmax[1:4] == ['12 / 0', '50.50', '88.75'] and 'mask2former_deitt_softmax_camvid' in softmax[4]
    assert linear[1:4] == ['0 / 12', '41.50', '82.25'] and 'softmax' not in linear[4]


def test_benchmark_tables_say_what_the_records_say(tables):
    assert rows_of(tables.TABLES['speed_attention']())[2:] == [
        ['forward', '64', '3 ms', '1.5 ms, 2.00x', '2.0', '50 %', '1.0 / 1.0']]
    models = tables.TABLES['speed_model']()
    assert [row[3:8] for row in rows_of(models)[2:]] == [
        ['Softmax', '12 / 0', '6.0', '166.67', '1'], ['Linear', '0 / 12', '8.0', '125.00', '0.75x, slower']]
    assert '- ViT-S, fp32, Linear: slower at every measured size' in models
    assert rows_of(tables.TABLES['speed_training']())[2:] == [
        ['1', 'straightforward', '4.00', '', '30', ''], ['1', 'ours', '8.00', '2.00x', '30', '1.00']]
    assert rows_of(tables.TABLES['memory_by_depth']())[2:] == [['12', '10', '21']]
    counts = ['`a_head`', '0 / 12', '1,024', '100.0 GMAC', '60 %', '', '10 %', '30 %', '40 %']
    assert rows_of(tables.TABLES['head_counts']())[2:] == [counts]
    assert rows_of(tables.TABLES['head_times']())[2:] == [
        counts, ['`a_head`', '0 / 12', '1,024', '2.00 s of CPU', '50 %', '', '1.0 %', '49 %', '50 %']]
    assert 'At 1,024 pixels a multiply-add of the pixel decoder took 0.1 times as long' in tables.TABLES['head_times']()
    for name in BENCHMARKS:
        assert all(str(fact) in tables.TABLES[name]() for fact in (*MACHINE.values(), '1 threads'))


def test_writing_then_checking(tables, monkeypatch):
    make_tables(tables, monkeypatch)
    written = pages(tables)
    assert '80.00' in written['README.md'] and '44.4' in written['docs/results.md']
    make_tables(tables, monkeypatch, '--check')
    make_tables(tables, monkeypatch)
    assert pages(tables) == written


@pytest.mark.parametrize('page', ['README.md', 'docs/results.md', 'docs/performance.md'])
def test_check_fails_on_an_outdated_table(tables, monkeypatch, page):
    make_tables(tables, monkeypatch)
    path = tables.ROOT / page
    path.write_text(re.sub(r'\d\d\.\d\d?', '99.99', path.read_text(), count=1))
    before = pages(tables)
    with pytest.raises(SystemExit) as info:
        make_tables(tables, monkeypatch, '--check')
    assert page in str(info.value.code) and 'make_tables.py' in str(info.value.code)  # a text exits with status 1
    assert pages(tables) == before


def test_check_fails_on_a_new_record(tables, monkeypatch):
    make_tables(tables, monkeypatch)
    path = tables.ROOT / 'docs/results/real.json'
    path.write_text(path.read_text().replace('82.25', '83.25'))
    with pytest.raises(SystemExit, match='docs/results.md'):
        make_tables(tables, monkeypatch, '--check')


def test_check_touches_nothing(tables, monkeypatch):
    make_tables(tables, monkeypatch)
    for page in tables.PAGES:
        os.utime(tables.ROOT / page, ns=(10**18, 10**18))
    make_tables(tables, monkeypatch, '--check')
    assert {(tables.ROOT / page).stat().st_mtime_ns for page in tables.PAGES} == {10**18}


def test_tables_of_this_repository_are_up_to_date():
    absent = [str(path.relative_to(ROOT)) for path in RECORDS if not path.exists()]
    if absent:
        pytest.skip(f'not there (yet): {", ".join(absent)}')
    done = subprocess.run([sys.executable, 'maintenance/make_tables.py', '--check'], cwd=ROOT, capture_output=True,
                          text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr


def test_pages_ask_for_tables_that_exist():
    module, asked = load_script('maintenance/make_tables'), set()
    for text in pages(module).values():
        found = re.findall(r'<!-- table: (\w+) -->', text)
        assert text.count('<!-- end -->') == len(found), text
        asked |= set(found)
    assert asked == set(module.TABLES)


def test_table_of_faults(tables, monkeypatch):
    make_tables(tables, monkeypatch)
    lines = (tables.ROOT / 'docs/reproducibility.md').read_text().splitlines()
    assert '| disk full | an error | an error |' in lines and '| a | 2 |' in lines
