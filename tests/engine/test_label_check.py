"""The check of labels stops a run before a wrong label reaches the loss, and says which file holds it."""
from __future__ import annotations

import contextlib
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.model import MMDistributedDataParallel, is_model_wrapper
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmpretrain.structures import DataSample
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.structures import SegDataSample
from PIL import Image

from adala_mm.engine import LabelCheckHook
from helpers import ROOT, tiny_vit
from helpers.segmentors import CLASSES, build

CLASSIFIER = {
    'type': 'mmpretrain.ImageClassifier', 'backbone': tiny_vit(out_type='cls_token'),
    'head': {'type': 'mmpretrain.LinearClsHead', 'in_channels': 32, 'num_classes': CLASSES}}


@pytest.fixture(scope='module')
def classifier():
    return build(CLASSIFIER)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def scene(*values: int, path: str = 'labels/a.png') -> SegDataSample:
    """A label map of zeros that holds ``values`` too."""
    label = torch.zeros(1, 8, 8, dtype=torch.long)
    label.view(-1)[3:3 + len(values)] = torch.tensor(values)
    return SegDataSample(gt_sem_seg=PixelData(data=label), metainfo={'img_path': path})


def photograph(*labels: int, path: str = 'images/a.jpg') -> DataSample:
    return DataSample(metainfo={'img_path': path}).set_gt_label(torch.tensor(labels))


def check(model, *samples, moment='before_train_iter', **batch) -> None:
    hook = MMENGINE_HOOKS.build({'type': 'adala_mm.LabelCheckHook'})
    assert isinstance(hook, LabelCheckHook)
    batch = {'inputs': torch.zeros(max(len(samples), 1), 3, 8, 8), 'data_samples': list(samples), **batch}
    getattr(hook, moment)(SimpleNamespace(model=model), batch_idx=0, data_batch=batch)


@pytest.mark.parametrize('values', [(), (0, 1, 2, 3, 4), (4, 255), (255,) * 61])
def test_segmentation_labels_of_the_head_pass(segmentor, values):
    check(segmentor, scene(*values), scene())


@pytest.mark.parametrize('wrong', [CLASSES, CLASSES + 1, 254, 256, -1])
def test_segmentation_label_outside_the_head_names_its_file(segmentor, wrong):
    with pytest.raises(ValueError) as info:
        check(segmentor, scene(1, 255, path='fine.png'), scene(2, 255, wrong, path='wrong.png'))
    message = str(info.value)
    assert 'wrong.png' in message and 'fine.png' not in message
    assert f'label {wrong},' in message and f'num_classes={CLASSES}' in message and 'reduce_zero_label' in message


def test_ignored_label_is_the_head_s(segmentor, monkeypatch):
    monkeypatch.setattr(segmentor.decode_head, 'ignore_index', 100)
    check(segmentor, scene(100))
    with pytest.raises(ValueError, match='label 255'):
        check(segmentor, scene(255))


def test_uint8_labels(segmentor):
    sample = scene(4, 255)
    sample.gt_sem_seg.data = sample.gt_sem_seg.data.byte()
    check(segmentor, sample)
    sample.gt_sem_seg.data[0, 0, 0] = 77
    with pytest.raises(ValueError, match='label 77'):
        check(segmentor, sample)


def read_by_mmseg(path, array: np.ndarray, **options) -> SegDataSample:
    """A sample of a label file that Pillow has written, through mmseg's own steps."""
    Image.fromarray(array).save(path)
    with DefaultScope.overwrite_default_scope('mmseg'):
        steps = Compose([{'type': 'LoadAnnotations', **options}, {'type': 'PackSegInputs'}])
    return steps({'img_path': 'a.jpg', 'seg_map_path': str(path), 'seg_fields': [], 'reduce_zero_label': False,
                  'label_map': None})['data_samples']


@pytest.mark.parametrize('value', [300, 256, 1024, 26001, 65534])
def test_ids_that_wrap_to_classes_are_told_as_written(segmentor, value, tmp_path):
    sample = read_by_mmseg(tmp_path / 'wide.png', np.array([[0, 1], [2, value]], np.uint16))
    with pytest.raises(ValueError, match=rf'wide.png holds the label {value}, but label maps are read as 8 bits'):
        check(segmentor, sample)
    with pytest.raises(ValueError, match=f'label {value}'):  # in validation it would just lower the score
        check(segmentor, sample, moment='before_val_iter')


def test_no_class_in_16_bits(segmentor, tmp_path):
    sample = read_by_mmseg(tmp_path / 'wide.png', np.array([[0, 4], [255, 65535]], np.uint16))
    assert sample.gt_sem_seg.data.flatten().tolist() == [0, 4, 255, 255]
    check(segmentor, sample)


@pytest.mark.parametrize(('shape', 'options', 'match'), [
    ((4, 4, 3), {}, r'is a picture in colours \(RGB\), not a map of class ids'),
    ((4, 4, 4), {}, r'is a picture in colours \(RGBA\)'),
])
def test_pictures_of_classes_are_no_label_maps(segmentor, shape, options, match, tmp_path):
    with pytest.warns(UserWarning, match='segmentation'):
        sample = read_by_mmseg(tmp_path / 'colours.png', np.zeros(shape, np.uint8), **options)
    with pytest.raises(ValueError, match=match):
        check(segmentor, sample)


class OwnLoader(LoadAnnotations):
    """Somebody's, who reads colours or 16 bits."""


@pytest.mark.parametrize('loader', [OwnLoader, LoadAnnotations])
def test_a_loader_of_ones_own_may_read_files_in_its_own_way(segmentor, loader, tmp_path):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / 'colours.png')
    sample = scene(1, 2)
    sample.set_metainfo({'seg_map_path': str(tmp_path / 'colours.png')})
    steps = SimpleNamespace(pipeline=SimpleNamespace(transforms=[loader()]))
    runner = SimpleNamespace(model=segmentor, train_dataloader=SimpleNamespace(dataset=SimpleNamespace(dataset=steps)))
    with contextlib.nullcontext() if loader is OwnLoader else pytest.raises(ValueError, match='a picture in colours'):
        LabelCheckHook().before_train_iter(runner, 0, {'data_samples': [sample]})


def test_palettes_are_read_as_indices(segmentor, tmp_path):
    indices = Image.fromarray(np.array([[0, 1], [4, 255]], np.uint8)).convert('P')
    indices.putpalette(list(range(256)) * 3)
    indices.putdata([0, 1, 4, 255])
    indices.save(tmp_path / 'palette.png')
    with Image.open(tmp_path / 'palette.png') as image:
        assert image.mode == 'P'
        array = np.asarray(image)
    sample = read_by_mmseg(tmp_path / 'grey.png', array)
    check(segmentor, sample)
    with DefaultScope.overwrite_default_scope('mmseg'), pytest.warns(UserWarning, match='segmentation'):
        sample = Compose([{'type': 'LoadAnnotations', 'imdecode_backend': 'cv2'}, {'type': 'PackSegInputs'}])(
            {'seg_map_path': str(tmp_path / 'palette.png'), 'seg_fields': [], 'reduce_zero_label': False})
    with pytest.raises(ValueError, match="palette.png is read as 2 x 2 x 3, .*imdecode_backend='pillow'"):
        check(segmentor, sample['data_samples'])


def warnings_of_training(segmentor, batches: list[SegDataSample], moment: str = 'before_train_iter') -> list[str]:
    logger = Mock()
    hook = LabelCheckHook(patience=4)
    for sample in batches:
        getattr(hook, moment)(SimpleNamespace(model=segmentor, logger=logger), 0, {'data_samples': [sample]})
    return [call.args[0] for call in logger.warning.call_args_list]


def test_one_class_alone_is_told_once(segmentor):
    (line,) = warnings_of_training(segmentor, [scene(255)] * 9)
    assert line.startswith('4 batches of training hold class 0 only.') and 'masks of 0 and 255' in line
    assert warnings_of_training(segmentor, [scene(255)] * 3) == []
    assert warnings_of_training(segmentor, [scene(255)] * 3 + [scene(1)] + [scene()] * 9) == []
    assert warnings_of_training(segmentor, [scene()] * 9, 'before_val_iter') == []
    nothing = SegDataSample(gt_sem_seg=PixelData(data=torch.full((1, 4, 4), 255)))
    assert 'no class at all' in warnings_of_training(segmentor, [nothing] * 5)[0]


def test_classification_labels_of_the_head_pass(classifier):
    check(classifier, photograph(0), photograph(CLASSES - 1))


@pytest.mark.parametrize('labels', [(CLASSES,), (-1,), (255,), (1, 999)])
def test_classification_label_outside_the_head_names_its_file(classifier, labels):
    # 255 is nothing special here: ImageNet has a class of that number.
    with pytest.raises(ValueError) as info:
        check(classifier, photograph(0, path='fine.jpg'), photograph(*labels, path='wrong.jpg'))
    message = str(info.value)
    assert 'wrong.jpg' in message and 'fine.jpg' not in message and 'annotation file' in message
    assert f'label {labels[-1]},' in message and f'num_classes={CLASSES}' in message


def test_images_without_labels_pass(segmentor, classifier):
    for model in (segmentor, classifier):
        check(model, SegDataSample(), DataSample())
        with pytest.raises(ValueError):  # ... and do not hide what follows them
            check(model, SegDataSample(), DataSample(), photograph(99))


def test_models_without_a_head_pass(pretrained):
    # Alignment reads no labels, so whatever the data set says is right.
    check(MMENGINE_MODELS.build({'type': 'adala_mm.AttentionAlignment', 'backbone': tiny_vit(
        attention={'type': 'adala_mm.LinearAttention'}, init_cfg=pretrained)}), photograph(99))


@pytest.mark.parametrize('batch', [None, {}, {'inputs': torch.zeros(1, 3, 8, 8)}])
def test_batches_without_samples_pass(segmentor, batch):
    LabelCheckHook().before_train_iter(SimpleNamespace(model=segmentor), batch_idx=0, data_batch=batch)


def test_sample_without_a_path_is_still_an_error(segmentor):
    sample = SegDataSample(gt_sem_seg=PixelData(data=torch.full((1, 2, 2), 9)))
    with pytest.raises(ValueError, match='label 9'):
        check(segmentor, sample)


@pytest.mark.parametrize('model', ['segmentor', 'classifier'])
def test_looks_into_a_wrapped_model(process_group, request, model):
    wrapped = MMDistributedDataParallel(request.getfixturevalue(model))
    assert is_model_wrapper(wrapped)
    good, bad = (photograph(0), photograph(9)) if model == 'classifier' else (scene(0), scene(9))
    check(wrapped, good)
    with pytest.raises(ValueError, match='label 9'):
        check(wrapped, bad)


def test_it_is_a_default_hook():
    hooks = Config.fromfile(ROOT / 'configs/_base_/default_runtime.py').default_hooks
    assert {'type': 'adala_mm.LabelCheckHook'} in hooks.values()


@pytest.mark.parametrize('moment', ['before_train_iter', 'before_val_iter', 'before_test_iter'])
def test_validation_and_test_are_checked_too(segmentor, moment):
    with pytest.raises(ValueError, match='labels/a.png has the label 5'):
        check(segmentor, scene(CLASSES), moment=moment)
