"""Which files hold a checkpoint, and what each of them is: by its first bytes, not by its name."""
from __future__ import annotations

import json
import zipfile
from pathlib import Path

import torch

SAFETENSORS, TORCH = 'safetensors', 'torch'
# What folders of Hugging Face have, in order of preference.
IN_FOLDERS = ('model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin', 'pytorch_model.bin.index.json')
TORCH_SAVE = torch.serialization.MAGIC_NUMBER.to_bytes(10, 'little')  # in the first lines of files before PyTorch 1.6
# Where they lie in a file, first bytes of what is taken for a checkpoint; what it is, and what to do.
OTHERS = (
    (0, b'version https://git-lfs', 'it is a pointer of git-LFS, which stands for the file: say `git lfs pull` in its '
                                    'repository, or download the file itself'),
    (0, b'<', 'it is a web page, not a checkpoint: look into it for an error, and download the file itself'),
    (0, b'\x1f\x8b', 'it is compressed by gzip: unpack it'),
    (257, b'ustar', 'it is a tar archive: unpack it, and name the checkpoint in it'),
    (0, b'\x93NUMPY', 'it is a NumPy array, not a checkpoint'),
    (0, b'\x89HDF', 'it is an HDF5 file of Keras, not a checkpoint of PyTorch: take the PyTorch version of this model'),
)


class UnreadableCheckpoint(ValueError):
    """A file that is there, but of which no weights can be read."""


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights: ``path`` itself, one in a folder of Hugging Face, or all that an index names.

    Raises:
        FileNotFoundError: if there is none.
        UnreadableCheckpoint: for JSON that is no index.
    """
    if path.is_dir():
        path = next((path / name for name in IN_FOLDERS if (path / name).is_file()), path)
    if not path.is_file():
        looked = f' (looked for {", ".join(IN_FOLDERS)})' if path.is_dir() else ''
        raise FileNotFoundError(f'no checkpoint at {path}{looked}: check the path, or run the stage that writes it '
                                'first')
    head = first_bytes(path)
    if is_safetensors(head) or head.lstrip()[:1] not in (b'{', b'['):
        return [path]
    try:
        names = sorted(set(json.loads(path.read_text())['weight_map'].values()))
        parts = [path.parent / Path(name).name for name in names]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UnreadableCheckpoint(
            f'cannot read the checkpoint {path}: it is JSON without a weight_map, which names no weights. Name the '
            '.safetensors or .bin file beside it, or the folder of both') from error
    if absent := [part.name for part in parts if not part.is_file()]:
        raise FileNotFoundError(f'no checkpoint at {path.parent / absent[0]}: {path.name} names {len(parts)} files, '
                                f'and {len(absent)} of them are not beside it: download these too')
    return parts


def first_bytes(path: Path) -> bytes:
    with path.open('rb') as file:
        return file.read(512)


def is_safetensors(head: bytes) -> bool:
    """JSON behind its own length in 8 bytes, of which the last are 0 as in no text; the first may be any."""
    return head[4:9] == b'\0\0\0\0{'


def kind_of(path: Path) -> str:
    """`SAFETENSORS`, or `TORCH` for a file of ``torch.save``.

    Raises:
        ValueError: for anything else, with what it is and what to do.
    """
    head = first_bytes(path)
    if is_safetensors(head):
        if int.from_bytes(head[:8], 'little') + 8 > path.stat().st_size:
            raise ValueError('it is a truncated safetensors file: fetch it again')
        return SAFETENSORS
    if found := next((text for at, first, text in OTHERS if head.lstrip()[at:].startswith(first)), None):
        raise ValueError(found)
    if head.startswith(b'PK'):
        return archive(path)
    if TORCH_SAVE in head[:64]:
        return TORCH
    if head.startswith(b'\x80'):
        raise ValueError('it is a pickle that torch.save did not write, or a truncated one: if it is your own, '
                         'unpickle it and save its tensors with torch.save')
    raise ValueError('it is truncated, or not a checkpoint: fetch it again' if head else
                     'it is empty, a truncated file: fetch it again')


def archive(path: Path) -> str:
    """`TORCH` for a whole zip file of ``torch.save``; a ValueError for any other."""
    try:
        with zipfile.ZipFile(path) as opened:
            names = opened.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError('it is truncated: fetch it again') from error
    if any(name.endswith('data.pkl') for name in names):
        return TORCH
    if any(name.endswith('.npy') for name in names):
        raise ValueError('it is an archive of NumPy arrays (.npz): timm reads those of ViTs, so load it with '
                         "timm.create_model(..., checkpoint_path=FILE) and torch.save that model's state_dict(); or "
                         'name the same weights as timm://NAME')
    raise ValueError(f'it is a zip archive of {", ".join(names[:3])}: unpack it, and name the checkpoint in it')
