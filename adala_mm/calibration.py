"""Calibration: output projections of a linearized ViT refitted in closed form, on its own stream. No gradients."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce, broadcast, get_rank, get_world_size
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from adala_mm.adapters import Adapter, Architecture
from adala_mm.adapters.residuals import Residual, middle_of, residuals_of
from adala_mm.pairing import find_pair, first_of, frozen, report, require_whole, steps_in, validated
from adala_mm.utils.batches import Batches
from adala_mm.utils.ridge_regression import NormalEquations
from adala_mm.utils.run_checkpoint import read_run, restore_run, write_run

RIDGE = 1.0  # chosen on DeiT-tiny: with 256 images as good as 0.1, with 32 much better than 0.01


class Stream:
    """What the blocks of a ViT read, batch after batch.

    Tokens (B, N, C) in front of one block are kept in host memory. What else blocks are called with (grid, rotary
    positions) depends on the shape of the images only, and is kept once for each.
    """

    def __init__(self, vit: nn.Module, architecture: Architecture) -> None:
        self.vit, self.architecture, self.blocks = vit, architecture, architecture.blocks_of(vit)
        self.layout = next((attn.layout for attn in architecture.attentions_of(vit) if isinstance(attn, Adapter)), None)
        self.tokens: list[Tensor] = []
        self.shapes: list[torch.Size] = []
        self.calls: dict[torch.Size, list[tuple[tuple, dict]]] = {}  # other arguments of each block
        self.grids: dict[torch.Size, tuple[int, int] | None] = {}

    def read(self, images: Tensor, begin: int) -> None:
        """Takes up a batch (B, 3, H, W), in front of block ``begin``."""
        calls = []

        def note(block: nn.Module, args: tuple, kwargs: dict) -> None:
            if len(calls) == begin:
                self.tokens.append(args[0].cpu())
            calls.append((args[1:], kwargs))

        with ExitStack() as hooks:
            for block in self.blocks:
                hooks.callback(block.register_forward_pre_hook(note, with_kwargs=True).remove)
            self.architecture.features(self.vit, images)
        self.shapes.append(images.shape)
        self.calls[images.shape], self.grids[images.shape] = calls, self.layout and self.layout.hw

    def run(self, block: int, batch: int, device: torch.device) -> Tensor:
        """What the block makes of the tokens in front of it."""
        shape = self.shapes[batch]
        if self.layout is not None:
            self.layout.hw = self.grids[shape]
        args, kwargs = self.calls[shape][block]
        return first_of(self.blocks[block](self.tokens[batch].to(device), *args, **kwargs))


@contextmanager
def inputs_of(*modules: nn.Module) -> Iterator[dict[nn.Module, Tensor]]:
    """What each module read last while this was open."""
    seen: dict[nn.Module, Tensor] = {}
    with ExitStack() as hooks:
        for module in modules:
            hook = module.register_forward_pre_hook(lambda module, args: seen.update({module: args[0]}))
            hooks.callback(hook.remove)
        yield seen


class Calibration:
    """Refits the blocks of a student one after another: first `read` all images, then `refit` each block in order.

    A block ``m = x + s1 * proj(f)``, ``y = m + s2 * fc2(g)`` reads the student's own stream x, with all that the blocks
    before it, already refitted, have left different from the teacher's. ``proj`` is changed such that m comes as near
    as it can to the m of the teacher, then, with ``mlp``, ``fc2`` such that y does: `NormalEquations`, with a penalty
    on the change. There are no new parameters, and where student and teacher agree nothing changes. Softmax blocks that
    the student has kept are refitted as well.

    Memory: the streams of both, 2 N C numbers an image in host memory (float32: 8 MiB for a ViT-L at 512 x 512),
    shared between processes; the sums, 16 C^2 bytes (16 MiB; of ``fc2`` 160 C^2 bytes); and what one block needs
    without gradients. Time: five passes of a ViT over the images, with ``mlp`` six.

    Args:
        vit, teacher: of one architecture; what `find_pair` gives.
        architecture: theirs.
        mlp: refit the second matrix of each MLP, too.
        ridge: as in `NormalEquations.solve`.
        patches: how many of each image the sums take in, beside class and register tokens, drawn anew for each batch;
            None for all. They stand for all: the weight of an image stays.

    Raises:
        ValueError: for options out of range, or weights that are sharded.
        TypeError: for blocks that are not such sums (`residuals_of`).
    """

    def __init__(self, vit: nn.Module, teacher: nn.Module, architecture: Architecture, mlp: bool = False,
                 ridge: float = RIDGE, patches: int | None = None) -> None:
        if ridge <= 0 or (patches is not None and patches < 1):
            raise ValueError(f'ridge={ridge} must be above 0, patches={patches} at least 1 or None')
        if any(isinstance(parameter, DTensor) for parameter in vit.parameters()):
            raise ValueError('calibration needs whole parameters, and these are sharded: use DDP')
        self.architecture, self.mlp, self.ridge, self.patches = architecture, mlp, ridge, patches
        self.prefix = architecture.num_prefix(vit)
        self.networks, self.device = (vit, teacher), next(vit.parameters()).device
        self.student, self.teacher = Stream(vit, architecture), Stream(teacher, architecture)
        for pair in zip(self.student.blocks, architecture.attentions_of(vit), strict=True):
            middle_of(pair[0]), residuals_of(*pair)  # nothing is changed if one of them cannot be

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Neither dropout nor gradients, nor compiled blocks, which do not look at hooks that come later."""
        with frozen(*self.networks), torch.no_grad(), torch.compiler.set_stance('force_eager'):
            yield

    def read(self, images: Tensor, begin: int = 0) -> None:
        """Takes up a batch (B, 3, H, W); `refit` is to begin with block ``begin``, those before being done."""
        with self._quiet():
            for stream in (self.student, self.teacher):
                stream.read(images, begin)

    def refit(self, block: int) -> dict[str, float]:
        """Refits a block, and takes both streams behind it.

        Returns:
            ``rel_error``, which is ``||student - teacher|| / ||teacher||`` of the streams behind the block, and
            ``rel_error_before``, the same had this block been left as it was; over all images of all processes.

        Raises:
            FloatingPointError: if a stream is not finite.
        """
        attn = self.architecture.attentions_of(self.student.vit)[block]
        attention, hidden = residuals_of(self.student.blocks[block], attn)
        with self._quiet():
            before = self._refit_attention(block, attention)
            if self.mlp:
                self._refit_mlp(block, hidden)
            after = self._advance(block)
        return {'rel_error': _relative(after), 'rel_error_before': _relative(before)}

    def _refit_attention(self, block: int, attention: Residual) -> list[Tensor]:
        """Takes the teacher's stream behind the block, too; gives the squares of errors with the old projection."""
        student, teacher, squares = self.student, self.teacher, []
        here, there = (middle_of(stream.blocks[block]) for stream in (student, teacher))
        sums = self._sums(attention)
        for batch in range(len(student.tokens)):
            with inputs_of(attention.layer, here, there) as seen:
                got, wanted = (stream.run(block, batch, self.device) for stream in (student, teacher))
            if attention.layer not in seen:
                raise TypeError(f'the attention of block {block} does not call its output projection: its '
                                'forward has to call self.proj(x)')
            self._add(sums, seen[attention.layer], seen[there] - seen[here], block, batch)
            squares.append(_squares(got, wanted))
            teacher.tokens[batch] = wanted.cpu()
        self._change(attention, sums, block)
        return squares

    def _refit_mlp(self, block: int, hidden: Residual) -> None:
        sums = self._sums(hidden)
        for batch, wanted in enumerate(self.teacher.tokens):
            with inputs_of(hidden.layer) as seen:
                got = self.student.run(block, batch, self.device)
            self._add(sums, seen[hidden.layer], wanted.to(self.device) - got, block, batch)
        self._change(hidden, sums, block)

    def _advance(self, block: int) -> list[Tensor]:
        """Takes the student's stream behind the block; gives the squares of errors there."""
        squares = []
        for batch, wanted in enumerate(self.teacher.tokens):
            got = self.student.run(block, batch, self.device)
            squares.append(_squares(got, wanted.to(self.device)))
            self.student.tokens[batch] = got.cpu()
        return squares

    def _sums(self, residual: Residual) -> NormalEquations:
        layer = residual.layer
        return NormalEquations(layer.in_features, layer.out_features, layer.bias is not None, self.device)

    def _add(self, sums: NormalEquations, features: Tensor, residuals: Tensor, block: int, batch: int) -> None:
        """Adds the tokens (B, N, C) of a batch that count, by their weights."""
        weights = features.new_ones(features.shape[1], dtype=torch.float64)
        total = len(weights) - self.prefix
        if self.patches is not None and self.patches < total:
            place = block * len(self.student.tokens) + batch  # so that a resumed run draws the same
            draw = torch.Generator().manual_seed(place * get_world_size() + get_rank())
            order = self.prefix + torch.randperm(total, generator=draw)[:self.patches]
            chosen = torch.cat([torch.arange(self.prefix), order]).to(self.device)
            weights[self.prefix:] = total / self.patches
            features, residuals, weights = features[:, chosen], residuals[:, chosen], weights[chosen]
        sums.add(features, residuals, weights.expand(len(features), -1))

    def _change(self, residual: Residual, sums: NormalEquations, block: int) -> None:
        sums.all_reduce()
        try:
            change = sums.solve(self.ridge, residual.scale)
        except FloatingPointError as error:
            raise FloatingPointError(f'block {block}: {error}') from error
        layer = residual.layer
        layer.weight.copy_(layer.weight.double() + change[:layer.in_features].T)
        if layer.bias is not None:
            layer.bias.copy_(layer.bias.double() + change[-1])
        for parameter in layer.parameters():  # another machine may round in another way
            broadcast(parameter.detach())


def _squares(got: Tensor, wanted: Tensor) -> Tensor:
    """(2,) sums of squares of error and teacher."""
    return torch.stack([(got - wanted).double().square().sum(), wanted.double().square().sum()])


def _relative(squares: list[Tensor]) -> float:
    all_reduce(total := torch.stack(squares).sum(dim=0))
    return (total[0] / total[1].clamp_min(1e-24)).sqrt().item()


def calibrate(model: nn.Module, teacher: nn.Module, dataloader: Iterable[Any], steps: int | None = None,
              epochs: int | None = None, mlp: bool = False, ridge: float = RIDGE, patches: int | None = None,
              bf16: bool = False, validate: Callable[[nn.Module], Mapping[str, float] | None] | None = None,
              val_interval: int | None = None, checkpoint: str | Path | None = None,
              resume: bool = False) -> list[dict[str, float]]:
    """Brings a linearized ViT nearer to its softmax original in closed form: minutes, and no gradients.

    For an attention that answers much as softmax does, as it is or after stage 1 (`adala_mm.align`); stage 2 may
    follow. An untrained attention that does not is better left alone: errors that no projection can undo are smeared
    over its weights. `Calibration` says what is computed, and what memory it takes.

    In several processes each calls this with its share of the data, as with `adala_mm.align`; sums are taken over all.

    Args:
        model, teacher, dataloader: as of `adala_mm.align`. Images without augmentation will do.
        steps, epochs: how many batches to read, one of the two; a few hundred images are enough. Their streams are
            kept in host memory.
        mlp, ridge, patches: see `Calibration`.
        bf16: run both under bfloat16 autocast; the sums are float64 all the same.
        validate: as of `adala_mm.align`.
        val_interval: blocks between its calls; None: after the last only. It is called after that in any case.
        checkpoint: file that holds all that `resume` needs, replaced after each block. Rank 0 writes it, and reads it
            for all.
        resume: go on from ``checkpoint``, if it is there; the same images are read again, as `adala_mm.align` does.

    Returns:
        One dict per block: ``block``, counted from 1, and what `Calibration.refit` gives; and one per validation:
        ``block`` and what it returned.

    Raises:
        ValueError, TypeError: as `adala_mm.align` and `Calibration`.
        FileExistsError: for a checkpoint that is there, without ``resume``.
        FloatingPointError: if a stream is not finite.
    """
    require_whole(val_interval=val_interval)
    total, data = steps_in(dataloader, steps, epochs), Batches(dataloader)
    vit, old, architecture = find_pair(model, teacher)
    work = Calibration(vit, old, architecture, mlp, ridge, patches)
    run = dict(stage='calibrate', total=total, mlp=mlp, ridge=ridge, patches=patches, bf16=bf16,
               processes=get_world_size())
    saved = read_run(checkpoint, run, resume)
    begun, history = (saved['block'], saved['history']) if saved else (0, [])
    images_state, depth = saved['data'] if saved else data.state(), len(architecture.blocks_of(vit))
    for value in model.state_dict(keep_vars=True).values():
        broadcast(value.detach())
    if saved:
        restore_run(saved, {'model': model})
        data.seek(images_state)
        report(f'calibration  {checkpoint}: goes on after block {begun}/{depth}')
    parameter, start = next(vit.parameters()), time.perf_counter()
    half = torch.autocast(parameter.device.type, torch.bfloat16, enabled=bf16)
    with half:
        for _, images in zip(range(total if begun < depth else 0), data, strict=False):
            work.read(images.to(parameter.device, parameter.dtype, non_blocking=True), begun)
    for block in range(begun, depth):
        with half:
            figures = work.refit(block)
        done = block + 1
        history.append({'block': done, **figures})
        eta = time.strftime('%H:%M:%S', time.gmtime((time.perf_counter() - start) / (done - begun) * (depth - done)))
        report(f'calibration  block {done}/{depth}  rel_error {figures["rel_error"]:.4f} '
               f'(before: {figures["rel_error_before"]:.4f})  ETA {eta}')
        if validate and (done == depth or (val_interval and done % val_interval == 0)):
            history.append({'block': done, **validated(validate, model)})
            report('  '.join(['calibration', *(f'{name} {value}' for name, value in history[-1].items())]))
        if checkpoint:
            write_run(checkpoint, run, {'model': model}, {'data': images_state, 'block': done, 'history': history})
    return history
