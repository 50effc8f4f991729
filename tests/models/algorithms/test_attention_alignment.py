"""Stage 1 against two full networks in float64, one softmax and one linear, that share no code path with its loss."""
import pytest
import torch
from torch.nn import functional as F

from adala_mm.models.algorithms.attention_alignment import weights_loss
from adala_mm.models.attentions import SoftmaxAttention, build_attention
from adala_mm.registry import MODELS
from adala_mm.utils.cost import peak_bytes
from helpers import LINEAR, tiny_vit
from helpers.options import train

SOFTMAX = {'type': 'adala_mm.SoftmaxAttention'}
FEATURE_MAPS = ('elu1', 'relu', 'softplus', 'softmax', 'exp')
PHI = {
    'elu1': lambda x: F.elu(x) + 1,
    'relu': torch.relu,
    'softplus': F.softplus,
    'softmax': lambda x: x.softmax(dim=-1),
    'exp': torch.exp,
}


def linear(feature_map: str = 'elu1') -> dict:
    return LINEAR | {'feature_map': feature_map}


def stage1(sharp_pretrained, attention=LINEAR, target='output', **vit):
    model = MODELS.build({'type': 'adala_mm.AttentionAlignment', 'target': target,
                          'backbone': tiny_vit(attention=attention, init_cfg=sharp_pretrained, **vit)})
    model.init_weights()
    return model


def disturb(model):
    """Moves the student off the checkpoint, so that a teacher taken from the student would be noticed."""
    for block in model.backbone.blocks:
        if not block.attn.is_softmax:
            for parameter in block.attn.qkv.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def softmax_vit(sharp_pretrained):
    vit = MODELS.build(tiny_vit(init_cfg=sharp_pretrained))
    vit.init_weights()
    return vit.eval()


def watch_softmax_vit(sharp_pretrained, images) -> list[dict]:
    """What attention reads and writes in each block of an untouched softmax ViT in float64."""
    vit, seen = softmax_vit(sharp_pretrained).double(), []
    for block in vit.blocks:
        record = {}
        seen.append(record)
        block.attn.register_forward_pre_hook(lambda _, args, r=record: r.update(h=args[0].detach()))
        block.attn.proj.register_forward_pre_hook(lambda _, args, r=record: r.update(heads=args[0].detach()))
        block.attn.register_forward_hook(lambda _, args, out, r=record: r.update(output=out.detach()))
    vit(images.double())
    return seen


def quadratic_linear_attention(attn, h):
    """Linear attention before the output projection, by its full N x N matrix."""
    b, n, c = h.shape
    q, k, v = (part.reshape(b, n, attn.num_heads, -1).transpose(1, 2) for part in attn.qkv(h).chunk(3, dim=-1))
    phi = PHI[attn.feature_map]
    matrix = phi(q) @ phi(k).transpose(-2, -1)
    return (matrix / (matrix.sum(dim=-1, keepdim=True) + attn.eps) @ v).transpose(1, 2).reshape(b, n, c)


def two_network_loss(model, sharp_pretrained, images, target):
    """(loss, error of each linear block, the linear network that holds the gradients)."""
    attentions = [linear(b.attn.feature_map) if not b.attn.is_softmax else SOFTMAX for b in model.backbone.blocks]
    student = MODELS.build(tiny_vit(attention=attentions))
    student.load_state_dict(model.backbone.state_dict())
    student.double()
    losses, errors = [], []
    for block, seen in zip(student.blocks, watch_softmax_vit(sharp_pretrained, images), strict=True):
        if not block.attn.is_softmax:
            got = quadratic_linear_attention(block.attn, seen['h'])
            got = block.attn.proj(got) if target == 'output' else got
            losses.append((got - seen[target]).square().mean())
            errors.append(((got - seen[target]).norm() / seen[target].norm()).item())
    return sum(losses) / len(losses), errors, student


@pytest.mark.parametrize('feature_map', FEATURE_MAPS)
@pytest.mark.parametrize('target', ['output', 'heads'])
def test_loss_and_gradients_equal_two_networks(sharp_pretrained, target, feature_map):
    model = disturb(stage1(sharp_pretrained, linear(feature_map), target)).train()
    images = torch.randn(3, 3, 32, 32)
    out = model(images, mode='loss')
    out['loss'].backward()
    loss, errors, reference = two_network_loss(model, sharp_pretrained, images, target)
    loss.backward()

    assert out['loss'].item() == pytest.approx(loss.item(), rel=1e-4)
    assert out['rel_error'].item() == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    assert out['rel_error_worst'].item() == pytest.approx(max(errors), rel=1e-4)
    wanted = dict(reference.named_parameters())
    for name, parameter in model.backbone.named_parameters():
        learns = '.attn.qkv.' in name
        assert parameter.requires_grad == learns, name
        assert (parameter.grad is not None) == learns, name
        if learns:
            assert (parameter.grad - wanted[name].grad).norm() < 1e-4 * wanted[name].grad.norm(), name


@pytest.mark.parametrize('feature_map', FEATURE_MAPS)
def test_training_lowers_the_loss(sharp_pretrained, feature_map):
    model = stage1(sharp_pretrained, linear(feature_map)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = train(model, torch.randn(4, 3, 32, 32), optimizer, steps=30)
    assert losses[-1] < 0.5 * losses[0]


def test_training_moves_the_projections_and_not_the_teacher(sharp_pretrained):
    # Weight decay could reach frozen weights, drop path the stream.
    model = stage1(sharp_pretrained, drop_path_rate=0.9).train()
    images = torch.randn(2, 3, 32, 32)
    wanted = softmax_vit(sharp_pretrained).forward_features(images)
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    torch.testing.assert_close(model.teacher_features(images), wanted)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(images)['loss'].backward()
        optimizer.step()

    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, before[key]) == ('.attn.qkv.' not in key), key
    torch.testing.assert_close(model.teacher_features(images), wanted)
    torch.testing.assert_close(model.eval().teacher_features(images), wanted)
    assert (model(images, mode='tensor') - wanted).norm() > 0.05 * wanted.norm()  # the student is another network


def test_drop_path_does_not_touch_the_loss(sharp_pretrained):
    images = torch.randn(2, 3, 32, 32)
    plain = stage1(sharp_pretrained).train().loss(images)
    dropped = stage1(sharp_pretrained, drop_path_rate=0.9).train().loss(images)
    assert dropped == plain


def test_train_mode_reaches_the_learning_attentions_alone(sharp_pretrained):
    model = stage1(sharp_pretrained, [SOFTMAX, LINEAR]).train()
    first, second = model.backbone.blocks
    assert model.training and second.attn.training and second.attn.qkv.training
    assert not any(m.training for m in (model.backbone, first, first.attn, second, second.drop_path, second.mlp))
    assert not any(m.training for m in model.eval().modules())


@pytest.mark.parametrize('target', ['output', 'heads'])
def test_softmax_blocks_of_a_hybrid_are_not_in_the_loss(sharp_pretrained, target):
    model = disturb(stage1(sharp_pretrained, [SOFTMAX, LINEAR], target)).train()
    images = torch.randn(2, 3, 32, 32)
    out = model.loss(images)
    out['loss'].backward()
    loss, errors, _ = two_network_loss(model, sharp_pretrained, images, target)
    assert len(errors) == 1
    assert out['loss'].item() == pytest.approx(loss.item(), rel=1e-4)
    assert out['rel_error'].item() == out['rel_error_worst'].item() == pytest.approx(errors[0], rel=1e-4)
    learns = [name for name, p in model.backbone.named_parameters() if p.requires_grad]
    assert learns == ['blocks.1.attn.qkv.weight', 'blocks.1.attn.qkv.bias']


def test_rel_error_is_zero_for_a_perfect_student(sharp_pretrained):
    model = stage1(sharp_pretrained)
    for block, twin in zip(model.backbone.blocks, model.frozen['attentions'], strict=True):
        assert isinstance(twin, SoftmaxAttention)
        block.attn.attend = twin.attend
    with torch.no_grad():
        found = {key: value.item() for key, value in model.loss(torch.randn(2, 3, 32, 32)).items()}
    assert found == pytest.approx({'loss': 0, 'rel_error': 0, 'rel_error_worst': 0}, abs=1e-6)


def test_rel_error_is_one_for_a_silent_student(sharp_pretrained):
    model = stage1(sharp_pretrained, target='heads')
    for block in model.backbone.blocks:
        for parameter in block.attn.qkv.parameters():
            parameter.data[-32:] = 0  # the values
    out = model.loss(torch.randn(2, 3, 32, 32))
    assert out['rel_error'].item() == pytest.approx(1) and out['rel_error_worst'].item() == pytest.approx(1)


def test_all_softmax_raises(sharp_pretrained):
    with pytest.raises(ValueError, match='nothing to align'):
        stage1(sharp_pretrained, SOFTMAX)


def test_unknown_target_raises(sharp_pretrained):
    with pytest.raises(ValueError, match="'logits'.*output, heads"):
        stage1(sharp_pretrained, target='logits')


def test_missing_pretrained_weights_raise():
    with pytest.raises(ValueError, match='backbone has no pretrained weights'):
        stage1(None)


def test_unknown_mode_raises(sharp_pretrained):
    with pytest.raises(ValueError, match="'train'.*loss, predict, tensor"):
        stage1(sharp_pretrained)(torch.randn(1, 3, 32, 32), mode='train')


def native_hedgehog(checkpoint, **options):
    return stage1(checkpoint, attention=dict(type='adala_mm.HedgehogAttention'), trainable='feature_map', **options)


def test_weights_target_is_the_cross_entropy_of_attention_matrices(sharp_pretrained, monkeypatch):
    monkeypatch.setattr('adala_mm.models.algorithms.attention_alignment.QUERIES', 5)  # 17 tokens: an uneven last part
    model, images = disturb(native_hedgehog(sharp_pretrained, target='weights')), torch.randn(2, 3, 32, 32)
    out = model(images, mode='loss')
    out['loss'].backward()

    losses = []
    for block, record in zip(model.backbone.blocks, watch_softmax_vit(sharp_pretrained, images), strict=True):
        attn, softmax = block.attn.double(), softmax_vit(sharp_pretrained).blocks[len(losses)].attn.double()
        q, k = ((part.unflatten(-1, (4, 8)).transpose(1, 2)) for part in softmax.qkv(record['h']).chunk(3, -1)[:2])
        wanted = torch.softmax(q @ k.transpose(-2, -1) / 8 ** 0.5, dim=-1)
        q, k = ((part.unflatten(-1, (4, 8)).transpose(1, 2)) for part in attn.qkv(record['h']).chunk(3, -1)[:2])
        q, k = q @ attn.feature_map.q, k @ attn.feature_map.k
        q, k = (torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1) for x in (q, k))
        found = q @ k.transpose(-2, -1)
        losses.append(-(wanted * (found / found.sum(-1, keepdim=True)).log()).sum(-1).mean())
    torch.testing.assert_close(out['loss'].double(), torch.stack(losses).mean(), rtol=1e-4, atol=0)
    grads = [block.attn.feature_map.k.grad.double() for block in model.backbone.blocks]
    wanted = torch.autograd.grad(torch.stack(losses).mean(), [b.attn.feature_map.k for b in model.backbone.blocks])
    for got, exact in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-3 * exact.abs().max().item())


def test_weights_target_under_autocast_keeps_the_wanted_weights_in_float32():
    torch.manual_seed(0)
    attn, softmax = (build_attention(dict(type=f'adala_mm.{kind}Attention'), 32, 4) for kind in ('Hedgehog', 'Softmax'))
    h = torch.randn(2, 17, 32)
    with torch.no_grad():
        softmax.qkv.weight *= 10  # sharp: in bfloat16 the logits would be wrong in the first digit behind the point
        with torch.autocast('cpu', dtype=torch.bfloat16):
            got = weights_loss(attn, softmax, h, (4, 4), 1)
            (q, k, _), (wanted_q, wanted_k, _) = ([x.double() for x in a.project(h)] for a in (attn, softmax))
        wanted = (wanted_q @ wanted_k.transpose(-2, -1) / 8 ** 0.5).softmax(-1)
        loss = -(wanted * attn.weights(q, k).log()).sum(-1).mean()
    assert got.item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize(('options', 'name'), [
    (dict(), 'qkv.weight'), (dict(trainable='feature_map|qkv.bias'), 'qkv.bias'),
    (dict(attention=dict(type='adala_mm.HedgehogAttention', dwconv=3), trainable='feature_map|dwc'), 'dwconv.weight'),
    (dict(attention=dict(type='adala_mm.LoLCATSAttention'), trainable='feature_map|lora'), 'lora.a.[vo]')],
    ids=['all', 'bias', 'dwconv', 'lora'])
def test_weights_target_with_values_that_would_learn_raises(sharp_pretrained, options, name):
    options = dict(attention=dict(type='adala_mm.HedgehogAttention')) | options
    with pytest.raises(ValueError, match=rf"target='weights'.* blocks\.0\.attn\.{name} would learn.*'feature_map'"):
        stage1(sharp_pretrained, target='weights', **options)
    stage1(sharp_pretrained, **options)


@pytest.mark.parametrize(('attention', 'name'), [
    (dict(type='adala_mm.VicinityAttention'), 'se.0.weight'),
    (dict(type='adala_mm.L2ViTAttention', local_concentration=True), 'local.norm.weight'),
    (dict(type='adala_mm.LoLCATSAttention'), 'lora.a.o')], ids=['gate', 'lcm', 'lora'])
def test_heads_target_with_what_comes_after_the_projection_raises(sharp_pretrained, attention, name):
    with pytest.raises(ValueError, match=rf"target='heads'.* blocks\.0\.attn\.{name} comes after.*target='output'"):
        stage1(sharp_pretrained, attention, 'heads')
    stage1(sharp_pretrained, attention)
    stage1(sharp_pretrained, attention, 'heads', trainable='qkv')


def test_weights_target_may_teach_what_makes_queries_and_keys(sharp_pretrained):
    model = stage1(sharp_pretrained, dict(type='adala_mm.LoLCATSAttention'), 'weights',
                   trainable=r'feature_map|lora\.[ab]\.[qk]').train()
    learners = [p for p in model.parameters() if p.requires_grad]
    for parameter in learners:
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.loss(torch.randn(2, 3, 32, 32))['loss'].backward()
    assert len(learners) == 2 * 6 and all(p.grad.abs().sum() > 0 for p in learners)


def test_trainable_narrows_stage_1_down(sharp_pretrained):
    for target in ('weights', 'heads', 'output'):
        model = native_hedgehog(sharp_pretrained, target=target)
        learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert learns == {f'backbone.blocks.{i}.attn.feature_map.{x}' for i in range(2) for x in 'qk'}
        model.train()(torch.randn(2, 3, 32, 32), mode='loss')['loss'].backward()
        assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_weights_target_needs_an_attention_that_shows_them(sharp_pretrained):
    with pytest.raises(ValueError, match="target='weights'.*LinearAttention has no method weights"):
        stage1(sharp_pretrained, target='weights')


def test_trainable_that_leaves_nothing_raises(sharp_pretrained):
    with pytest.raises(ValueError, match=r"trainable='mlp' leaves nothing to learn"):
        stage1(sharp_pretrained, trainable='mlp')


def test_memory_does_not_grow_with_depth(sharp_pretrained):
    """Beyond weights and their gradients: one block's activations are gone before the next block runs."""
    peaks = {}
    for depth in (2, 6):
        model = MODELS.build({'type': 'adala_mm.AttentionAlignment',
                              'backbone': tiny_vit(img_size=128, depth=depth, attention=LINEAR,
                                                   init_cfg=sharp_pretrained)}).train()
        images = torch.randn(4, 3, 128, 128)
        peaks[depth] = peak_bytes(lambda model=model, images=images: model.loss(images)['loss'].backward())
        gradients = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
        peaks[depth] -= 2 * gradients
    assert peaks[6] < 1.1 * peaks[2]


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float16, 0.02), (torch.bfloat16, 0.05)], ids=str)
def test_gradients_survive_half_precision(sharp_pretrained, dtype, tolerance):
    """The mean over all elements has gradients below float16's smallest number."""
    model, images = disturb(stage1(sharp_pretrained)).train(), torch.randn(4, 3, 32, 32)
    grads = []
    for enabled in (False, True):
        with torch.autocast('cpu', dtype=dtype, enabled=enabled):
            loss = model.loss(images)['loss']
        loss.backward()
        grads.append([block.attn.qkv.weight.grad.clone() for block in model.backbone.blocks])
        model.zero_grad()
    for exact, half in zip(*grads, strict=True):
        assert (half - exact).norm() < tolerance * exact.norm()


def test_gradient_accumulation_and_scaling_reach_the_gradients(sharp_pretrained):
    model, images = disturb(stage1(sharp_pretrained)).train(), torch.randn(4, 3, 32, 32)
    weight = model.backbone.blocks[1].attn.qkv.weight
    model.loss(images)['loss'].backward()
    once = weight.grad.clone()
    (0.25 * model.loss(images)['loss']).backward()
    torch.testing.assert_close(weight.grad, 1.25 * once)
