"""The embedded data set: what its pictures ask for, and that its folder is whole or named as broken."""
import json
import multiprocessing
import os

import numpy as np
import pytest
from mmengine.registry import DefaultScope
from PIL import Image

from adala_mm.datasets import BeaconsDataset, beacons
from adala_mm.registry import DATASETS

GROUND, STRIPES, CHECKS, BEACON, FRIEND, STRANGER = range(6)
SCENES = 100
FEW = {'train': 4, 'val': 2}
PIPELINE = [{'type': 'LoadImageFromFile'}, {'type': 'LoadAnnotations'}, {'type': 'PackSegInputs'}]


@pytest.fixture(scope='module')
def scenes() -> list[tuple[np.ndarray, np.ndarray]]:
    return [beacons.draw_scene(np.random.default_rng(seed)) for seed in range(SCENES)]


@pytest.fixture
def few(monkeypatch):
    """Data sets of six images; RECIPE holds the very same dict and follows."""
    for split, count in FEW.items():
        monkeypatch.setitem(beacons.SPLITS, split, count)
    assert beacons.RECIPE['splits'] == FEW


@pytest.fixture
def root(few, tmp_path):
    """A complete small data set."""
    beacons.write_scenes(tmp_path / 'beacons')
    return tmp_path / 'beacons'


def build(root, split='train', **options):
    with DefaultScope.overwrite_default_scope('mmseg'):
        return BeaconsDataset(data_root=str(root), split=split, pipeline=PIPELINE, **options)


def files(root) -> dict[str, tuple[int, bytes]]:
    """Time and content of every file, by name."""
    return {path.relative_to(root).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
            for path in root.rglob('*') if path.is_file()}


def hue_votes(image, mask) -> tuple[int, int]:
    """Pixels that show one of the warm hues, and of the cool ones, at any brightness."""
    pixels = image[mask].astype(float)
    pixels /= pixels.max(axis=1, keepdims=True).clip(1)

    def count(hues):
        pure = hues / hues.max(axis=1, keepdims=True)
        return int((np.linalg.norm(pixels[:, None] - pure, axis=-1).min(axis=1) < 0.2).sum())

    return count(beacons.WARM), count(beacons.COOL)


def test_one_seed_one_scene():
    draws = [beacons.draw_scene(np.random.default_rng(seed)) for seed in (5, 5, 6)]
    for once, again, other in zip(*draws, strict=True):
        assert np.array_equal(once, again) and not np.array_equal(once, other)


@pytest.mark.parametrize('side', [80, 64])
def test_shapes_and_types(side):
    image, label = beacons.draw_scene(np.random.default_rng(0), side)
    assert (image.shape, image.dtype) == ((side, side, 3), np.uint8)
    assert (label.shape, label.dtype) == ((side, side), np.uint8)


def test_labels_are_classes_and_all_are_common(scenes):
    assert {int(value) for _, label in scenes for value in np.unique(label)} == set(range(len(beacons.CLASSES)))
    for index, name in enumerate(beacons.CLASSES):
        # At least a patch of 8 x 8: what the demo's ViT can see as one token.
        assert sum((label == index).sum() >= 64 for _, label in scenes) >= 0.35 * SCENES, name
        assert np.mean([label == index for _, label in scenes]) > 0.02, name


def test_the_beacon_decides_and_never_both(scenes):
    kinds = []
    for image, label in scenes[:50]:
        warm, cool = hue_votes(image, label == BEACON)
        assert max(warm, cool) > 4 * min(warm, cool)  # one clear hue, whatever scratch lies over it
        assert (label == FRIEND).any() == (warm > cool)
        assert (label == STRANGER).any() == (cool > warm)
        kinds.append(warm > cool)
    assert 15 <= sum(kinds) <= 35


def test_a_disc_does_not_show_what_it_is(scenes):
    for kind in (FRIEND, STRANGER):
        votes = np.array([hue_votes(image, label == kind) for image, label in scenes])
        assert 0.35 < votes[:, 0].sum() / votes.sum() < 0.65
        own = [votes[i].argmax() for i, (_, label) in enumerate(scenes) if (label == kind).any()]
        assert 0.2 < np.mean(own) < 0.8


@pytest.mark.parametrize('kind', [STRIPES, CHECKS])
def test_textures_have_the_tones_of_the_ground(scenes, kind):
    differences, contrasts = [], []
    for image, label in scenes:
        region, ground = image[label == kind].astype(float), image[label == GROUND].astype(float)
        if len(region) < 300:
            continue
        differences.append(region.mean(axis=0) - ground.mean(axis=0))
        light = region.mean(axis=1) > region.mean()
        dark_tone, light_tone = (np.median(region[part], axis=0) for part in (~light, light))
        contrasts.append(light_tone - dark_tone)
        # The ground is clouds between the same two tones (noise has a deviation of 10).
        low, high = np.percentile(ground, [10, 90], axis=0)
        assert (low > dark_tone - 20).all() and (high < light_tone + 20).all()
    differences, contrasts = np.array(differences), np.array(contrasts)
    assert len(differences) > 60
    assert 30 < np.median(contrasts) < 60  # 0.18 of 255, at brightnesses from 0.8 to 1.2
    assert abs(differences).max() < 20  # less than half of the contrast in any image ...
    assert abs(differences.mean(axis=0)).max() < 3  # ... and nothing on the whole, in any colour channel


def test_stripes_and_checks_have_one_distribution_of_colours(scenes):
    def colours(kind):
        return np.concatenate([(image - image[label == GROUND].mean(axis=0))[label == kind] for image, label in scenes])

    deciles = [np.percentile(colours(kind), range(10, 100, 10)) for kind in (STRIPES, CHECKS)]
    assert abs(deciles[0] - deciles[1]).max() < 5


def test_the_real_counts():
    assert beacons.SPLITS == {'train': 1000, 'val': 100}
    assert beacons.RECIPE['splits'] == beacons.SPLITS and beacons.RECIPE['side'] == beacons.SIDE == 80


@pytest.mark.parametrize('split', FEW)
def test_both_splits_load_through_a_pipeline(few, tmp_path, split):
    data = build(tmp_path / 'beacons', split)
    assert len(data) == FEW[split]
    assert data.metainfo['classes'] == beacons.CLASSES and len(data.metainfo['palette']) == len(beacons.CLASSES)
    drawn = [beacons.draw_scene(np.random.default_rng([beacons.RECIPE['seed'], list(FEW).index(split), i]))
             for i in range(len(data))]
    for i, (image, label) in enumerate(drawn):
        item = data[i]
        assert item['inputs'].numpy().transpose(1, 2, 0)[..., ::-1].tolist() == image.tolist()  # mmcv reads BGR
        assert item['data_samples'].gt_sem_seg.data[0].tolist() == label.tolist()
        assert item['data_samples'].img_path.endswith(f'images/{split}/{i:04d}.png')


def test_splits_share_no_scene(root):
    images = [path.read_bytes() for path in (root / 'images').rglob('*.png')]
    assert len(images) == len(set(images)) == sum(FEW.values())


def test_config_type_and_options_of_the_base_class(root):
    with DefaultScope.overwrite_default_scope('mmseg'):
        data = DATASETS.build({'type': 'adala_mm.BeaconsDataset', 'data_root': str(root), 'split': 'train',
                               'indices': 3, 'pipeline': PIPELINE})
    assert isinstance(data, BeaconsDataset) and len(data) == 3


def test_written_once(few, tmp_path):
    build(tmp_path / 'new' / 'beacons')  # the parent folder is made as well
    root = tmp_path / 'new' / 'beacons'
    before = files(root)
    assert len(before) == 2 * sum(FEW.values()) + 1
    for split in FEW:
        build(root, split)
    assert files(root) == before
    assert [path.name for path in root.parent.iterdir()] == ['beacons']  # nothing of the writing is left beside it


def test_relative_root(few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(build('data/beacons')) == FEW['train']
    assert len(files(tmp_path / 'data/beacons')) == 2 * sum(FEW.values()) + 1


def without_recipe(root):
    (root / 'recipe.json').unlink()


def with_half_a_recipe(root):
    (root / 'recipe.json').write_text('{"version": 1, ')


def with_bytes_for_a_recipe(root):
    (root / 'recipe.json').write_bytes(b'\xff\xfe\x80')


def with_another_recipe(root):
    (root / 'recipe.json').write_text(json.dumps(beacons.RECIPE | {'seed': 1}))


def with_another_count(root):
    (root / 'recipe.json').write_text(json.dumps(beacons.RECIPE | {'splits': {'train': 5, 'val': 2}}))


def without_an_image(root):
    (root / 'images/val/0001.png').unlink()


def without_a_label(root):
    (root / 'labels/train/0003.png').unlink()


def with_a_foreign_image(root):
    Image.new('RGB', (80, 80)).save(root / 'images/train/extra.png')


def without_labels(root):
    for path in (root / 'labels/val').iterdir():
        path.unlink()
    (root / 'labels/val').rmdir()


@pytest.mark.parametrize('spoil', [
    without_recipe, with_half_a_recipe, with_bytes_for_a_recipe, with_another_recipe, with_another_count,
    without_an_image, without_a_label, with_a_foreign_image, without_labels])
def test_a_spoilt_folder_is_named_and_left_alone(root, spoil):
    spoil(root)
    before = files(root)
    for split in FEW:  # the other split counts as well: the folder is one data set
        with pytest.raises(ValueError) as info:
            build(root, split)
        assert str(root) in str(info.value) and f'Remove the folder {root} and run again' in str(info.value)
    assert files(root) == before
    assert [path.name for path in root.parent.iterdir()] == ['beacons']


def test_an_empty_folder_is_not_filled(few, tmp_path):
    # It may be a mount that did not come up: writing there would hide it.
    root = tmp_path / 'beacons'
    root.mkdir()
    with pytest.raises(ValueError) as info:
        build(root)
    assert str(root) in str(info.value) and 'Remove the folder' in str(info.value)
    assert list(root.iterdir()) == [] and list(tmp_path.iterdir()) == [root]


def test_unknown_split(few, tmp_path):
    with pytest.raises(ValueError, match="'test'.*train, val"):
        build(tmp_path / 'beacons', 'test')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('error', [RuntimeError('disk full'), KeyboardInterrupt()])
def test_interrupted_writing_leaves_no_folder(few, tmp_path, monkeypatch, error):
    root, drawn = tmp_path / 'beacons', []

    def interrupted(rng):
        if len(drawn) == 5:  # in the second split
            raise error
        drawn.append(rng)
        return draw(rng)

    draw = beacons.draw_scene
    with monkeypatch.context() as patch:
        patch.setattr(beacons, 'draw_scene', interrupted)
        with pytest.raises(type(error)):
            build(root)
    assert len(drawn) == 5 and not root.exists()
    assert len(build(root, 'val')) == FEW['val']  # the next run is not in the way of the first one's remains


def draw_at_once(root, barrier, answers):
    """One of two processes that both find no folder, and both draw."""
    draw, waited = beacons.draw_scene, []

    def wait_and_draw(rng):
        if not waited:
            waited.append(barrier.wait(timeout=600))
        return draw(rng)

    beacons.draw_scene = wait_and_draw
    try:
        data = build(root)
        answers.put(('complete', len(data) + len(data[3]['inputs'])))
    except Exception as error:
        answers.put((type(error).__name__, str(error)))


def test_two_processes_at_once(few, tmp_path):
    # Two runs started side by side, each its own main process: torch.distributed's barrier knows nothing of them.
    root, context = tmp_path / 'beacons', multiprocessing.get_context('fork')
    barrier, answers = context.Barrier(2), context.Queue()
    processes = [context.Process(target=draw_at_once, args=(root, barrier, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    got = [answers.get(timeout=600) for _ in processes]
    for process in processes:
        process.join(timeout=600)
    beacons.check_scenes(root)
    assert ('complete', FEW['train'] + 3) in got
    for kind, message in got:
        assert kind == 'complete' or (kind == 'ValueError' and str(root) in message), message
    assert os.listdir(tmp_path) == ['beacons']  # the slower one takes its copy away
