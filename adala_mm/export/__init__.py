"""Trained models for other runtimes and libraries; `tools/export.py` is the command."""
from adala_mm.export.graphs import export_onnx, export_torch
from adala_mm.export.linearized import of_linearized
from adala_mm.export.parity import Difference, check, difference_table, differences
from adala_mm.export.speed import measure, speed_report
from adala_mm.export.target import PARTS, HalfPrecision, Target, assemble, load, name_classes
from adala_mm.export.weights import export_timm, export_transformers

__all__ = ['PARTS', 'Difference', 'HalfPrecision', 'Target', 'assemble', 'check', 'difference_table', 'differences',
           'export_onnx', 'export_timm', 'export_torch', 'export_transformers', 'load', 'measure', 'name_classes',
           'of_linearized', 'speed_report']
