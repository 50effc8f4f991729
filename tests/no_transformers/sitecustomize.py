"""Hides transformers from whoever asks for its version, as mmpretrain does before it imports it."""
import importlib.metadata

_distribution = importlib.metadata.distribution


def distribution(name):
    if name == 'transformers':
        raise importlib.metadata.PackageNotFoundError(name)
    return _distribution(name)


importlib.metadata.distribution = distribution
