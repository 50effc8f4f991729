"""Reading checkpoints: every key accounted for, every bad file named, and no code run."""
from __future__ import annotations

import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.runner.checkpoint import CheckpointLoader
from mmengine.runner.checkpoint import load_checkpoint as mmengine_load_checkpoint
from safetensors.torch import save_file
from torch import nn

from adala_mm.models.attentions import SoftmaxAttention
from adala_mm.models.backbones.weights import LINES, load_vit
from adala_mm.registry import ATTENTIONS, MODELS
from adala_mm.utils.checkpoint import hub_file, load_checkpoint, local_file, read_state_dict, use_safe_loading
from helpers import tiny_vit
from helpers.processes import put_back


def vit(**changes):
    model = MODELS.build(tiny_vit(**changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def load(model, path, **options):
    load_vit(model, dict(type='Pretrained', checkpoint=str(path), **options))


def saved(tmp_path, state, name='weights.pth') -> Path:
    path = tmp_path / name
    save_file(state, path) if path.suffix == '.safetensors' else torch.save(state, path)
    return path


def assert_loaded(model, state):
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.fixture
def safe_mmengine():
    schemes = CheckpointLoader._schemes.copy()
    use_safe_loading()
    yield
    CheckpointLoader._schemes = schemes


@pytest.fixture
def variant():
    """Name of an attention with parameters that no softmax ViT has."""

    @ATTENTIONS.register_module()
    class MadeUpAttention(SoftmaxAttention):
        def __init__(self, dim, num_heads, qkv_bias=True):
            super().__init__(dim, num_heads, qkv_bias)
            self.extra = nn.Linear(dim, dim)

    yield 'adala_mm.MadeUpAttention'
    for registry in (ATTENTIONS, MODELS):
        registry.module_dict.pop('MadeUpAttention')


def test_missing_key(tmp_path):
    state = vit().state_dict()
    del state['blocks.1.attn.qkv.bias'], state['norm.weight']
    path = saved(tmp_path, state)
    rows = r'missing +blocks.1.attn.qkv.bias +- +\(96,\)\n +missing +norm.weight +- +\(32,\)'
    with pytest.raises(ValueError, match=rows) as info:
        load(vit(), path)
    assert str(path) in str(info.value) and 'unexpected' not in str(info.value)


def test_unexpected_key(tmp_path):
    path = saved(tmp_path, vit().state_dict() | {'blocks.0.ls1.gamma': torch.ones(32)})
    with pytest.raises(ValueError, match=r'unexpected +blocks.0.ls1.gamma +\(32,\) +-'):
        load(vit(), path)


def test_wrong_shape(tmp_path):
    path = saved(tmp_path, vit().state_dict() | {'blocks.1.mlp.fc1.bias': torch.ones(100)})
    with pytest.raises(ValueError, match=r'other shape +blocks.1.mlp.fc1.bias +\(100,\) +\(128,\)'):
        load(vit(), path)


@pytest.mark.parametrize(('family', 'names'), [
    ({'layer_scale': 0.1}, r'unexpected +blocks.\*.ls1.gamma +\(x 2\) +\(32,\)'),
    ({'num_registers': 4, 'no_embed_class': True}, 'pos_embed .*16 entries.*no_embed_class'),
    ({'pre_norm': True}, r'(?s)missing.*patch_embed.proj.bias.*unexpected.*norm_pre.weight'),
    ({'class_token': False}, 'pos_embed .*16 entries.*class_token'),
    ({'embed_dim': 64}, r'other shape +cls_token +\(1, 1, 64\) +\(1, 1, 32\)'),
    ({'depth': 3}, r'unexpected +blocks.2.norm1.weight(.*\n){12}'),
    ({'depth': 1}, r'missing +blocks.1.norm1.weight(.*\n){12}'),
], ids=str)
def test_wrong_family_leaves_the_model_alone(family, names, tmp_path):
    path = saved(tmp_path, vit(**family).state_dict())
    model = vit()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=names):
        load(model, path)
    assert_loaded(model, before)


def averaged(state: dict) -> dict:
    """As PyTorch's AveragedModel around a DDP model saves it."""
    return {f'module.module.{key}': value for key, value in state.items()} | {'n_averaged': torch.tensor(3)}


@pytest.mark.parametrize('wrap', [
    lambda state: state,
    lambda state: {'state_dict': state},
    lambda state: {'model': state, 'epoch': 3},
    lambda state: {f'module.{key}': value for key, value in state.items()},
    lambda state: {'state_dict': {f'backbone.{key}': value for key, value in state.items()}
                   | {'decode_head.conv_seg.weight': torch.ones(3)}},
    lambda state: {'state_dict': {f'module.backbone.{key}': value for key, value in state.items()}
                   | {'module.head.fc.weight': torch.ones(3)}},
    lambda state: state | {key: torch.ones(3) for key in ('head.weight', 'head_dist.bias', 'fc_norm.weight',
                                                          'attn_pool.q.weight')},
    lambda state: {'model': averaged(state), 'optimizer': {'state': {0: {'exp_avg': torch.ones(3)}}}},
    lambda state: {'ema_state_dict': averaged(state) | {'steps': torch.tensor(7)}},
    lambda state: {'state_dict': state, 'ema_state_dict': {key: value + 1 for key, value in state.items()}},
    lambda state: {'state_dict_ema': {f'module._orig_mod.{key}': value for key, value in state.items()}},
    lambda state: {re.sub(r'(blocks\.\d+)', r'\1._checkpoint_wrapped_module', f'_fsdp_wrapped_module.{key}'): value
                   for key, value in state.items()},
], ids=['plain', 'state_dict', 'model', 'module', 'backbone', 'module.backbone', 'heads', 'averaged', 'ema',
        'both', 'timm', 'sharded'])
def test_wrappers_and_dropped_keys(wrap, tmp_path):
    state = vit().state_dict()
    model = vit()
    load(model, saved(tmp_path, wrap(state)))
    assert_loaded(model, state)


def test_other_prefix(tmp_path):
    student, teacher = vit().state_dict(), vit().state_dict()
    path = saved(tmp_path, {f'student.{key}': value for key, value in student.items()}
                 | {f'teacher.{key}': value for key, value in teacher.items()})
    model = vit()
    load(model, path, prefix='teacher.')
    assert_loaded(model, teacher)
    with pytest.raises(ValueError, match='unexpected.*student.cls_token'):
        load(model, path)


def test_torchscript_needs_trust(tmp_path):
    """OpenAI's files of CLIP are such archives."""
    torch.jit.save(torch.jit.script(nn.Linear(2, 3)), tmp_path / 'clip.pt')
    with pytest.raises(ValueError, match='a TorchScript archive, which is code.*--trust-checkpoint'):
        read_state_dict(str(tmp_path / 'clip.pt'))
    assert set(read_state_dict(str(tmp_path / 'clip.pt'), trust=True)) == {'weight', 'bias'}


def test_a_long_table_is_cut(tmp_path):
    other = {f'{key}.of_another': value for key, value in vit(depth=3, layer_scale=0.1).state_dict().items()}
    with pytest.raises(ValueError, match=r'does not fit this ViT:\n +key +in the file +in the model\n') as info:
        load(vit(), saved(tmp_path, other))
    shown = re.search(r'and (\d+) more', str(info.value))
    assert len(str(info.value).splitlines()) == LINES + 4 and int(shown[1]) > 0


def test_safetensors(tmp_path):
    state = vit().state_dict()
    model = vit()
    load(model, saved(tmp_path, state, 'weights.safetensors'))
    assert_loaded(model, state)


def test_extra_parameters_of_a_variant_may_be_missing(tmp_path, variant):
    state = vit().state_dict()
    path = saved(tmp_path, state)
    model = vit(attention={'type': variant})
    extra = model.blocks[0].attn.extra.weight.detach().clone()
    load(model, path)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert torch.equal(model.blocks[0].attn.extra.weight, extra)
    # ... but no other parameter, and a softmax ViT does not swallow those of a variant.
    del state['blocks.1.attn.proj.bias']
    with pytest.raises(ValueError, match=r'missing +blocks.1.attn.proj.bias'):
        load(model, saved(tmp_path, state))
    with pytest.raises(ValueError, match=r'unexpected +blocks.\*.attn.extra.weight +\(x 2\)'):
        load(vit(), saved(tmp_path, model.state_dict()))


@pytest.mark.parametrize('name', ['weights.pth', 'weights.safetensors'])
@pytest.mark.parametrize('part', [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize('read', [load_checkpoint, read_state_dict, lambda path: load(vit(), path)],
                         ids=['load_checkpoint', 'read_state_dict', 'load_vit'])
def test_truncated_file(name, part, read, tmp_path):
    path = saved(tmp_path, vit().state_dict(), name)
    content = path.read_bytes()
    path.write_bytes(content[:int(part * len(content))])
    with pytest.raises(ValueError, match='truncated') as info:
        read(str(path))
    assert str(path) in str(info.value)


@pytest.mark.parametrize('name', ['readme.pth', 'readme.safetensors', 'readme.md'])
def test_text_file(name, tmp_path):
    path = tmp_path / name
    path.write_text('<!DOCTYPE html><html>404: Not Found</html>\n' * 5)
    with pytest.raises(ValueError, match='not a checkpoint') as info:
        load(vit(), path)
    assert str(path) in str(info.value)


@pytest.mark.parametrize('content', [{'epoch': 3, 'state_dict': {}}, {}, {'meta': 'x'}, {0: torch.ones(2)},
                                     [torch.ones(2)], torch.ones(2)],
                         ids=['empty', 'nothing', 'no tensors', 'numbered', 'list', 'tensor'])
def test_file_without_a_state_dict(content, tmp_path):
    path = saved(tmp_path, content)
    with pytest.raises(ValueError) as info:
        read_state_dict(str(path))
    assert str(path) in str(info.value)


@pytest.mark.parametrize('read', [load_checkpoint, read_state_dict, lambda path: load(vit(), path)],
                         ids=['load_checkpoint', 'read_state_dict', 'load_vit'])
def test_missing_file(read, tmp_path):
    for path in (tmp_path / 'absent.pth', tmp_path):  # a folder is no checkpoint either
        with pytest.raises(FileNotFoundError, match=str(path)):
            read(str(path))


class Touch:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class ToFile(Touch):
    """The same by a method of an allowed class, for which the pickle asks with ``getattr(numpy.ndarray, 'tofile')``."""

    def __reduce__(self):
        return np.ndarray.tofile, (np.zeros(3), str(self.path))


class GetAttr:
    def __init__(self, cls, name):
        self.arguments = cls, name

    def __reduce__(self):
        return getattr, self.arguments


def by_mmengine(path):
    mmengine_load_checkpoint(vit(), path)


@pytest.mark.parametrize('read', [load_checkpoint, read_state_dict, lambda path: load(vit(), path), by_mmengine],
                         ids=['load_checkpoint', 'read_state_dict', 'load_vit', 'mmengine'])
@pytest.mark.parametrize('attack', [Touch, ToFile])
@pytest.mark.parametrize('zipped', [True, False])
def test_pickle_that_writes_a_file_is_refused(read, attack, zipped, tmp_path, safe_mmengine):
    victim, path = tmp_path / 'victim', tmp_path / 'evil.pth'
    torch.save(vit().state_dict() | {'evil': attack(victim)}, path, _use_new_zipfile_serialization=zipped)
    torch.load(path, weights_only=False)
    assert victim.exists()  # the attack is real
    victim.unlink()
    with pytest.raises(ValueError, match='never unpickled') as info:
        read(str(path))
    assert not victim.exists() and str(path) in str(info.value)


@pytest.mark.parametrize(('cls', 'name'), [(HistoryBuffer, '__init__'), (HistoryBuffer, 'register_statistics'),
                                           (HistoryBuffer, '__class__'), (np.ndarray, 'min'), (np.dtype, 'type')])
def test_getattr_is_limited_to_the_log_buffer(cls, name, tmp_path):
    path = saved(tmp_path, {'a': torch.ones(1), 'evil': GetAttr(cls, name)})
    torch.load(path, weights_only=False)
    with pytest.raises(ValueError, match=rf'\.{name}, which no training checkpoint needs'):
        load_checkpoint(path)
    path = saved(tmp_path, {'a': torch.ones(1), 'fine': GetAttr(HistoryBuffer, 'max')})
    assert load_checkpoint(path)['fine'] == 'max'  # a word, and nothing to call


class Net(BaseModel):
    def __init__(self):
        super().__init__()
        self.backbone = vit()

    def forward(self, inputs, data_samples=None, mode='loss'):
        return dict(loss=self.backbone(inputs)[0].square().mean())


class Notes(Hook):
    """What hooks of runs leave in the message hub: numbers of numpy among them."""

    def after_train_iter(self, runner, batch_idx, **kwargs):
        runner.message_hub.update_scalar('train/mine', 3.0 - batch_idx)
        runner.message_hub.update_info_dict({'best': np.float64(0.5), 'seen': np.int64(3), 'flag': np.bool_(True),
                                             'array': np.arange(3, dtype=np.float32)})


@pytest.fixture(scope='module')
def runner_checkpoint(tmp_path_factory) -> Path:
    """What MMEngine's own runner writes after three steps: log buffers, a schedule with milestones, averages, numpy."""
    folder = tmp_path_factory.mktemp('run')
    with pytest.MonkeyPatch.context() as patch:
        put_back(patch)
        Runner(Net(), str(folder), train_dataloader=dict(
            batch_size=1, dataset=[dict(inputs=torch.full((3, 32, 32), i / 3)) for i in range(3)],
            sampler=dict(type='DefaultSampler', shuffle=False), collate_fn=dict(type='default_collate')),
            train_cfg=dict(by_epoch=True, max_epochs=1), optim_wrapper=dict(optimizer=dict(type='AdamW')),
            param_scheduler=dict(type='MultiStepLR', milestones=[1, 2]), custom_hooks=[Notes(), dict(type='EMAHook')],
            experiment_name='test_checkpoint').train()
    return folder / 'epoch_1.pth'


def check_runner_checkpoint(path):
    checkpoint = load_checkpoint(path)
    wanted = torch.load(path, weights_only=False)
    buffers = checkpoint['message_hub']['log_scalars']
    assert buffers.keys() == wanted['message_hub']['log_scalars'].keys() >= {'train/mine', 'train/loss', 'train/lr'}
    for name, buffer in buffers.items():
        assert isinstance(buffer, HistoryBuffer) and all(
            np.array_equal(one, two) for one, two in
            zip(buffer.data, wanted['message_hub']['log_scalars'][name].data, strict=True))
    assert buffers['train/mine'].mean() == 2 and buffers['train/mine'].statistics('min') == 1
    info = checkpoint['message_hub']['runtime_info']
    assert info['best'] == 0.5 and info['seen'] == 3 and info['flag'] and info['array'].tolist() == [0, 1, 2]
    assert info.keys() == wanted['message_hub']['runtime_info'].keys()
    assert checkpoint.keys() == wanted.keys() >= {'ema_state_dict', 'optimizer', 'param_schedulers'}
    assert checkpoint['meta'] == wanted['meta'] and checkpoint['param_schedulers'] == wanted['param_schedulers']
    assert set(checkpoint['optimizer']['state']) == set(wanted['optimizer']['state'])
    model = vit()
    load(model, path)
    assert_loaded(model, {key.removeprefix('backbone.'): value for key, value in wanted['state_dict'].items()})


def test_runner_checkpoint(runner_checkpoint):
    check_runner_checkpoint(runner_checkpoint)


def test_runner_checkpoint_from_numpy_1(runner_checkpoint, tmp_path):
    # numpy 2 renamed `numpy.core`; a pickle of numpy 1, as any older training run left it, has the old name.
    path = tmp_path / 'numpy1.pth'
    with zipfile.ZipFile(runner_checkpoint) as source, zipfile.ZipFile(path, 'w') as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry).replace(b'numpy._core.', b'numpy.core.'))
    check_runner_checkpoint(path)


def test_mmengine_reads_a_runner_checkpoint(runner_checkpoint, safe_mmengine):
    model = nn.Module()
    model.backbone = vit()
    checkpoint = mmengine_load_checkpoint(model, str(runner_checkpoint), strict=True)
    assert checkpoint['meta']['iter'] == 3
    assert_loaded(model, checkpoint['state_dict'])


def test_safe_loading_keeps_the_other_schemes(safe_mmengine):
    schemes = CheckpointLoader._schemes
    assert schemes['http://'].__module__ == 'mmengine.runner.checkpoint'
    assert schemes[''].__module__ == 'adala_mm.utils.checkpoint'
    assert CheckpointLoader._get_checkpoint_loader('/a/b.pth') is schemes['']


def test_timm_goes_through_the_hub(tmp_path, monkeypatch):
    state = vit().state_dict()
    path = saved(tmp_path, state | {'head.weight': torch.ones(3, 32)}, 'model.safetensors')
    calls = []
    monkeypatch.setattr('huggingface_hub.hf_hub_download', lambda *args: calls.append(args) or str(path))
    model = vit()
    load(model, 'timm://vit_large_patch14_clip_quickgelu_224.openai')
    assert calls == [('timm/vit_large_patch14_clip_224.openai', 'model.safetensors')]  # as on the hub, not as in timm
    assert_loaded(model, state)


@pytest.mark.parametrize(('name', 'repository'), [
    ('vit_large_patch14_clip_quickgelu_224.openai', 'timm/vit_large_patch14_clip_224.openai'),
    ('vit_base_patch16_clip_quickgelu_224.metaclip_400m', 'timm/vit_base_patch16_clip_224.metaclip_400m'),
    ('vit_large_patch14_dinov2.lvd142m', 'timm/vit_large_patch14_dinov2.lvd142m'),
    ('vit_large_patch14_dinov2', 'timm/vit_large_patch14_dinov2.lvd142m'),  # the first tag
    ('vit_base_mci_224.apple_mclip', 'apple/mobileclip_b_timm'),
])
def test_repositories_of_timms_models(name, repository):
    assert hub_file(name) == (repository, 'model.safetensors')


@pytest.mark.parametrize(('name', 'advice'), [
    ('vit_large_patch14_dinov2.lvd142', 'did you mean timm://vit_large_patch14_dinov2.lvd142m?'),
    ('dinov2', 'timm.list_pretrained() has the names'),
    ('gcvit_tiny.in1k', 'did you mean'),  # timm knows it, but has it from elsewhere
])
def test_a_name_that_timm_has_not_on_the_hub(name, advice, monkeypatch):
    monkeypatch.setattr('huggingface_hub.hf_hub_download', lambda *args: pytest.fail('asked for it all the same'))
    with pytest.raises(ValueError, match=f'knows no weights on the Hugging Face hub for timm://{name}; ') as info:
        local_file(f'timm://{name}')
    assert advice in str(info.value) and 'name it as init_cfg.checkpoint' in str(info.value)


def test_without_a_connection_the_message_has_the_address(monkeypatch):
    def refuse(*args: str) -> str:
        raise OSError('no route')

    monkeypatch.setattr('huggingface_hub.hf_hub_download', refuse)
    with pytest.raises(ValueError, match='Fetch https://huggingface.co/timm/vit_large_patch14_clip_224.openai/resolve/'
                                         'main/model.safetensors on another machine') as info:
        local_file('timm://vit_large_patch14_clip_quickgelu_224.openai')
    assert str(info.value).startswith('cannot download timm://vit_large_patch14_clip_quickgelu_224.openai (OSError)')


def test_tensors_without_content_are_not_read(tmp_path, monkeypatch):
    torch.save(dict(meta=dict(iter=3), state_dict=dict(weight=torch.ones(2, 3))), tmp_path / 'a.pth')
    monkeypatch.setattr('adala_mm.utils.torch_files._read_bytes', None)
    state = load_checkpoint(tmp_path / 'a.pth', map_location='meta')
    assert state['meta'] == dict(iter=3) and state['state_dict']['weight'].shape == (2, 3)
    assert state['state_dict']['weight'].is_meta
