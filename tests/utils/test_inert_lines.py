"""Lines and options that change nothing are refused with the place to change, and only they."""
from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from mmengine.config import Config

from adala_mm.engine import ConfigCheckHook
from adala_mm.engine.config_check import command_line_options
from adala_mm.models.attentions import blocks_by_attention
from adala_mm.registry import MODELS
from adala_mm.utils.cli import base_parser, load_config
from adala_mm.utils.inert_lines import refuse_inert_lines
from helpers import ROOT

FLAGSHIP, STAGE1, STAGE2 = 'adala.mask2former_dinov2l_ade20k', 'adala.stage1_dinov2l_coco', 'adala.stage2_dinov2l_in22k'
# Those that tests/configs/test_configs.py does not go through.
OTHERS = sorted(path for path in ROOT.glob('configs/*/*.py')
                if path.parent.name in ('l2vit', 'detection') or path.name.startswith('task_'))


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    """A folder for configs of one's own beside this repository's."""
    for folder in (ROOT / 'configs').iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    (tmp_path / 'mine').mkdir()
    monkeypatch.chdir(tmp_path)
    return Path('mine')


def write(path: Path, parent: str, *lines: str) -> Path:
    """A config that inherits ``parent`` and then has ``lines``, the first of them in line 6."""
    head = ['from mmengine.config import read_base', '', 'with read_base():', f'    from {parent} import *', '']
    path.write_text('\n'.join([*head, *lines, '']))
    return path


def load(path: Path | str, *options: str) -> Config:
    return load_config(base_parser('').parse_args([str(path), *(['--cfg-options', *options] if options else [])]))


@pytest.mark.parametrize(('line', 'parent', 'fix'), [
    ('crop_size = (256, 256)', FLAGSHIP, "Change train_dataloader['dataset']['pipeline'][3]['crop_size'] instead"),
    ('num_classes = 3', FLAGSHIP, "Change model['decode_head']['num_classes'] instead"),
    ("preprocessor['mean'] = [0, 0, 0]", FLAGSHIP, "Change model['data_preprocessor'] instead"),
    ("pretrained.update(checkpoint='a.pth')", STAGE1, "Change model['backbone']['init_cfg'] instead"),
    ('train_pipeline[3].update(crop_size=(64, 64))', FLAGSHIP, "train_dataloader['dataset']['pipeline'] instead"),
    ("train_pipeline = [dict(type='LoadImageFromFile')]", FLAGSHIP, "train_dataloader['dataset']['pipeline'] instead"),
    ("softmax.update(type='my.Softmax')", FLAGSHIP, 'Use softmax in a line below, or delete this line'),
    ('epochs = 3', STAGE2, 'Use epochs in a line below, or delete this line'),
    ('vis_backends.append(dict(type=\'TensorboardVisBackend\'))', STAGE2, "Change visualizer['vis_backends'] instead"),
    # Names that the parent does not have, but that are keys of what is read:
    ("backbone = dict(model['backbone'], attention=softmax)", FLAGSHIP, "Change model['backbone'] instead"),
    ("attention = dict(type='adala_mm.RALAAttention')", STAGE1, "Change model['backbone']['attention'] instead"),
    ("teacher = dict(type='adala_mm.AdaLAViT')", STAGE2, "Change model['teacher'] instead"),
    ("optimizer = dict(type='SGD', lr=1)", STAGE1, "Change optim_wrapper['optimizer'] instead"),
    ("data_root = 'elsewhere'", STAGE1, "Change train_dataloader['dataset']['data_root'] instead"),
    ("norm_cfg = dict(type='BN')", FLAGSHIP, "Change model['neck']['norm_cfg']"),
    ('data_preprocessor = dict(size=(64, 64))', FLAGSHIP, "Change model['data_preprocessor'] instead"),
])
def test_a_line_that_changes_nothing(mine, line, parent, fix):
    name = line.split()[0].split('.')[0].split('[')[0]
    with pytest.raises(ValueError) as info:
        load(write(mine / 'child.py', f'..{parent}', line))
    assert f'mine/child.py, line 6: this change of {name} does nothing' in str(info.value) and fix in str(info.value)


def test_the_old_line_for_an_attention_names_the_new_one(mine):
    path = write(mine / 'child.py', f'..{FLAGSHIP}', "backbone.update(attention=dict(type='adala_mm.RALAAttention'))")
    with pytest.raises(NameError, match="name 'backbone' is not defined"):  # as in mmseg's own tools
        Config.fromfile(path)
    with pytest.raises(ValueError, match=r"mine/child.py, line 6: name 'backbone' is not defined. A finished config "
                                         r"has its network in model\['backbone'\]"):
        load(path)


@pytest.mark.parametrize(('option', 'message'), [
    ('backbone.attention.type=a.B', 'a run does not read backbone. Change model.backbone.attention.type instead'),
    ('crop_size=64', 'a run does not read crop_size. Change train_dataloader.dataset.pipeline.3.crop_size instead'),
    ('data_preprocessor.size=64', 'Change model.data_preprocessor.size instead'),
    ('trian_cfg.max_epochs=1', 'optim_wrapper, param_scheduler, train_cfg, auto_scale_lr'),
    ('model.backbone.out_indices.type=4', 'does not fit the config: list indices must be integers'),
])
def test_an_option_that_changes_nothing(option, message):
    with pytest.raises(ValueError) as info:
        load(ROOT / 'configs/adala/mask2former_dinov2l_ade20k.py', option)
    assert str(info.value).startswith(f'--cfg-options {option.split("=")[0]}') and message in str(info.value)


@pytest.mark.parametrize('lines', [
    ('num_classes = 3', "model['decode_head'].update(num_classes=num_classes)"),  # used
    ('num_classes = 3', "model['decode_head'].update(num_classes=3)"),  # the same value
    ('scale = 2', 'crop_size = (256 * scale, 256)', "train_dataloader['dataset']['pipeline'][3].update(x=crop_size)"),
    ("backbone = model['backbone']", "backbone.update(attention=dict(type='adala_mm.RALAAttention'))"),  # what is read
    ('for loader in (train_dataloader, val_dataloader):', "    dataset = loader['dataset']",
     "    dataset.update(data_root='elsewhere')"),
    ("retained = (5,)", 'attentions = [softmax if i in retained else linear for i in range(24)]',
     "model['backbone']['attention'] = attentions"),
    ("tta_model = dict(type='mmseg.SegTTAModel')", "find_unused_parameters = True", "train_cfg = dict(max_epochs=1)"),
])
def test_lines_that_change_something(mine, lines):
    load(write(mine / 'child.py', f'..{FLAGSHIP}', *lines))


def test_files_between(mine):
    """A name may be changed in one file and used in one that inherits it."""
    write(mine / 'sizes.py', f'..{FLAGSHIP}', 'crop_size = (256, 256)')
    user = write(mine / 'user.py', '.sizes', "train_dataloader['dataset']['pipeline'][3]['crop_size'] = crop_size")
    assert load(user).train_dataloader.dataset.pipeline[3].crop_size == (256, 256)
    other = write(mine / 'other.py', '.sizes', "optim_wrapper['optimizer'].update(lr=1)")
    with pytest.raises(ValueError, match='mine/sizes.py, line 6: this change of crop_size does nothing'):
        load(other)


def test_a_base_of_an_installed_package(tmp_path):
    path = write(tmp_path / 'child.py', f'adala_mm.configs.{FLAGSHIP}', 'crop_size = (256, 256)')
    with pytest.raises(ValueError, match='child.py, line 6: this change of crop_size does nothing'):
        load(path)


def test_older_kind_of_inheritance(mine):
    """``_base_`` merges, and a line that no merge reaches is as inert; a file without a base is left alone."""
    Path('mine/base.py').write_text("norm_cfg = dict(type='BN')\nmodel = dict(neck=dict(norm_cfg=norm_cfg))\n"
                                    "attention = dict(type='a')\n")
    refuse_inert_lines(Config.fromfile('mine/base.py'))
    Path('mine/child.py').write_text("_base_ = ['base.py']\nnorm_cfg = dict(type='GN')\n")
    with pytest.raises(ValueError, match=r"mine/child.py, line 2: .* Change model\['neck'\]\['norm_cfg'\] instead"):
        refuse_inert_lines(Config.fromfile('mine/child.py'))
    Path('mine/child.py').write_text("_base_ = ['base.py']\nmodel = dict(neck=dict(norm_cfg=dict(type='GN')))\n")
    refuse_inert_lines(Config.fromfile('mine/child.py'))


def test_lines_that_repeat_or_note_something(mine):
    """mmseg's habit of saying the type of the data set again, and a note in a name that is a key elsewhere."""
    (mine / 'base.py').write_text("dataset_type = 'ADE20KDataset'\nmodel = dict(head=dict(size=3))\n")
    (mine / 'again.py').write_text("_base_ = './base.py'\ndataset_type = 'ADE20KDataset'\nsize = 512  # pixels\n")
    load(mine / 'again.py')


def test_values_of_the_base_count_as_used(mine):
    (mine / 'base.py').write_text('crop_size = (512, 512)\nmodel = dict(test_cfg=dict(stride=crop_size))\n')
    (mine / 'middle.py').write_text("_base_ = './base.py'\ncrop_size = (768, 768)\n")
    (mine / 'child.py').write_text("_base_ = './middle.py'\nmodel = dict(test_cfg=dict(crop=_base_.crop_size))\n")
    assert load(mine / 'child.py').model.test_cfg.crop == (768, 768)
    with pytest.raises(ValueError, match='middle.py, line 2: this change of crop_size does nothing'):
        load(mine / 'middle.py')


def test_dumped_configs_are_left_alone(mine):
    """A run's own copy of its config has all names, and cannot be wrong about them."""
    cfg = load(write(mine / 'child.py', f'..{FLAGSHIP}', "model['backbone']['attention'] = softmax"), 'model.neck=None')
    cfg.dump('dumped.py')
    load('dumped.py')


@pytest.mark.parametrize('path', OTHERS, ids=lambda path: path.stem)
def test_other_configs(path):
    cfg = Config.fromfile(path)
    refuse_inert_lines(cfg)
    assert 'backbone' not in cfg


def test_the_hook_of_every_run(mine, monkeypatch, request):
    """For tools of others: it reads their command line, and says which attentions the blocks have."""
    assert {'type': 'adala_mm.ConfigCheckHook'} in Config.fromfile(
        ROOT / 'configs/_base_/default_runtime.py').default_hooks.values()
    path = write(mine / 'child.py', f'..{STAGE2}', "model['backbone']['attention'] = [softmax] * 2 + [linear] * 2",
                 "for vit in (model['backbone'], model['teacher']):", '    vit.update(depth=4, embed_dim=32)')
    cfg, lines = Config.fromfile(path), []
    runner = SimpleNamespace(cfg=cfg, model=MODELS.build(cfg.model), logger=SimpleNamespace(info=lines.append))
    ConfigCheckHook().before_run(runner)
    assert lines == ['backbone: 2 of 4 blocks LinearAttention, 2 SoftmaxAttention',
                     'frozen teacher: 4 of 4 blocks SoftmaxAttention']
    line = ['train.py', str(path), '--cfg-options', 'backbone.depth=5', 'model.backbone.depth=4', '--launcher', 'none']
    monkeypatch.setattr(sys, 'argv', line)
    with pytest.raises(ValueError, match='--cfg-options backbone.depth changes nothing'):
        ConfigCheckHook().before_run(runner)
    assert command_line_options(line[1:]) == ['backbone.depth', 'model.backbone.depth']
    assert command_line_options(['--cfg', 'a=b']) == []


def test_names_of_attentions():
    l2vit = MODELS.build(dict(type='adala_mm.L2ViT'))
    assert blocks_by_attention(SimpleNamespace(named_children=lambda: [('backbone', l2vit)])) == {
        'backbone': '6 of 12 blocks WindowAttention, 6 L2ViTAttention'}
    assert blocks_by_attention(l2vit.norms) == {}
