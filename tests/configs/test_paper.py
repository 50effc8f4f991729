"""docs/paper.md has a run for every row of the paper; all of them build; composed configs say what their file says."""
from __future__ import annotations

import copy
import functools
import re
import sys
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

import make_paper
import pytest
import torch
import yaml
from mmcv.transforms import Compose
from mmengine.config import Config, ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, METRICS, MODELS, DefaultScope

from adala_mm.utils.cli import base_parser, find_config, load_config
from adala_mm.utils.compose import composable, composed, composed_text
from helpers import ROOT
from helpers.scripts import load_tool


@functools.cache
def runs() -> list[str]:
    """Configs of all rows, and those that they start from."""
    return list(dict.fromkeys(run for number in make_paper.facts()['tables'] for row in make_paper.rows_of(number)
                              for run in make_paper.chain(row.config)))


def test_the_pages_are_up_to_date():
    for page, text in make_paper.files():
        assert (ROOT / page).read_text(encoding='utf-8') == text, 'run: python maintenance/make_paper.py'


def test_every_row_of_the_paper_is_there():
    rows = {number: make_paper.rows_of(number) for number in make_paper.facts()['tables']}
    # Rows of the paper; of Tables 7 to 9, whose rows have several scores, the scores.
    assert {number: len(own) for number, own in rows.items()} == {
        1: 16, 2: 16, 3: 5, 4: 20, 7: 6, 8: 9, 9: 8, 10: 10, 11: 40, 12: 20}
    assert len(make_paper.facts()['settings']) == 9 and len(make_paper.facts()['times']) == 4
    assert [figure[0] for figure in make_paper.facts()['figures']] == list(range(1, 15))
    assert [make_paper.config_name('siglipl', 'cityscapes', 1024, method) for method in ('performer', 'stage2')] == [
        'mask2former_siglipl_performer_native_1024_cityscapes', 'mask2former_siglipl_stage2only_1024_cityscapes']
    # Rows that stand in two tables have one score, but for those that the errata name.
    scores = {}
    for row in (row for own in rows.values() for row in own):
        scores.setdefault(row.config, set()).add(row.score)
    assert {name for name, found in scores.items() if len(found) > 1} == {
        'cls_clipl_softmax_in1k', 'mask2former_siglipl_ade20k', 'mask2former_in1kl_softmax_cityscapes',
        'mask2former_in1kl_cityscapes'}


@functools.cache
def model_of(text: str, scope: str) -> torch.nn.Module:
    """A model whose ViTs have two blocks, on the meta device; its config as YAML."""
    with DefaultScope.overwrite_default_scope(scope), torch.device('meta'):
        return MODELS.build(ConfigDict(yaml.safe_load(text)))


def in_small(cfg: Config) -> str:
    model = cfg.model.to_dict()
    for network in filter(None, (model['backbone'], model.get('teacher'))):
        assert network.pop('depth') in (12, 24)
        network.update(depth=2, init_cfg=None)
        if 'out_indices' in network:
            network['out_indices'] = [1] * len(network['out_indices'])
    return yaml.safe_dump(model)


def test_every_run_builds(monkeypatch):
    """Model, optimizer, data, pipelines and metrics, each distinct one once; and who learns, and where it starts."""
    monkeypatch.setattr('mmengine.optim.optimizer.default_constructor.print_log', lambda *args, **kwargs: None)
    assert len(runs()) > 150 and len(set(runs()) - set(make_paper.FILES)) > 70
    done = set()
    for name in runs():
        cfg = make_paper.read(name)
        for path in make_paper.checkpoints(cfg.model.to_dict()):
            assert path.startswith('timm://') or Path(path).parts[0] == 'work_dirs', name
            if path.startswith('work_dirs/'):
                _, before, file = path.split('/')
                assert file == f'epoch_{make_paper.read(before).train_cfg.max_epochs}.pth', name
        text = in_small(cfg)
        if (key := repr((text, cfg.optim_wrapper))) not in done:
            done.add(key)
            model = model_of(text, cfg.default_scope)
            wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
            groups = {id(p) for group in wrapper.optimizer.param_groups for p in group['params']}
            learning = {key for key, p in model.named_parameters() if p.requires_grad and id(p) in groups}
            assert learning, name
            if '_qkv_in22k' in name:
                assert all(re.search(r'attn\.qkv\.', key) for key in learning)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
                options = cfg.get(loader, {}).get('dataset')
                if options and (key := repr((cfg.default_scope, options))) not in done:
                    done.add(key)
                    assert Compose(copy.deepcopy(options.to_dict()['pipeline'])).transforms
                    assert DATASETS.build(dict(options.to_dict(), lazy_init=True)).data_root == options.data_root
            metric = cfg.get('val_evaluator')
            if metric and (key := repr(metric)) not in done:
                done.add(key)
                assert METRICS.build(metric.to_dict())


def flat(node: object, path: str = '') -> dict[str, object]:
    if not isinstance(node, dict):
        return {path: node}
    return {key: value for name, part in node.items() for key, value in flat(part, f'{path}/{name}').items()}


def changes(cfg: Config, recipe: Config, vfm: str) -> dict:
    """What a config changes of a recipe, in words that are the same for all VFMs."""
    ours, theirs = flat(cfg.to_dict()), flat(recipe.to_dict())
    ours = {key: value for key, value in ours.items() if re.match('/(model|optim|train|param|auto)', key)}
    found = {key: value for key, value in ours.items() if theirs.get(key, '-') != value}
    found['dropped'] = {key for key in theirs if key.startswith('/model') and key not in ours}
    weights = found.get('/model/backbone/init_cfg/checkpoint', '')
    weights = 'pretrained' if weights == cfg.get('pretrained', {}).get('checkpoint') else re.sub(
        r'(/stage2_\w+/epoch)_\d+', r'\1', weights.replace(vfm, 'VFM'))
    return found | {'/model/backbone/init_cfg/checkpoint': weights}


@pytest.mark.parametrize('name', [
    'stage1_clipl_lolcats_native_coco', 'stage2_clipl_qkv_in22k', 'stage2_siglipl_lolcats_in22k',
    'cls_clipl_performer_native_in1k', 'cls_siglipl_stage2only_in1k', 'mask2former_in1kl_hedgehog_native_ade20k',
    'mask2former_siglipl_lolcats_native_1024_cityscapes', 'mask2former_dinov2l_stage2only_1024_cityscapes'])
def test_composed_changes_of_its_recipe_what_the_file_changes(name):
    path, vfm = composable()[name]
    words = rf'_({"|".join(make_paper.METHODS)}|native|nostage1|stage[12]only|qkv)(?=_)'
    recipe, stated = (re.sub(words, '', text) for text in (name, path.stem))
    ours = changes(Config.fromfile(composed(name)), make_paper.read(recipe), vfm)
    assert ours == changes(make_paper.read(path.stem), make_paper.read(stated), 'dinov2l')
    assert len(ours) > 1


def test_composed_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = 'mask2former_siglipl_hedgehog_native_1024_cityscapes'
    cfg = load_config(base_parser('').parse_args([name]))  # which refuses lines that change nothing
    assert 'composed from' in capsys.readouterr().out
    assert cfg.work_dir == f'./work_dirs/{name}' and Path(cfg.filename).name == f'{name}.py'
    assert cfg.model.backbone.attention.type == 'adala_mm.HedgehogAttention' and cfg.crop_size == (1024, 1024)
    assert cfg.model.backbone.init_cfg.checkpoint == 'work_dirs/stage1_siglipl_hedgehog_native_coco/epoch_4.pth'
    cfg.dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py').to_dict() == cfg.to_dict()
    assert find_config(f'{name}.py') == Path(cfg.filename)
    assert 'epoch_15.pth' in composed_text('mask2former_clipl_monarch_ade20k')  # CLIP's stage 2 has 15 epochs
    with pytest.raises(FileNotFoundError, match=f'names like it: {name}, '):
        find_config(name.replace('native', 'nativ'))
    with pytest.raises(FileNotFoundError):
        find_config(f'mine/{name}.py')


def test_figures_name_what_there_is():
    for number, _, configs, commands, _ in make_paper.facts()['figures']:
        for name in [run for config in configs for run in make_paper.chain(config)]:
            assert make_paper.read(name), number
        for command in commands:
            for path in re.findall(r'(?:configs|tools)/\S+?\.(?:py|sh)', command):
                assert (ROOT / path).is_file(), (number, path)
            for name in re.findall(r'dist_\w+\.sh (\w+)', command):
                assert find_config(name), (number, name)


def test_figure_10_finds_its_checkpoints():
    """Its command of stage 2 keeps what its loop reads; a run without the option keeps the last three."""
    _, _, _, (training, loop), _ = make_paper.facts()['figures'][9]
    name, options = re.fullmatch(r'bash tools/dist_train.sh (\w+) 8 --cfg-options (.+)', training).groups()
    cfg = make_paper.read(name).copy()
    assert cfg.default_hooks.checkpoint.interval == 1 and cfg.default_hooks.checkpoint.max_keep_ckpts == 3
    cfg.merge_from_dict({key: yaml.safe_load(value) for key, value in (word.split('=') for word in options.split())})
    assert cfg.default_hooks.checkpoint.max_keep_ckpts == -1
    assert f'checkpoint=work_dirs/{name}/epoch_$e.pth' in loop
    assert max(map(int, re.match(r'for e in ([\d ]+);', loop)[1].split())) == cfg.train_cfg.max_epochs


def test_gpu_hours_of_figures():
    """Figure 10 trains stage 3 nine times; figures that train nothing have none."""
    loop = make_paper.facts()['figures'][9][3][1]
    assert make_paper.trained_by(loop) == ['mask2former_dinov2l_ade20k'] * 9
    assert make_paper.figure_hours([]) == '-'
    stage2 = make_paper.hours('stage2_dinov2l_in22k')[1]
    task = make_paper.hours('mask2former_dinov2l_ade20k')[1]
    assert make_paper.figure_hours(['stage2_dinov2l_in22k', 'mask2former_dinov2l_ade20k']) == f'> {stage2 + task:,.0f}'


def test_figures_draw_the_runs_that_they_train():
    for number, _, configs, commands, _ in make_paper.facts()['figures']:
        trained = {run for config in configs for run in make_paper.chain(config)}
        drawn = {name for line in commands if 'plot_alignment' in line for name in re.findall(r'work_dirs/(\w+)', line)
                 if not name.startswith('figure')}
        assert drawn <= trained, number
        if number == 8:
            assert drawn == trained and '*' not in commands[0]


def test_counts_of_the_paper():
    """The paper's FLOPs of softmax and linear attention, by the arithmetic of docs/errata.md."""
    width, depth, head = 1024, 24, 64
    for size, softmax, linear, short in ((512, 310.60, 262.19, 51.38), (1024, 1241.50, 429.35, 824.01)):
        patches = (size // 16) ** 2
        tokens = patches + 1
        network = 12 * tokens * width ** 2 * depth + patches * 3 * 16 ** 2 * width
        norms = 5 * tokens * width * (2 * depth + 1)
        mixing = {'softmax': 2 * tokens ** 2 * width * depth, 'linear': 2 * tokens * head * width * depth}
        assert (network + norms) / 1e9 == pytest.approx(softmax, abs=0.005)
        assert (network + norms - mixing['softmax'] + mixing['linear']) / 1e9 == pytest.approx(linear, abs=0.005)
        assert (mixing['softmax'] - norms) / 1e9 == pytest.approx(short, abs=0.005)
        rows = {row['attention']: row for row in make_paper.recorded('paper_flops')['rows']}
        assert rows['SoftmaxAttention']['total'][str(size)] == network + mixing['softmax']
        assert rows['LinearAttention']['total'][str(size)] == pytest.approx(network + mixing['linear'], rel=2e-4)


def test_the_table_of_flops_is_counted():
    tool = load_tool('tools/analysis_tools/count_flops')
    rows = {row['config']: row for row in make_paper.recorded('paper_flops')['rows']}
    assert list(rows) == tool.CONFIGS
    name = 'mask2former_dinov2l_linformer_ade20k'
    assert tool.count(name, [512, 1024]) == rows[name]


def test_flops_of_a_backbone_with_rotation():
    """DINOv3-B by hand: 12 blocks of 12 C², patches of 16 x 16 pixels, a class and four register tokens."""
    row = load_tool('tools/analysis_tools/count_flops').count('mask2former_dinov3b_ade20k', [512])
    width, patches = 768, 32 ** 2
    network = 12 * 12 * (patches + 5) * width ** 2 + patches * 768 * width
    assert row['total']['512'] - row['mixing']['512'] == network
    assert row['mixing']['512'] == pytest.approx(12 * 2 * (patches + 5) * 64 * width, rel=0.01)  # and denominators


def test_flops_are_those_of_plain_vits(monkeypatch):
    tool = load_tool('tools/analysis_tools/count_flops')
    monkeypatch.setattr(sys, 'argv', ['count_flops', 'upernet_l2vitt_ade20k'])
    with pytest.raises(SystemExit, match='upernet_l2vitt_ade20k: only AdaLAViT is counted, .* adala_mm.L2ViT'):
        tool.main()


def test_costs_of_attentions_alone(tmp_path):
    """Figure 3: softmax by its formula holds two N x N matrices, by the fused kernel none; both multiply alike."""
    tool = load_tool('tools/analysis_tools/attention_costs')
    args = Namespace(tokens=[64, 1024], dim=64, heads=2)
    rows = {(row['name'], row['tokens']): row for rows in tool.measure(args, torch.device('cpu')) for row in rows}
    assert all('mib' in row for row in rows.values()) and len(rows) > 2 * 20
    unfused, fused, linear = (rows[name, 1024] for name in (tool.UNFUSED, tool.SOFTMAX, tool.LINEAR))
    assert unfused['mixing'] == fused['mixing'] == pytest.approx(2 * 1024 ** 2 * 64 / 1e9)
    assert linear['mixing'] == pytest.approx(2 * 1024 * 32 * 64 / 1e9, rel=0.05)  # and the denominators
    assert unfused['mib'] >= 2 * 2 * 1024 ** 2 * 4 / 2 ** 20 > 4 * max(fused['mib'], linear['mib'])
    data = dict(rows=list(rows.values()), settings=vars(args), machine=dict(device='a CPU'))
    tool.draw(tmp_path / 'costs.png', data)
    assert (tmp_path / 'costs.png').read_bytes().startswith(b'\x89PNG')
    assert tool.table(data).count('\n') == len(rows) // 2 + 1
    for text in ('50', 'abc', '0'):
        with pytest.raises(ArgumentTypeError, match=f'{text} tokens are no square grid'):
            tool.square(text)


def test_attentions_that_would_not_fit_are_skipped(monkeypatch):
    """Both quadratic ones, softmax by its formula and RMT: what they hold is foreseen from smaller lengths."""
    tool = load_tool('tools/analysis_tools/attention_costs')
    seen = [dict(tokens=n, mib=3 * n + 2 * n ** 2) for n in (10, 20)]
    assert tool.forecast(100, seen) == pytest.approx(3 * 100 + 2 * 100 ** 2)
    assert tool.forecast(100, [dict(tokens=n, mib=3 * n) for n in (10, 20)]) == pytest.approx(300)
    assert tool.forecast(100, [*seen[:1], dict(tokens=20, note='failed')]) == 0
    quadratic = {tool.UNFUSED, 'RMT'}
    chosen = {name: cfg for name, cfg in tool.attentions().items() if name in quadratic | {tool.LINEAR}}
    monkeypatch.setattr(tool, 'attentions', lambda: chosen)
    monkeypatch.setattr(tool, 'total_memory', lambda device: 16 * 2 ** 20)
    rows, = tool.measure(Namespace(tokens=[1024], dim=64, heads=2), torch.device('cpu'))
    assert {row['name'] for row in rows if row.get('note', '').startswith('skipped: ')} == quadratic


def test_channels_are_shared_by_heads(tmp_path, monkeypatch, capsys):
    tool = load_tool('tools/analysis_tools/attention_costs')
    monkeypatch.setattr(sys, 'argv', ['attention_costs', '--dim', '100', '--heads', '16', '--out', str(tmp_path)])
    with pytest.raises(SystemExit):
        tool.main()
    assert '--dim 100 --heads 16: heads share the channels equally' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
