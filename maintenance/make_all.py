"""Writes everything that is generated here: tables, pages, metafiles and pictures. `make tables` calls it.

    python maintenance/make_all.py [--check]

Nothing is trained or measured: all of it comes from the code, the configs and the records. The metafiles take minutes.
``--check`` leaves out the pictures: their bytes depend on the version of Matplotlib.
"""
from __future__ import annotations

from pathlib import Path

import draw_stages
import make_configs
import make_metafiles
import make_paper
import make_tables
import study_report
from generated import keep

from adala_mm.utils import frontier

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    if keep(ROOT, make_tables=make_tables.files, make_configs=make_configs.files, make_paper=make_paper.files,
            make_metafiles=make_metafiles.files):
        draw_stages.draw(ROOT / 'docs/images/stages.svg')
        study_report.draw(ROOT / 'docs/images/study.png', make_tables.recorded('study'),
                          study_report.read_plan(ROOT / 'configs/real/study.yml'))
        frontier.draw(ROOT / 'docs/images/frontier.png', make_tables.recorded('frontier'))


if __name__ == '__main__':
    main()
