"""Writes the references of the configs and of their base files from their names and their first comments.

    python maintenance/make_configs.py [--check]
"""
from __future__ import annotations

import re
from os.path import commonprefix
from pathlib import Path

from generated import Files, keep

from adala_mm.registry import ATTENTIONS
from adala_mm.utils.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / 'configs'
HEADER = '''\
<!-- Written by maintenance/make_configs.py; what it says of a config is the first comment in it. -->
# Configs

A config is a Python file of a few lines. It starts from [base files](base_configs.md) and says what differs.
`python tools/train.py CONFIG` runs it, and `--cfg-options key.of.it=value` changes single values. To write one for your
data, see [Your own data set](own_data.md).

## Names

`{stage or head}_{vfm}[_{attention}][_{change}]_{dataset}.py`. Linear attention is the default and is not named.
`softmax` marks the baseline on the same schedule.

A name works without a file, too. If a config of `configs/adala` or `configs/baselines` is for `dinov2l`, its name also
works with another VFM that these folders have recipes of, and with `1024_cityscapes` in place of `cityscapes`:

```bash
python tools/train.py stage1_clipl_hedgehog_native_coco
python tools/train.py mask2former_clipl_hedgehog_native_1024_cityscapes
```

The second command runs `mask2former_dinov2l_hedgehog_native_cityscapes` with the VFM and the size of its name. It
starts from what the first command leaves in `work_dirs/stage1_clipl_hedgehog_native_coco`. All tools take such a name
in place of a file; the analysis tools take it with `.py` behind it. A run writes the whole config into its work dir.
[The paper, row by row](paper.md) has the names of the paper's tables.
'''
BASE_HEADER = '''\
<!-- Written by maintenance/make_configs.py; what it says of a file is the first comment in it. -->
# Base files of the configs

The [configs](configs.md) start from these files. A new pretrained ViT needs one more of them: [Add a VFM](add_vfm.md).
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


def shared(sentences: list[str]) -> str:
    """What sentences have in common at both ends; … stands for the words between, where they differ."""
    words = [sentence.split() for sentence in sentences]
    start = commonprefix(words)
    rest = [found[len(start):] for found in words]
    end = commonprefix([found[::-1] for found in rest])[::-1]
    return ' '.join([*start, *['…'] * any(rest), *end * any(found != end for found in rest)])


def recipes(paths: list[Path], vfms: list[str]) -> str:
    """A row for all configs that differ in the VFM or in the attention alone, with these words as links."""
    ATTENTIONS.import_from_location()
    attentions = {name.removesuffix('Attention').lower() for name in ATTENTIONS.module_dict} - {'softmax'}
    found: dict[tuple[str, ...], list[Path]] = {}
    for path in paths:
        head, _, between, data = split_name(path.stem, vfms)
        kind = ('' if word in attentions else word for word in between)
        found.setdefault((head, *kind, data), []).append(path)
    return table(['config', 'with … being', 'what it is'], [
        [*names(group), shared(list(map(about, group)))] for group in found.values()])


def names(paths: list[Path]) -> tuple[str, str]:
    """A name for configs whose names differ in single words, with … in their place, and these words as links."""
    if len(paths) == 1:
        return link(paths[0], paths[0].stem), ''
    words = [path.stem.split('_') for path in paths]
    same = [len(set(column)) == 1 for column in zip(*words, strict=True)]
    name = '_'.join(word if own else '…' for word, own in zip(words[0], same, strict=True))
    return f'`{name}`', ', '.join(
        link(path, '_'.join(word for word, own in zip(parts, same, strict=True) if not own))
        for path, parts in zip(paths, words, strict=True))


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
    text += ('\n## Folders\n\n' + table(['folder', 'configs', 'page'], rows)
             + '\nSeveral configs share a row where only the VFM or the attention differs: … stands for that word.\n')
    for folder, paths in configs.items():
        text += f'\n### {folder.name}\n\n' + recipes(paths, vfms)
    return text


def base_page() -> str:
    base = sorted((CONFIGS / '_base_').rglob('*.py'))
    return BASE_HEADER + '\n' + table(['file in `configs/_base_`', 'what it is'], [
        [link(path, path.relative_to(CONFIGS / '_base_').as_posix()), about(path)] for path in base])


def files() -> Files:
    yield 'docs/configs.md', page()
    yield 'docs/base_configs.md', base_page()


if __name__ == '__main__':
    keep(ROOT, make_configs=files)
