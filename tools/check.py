"""Checks a config before training: finds in under a minute what would fail later.

    python tools/check.py configs/adala/mask2former_dinov2l_ade20k.py [--data-root DIR] [--gpus 8] [--images all]

Prints one line for each check, and a fix below what is wrong. The exit code is 1 if something would fail. See
docs/check.md.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections import Counter
from pathlib import Path

from adala_mm.preflight import ERROR, OK, SKIPPED, WARNING, Plan, preflight, write_finding
from adala_mm.utils.cli import base_parser, load_config, message_for_files, scale_learning_rate
from adala_mm.utils.machine import cores


def number_of_images(text: str) -> int | None:
    if text == 'all':
        return None
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f'{text!r} is neither a positive number nor all')
    return int(text)


def positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f'{text} is not positive')
    return value


@message_for_files()
def main() -> None:
    parser = base_parser(__doc__.splitlines()[0])
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='check CHECKPOINT, too; as in tools/train.py')
    parser.add_argument('--amp', action='store_true', help='estimate memory for bfloat16; as in tools/train.py')
    parser.add_argument('--auto-scale-lr', action='store_true', help='check the scaled rate; as in tools/train.py')
    parser.add_argument('--images', type=number_of_images, default=300, metavar='N|all',
                        help='decode this many images of each data set, spread evenly (default: %(default)s)')
    parser.add_argument('--workers', type=int, default=min(16, cores()),
                        help='threads that decode images (default: %(default)s)')
    parser.add_argument('--gpus', type=int, default=int(os.environ.get('WORLD_SIZE', 1)),
                        help='processes of the planned run (default: $WORLD_SIZE, or 1)')
    parser.add_argument('--device-memory', type=positive, metavar='GB',
                        help='memory of the planned GPU in GiB (default: that of the GPU here)')
    parser.add_argument('--json', metavar='FILE', help='write the findings to FILE, for scripts')
    args = parser.parse_args()
    for option in ('workers', 'gpus'):
        if getattr(args, option) < 1:
            parser.error(f'--{option} must be at least 1')
    processes, args.launcher = args.gpus, 'none'  # looks at a run of several processes from one
    cfg = load_config(args)
    if args.amp:
        cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0)
    if args.auto_scale_lr:
        scale_learning_rate(cfg, parser)
    if args.resume and args.resume != 'auto':
        cfg.load_from = args.resume
    findings = []
    for finding in preflight(Plan(cfg, args.images, args.workers, processes, args.device_memory)):
        write_finding(finding)
        findings.append(finding)
    count = Counter(finding.status for finding in findings)
    print(', '.join(f'{count[status]} {status}' for status in (OK, WARNING, ERROR, SKIPPED) if count[status]))
    if args.json:
        Path(args.json).write_text(json.dumps(dict(
            config=args.config, findings=[dataclasses.asdict(finding) for finding in findings]), indent=1) + '\n')
    sys.exit(1 if count[ERROR] else 0)


if __name__ == '__main__':
    main()
