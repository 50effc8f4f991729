"""`align` against the runs of configs, in every family."""
from __future__ import annotations

import copy
import logging
import re
from functools import partial

import pytest
import torch
from torch import nn

from adala_mm import align, linearize
from adala_mm.linearization import is_linear
from adala_mm.registry import ATTENTIONS, MODELS
from adala_mm.utils.cost import peak_bytes
from helpers import LINEAR, ROOT, tiny_vit
from helpers.vits import EVA, HF, TIMM, attentions, batches, build, headless, own_vit, timm_vit

ATTENTIONS.import_from_location()
SOFTMAX = {'type': 'adala_mm.SoftmaxAttention'}


def config_route(kind: str, student: nn.Module, teacher: nn.Module, tmp_path, **options) -> nn.Module:
    """The algorithm of the config route, with the weights of both."""
    files = {'student': tmp_path / 'student.pth', 'teacher': tmp_path / 'teacher.pth'}
    for model, file in zip((student, teacher), files.values(), strict=True):
        torch.save(headless(model.state_dict()), file)
    vit = tiny_vit(depth=3, init_cfg=dict(type='Pretrained', checkpoint=str(files['teacher']))) | TIMM['augreg'][1]
    if kind == 'FeatureAlignment':
        options['teacher'] = vit
    model = MODELS.build(dict(type=f'adala_mm.{kind}', backbone=vit | dict(attention=[LINEAR, SOFTMAX, LINEAR]),
                              **options))
    model.init_weights()
    model.backbone.load_state_dict(torch.load(files['student']))
    return model


# --- align ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['timm', 'ours'])
@pytest.mark.parametrize('stage', [1, 2])
def test_losses_and_first_step_equal_the_config_route(stage, kind, tmp_path):
    teacher = build('augreg')
    if kind == 'ours':
        ours = own_vit('augreg', SOFTMAX)
        ours.load_state_dict(headless(teacher.state_dict()))
        teacher = ours
    student = linearize(teacher, keep_softmax=[1])
    with torch.no_grad():
        for attn in attentions(student):
            if is_linear(attn):
                attn.qkv.weight += 0.1 * torch.randn_like(attn.qkv.weight)
    options = dict(loss_scale=3.0) if stage == 2 else {}
    route = config_route('AttentionAlignment' if stage == 1 else 'FeatureAlignment', student, teacher, tmp_path,
                         **options).train()
    images, = batches(1)
    wanted = route.loss(images)
    optimizer = torch.optim.AdamW([p for p in route.backbone.parameters() if p.requires_grad],
                                  lr=1e-2 if stage == 1 else 1e-3, weight_decay=0.05)
    wanted['loss'].backward()
    optimizer.step()
    (record,) = align(student, teacher, [images], stage=stage, steps=1, lr=1e-2 if stage == 1 else 1e-3, **options)
    assert record['step'] == 1
    assert abs(record['loss'] / wanted['loss'].item() - 1) < 1e-6
    assert abs(record['rel_error'] - wanted['rel_error'].item()) < 1e-6
    trained = headless(dict(student.named_parameters()))
    for name, value in route.backbone.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize('family', [*TIMM, *EVA, *HF, 'mmpretrain', 'adala'])
@pytest.mark.parametrize('stage', [1, 2])
def test_align_lowers_the_error_in_every_family(family, stage):
    teacher = build(family)
    student = linearize(teacher, keep_softmax=[1])
    before = copy.deepcopy(student.state_dict())
    history = align(student, teacher, batches(1, (2, 3, 24, 40)), stage=stage, steps=8, lr=3e-3, log_interval=1)
    assert history[-1]['loss'] < 0.97 * history[0]['loss'] and history[-1]['rel_error'] < history[0]['rel_error']
    if stage == 1:  # nothing else has moved
        changed = {key for key, value in student.state_dict().items() if not torch.equal(value, before[key])}
        learns = {key for key in before if re.search(r'qkv|[qkv]_(proj|bias)|attention\.(query|key|value)', key)
                  and not re.search(r'(blocks|layers?)\.1\.|head\.', key)}
        assert changed == learns


def test_align_brings_agreement_back_and_restores_everything(caplog):
    teacher = build('augreg').train()
    teacher.head.requires_grad_(False)
    student = linearize(teacher.eval(), 'rala')
    teacher.train()
    student.blocks[0].mlp.requires_grad_(False)
    flags = [[[m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]]
             for net in (teacher, student)]
    data = batches(4, (8, 3, 32, 32))
    caplog.set_level(logging.INFO, 'adala_mm')

    @torch.no_grad()
    def agreement() -> float:
        images, soft, linear = torch.cat(data), copy.deepcopy(teacher).eval(), copy.deepcopy(student).eval()
        return (soft(images).argmax(-1) == linear(images).argmax(-1)).float().mean().item()

    state = copy.deepcopy(teacher.state_dict())
    before = agreement()
    history = align(student, teacher, data, stage=1, epochs=5, lr=3e-3, log_interval=8)
    assert [line['step'] for line in history] == [8, 16, 20] and history[-1]['loss'] < history[0]['loss']
    history = align(student, teacher, data, stage=2, steps=30, lr=3e-3, log_interval=10)
    assert history[-1]['loss'] < history[0]['loss'] and agreement() > before
    assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items())
    assert all(p.grad is None for net in (teacher, student) for p in net.parameters())
    assert not any(module._forward_hooks for module in teacher.modules())
    for net, (modes, grads) in zip((teacher, student), flags, strict=True):
        assert [m.training for m in net.modules()] == modes and [p.requires_grad for p in net.parameters()] == grads
    assert any('stage 2  step 10/30  loss ' in m and 'images/s  ETA 0' in m for m in caplog.messages)


def test_frozen_models_learn_all_the_same():
    teacher = build('augreg').requires_grad_(False)
    history = align(linearize(teacher), teacher, batches(1), steps=4, lr=3e-3, log_interval=1)
    assert history[-1]['loss'] < history[0]['loss']


def test_teacher_is_restored_after_an_error():
    teacher = build('augreg').train()
    with pytest.raises(FloatingPointError, match='stage 2: the loss is nan after step 1; try a lower lr'):
        align(linearize(teacher), teacher, [torch.full((1, 3, 32, 32), torch.nan)], stage=2, steps=1)
    assert teacher.training and all(p.requires_grad for p in teacher.parameters())
    assert not any(module._forward_hooks for module in teacher.modules())


def test_dropout_of_the_model_does_not_disturb_stage_1():
    plain, noisy = build('augreg'), timm_vit(proj_drop_rate=0.5, drop_path_rate=0.5)
    noisy.load_state_dict(plain.state_dict())
    results = [align(linearize(net.train()), net, batches(1), steps=1) for net in (plain, noisy)]
    assert results[0] == results[1]


def test_memory_of_stage_1_does_not_grow_with_depth():
    peaks = []
    for depth in (2, 6):
        teacher = timm_vit(img_size=128, depth=depth)
        student, step = linearize(teacher), partial(align, steps=1, dataloader=batches(1, (4, 3, 128, 128)))
        of_weights = 4 * sum(p.numel() for attn in attentions(student) for p in attn.qkv.parameters())
        peaks.append(peak_bytes(lambda: step(student, teacher)) - 4 * of_weights)  # noqa: B023
    assert peaks[1] < 1.1 * peaks[0]


def test_kinds_of_batches():
    teacher, images = build('augreg'), batches(1)[0]
    wanted = align(linearize(teacher), teacher, [images], steps=1)
    labels = torch.zeros(2)
    for batch in ((images, labels), [images, labels], {'pixel_values': images, 'labels': labels}):
        assert align(linearize(teacher), teacher, [batch], epochs=1) == wanted
    assert align(linearize(teacher), teacher, (images for _ in range(1)), steps=1) == wanted
    for batch, kind in ((images[0], r'\(3, 32, 32\)'), ({'image': images}, 'dict'), (['x'], 'str')):
        with pytest.raises(TypeError, match=f'yields {kind}, not images'):
            align(linearize(teacher), teacher, [batch], steps=1)


@pytest.mark.parametrize('stage', [1, 2])
def test_bfloat16_autocast(stage):
    teacher = build('augreg')
    full, half = (align(linearize(teacher), teacher, batches(1), stage=stage, steps=3, lr=1e-3, bf16=bf16)[-1]
                  for bf16 in (False, True))
    assert full != half and abs(half['loss'] / full['loss'] - 1) < 0.1
    student = linearize(teacher.bfloat16())
    assert align(student, teacher, batches(1), stage=stage, steps=1)[0]['loss'] > 0


@pytest.mark.parametrize(('options', 'error', 'message'), [
    (dict(stage=3, steps=1), ValueError, 'stage=3'),
    (dict(), ValueError, 'either steps or epochs'),
    (dict(steps=1, epochs=1), ValueError, 'either steps or epochs'),
    (dict(steps=0), ValueError, 'steps=0 has to be a whole number of at least 1'),
    (dict(steps=2.0), ValueError, 'steps=2.0 has to be a whole number'),
    (dict(epochs=1.5), ValueError, 'epochs=1.5 has to be a whole number'),
    (dict(epochs=-1), ValueError, 'epochs=-1 has to be a whole number'),
    (dict(epochs=1, dataloader=[]), ValueError, 'epochs=1 of this dataloader are no steps: it has no batch'),
    (dict(steps=1, dataloader=[]), ValueError, 'the dataloader is empty'),
    (dict(steps=1, dataloader=iter([])), ValueError, 'the list_iterator of images is used up: it can be read'),
    (dict(steps=3, dataloader=(image for image in batches(2))), ValueError, 'the generator of images is used up'),
    (dict(steps=3, stage='calibrate', dataloader=(image for image in batches(2))), ValueError, 'generator of images'),
    (dict(epochs=1, dataloader=iter([])), TypeError, 'epochs=1 of a list_iterator without length: say steps'),
    (dict(steps=1, log_interval=0), ValueError, 'log_interval=0 has to be a whole number of at least 1'),
    (dict(steps=1, checkpoint_interval=0), ValueError, 'checkpoint_interval=0 has to be'),
    (dict(steps=1, val_interval=0), ValueError, 'val_interval=0 has to be'),
    (dict(steps=1, stage='calibrate', val_interval=0.5), ValueError, 'val_interval=0.5 has to be'),
    (dict(steps=1, lr=-1e-3), ValueError, 'lr=-0.001 has to be above 0'),
    (dict(steps=1, lr=float('nan')), ValueError, 'lr=nan has to be above 0'),
    (dict(steps=1, model=timm_vit), ValueError, 'no linear block: call linearize first'),
    (dict(steps=1, teacher=lambda: timm_vit(depth=2)), ValueError, '3 blocks.*2 blocks.*not the same network'),
    (dict(steps=1, teacher=lambda: nn.Linear(2, 2)), TypeError, 'no ViTs'),
    (dict(steps=1, teacher=lambda: timm_vit().to('meta')), ValueError, 'on cpu, its teacher on meta'),
    (dict(steps=1, stage=2, teacher=lambda: timm_vit(embed_dim=16)), ValueError, r'17, 32.*17, 16'),
])
def test_wrong_arguments_of_align(options, error, message):
    options = dict(model=lambda: linearize(timm_vit()), teacher=timm_vit, dataloader=batches(1)) | options
    model, teacher = options.pop('model')(), options.pop('teacher')()
    with pytest.raises(error, match=message):
        align(model, teacher, options.pop('dataloader'), **options)


def test_shared_weights_are_refused():
    model = timm_vit()
    with pytest.raises(ValueError, match='share weights'):
        align(linearize(model, inplace=True), model, batches(1), steps=1)


SNIPPET = (ROOT / 'docs/snippets/linearize.py').read_text()


def test_snippet(monkeypatch, tmp_path):
    """What the README shows runs as it stands, with a tiny model in place of the download."""
    import timm
    from PIL import Image
    made = []

    def create_model(name, pretrained=False):
        assert pretrained and timm.is_model_pretrained(name)
        made.append(build('augreg'))
        made[0].pretrained_cfg = dict(input_size=(3, 32, 32))
        return made[0]

    (tmp_path / 'images/class').mkdir(parents=True)
    for i in range(3):
        Image.effect_noise((40, 40), 50 + i).convert('RGB').save(tmp_path / f'images/class/{i}.png')
    monkeypatch.setattr(timm, 'create_model', create_model)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(SNIPPET, scope)
    assert SNIPPET in (ROOT / 'README.md').read_text(encoding='utf-8')
    assert len(SNIPPET.splitlines()) <= 15 and len(made) == 1
    assert scope['model'].num_linear_blocks == 3 and not attentions(made[0])


def test_real_weights(shared_data):
    """DeiT-tiny: a few steps of stage 1 bring the features nearer to the teacher's."""
    import timm
    from PIL import Image
    from safetensors.torch import load_file
    from timm.data import create_transform
    teacher = timm.create_model('deit_tiny_patch16_224').eval()
    teacher.load_state_dict(load_file(shared_data / 'weights/deit_tiny_patch16_224.safetensors'))
    transform = create_transform(224, is_training=False)
    files = sorted((shared_data / 'coco_permissive53/images').rglob('*.jpg'))[:16]
    photos = torch.stack([transform(Image.open(file).convert('RGB')) for file in files])
    student = linearize(teacher)

    @torch.no_grad()
    def error() -> float:
        wanted = teacher.forward_features(photos[12:])
        return ((student.forward_features(photos[12:]) - wanted).norm() / wanted.norm()).item()

    swapped = error()
    history = align(student, teacher, photos[:12].split(4), stage=1, steps=9, lr=2e-3, log_interval=3)
    aligned = error()
    assert history[-1]['rel_error'] < 0.9 * history[0]['rel_error'] and aligned < swapped
    align(student, teacher, photos[:12].split(4), stage=2, steps=3)
    assert error() < 0.95 * aligned
