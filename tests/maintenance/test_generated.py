"""Writers of generated files write what differs, and with --check name all of it; READMEs list every script."""
from __future__ import annotations

import re
import sys

import pytest
from generated import keep

from helpers import ROOT


def test_written_then_checked(tmp_path, monkeypatch, capsys):
    texts = {'a.md': 'ä\n', 'b.md': 'b\n'}
    writers = dict(make_one=lambda: [('a.md', texts['a.md'])], make_two=lambda: [('b.md', texts['b.md'])])
    monkeypatch.setattr(sys, 'argv', ['make.py'])
    assert keep(tmp_path, **writers)
    assert {path.name: path.read_text(encoding='utf-8') for path in tmp_path.iterdir()} == texts
    assert capsys.readouterr().out == 'a.md has been written\nb.md has been written\n'
    assert keep(tmp_path, **writers) and capsys.readouterr().out == ''  # nothing differs

    monkeypatch.setattr(sys, 'argv', ['make.py', '--check'])
    assert not keep(tmp_path, **writers)
    (tmp_path / 'a.md').unlink()
    (tmp_path / 'b.md').write_text('c\n')
    with pytest.raises(SystemExit, match='^a.md is out of date; run: python maintenance/make_one.py\n'
                                         'b.md is out of date; run: python maintenance/make_two.py$'):
        keep(tmp_path, **writers)
    assert [path.name for path in tmp_path.iterdir()] == ['b.md'] and (tmp_path / 'b.md').read_text() == 'c\n'


@pytest.mark.parametrize('folder', ['tools', 'tools/analysis_tools', 'maintenance'])
def test_every_script_is_listed(folder):
    readme = ROOT / folder.split('/')[0] / 'README.md'
    listed = re.findall(r'^\| `(\w+\.\w+)` \|', readme.read_text(encoding='utf-8'), re.MULTILINE)
    assert len(listed) == len(set(listed))
    scripts = {path.name for path in (ROOT / folder).iterdir() if path.suffix in ('.py', '.sh')}
    assert scripts - {'generated.py'} <= set(listed) and len(scripts) > 5
    everything = {path.name for path in (ROOT / folder.split('/')[0]).rglob('*.*')}
    assert set(listed) <= everything
