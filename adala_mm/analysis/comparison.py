"""Students beside their teacher, block by block, on the same images."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from adala_mm.analysis.attention_maps import attention_entropy
from adala_mm.analysis.networks import Network
from adala_mm.analysis.similarity import MinibatchCKA, knn_agreement, probe_agreement
from adala_mm.models.backbones import AdaLAViT
from adala_mm.models.backbones.vit import pooled

PATCHES = 64  # of each image that the linear probe sees
SMALLEST = 4  # images in a batch that the unbiased estimate of CKA needs


class Sums:
    """Numbers that are added up over batches, by name; divided by each other in the end."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            self.values[name] = self.values.get(name, 0.0) + float(value)

    def distance(self, name: str) -> float:
        """``||a - b|| / ||b||`` from sums of squares ``<name>_error`` and ``<name>_energy``."""
        return (self.values[f'{name}_error'] / max(self.values[f'{name}_energy'], 1e-12)) ** 0.5


def squares(ours: Tensor, theirs: Tensor, name: str) -> dict[str, Tensor]:
    ours, theirs = ours.float(), theirs.float()
    return {f'{name}_error': (ours - theirs).square().sum(dtype=torch.float64),
            f'{name}_energy': theirs.square().sum(dtype=torch.float64)}


def cosine(ours: Tensor, theirs: Tensor) -> Tensor:
    """Sum over images of the mean over tokens."""
    return torch.cosine_similarity(ours.float(), theirs.float(), dim=-1).mean(dim=1).sum()


class Block:
    """What is known of one block of one student."""

    def __init__(self) -> None:
        self.sums = Sums()
        self.cka = MinibatchCKA()
        self.entropy: Tensor | None = None

    def see_entropy(self, entropy: Tensor | None, count: int) -> None:
        if entropy is not None:
            self.entropy = count * entropy.cpu() + (0 if self.entropy is None else self.entropy)

    def scores(self, images: int) -> dict:
        heads = None if self.entropy is None else (self.entropy / images).tolist()
        return dict(entropy=heads and sum(heads) / len(heads), entropy_of_heads=heads)


class Comparison:
    """Runs students in step with their teacher and keeps sums, so that any number of images fits into memory.

    Of each block, with the features f = norm(x) and f' = norm'(x') that `AdaLAViT` returns for it: streams x of the
    teacher and x' of the student after the block and the network's final LayerNorm, without which a stream's scale,
    that no later layer sees, would count:

    ==================  ===============================================================================================
    rel_error           ``||f' - f|| / ||f||``: how errors accumulate over depth, the last one being that of the network
    cosine              mean over tokens of the cosine between f' and f
    block_error         the same error if the student's block gets the teacher's stream: what this block does by itself
    attention_error     the same of the attention's output after its projection, given the teacher's stream: what stage
                        1 makes small, its ``rel_error``
    cka                 `MinibatchCKA` of f' and f
    entropy             `attention_entropy` on the own stream, mean over heads; ``entropy_of_heads`` each of them
    ==================  ===============================================================================================

    Errors are over all tokens, class and register tokens included, of all images together.

    Args:
        teacher, students: alike in width, depth, patch and prefix tokens.
        entropy: whether to look at attention maps, in time quadratic in tokens.
    """

    def __init__(self, teacher: Network, students: Sequence[Network], entropy: bool = True) -> None:
        self.teacher, self.students, self.entropy = teacher, students, entropy
        self.images = 0
        depth = len(teacher.model.blocks)
        self.blocks = [[Block() for _ in range(depth)] for _ in students]
        self.teacher_blocks = [Block() for _ in range(depth)]
        self.features: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(len(students) + 1)]  # the teacher's last

    @torch.no_grad()
    def update(self, images: Sequence[Tensor]) -> None:
        """Adds a batch.

        Args:
            images: the same images (B, 3, H, W) as each network wants them, the teacher's first.
        """
        vit, own = self.teacher.model, [student.model for student in self.students]
        x, hw = vit.embed(images[0])
        streams = [model.embed(image)[0] for model, image in zip(own, images[1:], strict=True)]
        count, layout = len(x), vit.layout(x, hw)
        layouts = [model.layout(x, hw) for model in own]
        for i, block in enumerate(vit.blocks):
            h = block.norm1(x)
            attended = block.attn(h, *layout)
            x_next = block.add_residuals(x, attended)
            features = vit.norm(x_next)
            if self.entropy:
                self.teacher_blocks[i].see_entropy(attention_entropy(block.attn, h, *layout), count)
            for s, (model, own_layout) in enumerate(zip(own, layouts, strict=True)):
                twin, seen = model.blocks[i], self.blocks[s][i]
                local = twin.attn(twin.norm1(x), *own_layout)
                seen.sums.add(**squares(local, attended, 'attention'),
                              **squares(model.norm(twin.add_residuals(x, local)), features, 'block'))
                if self.entropy:
                    seen.see_entropy(attention_entropy(twin.attn, twin.norm1(streams[s]), *own_layout), count)
                streams[s] = twin(streams[s], *own_layout)
                tokens = model.norm(streams[s])
                seen.sums.add(**squares(tokens, features, 'stream'), cosine=cosine(tokens, features))
                if count >= SMALLEST:
                    seen.cka.update(tokens, features)
            x = x_next
        for which, (model, stream) in enumerate(zip((*own, vit), (*streams, x), strict=True)):
            self.keep(which, model, model.norm(stream))
        self.images += count

    def keep(self, which: int, model: AdaLAViT, tokens: Tensor) -> None:
        patches = tokens[:, model.num_prefix:]
        some = torch.linspace(0, patches.shape[1] - 1, min(PATCHES, patches.shape[1])).round().long()
        whole = pooled(tokens, model.num_prefix, model.class_token)
        self.features[which].append((whole.float().cpu(), patches[:, some].float().cpu()))

    def results(self, k: Sequence[int], clusters: int) -> dict:
        """All scores as plain values: ``teacher`` and ``students``.

        Args:
            k: numbers of neighbours of `knn_agreement`.
            clusters: of `probe_agreement`, which is fitted to the patches of every other image.

        Raises:
            ValueError: if there are too few images for either.
        """
        pools, patches = zip(*((torch.cat(a), torch.cat(b)) for a, b in (zip(*f, strict=True) for f in self.features)),
                             strict=True)
        fit = np.repeat(np.arange(self.images) % 2 == 0, patches[-1].shape[1])
        flat = [part.flatten(0, 1).numpy() for part in patches]
        rows = []
        for s, student in enumerate(self.students):
            blocks = [dict(rel_error=b.sums.distance('stream'), cosine=b.sums.values['cosine'] / self.images,
                           block_error=b.sums.distance('block'), attention_error=b.sums.distance('attention'),
                           cka=b.cka.value(), **b.scores(self.images)) for b in self.blocks[s]]
            rows.append(dict(name=student.name, rel_error=blocks[-1]['rel_error'], cosine=blocks[-1]['cosine'],
                             knn={str(n): knn_agreement(pools[s], pools[-1], n) for n in k},
                             probe=probe_agreement(flat[s], flat[-1], fit, clusters), blocks=blocks))
        teacher = dict(name=self.teacher.name, blocks=[b.scores(self.images) for b in self.teacher_blocks])
        return dict(teacher=teacher, students=rows)
