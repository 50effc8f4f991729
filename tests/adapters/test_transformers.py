"""Models of transformers with a ViT inside, what is asked of ViTs there, and those that are refused."""
from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

import adala_mm
from adala_mm import align, calibrate, linearize
from helpers.hf_models import AROUND, SMALL, depth_anything, eomt, model_of
from helpers.vits import MLP, Exact, attentions, awaken, build, hf_vit, run

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('kind', AROUND)
def test_models_around_a_vit(kind, tmp_path):
    """In place: with softmax in the adapters the answer is the model's own; the ViT alone learns; files come back."""
    make, answer = AROUND[kind]
    teacher = awaken(make())
    images = torch.randn(2, 3, *[getattr(teacher.config, 'image_size', None) or 32] * 2)

    @torch.no_grad()
    def answer_of(model: nn.Module) -> torch.Tensor:
        return model(images)[answer]

    wanted = answer_of(teacher)
    torch.testing.assert_close(answer_of(linearize(teacher, 'softmax')), wanted, rtol=1e-4, atol=1e-4)
    student = copy.deepcopy(teacher)
    assert linearize(student, 'hedgehog', keep_softmax=[-1], inplace=True) is student
    assert student.num_linear_blocks == len(attentions(student)) == 3 and not torch.equal(answer_of(student), wanted)
    before = copy.deepcopy(student.state_dict())
    for stage in (1, 2):
        first, second = align(student, teacher, [images], stage=stage, steps=2, lr=1e-3, log_interval=1)
        assert second['loss'] < first['loss']
    head = [name for name in before if name.startswith(('head', 'neck', 'decode', 'classifier', 'decoder', 'mask_head'))
            or 'transformer_module' in name]
    assert all(torch.equal(student.state_dict()[name], before[name]) for name in head)
    adala_mm.save(student, tmp_path / 'model.safetensors')
    student.save_pretrained(tmp_path / 'folder')
    for path in ('model.safetensors', 'folder'):
        twin = adala_mm.load(tmp_path / path)
        assert type(twin) is type(student)
        torch.testing.assert_close(answer_of(twin), answer_of(student), rtol=1e-5, atol=1e-5)


def test_queries_of_eomt_keep_their_softmax():
    teacher, images = awaken(eomt()), [IMAGES]
    student = linearize(teacher)
    assert [type(block.attention).__name__ for block in student.layers] == [
        *['TransformersLinearAttention'] * 4, *['EomtAttention'] * 2]
    with pytest.raises(ValueError, match='no block 4 in a ViT of 4 blocks'):
        linearize(teacher, keep_softmax=[4])
    last = calibrate(student, teacher, images, steps=1, mlp=True)[-1]
    assert last['block'] == 4 and last['rel_error'] < last['rel_error_before']
    target = dict(mask_labels=[torch.ones(1, 32, 32)] * 2, class_labels=[torch.tensor([1])] * 2)
    student.train()(IMAGES, **target).loss.backward()  # queries see through masks
    assert all(block.attention.q_proj.weight.grad.abs().max() > 0 for block in student.layers)


@torch.no_grad()
def test_what_vits_of_transformers_are_asked_for():
    model = awaken(AROUND['masked images'][0]())
    linear, softmax = linearize(model), linearize(model, 'softmax')
    masked = torch.arange(16).expand(2, -1) % 3 == 0
    torch.testing.assert_close(softmax(IMAGES, bool_masked_pos=masked).reconstruction,
                               model(IMAGES, bool_masked_pos=masked).reconstruction, rtol=1e-4, atol=1e-4)
    assert not torch.equal(linear(IMAGES, bool_masked_pos=masked).reconstruction, linear(IMAGES).reconstruction)
    classifier, larger = linearize(awaken(AROUND['classifier'][0]())), torch.randn(1, 3, 48, 40)
    assert classifier(larger, interpolate_pos_encoding=True).logits.isfinite().all()
    with pytest.raises(ValueError, match="doesn't match model"):  # transformers' own
        classifier(larger)
    asked = [(classifier, dict(output_attentions=True)), (linearize(depth_anything()), dict(output_attentions=True)),
             (linearize(eomt()).eval(), dict(output_attentions=True))]
    if transformers.__version__ < '5':
        asked.append((classifier, dict(head_mask=torch.ones(4))))
    for net, option in asked:
        with pytest.raises(ValueError, match=f'{next(iter(option))} needs attention weights'):
            net(IMAGES, **option)


@pytest.mark.parametrize('kind', ['SiglipVisionModel', 'SiglipForImageClassification', 'SiglipModel'])
@torch.no_grad()
def test_a_refusal_leaves_nothing_behind(kind):
    """Of what transformers puts in place of softmax attentions while it collects their weights."""
    vision = dict(SMALL, **MLP)
    text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=50, **MLP)
    options = vision if kind == 'SiglipVisionModel' else dict(vision_config=vision, text_config=text)
    model = linearize(awaken(model_of(kind, **options, attn_implementation='eager')), keep_softmax=[0])
    words = dict(input_ids=torch.ones(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 4))
    words = words if kind == 'SiglipModel' else {}

    for asked in (dict(output_attentions=True), {}):
        with pytest.raises(ValueError, match='output_attentions needs attention weights'):
            model(pixel_values=IMAGES, **words, **asked)
        assert not any('forward' in vars(module) for module in model.modules())
        model.config.output_attentions = True
    model.config.output_attentions = False
    other = copy.deepcopy(model)
    attention = next(module for name, module in other.named_modules() if name.endswith('layers.0.self_attn')
                     and 'vision' in name)
    nn.init.normal_(attention.v_proj.weight)
    assert not torch.allclose(other(pixel_values=IMAGES, **words)[0], model(pixel_values=IMAGES, **words)[0])
    assert other.bfloat16()(pixel_values=IMAGES.bfloat16(), **words)[0].isfinite().all()


@pytest.mark.parametrize('family', ['hf_vit', 'hf_dinov3'])
@torch.no_grad()
def test_implementations_and_precisions(family):
    wanted = None
    for kind in ('eager', 'sdpa'):
        model = linearize(awaken(hf_vit(family, attn_implementation=kind)))
        torch.manual_seed(0)
        awaken(model)
        wanted = run(model, IMAGES) if wanted is None else wanted
        assert torch.equal(run(model, IMAGES), wanted)
    for dtype in (torch.bfloat16, torch.float16):
        got = run(linearize(build(family).to(dtype)), IMAGES.to(dtype))
        assert got.dtype == dtype and got.isfinite().all()


def test_positions_stay_where_they_are_in_stage_2():
    """DINOv3 moves them at random in training; a student that is its teacher would be told off for that."""
    teacher = awaken(hf_vit('hf_dinov3', pos_embed_rescale=2.0))
    student = linearize(teacher, Exact).train()
    assert not torch.allclose(run(student, IMAGES), run(teacher, IMAGES), rtol=0.1)
    (record,) = align(student, teacher, [IMAGES], stage=2, steps=1)
    assert record['rel_error'] < 1e-5 and all(module.training for module in student.modules())


def hybrid() -> nn.Module:
    bit = transformers.BitConfig(embedding_size=8, hidden_sizes=[8, 16, 32], depths=[1, 1, 1], num_groups=8,
                                 out_features=['stage1', 'stage2', 'stage3'], layer_type='bottleneck')
    return model_of('DPTModel', **SMALL | dict(patch_size=16), **MLP, is_hybrid=True, backbone_config=bit,
                    backbone_featmap_shape=[1, 32, 2, 2])


@pytest.mark.parametrize(('make', 'reason'), [
    (lambda: model_of('ViTMAEModel', **SMALL, **MLP), 'ViTMAEModel cannot.*on no grid: load its weights into a ViTM'),
    (lambda: model_of('ViTMAEForPreTraining', **SMALL, **MLP), 'ViTMAEForPreTraining cannot.*on no grid'),
    (lambda: model_of('Siglip2VisionModel', **MLP, num_patches=16, hidden_size=32, num_hidden_layers=1,
                      num_attention_heads=4), 'masks the padding.*SigLIP 2 for one resolution are SiglipVisionModel'),
    (hybrid, 'DPTModel cannot.*convolutional network')], ids=['mae', 'mae_pretraining', 'naflex', 'hybrid'])
def test_no_plain_vits(make, reason):
    with pytest.raises(TypeError, match=reason):
        linearize(make())


@torch.no_grad()
def test_weights_of_mae_are_those_of_a_vit(tmp_path):
    """With no patch masked and in their order, ViTMAEModel gives what ViTModel makes of its weights."""
    mae = awaken(model_of('ViTMAEModel', **SMALL, **MLP, mask_ratio=0.0))
    mae.save_pretrained(tmp_path)
    vit = transformers.ViTModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    in_order = torch.arange(16.0).expand(2, -1)
    torch.testing.assert_close(vit(IMAGES)[0], mae(IMAGES, noise=in_order)[0], rtol=1e-5, atol=1e-5)
    assert linearize(vit).num_linear_blocks == 4


def test_backbones_that_would_be_fetched(tmp_path):
    """A config may name one instead of describing it; no file makes us ask a server for it."""
    model = linearize(depth_anything())
    model.config.backbone = 'someone/dinov2'
    adala_mm.save(model, tmp_path / 'model.safetensors')
    with pytest.raises(ValueError, match=r'with a backbone from elsewhere, someone/dinov2.*load\(path, model\)'):
        adala_mm.load(tmp_path / 'model.safetensors')
    twin = adala_mm.load(tmp_path / 'model.safetensors', depth_anything())
    assert twin.num_linear_blocks == 4
