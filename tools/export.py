"""Exports a trained model to ONNX, torch.export, timm or transformers; the suffix of OUT chooses. See docs/export.md.

    python tools/export.py CONFIG [CHECKPOINT] OUT.onnx [--part model] [--size H W] [--fixed-size] [--half]
    python tools/export.py CONFIG [CHECKPOINT] OUT.pt2
    python tools/export.py CONFIG [CHECKPOINT] OUT.safetensors     # timm
    python tools/export.py CONFIG [CHECKPOINT] FOLDER              # transformers
    python tools/export.py LINEARIZED OUT.onnx                     # a file of adala_mm.save, to .onnx or .pt2

It reads the result back and compares it with the model. If they differ, it leaves no file.
"""
import argparse
import dataclasses
import os
import shutil
from pathlib import Path

import torch
from mmengine.config import DictAction

import adala_mm
from adala_mm import export
from adala_mm.conversion import FAMILIES
from adala_mm.export.graphs import OPSET, require_packages
from adala_mm.export.parity import shapes
from adala_mm.export.speed import SIZES
from adala_mm.models.attentions.marks import MARK
from adala_mm.utils.checkpoint import TRUST, file_notes
from adala_mm.utils.cli import load_config

FORMATS = {'.onnx': 'ONNX', '.pt2': 'torch.export', '.safetensors': 'timm', '': 'transformers'}
TOLERANCE, HALF_TOLERANCE = 1e-4, 1e-2


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config; or the file or folder of a linearized model of timm, transformers or '
                        'mmpretrain, as adala_mm.load reads it')
    parser.add_argument('checkpoint', nargs='?', help="checkpoint of the config (default: the weights that the "
                        "backbone's init_cfg names)")
    parser.add_argument('out', type=Path, help='new file: .onnx, .pt2, or .safetensors for timm; a new folder for '
                        'transformers')
    parser.add_argument('--part', choices=export.PARTS, default='backbone',
                        help='export the backbone alone, or the whole model with its head (default: %(default)s)')
    parser.add_argument('--size', type=int, nargs=2, metavar=('H', 'W'),
                        help="size at which to trace and compare (default: the config's img_size)")
    parser.add_argument('--fixed-size', action='store_true', help='make a graph for that size only')
    parser.add_argument('--half', action='store_true', help='cast the graph to float16; images, outputs and sums '
                        'over tokens stay float32')
    parser.add_argument('--opset', type=int, default=OPSET,
                        help='opset of ONNX, at least %(default)s (default: %(default)s)')
    parser.add_argument('--family', choices=list(FAMILIES), metavar='F',
                        help=f'family of the ViT, for timm and transformers: {", ".join(FAMILIES)}')
    parser.add_argument('--tolerance', type=float, help='allowed difference from the float32 model, as a share of the '
                        f'greatest output or of 1 (default: {TOLERANCE:g}; with --half {HALF_TOLERANCE:g})')
    parser.add_argument('--benchmark', type=int, nargs='+', metavar='S',
                        help=f'time ONNX Runtime at these sides (default: {" ".join(map(str, SIZES))})')
    parser.add_argument('--no-benchmark', action='store_true', help='do not time ONNX Runtime')
    parser.add_argument('--overwrite', action='store_true', help='replace OUT, if it is a file')
    parser.add_argument('--data-root', help='use this folder where the config says data/')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='override entries of the config')
    parser.add_argument('--trust-checkpoint', action='store_true',
                        help='unpickle whatever a checkpoint holds, which can run any code; for your own files only')
    parser.set_defaults(launcher='none', local_rank=0, work_dir=None)
    args = parser.parse_intermixed_args()
    if args.out.suffix not in FORMATS:
        parser.error(f'{args.out}: the suffix says the format, and is one of .onnx, .pt2, .safetensors (timm), or none '
                     '(a folder for transformers)')
    args.format = FORMATS[args.out.suffix]
    named = Path(args.config)
    args.linearized = named.suffix == '.safetensors' or named.is_dir() or MARK in file_notes(named)
    if args.linearized and (args.checkpoint or args.format in ('timm', 'transformers')):
        parser.error(f'{args.config} is a model of its library, weights included: it becomes .onnx or .pt2, without a '
                     'CHECKPOINT')
    of_configs = ('--family', '--benchmark', '--data-root', '--cfg-options')
    idle = [option for option in of_configs if getattr(args, option[2:].replace('-', '_'))]
    if args.linearized and idle:
        parser.error(f'{", ".join(idle)}: for configs only, and {args.config} is a linearized model, which has none')
    if args.half and args.format in ('timm', 'transformers'):
        parser.error(f'--half: weights for {args.format} are float32, and model.half() makes them float16 there')
    if args.tolerance is None:
        args.tolerance = HALF_TOLERANCE if args.half else TOLERANCE
    if args.out.is_dir():
        parser.error(f'{args.out} is a folder that exists already; nothing is overwritten')
    if args.out.exists() and not args.overwrite:
        parser.error(f'{args.out} exists already; nothing is overwritten without --overwrite')
    return args


def main() -> None:
    args = parse_args()
    try:
        run(args)
    except (ImportError, OSError, ValueError, TypeError) as error:
        raise SystemExit(f'{args.config}: {error}') from error


def run(args: argparse.Namespace) -> None:
    """Builds, writes under another name, reads back, compares, renames; a failure leaves nothing behind."""
    if args.format == 'ONNX':
        require_packages()
    if args.trust_checkpoint:
        os.environ[TRUST] = '1'
    if args.linearized:
        target = export.of_linearized(adala_mm.load(args.config), args.part, args.size, args.fixed_size)
    else:
        cfg = load_config(args)
        target = export.assemble(cfg, args.part, args.size, fixed=args.fixed_size)
        export.load(target, cfg, args.checkpoint)
        export.name_classes(target, args.checkpoint)
    model = target.module
    if args.half:
        target = dataclasses.replace(target, module=export.HalfPrecision(model), notes=target.notes | {
            'precision': 'float16'})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    partial = args.out.with_name(f'{args.out.stem}.partial{args.out.suffix}')
    dynamic = not args.fixed_size
    try:
        if args.format == 'ONNX':
            exported = export.export_onnx(target, partial, dynamic, args.opset)
        elif args.format == 'torch.export':
            exported = export.export_torch(target, partial, dynamic)
        elif args.format == 'timm':
            exported = export.export_timm(target, partial, args.family)
        else:
            exported = export.export_transformers(target, partial, args.family)
            dynamic = False  # transformers resizes positions in its own way
        if args.format in ('timm', 'transformers') and args.part == 'backbone':
            def model(image: torch.Tensor) -> tuple[torch.Tensor]:
                return (target.backbone.forward_features(image),)
        size = target.size
        if args.format == 'transformers':
            size = tuple(side * target.backbone.patch_size for side in target.backbone.pos_grid)
        found = export.differences(model, exported, shapes(size, target.multiple, dynamic))
        print(export.difference_table(found), '\n', sep='\n')
        export.check(found, args.tolerance)
        partial.rename(args.out)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)
    print(f'{args.out}: {args.format}, {args.part} with {target.notes["attention"]}, '
          + (f'any batch, sizes: {"multiples of " + str(target.multiple) if dynamic else target.size}'
             if args.format in ('ONNX', 'torch.export') else 'see docs/export.md for how to load it'))
    if args.format != 'ONNX' or args.no_benchmark or args.linearized:
        return
    if not target.attentions or target.is_softmax:
        print('no linear attention to compare with softmax')
        return
    rows = export.measure(target, cfg, exported, args.benchmark or SIZES, dynamic, args.opset)
    print(f'\n{export.speed_report(rows, target.notes["attention"])}')


if __name__ == '__main__':
    main()
