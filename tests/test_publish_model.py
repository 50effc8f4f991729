"""A published checkpoint is the weights and their description, named after its own bytes."""
import hashlib
import runpy
import sys

import pytest
import torch
from conftest import ROOT, tiny_vit

from adala_mm.registry import MODELS
from adala_mm.utils.checkpoint import load_checkpoint


def publish(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, 'argv', ['publish_model.py', *map(str, words)])
    runpy.run_path(str(ROOT / 'tools/publish_model.py'), run_name='__main__')


@pytest.fixture
def trained(tmp_path):
    state = {f'backbone.{key}': value for key, value in MODELS.build(tiny_vit()).state_dict().items()}
    average = {f'module.{key}': value + 1 for key, value in state.items()} | {'steps': torch.tensor(3)}
    torch.save(dict(state_dict=state, meta=dict(epoch=3, cfg='a = 1'), optimizer=dict(state={}),
                    message_hub={}, ema_state_dict=average), tmp_path / 'epoch_3.pth')
    return tmp_path / 'epoch_3.pth'


@pytest.mark.parametrize('ema', [False, True])
def test_publish(trained, ema, tmp_path, monkeypatch, capsys):
    publish(monkeypatch, trained, tmp_path / 'out/model', *(['--ema'] if ema else []))
    result, = (tmp_path / 'out').iterdir()
    assert result.name == f'model-{hashlib.sha256(result.read_bytes()).hexdigest()[:8]}.pth'
    published, source = load_checkpoint(result), load_checkpoint(trained)
    assert set(published) == {'state_dict', 'meta'} and published['meta'] == source['meta']
    assert all(torch.equal(value, source['state_dict'][key] + ema) for key, value in published['state_dict'].items())
    assert 'dropped ema_state_dict, message_hub, optimizer' in capsys.readouterr().out
    vit = MODELS.build(tiny_vit(init_cfg=dict(type='Pretrained', checkpoint=str(result))))
    vit.init_weights()
    with pytest.raises(SystemExit):  # the same bytes again
        publish(monkeypatch, trained, tmp_path / 'out/model', *(['--ema'] if ema else []))
    assert list((tmp_path / 'out').iterdir()) == [result]


def test_what_is_no_training_checkpoint(tmp_path, monkeypatch, capsys):
    torch.save({'weight': torch.ones(2)}, tmp_path / 'plain.pth')
    with pytest.raises(SystemExit):
        publish(monkeypatch, tmp_path / 'plain.pth', tmp_path / 'out')
    assert 'has no state_dict' in capsys.readouterr().err and not list(tmp_path.glob('out*'))
    torch.save({'state_dict': {'weight': torch.ones(2)}}, tmp_path / 'plain.pth')
    with pytest.raises(SystemExit):
        publish(monkeypatch, tmp_path / 'plain.pth', tmp_path / 'out', '--ema')
    assert 'no averaged weights' in capsys.readouterr().err
