"""A published checkpoint is the weights and their description, named after its own bytes."""
import hashlib
import runpy
import sys
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner

from adala_mm.registry import MODELS
from adala_mm.utils.checkpoint import load_checkpoint, read_state_dict
from helpers import ROOT, tiny_vit
from helpers.processes import put_back

MOMENTUM = 0.25


def publish(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, 'argv', ['publish_model.py', *map(str, words)])
    runpy.run_path(str(ROOT / 'tools/publish_model.py'), run_name='__main__')


class Net(BaseModel):
    def __init__(self):
        super().__init__()
        self.backbone = MODELS.build(tiny_vit())

    def forward(self, inputs, data_samples=None, mode='loss'):
        return dict(loss=(self.backbone(inputs)[0] - 1).square().mean())


class Steps(Hook):
    """Keeps the weights after each step."""

    def __init__(self):
        self.weights = []

    def after_train_iter(self, runner, *args, **kwargs):
        self.weights.append({key: value.clone() for key, value in runner.model.state_dict().items()})


@pytest.fixture(scope='module', params=[False, True], ids=['plain', 'ema'])
def trained(request, tmp_path_factory):
    """A checkpoint that MMEngine's own runner and hooks wrote; the weights of its last step, and their average."""
    folder, steps = tmp_path_factory.mktemp('run'), Steps()
    with pytest.MonkeyPatch.context() as patch:
        put_back(patch)
        Runner(Net(), str(folder), train_dataloader=dict(
            batch_size=2, dataset=[dict(inputs=torch.full((3, 32, 32), i / 6)) for i in range(6)],
            sampler=dict(type='DefaultSampler', shuffle=False), collate_fn=dict(type='default_collate')),
            train_cfg=dict(by_epoch=True, max_epochs=1), optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.5)),
            custom_hooks=[steps] + [dict(type='EMAHook', momentum=MOMENTUM)] * request.param,
            experiment_name=f'publish{request.param}').train()
    average = steps.weights[0]
    for weights in steps.weights[1:]:
        average = {key: (1 - MOMENTUM) * value + MOMENTUM * weights[key] for key, value in average.items()}
    return folder / 'epoch_1.pth', steps.weights[-1], average if request.param else None


def assert_close(state, wanted):
    assert state.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(state[key], value)


@pytest.mark.parametrize('option', [[], ['--ema'], ['--raw']], ids=' '.join)
def test_publish(trained, option, tmp_path, monkeypatch, capsys):
    path, last, average = trained
    if average is None and option:
        with pytest.raises(SystemExit):
            publish(monkeypatch, path, tmp_path / 'out/model', *option)
        assert 'no averaged weights' in capsys.readouterr().err and not (tmp_path / 'out').exists()
        return
    if average is not None:
        assert max((last[key] - value).abs().max() for key, value in average.items()) > 1e-3
    with monkeypatch.context() as patch:  # files may be greater than the memory
        patch.delattr(Path, 'read_bytes')
        publish(monkeypatch, path, tmp_path / 'out/model', *option)
    result, = (tmp_path / 'out').iterdir()
    assert result.name == f'model-{hashlib.sha256(result.read_bytes()).hexdigest()[:8]}.pth'
    published = load_checkpoint(result)
    assert set(published) == {'state_dict', 'meta'} and published['meta'] == load_checkpoint(path)['meta']
    assert_close(published['state_dict'], last if average is None or option == ['--raw'] else average)
    printed = capsys.readouterr().out
    assert ('averaged tensors' in printed) == (average is not None and option != ['--raw'])
    assert 'message_hub, optimizer' in printed
    vit = MODELS.build(tiny_vit(init_cfg=dict(type='Pretrained', checkpoint=str(result))))
    vit.init_weights()
    with pytest.raises(SystemExit):  # the same bytes again
        publish(monkeypatch, path, tmp_path / 'out/model', *option)
    assert list((tmp_path / 'out').iterdir()) == [result]


def test_what_reads_a_checkpoint_reads_the_average(trained):
    """Stages, converters and exports: the weights that validation has scored."""
    path, last, average = trained
    assert_close(read_state_dict(str(path)), average or last)


@pytest.mark.parametrize('content', [{'weight': torch.ones(2)}, [torch.ones(2)], {'state_dict': [1]}], ids=str)
def test_what_is_no_training_checkpoint(content, tmp_path, monkeypatch, capsys):
    torch.save(content, tmp_path / 'plain.pth')
    with pytest.raises(SystemExit):
        publish(monkeypatch, tmp_path / 'plain.pth', tmp_path / 'out')
    assert 'has no state_dict' in capsys.readouterr().err and not list(tmp_path.glob('out*'))


@pytest.mark.parametrize(('source', 'out', 'message'), [
    ('absent.pth', 'out', 'error: no checkpoint at .*absent.pth'), ('.', 'out', 'error: no checkpoint at .*looked for'),
    ('a.pth', 'a.pth/out', 'error: .*a.pth')], ids=['absent', 'folder', 'no place'])
def test_files_and_places_that_are_not_there(source, out, message, tmp_path, monkeypatch):
    torch.save({'state_dict': {'weight': torch.ones(2)}}, tmp_path / 'a.pth')
    with pytest.raises(SystemExit, match=message):
        publish(monkeypatch, tmp_path / source, tmp_path / out)
    assert [path.name for path in tmp_path.iterdir()] == ['a.pth']


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(state, path):
        Path(path).write_bytes(b'half')
        raise OSError(28, 'No space left on device')

    torch.save({'state_dict': {'weight': torch.ones(2)}}, tmp_path / 'a.pth')
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(SystemExit, match='No space left'):
        publish(monkeypatch, tmp_path / 'a.pth', tmp_path / 'out/model')
    assert not list((tmp_path / 'out').iterdir())
