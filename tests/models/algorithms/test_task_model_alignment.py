"""TaskModelAlignment: a fine-tuned task model teaches its linear twin, and checkpoints are the plain model's."""
from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample
from torch.nn import functional as F
from torch.utils.data import DataLoader

from adala_mm.models.algorithms.task_model_alignment import logits_divergence, outputs_of
from adala_mm.models.attentions import blocks_by_attention
from adala_mm.registry import MODELS
from helpers import LINEAR, ROOT, tiny_vit
from helpers.processes import put_back

SOFTMAX = dict(type='adala_mm.SoftmaxAttention')
SCOPES = dict(linear='mmseg', mask2former='mmseg', classifier='mmpretrain')
NORM = dict(mean=[110.0] * 3, std=[55.0] * 3)
every_task = pytest.mark.parametrize('task', SCOPES)
ADAMW = dict(optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.5))


@pytest.fixture(autouse=True)
def managers(monkeypatch):
    """What runners leave in the process is put back."""
    put_back(monkeypatch)


def plain(task: str, **vit) -> dict:
    """Config of a tiny task model; softmax unless told otherwise."""
    if task == 'classifier':
        return dict(type='ImageClassifier', backbone=tiny_vit(out_type='cls_token', **vit),
                    data_preprocessor=dict(type='ClsDataPreprocessor', num_classes=5, **NORM),
                    head=dict(type='LinearClsHead', num_classes=5, in_channels=32))
    preprocessor = dict(type='SegDataPreProcessor', size=(32, 32), seg_pad_val=255, **NORM)
    if task == 'linear':
        head = dict(type='FCNHead', in_channels=32, channels=32, num_convs=0, concat_input=False, num_classes=5,
                    dropout_ratio=0.0, align_corners=False, loss_decode=dict(type='CrossEntropyLoss'))
        return dict(type='EncoderDecoder', backbone=tiny_vit(**vit), decode_head=head, data_preprocessor=preprocessor,
                    test_cfg=dict(mode='whole'))
    cfg = Config.fromfile(ROOT / 'configs/_base_/models/mask2former_small.py').model
    cfg.update(backbone=tiny_vit(out_indices=[0, 1, 1, 1], **vit), data_preprocessor=preprocessor)
    cfg.neck.update(embed_dim=32, norm_cfg=dict(type='GN', num_groups=8))
    cfg.decode_head.update(num_classes=5, in_channels=[32] * 4, strides=[2, 4, 8, 16], num_queries=7)
    cfg.decode_head.loss_cls.update(class_weight=[1.0] * 5 + [0.1])
    cfg.decode_head.transformer_decoder.num_layers = 2
    cfg.decode_head.train_cfg.num_points = 64
    return cfg.to_dict()


def build(cfg: dict, task: str) -> torch.nn.Module:
    with DefaultScope.overwrite_default_scope(SCOPES[task]):
        return MODELS.build(ConfigDict(copy.deepcopy(cfg)))


@pytest.fixture(scope='module')
def fine_tuned(tmp_path_factory) -> Callable[[str], str]:
    """Checkpoint of a softmax task model with random, but not degenerate, weights."""
    made = {}

    def make(task: str) -> str:
        if task not in made:
            torch.manual_seed(7)
            model = build(plain(task), task)
            model.init_weights()
            for name, parameter in model.named_parameters():
                parameter.data += torch.randn_like(parameter) * (0.2 if name.startswith('backbone') else 0.02)
            made[task] = str(tmp_path_factory.mktemp(task) / 'epoch_20.pth')
            torch.save(dict(meta={}, state_dict=model.state_dict()), made[task])
        return made[task]
    return make


@pytest.fixture
def aligned(fine_tuned) -> Callable:
    """Builds the alignment of a task model whose backbone starts as a copy of the teacher's, with linear attention."""
    def make(task: str, init: bool = True, vit: dict | None = None, **options) -> torch.nn.Module:
        init_cfg = dict(type='Pretrained', checkpoint=fine_tuned(task))
        cfg = plain(task, **{'attention': LINEAR, 'init_cfg': init_cfg, **(vit or {})})
        cfg.update(type='adala_mm.TaskModelAlignment', task_model=cfg['type'], teacher=init_cfg)
        model = build(cfg | options, task)
        if init:
            model.init_weights()
        return model
    return make


def batch(task: str, count: int = 2) -> dict:
    """What a data loader would yield: images with labels."""
    samples = []
    for i in range(count):
        if task == 'classifier':
            samples.append(DataSample().set_gt_label(i))
        else:
            sample = SegDataSample(metainfo=dict(img_shape=(32, 32), ori_shape=(32, 32), pad_shape=(32, 32)))
            sample.gt_sem_seg = PixelData(data=torch.randint(5, (1, 32, 32)))
            samples.append(sample)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    return dict(inputs=images if task == 'classifier' else list(images), data_samples=samples)


def losses_of(model: torch.nn.Module, task: str, data: dict | None = None) -> dict:
    data = model.data_preprocessor(data or batch(task), True)
    return model(**data, mode='loss')


def everything(task: str) -> dict:
    """Options that turn all terms on."""
    return dict(features=dict(mse=1.0, cosine=0.5), logits=0.5, task_weight=1.0, attention_weight=50.0,
                trainable=None) | (dict(pyramid=dict(smooth_l1=2.0)) if task == 'mask2former' else {})


@every_task
def test_checkpoint_has_the_keys_of_the_plain_model(aligned, task):
    model = aligned(task)
    with torch.no_grad():
        model.backbone.blocks[0].mlp.fc1.weight += 0.1
    linear = build(plain(task, attention=LINEAR), task)
    assert list(model.state_dict()) == list(linear.state_dict())
    linear.load_state_dict(model.state_dict(), strict=True)
    data = model.data_preprocessor(batch(task), False)
    assert not list(model.data_preprocessor.parameters())
    scores = [m.eval()(**copy.deepcopy(data), mode='predict') for m in (model, linear)]
    for ours, theirs in zip(*scores, strict=True):
        if task == 'classifier':
            assert torch.equal(ours.pred_score, theirs.pred_score)
        else:
            torch.testing.assert_close(ours.seg_logits.data, theirs.seg_logits.data)
    if task != 'mask2former':  # whose plain model has no mode 'tensor' in mmseg
        ours, theirs = (m(data['inputs'], mode='tensor') for m in (model, linear))
        assert torch.equal(ours, theirs)


@every_task
def test_student_starts_as_the_teacher_with_linear_attention(aligned, fine_tuned, task):
    model, state = aligned(task), torch.load(fine_tuned(task))['state_dict']
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert {type(block.attn).__name__ for block in model.backbone.blocks} == {'LinearAttention'}
    teacher = model.frozen['teacher']
    assert {type(block.attn).__name__ for block in teacher.backbone.blocks} == {'SoftmaxAttention'}
    assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items())
    assert set(teacher.loaded[0]) == set(state)  # what WeightsCheckHook looks at
    learns = {name.split('.')[0] for name, p in model.named_parameters() if p.requires_grad}
    assert learns == {'backbone'}


@every_task
def test_teacher_hygiene(aligned, task):
    model = aligned(task, **everything(task)).train()
    teacher = model.frozen['teacher']
    parameters = {id(p) for p in teacher.parameters()}
    assert not parameters & {id(p) for p in model.parameters()}
    assert not {p.data_ptr() for p in teacher.parameters()} & {v.data_ptr() for v in model.state_dict().values()}
    wrapper = build_optim_wrapper(model, ADAMW)
    assert not parameters & {id(p) for group in wrapper.optimizer.param_groups for p in group['params']}
    assert not any(module.training for module in teacher.modules())
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    model.train_step(batch(task), wrapper)
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    model.to(torch.float64)
    assert {p.dtype for p in teacher.parameters()} == {torch.float64}
    clone = copy.deepcopy(model)
    assert not parameters & {id(p) for p in clone.frozen['teacher'].parameters()}
    assert clone.task.backbone is clone.backbone is not model.backbone


@every_task
@pytest.mark.parametrize('chosen', ['default', 'everything', 'logits', 'with_cp'])
def test_one_step_under_ddp_trains_all_that_may_learn(aligned, task, chosen, tmp_path):
    options = dict(default={}, everything=everything(task), logits=dict(features={}, logits=1.0, trainable=None),
                   with_cp=everything(task) | dict(vit=dict(with_cp=True)))[chosen]
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = aligned(task, **options)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        ddp = MMDistributedDataParallel(model).train()
        wrapper = build_optim_wrapper(ddp, ADAMW)
        for _ in range(2):  # the second forward raises if a parameter got no gradient in the first
            log = ddp.train_step(batch(task), wrapper)
    finally:
        torch.distributed.destroy_process_group()
    assert torch.isfinite(log['loss'])
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (chosen != 'default' or name.startswith('backbone.'))
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_features_against_two_networks(aligned):
    """Value and gradients of the default loss; the four levels of the pyramid read two different outputs."""
    model = aligned('mask2former').double().train()
    data = model.data_preprocessor(batch('mask2former'), True)
    images = data['inputs'].double()
    out = model.loss(images, data['data_samples'])
    assert set(out) == {'loss_features', 'rel_error'}
    out['loss_features'].backward()
    student, teacher = copy.deepcopy(model.backbone), model.frozen['teacher'].backbone
    student.zero_grad()
    got, wanted = student(images), [x.detach() for x in teacher(images)]
    loss = sum((got[i] - wanted[i]).square().mean() for i in (0, 1)) / 2
    loss.backward()
    # The loss itself is in float32.
    assert out['loss_features'].item() == pytest.approx(loss.item(), rel=1e-5)
    assert len(list(student.parameters())) > 20
    for (name, ours), theirs in zip(model.backbone.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=name)


@every_task
def test_terms_are_weighted_and_add_up(aligned, task):
    model = aligned(task, **everything(task)).eval()  # no dropout: each call is the same
    data = batch(task)
    torch.manual_seed(3)  # Mask2Former draws the points of its loss
    got = losses_of(model, task, copy.deepcopy(data))
    total, log = model.parse_losses(got)
    parts = ['features', 'logits', 'attention'] + ['pyramid'] * (task == 'mask2former')
    assert {f'loss_{part}' for part in parts} <= set(got)
    assert total.item() == pytest.approx(sum(v.item() for k, v in log.items() if 'loss' in k and k != 'loss'), rel=1e-5)

    doubled = aligned(task, **everything(task) | dict(
        features=dict(mse=2.0, cosine=1.0), logits=1.0, task_weight=2.0, attention_weight=100.0,
        **(dict(pyramid=dict(smooth_l1=4.0)) if task == 'mask2former' else {}))).eval()
    torch.manual_seed(3)
    twice = losses_of(doubled, task, copy.deepcopy(data))
    assert list(twice) == list(got)
    for key, value in got.items():
        factor = 2 if 'loss' in key else 1
        torch.testing.assert_close(twice[key], factor * value, msg=key)


@every_task
def test_a_student_that_is_the_teacher_has_nothing_to_learn(aligned, task):
    options = everything(task) | dict(attention_weight=0.0, vit=dict(attention=SOFTMAX))
    model = aligned(task, **options).eval()
    data = batch(task)
    torch.manual_seed(3)
    got = losses_of(model, task, copy.deepcopy(data))
    for key, value in got.items():
        if not key.startswith('task.'):
            assert abs(value.item()) < 1e-6, key
    # What is left is the loss of the plain model.
    linear = build(plain(task), task).eval()
    linear.load_state_dict(model.state_dict())
    torch.manual_seed(3)
    own = linear(**linear.data_preprocessor(data, True), mode='loss')
    assert own
    for key, value in own.items():
        torch.testing.assert_close(got[f'task.{key}'], value, msg=key)


def test_attention_term_is_the_loss_of_stage_1(aligned, fine_tuned):
    model = aligned('linear', features={}, attention_weight=50.0, trainable=r'\.attn\.').train()
    stage1 = MODELS.build(dict(type='adala_mm.AttentionAlignment', backbone=tiny_vit(
        attention=LINEAR, init_cfg=dict(type='Pretrained', checkpoint=fine_tuned('linear')))))
    stage1.init_weights()
    stage1.train()
    data = model.data_preprocessor(batch('linear'), True)
    ours, theirs = model(**data, mode='loss')['loss_attention'], stage1.loss(data['inputs'])['loss']
    assert ours.item() == pytest.approx(50 * theirs.item(), rel=1e-6)
    ours.backward(), theirs.backward()
    for (name, p), q in zip(model.backbone.named_parameters(), stage1.backbone.parameters(), strict=True):
        if '.attn.proj.' in name:
            assert p.grad is not None and q.grad is None  # it learns here, and is the teacher's own there
        elif q.grad is not None:
            torch.testing.assert_close(p.grad, 50 * q.grad)
        else:
            assert p.grad is None or not p.grad.any(), name


@pytest.mark.parametrize('temperature', [1.0, 4.0])
def test_logits_divergence_against_its_formula(temperature):
    def probabilities(logits: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.softmax(logits.double() / temperature, dim)

    for shape in ((3, 5), (3, 5, 4, 6)):
        student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)
        p, q = probabilities(teacher, 1), probabilities(student, 1)
        wanted = temperature ** 2 * (p * (p / q).log()).sum(1).mean()
        got = logits_divergence(student, teacher, temperature)
        assert got.item() == pytest.approx(wanted.item(), rel=1e-5)
        torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (got, wanted)))
        assert logits_divergence(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-6)

    def outputs() -> tuple[list, list]:
        return ([torch.randn(2, 7, 6, requires_grad=True) for _ in range(3)],
                [torch.randn(2, 7, 4, 4, requires_grad=True) for _ in range(3)])
    student, teacher = outputs(), outputs()
    wanted = 0
    for c, m, tc, tm in zip(*student, *teacher, strict=True):
        p, q = probabilities(tc, -1), probabilities(c, -1)
        wanted += (p * (p / q).log()).sum(-1).mean()
        p, q = ((x.double() / temperature).sigmoid() for x in (tm, m))
        wanted += (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    wanted = temperature ** 2 * wanted / 3
    got = logits_divergence(student, tuple([x.detach() for x in level] for level in teacher), temperature)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)
    learners = [*student[0], *student[1]]
    for ours, theirs in zip(torch.autograd.grad(got, learners), torch.autograd.grad(wanted, learners), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_outputs_of_puts_forward_back():
    class Doubles(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    fresh, patched = Doubles(), Doubles()
    patched.forward = mine = lambda x: 3 * x
    with pytest.raises(ZeroDivisionError), outputs_of(dict(a=fresh, b=patched)) as kept:
        assert fresh(1) == 2 and patched.forward(1) == 3 and kept == dict(a=2, b=3)
        raise ZeroDivisionError
    assert 'forward' not in vars(fresh) and patched.forward is mine


def test_blocks_behind_the_last_output_must_not_learn(aligned):
    with pytest.raises(ValueError, match=r'out_indices=\[0\]: nothing behind block 0 is compared, and blocks\.1\.'):
        aligned('linear', vit=dict(out_indices=[0]))
    aligned('linear', vit=dict(out_indices=[0]), trainable=r'^backbone\.blocks\.0\.')


def test_frozen_parts_answer_as_the_teachers(aligned):
    model = aligned('linear').train()
    assert model.training and model.backbone.training and not model.decode_head.training
    assert aligned('linear', task_weight=1.0, trainable=None).train().decode_head.training


def test_compiled_backbone_is_not_compiled_in_the_teacher_that_hooks_read(aligned):
    def compiled(model: torch.nn.Module) -> bool:
        return bool(model.frozen['teacher'].backbone.compile_mode)

    assert compiled(aligned('linear', init=False, vit=dict(compile=True)))
    assert not compiled(aligned('linear', init=False, vit=dict(compile=True), attention_weight=1.0))


@pytest.mark.parametrize(('task', 'options', 'message'), [
    ('linear', dict(teacher='epoch_20.pth'), 'teacher must be dict'),
    ('linear', dict(teacher=dict(type='Pretrained')), 'teacher must be dict'),
    ('linear', dict(features=dict(mes=1.0)), r"features has no term 'mes'; it may have mse, cosine, smooth_l1"),
    ('linear', dict(features=dict(mse=-1.0)), 'features: the weight of mse is -1.0'),
    ('linear', dict(features={}), 'nothing to learn'),
    ('linear', dict(pyramid=dict(mse=1.0)), 'pyramid compares the outputs of a neck, and this EncoderDecoder has none'),
    ('linear', dict(logits=-1.0), 'logits=-1.0 must be a number from 0 up'),
    ('linear', dict(logits=1.0, temperature=0.0), 'temperature=0.0 must be above 0'),
    ('linear', dict(trainable='^bakcbone'), r"trainable='\^bakcbone' matches no parameter.*backbone\.cls_token"),
    ('linear', dict(trainable=None), r'lets decode_head\.conv_seg\.weight learn, and no loss reads it'),
    ('mask2former', dict(trainable='neck|backbone'), r'lets neck\.\S+ learn, and no loss reads it'),
    ('linear', dict(features={}, attention_weight=1.0), r'lets backbone\.cls_token learn, and no loss reads it'),
    ('linear', dict(attention_weight=1.0, vit=dict(attention=SOFTMAX)), 'no linear attention of the backbone learns'),
])
def test_bad_options_raise(aligned, task, options, message):
    with pytest.raises(ValueError, match=message):
        aligned(task, init=False, **options)


def test_bad_checkpoints_raise(aligned, fine_tuned, tmp_path):
    state = torch.load(fine_tuned('linear'))['state_dict']
    state['decode_head.conv_sge.weight'] = state.pop('decode_head.conv_seg.weight')
    torch.save(state, tmp_path / 'other.pth')
    with pytest.raises(ValueError, match=r'does not fit the teacher[\s\S]*missing +decode_head.conv_seg.weight'
                                         r'[\s\S]*unexpected +decode_head.conv_sge.weight'):
        aligned('linear', teacher=dict(type='Pretrained', checkpoint=str(tmp_path / 'other.pth')))
    with pytest.raises(FileNotFoundError, match='no checkpoint at'):
        aligned('linear', teacher=dict(type='Pretrained', checkpoint=str(tmp_path / 'missing.pth')))
    with pytest.raises(ValueError, match='the backbone has no pretrained weights'):
        aligned('linear', vit=dict(init_cfg=None))


def test_second_init_weights_changes_nothing(aligned):
    model = aligned('linear')
    for parameter in model.parameters():
        parameter.data += 1
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.init_weights()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@contextlib.contextmanager
def runner_of(cfg: dict, tmp_path: Path, **options):
    loader = DataLoader([dict(inputs=d['inputs'][0], data_samples=d['data_samples'][0])
                         for d in (batch('linear', 1) for _ in range(4))], batch_size=2, collate_fn=pseudo_collate)
    evaluator = dict(type='mmseg.IoUMetric')
    base = dict(model=ConfigDict(copy.deepcopy(cfg)), work_dir=str(tmp_path), default_scope='mmseg',
                experiment_name=tmp_path.name)
    runner = Runner(**base, **{key: loader if value == 'loader' else evaluator if value == 'evaluator' else value
                               for key, value in options.items()})
    loader.dataset_meta = None
    for loop in ('test_evaluator', 'val_evaluator'):
        built = getattr(getattr(runner, loop.replace('evaluator', 'loop'), None), 'evaluator', None)
        if built is not None:
            built.dataset_meta = dict(classes=tuple('abcde'))
    yield runner


def test_a_run_whose_checkpoint_the_plain_model_tests(fine_tuned, tmp_path, monkeypatch):
    """Two iterations by the Runner with our hooks; then the plain model reads the checkpoint, and scores alike."""
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)
    init_cfg = dict(type='Pretrained', checkpoint=fine_tuned('linear'))
    cfg = plain('linear', attention=LINEAR, init_cfg=init_cfg)
    aligned = dict(cfg, type='adala_mm.TaskModelAlignment', task_model='EncoderDecoder', teacher=init_cfg, logits=1.0)
    hooks = [dict(type='adala_mm.WeightsCheckHook'), dict(type='adala_mm.TeacherDriftHook', interval=1)]
    torch.manual_seed(0)
    with runner_of(aligned, tmp_path / 'align', train_dataloader='loader', optim_wrapper=ADAMW, custom_hooks=hooks,
                   train_cfg=dict(type='IterBasedTrainLoop', max_iters=2), log_processor=dict(by_epoch=False),
                   default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2))) as runner:
        runner.train()
    checkpoint = tmp_path / 'align/iter_2.pth'
    state = torch.load(checkpoint, weights_only=False)['state_dict']
    start = torch.load(fine_tuned('linear'))['state_dict']
    assert list(state) == list(build(cfg, 'linear').state_dict())
    changed = {key for key in state if not torch.equal(state[key], start[key])}
    assert changed == {key for key in state if key.startswith('backbone.')}

    scores = []
    for name, model in (('plain', dict(cfg, backbone=dict(cfg['backbone'], init_cfg=None))), ('aligned', aligned)):
        torch.manual_seed(0)
        with runner_of(model, tmp_path / name, test_dataloader='loader', test_evaluator='evaluator', test_cfg={},
                       load_from=str(checkpoint)) as runner:
            scores.append(runner.test())
    assert scores[0] == scores[1] and scores[0]['mIoU'] > 0


def test_classifier_logits_follow_the_teacher(aligned):
    """A few steps bring the logits of the student close to those of the teacher."""
    model = aligned('classifier', features={}, logits=1.0).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    data, history = batch('classifier', 8), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = losses_of(model, 'classifier', copy.deepcopy(data))['loss_logits']
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.2 * history[0]
    images = model.data_preprocessor(copy.deepcopy(data), True)['inputs']
    student, teacher = (m.eval()(images, mode='tensor').detach() for m in (model, model.frozen['teacher']))
    assert F.mse_loss(student, teacher) < 0.2 * teacher.var()


def test_options_of_the_linear_attention_are_not_the_teachers():
    """From a config, whose dicts merge where plain ones replace: the teacher is softmax without them."""
    cfg = Config.fromfile(ROOT / 'configs/beyond/task_cls_dinov2l_in1k.py')
    cfg.model.backbone.update(depth=2)
    cfg.model.backbone.attention = dict(type='adala_mm.HedgehogAttention', variant='exp', dwconv=3)
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert blocks_by_attention(model) == {'backbone': '2 of 2 blocks HedgehogAttention',
                                          'frozen teacher': '2 of 2 blocks SoftmaxAttention'}
    assert model.backbone.blocks[0].attn.dwconv is not None
