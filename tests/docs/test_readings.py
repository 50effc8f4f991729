"""Options of docs/readings.md do what the page says, and its counts of parameters are those of the configs."""
from __future__ import annotations

import re
import shlex

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from adala_mm.models.attentions.parts import GridTable
from adala_mm.utils.cli import base_parser, load_config
from helpers import ROOT

PAGE = (ROOT / 'docs/readings.md').read_text(encoding='utf-8')
LINES = [shlex.split(line)[2:] for line in PAGE.replace('\\\n', '').splitlines()
         if line.startswith('python tools/train.py configs/') and '/real/' not in line]


def build(cfg: Config) -> nn.Module:
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device('meta'):
        return MODELS.build(cfg.model)


def millions(*modules: nn.Module) -> float:
    return round(sum(p.numel() for module in modules for p in module.parameters()) / 1e6, 3)


def rates(cfg: Config, model: nn.Module) -> dict[str, set[float]]:
    """Learning rates of the parts of a model."""
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    of = {id(p): round(group['lr'], 9) for group in wrapper.optimizer.param_groups for p in group['params']}
    found: dict[str, set[float]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.setdefault(name.split('.')[0], set()).add(of[id(parameter)])
    return found


def tables(model: nn.Module) -> set[tuple[int, ...]]:
    return {tuple(table.weight.shape[1:]) for table in model.modules() if isinstance(table, GridTable)}


# What each line is to bring about, in the order of the page.
EFFECTS = [
    ('stage1_dinov2l_coco', lambda cfg, model: rates(cfg, model), {'backbone': {1e-3}}),
    ('stage2_dinov2l_in22k', lambda cfg, model: rates(cfg, model), {'backbone': {1e-4}}),
    ('mask2former_dinov2l_ade20k', lambda cfg, model: {x for part in rates(cfg, model).values() for x in part}, {1e-4}),
    ('stage2_dinov2l_in22k', lambda cfg, model: cfg.param_scheduler.to_dict(),
     dict(type='PolyLR', power=1.0, end=30, by_epoch=True, convert_to_iter_based=True)),
    ('cls_dinov2l_in1k', lambda cfg, model: model.backbone.out_type, 'avg_featmap'),
    ('cls_siglipl_in1k', lambda cfg, model: (millions(model.backbone, model.neck), rates(cfg, model)),
     (316.743, {'backbone': {1e-5}, 'neck': {1e-5}, 'head': {1e-4}})),
    *(('stage1_in1kl_coco', lambda cfg, model: cfg.model.backbone.init_cfg.checkpoint.removeprefix('timm://'), name)
      for name in ('vit_large_patch16_224.augreg_in21k', 'vit_large_patch16_384.augreg_in21k_ft_in1k')),
    ('mask2former_dinov2l_1024_cityscapes', lambda cfg, model: (model.backbone.pos_grid, millions(model.backbone)),
     ((64, 64), 307.344)),
    ('mask2former_dinov2l_1024_cityscapes', lambda cfg, model: (model.backbone.pos_grid, tables(model.backbone)),
     ((32, 32), {(64, 64)})),
    ('stage1_dinov2l_hedgehog_coco', lambda cfg, model: millions(model.backbone), 305.772),
    ('stage1_dinov2l_coco', lambda cfg, model: {block.attn.feature_map for block in model.backbone.blocks},
     {'efficient'}),
]


@pytest.mark.parametrize(('line', 'effect'), zip(LINES, EFFECTS, strict=True), ids=map(' '.join, LINES))
def test_options_do_what_the_page_says(line, effect, monkeypatch):
    monkeypatch.setattr('mmengine.optim.optimizer.default_constructor.print_log', lambda *args, **kwargs: None)
    config, found, wanted = effect
    assert line[0].endswith(f'/{config}.py')
    plain = Config.fromfile(ROOT / line[0])
    cfg = load_config(base_parser('').parse_args([str(ROOT / line[0]), *line[1:]]))
    assert cfg.to_dict() != plain.to_dict()
    assert found(cfg, build(cfg)) == wanted


def test_colour_jitter_of_the_page(tmp_path):
    code, = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)
    (tmp_path / 'mine.py').write_text(code)
    steps = Config.fromfile(tmp_path / 'mine.py').train_dataloader.dataset.pipeline
    assert [step.type for step in steps] == ['LoadImageFromFile', 'RandomResizedCrop', 'RandomFlip', 'ColorJitter',
                                             'PackInputs']


def test_parameters_at_1024_pixels():
    """Of what is stored, as the page and the paper count them; attentions' tables among it."""
    rows = dict(re.findall(r'^\| (\S+-[LB](?: with Linformer, rank 32)?) \| [\d.]+ \| ([\d.]+) \|', PAGE, re.MULTILINE))
    assert len(rows) == 6
    for row, stored in rows.items():
        vfm, *linformer = row.split(' with ')
        cfg = Config.fromfile(
            ROOT / f'configs/adala/mask2former_{vfm.lower().replace("-", "")}_1024_cityscapes.py').model.backbone
        if linformer:
            cfg.attention = dict(type='adala_mm.LinformerAttention', rank=32)
        with torch.device('meta'):
            assert f'{millions(MODELS.build(cfg)):.3f}' == stored, row
