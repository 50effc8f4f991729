"""Tables of the measurements of tools/analysis_tools: the tools print them, and the pages have them."""
from __future__ import annotations

from adala_mm.utils.tables import markdown_table


def speedup(baseline: float, own: float) -> str:
    """Time of the baseline divided by the own time, as text, which says so if the own one is slower."""
    text = f'{baseline / own:.2f}x'
    return f'{text}, slower' if float(text[:-1]) < 1 else text


def attention_speed_table(data: dict) -> str:
    """What benchmark_attention.py found: one row per pass, shape and length, one column per competitor."""
    names = list(dict.fromkeys(row['name'] for row in data['rows']))
    passes = list(dict.fromkeys(row['pass'] for row in data['rows']))
    shapes = list(dict.fromkeys(shape_of(row) for row in data['rows']))
    cells = {(row['pass'], *shape_of(row), row['tokens'], row['name']): row for row in data['rows']}
    table = []
    for key in sorted(dict.fromkeys(key[:-1] for key in cells), key=lambda key: (passes.index(key[0]), *key[1:])):
        own, sdpa = (cells.get((*key, name), {}) for name in ('ours', 'sdpa'))
        texts = [time_cell(cells[(*key, name)], sdpa) if (*key, name) in cells else '' for name in names]
        share = [f'{own["gb_per_s"]:.1f}', f'{100 * own["copy_share"]:.0f} %'] if 'ms' in own else ['', '']
        memory = ' / '.join(f'{row["mib"]:,.1f}' if 'mib' in row else '-' for row in (own, sdpa))
        shape = [' x '.join(map(str, key[1:-1]))] * (len(shapes) > 1)
        table.append([key[0], *shape, f'{key[-1]:,}', *texts, *share, memory])
    shape = ['images x heads x channels'] * (len(shapes) > 1)
    return markdown_table(['pass', *shape, 'tokens', *names, 'ours, GB/s', 'of a copy', 'MiB, ours / sdpa'], table)


def shape_of(row: dict) -> tuple[int, ...]:
    """Images, heads and channels of a head; earlier records have those of all rows in their settings."""
    return tuple(row[name] for name in ('batch', 'heads', 'dim') if name in row)


def time_cell(row: dict, baseline: dict) -> str:
    if 'ms' not in row:
        return row['note']
    text = f'{row["ms"]:.3g} ms' if row['ms'] < 1000 else f'{row["ms"]:,.0f} ms'
    if row.get('backend') and row is baseline:
        text += f' ({row["backend"]})'
    return f'{text}, {speedup(baseline["ms"], row["ms"])}' if 'ms' in baseline and row is not baseline else text


def check_table(data: dict) -> str:
    """What check_kernels.py found: one row per case."""
    return markdown_table(
        ['core', 'dtype', 'channels', 'tokens', 'error', 'of the gradient', 'bound', 'NaN stays NaN', ''],
        [[row['name'], row['dtype'], str(row['dim']), f'{row["tokens"]:,}',
          *(f'{row[name]:.1e}' if name in row else '' for name in ('error', 'gradient_error', 'bound')),
          {True: 'yes', False: 'no'}.get(row.get('nan_stays'), ''), row.get('note', '')] for row in data['rows']])


def model_speed_table(data: dict) -> str:
    """What benchmark_model.py found: one row per ViT, image size, mode and attention; then where linear gets faster."""
    batches = any('best_batch' in row for row in data['rows'])
    table = []
    for row in data['rows']:
        cells = [f'ViT-{row["arch"]}', str(row['size']), row['mode'], row['attention'].removesuffix('Attention'),
                 f'{row["softmax_blocks"]} / {row["linear_blocks"]}']
        if 'ms' in row:
            cells += [f'{row["ms"]:.1f}', f'{1000 / row["ms"]:.2f}', against(row), f'{row["mib"]:,.0f}']
        else:
            cells += [row['note'], '', '', '']
        cells += [f'{row["gmac"]:.1f}', f'{row["parameters"] / 1e6:.1f}']
        if batches:
            cells += [str(row['best_batch']), f'{row["best_images_per_s"]:.2f}'] if 'best_batch' in row else ['', '']
        table.append(cells)
    header = ['model', 'pixels', 'mode', 'attention', 'softmax / linear blocks', 'ms', 'images/s', 'against softmax',
              'peak MiB', 'GMAC', 'M parameters']
    lines = [f'- {line}' for line in crossovers(data['rows'])]
    return '\n'.join([markdown_table(header + (['best batch', 'images/s with it'] if batches else []), table), '',
                      *lines])


def against(row: dict) -> str:
    if row['attention'] == 'SoftmaxAttention':
        return '1'
    return speedup(row['softmax_ms'], row['ms']) if row.get('softmax_ms') else ''


def crossovers(rows: list[dict]) -> list[str]:
    """Per ViT, mode and attention: the smallest measured size from which on it is faster than softmax."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if row.get('softmax_ms') and row['attention'] != 'SoftmaxAttention':
            groups.setdefault((row['arch'], row['mode'], row['attention']), []).append(row)
    lines = []
    for (arch, mode, attention), found in groups.items():
        found = sorted(found, key=lambda row: row['size'])
        slower = [row['size'] for row in found if row['ms'] >= row['softmax_ms']]
        faster = [row['size'] for row in found if row['size'] > max(slower, default=0)]
        what = (f'faster than softmax from {faster[0]} pixels on' if slower else 'faster at every measured size'
                ) if faster else 'slower at the largest measured size' if len(slower) < len(found) else (
                    'slower at every measured size')
        lines.append(f'ViT-{arch}, {mode}, {attention.removesuffix("Attention")}: {what}')
    return lines


def head_share_table(data: dict) -> str:
    """What benchmark_model.py --configs found: of each segmentor and size the whole, and the share of each part."""
    parts = ['backbone', 'neck', 'pixel decoder', 'head']
    kinds = dict(gmac='{:,.1f} GMAC', seconds='{:,.2f} s of CPU')
    rows = sorted(((kind, row) for row in data['rows'] for kind in kinds if kind in row),
                  key=lambda found: list(kinds).index(found[0]))
    return markdown_table(
        ['config', 'softmax / linear blocks', 'pixels', 'whole', *parts, 'all but the backbone'],
        [[f'`{row["config"]}`', f'{row.get("softmax_blocks", "")} / {row.get("linear_blocks", "")}', f'{row["size"]:,}',
          kinds[kind].format(whole := sum(row[kind].values())),
          *(percent(row[kind][part] / whole) if part in row[kind] else '' for part in parts),
          percent(1 - row[kind]['backbone'] / whole)] for kind, row in rows])


def percent(share: float) -> str:
    return f'{100 * share:.0f} %' if share >= 0.095 else f'{100 * share:.1f} %'


def training_speed_table(data: dict) -> str:
    """What benchmark_training.py found: one row per stage and version."""
    table = []
    for row in data['rows']:
        baseline = next(other for other in data['rows'] if other['stage'] == row['stage'])  # the first
        cells = [str(row['stage']), row['version']]
        if 'ms' not in row:
            table.append([*cells, row['note'], '', '', ''])
            continue
        ratios = [speedup(baseline['ms'], row['ms']), f'{row["mib"] / baseline["mib"]:.2f}'
                  ] if 'ms' in baseline and row is not baseline else ['', '']
        batch = row.get('batch') or data['settings']['batch']  # earlier records have it in their settings
        table.append([*cells, f'{1000 * batch / row["ms"]:.2f}', ratios[0], f'{row["mib"]:,.0f}',
                      ratios[1]])
    return markdown_table(['stage', 'version', 'images/s', 'against straightforward', 'peak MiB', 'of straightforward'],
                          table)


def depth_table(data: dict) -> str:
    """Memory of a step of stage 1, by depth of the ViT."""
    versions = list(dict.fromkeys(row['version'] for row in data['depths']))
    kinds = dict(held_mib='weights and optimizer', step_mib='step')
    cells = {(row['depth'], row['version']): row for row in data['depths']}
    return markdown_table(
        ['blocks', *(f'{version}: {kind}, MiB' for version in versions for kind in kinds.values())],
        [[str(depth), *(f'{cells[depth, version][key]:,.0f}' for version in versions for key in kinds)]
         for depth in sorted({key[0] for key in cells})])
