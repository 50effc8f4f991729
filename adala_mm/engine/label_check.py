from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor

from adala_mm.registry import HOOKS
from adala_mm.utils.label_files import in_low_bytes, require_byte_ids


@HOOKS.register_module()
class LabelCheckHook(Hook):
    """Names the file when a label is no class of the model's head, before it becomes a device-side assertion.

    Looks at every batch of training, validation and test on the CPU, before the model does; images without labels
    pass. A wrong label in validation would otherwise just lower the score. Label maps of more than 8 bits are looked at
    as they are written, too, since pipelines keep the low byte of an id.

    If the first batches of training hold one class only, training continues with a warning: masks of 0 and 255 do.

    Args:
        patience: batches of training, after which one class alone is told.

    Raises:
        ValueError: naming file, label and number of classes; for colours instead of class ids.
    """

    def __init__(self, patience: int = 50) -> None:
        self.patience = patience
        self.narrow: dict[str, bool] = {}  # by mode: whether the pipeline keeps the low byte of labels
        self.batches = 0  # of training that were looked at, all of one class
        self.classes: set[int] = set()

    def _before_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None, mode: str = 'train') -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        head = getattr(model, 'decode_head', None) or getattr(model, 'head', None)
        classes = getattr(head, 'num_classes', None)
        if classes is None:
            return
        if mode not in self.narrow:
            loader = getattr(runner, f'{mode}_dataloader', None)
            self.narrow[mode] = loader is None or in_low_bytes(loader.dataset)
        maps = []
        for sample in (data_batch or {}).get('data_samples', []):
            if 'gt_sem_seg' in sample:
                labels, key = label_map(sample, self.narrow[mode]), 'reduce_zero_label'
                labels = labels[labels != getattr(head, 'ignore_index', 255)]
                maps.append(labels)
            elif 'gt_label' in sample:
                labels, key = sample.gt_label, 'the annotation file'
            else:
                continue
            wrong = labels[(labels >= classes) | (labels < 0)]
            if wrong.numel():
                raise ValueError(f'{sample.get("img_path", "an image")} has the label {int(wrong.flatten()[0])}, but '
                                 f'the head has num_classes={classes}. Check num_classes, {key} and the label files')
        if maps and mode == 'train' and classes > 1:
            self.watch(runner, maps)

    def watch(self, runner: Runner, maps: list[Tensor]) -> None:
        """Warns once if the label maps of the first batches hold one class at most."""
        if self.batches == self.patience or len(self.classes) > 1:
            return
        self.classes.update(label for labels in maps for label in labels.unique().tolist())
        self.batches += 1
        if self.batches == self.patience and len(self.classes) < 2:
            found = f'class {min(self.classes)} only' if self.classes else 'no class at all'
            runner.logger.warning(f'{self.batches} batches of training hold {found}. If the label files are masks of 0 '
                                  'and 255, write 0 and 1: 255 is no class')


def label_map(sample: object, narrow: bool) -> Tensor:
    """Class ids of a sample.

    Args:
        narrow: whether they are the low bytes of what the file holds, as mmseg's ``LoadAnnotations`` has it.

    Raises:
        ValueError: if they are not what the label file holds, or several for a pixel.
    """
    path, labels = sample.get('seg_map_path') or '', sample.gt_sem_seg.data
    if narrow:
        require_byte_ids(path)
    if labels.ndim > 2 and labels.shape[0] != 1:
        raise ValueError(f'{path or "a label map"} is read as {" x ".join(map(str, labels.shape))}, and not as one '
                         "class id for each pixel: palettes need LoadAnnotations(imdecode_backend='pillow')")
    return labels
