"""What every attention in the registry promises. A new variant is tested here as soon as it is registered."""
from __future__ import annotations

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import DefaultScope
from timm.models.vision_transformer import Attention as TimmAttention
from torch.nn import functional as F

from adala_mm.models.attentions import Attention, SoftmaxAttention, build_attention
from adala_mm.models.attentions.parts import GridTable
from adala_mm.registry import ATTENTIONS, MODELS
from helpers import ROOT, tiny_vit

ATTENTIONS.import_from_location()
NAMES = sorted(ATTENTIONS.module_dict)
GRIDS = [(4, 4), (3, 5), (1, 6)]
DIM, HEADS = 32, 4

every_attention = pytest.mark.parametrize('name', NAMES)


def build(name: str, hw: tuple[int, int] = (3, 5), num_prefix: int = 1, **options):
    return build_attention(dict(type=f'adala_mm.{name}', **options), DIM, HEADS, grid=hw, num_prefix=num_prefix).eval()


def disturbed(layer: Attention) -> Attention:
    """The layer with what it has beside the projections off its neutral start, so that it matters."""
    for key, parameter in layer.named_parameters():
        if not key.startswith(('qkv.', 'proj.')):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return layer


def tokens(hw, num_prefix, batch=2):
    return torch.randn(batch, num_prefix + hw[0] * hw[1], DIM)


def test_registry_is_complete():
    published = ('Hedgehog LoLCATS Linformer Performer Cosformer Nystromformer Monarch RALA InLine Focused PolaFormer '
                 'Agent ViTALiTy Castling Vicinity MLLA ViG RMT FCViT L2ViT').split()
    assert {'LinearAttention', 'SoftmaxAttention', *(f'{name}Attention' for name in published)} <= set(NAMES)


@every_attention
def test_layer_describes_itself(name):
    layer = ATTENTIONS.get(name)
    assert layer.__doc__ and layer.formula and layer.cost and layer.reference


def test_one_small_file_each():
    for path in (ROOT / 'adala_mm/models/attentions').glob('*.py'):
        assert len(path.read_text().splitlines()) <= 125, path.name


@every_attention
@pytest.mark.parametrize('qkv_bias', [True, False])
def test_keys_of_timm(name, qkv_bias):
    timm_state = TimmAttention(DIM, HEADS, qkv_bias=qkv_bias).state_dict()
    layer = build_attention({'type': f'adala_mm.{name}'}, DIM, HEADS, qkv_bias=qkv_bias, grid=(4, 4))
    own = {key: value.shape for key, value in layer.state_dict().items() if key.startswith(('qkv.', 'proj.'))}
    assert own == {key: value.shape for key, value in timm_state.items()}
    result = layer.load_state_dict(timm_state, strict=False)
    assert not result.unexpected_keys
    # What is missing belongs to a submodule of the variant, which load_vit tells apart by its name.
    assert not [key for key in result.missing_keys if key.startswith(('qkv.', 'proj.')) or '.' not in key]
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in timm_state.items())


@every_attention
@pytest.mark.parametrize('hw', GRIDS, ids=str)
@pytest.mark.parametrize('num_prefix', [0, 1, 5])
def test_shape_and_independent_samples(name, hw, num_prefix):
    layer, x = disturbed(build(name, hw, num_prefix)), tokens(hw, num_prefix)
    with torch.no_grad():
        out = layer(x, hw, num_prefix)
        alone = layer(x[1:], hw, num_prefix)
        assert torch.equal(layer(x, hw, num_prefix), out)
    assert out.shape == x.shape and out.dtype == x.dtype and out.isfinite().all()
    torch.testing.assert_close(out[1:], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(('name', 'options'), [*((name, {}) for name in NAMES),
                                               ('NystromformerAttention', dict(pinv_init='original')),
                                               ('L2ViTAttention', dict(local_concentration=True))],
                         ids=lambda value: ' '.join(value) if isinstance(value, dict) else value)
@pytest.mark.parametrize(('hw', 'num_prefix', 'training'), [((3, 5), 1, True), ((4, 4), 0, False)], ids=str)
def test_a_batch_of_nothing(name, options, hw, num_prefix, training):
    """As the last share of a batch may be: nothing comes out, gradients are 0, and so it is under bfloat16."""
    layer = disturbed(build(name, hw, num_prefix, **options)).train(training)
    for enabled in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            out = layer(x := tokens(hw, num_prefix, batch=0).requires_grad_(), hw, num_prefix)
        assert out.shape == x.shape
        out.sum().backward()
        assert x.grad.shape == x.shape
        assert all(not parameter.grad.any() for parameter in layer.parameters() if parameter.grad is not None)


@every_attention
def test_tokens_are_mixed(name):
    layer, x = build(name), tokens((3, 5), 1)
    changed = x.clone()
    changed[:, 7] += 1
    with torch.no_grad():
        moved = (layer(changed, (3, 5), 1) - layer(x, (3, 5), 1)).abs().amax(-1)
    assert (moved[:, [0, 6, 8]] > 1e-6).all()  # the class token and both neighbours notice


@every_attention
def test_parameters_behind_the_projection_are_named(name):
    options = dict(local_concentration=True) if name == 'L2ViTAttention' else {}
    layer = disturbed(build(name, **options))
    for run, seen in ((layer.attend, False), (layer, True)):
        grads = torch.autograd.grad(run(tokens((3, 5), 1), (3, 5), 1).square().sum(), layer.parameters(),
                                    allow_unused=True)
        blind = {key for (key, _), grad in zip(layer.named_parameters(), grads, strict=True) if grad is None}
        assert blind == {key for key, _ in layer.named_parameters() if not seen and
                         key.startswith(('proj.', *layer.after_proj))}


@every_attention
def test_prefix_tokens_matter(name):
    layer, x = build(name, num_prefix=2), tokens((3, 5), 2)
    changed = x.clone()
    changed[:, 0] += 1
    with torch.no_grad():
        moved = (layer(changed, (3, 5), 2) - layer(x, (3, 5), 2)).abs().amax(-1)
    assert (moved[:, [0, 1, 2, -1]] > 1e-7).all()


@every_attention
@pytest.mark.parametrize('hw', [(8, 8), (2, 7), (1, 3)], ids=str)
def test_other_grid_than_built_for(name, hw):
    layer, x = disturbed(build(name, (4, 4))), tokens(hw, 1)
    with torch.no_grad():
        out = layer(x, hw, 1)
    assert out.shape == x.shape and out.isfinite().all()


@every_attention
def test_checkpoint_of_another_grid_loads(name, tmp_path):
    """Stage 3 may run at a larger image than stages 1 and 2; what a variant has per position is resampled."""
    attention = dict(type=f'adala_mm.{name}')
    small, large = (MODELS.build(tiny_vit(img_size=size, attention=attention)) for size in (32, 64))
    for block in small.blocks:
        disturbed(block.attn)
    torch.save({'state_dict': {f'backbone.{key}': value for key, value in small.state_dict().items()}},
               tmp_path / 'small.pth')
    large.init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'small.pth'))
    large.init_weights()
    assert large.forward_features(torch.randn(1, 3, 64, 48)).isfinite().all()
    tables = {f'{key}.weight' for key, module in small.named_modules() if isinstance(module, GridTable)}
    state = large.state_dict()
    for key, value in small.state_dict().items():
        if key in tables:  # seen from afar, the same pattern
            pooled = F.adaptive_avg_pool2d(state[key], value.shape[1:])
            assert torch.corrcoef(torch.stack([pooled.flatten(), value.flatten()]))[0, 1] > 0.8, key
        elif '.attn.' in key:
            assert torch.equal(state[key], value), key


@pytest.mark.parametrize('name', [name for name in NAMES if not ATTENTIONS.get(name).is_softmax])
def test_every_layer_learns_in_both_stages(name, sharp_pretrained):
    options = {'NystromformerAttention': dict(num_landmarks=8),
               'CoarseToFineAttention': dict(tile=2, num_open=2, block=4)}.get(name, {})
    vit = dict(img_size=64, init_cfg=sharp_pretrained)  # 64 patches: more than a window, landmarks or open tiles
    student, images = tiny_vit(attention=dict(type=f'adala_mm.{name}', **options), **vit), torch.randn(4, 3, 64, 64)
    for stage, extra in (('AttentionAlignment', {}), ('FeatureAlignment', dict(teacher=tiny_vit(**vit)))):
        model = MODELS.build(dict(type=f'adala_mm.{stage}', backbone=student, **extra))
        model.init_weights()
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        losses = []
        for _ in range(5):
            loss = model(images, mode='loss')['loss']
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0], stage


@every_attention
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_model_in_half_precision(name, dtype):
    layer, x = build(name, (17, 15)), tokens((17, 15), 1)
    with torch.no_grad():
        wanted = layer(x, (17, 15), 1)
        out = layer.to(dtype)(x.to(dtype), (17, 15), 1)
    assert out.dtype == dtype and out.isfinite().all()
    assert (out.float() - wanted).abs().max() < 0.05 * wanted.abs().max()


@every_attention
def test_random_initialisation_keeps_what_a_variant_starts_from(name):
    vit = MODELS.build(tiny_vit(attention=dict(type=f'adala_mm.{name}')))
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    vit.init_weights()
    for key, value in vit.state_dict().items():
        if '.attn.' in key:
            assert torch.equal(value, before[key]) != ('.qkv.weight' in key or '.proj.weight' in key
                                                       or key.endswith(('qkv.bias', 'proj.bias'))), key


@every_attention
def test_gradients_reach_the_projections(name):
    layer, x = build(name).train(), tokens((3, 5), 1).requires_grad_()
    (layer(x, (3, 5), 1) * torch.randn(DIM)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())  # or DDP would complain
    for part in (*layer.qkv.weight.grad.chunk(3), layer.proj.weight.grad, layer.proj.bias.grad, x.grad):
        assert part.isfinite().all() and part.abs().max() > 1e-6


@every_attention
def test_bf16_autocast(name):
    layer, x = build(name, (8, 9)), tokens((8, 9), 1)
    with torch.no_grad():
        wanted = layer(x, (8, 9), 1)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = layer(x * 1.0, (8, 9), 1)
        big = layer(x * 1e3, (8, 9), 1)
    (out.float().square().sum() + big.float().square().mean()).backward()
    # A query whose positive channels are all small keeps few correct digits of them.
    assert (out.float() - wanted).abs().max() < 0.1 * wanted.abs().max()
    assert big.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())


@every_attention
def test_bad_arguments(name):
    with pytest.raises(ValueError, match='num_heads=5 .* 32'):
        build_attention({'type': f'adala_mm.{name}'}, 32, 5)
    with pytest.raises((TypeError, ValueError), match='nonsense'):
        build(name, nonsense=1)


@pytest.mark.parametrize('qkv_bias', [True, False])
def test_softmax_attention_equals_timm(qkv_bias):
    timm_layer = TimmAttention(DIM, HEADS, qkv_bias=qkv_bias)
    layer = SoftmaxAttention(DIM, HEADS, qkv_bias=qkv_bias)
    layer.load_state_dict(timm_layer.state_dict())
    x = 3 * tokens((3, 5), 1)
    torch.testing.assert_close(layer(x, (3, 5), 1), timm_layer(x))


def test_linear_attention_rejects_an_unknown_feature_map():
    with pytest.raises(ValueError, match="'elu'.*elu1, relu"):
        build('LinearAttention', feature_map='elu')


@pytest.mark.parametrize('kind', ['adala_mm.LinearAtention', 'LinearAtention'])
def test_unknown_type_names_the_close_one(kind):
    with pytest.raises(ValueError) as info:
        build_attention({'type': kind}, DIM, HEADS)
    message = str(info.value)
    assert repr(kind) in message and 'Did you mean adala_mm.LinearAttention?' in message
    assert all(f'adala_mm.{name}' in message for name in NAMES)


@pytest.mark.parametrize('cfg', [{'type': 'adala_mm.Qwerty'}, {}], ids=str)
def test_unknown_type_without_a_close_one(cfg):
    with pytest.raises(ValueError, match='Registered: .*adala_mm.SoftmaxAttention') as info:
        build_attention(cfg, DIM, HEADS)
    assert 'Did you mean' not in str(info.value)


class OwnAttention(Attention):
    def mix(self, q, k, v, hw, num_prefix):
        return v


@pytest.mark.parametrize('kind', [OwnAttention, f'{__name__}.OwnAttention'])
def test_own_attention_needs_no_registration(kind):
    assert type(build_attention({'type': kind}, 32, 4)) is OwnAttention


def test_a_new_attention_is_one_file_one_import_and_one_config_line(tmp_path, monkeypatch):
    """What the README promises: the file, registered on import, and the line that names it in a stage-1 config."""
    (tmp_path / 'mean_attention.py').write_text('''
from adala_mm.models.attentions import Attention
from adala_mm.registry import ATTENTIONS


@ATTENTIONS.register_module()
class MeanAttention(Attention):
    def mix(self, q, k, v, hw, num_prefix):
        return v.mean(dim=2, keepdim=True).expand_as(v)
''')
    monkeypatch.syspath_prepend(tmp_path)
    import mean_attention  # noqa: F401
    try:
        cfg = Config.fromfile(ROOT / 'configs/demo/stage1_demo_beacons.py')
        cfg.model.backbone.update(attention=dict(type='adala_mm.MeanAttention'))  # the config line
        model = MODELS.build(cfg.model)
        assert {type(block.attn).__name__ for block in model.backbone.blocks} == {'MeanAttention'}
        model.teacher_ready = True
        model(torch.randn(2, 3, 80, 80), mode='loss')['loss'].backward()
        assert model.backbone.blocks[0].attn.qkv.weight.grad.chunk(3)[2].abs().sum() > 0
    finally:
        for registry in (ATTENTIONS, MODELS):
            registry.module_dict.pop('MeanAttention')


@pytest.mark.parametrize('scope', ['mmseg', 'mmpretrain', 'mmdet', 'mmengine', 'adala_mm'])
def test_layers_are_modules_of_openmmlab(scope):
    """By name in any scope, as every registered module: alone or inside of a model of somebody else."""
    with DefaultScope.overwrite_default_scope(scope):
        for name in NAMES:
            assert MMENGINE_MODELS.get(f'adala_mm.{name}') is ATTENTIONS.get(name), name
        layer = MMENGINE_MODELS.build(dict(type='adala_mm.LinearAttention', dim=32, num_heads=4))
    assert type(layer) is MODELS.get('LinearAttention') and layer(torch.randn(2, 5, 32), (2, 2), 1).shape == (2, 5, 32)


def test_a_layer_of_ones_own_is_one_as_well():
    for taken in ('LinearAttention', 'AdaLAViT'):
        with pytest.raises(KeyError, match=f'{taken} is already registered'):
            ATTENTIONS.register_module(taken, module=OwnAttention)
        assert OwnAttention not in (MODELS.get(taken), ATTENTIONS.get(taken))
    try:
        assert ATTENTIONS.register_module(name=['Own', 'OwnToo'])(OwnAttention) is OwnAttention
        layer = MMENGINE_MODELS.build(dict(type='adala_mm.OwnToo', dim=32, num_heads=4))
        assert type(layer) is type(build_attention({'type': 'adala_mm.Own'}, 32, 4)) is OwnAttention
    finally:
        for registry in (ATTENTIONS, MODELS):
            for name in ('Own', 'OwnToo'):
                registry.module_dict.pop(name, None)


@pytest.mark.parametrize('kind', ['torch.nn.Linear', 'no_such_module.Layer', f'{__name__}.NoSuchLayer', None])
def test_what_is_no_attention_raises(kind):
    with pytest.raises(ValueError, match='unknown attention type.*adala_mm.LinearAttention'):
        build_attention({'type': kind}, 32, 4)


def test_error_inside_an_own_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / 'own_broken.py').write_text('import no_such_library')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match='no_such_library'):
        build_attention({'type': 'own_broken.Layer'}, 32, 4)
