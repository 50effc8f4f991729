"""What lower precision does to an exported graph: size, time, and how far its outputs are from those in float32.

    python tools/export.py CONFIG CHECKPOINT model.onnx
    python tools/export.py CONFIG CHECKPOINT half.onnx --half
    python tools/analysis_tools/benchmark_onnx.py model.onnx half.onnx --int8 --images FOLDER

The first file is what the others are compared with; --int8 adds its dynamically quantised copy, by ONNX Runtime.
"""
from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

import onnx
import torch

from adala_mm.analysis.images import normalise, read_image
from adala_mm.datasets.image_files import EXTENSIONS
from adala_mm.export.graphs import quiet, session
from adala_mm.models.algorithms.base import relative_error
from adala_mm.utils.machine import machine
from adala_mm.utils.stopwatch import take_turns, wall_timer
from adala_mm.utils.tables import markdown_table

LIMIT = 200  # images to compare on


def quantised(path: Path, out: Path) -> Path:
    """A copy with the weights of linear layers in int8; their inputs are quantised as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    with quiet():
        quantize_dynamic(path, out, weight_type=QuantType.QInt8, op_types_to_quantize=['MatMul', 'Gemm'])
    return out


def agreement(got: torch.Tensor, wanted: torch.Tensor) -> str:
    """Share of images, or of pixels, whose class is the same."""
    return f'{100 * (got.argmax(dim=1) == wanted.argmax(dim=1)).double().mean():.1f} %'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('models', type=Path, nargs='+', help='.onnx files of the same model, the float32 one first')
    parser.add_argument('--int8', action='store_true', help='quantise the first one as well')
    parser.add_argument('--images', type=Path, required=True, help='folder of images, sub-folders included')
    parser.add_argument('--size', type=int, nargs=2, default=[224, 224], metavar=('H', 'W'))
    parser.add_argument('--seconds', type=float, default=10, help='to time all of them; %(default)g if unset')
    args = parser.parse_args()
    files = sorted(path for path in args.images.rglob('*') if path.suffix.lower() in EXTENSIONS)[:LIMIT]
    if not files:
        parser.error(f'no images in {args.images}')
    notes = {entry.key: entry.value for entry in onnx.load(args.models[0], load_external_data=False).metadata_props}
    if 'preprocessing' not in notes:
        parser.error(f'{args.models[0]} has no notes on mean and std: it is not of tools/export.py')
    preprocessor, classes = json.loads(notes['preprocessing']), notes.get('part') == 'model'

    with tempfile.TemporaryDirectory() as folder:
        paths = {path.name: path for path in args.models}
        if args.int8:
            paths['int8'] = quantised(args.models[0], Path(folder) / 'int8.onnx')
        runs = {name: session(path) for name, path in paths.items()}
        outputs = {name: [] for name in runs}
        for file in files:
            image = normalise([read_image(str(file), tuple(args.size))], preprocessor)
            for name, run in runs.items():
                outputs[name].append(run(image)[0])
        times = take_turns({name: partial(run, image) for name, run in runs.items()}, wall_timer(torch.device('cpu')),
                           args.seconds, least=3)
        outputs = {name: torch.cat(found) for name, found in outputs.items()}
        wanted = outputs[args.models[0].name]
        rows = [[name, f'{paths[name].stat().st_size / 2 ** 20:.1f}', f'{1000 * times[name]:.1f}',
                 f'{relative_error(found, wanted).item():.1e}', *([agreement(found, wanted)] if classes else [])]
                for name, found in outputs.items()]
    print(markdown_table(['graph', 'MiB', 'ms an image', 'relative error', *(['same class'] if classes else [])], rows))
    import onnxruntime
    facts = machine()
    print(f'\n{len(files)} images at {args.size[0]} x {args.size[1]}, {notes["attention"]}, ONNX Runtime '
          f'{onnxruntime.__version__}, {torch.get_num_threads()} threads on {facts["cores"]} cores ({facts["cpu"]})')


if __name__ == '__main__':
    main()
