"""Prepares a checkpoint for publishing: keeps weights and their description, and puts the hash into the file's name.

    python tools/publish_model.py work_dirs/mask2former_dinov2l_ade20k/epoch_20.pth published/mask2former_dinov2l_ade20k

writes published/mask2former_dinov2l_ade20k-<first 8 digits of SHA-256>.pth.

If the run had MMEngine's EMAHook, the averaged weights are published. These are the weights that validation scored. The
hook saves them as `state_dict`, and the weights of the last step as `ema_state_dict`.
"""
import argparse
from pathlib import Path

import torch

from adala_mm.utils.checkpoint import load_checkpoint
from adala_mm.utils.cli import one_message
from adala_mm.utils.fingerprint import file_sha256

KEPT = ('state_dict', 'meta')  # not the optimizer, schedulers, log buffers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint', type=Path, help='checkpoint that tools/train.py wrote')
    parser.add_argument('out', type=Path, help='path of the result without hash and suffix')
    which = parser.add_mutually_exclusive_group()
    which.add_argument('--ema', action='store_true', help='refuse a checkpoint without averaged weights')
    which.add_argument('--raw', action='store_true',
                       help='publish the weights of the last step instead of their average')
    parser.add_argument('--trust-checkpoint', action='store_true',
                        help='unpickle whatever the checkpoint holds, which can run any code; for your own files only')
    args = parser.parse_args()
    with one_message():
        publish(args, parser)


def publish(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    checkpoint = load_checkpoint(args.checkpoint, trust=args.trust_checkpoint)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get('state_dict'), dict):
        parser.error(f'{args.checkpoint} has no state_dict: it is not a checkpoint of a training run')
    last = {key.removeprefix('module.'): value for key, value in checkpoint.get('ema_state_dict', {}).items()
            if key.startswith('module.')}
    if (args.ema or args.raw) and not last:
        parser.error(f'{args.checkpoint} holds no averaged weights (ema_state_dict): leave out --ema and --raw')
    kept = {key: checkpoint[key] for key in KEPT if key in checkpoint}
    if args.raw:
        kept['state_dict'].update(last)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    part = args.out.with_name(f'{args.out.name}.partial')
    try:
        torch.save(kept, part)
        out = args.out.with_name(f'{args.out.name}-{file_sha256(part)[:8]}.pth')
        if out.exists():
            parser.error(f'{out} exists already; nothing is overwritten')
        part.rename(out)
    finally:
        part.unlink(missing_ok=True)
    size = [path.stat().st_size / 2 ** 20 for path in (args.checkpoint, out)]
    dropped = sorted(set(checkpoint) - set(kept))
    kind = 'tensors' if not last else 'tensors of the last step' if args.raw else 'averaged tensors'
    print(f'{out}: {len(kept["state_dict"])} {kind}, {size[1]:.1f} MiB of {size[0]:.1f}; dropped {", ".join(dropped)}')


if __name__ == '__main__':
    main()
