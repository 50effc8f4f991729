"""Adds the updates of LoRA to the weights of a checkpoint, which then holds plain Hedgehog attention.

    python tools/merge_lora.py work_dirs/cls_dinov2l_lolcats_native_in1k/epoch_10.pth merged.pth

The result is a .safetensors file if OUT has this suffix, otherwise a file of torch.save. It loads into a model with
`adala_mm.HedgehogAttention` in place of `adala_mm.LoLCATSAttention`.
"""
import argparse
import io
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from adala_mm.models.attentions.lolcats import merge_lora
from adala_mm.utils.atomic import write_atomically
from adala_mm.utils.checkpoint import grid_note, read_state_dict
from adala_mm.utils.cli import one_message


def content_of(state: dict[str, Tensor], suffix: str) -> bytes:
    """A file with ``state``, of the kind that its name says."""
    if suffix == '.safetensors':
        own = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
        return safetensors.torch.save(own, {'format': 'pt', **grid_note(state)})
    torch.save({'state_dict': state}, buffer := io.BytesIO())
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint', help='checkpoint of a model with LoLCATSAttention')
    parser.add_argument('out', type=Path, help='file to write; it must not exist')
    parser.add_argument('--alpha', type=float, default=16.0,
                        help="LoRA's alpha, as in the model's config (default: %(default)s)")
    parser.add_argument('--trust-checkpoint', action='store_true',
                        help='unpickle whatever the checkpoint holds, which can run any code; for your own files only')
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f'{args.out} exists already; nothing is overwritten')
    with one_message():
        state = read_state_dict(args.checkpoint, trust=args.trust_checkpoint)
        merged = merge_lora(state, args.alpha)
        write_atomically(args.out, content_of(merged, args.out.suffix))
    print(f'{args.out}: {len(state) - len(merged)} LoRA tensors merged, {len(merged)} tensors left')


if __name__ == '__main__':
    main()
