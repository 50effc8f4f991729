"""Fused attention and the backbone's ``compile`` key change speed and nothing else."""
import copy
import shutil

import pytest
import torch

from adala_mm.registry import MODELS
from helpers import LINEAR, tiny_vit

compiles = pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile on a CPU needs a C++ compiler')


def training_curve(stage: str, checkpoint: dict) -> list[float]:
    torch.manual_seed(0)
    vit = tiny_vit(img_size=64, init_cfg=checkpoint)
    teacher = dict(teacher=vit) if stage == 'FeatureAlignment' else {}
    model = MODELS.build(dict(type=f'adala_mm.{stage}', backbone=vit | dict(attention=LINEAR), **teacher))
    model.init_weights()
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 3, 64, 64), mode='loss')['loss']
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize('stage', ['AttentionAlignment', 'FeatureAlignment'])
def test_training_curves_coincide(stage, sharp_pretrained, monkeypatch):
    fused = training_curve(stage, sharp_pretrained)
    monkeypatch.setattr('adala_mm.ops.fused_linear_attention.supports', lambda *args: False)
    plain = training_curve(stage, sharp_pretrained)
    assert fused != plain  # another order of sums
    assert fused == pytest.approx(plain, rel=1e-3) and plain[-1] < plain[0]


@compiles
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


@compiles
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


@pytest.fixture
def compilations(monkeypatch) -> list[tuple[str, str]]:
    """(class, mode) of what is compiled, which is traced only: this is about who is compiled, and not by what."""
    found, compile = [], torch.nn.Module.compile

    def record(module: torch.nn.Module, mode: str) -> None:
        found.append((type(module).__name__, mode))
        compile(module, backend='aot_eager', fullgraph=True)
    monkeypatch.setattr(torch.nn.Module, 'compile', record)
    return found


@pytest.mark.parametrize(('flag', 'wanted'), [
    (False, []), (True, 2 * [('Block', 'default')]), ('default', 2 * [('Block', 'default')]),
    ('max-autotune-no-cudagraphs', 2 * [('Block', 'max-autotune-no-cudagraphs')]),
    ('reduce-overhead', [('Blocks', 'reduce-overhead')]), ('max-autotune', [('Blocks', 'max-autotune')])])
def test_modes_of_compilation(flag, wanted, compilations):
    """A CUDA graph's output is gone with the next compiled call: with graphs, all blocks are one."""
    torch._dynamo.reset()
    plain = MODELS.build(tiny_vit(attention=LINEAR, out_indices=(0, 1)))
    model = MODELS.build(tiny_vit(attention=LINEAR, out_indices=(0, 1), compile=flag))
    assert compilations == wanted
    model.load_state_dict(plain.state_dict())
    images, results = torch.randn(2, 3, 32, 32), []
    for vit in (plain, model, copy.deepcopy(model)):
        maps = vit(images)
        loss = sum(m.sin().sum() for m in maps)
        results.append([*maps, *torch.autograd.grad(loss, list(vit.parameters()))])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()))


@pytest.mark.parametrize('mode', ['fast', 'reduce_overhead', None, 1])
def test_unknown_mode_of_compilation(mode):
    from adala_mm.preflight.plan import eager
    vit = tiny_vit(compile=mode)
    with pytest.raises(ValueError, match='compile=.*choose True, False, or a mode of torch.compile: default, reduce-'):
        MODELS.build(vit)
    with pytest.raises(ValueError, match='choose True, False, or a mode'):
        eager(dict(backbone=vit))


def test_stage_1_in_modes_of_compilation(sharp_pretrained, compilations, monkeypatch):
    functions = []
    monkeypatch.setattr(torch, 'compile', lambda function, mode=None, **_: functions.append(mode) or function)

    def build(mode: str):
        return MODELS.build(dict(type='adala_mm.AttentionAlignment', backbone=tiny_vit(
            attention=LINEAR, init_cfg=sharp_pretrained, compile=mode)))
    build('max-autotune-no-cudagraphs')
    assert functions.count('max-autotune-no-cudagraphs') == 1  # the teacher's way through a block
    assert compilations[2:] == 2 * [('LinearAttention', 'max-autotune-no-cudagraphs')]
    for mode in ('reduce-overhead', 'max-autotune'):
        with pytest.raises(ValueError, match=f"backbone.compile='{mode}' records a CUDA graph.*use compile=True"):
            build(mode)


@compiles
@pytest.mark.parametrize('kind', ['HedgehogAttention', 'MonarchAttention', 'RALAAttention'])
def test_other_attentions_compile_without_graph_breaks(kind):
    layer = MODELS.build(tiny_vit(attention=dict(type=f'adala_mm.{kind}'))).blocks[0].attn
    x = torch.randn(2, 17, 32)
    compiled = torch.compile(layer, fullgraph=True, backend='eager')
    torch.testing.assert_close(compiled(x, (4, 4), 1), layer(x, (4, 4), 1))
