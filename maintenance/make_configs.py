"""Writes docs/configs.md, the reference of the configs, from their names and their first comments.

    python maintenance/make_configs.py [--check]
"""
from __future__ import annotations

import re
from pathlib import Path

from generated import Files, keep

from adala_mm.utils.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / 'configs'
HEADER = '''\
<!-- Written by maintenance/make_configs.py; what it says of a config is the first comment in it. -->
# Configs

A config is a Python file of a few lines that starts from files in `configs/_base_` and says what differs.
`python tools/train.py CONFIG` runs it; `--cfg-options key.of.it=value` changes single values.

## Names

`{stage or head}_{vfm}[_{attention}][_{change}]_{dataset}.py`. Linear attention is the default and is not named;
`softmax` marks the baseline on the same schedule.

Names are options, too. What stands in `configs/adala` and `configs/baselines` for `dinov2l` needs no file for another
VFM that these folders have recipes of, nor for Cityscapes at 1,024 px (`1024` before the data set):

```bash
python tools/train.py stage1_clipl_hedgehog_native_coco
python tools/train.py mask2former_clipl_hedgehog_native_1024_cityscapes
```

The second is `mask2former_dinov2l_hedgehog_native_cityscapes` in the words of its name, and starts from what the first
leaves in `work_dirs/stage1_clipl_hedgehog_native_coco`. All tools take such a name in place of a file, the analysis
tools with `.py` behind it; a run writes the whole config into its work dir, as ever. [docs/paper.md](paper.md) has
those of the paper's tables.
'''


def about(path: Path) -> str:
    """First sentence of the comment that a config begins with."""
    lines = []
    for line in path.read_text(encoding='utf-8').splitlines():
        if not line.startswith('#'):
            break
        lines.append(line.lstrip('# '))
    text = ' '.join(lines)
    first = re.match(r'.+?(?<!et al)\.(?=\s+[A-Z`"]|$)', text)  # a sentence ends before the next one begins
    return (first[0] if first else text).replace('|', '\\|')


def link(path: Path, name: str) -> str:
    return f'[`{name}`](../{path.relative_to(ROOT).as_posix()})'


def table(header: list[str], rows: list[list[str]]) -> str:
    return markdown_table(header, rows) + '\n'


def split_name(name: str, vfms: list[str]) -> tuple[str, str, list[str], str]:
    """Stage or head, VFM, what stands between, data set.

    Raises:
        ValueError: if no word is a file of ``_base_/backbones``, or another size of one.
    """
    words = name.split('_')
    place = next((i for i, word in enumerate(words) if word in vfms or word[:-1] in {vfm[:-1] for vfm in vfms}), None)
    if place is None or not 0 < place < len(words) - 1:
        raise ValueError(f'{name}: no config is named like that; no word between the first and the last is one of '
                         f'{", ".join(vfms)}')
    return '_'.join(words[:place]), words[place], words[place + 1:-1], words[-1]


def grammar(names: list[str], vfms: list[str]) -> str:
    """The words that names are made of."""
    heads, models, between, data = zip(*(split_name(name, vfms) for name in names), strict=True)
    words = {'stage or head': heads, 'vfm': models, 'attention and change': [w for part in between for w in part],
             'dataset': data}
    return table(['part', 'words'], [[part, ', '.join(f'`{word}`' for word in sorted(set(used)))]
                                     for part, used in words.items()])


def page() -> str:
    folders = sorted(folder for folder in CONFIGS.iterdir() if folder.is_dir() and folder.name != '_base_')
    configs = {folder: sorted(folder.glob('*.py')) for folder in folders}
    vfms = sorted(path.stem for path in (CONFIGS / '_base_/backbones').glob('*.py'))
    text = HEADER + '\n' + grammar([path.stem for paths in configs.values() for path in paths], vfms)
    rows = []
    for folder, paths in configs.items():
        readme = folder / 'README.md'
        title = readme.read_text(encoding='utf-8').splitlines()[0].lstrip('# ') if readme.exists() else ''
        rows.append([f'[{folder.name}](#{folder.name})', str(len(paths)),
                     f'[{title}](../configs/{folder.name}/README.md)' if title else ''])
    text += '\n## Folders\n\n' + table(['folder', 'configs', 'page'], rows)
    for folder, paths in configs.items():
        text += f'\n### {folder.name}\n\n' + table(['config', 'what it is'],
                                                   [[link(path, path.stem), about(path)] for path in paths])
    base = sorted((CONFIGS / '_base_').rglob('*.py'))
    return text + '\n## Base files\n\n' + table(
        ['file in `configs/_base_`', 'what it is'],
        [[link(path, path.relative_to(CONFIGS / '_base_').as_posix()), about(path)] for path in base])


def files() -> Files:
    yield 'docs/configs.md', page()


if __name__ == '__main__':
    keep(ROOT, make_configs=files)
