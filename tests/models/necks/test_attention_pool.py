"""The attention pool against timm's."""
from __future__ import annotations

import pytest
import timm
import torch
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.structures import DataSample
from safetensors.torch import save_file
from torch import nn

from adala_mm.models.necks import AttentionPool
from helpers import LINEAR, tiny_vit

POOL = 'vit_large_patch16_siglip_256.webli'


@pytest.fixture
def siglip(tmp_path):
    """A small SigLIP as timm has it, with its file."""
    model = timm.create_model('vit_tiny_patch16_224', img_size=64, embed_dim=32, depth=2, num_heads=4, num_classes=0,
                              class_token=False, global_pool='map').eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    save_file(model.state_dict(), tmp_path / 'siglip.safetensors')
    return model, dict(type='Pretrained', checkpoint=str(tmp_path / 'siglip.safetensors'))


def test_attention_pool_is_timms(siglip):
    theirs, init = siglip
    vit = MODELS.build(tiny_vit(img_size=64, patch_size=16, class_token=False, out_type='raw', init_cfg=init)).eval()
    pool = AttentionPool(32, 4, init_cfg=init)
    for module in (vit, pool):
        module.init_weights()
    image = torch.randn(2, 3, 64, 96)
    theirs.set_input_size(img_size=(64, 96))
    for got in (pool(vit(image)), pool((None, *vit(image)))):
        torch.testing.assert_close(got, (theirs(image),))
    assert len(pool.attn_pool.loaded[0]) == len(pool.state_dict())  # which the check of weights looks at


def test_attention_pool_of_another_file(siglip, tmp_path):
    theirs, init = siglip
    with pytest.raises(ValueError, match='pool of .*siglip.safetensors does not fit.*dim, num_heads and mlp_ratio'):
        AttentionPool(32, 4, mlp_ratio=2, init_cfg=init).init_weights()
    state = {key: value for key, value in theirs.state_dict().items() if 'pool' not in key}
    save_file(state, tmp_path / 'a.safetensors')
    with pytest.raises(ValueError, match=f'a.safetensors has no attention pool.*{POOL}'):
        AttentionPool(32, 4, init_cfg=dict(init, checkpoint=str(tmp_path / 'a.safetensors'))).init_weights()


def test_attention_pool_under_a_classifier(siglip):
    _, init = siglip
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(dict(
            type='ImageClassifier', backbone=tiny_vit(class_token=False, out_type='raw', attention=LINEAR),
            neck=dict(type='adala_mm.AttentionPool', dim=32, num_heads=4, init_cfg=init),
            head=dict(type='LinearClsHead', num_classes=5, in_channels=32)))
    model.init_weights()
    labels = [DataSample().set_gt_label(i) for i in (1, 3)]
    model.loss(torch.randn(2, 3, 32, 32), labels)['loss'].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert torch.equal(model.neck.state_dict()['attn_pool.latent'], siglip[0].attn_pool.latent)
