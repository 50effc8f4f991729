from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from adala_mm.models.attentions import blocks_by_attention
from adala_mm.registry import HOOKS
from adala_mm.utils.inert_lines import refuse_inert_lines


@HOOKS.register_module()
class ConfigCheckHook(Hook):
    """Refuses config lines without effect before a run, and logs which attention each block has.

    Our tools refuse such lines when they read a config; this hook serves the tools of mmseg, mmpretrain and mmdet.

    Raises:
        ValueError: as `adala_mm.utils.inert_lines.refuse_inert_lines`.
    """

    def before_run(self, runner: Runner) -> None:
        file = runner.cfg.filename
        if file and Path(file).is_file():
            refuse_inert_lines(Config.fromfile(file), command_line_options(sys.argv[1:]))
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        for name, blocks in blocks_by_attention(model).items():
            runner.logger.info(f'{name}: {blocks}')


def command_line_options(arguments: list[str]) -> list[str]:
    """Keys after ``--cfg-options``, which all tools of OpenMMLab know."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--cfg-options', nargs='+', default=[])
    return [option.split('=', 1)[0] for option in parser.parse_known_args(arguments)[0].cfg_options]
