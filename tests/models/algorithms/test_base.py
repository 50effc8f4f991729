"""The frozen teacher of both stages stays out of training, checkpoints and DDP, and is scored against correctly."""
from __future__ import annotations

import copy
import re

import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import METRICS
from torch import nn

from adala_mm.registry import MODELS
from helpers import LINEAR, tiny_vit

NORMALISE = {'type': 'ImgDataPreprocessor', 'mean': [120.0, 110.0, 100.0], 'std': [60.0, 50.0, 40.0]}
both_stages = pytest.mark.parametrize('stage', ['AttentionAlignment', 'FeatureAlignment'])


def build(stage, pretrained, init=True, **options):
    if stage == 'FeatureAlignment':
        options['teacher'] = tiny_vit(init_cfg=pretrained)
    model = MODELS.build({'type': f'adala_mm.{stage}', 'data_preprocessor': NORMALISE, **options,
                          'backbone': tiny_vit(attention=LINEAR, init_cfg=pretrained)})
    if init:
        model.init_weights()
    return model


def teacher_parameters(model) -> list[nn.Parameter]:
    parameters = [p for module in model.frozen.values() for p in module.parameters()]
    assert len(parameters) >= 8  # two blocks with weights and biases of qkv and proj, or more
    return parameters


def ids(parameters) -> set[int]:
    return {id(p) for p in parameters}


def softmax_features(pretrained, images):
    vit = MODELS.build(tiny_vit(init_cfg=pretrained))
    vit.init_weights()
    return vit.to(images.dtype).forward_features(images).detach()


def disturb(model):
    for parameter in model.backbone.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def train_step(model, optim_wrapper):
    return model.train_step({'inputs': list(torch.randint(256, (4, 3, 32, 32)))}, optim_wrapper)


def adamw(**options) -> dict:
    return {'optimizer': {'type': 'AdamW', 'lr': 0.01, 'weight_decay': 0.5}, **options}


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@both_stages
def test_teacher_is_no_part_of_the_module_tree(pretrained, stage):
    model = build(stage, pretrained)
    teacher = teacher_parameters(model)
    assert not ids(teacher) & ids(model.parameters())
    assert not ids(teacher) & ids(p for _, module in model.named_modules() for p in module.parameters())
    storages = {p.data_ptr() for p in teacher}
    assert not storages & {value.data_ptr() for value in model.state_dict().values()}


@both_stages
def test_checkpoint_holds_the_backbone_alone(pretrained, stage):
    model = build(stage, pretrained)
    assert len(list(model.data_preprocessor.buffers())) == 2  # mean and std, not persistent
    assert list(model.state_dict()) == [f'backbone.{key}' for key in model.backbone.state_dict()]


@both_stages
@pytest.mark.parametrize('options', [{}, {'paramwise_cfg': {'norm_decay_mult': 0.0, 'custom_keys': {'mlp': {}}}}],
                         ids=['plain', 'paramwise'])
def test_teacher_is_not_in_the_optimizer(pretrained, stage, options):
    model = build(stage, pretrained)
    wrapper = build_optim_wrapper(model, adamw(**options))
    optimised = ids(p for group in wrapper.optimizer.param_groups for p in group['params'])
    assert ids(p for p in model.parameters() if p.requires_grad) <= optimised <= ids(model.parameters())
    assert not optimised & ids(teacher_parameters(model))


@both_stages
def test_ddp_does_not_see_the_teacher(pretrained, stage, process_group):
    model = build(stage, pretrained)
    before = [p.clone() for p in teacher_parameters(model)]
    start = {key: value.clone() for key, value in model.state_dict().items()}
    ddp = MMDistributedDataParallel(model)
    known_to_ddp = ids(ddp.parameters()) | ids(ddp._module_parameters)
    assert known_to_ddp == ids(model.parameters()) and not known_to_ddp & ids(teacher_parameters(model))
    ddp.train()
    wrapper = build_optim_wrapper(model, adamw())
    for _ in range(2):  # the second forward raises if a parameter got no gradient in the first
        train_step(ddp, wrapper)
    assert any(not torch.equal(value, start[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(*pair) for pair in zip(before, teacher_parameters(model), strict=True))


@both_stages
def test_teacher_stays_frozen_and_in_eval_mode(pretrained, stage):
    model = build(stage, pretrained).train()
    assert model.training and any(module.training for module in model.backbone.modules())
    assert not any(module.training for frozen in model.frozen.values() for module in frozen.modules())
    assert not any(p.requires_grad for p in teacher_parameters(model))
    model.loss(torch.randn(2, 3, 32, 32))['loss'].backward()
    assert all(p.grad is None for p in teacher_parameters(model))
    assert not model.teacher_features(torch.randn(1, 3, 32, 32)).requires_grad


@both_stages
def test_teacher_moves_with_the_model(pretrained, stage):
    model = build(stage, pretrained)
    assert {p.dtype for p in teacher_parameters(model)} == {torch.float32}
    model.to(torch.float64)
    assert {p.dtype for p in teacher_parameters(model)} == {torch.float64}
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model.teacher_features(images), softmax_features(pretrained, images))
    # Also when a wrapper is moved, and to another device.
    nn.Sequential(model).to('meta')
    assert {p.device.type for p in teacher_parameters(model)} == {'meta'}


@both_stages
def test_checkpoint_round_trip(pretrained, stage, tmp_path):
    model, images = build(stage, pretrained).train(), torch.randn(2, 3, 32, 32)
    wrapper = build_optim_wrapper(model, adamw())
    for _ in range(3):
        train_step(model, wrapper)
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    resumed = build(stage, pretrained)
    assert not torch.allclose(resumed.eval()(images), model.eval()(images), rtol=0.01)
    resumed.load_state_dict(torch.load(tmp_path / 'model.pth'), strict=True)
    assert torch.equal(resumed(images), model(images))
    torch.testing.assert_close(resumed.teacher_features(images), softmax_features(pretrained, images))


@both_stages
def test_deepcopy_has_a_teacher_of_its_own(pretrained, stage):
    model, images = disturb(build(stage, pretrained)).eval(), torch.randn(2, 3, 32, 32)
    clone = copy.deepcopy(model)
    assert not ids(teacher_parameters(model)) & ids(teacher_parameters(clone))
    torch.testing.assert_close(clone(images, mode='predict'), model(images, mode='predict'), rtol=0, atol=0)
    clone.to(torch.float64)
    assert {p.dtype for p in teacher_parameters(model)} == {torch.float32}


@pytest.fixture(scope='module')
def with_head(pretrained, tmp_path_factory) -> dict:
    """The pretrained checkpoint as timm ships it: with a classification head."""
    generator = torch.Generator().manual_seed(4)
    head = {'head.weight': torch.randn(5, 32, generator=generator), 'head.bias': torch.randn(5, generator=generator)}
    path = tmp_path_factory.mktemp('weights') / 'with_head.pth'
    torch.save(torch.load(pretrained['checkpoint']) | head, path)
    return {'type': 'Pretrained', 'checkpoint': str(path)}


@both_stages
def test_pooled_features_are_sent_without_the_batch(pretrained, stage):
    batch = build(stage, pretrained).eval()(torch.randn(8, 3, 32, 32), mode='predict')
    assert {x.untyped_storage().nbytes() for score in batch for x in score['pooled']} == {32 * 4}


@pytest.mark.parametrize('mode', ['loss', 'predict'])
@pytest.mark.parametrize('part', [r'blocks\.1\.mlp\.fc2\.weight', 'blocks.0.norm2.bias', 'pos_embed', 'norm.weight'])
def test_stage_1_does_not_borrow_from_a_checkpoint_of_stage_2(pretrained, part, mode):
    images = torch.randn(2, 3, 32, 32)
    state = build('FeatureAlignment', pretrained).state_dict()
    (key,) = [key for key in state if re.fullmatch(rf'backbone\.{part}', key)]
    state[key] = state[key] + 0.02 * torch.randn_like(state[key])
    # In training, the checkpoint comes after init_weights; in tests, nothing has been initialised.
    for init in (True, False):
        model = build('AttentionAlignment', pretrained, init=init)
        model.load_state_dict(state)
        for _ in range(2):
            with pytest.raises(ValueError, match=rf'^{part} is not what .* has, and stage 1 trains attentions only'):
                model(images, mode=mode)
        model(images)  # a student by itself


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize('kept', [0, 1])
def test_stage_1_takes_its_own_checkpoint_in_any_dtype(pretrained, dtype, kept):
    attention = [dict(type='adala_mm.SoftmaxAttention')] * kept + [LINEAR] * (2 - kept)
    models = [MODELS.build({'type': 'adala_mm.AttentionAlignment',
                            'backbone': tiny_vit(attention=attention, init_cfg=pretrained)}) for _ in range(2)]
    models[0].init_weights()
    state = {key: value.to(dtype) for key, value in disturb(models[0]).state_dict().items()}
    models[1].load_state_dict(state)
    images = torch.randn(2, 3, 32, 32, dtype=dtype)
    for model in models:
        for _ in range(2):
            assert torch.isfinite(model.to(dtype)(images, mode='loss')['loss'])


def pool(tokens, out_type):
    return tokens[:, 0] if out_type == 'cls_token' else tokens[:, 1:].mean(dim=1)


@both_stages
@pytest.mark.parametrize('out_type', [None, 'cls_token', 'avg_featmap'])
def test_scores_equal_a_direct_computation(with_head, stage, out_type):
    head = out_type and {'checkpoint': with_head['checkpoint'], 'out_type': out_type}
    model = disturb(build(stage, with_head, head=head)).eval()
    batches = [torch.randn(n, 3, 32, 32) for n in (24, 24, 12)]
    images = torch.cat(batches).double()
    teacher = softmax_features(with_head, images)
    student = copy.deepcopy(model.backbone).double().forward_features(images).detach()
    dot = (student * teacher).sum(-1) / (student.norm(dim=-1) * teacher.norm(dim=-1))
    wanted = {'align/rel_error': ((student - teacher).norm() / teacher.norm()).item(),
              'align/cosine': dot.mean().item()}
    assert wanted['align/rel_error'] > 0.05
    if head:
        # Tokens of random weights differ little between images: without centring all would be of one class.
        classifier = model.frozen['head']
        classifier.bias.data = -classifier.weight.data @ pool(teacher, out_type).mean(dim=0).float()
        classes = [copy.deepcopy(classifier).double()(pool(x, out_type)).argmax(dim=1) for x in (student, teacher)]
        wanted['align/top1_agreement'] = 100 * (classes[0] == classes[1]).double().mean().item()
        assert 0 < wanted['align/top1_agreement'] < 100

    metric = METRICS.build({'type': 'adala_mm.AlignmentMetric'})
    for batch in batches:
        predictions = model(batch, mode='predict')
        assert len(predictions) == len(batch) and all(isinstance(p, dict) for p in predictions)
        metric.process({}, predictions)
    assert metric.evaluate(len(images)) == pytest.approx(wanted, rel=1e-4)


@both_stages
def test_head_follows_the_model_and_is_not_saved(with_head, stage):
    model = build(stage, with_head, head={'checkpoint': with_head['checkpoint']}).train()
    head, state = model.frozen['head'], torch.load(with_head['checkpoint'])
    assert torch.equal(head.weight, state['head.weight']) and torch.equal(head.bias, state['head.bias'])
    assert list(model.state_dict()) == [f'backbone.{key}' for key in model.backbone.state_dict()]
    assert not head.training and not head.weight.requires_grad
    assert not ids(head.parameters()) & ids(model.parameters())
    model.to(torch.float64)
    assert {p.dtype for p in model.frozen['head'].parameters()} == {torch.float64}


@both_stages
def test_head_of_a_checkpoint_without_one_raises(pretrained, stage):
    with pytest.raises(ValueError, match='no classification head'):
        build(stage, pretrained, head={'checkpoint': pretrained['checkpoint']})


@both_stages
def test_teacher_is_loaded_when_only_testing(stage, pretrained):
    """Runner.test() loads the student's checkpoint and never calls init_weights."""
    trained = disturb(build(stage, pretrained)).eval()
    fresh = build(stage, pretrained, init=False).eval()
    fresh.load_state_dict(trained.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(fresh(images, mode='predict'), trained(images, mode='predict'), rtol=0, atol=0)
    assert torch.equal(fresh.teacher_features(images), softmax_features(pretrained, images))


@both_stages
def test_second_init_weights_leaves_the_teacher_alone(stage, pretrained):
    model = disturb(build(stage, pretrained))
    model.init_weights()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval().teacher_features(images), softmax_features(pretrained, images))


@pytest.mark.parametrize('head', [{'out_type': 'cls_token'}, {'checkpoint': 'x', 'out_type': 'raw'},
                                  {'checkpoint': 'x', 'outtype': 'cls_token'}])
def test_bad_head_raises(pretrained, head):
    with pytest.raises(ValueError, match='head must be dict'):
        build('FeatureAlignment', pretrained, init=False, head=head)
