"""Converts pretrained ViT weights of other libraries for adala_mm.AdaLAViT; docs/weights.md lists them.

    python tools/convert_vfm.py dinov2_vitl14_pretrain.pth dinov2l.safetensors --check
    python tools/convert_vfm.py timm://vit_large_patch16_siglip_256.webli siglipl_512.safetensors --img-size 512
    python tools/convert_vfm.py ViT-L-14.safetensors clipl.safetensors --family clip_openai --patch-size 16

It writes nothing unless every key is accounted for and, with --check, the features are those of the source library.
"""
import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from adala_mm.conversion import (
    FAMILIES,
    PATCH_METHODS,
    Converted,
    compare,
    config_text,
    convert,
    metadata,
    report_table,
    resample,
    write,
)
from adala_mm.utils.checkpoint import checkpoint_sha256, read_state_dict
from adala_mm.utils.image_files import open_image

PHOTO = 'the photograph of matplotlib'
TOLERANCE = 1e-4  # of the greatest feature, or of 1 if that is smaller


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('src',
                        help='file of weights (.safetensors, .pth, .bin), folder of Hugging Face, or timm://NAME')
    parser.add_argument('out', type=Path, help='.safetensors file to write; it must not exist')
    parser.add_argument('--key', help='where in the file the weights are, if not at its top, such as teacher, or '
                                      'teacher.backbone for official checkpoints of DINOv2 in training')
    parser.add_argument('--grid', type=int, nargs=2, metavar=('H', 'W'),
                        help='grid of the position embeddings in the file, in patches, if it is not square')
    parser.add_argument('--family', choices=list(FAMILIES), metavar='F',
                        help=f'family of the weights, if they fit several: {", ".join(FAMILIES)}')
    parser.add_argument('--patch-size', type=int, metavar='P',
                        help='resample the patch kernel to P x P pixels (default: keep it)')
    parser.add_argument('--patch-method', choices=PATCH_METHODS, default='flexi',
                        help='how --patch-size resamples (default: %(default)s)')
    parser.add_argument('--img-size', type=int, nargs='+', metavar='S',
                        help='resize position embeddings for images of S x S, or of HEIGHT WIDTH (default: keep them)')
    parser.add_argument('--num-heads', type=int, metavar='N',
                        help='number of heads; needed for ViTs of unusual width, because no weight shows it')
    parser.add_argument('--check', nargs='?', const=PHOTO, metavar='IMAGE',
                        help=f"compare features with the source library's model on an image (default: {PHOTO})")
    parser.add_argument('--trust-checkpoint', action='store_true',
                        help='unpickle whatever the file holds, which can run any code; for files that you trust')
    args = parser.parse_args()
    if args.out.suffix != '.safetensors':
        parser.error(f'{args.out}: the result is a .safetensors file')
    if args.out.exists():
        parser.error(f'{args.out} exists already; nothing is overwritten')
    if args.img_size and len(args.img_size) > 2:
        parser.error(f'--img-size takes one or two numbers, not {len(args.img_size)}')
    for option in ('patch_size', 'num_heads'):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            parser.error(f'--{option.replace("_", "-")} must be positive')
    return args


def main() -> None:
    args = parse_args()
    try:
        run(args)
    except (OSError, ValueError) as error:
        raise SystemExit(f'{args.src}: {error}') from error


def run(args: argparse.Namespace) -> None:
    """Reads, converts, compares, writes; in that order, so that a failure leaves nothing behind."""
    name = args.src.removeprefix('timm://') if args.src.startswith('timm://') else None
    state = read_state_dict(args.src, trust=args.trust_checkpoint, key=args.key)
    img_size = tuple((args.img_size * 2)[:2]) if args.img_size else None
    native = convert(state, args.family, args.num_heads, img_size, name, args.grid and tuple(args.grid))
    done = resample(native, args.patch_size, args.patch_method, img_size)
    print(f'family {native.family_name}: {native.family}; licence {native.licence}\n')
    print(report_table(done))
    if args.check:
        check(native, state, args.check, name)
    count = write(done, args.out, metadata(done, Path(args.src).name, checkpoint_sha256(args.src)))
    print(f'\n{args.out}: {count} tensors. The config that fits:\n\n{config_text(done, args.out)}')


def check(native: Converted, state: dict[str, Tensor], picture: str, name: str | None) -> None:
    """Prints the greatest difference to the source's features; a ValueError if it is no rounding error."""
    note, difference, greatest = compare(native, state, read_image(picture, native), name)
    print(f'\n{picture} at native size: tokens differ by at most {difference:.2e} from {note} (greatest value '
          f'{greatest:.3g}). What is resampled afterwards has no original to compare with.')
    if not difference <= TOLERANCE * max(1.0, greatest):
        raise ValueError('the features are not those of the source, so nothing is written; is the family right?')


def read_image(picture: str, native: Converted) -> Tensor:
    """An image file at native size, normalised as the family has it: (1, 3, H, W)."""
    if picture == PHOTO:
        from matplotlib.cbook import get_sample_data
        picture = get_sample_data('grace_hopper.jpg', asfileobj=False)
    patch = native.config['patch_size']
    height, width = (patch * side for side in native.grid)
    pixels = np.asarray(open_image(picture).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in native.family.normalise)
    return (torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] - mean) / std


if __name__ == '__main__':
    main()
