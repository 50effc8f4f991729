"""Installs adala_mm; see README.md for the tested versions."""
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def requirements(name: str) -> list[str]:
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith(('#', '-'))]


setup(
    name='adala_mm',
    version=re.search(r"__version__ = '(.+)'", (ROOT / 'adala_mm/__init__.py').read_text())[1],
    description='Turns pretrained Vision Transformers into linear-attention ones, inside OpenMMLab',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=find_packages(include=['adala_mm', 'adala_mm.*']),
    package_data={'adala_mm': ['py.typed']},
    install_requires=requirements('runtime'),
    extras_require={name: requirements(name) for name in ('onedl', 'openmmlab', 'tests')},
)
