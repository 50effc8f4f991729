"""Compares attentions in a pretrained ViT by image size: agreement with the softmax teacher, and cost.

    python tools/analysis_tools/compare_attentions.py [--data-root data] [--attentions all configs/real/frontier.yml] \
        [--sizes 224 512] [--stage1 100] [--stage2 0] [--images 250] [--jobs 2]

An attention is ``all``, a registered name, a name with options and a label ("Monarch, 1
step=MonarchAttention:num_steps=1"), or a YAML file of such dicts by label. Each attention is scored without training,
then after ``--stage1`` and ``--stage2`` iterations of alignment. At each size, it is compared with the teacher at that
size. Then the time and memory of all attentions are measured in one run, with one thread each.

Images come from folders or lists ("path" or "path class-id", relative to the list). Alignment does not train on every
eighth line of its list (index % 8 == 7); these lines are scored, unless ``--score-list`` names others. A linear head is
fitted on frozen features of the teacher, and nearest neighbours vote on labels.

Each row is recorded at once. The same command continues where it was stopped; other attentions, sizes, seeds and
lengths add their rows. If a row fails, the command reports it and continues with the others. It ends with a table,
advice and a picture.
"""
from __future__ import annotations

import argparse
import ast
import hashlib
import json
import logging
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

for variable in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'):  # rows run side by side, with a thread each
    os.environ.setdefault(variable, '1')
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

import torch  # noqa: E402
import yaml  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from adala_mm import align, linearize  # noqa: E402
from adala_mm.analysis.images import named_images, spread  # noqa: E402
from adala_mm.evaluation.likeness import ImageList, augmented, likeness, load_teacher, make_reference, moved  # noqa: E402
from adala_mm.linearization import find_attention  # noqa: E402
from adala_mm.models.attentions import build_attention  # noqa: E402
from adala_mm.registry import ATTENTIONS  # noqa: E402
from adala_mm.utils.cli import one_message  # noqa: E402
from adala_mm.utils.cost import multiply_adds  # noqa: E402
from adala_mm.utils.fingerprint import file_sha256  # noqa: E402
from adala_mm.utils.frontier import SOFTMAX, UNTRAINED, Training, advice, describe, draw, table  # noqa: E402
from adala_mm.utils.machine import cores, default_device, git_state, machine  # noqa: E402
from adala_mm.utils.records import save  # noqa: E402
from adala_mm.utils.runs import Job, locked, work_off  # noqa: E402
from adala_mm.utils.stopwatch import failure, peak_memory, take_turns, wall_timer  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT = 8  # one line in so many of the alignment's list is for scores
LAYER = dict(dim=384, num_heads=6)  # whose time and memory are measured beside the ViT's
Attentions = dict[str, dict | None]  # by label; None is softmax
Labelled = tuple[Path, int]


@dataclass(frozen=True)
class Setting:
    """What all rows share."""

    model: str
    weights: Path | None
    scored: Sequence[Path]
    labelled: Sequence[Labelled]
    training: Sequence[tuple[Path, Path]]
    validation: Sequence[tuple[Path, Path]]
    alignment: Sequence[Path]
    batch: int
    bf16: bool
    threads: int
    out: Path
    work: Path
    ran_on: dict = field(default_factory=dict)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What scores depend on beside the attention, in words that are the same on every machine."""
        return dict(model=self.model, weights=file_sha256(self.weights)[:16] if self.weights else 'hub',
                    photographs=named(self.scored), labelled=named(self.labelled), fitted=named(self.training),
                    scenes=named(self.validation))

    def row(self, attention: dict | None, training: Training) -> dict[str, Any]:
        """Settings of one row, by which changed ones are noticed."""
        aligned = dict(alignment=named(self.alignment), batch=self.batch, bf16=self.bf16)
        whole = attention and described(attention)
        return self.facts | dict(attention=whole) | (aligned if training != UNTRAINED else {})

    def reference(self, size: int) -> Path:
        return self.work / f'reference_{size}_{digest(self.facts)}.pt'


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def named(images: Sequence) -> str:
    """How many images, and a hash of their names: of file and folder, wherever the data lie."""
    def name(entry: Any) -> Any:
        return [name(part) for part in entry] if isinstance(entry, tuple) else (
            '/'.join(entry.parts[-2:]) if isinstance(entry, Path) else entry)
    return f'{len(images)}, {digest([name(entry) for entry in images])}'


def parse_attentions(words: Sequence[str]) -> Attentions:
    """Attentions by label.

    Raises:
        ValueError: for a word that is none, an unknown attention or option, and a label that is given twice.
    """
    found: list[tuple[str, dict]] = []
    for word in words:
        if word == 'all':
            ATTENTIONS.import_from_location()
            found += [(name.removesuffix('Attention'), dict(type=name))
                      for name, layer in sorted(ATTENTIONS.module_dict.items()) if not layer.is_softmax]
        elif word.endswith(('.yml', '.yaml')):
            listed = yaml.safe_load(Path(word).read_text())
            if not isinstance(listed, dict) or not all(isinstance(cfg, dict) for cfg in listed.values()):
                raise ValueError(f'{word} is no list of attentions; write one a line, label: {{type: NAME, ...}}')
            found += listed.items()
        else:
            if not (parts := re.fullmatch(r'(?:([^=:]+)=)?([\w.]+)(?::(.*))?', word)):
                raise ValueError(f'{word!r} is no attention; write all, FILE.yml or [LABEL=]NAME[:OPTION=VALUE,...]')
            label, kind, options = parts.groups()
            own = {name.strip(): literal(value) for name, _, value in (
                option.partition('=') for option in re.split(r',(?![^\[(]*[\])])', options or '') if option)}
            short = str(find_attention(kind)['type']).rpartition('.')[2].removesuffix('Attention')
            found.append((label or ', '.join([short, *(f'{key} {value}' for key, value in own.items())]),
                          dict(type=kind, **own)))
    attentions: Attentions = {}
    for label, cfg in found:
        if label == SOFTMAX or label in attentions:
            raise ValueError(f'{label!r} is the label of two attentions: give one another, LABEL=NAME:OPTION=VALUE')
        attentions[label] = find_attention(cfg)
        described(attentions[label])
    return attentions


def literal(text: str) -> Any:
    """A number, list, True, False or None as Python writes it; anything else is a word."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text.strip()


def described(cfg: dict) -> dict[str, Any]:
    """The config of an attention with the options that it leaves out: their defaults may be others tomorrow.

    Raises:
        ValueError: for an unknown type, and for an option that it does not have.
    """
    try:
        with torch.device('meta'):
            return build_attention(cfg, **LAYER, grid=(14, 14), num_prefix=1).adala_mm | dict(type=cfg['type'])
    except (TypeError, ValueError) as error:
        raise ValueError(f'{cfg}: {error}') from error


def read_list(path: Path) -> list[tuple[Path, int | None]]:
    """Images of a folder, or of a list with their classes where it has them.

    Raises:
        FileNotFoundError: if there is neither, and for a folder without images.
    """
    if path.is_dir():
        return [(Path(file), None) for file in named_images([str(path)])]
    if not path.is_file():
        raise FileNotFoundError(f'no list or folder of images at {path}; name another one, or where the data are with '
                                '--data-root DIR')
    entries = [re.fullmatch(r'(.+?)(?:\s+(\d+))?', line.strip()).groups()
               for line in path.read_text().splitlines() if line.strip()]
    return [(path.parent / name, None if number is None else int(number)) for name, number in entries]


def few(images: Sequence, count: int) -> tuple:
    """At most so many, spread evenly."""
    return tuple(images[i] for i in spread(len(images), count))


def scenes(folder: Path, split: str, count: int) -> tuple[tuple[Path, Path], ...]:
    """Images and maps of ids of a folder as mmseg has them: images/<split>/*, labels/<split>/*.png."""
    images = [image for image, _ in read_list(folder / 'images' / split)]
    return few([(image, folder / 'labels' / split / f'{image.stem}.png') for image in images], count)


def make_setting(args: argparse.Namespace) -> Setting:
    """What the command line says, with the images that it comes to.

    Raises:
        FileNotFoundError: for data or weights that are not there.
        ValueError: for a list of labelled images without labels, and for too few images.
    """
    root = args.data_root
    lines = [image for image, _ in read_list(root / args.align_list)]
    held_out = [image for i, image in enumerate(lines) if i % HELD_OUT == HELD_OUT - 1]
    scored = [image for image, _ in read_list(root / args.score_list)] if args.score_list else held_out
    labelled = [entry for name in args.labelled for entry in read_list(root / name)]
    if missing := [str(image) for image, number in labelled if number is None]:
        raise ValueError(f'--labelled: {missing[0]} has no class; a line is "path class-id"')
    kept = {*held_out, *scored}
    alignment = tuple(image for image in lines if image not in kept)
    if not scored or len(labelled) < 2 or len(alignment) < args.batch:
        raise ValueError(f'{len(scored)} photographs to score, {len(labelled)} labelled ones and {len(alignment)} to '
                         f'align on in batches of {args.batch}: there must be more')
    if args.weights and not args.weights.is_file():
        raise FileNotFoundError(f'no weights at {args.weights}')
    training, validation = (scenes(root / args.segmentation, split, args.images) if args.segmentation else ()
                            for split in ('train', 'val'))
    threads = max(1, cores() // args.jobs)
    return Setting(
        args.model, args.weights, few(scored, args.images), few(labelled, args.images), training, validation,
        alignment, args.batch, args.bf16, threads, args.out, args.work_dir,
        machine() | dict(threads=threads, dirty=git_state()['dirty']))


def key(label: str, size: int, seed: int, training: Training) -> str:
    return f'{label}/{size}/seed{seed}/{training[0]}+{training[1]}'


def read_records(out: Path) -> dict:
    return json.loads(out.read_text()) if out.exists() else dict(rows={}, costs={})


def keep(setting: Setting, part: str, name: str, record: dict) -> None:
    """Adds a record to those in the file, to which other processes of this work dir may add theirs."""
    with locked(setting.work / 'lock'):
        data = read_records(setting.out)
        data[part][name] = record
        save(setting.out, data)


def outstanding(setting: Setting, attentions: Attentions, sizes: Sequence[int], seeds: Sequence[int],
                trainings: Sequence[Training]) -> list[tuple[str, int, int, list[Training]]]:
    """Jobs: rows of a label, size and seed that are not recorded, those as is before all trained ones.

    What is as is has the first seed alone.

    Raises:
        ValueError: for a row that is recorded, but of other settings.
    """
    known, jobs = read_records(setting.out)['rows'], []
    for chain in ([UNTRAINED], [training for training in trainings if training != UNTRAINED]):
        for seed in seeds if chain != [UNTRAINED] else seeds[:1]:
            for size in sizes:
                for label, attention in attentions.items():
                    todo = []
                    for training in chain if attention or chain == [UNTRAINED] else []:
                        row, wanted = known.get(key(label, size, seed, training)), setting.row(attention, training)
                        if row is None:
                            todo.append(training)
                        elif changed := differences(row['settings'], wanted, attention or {}):
                            raise ValueError(
                                f'{key(label, size, seed, training)} is recorded in {setting.out} with other settings, '
                                f'{changed}: name another --out, give the attention another label, or remove the '
                                'record')
                    if todo:
                        jobs.append((label, size, seed, todo))
    return jobs


def differences(was: dict, now: dict, given: dict) -> str:
    """What recorded settings have and those at hand have not, in words; empty if there is nothing.

    An option that the attention has got since is no difference, unless it is ``given``.
    """
    old, new = was['attention'] or {}, now['attention'] or {}
    pairs = {name: (was.get(name), value) for name, value in now.items() if name != 'attention'}
    pairs |= {name: (old.get(name), new.get(name)) for name in old | given}
    return ', '.join(f'{name} {before!r} and not {value!r}' for name, (before, value) in pairs.items()
                     if before != value)


def write_reference(setting: Setting, size: int) -> None:
    """What the teacher says at a size, once: other processes of this work dir wait for it."""
    path = setting.reference(size)
    with locked(path.with_suffix('.lock')):
        if path.exists():
            return
        print(f'{size} px: features of the teacher', flush=True)
        teacher = load_teacher(setting.model, size, setting.weights).to(default_device())
        found = make_reference(teacher, size, setting.scored, setting.labelled, setting.training, setting.validation)
        torch.save(found, part := path.with_suffix('.part'))
        part.replace(path)


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """What the package says goes into a file meanwhile, and what goes wrong."""
    logger, handler = logging.getLogger('adala_mm'), logging.FileHandler(path)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    except Exception:
        logger.exception('failed')
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()


def run_job(setting: Setting, label: str, attention: dict | None, size: int, seed: int,
            trainings: Sequence[Training]) -> list[str]:
    """Rows of one attention, size and seed, each recorded at once; in a process of its own. Returns what to tell."""
    torch.set_num_threads(setting.threads)
    device, told = default_device(), []
    reference = torch.load(setting.reference(size), mmap=True, weights_only=True)
    with logged(log_of(setting, label, size, seed)):
        for training in trainings:
            began = time.time()
            student = load_teacher(setting.model, size, setting.weights).to(device)
            if attention:
                torch.manual_seed(seed)
                student = linearize(student, attention)
            train(setting, student, label, attention, size, seed, training)
            scores = likeness(student.eval(), reference)
            if attention is None:  # the teacher, beside itself
                scores['moved'] = likeness(student, moved(reference))
            row = scores | dict(
                label=label, size=size, seed=seed, stage1=training[0], stage2=training[1],
                seconds=round(time.time() - began), settings=setting.row(attention, training), machine=setting.ran_on)
            keep(setting, 'rows', key(label, size, seed, training), row)
            told.append(f'{label}, {size} px, {describe(training)}: '
                        + ', '.join(f'{name} {value:.3g}' for name, value in scores.items() if name != 'moved')
                        + f' ({clock(row["seconds"])})')
    return told


def log_of(setting: Setting, label: str, size: int, seed: int) -> Path:
    return setting.work / f'{re.sub(r"[^A-Za-z0-9]+", "_", label)}_{size}_seed{seed}.log'


def train(setting: Setting, student: torch.nn.Module, label: str, attention: dict | None, size: int, seed: int,
          training: Training) -> None:
    """Stages 1 and 2, or what is left of them since an earlier call."""
    if training == UNTRAINED:
        return
    teacher = load_teacher(setting.model, size, setting.weights).to(default_device())
    images = DataLoader(ImageList(setting.alignment, augmented(teacher, size)), setting.batch, shuffle=True,
                        drop_last=True)
    torch.manual_seed(seed)
    for stage, steps in enumerate(training, 1):
        if not steps:
            continue
        until = (training[0], steps if stage == 2 else 0)
        mark = digest([setting.row(attention, until), until])
        path = log_of(setting, label, size, seed).with_suffix(f'.stage{stage}_{mark}.pth')
        align(student, teacher, images, stage, steps, bf16=setting.bf16, log_interval=10, checkpoint=path,
              checkpoint_interval=50, resume=True)


def work_of(setting: Setting, size: int, trainings: Sequence[Training]) -> float:
    """Of a job, in images that go through the network, a pixel counting the same everywhere."""
    scored = len(setting.scored) + len(setting.labelled) + len(setting.validation)
    return size ** 2 * sum(scored + setting.batch * (3 * training[0] + 4 * training[1]) for training in trainings)


def run_jobs(setting: Setting, attentions: Attentions, tasks: list[tuple[str, int, int, list[Training]]],
             processes: int) -> int:
    """All of them, so many at a time; returns how many failed."""
    by_name = {key(label, size, seed, trainings[-1]): (label, size, seed, trainings)
               for label, size, seed, trainings in tasks}
    jobs = [Job(name, cost=work_of(setting, size, trainings)) for name, (_, size, _, trainings) in by_name.items()]
    began = time.time()
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context('spawn')) as pool:

        def submit(job: Job) -> Future:
            label, *rest = by_name[job.name]
            return pool.submit(run_job, setting, label, attentions[label], *rest)

        try:
            for job in work_off(jobs, submit, processes):
                if job.state == 'running':
                    continue
                label, size, seed, _ = by_name[job.name]
                ended = [job for job in jobs if job.state in ('done', 'failed')]
                done, whole = (sum(job.cost for job in some) for some in (ended, jobs))
                left = clock((time.time() - began) / done * (whole - done))
                head = f'[{clock(time.time() - began)}] {len(ended)}/{len(jobs)}  ETA {left}  '
                error = job.future.exception()  # whatever it is, the other rows go on
                told = job.future.result() if error is None else [
                    f'{label}, {size} px, seed {seed} FAILED, {type(error).__name__}: {error}\n'
                    f'    see {log_of(setting, label, size, seed)}']
                print(head + f'\n{" " * len(head)}'.join(told), flush=True)
        except BaseException:  # an interrupt: rows and checkpoints are whole at any time
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return sum(job.state == 'failed' for job in jobs)


def clock(seconds: float) -> timedelta:
    """Whole seconds, which are written as 0:12:34."""
    return timedelta(seconds=int(seconds))


def measure_costs(setting: Setting, attentions: Attentions, size: int, seconds: float = 20) -> dict[str, dict]:
    """Time, peak memory and multiply-adds of one layer and of the whole ViT on one image, in float32, by label.

    All take turns; times are medians. What fails is told and left out.
    """
    device = default_device()
    teacher = load_teacher(setting.model, size, setting.weights).to(device)
    image, side = torch.randn(1, 3, size, size, device=device), teacher.patch_embed.grid_size
    prefix = teacher.num_prefix_tokens
    tokens = torch.randn(1, prefix + side[0] * side[1], LAYER['dim'], device=device)
    calls: dict[str, dict] = dict(vit={}, layer={})
    networks = {}
    for label, attention in attentions.items():
        try:
            networks[label] = vit = (linearize(teacher, attention) if attention else teacher).eval()
            layer = build_attention(attention or dict(type='SoftmaxAttention'), **LAYER, grid=side, num_prefix=prefix)
            layer.to(device).eval().requires_grad_(False)
        except Exception as error:
            print(f'{size} px, {label}: not measured, {type(error).__name__}: {error}', flush=True)
            continue
        found = dict(vit=lambda vit=vit: vit(image), layer=lambda layer=layer: layer(tokens, side, prefix))
        with torch.no_grad():
            if any(failure(call, device) for call in found.values()):
                continue
        for part, call in found.items():
            calls[part][label] = call
    costs: dict[str, dict] = {label: dict(parameters=sum(p.numel() for p in networks[label].parameters())
                                          - sum(p.numel() for p in teacher.parameters())) for label in calls['vit']}
    with torch.no_grad():
        for part, functions in calls.items():
            for label, taken in take_turns(functions, wall_timer(device), seconds).items():
                call = functions[label]
                costs[label] |= {f'{part}_ms': 1000 * taken, f'{part}_mib': peak_memory(call, device) / 2 ** 20,
                                 f'{part}_gmac': multiply_adds(call) / 1e9}
    return costs


def update_costs(setting: Setting, size: int) -> None:
    """Measures all that has rows at a size, unless that has been done."""
    data = read_records(setting.out)
    attentions = {row['label']: row['settings']['attention'] for row in data['rows'].values() if row['size'] == size}
    wanted = dict(model=setting.model, threads=1, attentions={SOFTMAX: None} | attentions)
    if data['costs'].get(str(size), {}).get('settings') == wanted:
        return
    print(f'{size} px: time and memory of {len(attentions)} networks', flush=True)
    torch.set_num_threads(1)
    with logged(setting.work / 'costs.log'):
        rows = measure_costs(setting, wanted['attentions'], size)
    keep(setting, 'costs', str(size), dict(rows=rows, settings=wanted, machine=setting.ran_on | dict(threads=1)))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('--model', default='deit_tiny_patch16_224', help='pretrained classifier of timm, a ViT (default: %(default)s)')
    add('--weights', type=Path, help='file with its weights (default: the download from the hub)')
    add('--attentions', nargs='+', default=['all', str(ROOT / 'configs/real/frontier.yml')], metavar='ATTENTION',
        help='all, FILE.yml, or [LABEL=]NAME[:OPTION=VALUE,...] (default: all, and configs/real/frontier.yml)')
    add('--sizes', nargs='+', type=int, default=[224, 512], help='sides of the images in pixels (default: 224 512)')
    add('--seeds', nargs='+', type=int, default=[0], help='seeds of alignment (default: 0)')
    add('--stage1', type=int, default=100,
        help='iterations of stage 1; with 0, score without training only (default: %(default)s)')
    add('--stage2', type=int, default=0, help='iterations of stage 2, after stage 1 (default: %(default)s)')
    add('--batch', type=int, default=16, help='images in an iteration (default: %(default)s)')
    add('--bf16', action='store_true', help='align in bfloat16; scores stay float32')
    add('--images', type=int, default=250,
        help='greatest number of images of each kind to score, spread evenly (default: %(default)s)')
    add('--data-root', type=Path, default=Path('data'),
        help='folder of the lists and folders below (default: %(default)s)')
    add('--align-list', default='caltech101/unlabelled.txt',
        help='list or folder for alignment; every eighth image is held out (default: %(default)s)')
    add('--score-list', help='list or folder for agreement (default: the images that alignment holds out)')
    add('--labelled', nargs='+', default=['caltech101/train.txt', 'caltech101/test.txt'],
        help='lists with class ids, for training and test (default: those of caltech101)')
    add('--segmentation', default='camvid11',
        help="folder with images/ and labels/ of train/ and val/; '' for none (default: %(default)s)")
    add('--jobs', type=int, default=cores(), help='rows to measure in parallel (default: %(default)s)')
    add('--out', type=Path, default=Path('docs/results/frontier.json'),
        help='file in which rows are recorded (default: %(default)s)')
    add('--png', type=Path, default=Path('docs/images/frontier.png'), help='picture to draw (default: %(default)s)')
    add('--work-dir', type=Path, default=Path('work_dirs/frontier'),
        help='folder for logs, features and checkpoints (default: %(default)s)')
    return parser


def run(args: argparse.Namespace) -> int:
    """Returns how many jobs failed."""
    if min(args.jobs, args.batch, args.images, *args.sizes) < 1 or min(args.stage1, args.stage2) < 0:
        raise ValueError('--jobs, --batch, --images and --sizes are at least 1, --stage1 and --stage2 at least 0')
    attentions = {SOFTMAX: None} | parse_attentions(args.attentions)
    setting = make_setting(args)
    lengths = [UNTRAINED, (args.stage1, 0), (args.stage1, args.stage2)]
    jobs = outstanding(setting, attentions, args.sizes, args.seeds, list(dict.fromkeys(lengths)))
    print(f'{len(attentions) - 1} attentions at {", ".join(map(str, args.sizes))} px: {len(jobs)} jobs to go, '
          f'{args.jobs} at a time; recorded in {args.out}', flush=True)
    setting.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(cores())
    for size in dict.fromkeys(size for _, size, _, _ in jobs):
        write_reference(setting, size)
    failed = run_jobs(setting, attentions, jobs, args.jobs) if jobs else 0
    for size in args.sizes:
        update_costs(setting, size)
    data = read_records(args.out)
    draw(args.png, data)
    print(table(data), advice(data), sep='\n\n')
    return failed


def main() -> None:
    args = parser().parse_args()
    try:
        with one_message():
            failed = run(args)
    except KeyboardInterrupt:
        sys.exit('interrupted; the same command goes on')
    if failed:
        sys.exit(f'{failed} jobs failed; the same command tries them again and goes on')


if __name__ == '__main__':
    main()
