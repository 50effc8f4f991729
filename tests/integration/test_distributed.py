"""Several processes on the CPU do what one does with the same total batch, in every stage."""
from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config

from adala_mm.engine import ShardedRunner
from adala_mm.registry import MODELS
from adala_mm.utils.checkpoint import load_checkpoint
from adala_mm.utils.cli import join_cpu_processes, leave_processes
from adala_mm.utils.records import curve
from helpers import LINEAR, ROOT, tiny_vit
from helpers.distributed import furnished, ranks, run_in_processes
from helpers.processes import gloo_threads, wait_for

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='compares runs on the CPU')
STEPS = 4
BATCH = 4  # of all processes together, in one step of the optimizer


def tiny_config(place: Path, stage: str, init_cfg: dict) -> Path:
    """The demo's config of a stage, on a tiny ViT, in a fixed order of images, and free of chance."""
    cfg = Config.fromfile(ROOT / f'configs/demo/{stage}_demo_beacons.py')
    for loader, split in ((cfg.train_dataloader, 'train'), (cfg.val_dataloader, 'val')):
        loader.sampler = dict(type='DefaultSampler', shuffle=False)
        loader.batch_size = 2
        if stage == 'mask2former':
            loader.dataset = dict(
                type='BaseSegDataset', data_root=str(place / 'data/beacons'), seg_map_suffix='.png', img_suffix='.png',
                data_prefix=dict(img_path=f'images/{split}', seg_map_path=f'labels/{split}'),
                metainfo=dict(classes=tuple('abcdef')),
                pipeline=[dict(type=kind) for kind in ('LoadImageFromFile', 'LoadAnnotations', 'PackSegInputs')])
        else:
            loader.dataset.update(data_root=str(place / 'data/beacons'), data_prefix=f'images/{split}', pipeline=[
                dict(type='LoadImageFromFile'), dict(type='mmpretrain.PackInputs')])
    cfg.model.backbone = tiny_vit(attention=LINEAR, init_cfg=init_cfg)
    if stage == 'stage2':
        cfg.model.teacher = tiny_vit(init_cfg=init_cfg)
    if stage == 'mask2former':
        cfg.custom_imports = dict(imports=['points'])
        cfg.model.backbone.out_indices = [-1] * 4
        cfg.model.data_preprocessor.size = (32, 32)
        cfg.model.neck.embed_dim = 32
        head = cfg.model.decode_head
        head.update(in_channels=[32] * 4, feat_channels=32, out_channels=32, num_queries=8)
        head.train_cfg.num_points = 256
        for holder in (head, head.pixel_decoder):
            holder.positional_encoding.num_feats = 16
        head.pixel_decoder.encoder.num_layers = 1
        for layer in (*head.pixel_decoder.encoder.layer_cfg.values(),
                      *head.transformer_decoder.layer_cfg.values()):
            layer.embed_dims = 32
            if 'feedforward_channels' in layer:
                layer.feedforward_channels = 64
    # AdamW would magnify rounding in gradients that are next to nothing. The rate is scaled to 0.1 for BATCH images.
    cfg.optim_wrapper.optimizer = dict(type='SGD', lr=0.2, momentum=0.9)
    cfg.auto_scale_lr.base_batch_size = 2 * BATCH
    cfg.param_scheduler = None
    cfg.train_cfg.update(max_iters=STEPS, val_interval=STEPS)
    cfg.default_hooks.checkpoint.interval = STEPS
    cfg.default_hooks.logger.interval = 1
    cfg.custom_hooks.append(dict(type='diary.Diary'))
    path = place / f'tiny_{stage}.py'
    cfg.dump(str(path))
    return path


@pytest.fixture(scope='module')
def pretrained(pretrained, tmp_path_factory) -> dict:
    """The shared checkpoint with LayerNorm weights around 1: around 0 there is little to align."""
    state = torch.load(pretrained['checkpoint'])
    path = tmp_path_factory.mktemp('weights') / 'sharp_softmax.pth'
    torch.save({key: value + 1 if 'norm' in key and 'weight' in key else value for key, value in state.items()}, path)
    return pretrained | dict(checkpoint=str(path))


def join_and_leave(environment: dict) -> None:
    os.environ.update(environment)
    join_cpu_processes(Config(dict(launcher='pytorch')))
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
    model.holder = [model]  # like runners, which are full of cycles
    assert gloo_threads()
    held, destroy = weakref.ref(model), torch.distributed.destroy_process_group
    del model

    def last() -> None:
        assert held() is None  # else it would be the model that destroys the group, under Python's lock
        destroy()

    torch.distributed.destroy_process_group = last
    leave_processes()
    assert not gloo_threads()


def test_no_thread_is_left_to_meet_the_end_of_the_interpreter():
    process = multiprocessing.get_context('fork').Process(target=join_and_leave, args=ranks(1))
    process.start()
    assert wait_for(process) == [0]


def train(place: Path, run: Path, count: int, config: Path, *words: str) -> str:
    """`tools/train.py` in ``count`` processes; what rank 0 prints."""
    launch = ['--launcher', 'pytorch'] if count > 1 else []
    return run_in_processes('tools/train.py', str(config), '--work-dir', str(run), *launch, *words, place=place,
                            name=run.name, environments=ranks(count))


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    return furnished(tmp_path_factory.mktemp('distributed'))


def distance(got: dict, wanted: dict, start: dict) -> float:
    """How far two results are apart, as a share of how far training has moved the second."""
    assert got.keys() == wanted.keys()
    apart, moved = (torch.cat([(some[key] - other[key]).flatten() for key in wanted])
                    for some, other in ((got, wanted), (start, wanted)))
    assert moved.norm() > 0.05
    return float(apart.norm() / moved.norm())


# Processes, images for each in an iteration, iterations to a step of the optimizer.
SHAPES = dict(two=(2, 2, 1), four=(4, 1, 1), accumulated=(1, 2, 2), two_accumulated=(2, 1, 2))


@pytest.mark.parametrize('stage', ['stage1', 'stage2', 'mask2former'])
def test_processes_and_accumulation_equal_one_process(place, pretrained, stage):
    config = tiny_config(place, stage, pretrained)

    def run(name: str, processes: int, batch: int, accumulated: int, *options: str) -> tuple[Path, list, str]:
        folder, iterations = place / f'{stage}_{name}', STEPS * accumulated
        # One iteration has as many images as the rate is meant for, or half of them.
        scaling = ['--auto-scale-lr'] if accumulated == 1 else ['--cfg-options', 'optim_wrapper.optimizer.lr=0.1']
        log = train(place, folder, processes, config, *scaling, '--cfg-options', *options,
                    f'train_dataloader.batch_size={batch}', f'optim_wrapper.accumulative_counts={accumulated}',
                    f'train_cfg.max_iters={iterations}', f'train_cfg.val_interval={iterations}',
                    f'default_hooks.checkpoint.interval={iterations}')
        diary = json.loads((folder / 'diary.json').read_text())
        assert len(set(diary['weights'])) == 1  # processes agree to the last bit
        assert [[len(part) for part in step['images']] for step in diary['steps']] == [[batch] * processes] * iterations
        if accumulated > 1 and processes > 1:  # no_sync: they do not exchange gradients that no step uses yet
            assert all(len(set(step['waiting'])) == processes for step in diary['steps'][::accumulated])
        steps = [diary['steps'][i:i + accumulated] for i in range(0, iterations, accumulated)]
        return folder, [dict(loss=np.mean([part['loss'] for part in step]),
                             images=sorted(sum((images for part in step for images in part['images']), [])))
                        for step in steps], log

    def state(folder: Path, accumulated: int = 1) -> dict:
        return load_checkpoint(folder / f'iter_{STEPS * accumulated}.pth')['state_dict']

    one, alone, _ = run('one', 1, BATCH, 1)
    start = load_checkpoint(one / 'start.pth')
    if stage != 'mask2former':
        assert start.keys() == {f'backbone.{key}' for key in torch.load(pretrained['checkpoint'])}
        assert alone[-1]['loss'] < 0.95 * alone[0]['loss']  # twelve images are three steps, then they come round
    scores = ['mIoU', 'mAcc'] if stage == 'mask2former' else ['align/rel_error', 'align/cosine']
    for name, (processes, batch, accumulated) in SHAPES.items():
        # What is not kept for the backward pass is computed again: that changes nothing either.
        options = ['model.backbone.with_cp=True'] if name == 'four' and stage != 'stage1' else []
        folder, steps, log = run(name, processes, batch, accumulated, *options)
        assert ('MMDistributedDataParallel' in log) == (processes > 1)
        assert '\n0 threads of gloo are left\n' in log
        if accumulated == 1:
            assert 'LR is set based on batch size of 8 and the current batch size is 4. Scaling the original LR by ' \
                   '0.5' in log
        rate = 0.01 if stage == 'mask2former' else 0.1  # of the first group, which is the backbone's
        assert curve(folder, 'lr')[1] == pytest.approx([rate] * STEPS * accumulated)
        for got, wanted in zip(steps, alone, strict=True):
            assert got['images'] == wanted['images'], name
            assert got['loss'] == pytest.approx(wanted['loss'], rel=1e-4), name
        begin = load_checkpoint(folder / 'start.pth')
        assert all(torch.equal(begin[key], value) for key, value in start.items()), name
        assert distance(state(folder, accumulated), state(one), start) < 1e-3, name
        for key in scores:  # over all five images, none counted twice
            assert curve(folder, key)[1] == pytest.approx(curve(one, key)[1], rel=1e-4), (name, key)


def fsdp_config(place: Path) -> Path:
    """The recipe with FSDP on a tiny ViT and the dozen images, two epochs of three steps."""
    cfg = Config.fromfile(ROOT / 'configs/adala/stage2_dinov2l_fsdp_in22k.py')
    assert cfg.runner_type == 'adala_mm.ShardedRunner' and cfg.model.backbone.with_cp
    for role in ('backbone', 'teacher'):
        cfg.model[role].update(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)
    torch.manual_seed(2)
    start = MODELS.build(cfg.model.teacher.to_dict() | dict(init_cfg=None))
    for name, parameter in start.named_parameters():
        torch.nn.init.normal_(parameter, mean=float('norm' in name and 'weight' in name), std=0.2)
    torch.save(start.state_dict(), place / 'fsdp_start.pth')
    for role in ('backbone', 'teacher'):
        cfg.model[role].init_cfg = dict(type='Pretrained', checkpoint=str(place / 'fsdp_start.pth'))
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False, batch_size=2)
    cfg.train_dataloader.dataset.update(
        data_root=str(place / 'data/beacons/images/train'),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='mmpretrain.PackInputs')])
    heldout = Config.fromfile(ROOT / 'configs/_base_/datasets/beacons_images.py')
    cfg.val_dataloader, cfg.val_evaluator, cfg.val_cfg = heldout.val_dataloader, heldout.val_evaluator, heldout.val_cfg
    cfg.val_dataloader.batch_size = 2
    cfg.val_dataloader.dataset.data_root = str(place / 'data/beacons')
    cfg.train_cfg.max_epochs = cfg.param_scheduler.end = 2
    cfg.optim_wrapper.update(clip_grad=dict(max_norm=1.0))
    cfg.default_hooks.logger.interval = 1
    cfg.default_hooks.checkpoint.update(save_best='align/rel_error', rule='less')
    cfg.custom_hooks = [dict(type='diary.Shares')]
    path = place / 'tiny_fsdp.py'
    cfg.dump(str(path))
    return path


def test_sharded_student_equals_whole_one(place):
    config = fsdp_config(place)
    whole, sharded, resumed, unsharded = (place / f'fsdp_{name}' for name in ('whole', 'two', 'resumed', 'unsharded'))
    train(place, whole, 1, config, '--cfg-options', 'runner_type=Runner', 'train_dataloader.batch_size=4')
    train(place, sharded, 2, config)
    # Each process holds half of the student and of AdamW's moments, and the whole teacher.
    start = load_checkpoint(place / 'fsdp_start.pth')
    total = sum(value.numel() for value in start.values())
    shares = json.loads((sharded / 'shares.json').read_text())
    assert [sum(part) for part in zip(*shares, strict=True)] == [total, total, 2 * total]
    assert all(abs(held - total / 2) < 0.05 * total for share in shares for held in share[:2])

    wanted, got = (load_checkpoint(run / 'epoch_2.pth') for run in (whole, sharded))
    assert_ordinary(got, wanted)
    for key in ('loss', 'grad_norm'):  # of all images, and of all shards
        assert curve(sharded, key)[1] == pytest.approx(curve(whole, key)[1], rel=1e-3)
        assert len(curve(sharded, key)[1]) == 6
    assert curve(sharded, 'align/rel_error')[1] == pytest.approx(curve(whole, 'align/rel_error')[1], rel=1e-4)
    assert len(curve(sharded, 'align/rel_error')[1]) == 2
    start = {f'backbone.{key}': value for key, value in start.items()}
    assert distance(got['state_dict'], wanted['state_dict'], start) < 1e-3

    (best,) = sharded.glob('best_*.pth')  # written after a validation, when some weights are still put together
    then = load_checkpoint(sharded / best.name.removeprefix('best_align_rel_error_'))['state_dict']
    assert all(torch.equal(load_checkpoint(best)['state_dict'][key], value) for key, value in then.items())

    # The checkpoint of the first epoch is taken up by as many processes, and by one that shards nothing.
    for run in (resumed, unsharded):
        run.mkdir()
        shutil.copy(sharded / 'epoch_1.pth', run)
    train(place, resumed, 2, config, '--resume')
    train(place, unsharded, 1, config, '--resume', '--cfg-options', 'runner_type=Runner',
          'train_dataloader.batch_size=4')
    again, other = (load_checkpoint(run / 'epoch_2.pth') for run in (resumed, unsharded))
    assert all(torch.equal(again['state_dict'][key], value) for key, value in got['state_dict'].items())
    assert_ordinary(other, wanted)
    assert distance(other['state_dict'], wanted['state_dict'], start) < 1e-3

    # Stage 3 starts from it like from any other.
    vit = MODELS.build(Config.fromfile(config).model.backbone.to_dict() | dict(
        init_cfg=dict(type='Pretrained', checkpoint=str(sharded / 'epoch_2.pth'))))
    vit.init_weights()
    assert torch.equal(vit.blocks[1].mlp.fc1.weight, got['state_dict']['backbone.blocks.1.mlp.fc1.weight'])


def assert_ordinary(got: dict, wanted: dict) -> None:
    """A checkpoint looks like that of a run that shards nothing: keys, whole tensors, moments of the optimizer."""
    def shape(node):
        if isinstance(node, dict):
            return {key: shape(value) for key, value in node.items()}
        return (type(node), tuple(node.shape), node.dtype) if isinstance(node, torch.Tensor) else type(node)

    for part in ('state_dict', 'optimizer'):
        assert shape(got[part]) == shape(wanted[part])
    for i, moments in wanted['optimizer']['state'].items():
        for key, value in moments.items():
            assert (got['optimizer']['state'][i][key] - value).norm() <= 1e-3 * value.norm() + 1e-8, (i, key)


@pytest.mark.parametrize(('config', 'distributed', 'message'), [
    (dict(), False, 'start it with tools/dist_train.sh'),
    (dict(type='adala_mm.AttentionAlignment', backbone=tiny_vit(attention=LINEAR)), True, 'cannot run stage 1'),
    (dict(type='mmpretrain.ImageClassifier', backbone=dict(type='mmpretrain.ResNet', depth=18)), True,
     'shards model.backbone.blocks, which ImageClassifier lacks'),
], ids=['alone', 'stage1', 'no_blocks'])
def test_what_cannot_be_sharded_is_named(config, distributed, message):
    model = MODELS.build(config or dict(type='adala_mm.FeatureAlignment', backbone=tiny_vit(), teacher=tiny_vit()))
    with pytest.raises(ValueError, match=message):
        ShardedRunner.wrap_model(SimpleNamespace(distributed=distributed), None, model)
