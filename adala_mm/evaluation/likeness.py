"""How far the linearized copy of a timm ViT answers as its softmax teacher, on images of one square size.

What the teacher says is worked out once (`make_reference`) and kept; `likeness` puts any student beside it.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision import transforms

from adala_mm.evaluation.knn import KNNMetric
from adala_mm.models.backbones.vit import pooled
from adala_mm.utils.checkpoint import read_state_dict
from adala_mm.utils.image_files import open_image

Reference = dict[str, Any]  # tensors alone, which torch.load can map
NO_CLASS = 255
BATCH = 10  # images at a time, which a CPU has in its caches


def load_teacher(name: str, size: int, weights: str | Path | None = None) -> nn.Module:
    """A pretrained ViT of timm for ``size`` x ``size`` pixels, its table of positions resampled, in eval mode.

    Args:
        weights: a file of timm's keys in place of those of the hub.

    Raises:
        ValueError: for a model that does not classify, which could not agree with anybody.
    """
    overlay = dict(state_dict=read_state_dict(str(weights))) if weights else None
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, img_size=size)
    model.pretrained_cfg.pop('state_dict', None)  # copies of the model would have copies of it
    if not model.num_classes:
        raise ValueError(f'{name} has no classifier, so that nothing could agree with it; choose one that classifies, '
                         'such as deit_tiny_patch16_224')
    return model.eval().requires_grad_(False)


class ImageList(Dataset):
    """Image files through a transform of Pillow images."""

    def __init__(self, paths: Sequence[Path], transform: Callable[[Image.Image], Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(open_image(str(self.paths[index])))


def augmented(model: nn.Module, size: int) -> Callable[[Image.Image], Tensor]:
    """Crops, mirror images and changed colours to align on; all drawn from PyTorch's generator."""
    config = resolve_model_data_config(model)
    return transforms.Compose([
        transforms.RandomResizedCrop(size, (0.25, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(), transforms.ColorJitter(0.4, 0.4, 0.4), transforms.ToTensor(),
        transforms.Normalize(config['mean'], config['std'])])


def make_reference(teacher: nn.Module, size: int, scored: Sequence[Path], labelled: Sequence[tuple[Path, int]],
                   training: Sequence[tuple[Path, Path]], validation: Sequence[tuple[Path, Path]]) -> Reference:
    """Images as the teacher sees them, and what it makes of them.

    Args:
        scored: photographs for agreement and feature error.
        labelled: photographs with classes, for nearest neighbours; may be some of those.
        training, validation: street scenes or the like with maps of class ids, 255 being none; both or neither. The
            linear head is fitted on the first and serves on the others.
    """
    config = resolve_model_data_config(teacher)
    paths = list(dict.fromkeys([*scored, *(path for path, _ in labelled)]))
    seen = ImageList(paths, create_transform(
        size, interpolation=config['interpolation'], crop_pct=config['crop_pct'], crop_mode=config['crop_mode'],
        normalize=False))
    reference = dict(mean=torch.tensor(config['mean']), std=torch.tensor(config['std']), images=torch.stack([*seen]),
                     labelled=torch.tensor([paths.index(path) for path, _ in labelled]),
                     classes=torch.tensor([number for _, number in labelled]))
    features, top = [], []
    for i, (tokens, classes) in enumerate(answers(teacher, reference['images'], reference)):
        features.append(tokens[:max(0, len(scored) - i * BATCH)])
        top.append(classes)
    reference.update(features=torch.cat(features), top=torch.cat(top))
    if validation:
        squeezed = transforms.Compose([
            transforms.Resize((size, size), transforms.InterpolationMode.BICUBIC), transforms.PILToTensor()])
        scenes, maps = ([*ImageList([image for image, _ in training], squeezed)], [read_map(m) for _, m in training])
        kinds = 1 + max(int(ids[ids != NO_CLASS].max(initial=0)) for ids in map(Tensor.numpy, maps))
        tokens = torch.cat([patches(teacher, tokens) for tokens, _ in answers(teacher, torch.stack(scenes), reference)])
        side = round(tokens.shape[1] ** 0.5)
        shares = torch.cat([shares_of(ids, kinds, side) for ids in maps])
        weight, bias = fit_head(tokens.flatten(0, 1), shares.flatten(0, 1))
        reference.update(weight=weight, bias=bias, maps=[read_map(m) for _, m in validation],
                         scenes=torch.stack([*ImageList([image for image, _ in validation], squeezed)]))
    return reference


@torch.no_grad()
def likeness(model: nn.Module, reference: Reference) -> dict[str, float]:
    """What a student keeps of the teacher whose ``reference`` this is.

    ``agreement``: percentage of the scored photographs that both put into the same class. ``rel_error``:
    ||student - teacher|| / ||teacher|| over all their final tokens. ``knn``: percentage of the labelled photographs
    whose nearest other one, by the student's class token (mean patch if there is none) and cosine, is of their class.
    ``miou``: of the student's patches under the linear head that was fitted on the teacher's.
    """
    wanted, features, top, error, begun = reference['features'], [], [], 0.0, 0
    for tokens, classes in answers(model, reference['images'], reference):
        part = wanted[begun:begun + len(tokens)].to(tokens)
        error += float((tokens[:len(part)] - part).square().sum())
        features.append(pooled(tokens, model.num_prefix_tokens, class_token=model.num_prefix_tokens > 0))
        top.append(classes)
        begun += len(tokens)
    agree, metric = torch.cat(top) == reference['top'], KNNMetric(k=1)
    scores = dict(agreement=100 * float(agree[:len(wanted)].float().mean()),
                  rel_error=(error / float(wanted.square().sum())) ** 0.5)
    if 'labelled' in reference:
        scores['knn'] = metric.accuracy(metric.neighbours(torch.cat(features).cpu()[reference['labelled']]),
                                        reference['classes'])
    if 'scenes' in reference:
        maps = [patches(model, tokens) @ reference['weight'].to(tokens).T + reference['bias'].to(tokens)
                for tokens, _ in answers(model, reference['scenes'], reference)]
        scores['miou'] = mean_iou(torch.cat(maps).cpu(), reference['maps'])
    return scores


def moved(reference: Reference) -> Reference:
    """What ``agreement`` and ``rel_error`` need, of scored photographs that have been moved to the right by one pixel.

    A yardstick: a student cannot be asked to be nearer to its teacher than the teacher is to itself, on pictures that
    look the same.
    """
    count = len(reference['features'])
    images = reference['images'][:count]
    return dict(images=torch.cat([images[..., :1], images[..., :-1]], dim=-1), top=reference['top'][:count],
                **{name: reference[name] for name in ('features', 'mean', 'std')})


@torch.no_grad()
def answers(model: nn.Module, images: Tensor, reference: Reference) -> Iterator[tuple[Tensor, Tensor]]:
    """Final tokens (B, N, C) and most probable classes (B,) of images (n, 3, S, S) uint8, a batch at a time."""
    device = next(model.parameters()).device
    mean, std = (reference[name].view(3, 1, 1).to(device) for name in ('mean', 'std'))
    for batch in images.split(BATCH):
        tokens = model.forward_features((batch.to(device) / 255 - mean) / std)
        yield tokens, model.forward_head(tokens).argmax(dim=1).cpu()


def patches(model: nn.Module, tokens: Tensor) -> Tensor:
    return tokens[:, model.num_prefix_tokens:]


def read_map(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image))


def shares_of(ids: Tensor, kinds: int, side: int) -> Tensor:
    """Which share of each patch has which class, (1, side * side, kinds); pixels of no class have none."""
    masks = torch.stack([ids == kind for kind in range(kinds)]).float()
    return F.adaptive_avg_pool2d(masks, side).flatten(1).T[None]


def fit_head(tokens: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Logistic regression of class shares (n, K) on tokens (n, C): weight (K, C) and bias (K,); from zero, so always
    the same."""
    weight, bias = (tokens.new_zeros(shape, requires_grad=True) for shape in ((shares.shape[1], tokens.shape[1]),
                                                                              shares.shape[1:]))
    shares = shares.to(tokens)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn='strong_wolfe')

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -(shares * (tokens @ weight.T + bias).log_softmax(dim=1)).sum() / shares.sum()
        (value := value + 1e-4 * weight.square().sum()).backward()
        return value

    optimizer.step(loss)
    return weight.detach().cpu(), bias.detach().cpu()


def mean_iou(logits: Tensor, maps: Sequence[Tensor]) -> float:
    """Mean over classes of intersection / union, in percent, over all pixels of all maps.

    Args:
        logits: (n, N, K) of square grids, which are laid over the n maps of ids (H, W), of whatever sizes.
    """
    kinds, side = logits.shape[2], round(logits.shape[1] ** 0.5)
    counts = torch.zeros(kinds, kinds, dtype=torch.long)  # true class, found class
    for grid, ids in zip(logits.transpose(1, 2).unflatten(2, (side, side)), maps, strict=True):
        found = F.interpolate(grid[None], size=ids.shape, mode='bilinear').argmax(dim=1)[0]
        known = ids < kinds
        counts += torch.bincount(ids[known].long() * kinds + found[known], minlength=kinds ** 2).view(kinds, kinds)
    hit, either = counts.diagonal(), counts.sum(dim=0) + counts.sum(dim=1) - counts.diagonal()
    return 100 * float((hit[either > 0] / either[either > 0]).mean())
