"""The configs of configs/real on real weights and photographs, a few iterations each; skipped without the data."""
from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from safetensors.torch import load_file
from torch.nn import functional as F

from adala_mm import align, linearize
from adala_mm.registry import MODELS
from adala_mm.utils.checkpoint import load_checkpoint, use_safe_loading
from adala_mm.utils.cli import check_data, relocate
from adala_mm.utils.records import curve, read_scalars
from helpers import ROOT
from helpers.processes import put_back

SOFTMAX = {'type': 'adala_mm.SoftmaxAttention'}
EIGHT = list(range(0, 396, 50))  # of the 396 test photographs, which are sorted by class
FORTY = list(range(0, 396, 9))[:40]


class Watch(Hook):
    """Keeps the backbone as training starts, and every loss."""

    priority = 'VERY_HIGH'

    def before_train(self, runner) -> None:
        self.losses: list[float] = []
        self.start = {key: value.clone() for key, value in runner.model.backbone.state_dict().items()}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.losses.append(outputs['loss'].item())


@pytest.fixture(scope='module')
def place(shared_data, tmp_path_factory) -> Path:
    """Where the runs write; what they leave in the process (scope, loggers, loading scheme) is put back."""
    place = tmp_path_factory.mktemp('real')
    with pytest.MonkeyPatch.context() as patch:
        put_back(patch)
        patch.chdir(place)
        use_safe_loading()
        yield place


def few(name: str, data: Path, iterations: int, batch: int, images: int | list[int]) -> Config:
    """A config of configs/real with fewer iterations, smaller batches and fewer images to validate on."""
    cfg = Config.fromfile(ROOT / f'configs/real/{name}.py')
    cfg.merge_from_dict(relocate(cfg.to_dict(), str(data)))
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
    cfg.train_dataloader.batch_size = batch
    cfg.val_dataloader.dataset.indices = images
    cfg.train_cfg.update(max_iters=iterations, val_interval=iterations)
    cfg.default_hooks.checkpoint.interval = iterations
    cfg.default_hooks.logger.interval = 1
    cfg.work_dir = f'work_dirs/{name}'
    cfg.visualizer.name = name  # a second one of the same name would be the first, and log into its folder
    return cfg


def train(cfg: Config) -> SimpleNamespace:
    check_data(cfg, ('train_dataloader', 'val_dataloader'))
    runner, watch = Runner.from_cfg(cfg), Watch()
    runner.register_hook(watch)
    runner.train()
    newest = Path(Path(cfg.work_dir, 'last_checkpoint').read_text()).resolve()
    saved = {key.removeprefix('backbone.'): value for key, value in load_checkpoint(newest)['state_dict'].items()
             if key.startswith('backbone.')}
    assert len(watch.losses) == cfg.train_cfg.max_iters and all(map(math.isfinite, watch.losses))
    return SimpleNamespace(checkpoint=newest, saved=saved, start=watch.start, losses=watch.losses,
                           folder=newest.parent, model=runner.model)


def moved(run: SimpleNamespace) -> set[str]:
    assert run.saved.keys() == run.start.keys()
    return {key for key, value in run.saved.items() if not torch.equal(value, run.start[key])}


def scores(run: SimpleNamespace) -> list[dict]:
    return [row for row in read_scalars(run.folder) if 'loss' not in row]


def equal(state: dict, other: dict) -> bool:
    return state.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in state.items())


@pytest.fixture(scope='module')
def weights(shared_data) -> dict:
    return load_file(shared_data / 'weights/deit_tiny_patch16_224.safetensors')


@pytest.fixture
def teacher(weights) -> torch.nn.Module:
    model = timm.create_model('deit_tiny_patch16_224', pretrained=False).eval()
    model.load_state_dict(weights)
    return model


@pytest.fixture(scope='module')
def stage1(place, shared_data):
    return train(few('stage1_deitt_caltech', shared_data, iterations=3, batch=4, images=FORTY))


@pytest.fixture(scope='module')
def stage2(place, shared_data, stage1):
    cfg = few('stage2_deitt_caltech', shared_data, iterations=2, batch=4, images=EIGHT)
    cfg.model.backbone.init_cfg.checkpoint = str(stage1.checkpoint)
    return train(cfg)


def test_checkpoints_of_the_configs_are_those_of_the_stage_before():
    one, two, three = (Config.fromfile(ROOT / f'configs/real/{name}.py') for name in (
        'stage1_deitt_caltech', 'stage2_deitt_caltech', 'mask2former_deitt_camvid'))
    for stage, name, before in ((two, 'stage1_deitt_caltech', one), (three, 'stage2_deitt_caltech', two)):
        wanted = f'work_dirs/{name}/iter_{before.train_cfg.max_iters}.pth'
        assert stage.model.backbone.init_cfg.checkpoint == wanted


def test_backbone_is_timm_s_deit(shared_data, teacher):
    images = torch.stack([torch.from_numpy(cv2.resize(cv2.imread(str(path)), (224, 224))[..., ::-1].copy())
                          for path in sorted((shared_data / 'caltech101/images').rglob('*.jpg'))[:300:60]])
    cfg = Config.fromfile(ROOT / 'configs/real/stage2_deitt_caltech.py')
    cfg.merge_from_dict(relocate(cfg.to_dict(), str(shared_data)))
    model = MODELS.build(dict(cfg.model, backbone=dict(cfg.model.teacher)))
    model.prepare_teacher()
    inputs = model.data_preprocessor(dict(inputs=list(images.flip(-1).permute(0, 3, 1, 2))))['inputs']  # BGR
    normalised = (images.float() / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        wanted = teacher.forward_features(normalised.permute(0, 3, 1, 2))
        got = model.teacher_features(inputs)
        logits = model.frozen['head'](got[:, 0])
        assert (got - wanted).norm() < 1e-4 * wanted.norm()
        assert torch.allclose(logits, teacher.forward_head(wanted), atol=1e-3)
    assert len(set(logits.argmax(dim=1).tolist())) >= 3  # a network that says something
    assert F.softmax(logits, dim=1).max(dim=1).values.mean() > 0.3


def test_stage_1_starts_from_the_swap_of_the_pretrained_weights(stage1, weights):
    assert equal(stage1.start, {key: value for key, value in weights.items() if not key.startswith('head.')})
    before, after = scores(stage1)
    assert (before['step'], after['step']) == (0, 3)
    assert 0 <= before['align/top1_agreement'] < 15  # about 3 % on all of the test photographs
    assert 1 < before['align/rel_error'] < 1.6 and 0 < before['align/cosine'] < 0.6
    assert before['align/top1_agreement'] % 2.5 == pytest.approx(0)  # 40 images


def test_stage_1_trains_the_projections_alone(stage1):
    assert moved(stage1) == {f'blocks.{i}.attn.qkv.{kind}' for i in range(12) for kind in ('weight', 'bias')}
    assert stage1.losses[-1] < stage1.losses[0]
    before, after = scores(stage1)
    assert after['align/rel_error'] < before['align/rel_error']
    assert curve(stage1.folder, 'rel_error_worst')[0] == [1, 2, 3]


def test_stage_2_starts_where_stage_1_ended(stage1, stage2, weights):
    assert equal(stage2.start, stage1.saved)
    teacher = stage2.model.frozen['teacher'].state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in teacher.items())  # trained beside it, not with it
    assert moved(stage2) == set(stage2.saved)
    assert [row['step'] for row in scores(stage2)] == [0, 2]


def test_a_softmax_student_is_its_teacher(place, shared_data):
    cfg = few('stage2_deitt_caltech', shared_data, iterations=1, batch=1, images=EIGHT)
    cfg.model.backbone = dict(cfg.model.teacher)
    assert cfg.model.backbone.attention == SOFTMAX
    cfg.work_dir, cfg.visualizer.name = 'work_dirs/itself', 'itself'
    runner = Runner.from_cfg(cfg)
    runner.model.init_weights()  # which MMEngine leaves to the training loop
    got = runner.val()
    assert got['align/top1_agreement'] == 100 and got['align/rel_error'] == 0
    assert got['align/cosine'] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize('twin', ['', '_softmax'])
def test_mask2former_on_street_frames(place, shared_data, stage2, weights, twin):
    cfg = few(f'mask2former_deitt{twin}_camvid', shared_data, iterations=2, batch=2, images=2)
    if not twin:
        cfg.model.backbone.init_cfg.checkpoint = str(stage2.checkpoint)
    run = train(cfg)
    assert all(block.attn.is_softmax == bool(twin) for block in run.model.backbone.blocks)
    pretrained = {key: value for key, value in weights.items() if not key.startswith('head.')}
    assert equal(run.start, pretrained if twin else stage2.saved)
    assert moved(run)  # the backbone is fine-tuned
    (score,) = scores(run)
    assert score['step'] == 2 and 0 <= score['mIoU'] <= 100 and 0 <= score['aAcc'] <= 100


def test_align_does_not_drive_a_near_student_away(shared_data, teacher):
    paths = sorted((shared_data / 'caltech101/unlabelled').rglob('*.jpg'))[::100][:8]
    pictures = [cv2.cvtColor(cv2.resize(cv2.imread(str(path)), (112, 112)), cv2.COLOR_BGR2RGB) for path in paths]
    images = (torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() - 120) / 58
    teacher.set_input_size(112)
    student = linearize(teacher, dict(type='adala_mm.CoarseToFineAttention', tile=2, block=2, num_open=10))
    for stage in (1, 2):
        errors = [row['rel_error'] for row in align(student, teacher, [images], stage, steps=4, log_interval=1)]
        assert errors[0] < 0.3 and max(errors) < 1.5 * errors[0], (stage, errors)


def test_align_does_to_timm_s_model_what_the_configs_do(shared_data, weights, teacher):
    """Three steps of each stage on the same photographs, learning rates and all: the same losses, the same model."""
    paths = sorted((shared_data / 'caltech101/unlabelled').rglob('*.jpg'))[::160]
    pictures = [torch.from_numpy(cv2.resize(cv2.imread(str(path)), (224, 224))).permute(2, 0, 1) for path in paths]
    batches = [pictures[i:i + 4] for i in range(0, 24, 4)]
    student = linearize(teacher)
    state = None
    for stage in (1, 2):
        cfg = Config.fromfile(ROOT / f'configs/real/stage{stage}_deitt_caltech.py')
        cfg.merge_from_dict(relocate(cfg.to_dict(), str(shared_data)))
        model = MODELS.build(cfg.model).train()
        model.init_weights() if stage == 1 else model.prepare_teacher()
        if stage == 2:
            model.backbone.load_state_dict(state)
        learn = [p for p in model.parameters() if p.requires_grad]
        optimizer = OptimWrapper(torch.optim.AdamW(learn, lr=1e-3, weight_decay=0.05))
        inputs, losses = [], []
        for i, batch in enumerate(batches[:3] if stage == 1 else batches[3:]):
            inputs.append(model.data_preprocessor(dict(inputs=batch))['inputs'])
            if stage == 2:  # align lets it fall from the first step on
                optimizer.optimizer.param_groups[0]['lr'] = 1e-3 * (1 - i / 3) ** 0.9
            losses.append(model.train_step(dict(inputs=batch), optimizer)['loss'].item())
        scale = cfg.model.get('loss_scale', 1.0)
        history = align(student, teacher, inputs, stage=stage, steps=3, lr=1e-3, loss_scale=scale, log_interval=1)
        assert [row['loss'] for row in history] == pytest.approx(losses, rel=1e-3), stage
        assert losses[-1] < losses[0]
        state = model.backbone.state_dict()
        got, began = (torch.cat([net[key].flatten() for key in state]) for net in (student.state_dict(), weights))
        wanted = torch.cat([value.flatten() for value in state.values()])
        # AdamW's first steps are as long for a gradient that is next to nothing, where rounding decides on the sign.
        assert (got - wanted).norm() < 0.02 * (wanted - began).norm() != 0, stage
