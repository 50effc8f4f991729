"""Writes the runs of the paper's tables and figures, docs/paper*.md, from docs/paper.yml, the configs and the records.

    python maintenance/make_paper.py [--check]
"""
from __future__ import annotations

import functools
import math
import re
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from generated import Files, keep
from make_tables import recorded
from mmengine.config import Config

from adala_mm.utils.compose import composed
from adala_mm.utils.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
FILES = {path.stem: path for path in sorted((ROOT / 'configs').glob('[!_]*/*.py'))}
GPUS = 8  # of the paper
VFMS = dict(dinov2l='DINOv2-L', clipl='CLIP-L', siglipl='SigLIP-L', in1kl='IN1K-L', dinov2b='DINOv2-B')
METHODS = dict(softmax='Softmax', hedgehog='Hedgehog', lolcats='LoLCATS', linformer='Linformer', performer='Performer',
               cosformer='cosFormer', nystromformer='Nyströmformer', monarch='Monarch', stage2='ViT-AdaLA (Stage 2)',
               ours='ViT-AdaLA')
BENCHMARK = 'python tools/analysis_tools/benchmark_model.py --arch L --sizes 512 1024 --attentions paper'
HEADER = '''\
<!-- Written by maintenance/make_paper.py from docs/paper.yml, the configs and the records in docs/results. -->
# The paper, row by row

This page has each row of the tables of ViT-AdaLA, with the paper's number and the runs that ask for ours. [Another
page](paper_figures.md) has the figures. **None of these runs has been made at the paper's scale.** Where a recorded
run asks the same question at a small scale, the column "ours, small" has its number; do not compare it with the
paper's.

[Errata](errata.md) says what we found out about the paper's own figures. [Readings](readings.md) lists sentences that
can be read in two ways. What the paper leaves open, and our choice, is in
[configs/adala](../configs/adala/README.md#what-the-paper-leaves-open-and-what-we-chose) and
[configs/baselines](../configs/baselines/README.md#what-the-paper-leaves-open-and-what-we-chose).

'''
RULES = '''\
- **Runs** are configs. Start each one with `bash tools/dist_train.sh NAME 8`, in the order of the cell: each starts
  from the checkpoint of the one before it. Do not train a run again that another row has trained. The last run
  validates after every epoch, and its log ends with the number of the row.
- **Names** without a file are [composed](configs.md#names). The work dir of a run holds the whole config.
- **GPU-hours** are of one H100, of which 8 work at a time; there is one number for each run. A plain number is the
  paper's (Table 6, epochs of Table 5). ≈ is the number of another VFM, scaled by multiply-adds, or of an alignment of
  the same length. &gt; is counted from matrix products alone: three times those of a forward pass, at the rate that
  the paper's time of stage 2 implies.
'''
FIGURES = '''\
<!-- Written by maintenance/make_paper.py from docs/paper.yml, the configs and the records in docs/results. -->
# The figures of the paper

This page has each figure of ViT-AdaLA, with the commands that ask for ours. Runs are configs, as on [the page of the
tables](paper.md): start each one with `bash tools/dist_train.sh NAME 8`, in the order of the cell. Then call the
commands. GPU-hours are the sum of all commands that train. None of the runs has been made at the paper's scale.

'''


class Row(NamedTuple):
    """One number of the paper, and the config whose run asks for ours."""

    label: str
    config: str
    score: float


@functools.cache
def facts() -> dict[str, Any]:
    return yaml.safe_load((ROOT / 'docs/paper.yml').read_text(encoding='utf-8'))


@functools.cache
def read(name: str) -> Config:
    """A config by name, composed if it has no file.

    Raises:
        KeyError: if there is none.
    """
    return Config.fromfile(FILES.get(name) or composed(name))


def config_name(vfm: str, dataset: str, pixels: int, method: str) -> str:
    """What the stage-3 run of a method is called; baselines are trained by their own recipes."""
    head = 'cls' if dataset == 'in1k' else 'mask2former'
    words = dict(softmax=['softmax'], stage2=['stage2only'], ours=[]).get(method, [method, 'native'])
    return '_'.join([head, vfm, *words, *['1024'] * (pixels == 1024), dataset])


def rows_of(number: int) -> list[Row]:
    """Rows of a table that are runs."""
    table = facts()['tables'][number]
    rows = [Row(*row) for row in table.get('rows', ())]
    for vfm, dataset, pixels, scores in table.get('grid', ()):
        methods = facts()['methods'] if len(scores) > 3 else ['softmax', 'stage2', 'ours']
        size = f', {pixels} px' if dataset == 'cityscapes' else ''
        rows += [Row(f'{METHODS[method]}, {VFMS[vfm]}{size}', config_name(vfm, dataset, pixels, method), score)
                 for method, score in zip(methods, scores, strict=True)]
    return rows


def checkpoints(node: Any) -> Iterator[str]:
    """Every checkpoint that a model config names."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from [value] if key == 'checkpoint' else checkpoints(value)


@functools.cache
def chain(name: str) -> tuple[str, ...]:
    """Configs that have to be run, in this order: all that a config's checkpoints come from, and the config."""
    named = (re.match(r'work_dirs/(\w+)/', path) for path in checkpoints(read(name).model.to_dict()))
    before = [match[1] for match in named if match]
    return tuple(dict.fromkeys(run for other in before for run in chain(other))) + (name,)


@functools.cache
def counted() -> dict[str, int]:
    """Multiply-adds of the models that the configs of files have, for one image."""
    return {model['Name']: model['Metadata']['FLOPs'] for folder in ('adala', 'baselines')
            for model in yaml.safe_load((ROOT / f'configs/{folder}/metafile.yml').read_text())['Models']}


def forward_pass(name: str) -> float:
    """Multiply-adds of one image through the model of stage 3, or of training from scratch; of no teacher."""
    name = name.removeprefix('task_')
    if name in counted():
        return counted()[name]
    cfg = read(name)
    kind = cfg.model.backbone.attention.type.removeprefix('adala_mm.')
    size = str(cfg.crop_size[0] if 'crop_size' in cfg else 512)
    total = {row['attention']: row['total'][size] for row in recorded('paper_flops')['rows']}
    recipe = re.sub(r'_(softmax|stage[12]only|qkv|swap|[a-z]+_native)(?=_)', '', name)
    return counted()[recipe] + total[kind] - total['LinearAttention']


@functools.cache
def hours(name: str) -> tuple[str, float]:
    """GPU-hours of a run, and what they stand on: '' the paper, '≈' another run of the paper, '>' a count."""
    cfg, (stage, vfm, *_) = read(name), name.split('_')
    epochs, times = cfg.train_cfg.max_epochs, facts()['times']
    if stage in ('stage1', 'stage2'):
        which = ('stage1', 'stage2').index(stage)
        seconds = times[vfm if vfm in times else 'dinov2l'][which]
        if vfm not in times:
            steps = {row['config']: row['training_multiply_adds'] for row in recorded('costs')['rows']}
            data = 'in22k' if which else 'coco'
            seconds *= steps[f'{stage}_{vfm}_{data}'] / steps[f'{stage}_dinov2l_{data}']
        exact = vfm in times and name in (f'stage1_{vfm}_coco', f'stage2_{vfm}_in22k')
        return '' if exact else '≈ ', epochs * seconds * GPUS / 3600
    rate = next(row for row in recorded('costs')['rows'] if row['config'] == 'stage2_dinov2l_in22k')
    data = recorded('datasets')
    per_second = data['in22k']['images'] * rate['training_multiply_adds'] / (times['dinov2l'][1] * GPUS)
    images = data[name.rpartition('_')[2]]['images']
    return '> ', epochs * images * 3 * forward_pass(name) / per_second / 3600


def shown_hours(runs: tuple[str, ...]) -> str:
    return '<br>'.join(f'{about}{value:,.1f}' if value < 100 else f'{about}{value:,.0f}'
                       for about, value in map(hours, runs))


def named(runs: Iterable[str]) -> str:
    return '<br>'.join(f'`{name}`' for name in runs)


def small(number: int, config: str) -> str:
    """What we have at small scale."""
    if not (entry := facts()['tables'][number]['small'].get(config)):
        return ''
    record, key, metric, where = entry
    if record == 'demo':
        row = next(row for row in recorded('demo')['rows'] if row['name'] == key)
        return f'{row[metric]:.2f} ({where})'
    runs = [run for name, run in recorded(record).items() if name.rpartition('/')[0] == key]
    values = [run['scores'][-1][metric] for run in runs]
    return (f'{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}, {len(values)} seeds '
            f'({where}: `{runs[0]["config"]}`, {runs[0]["iterations"]} it.)')


def decimals(score: float) -> str:
    """A score with two digits, or one where the second is zero."""
    return f'{score:.2f}'.removesuffix('0')


def run_table(number: int) -> str:
    header, rows = ['row', 'paper', 'runs', 'GPU-hours'], []
    for row in rows_of(number):
        runs = chain(row.config)
        rows.append([row.label, decimals(row.score), named(runs), shown_hours(runs)])
    if 'small' in facts()['tables'][number]:
        header.append('ours, small')
        rows = [[*cells, small(number, row.config)] for cells, row in zip(rows, rows_of(number), strict=True)]
    return markdown_table(header, rows)


def side_by_side() -> str:
    """Table 3 of the paper and of the demo, each relative to its softmax model as well."""
    demo = {row['name']: row for row in recorded('demo')['rows']}
    rows, entries = rows_of(3), facts()['tables'][3]['small']
    best, teacher = rows[-1].score, demo[entries[rows[-1].config][1]]['tuned']
    cells = []
    for row in rows:
        ours = demo[entries[row.config][1]]
        cells.append([row.label, f'{row.score:.2f}', f'{100 * row.score / best:.1f} %', f'{ours["tuned"]:.2f}',
                      f'{100 * ours["tuned"] / teacher:.1f} %', f'{ours["as_is"]:.2f}'])
    header = ['stages', 'paper, ADE20K', 'of softmax', 'demo', 'of softmax', 'demo, before stage 3']
    return markdown_table(header, cells)


def settings() -> str:
    return markdown_table(['row', 'paper: stage 1 / stage 2 / stage 3', 'key in our configs'],
                          [[row, str(value), f'`{key}`'] for row, key, value in facts()['settings']])


def clock(seconds: float) -> str:
    hour, rest = divmod(round(seconds), 3600)
    return f'{hour} h ' * bool(hour) + f'{rest // 60} min {rest % 60} s'


def times() -> str:
    own = facts()['times']
    rows = [[VFMS[vfm], *map(clock, own[vfm]), named((f'stage1_{vfm}_coco', f'stage2_{vfm}_in22k'))] for vfm in own]
    return markdown_table(['row', 'paper: stage 1, an epoch', 'stage 2, an epoch', 'runs'],
                          [*rows, ['Mean', *map(clock, facts()['mean_time']), 'those above']])


def columns() -> str:
    """Parameters and multiply-adds of DINOv2-L: counted, and the paper's."""
    backbones, rows = {row['config']: row for row in recorded('paper_flops')['rows']}, []
    for method, (parameters, sizes) in facts()['columns'].items():
        words = dict(ours='', softmax='softmax_').get(method, f'{method}_')
        own = backbones[f'mask2former_dinov2l_{words}ade20k']
        cells = [METHODS[method], f'{own["parameters"] / 1e6:.2f} / {parameters:.2f}']
        for size, (flops, *_) in sizes.items():
            total = own['total'][str(size)] / 1e9
            cells += [f'{total:,.2f} / {flops:,.2f}', f'{total - flops:,.2f}', f'{own["mixing"][str(size)] / 1e9:,.2f}']
        rows.append(cells)
    header = ['', 'parameters (M): ours / paper']
    for size in (512, 1024):
        header += [f'10⁹ multiply-adds at {size} px: ours / paper', 'difference', 'of ours, mixing']
    return markdown_table(header, rows)


def measured() -> str:
    """Peak memory and throughput of DINOv2-L in the paper, by pixels."""
    header = ['', *(f'{what} at {size} px' for size in (512, 1024) for what in ('paper: GB', 'images/s'))]
    return markdown_table(header, [
        [METHODS[method], *(text for _, memory, rate in sizes.values() for text in (f'{memory:.4f}', f'{rate:.2f}'))]
        for method, (_, sizes) in facts()['columns'].items()])


def trained_by(line: str) -> list[str]:
    """Configs that a command line trains, once for each word of the loop that it may be."""
    loop = re.match(r'for \w+ in ([^;]+);', line)
    return re.findall(r'dist_train\.sh (\w+)', line) * (len(loop[1].split()) if loop else 1)


def figure_hours(runs: list[str]) -> str:
    """The sum of the runs' GPU-hours, which stands on the least of what they stand on."""
    found = [hours(run) for run in runs]
    about = max((mark for mark, _ in found), key=['', '≈ ', '> '].index, default='')
    return f'{about}{math.fsum(value for _, value in found):,.0f}' if found else '-'


def figures() -> str:
    rows = []
    for number, what, configs, lines, ours in facts()['figures']:
        runs = list(dict.fromkeys(run for name in configs for run in chain(name)))
        shown = '<br>'.join(f'`{line}`' for line in lines)
        trained = [*runs, *(run for line in lines for run in trained_by(line))]
        rows.append([str(number), what, named(runs), shown, figure_hours(trained), ours])
    return markdown_table(['figure', 'what it shows', 'runs', 'then', 'GPU-hours', 'ours'], rows)


def totals() -> str:
    """How much there is, and what all of it would take."""
    tables = {number: rows_of(number) for number in facts()['tables']}
    rows = [row for own in tables.values() for row in own]
    listed = len(rows) + len(facts()['settings']) + len(facts()['times']) + 1
    runs = dict.fromkeys(run for row in rows for run in chain(row.config))
    total = math.fsum(hours(run)[1] for run in runs)
    stage2 = math.fsum(hours(run)[1] for run in runs if run.startswith('stage2'))
    return (f'The 12 tables have {listed} rows. {len(rows)} of them are runs, of '
            f'{len({row.config for row in rows})} configs. With all that they start from, these are {len(runs)} runs. '
            f'They would take more than {total:,.0f} GPU-hours, {stage2:,.0f} of them in stage 2. '
            '`tests/configs/test_paper.py` builds all of them.\n')


def page() -> str:
    parts = [HEADER + totals(), RULES]
    for number in range(1, 13):
        if number == 5:
            parts.append('## Table 5: settings\n\nEvery value is checked in every config '
                         f'(`tests/configs/test_schedules.py`).\n\n{settings()}\n')
        elif number == 6:
            parts.append('## Table 6: time of an epoch on 8 H100\n\nA run logs its time; '
                         '`python tools/analysis_tools/benchmark_training.py` measures steps of both stages without '
                         f'data.\n\n{times()}\n')
        else:
            table = facts()['tables'][number]
            note = table['note'] + '\n\n' if 'note' in table else ''
            parts.append(f'## Table {number}: {table["title"]}\n\n{note}{run_table(number)}\n')
        if number == 3:
            parts.append(f'Beside the demo, which takes minutes on a CPU (`make demo`, `configs/demo`):\n\n'
                         f'{side_by_side()}\n')
    parts.append('## Columns of Tables 1, 2, 4 and 10 to 12\n\n'
                 '`python tools/analysis_tools/count_flops.py` counts parameters and multiply-adds of DINOv2-L from '
                 f'shapes, in half a minute; [errata](errata.md) explains the differences.\n\n{columns()}\n\n'
                 'Peak memory and throughput are measured on a GPU, one image at a time, with the options of the '
                 "paper's attentions (`configs/_base_/attentions.py`):\n\n```bash\n"
                 f'{BENCHMARK}\n```\n\n{measured()}\n')
    return '\n'.join(parts)


def figures_page() -> str:
    return (f'{FIGURES}{figures()}\n\n## Figure 3\n\n'
            '![memory and multiply-adds of attention modules over tokens](images/attention_costs.png)\n\n'
            '*Every attention of adala_mm alone, forward pass of one sequence. Softmax is there twice: with the '
            'N x N matrix, and by the fused kernel that PyTorch takes by itself.*\n')


def files() -> Files:
    yield 'docs/paper.md', page()
    yield 'docs/paper_figures.md', figures_page()


if __name__ == '__main__':
    keep(ROOT, make_paper=files)
