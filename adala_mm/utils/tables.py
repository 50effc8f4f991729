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


def attention_table(data: dict) -> str:
    """What tools/compare_attentions.py found: one row per attention, best first; seeds are averaged."""
    softmax, rows = data['costs']['SoftmaxAttention'], {}
    for row in data['rows']:
        rows.setdefault(row['name'], []).append(row)

    def mean(name: str, key: str) -> list[float]:
        return [sum(values) / len(values) for values in zip(*(row[key] for row in rows[name]), strict=True)]

    def cost(name: str) -> list[str]:
        own = data['costs'][name]
        return [f'{own["ms"] / softmax["ms"]:.2f}', f'{own["mib"] / softmax["mib"]:.2f}', f'{own["gmac"]:.2f}',
                f'{own["parameters"]:,}']

    table = [['softmax (teacher)', *[f'{data["teacher"]:.2f}'] * 3, '0', *cost('SoftmaxAttention')]]
    for name in sorted(rows, key=lambda name: -mean(name, 'miou')[-1]):
        scores = [f'{value:.2f}' for value in mean(name, 'miou')]
        errors = ' / '.join(f'{value:.2f}' for value in mean(name, 'rel_error'))
        table.append([name.removesuffix('Attention'), *scores, errors, *cost(name)])
    return markdown_table(['attention', 'mIoU: swap', 'stage 1', 'stage 1 + 2', 'feature error', 'time', 'memory',
                           'GMAC', 'extra parameters'], table)
