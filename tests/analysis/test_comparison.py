"""Comparison of networks: the errors of the stages, block by block."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from mmengine.config import Config

from adala_mm import analysis
from adala_mm.evaluation import AlignmentMetric
from adala_mm.registry import MODELS
from helpers.analysis import COUNT, batches, compared, hsic_by_definition


def test_errors_are_those_that_the_stages_report(world):
    found, networks = compared(world, 'swap={stage1}', 'near={stage2}:{near}')
    (images, *_), = batches(world, networks, COUNT)
    stage1 = MODELS.build(Config.fromfile(world['stage1']).model)
    stage1.init_weights()
    with torch.no_grad():
        stage1.loss(images)
    own = [block['attention_error'] for block in found['students'][0]['blocks']]
    np.testing.assert_allclose(own, stage1.block_errors.numpy(), rtol=1e-4)

    stage2 = MODELS.build(Config.fromfile(world['stage2']).model)
    stage2.init_weights()
    stage2.backbone.load_state_dict(networks[2].model.state_dict())
    with torch.no_grad():
        samples = stage2(images, mode='predict')
    wanted = AlignmentMetric().compute_metrics(samples)
    row = found['students'][1]
    assert row['rel_error'] == pytest.approx(wanted['rel_error'], rel=1e-4) and row['rel_error'] > 0.01
    assert row['cosine'] == pytest.approx(wanted['cosine'], rel=1e-4)
    student, teacher = (torch.stack(side) for side in zip(*(s['pooled'] for s in samples), strict=True))
    assert row['knn'] == {str(k): pytest.approx(analysis.knn_agreement(student, teacher, k)) for k in (1, 3)}


def test_features_of_the_blocks(world):
    found, (teacher, student) = compared(world, 'near={stage2}:{near}')
    (images, _), = batches(world, (teacher, student), COUNT)
    streams, features, hw, prefix = [], [], (4, 4), 1
    for vit in (teacher.model, student.model):
        vit.out_indices, vit.out_type = [0, 1], 'raw'
        with torch.no_grad():
            streams.append(vit.run_blocks(*vit.embed(images)))
            features.append([tokens.double() for tokens in vit(images)])
    with torch.no_grad():
        local = student.model.norm(student.model.blocks[1](streams[0][0], hw, prefix)).double()
    for i, block in enumerate(found['students'][0]['blocks']):
        theirs, ours = features[0][i], features[1][i]
        assert block['rel_error'] == pytest.approx(((ours - theirs).norm() / theirs.norm()).item(), rel=1e-4)
        assert block['cosine'] == pytest.approx(torch.cosine_similarity(ours, theirs, dim=-1).mean().item(), rel=1e-4)
        k, l = ((x.flatten(1) @ x.flatten(1).T).numpy() for x in (ours, theirs))  # noqa: E741
        cross, own, other = (hsic_by_definition(a[:7, :7], b[:7, :7]) for a, b in ((k, l), (k, k), (l, l)))
        few = analysis.MinibatchCKA()
        few.update(ours[:7], theirs[:7])
        assert few.value() == pytest.approx(cross / np.sqrt(own * other), rel=1e-6)
        whole = analysis.MinibatchCKA()
        whole.update(ours, theirs)
        assert block['cka'] == pytest.approx(whole.value(), rel=1e-4)
    last = found['students'][0]['blocks'][1]
    distance = (local - features[0][1]).norm() / features[0][1].norm()
    assert last['block_error'] == pytest.approx(distance.item(), rel=1e-3)
    h = student.model.blocks[1].norm1(streams[1][0])
    entropy = analysis.attention_entropy(student.model.blocks[1].attn, h, hw, prefix).tolist()
    assert last['entropy_of_heads'] == pytest.approx(entropy, rel=1e-4)


def test_sums_do_not_depend_on_the_batches(world):
    whole, _ = compared(world, 'near={stage2}:{near}')
    parts, _ = compared(world, 'near={stage2}:{near}', size=5)
    for a, b in zip(whole['students'][0]['blocks'], parts['students'][0]['blocks'], strict=True):
        assert {k: v for k, v in a.items() if k != 'cka'} == {
            k: pytest.approx(v, rel=1e-4) for k, v in b.items() if k != 'cka'}
        assert a['cka'] == pytest.approx(b['cka'], abs=0.2)
    for key in ('rel_error', 'cosine', 'knn', 'probe'):
        assert whole['students'][0][key] == pytest.approx(parts['students'][0][key], rel=1e-4)


def test_a_teacher_is_like_itself(world):
    found, _ = compared(world, 'itself={softmax}', 'swap={stage1}')
    itself, swap = found['students']
    assert itself['rel_error'] < 1e-6 and itself['knn'] == {'1': 100, '3': 100}
    assert itself['probe']['student'] == itself['probe']['teacher'] >= itself['probe']['largest']
    for own, block in zip(found['teacher']['blocks'], itself['blocks'], strict=True):
        assert max(block[key] for key in ('rel_error', 'block_error', 'attention_error')) < 1e-6
        assert block['cosine'] == pytest.approx(1) and block['cka'] == pytest.approx(1)
        assert block['entropy'] == pytest.approx(own['entropy'])
    assert swap['rel_error'] > 0.05 and swap['blocks'][1]['cka'] < 0.99
