"""The estimate of memory against a measured peak."""
from __future__ import annotations

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from adala_mm.preflight import Plan, memory
from helpers import LINEAR, tiny_vit
from helpers.preflight import ESTIMATE, HEAD_LINE, assert_one_red, flagship


def test_too_little_memory(root, monkeypatch):
    monkeypatch.setattr(memory, 'estimate', ESTIMATE)
    monkeypatch.setattr(memory, 'head_line', HEAD_LINE)
    options = {'train_dataloader.batch_size': 4, 'train_dataloader.dataset.pipeline.3.crop_size': (256, 256),
               'model.data_preprocessor.size': (256, 256)}
    assert_one_red(flagship(root, '--device-memory', '0.05', **options), 'memory', '4 x 256 x 256', '51 MiB on the',
                   fix='train_dataloader.batch_size=')


def measured(model: nn.Module, batch: dict, optimizer: dict) -> int:
    """Weights, optimizer state and the peak of a real step, by PyTorch's profiler."""
    from adala_mm.utils.cost import peak_bytes
    wrapper = build_optim_wrapper(model, dict(type='OptimWrapper', optimizer=optimizer))
    model.train_step(batch, wrapper)  # makes the optimizer's state
    wrapper.zero_grad()
    networks = [model, *getattr(model, 'frozen', {}).values()]
    held = memory.held_by(t for network in networks for t in (*network.parameters(), *network.buffers()))
    held += memory.held_by(t for state in wrapper.optimizer.state.values() for t in state.values())
    return held + peak_bytes(lambda: model.train_step(batch, wrapper))


@pytest.mark.parametrize('kind', ['stage 1', 'stage 2', 'segmentor'])
def test_the_estimate_of_memory_against_a_measured_peak(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, 'head_line', HEAD_LINE)
    size, count = 128, 4
    vit = tiny_vit(depth=4, embed_dim=64, img_size=size, attention=LINEAR)
    inputs = torch.rand(count, 3, size, size)
    if kind == 'segmentor':
        model = dict(type='EncoderDecoder', backbone=vit, decode_head=dict(
            type='FCNHead', in_channels=64, channels=32, num_convs=1, concat_input=False, num_classes=8,
            loss_decode=dict(type='CrossEntropyLoss')),
            data_preprocessor=dict(type='SegDataPreProcessor', size=(size, size)))
    else:
        vit['init_cfg'] = dict(type='Pretrained', checkpoint=str(tmp_path / 'vit.pth'))
        torch.save(MODELS.build(dict(vit, init_cfg=None)).state_dict(), tmp_path / 'vit.pth')
        softmax = dict(type='adala_mm.SoftmaxAttention')
        model = dict(type='adala_mm.AttentionAlignment', backbone=vit) if kind == 'stage 1' else dict(
            type='adala_mm.FeatureAlignment', backbone=vit, teacher=dict(vit, attention=softmax))
    optimizer = dict(type='AdamW', lr=1e-4)
    cfg = Config(dict(model=model, optim_wrapper=dict(optimizer=optimizer), train_dataloader=dict(batch_size=count)))
    with DefaultScope.overwrite_default_scope('mmseg'):
        plan = Plan(cfg)
        estimated = ESTIMATE(plan)(count, size, size)
        batch = dict(inputs=inputs)
        if kind == 'segmentor':
            batch['data_samples'] = memory.samples(plan, count, size, size)
            batch['inputs'] = list(inputs)
        real = MODELS.build(cfg.model)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr('mmengine.model.base_module.print_log', lambda *args, **kwargs: None)
            real.init_weights()
        peak = measured(real, batch, optimizer)
    assert 0.6 * peak < estimated < 1.6 * peak
    assert estimated > 6 * memory.held_by(real.parameters())  # more than weights, gradients and optimizer state


def test_optimizer_state_is_counted_for_what_learns():
    cfg = Config(dict(model=tiny_vit(trainable='qkv'), optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1.0))))
    plan = Plan(cfg)
    network = nn.Module()
    network.backbone = MODELS.build(tiny_vit(trainable='qkv'))
    learn = 4 * sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert 0 < learn < 4 * sum(p.numel() for p in network.parameters())
    assert memory.trainable_bytes(plan) == learn and memory.optimizer_bytes(plan) == 2 * learn
    cfg.optim_wrapper.optimizer = dict(type='SGD', lr=1.0)
    assert memory.optimizer_bytes(plan) == 0
