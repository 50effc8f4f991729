"""Keeps mmpretrain importable beside transformers 5, from which its multimodal models import what is gone."""
from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

GATE = 'mmpretrain.utils.dependency'  # where mmpretrain decides whether its multimodal models are importable


class _CloseGate(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads `GATE` as usual, then says that there are no multimodal models: mmpretrain puts placeholders there."""

    def find_spec(self, fullname: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if fullname != GATE:
            return None
        self.real = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        return self.real and importlib.util.spec_from_loader(fullname, self, origin=self.real.origin)

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = self.real.origin
        self.real.loader.exec_module(module)
        module.WITH_MULTIMODAL = False


def too_new_transformers() -> str | None:
    """Version of the installed transformers if mmpretrain cannot be imported beside it, else None."""
    try:
        found = version('transformers')
    except PackageNotFoundError:
        return None
    return found if int(found.split('.')[0]) >= 5 else None


def tolerate_transformers_5() -> None:
    """Has an effect only with transformers >= 5, and before mmpretrain is imported."""
    if too_new_transformers() and not any(isinstance(finder, _CloseGate) for finder in sys.meta_path):
        sys.meta_path.insert(0, _CloseGate())
