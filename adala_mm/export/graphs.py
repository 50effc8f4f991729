"""Exports models as graphs (``torch.export``, ONNX) that run without this package and without OpenMMLab."""
from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from adala_mm.export.mask2former import symbolic_sizes
from adala_mm.export.parity import Run, last_line
from adala_mm.export.target import Target

OPSET = 18  # the first whose Resize can antialias, as position embeddings need
PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')
LEAST = 2  # patches along a side of what torch.export traces for any size: it takes 1 for a constant
LIMIT = 2 ** 31  # bytes of a protobuf, which an ONNX file is


def trace(target: Target, dynamic: bool) -> ExportedProgram:
    """Traces a model for any batch size, and if ``dynamic`` for every image size of `size_note`.

    Raises:
        ValueError: if the model depends on the size in a way that a graph cannot express.
    """
    step = target.multiple
    rows, columns = (max(LEAST, side // step) for side in target.size)
    size = (rows * step, (columns + 1) * step) if dynamic else target.size
    free = {2: step * Dim('rows'), 3: step * Dim('columns')} if dynamic else {}
    try:
        with symbolic_sizes(target.model), quiet(), torch.no_grad():
            return torch.export.export(target.module, (torch.zeros(2, 3, *size),),
                                       dynamic_shapes=({0: Dim('batch'), **free},))
    except Exception as error:  # its own, and those of code that meets symbols
        fix = '; --fixed-size ties the graph to one size, which may help' if dynamic else ''
        raise ValueError(f'{target.notes["attention"]}: torch.export cannot hold this model with a '
                         f'{"free" if dynamic else "fixed"} size ({last_line(error)}){fix}') from error


def export_torch(target: Target, path: Path, dynamic: bool = True) -> Run:
    """Writes a ``.pt2`` file, reads it back, and returns it as a function."""
    notes = target.notes | {'size': size_note(target, dynamic, LEAST)}
    torch.export.save(trace(target, dynamic), path, extra_files={'adala_mm.json': json.dumps(notes)})
    return torch.export.load(path).module()


def export_onnx(target: Target, path: Path, dynamic: bool = True, opset: int = OPSET) -> Run:
    """Writes an ONNX file, and returns it as a function that ONNX Runtime runs on the CPU.

    Raises:
        ImportError: if a package for ONNX is missing.
        ValueError: if ONNX cannot express the model.
    """
    require_packages()
    if opset < OPSET:
        raise ValueError(f'opset {opset}: position embeddings are resized with antialiasing, which ONNX has from '
                         f'opset {OPSET} on')
    nbytes = sum(value.nbytes for value in target.model.state_dict().values())
    if nbytes >= LIMIT:
        raise ValueError(f'{nbytes / 2 ** 30:.1f} GiB of weights: an ONNX file holds less than 2; use .pt2')
    program = trace(target, dynamic)
    try:
        with quiet():
            made = torch.onnx.export(program, dynamo=True, opset_version=opset, input_names=['image'],
                                     output_names=list(target.outputs), verbose=False)
    except Exception as error:  # the exporter's own, and those of each operator's translation
        cause = error.__cause__ or error
        raise ValueError(f'{target.notes["attention"]}: ONNX cannot hold this model ({last_line(cause)}); '
                         '.pt2 may') from error
    graph = made.model.graph
    sides = ['height', 'width'] if dynamic else list(target.size)
    graph.inputs[0].shape = type(graph.inputs[0].shape)(['batch', 3, *sides])
    for output in graph.outputs:
        output.shape = type(output.shape)(['batch', *list(output.shape)[1:]])
    made.model.metadata_props.update(target.notes | {'size': size_note(target, dynamic)})
    made.save(path)
    return session(path)


def session(path: Path) -> Run:
    """An ONNX file as a function of images, by ONNX Runtime on as many cores as PyTorch uses."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # what goes wrong is raised as well
    options.intra_op_num_threads = torch.get_num_threads()
    runtime = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])

    def run(image: Tensor) -> list[Tensor]:
        return [torch.from_numpy(output) for output in runtime.run(None, {'image': image.numpy()})]

    return run


def require_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'ONNX files need {", ".join(missing)}: pip install {" ".join(PACKAGES)}')


def size_note(target: Target, dynamic: bool, least: int = 1) -> str:
    """Says which sizes a graph accepts; a side has at least ``least`` multiples."""
    if not dynamic:
        return '{} x {} only'.format(*target.size)
    return f'any multiple of {target.multiple}' + f' from {least * target.multiple} on' * (least > 1)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the exporters, which report every rewrite; they raise real errors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(before)
