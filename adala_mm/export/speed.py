"""Times a model and its softmax twin in ONNX Runtime."""
from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from mmengine.config import Config

from adala_mm.export.graphs import export_onnx
from adala_mm.export.parity import Run
from adala_mm.export.target import HalfPrecision, Target, assemble
from adala_mm.utils.benchmark_tables import speedup
from adala_mm.utils.machine import machine, total_memory
from adala_mm.utils.stopwatch import take_turns, wall_timer
from adala_mm.utils.tables import markdown_table

CPU = torch.device('cpu')
SIZES = (224, 512, 1024)


def measure(target: Target, cfg: Config, run: Run, sizes: Sequence[int], dynamic: bool,
            opset: int) -> list[dict]:
    """Milliseconds of ``run`` and of the same model with softmax attention in all blocks, one image, in turns.

    Args:
        sizes: sides of square images, rounded up to what fits; the fixed size alone if not ``dynamic``.
    """
    twin = assemble(cfg, target.notes['part'], target.size, softmax=True, fixed=not dynamic)
    twin.model.load_state_dict(target.model.state_dict(), strict=False)
    if target.notes.get('precision') == 'float16':
        twin = replace(twin, module=HalfPrecision(twin.module))
    step, memory, rows = target.multiple, total_memory(CPU), []
    wanted = dict.fromkeys(-(-side // step) * step for side in sizes)
    with tempfile.TemporaryDirectory() as folder:
        softmax = export_onnx(twin, Path(folder) / 'softmax.onnx', dynamic, opset)
        for height, width in [(side, side) for side in wanted] if dynamic else [target.size]:
            patch, heads = target.backbone.patch_size, target.backbone.blocks[0].attn.num_heads
            # ONNX Runtime forms the matrix of attention weights, twice at least
            matrix = 2 * 4 * heads * (height * width / patch ** 2) ** 2
            row = dict(height=height, width=width)
            if matrix > memory / 2:
                rows.append(row | dict(note=f'skipped: softmax takes {matrix / 2 ** 30:.0f} GiB'))
                continue
            image = torch.randn(1, 3, height, width)
            times = take_turns({'softmax': partial(softmax, image), 'own': partial(run, image)}, wall_timer(CPU),
                               seconds=10, least=3)
            rows.append(row | {f'{name}_ms': 1000 * value for name, value in times.items()})
    return rows


def speed_report(rows: list[dict], attention: str) -> str:
    """Table of the results of `measure`, with the machine that measured them."""
    import onnxruntime
    table = []
    for row in rows:
        cells = [row['note'], '', ''] if 'note' in row else [
            f'{row["softmax_ms"]:.1f}', f'{row["own_ms"]:.1f}', speedup(row['softmax_ms'], row['own_ms'])]
        table.append([f'{row["height"]} x {row["width"]}', *cells])
    facts = machine()
    return '\n'.join([
        markdown_table(['pixels', 'softmax, ms', f'{attention}, ms', 'against softmax'], table), '',
        f'ONNX Runtime {onnxruntime.__version__}, {torch.get_num_threads()} threads on {facts["cores"]} cores '
        f'({facts["cpu"]}), one image, medians in turns.'])
