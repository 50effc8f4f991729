"""Writes the results of a conversion: a safetensors file with metadata, a config, and tables."""
from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save

from adala_mm.conversion.source import Converted
from adala_mm.utils.tables import markdown_table
from adala_mm.version import __version__


def metadata(converted: Converted, origin: str, checksum: str) -> dict[str, str]:
    """The strings that go into the file beside the weights."""
    mean, std = converted.family.normalise
    return {
        'format': 'pt', 'adala_mm': __version__, 'source': f'{converted.source.name}: {origin}',
        'sha256': checksum, 'family': converted.family_name, 'licence': converted.licence,
        'mean': json.dumps(mean), 'std': json.dumps(std), 'patch_size': str(converted.config['patch_size']),
        'position_grid': 'x'.join(map(str, converted.grid)),
        'resampled': '; '.join(text for step, _, text in converted.report if step == 'resampled') or 'nothing'}


def write(converted: Converted, out: Path, notes: dict[str, str]) -> int:
    """Writes ``backbone.*`` with the metadata ``notes`` to a new file; returns the number of tensors.

    Raises:
        FileExistsError: if the file exists; it stays as it is.
    """
    content = save({f'backbone.{key}': value.contiguous() for key, value in converted.state.items()}, notes)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open('xb') as file:
        try:
            file.write(content)
        except OSError:
            out.unlink()  # half a file would pass for one
            raise
    return len(converted.state)


def config_text(converted: Converted, checkpoint: str | Path) -> str:
    """``preprocessor`` and ``backbone`` of a config for the converted weights, as Python."""
    mean, std = (list(values) for values in converted.family.normalise)
    lines = ["type='adala_mm.AdaLAViT'", *(f'{key}={value!r}' for key, value in converted.config.items()),
             "attention=dict(type='adala_mm.LinearAttention')",
             f"init_cfg=dict(type='Pretrained', checkpoint={str(checkpoint)!r})"]
    inner = ',\n    '.join(lines)
    return f'preprocessor = dict(mean={mean}, std={std})\nbackbone = dict(\n    {inner})'


def report_table(converted: Converted) -> str:
    """What was loaded, dropped and resampled, as a Markdown table."""
    return markdown_table(['step', 'tensors', 'details'], [[step, str(count), text] for step, count, text
                                                           in converted.report])
