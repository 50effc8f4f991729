"""Runs of the demo's configs that are struck and resumed, and how two runs are compared."""
from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Iterable
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from adala_mm.utils.checkpoint import load_checkpoint
from helpers import LINEAR, ROOT, saboteur, tiny_vit  # noqa: F401  the hooks of saboteur
from helpers.processes import fresh_process

BATCH, STEPS = 2, 15  # three epochs of five batches; a checkpoint after each


def train(cfg: Config, work_dir: Path, resume: bool = False, harm: dict | None = None) -> None:
    with fresh_process():
        cfg = cfg.copy()
        cfg.work_dir, cfg.resume, cfg.experiment_name = str(work_dir), resume, f'{work_dir.parent.name}{work_dir.name}'
        cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='Diary')]
        if harm:
            cfg.custom_hooks.append(dict(type='Saboteur', **harm))
        init_default_scope(cfg.default_scope)
        Runner.from_cfg(cfg).train()


def diary(work_dir: Path) -> dict[int, list]:
    """The last word on each step: a step after the last checkpoint is done twice."""
    lines = map(json.loads, (work_dir / 'diary.jsonl').read_text().splitlines())
    return {step: rest for step, *rest in lines}


def assert_same_run(whole: Path, pieces: Path, final: str, unwritten: Iterable[int] = ()) -> None:
    one, two = (load_checkpoint(run / final) for run in (whole, pieces))
    assert one['state_dict'].keys() == two['state_dict'].keys()
    for key, value in one['state_dict'].items():
        assert torch.equal(value, two['state_dict'][key]), key
    steps = diary(whole)
    assert list(steps) == list(range(STEPS))
    assert diary(pieces) == {step: rest for step, rest in steps.items() if step not in unwritten}
    assert one['meta']['iter'] == two['meta']['iter'] == STEPS
    for mine, other in zip(one['optimizer']['state'].values(), two['optimizer']['state'].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(other[key])) for key in mine)
    assert one['param_schedulers'] == two['param_schedulers']


def config(name: str, scenes: Path, init_cfg: dict, by_epoch: bool, workers: int = 0) -> Config:
    """A config of the demo on a tiny ViT, with random flips and drop path, saving and validating within the run."""
    cfg = Config.fromfile(ROOT / f'configs/demo/{name}_demo_beacons.py')
    cfg.train_dataloader.update(
        batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0,
        sampler=dict(type='DefaultSampler' if by_epoch else 'InfiniteSampler', shuffle=True))
    cfg.val_dataloader.update(batch_size=2)
    vit = tiny_vit(attention=LINEAR, drop_path_rate=0.3, init_cfg=init_cfg)
    if name == 'mask2former':
        for loader, split in ((cfg.train_dataloader, 'train'), (cfg.val_dataloader, 'val')):
            loader.dataset = dict(
                type='BaseSegDataset', data_root=str(scenes), img_suffix='.png', pipeline=loader.dataset.pipeline,
                data_prefix=dict(img_path=f'images/{split}', seg_map_path=f'labels/{split}'),
                metainfo=dict(classes=list('abcdef'), palette=[[i] * 3 for i in range(6)]))
        cfg.model.backbone = dict(vit, out_indices=[-1] * 4)
        cfg.model.data_preprocessor.size = (32, 32)
        cfg.model.neck.embed_dim = 32
        head = cfg.model.decode_head
        head.update(in_channels=[32] * 4, num_queries=5)
        head.pixel_decoder.encoder.num_layers = head.transformer_decoder.num_layers = 1
    else:
        cfg.model.backbone = vit
        cfg.train_dataloader.dataset.pipeline[1:-1] = [
            dict(type='mmpretrain.RandomFlip', prob=0.5, direction='horizontal'),
            dict(type='mmpretrain.ColorJitter', brightness=0.5)]
        for loader in (cfg.train_dataloader, cfg.val_dataloader):
            loader.dataset.data_root = str(scenes)
    if name == 'stage2':
        cfg.model.teacher = tiny_vit(init_cfg=init_cfg)
    for key, value in (('by_epoch', by_epoch), ('interval', 1 if by_epoch else 5), ('save_last', False)):
        cfg.default_hooks.checkpoint[key] = value
    cfg.default_hooks.checkpoint.max_keep_ckpts = 2
    if by_epoch:
        cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=3, val_interval=1)
        cfg.param_scheduler = [dict(type='LinearLR', start_factor=0.1, end=2, by_epoch=True)]
        cfg.log_processor = dict(by_epoch=True)
    else:
        cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=STEPS, val_interval=5)
        cfg.param_scheduler = [dict(type='PolyLR', power=0.9, end=STEPS, by_epoch=False)]
    return cfg


def last(by_epoch: bool) -> str:
    return 'epoch_3.pth' if by_epoch else 'iter_15.pth'


def averaged(cfg: Config) -> None:
    cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='EMAHook', momentum=0.2)]


def accumulated(cfg: Config) -> None:
    cfg.optim_wrapper.accumulative_counts = 3  # of 5 iterations of an epoch


def mixed_precision(cfg: Config) -> None:
    cfg.optim_wrapper.update(type='adala_mm.CPUAmpOptimWrapper', dtype='float16',
                             loss_scale=dict(init_scale=2.0 ** 10, growth_interval=4))


def checkpointed(cfg: Config) -> None:
    cfg.model.backbone.with_cp = True


def progressive(cfg: Config) -> None:
    cfg.custom_hooks = [*cfg.get('custom_hooks', []),
                        dict(type='adala_mm.ProgressiveResolutionHook', sizes={0: 16, 1: 32})]


def stopped_early(cfg: Config) -> None:
    """After two epochs: only the validation before training counts as better than what came before it."""
    cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(
        type='adala_mm.StopOnPlateauHook', monitor={'align/rel_error': 'less'}, patience=2, min_delta=0.99)]


def redrawn(cfg: Config) -> None:
    cfg.model.backbone.attention = dict(type='adala_mm.PerformerAttention', redraw_interval=4)


def corrupt_skipped(cfg: Config) -> None:
    """Two of ten files are empty, to a data set that passes over them."""
    dataset = cfg.train_dataloader.dataset
    dataset.update(type='adala_mm.ImageFiles', data_root=f'{dataset.data_root}_corrupt')
    dataset.pop('with_label', None)


def best_kept(cfg: Config) -> None:
    """Written after validation, and the checkpoint before it once more."""
    cfg.default_hooks.checkpoint.update(save_best='align/rel_error', rule='less')


FEATURES = {
    'best weights kept': best_kept,
    'averaged weights': averaged, 'accumulation': accumulated, 'mixed precision': mixed_precision,
    'activation checkpointing': checkpointed, 'progressive resolution': progressive, 'early stopping': stopped_early,
    'redrawn features': redrawn, 'corrupt images': corrupt_skipped}
CELLS = {  # of a run of epochs, which saves after 5, 10, 15 iterations and validates then
    ('SIGKILL', 'training'): dict(what='kill', when='step', at=7),
    ('SIGKILL', 'validation'): dict(what='kill', when='validation', at=10),
    ('SIGKILL', 'saving'): dict(what='kill', when='half', at=11),
    ('SIGTERM', 'training'): dict(what='terminate', when='step', at=6),
    ('SIGTERM', 'the last step of an epoch'): dict(what='terminate', when='batch', at=4),
    ('SIGTERM', 'validation'): dict(what='terminate', when='validation', at=5),
    ('SIGTERM', 'saving'): dict(what='terminate', when='written', at=6)}


def strike_and_resume(cfg: Config, work_dir: Path, harm: dict) -> None:
    """In a child, which has everything imported: the signals are real."""
    child = multiprocessing.get_context('fork').Process(target=train, args=(cfg, work_dir), kwargs=dict(harm=harm))
    child.start()
    child.join(600)
    assert child.exitcode == (-signal.SIGKILL if harm['what'] == 'kill' else 128 + signal.SIGTERM)
    train(cfg, work_dir, resume=True)


def with_features(names: Iterable[str], scenes: Path, init_cfg: dict) -> Config:
    cfg = config('stage2', scenes, init_cfg, by_epoch=True)
    for name in names:
        FEATURES[name](cfg)
    return cfg


def assert_same_end(whole: Path, pieces: Path) -> None:
    """All that the last checkpoint has, and all that the steps saw."""
    final = sorted(path.name for path in whole.glob('epoch_*.pth'))
    assert sorted(path.name for path in pieces.glob('epoch_*.pth')) == final
    assert not (pieces / 'preempted.pth').exists()
    one, two = (load_checkpoint(run / final[-1]) for run in (whole, pieces))
    for key in sorted(one.keys() - {'message_hub', 'meta'}):
        assert_equal(one[key], two[key], key)
    assert one.keys() == two.keys() and diary(pieces) == diary(whole)
    stops = [run['message_hub']['runtime_info'].get('early_stopping') for run in (one, two)]
    assert stops[0] == stops[1] and one['meta']['iter'] == two['meta']['iter']


def assert_equal(one: object, two: object, place: str) -> None:
    if isinstance(one, dict):
        assert one.keys() == two.keys(), place
        for key in one:
            assert_equal(one[key], two[key], f'{place}.{key}')
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two), place
    else:
        assert one == two, place
