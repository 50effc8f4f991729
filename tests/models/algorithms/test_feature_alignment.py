"""Stage 2 against two networks in float64."""
import pytest
import torch

from adala_mm.registry import MODELS
from helpers import LINEAR, tiny_vit
from helpers.options import train

SOFTMAX = {'type': 'adala_mm.SoftmaxAttention'}


@pytest.fixture(scope='module')
def stage1_result(pretrained, tmp_path_factory) -> dict:
    """``init_cfg`` of a student that has moved away from the teacher, saved as stage 1 saves it."""
    generator = torch.Generator().manual_seed(3)
    state = {f'backbone.{key}': value + 0.1 * torch.randn(value.shape, generator=generator)
             for key, value in torch.load(pretrained['checkpoint']).items()}
    path = tmp_path_factory.mktemp('weights') / 'stage1.pth'
    torch.save({'meta': {}, 'state_dict': state}, path)
    return {'type': 'Pretrained', 'checkpoint': str(path)}


def stage2(student, teacher, init=True, student_vit=None, teacher_vit=None, **options):
    model = MODELS.build({'type': 'adala_mm.FeatureAlignment', **options,
                          'backbone': tiny_vit(init_cfg=student, **({'attention': LINEAR} | (student_vit or {}))),
                          'teacher': tiny_vit(init_cfg=teacher, **(teacher_vit or {}))})
    if init:
        model.init_weights()
    return model


def reference_vit(checkpoint: dict, **vit):
    network = MODELS.build(tiny_vit(init_cfg=checkpoint, **vit))
    network.init_weights()
    return network.double()


@pytest.mark.parametrize('loss_scale', [1.0, 4000.0])
def test_loss_and_gradients_equal_two_networks(pretrained, stage1_result, loss_scale):
    model = stage2(stage1_result, pretrained, loss_scale=loss_scale).train()
    images = torch.randn(3, 3, 32, 32)
    out = model(images, mode='loss')
    out['loss'].backward()

    student = reference_vit(stage1_result, attention=LINEAR)
    got, wanted = student.forward_features(images.double()), reference_vit(pretrained).forward_features(images.double())
    difference = got - wanted.detach()
    assert got.shape == (3, 17, 32)  # the class token counts
    loss = loss_scale * difference.square().sum() / got.numel()
    loss.backward()
    assert out['loss'].item() == pytest.approx(loss.item(), rel=1e-4)
    assert out['rel_error'].item() == pytest.approx((difference.norm() / wanted.norm()).item(), rel=1e-4)
    reference = dict(student.named_parameters())
    for name, parameter in model.backbone.named_parameters():
        assert (parameter.grad - reference[name].grad).norm() < 1e-4 * reference[name].grad.norm(), name


def test_copy_of_the_teacher_has_no_error(pretrained):
    model = stage2(pretrained, pretrained, student_vit={'attention': SOFTMAX}).train()
    out = model.loss(torch.randn(2, 3, 32, 32))
    assert out['loss'].item() == pytest.approx(0, abs=1e-10)
    assert out['rel_error'].item() == pytest.approx(0, abs=1e-6)


def test_teacher_is_not_the_student(pretrained, stage1_result):
    # Its features come from its own checkpoint, and its drop path sleeps while the student trains.
    model = stage2(stage1_result, pretrained, teacher_vit={'drop_path_rate': 0.9}).train()
    images = torch.randn(2, 3, 32, 32)
    wanted = reference_vit(pretrained).float().forward_features(images)
    torch.testing.assert_close(model.teacher_features(images), wanted)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    losses = train(model, images, optimizer, steps=10)
    assert losses[-1] < 0.5 * losses[0]
    torch.testing.assert_close(model.teacher_features(images), wanted)


@pytest.mark.parametrize('trainable', [None, r'attn\.qkv\.'])
def test_trainable(pretrained, stage1_result, trainable):
    model = stage2(stage1_result, pretrained, student_vit=dict(trainable=trainable)).train()
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    model.loss(torch.randn(2, 3, 32, 32))['loss'].backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for name, parameter in model.backbone.named_parameters():
        learns = trainable is None or '.attn.qkv.' in name
        assert parameter.requires_grad == learns, name
        assert (parameter.grad is not None) == learns, name
        assert torch.equal(parameter, before[name]) != learns, name


def test_trainable_that_matches_nothing_raises(pretrained):
    with pytest.raises(ValueError, match=r"trainable='mpl' matches no parameter.*blocks\.0\.norm1\.weight"):
        stage2(pretrained, pretrained, student_vit=dict(trainable='mpl'))


@pytest.mark.parametrize(('fact', 'teacher_vit'), [
    ('embed_dim', {'embed_dim': 16}),
    ('num_prefix', {'num_registers': 4}),
    ('class_token', {'class_token': False}),
    ('class_token', {'class_token': False, 'num_registers': 1}),  # as many prefix tokens, but not the same
    ('patch_size', {'patch_size': 4}),
])
def test_incomparable_teacher_raises(pretrained, fact, teacher_vit):
    with pytest.raises(ValueError, match=f'differ in {fact}'):
        stage2(pretrained, pretrained, init=False, teacher_vit=teacher_vit)


@pytest.mark.parametrize('missing', ['backbone', 'teacher'])
def test_missing_pretrained_weights_raise(pretrained, missing):
    model = stage2(None if missing == 'backbone' else pretrained, None if missing == 'teacher' else pretrained,
                   init=False)
    with pytest.raises(ValueError, match=f'the {missing} has no pretrained weights'):
        model.init_weights()
