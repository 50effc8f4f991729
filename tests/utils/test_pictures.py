"""Feature colours come from the teacher's principal components, and segmentations are painted where there are any."""
import numpy as np
import pytest
import torch

from adala_mm.utils.pictures import overlay, shared_pca

PALETTE = [[0, 0, 0], [250, 20, 90], [10, 200, 40]]


def features(channels=16, seed=0, images=2, side=12):
    """Feature maps with a few strong directions, as a ViT's have, away from the origin."""
    generator = torch.Generator().manual_seed(seed)
    strength = 3.0 * 0.7 ** torch.arange(channels)
    basis = torch.linalg.qr(torch.randn(channels, channels, generator=generator))[0]
    values = torch.randn(images, side, side, channels, generator=generator) * strength
    return (values @ basis + 5).permute(0, 3, 1, 2)


def turned(maps, seed=1):
    """The same features in another orthogonal basis: as good a network, but other directions."""
    c = maps.shape[1]
    basis = torch.linalg.qr(torch.randn(c, c, generator=torch.Generator().manual_seed(seed)))[0]
    return torch.einsum('bchw,cd->bdhw', maps, basis)


@pytest.mark.parametrize(('images', 'channels', 'side'), [(2, 16, 12), (1, 64, 4), (1, 3, 8), (1, 96, 2)])
def test_shapes_and_range(images, channels, side):
    # 16 pixels of 64 channels and 4 of 96 have fewer components than channels.
    maps = [features(channels, seed, images, side) for seed in range(3)]
    pictures = shared_pca(maps)
    assert len(pictures) == 3
    for picture in pictures:
        assert isinstance(picture, np.ndarray) and picture.shape == (images, side, side, 3)
        assert picture.min() >= 0 and picture.max() <= 1
    assert pictures[0].min() == 0 and pictures[0].max() == 1  # the teacher uses the whole range


def test_networks_of_different_resolution_share_components():
    maps = features()
    teacher, student = shared_pca([maps, maps[:, :, ::2, ::2]])
    np.testing.assert_allclose(student, teacher[:, ::2, ::2], atol=1e-5)


def test_identical_features_have_identical_colours():
    maps = features()
    teacher, same, other = shared_pca([maps, maps.clone(), features(seed=7)])
    assert np.array_equal(teacher, same)
    assert not np.allclose(teacher, other, atol=0.05)


def test_equal_features_of_two_images_have_equal_colours():
    maps = features()
    maps[1] = maps[0].flip(-1)
    (picture,) = shared_pca([maps])
    np.testing.assert_allclose(picture[1], picture[0][:, ::-1], atol=1e-6)


def test_channels_are_the_principal_components_in_order():
    # Four known directions of falling strength, hidden in ten channels by a rotation, and far from the origin.
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2 * 20 * 20, 4, generator=generator)
    basis = torch.linalg.qr(torch.randn(10, 10, generator=generator))[0][:4]
    maps = ((hidden * torch.tensor([8.0, 4.0, 2.0, 1.0])) @ basis + 20).reshape(2, 20, 20, 10).permute(0, 3, 1, 2)
    (picture,) = shared_pca([maps])
    inside = ((picture > 0) & (picture < 1)).all(axis=-1).flatten()
    correlation = np.corrcoef(picture.reshape(-1, 3)[inside].T, hidden.numpy()[inside].T)[:3, 3:]
    assert abs(np.diagonal(correlation)).min() > 0.99
    assert abs(correlation[~np.eye(3, 4, dtype=bool)]).max() < 0.15


@pytest.mark.parametrize('student', [
    turned(features()), features() + torch.randn(2, 16, 12, 12, generator=torch.Generator().manual_seed(5)),
    -features(), 2 * features()], ids=['turned', 'noisy', 'negated', 'doubled'])
def test_components_come_from_the_first_network(student):
    maps = features()
    teacher, beside = shared_pca([maps, student])
    assert not np.allclose(beside, teacher, atol=0.1)
    assert np.array_equal(teacher, shared_pca([maps])[0])  # the second has no say in the first's colours
    alone, last = shared_pca([student, maps])
    assert np.array_equal(alone, shared_pca([student])[0])
    assert not np.allclose(last, teacher, atol=0.1)


def test_range_comes_from_the_first_network():
    maps = features()
    centre = maps.mean(dim=(0, 2, 3), keepdim=True)
    teacher, faint = shared_pca([maps, centre + 0.1 * (maps - centre)])
    assert teacher.std() > 0.2 and 0.005 < faint.std() < 0.05  # not stretched on its own
    clipped = [(teacher == bound).mean() for bound in (0, 1)]
    assert all(0.01 < share < 0.03 for share in clipped)  # 2 % at either end


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    maps = features()
    exact, (rounded,) = shared_pca([maps])[0], shared_pca([maps.to(dtype)])
    signs = np.sign(np.sum((exact - 0.5) * (rounded - 0.5), axis=(0, 1, 2)))  # a component's sign is free
    np.testing.assert_allclose((rounded - 0.5) * signs, exact - 0.5, atol=0.05)


@pytest.mark.parametrize('value', [0.0, 1.0, 0.1, -37.3])
def test_constant_features_give_numbers(value):
    constant = torch.full((1, 8, 4, 4), value)
    for picture in shared_pca([constant, constant, features(8, images=1, side=4)]):
        assert np.isfinite(picture).all() and picture.min() >= 0 and picture.max() <= 1


def test_features_of_rank_one_give_numbers():
    line = torch.arange(16.0).reshape(1, 1, 4, 4) * torch.ones(1, 8, 1, 1)
    (picture,) = shared_pca([line])
    assert np.isfinite(picture).all() and picture[..., 0].std() > 0.2


def test_overlay_paints_known_labels_alone():
    image = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    label = np.full((6, 5), 255, np.uint8)
    label[0], label[1], label[2], label[3] = 0, 1, 2, 3  # there is no colour 3
    before, out = image.copy(), overlay(image, label, PALETTE, opacity=0.65)
    assert out.dtype == np.uint8 and out.shape == image.shape
    for row, colour in enumerate(PALETTE):
        wanted = 0.35 * image[row].astype(float) + 0.65 * np.array(colour)
        assert abs(out[row] - wanted).max() <= 0.5
    assert np.array_equal(out[3:], image[3:]) and np.array_equal(image, before)


def test_overlay_opacity():
    image = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    label = np.random.default_rng(1).integers(0, 3, (4, 4), dtype=np.uint8)
    assert np.array_equal(overlay(image, label, PALETTE, opacity=0), image)
    assert np.array_equal(overlay(image, label, PALETTE, opacity=1), np.array(PALETTE, np.uint8)[label])


def test_overlay_does_not_wrap_around():
    white = np.full((2, 2, 3), 255, np.uint8)
    assert overlay(white, np.zeros((2, 2), np.int64), [[255, 255, 255]]).min() == 255
