"""`align` over its whole life: rates, validation, interruption, several processes."""
from __future__ import annotations

import copy
import logging.handlers
import multiprocessing
import os
import socket
from datetime import timedelta
from itertools import islice

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler, TensorDataset

from adala_mm import align, calibrate, linearize
from adala_mm.registry import MODELS
from adala_mm.utils.batches import Batches
from adala_mm.utils.checkpoint import load_checkpoint
from helpers import tiny_vit
from helpers.align_runs import PICTURES, Interrupted, equal, shuffled
from helpers.vits import Exact, batches, build, timm_vit


def moved(student: nn.Module, before: nn.Module) -> float:
    """Median of what one step changed. AdamW moves each parameter by the rate, whatever its gradient."""
    return (student.blocks[0].attn.qkv.weight - before.blocks[0].attn.qkv.weight).abs().median().item()


def polyak(student: nn.Module, teacher: nn.Module, images: torch.Tensor, stage: int) -> float:
    """Loss / sum |gradient|, with all blocks in one graph."""
    inputs, outputs, student = [], [], copy.deepcopy(student)
    student(images)  # from here on its attentions know the grid
    if stage == 1:
        for block in teacher.blocks:
            block.attn.register_forward_hook(lambda _, x, y: inputs.append(x[0].detach()) or outputs.append(y.detach()))
        teacher(images)
        learners = [p for block in student.blocks for name, p in block.attn.named_parameters() if 'qkv' in name]
        losses = [(block.attn(x) - y).square().mean()
                  for block, x, y in zip(student.blocks, inputs, outputs, strict=True)]
        loss = torch.stack(losses).mean()
    else:
        learners = list(student.parameters())
        loss = (student.forward_features(images) - teacher.forward_features(images)).square().mean()
    gradients = torch.autograd.grad(loss, learners, allow_unused=True)
    return (loss / sum(g.abs().sum() for g in gradients if g is not None)).item()


@pytest.mark.parametrize(('stage', 'rate'), [(1, 1e-2 * (2 / 256) ** 0.5), (2, 1e-3 * (2 / 128) ** 0.5)])
@pytest.mark.parametrize('near', [False, True])
def test_rate_follows_the_batch_and_how_near_the_student_is(stage, rate, near, caplog):
    caplog.set_level(logging.INFO, 'adala_mm')
    teacher = build('augreg')
    student, (images,) = linearize(teacher, Exact) if near else linearize(teacher), batches(1)
    if near:
        for parameter in student.parameters():
            parameter.data += 1e-4 * torch.randn(parameter.shape)
    limit = polyak(student, copy.deepcopy(teacher), images, stage)
    assert near == (limit < rate)
    before = copy.deepcopy(student)
    align(student, teacher, [images], stage=stage, steps=1, weight_decay=0.0)
    assert moved(student, before) == pytest.approx(min(rate, limit), rel=0.01)
    (line,) = [message for message in caplog.messages if ' lr ' in message]
    assert f'lr {min(rate, limit):.4g}' in line and f'sqrt(2 / {[256, 128][stage - 1]})' in line
    assert near == ('would go past a loss of 0' in line)
    student = copy.deepcopy(before)
    align(student, teacher, [images], stage=stage, steps=1, weight_decay=0.0, lr=1e-5)
    assert moved(student, before) == pytest.approx(1e-5, rel=0.02)


@pytest.mark.parametrize('stage', [1, 2])
def test_a_student_without_error_stays_where_it_is(stage):
    teacher = build('augreg')
    student = linearize(teacher, Exact)
    align(student, teacher, batches(1), stage, steps=2)
    assert equal(student, linearize(teacher, Exact))


@pytest.mark.parametrize('stage', [1, 2])
def test_validation(stage, caplog):
    caplog.set_level(logging.INFO, 'adala_mm')
    teacher = build('augreg')
    student, seen = linearize(teacher).train(), []

    def validate(model):
        seen.append((any(module.training for module in model.modules()), torch.is_grad_enabled(), model is student))
        return {'accuracy': len(seen) / 4}

    history = align(student, teacher, batches(2), stage=stage, steps=5, lr=1e-3, validate=validate, val_interval=2)
    assert seen == [(False, False, True)] * 3 and student.training
    assert [line for line in history if 'accuracy' in line] == [
        dict(step=2, accuracy=0.25), dict(step=4, accuracy=0.5), dict(step=5, accuracy=0.75)]
    assert any('step 4  accuracy 0.5' in message for message in caplog.messages)
    assert align(student, teacher, batches(2), steps=3, validate=lambda model: None)[-1] == {'step': 3}


@pytest.mark.parametrize('stage', [1, 2])
@pytest.mark.parametrize('stop', [3, 4])  # after a step in the middle of a pass of two batches, and at its end
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(stage, stop, tmp_path, caplog):
    caplog.set_level(logging.INFO, 'adala_mm')
    teacher = timm_vit(proj_drop_rate=0.3, drop_path_rate=0.3)
    teacher.load_state_dict(build('augreg').state_dict())
    start, path = linearize(teacher.eval(), 'hedgehog').train(), tmp_path / 'run.pt'
    options = dict(stage=stage, steps=7, log_interval=2, checkpoint_interval=1)

    def run(model: nn.Module, seed: int, **more):
        torch.manual_seed(seed)
        return align(model, teacher, shuffled(), **options, checkpoint=path, **more)

    whole = copy.deepcopy(start)
    wanted = run(whole, 1)
    path.unlink()

    def interrupt(model):
        raise Interrupted

    with pytest.raises(Interrupted):
        run(copy.deepcopy(start), 1, validate=interrupt, val_interval=stop + 1)
    assert load_checkpoint(path)['step'] == stop
    resumed = linearize(teacher, 'hedgehog').train()
    history = run(resumed, 2, resume=True)
    assert history == wanted and equal(resumed, whole)
    assert any(f'goes on after step {stop}/7' in message for message in caplog.messages)
    assert run(copy.deepcopy(start), 3, resume=True) == wanted  # it is done already
    assert sorted(tmp_path.iterdir()) == [path]


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    teacher, path = build('augreg'), tmp_path / 'run.pt'
    student = linearize(teacher)
    first = dict(steps=2, stage=1, lr=1e-3, checkpoint=path)
    align(student, teacher, batches(1), **first)
    content = path.read_bytes()
    with pytest.raises(FileExistsError, match=r'run\.pt exists: say resume=True'):
        align(student, teacher, batches(1), **first)
    for change, message in ((dict(stage=2), 'stage=1, not 2'), (dict(steps=3), 'total=2, not 3'),
                            (dict(lr=None), r'lr=0\.001, not None'), (dict(bf16=True), 'bf16=False, not True')):
        with pytest.raises(ValueError, match=f'is of another run, with .*{message}'):
            align(student, teacher, batches(1), **first | change, resume=True)
    for other, message in ((linearize(teacher, 'hedgehog'), 'was saved as LinearAttention'),
                           (linearize(teacher, keep_softmax=[0]), 'blocks.0.attn.adala_mm')):
        with pytest.raises(ValueError, match=f'another model: [^$]*{message}'):
            align(other, teacher, batches(1), **first, resume=True)
    assert path.read_bytes() == content
    torch.save({'state_dict': {}}, path)
    with pytest.raises(ValueError, match='no checkpoint of align'):
        align(student, teacher, batches(1), **first, resume=True)
    with pytest.raises(ValueError, match='resume=True needs a checkpoint'):
        align(student, teacher, batches(1), steps=1, resume=True)


def test_what_is_not_finite_replaces_no_checkpoint(tmp_path):
    teacher, path = build('augreg'), tmp_path / 'run.pt'
    data = [*batches(2), torch.full((2, 3, 32, 32), torch.nan)]
    with pytest.raises(FloatingPointError, match='after step 3'):
        align(linearize(teacher), teacher, data, steps=4, checkpoint=path, checkpoint_interval=1)
    saved = load_checkpoint(path)
    assert saved['step'] == 2 and all(value.isfinite().all() for value in saved['model'].values())


def test_processes_that_would_do_the_same_are_refused(monkeypatch):
    teacher = build('augreg')
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='2 processes have been started.*init_process_group'):
        align(linearize(teacher), teacher, batches(1), steps=1)
    monkeypatch.setattr('adala_mm.utils.batches.get_world_size', lambda: 2)
    with pytest.raises(ValueError, match='2 processes would all read all images.*sampler=DistributedSampler'):
        align(linearize(teacher), teacher, shuffled(), steps=1)


class Halves(BatchSampler):
    """Deals out whole batches to two processes, in an order of each epoch's own; what a library of one's own has."""

    epoch = -1

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        yield from (order[:2], order[4:6])


def test_batch_samplers_deal_out_shares(monkeypatch):
    monkeypatch.setattr('adala_mm.utils.batches.get_world_size', lambda: 2)
    data = TensorDataset(PICTURES)
    inside, whole = DistributedSampler(data, 2, 0), SequentialSampler(data)
    for sampler, counts in ((BatchSampler(inside, 2, False), inside), (ours := Halves(whole, 2, False), ours)):
        shares = Batches(DataLoader(data, batch_sampler=sampler))
        assert len(list(islice(shares, 5))) == 5 and counts.epoch == 2  # passes of two batches
    for same in (dict(batch_sampler=BatchSampler(whole, 2, False)), dict(batch_size=None), dict(shuffle=True)):
        with pytest.raises(ValueError, match='processes would all read all images'):
            Batches(DataLoader(data, **same))


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    teacher = MODELS.build(tiny_vit())
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.3)
    return linearize(teacher, 'performer'), teacher


def both_stages(student: nn.Module, teacher: nn.Module, data: DataLoader) -> list:
    return [align(student, teacher, data, stage=stage, epochs=2, log_interval=1, lr=1e-3) for stage in (1, 2)]


def raised(error: type[Exception], student: nn.Module, teacher: nn.Module, **options) -> str:
    with pytest.raises(error) as caught:
        align(student, teacher, [PICTURES[:2]], steps=2, **options)
    return str(caught.value)


def process(rank: int, port: int, folder, results) -> None:
    torch.set_num_threads(1)
    os.environ |= dict(MASTER_ADDR='localhost', MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE='2')
    dist.init_process_group('gloo', timeout=timedelta(seconds=30), rank=rank, world_size=2)
    student, teacher = pair()
    if rank:  # what rank 0 has counts
        for value in student.state_dict(keep_vars=True).values():
            value.data.zero_()
    data = TensorDataset(PICTURES)
    sampler = DistributedSampler(data, shuffle=False)
    history = both_stages(student, teacher, DataLoader(data, batch_size=2, sampler=sampler))
    state = {name: value.numpy() for name, value in student.state_dict().items()}
    student, teacher = pair()
    for value in student.state_dict(keep_vars=True).values() if rank else ():
        value.data.zero_()
    shares = DataLoader(data, batch_size=2, sampler=DistributedSampler(data, shuffle=False))
    figures = calibrate(student, teacher, shares, epochs=1, mlp=True)
    refitted = {name: value.numpy() for name, value in student.state_dict().items()}

    # Batches of 4 and 1, and a disk of its own for each: only rank 0 finds what it wrote.
    said, (student, teacher), path = logging.handlers.BufferingHandler(1000), pair(), folder / f'{rank}' / 'run.pt'
    (logger := logging.getLogger('adala_mm')).addHandler(said)
    logger.setLevel(logging.INFO)
    run = dict(steps=2, val_interval=1, validate=lambda model: {'accuracy': 1}, checkpoint=path)
    uneven = align(student, teacher, [PICTURES[4:][:1 if rank else 4]], **run)
    weights = {name: value.numpy() for name, value in student.state_dict().items()}
    there = raised(FileExistsError, student, teacher, checkpoint=path)
    other = raised(ValueError, student, teacher, checkpoint=path, resume=True, lr=1.0)
    again = align(student, teacher, [PICTURES[:2]], **run, resume=True)
    no_folder = (folder / '0' / 'run.pt' if rank == 0 else folder / '1') / 'run.pt'
    unwritten = raised(OSError, student, teacher, checkpoint=no_folder)
    results.put((rank, history, state, sampler.epoch, dict(
        messages=[record.getMessage() for record in said.buffer], weights=weights, uneven=uneven, again=again,
        errors=[there, other, unwritten], figures=figures, refitted=refitted)))
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.is_available(), reason='compares runs on the CPU')
def test_two_processes_do_what_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context('fork')
    results = context.Queue()
    children = [context.Process(target=process, args=(rank, port, tmp_path, results)) for rank in range(2)]
    for child in children:
        child.start()
    found = sorted((results.get(timeout=120) for _ in children), key=lambda result: result[0])
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    student, teacher = pair()
    # DistributedSampler deals out one by one: ranks hold 0 2 | 1 3, then 4 6 | 5 7.
    wanted = both_stages(student, teacher, DataLoader(TensorDataset(PICTURES), batch_size=4))
    for _, history, state, epoch, _ in found:
        assert epoch == 1
        for stage, other in zip(history, wanted, strict=True):
            assert [line['step'] for line in stage] == [1, 2, 3, 4]
            for line, want in zip(stage, other, strict=True):
                assert abs(line['loss'] / want['loss'] - 1) < 1e-4
        for name, value in student.state_dict().items():
            torch.testing.assert_close(torch.from_numpy(state[name]), value, rtol=1e-3, atol=1e-4, msg=name)

    first, second = (result[-1] for result in found)
    student, teacher = pair()
    figures = calibrate(student, teacher, DataLoader(TensorDataset(PICTURES), batch_size=4), epochs=1, mlp=True)
    assert first['figures'] == second['figures'] == [pytest.approx(line) for line in figures]
    for name, value in student.state_dict().items():
        assert (first['refitted'][name] == second['refitted'][name]).all()
        torch.testing.assert_close(torch.from_numpy(first['refitted'][name]), value, rtol=1e-3, atol=1e-4, msg=name)
    assert first['errors'] == second['errors'] and not (tmp_path / '1').exists()
    for message, wanted in zip(first['errors'], ('exists: say resume=True', 'lr=None, not 1.0', 'run.pt'), strict=True):
        assert wanted in message
    assert first['uneven'] == second['uneven'] == first['again'] == second['again']
    assert any(f'lr {1e-2 * (5 / 256) ** 0.5:.4g}' in line for line in first['messages'])
    assert any('accuracy' in line for line in first['messages']) and second['messages'] == []
    for name, value in first['weights'].items():
        torch.testing.assert_close(torch.from_numpy(second['weights'][name]), torch.from_numpy(value), msg=name)
