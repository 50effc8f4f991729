"""Checkpoints of ViTs with rotary positions, and those that are refused."""
from __future__ import annotations

import pytest
import torch
from timm import create_model
from torch import nn

from adala_mm.models.backbones.weights import positions_for
from adala_mm.registry import ATTENTIONS
from helpers.rotary import loaded, narrow, own, softmax_file

ATTENTIONS.import_from_location()


def test_other_files_are_named(tmp_path):
    init_cfg, _ = softmax_file(tmp_path / 'rotary.pth')
    with pytest.raises(ValueError, match=r'(?s)missing +pos_embed +- +\(1, 21, 32\).*say rotary=dict\(\)'):
        own(rotary=None, init_cfg=init_cfg).init_weights()
    init_cfg, _ = softmax_file(tmp_path / 'plain.pth', rotary=None)
    for options in ({}, dict(num_registers=2)):  # the grid of positions that are not wanted is no matter
        with pytest.raises(ValueError, match=r'(?s)unexpected +pos_embed +\(1, 21, 32\).*: leave out rotary'):
            own(init_cfg=init_cfg, **options).init_weights()
    init_cfg, _ = softmax_file(tmp_path / 'small.pth')
    own(img_size=48, init_cfg=init_cfg).init_weights()  # of any size
    with pytest.raises(ValueError, match=r'init_cfg\.grid=\(4, 4\) .* rotary positions.*leave it out'):
        own(init_cfg=dict(init_cfg, grid=(4, 4))).init_weights()


@pytest.mark.parametrize(('changes', 'options'), [
    (dict(num_reg_tokens=0), dict(num_registers=0)), (dict(num_reg_tokens=1, class_token=False), dict(num_registers=1)),
    (dict(num_reg_tokens=0, use_abs_pos_emb=True), dict(num_registers=0, rotary=None))], ids=str)
def test_names_of_other_rotary_vits_of_timm_are_not_taken_for_dinov3(changes, options, tmp_path):
    theirs = narrow(**changes, rope_type='cat', rope_rotate_half=False)
    with pytest.raises(ValueError, match=r'(?s)does not fit this ViT.*unexpected +blocks\.\*\.gamma_1'):
        loaded(theirs, tmp_path / 'timm.pth', class_token=changes.get('class_token', True), **options)


@pytest.mark.parametrize('path', ['timm://vit_pe_core_tiny_patch16_384', 'pe.pth', 'timm://vit_small_patch16_rope_224'])
def test_rotary_positions_that_no_weight_shows_are_refused(path, tmp_path, monkeypatch):
    theirs, local = create_model('vit_pe_core_tiny_patch16_384', depth=2), tmp_path / 'pe.pth'
    state = theirs.state_dict()
    torch.save(state if path == 'pe.pth' else {key: state[key] for key in state if 'attn_pool' not in key}, local)
    monkeypatch.setattr('adala_mm.utils.checkpoint.local_file', lambda path: local)
    model = own(img_size=384, patch_size=16, embed_dim=192, num_heads=3, num_registers=0, layer_scale=None,
                pre_norm=True, qkv_bias=True, rotary=None, init_cfg=dict(type='Pretrained', checkpoint=path))
    with pytest.raises(ValueError, match="rotary positions .*of another kind than DINOv3's.*linearize"):
        model.init_weights()


def test_a_whole_model_of_another_size():
    small, large = (nn.ModuleDict(dict(backbone=own(img_size=size))) for size in (32, 48))
    state = small.state_dict()
    fitted = positions_for(large, state)
    assert fitted.keys() == state.keys()
    large.load_state_dict(fitted)


def test_biases_of_the_file(tmp_path):
    """Zeros are left out of a ViT without biases; others are an error, and a ViT with biases wants some."""
    theirs, path = narrow(qkv_bias=True), tmp_path / 'timm.pth'
    torch.save(theirs.state_dict(), path)
    with pytest.raises(ValueError, match=r'unexpected +blocks\.\*\.attn\.qkv\.bias +\(x 2\)'):
        own(init_cfg=dict(type='Pretrained', checkpoint=str(path))).init_weights()
    for block in theirs.blocks:
        nn.init.zeros_(block.attn.q_bias)
        nn.init.zeros_(block.attn.v_bias)
    model, images = loaded(theirs, path, norm_eps=1e-6), torch.randn(1, 3, 24, 40)
    torch.testing.assert_close(model.forward_features(images), theirs.forward_features(images), rtol=1e-6, atol=1e-6)
    torch.save(narrow().state_dict(), path)
    with pytest.raises(ValueError, match=r'missing +blocks\.\*\.attn\.qkv\.bias +\(x 2\)'):
        own(qkv_bias=True, init_cfg=dict(type='Pretrained', checkpoint=str(path))).init_weights()


@pytest.mark.parametrize(('key', 'library'), [('storage_tokens', 'official DINOv3'),
                                              ('embeddings.register_tokens', 'transformers')])
def test_names_of_other_libraries_ask_for_the_converter(key, library, tmp_path):
    path = tmp_path / 'theirs.pth'
    torch.save({key: torch.ones(1, 4, 32), 'mask_token': torch.ones(1, 32), 'blocks.0.ls1.gamma': torch.ones(32)}, path)
    with pytest.raises(ValueError, match=f'holds weights of {library}.*convert_vfm.py'):
        own(init_cfg=dict(type='Pretrained', checkpoint=str(path))).init_weights()
