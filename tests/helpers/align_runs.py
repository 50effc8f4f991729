"""Data for runs of `align`, and what interrupts them."""
from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

PICTURES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(5))


class Noisy(TensorDataset):
    """Images with an augmentation that PyTorch's generator draws."""

    def __getitem__(self, index):
        image, = super().__getitem__(index)
        return image + 0.1 * torch.randn_like(image)


def shuffled(size: int = 3) -> DataLoader:
    return DataLoader(Noisy(PICTURES), batch_size=size, shuffle=True, drop_last=True)


def equal(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


class Interrupted(Exception):
    pass
