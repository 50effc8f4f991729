"""Images that networks are compared on."""
from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import ImgDataPreprocessor
from PIL import Image

from adala_mm import analysis
from adala_mm.analysis.images import named_images, spread, validation_images
from helpers.analysis import COUNT, NORM


def test_images_are_normalised_as_the_config_does_it(world):
    path = str(world['images'] / '03.png')
    bgr = torch.from_numpy(cv2.imread(path)).permute(2, 0, 1)
    rgb = [analysis.read_image(path, (48, 48))]
    for changes in ({}, dict(bgr_to_rgb=False), dict(mean=None, std=None)):
        options = NORM | changes
        wanted = ImgDataPreprocessor(**{k: v for k, v in options.items() if k != 'type'})(dict(inputs=[bgr]))['inputs']
        torch.testing.assert_close(analysis.normalise(rgb, options), wanted.float())
    mmpretrain = {'to_rgb': True} | {k: v for k, v in NORM.items() if k in ('mean', 'std')}
    torch.testing.assert_close(analysis.normalise(rgb, mmpretrain), analysis.normalise(rgb, NORM))


def test_images_fill_the_size_from_their_middle(tmp_path):
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, 20:40] = [200, 100, 0]
    Image.fromarray(picture).save(tmp_path / 'wide.png')
    found = analysis.read_image(str(tmp_path / 'wide.png'), (20, 20))
    assert found.shape == (20, 20, 3) and (found == [200, 100, 0]).all()
    assert analysis.read_image(str(tmp_path / 'wide.png'), (40, 16)).shape == (40, 16, 3)
    (tmp_path / 'wide.png').write_bytes((tmp_path / 'wide.png').read_bytes()[:60])
    with pytest.raises(ValueError, match=r'cannot read the image .*wide.png'):
        analysis.read_image(str(tmp_path / 'wide.png'), (20, 20))


def test_images_by_name(world, tmp_path):
    one, folder = str(world['images'] / '05.png'), str(world['images'])
    assert named_images([one]) == [one]
    assert [Path(path).name for path in named_images([folder], 3)] == ['00.png', '06.png', '13.png']
    assert len(named_images([folder, one], 99)) == COUNT + 1
    assert spread(5, 9) == [0, 1, 2, 3, 4] and spread(9, 1) == [0]
    with pytest.raises(FileNotFoundError, match='absent: there is no such file or folder'):
        named_images([str(tmp_path / 'absent')])
    (tmp_path / 'empty').mkdir()
    with pytest.raises((FileNotFoundError, ValueError), match='empty'):
        named_images([str(tmp_path / 'empty')])


def test_images_of_the_config(world):
    cfg = Config.fromfile(world['stage1'])
    assert [Path(path).name for path in validation_images(cfg, 2)] == ['00.png', '13.png']
    cfg.val_dataloader.dataset.data_prefix = 'nowhere'
    with pytest.raises(FileNotFoundError, match='val_dataloader: .*nowhere does not exist'):
        validation_images(cfg, 2)
    cfg.val_dataloader = None
    with pytest.raises(ValueError, match='has no validation set: say which images'):
        validation_images(cfg, 2)
