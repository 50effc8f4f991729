"""The cost that each attention states, against what PyTorch counts, and the tools that measure it."""
from __future__ import annotations

import json
import re

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch.nn.functional import scaled_dot_product_attention

from adala_mm.models.attentions import build_attention
from adala_mm.preflight import Plan
from adala_mm.preflight.cost import training_multiply_adds
from adala_mm.registry import ATTENTIONS
from adala_mm.utils.cost import flop_counter, multiply_adds, peak_bytes
from helpers import ROOT

ATTENTIONS.import_from_location()
OPTIONS = dict(NystromformerAttention=dict(num_landmarks=16), LinformerAttention=dict(rank=24),
               WindowAttention=dict(window_size=8), WindowedLinearAttention=dict(window_size=8),
               CoarseToFineAttention=dict(tile=2, num_open=3))
DIM, HW = 32, (16, 24)


def stated(layer) -> float:
    """The class attribute ``cost``, worked out for this layer on the grid HW without prefix tokens."""
    sizes = dict(N=HW[0] * HW[1], D=DIM, h=HW[0], w=HW[1], R=24,
                 F=layer.feature_map.q.shape[-1] if 'F' in layer.cost else 0, A=getattr(layer, 'num_agents', 49),
                 T=getattr(layer, 'num_steps', 0), S=getattr(layer, 'window_size', getattr(layer, 'tile', 0)),
                 K=getattr(layer, 'num_open', 0),
                 M=16 if hasattr(layer, 'num_landmarks') else len(getattr(
                     getattr(layer, 'feature_map', None), 'projection', ())))
    formula = layer.cost.replace('²', '**2').replace('³', '**3')
    formula = re.sub(r'(?<=[\w)])(?=[A-Za-z(])', '*', formula)  # juxtaposition multiplies
    return eval(formula, {}, sizes)


def matrix_products(function) -> int:
    """Multiply-adds without those of convolutions."""
    with flop_counter() as counter:
        function()
    return sum(flops for op, flops in counter.get_flop_counts()['Global'].items() if 'conv' not in str(op)) // 2


@pytest.mark.parametrize('name', sorted(ATTENTIONS.module_dict))
def test_stated_cost(name):
    layer = build_attention(dict(type=name, **OPTIONS.get(name, {})), DIM, 1, grid=HW).eval()
    q, k, v = torch.randn(3, 1, 1, HW[0] * HW[1], DIM)
    x = torch.randn(1, HW[0] * HW[1], DIM)
    projections = 4 * HW[0] * HW[1] * DIM ** 2
    with torch.no_grad():
        if name in ('ViGAttention', 'WindowAttention'):  # no mix of their own
            counted = matrix_products(lambda: layer(x, HW, 0)) - projections
            if name == 'ViGAttention':  # less its gates
                counted -= x.shape[1] * (DIM ** 2 + 4 * 16 * DIM)
        else:
            counted = matrix_products(lambda: layer.mix(q, k, v, HW, 0))
    if name == 'FCViTAttention':
        assert counted < 10 * x.shape[1] * DIM  # mostly not matrix products
    else:
        assert stated(layer) == pytest.approx(counted, rel=0.12)


def test_multiply_adds_of_fused_attention():
    q, k, v = torch.randn(3, 2, 3, 10, 8)
    assert multiply_adds(lambda: scaled_dot_product_attention(q, k, v)) == 2 * (2 * 3) * 10 * 10 * 8
    image, kernels = torch.randn(1, 4, 6, 5), torch.randn(8, 4, 3, 3)
    assert multiply_adds(lambda: torch.conv2d(image, kernels, padding=1)) == 8 * 4 * 9 * 30


def test_multiply_adds_are_the_same_without_gradients_inside():
    layer, x = build_attention(dict(type='LinearAttention'), DIM, 1, grid=HW), torch.randn(2, HW[0] * HW[1], DIM)
    counted = multiply_adds(lambda: layer(x, HW, 0))
    assert multiply_adds(torch.no_grad()(lambda: layer(x, HW, 0))) == counted


@pytest.mark.parametrize('transposed', [False, True])
@pytest.mark.parametrize('groups', [1, 4])
@pytest.mark.parametrize('learns', ['image', 'kernels', 'both'])
def test_multiply_adds_of_the_backward_pass_of_convolutions(learns, groups, transposed):
    image = torch.randn(2, 4, 6, 5, requires_grad=learns != 'kernels')
    kernels = torch.randn(4, 4 // groups, 3, 3, requires_grad=learns != 'image')
    function = torch.conv_transpose2d if transposed else torch.conv2d

    def run():
        function(image, kernels, padding=1, groups=groups).sum().backward()

    forward = 2 * 4 * (4 // groups) * 9 * 30  # images, channels out and in, kernel, positions
    assert multiply_adds(run) == forward * (3 if learns == 'both' else 2)


def test_peak_bytes_counts_temporaries():
    x = torch.randn(256, 256)  # 262,144 bytes, there before

    def run():
        return (x * 2).sum() + (x + 1).sum()

    assert 262_144 <= peak_bytes(run) < 2 * 262_144
    assert peak_bytes(lambda: (x * 2) + (x * 3)) >= 3 * 262_144 - 64


def counted(folder: str, config: str, side: int) -> int:
    cfg = Config.fromfile(ROOT / f'configs/{folder}/{config}.py')
    with DefaultScope.overwrite_default_scope('mmseg'):
        return training_multiply_adds(Plan(cfg), side, side)


@pytest.mark.parametrize(('config', 'run'), [
    ('stage1_deitt_caltech', 'paper_1'), ('stage2_deitt_caltech', 'paper_250'),
    ('stage1_deitt_plus_caltech', 'plus_1')])
def test_training_is_counted_as_it_ran(config, run):
    """The study has counted the steps of real networks."""
    study = json.loads((ROOT / 'docs/results/study.json').read_text())
    assert counted('real', config, 224) == study[f'{run}/seed0']['training_multiply_adds']


def test_training_of_a_segmentor_by_hand():
    """A ViT and a 1 x 1 convolution, thrice their forward pass, but for the gradient of the image."""
    tokens, dim = 101, 96
    blocks = 6 * tokens * dim * (12 * dim + 2 * tokens)
    embedding, head = 100 * 3 * 8 ** 2 * dim, 100 * dim * 6
    assert counted('demo', 'teacher_demo_beacons', 80) == 3 * (blocks + head) + 2 * embedding


def test_costs_of_the_record_are_those_of_the_config(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools/analysis_tools'))
    from estimate_costs import costs, table
    row = json.loads(json.dumps(costs('stage1_dinov2b_coco', 8)))
    rows = json.loads((ROOT / 'docs/results/costs.json').read_text())['rows']
    assert row in rows, 'run: python tools/analysis_tools/estimate_costs.py ... --out docs/results/costs.json'
    assert f'| {4 * 1000 * row["training_multiply_adds"] / 1e15:,.2f} |' in table([row], images=1000)
    assert 'say --images' in table([row], None)
