"""model-index.yml and the metafiles list every config once, and say what the configs and the records say."""
from __future__ import annotations

import functools
import json
import re
import shutil
import sys
from pathlib import Path

import modelindex
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.config.utils import _get_cfg_metainfo

from helpers import ROOT
from helpers.scripts import load_tool

FOLDERS = ['adala', 'baselines', 'beyond', 'demo', 'detection', 'l2vit', 'real']


@pytest.fixture
def tool(monkeypatch):
    return load_tool('maintenance/make_metafiles')


@functools.cache
def metafile(folder: str) -> dict:
    return yaml.safe_load((ROOT / f'configs/{folder}/metafile.yml').read_text(encoding='utf-8'))


def models() -> list[dict]:
    return [model for folder in FOLDERS for model in metafile(folder)['Models']]


def listed(name: str) -> dict:
    (found,) = [model for model in models() if model['Name'] == name]
    return found


def test_every_config_is_listed_once(tool):
    assert [folder.name for folder in tool.config_folders()] == FOLDERS
    for folder in FOLDERS:
        configs = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / 'configs' / folder).glob('*.py'))
        assert configs and [model['Config'] for model in metafile(folder)['Models']] == configs
    assert all(model['Name'] == Path(model['Config']).stem for model in models())
    assert len({model['Name'] for model in models()}) == len(models())


def test_the_index_loads(tool):
    assert (ROOT / 'model-index.yml').read_text() == tool.model_index()
    index = modelindex.load(str(ROOT / 'model-index.yml'))
    # The library looks for a README beside the file that names it; OpenMMLab's paths start at the repository.
    assert [line for line in index.check(silent=True) if 'Path to README' not in line] == []
    assert {model.name: model.config for model in index.models} == {m['Name']: m['Config'] for m in models()}
    papers = {name: paper for name, (_, paper) in tool.PAPERS.items()}
    assert {collection.name: collection.paper for collection in index.collections} == papers
    for collection in index.collections:
        assert (ROOT / collection.readme).is_file()
    assert {model['In Collection'] for model in models()} == set(papers)  # none without a config


def test_mmengine_finds_configs(tmp_path):
    (tmp_path / '.mim').symlink_to(ROOT)  # what an installed package has there
    name = 'adala/mask2former_dinov2l_ade20k.py'
    assert _get_cfg_metainfo(str(tmp_path), name)['Config'] == f'configs/{name}'


@pytest.mark.parametrize('folder', FOLDERS)
def test_metafiles_are_up_to_date(tool, folder):
    """All but FLOPs, which take minutes to count; samples of them come below."""
    committed = json.loads(json.dumps(metafile(folder)))
    flops = [model['Metadata'].pop('FLOPs') for model in committed['Models']]
    assert all(type(count) is int and count > 0 for count in flops)
    wanted = tool.metafile(ROOT / 'configs' / folder, with_flops=False)
    assert committed == wanted, 'run: python maintenance/make_metafiles.py'
    text = (ROOT / f'configs/{folder}/metafile.yml').read_text(encoding='utf-8')
    assert text == tool.as_text(metafile(folder))


@pytest.mark.parametrize('name', [
    'stage1_deitt_caltech', 'mask2former_demo_beacons', 'cls_dinov2b_softmax_in1k', 'cls_dinov2l_monarch_in1k',
    'cls_l2vitt_in1k', 'stage1_dinov2b_coarse_coco'])
def test_flops(tool, name):
    entry = listed(name)
    facts = tool.metadata(Config.fromfile(ROOT / entry['Config']), name)
    assert facts == entry['Metadata'], 'run: python maintenance/make_metafiles.py'


def test_flops_by_hand():
    """ViT-B at 512 px, linear attention: four D x D projections, an MLP of 8 D x D, and 2 N D x 64 for attention."""
    tokens, dim = 1025, 768
    block = tokens * dim * (12 * dim + 2 * 64)
    wanted = 12 * block + 1024 * 3 * 16 ** 2 * dim + dim * 1000
    assert listed('cls_dinov2b_in1k')['Metadata']['FLOPs'] == pytest.approx(wanted, rel=2e-3)
    softmax = wanted + 12 * 2 * tokens * dim * (tokens - 64)
    assert listed('cls_dinov2b_softmax_in1k')['Metadata']['FLOPs'] == pytest.approx(softmax, rel=2e-3)


def test_equal_architectures_cost_the_same(tool):
    costs = {}
    for model in models():
        cfg = Config.fromfile(ROOT / model['Config'])
        facts = model['Metadata']
        costs.setdefault((json.dumps(tool.architecture(cfg)), facts['Image Size']), set()).add(facts['FLOPs'])
    assert len(costs) > 30 and all(len(found) == 1 for found in costs.values())


def test_linear_attention_costs_less():
    pairs = 0
    for model in models():
        twin = re.sub('_softmax', '', model['Name'])
        if twin != model['Name'] and any(other['Name'] == twin for other in models()):
            linear, softmax = listed(twin)['Metadata'], model['Metadata']
            assert linear['FLOPs'] < softmax['FLOPs'] and linear['Image Size'] == softmax['Image Size']
            pairs += 1
    assert pairs >= 20


def test_results_are_those_of_the_records(tool):
    demo = json.loads((ROOT / 'docs/results/demo.json').read_text())
    real = json.loads((ROOT / 'docs/results/real.json').read_text())
    with_results = {model['Name']: model['Results'][0]['Metrics'] for model in models() if 'Results' in model}
    assert {name for name in with_results if not name.endswith('_beacons')} == {run['config'] for run in real.values()}
    for run in real.values():
        last = run['scores'][-1]
        assert with_results[run['config']] == {
            key: pytest.approx(value, rel=1e-3) for key, value in last.items() if key != 'step'}
    assert with_results['mask2former_demo_beacons'] == dict(mIoU=pytest.approx(demo['mask2former'], rel=1e-3))
    # The demo's own list of runs says which config is behind which row.
    configs = {run.name: run.config for run in load_tool('tools/demo').RUNS}
    rows = {row['name']: row for row in demo['rows']}
    ends = {configs[run]: row for run, row, *_ in load_tool('tools/demo_report').ROWS}
    unrecorded = {config for config, row in ends.items() if row not in rows}
    for config in ends.keys() - unrecorded:
        assert with_results[config] == dict(mIoU=pytest.approx(rows[ends[config]]['tuned'], rel=1e-3))
    for run, errors in demo['rel_error'].items():
        assert with_results[configs[run]] == {'align/rel_error': pytest.approx(errors[-1], rel=1e-3)}
    assert set(with_results) == {*configs.values(), *(run['config'] for run in real.values())} - unrecorded


def test_nothing_is_claimed_that_is_not_there():
    assert all(set(model) <= {'Name', 'In Collection', 'Config', 'Metadata', 'Results'} for model in models())
    trained = {model['Config'].split('/')[1] for model in models() if 'Results' in model}
    assert trained == {'demo', 'real'}


def test_written_then_checked(tool, tmp_path, monkeypatch):
    for name in ('configs/_base_', 'docs/results'):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / 'configs/demo').mkdir()
    shutil.copy(ROOT / 'configs/demo/teacher_demo_beacons.py', tmp_path / 'configs/demo')
    monkeypatch.setattr(tool, 'ROOT', tmp_path)

    def run(*words: str) -> None:
        monkeypatch.setattr(sys, 'argv', ['make_metafiles.py', *words])
        tool.main()
    told = r'model-index\.yml is out of date; run: python maintenance/make_metafiles\.py'
    with pytest.raises(SystemExit, match=told):
        run('--check')
    assert not (tmp_path / 'model-index.yml').exists()
    run()
    run('--check')
    path = tmp_path / 'configs/demo/metafile.yml'
    written = path.read_text(encoding='utf-8')
    assert yaml.safe_load(written)['Models'] == [listed('teacher_demo_beacons')]
    path.write_text(written.replace('mIoU: ', 'mIoU: 9'), encoding='utf-8')
    with pytest.raises(SystemExit, match=r'configs/demo/metafile\.yml is out of date'):
        run('--check')
    run()
    assert path.read_text(encoding='utf-8') == written


def test_no_state_is_left_behind(tool):
    autocast = torch.autocast
    tool.metadata(Config.fromfile(ROOT / 'configs/demo/stage1_demo_beacons.py'), 'stage1_demo_beacons')
    assert torch.autocast is autocast
