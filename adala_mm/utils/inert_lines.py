"""Lines of a config, and options of a command line, that change nothing."""
from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from mmengine.utils import get_installed_path

# What MMEngine's runner and the tools look up in the whole config, beside the runner's own arguments.
LOOKED_UP = {'activation_checkpointing', 'compile', 'custom_imports', 'efficient_conv_bn_eval',
             'find_unused_parameters', 'model_wrapper_cfg', 'runner_type', 'sync_bn', 'tta_model', 'tta_pipeline'}


class Statement(NamedTuple):
    """What a statement of a config file does to names of the file."""

    line: int
    changed: set[str]  # assigned, or altered through an item or a method
    used: set[str]


def refuse_inert_lines(cfg: Config, options: Iterable[str] = ()) -> None:
    """Raises ValueError, naming line or option and the fix, for the first that changes nothing.

    A run reads some top-level names of a config (``model``, ``train_dataloader`` ...). With all others a file only puts
    those together, and what it puts in is copied: after ``crop_size = (256, 256)`` in a file that inherits a finished
    recipe, its pipelines crop as before. Such a change is refused in the config's file and in all files that it
    inherits from, unless that file, or one between it and ``cfg``, uses the name, or what is read or was inherited has
    the same value. A number that nothing inherited had is a note of its author's. Files that inherit nothing are left
    alone: there is nothing that they could have meant to change.

    Args:
        cfg: as its file says.
        options: keys of ``--cfg-options``; no line follows that could use them.
    """
    read, content = names_read(cfg), cfg.to_dict()
    places = [place for name in content if name in read for place in walk(content[name], (name,))]

    def instead(name: str, value: Any) -> list[tuple]:
        """Places with that key (those of ``custom_keys`` are parameters), or with the value."""
        return ([path for path, _ in places if path[-1] == name and 'custom_keys' not in path]
                or [path for path, other in places if nested(value) and contains(other, value)])

    for option in options:
        name, *rest = option.split('.')
        if name not in read:
            found = ['.'.join(map(str, (*path, *rest))) for path in instead(name, content.get(name))]
            raise ValueError(f'--cfg-options {option} changes nothing: a run does not read {name}. '
                             + (advice(found) or f'It reads {", ".join(key for key in content if key in read)}'))
    for file, line, name in inert_changes(Path(cfg.filename), read):
        if name not in content or any(other == content[name] and (path[-1] == name or nested(other))
                                      for path, other in places):
            continue
        inherited = [base[name] for base in map(Config.fromfile, bases_of(file)) if name in base]
        if content[name] in inherited:
            continue
        found = instead(name, inherited[0] if inherited else None)
        number = isinstance(content[name], (int, float))
        if inherited or (found and not number and file == Path(cfg.filename)):
            python = [path[0] + ''.join(f'[{part!r}]' for part in path[1:]) for path in found]
            raise ValueError(f'{file}, line {line}: this change of {name} does nothing: a run does not read {name}, '
                             f'only what was made of it. {advice(python) or f"Use {name} in a line below"}, or delete '
                             'this line')


def advice(places: list[str]) -> str:
    return places and f'Change {", ".join(places[:4])}{" ..." if len(places) > 4 else ""} instead'


def names_read(cfg: Config) -> set[str]:
    """Top-level names of a config that a run looks at."""
    runner = RUNNERS.get(cfg.get('runner_type', 'Runner')) or Runner  # an unknown one is an error of its own
    names = LOOKED_UP | set(inspect.signature(runner.__init__).parameters)
    if 'data_preprocessor' in (cfg.get('model') or {}):
        names.discard('data_preprocessor')  # MMEngine takes it for models that have none
    return names


def inert_changes(file: Path, read: set[str],
                  used: frozenset[str] = frozenset()) -> Iterator[tuple[Path, int, str]]:
    """File, line and name of changes to what is not ``read`` and not used either, in files that inherit.

    Args:
        file: of the config; all that it inherits from are looked at as well.
        used: names that are used by files which inherit from this one.
    """
    if file.suffix != '.py':
        return
    bases, own = bases_of(file), statements(file.read_text(encoding='utf-8'))
    used = used.union(*(statement.used - statement.changed for statement in own))
    for statement in own if bases else ():
        for name in sorted(statement.changed - used - read):
            yield file, statement.line, name
    for base in bases:
        yield from inert_changes(base, read, used)


def bases_of(file: Path) -> list[Path]:
    """Files that a config inherits from, in MMEngine's newer (``read_base``) or older (``_base_``) manner."""
    found = []
    for node in parsed(file.read_text(encoding='utf-8')).body:
        if isinstance(node, ast.With):
            for base in (base for base in node.body if isinstance(base, ast.ImportFrom)):
                first, *others = base.module.split('.')
                place = [file.parent, *['..'] * (base.level - 1), first] if base.level else [get_installed_path(first)]
                found.append(Path(*place, *others).with_suffix('.py'))
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', None) == '_base_':
            found += [file.parent / part.value for part in ast.walk(node.value)
                      if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return [base for base in found if base.is_file()]  # the older manner's package::config is not looked at


parsed = functools.cache(ast.parse)  # files of _base_ are met many times


@functools.cache
def statements(text: str) -> list[Statement]:
    """Every statement of a file, those in loops and branches one by one, with the names that it touches."""
    found = []
    for node in (node for node in ast.walk(parsed(text)) if isinstance(node, ast.stmt)):
        names = [part for child in ast.iter_child_nodes(node) if not isinstance(child, ast.stmt)
                 for part in ast.walk(child) if isinstance(part, ast.Name)]
        roots = {id(root): root.id for target in targets(node) if isinstance(root := root_of(target), ast.Name)}
        used = {name.id for name in names if isinstance(name.ctx, ast.Load) and id(name) not in roots}
        used |= {part.attr for child in ast.iter_child_nodes(node) for part in ast.walk(child)  # _base_.crop_size
                 if isinstance(part, ast.Attribute) and getattr(part.value, 'id', None) == '_base_'}
        found.append(Statement(node.lineno, set(roots.values()), used))
    return found


def targets(node: ast.stmt) -> Iterator[ast.expr]:
    """Expressions that a statement assigns to, or whose method it calls for its effect."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute):
        yield node.value.func
    for target in getattr(node, 'targets', None) or [getattr(node, 'target', None)]:
        yield from target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]


def root_of(node: ast.expr) -> ast.expr:
    """``model`` of ``model['backbone'].update``."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call, ast.Starred)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node


def nested(value: Any) -> bool:
    """Whether a value is recognised wherever it stands: a dict, or a list of such."""
    return isinstance(value, dict) or (isinstance(value, (list, tuple)) and any(map(nested, value)))


def contains(value: Any, part: Any) -> bool:
    """Whether a value is ``part``, or a dict that has all of its items."""
    return value == part or (isinstance(value, dict) and isinstance(part, dict)
                             and all(key in value and value[key] == item for key, item in part.items()))


def walk(node: Any, path: tuple) -> Iterator[tuple[tuple, Any]]:
    """A node and all that is in it, with their places."""
    yield path, node
    for key, value in node.items() if isinstance(node, dict) else \
            enumerate(node) if isinstance(node, (list, tuple)) else ():
        yield from walk(value, (*path, key))
