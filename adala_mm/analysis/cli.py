"""The command line that all analysis tools have in common."""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import DictAction

from adala_mm.analysis.images import named_images, validation_images
from adala_mm.analysis.networks import Network, Spec, load_networks
from adala_mm.utils.machine import default_device


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f'{text!r} is no positive number')
    return int(text)


def usable_device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:  # an unknown word, a GPU that is not there, a build without CUDA
        raise argparse.ArgumentTypeError(f'{text}: {str(error).splitlines()[0]}') from error
    return text


def analysis_parser(doc: str, num_images: int = 0) -> argparse.ArgumentParser:
    """Parser with the options of every tool.

    Args:
        doc: of the tool; its first line is the description.
        num_images: default of ``--num-images``; 0 for a tool that does not compare students with a teacher.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    if num_images:
        parser.add_argument('students', nargs='+', type=Spec.parse, metavar='[NAME=]CONFIG[:CHECKPOINT]',
                            help='config of any stage, and its checkpoint (default: the weights that init_cfg names)')
        parser.add_argument('--teacher', type=Spec.parse, metavar='CONFIG[:CHECKPOINT]',
                            help='config with softmax attention, or of stage 1 or 2, whose teacher is taken (default: '
                            'the teacher of the students)')
        parser.add_argument('--images', nargs='+', metavar='PATH',
                            help='files and folders (default: the validation set of the first config)')
        parser.add_argument('--num-images', type=positive, default=num_images, metavar='N',
                            help='use this many of them, spread evenly (default: %(default)s)')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/analysis'), metavar='DIR',
                        help='folder for the JSON and PNG files (default: %(default)s)')
    parser.add_argument('--overwrite', action='store_true', help='replace earlier results in that folder')
    parser.add_argument('--device', type=usable_device, default=str(default_device()),
                        help='device to run on (default: %(default)s)')
    parser.add_argument('--data-root', help='use this folder where the config says data/')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='override entries of all configs')
    parser.add_argument('--trust-checkpoint', action='store_true',
                        help='unpickle whatever a checkpoint holds, which can run any code; for your own files only')
    return parser


def add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--size', type=positive, nargs='+', metavar='H [W]',
                        help="size of the images in pixels (default: the teacher's img_size)")


def open_networks(args: argparse.Namespace) -> tuple[Network, list[Network]]:
    """Teacher and students of the command line, with ``--size`` if the tool has it; see `load_networks`."""
    size = getattr(args, 'size', None)
    if size and len(size) > 2:
        raise ValueError(f'--size {" ".join(map(str, size))}: a height and a width, or one number for both')
    return load_networks(args.teacher, args.students, args, size and (size[0], size[-1]))


def find_images(args: argparse.Namespace, students: Sequence[Network]) -> list[str]:
    """Paths of the command line's images, or of those of the first student's validation set."""
    if args.images:
        return named_images(args.images, args.num_images)
    return validation_images(students[0].cfg, args.num_images)
