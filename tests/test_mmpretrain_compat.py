"""mmpretrain imports beside transformers 5, and its registered models stay known."""
import subprocess
import sys
from importlib.metadata import version

import pytest

CODE = ('import adala_mm.registry, mmpretrain.models; from mmpretrain.registry import MODELS; '
        'from transformers import Dinov2Model; assert MODELS.get("ImageClassifier")')


@pytest.mark.skipif(int(version('transformers').split('.')[0]) < 5, reason='an older transformers needs no help')
def test_mmpretrain_imports_beside_transformers_5():
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
