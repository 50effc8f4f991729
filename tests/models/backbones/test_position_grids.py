"""The grid of position embeddings goes with the weights, and features are those of the same model at its own grid."""
from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_checkpoint as mmengine_load_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from adala_mm.conversion import convert, resample
from adala_mm.export.target import assemble, load
from adala_mm.export.weights import export_timm
from adala_mm.models.backbones.weights import load_vit
from adala_mm.preflight import Plan
from adala_mm.preflight.checkpoints import fine_tuned, pretrained, whole_model
from adala_mm.registry import MODELS
from adala_mm.utils.checkpoint import read_state_dict, use_safe_loading
from helpers import LINEAR, ROOT, tiny_vit
from helpers.processes import put_back

WIDE = (32, 128)  # 4 x 16 patches of 8: as many as 8 x 8


def vit(**changes) -> nn.Module:
    model = MODELS.build(tiny_vit(**changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


class Net(BaseModel):
    """A model around a ViT, which MMEngine's runner trains."""

    def __init__(self, backbone: nn.Module | dict) -> None:
        super().__init__()
        self.backbone = backbone if isinstance(backbone, nn.Module) else MODELS.build(backbone)

    def forward(self, inputs, data_samples=None, mode='loss'):
        return dict(loss=self.backbone(inputs)[0].square().mean())


def tool(name: str, *words: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [name, *map(str, words)])
        runpy.run_path(str(ROOT / f'tools/{name}.py'), run_name='__main__')


def by_state_dict(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / 'a.pth')
    return folder / 'a.pth'


def by_parallel_model(model: nn.Module, folder: Path) -> Path:
    torch.save({'model': nn.DataParallel(Net(model)).state_dict()}, folder / 'a.pth')
    return folder / 'a.pth'


def by_runner(model: nn.Module, folder: Path, *hooks: dict) -> Path:
    """The weights stay what they are: a step of length 0."""
    with pytest.MonkeyPatch.context() as patch:
        put_back(patch)
        Runner(Net(model), str(folder), train_dataloader=dict(
            batch_size=1, dataset=[dict(inputs=torch.zeros(3, 32, 32))], collate_fn=dict(type='default_collate'),
            sampler=dict(type='DefaultSampler', shuffle=False)), train_cfg=dict(by_epoch=True, max_epochs=1),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.0)), experiment_name=folder.name,
            custom_hooks=list(hooks)).train()
    return folder / 'epoch_1.pth'


def by_publishing(model: nn.Module, folder: Path) -> Path:
    tool('publish_model', by_runner(model, folder, dict(type='EMAHook')), folder / 'out', '--raw')
    return next(folder.glob('out-*.pth'))


def by_merging_lora(model: nn.Module, folder: Path) -> Path:
    twin = vit(img_size=WIDE, attention=dict(type='adala_mm.LoLCATSAttention'))
    twin.load_state_dict(model.state_dict(), strict=False)
    for parameter in (p for name, p in twin.named_parameters() if '.lora.b' in name):
        nn.init.zeros_(parameter)
    torch.save(twin.state_dict(), folder / 'lora.pth')
    tool('merge_lora', folder / 'lora.pth', folder / 'a.pth')
    state = read_state_dict(str(folder / 'a.pth'))
    for key in [key for key in state if 'feature_map' in key or key not in model.state_dict()]:
        del state[key]
    torch.save(state, folder / 'a.pth')
    return folder / 'a.pth'


def by_merging_lora_into_safetensors(model: nn.Module, folder: Path) -> Path:
    """Such a file in deed, as its own library reads it, with the same weights as in the other kind."""
    state = read_state_dict(str(by_merging_lora(model, folder)))
    tool('merge_lora', folder / 'lora.pth', folder / 'b.safetensors')
    with safe_open(folder / 'b.safetensors', 'pt') as file:
        assert all(torch.equal(file.get_tensor(key), value) for key, value in state.items())
        tensors, notes = {key: file.get_tensor(key) for key in state}, file.metadata()
    save_file(tensors, folder / 'c.safetensors', notes)
    return folder / 'c.safetensors'


def by_conversion(model: nn.Module, folder: Path) -> Path:
    """What is recorded in the source is used, and recorded again."""
    tool('convert_vfm', by_state_dict(model, folder), folder / 'a.safetensors', '--family', 'deit', '--num-heads', 4)
    return folder / 'a.safetensors'


def by_export(model: nn.Module, folder: Path) -> Path:
    cfg = Config(dict(model=dict(type='adala_mm.FeatureAlignment', backbone=tiny_vit(img_size=WIDE))))
    target = assemble(cfg)
    load(target, cfg, by_state_dict(model, folder))
    export_timm(target, folder / 'a.safetensors', 'deit')
    return folder / 'a.safetensors'


WRITERS = [by_state_dict, by_parallel_model, by_runner, by_publishing, by_merging_lora,
           by_merging_lora_into_safetensors, by_conversion, by_export]


@pytest.mark.parametrize('write', WRITERS, ids=lambda write: write.__name__)
@torch.no_grad()
def test_features_of_a_file_at_another_grid(write, tmp_path):
    wide, image = vit(img_size=WIDE), torch.randn(1, 3, 64, 64)
    with torch.enable_grad():
        path = write(wide, tmp_path)
    wanted = wide.eval().forward_features(image)
    for size in (64, (32, 64), WIDE):  # as many positions, fewer, and the very same
        model = vit(img_size=size)
        assert load_vit(model, dict(type='Pretrained', checkpoint=str(path))) == []
        got = model.forward_features(torch.randn(1, 3, *model_size(model)) if size != 64 else image)
        if size == 64:
            torch.testing.assert_close(got, wanted)
        else:  # positions alone are resampled, from the very same grid
            twin = vit(img_size=size)
            twin.load_state_dict(wide.state_dict())
            torch.testing.assert_close(model.pos_embed, twin.pos_embed)


def model_size(model: nn.Module) -> tuple[int, int]:
    return tuple(side * model.patch_size for side in model.pos_grid)


@torch.no_grad()
def test_whole_models_are_loaded_by_mmengine(tmp_path):
    """load_from, tools/test.py and inferencers: as many positions, and fewer."""
    use_safe_loading()
    wide = vit(img_size=WIDE)
    torch.save({'state_dict': Net(wide).state_dict()}, tmp_path / 'a.pth')
    for size in ((64, 64), (32, 64)):
        net, image = Net(vit(img_size=size)), torch.randn(1, 3, *size)
        mmengine_load_checkpoint(net, str(tmp_path / 'a.pth'), strict=True)
        torch.testing.assert_close(net.backbone.forward_features(image), wide.forward_features(image))


def plain(model: nn.Module, path: Path, prefix: str = '') -> str:
    """A file that records nothing."""
    save_file({prefix + key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return str(path)


@torch.no_grad()
def test_what_a_file_does_not_record_can_be_said(tmp_path, monkeypatch):
    wide, model, image = vit(img_size=WIDE), vit(img_size=64), torch.randn(1, 3, 64, 64)
    init = dict(type='Pretrained', checkpoint=plain(wide, tmp_path / 'a.safetensors'))
    model.init_cfg = init | dict(grid=[4, 16])
    model.init_weights()
    torch.testing.assert_close(model.forward_features(image), wide.forward_features(image))
    for grid, message in (((4, 4), r'65 entries: not the grid of 4x4 .* init_cfg.grid'), ('4x16', 'must be .height'),
                          ((4.0, 16), 'must be .height'), ((64,), 'must be .height')):
        with pytest.raises(ValueError, match=message):
            load_vit(model, init | dict(grid=grid))
    with pytest.raises(ValueError, match='no square grid plus 1 .*init_cfg.grid'):
        load_vit(model, init | dict(checkpoint=plain(vit(img_size=(32, 64)), tmp_path / 'b.safetensors')))
    said = []
    monkeypatch.setattr('adala_mm.models.backbones.weights.print_log', lambda text, **_: said.append(text))
    load_vit(model, init)
    assert 'positions read as 8x8, as no grid is recorded (init_cfg.grid)' in said[0]


@pytest.mark.parametrize(('prefix', 'read', 'other'), [('', (8, 8), (4, 16)), ('backbone.', (4, 16), (8, 8))],
                         ids=['of others', 'our own'])
@torch.no_grad()
def test_what_may_be_either_is_said(prefix, read, other, tmp_path):
    """A file of others is read as square, one of our own as of the model's grid; both ways are named, also by check."""
    source = vit(img_size=tuple(8 * side for side in read))
    path, model, image = plain(source, tmp_path / 'a.safetensors', prefix), vit(img_size=WIDE), torch.randn(1, 3, *WIDE)
    init = dict(type='Pretrained', checkpoint=path)
    doubt, = load_vit(model, init)
    assert f'64 positions are read as a grid of {read[0]}x{read[1]}, and might be {other[0]}x{other[1]}' in doubt
    assert f'init_cfg.grid={read}' in doubt
    torch.testing.assert_close(model.forward_features(image), source.forward_features(image))
    plan = Plan(Config(dict(model={})))
    assert pretrained(plan, 'backbone', model.to('meta'), init).status == 'warning'
    assert pretrained(plan, 'backbone', model.to('meta'), init | dict(grid=read)).status == 'ok'


def test_check_reads_the_grid_of_load_from(tmp_path):
    torch.save({'state_dict': Net(vit(img_size=WIDE)).state_dict()}, tmp_path / 'a.pth')
    plan = Plan(Config(dict(model={})))
    plan._made[('model',)] = Net(tiny_vit(img_size=(32, 64)))
    assert whole_model(plan, str(tmp_path / 'a.pth')).status == 'ok'


@pytest.mark.parametrize('size', [(64, 64), (32, 64)], ids=['as many', 'fewer'])
@torch.no_grad()
def test_a_fine_tuned_teacher_of_another_grid(size, tmp_path):
    """`TaskModelAlignment` reads its teacher's file as a whole model."""
    def classifier(**changes) -> ConfigDict:
        return ConfigDict(dict(type='ImageClassifier', backbone=tiny_vit(out_type='cls_token', **changes),
                               head=dict(type='LinearClsHead', num_classes=5, in_channels=32)))

    path, image = str(tmp_path / 'a.pth'), torch.randn(1, 3, *size)
    init = dict(type='Pretrained', checkpoint=path)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        wide = MODELS.build(classifier(img_size=WIDE))
        wide.backbone.load_state_dict(vit(img_size=WIDE).state_dict())
        torch.save({'state_dict': wide.state_dict()}, path)
        cfg = classifier(img_size=size, attention=LINEAR, init_cfg=init)
        cfg.update(type='adala_mm.TaskModelAlignment', task_model='ImageClassifier', teacher=init)
        model = MODELS.build(cfg)
    plan = Plan(Config(dict(model={})))
    plan._made[('model',)] = model
    assert fine_tuned(plan).status == 'ok'
    model.init_weights()
    teacher = model.frozen['teacher'].eval()
    torch.testing.assert_close(teacher(image), wide.eval()(image))
    torch.testing.assert_close(model.backbone.pos_embed, teacher.backbone.pos_embed)


@torch.no_grad()
def test_the_converter_asks(tmp_path, capsys):
    wide, image = vit(img_size=WIDE), torch.randn(1, 3, *WIDE)
    path, out = plain(wide, tmp_path / 'a.safetensors'), tmp_path / 'out.safetensors'
    options = (path, out, '--family', 'deit', '--num-heads', 4)
    with pytest.raises(SystemExit, match='grid of 8x8 or, as --img-size has it, 4x16: say which .* --grid'):
        tool('convert_vfm', *options, '--img-size', *WIDE)
    with pytest.raises(SystemExit, match='not a grid of 2x16'):
        tool('convert_vfm', *options, '--grid', 2, 16)
    assert not out.exists()
    for words, wanted in ((('--grid', 4, 16), wide.forward_features(image)),
                          (('--grid', 4, 16, '--img-size', 64), wide.forward_features(torch.ones(1, 3, 64, 64))),
                          (('--grid', 8, 8, '--img-size', *WIDE), None)):
        tool('convert_vfm', *options, *words)
        model = vit(img_size=64 if words[-1] == 64 else WIDE)
        load_vit(model, dict(type='Pretrained', checkpoint=str(out)))
        got = model.forward_features(torch.ones(1, 3, 64, 64) if words[-1] == 64 else image)
        if wanted is None:
            square = vit(img_size=64)
            square.load_state_dict(load_file(path))
            wanted = square.forward_features(image)
        torch.testing.assert_close(got, wanted)
        out.unlink()


@pytest.mark.parametrize('write', WRITERS[:5], ids=lambda write: write.__name__)
def test_linear_weights_do_not_pass_for_softmax(write, tmp_path, monkeypatch):
    """The converter refuses them by what is recorded beside the grid, since keys are timm's; loading them tells."""
    path = str(write(vit(img_size=WIDE, attention=LINEAR), tmp_path))
    kind = 'LoLCATSAttention' if write is by_merging_lora else 'LinearAttention'
    for key in ('backbone', None) if write in (by_runner, by_publishing) else (None,):
        with pytest.raises(ValueError, match='weights of a linearized model .as the file records.*init_cfg.checkpoint'):
            convert(read_state_dict(path, key=key), 'deit', 4)
    said = []
    monkeypatch.setattr('adala_mm.models.backbones.weights.print_log', lambda text, **_: said.append(text))
    for attention, told in ((dict(type='adala_mm.SoftmaxAttention'), True), (dict(type=f'adala_mm.{kind}'), False)):
        load_vit(vit(img_size=WIDE, attention=attention), dict(type='Pretrained', checkpoint=path))
        assert (f'2 blocks of {kind} are SoftmaxAttention here' in said[-1]) == told


def test_a_function_call_reads_what_is_recorded():
    """As above, without the command."""
    wide = vit(img_size=WIDE)
    assert convert(wide.state_dict(), 'deit', 4).grid == (4, 16)
    assert convert(dict(wide.state_dict()), 'deit', 4).grid == (8, 8)
    done = resample(convert(dict(wide.state_dict()), 'deit', 4, grid=(4, 16)), img_size=(64, 64))
    twin = vit(img_size=64)
    twin.load_state_dict(wide.state_dict())
    torch.testing.assert_close(done.state['pos_embed'], twin.pos_embed)
