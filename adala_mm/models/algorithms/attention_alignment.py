"""Stage 1 of ViT-AdaLA: each block's linear attention learns to answer as its softmax attention does."""
from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from adala_mm.models.algorithms.base import Alignment, mean_squared_error, relative_error
from adala_mm.models.attentions import Attention, build_attention
from adala_mm.models.backbones.vit import CUDA_GRAPH_MODES
from adala_mm.ops import in_float32
from adala_mm.registry import MODELS

TARGETS = ('output', 'heads', 'weights')
QUERIES = 256  # of which the weights on all keys are in memory at a time
# Parameters with a part that attention matrices do not depend on: values (qkv holds them) and what comes after them.
VALUES = re.compile(r'\.attn\.(qkv|dwconv|lora\.[ab]\.[vo])(\.|$)')
SAMPLE = 64  # elements of each tensor by which weights are recognized


@in_float32
def softmax_weights(q: Tensor, k: Tensor) -> Tensor:
    """Softmax attention's matrix (B, H, Nq, N), outside of autocast."""
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)


def weights_loss(attn: Attention, softmax: Attention, h: Tensor, *layout: Any) -> Tensor:
    """Soft cross-entropy between attention matrices, ``-sum_j A_ij log B_ij``, the mean over images, heads and queries.

    What Hedgehog is distilled by (Zhang et al. 2024, section 4). A is softmax attention's. Both exist for a few
    queries at a time only, in the backward pass too; the cost is quadratic in tokens all the same.

    Args:
        attn: attention with a method ``weights``.
        softmax: its frozen twin.
        h: their input (B, N, C).
        layout: as of `AdaLAViT.layout`.
    """
    q, k, _ = (x.float() for x in attn.turned(h, *layout))
    with torch.no_grad():
        wanted_q, wanted_k, _ = (x.float() for x in softmax.turned(h, *layout))

    def part(q: Tensor, k: Tensor, wanted_q: Tensor) -> Tensor:
        return -(softmax_weights(wanted_q, wanted_k) * attn.weights(q, k).clamp_min(1e-12).log()).sum()

    total = sum(checkpoint(part, some, k, wanted, use_reentrant=False)
                for some, wanted in zip(q.split(QUERIES, dim=2), wanted_q.split(QUERIES, dim=2), strict=True))
    return total / q[..., 0].numel()


class _Differentiated(torch.autograd.Function):
    """A loss whose gradients are known already: the backward pass only hands them on, scaled by what comes from above.

    To DDP, gradient accumulation and loss scaling it looks like any other loss.
    """

    @staticmethod
    def forward(ctx, loss: Tensor, grads: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    def backward(ctx, above: Tensor):
        grads, ctx.grads = ctx.grads, None
        return None, None, *(grad.mul_(above) for grad in grads)  # ours alone: no second copy of them


def differentiate(loss: Tensor, parameters: list[Tensor], scale: float) -> Tensor:
    """``loss`` with its gradients taken on the spot, so that nothing of its graph lives on.

    Args:
        loss: a scalar that depends on ``parameters``.
        scale: factor of the loss while it is differentiated, in case half precision is involved; exact if a power of 2.
    """
    with torch.autocast(loss.device.type, enabled=False):  # as for any backward pass
        grads = torch.autograd.grad(loss * scale, parameters, allow_unused=True)
    # Not in place: autograd may hand out one tensor for two parameters, or one number for all elements of one.
    grads = [torch.zeros_like(p) if g is None else g.div(scale) for p, g in zip(parameters, grads, strict=True)]
    return _Differentiated.apply(loss.detach(), grads, *parameters)


def settle(loss: Tensor, attn: Attention, got: Tensor) -> Tensor:
    """``loss`` of an attention's output ``got``, with the gradients of what the attention learns taken on the spot."""
    parameters = [parameter for parameter in attn.parameters() if parameter.requires_grad]
    if not (parameters and torch.is_grad_enabled()):
        return loss.detach()
    # A mean over so many elements vanishes in float16, their sum may overflow in it: halfway between.
    scale = 2.0 ** round(math.log2(got.numel() / math.sqrt(got[..., 0].numel())))
    return differentiate(loss, parameters, scale)


@contextmanager
def compared(pairs: Iterable[tuple[nn.Module, nn.Module]],
             compare: Callable[[nn.Module, Any, Any], Tensor]) -> Iterator[list[Tensor]]:
    """While it is open, each softmax attention that runs shows its input to the linear one that replaces it.

    Args:
        pairs: (linear, softmax) attentions. Compiled ones do not look at hooks that come later, and report nothing.
        compare: is given the linear attention, its output for that input, and the softmax attention's. What it returns
            joins the list that this gives.
    """
    found, learning = [], torch.is_grad_enabled()

    def report_to(linear: nn.Module) -> Callable:
        def report(softmax: nn.Module, args: tuple, kwargs: dict, wanted: Any) -> None:
            with torch.set_grad_enabled(learning):
                found.append(compare(linear, linear(*args, **kwargs), wanted))
        return report

    with ExitStack() as hooks:
        for linear, softmax in pairs:
            hooks.callback(softmax.register_forward_hook(report_to(linear), with_kwargs=True).remove)
        yield found


def attention_mse(student: nn.Module, teacher: nn.Module) -> AbstractContextManager[list[Tensor]]:
    """The loss of stage 1 beside any other: while it is open, the teacher's blocks report to the student's.

    Whenever the teacher runs, each of its attentions that the student has replaced shows its input to the student's
    (`compared`), their `mean_squared_error` is differentiated on the spot, and the loss joins the list.

    Costs one more pass through the student's attentions, forward and backward (a third of its blocks, about), with the
    activations of one block in memory at a time, and their gradients a second time. The teacher's blocks must not be
    compiled: compiled ones do not look at hooks that come later.

    Args:
        student, teacher: ViTs with ``blocks`` as `AdaLAViT` has them, as many in both; all blocks of the teacher have
            softmax attention.

    Raises:
        ValueError: if the parameters of the student are sharded: single attentions are run here, and FSDP gathers
            whole blocks.
    """
    if any(isinstance(parameter, DTensor) for parameter in student.parameters()):
        raise ValueError('attention_weight needs whole parameters, and ShardedRunner has sharded them: use DDP (no '
                         'runner_type), or attention_weight=0')
    pairs = [(block.attn, twin.attn) for block, twin in zip(student.blocks, teacher.blocks, strict=True)
             if not block.attn.is_softmax]
    return compared(pairs, lambda attn, got, wanted: settle(mean_squared_error(got, wanted), attn, got))


@torch.no_grad()
def _run_teacher(block: nn.Module, softmax: Attention, x: Tensor,
                 *layout: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A block with its softmax attention: what that reads, writes before and after its projection, and the next x."""
    h = block.norm1(x)
    heads = softmax.attend(h, *layout)
    attended = softmax.proj(heads)
    return h, heads, attended, block.add_residuals(x, attended)


@MODELS.register_module()
class AttentionAlignment(Alignment):
    """Attention alignment (ViT-AdaLA section 3.2, eq. 3).

    ``loss = 1/L sum_l mean_{n,c} (linear_l(h_l) - softmax_l(h_l))^2`` with ``h_l = norm1_l(x_l)`` and x_l the stream
    of the *softmax* ViT; `mean_squared_error` is the term of a block. Every block sees exactly what it saw in
    pretraining, so blocks learn independently. Only the query, key and value projections train, and what a variant adds
    to them; the rest is the frozen teacher itself.
    The backbone's ``trainable`` narrows that down (``feature_map`` for the native recipes of Hedgehog and LoLCATS).

    One network serves as both: the backbone has its final linear attentions, and the softmax attentions they replace
    stand beside it, a third more block weights instead of a second ViT. Blocks that keep softmax attention (hybrids)
    have nothing to learn and count in neither loss nor L.

    Blocks being independent, each is differentiated before the next is run: memory for activations is that of one
    block, however deep the network. Rotary positions are those of evaluation, for both attentions of a block.

    Args:
        backbone: the linear ViT, with ``init_cfg`` naming the pretrained *softmax* checkpoint.
        target: ``output`` compares after the output projection (Y = softmax attention module's output, our reading of
            eq. 3 and that of follow-up work), ``heads`` before it, ``weights`` the attention matrices (`weights_loss`),
            of which values learn nothing: it needs a ``trainable`` that leaves ``qkv`` out. So does ``heads`` for what
            an attention has behind its projection.
        head, data_preprocessor: see `Alignment`.

    Logs ``rel_error``, the mean over blocks of ``||linear - softmax|| / ||softmax||``, and ``rel_error_worst``, the
    largest of them; all are in ``block_errors`` until the next batch.

    Raises:
        ValueError: for an unknown ``target``, ``weights`` of an attention that cannot show them, a ``target`` that is
            blind to something that would learn, a backbone of softmax blocks only or compiled to CUDA graphs, or a
            ``trainable`` that leaves nothing to learn; before the first loss or score, if the backbone around its
            attentions is not that of its ``init_cfg``.
    """

    def __init__(self, backbone: dict, target: str = 'output', head: dict | None = None,
                 data_preprocessor: dict | None = None) -> None:
        super().__init__(backbone, head, data_preprocessor)
        if target not in TARGETS:
            raise ValueError(f'unknown target {target!r}; choose one of {", ".join(TARGETS)}')
        self.target = target
        self.softmax_config = dict(backbone, attention=dict(type='adala_mm.SoftmaxAttention'), trainable=None)
        learners = {f'blocks.{i}.attn.': block.attn for i, block in enumerate(self.backbone.blocks)
                    if not block.attn.is_softmax}
        if not learners:
            raise ValueError('every block of the backbone has softmax attention: there is nothing to align. Give it a '
                             'linear attention')
        for attn in learners.values():
            if target == 'weights' and not hasattr(attn, 'weights'):
                raise ValueError(f"target='weights' compares attention matrices, and {type(attn).__name__} has no "
                                 "method weights(q, k) that shows its own; use target='output' or 'heads'")
        for name, parameter in self.backbone.named_parameters():
            learns = name.startswith(tuple(learners)) and '.attn.proj.' not in name
            parameter.requires_grad_(parameter.requires_grad and learns)
            if target == 'weights' and parameter.requires_grad and VALUES.search(name):
                raise ValueError(f"target='weights' does not read values, and {name} would learn: on them weight decay "
                                 "would act alone. Let the backbone's trainable leave it out, as 'feature_map' does")
        for prefix, attn in learners.items() if target == 'heads' else ():
            late = tuple(prefix + name for name in attn.after_proj)
            for name, parameter in self.backbone.named_parameters():
                if parameter.requires_grad and name.startswith(late):
                    raise ValueError(f"target='heads' compares before the output projection, and {name} comes after "
                                     "it: on it weight decay would act alone. Use target='output', or let the "
                                     "backbone's trainable leave it out")
        if not any(parameter.requires_grad for parameter in self.backbone.parameters()):
            raise ValueError(f'trainable={self.backbone.trainable!r} leaves nothing to learn: in stage 1 only '
                             'attentions do, without their output projections')
        self.run_teacher = _run_teacher
        mode = self.backbone.compile_mode
        if mode in CUDA_GRAPH_MODES:
            raise ValueError(f'backbone.compile={mode!r} records a CUDA graph of all blocks, and stage 1 runs them one '
                             "by one: use compile=True, or 'max-autotune-no-cudagraphs'")
        if mode:
            self.run_teacher = torch.compile(_run_teacher, mode=mode)
            for attn in learners.values():
                attn.compile(mode=mode)
        self.freeze('attentions', nn.ModuleList(self._softmax_twin(block.attn) for block in self.backbone.blocks))
        self.borrowed: dict[str, Tensor] = {}  # what the teacher shares with the student, as pretrained, until checked

    @staticmethod
    def _softmax_twin(attn: nn.Module) -> nn.Module:
        dim = attn.proj.in_features
        return build_attention(dict(type='adala_mm.SoftmaxAttention'), dim, attn.num_heads,
                               qkv_bias=attn.qkv.bias is not None)

    def load_teacher(self) -> None:
        # From the checkpoint and not from the student's projections, which a resumed run has trained already.
        self.require_pretrained('backbone', self.backbone)
        pretrained = MODELS.build(self.softmax_config)
        pretrained.init_weights()
        for twin, block in zip(self.frozen['attentions'], pretrained.blocks, strict=True):
            twin.load_state_dict(block.attn.state_dict())
        self.borrowed = self._sample(pretrained)

    @staticmethod
    def _sample(vit: nn.Module) -> dict[str, Tensor]:
        """Copies of some elements of every tensor outside the attentions, float32 on the CPU."""
        return {key: value.flatten()[::max(1, value.numel() // SAMPLE)][:SAMPLE].float().cpu().clone()
                for key, value in vit.state_dict().items() if '.attn.' not in key}

    def check_borrowed(self) -> None:
        """ValueError if the teacher's norms, MLPs and embeddings, which are the student's, are not as pretrained.

        The state dicts of all stages have the same keys: nothing else tells a checkpoint of stage 2.
        """
        if not self.borrowed:
            return
        for key, value in self._sample(self.backbone).items():
            wanted = self.borrowed[key]
            # Half precision rounds to within 0.4 %.
            if (value - wanted).abs().max() > 0.01 * wanted.abs().max():
                raise ValueError(f'{key} is not what {self.backbone.init_cfg["checkpoint"]} has, and stage 1 trains '
                                 'attentions only: a checkpoint of another stage, or of another init_cfg, was loaded. '
                                 'Test it with its own config; to train, leave load_from and resume out')
        self.borrowed = {}

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = 'tensor'):
        if mode in ('loss', 'predict'):
            self.prepare_teacher()
            self.check_borrowed()
        return super().forward(inputs, data_samples, mode)

    def train(self, mode: bool = True) -> AttentionAlignment:
        """Only the attentions that learn follow ``mode``; the stream stays the teacher's (no drop path)."""
        super().train(mode)
        self.backbone.eval()
        for block in self.backbone.blocks:
            if not block.attn.is_softmax:
                block.attn.train(mode)
        return self

    def loss(self, images: Tensor) -> dict[str, Tensor]:
        vit, losses, errors = self.backbone, [], []
        with torch.no_grad():
            x, hw = vit.embed(images)
            layout = vit.layout(x, hw)
        for block, softmax in zip(vit.blocks, self.frozen['attentions'], strict=True):
            h, heads, attended, x = self.run_teacher(block, softmax, x, *layout)
            if block.attn.is_softmax:
                continue
            wanted = attended if self.target == 'output' else heads
            with torch.set_grad_enabled(self.target != 'weights' and torch.is_grad_enabled()):
                got = (block.attn if self.target == 'output' else block.attn.attend)(h, *layout)
            loss = (weights_loss(block.attn, softmax, h, *layout) if self.target == 'weights' else
                    mean_squared_error(got, wanted))
            errors.append(relative_error(got, wanted))
            losses.append(settle(loss, block.attn, got))
        errors = self.block_errors = torch.stack(errors)
        return {'loss': torch.stack(losses).mean(), 'rel_error': errors.mean(), 'rel_error_worst': errors.max()}

    @torch.no_grad()
    def teacher_features(self, images: Tensor) -> Tensor:
        vit = self.backbone
        x, hw = vit.embed(images)
        layout = vit.layout(x, hw)
        for block, softmax in zip(vit.blocks, self.frozen['attentions'], strict=True):
            x = block.add_residuals(x, softmax(block.norm1(x), *layout))
        return vit.norm(x)
