# The shared runtime in mmdet's scope.
from mmengine.config import read_base

with read_base():
    from .default_runtime import *

default_scope = 'mmdet'
visualizer.update(type='DetLocalVisualizer')
default_hooks.update(visualization=dict(type='DetVisualizationHook'))
# mmdet's inferencer knows nothing of adala_mm until it builds the model, and mmdet.models cannot be imported without
# mmcv's compiled ops: the stand-in for them has to be there first. MMEngine heeds custom_imports in a dumped config
# only, so that this file does it itself.
custom_imports = dict(imports=['adala_mm.registry'])
__import__('adala_mm.registry')
