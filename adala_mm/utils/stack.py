"""Which versions of the stack are tested, and what to install when they are not there."""
from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

# import name -> (names of the distributions that provide it, tested versions).
# `requirements/constraints.txt` pins one version of each; tests/integration/test_install.py keeps the two in step.
STACK: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    'torch': (('torch',), ('2.11', '2.15')),
    'timm': (('timm',), ('1.0.31',)),
    'mmengine': (('onedl-mmengine', 'mmengine'), ('0.10.12',)),
    'mmcv': (('onedl-mmcv', 'mmcv', 'mmcv-lite'), ('2.3.6',)),
    'mmseg': (('onedl-mmsegmentation', 'mmsegmentation'), ('1.4.2',)),
    'mmdet': (('onedl-mmdetection', 'mmdet'), ('3.5.1',)),
    'mmpretrain': (('onedl-mmpretrain', 'mmpretrain'), ('1.3.6',)),
}
CORE = ('torch', 'timm', 'mmengine')  # what layers, backbones and alignment import


def installed_version(distributions: tuple[str, ...]) -> str | None:
    """Version of the first of ``distributions`` that is installed, or None."""
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def stack_versions() -> dict[str, str | None]:
    """Installed version of every package of the stack; None where there is none."""
    return {name: installed_version(distributions) for name, (distributions, _) in STACK.items()}


def stack_problems() -> tuple[list[str], list[str]]:
    """Names of the missing packages, and one 'name found (tested: ...)' line for each untested version."""
    missing, untested = [], []
    for name, (distributions, tested) in STACK.items():
        found = installed_version(distributions)
        if found is None:
            missing.append(name)
        elif not any(found == v or found.startswith((f'{v}.', f'{v}+')) for v in tested):
            untested.append(f'{name} {found} (tested: {", ".join(tested)})')
    return missing, untested


def install_line(names: Iterable[str]) -> str:
    """Command that installs a tested version of these packages of the stack, wherever adala_mm comes from."""
    wanted = [(distributions[0], tested[0]) for distributions, tested in map(STACK.get, names)]
    return ' '.join(['pip install', *(f'"{distribution}=={version}.*"' for distribution, version in wanted)])


def warn_about_stack() -> None:
    """Warns once about missing packages and untested versions."""
    missing, untested = stack_problems()
    if missing:
        warnings.warn(f'adala_mm: not installed: {", ".join(missing)}. adala_mm.ops needs torch alone, linearize and '
                      f'align need {", ".join(CORE)}, configs and tools the whole stack. Install with: '
                      f'{install_line(missing)}', stacklevel=3)
    if untested:
        warnings.warn(f'adala_mm: untested versions: {"; ".join(untested)}. For the tested ones: '
                      f'{install_line(line.split()[0] for line in untested)}', stacklevel=3)


def require_stack(names: Iterable[str] = STACK) -> None:
    """Raises ImportError naming every package of ``names`` that is missing, and the line that installs them."""
    missing = [name for name in stack_problems()[0] if name in names]
    if missing:
        raise ImportError(f'adala_mm needs {", ".join(missing)}, which cannot be found. Install with: '
                          f'{install_line(missing)}')


def import_quietly(*names: str) -> None:
    """Imports modules, and keeps to itself that they found no OneDL.

    The onedl builds print so for each folder of data sets of a service that nobody here has asked for; it is meant as
    a message of the level DEBUG, but printed whatever the level is. Everything else that is printed stays.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            for name in names:
                import_module(name)
    finally:
        for line in said.getvalue().splitlines():
            if not line.startswith('Could not import OneDL'):
                print(line)
