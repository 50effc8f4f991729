"""Markdown tables of recorded results, for reports and for the docs."""
from __future__ import annotations


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; cells are put in as they are."""
    lines = [f'| {" | ".join(cells)} |' for cells in (header, *rows)]
    return '\n'.join([lines[0], '|' + '---|' * len(header), *lines[1:]])


def ablation_table(rows: list[dict]) -> str:
    """The ablation of ViT-AdaLA's Table 3, as the demo records it: one row per way to a linear backbone."""
    return markdown_table(
        ['backbone', 'softmax / linear blocks', 'mIoU as is', 'of teacher', 'mIoU after stage 3', 'of teacher'],
        [[r['name'], f'{r["softmax_blocks"]} / {r["linear_blocks"]}', f'{r["as_is"]:.2f}', f'{r["as_is_kept"]:.1f} %',
          f'{r["tuned"]:.2f}', f'{r["tuned_kept"]:.1f} %'] for r in rows])
