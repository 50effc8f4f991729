"""Modules of the package import each other in one direction: no circles, and no layer knows what is built on it."""
import ast
from graphlib import TopologicalSorter

from helpers import ROOT

PACKAGE = ROOT / 'adala_mm'
LAYERS = ('adala_mm.ops', 'adala_mm.models.attentions', 'adala_mm.models.backbones', 'adala_mm.models.algorithms')


def name_of(path) -> str:
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


def imports(path, modules: set[str]) -> set[str]:
    """Modules of the package that a file imports anywhere: at its top, in functions, and for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'{path} has a relative import'
            found |= {name if (name := f'{node.module}.{alias.name}') in modules else node.module
                      for alias in node.names}
    return found & modules - {name_of(path)}


def graph() -> dict[str, set[str]]:
    paths = {name_of(path): path for path in PACKAGE.rglob('*.py')
             if not path.is_relative_to(PACKAGE / 'configs')}
    return {name: imports(path, paths.keys()) for name, path in paths.items()}


def test_no_circle_of_imports():
    found = graph()
    assert found['adala_mm.models.backbones.vit'] >= {'adala_mm.models.backbones.weights', 'adala_mm.ops'}
    TopologicalSorter(found).prepare()  # CycleError names the modules of a circle


def test_lower_layers_know_nothing_of_upper_ones():
    upwards = [(name, other) for name, others in graph().items() for other in others for i, layer in enumerate(LAYERS)
               if name.startswith(layer) and other.startswith(LAYERS[i + 1:])]
    assert not upwards
