"""The pages say what is: links lead somewhere, quoted messages are in the code, examples and the notebook run."""
from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
import textwrap
import typing
from pathlib import Path
from urllib.parse import unquote

import cv2
import numpy as np
import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, DefaultScope

import adala_mm
from adala_mm.models.attentions import blocks_by_attention
from adala_mm.utils import cli
from adala_mm.utils.checkpoint import hub_file, hub_url
from helpers import ROOT
from helpers.processes import start_script, wait_for

PAGES = [*sorted(ROOT.glob('*.md')), *sorted(ROOT.glob('docs/**/*.md')), *sorted(ROOT.glob('configs/**/README.md')),
         ROOT / 'tools/README.md', ROOT / 'maintenance/README.md']
NOTEBOOK = ROOT / 'docs/notebooks/quickstart.ipynb'
FENCE = re.compile(r'^( *)(```+|~~~+).*?^\1\2 *$', re.DOTALL | re.MULTILINE)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def links_of(text: str) -> list[str]:
    """Targets of links and pictures, outside of code."""
    text = re.sub(r'`[^`\n]*`', '', FENCE.sub('', text))
    return re.findall(r'\]\(([^)\s]+)(?: "[^"]*")?\)', text)


@functools.cache
def anchors_of(path: Path) -> set[str]:
    """Anchors of headings as Git servers and MyST make them."""
    headings = re.findall(r'^#{1,6} +(.+?) *$', FENCE.sub('', path.read_text(encoding='utf-8')), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for link in links_of(text):
        if re.match(r'[a-z]+:', link):
            continue  # another server: not looked at, tests are offline
        file, _, anchor = unquote(link).partition('#')
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or not target.is_relative_to(ROOT) or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
    assert broken_links(page, page.read_text(encoding='utf-8')) == []


def test_broken_links_are_found():
    text = '''# A heading, with `code`

[a](#a-heading-with-code) [b](docs/nothing.md) [c](docs/index.md#nothing) ![d](docs/images/nothing.png)
[e](https://example.org/nothing) [f](../outside.md) `[g](nothing.md)`

```
[h](nothing.md)
```
'''
    wanted = ['#a-heading-with-code', 'docs/nothing.md', 'docs/index.md#nothing', 'docs/images/nothing.png',
              '../outside.md']
    assert broken_links(ROOT / 'README.md', text) == wanted


def test_pages_are_linked_from_the_index():
    """The index and the README are where readers begin; what the site's side bar lists is not on a Git server."""
    linked = {(ROOT / 'docs' / link.partition('#')[0]).resolve()
              for link in links_of((ROOT / 'docs/index.md').read_text(encoding='utf-8'))}
    linked |= {(ROOT / link.partition('#')[0]).resolve() for link in links_of((ROOT / 'README.md').read_text())}
    pages = {page for page in ROOT.glob('docs/*.md') if page.name != 'index.md'}
    assert sorted(map(name_of, pages - linked)) == []


def template(node: ast.AST) -> str:
    """A string expression with ``…`` for what is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return ''.join(map(template, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return '…'


@functools.cache
def strings_of_the_code() -> list[str]:
    nodes = [node for folder in ('adala_mm', 'tools', 'maintenance', 'benchmarks')
             for path in (ROOT / folder).rglob('*.py')
             for node in ast.walk(ast.parse(path.read_text(encoding='utf-8')))]
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    return [text for node in nodes if id(node) not in docstrings and (text := template(node)) != '…']


def is_in_the_code(message: str) -> bool:
    """Whether one string has all parts of the message in their order; ``…`` is anything."""
    parts = [re.escape(part.strip()) for part in message.split('…') if part.strip()]
    pattern = re.compile('.*'.join(parts), re.DOTALL)
    return any(pattern.search(text) for text in strings_of_the_code())


def test_troubleshooting_quotes_messages_of_the_code():
    page = (ROOT / 'docs/troubleshooting.md').read_text(encoding='utf-8')
    rows = [line.split(' | ')[0] for line in page.splitlines() if line.startswith('| `')]
    messages = [message for row in rows for message in re.findall(r'`([^`]+)`', row)]
    assert messages
    assert [message for message in messages if not is_in_the_code(message)] == []
    assert not is_in_the_code('no checkpoint at …: there was one yesterday')


def test_names_on_the_hub_are_timms():
    """Names after ``timm://`` and in ``create_model``, and repositories, of all configs, pages, messages and tools."""
    repositories = {facts.hf_hub_id for name in timm.list_pretrained() if (facts := timm.get_pretrained_cfg(name))}
    files = [ROOT / 'README.md', *(path for folder in ('configs', 'docs', 'adala_mm', 'tools', 'maintenance')
                                   for suffix in ('py', 'md', 'rst', 'ipynb', 'yml')
                                   for path in (ROOT / folder).rglob(f'*.{suffix}'))]
    found = set()
    for path in files:
        text = path.read_text(encoding='utf-8')
        names = set(re.findall(r"""(?:timm://|create_model\(['"])(\w+_[\w.]+)""", text))
        assert {hub_file(name)[0] for name in names} <= repositories, path
        named = set(re.findall(r'(?:huggingface\.co/|[\s`(])(timm/\w+\.\w+)(?=[/`; ])', text))
        assert named <= repositories, path
        found |= names | named
    assert {'vit_large_patch14_clip_quickgelu_224.openai', 'timm/vit_large_patch14_clip_224.openai',
            'vit_base_patch14_dinov2.lvd142m', 'timm/deit_tiny_patch16_224.fb_in1k'} <= found and len(found) > 12, found


def test_weights_of_the_recipes_are_where_the_page_says():
    page = (ROOT / 'configs/adala/README.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| `(\w+)` \| `([\w.]+)` \| <(https://[^>]+)> \|$', page, re.MULTILINE)
    assert all(url == hub_url(name) for _, name, url in rows)
    names = {vfm: name for vfm, name, _ in rows}
    assert names.pop('deitt') == 'deit_tiny_patch16_224.fb_in1k'  # its recipes start from a file
    texts = {path.stem: path.read_text(encoding='utf-8') for path in ROOT.glob('configs/_base_/backbones/*.py')}
    assert names == {vfm: found[1] for vfm, text in texts.items() if (found := re.search(r"timm://([\w.]+)'", text))}


def code_blocks(page: str) -> list[str]:
    """Python of a page, that inside lists too."""
    found = re.findall(r'^( *)```python\n(.*?)^\1```$', (ROOT / page).read_text(encoding='utf-8'),
                       re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(code) for _, code in found]


def test_public_functions_are_what_type_checkers_see():
    """pyright and mypy read files: they know no `__getattr__`, and a module hides a function of its name."""
    tree = ast.parse((ROOT / 'adala_mm/__init__.py').read_text(encoding='utf-8'))
    seen = {name.name: node.module for block in tree.body if isinstance(block, ast.If) for node in block.body
            for name in node.names}
    assert seen == adala_mm.EXPORTED and list(seen) == adala_mm.__all__
    modules = {module.name for module in pkgutil.iter_modules(adala_mm.__path__)}
    assert modules.isdisjoint(seen)
    assert (ROOT / 'adala_mm/py.typed').is_file()
    for name in seen:
        function = getattr(adala_mm, name)
        hints = typing.get_type_hints(function)  # names that only type checkers import would not resolve
        assert hints.keys() == {*inspect.signature(function).parameters, 'return'}, name


@pytest.mark.parametrize('page', ['README.md', 'docs/quickstart.md', 'docs/timm.md', 'docs/transformers.md',
                                  'docs/notebooks/quickstart.ipynb'])
def test_calls_of_public_functions_fit_their_signatures(page):
    if page.endswith('.ipynb'):
        cells = json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']
        code = '\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code')
    else:
        code = '\n'.join(code_blocks(page))
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Name) and node.func.id in adala_mm.__all__]
    assert len(calls) >= 3
    for call in calls:
        inspect.signature(getattr(adala_mm, call.func.id)).bind(
            *call.args, **{keyword.arg: keyword.value for keyword in call.keywords})


def python(code: str, folder: Path, **environment: str) -> str:
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=False,
                          cwd=folder, timeout=300, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_attention_of_the_page_works(tmp_path):
    layer, use, check = code_blocks('docs/add_attention.md')
    (tmp_path / 'my_attention.py').write_text(layer)
    assert 'my_attention.' in use
    (tmp_path / 'check.py').write_text(check)
    log = tmp_path / 'console.log'
    codes = wait_for(start_script(tmp_path / 'check.py', place=tmp_path, log=log))
    out = log.read_text()
    assert codes == [0], out
    assert out.splitlines()[-2] == '2 blocks, output (1, 17, 32), every weight of the softmax ViT in its place'


def test_family_of_the_page_converts(monkeypatch):
    """DeiT III, which `convert` does not know, with the lines that the page adds."""
    from adala_mm.conversion import FAMILIES, compare, convert
    from adala_mm.conversion.families import IMAGENET, Family
    from adala_mm.conversion.from_timm import TIMM
    row, _ = code_blocks('docs/add_vfm.md')  # the other one is a sketch
    name = 'deit3_small_patch16_224'
    state = timm.create_model(name).state_dict()
    with pytest.raises(ValueError, match='of no known family'):
        convert(state, name=name)
    added = eval(f'{{{row}}}', {'Family': Family, 'IMAGENET': IMAGENET})
    monkeypatch.setitem(FAMILIES, *added.popitem())
    monkeypatch.setitem(vars(TIMM), 'families', tuple(FAMILIES))  # as its file has it
    converted = convert(state, name=name)
    assert converted.family_name == 'deit3' and converted.config['no_embed_class']
    note, difference, greatest = compare(converted, state, torch.randn(1, 3, 224, 224), name)
    assert name in note and difference < 1e-4 and greatest > 1


def feature_errors(out: str) -> dict[str, float]:
    found = re.findall(r'^(softmax teacher|swap|stage 1|stage 1 \+ 2) +(\d\.\d+)', out, re.MULTILINE)
    return {name: float(error) for name, error in found}


def test_notebook_is_stored_with_the_outputs_of_its_code():
    notebook = json.loads(NOTEBOOK.read_text(encoding='utf-8'))
    code = [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']
    sources = '\n\n'.join(''.join(cell['source']) for cell in code)
    assert notebook['metadata']['code_sha256'] == hashlib.sha256(sources.encode()).hexdigest(), 'run: make notebook'
    assert [cell['execution_count'] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell['outputs']]
    assert {output['output_type'] for output in outputs} == {'stream', 'display_data'}  # no error
    pictures = [output['data']['image/png'] for output in outputs if 'data' in output]
    assert len(pictures) == 2 and NOTEBOOK.stat().st_size < 400_000
    said = ''.join(''.join(output.get('text', '')) for output in outputs)
    assert list(feature_errors(said)) == ['softmax teacher', 'swap', 'stage 1', 'stage 1 + 2']
    assert not re.search('OneDL|Warning|/(?:home|root|work|tmp)/', said)  # nothing of where it ran


def test_notebook_runs_from_top_to_bottom(tmp_path):
    cells = json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']
    code = [cell for cell in cells if cell['cell_type'] == 'code']
    out = python('\n\n'.join(''.join(cell['source']) for cell in code), tmp_path, MPLBACKEND='Agg')
    assert list(feature_errors(out)) == ['softmax teacher', 'swap', 'stage 1', 'stage 1 + 2']
    assert 'OneDL' not in out
    assert list(tmp_path.iterdir()) == []  # it leaves nothing behind
    for cell in cells:
        if cell['cell_type'] == 'markdown':
            assert broken_links(NOTEBOOK, ''.join(cell['source'])) == []


def test_lines_for_a_machine_without_a_connection():
    """With the options of the page, no stage has anything left to download; without them, all but stage 3 have."""
    page = (ROOT / 'docs/costs.md').read_text(encoding='utf-8')
    lines = re.findall(r'^python tools/train.py (\S+)(?: --cfg-options (\S+)=(\S+))?$', page, re.MULTILINE)
    assert [Path(config).stem for config, _, _ in lines] == [
        'stage1_dinov2l_coco', 'stage2_dinov2l_in22k', 'mask2former_dinov2l_ade20k',
        'mask2former_dinov2l_softmax_ade20k']
    for config, key, file in lines:
        cfg = Config.fromfile(ROOT / config)
        assert ('timm://' in str(cfg.model)) == bool(key)
        if key:
            before = str(cfg.model)
            cfg.merge_from_dict({key: file})
            # In the place of the name, and no new entry that nobody reads.
            assert str(cfg.model) == before.replace(cfg.pretrained.checkpoint, file) != before


def test_weights_of_the_cache_need_no_connection(tmp_path, monkeypatch):
    """A cache as the hub lays it out, copied from another machine."""
    from huggingface_hub import constants

    from adala_mm.utils.checkpoint import local_file
    name = 'vit_large_patch14_dinov2.lvd142m'
    assert f'timm://{name}' in (ROOT / 'docs/costs.md').read_text(encoding='utf-8')
    assert Config.fromfile(ROOT / 'configs/adala/stage1_dinov2l_coco.py').pretrained.checkpoint == f'timm://{name}'
    folder = tmp_path / f'models--timm--{name}'
    (folder / 'snapshots/abc').mkdir(parents=True)
    (folder / 'refs').mkdir()
    (folder / 'refs/main').write_text('abc')
    (folder / 'snapshots/abc/model.safetensors').touch()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.file_download.constants.HF_HUB_CACHE', str(tmp_path))
    assert local_file(f'timm://{name}') == folder / 'snapshots/abc/model.safetensors'


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    """A folder for configs of one's own beside this repository's."""
    (tmp_path / 'configs/mine').mkdir(parents=True)
    for folder in (ROOT / 'configs').iterdir():
        (tmp_path / 'configs' / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path / 'configs/mine'


# What each snippet is for: the finished config that it is put under -> the attentions that its blocks then have.
CHILDREN = {
    ('docs/attentions.md', "model['backbone']['attention'] = [softmax]"): {
        'adala/mask2former_dinov2l_ade20k': '22 of 24 blocks LinearAttention, 2 SoftmaxAttention',
        'adala/stage1_dinov2l_coco': '22 of 24 blocks LinearAttention, 2 SoftmaxAttention'},
    ('docs/attentions.md', "model['backbone']['attention'] = dict(type='adala_mm.RALAAttention')"): {
        'adala/cls_clipl_in1k': '24 of 24 blocks RALAAttention',
        'adala/stage2_dinov2l_in22k': '24 of 24 blocks RALAAttention',
        'beyond/mask2former_dinov2l_plus_ade20k': '24 of 24 blocks RALAAttention',  # its options go
        'beyond/task_mask2former_dinov2l_ade20k': '24 of 24 blocks RALAAttention',
        'detection/dino_dinov2l_coco': '24 of 24 blocks RALAAttention',
        'real/stage2_deitt_caltech': '12 of 12 blocks RALAAttention'},
    ('docs/add_attention.md', "model['backbone']['attention'] ="): {
        'baselines/mask2former_dinov2l_cosformer_cityscapes': '24 of 24 blocks MeanBesideLinear'},
    ('docs/beyond.md', "model['backbone']['attention'] ="): {
        'real/stage2_deitt_caltech': '12 of 12 blocks HedgehogAttention'},
    ('docs/beyond.md', "attention=dict(type='adala_mm.CoarseToFineAttention'"): {
        'real/stage2_deitt_caltech': '12 of 12 blocks CoarseToFineAttention'},
    ('docs/beyond.md', "type='adala_mm.TaskModelAlignment'"): {
        'adala/mask2former_dinov2l_ade20k': '24 of 24 blocks LinearAttention'},
    ('docs/training.md', 'patience=3)]\ndefault_hooks'): {
        'real/stage2_deitt_caltech': '12 of 12 blocks LinearAttention'},
    ('docs/training.md', "monitor={'align/rel_error': 'less', 'knn/agreement'"): {
        'real/stage2_deitt_caltech': '12 of 12 blocks LinearAttention'},
    ('docs/training.md', "runner_type = 'adala_mm.ShardedRunner'"): {
        'adala/stage2_dinov2l_in22k': '24 of 24 blocks LinearAttention'},
}


@pytest.mark.parametrize(('page', 'start', 'config', 'blocks'), [
    pytest.param(page, start, config, blocks, id=f'{page}-{config}')
    for (page, start), configs in CHILDREN.items() for config, blocks in configs.items()])
def test_snippets_work_in_a_config_that_inherits(page, start, config, blocks, mine, monkeypatch):
    """Each line as a reader would use it: below a finished config, read by the command line, and built."""
    (code,) = [code for code in code_blocks(page) if start in code]
    folder, name = config.split('/')
    (mine / 'child.py').write_text(
        f'from mmengine.config import read_base\n\nwith read_base():\n    from ..{folder}.{name} import *\n\n{code}')
    if 'my_attention' in code:
        Path('my_attention.py').write_text(code_blocks(page)[0])
        monkeypatch.syspath_prepend(Path.cwd())
    cfg = cli.load_config(cli.base_parser('').parse_args(['configs/mine/child.py']))
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device('meta'):
        assert blocks_by_attention(MODELS.build(cfg.model))['backbone'] == blocks


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_pages_change_the_backbone_where_it_is_read(page):
    inert = r'^ *backbone(\.|\[| = ).*|`backbone\.(update|attention)\b.*| backbone\.[a-z_.]*=.*'
    assert [found[0] for found in re.finditer(inert, page.read_text(encoding='utf-8'), re.MULTILINE)] == []


def test_configs_of_ones_own_data(mine):
    segmentor, classifier = code_blocks('docs/own_data.md')
    for name, code in dict(rooftops=segmentor, flowers=classifier).items():
        (mine / f'{name}.py').write_text(code)
    for split in ('train', 'val'):
        for kind, suffix in (('images', 'jpg'), ('labels', 'png')):
            path = Path(f'data/rooftops/{kind}/{split}/1.{suffix}')
            path.parent.mkdir(parents=True)
            cv2.imwrite(str(path), np.arange(600 * 700).reshape(600, 700) % 3)
        for flower in ('daisy', 'rose'):
            Path(f'data/flowers/{split}/{flower}').mkdir(parents=True)
            cv2.imwrite(f'data/flowers/{split}/{flower}/1.jpg', np.full((40, 50, 3), 99))

    cfg = cli.load_config(cli.base_parser('').parse_args(['configs/mine/rooftops.py']))
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        with DefaultScope.overwrite_default_scope('mmseg'):
            (sample,) = DATASETS.build(cfg[loader].dataset)
        assert sample['data_samples'].gt_sem_seg.data.unique().tolist() == [0, 1, 2]  # nothing is taken off them
        assert sample['data_samples'].img_path.startswith('data/rooftops/images/')
    head = cfg.model.decode_head
    assert head.num_classes == 3 and head.loss_cls.class_weight == [1.0, 1.0, 1.0, 0.1]

    cfg = cli.load_config(cli.base_parser('').parse_args(['configs/mine/flowers.py']))
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            samples = list(DATASETS.build(cfg[loader].dataset))
        assert [sample['data_samples'].gt_label.item() for sample in samples] == [0, 1]
    assert cfg.model.head.num_classes == cfg.model.data_preprocessor.num_classes == 5
