"""Every attention is compared with a transcription of its formula that names its source and has nothing of ours."""
from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from types import FunctionType

import pytest
import torch

from adala_mm.models.attentions import build_attention
from adala_mm.ops import elu1
from adala_mm.registry import ATTENTIONS
from helpers.layers import without_code
from helpers.references import baselines, coarse_to_fine, l2vit, related, windowed_linear

ATTENTIONS.import_from_location()
TRANSCRIPTIONS = {
    'SoftmaxAttention': baselines.softmax, 'LinearAttention': baselines.linear, 'ViGAttention': related.vig,
    **{f'{name}Attention': function for name, (function, _) in baselines.LAYERS.items()},
    **{f'{name}Attention': function for name, function in related.CORES.items()},
    'L2ViTAttention': l2vit.naive_global, 'WindowAttention': l2vit.naive_window,
    'WindowedLinearAttention': windowed_linear.windowed,
    'CoarseToFineAttention': coarse_to_fine.coarse_to_fine}
# With whom, and where there; that code was read under a licence that permits it.
SOURCE = re.compile(r'\(arXiv \d{4}\.\d{5}\), .*(\beq\. \d|Algorithm \d|section\b|definition|as its code has it \('
                    r'(MIT|Apache-2.0))|^Of our own: ', re.DOTALL)


def names_used(function: Callable) -> dict[str, object]:
    """What a function and those of the tests that it calls find outside of themselves, by name."""
    found, waiting = {}, [function]
    while waiting:
        code = waiting.pop()
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        for name in names & code.__globals__.keys() - found.keys():
            found[name] = value = code.__globals__[name]
            if isinstance(value, FunctionType) and value.__module__.startswith('helpers.'):
                waiting.append(value)
    return found


def ours(function: Callable) -> set[str]:
    return {name for name, value in names_used(function).items()
            if (getattr(value, '__module__', None) or getattr(value, '__name__', '')).startswith('adala_mm')}


def test_there_is_one_for_each():
    assert TRANSCRIPTIONS.keys() == ATTENTIONS.module_dict.keys()


@pytest.mark.parametrize('name', sorted(TRANSCRIPTIONS))
def test_it_says_whose_equation_it_is(name):
    assert SOURCE.search(inspect.getdoc(TRANSCRIPTIONS[name]) or '')


@pytest.mark.parametrize('function', [*dict.fromkeys(TRANSCRIPTIONS.values()), baselines.reference, related.reference],
                         ids=lambda function: f'{function.__module__}.{function.__name__}')
def test_it_uses_nothing_of_ours(function):
    assert ours(function) == set()


def test_what_is_not_independent_is_found():
    """Neither functions of ours nor the code of the layer, of which `without_code` leaves nothing."""
    def borrowed(layer, q, k):
        return elu1(q) @ elu1(k)

    assert ours(borrowed) == {'elu1'}
    layer = build_attention(dict(type='adala_mm.HedgehogAttention'), 32, 4)
    bare = without_code(layer)
    assert bare.feature_map.q is layer.feature_map.q and bare.variant == 'softmax'
    x = torch.zeros(1, 4, 5, 8)
    for call in (lambda: bare(x, (1, 5), 0), lambda: bare.qkv(x), lambda: bare.feature_map(x, x)):
        with pytest.raises(NotImplementedError):
            call()
    with pytest.raises(AttributeError):
        bare.features(x, x)
