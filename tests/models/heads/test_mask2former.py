"""Our Mask2Former head predicts as mmseg's on whole images, and from crops, which mmseg's cannot."""
from __future__ import annotations

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from mmseg.structures import SegDataSample
from torch import nn

from helpers import LINEAR, ROOT, tiny_vit


def segmentor(**head) -> nn.Module:
    """The demo's Mask2Former on a tiny ViT; its queries are few, its weights the same whatever the head's class."""
    cfg = Config.fromfile(ROOT / 'configs/demo/mask2former_demo_beacons.py').model
    cfg.backbone = tiny_vit(attention=LINEAR, out_indices=[-1] * 4)
    cfg.neck.update(embed_dim=32, norm_cfg=dict(type='GN', num_groups=4))
    cfg.decode_head.update(in_channels=[32] * 4, **head)
    torch.manual_seed(3)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg)
        model.init_weights()
    return model.eval()


@pytest.fixture(scope='module')
def model() -> nn.Module:
    return segmentor()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 48, 64)


def logits(model: nn.Module, image: torch.Tensor, metas: list[dict] | None = None, **test_cfg) -> torch.Tensor:
    """Of a batch, as mmseg's data_preprocessor describes it."""
    model.test_cfg = ConfigDict(test_cfg)
    size = tuple(image.shape[2:])
    with torch.no_grad():
        return model.inference(image, metas or [dict(img_shape=size, ori_shape=size, pad_shape=size)] * len(image))


def test_whole_images_are_bit_equal_to_mmsegs_head(model, image):
    theirs = segmentor(type='Mask2FormerHead')
    assert type(theirs.decode_head) is type(model.decode_head).__mro__[1]
    assert list(theirs.state_dict()) == list(model.state_dict())
    theirs.load_state_dict(model.state_dict())
    padded = dict(img_shape=(45, 60), ori_shape=(90, 120), pad_shape=(48, 64), img_padding_size=(0, 4, 0, 3))
    for metas in (None, [padded] * 2):
        got = logits(model, image, metas, mode='whole')
        assert got.shape == (2, 6, 48, 64) and got.std() > 0
        assert torch.equal(got, logits(theirs, image, metas, mode='whole'))
    samples = [SegDataSample(metainfo=padded) for _ in image]
    for ours, wanted in zip(model.predict(image, samples), theirs.predict(image, samples), strict=True):
        assert ours.seg_logits.shape == (90, 120) and torch.equal(ours.seg_logits.data, wanted.seg_logits.data)
    with pytest.raises(RuntimeError, match='must match the size'):  # if not, mmseg has learnt it, and we need not
        logits(theirs, image, mode='slide', crop_size=(32, 40), stride=(16, 24))


@pytest.mark.parametrize('crop', [(48, 64), (48, 80), (96, 128)])
def test_slide_with_one_crop_is_whole(model, image, crop):
    assert torch.equal(logits(model, image, mode='slide', crop_size=crop, stride=(16, 16)),
                       logits(model, image, mode='whole'))


@pytest.mark.parametrize(('crop', 'corners'), [
    ((32, 40), [(0, 0), (0, 24), (16, 0), (16, 24)]), ((24, 64), [(0, 0), (16, 0), (24, 0)]),
    ((48, 32), [(0, 0), (0, 24), (0, 32)])])
def test_slide_is_the_mean_of_its_crops(model, image, crop, corners):
    got = logits(model, image, mode='slide', crop_size=crop, stride=(16, 24))
    total, count = torch.zeros(2, 6, 48, 64), torch.zeros(48, 64)
    for top, left in corners:
        rows, columns = slice(top, top + crop[0]), slice(left, left + crop[1])
        total[:, :, rows, columns] += logits(model, image[:, :, rows, columns], mode='whole')
        count[rows, columns] += 1
    assert count.min() == 1 and count.max() > 1
    torch.testing.assert_close(got, total / count)
