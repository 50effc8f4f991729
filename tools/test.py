"""Scores a checkpoint with the test set and metric of its config.

    python tools/test.py CONFIG CHECKPOINT [--work-dir DIR] [--show-dir DIR] [--out DIR] [--tta]
"""
from mmengine.runner import Runner

from adala_mm.engine.provenance import outcome_recorded
from adala_mm.utils.cli import base_parser, check_data, leave_processes, load_config, message_for_files


@message_for_files()
def main() -> None:
    parser = base_parser(__doc__.splitlines()[0])
    parser.add_argument('checkpoint', help='checkpoint to score')
    parser.add_argument('--show-dir', help='draw the predictions into this folder')
    parser.add_argument('--out', help='also write the predicted label maps to this folder (segmentation only)')
    parser.add_argument('--tta', action='store_true', help='use test-time augmentation, if the config defines it')
    args = parser.parse_args()
    cfg = load_config(args)
    cfg.load_from = args.checkpoint
    if args.show_dir:
        if cfg.default_scope == 'mmpretrain':
            cfg.default_hooks.visualization.update(enable=True, out_dir=args.show_dir)
        else:
            cfg.default_hooks.visualization.draw = True
            cfg.visualizer.save_dir = args.show_dir
    if args.out:
        if cfg.default_scope != 'mmseg':
            parser.error(f'--out writes label maps, and {args.config} is no segmentation config')
        cfg.test_evaluator.update(output_dir=args.out, keep_results=True)
    if args.tta:
        if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
            parser.error(f'--tta: {args.config} defines no tta_model and tta_pipeline')
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.model = dict(cfg.tta_model, module=cfg.model)
    check_data(cfg, ('test_dataloader',))
    runner = Runner.from_cfg(cfg)
    with outcome_recorded(runner):
        runner.test()
    del runner
    leave_processes()


if __name__ == '__main__':
    main()
