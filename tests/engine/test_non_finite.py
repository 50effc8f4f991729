"""What is not finite stops a run or is skipped before it does harm, and is named."""
from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.dist import all_reduce, get_rank
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from adala_mm.engine import DeadLossHook, NonFiniteHook, ShardedRunner
from adala_mm.engine.non_finite import first_not_finite
from adala_mm.utils.checkpoint import load_checkpoint
from helpers import ROOT
from helpers.processes import apart, exit_codes
from helpers.stages import ADAMW, SGD, Act, Norms, Pictures, make_runner, pictures, stage

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='compares runs on the CPU')


class Averaging(Norms):
    """As mmdet's heads, it divides by a mean over processes; ``harm`` is done to process 1's third layer."""

    def __init__(self, harm: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        if get_rank() == 1:
            self.layers[2].register_forward_hook(lambda module, args, output: harm(output))

    def forward(self, inputs, data_samples=None, mode='tensor'):
        count = torch.tensor(float(len(inputs)))
        all_reduce(count, op='mean')
        return {'loss': self.layers(inputs).square().sum() / count}


def broken(output: Tensor) -> Tensor:
    """The output, of which running a batch again makes an error."""
    broken.runs = getattr(broken, 'runs', 0) + 1
    if broken.runs > 1:
        raise ValueError('no second time')
    return output * 1e30


@pytest.fixture(autouse=True)
def isolated():
    with apart():
        yield


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], **tolerance) -> None:
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(got[key], value, **(tolerance or dict(rtol=0, atol=0)), msg=key)


# Each puts something that is not finite into the third iteration, and says where it first shows.
def nan_pixel(model):
    return None, 'the images themselves', ['-6.jpg']


def nan_in_block(model):
    def act(runner):
        def poison(module, args, output):
            return output * float('nan') if runner.iter == 2 else output
        if runner.iter == 0:
            model.backbone.blocks[1].mlp.fc1.register_forward_hook(poison)
    return Act(act), 'the output of backbone.blocks.1.mlp.fc1', ['5.jpg', '6.jpg']


def inf_gradient(model):
    def act(runner):
        if runner.iter == 0:
            model.backbone.blocks[0].attn.qkv.bias.register_hook(
                lambda grad: grad * float('inf') if runner.iter == 2 else grad)
    return Act(act), 'the gradient of backbone.blocks.0.attn.qkv.bias', ['5.jpg', '6.jpg']


def inf_in_attention(model):
    def act(runner):
        def poison(module, args, output):
            return output + float('inf') if runner.iter == 2 else output
        if runner.iter == 0:
            model.backbone.blocks[1].attn.register_forward_hook(poison)
    return Act(act), 'the output of backbone.blocks.1.attn', ['5.jpg', '6.jpg']


PLANTS = [(1, nan_pixel), (1, inf_in_attention), (1, inf_gradient), (2, nan_pixel), (2, nan_in_block),
          (2, inf_gradient)]


@pytest.mark.parametrize(('number', 'plant'), PLANTS, ids=lambda value: getattr(value, '__name__', str(value)))
@pytest.mark.parametrize('clip', [False, True])
def test_stop_names_step_block_files_and_keeps_the_last_checkpoint(number, plant, clip, sharp_pretrained, tmp_path):
    clipping = dict(clip_grad=dict(max_norm=1.0)) if clip else {}
    before = stage(number, sharp_pretrained)
    make_runner(tmp_path / 'before', before, pictures(2), **clipping).train()

    model = stage(number, sharp_pretrained)
    hook, where, files = plant(model)
    numbers = pictures(4, bad=(3,) if plant is nan_pixel else ())
    runner = make_runner(tmp_path / 'run', model, numbers, hooks=(hook,) if hook else (), **clipping)
    with pytest.raises(RuntimeError) as error:
        runner.train()
    message = str(error.value)
    last = tmp_path / 'run/iter_2.pth'
    for part in ('iteration 3:', f'process 0: first {where} (loss ', f'files {", ".join(files)}. The',
                 f'last good checkpoint: {last};'):
        assert part in message
    assert_same(weights(model), weights(before))  # not even the clipped step was taken
    assert_same(load_checkpoint(last)['state_dict'], weights(before))
    assert sorted(path.name for path in (tmp_path / 'run').glob('*.pth')) == ['iter_1.pth', 'iter_2.pth']
    record = json.loads((tmp_path / 'run/non_finite_iter_3.json').read_text())
    assert record['iteration'] == 3 and str(tmp_path / 'run/non_finite_iter_3.json') in message
    (process,) = record['processes']
    assert process['process'] == 0 and process['first'] == where and process['files'] == files


@pytest.mark.parametrize(('number', 'plant'), PLANTS, ids=lambda value: getattr(value, '__name__', str(value)))
def test_skip_leaves_a_run_that_never_saw_the_batch(number, plant, sharp_pretrained, tmp_path):
    without = stage(number, sharp_pretrained)
    numbers = pictures(5)
    wanted = make_runner(tmp_path / 'without', without, numbers[:4] + numbers[6:], optimizer=ADAMW)
    wanted.train()

    model = stage(number, sharp_pretrained)
    hook, where, files = plant(model)
    numbers = pictures(5, bad=(3,) if plant is nan_pixel else ())
    runner = make_runner(tmp_path / 'run', model, numbers, dict(policy='skip'), ADAMW, (hook,) if hook else ())
    runner.train()
    assert_same(weights(model), weights(without))
    for got, want in zip(runner.optim_wrapper.optimizer.state.values(),
                         wanted.optim_wrapper.optimizer.state.values(), strict=True):
        assert_same(got, want)  # momenta and the count of steps as well
    assert runner.message_hub.get_scalar('train/skipped').current() == 1
    (log,) = (tmp_path / 'run').glob('*/*.log')
    assert where in log.read_text() and 'Skipped, 1 so far' in log.read_text()


def test_skipping_ends_after_max_skipped_in_a_row(pretrained, tmp_path):
    numbers = pictures(9, bad=(2, 3, 5, 6, 7, 8))
    runner = make_runner(tmp_path, stage(2, pretrained), numbers, dict(policy='skip', max_skipped=2))
    with pytest.raises(RuntimeError, match=r'3 batches in a row .* \(max_skipped=2\)\. Of the last one: iteration 7:'):
        runner.train()


def test_unknown_policies():
    with pytest.raises(ValueError, match="unknown policy 'ignore'; choose one of stop, skip"):
        NonFiniteHook(policy='ignore')
    with pytest.raises(ValueError, match="unknown policy 'skip'; choose one of warn, stop"):
        DeadLossHook(policy='skip')


def step_of(model: nn.Module, batches: list[list[int]], count: int) -> dict[str, Tensor]:
    """Weights after one SGD step on the sum of the batches' losses over ``count``."""
    model = copy.deepcopy(model).train()
    for numbers in batches:
        images = torch.stack([Pictures(numbers)[i]['inputs'] for i in range(len(numbers))])
        (model.parse_losses(model(images, mode='loss'))[0] / count).backward()
    torch.optim.SGD([p for p in model.parameters() if p.grad is not None], lr=SGD['lr']).step()
    return weights(model)


@pytest.mark.parametrize('bad', [1, 2, 3])
def test_bad_batch_does_not_poison_what_is_accumulated(bad, sharp_pretrained, tmp_path):
    model = stage(2, sharp_pretrained)
    good = [[2 * i - 1, 2 * i] for i in (1, 2, 3) if i != bad]
    wanted = step_of(model, good, 3)
    make_runner(tmp_path, model, pictures(3, bad=(bad,)), dict(policy='skip'), accumulative_counts=3).train()
    assert_same(weights(model), wanted, rtol=1e-5, atol=1e-7)


def test_nothing_is_done_when_all_accumulated_batches_are_bad(sharp_pretrained, tmp_path):
    model = stage(2, sharp_pretrained)
    before = weights(model)
    runner = make_runner(tmp_path, model, pictures(2, bad=(1, 2)), dict(policy='skip'), ADAMW, accumulative_counts=2)
    runner.train()  # AdamW would decay weights even for gradients of 0
    assert_same(weights(model), before)
    assert not runner.optim_wrapper.optimizer.state


def test_bad_gradients_take_their_whole_accumulated_step_with_them(sharp_pretrained, tmp_path):
    model = stage(2, sharp_pretrained)
    before = weights(model)
    hook, where, _ = inf_gradient(model)
    runner = make_runner(tmp_path, model, pictures(4), hooks=(hook,), accumulative_counts=4)
    with pytest.raises(RuntimeError, match='no process finds it when it runs its batch again; last of the gradients '
                                           'that are not finite: backbone.blocks.0.attn.qkv.bias'):
        runner.train()
    assert_same(weights(model), before)
    record = json.loads((tmp_path / 'non_finite_iter_4.json').read_text())
    assert record['processes'][0]['step_files'] == [f'{i}.jpg' for i in range(1, 9)]


@pytest.mark.parametrize('finite', [False, True], ids=['nan_pixel', 'square_overflows'])
def test_statistics_of_batch_norm_are_put_back(finite, tmp_path):
    numbers, results = pictures(4), []
    for bad in (False, True):
        torch.manual_seed(3)
        model = Norms()
        chosen = pictures(4, bad=() if finite else (3,)) if bad else numbers[:4] + numbers[6:]
        runner = make_runner(tmp_path / str(bad), model, chosen, dict(policy='skip'))
        if finite and bad:  # behind the norm, which sees ordinary numbers
            model.layers[2].register_forward_hook(
                lambda module, args, output, run=runner: output * (1e30 if run.iter == 2 else 1))
        runner.train()
        results.append(weights(model))
    assert_same(*results)
    assert results[1]['layers.1.num_batches_tracked'] == 3
    assert runner.message_hub.get_scalar('train/skipped').current() == 1


@pytest.mark.parametrize('kind', [nn.SyncBatchNorm, type('SyncBatchNorm', (nn.BatchNorm2d,), {})])  # PyTorch's, mmcv's
def test_no_process_runs_synchronised_batch_norm_again(kind, monkeypatch):
    model = Norms()
    model.layers[1] = kind(4)
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1))
    model.layers[2].register_forward_hook(lambda module, args, output: output * 1e30)
    batch = dict(inputs=torch.randn(2, 3, 8, 8), mode='loss')
    assert first_not_finite(model, wrapper, batch) == 'the loss term loss'
    monkeypatch.setattr('adala_mm.engine.non_finite.get_world_size', lambda: 2)
    assert first_not_finite(model, wrapper, batch) is None


def test_weights_broken_by_a_finite_step_are_not_saved(tmp_path):
    def act(runner):
        runner.optim_wrapper.optimizer.param_groups[0]['lr'] = 1e38 if runner.iter == 2 else 1e-9

    model = Norms()
    model.layers[2].weight.data *= 1000
    runner = make_runner(tmp_path, model, pictures(3), hooks=(Act(act),))
    with pytest.raises(RuntimeError, match=r'iteration 3: weights are not finite \(layers.*iter_2.pth'):
        runner.train()
    assert not (tmp_path / 'iter_3.pth').exists() and (tmp_path / 'iter_2.pth').exists()


HALF = dict(type='adala_mm.CPUAmpOptimWrapper', dtype='float16')


def test_overflow_under_dynamic_loss_scale_is_no_fault(sharp_pretrained, tmp_path):
    model = stage(2, sharp_pretrained)
    before = weights(model)
    runner = make_runner(tmp_path, model, pictures(20), **HALF, loss_scale=dict(init_scale=2.0 ** 36))
    runner.train()
    assert runner.optim_wrapper.loss_scaler.get_scale() < 2.0 ** 36  # so there was one
    after = weights(model)
    assert any(not torch.equal(after[key], value) for key, value in before.items())
    assert all(value.isfinite().all() for value in after.values())
    assert not list(tmp_path.glob('*.json')) and 'train/skipped' not in runner.message_hub.log_scalars


@pytest.mark.parametrize(('scale', 'match'), [
    (dict(init_scale=2.0 ** -12), 'iteration 2: the loss scale has fallen to 6e-05'),  # after its second halving
    (1.0, 'iteration 1: loss or gradients are not finite')])
def test_gradients_that_no_loss_scale_mends(scale, match, sharp_pretrained, tmp_path):
    model = stage(2, sharp_pretrained)
    model.backbone.blocks[0].mlp.fc1.bias.register_hook(lambda grad: grad * float('nan'))
    before = weights(model)
    runner = make_runner(tmp_path, model, pictures(4), **HALF, loss_scale=scale)
    with pytest.raises(RuntimeError, match=f'{match}.*the gradient of backbone.blocks.0.mlp.fc1.bias'):
        runner.train()
    assert_same(weights(model), before)


def test_finished_run_leaves_model_and_optimizer_wrapper_as_they_were(pretrained, tmp_path):
    model = stage(2, pretrained)
    runner = make_runner(tmp_path, model, pictures(1))
    runner.train()
    assert not model._forward_pre_hooks and not {'step', 'backward'} & vars(runner.optim_wrapper).keys()


def work(rank: int, place: Path, init_cfg: dict) -> None:
    """One of two processes: notes what it sees when a picture of process 1 alone has a NaN."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
    torch.distributed.init_process_group('gloo', init_method=f'file://{place}/store', rank=rank, world_size=2)
    found = {}
    # DefaultSampler deals pictures out in turn: process 0 has the odd ones, process 1 the even ones.
    numbers = list(range(1, 13))
    bad = [-6 if n == 6 else n for n in numbers]
    skip = dict(policy='skip')
    for name, chosen, options in (('skip', bad, dict(hook=skip, optimizer=ADAMW)),
                                  ('without', numbers[:4] + numbers[8:], dict(optimizer=ADAMW)),
                                  ('accumulate', bad[:8], dict(hook=skip, accumulative_counts=2)),
                                  ('sharded', bad, dict(hook=skip, kind=ShardedRunner, optimizer=ADAMW)),
                                  ('sharded stop', bad, dict(kind=ShardedRunner)),
                                  ('stop', bad, {}),
                                  ('averaging image', bad, dict(harm=torch.Tensor.clone)),
                                  ('averaging loss', numbers, dict(harm=lambda output: output * 1e30)),
                                  ('averaging broken', numbers, dict(harm=broken))):
        harm = options.pop('harm', None)
        model = Averaging(harm) if harm else stage(2, init_cfg)
        runner = make_runner(place / name, model, chosen, launcher='pytorch', save_every=100, **options)
        try:
            runner.train()
            state = model.state_dict()
            found[name] = [value.double().sum().item() for value in state.values()]
            if rank == 0:
                torch.save(state, place / f'{name}.pth')
        except RuntimeError as error:
            found[name] = str(error)
    torch.distributed.destroy_process_group()
    (place / f'{rank}.json').write_text(json.dumps(found))


@pytest.fixture(scope='module')
def together(sharp_pretrained, tmp_path_factory) -> tuple[Path, list[dict]]:
    place = tmp_path_factory.mktemp('together')
    assert exit_codes(work, place, sharp_pretrained) == [0, 0]
    return place, [json.loads((place / f'{rank}.json').read_text()) for rank in range(2)]


def test_two_processes_stop_alike_and_name_the_one(together):
    place, (one, two) = together
    assert one['stop'] == two['stop']
    assert 'iteration 2: ' in one['stop'] and 'process 1: first the images themselves' in one['stop']
    assert 'files -6.jpg. The' in one['stop'] and 'process 0' not in one['stop']
    record = json.loads((place / 'stop/non_finite_iter_2.json').read_text())
    assert [process['files'] for process in record['processes']] == [['5.jpg', '7.jpg'], ['-6.jpg']]


@pytest.mark.parametrize(('name', 'where'), [
    ('image', 'the images themselves'), ('loss', 'the loss term loss'),
    ('broken', 'unknown, as running the batch again fails (ValueError: no second time)')])
def test_no_process_waits_in_vain_for_another_that_looks(together, name, where):
    place, (one, two) = together
    assert one[f'averaging {name}'] == two[f'averaging {name}']
    assert f'process 1: first {where} (' in one[f'averaging {name}'] and 'process 0' not in one[f'averaging {name}']


def test_sharded_processes_stop_and_skip_alike(together):
    place, (one, two) = together
    assert one['sharded'] == two['sharded']
    assert_same(torch.load(place / 'sharded.pth'), torch.load(place / 'without.pth'), rtol=1e-4, atol=1e-6)
    assert one['sharded stop'] == two['sharded stop']
    assert 'process 1: first the images themselves' in one['sharded stop'] and 'process 0' not in one['sharded stop']


def test_two_processes_skip_alike(together):
    place, (one, two) = together
    assert one['skip'] == two['skip'] == one['without']
    assert_same(torch.load(place / 'skip.pth'), torch.load(place / 'without.pth'))


def test_two_processes_accumulate_alike(together, sharp_pretrained):
    place, (one, two) = together
    assert one['accumulate'] == two['accumulate']
    # Of the step's two batches on two processes, the second counted as nothing on both: DDP's mean of the first.
    wanted = step_of(stage(2, sharp_pretrained), [[1, 2, 3, 4]], 2)
    assert_same(torch.load(place / 'accumulate.pth'), wanted, rtol=1e-5, atol=1e-6)


def test_they_are_default_hooks():
    hooks = Config.fromfile(ROOT / 'configs/_base_/default_runtime.py').default_hooks
    names = {hook['type'] for hook in hooks.values()}
    assert {f'adala_mm.{name}Hook' for name in ('NonFinite', 'TeacherDrift', 'DeadLoss', 'WeightsCheck')} <= names
