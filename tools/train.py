"""Trains any config: a stage of alignment, a segmentor or a classifier.

    python tools/train.py configs/adala/mask2former_dinov2l_ade20k.py [--work-dir DIR] [--resume] [--amp] \
        [--seed N] [--deterministic]
"""
import os

import torch
from mmengine.registry import RUNNERS

from adala_mm.engine.provenance import outcome_recorded
from adala_mm.utils.cli import (
    base_parser,
    check_data,
    leave_processes,
    load_config,
    message_for_files,
    scale_learning_rate,
)


@message_for_files()
def main() -> None:
    parser = base_parser(__doc__.splitlines()[0])
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='continue from the newest checkpoint in the work dir, or from CHECKPOINT')
    parser.add_argument('--amp', action='store_true', help='train with automatic mixed precision in bfloat16')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help="scale the learning rate to this run's total batch size")
    parser.add_argument('--seed', type=int, help="seed of all random numbers (default: the config's)")
    parser.add_argument('--deterministic', action='store_true',
                        help='use deterministic algorithms only; slower, but on a CPU equal runs give equal bits')
    args = parser.parse_args()
    if args.seed is not None and not 0 <= args.seed < 2 ** 32:
        parser.error(f'--seed must be within 0 and 2^32 - 1, got {args.seed}')
    cfg = load_config(args)
    if args.amp:
        # bfloat16 has float32's range: gradients need no scaling.
        kind = 'AmpOptimWrapper' if torch.cuda.is_available() else 'adala_mm.CPUAmpOptimWrapper'
        cfg.optim_wrapper.update(type=kind, dtype='bfloat16', loss_scale=1.0)
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    if args.auto_scale_lr:
        scale_learning_rate(cfg, parser)
    cfg.randomness = dict(cfg.get('randomness', {}))
    if args.seed is not None:
        cfg.randomness.update(seed=args.seed)
    if args.deterministic:
        cfg.randomness.update(deterministic=True)
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # without it, cuBLAS refuses to be deterministic
    check_data(cfg, ('train_dataloader', 'val_dataloader'))
    runner = RUNNERS.build(cfg)  # MMEngine's Runner, unless the config names a runner_type
    with outcome_recorded(runner):
        runner.train()
    del runner
    leave_processes()


if __name__ == '__main__':
    main()
