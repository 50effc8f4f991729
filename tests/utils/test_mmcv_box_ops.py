"""mmcv's operators on torchvision, against their definitions."""
from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from adala_mm.utils.mmcv_ext import provide_mmcv_ops


@pytest.fixture
def stand_in():
    """For what compiled ops treat otherwise, or not on the CPU."""
    if not provide_mmcv_ops():
        pytest.skip('this mmcv has compiled ops')


def random_boxes(count: int, size: float) -> torch.Tensor:
    corners = torch.rand(count, 2, 2, dtype=torch.float64).sort(dim=1).values * size
    return corners.flatten(1)


def iou(a, b, offset):
    w = min(a[2], b[2]) - max(a[0], b[0]) + offset
    h = min(a[3], b[3]) - max(a[1], b[1]) + offset
    both = max(w, 0) * max(h, 0)
    areas = sum((c[2] - c[0] + offset) * (c[3] - c[1] + offset) for c in (a, b))
    return both / (areas - both)


@pytest.mark.parametrize('offset', [0, 1])
def test_nms_by_definition(offset):
    from mmcv.ops import nms
    boxes, scores = random_boxes(60, 8), torch.rand(60, dtype=torch.float64)
    kept = []
    for i in scores.argsort(descending=True).tolist():
        if all(iou(boxes[i].tolist(), boxes[j].tolist(), offset) <= 0.3 for j in kept):
            kept.append(i)
    found, indices = nms(boxes, scores, 0.3, offset=offset)
    assert indices.tolist() == kept and 5 < len(kept) < 50
    torch.testing.assert_close(found, torch.cat([boxes[kept], scores[kept, None]], dim=1))


def test_the_offset_of_nms_matters():
    from mmcv.ops import nms
    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 2]])  # IoU 1 / 2, or 4 / 6
    counts = [len(nms(boxes, torch.tensor([0.9, 0.8]), 0.6, offset=offset)[1]) for offset in (0, 1)]
    assert counts == [2, 1]


def test_nms_of_no_boxes_and_of_half_precision(stand_in):
    from mmcv.ops import nms
    assert nms(torch.zeros(0, 4), torch.zeros(0), 0.5)[1].tolist() == []
    boxes = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 7], [20, 20, 30, 30]], dtype=torch.bfloat16)
    assert nms(boxes, torch.tensor([0.5, 0.75, 0.25], dtype=torch.bfloat16), 0.5)[1].tolist() == [1, 2]


def test_batched_nms_keeps_classes_apart():
    from mmcv.ops import batched_nms
    boxes = torch.tensor([[0.0, 0, 8, 8]]).repeat(4, 1)
    _, kept = batched_nms(boxes, torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0, 1, 0, 2]),
                          dict(type='nms', iou_threshold=0.5))
    assert kept.tolist() == [0, 1, 3]


def sample(image, y, x):
    """Bilinear value (C) of one image (C, h, w); zero from one pixel outside of it on."""
    height, width = image.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return image.new_zeros(len(image))
    y, x = max(y, 0), max(x, 0)
    top, left = min(int(y), height - 1), min(int(x), width - 1)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    fy, fx = (0 if top == height - 1 else y - top), (0 if left == width - 1 else x - left)
    return ((1 - fy) * ((1 - fx) * image[:, top, left] + fx * image[:, top, right])
            + fy * ((1 - fx) * image[:, bottom, left] + fx * image[:, bottom, right]))


def naive_roi_align(features, rois, size, scale, ratio, aligned):
    out = []
    for index, *box in rois.tolist():
        x1, y1, x2, y2 = (c * scale - 0.5 * aligned for c in box)
        w, h = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1), max(y2 - y1, 1))
        ny, nx = (ratio, ratio) if ratio else (math.ceil(h / size[0]), math.ceil(w / size[1]))
        out.append(torch.stack([torch.stack([
            sum(sample(features[int(index)], y1 + (i + (a + 0.5) / ny) * h / size[0],
                       x1 + (j + (b + 0.5) / nx) * w / size[1]) for a in range(ny) for b in range(nx)) / (ny * nx)
            for j in range(size[1])], dim=-1) for i in range(size[0])], dim=-2))
    return torch.stack(out)


@pytest.mark.parametrize(('ratio', 'aligned'), [(0, True), (2, True), (2, False)])
def test_roi_align_by_definition(ratio, aligned):
    from mmcv.ops import roi_align
    features = torch.randn(2, 3, 6, 9, dtype=torch.float64, requires_grad=True)
    rois = torch.cat([torch.tensor([[0.0], [1], [1], [0]], dtype=torch.float64), random_boxes(4, 26) - 2], dim=1)
    rois[3, 1:] = torch.tensor([30.0, -9.0, 60.0, 20.0])  # beside the image for the most part
    found = roi_align(features, rois, (3, 2), 0.5, ratio, 'avg', aligned)
    naive = naive_roi_align(features, rois, (3, 2), 0.5, ratio, aligned)
    torch.testing.assert_close(found, naive)
    upstream = torch.randn_like(naive)
    (wanted,) = torch.autograd.grad(naive, features, upstream)
    torch.testing.assert_close(torch.autograd.grad(found, features, upstream)[0], wanted)
    assert wanted.abs().max() > 0.1


def test_roi_align_of_half_precision(stand_in):
    from mmcv.ops import roi_align
    features = torch.randn(1, 2, 8, 8).bfloat16().requires_grad_()
    rois = torch.tensor([[0.0, 1, 1, 6, 6]], dtype=torch.bfloat16)
    found = roi_align(features, rois, 2)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), roi_align(features.float(), rois.float(), 2), rtol=1e-2, atol=1e-2)
    found.sum().backward()
    assert features.grad.dtype == torch.bfloat16 and features.grad.float().sum() == pytest.approx(8, rel=2e-2)


def test_focal_loss_by_definition(stand_in):
    """On GPUs mmdet calls the op, on the CPU its own formula; here both run on the CPU."""
    from mmcv.ops import sigmoid_focal_loss
    logits = (3 * torch.randn(7, 4, dtype=torch.float64)).requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 4, 4, 0])  # 4: no class
    p = logits.sigmoid()
    hit = F.one_hot(labels, 5)[:, :4].bool()
    naive = torch.where(hit, -0.3 * (1 - p) ** 1.5 * p.log(), -0.7 * p ** 1.5 * (1 - p).log())
    for reduction, reduced in (('none', naive), ('sum', naive.sum()), ('mean', naive.sum() / 7)):
        found = sigmoid_focal_loss(logits, labels, 1.5, 0.3, None, reduction)
        torch.testing.assert_close(found, reduced)
        upstream = torch.randn_like(reduced)
        (wanted,) = torch.autograd.grad(reduced, logits, upstream, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(found, logits, upstream)[0], wanted)


def test_what_torchvision_has_not(stand_in):
    from mmcv.ops import roi_align, sigmoid_focal_loss
    with pytest.raises(NotImplementedError, match=r"pool_mode='max'\) needs an mmcv with compiled ops"):
        roi_align(torch.ones(1, 1, 4, 4), torch.tensor([[0.0, 0, 0, 2, 2]]), 2, 1.0, 0, 'max')
    with pytest.raises(NotImplementedError, match='weights of classes needs an mmcv with compiled ops'):
        sigmoid_focal_loss(torch.zeros(1, 2), torch.tensor([0]), 2.0, 0.25, torch.ones(2))
