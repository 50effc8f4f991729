# The shared runtime in mmdet's scope.
from mmengine.config import read_base

with read_base():
    from .default_runtime import *

default_scope = 'mmdet'
visualizer.update(type='DetLocalVisualizer')
default_hooks.update(visualization=dict(type='DetVisualizationHook'))
