"""The planned run: its config, and the parts that several checks need, each made once."""
from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from adala_mm.models.backbones.vit import compile_mode
from adala_mm.preflight.images import Look, scan
from adala_mm.preflight.report import Skipped, one_line
from adala_mm.utils.cli import absent_data
from adala_mm.utils.label_files import leaves

TRAIN, VAL = 'train_dataloader', 'val_dataloader'


@dataclass(frozen=True)
class Scan:
    """What `scan` saw of a data set: how many images it has, and a look at some."""

    total: int
    looks: list[Look]

    @property
    def complete(self) -> bool:
        return len(self.looks) == self.total


class Plan:
    """A training run before it starts.

    Args:
        cfg: its config with all options of the command line.
        images: how many images of a data set to decode, None for all.
        workers: threads that decode.
        processes: how many processes the run will have.
        device_memory: GiB of the device it will run on; None for the device here.
    """

    def __init__(self, cfg: Config, images: int | None = 300, workers: int = 4, processes: int = 1,
                 device_memory: float | None = None) -> None:
        self.cfg = cfg
        self.images = images
        self.workers = workers
        self.processes = processes
        self.device_memory = device_memory
        self._made: dict[tuple, Any] = {}
        self._failed: dict[tuple, str] = {}

    def _once(self, key: tuple, what: str, make: Callable[[], Any]) -> Any:
        """``make()``, called once. If it fails, the first to ask gets the error and all others `Skipped`."""
        if key in self._failed:
            raise Skipped(self._failed[key])
        if key not in self._made:
            try:
                self._made[key] = make()
            except Exception as error:  # raised again: only noted, so that nobody tries it twice
                reason = one_line(error)[:100]
                self._failed[key] = reason if isinstance(error, Skipped) else f'{what}: {reason}'
                raise
        return self._made[key]

    @property
    def written(self) -> Config:
        """The config as its file says, without options of the command line."""
        return self._once(('written',), 'the file cannot be read', lambda: Config.fromfile(self.cfg.filename))

    @property
    def model(self) -> nn.Module:
        """The model at full size on the meta device: names and shapes, no weights."""
        def make() -> nn.Module:
            with torch.device('meta'):
                return MODELS.build(eager(copy.deepcopy(self.cfg.model)))
        return self._once(('model',), 'there is no model', make)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Modules of the model by name, the frozen teacher's, which is no submodule, included."""
        frozen = getattr(self.model, 'frozen', {})
        return dict(self.model.named_modules()) | dict(frozen)

    @property
    def patch(self) -> int | None:
        """Patch size of the backbone, None of a network that pads its images."""
        return getattr(getattr(self.model, 'backbone', None), 'patch_size', None)

    @property
    def heads(self) -> dict[str, nn.Module]:
        """Heads that have classes, by name."""
        names = ('decode_head', 'auxiliary_head', 'head')
        return {name: head for name in names if (head := getattr(self.model, name, None)) is not None
                and getattr(head, 'num_classes', None) is not None}

    @property
    def loaders(self) -> list[str]:
        """Loaders that the config has, without a second one on the same data."""
        names = [name for name in (TRAIN, VAL) if self.cfg.get(name)]
        return names[:1] if len(names) == 2 and self.cfg[TRAIN].dataset == self.cfg[VAL].dataset else names

    def dataset(self, loader: str) -> Any:
        """The data set of a loader, built as in training.

        Raises:
            Skipped: if its folders are absent, or it draws itself on first use.
        """
        def make() -> Any:
            if not self.cfg.get(loader):
                raise Skipped(f'the config has no {loader}')
            if any(True for _ in absent_data(self.cfg, loader)):
                raise Skipped('its folders or files are absent')
            if draws_itself(self.cfg[loader].dataset):
                raise Skipped('it draws itself on first use')
            try:
                dataset = DATASETS.build(self.cfg[loader].dataset)
                if hasattr(dataset, 'full_init'):
                    dataset.full_init()
                return dataset
            except ValueError as error:
                if 'at least one array' in str(error):  # what an empty list becomes in MMEngine
                    raise ValueError('no images: no file in the folders has the suffix that the config names') from None
                raise
        return self._once(('dataset', loader), 'there is no data set', make)

    def scan(self, loader: str) -> Scan:
        """Images of a loader's data set, looked at."""
        def make() -> Scan:
            parts = list(leaves(self.dataset(loader)))
            looks = [look for part in parts for look in scan(part, loader, self.images, self.workers)]
            return Scan(sum(map(len, parts)), looks)
        return self._once(('scan', loader), 'images were not looked at', make)

    def dataloader(self, loader: str, processes: int = 1) -> DataLoader:
        """A loader as one of so many processes has it, but without workers."""
        settings = copy.deepcopy(self.cfg[loader])
        for worker_option in ('persistent_workers', 'prefetch_factor', 'pin_memory'):
            settings.pop(worker_option, None)
        settings.update(num_workers=0)
        settings['dataset'] = self.dataset(loader)
        # Samplers ask MMEngine how many processes there are, and take no other word for it.
        with patch('mmengine.dist.utils.get_world_size', return_value=processes):
            return Runner.build_dataloader(settings, seed=0)

    def batch(self, loader: str) -> dict[str, Any]:
        """First batch of a loader, made by its own pipeline in this process.

        Raises:
            ValueError: if a process would get no batch at all.
        """
        def make() -> dict[str, Any]:
            dataset = self.dataset(loader)
            batch = next(iter(self.dataloader(loader)), None)
            if batch is None:
                raise ValueError(f'the loader gives no batch: {len(dataset)} images, batch_size='
                                 f'{self.cfg[loader].batch_size}, and drop_last drops what does not fill a batch')
            return batch
        return self._once(('batch', loader), 'there is no batch', make)

    def images_of(self, loader: str) -> Tensor:
        """First batch of a loader as the model gets it: (B, 3, H, W), normalised and padded."""
        def make() -> Tensor:
            batch = copy.deepcopy(self.batch(loader))
            return MODELS.build(self.cfg.model.data_preprocessor)(batch, training=loader == TRAIN)['inputs']
        return self._once(('images', loader), 'there is no batch', make)


def eager(model: Any) -> Any:
    """A model's config with ``compile`` off in every ViT: nothing is run long enough here to pay for compilation."""
    for value in model.values() if isinstance(model, dict) else model if isinstance(model, (list, tuple)) else ():
        eager(value)
    if isinstance(model, dict) and model.get('type') in ('adala_mm.AdaLAViT', 'adala_mm.QueryViT'):
        compile_mode(model.pop('compile', False))  # a wrong one is told all the same
    return model


def draws_itself(dataset: dict) -> bool:
    return dataset.get('type') == 'adala_mm.BeaconsDataset' and not Path(dataset['data_root']).exists()
