"""Options of stage 2: several layers, hidden patches, the loss of stage 1."""
from __future__ import annotations

import copy

import pytest
import torch

from adala_mm.models.algorithms.feature_alignment import hide_patches, layer_tokens, random_patches
from helpers import LINEAR
from helpers.options import DWCONV, SOFTMAX, images, stage1, stage2, step


@pytest.mark.parametrize('layers', [[0], [0, 1], [-2, -1, -1]])
@pytest.mark.parametrize('with_cp', [False, True])
def test_layers_against_what_a_head_reads(sharp_pretrained, layers, with_cp):
    trainable = r'^(?!blocks\.1\.)' if layers == [0] else None
    student = dict(with_cp=with_cp, attention=DWCONV, trainable=trainable)
    model = stage2(sharp_pretrained, layers=layers, student=student).train()
    x = images()
    out = model.loss(x)
    out['loss'].backward()

    def read(vit: torch.nn.Module) -> tuple[torch.Tensor, ...]:  # as a head does
        vit = copy.deepcopy(vit).double().train()
        vit.zero_grad()
        vit.out_type, vit.out_indices, vit.with_cp = 'raw', [i % 2 for i in layers], False
        return vit, vit(x.double())
    (student, got), (_, wanted) = read(model.backbone), read(model.frozen['teacher'])
    loss = sum((a - b.detach()).square().mean() for a, b in zip(got, wanted, strict=True)) / len(layers)
    loss.backward()
    assert out['loss'].item() == pytest.approx(loss.item(), rel=1e-4)
    errors = [(a - b).norm() / b.norm() for a, b in zip(got, wanted, strict=True)]
    assert out['rel_error'].item() == pytest.approx(sum(errors).item() / len(layers), rel=1e-4)
    ours, theirs = (dict(vit.named_parameters()) for vit in (model.backbone, student))
    for name, parameter in ours.items():
        if theirs[name].grad is None:
            assert parameter.grad is None and layers == [0] and name.startswith('blocks.1.')
        else:
            torch.testing.assert_close(parameter.grad.double(), theirs[name].grad, rtol=1e-3, atol=1e-5, msg=name)


def test_scores_are_of_the_final_features_whatever_the_layers(pretrained):
    x = images()
    scores = [stage2(pretrained, layers=layers, student=dict(trainable=r'blocks\.0\.')).eval()(x, mode='predict')[0]
              for layers in ([-1], [0])]
    assert scores[0]['error'] == scores[1]['error'] > 0


def test_blocks_behind_the_last_layer_must_not_learn(pretrained):
    with pytest.raises(ValueError, match=r'layers=\[0\]: nothing behind block 0 is compared, and '
                                         r'blocks\.1\.norm1\.weight would learn: add -1 to layers, or let trainable'):
        stage2(pretrained, layers=[-2])
    step(stage2(pretrained, layers=[0], student=dict(trainable=r'blocks\.0\.')))
    # The loss of stage 1 reaches linear attentions wherever they are, and nothing else.
    options = dict(layers=[0], attention_weight=1.0)
    step(stage2(pretrained, **options, student=dict(trainable=r'blocks\.0\.|\.attn\.')))
    for student in (dict(trainable=r'blocks\.0\.|\.mlp\.'),
                    dict(trainable=r'blocks\.0\.|\.attn\.', attention=[LINEAR, SOFTMAX])):
        with pytest.raises(ValueError, match=r'blocks\.1\.(mlp|attn)\.\S+ would learn'):
            stage2(pretrained, **options, student=student)


# --- hidden patches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('ratio', 'hidden'), [(0.01, 1), (0.25, 3), (0.5, 6), (0.75, 9)])
def test_random_patches(ratio, hidden):
    mask = random_patches(400, (3, 4), ratio, torch.device('cpu'))
    assert mask.shape == (400, 12) and mask.dtype == torch.bool
    assert set(mask.sum(dim=1).tolist()) == {hidden}
    assert mask.any(dim=0).all() and len({tuple(row) for row in mask.tolist()}) > 5  # any patch, each image its own


def test_hidden_patches_leave_the_bias_and_nothing_else_changes(pretrained):
    vit, x = stage2(pretrained).backbone, images(2, (32, 48))
    grid = (4, 6)
    mask = random_patches(2, grid, 0.5, x.device)
    seen = hide_patches(x, mask, grid)
    before, after = (vit.patch_embed(pixels).flatten(2).transpose(1, 2) for pixels in (x, seen))
    torch.testing.assert_close(after[mask], vit.patch_embed.proj.bias.expand_as(after[mask]))
    torch.testing.assert_close(after[~mask], before[~mask])


@pytest.mark.parametrize('masked_only', [False, True])
def test_masked_distillation_against_two_networks(pretrained, masked_only):
    model, x = stage2(pretrained, mask_ratio=0.5, masked_only=masked_only).train(), images()
    torch.manual_seed(5)
    out = model.loss(x)
    torch.manual_seed(5)
    mask = random_patches(3, (4, 4), 0.5, x.device)
    teacher = model.teacher_features(x)  # it sees all
    student = model.backbone.forward_features(hide_patches(x, mask, (4, 4)))
    difference = student - teacher
    if masked_only:
        difference = difference[:, 1:][mask]
    assert out['loss'].item() == pytest.approx(difference.square().mean().item(), rel=1e-5)
    assert list(model.state_dict()) == [f'backbone.{key}' for key in model.backbone.state_dict()]  # no token is kept
    # Validation is of whole images.
    assert torch.equal(model.eval()(x), model.backbone.forward_features(x))


# --- attention loss in stage 2 ---------------------------------------------------------------------------------------


def test_attention_weight_adds_the_loss_of_stage_1(pretrained):
    x, weight = images(), 50.0
    first, plain = stage1(pretrained, [LINEAR, SOFTMAX]).train(), dict(attention=[LINEAR, SOFTMAX])
    both, alone = (stage2(pretrained, student=plain, loss_scale=3.0, **options).train()
                   for options in (dict(attention_weight=weight), {}))
    outs = [model.loss(x) for model in (first, alone, both)]
    for out in outs:
        out['loss'].backward()
    assert outs[2]['attention_mse'].item() == pytest.approx(outs[0]['loss'].item(), rel=1e-5)
    assert not outs[2]['attention_mse'].requires_grad
    assert outs[2]['loss'].item() == pytest.approx(outs[1]['loss'].item() + weight * outs[0]['loss'].item(), rel=1e-5)
    grads = [{name: p.grad for name, p in model.backbone.named_parameters()} for model in (first, alone, both)]
    for name, grad in grads[2].items():
        if '.attn.proj.' in name and name.startswith('blocks.0'):
            assert not torch.allclose(grad, grads[1][name])  # stage 1 itself keeps it as it is
        else:
            wanted = grads[1][name] + (0 if grads[0][name] is None else weight * grads[0][name])
            torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6, msg=name)


def test_teacher_has_no_hooks_left(pretrained):
    model = stage2(pretrained, attention_weight=1.0).train()
    model.loss(images())
    assert not any(module._forward_hooks for module in model.frozen['teacher'].modules())
    with torch.no_grad():
        assert not model.loss(images())['loss'].requires_grad


def test_teacher_is_compiled_unless_its_attentions_are_read(pretrained):
    for weight in (0.0, 1.0):
        model = stage2(pretrained, vit=dict(compile=True), init=False, attention_weight=weight)
        assert model.backbone.compile_mode
        assert bool(model.frozen['teacher'].compile_mode) == (weight == 0)


# --- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('student', [{}, dict(with_cp=True), dict(attention=DWCONV), dict(attention=[SOFTMAX, DWCONV])],
                         ids=['plain', 'with_cp', 'dwconv', 'retained'])
@pytest.mark.parametrize('options', [
    dict(loss=dict(cosine=0.9, smooth_l1=0.1, class_token=1.0)), dict(layers=[0, 1]), dict(mask_ratio=0.5),
    dict(mask_ratio=0.5, masked_only=True), dict(attention_weight=50.0),
    dict(loss=dict(mse=5.0, cosine=1.0), layers=[0, -1], mask_ratio=0.25, masked_only=True, attention_weight=50.0),
], ids=lambda options: '-'.join(options))
def test_every_option_trains(pretrained, student, options):
    model = stage2(pretrained, student=student, **options)
    log = step(model)
    assert ('attention_mse' in log) == ('attention_weight' in options)
    assert list(model.state_dict()) == [f'backbone.{key}' for key in model.backbone.state_dict()]
    teacher = model.frozen['teacher']
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters()) and not teacher.training


@pytest.mark.parametrize('options', [
    dict(loss=dict(cosine=1.0)), dict(loss=dict(smooth_l1=1.0)), dict(loss=dict(class_token=1.0))],
    ids=lambda options: next(iter(options['loss'])))
@pytest.mark.parametrize('vit', [dict(num_registers=2), dict(class_token=False)], ids=['registers', 'no_class_token'])
def test_single_terms_reach_all_that_learns(options, vit):
    model = stage2(None, vit=vit, init=False, student=dict(attention=DWCONV), **options)
    for parameter in (*model.backbone.parameters(), *model.frozen['teacher'].parameters()):
        torch.nn.init.normal_(parameter, std=0.2)
    model.train().loss(images())['loss'].backward()
    assert all(parameter.grad is not None for parameter in model.backbone.parameters())


@pytest.mark.parametrize(('options', 'message'), [
    (dict(loss=dict(mes=1.0)), "loss has no term 'mes'"), (dict(loss={}), 'at least one term needs a weight above 0'),
    (dict(loss=dict(mse=0.0)), 'at least one term needs a weight above 0'),
    (dict(layers=[]), 'name at least one block, from -2 to 1 in a ViT of depth=2'),
    (dict(layers=[0, 2]), r'layers=\[0, 2\]: name at least one block, from -2 to 1'),
    (dict(mask_ratio=1.0), r'mask_ratio=1.0 must lie in \[0, 1\)'), (dict(mask_ratio=-0.1), 'mask_ratio=-0.1'),
    (dict(masked_only=True), 'masked_only=True compares hidden patches only'),
    (dict(attention_weight=-1.0), 'attention_weight=-1.0 must not be negative'),
    (dict(attention_weight=1.0, student=dict(attention=SOFTMAX)), 'no linear attention of the backbone learns'),
    (dict(attention_weight=1.0, student=dict(trainable='mlp')), 'no linear attention of the backbone learns'),
    (dict(layers=[0], student=dict(depth=3)), r'differ in depth \(3 and 2\): layers=\[0\]'),
    (dict(attention_weight=1.0, student=dict(depth=3)), 'differ in depth'),
])
def test_bad_options_raise(pretrained, options, message):
    with pytest.raises(ValueError, match=message):
        stage2(pretrained, init=False, **options)


def test_layer_tokens_of_the_last_block_are_the_final_features(pretrained):
    vit, x = stage2(pretrained).backbone, images()
    (last,) = layer_tokens(vit, x)
    assert torch.equal(last, vit.forward_features(x))
