"""Checks of the data: folders, counts, images, labels, classes, and the first batch."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from adala_mm.datasets import ImageFiles
from adala_mm.datasets.image_index import OTHERS, is_image, kind_of, passed_over
from adala_mm.engine import LabelCheckHook
from adala_mm.preflight.images import label_loader
from adala_mm.preflight.plan import TRAIN, VAL, Plan, Scan, draws_itself
from adala_mm.preflight.report import ERROR, OK, WARNING, Finding, Skipped
from adala_mm.utils.cli import absent_data, data_advice
from adala_mm.utils.folders import walk
from adala_mm.utils.label_files import leaves

MANY = 100_000  # labels of images that are read at most


def some(paths: list[str]) -> str:
    return ', '.join(paths[:3]) + (', ...' if len(paths) > 3 else '')


def folders(plan: Plan, loader: str) -> Iterator[Finding]:
    """The folders and lists that the config names are there and not empty."""
    name, dataset = f'{loader} folders', plan.cfg[loader].dataset
    absent = list(absent_data(plan.cfg, loader))
    for path, state in absent:
        yield Finding(name, ERROR, f'{path} {state}', data_advice(loader))
    if not absent:
        root = dataset.get('data_root', 'its own place')
        yield Finding(name, OK, f'{root} is drawn on first use' if draws_itself(dataset) else str(root))


def counts(plan: Plan, loader: str) -> Iterator[Finding]:
    """How many images there are; which of them lack a file, or a label file."""
    name, images, lost, unlabelled, others = f'{loader} counts', 0, [], [], []
    for part in leaves(plan.dataset(loader)):
        images += len(part)
        others += not_taken(part)
        labels, listed = label_loader(part) is not None, bool(getattr(part, 'ann_file', ''))
        if not labels and not listed:
            continue  # found by walking through the folder
        for info in map(part.get_data_info, range(len(part))):
            if '://' in info['img_path']:
                break
            if listed and not Path(info['img_path']).is_file():
                lost.append(info['img_path'])
            if labels and not Path(info.get('seg_map_path', '')).is_file():
                unlabelled.append(info.get('seg_map_path', f'{info["img_path"]} (no label path)'))
    if lost:
        yield Finding(name, ERROR, f'{len(lost)} of {images} images of the list do not exist: {some(lost)}',
                      'put them there, or take them off the list')
    if unlabelled:
        yield Finding(name, ERROR, f'{len(unlabelled)} of {images} images have no label file: {some(unlabelled)}',
                      'put the label files there, or take the images away')
    for problem in others:
        yield Finding(name, WARNING, problem)
    if not lost and not unlabelled and not others:
        yield Finding(name, OK, f'{images} images')


def not_taken(dataset: Any) -> list[str]:
    """What to say of files in a data set's folder that look like images, but are neither its images nor its labels."""
    if isinstance(dataset, ImageFiles):
        return dataset.problems
    folder = str((getattr(dataset, 'data_prefix', None) or {}).get('img_path') or '')
    if not Path(folder).is_dir() or getattr(dataset, 'ann_file', '') or dataset._indices is not None \
            or len(dataset) > MANY:
        return []
    infos = map(dataset.get_data_info, range(len(dataset)))
    taken = {Path(info[key]) for info in infos for key in ('img_path', 'seg_map_path') if info.get(key)}
    found = (Path(folder, place, name) for place, _, names, _ in walk(folder) for name in names
             if is_image(name, OTHERS))
    return passed_over(folder, Counter(kind_of(path.name) for path in found if path not in taken))


def images(plan: Plan, loader: str) -> Iterator[Finding]:
    """Images decode to the end and are no thumbnails."""
    name, seen = f'{loader} images', plan.scan(loader)
    share = f'{len(seen.looks)} of {seen.total} looked at'
    broken = [f'{look.path} ({look.error})' for look in seen.looks if look.error]
    sizes = [look.size for look in seen.looks if look.size]
    least = plan.patch or 16
    small = [look.path for look in seen.looks if look.size and min(look.size) < least]
    if broken:
        yield Finding(name, ERROR, f'{len(broken)} cannot be decoded, {share}: {some(broken)}',
                      'replace these files or take them away' + ('' if seen.complete else '; --images all finds all'))
    if small:
        yield Finding(name, WARNING, f'{len(small)} have a side below {least} pixels, {share}: {some(small)}',
                      'take them away if they are not meant to be so small')
    otherwise = [look.path for look in seen.looks if look.otherwise]
    if otherwise:
        yield Finding(name, WARNING, f'{len(otherwise)} are read in another way than in stages 1 and 2 and by the '
                      f'tools, {share}: {some(otherwise)}', 'save WebP and AVIF files upright, and TIFF files as RGB '
                      'without alpha (docs/image_files.md)')
    dark = [look.path for look in seen.looks if look.dark]
    if dark:
        yield Finding(name, WARNING, f'{len(dark)} have 16 bits and are nearly black in 8, {share}: {some(dark)}',
                      'scale their values to the range of 16 bits, 0 to 65535, or write 8 bits')
    if sizes and not broken and not otherwise and not dark:
        (h, w), (height, width) = np.min(sizes, axis=0), np.max(sizes, axis=0)
        yield Finding(name, OK, f'all decode, {share}; heights {h} to {height}, widths {w} to {width}')


def labels(plan: Plan, loader: str) -> Iterator[Finding]:
    """Label maps are readable, as large as their images, and hold classes of the head only."""
    name = f'{loader} labels'
    parts = list(leaves(plan.dataset(loader)))
    if any(getattr(part, 'with_label', False) for part in parts):
        yield from image_labels(plan, name, parts)
        return
    if not any(label_loader(part) for part in parts):
        raise Skipped('the pipeline reads no labels')
    seen = plan.scan(loader)
    looks = [look for look in seen.looks if look.label_path]
    found = list(wrong_labels(plan, name, loader, seen))
    yield from found
    if looks and not found:
        ignored = {head.ignore_index for head in plan.heads.values() if hasattr(head, 'ignore_index')} or {255}
        classes = frozenset().union(*(look.values for look in looks)) - ignored
        share = f'{len(looks)} of {seen.total} looked at'
        if len(classes) < 2 and any(head.num_classes > 1 for head in plan.heads.values()):
            written = frozenset().union(*(look.written for look in looks))
            yield Finding(name, WARNING, f'{share}; {f"class {min(classes)} alone" if classes else "no class"} occurs, '
                          f'label files hold {some(list(map(str, sorted(written))))}',
                          'write 0 and 1 instead of 0 and 255: 255 means that a pixel has no class'
                          if written == {0, 255} else 'look at the label files, num_classes and reduce_zero_label')
        else:
            yield Finding(name, OK, f'{share}; {len(classes)} classes occur'
                          + (f', {min(classes)} to {max(classes)}' if classes else ''))


def wrong_labels(plan: Plan, name: str, loader: str, seen: Scan) -> Iterator[Finding]:
    """What is wrong with the label maps of a scan."""
    looks = [look for look in seen.looks if look.label_path]
    no_ids = [f'{look.label_path} ({look.no_ids})' for look in looks if look.no_ids]
    if no_ids:
        yield Finding(name, ERROR, f'{len(no_ids)} are no maps of class ids: {some(no_ids)}',
                      'write label files of one channel and 8 bits, with the classes from 0 on and 255 for none')
    unread = [f'{look.label_path} ({look.label_error})' for look in looks
              if look.label_error and Path(look.label_path).is_file()]  # the others are counted already
    if unread:
        yield Finding(name, ERROR, f'{len(unread)} cannot be read: {some(unread)}',
                      "replace these files; if all fail, let dataset and LoadAnnotations agree on reduce_zero_label")
    other = [f'{look.label_path} ({look.label_size}, its image {look.size})' for look in looks
             if look.label_size and look.size and look.label_size != look.size]
    if other:
        yield Finding(name, ERROR, f'{len(other)} have another size than their image: {some(other)}',
                      'label maps must be one-channel images of class ids, as large as the image')
    for role, head in plan.heads.items():
        classes, ignore = head.num_classes, getattr(head, 'ignore_index', 255)
        beyond = {look.label_path: max(bad) for look in looks
                  if (bad := {v for v in look.values if not 0 <= v < classes} - {ignore})}
        reduced = [reduces_zero(part) for part in leaves(plan.dataset(loader)) if label_loader(part)]
        values = frozenset().union(*(look.values for look in looks)) - {ignore}
        if beyond:
            shifted = not any(reduced) and max(beyond.values()) == classes
            yield Finding(name, ERROR, f'{len(beyond)} hold labels that {role} with num_classes={classes} lacks: '
                          + some([f'{path} ({value})' for path, value in beyond.items()]),
                          f'if labels run from 1 to {classes} and 0 means none, set reduce_zero_label=True in the '
                          f'data set and in LoadAnnotations; else correct num_classes' if shifted else
                          f'correct num_classes, or write {ignore} where a pixel has no class')
        elif all(reduced) and reduced and values == set(range(classes - 1)) \
                and any(0 in look.written for look in looks):
            yield Finding(name, ERROR, f'reduce_zero_label=True drops label 0, but labels run from 0 to {classes - 1}: '
                          f'all {classes} classes of {role}, and the last one never occurs',
                          'set reduce_zero_label=False in the data set and in LoadAnnotations')


def reduces_zero(dataset: Any) -> bool:
    """Whether label 0 becomes 'no class' when this data set is read."""
    step = getattr(label_loader(dataset), 'reduce_zero_label', None)
    return bool(getattr(dataset, 'reduce_zero_label', False) if step is None else step)


def image_labels(plan: Plan, name: str, parts: list) -> Iterator[Finding]:
    """One label for each image: within the head's classes, and none absent."""
    counted: Counter[int] = Counter()
    for part in parts:
        step = -(-len(part) // MANY)
        counted.update(int(part.get_data_info(i)['gt_label']) for i in range(0, len(part), step))
    for role, head in plan.heads.items():
        wrong = sorted(label for label in counted if not 0 <= label < head.num_classes)
        if wrong:
            yield Finding(name, ERROR, f'labels {some(list(map(str, wrong)))} are no classes of {role} with '
                          f'num_classes={head.num_classes}', 'correct num_classes or the annotation file')
            return
    yield Finding(name, OK, f'{len(counted)} classes occur, {min(counted.values())} to {max(counted.values())} images '
                  'each')


def classes(plan: Plan) -> Iterator[Finding]:
    """Train and validation set have the same list of classes, as long as the head is wide."""
    lists, settings = {}, {}
    for loader in plan.loaders:
        try:
            part = next(leaves(plan.dataset(loader)))
        except Exception:  # told by the checks of the data set
            continue
        lists[loader] = tuple(part.metainfo.get('classes') or ())
        settings[loader] = getattr(part, 'folder_to_idx', None), getattr(part, 'reduce_zero_label', None)
    if not lists:
        raise Skipped('there is no data set')
    if not plan.heads:
        raise Skipped('the model has no classes')
    problems = []
    for loader, names in lists.items():
        for role, head in plan.heads.items():
            if names and len(names) != head.num_classes:
                problems.append(f'{loader} has {len(names)} classes, {role} num_classes={head.num_classes}')
    if len(lists) == 2 and lists[TRAIN] != lists[VAL]:
        first = sorted(set(lists[TRAIN]) ^ set(lists[VAL]))
        problems.append(f'{TRAIN} and {VAL} list other classes, or another order' +
                        (f': {some(first)} in one only' if first else ''))
    elif len(settings) == 2 and settings[TRAIN] != settings[VAL]:
        problems.append(f'{TRAIN} and {VAL} differ in class folders or reduce_zero_label')
    for problem in problems:
        yield Finding('classes', ERROR, problem, 'make metainfo.classes (or the class folders) and num_classes agree')
    if not problems:
        widths = ', '.join(f'{role} num_classes={head.num_classes}' for role, head in plan.heads.items())
        yield Finding('classes', OK, f'{widths}, the same list in {" and ".join(lists)}')


def batch(plan: Plan, loader: str) -> Iterator[Finding]:
    """The pipeline gives a batch whose labels are classes and whose sides the patch divides."""
    name, patch = f'{loader} batch', plan.patch
    LabelCheckHook().before_train_iter(SimpleNamespace(model=plan.model), 0, plan.batch(loader))
    inputs = plan.images_of(loader)
    shape, (height, width) = ' x '.join(map(str, inputs.shape)), inputs.shape[-2:]
    if not inputs.isfinite().all():
        yield Finding(name, ERROR, f'{shape}, with values that are not finite', 'check data_preprocessor.std')
    elif patch and (height % patch or width % patch):
        yield Finding(name, ERROR, f'{shape}: the patch size {patch} does not divide {height} x {width}',
                      f'crop, resize or pad (data_preprocessor) to a multiple of {patch}')
    else:
        yield Finding(name, OK, f'{shape} after the data_preprocessor')

