"""Linearized models in files: what comes back is what was saved, and nobody else takes it for softmax."""
from __future__ import annotations

import copy
import json
import logging
import pickle
from contextlib import nullcontext

import pytest
import timm
import torch
from mmengine.runner.checkpoint import get_state_dict
from mmpretrain.models.backbones import VisionTransformer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import adala_mm
from adala_mm import linearize, registry
from adala_mm.models.attentions.marks import encode
from helpers import tiny_vit
from helpers.vits import HF, IMAGES, SMALL, MeanAttention, attentions, awaken, build, headless, own_vit, run, timm_vit


def created(name: str = 'vit_tiny_patch16_224', **changes) -> nn.Module:
    """A tiny ViT that timm's factory has made."""
    return awaken(timm.create_model(name, **SMALL | changes))


MODELS = {
    'timm': created,
    'timm, other options': lambda: created('vit_small_patch14_reg4_dinov2', init_values=0.1, drop_path_rate=0.2,
                                           act_layer='quick_gelu', num_classes=0, global_pool='', in_chans=3),
    'timm, dinov3': lambda: created('vit_small_patch16_dinov3', num_classes=0),
    **{name: lambda name=name: build(name) for name in (*HF, 'mmpretrain', 'mmpretrain_no_class', 'adala')},
    'mmpretrain, no LayerScale': lambda: awaken(VisionTransformer(
        arch=dict(embed_dims=32, num_layers=3, num_heads=4, feedforward_channels=64), img_size=32, patch_size=8,
        out_type='raw')),
    'adala, dinov2': lambda: awaken(registry.MODELS.build(tiny_vit(
        depth=3, num_registers=2, no_embed_class=True, layer_scale=1e-5))),
    'adala, dinov3': lambda: awaken(registry.MODELS.build(tiny_vit(
        depth=3, num_registers=2, rotary={}, swiglu=True, mlp_ratio=8 / 3, layer_scale=1e-5))),
}


@pytest.mark.parametrize('name', MODELS)
@torch.no_grad()
def test_what_was_saved_comes_back(name, tmp_path):
    model = linearize(MODELS[name](), 'hedgehog', keep_softmax=[0, 1])
    linearize(model, dict(type='linear', feature_map='relu'), keep_softmax=[1], inplace=True)
    for attn in attentions(model):
        for parameter in attn.parameters():
            nn.init.normal_(parameter, std=0.2)
    wanted = run(model, IMAGES)  # which leaves nothing on the model that counts
    adala_mm.save(model, tmp_path / 'model.safetensors')
    twin = adala_mm.load(tmp_path / 'model.safetensors')
    assert type(twin) is type(model) and not twin.training
    assert [type(layer) for layer in twin.modules()] == [type(layer) for layer in model.modules()]
    assert torch.equal(run(twin, IMAGES), wanted)


@torch.no_grad()
def test_precision_and_a_changed_model_come_back(tmp_path):
    model = linearize(created().bfloat16(), 'linear')
    model.reset_classifier(7)
    adala_mm.save(model.bfloat16(), tmp_path / 'a.safetensors')
    twin = adala_mm.load(tmp_path / 'a.safetensors')
    images = IMAGES.bfloat16()
    assert twin(images).shape == (2, 7) and torch.equal(twin(images), model(images))


@torch.no_grad()
def test_the_name_of_a_file_is_free(tmp_path):
    model = linearize(created())
    adala_mm.save(model, tmp_path / 'model.bin')
    assert torch.equal(adala_mm.load(tmp_path / 'model.bin')(IMAGES), model(IMAGES))


@pytest.mark.parametrize('wrap', [
    torch.compile, nn.DataParallel, AveragedModel, lambda model: torch.compile(nn.DataParallel(torch.compile(model)))],
    ids=['compile', 'DataParallel', 'average', 'several'])
@torch.no_grad()
def test_what_is_wrapped_is_saved_without_its_wrapper(wrap, tmp_path):
    model = linearize(created())
    adala_mm.save(wrap(model), tmp_path / 'model.safetensors')
    assert torch.equal(adala_mm.load(tmp_path / 'model.safetensors')(IMAGES), model(IMAGES))


@torch.no_grad()
def test_folders_have_one_set_of_weights(tmp_path):
    """What stands beside it is not read; what its index names is not missed."""
    model = linearize(build('hf_dinov2'))
    wanted = run(model, IMAGES)
    model.save_pretrained(tmp_path / 'whole')
    zeros = {name: 0 * value for name, value in load_file(tmp_path / 'whole/model.safetensors').items()}
    save_file(zeros, tmp_path / 'whole/model_ema.safetensors')
    assert torch.equal(run(adala_mm.load(tmp_path / 'whole'), IMAGES), wanted)
    model.save_pretrained(tmp_path / 'parts', max_shard_size='20KB')
    shard = sorted((tmp_path / 'parts').glob('*.safetensors'))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f'{shard.name}: .*1 of them are not beside it'):
        adala_mm.load(tmp_path / 'parts')


def files_of(model: nn.Module, folder) -> dict:
    files = {'save': folder / 'save.safetensors', 'state_dict': folder / 'state.pth'}
    adala_mm.save(model, files['save'])
    torch.save(model.state_dict(), files['state_dict'])
    return files


@pytest.mark.parametrize('kind', ['linear', 'hedgehog'])
def test_plain_timm_refuses_the_weights(kind, tmp_path):
    from timm.models import load_checkpoint, save_for_hf
    model = linearize(created(), kind, keep_softmax=[0])
    for file in files_of(model, tmp_path).values():
        with pytest.raises(RuntimeError, match=r'Unexpected key.*blocks\.1\.attn\.adala_mm'):
            timm.create_model('vit_tiny_patch16_224', checkpoint_path=str(file), **SMALL)
        with pytest.raises(RuntimeError, match='size mismatch for blocks.1.attn.proj.bias'):
            load_checkpoint(created(), str(file), strict=False)
    save_for_hf(model, tmp_path / 'hub', safe_serialization=True)
    for changes in ({}, dict(num_classes=0)):  # another number of classes, and timm no longer loads strictly
        with pytest.raises(RuntimeError, match='size mismatch for blocks.1.attn.proj.bias'):
            timm.create_model(f'local-dir:{tmp_path / "hub"}', pretrained=True, **changes)


@pytest.mark.parametrize('name', HF)
@pytest.mark.parametrize('kind', ['linear', 'hedgehog'])
def test_plain_transformers_refuses_the_weights(name, kind, tmp_path):
    model = linearize(build(name), kind, keep_softmax=[0])
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match='size mismatch|ignore_mismatched_sizes'):
        type(model).from_pretrained(tmp_path)
    adala_mm.save(model, tmp_path / 'model.safetensors')  # under the name that transformers looks for
    with pytest.raises((OSError, ValueError, RuntimeError), match='adala_mm|size mismatch|ignore_mismatched_sizes'):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize('name', [*HF, 'timm'])
@torch.no_grad()
def test_folders_of_timm_and_transformers_come_back(name, tmp_path):
    model = linearize(MODELS[name](), 'hedgehog', keep_softmax=[-1])
    for attn in attentions(model):
        nn.init.normal_(list(attn.parameters())[0], std=0.2)
    folders = [tmp_path / 'a', tmp_path / 'b']
    for folder, options in zip(folders, ({}, dict(max_shard_size='20KB')), strict=True):
        if name == 'timm':
            timm.models.save_for_hf(model, folder, safe_serialization=not options)
        else:
            model.save_pretrained(folder, **options)
        assert torch.equal(run(adala_mm.load(folder), IMAGES), run(model, IMAGES))
        twin = linearize(MODELS[name](), 'hedgehog', keep_softmax=[-1])
        twin.load_state_dict(model.state_dict())
        assert torch.equal(run(twin, IMAGES), run(model, IMAGES))


def test_another_attention_refuses_the_weights(tmp_path):
    relu = dict(type='adala_mm.LinearAttention', feature_map='relu')
    state = linearize(created(), relu).state_dict()
    linearize(created(), relu).load_state_dict(state)
    linearize(created(), relu | dict(eps=1e-6)).load_state_dict(state)  # the default, said aloud
    wanted = r"blocks\.0\.attn was saved as LinearAttention\(feature_map='relu', .*LinearAttention\(feature_map='elu1'"
    with pytest.raises(RuntimeError, match=wanted):
        linearize(created()).load_state_dict(state)
    torch.save(headless(linearize(timm_vit(), relu).state_dict()), tmp_path / 'relu.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'relu.pth'))
    ours = own_vit('augreg', relu)
    ours.init_cfg = init_cfg
    ours.init_weights()
    assert torch.equal(ours.blocks[0].attn.proj.bias, torch.load(tmp_path / 'relu.pth')['blocks.0.attn.proj.bias'][0])
    for other in (dict(type='adala_mm.SoftmaxAttention'), dict(type='adala_mm.LinearAttention')):
        vit = adala_mm.registry.MODELS.build(tiny_vit(depth=3, attention=other, init_cfg=init_cfg))
        with pytest.raises(ValueError, match=r'is of a linearized model: blocks\.0\.attn was saved as LinearAtt'):
            vit.init_weights()


@torch.no_grad()
def test_models_that_tell_no_base(tmp_path, caplog):
    caplog.set_level(logging.INFO, 'adala_mm')

    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = created(), nn.Linear(5, 2)

        def forward(self, images):
            return self.head(self.backbone(images))

    plain, path = Segmenter(), tmp_path / 'a.safetensors'
    model = linearize(plain, 'hedgehog')
    adala_mm.save(model, path)
    assert any('Segmenter cannot be built from what it tells of itself' in message for message in caplog.messages)
    with pytest.raises(ValueError, match=r'how to build its model .*class of your own.*load\(path, model\)'):
        adala_mm.load(path)
    assert torch.equal(adala_mm.load(path, Segmenter())(IMAGES), model(IMAGES))
    torch.save(model.state_dict(), tmp_path / 'a.pth')
    assert torch.equal(adala_mm.load(tmp_path / 'a.pth', Segmenter())(IMAGES), model(IMAGES))
    with pytest.raises(ValueError, match='not written by adala_mm.save'):
        adala_mm.load(tmp_path / 'a.pth')


def captioner() -> nn.Module:
    """Of transformers, whose decoder has one matrix for words that it reads and that it writes."""
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig
    vit = ViTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8,
                    intermediate_size=64)
    words = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=16)
    return awaken(VisionEncoderDecoderModel(VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, words)))


@torch.no_grad()
def test_tied_weights_of_a_model_that_load_is_given(tmp_path):
    model, words = linearize(captioner()), torch.tensor([[1, 2, 3], [4, 5, 6]])
    adala_mm.save(model, tmp_path / 'a.safetensors')
    tied = {'decoder.lm_head.weight', 'decoder.transformer.wte.weight'}
    assert len(tied & load_file(tmp_path / 'a.safetensors').keys()) == 1
    torch.save(model.state_dict(), tmp_path / 'a.pth')
    model.save_pretrained(tmp_path / 'folder')
    for path in ('a.safetensors', 'a.pth', 'folder'):
        twin = adala_mm.load(tmp_path / path, captioner())
        assert torch.equal(twin(IMAGES, words).logits, model(IMAGES, words).logits)
        assert twin.decoder.lm_head.weight is twin.decoder.transformer.wte.weight


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_tied_weights_are_tied_again(dtype, tmp_path):
    """Also those of linear attentions, and with more than one dtype; parts of one memory are not whole weights."""
    model = linearize(created(), 'hedgehog', keep_softmax=[0])
    model.blocks[1].mlp.fc1.weight = model.blocks[2].mlp.fc1.weight
    model.blocks[1].attn.proj.bias = model.blocks[2].attn.proj.bias
    model.blocks[0].norm1.weight.data, model.blocks[0].norm1.bias.data = torch.randn(64).chunk(2)
    model.head.to(dtype)
    adala_mm.save(model, tmp_path / 'a.safetensors')
    twin = adala_mm.load(tmp_path / 'a.safetensors')
    assert torch.equal(twin.forward_features(IMAGES), model.forward_features(IMAGES))
    assert twin.blocks[1].mlp.fc1.weight is twin.blocks[2].mlp.fc1.weight
    assert twin.blocks[1].attn.proj.bias is twin.blocks[2].attn.proj.bias
    assert twin.blocks[0].mlp.fc1.weight is not twin.blocks[2].mlp.fc1.weight and twin.head.weight.dtype == dtype


@torch.no_grad()
def test_arguments_that_the_model_does_not_tell(tmp_path, caplog):
    caplog.set_level(logging.INFO, 'adala_mm')
    path, arguments = tmp_path / 'a.safetensors', dict(**SMALL, dynamic_img_size=True)
    model = linearize(build('augreg'))
    adala_mm.save(model, path)
    assert any('cannot be built' in message for message in caplog.messages)
    adala_mm.save(model, path, model_args=arguments)
    assert torch.equal(adala_mm.load(path)(IMAGES), model(IMAGES))
    for wrong in (dict(qk_norm=True), dict(num_heads=2), dict(dynamic_img_size=False)):
        with pytest.raises(ValueError, match='do not make this VisionTransformer'):
            adala_mm.save(model, path, model_args=arguments | wrong)


@torch.no_grad()
def test_attentions_of_ones_own(tmp_path):
    model, path = linearize(created(), MeanAttention, keep_softmax=[0]), tmp_path / 'a.safetensors'
    adala_mm.save(model, path)
    with pytest.raises(ValueError, match=r'MeanAttention, which is not registered.*attentions=\[MyAttention\]'):
        adala_mm.load(path)
    assert torch.equal(adala_mm.load(path, attentions=[MeanAttention])(IMAGES), model(IMAGES))


class Scaled(MeanAttention):
    def __init__(self, dim, num_heads, qkv_bias=True, scale=None):
        super().__init__(dim, num_heads, qkv_bias)


def test_options_that_no_file_can_hold():
    with pytest.raises(TypeError, match='options of Scaled are to be saved.*make anything else part of a subclass'):
        linearize(created(), dict(type=Scaled, scale=abs))


# --- files that lie ---------------------------------------------------------------------------------------------------


def rewritten(path, about: dict | None = None, kind: dict | None = None, **more) -> None:
    """The file with another story of itself."""
    with safe_open(path, 'pt') as file:
        metadata = file.metadata()
    state = load_file(path)
    if kind is not None:
        state['blocks.0.attn.adala_mm'] = encode(kind)
    if about is not None or more:
        metadata['adala_mm'] = json.dumps({'base': about or json.loads(metadata['adala_mm'])['base'], **more})
    save_file(state, path, metadata)


@pytest.mark.parametrize('base', [
    dict(library='timm', name='local-dir:x', args={}), dict(library='timm', name='os.system', args={}),
    dict(library='transformers', name='os.system', args={}), dict(library='os', name='os.system', args={}),
    dict(library='transformers', name='transformers.models.clip.modeling_clip.logger', args={}),
    dict(library='mmpretrain', name='mmpretrain.models.backbones.vision_transformer.VisionTransformer',
         args=dict(norm_cfg=dict(type='os.system'))), 'timm', ['timm'], dict(library='timm')], ids=str)
def test_files_call_nothing_but_supported_models(base, tmp_path):
    path = tmp_path / 'a.safetensors'
    adala_mm.save(linearize(created()), path)
    rewritten(path, base)
    with pytest.raises(ValueError, match='file asks for|does not tell how'):
        adala_mm.load(path)


@pytest.mark.parametrize('ties', [{'blocks.0.forward': 'head.forward'}, ['head']], ids=str)
@torch.no_grad()
def test_files_tie_nothing_but_weights(ties, tmp_path):
    model, path = linearize(created()), tmp_path / 'a.safetensors'
    adala_mm.save(model, path)
    rewritten(path, ties=ties)
    assert torch.equal(adala_mm.load(path)(IMAGES), model(IMAGES))


def test_files_name_no_foreign_attention(tmp_path):
    path = tmp_path / 'a.safetensors'
    adala_mm.save(linearize(created()), path)
    for kind, message in ((dict(type='os.system'), 'has blocks with os.system, which is not registered'),
                          (dict(kind=1), 'holds no attention of ours')):
        rewritten(path, kind=kind)
        with pytest.raises(ValueError, match=message):
            adala_mm.load(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match='VisionTransformer has no linear block'):
        adala_mm.save(created(), tmp_path / 'a.safetensors')
    save_file(created().state_dict(), tmp_path / 'a.safetensors')
    timm.models.save_for_hf(created(), tmp_path / 'hub', safe_serialization=True)
    for path in ('a.safetensors', 'hub'):
        with pytest.raises(ValueError, match='holds no linearized model'):
            adala_mm.load(tmp_path / path)
    for path in (tmp_path, tmp_path / 'nothing.safetensors'):
        with pytest.raises(FileNotFoundError):
            adala_mm.load(path)
    adala_mm.save(linearize(created()), tmp_path / 'b.safetensors')
    with pytest.raises(ValueError, match=r'does not fit VisionTransformer[^$]*size mismatch'):
        adala_mm.load(tmp_path / 'b.safetensors', created(embed_dim=16))


def test_averages_and_tracers_see_the_parameters():
    """timm's EMA runs through state dicts and rounds what is no float; tracers take the parameters from there."""
    from timm.utils import ModelEmaV2
    model = linearize(created(), 'hedgehog')
    ema = ModelEmaV2(model, decay=0.9)
    for _ in range(3):
        ema.update(model)
    for name, value in ema.module.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name])
    assert model.state_dict(keep_vars=True)['blocks.0.attn.proj.bias'] is model.blocks[0].attn.proj.bias


def test_runners_of_mmengine_save_the_marks():
    """Its own walk over modules, also over copies, whose weights are theirs."""
    model = linearize(created(), 'hedgehog', keep_softmax=[0])
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        nn.init.normal_(twin.blocks[1].attn.proj.bias)
        state, wanted = get_state_dict(twin), twin.state_dict()
        assert list(state) == list(wanted) and all(torch.equal(state[key], value) for key, value in wanted.items())
        assert torch.equal(state['blocks.1.attn.proj.bias'][0], twin.blocks[1].attn.proj.bias)
        assert sorted(key for key in state if key.endswith('adala_mm')) == [f'blocks.{i}.attn.adala_mm' for i in (1, 2)]
    with pytest.raises(RuntimeError, match=r'Unexpected key.*blocks\.1\.attn\.adala_mm'):
        created().load_state_dict({key: value for key, value in state.items() if '.feature_map.' not in key})
    assert get_state_dict(model, keep_vars=True)['blocks.1.attn.proj.bias'] is model.blocks[1].attn.proj.bias


class Lora(nn.Linear):
    """A projection with low-rank matrices inside, as peft and others have them."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)
        self.lora_A, self.lora_B = nn.Linear(dim, 2, bias=False), nn.Linear(2, dim, bias=False)


@pytest.mark.parametrize('bias', [True, False])
def test_matrices_in_the_output_projection_are_saved_as_they_are(bias):
    model, twin = (linearize(created()) for _ in range(2))
    for net in (model, twin):
        net.blocks[0].attn._modules['proj'] = Lora(32)
        if not bias:
            net.blocks[0].attn.proj.bias = None
    state = model.state_dict()
    changed = 'bias' if bias else 'weight'
    assert {key for key, value in model.named_parameters() if state[key].shape != value.shape} == {
        f'blocks.0.attn.proj.{changed}', 'blocks.1.attn.proj.bias', 'blocks.2.attn.proj.bias'}
    lora = {key: value for key, value in state.items() if 'lora' in key}
    assert len(lora) == 2 and not twin.load_state_dict(lora, strict=False).unexpected_keys
    twin.load_state_dict(state)
    assert torch.equal(twin.blocks[0].attn.proj.lora_B.weight, model.blocks[0].attn.proj.lora_B.weight)


def test_weights_without_their_marks_are_loaded_by_linear_blocks_only():
    """So torch.distributed.checkpoint gives those of rank 0 to the others: what is a parameter, in rank 0's shape."""
    model = linearize(created())
    state = {key: value for key, value in model.state_dict().items() if not key.endswith('adala_mm')}
    twin = linearize(created())
    twin.load_state_dict(state)
    assert torch.equal(twin.blocks[2].attn.proj.bias, model.blocks[2].attn.proj.bias)
    softmax = adala_mm.registry.MODELS.build(tiny_vit(depth=3))
    with pytest.raises(RuntimeError, match='size mismatch for blocks.0.attn.proj.bias'):
        softmax.load_state_dict(headless(state))


@torch.no_grad()
def test_quantized_projections():
    """They have no parameters: the mark alone tells what the layer is."""
    model = torch.ao.quantization.quantize_dynamic(linearize(created()), {'blocks.0.attn.proj'})
    state = model.state_dict()
    assert 'blocks.0.attn.adala_mm' in state and state['blocks.1.attn.proj.bias'].shape == (1, 32)
    twin = torch.ao.quantization.quantize_dynamic(linearize(created()), {'blocks.0.attn.proj'})
    twin.load_state_dict(state)
    assert torch.equal(twin(IMAGES), model(IMAGES))


def test_options_that_a_file_does_not_know_yet():
    model = linearize(created(), dict(type='linear', feature_map='relu'))
    for options, message in ((dict(feature_map='relu'), None), ({}, r'saved as LinearAttention\(\)')):
        mark = encode(dict(type='adala_mm.LinearAttention') | options)
        state = model.state_dict() | {f'blocks.{i}.attn.adala_mm': mark for i in range(3)}
        with nullcontext() if message is None else pytest.raises(RuntimeError, match=message):
            model.load_state_dict(state)
