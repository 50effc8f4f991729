"""Writes the tables of the Markdown pages from the records (docs/results/, benchmarks/results/) and the code itself.

    python maintenance/make_tables.py [--check]

A table stands between <!-- table: NAME --> and <!-- end -->; everything else in the files is left alone.
"""
from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from generated import Files, keep
from study_report import ALIGNMENT, SEGMENTATION, chain, compute, lengths, read_plan, seeds_of, shown, spread, table
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from adala_mm.conversion import FAMILIES, SOURCES
from adala_mm.models.attentions import build_attention
from adala_mm.registry import ATTENTIONS
from adala_mm.utils.benchmark_tables import (
    attention_speed_table,
    check_table,
    depth_table,
    head_share_table,
    model_speed_table,
    training_speed_table,
)
from adala_mm.utils.frontier import advice, agreements, each_size
from adala_mm.utils.frontier import table as frontier_table
from adala_mm.utils.row_log import latest_rows
from adala_mm.utils.tables import ablation_table, markdown_table

ROOT = Path(__file__).resolve().parents[1]
# Runs of the study: the paper's recipe and ours, after stage 1, and after a short and a long stage 2.
ENDS = (1, 250, 1200)
RECIPES = [f'{recipe}_{end}' for recipe in ('paper', 'plus', 'coarse') for end in ENDS]
PAGES = ['README.md', 'docs/pick_attention.md', 'docs/attentions.md', 'docs/frontier.md', 'docs/approximations.md',
         'docs/costs.md', 'docs/results.md', 'docs/performance.md', 'docs/kernels.md', 'docs/reproducibility.md',
         'docs/weights.md']


def recorded(name: str) -> dict:
    return json.loads((ROOT / f'docs/results/{name}.json').read_text())


def faults() -> str:
    """What tests/integration/faults.py saw; its pairs of features as a square."""
    data = recorded('faults')
    pairs = {tuple(fault.split(' x ')): seen for fault, _, seen in data['rows'] if len(fault.split(' x ')) == 2
             and seen.startswith('equal after ')}
    ones, twos = (list(dict.fromkeys(names)) for names in zip(*pairs, strict=True))
    square = [[one, *(str(pairs[key].count(' in ')) if (key := (one, two)) in pairs else '' for two in twos)]
              for one in ones]
    others = [row for row in data['rows'] if tuple(row[0].split(' x ')) not in pairs]
    m = data['machine']
    return '\n\n'.join([
        markdown_table(['fault', 'expected', 'seen'], others),
        'Each number says after how many of seven interruptions a run with both features was resumed bitwise: SIGKILL '
        'in training, in validation and while a checkpoint is written; SIGTERM in these three and at the last step of '
        'an epoch.',
        markdown_table(['', *twos], square), f'{m["cores"]} cores ({m["cpu"]}), torch {m["torch"]}, '
        f'commit {m["commit"]}.'])


def demo() -> str:
    data = recorded('demo')
    m = data['machine']
    return ablation_table(data['rows']) + (
        f'\n\nOne run each, seed 0, {data["seconds"]} s in all on {m["cores"]} cores ({m["cpu"]}), Python '
        f'{m["python"]}, torch {m["torch"]}, commit {m["commit"]}.')


def real_alignment() -> str:
    runs = recorded('real')
    one, two = runs['stage1_deitt_caltech'], runs['stage2_deitt_caltech']

    def row(name: str, blocks: str, scores: dict, run: dict | None) -> list[str]:
        return [name, blocks, f'{scores["align/top1_agreement"]:.1f}', f'{scores["align/rel_error"]:.3f}',
                f'{scores["align/cosine"]:.3f}', where(run)]

    header = ['DeiT-tiny', 'softmax / linear blocks', 'top-1 agreement (%)', 'relative feature error', 'cosine', 'run']
    return markdown_table(header, [
        ['softmax teacher', '12 / 0', '100', '0', '1', ''],
        row('swap', '0 / 12', one['scores'][0], None),
        row('stage 1', '0 / 12', one['scores'][-1], one),
        *[row(f'stage 1 + 2, iteration {s["step"]}', '0 / 12', s, two if s is two['scores'][-1] else None)
          for s in two['scores'][1:]],
    ]) + footnote(two)


def study(columns: dict[str, tuple[str, int]], file: str = 'configs/real/study.yml', scored: str | None = None) -> str:
    """Table of a study, or of those of its runs that score_study.py has ``scored`` on other images."""
    path = ROOT / file
    records, plan = recorded(path.stem), read_plan(path)
    if scored:
        again = recorded(f'{path.stem}_{scored}')
        plan = {name: run for name, run in plan.items() if seeds_of(again, name)}
        # What they have gone through before they were scored is the study's.
        records = {key: run for key, run in records.items() if key.rpartition('/')[0] not in plan} | again
    machines = [run['machine'] for run in shown(records, plan, columns)]
    places = dict.fromkeys(f'{m["cores"]} cores ({m["cpu"]}), {m["threads"]} of them a run, Python {m["python"]}, '
                           f'torch {m["torch"]}' for m in machines)
    return table(records, plan, columns) + (
        f'\n\nMean ± standard deviation over the seeds. {"; ".join(places)}. {commits(machines)}')


def commits(machines: Iterable[dict]) -> str:
    """At which the code of recorded runs was."""
    names = dict.fromkeys(m['commit'] + '+' * bool(m['dirty']) for m in machines)
    changed = ' (+: files were changed)' * any(name.endswith('+') for name in names)
    return f'Commits {", ".join(names)}{changed}.'


def real_camvid() -> str:
    runs = recorded('real')
    rows = [[name, blocks, f'{runs[run]["scores"][-1]["mIoU"]:.2f}', f'{runs[run]["scores"][-1]["aAcc"]:.2f}',
             where(runs[run])] for name, blocks, run in (
                 ('softmax DeiT-tiny', '12 / 0', 'mask2former_deitt_softmax_camvid'),
                 ('linear DeiT-tiny, stage 1 + 2', '0 / 12', 'mask2former_deitt_camvid'))]
    return markdown_table(['backbone', 'softmax / linear blocks', 'mIoU', 'pixel accuracy', 'run'], rows) + footnote(
        runs['mask2former_deitt_camvid'])


def where(run: dict | None) -> str:
    return '' if run is None else f'`{run["config"]}`, {run["iterations"]} it., {run["sha256"][:8]}'


def footnote(run: dict) -> str:
    m = run['machine']
    return (f'\n\nOne run each, seed {run["seed"]}; {m["cores"]} cores ({m["cpu"]}), Python {m["python"]}, torch '
            f'{m["torch"]}, recorded at commit {m["commit"]}. Hash: first digits of the checkpoint\'s SHA-256.')


def layers() -> str:
    """What each attention says of itself, and the parameters that it adds to a block of ViT-L at 512 px."""
    ATTENTIONS.import_from_location()
    rows = []
    for name, layer in sorted(ATTENTIONS.module_dict.items()):
        with torch.device('meta'):
            built = build_attention(dict(type=name), 1024, 16, grid=(32, 32), num_prefix=1)
        extra = sum(p.numel() for key, p in built.named_parameters() if not key.startswith(('qkv.', 'proj.')))
        rows.append([f'`{name}`', layer.formula.replace('|', '\\|'), f'{extra:,}', layer.cost,
                     'yes' if layer.positional else 'no', layer.reference])
    return markdown_table(['type', 'formula (before the output projection)', 'extra parameters', 'cost', 'positional',
                           'reference'], rows)


class Calls(TorchFunctionMode):
    """Operators of ours that are called, and how many query channels the calls of PyTorch's fused attention have."""

    def __init__(self) -> None:
        super().__init__()
        self.ours, self.channels = set(), [0]

    def __torch_function__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        if function is F.scaled_dot_product_attention:
            self.channels.append(args[0].numel())
        elif str(function).startswith('adala_mm.'):
            self.ours.add(str(function).split('.')[1])
        return function(*args, **kwargs or {})


def gpu_paths() -> str:
    """Who mixes the tokens of each attention on a GPU: seen by running it on tensors that pretend to be on one."""
    ATTENTIONS.import_from_location()
    rows = {'fused': [], 'SDPA': [], 'PyTorch': []}
    for name in sorted(ATTENTIONS.module_dict):
        with FakeTensorMode(), torch.device('cuda'):
            built = build_attention(dict(type=name), 1024, 16, grid=(32, 32), num_prefix=1)
            x = torch.empty(1, 1025, 1024, requires_grad=True)
            with Calls() as calls:
                built(x, (32, 32), 1)
        # The softmax of the class token alone takes O(N) and says nothing of the others.
        path = 'fused' if calls.ours else 'SDPA' if max(calls.channels) > x.numel() // 2 else 'PyTorch'
        rows[path].append(f'`{name.removesuffix("Attention")}`' + f' (`{", ".join(calls.ours)}`)' * bool(calls.ours))
    return markdown_table(['path', 'attentions'], [[path, ', '.join(names)] for path, names in rows.items()])


def priced() -> tuple[list[dict], str]:
    """Recipes with what they cost: counted, and in GPU-days as the paper says, or at the rate that its times imply."""
    data, paper = recorded('datasets'), recorded('paper_times')
    rows = {row['config']: row | data[row['config'].rpartition('_')[2]] for row in recorded('costs')['rows']}
    for row in rows.values():
        row['epoch'] = row['images'] * row['training_multiply_adds']
    rates = {config.partition('_')[0]: rows[config]['epoch'] / seconds / paper['gpus']  # of one GPU, a second
             for config, seconds in paper['seconds_per_epoch'].items()}
    for config, row in rows.items():
        stated = paper['seconds_per_epoch'].get(config)
        rate = rates.get(config.partition('_')[0], rates['stage2'])
        days = row['epochs'] / 86400 * (stated * paper['gpus'] if stated else row['epoch'] / rate)
        row.update(days=days, about='' if stated else '≈ ' if config.startswith('stage') else '> ')
    return list(rows.values()), (
        f'Days: {paper["source"]}. ≈ marks an estimate: multiply-adds divided by the rate that the time of stage 1 '
        f'({rates["stage1"] / 1e12:.0f} · 10¹² a second and GPU) or stage 2 ({rates["stage2"] / 1e12:.0f} · 10¹²) '
        'implies. > marks the same estimate for matrix products alone; heads do more than these.')


def costs() -> str:
    rows, footnote = priced()
    return markdown_table(
        ['config', 'epochs x images', '10¹⁸ multiply-adds', 'H100-days', 'GiB a GPU, float32 / bfloat16',
         'GB of checkpoints'],
        [[f'`{row["config"]}`', f'{row["epochs"]} x {row["images"]:,}', f'{row["epochs"] * row["epoch"] / 1e18:,.3f}',
          f'{row["about"]}{row["days"]:,.2f}', ' / '.join(map(str, row['gib'])),
          f'{math.prod(row["checkpoints"]) / 1e9:.1f}'] for row in rows]) + f'\n\n{footnote}'


def five_commands() -> str:
    """The same in short, for the runs of the README."""
    rows = {row['config']: row for row in priced()[0]}
    chosen = [(f'stage {number}', rows[config]) for number, config in enumerate(
        ('stage1_dinov2l_coco', 'stage2_dinov2l_in22k', 'mask2former_dinov2l_ade20k'), 1)]
    header = ['', 'days on 8 H100', 'GiB a GPU, float32 / bfloat16', 'GB of checkpoints', 'images to fetch']
    return markdown_table(header, [
        [name, f'{row["about"]}{row["days"] / 8:.2f}', ' / '.join(map(str, row['gib'])),
         f'{math.prod(row["checkpoints"]) / 1e9:.1f}', f'{row["name"]}, {row["download"]}'] for name, row in chosen])


def downloads() -> str:
    return markdown_table(['data', 'for', 'training images', 'download, about', 'from', 'size according to'], [
        [row['name'], row['for'], f'{row["images"]:,}', row['download'], row['place'], row['source']]
        for row in recorded('datasets').values()])


def study_costs() -> str:
    """What the study's recipes cost on a CPU, as far as each was trained."""
    records, plan, rows = recorded('study'), read_plan(ROOT / 'configs/real/study.yml'), []
    for name in RECIPES:
        if not (chains := [chain(records, key) for key in seeds_of(records, name)]):
            continue
        scores = [runs[-1]['scores'][-1] for runs in chains]
        steps = chains[0][-1]['iterations']
        rows.append([plan[name]['label'], ' + '.join(map(str, lengths(chains[0], steps))),
                     f'{compute(chains[0], steps):.1f}',
                     spread([sum(run['minutes'] for run in runs) for runs in chains], 0),
                     spread([score['align/top1_agreement'] for score in scores], 1), str(len(chains))])
    header = ['recipe', 'iterations', '10¹² multiply-adds', 'minutes', 'top-1 agreement (%)', 'seeds']
    return markdown_table(header, rows)


def agreement() -> str:
    """How often students of each recipe agree with their teacher, from no training to the longest; means over seeds."""
    records, rows = recorded('study'), [['softmax teacher'] + ['100'] * (1 + len(ENDS))]
    for recipe, title in dict(coarse_24='*coarse*, half of its tiles open', coarse='*coarse*', plus='*plus*',
                              paper="the paper's recipe").items():
        runs = [[records[key]['scores'] for key in seeds_of(records, f'{recipe}_{end}')] for end in ENDS]
        if runs[0]:
            found = [[scores[0] for scores in runs[0]], *([scores[-1] for scores in ended] for ended in runs)]
            rows.append([title, *(f'{statistics.fmean(score["align/top1_agreement"] for score in scores):.0f}'
                                  if scores else '' for scores in found)])
    trained = [chain(records, seeds_of(records, f'paper_{end}')[0]) for end in ENDS]
    return markdown_table(['agreement with the teacher (%), by iterations', 'untrained',
                           *(' + '.join(f'{run["iterations"]:,}' for run in runs) for runs in trained)], rows)


def frontier() -> str:
    """What compare_attentions.py found."""
    data = recorded('frontier')
    return frontier_table(data) + '\n\n' + conditions(data)


def frontier_advice() -> str:
    """Which attention that speaks for, by image size, training and time."""
    data = recorded('frontier')
    return advice(data) + '\n\n' + conditions(data)


# Rows of the page on approximations: labels of the frontier's records, kernels first.
APPROXIMATIONS = ('Linear', 'Performer', 'Hedgehog', 'plus', 'WindowedLinear', 'Nystromformer', "Monarch, the paper's",
                  'Monarch', 'CoarseToFine, small', 'CoarseToFine')


def approximations() -> str:
    """Approximations of softmax and kernels, as they are and after the same alignment."""
    data = recorded('frontier')
    return each_size(data, lambda size: agreements(data, APPROXIMATIONS, size)) + '\n\n' + conditions(data)


def conditions(data: dict) -> str:
    """Of the frontier's records."""
    rows, costs = list(data['rows'].values()), list(data['costs'].values())
    m, seeds = rows[0]['machine'], sorted({row['seed'] for row in rows})
    models = dict.fromkeys(row['settings']['model'] for row in rows)
    photographs = dict.fromkeys(row['settings']['photographs'].partition(',')[0] for row in rows)
    return (f'{", ".join(models)}, {", ".join(photographs)} photographs; seeds {", ".join(map(str, seeds))}; '
            f'{m["cores"]} cores ({m["cpu"]}), Python {m["python"]}, torch {m["torch"]}. '
            + commits(row['machine'] for row in rows + costs))


def benchmark(name: str, table: Callable[[dict], str]) -> str:
    data = json.loads((ROOT / f'benchmarks/results/cpu/{name}.json').read_text())
    m = data['machine']
    return table(data) + (f'\n\nOne run with {m["threads"]} threads on {m["cores"]} cores ({m["device"]}), Python '
                          f'{m["python"]}, torch {m["torch"]}, commit {m["commit"]}.')


def head_counts() -> str:
    """What heads take of the flagship's multiply-adds: nothing that depends on a machine."""
    return head_share_table(recorded('heads'))


def head_times() -> str:
    """What heads take of the time of a small segmentor, and what a multiply-add of its pixel decoder takes."""
    def table(data: dict) -> str:
        last = max((row for row in data['rows'] if not row['softmax_blocks']), key=lambda row: row['size'])
        ours, theirs = (last['seconds'][part] / last['gmac'][part] for part in ('backbone', 'pixel decoder'))
        return (f'{head_share_table(data)}\n\nAt {last["size"]:,} pixels a multiply-add of the pixel decoder took '
                f'{theirs / ours:.1f} times as long as one of the linear backbone.')

    return benchmark('heads', table)


# Parts of benchmarks/run_gpu.sh that have a table: their title, and what makes it.
GPU_PARTS = dict(check=('Values and gradients', check_table), spot=('Values and gradients, spot checks', check_table),
                 core=('The attention core', attention_speed_table), model=('Whole ViTs', model_speed_table),
                 training=('Training steps', training_speed_table))


def gpu() -> str:
    """What run_gpu.sh measured, a section for each GPU."""
    folders = [path.parent for path in sorted(ROOT.glob('benchmarks/results/*/run.jsonl'))]
    return '\n\n'.join(map(measured_on, folders)) or 'No GPU has measured these yet.'


def measured_on(folder: Path) -> str:
    """Tables of a GPU's records; of rows with the same key the last one counts."""
    parts, (machine, *_) = latest_rows(folder / 'run.jsonl')
    texts = [f'### Measured on {machine["device"]}']
    for name, (title, tell) in GPU_PARTS.items():
        if (folder / f'{name}.jsonl').exists():
            rows, machines = latest_rows(folder / f'{name}.jsonl')
            places = dict.fromkeys(f'driver {m["driver"]}, CUDA {m["cuda"]}, torch {m["torch"]}, Triton {m["triton"]}, '
                                   f'commit {m["commit"]}' for m in machines)
            texts += [f'{title}:', tell(dict(rows=rows)), f'{"; ".join(places)}.'] if rows else []
    texts += [f'The part "{part["part"]}" {part["outcome"]}.' for part in parts if part['outcome'] != 'done']
    return '\n\n'.join(texts)


def compiled_kernels() -> str:
    """What the compiler made of the Triton kernels before products in half precision, and what it makes of them now."""
    data = recorded('compiled_kernels')
    old, new = ({tuple(row[name] for name in ('target', 'dtype', 'dim', 'kernel')): row for row in data[when]}
                for when in ('before', 'now'))

    def cells(key: tuple) -> list[str]:
        rows = old[key], new[key]
        shared = [f'{row["shared"] / 1024:.0f}' + ' (too much)' * (row['shared'] > row['limit']) for row in rows]
        return [*map(str, key[:3]), f'`{key[3].strip("_").removesuffix("_kernel")}`',
                *(' → '.join(str(row[name]) for row in rows) for name in ('registers', 'stack')), ' → '.join(shared),
                ' → '.join(f'{row["issue_share"]:.0%}'.replace('%', ' %') for row in rows)]

    versions = ', '.join(f'{name} {version}' for name, version in data['versions'].items())
    return markdown_table(['target', 'dtype', 'D', 'kernel', 'registers', 'stack, B', 'shared memory, KiB',
                           'issue slots'], [cells(key) for key in new]) + f'\n\nFeature map elu1; {versions}.'


def families() -> str:
    """Every family of pretrained weights in every source that `adala_mm.conversion` reads."""
    rows = [[f'`{name}`', family.about, source.name,
             'native, other sizes' if name in source.any_size else 'native', family.patch, family.licence]
            for name, family in FAMILIES.items() for source in SOURCES if name in source.families]
    return markdown_table(['family', 'what it is', 'source', 'parity tested at', 'patch', 'licence'], rows)


TABLES = dict(demo=demo, faults=faults, layers=layers, gpu_paths=gpu_paths, compiled_kernels=compiled_kernels,
              frontier=frontier, advice=frontier_advice, costs=costs, downloads=downloads,
              five_commands=five_commands, study_costs=study_costs, real_alignment=real_alignment,
              real_camvid=real_camvid,
              agreement=agreement,
              study_alignment=lambda: study(ALIGNMENT), study_segmentation=lambda: study(SEGMENTATION),
              study_512=lambda: study(ALIGNMENT, 'configs/real/study_512.yml'),
              study_unseen=lambda: study(ALIGNMENT, scored='unseen'),
              demo_seeds=lambda: study(SEGMENTATION, 'configs/demo/demo_seeds.yml'),
              speed_attention=lambda: benchmark('attention', attention_speed_table),
              speed_model=lambda: benchmark('model', model_speed_table),
              speed_training=lambda: benchmark('training', training_speed_table),
              head_counts=head_counts, head_times=head_times,
              speed_gpu=gpu, memory_by_depth=lambda: benchmark('training', depth_table), approximations=approximations,
              families=families)


def fill(text: str) -> str:
    """``text`` with every marked table written anew."""
    return re.sub(r'(<!-- table: (\w+) -->\n).*?(\n?<!-- end -->)',
                  lambda m: m[1] + TABLES[m[2]]() + '\n<!-- end -->', text, flags=re.DOTALL)


def files() -> Files:
    for page in PAGES:
        yield page, fill((ROOT / page).read_text(encoding='utf-8'))


def main() -> None:
    keep(ROOT, make_tables=files)


if __name__ == '__main__':
    main()
