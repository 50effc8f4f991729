"""What importing this module changes in OpenMMLab, for the whole process.

- MMEngine reads checkpoints without unpickling them (`use_safe_loading`), so nothing in them is run unasked.
- MMEngine writes checkpoints and other local files whole or not at all (`use_atomic_saving`).
- mmdet and Mask2Former work with an mmcv that has no compiled ops (`provide_mmcv_ops`).
- ``mmengine.hub.get_config('adala_mm::demo/stage1_demo_beacons.py')`` finds our configs.
- mmpretrain, and mmseg with it, can be imported beside transformers 5 (`tolerate_transformers_5`).

Our tools import it first; so do all configs of this repository, and the parts of adala_mm that are for runs of
MMEngine: data sets, hooks and runners (`adala_mm.engine`) and heads. A look-up of any ``type='adala_mm.X'`` in a config
therefore has it, with whatever tool the config is used. The package itself, its layers, its backbones, `linearize` and
`align` do without, and change nothing.
"""
from mmengine.config.utils import MODULE2PACKAGE

from adala_mm.utils.atomic import use_atomic_saving
from adala_mm.utils.checkpoint import use_safe_loading
from adala_mm.utils.mmcv_ext import provide_mmcv_ops
from adala_mm.utils.mmpretrain_compat import tolerate_transformers_5

tolerate_transformers_5()  # first: the others may import mmseg
use_safe_loading()
use_atomic_saving()
provide_mmcv_ops()
MODULE2PACKAGE['adala_mm'] = 'adala_mm'
