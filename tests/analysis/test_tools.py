"""The tools that compare networks: what they write, and what they refuse."""
from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from adala_mm import analysis
from adala_mm.analysis.images import named_images
from adala_mm.utils.cost import multiply_adds
from adala_mm.utils.pictures import picture_grid
from helpers.analysis import COUNT, TOOLS, compared, load, pixels, refused


def provenance(data: dict, names: list[str]) -> None:
    assert [network['name'] for network in data['networks']] == names
    assert all(re.fullmatch('[0-9a-f]{64}', network['sha256']) for network in data['networks'])
    assert data['versions']['torch'] and data['machine']['device'] and 'commit' in data['source']


# --- tools


def test_evaluate_alignment(world, tool, tmp_path):
    out = tool('evaluate_alignment', f'swap={world["stage1"]}', f'near={world["stage2"]}:{world["near"]}',
               '--k', 1, 3, '--clusters', 4, '--batch-size', 7, '--out', tmp_path)
    data = json.loads((tmp_path / 'alignment.json').read_text())
    provenance(data, ['teacher', 'swap', 'near'])
    direct, _ = compared(world, 'swap={stage1}', 'near={stage2}:{near}', size=7)
    for row, wanted in zip(data['students'], direct['students'], strict=True):
        assert row['blocks'][1]['rel_error'] == pytest.approx(wanted['blocks'][1]['rel_error'], rel=1e-4)
        assert row['probe'] == pytest.approx(wanted['probe'])
    assert len(data['images']) == COUNT and data['settings']['size'] == [32, 32]
    assert '| near |' in out and f'{data["students"][0]["rel_error"]:.3f}' in out
    pixels(tmp_path / 'alignment.png')
    message = refused(tool, 'evaluate_alignment', world['stage1'], '--out', tmp_path)
    assert 'alignment.json is there already: say --overwrite' in message
    tool('evaluate_alignment', world['stage1'], '--k', 1, '--clusters', 2, '--no-entropy', '--out', tmp_path,
         '--overwrite', '--size', 40, 24)
    data = json.loads((tmp_path / 'alignment.json').read_text())
    assert data['settings']['size'] == [40, 24] and data['teacher']['blocks'][0]['entropy'] is None
    pixels(tmp_path / 'alignment.png')


@pytest.mark.parametrize(('words', 'message'), [
    (['{stage1}', '--num-images', '10'], '10 images are too few for 10 neighbours'),
    (['{stage1}', '--batch-size', '3'], '--batch-size 3: CKA is estimated within batches of at least 4'),
    (['{stage1}', '--size', '30'], '30 x 30 pixels are not a multiple of 8; 32 x 32 are'),
    (['{stage1}', '--size', '8', '8', '8'], '--size 8 8 8: a height and a width'),
    (['{deeper}'], 'deeper'), (['{foreign}', '--teacher', '{softmax}'], 'its backbone is ResNet'),
    (['{stage3}:{near}'], 'Say --teacher'), (['{stage1}', '--images', 'absent'], 'absent: there is no such file')])
def test_what_evaluate_alignment_refuses(world, tool, tmp_path, words, message):
    def call(*words):
        return tool('evaluate_alignment', *words, '--out', tmp_path)
    with pytest.raises(SystemExit) as info:
        call(*(word.format_map(world) for word in words))
    assert message in str(info.value.code) and not list(tmp_path.iterdir())


def test_visualize_features(world, tool, tmp_path):
    out = tool('visualize_features', f'swap={world["stage1"]}', f'near={world["stage2"]}:{world["near"]}',
               '--images', world['images'], '--num-images', 3, '--out', tmp_path)
    data = json.loads((tmp_path / 'features.json').read_text())
    provenance(data, ['teacher', 'swap', 'near'])
    teacher, students = load(world, 'swap={stage1}', 'near={stage2}:{near}')
    images = [analysis.read_image(path, (32, 32)) for path in named_images([str(world['images'])], 3)]
    with torch.no_grad():
        theirs, *ours = (n.model(analysis.normalise(images, n.preprocessor))[-1].double() for n in (teacher, *students))
    for row, features in zip(data['students'], ours, strict=True):
        assert row['rel_error'] == pytest.approx(((features - theirs).norm() / theirs.norm()).item(), rel=1e-4)
    rows = theirs.permute(0, 2, 3, 1).reshape(-1, 32).numpy()
    variance = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False) ** 2
    assert data['explained_variance'] == pytest.approx((variance[:3] / variance.sum()).tolist(), rel=1e-5)
    assert f'{data["students"][1]["rel_error"]:.3f}' in out
    height, width, _ = pixels(tmp_path / 'features.png').shape
    assert width > height  # four columns, three rows
    tool('visualize_features', f'near={world["stage2"]}:{world["near"]}', '--images', world['images'] / '00.png',
         '--block', 1, '--out', tmp_path / 'early')
    early = json.loads((tmp_path / 'early/features.json').read_text())
    assert early['students'][0]['rel_error'] != data['students'][1]['rel_error'] and len(early['images']) == 1
    assert '--block 3: blocks are 1 to 2' in refused(tool, 'visualize_features', world['stage1'], '--block', 3,
                                                     '--out', tmp_path / 'none')


def test_evaluate_resolution(world, tool, tmp_path):
    words = ['evaluate_resolution', f'near={world["stage2"]}:{world["near"]}', '--num-images', 3, '--seconds', 0]
    out = tool(*words, '--sizes', 48, 32, '--out', tmp_path)
    data = json.loads((tmp_path / 'resolution.json').read_text())
    provenance(data, ['teacher', 'near'])
    assert [(row['size'], row['name'], row['tokens']) for row in data['rows']] == [
        (32, 'teacher', 17), (32, 'near', 17), (48, 'teacher', 37), (48, 'near', 37)]
    teacher, (student,) = load(world, 'near={stage2}:{near}')
    for row in data['rows']:
        network = teacher if row['name'] == 'teacher' else student
        images = [analysis.read_image(path, (row['size'],) * 2) for path in data['images']]
        batch = analysis.normalise(images, network.preprocessor)
        macs = multiply_adds(lambda vit=network.model, image=batch[:1]: vit.forward_features(image))
        # On this CPU the cheaper order of products is taken for few tokens; it is counted where there is no device.
        assert row['gmac'] == pytest.approx(macs / 1e9, rel=0.05)
        assert row['ms'] > 0 and row['mib'] > 0
        if network is student:
            with torch.no_grad():
                theirs, ours = (n.model.forward_features(batch).double() for n in (teacher, student))
            assert row['rel_error'] == pytest.approx(((ours - theirs).norm() / theirs.norm()).item(), rel=1e-4)
            assert row['cosine'] == pytest.approx(torch.cosine_similarity(ours, theirs, dim=-1).mean().item(), rel=1e-4)
    assert '| 48 | 37 | near |' in out
    pixels(tmp_path / 'resolution.png')
    assert 'are not multiples of the patch size 8' in refused(tool, *words, '--sizes', 30, '--out', tmp_path / 'odd')


def test_what_would_not_fit_is_not_run(world, tool, tmp_path):
    # 1601 tokens: 40 MiB for the teacher's four attention matrices, 2.3 MiB without them.
    tool('evaluate_resolution', f'near={world["stage2"]}:{world["near"]}', '--num-images', 1, '--seconds', 0,
         '--sizes', 320, '--memory', 0.01, '--out', tmp_path)
    teacher, student = json.loads((tmp_path / 'resolution.json').read_text())['rows']
    assert teacher['note'] == 'skipped: about 0.04 GiB, 0.01 are allowed'
    assert 'ms' not in teacher and teacher['gmac'] > student['gmac']
    assert student['ms'] > 0 and 'rel_error' not in student  # no teacher to compare with
    pixels(tmp_path / 'resolution.png')


# --- curves


def write_run(folder: Path, stage: str, seed: int = 0) -> Path:
    logs = folder / '20260101_000000/vis_data'
    logs.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    rows = [{'align/rel_error': 1.2, 'step': 0}]
    rows += [dict(loss=float(5 / step + rng.random()), rel_error=float(1 / step), lr=0.1, step=step)
             for step in range(10, 60, 10)]
    rows += [{'align/rel_error': 0.4, 'step': 50}]
    (logs / 'scalars.json').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    (logs / 'config.py').write_text(f"model = dict(type='adala_mm.{stage}')\n")
    return folder


def test_plot_alignment(world, tool, tmp_path):
    one = write_run(tmp_path / 'one', 'AttentionAlignment')
    two = [write_run(tmp_path / name, 'FeatureAlignment', seed) for seed, name in enumerate(('two', 'lr=3'))]
    tool('evaluate_alignment', f'swap={world["stage1"]}', '--k', 1, '--clusters', 2, '--out', tmp_path)
    out = tool('plot_alignment', one, f'after stage 1={two[0]}', two[1], '--out', tmp_path / 'out',
               '--evaluation', tmp_path / 'alignment.json')
    data = json.loads((tmp_path / 'out/curves.json').read_text())
    assert [(run['name'], run['stage']) for run in data['runs']] == [
        ('one', 'stage 1'), ('after stage 1', 'stage 2'), ('lr=3', 'stage 2')]
    assert data['runs'][0]['curves']['align/rel_error'] == dict(steps=[0, 50], values=[1.2, 0.4])
    assert data['runs'][2]['curves']['loss']['steps'] == [10, 20, 30, 40, 50]
    evaluated = json.loads((tmp_path / 'alignment.json').read_text())['students'][0]['blocks']
    assert data['students'][0]['blocks'][1] == {k: evaluated[1][k] for k in ('attention_error', 'rel_error')}
    assert '| after stage 1 | stage 2 | 50 |' in out
    tall = pixels(tmp_path / 'out/curves.png').shape[0]
    tool('plot_alignment', one, '--out', tmp_path / 'single')
    assert tall > 2.5 * pixels(tmp_path / 'single/curves.png').shape[0]  # three rows of panels against one
    tool('plot_alignment', '--evaluation', tmp_path / 'alignment.json', '--out', tmp_path / 'blocks')
    pixels(tmp_path / 'blocks/curves.png')


def test_devices_that_are_not_there(world, tool, capsys):
    for device in ('cuda:77', 'toaster'):
        with pytest.raises(SystemExit):
            tool('evaluate_alignment', world['stage1'], '--device', device)
        assert f'argument --device: {device}: ' in capsys.readouterr().err


def test_what_plot_alignment_refuses(tool, tmp_path):
    one = write_run(tmp_path / 'one', 'AttentionAlignment')
    (tmp_path / 'x.json').write_text('{}')
    (tmp_path / 'z.json').write_text('{"students": []}')
    other = write_run(tmp_path / 'other', 'Net')
    for words, message in (
            ([tmp_path / 'absent'], 'no training log'), ([other], 'is a run of Net: only those of stage 1 and 2'),
            ([one, one], 'more than one run is called one'),
            (['--evaluation', tmp_path / 'y.json'], 'there is no such file'),
            (['--evaluation', tmp_path / 'x.json'], 'no result of evaluate_alignment.py'),
            (['--evaluation', tmp_path / 'z.json'], 'it has no students')):
        assert message in refused(tool, 'plot_alignment', *words, '--out', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    for path in one.glob('*/vis_data/config.py'):
        path.unlink()
    assert 'what was run' in refused(tool, 'plot_alignment', one, '--out', tmp_path / 'out')


@pytest.mark.parametrize('name', ['segment_image', 'classify_image'])
def test_tools_start_by_themselves(name):
    """In a process that imports nothing before them: mmpretrain does not survive transformers 5 by itself."""
    done = subprocess.run([sys.executable, str(TOOLS / f'{name}.py'), '--help'], capture_output=True, text=True)
    assert done.returncode == 0 and 'IMAGE' in done.stdout, done.stderr


def test_picture_grid(tmp_path):
    wide, high = np.full((10, 40, 3), 0.2), np.full((40, 10, 3), 0.8)
    picture_grid(tmp_path / 'new/grid.png', {'a': [wide, high], 'b': [wide / 2, high / 2], 'c': [wide, high]}, 'title')
    found = pixels(tmp_path / 'new/grid.png')
    # Both columns show what they were given, in rows as high as their pictures.
    assert all((abs(found - 255 * value) < 2).all(axis=-1).mean() > 0.01 for value in (0.2, 0.8, 0.1, 0.4))
