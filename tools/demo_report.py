"""Draws the report of a finished demo: report.md, report.html, results.json and their pictures.

    python tools/demo_report.py work_dirs/demo [--data-root data] [--seconds 400]
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import html
import io
import json
import re
import statistics
import time
import warnings
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmseg.structures import SegDataSample
from PIL import Image
from torch.nn.functional import scaled_dot_product_attention

from adala_mm.datasets.beacons import CLASSES, PALETTE
from adala_mm.ops import linear_attention
from adala_mm.registry import MODELS
from adala_mm.utils.checkpoint import load_checkpoint
from adala_mm.utils.machine import machine
from adala_mm.utils.pictures import overlay, picture_grid, shared_pca
from adala_mm.utils.records import curve
from adala_mm.utils.tables import ablation_table

SIDE = 1.75  # inches, of a picture in a grid
# run of the fine-tuning, its name in the table, number of softmax and of replaced blocks
ROWS = [('softmax', 'softmax teacher', 6, 0), ('swap', 'swap only', 0, 6), ('coarse', 'swap, coarse to fine', 0, 6),
        ('stage1_only', 'stage 1 only', 0, 6), ('stage2_only_tuned', 'stage 2 only', 0, 6),
        ('both', 'stage 1 + 2', 0, 6)]


def results(out: Path, seconds: float) -> dict:
    rows = []
    for run, name, softmax, linear in ROWS:
        steps, scores = curve(out / run, 'mIoU')
        rows.append(dict(name=name, softmax_blocks=softmax, linear_blocks=linear, as_is=scores[0], tuned=scores[-1],
                         iterations=steps[-1]))
    teacher = rows[0]['as_is']
    for row in rows:
        row.update(as_is_kept=100 * row['as_is'] / teacher, tuned_kept=100 * row['tuned'] / teacher)
    return dict(rows=rows, mask2former=curve(out / 'mask2former', 'mIoU')[1][-1],
                rel_error={name: curve(out / name, 'align/rel_error')[1] for name in
                           ('stage1', 'stage2_only', 'stage2')},
                seconds=round(seconds), machine=machine())


def table(data: dict) -> str:
    return ablation_table(data['rows'])


def run_config(out: Path, run: str) -> Config:
    cfg = Config.fromfile(next((out / run).glob('*.py')))
    init_default_scope(cfg.default_scope)
    return cfg


def segmentor(out: Path, run: str, tuned: bool) -> torch.nn.Module:
    """Model of a run as it started (``tuned=False``) or as it ended."""
    with contextlib.redirect_stdout(io.StringIO()):  # MMEngine prints each file that it loads
        model = MODELS.build(run_config(out, run).model)
        model.init_weights()
    if tuned:
        model.load_state_dict(load_checkpoint(next((out / run).glob('iter_*.pth')))['state_dict'])
    return model.eval()


def batch(images: list[np.ndarray]) -> dict:
    """RGB images as mmseg's data loaders deliver them: BGR tensors and empty data samples."""
    size = images[0].shape[:2]
    return dict(inputs=[torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1) for image in images],
                data_samples=[SegDataSample(metainfo=dict(img_shape=size, ori_shape=size)) for _ in images])


@torch.no_grad()
def labels(model: torch.nn.Module, images: list[np.ndarray]) -> list[np.ndarray]:
    return [sample.pred_sem_seg.data[0].numpy().astype(np.uint8) for sample in model.test_step(batch(images))]


@torch.no_grad()
def draw_features(path: Path, out: Path, images: list[np.ndarray]) -> None:
    features = []
    for run, *_ in ROWS:
        model = segmentor(out, run, tuned=False)
        features.append(model.backbone(model.data_preprocessor(batch(images))['inputs'])[-1])
    colours = shared_pca(features)
    columns = {'image': images} | {name: list(c) for (_, name, *_), c in zip(ROWS, colours, strict=True)}
    picture_grid(path, columns, 'First three principal components of the patch features, components shared', SIDE)


def draw_segmentations(path: Path, out: Path, images: list[np.ndarray], truth: list[np.ndarray]) -> None:
    columns = {'image': images, 'labels': [overlay(i, t, PALETTE) for i, t in zip(images, truth, strict=True)]}
    for name, run, tuned in (('teacher', 'softmax', False), ('swap', 'swap', False), ('stage 1 + 2', 'both', False),
                             ('swap, tuned', 'swap', True), ('stage 1 + 2, tuned', 'both', True),
                             ('Mask2Former', 'mask2former', True)):
        found = labels(segmentor(out, run, tuned), images)
        columns[name] = [overlay(i, f, PALETTE) for i, f in zip(images, found, strict=True)]
    picture_grid(path, columns, ', '.join(CLASSES[1:]) + ': friend or stranger is decided by the framed beacon alone',
                 SIDE)


def draw_curves(path: Path, out: Path) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3))
    left.semilogy(*curve(out / 'stage1', 'loss'), color='tab:blue')
    left.set(title='stage 1: attention MSE', xlabel='iteration')
    for run, name, colour in (('stage2_only', 'from the swap', 'tab:orange'), ('stage2', 'from stage 1', 'tab:blue')):
        middle.semilogy(*curve(out / run, 'loss'), label=name, color=colour)
    middle.set(title='stage 2: feature MSE', xlabel='iteration')
    middle.legend()
    for run, name, *_ in ROWS:
        right.plot(*curve(out / run, 'decode.loss_ce'), label=name)
    right.set(title='stage 3: cross-entropy', xlabel='iteration')
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


@torch.no_grad()
def measure_attentions(tokens: tuple[int, ...] = (64, 256, 1024, 4096, 8192)) -> dict[str, list[float]]:
    """Milliseconds (median of 5, both attentions in turn) per image for 6 heads of 64 channels on this machine."""
    times = dict(tokens=list(tokens), softmax=[], linear=[])
    for n in tokens:
        q, k, v = torch.randn(3, 1, 6, n, 64).unbind(0)
        rounds = dict(softmax=[], linear=[])
        for _ in range(6):  # the first round warms up
            for name, function in (('softmax', scaled_dot_product_attention), ('linear', linear_attention)):
                start = time.perf_counter()
                function(q, k, v)
                rounds[name].append(1000 * (time.perf_counter() - start))
        for name, values in rounds.items():
            times[name].append(statistics.median(values[1:]))
    return times


def draw_times(path: Path, times: dict[str, list[float]]) -> None:
    figure, axis = plt.subplots(figsize=(5, 3.2))
    for name, colour in (('softmax', 'tab:red'), ('linear', 'tab:blue')):
        axis.loglog(times['tokens'], times[name], 'o-', label=name, color=colour)
    axis.set(xlabel='tokens', ylabel='ms per image (6 heads x 64)', title='attention core on this machine, float32')
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def text(data: dict) -> str:
    m, errors = data['machine'], data['rel_error']
    return f"""# From softmax to linear attention, on the embedded data set

{table(data)}

*As is*: the backbone under the teacher's own head, before any fine-tuning. *After stage 3*: backbone and head
fine-tuned for {data['rows'][0]['iterations']} iterations; the softmax teacher gets the same. *Swap, coarse to fine*:
not linear attention but an approximation of softmax, which opens 8 of 25 tiles; it has neither stage 1 nor 2. One run
each, one seed.
Mask2Former (the flagship's model in small) on the stage 1 + 2 backbone: {data['mask2former']:.2f} mIoU.

Relative feature error on held-out images, ||student - teacher|| / ||teacher||: swap {errors['stage1'][0]:.2f},
stage 1 {errors['stage1'][-1]:.2f}, stage 2 only {errors['stage2_only'][-1]:.2f},
stage 1 + 2 {errors['stage2'][-1]:.2f}.

![features](features.png)

![segmentations](segmentations.png)

![curves](curves.png)

![tokens against time](times.png)

{data['seconds']} s in all on {m['cores']} cores ({m['cpu']}), Python {m['python']}, torch {m['torch']},
commit {m['commit']}.
"""


def as_html(markdown: str, out: Path) -> str:
    """The report's few constructs (title, table, pictures, paragraphs) as one self-contained page."""
    body = []
    for block in markdown.strip().split('\n\n'):
        if block.startswith('# '):
            body.append(f'<h1>{html.escape(block[2:])}</h1>')
        elif block.startswith('|'):
            rows = [[html.escape(c.strip()) for c in line.strip('|').split('|')] for line in block.splitlines()]
            body.append('<table>' + ''.join('<tr>' + ''.join(f'<{t}>{c}</{t}>' for c in row) + '</tr>' for t, row in
                                            [('th', rows[0])] + [('td', r) for r in rows[2:]]) + '</table>')
        elif block.startswith('!['):
            name = re.search(r'\((.+)\)', block)[1]
            picture = base64.b64encode((out / name).read_bytes()).decode()
            body.append(f'<img alt="{html.escape(block[2:block.index("]")])}" src="data:image/png;base64,{picture}">')
        else:
            body.append('<p>' + re.sub(r'\*(.+?)\*', r'<em>\1</em>', html.escape(block)) + '</p>')
    style = ('body{font:15px/1.5 sans-serif;max-width:1000px;margin:2em auto;padding:0 1em}img{max-width:100%}'
             'table{border-collapse:collapse}td,th{border:1px solid #bbb;padding:.25em .7em;text-align:left}')
    return f'<!doctype html><meta charset="utf-8"><title>adala_mm demo</title><style>{style}</style>' + '\n'.join(body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=Path, help='work dir of the demo')
    parser.add_argument('--data-root', type=Path, default=Path('data'),
                        help='folder of the embedded data set (default: %(default)s)')
    parser.add_argument('--seconds', type=float, default=0.0,
                        help='how many seconds the runs took; the report shows it')
    args = parser.parse_args()
    out, began = args.out, time.time()
    warnings.filterwarnings('ignore')
    MMLogger.get_instance('demo_report', log_level='ERROR')  # building models is not the news here
    stems = ['0000', '0008', '0012', '0020']  # two scenes with a warm beacon, two with a cool one
    images = [np.asarray(Image.open(args.data_root / 'beacons/images/val' / f'{s}.png')) for s in stems]
    truth = [np.asarray(Image.open(args.data_root / 'beacons/labels/val' / f'{s}.png')) for s in stems]
    draw_features(out / 'features.png', out, images)
    draw_segmentations(out / 'segmentations.png', out, images, truth)
    draw_curves(out / 'curves.png', out)
    times = measure_attentions()
    draw_times(out / 'times.png', times)
    data = results(out, args.seconds + time.time() - began) | dict(attention_ms=times)
    (out / 'results.json').write_text(json.dumps(data, indent=1))
    markdown = text(data)
    (out / 'report.md').write_text(markdown)
    (out / 'report.html').write_text(as_html(markdown, out))
    print(table(data))
    print(f'\n{out}/report.html')


if __name__ == '__main__':
    main()
