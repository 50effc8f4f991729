"""Runs the notebook from top to bottom and stores what comes out: `make notebook`, after a change of its code.

What the outputs belong to is stored with them, so that a test can tell when they are of other code.
"""
import hashlib
import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / 'docs/notebooks/quickstart.ipynb'


def code_sha256(notebook: dict) -> str:
    """Hash of the sources of all code cells."""
    sources = [''.join(cell['source']) for cell in notebook['cells'] if cell['cell_type'] == 'code']
    return hashlib.sha256('\n\n'.join(sources).encode()).hexdigest()


def main() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    os.environ['PYTHONWARNINGS'] = 'ignore'  # tqdm misses widgets that nobody needs, and says where it lies
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=600, record_timing=False, coalesce_streams=True,
                       resources=dict(metadata=dict(path=folder))).execute()
    notebook.metadata = dict(language_info=dict(name='python'), code_sha256=code_sha256(notebook),
                             kernelspec=dict(display_name='Python 3', language='python', name='python3'))
    nbformat.write(notebook, NOTEBOOK)


if __name__ == '__main__':
    main()
