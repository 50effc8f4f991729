"""Configs that no file states: what a file of configs/ does for DINOv2-L, for another VFM or at 1,024 px.

The name says it all. ``mask2former_clipl_linformer_native_1024_cityscapes`` is
``mask2former_dinov2l_linformer_native_cityscapes`` with another word for the VFM and one for the size, and so are the
checkpoints that it starts from: stages of one VFM find each other as those of DINOv2-L do.
"""
from __future__ import annotations

import atexit
import functools
import re
import tempfile
from pathlib import Path

from mmengine.config import Config

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'  # a wheel has them in the package, a clone a link to them
FOLDERS = ('adala', 'baselines')
STATED = 'dinov2l'  # the VFM whose configs are all files


@functools.cache
def paper_attentions() -> dict[str, dict]:
    """The paper's baselines by the word that names have for them, with its options (configs/_base_/attentions.py)."""
    return {name: cfg.to_dict() for name, cfg in Config.fromfile(CONFIGS / '_base_/attentions.py').items()}


@functools.cache
def composable() -> dict[str, tuple[Path, str]]:
    """Name of each config that is composed -> the file that states it for DINOv2-L, and the VFM."""
    files = {path.stem: path for folder in FOLDERS for path in sorted((CONFIGS / folder).glob('*.py'))}
    vfms = [name.split('_')[1] for name in files if re.fullmatch(r'stage2_[^_]+_in22k', name)]
    found = {}
    for name, path in files.items():
        for vfm in vfms if f'_{STATED}_' in name else ():
            stage, dataset = name.split('_')[0], name.split('_')[-1]
            for size in ('', '1024_') if dataset == 'cityscapes' and '_1024_' not in name else ('',):
                other = name.replace(STATED, vfm).replace(f'_{dataset}', f'_{size}{dataset}')
                if other not in files and f'{stage}_{vfm}_{size}{dataset}' in files:  # the recipe that it changes
                    found[other] = (path, vfm)
    return found


def composed_text(name: str) -> str:
    """The config as a file of its own, which inherits from the recipe of its VFM and size.

    Raises:
        KeyError: if `composable` has no such name.
    """
    path, vfm = composable()[name]
    text = path.read_text(encoding='utf-8').replace(STATED, vfm)
    text = re.sub(r'from \.\.(?=\w)', 'from adala_mm.configs.', text)
    text = re.sub(r'from \.(?=\w)', f'from adala_mm.configs.{path.parent.name}.', text)
    if '_1024_' in name:
        text = re.sub(r'(?<!1024)_cityscapes import', '_1024_cityscapes import', text)
    # The paper's stage 2 is shorter for some VFMs: the last of its checkpoints is called by its epochs.
    epochs = Config.fromfile(CONFIGS / f'adala/stage2_{vfm}_in22k.py').train_cfg.max_epochs
    text = re.sub(r'(/stage2_\w+/epoch_)\d+', rf'\g<1>{epochs}', text)
    return f'# Composed from configs/{path.parent.name}/{path.name}.\n{text}'


@functools.cache
def composed(name: str) -> Path:
    """The file of `composed_text`, which lasts as long as this process: a run dumps the whole config in its work dir.

    Raises:
        KeyError: as `composed_text`.
    """
    text, folder = composed_text(name), tempfile.TemporaryDirectory(prefix='adala_mm_')
    atexit.register(folder.cleanup)
    path = Path(folder.name) / f'{name}.py'
    path.write_text(text, encoding='utf-8')
    return path
