"""maintenance/make_configs.py: the references of the configs name all of them, in as few rows as they need."""
import re

import pytest

from helpers import ROOT
from helpers.scripts import load_tool


@pytest.fixture(scope='module')
def tool():
    return load_tool('maintenance/make_configs')


def test_pages_are_up_to_date_and_link_every_config(tool):
    pages = dict(tool.files())
    for page, text in pages.items():
        assert (ROOT / page).read_text(encoding='utf-8') == text, 'run: python maintenance/make_configs.py'
    for page, pattern in {'docs/configs.md': '[!_]*/*.py', 'docs/base_configs.md': '_base_/**/*.py'}.items():
        linked = re.findall(r'\]\(\.\./(configs/[^)]+\.py)\)', pages[page])
        assert sorted(linked) == sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(f'configs/{pattern}'))


def test_configs_that_differ_in_a_word_share_a_row(tool):
    paths = [ROOT / f'configs/a/cls_{words}_in1k.py' for words in ('clipl_monarch', 'dinov2l_linear')]
    assert tool.names(paths[:1]) == ('[`cls_clipl_monarch_in1k`](../configs/a/cls_clipl_monarch_in1k.py)', '')
    assert tool.names(paths) == ('`cls_…_…_in1k`', '[`clipl_monarch`](../configs/a/cls_clipl_monarch_in1k.py), '
                                                   '[`dinov2l_linear`](../configs/a/cls_dinov2l_linear_in1k.py)')
    assert tool.shared(['A probe on X, frozen.', 'A probe on Y Z, frozen.']) == 'A probe on … frozen.'
    assert tool.shared(['A probe.', 'A probe.']) == 'A probe.'
    assert tool.shared(['A b a.', 'A a.']) == 'A … a.'


def test_names_are_parsed(tool, tmp_path):
    vfms = ['dinov2l', 'l2vitt']
    assert tool.split_name('mask2former_dinov2l_softmax_1024_cityscapes', vfms) == (
        'mask2former', 'dinov2l', ['softmax', '1024'], 'cityscapes')
    assert tool.split_name('task_cls_l2vitb_in1k', vfms) == ('task_cls', 'l2vitb', [], 'in1k')
    for name in ('mask2former_ade20k', 'dinov2l_ade20k', 'stage1_dinov2l'):
        with pytest.raises(ValueError, match=f'{name}: no config is named like that'):
            tool.split_name(name, vfms)
    config = tmp_path / 'config.py'
    config.write_text('# ViT-B of Oquab et al. (2024), as\n# is. More.\nx = 1\n')
    assert tool.about(config) == 'ViT-B of Oquab et al. (2024), as is.'
