"""What is declared about versions agrees with itself, and a broken installation is named, not traced back."""
import shlex
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError

import pytest
from packaging.requirements import Requirement

from adala_mm.utils import stack
from helpers import ROOT

OPENMMLAB = ('mmengine', 'mmcv', 'mmseg', 'mmdet', 'mmpretrain')


def read_requirements(name: str) -> dict[str, Requirement]:
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith('#')]
    return {requirement.name: requirement for requirement in found}


def pinned(requirement: Requirement) -> str:
    (pin,) = requirement.specifier
    assert pin.operator == '=='
    return pin.version


def fake_stack(monkeypatch, installed=None):
    """Pretends that the first tested version of everything is installed, but for ``installed`` (None: missing)."""
    def version(name):
        if installed[name] is None:
            raise PackageNotFoundError(name)
        return installed[name]

    tested = {names[0]: versions[0] for names, versions in stack.STACK.values()}
    others = {name: None for names, _ in stack.STACK.values() for name in names[1:]}
    installed = {**tested, **others, **(installed or {})}
    monkeypatch.setattr(stack, 'version', version)


def python(code: str) -> str:
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=False,
                          cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize('name', stack.STACK)
def test_constraints_pin_a_tested_version(monkeypatch, name):
    (distribution, *_), tested = stack.STACK[name]
    pin = pinned(read_requirements('constraints')[distribution])
    assert any(pin == v or pin.startswith(f'{v}.') for v in tested)
    fake_stack(monkeypatch, {distribution: pin})
    assert stack.stack_problems() == ([], [])


@pytest.mark.parametrize('extra', ['onedl', 'openmmlab'])
def test_extras_are_the_openmmlab_part_of_the_stack(extra):
    required = read_requirements(extra)
    assert len(required) == len(OPENMMLAB)
    for name in OPENMMLAB:
        distributions, _ = stack.STACK[name]
        assert len(set(distributions) & set(required)) == 1, name


def test_requirements_admit_the_constraints():
    constraints = read_requirements('constraints')
    for name in ('onedl', 'runtime'):
        for distribution, requirement in read_requirements(name).items():
            if distribution in constraints:
                assert requirement.specifier.contains(pinned(constraints[distribution])), requirement
    assert set(read_requirements('onedl')) < set(constraints)
    for transformers in (read_requirements('tests')['transformers'], constraints['transformers']):
        assert transformers.specifier.contains('4.57.3') and not transformers.specifier.contains('5.0.0')


@pytest.mark.parametrize(('installed', 'missing', 'untested'), [
    ({}, [], []),
    ({'timm': None}, ['timm'], []),
    ({'onedl-mmcv': None, 'onedl-mmdetection': None}, ['mmcv', 'mmdet'], []),
    ({'onedl-mmcv': None, 'mmcv': '2.3.6'}, [], []),
    ({'onedl-mmcv': None, 'mmcv-lite': '2.1.0'}, [], ['mmcv 2.1.0 (tested: 2.3.6)']),
    ({'torch': '2.11.0+cu128'}, [], []),
    ({'torch': '2.110.0'}, [], ['torch 2.110.0 (tested: 2.11, 2.15)']),
    ({'timm': '0.9', 'torch': None}, ['torch'], ['timm 0.9 (tested: 1.0.31)']),
])
def test_stack_problems(monkeypatch, installed, missing, untested):
    fake_stack(monkeypatch, installed)
    assert stack.stack_problems() == (missing, untested)


def test_tested_stack_is_silent(monkeypatch):
    fake_stack(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        stack.warn_about_stack()
    stack.require_stack()


def test_warning_names_packages_and_install_line(monkeypatch):
    fake_stack(monkeypatch, {'onedl-mmsegmentation': None, 'timm': '0.9'})
    with pytest.warns(UserWarning) as record:
        stack.warn_about_stack()
    missing, untested = (str(w.message) for w in record)
    assert 'not installed: mmseg. ' in missing and 'pip install "onedl-mmsegmentation==1.4.2.*"' in missing
    assert 'timm 0.9' in untested and untested.endswith('pip install "timm==1.0.31.*"')


def test_require_stack_names_the_missing_packages(monkeypatch):
    fake_stack(monkeypatch, {'onedl-mmengine': None, 'onedl-mmpretrain': None, 'timm': '0.9'})
    with pytest.raises(ImportError, match='mmengine, mmpretrain') as error:
        stack.require_stack()
    assert str(error.value).endswith('pip install "onedl-mmengine==0.10.12.*" "onedl-mmpretrain==1.3.6.*"')
    with pytest.raises(ImportError, match='needs mmengine, which'):
        stack.require_stack(stack.CORE)


def test_install_line_asks_for_what_the_constraints_pin():
    wanted = [Requirement(word) for word in shlex.split(stack.install_line(stack.STACK))[2:]]
    constraints = read_requirements('constraints')
    assert len(wanted) == len(stack.STACK)
    assert all(line.specifier.contains(pinned(constraints[line.name])) for line in wanted)


def test_importing_the_package_loads_none_of_the_stack():
    code = 'import sys, adala_mm; print(" ".join(sys.modules))'
    loaded = set(python(code).split())
    assert 'adala_mm' in loaded and not loaded & {*stack.STACK, 'numpy'}


def test_ops_need_torch_alone():
    code = f'''
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {(*OPENMMLAB, 'timm')}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
import torch
from adala_mm.ops import linear_attention, ms_deform_attn
x = torch.ones(1, 2, 3, 4)
print(bool(torch.allclose(linear_attention(x, x, x), x)))
try:
    import adala_mm.registry
except ModuleNotFoundError as error:
    print('blocked', error)
'''
    # The last line shows that the blocker works.
    assert python(code).splitlines() == ['True', 'blocked mmengine']


def test_linearize_and_align_need_no_openmmlab_but_mmengine():
    code = '''
import sys
for name in ('mmcv', 'mmseg', 'mmdet', 'mmpretrain'):
    sys.modules[name] = None  # as if it were not installed
from adala_mm.utils import stack
installed = stack.installed_version
stack.installed_version = lambda names: installed(names) if names[0].split('-')[-1] in (*stack.CORE, 'timm') else None
import timm, torch
from adala_mm import align, linearize
teacher = timm.create_model('vit_tiny_patch16_224', img_size=32, depth=2)
model = linearize(teacher)
for stage in (1, 2):
    align(model, teacher, [torch.randn(2, 3, 32, 32)], stage=stage, steps=1)
print(model.num_linear_blocks, *stack.stack_problems()[0])
try:
    stack.require_stack()
except ImportError as error:
    print(error)
'''
    counted, refused = python(code).splitlines()[-2:]
    assert counted == '2 mmcv mmseg mmdet mmpretrain' and 'needs mmcv, mmseg, mmdet, mmpretrain, which' in refused


def test_quiet_imports_say_all_but_one_thing(tmp_path, monkeypatch, capsys):
    (tmp_path / 'talkative.py').write_text("print('Could not import OneDL')\nprint('Could not import it')\n1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError):
        stack.import_quietly('talkative')
    assert capsys.readouterr().out == 'Could not import it\n'


def test_license_is_apache_2():
    text = (ROOT / 'LICENSE').read_text()
    assert text.split()[:4] == ['Apache', 'License', 'Version', '2.0,']
    assert 'END OF TERMS AND CONDITIONS' in text
