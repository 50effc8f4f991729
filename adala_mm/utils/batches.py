"""Images of a training loop that may be spread over processes, and that goes on exactly where it was interrupted."""
from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from mmengine.dist import all_gather_object, all_reduce, get_rank, get_world_size
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler


class Batches:
    """Images (B, 3, H, W) of a dataloader, pass after pass.

    A pass draws its order and its augmentations from PyTorch's generator. Its state at the beginning is kept, so that
    `seek` can begin the same pass again and leave out what has been seen.

    Args:
        dataloader: of this process' share of the data.

    Raises:
        ValueError: if several processes would see the same images.
    """

    def __init__(self, dataloader: Iterable[Any]) -> None:
        if (wanted := int(os.environ.get('WORLD_SIZE', 1))) > get_world_size():
            raise ValueError(f'{wanted} processes have been started, which do not know of each other: call '
                             'torch.distributed.init_process_group() first')
        if (get_world_size() > 1 and isinstance(dataloader, DataLoader)
                and {type(sampler) for sampler in samplers(dataloader)} <= {BatchSampler, RandomSampler,
                                                                            SequentialSampler}):
            raise ValueError(f'{get_world_size()} processes would all read all images: give the DataLoader '
                             'sampler=DistributedSampler(dataset) instead of shuffle')
        self.dataloader = dataloader
        self.passes, self.seen, self.skip = 0, 0, 0  # whole passes, batches of this one, batches to leave out
        self.start = random_state()

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            self.start = random_state()
            for sampler in samplers(self.dataloader):
                if hasattr(sampler, 'set_epoch'):
                    sampler.set_epoch(self.passes)
            self.seen = 0
            for batch in self.dataloader:
                self.seen += 1
                if self.seen > self.skip:
                    yield images_of(batch)
                elif self.seen == self.skip:
                    set_random_state(self.resumed)
            if not self.seen:
                kind = type(self.dataloader).__name__
                raise ValueError(f'the {kind} of images is used up: it can be read only once. Give a DataLoader or a '
                                 'list, or fewer steps' if isinstance(self.dataloader, Iterator) else
                                 'the dataloader is empty: are there fewer images than a batch, with drop_last?')
            self.passes, self.skip = self.passes + 1, 0

    def state(self) -> dict[str, Any]:
        """What `seek` needs, of all processes."""
        return {'passes': self.passes, 'seen': self.seen, 'start': all_gather_object(self.start),
                'now': all_gather_object(random_state())}

    def seek(self, state: Mapping[str, Any]) -> None:
        """To where `state` was taken."""
        self.passes, self.skip = state['passes'], state['seen']
        self.resumed = state['now'][get_rank()]
        set_random_state(state['start'][get_rank()])


def samplers(dataloader: Iterable[Any]) -> list[Any]:
    """What chooses the images of a dataloader: its batch sampler and the sampler in that, or its sampler alone."""
    batch_sampler = getattr(dataloader, 'batch_sampler', None)
    # A DataLoader that has been given a batch sampler has a sampler besides, which it does not use.
    owner = dataloader if batch_sampler is None else batch_sampler
    return [sampler for sampler in (batch_sampler, getattr(owner, 'sampler', None)) if sampler is not None]


def common_length(total: int) -> int:
    """The least of all processes: none may wait for another that has ended."""
    all_reduce(least := torch.tensor(total), op='min')
    return int(least)


def images_of(batch: Any) -> Tensor:
    """The images of a batch: itself, its first part, or its ``pixel_values``.

    Raises:
        TypeError: for batches of another kind.
    """
    if isinstance(batch, Mapping) and 'pixel_values' in batch:
        batch = batch['pixel_values']
    elif isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if not isinstance(batch, Tensor) or batch.ndim != 4:
        kind = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
        raise TypeError(f'the dataloader yields {kind}, not images (B, 3, H, W), (images, ...) or '
                        "{'pixel_values': images}")
    return batch


def random_state() -> list[Tensor]:
    """Of PyTorch, on the CPU and on the current GPU."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[1])
