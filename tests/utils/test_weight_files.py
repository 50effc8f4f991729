"""What a file is that should hold weights: it loads, or one message says what it is and what to do."""
from __future__ import annotations

import collections
import gzip
import json
import pickle
import re
import runpy
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from adala_mm.models.backbones.weights import load_vit
from adala_mm.registry import MODELS
from adala_mm.utils.checkpoint import TRUST, load_checkpoint, read_state_dict
from helpers import ROOT, tiny_vit

TENSORS = {'a': torch.arange(3.0), 'b': torch.ones(2, 2)}


def written(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def zipped(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, 'w') as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tarred(path: Path) -> Path:
    torch.save(TENSORS, path.with_name('in.pth'))
    with tarfile.open(path, 'w') as archive:
        archive.add(path.with_name('in.pth'), 'in.pth')
    return path


def arrays(path: Path) -> Path:
    with path.open('wb') as file:
        np.savez(file, a=np.ones(3))
    return path


def cut(path: Path, share: float, write) -> Path:
    write(path)
    return written(path, path.read_bytes()[:int(share * path.stat().st_size)])


OTHER_FILES = {
    'git-LFS': (lambda path: written(path, 'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n'),
                'a pointer of git-LFS.*git lfs pull'),
    'web page': (lambda path: written(path, '\n<!DOCTYPE html><html>404</html>'),
                 'a web page.*download the file itself'),
    'xml': (lambda path: written(path, '<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'), 'a web page'),
    'npz': (arrays, r'NumPy arrays \(.npz\).*timm://NAME'),
    'npy': (lambda path: np.save(path.open('wb'), np.ones(3)), 'a NumPy array'),
    'tar': (tarred, 'a tar archive: unpack it'),
    'gzip': (lambda path: written(path, gzip.compress(b'weights')), 'compressed by gzip: unpack it'),
    'zip': (lambda path: zipped(path, **{'weights/vit.pth': b'x'}), 'a zip archive of weights/vit.pth: unpack it'),
    'hdf5': (lambda path: written(path, b'\x89HDF\r\n\x1a\n' + bytes(100)), 'HDF5 file of Keras'),
    'json': (lambda path: written(path, '{"architectures": ["Dinov2Model"]}'), 'JSON without a weight_map.*beside it'),
    'pickle': (lambda path: written(path, pickle.dumps({'a': np.ones(3)})), 'a pickle that torch.save did not write'),
    'empty': (lambda path: written(path, b''), 'empty, a truncated file'),
    'text': (lambda path: written(path, 'weights are in another folder'), 'not a checkpoint'),
    'cut zip': (lambda path: cut(path, 0.6, lambda path: torch.save(TENSORS, path)), 'truncated: fetch it again'),
    'cut safetensors': (lambda path: cut(path, 0.9, lambda path: save_file(TENSORS, path)), 'truncated'),
    'cut header': (lambda path: cut(path, 0.3, lambda path: save_file(TENSORS, path)), 'a truncated safetensors file'),
    'cut old file': (lambda path: cut(path, 0.8, lambda path: torch.save(
        TENSORS, path, _use_new_zipfile_serialization=False)), 'truncated or damaged: fetch it again'),
}


@pytest.mark.parametrize('trust', [False, True], ids=['safe', 'trusted'])
@pytest.mark.parametrize('name', ['a.pth', 'a.safetensors'])
@pytest.mark.parametrize('kind', OTHER_FILES)
def test_what_holds_no_weights(kind, name, trust, tmp_path):
    """Trust could not help, and is not advised."""
    write, message = OTHER_FILES[kind]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=f'cannot read the checkpoint .*{name}: .*{message}') as info:
        load_checkpoint(tmp_path / name, trust=trust)
    assert 'trust' not in str(info.value).lower() and len(str(info.value).splitlines()) == 1


def assert_tensors(found) -> None:
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[key], value) for key, value in TENSORS.items())


@pytest.mark.parametrize('name', ['a.pth', 'a.safetensors', 'a.pth.tar', 'a'])
@pytest.mark.parametrize('write', [save_file, torch.save, lambda tensors, path: torch.save(
    tensors, path, _use_new_zipfile_serialization=False)], ids=['safetensors', 'zip', 'old'])
def test_names_do_not_matter(write, name, tmp_path):
    write(TENSORS, tmp_path / name)
    assert_tensors(load_checkpoint(tmp_path / name))


@pytest.mark.parametrize('length', [b' {', b' <', b'\n\n\x01', b' \x80'], ids=repr)
def test_the_length_of_a_header_is_no_text(length, tmp_path):
    """A safetensors file begins with it: with a space and a brace, say, as JSON could."""
    header = json.dumps({'a': dict(dtype='F32', shape=[3], data_offsets=[0, 12])}).encode()
    header = header.ljust(int.from_bytes(length, 'little'))
    content = len(header).to_bytes(8, 'little') + header + np.arange(3, dtype='<f4').tobytes()
    assert torch.equal(load_checkpoint(written(tmp_path / 'a.pth', content))['a'], TENSORS['a'])


def test_json_is_no_safetensors(tmp_path):
    """Its ninth byte is a brace, too."""
    path = written(tmp_path / 'a.json', '{"maps":{"a": "b"}, "number": 3}')
    with pytest.raises(ValueError, match='JSON without a weight_map'):
        load_checkpoint(path)


@pytest.mark.parametrize('suffix', ['safetensors', 'bin'])
def test_folders_and_shards_of_hugging_face(suffix, tmp_path):
    save = save_file if suffix == 'safetensors' else torch.save
    stem = 'model' if suffix == 'safetensors' else 'pytorch_model'
    (tmp_path / 'config.json').write_text('{}')
    with pytest.raises(FileNotFoundError, match=r'no checkpoint at .*looked for model.safetensors'):
        load_checkpoint(tmp_path)
    names = [f'{stem}-0000{i}-of-00002.{suffix}' for i in (1, 2)]
    index = tmp_path / f'{stem}.{suffix}.index.json'
    index.write_text(json.dumps(dict(metadata={}, weight_map=dict(zip(TENSORS, names, strict=True)))))
    save({'a': TENSORS['a']}, tmp_path / names[0])
    with pytest.raises(FileNotFoundError, match=f'{names[1]}: {index.name} names 2 files, and 1 of them'):
        load_checkpoint(index)
    save({'b': TENSORS['b']}, tmp_path / names[1])
    for path in (index, tmp_path):
        assert_tensors(load_checkpoint(path))
    save({'a': TENSORS['a']}, tmp_path / f'{stem}.{suffix}')
    assert list(load_checkpoint(tmp_path)) == ['a']


def test_trust_is_advised_where_it_helps(tmp_path, monkeypatch):
    path = tmp_path / 'a.pth'
    torch.save(TENSORS | {'made by code': collections.deque()}, path)
    with pytest.raises(ValueError, match=f'never unpickled here .*deque.*--trust-checkpoint.*{TRUST}=1.*trust=True'):
        load_checkpoint(path)
    assert 'a' in load_checkpoint(path, trust=True)
    monkeypatch.setenv(TRUST, '1')
    assert 'a' in load_checkpoint(path)


NESTED = {
    'teacher': lambda state: {'teacher': state, 'iteration': 3},
    'teacher.backbone': lambda state: {'teacher': {f'backbone.{key}': value for key, value in state.items()}
                                       | {'dino_head.mlp.0.weight': torch.ones(2)}},
    'student': lambda state: {'model': {'student': state, 'teacher': {'x': torch.ones(1)}}, 'epoch': 3},
    'module': lambda state: {'module': {f'module.{key}': value for key, value in state.items()}},
    'network': lambda state: {'network': {'state_dict': state}},
    'student.backbone': lambda state: {'model': {f'student.backbone.{key}': value for key, value in state.items()}},
}


@pytest.fixture(scope='module')
def state() -> dict:
    torch.manual_seed(3)
    model = MODELS.build(tiny_vit())
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.state_dict()


@pytest.mark.parametrize('key', NESTED)
def test_entries_are_reached_by_key(key, state, tmp_path):
    path = str(tmp_path / 'a.pth')
    torch.save(NESTED[key](dict(state)), path)
    model = MODELS.build(tiny_vit())
    load_vit(model, dict(type='Pretrained', checkpoint=path, key=key))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="nothing under key='encoder', only: "):
        read_state_dict(path, key='encoder')


def test_the_entries_are_named(state, tmp_path):
    torch.save({'student': state, 'teacher': state, 'epoch': 3}, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match="only: student, teacher, epoch. Say which: key='student' or 'teacher' in "
                                         'init_cfg, --key of tools/convert_vfm.py'):
        read_state_dict(str(tmp_path / 'a.pth'))


def convert(*words) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['convert_vfm.py', *map(str, words)])
        runpy.run_path(str(ROOT / 'tools/convert_vfm.py'), run_name='__main__')


@pytest.mark.parametrize('key', [None, 'teacher.backbone', ''], ids=['released', 'in training', 'folder'])
@torch.no_grad()
def test_official_dinov2_is_pointed_to_the_converter(key, tmp_path):
    """By a command that works: it converts what timm, by its own rules, reads in the same way."""
    reference = timm.models.VisionTransformer(img_size=56, patch_size=14, embed_dim=64, depth=2, num_heads=4,
                                              init_values=1e-5, num_classes=0, global_pool='').eval()
    weights = {name: torch.randn_like(value) * 0.3 for name, value in reference.state_dict().items()}
    reference.load_state_dict(weights)
    official = weights | {'mask_token': torch.zeros(1, 64)}
    path = tmp_path / 'dinov2'
    if key == '':
        path.mkdir()
        save_file(official, path / 'model.safetensors')
    else:
        torch.save({'teacher': {f'backbone.{name}': value for name, value in official.items()}} if key else official,
                   path)
    vit = tiny_vit(img_size=56, patch_size=14, embed_dim=64, layer_scale=1e-5)
    model = MODELS.build(vit)
    init = dict(type='Pretrained', checkpoint=str(path), **(dict(key='teacher') if key else {}))
    with pytest.raises(ValueError, match='weights of official DINOv2.*Convert it') as info:
        load_vit(model, init)
    words = re.search(r'python tools/convert_vfm.py (.*)', str(info.value))[1].split()
    assert words == [str(path), 'dinov2_converted.safetensors', *(['--key', key] if key else [])]
    convert(words[0], tmp_path / words[1], *words[2:], '--num-heads', 4)
    load_vit(model, init | dict(checkpoint=str(tmp_path / words[1]), key=None))
    image = torch.randn(1, 3, 56, 56)
    torch.testing.assert_close(model.eval().forward_features(image), reference.forward_features(image))


@pytest.mark.parametrize('names', ['dist_token', 'embeddings.cls_token', 'visual.class_embedding',
                                   'patch_embed.projection.weight'])
def test_other_libraries_are_pointed_there(names, state, tmp_path):
    torch.save({names: torch.ones(3)}, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match=r'tools/convert_vfm.py .*a.pth a_converted.safetensors'):
        load_vit(MODELS.build(tiny_vit()), dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth')))


@torch.no_grad()
@pytest.mark.parametrize('channels', [1, 4])
def test_other_channels_are_fitted_as_timm_does(channels, state, tmp_path):
    torch.save(state, tmp_path / 'a.pth')
    model = MODELS.build(tiny_vit(in_channels=channels))
    load_vit(model, dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth')))
    twin = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=0)
    torch.save(state, tmp_path / 'timm.pth')
    grey = timm.create_model('vit_tiny_patch16_224', patch_size=8, img_size=32, embed_dim=32, depth=2, num_heads=4,
                             num_classes=0, in_chans=channels, pretrained=True,
                             pretrained_cfg_overlay=dict(file=str(tmp_path / 'timm.pth'), num_classes=0))
    torch.testing.assert_close(model.patch_embed.proj.weight, grey.patch_embed.proj.weight)
    if channels == 1:
        rgb = MODELS.build(tiny_vit())
        rgb.load_state_dict(twin.state_dict() | state)
        image = torch.randn(1, 1, 32, 32)
        torch.testing.assert_close(model.eval().forward_features(image),
                                   rgb.eval().forward_features(image.expand(-1, 3, -1, -1)))
    with pytest.raises(ValueError, match=f'images of 3 channels for a ViT of {channels}: set in_channels=3'):
        model(torch.zeros(1, 3, 32, 32))


def test_a_kernel_of_grey_images_is_not_widened(tmp_path):
    torch.save(MODELS.build(tiny_vit(in_channels=1)).state_dict(), tmp_path / 'a.pth')
    row = r'patch_embed.proj.weight +\(32, 1, 8, 8\) +\(32, 3, 8, 8\)'
    with pytest.raises(ValueError, match=rf'{row}(.*\n)+.*in_channels'):
        load_vit(MODELS.build(tiny_vit()), dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth')))
