"""Draws docs/images/stages.svg, the diagram of docs/method.md.

    python maintenance/draw_stages.py [FILE]
"""
from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

FROZEN, LEARNS, PLAIN, LOSS = '#d6e4f0', '#fbd9b5', '#f0f0f0', '#b03a2e'


def box(ax: Axes, x: float, y: float, text: str, colour: str, width: float = 2.3, height: float = 0.62) -> None:
    """A box around its middle."""
    ax.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, facecolor=colour, edgecolor='#555555',
                                linewidth=0.9, boxstyle='round,pad=0,rounding_size=0.1'))
    ax.text(x, y, text, ha='center', va='center', fontsize=9, linespacing=1.25)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = '#333333',
          both: bool = False) -> None:
    ax.annotate('', end, start, arrowprops=dict(arrowstyle='<->' if both else '->', color=colour, lw=1.2, shrinkA=0,
                                                shrinkB=0))


def panel(fig, number: int, title: str, below: str) -> Axes:
    ax = fig.add_subplot(1, 3, number)
    ax.set(xlim=(0, 6), ylim=(-0.75, 6.3))
    ax.axis('off')
    ax.text(3, 6.1, title, ha='center', va='center', fontsize=11, weight='bold')
    ax.text(3, -0.5, below, ha='center', va='center', fontsize=8.5, color='#333333', linespacing=1.35)
    return ax


def attention_alignment(fig) -> None:
    ax = panel(fig, 1, 'Stage 1: attention alignment', 'one block of L; images without labels')
    box(ax, 1.7, 0.4, 'stream of the softmax ViT', PLAIN, width=3.2)
    box(ax, 1.7, 1.6, 'LayerNorm', FROZEN)
    box(ax, 1.7, 3.0, 'softmax attention', FROZEN)
    box(ax, 1.7, 5.1, 'rest of the block', FROZEN)
    box(ax, 4.7, 3.0, 'linear attention\n(q, k, v learn)', LEARNS)
    arrow(ax, (1.7, 0.71), (1.7, 1.29))
    arrow(ax, (1.7, 1.91), (1.7, 2.69))
    arrow(ax, (1.7, 3.31), (1.7, 4.79))
    ax.plot([1.7, 4.7], [2.3, 2.3], color='#333333', lw=1.2)
    arrow(ax, (4.7, 2.3), (4.7, 2.69))
    ax.text(1.5, 2.3, '$h_l$', ha='right', va='center', fontsize=10)
    ax.text(1.5, 4.2, '$Y_l$', ha='right', va='center', fontsize=10)
    ax.plot([4.7, 4.7], [3.31, 4.05], color='#333333', lw=1.2)
    arrow(ax, (1.75, 4.05), (4.7, 4.05), LOSS, both=True)
    ax.text(3.3, 4.3, 'mean squared error', ha='center', va='center', fontsize=9, color=LOSS)


def feature_alignment(fig) -> None:
    ax = panel(fig, 2, 'Stage 2: feature alignment', 'images without labels')
    box(ax, 3.0, 0.4, 'image', PLAIN)
    for x, kind, colour in ((1.5, 'softmax', FROZEN), (4.5, 'linear', LEARNS)):
        box(ax, x, 1.75, 'patch embedding', colour)
        box(ax, x, 3.0, f'L blocks with\n{kind} attention', colour)
        box(ax, x, 4.2, 'last LayerNorm', colour)
        arrow(ax, (3.0, 0.71), (x, 1.44))
        arrow(ax, (x, 2.06), (x, 2.69))
        arrow(ax, (x, 3.31), (x, 3.89))
        ax.plot([x, x], [4.51, 5.2], color='#333333', lw=1.2)
    arrow(ax, (1.5, 5.2), (4.5, 5.2), LOSS, both=True)
    ax.text(3.0, 5.45, 'scaled mean squared error', ha='center', va='center', fontsize=9, color=LOSS)
    ax.text(1.3, 4.85, '$F$', ha='right', va='center', fontsize=10)
    ax.text(4.7, 4.85, r'$\hat{F}$', ha='left', va='center', fontsize=10)


def fine_tuning(fig) -> None:
    ax = panel(fig, 3, 'Stage 3: fine-tuning', 'images with labels')
    box(ax, 3.0, 0.4, 'image', PLAIN)
    box(ax, 3.0, 1.75, 'linear ViT of stage 2\n(learning rate × 0.1)', LEARNS, width=2.9, height=0.75)
    box(ax, 3.0, 3.4, 'head of the task', LEARNS, width=2.9)
    arrow(ax, (3.0, 0.71), (3.0, 1.37))
    arrow(ax, (3.0, 2.13), (3.0, 3.09))
    arrow(ax, (3.0, 3.71), (3.0, 5.2), LOSS)
    ax.text(3.0, 5.45, 'loss of the task against labels', ha='center', va='center', fontsize=9, color=LOSS)


def draw(path: Path) -> None:
    plt.rcParams.update({'svg.hashsalt': 'adala_mm', 'font.family': 'DejaVu Sans'})
    fig = plt.figure(figsize=(11, 4.7), facecolor='white')
    for stage in (attention_alignment, feature_alignment, fine_tuning):
        stage(fig)
    fig.subplots_adjust(left=0.005, right=0.995, top=1, bottom=0.06, wspace=0.02)
    for x, colour, text in ((0.4, FROZEN, 'frozen'), (0.52, LEARNS, 'learns')):
        fig.add_artist(FancyBboxPatch((x, 0.022), 0.018, 0.032, boxstyle='round,pad=0,rounding_size=0.004',
                                      facecolor=colour, edgecolor='#555555', linewidth=0.9, transform=fig.transFigure))
        fig.text(x + 0.026, 0.038, text, va='center', fontsize=9)
    fig.savefig(path, dpi=110, metadata={'Date': None} if path.suffix == '.svg' else None)


if __name__ == '__main__':
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / 'docs/images/stages.svg')
