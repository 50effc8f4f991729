"""Every registered attention on the embedded data set: swapped in, after stage 1, after stages 1 and 2.

    python tools/compare_attentions.py [--quick] [--attentions LinearAttention RALAAttention] [--seeds 0 1 2]

Trains the demo's teacher, then puts each attention into it with the demo's own configs. A run that was interrupted goes
on where it was: finished rows are kept in the work dir. Ends with results.json, comparison.md and comparison.png there.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

for variable in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'):  # rows run side by side, with a thread each
    os.environ.setdefault(variable, '1')
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

import matplotlib  # noqa: E402
import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.runner import Runner  # noqa: E402

from adala_mm.models.attentions import build_attention  # noqa: E402
from adala_mm.registry import ATTENTIONS  # noqa: E402
from adala_mm.utils.cli import relocate  # noqa: E402
from adala_mm.utils.cost import multiply_adds, peak_bytes  # noqa: E402
from adala_mm.utils.fingerprint import file_sha256  # noqa: E402
from adala_mm.utils.records import cores, curve, machine  # noqa: E402
from adala_mm.utils.tables import attention_table  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
# iterations of teacher, stage 1 and stage 2: the demo's own, or what fits into ten minutes for all attentions
FULL = dict(teacher=500, stage1=80, stage2=50)
QUICK = dict(teacher=250, stage1=30, stage2=20)
GRID = (64, 64)  # on which time and memory of one layer are measured, with a class token


def demo_config(name: str, work_dir: Path, data_root: str, seed: int, iterations: int | None = None) -> Config:
    """A config of configs/demo with another place, length and seed."""
    cfg = Config.fromfile(ROOT / f'configs/demo/{name}.py')
    cfg.merge_from_dict(relocate(cfg.to_dict(), data_root))
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = '_'.join(work_dir.parts[-3:])
    cfg.visualizer.name = cfg.experiment_name  # one per run: MMEngine shares those of a name within a process
    cfg.randomness.seed = seed
    if iterations:
        cfg.train_cfg.update(max_iters=iterations, val_interval=iterations)
        warmup, decay = cfg.param_scheduler
        warmup.end = decay.begin = min(warmup.end, iterations // 2)
        decay.end = iterations
        cfg.default_hooks.checkpoint.interval = iterations
    return cfg


def train_teacher(out: Path, data_root: str, iterations: int) -> Path:
    checkpoint = out / f'iter_{iterations}.pth'
    if not checkpoint.exists():
        out.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(min(2, cores()))
        print(f'training the teacher, {iterations} iterations, see {out}/console.log', flush=True)
        with open(out / 'console.log', 'w') as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            Runner.from_cfg(demo_config('teacher_demo_beacons', out, data_root, 0, iterations)).train()
    return checkpoint


def mean_iou(out: Path, data_root: str, teacher: Path, attention: dict, backbone: Path) -> float:
    """mIoU of a backbone under the teacher's head."""
    cfg = demo_config('linear_demo_beacons', out, data_root, 0)
    cfg.model.backbone.update(attention=attention, init_cfg=dict(type='Pretrained', checkpoint=str(backbone)))
    cfg.model.decode_head.init_cfg.update(checkpoint=str(teacher))
    cfg.train_dataloader = cfg.train_cfg = cfg.optim_wrapper = cfg.param_scheduler = None
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.custom_hooks = []
    runner = Runner.from_cfg(cfg)
    runner.model.init_weights()
    return float(runner.test()['mIoU'])


def run_row(name: str, seed: int, out: Path, data_root: str, teacher: str, iterations: dict) -> dict:
    """Swap, stage 1 and stage 2 of one attention; in a process of its own."""
    torch.set_num_threads(1)
    began, attention, source = time.time(), dict(type=f'adala_mm.{name}'), Path(teacher)
    out.mkdir(parents=True, exist_ok=True)
    miou, errors = [], []
    with open(out / 'console.log', 'w') as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        miou.append(mean_iou(out / 'swap', data_root, source, attention, source))
        for stage in ('stage1', 'stage2'):
            cfg = demo_config(f'{stage}_demo_beacons', out / stage, data_root, seed, iterations[stage])
            start = source if stage == 'stage1' else out / f'stage1/iter_{iterations["stage1"]}.pth'
            cfg.model.backbone.update(attention=attention, init_cfg=dict(type='Pretrained', checkpoint=str(start)))
            if stage == 'stage2':
                cfg.model.teacher.init_cfg.update(checkpoint=str(source))
            Runner.from_cfg(cfg).train()
            errors += curve(out / stage, 'align/rel_error')[1][len(errors) > 0:]  # stage 2 begins where stage 1 ended
            miou.append(mean_iou(out / f'{stage}_score', data_root, source, attention,
                                 out / stage / f'iter_{iterations[stage]}.pth'))
    return dict(name=name, seed=seed, miou=miou, rel_error=errors, seconds=round(time.time() - began))


def measure_costs(names: list[str], rounds: int = 4, dim: int = 384, heads: int = 6) -> dict[str, dict]:
    """Time and peak memory of one layer in float32 on a 64 x 64 grid, and what it adds to the plain ViT.

    All layers take turns; times are medians without the first round.
    """
    x = torch.randn(1, 1 + GRID[0] * GRID[1], dim)
    layers = {name: build_attention(dict(type=name), dim, heads, grid=GRID, num_prefix=1).eval() for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    with torch.no_grad():
        for _ in range(rounds):
            for name, layer in layers.items():
                start = time.perf_counter()
                layer(x, GRID, 1)
                times[name].append(time.perf_counter() - start)
        plain = sum(p.numel() for p in layers['SoftmaxAttention'].parameters())
        return {name: dict(ms=1000 * statistics.median(times[name][1:]),
                           mib=peak_bytes(lambda layer=layer: layer(x, GRID, 1)) / 2 ** 20,
                           gmac=multiply_adds(lambda layer=layer: layer(x, GRID, 1)) / 1e9,
                           parameters=sum(p.numel() for p in layer.parameters()) - plain)
                for name, layer in layers.items()}


def draw(path: Path, data: dict) -> None:
    """Quality against measured time and memory, one numbered point per attention."""
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    softmax, grouped = data['costs']['SoftmaxAttention'], rows_by_name(data)
    errors = {name: [statistics.mean(values) for values in zip(*(row['rel_error'] for row in rows), strict=True)]
              for name, rows in grouped.items()}
    for axis, key, label in zip(axes, ('ms', 'mib'), ('time', 'peak memory'), strict=True):
        axis.axvline(1, color='grey', lw=0.8, ls='--')
        for i, name in enumerate(sorted(errors, key=lambda name: errors[name][-1])):
            x, (_, one, both) = data['costs'][name][key] / softmax[key], errors[name]
            colour = plt.get_cmap('tab20')(i % 20)
            axis.plot([x, x], [max(one, 1e-3), both], '-', color=colour, lw=0.7)
            axis.plot(x, both, 'o', color=colour, ms=11, label=f'{i + 1}  {name.removesuffix("Attention")}')
            axis.annotate(str(i + 1), (x, both), ha='center', va='center', fontsize=7)
        axis.set_xscale('log')
        axis.set_yscale('log')
        axis.xaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter('{x:g}')
        axis.xaxis.set_minor_formatter('')
        axis.set_xlabel(f'{label} of one layer, 64 x 64 patches, softmax = 1')
    axes[0].invert_yaxis()
    axes[0].set_ylabel('relative feature error (better is higher)')
    axes[1].legend(fontsize=7, loc='center left', bbox_to_anchor=(1.0, 0.5), markerscale=0.5)
    figure.suptitle('After stage 1 + 2 (points), from where stage 1 ended (lines)')
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def rows_by_name(data: dict) -> dict[str, list[dict]]:
    grouped: dict[str, list[dict]] = {}
    for row in data['rows']:
        grouped.setdefault(row['name'], []).append(row)
    return grouped


def clock(seconds: float) -> str:
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


def run_rows(args: argparse.Namespace, names: list[str], out: Path, data_root: str, teacher: Path,
             iterations: dict, began: float) -> list[dict]:
    """All rows, those of an earlier call from their files; a row that fails is told and left out."""
    key = dict(iterations, teacher_sha256=file_sha256(teacher))
    rows, todo = [], []
    for seed in args.seeds:
        for name in names:
            path = out / 'rows' / f'{name}_seed{seed}' / 'row.json'
            known = json.loads(path.read_text()) if path.exists() else {}
            if known.get('key') == key:
                rows.append(known)
            else:
                todo.append((name, seed, path))
    print(f'[{clock(time.time() - began)}] {len(rows)} rows are there already, {len(todo)} to go', flush=True)
    started, done, failed = time.time(), 0, []
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context('spawn')) as pool:
        jobs = {pool.submit(run_row, name, seed, path.parent, data_root, str(teacher), iterations): (name, path)
                for name, seed, path in todo}
        for job in as_completed(jobs):
            name, path = jobs[job]
            done += 1
            left = (time.time() - started) / done * (len(todo) - done)
            head = f'[{clock(time.time() - began)}] {done}/{len(todo)}  ETA {clock(left)}  {name}'
            try:
                row = job.result() | dict(key=key)
            except Exception:
                failed.append(name)
                print(f'{head} FAILED, see {path.parent}/console.log\n{traceback.format_exc(limit=-1)}', flush=True)
                continue
            path.write_text(json.dumps(row))
            rows.append(row)
            print(head + ': swap {:.1f}, stage 1 {:.1f}, stage 1 + 2 {:.1f} mIoU'.format(*row['miou']), flush=True)
    if failed:
        sys.exit(f'{len(failed)} rows failed: {", ".join(failed)}. The others are kept; call again to go on')
    return sorted(rows, key=lambda row: (row['name'], row['seed']))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--quick', action='store_true', help='shorter runs: all attentions in ten minutes on 2 cores')
    parser.add_argument('--iterations', nargs=3, type=int, metavar=('TEACHER', 'STAGE1', 'STAGE2'),
                        help='lengths of the runs, instead')
    parser.add_argument('--attentions', nargs='+', metavar='NAME', help='registered names; all if unset')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument('--jobs', type=int, default=cores(), help='rows at a time')
    parser.add_argument('--work-dir', help='work_dirs/compare, or work_dirs/compare_quick')
    parser.add_argument('--data-root', default='data', help='where the embedded data set is drawn (beacons/)')
    args = parser.parse_args()
    ATTENTIONS.import_from_location()
    known = sorted(name for name, layer in ATTENTIONS.module_dict.items() if not layer.is_softmax)
    names = [name.removeprefix('adala_mm.') for name in args.attentions or known]
    if unknown := set(names) - set(known):
        parser.error(f'{", ".join(sorted(unknown))}: no registered attention; there are {", ".join(known)}')
    out = Path(args.work_dir or f'work_dirs/compare{"_quick" if args.quick else ""}').resolve()
    iterations, data_root = QUICK if args.quick else FULL, str(Path(args.data_root).resolve())
    if args.iterations:
        if min(args.iterations) < 2:
            parser.error('--iterations must be at least 2 each')
        iterations = dict(zip(FULL, args.iterations, strict=True))
    began = time.time()

    print(f'Teacher, then {len(names)} attentions x {len(args.seeds)} seeds, {args.jobs} at a time: {out}', flush=True)
    teacher = train_teacher(out / 'teacher', data_root, iterations['teacher'])
    score = curve(out / 'teacher', 'mIoU')[1][-1]
    print(f'[{clock(time.time() - began)}] teacher: {score:.2f} mIoU', flush=True)
    rows = run_rows(args, names, out, data_root, teacher, iterations, began)
    print(f'[{clock(time.time() - began)}] measuring time and memory', flush=True)
    torch.set_num_threads(1)
    data = dict(rows=rows, teacher=score, iterations=iterations, costs=measure_costs(['SoftmaxAttention', *names]),
                machine=machine())
    (out / 'results.json').write_text(json.dumps(data, indent=1, sort_keys=True) + '\n')
    (out / 'comparison.md').write_text(attention_table(data) + '\n')
    draw(out / 'comparison.png', data)
    print(attention_table(data))
    print(f'\n[{clock(time.time() - began)}] {out}/comparison.md, comparison.png, results.json')


if __name__ == '__main__':
    main()
