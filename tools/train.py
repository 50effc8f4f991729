"""Trains any config of this repository: alignment stages, segmentors and classifiers alike.

    python tools/train.py configs/adala/mask2former_dinov2l_ade20k.py [--work-dir DIR] [--resume] [--amp]
"""
from mmengine.runner import Runner

from adala_mm.utils.cli import base_parser, check_data, leave_processes, load_config


def main() -> None:
    parser = base_parser(__doc__.splitlines()[0])
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='continue from the newest checkpoint in the work dir, or from the one given')
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision in bfloat16 (needs a GPU)')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help="scale the learning rate to this run's total batch size")
    args = parser.parse_args()
    cfg = load_config(args)
    if args.amp:
        # bfloat16 has float32's range: gradients need no scaling, and nothing in a Mask2Former head overflows.
        cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0)
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    if args.auto_scale_lr:
        cfg.auto_scale_lr.enable = True
    check_data(cfg, ('train_dataloader', 'val_dataloader'))
    Runner.from_cfg(cfg).train()
    leave_processes()


if __name__ == '__main__':
    main()
