"""The encoder-only mask head: values against transformers' EoMT, files, training, resuming; and linear probes."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

import adala_mm
from adala_mm import linearize
from adala_mm.models.backbones import QueryViT
from adala_mm.models.heads import EncoderMaskHead
from adala_mm.preflight import memory
from adala_mm.utils.checkpoint import load_checkpoint
from adala_mm.utils.cli import base_parser, load_config
from helpers import LINEAR, ROOT, tiny_vit
from helpers.pictures import ade20k, cityscapes
from helpers.preflight import check, red
from helpers.recipes import Recorder, apart, assert_equal

SOFTMAX = dict(type='adala_mm.SoftmaxAttention')
MIXED = [LINEAR, LINEAR, SOFTMAX, SOFTMAX]
CLASSES, QUERIES = 5, 7
LOSSES = dict(
    loss_cls=dict(type='mmdet.CrossEntropyLoss', use_sigmoid=False, loss_weight=2.0,
                  class_weight=[1.0] * CLASSES + [0.1]),
    loss_mask=dict(type='mmdet.CrossEntropyLoss', use_sigmoid=True, loss_weight=5.0),
    loss_dice=dict(type='mmdet.DiceLoss', use_sigmoid=True, activate=True, naive_dice=True, eps=1.0, loss_weight=5.0))


def query_vit(**changes) -> QueryViT:
    vit = dict(tiny_vit(depth=4, attention=MIXED), num_queries=QUERIES, query_blocks=2) | changes
    return MODELS.build(vit | dict(type='adala_mm.QueryViT'))


def segmentor(**changes) -> torch.nn.Module:
    """Of mmseg, with the losses and the matching of the configs."""
    cfg = Config.fromfile(ROOT / 'configs/_base_/models/encoder_mask.py').model
    cfg.backbone = dict(tiny_vit(depth=4, attention=MIXED), type='adala_mm.QueryViT', num_queries=QUERIES,
                        query_blocks=2) | changes
    cfg.decode_head.update(in_channels=32, num_queries=QUERIES, num_classes=CLASSES, **LOSSES)
    cfg.decode_head.train_cfg.num_points = 64
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg)
        model.init_weights()
    return model


def samples(count: int, height: int, width: int) -> list[SegDataSample]:
    shape = dict(img_shape=(height, width), ori_shape=(height, width), pad_shape=(height, width))
    labels = torch.randint(CLASSES, (count, 1, 4, 4)).float()
    return [SegDataSample(metainfo=shape, gt_sem_seg=PixelData(data=label.long()))
            for label in torch.nn.functional.interpolate(labels, (height, width))]


def theirs_as_ours(state: dict[str, torch.Tensor], upscales: int) -> tuple[dict, dict]:
    """Weights of transformers' EoMT under the names of the backbone and of the head."""
    backbone = dict(cls_token=state['embeddings.cls_token'], reg_token=state['embeddings.register_tokens'],
                    pos_embed=state['embeddings.position_embeddings.weight'][None])
    head, names = {}, {'embeddings.patch_embeddings.projection': 'patch_embed.proj', 'layernorm': 'norm',
                       'query': 'query_embed'}
    heads = {'class_predictor': 'cls_embed'} | {f'mask_head.fc{i + 1}': f'mask_embed.{2 * i}' for i in range(3)}
    for i in range(upscales):
        heads |= {f'upscale_block.block.{i}.{part}': f'upscale.{4 * i + place}'
                  for part, place in (('conv1', 0), ('conv2', 2), ('layernorm2d', 3))}
    for i in range(sum(key.endswith('norm1.weight') for key in state)):
        theirs, ours = f'layers.{i}', f'blocks.{i}'
        names |= {f'{theirs}.{part}': f'{ours}.{part}' for part in ('norm1', 'norm2', 'mlp.fc1', 'mlp.fc2')}
        names[f'{theirs}.attention.out_proj'] = f'{ours}.attn.proj'
        for kind in ('weight', 'bias'):
            backbone[f'{ours}.attn.qkv.{kind}'] = torch.cat(
                [state[f'{theirs}.attention.{part}_proj.{kind}'] for part in 'qkv'])
        for part in (1, 2):
            backbone[f'{ours}.ls{part}.gamma'] = state[f'{theirs}.layer_scale{part}.lambda1']
    for key, value in state.items():
        module, _, kind = key.rpartition('.')
        if module in names:
            backbone[f'{names[module]}.{kind}'] = value
        elif module in heads:
            head[f'{heads[module]}.{kind}'] = value
    return backbone, head


def test_values_are_those_of_transformers():
    """Random weights, masked attention annealed away, which is how EoMT predicts."""
    transformers = pytest.importorskip('transformers')
    theirs = transformers.EomtForUniversalSegmentation(transformers.EomtConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=8, num_blocks=2,
        num_queries=QUERIES, num_register_tokens=2, num_labels=CLASSES, num_upscale_blocks=2)).double().eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.attn_mask_probs.zero_()
    backbone = query_vit(img_size=64, num_registers=2, no_embed_class=True, layer_scale=1.0, attention=SOFTMAX)
    head = EncoderMaskHead(in_channels=32, num_classes=CLASSES, num_queries=QUERIES, **LOSSES)
    ours = theirs_as_ours(theirs.state_dict(), upscales=2)
    for module, state in zip((backbone, head), ours, strict=True):
        module.double().eval().load_state_dict(state)
    assert sum(value.numel() for state in ours for value in state.values()) == sum(
        p.numel() for p in theirs.parameters())
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        (classes,), (masks,) = head(backbone(image))
        wanted = theirs(image)
    assert masks.shape == (2, QUERIES, 32, 32) and classes.std() > 0.1 and masks.std() > 0.1
    torch.testing.assert_close(classes, wanted.class_queries_logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(masks, wanted.masks_queries_logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('rotary', [None, {}], ids=['table', 'rotary'])
def test_queries_join_the_last_blocks_and_the_others_do_not_see_them(rotary):
    plain = MODELS.build(tiny_vit(depth=4, attention=MIXED, out_indices=[1], rotary=rotary))
    model = query_vit(rotary=rotary)
    model.load_state_dict(plain.state_dict(), strict=False)
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append((args[0].shape[1], args[2])))
    image = torch.randn(2, 3, 32, 48)
    pairs = model.train()(image)
    tokens = 1 + 4 * 6
    assert seen == [(tokens, 1)] * 2 + [(tokens + QUERIES, 1 + QUERIES)] * 2
    assert [tuple(part.shape[1:]) for part in pairs] == [(32, 4, 6), (QUERIES, 32)] * 3
    # What goes into the first of their blocks is what the blocks before make of the image, and the queries themselves.
    torch.testing.assert_close(pairs[0], plain(image)[0])
    torch.testing.assert_close(pairs[1], model.norm(model.query_embed.weight).expand(2, -1, -1))
    torch.testing.assert_close(model.eval()(image), pairs[-2:])
    again = query_vit(rotary=rotary, with_cp=True).train()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(image), pairs)


def test_files_of_a_vit_start_it(tmp_path):
    plain = MODELS.build(tiny_vit(depth=4, attention=MIXED))
    plain.init_weights()
    torch.save(plain.state_dict(), tmp_path / 'stage2.pth')
    model = query_vit(init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'stage2.pth')))
    queries = model.query_embed.weight.clone()
    model.init_weights()
    assert set(model.state_dict()) - set(plain.state_dict()) == {'query_embed.weight'}
    assert all(torch.equal(model.state_dict()[key], value) for key, value in plain.state_dict().items())
    assert torch.equal(model.query_embed.weight, queries) and queries.std() > 0.5
    assert model.get_layer_depth('query_embed.weight') == (5, 6) != model.get_layer_depth('pos_embed')


def test_its_files_start_a_plain_vit_without_queries_and_another_one_with_them(tmp_path):
    model, path = segmentor(), tmp_path / 'segmentor.pth'
    torch.save(dict(state_dict=model.state_dict()), path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    plain = MODELS.build(tiny_vit(depth=4, attention=MIXED, init_cfg=init_cfg))
    again = query_vit(init_cfg=init_cfg)
    for vit in (plain, again):
        vit.init_weights()
        assert all(torch.equal(model.backbone.state_dict()[key], value) for key, value in vit.state_dict().items())
    assert set(again.state_dict()) - set(plain.state_dict()) == {'query_embed.weight'}


@torch.no_grad()
def test_it_is_linearized_but_for_tables_in_blocks_with_queries(tmp_path):
    model = query_vit(attention=SOFTMAX, layer_scale=1e-5, num_registers=2)
    with pytest.raises(ValueError, match='LinformerAttention in block 2 has tables over tokens.*the last 2 blocks'):
        linearize(model, 'linformer')
    linear, image = linearize(model, 'linformer', keep_softmax=[2, 3]).eval(), torch.randn(2, 3, 32, 32)
    linearize(linear, 'hedgehog', keep_softmax=[2], inplace=True)
    adala_mm.save(linear, tmp_path / 'a.safetensors')
    twin = adala_mm.load(tmp_path / 'a.safetensors')
    assert type(twin) is QueryViT and twin.block_counts == dict(softmax_blocks=1, linear_blocks=3)
    for found, wanted in zip(twin(image), linear(image), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(query_blocks=4), r'query_blocks=4 must be less than depth=4'),
    (dict(query_blocks=0), r'query_blocks=0 must be less than depth=4, and at least 1'),
    (dict(out_indices=[3]), 'out_indices: QueryViT returns maps and queries'),
    (dict(compile='reduce-overhead'), 'queries join halfway: choose True'),
    (dict(attention=dict(type='adala_mm.LinformerAttention', rank=4)), 'LinformerAttention in block 2 has tables'),
])
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        query_vit(**changes)


def test_features_of_another_backbone_are_named():
    head = EncoderMaskHead(in_channels=32, num_classes=CLASSES, num_queries=QUERIES, **LOSSES)
    for features in ((torch.zeros(1, 32, 4, 4),), (torch.zeros(1, 32, 4, 4), torch.zeros(1, 6, 32))):
        with pytest.raises(ValueError, match='pairs of a map and 7 queries, as QueryViT with num_queries=7'):
            head(features)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_it_learns_and_all_of_it(dtype):
    model = segmentor().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    images, truth, totals = torch.randn(2, 3, 32, 48), samples(2, 32, 48), []
    for _ in range(12):
        torch.manual_seed(0)  # of the points that losses look at
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            losses = model.loss(images, truth)
        assert {key.rpartition('.')[0] for key in losses} == {'decode', 'decode.d0', 'decode.d1'}
        loss, _ = model.parse_losses(losses)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        totals.append(loss.item())
    assert totals[-1] < 0.8 * totals[0]


def test_predictions_of_whole_images_and_crops():
    model, image = segmentor().eval(), torch.randn(1, 3, 32, 48)
    meta = [dict(img_shape=(32, 48), ori_shape=(32, 48), pad_shape=(32, 48))]
    with torch.no_grad():
        whole = model.inference(image, meta)
        model.test_cfg = ConfigDict(mode='slide', crop_size=(32, 48), stride=(16, 16))
        torch.testing.assert_close(model.inference(image, meta), whole)
    assert whole.shape == (1, CLASSES, 32, 48) and whole.min() > 0 and whole.std() > 0


# --- configs, with their depth cut, on generated folders

def cut(name: str) -> Path:
    """The config as a file, with a narrow ViT of two blocks and 64-pixel crops, from random weights."""
    cfg = Config.fromfile(next(ROOT.glob(f'configs/*/{name}.py')))
    vit, head = cfg.model.backbone, cfg.model.decode_head
    attention = vit.attention if isinstance(vit.attention, dict) else vit.attention[::len(vit.attention) - 1]
    vit.update(img_size=64, embed_dim=32, depth=2, num_heads=4, attention=attention, init_cfg=None)
    if name.startswith('eomt'):
        vit.update(query_blocks=1, num_queries=10)
        head.update(in_channels=32, num_queries=10)
        head.train_cfg.num_points = 128
        cfg.train_cfg.max_epochs = 1
    else:
        head.update(in_channels=32, channels=32)
        cfg.train_cfg.update(max_iters=2, val_interval=2)
        cfg.default_hooks.checkpoint.interval = 2
    cfg.param_scheduler = None
    cfg.model.data_preprocessor.size = (64, 64)
    for loader, batch in (('train_dataloader', 2), ('val_dataloader', 1), ('test_dataloader', 1)):
        cfg[loader].update(num_workers=0, persistent_workers=False, batch_size=batch)
    resize, crop = cfg.train_dataloader.dataset.pipeline[2:4]
    resize.scales, crop.crop_size = [64, 96], (64, 64)
    for loader in ('val_dataloader', 'test_dataloader'):
        cfg[loader].dataset.pipeline[1].scale = (256, 64)
    path = Path(f'cut_{name}.py')
    cfg.dump(path)
    return path


def train(path: Path, root: Path, **changes) -> tuple[Runner, Recorder]:
    cfg = load_config(base_parser('').parse_args([str(path), '--data-root', str(root)]))
    cfg.merge_from_dict(changes)
    cfg.experiment_name = cfg.visualizer.name = f'{path.stem}_{len(changes)}'
    run, record = Runner.from_cfg(cfg), Recorder()
    run.register_hook(record)
    run.train()
    return run, record


@pytest.mark.parametrize(('name', 'data'), [
    ('eomt_dinov2l_last4_ade20k', ade20k), ('eomt_dinov2l_1024_cityscapes', cityscapes),
    ('probe_dinov2l_ade20k', ade20k), ('probe_dinov2b_softmax_cityscapes', cityscapes)])
def test_configs_are_checked_and_trained(name, data, tmp_path, monkeypatch):
    if name != 'eomt_dinov2l_last4_ade20k':  # an estimate of memory takes a second in each of many runs
        monkeypatch.setattr(memory, 'estimate', lambda plan: lambda batch, height, width: 0)
        monkeypatch.setattr(memory, 'head_line', lambda plan: lambda pixels: 0)
    with apart(tmp_path):
        root = data(tmp_path / 'data')
        path = cut(name)
        assert not red(check(path, '--data-root', root))
        run, record = train(path, root)
        assert len(record.losses) == 2 and all(0 < loss < 1e4 for loss in record.losses)
        changed = {key for key, value in run.model.state_dict().items()
                   if value.is_floating_point() and not torch.equal(value, record.state[key])}
        if name.startswith('probe'):  # what it says is frozen is
            assert changed == {'backbone.norm.weight', 'backbone.norm.bias', 'decode_head.conv_seg.weight',
                               'decode_head.conv_seg.bias'}
            return
        assert {'backbone.query_embed.weight', 'backbone.blocks.0.attn.qkv.weight', 'decode_head.cls_embed.weight',
                'decode_head.upscale.0.weight'} <= changed
        saved = load_checkpoint(Path(run.work_dir) / 'epoch_1.pth')
        _, again = train(path, root, resume=True, **{'train_cfg.max_epochs': 2})
        assert again.start == 2 and len(again.losses) == 2
        assert_equal(again.state, saved['state_dict'])
        assert_equal(again.optimizer['state'], saved['optimizer']['state'])
