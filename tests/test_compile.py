"""The backbone's ``compile`` key changes speed and nothing else."""
import shutil

import pytest
import torch
from conftest import LINEAR, tiny_vit

from adala_mm.registry import MODELS

pytestmark = pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile on a CPU needs a C++ compiler')


def test_compiled_vit_is_the_same_vit():
    plain = MODELS.build(tiny_vit(attention=LINEAR))
    compiled = MODELS.build(tiny_vit(attention=LINEAR, compile=True))
    compiled.load_state_dict(plain.state_dict())  # with the same keys
    images, upstream, results = torch.randn(2, 3, 32, 32), torch.randn(2, 17, 32), []
    for model in (plain, compiled):
        with torch._dynamo.config.patch(error_on_recompile=True):  # all blocks share one compilation
            features = model.forward_features(images)
        (features * upstream).sum().backward()
        results.append([features, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()))


def test_compiled_stage_1(sharp_pretrained):
    images, results = torch.randn(2, 3, 32, 32), []
    for flag in (False, True):
        model = MODELS.build(dict(type='adala_mm.AttentionAlignment', backbone=tiny_vit(
            attention=LINEAR, init_cfg=sharp_pretrained, compile=flag)))
        model.init_weights()
        loss = model.train()(images, mode='loss')['loss']
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))


@pytest.mark.parametrize('kind', ['HedgehogAttention', 'MonarchAttention', 'RALAAttention'])
def test_other_attentions_compile_without_graph_breaks(kind):
    layer = MODELS.build(tiny_vit(attention=dict(type=f'adala_mm.{kind}'))).blocks[0].attn
    x = torch.randn(2, 17, 32)
    compiled = torch.compile(layer, fullgraph=True, backend='eager')
    torch.testing.assert_close(compiled(x, (4, 4), 1), layer(x, (4, 4), 1))
