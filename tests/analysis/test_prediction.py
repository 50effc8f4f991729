"""The tools that draw and score predictions."""
from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from torch import nn

from adala_mm import analysis
from adala_mm.analysis.prediction import class_names
from adala_mm.datasets.beacons import draw_scene
from helpers import LINEAR, tiny_vit
from helpers.analysis import NORM, arguments, pixels, refused


@pytest.fixture(scope='module')
def segmentor(world, tmp_path_factory) -> tuple[Path, Path]:
    """Config and checkpoint of a segmentor whose output depends on the image."""
    folder = tmp_path_factory.mktemp('segmentor')
    cfg = Config.fromfile(world['stage3'])
    cfg.test_pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
    cfg.test_dataloader = dict(dataset=dict(
        type='BaseSegDataset', pipeline=cfg.test_pipeline, metainfo=dict(
            classes=['ground', 'sky', 'water', 'wood'], palette=[[200, 0, 0], [0, 200, 0], [0, 0, 200], [9, 9, 9]])))
    cfg.dump(folder / 'config.py')
    return folder / 'config.py', saved(cfg, folder / 'weights.pth')


def saved(cfg: Config, path: Path) -> Path:
    from adala_mm.export import assemble
    torch.manual_seed(3)
    model = assemble(cfg, 'model').model
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float('norm' in name and 'weight' in name), std=0.3)
    torch.save(dict(state_dict=model.state_dict()), path)
    return path


def test_segment_image(world, segmentor, tool, tmp_path):
    source = world['images'] / '02.png'
    before = source.read_bytes()
    out = tool('segment_image', *segmentor, source, world['images'] / '04.png', '--out', tmp_path)
    data = json.loads((tmp_path / 'segmented.json').read_text())
    args = arguments(config=str(segmentor[0]), checkpoint=str(segmentor[1]))
    model = analysis.load_predictor(args, 'EncoderDecoder')
    image = analysis.normalise([analysis.read_image(str(source), (48, 48))], NORM)
    with torch.no_grad():
        label = model.encode_decode(image, [dict(ori_shape=(48, 48), img_shape=(48, 48))]).argmax(dim=1)
    counts = torch.bincount(label.flatten(), minlength=4) / label.numel()
    names = ['ground', 'sky', 'water', 'wood']
    wanted = {name: pytest.approx(count, abs=1e-6) for name, count in zip(names, counts.tolist(), strict=True) if count}
    assert data['rows'][0]['classes'] == wanted and len(wanted) > 1
    assert '02_segmented.png' in out and source.read_bytes() == before
    assert len(data['rows']) == 2 and re.fullmatch('[0-9a-f]{64}', data['model']['sha256'])
    found = pixels(tmp_path / '02_segmented.png')
    # The legend at the right has the colour of the most frequent class.
    colour = dict(zip(names, [[200, 0, 0], [0, 200, 0], [0, 0, 200], [9, 9, 9]], strict=True))[
        max(data['rows'][0]['classes'], key=data['rows'][0]['classes'].get)]
    assert (found[:, -found.shape[1] // 5:] == colour).all(axis=-1).any()


def test_pictures_replace_nothing(world, segmentor, tool, tmp_path):
    source, words = world['images'] / '02.png', ['segment_image', *segmentor]
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a/x.png').write_bytes(source.read_bytes())
    (tmp_path / 'x.jpg').write_bytes(source.read_bytes())
    assert 'would both become' in refused(tool, *words, tmp_path / 'a/x.png', tmp_path / 'x.jpg', '--out', tmp_path)
    named = tmp_path / 'b_segmented.png'
    named.write_bytes(source.read_bytes())
    (tmp_path / 'b.png').write_bytes(source.read_bytes())
    message = refused(tool, *words, tmp_path / 'b.png', named, '--out', tmp_path, '--overwrite')
    assert 'b_segmented.png is one of the images' in message
    assert 'is there already: say --overwrite' in refused(tool, *words, tmp_path / 'b.png', '--out', tmp_path)
    assert named.read_bytes() == source.read_bytes()
    tool(*words, tmp_path / 'b.png', '--out', tmp_path, '--overwrite')
    assert named.read_bytes() != source.read_bytes()
    assert 'there is no such file or folder' in refused(tool, *words, 'absent.png', '--out', tmp_path / 'c')
    (tmp_path / 'cut.png').write_bytes(source.read_bytes()[:200])
    message = refused(tool, *words, source, tmp_path / 'cut.png', '--out', tmp_path / 'c')
    assert f'cannot read the image {tmp_path}/cut.png' in message and not (tmp_path / 'c').exists()
    stage = refused(tool, 'segment_image', world['stage1'], segmentor[1], source, '--out', tmp_path / 'c')
    assert 'describes a AttentionAlignment, which is no segmentor' in stage
    wrong = refused_with_lines(tool, 'segment_image', segmentor[0], world['near'], source, '--out', tmp_path / 'c')
    assert 'does not fit the model of the config' in wrong
    assert not (tmp_path / 'c').exists()


def refused_with_lines(tool, *words) -> str:
    with pytest.raises(SystemExit) as info:
        tool(*words)
    return str(info.value.code)


def test_classify_image(world, tool, tmp_path):
    cfg = Config(dict(
        default_scope='mmpretrain', model=dict(
            type='ImageClassifier', backbone=tiny_vit(attention=LINEAR, out_type='cls_token'),
            head=dict(type='LinearClsHead', num_classes=7, in_channels=32),
            data_preprocessor=dict(mean=NORM['mean'], std=NORM['std'], to_rgb=True)),
        test_dataloader=dict(dataset=dict(type='CustomDataset', pipeline=[
            dict(type='LoadImageFromFile'), dict(type='Resize', scale=32), dict(type='PackInputs')]))))
    cfg.dump(tmp_path / 'config.py')
    weights = saved(cfg, tmp_path / 'weights.pth')
    names = ['crane'] * 7  # as two classes of ImageNet: nothing may go by name
    state = torch.load(weights) | dict(meta=dict(dataset_meta=dict(classes=names)))
    torch.save(state, weights)
    source = world['images'] / '02.png'
    out = tool('classify_image', tmp_path / 'config.py', weights, source, '--top', 3, '--out', tmp_path / 'out')
    row, = json.loads((tmp_path / 'out/classified.json').read_text())['rows']
    model = analysis.load_predictor(arguments(config=str(tmp_path / 'config.py'), checkpoint=str(weights)),
                                    'ImageClassifier')
    small = cv2.resize(cv2.imread(str(source)), (32, 32), interpolation=cv2.INTER_LINEAR)[..., ::-1]
    with torch.no_grad():
        scores = model(analysis.normalise([small.copy()], NORM), mode='tensor')[0].softmax(-1)
    top = scores.topk(3)
    assert row['classes'] == [dict(index=i, name=names[i], probability=pytest.approx(v, rel=1e-4)) for i, v in
                              zip(top.indices.tolist(), top.values.tolist(), strict=True)]
    assert f'{top.values[0]:.1%}' in out
    pixels(tmp_path / 'out/02_classified.png')
    assert 'which is no classifier' in refused(tool, 'classify_image', world['stage3'], weights, source,
                                               '--out', tmp_path / 'other')


def test_class_names_without_any_are_numbers(world, tmp_path):
    cfg = Config.fromfile(world['stage3'])
    cfg.test_dataloader = dict(dataset=dict(type='BaseSegDataset', pipeline=[]))
    cfg.dump(tmp_path / 'config.py')
    args = arguments(config=str(tmp_path / 'config.py'), checkpoint=str(saved(cfg, tmp_path / 'weights.pth')))
    meta = analysis.load_predictor(args, 'EncoderDecoder').dataset_meta
    assert meta['classes'] == ['0', '1', '2', '3'] and len({tuple(colour) for colour in meta['palette']}) == 4


@pytest.mark.parametrize(('scope', 'kind', 'count', 'first'), [
    ('mmpretrain', 'CIFAR10', 10, 'airplane'), ('mmseg', 'CityscapesDataset', 19, 'road'),
    ('mmseg', 'adala_mm.BeaconsDataset', 6, 'ground'), ('mmseg', 'CityscapesDataset', 3, '0')])
def test_class_names_of_the_data_set(scope, kind, count, first, tmp_path):
    torch.save(dict(state_dict={}), tmp_path / 'weights.pth')
    cfg = Config(dict(default_scope=scope, test_dataloader=dict(dataset=dict(type=kind))))
    meta = class_names(cfg, str(tmp_path / 'weights.pth'), count)
    assert meta['classes'][0] == first and len(meta['classes']) == len(meta['palette']) == count
    torch.save(dict(meta=dict(dataset_meta=dict(classes=['x'] * count))), tmp_path / 'weights.pth')
    assert class_names(cfg, str(tmp_path / 'weights.pth'), count)['classes'] == ['x'] * count  # what was trained


@pytest.fixture(scope='module')
def scored(world, segmentor, tmp_path_factory) -> tuple[Path, Path]:
    """Config with four labelled images of 40 x 56 pixels for that segmentor, and its checkpoint."""
    folder = tmp_path_factory.mktemp('scored')
    (folder / 'images').mkdir()
    for i in range(4):
        image, label = draw_scene(np.random.default_rng(i), 64)
        Image.fromarray(image[:40, :56]).save(folder / f'images/{i}.png')
        Image.fromarray(label[:40, :56] % 4).save(folder / f'images/{i}_label.png')
    (folder / 'list.txt').write_text('0\n1\n2\n3\n')
    cfg = Config.fromfile(segmentor[0])
    pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(99, 7), keep_ratio=True),
                dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
    cfg.test_dataloader = dict(num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=dict(
        cfg.test_dataloader.dataset, data_root=str(folder), ann_file='list.txt', img_suffix='.png',
        seg_map_suffix='_label.png', data_prefix=dict(img_path='images', seg_map_path='images'), pipeline=pipeline))
    cfg.test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
    cfg.model.test_cfg = dict(mode='slide', crop_size=(16, 16), stride=(16, 16))
    cfg.dump(folder / 'config.py')
    return folder / 'config.py', segmentor[1]


def test_evaluate_segmentation(scored, tool, tmp_path):
    config, checkpoint = scored
    words = ['evaluate_segmentation', f'one={config}:{checkpoint}', f'two={config}:{checkpoint}']
    out = tool(*words, '--sizes', 80, 40, '--num-images', 2, '--out', tmp_path)
    data = json.loads((tmp_path / 'segmentation.json').read_text())
    assert [(row['name'], row['size'], row['num_images'], row['softmax_blocks']) for row in data['rows']] == [
        ('one', 40, 2, 0), ('two', 40, 2, 0), ('one', 80, 2, 0), ('two', 80, 2, 0)]
    model = analysis.load_predictor(arguments(config=str(config), checkpoint=str(checkpoint)), 'EncoderDecoder')
    for row in data['rows']:
        matrix, scale = torch.zeros(4, 4), row['size'] // 40
        for number in (0, 3):  # spread evenly
            image = np.asarray(Image.open(config.parent / f'images/{number}.png'))
            image = cv2.resize(image, (56 * scale, 40 * scale), interpolation=cv2.INTER_LINEAR)
            batch = analysis.normalise([image], NORM)
            with torch.no_grad():
                logits = nn.functional.interpolate(model.encode_decode(batch, [dict(
                    ori_shape=image.shape[:2], img_shape=image.shape[:2])]), (40, 56), mode='bilinear')
            label = torch.tensor(np.asarray(Image.open(config.parent / f'images/{number}_label.png')).copy()).long()
            matrix += torch.bincount(4 * label.flatten() + logits.argmax(1).flatten(), minlength=16).reshape(4, 4)
        iou = matrix.diag() / (matrix.sum(0) + matrix.sum(1) - matrix.diag())
        assert row['miou'] == pytest.approx(100 * iou[~iou.isnan()].mean().item(), abs=0.02)
        assert row['accuracy'] == pytest.approx(100 * (matrix.diag().sum() / matrix.sum()).item(), abs=0.02)
        assert row['ms'] > 0
    assert data['rows'][0]['miou'] != data['rows'][2]['miou']
    assert [model['name'] for model in data['models']] == ['one', 'two'] and data['models'][0]['sha256']
    assert '| 80 | two | 0 / 2 |' in out
    pixels(tmp_path / 'segmentation.png')


def test_what_evaluate_segmentation_refuses(world, scored, tool, tmp_path):
    config, checkpoint = scored
    words = ['evaluate_segmentation', '--out', tmp_path / 'out']
    assert 'say CONFIG:CHECKPOINT' in refused(tool, *words, config)
    assert 'called config weights: give them names' in refused(tool, *words, *[f'{config}:{checkpoint}'] * 2)
    assert 'describes a AttentionAlignment' in refused(tool, *words, f'{world["stage1"]}:{checkpoint}')
    for change, message in (
            (dict(type='LoadImageFromNDArray'), 'begins with LoadImageFromNDArray, not LoadImageFromFile'),
            (None, 'test_evaluator gives aAcc, mDice, mAcc, and no mIoU')):
        cfg = Config.fromfile(config)
        if change:
            cfg.test_dataloader.dataset.pipeline[0] = change
        else:
            cfg.test_evaluator.iou_metrics = ['mDice']
        cfg.dump(tmp_path / 'other.py')
        assert message in refused(tool, *words, f'{tmp_path / "other.py"}:{checkpoint}', '--sizes', 40)
    assert not (tmp_path / 'out').exists()
