from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from adala_mm.registry import HOOKS


@HOOKS.register_module()
class LabelCheckHook(Hook):
    """Names the file when a label is no class of the model's head, before it becomes a device-side assertion.

    Looks at every batch of training, validation and test on the CPU, before the model does; images without labels
    pass. A wrong label in validation would otherwise just lower the score.

    Raises:
        ValueError: naming file, label and number of classes.
    """

    def _before_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None, mode: str = 'train') -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        head = getattr(model, 'decode_head', None) or getattr(model, 'head', None)
        classes = getattr(head, 'num_classes', None)
        if classes is None:
            return
        for sample in (data_batch or {}).get('data_samples', []):
            if 'gt_sem_seg' in sample:
                labels, key = sample.gt_sem_seg.data, 'reduce_zero_label'
                labels = labels[labels != getattr(head, 'ignore_index', 255)]
            elif 'gt_label' in sample:
                labels, key = sample.gt_label, 'the annotation file'
            else:
                continue
            wrong = labels[(labels >= classes) | (labels < 0)]
            if wrong.numel():
                raise ValueError(f'{sample.get("img_path", "an image")} has the label {int(wrong.flatten()[0])}, but '
                                 f'the head has num_classes={classes}. Check num_classes, {key} and the label files')
