"""Compares the image sizes of backbone, pipelines, data_preprocessor and hooks with the patch."""
from __future__ import annotations

from collections.abc import Iterator, Sequence

from adala_mm.models.heads.mask2former import MMSegMask2FormerHead
from adala_mm.preflight.plan import TRAIN, VAL, Plan
from adala_mm.preflight.report import ERROR, OK, WARNING, Finding, Skipped

Size = tuple[int, int]
KEEP_SIZE = ('Load', 'RandomFlip', 'Pack', 'PhotoMetric', 'ColorJitter', 'RandAugment', 'AutoAugment', 'RandomErasing',
             'Normalize')


def pair(size: int | Sequence[int]) -> Size:
    return (size, size) if isinstance(size, int) else tuple(size)


def pipeline_of(dataset: dict) -> list[dict]:
    while 'pipeline' not in dataset and 'dataset' in dataset:
        dataset = dataset['dataset']
    return list(dataset.get('pipeline') or [])


def cropped_size(pipeline: list[dict]) -> Size | None:
    """Height and width that every image leaves a pipeline with; None if they differ, or nobody can tell."""
    size = None
    for step in pipeline:
        kind = str(step.get('type')).rsplit('.', 1)[-1].removesuffix("'>")
        if kind in ('RandomCrop', 'CenterCrop') and 'crop_size' in step:
            size = pair(step['crop_size'])
        elif kind in ('RandomResizedCrop', 'EfficientNetRandomCrop', 'EfficientNetCenterCrop'):
            size = pair(step['scale'] if 'scale' in step else step['crop_size'])
        elif kind == 'Resize' and not step.get('keep_ratio') and 'scale' in step:
            size = pair(step['scale'])
            size = size if isinstance(step['scale'], int) else size[::-1]  # given as (width, height)
        elif kind == 'Pad' and step.get('size'):
            size = pair(step['size'])[::-1]
        elif not kind.startswith(KEEP_SIZE):
            size = None
    return size


def training_size(plan: Plan) -> Size | None:
    """Height and width of a training batch: as the first one has it, as the config says, or as positions are for."""
    try:
        return tuple(plan.images_of(TRAIN).shape[-2:])
    except Exception:  # told by the check of the batch
        padded = (plan.cfg.model.get('data_preprocessor') or {}).get('size')
    size = pair(padded) if padded else cropped_size(pipeline_of(plan.cfg[TRAIN].dataset))
    if size is None and plan.patch is not None:
        size = tuple(side * plan.patch for side in plan.model.backbone.pos_grid)
    return size


def validation_size(plan: Plan) -> Iterator[tuple[str, Size]]:
    """Sizes of validation images that are known without running the pipeline, and what they belong to."""
    pipeline = pipeline_of(plan.cfg[VAL].dataset)
    if (size := cropped_size(pipeline)) is not None:
        yield f'{VAL} pipeline', size
    elif all(str(step.get('type')).rsplit('.', 1)[-1].startswith(KEEP_SIZE) for step in pipeline):
        for look in plan.scan(VAL).looks:  # files come as they are
            if look.size:
                yield look.path, look.size


def crop_of(plan: Plan) -> Size | None:
    """Height and width of the crops that a segmentor's sliding window sees, None if it sees whole images."""
    test_cfg = plan.cfg.model.get('test_cfg') or {}
    return pair(test_cfg['crop_size']) if test_cfg.get('mode') == 'slide' else None


def sizes(plan: Plan) -> Iterator[Finding]:
    """What becomes an input of the backbone is a multiple of its patch, and the head can predict from crops of it."""
    if crop_of(plan) and type(getattr(plan.model, 'decode_head', None)) is MMSegMask2FormerHead:
        yield Finding('image sizes', ERROR, "test_cfg.mode='slide': mmseg's Mask2FormerHead answers to a crop with the "
                      'size of the whole image, so that validation fails on the first image larger than crop_size',
                      "--cfg-options model.decode_head.type=adala_mm.Mask2FormerHead: its weights have the same names")
    patch, cfg = plan.patch, plan.cfg
    if patch is None:
        raise Skipped('the backbone pads its images')
    known = []
    padded = (cfg.model.get('data_preprocessor') or {}).get('size')
    if padded:
        known.append(('data_preprocessor.size', pair(padded)))
    elif (size := cropped_size(pipeline_of(cfg[TRAIN].dataset))) is not None:
        known.append((f'{TRAIN} pipeline', size))
    if crop := crop_of(plan):
        known.append(('test_cfg.crop_size', crop))
    for hook in cfg.get('custom_hooks') or []:
        known += [(f'{hook["type"]}.sizes', pair(side)) for side in dict(hook.get('sizes') or {}).values()]
    preprocessor = cfg.model.get('data_preprocessor') or {}
    divisor = (preprocessor.get('test_cfg') or preprocessor).get('size_divisor')
    if divisor and divisor % patch:
        yield Finding('image sizes', ERROR, f'size_divisor={divisor} of the data_preprocessor is no multiple of the '
                      f'patch size {patch}', f'set it to {-(-divisor // patch) * patch}')
    unsure = False
    if cfg.get(VAL) and not divisor:
        try:
            found = list(validation_size(plan))
        except Exception:  # of the data set or its pipeline: told by the checks of the data
            found = []
        known += found
        unsure = not found and hasattr(plan.model, 'decode_head')
    wrong = [f'{what} {h} x {w}' for what, (h, w) in known if h % patch or w % patch]
    if wrong:
        more = f', ... ({len(wrong)} in all)' if len(wrong) > 3 else ''
        yield Finding('image sizes', ERROR, f'the patch size {patch} does not divide {"; ".join(wrong[:3])}{more}',
                      f'crop or resize to multiples of {patch}, or pad: data_preprocessor.size in training, '
                      f'data_preprocessor.test_cfg=dict(size_divisor={patch}) in validation')
    elif unsure:
        yield Finding('image sizes', WARNING, 'validation images keep sizes of their own, and nothing pads them',
                      f'set model.data_preprocessor.test_cfg=dict(size_divisor={patch})')
    elif not divisor or divisor % patch == 0:
        vit = plan.model.backbone
        stored = ('rotary positions' if getattr(vit, 'rotary', None) else
                  f'positions for {" x ".join(str(side * patch) for side in vit.pos_grid)}')
        known = sorted({f'{h} x {w}' for what, (h, w) in known})
        yield Finding('image sizes', OK, f'patch {patch}, {stored}, images {", ".join(known[:4])}'
                      + (f', padded to multiples of {divisor} in validation' if divisor else ''))
