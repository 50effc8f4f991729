"""Settings of Sphinx; `make docs` calls it.

The source folder is the root of the repository, so that a link between docs/, configs/ and README.md is written once
and works here and on a Git server. A link to any other file becomes a download of it.
"""
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.addnodes import pending_xref

import adala_mm

project = 'adala_mm'
version = release = adala_mm.__version__
copyright = 'the authors of adala_mm, Apache-2.0'

root_doc = 'docs/index'
include_patterns = ['README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', '*/README.md', 'configs/*/README.md', 'docs/**']
exclude_patterns = ['.*', '*.egg-info', 'build', 'data', 'work_dirs', '**/__pycache__']  # folders not even looked into
extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.viewcode']

nb_execution_mode = 'off'  # outputs are stored: maintenance/run_notebook.py
nb_merge_streams = True
myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3
html_math_renderer = 'mathml'

highlight_language = 'none'
default_role = 'py:obj'  # `name` in a docstring is a link if there is such an object here, and code if not
autodoc_default_options = {'members': True, 'show-inheritance': True}
autodoc_inherit_docstrings = False  # what overrides a method of MMEngine without a word does what MMEngine says
autodoc_member_order = 'bysource'
autodoc_typehints_format = 'short'

html_theme = 'furo'
html_title = f'adala_mm {version}'
html_extra_path = ['redirect']
html_static_path = ['static']
html_css_files = ['tables.css']
html_copy_source = False


def mathml(display: str):
    """Formulas as MathML, which browsers draw themselves: the pages need no script and no network."""
    def visit(translator, node) -> None:
        formula = convert(node.astext(), display=display)
        translator.body.append(f'<p>{formula}</p>' if display == 'block' else formula)
        raise SkipNode
    return visit


def links_to_folders(app, doctree) -> None:
    """A link to a folder leads to its README; without one it is plain text."""
    here = Path(app.env.doc2path(app.env.docname)).parent
    for node in list(doctree.findall(pending_xref)):
        folder = (here / node['reftarget']).resolve()
        if node['reftype'] != 'myst' or node['refdomain'] == 'doc' or not folder.is_dir():
            continue
        if (folder / 'README.md').exists():
            page = (folder / 'README').relative_to(app.srcdir).as_posix()
            node.attributes.update(refdomain='doc', reftarget=page, reftargetid=None)
        else:
            node.replace_self(node.children)


def links_to_names(app, doctree) -> None:
    """`Name` in a docstring finds its object in any module."""
    for node in doctree.findall(pending_xref):
        if node.get('reftype') == 'obj':
            node['refspecific'] = True


def setup(app) -> None:
    app.add_html_math_renderer('mathml', (mathml('inline'), None), (mathml('block'), None))
    app.connect('doctree-read', links_to_folders)
    app.connect('doctree-read', links_to_names)
