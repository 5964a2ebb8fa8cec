"""How Sphinx builds the site: `make docs`."""

import inspect
import pathlib
import re
import sys
from typing import Any

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from docutils import nodes  # noqa: E402
from markup import as_restructured_text  # noqa: E402
from reference import listed_names, write_pages  # noqa: E402
from signatures import signature_of  # noqa: E402
from sphinx import addnodes  # noqa: E402
from sphinx.errors import SphinxError  # noqa: E402

import kdjax  # noqa: E402

project = 'kdjax'
author = 'the authors of kdjax'
version = release = kdjax.__version__

extensions = ['sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.viewcode', 'myst_parser']
exclude_patterns = ['_build', 'README.md']
html_theme = 'furo'
html_title = f'kdjax {version}'
html_static_path = ['_static']
html_css_files = ['kdjax.css']
html_show_copyright = False
# Docstrings write `name` for code; where it names something of kdjax it becomes a link.
default_role = 'py:obj'
autodoc_member_order = 'bysource'
maximum_signature_line_length = 90
add_module_names = False
toc_object_entries_show_parents = 'hide'
napoleon_custom_sections = [('Reference', 'notes_style'), ('Attributes', 'params_style')]
napoleon_use_rtype = False
smartquotes = False
# A name that two modules have, such as Batch and Problem, is the same in both, and either will do as the target of a link.
suppress_warnings = ['ref.python']
# The anchors that GitHub gives headings, so that links work in both places.
myst_heading_anchors = 3


def process_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Rewrites the lines in place, before Napoleon reads them."""
    del app, what, name, obj, options
    lines[:] = [*as_restructured_text('\n'.join(lines)).splitlines(), '']


def process_signature(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None] | None:
    """Takes the signature from the sources."""
    del app, name, options, signature, returned
    return signature_of(obj, bound=what == 'method')


def skip_member(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool:
    """Leaves out the fields of named tuples and modules, which the docstring of the class explains."""
    del app, what, name, options
    default = inspect.isfunction(obj) and not obj.__module__.startswith('kdjax.')
    return skip or default or type(obj).__name__ == '_tuplegetter'


def finish_page(app: Any, doctree: Any) -> None:
    """Makes links of dotted names in guides, as in docstrings, and keeps a number in a table beside its error."""
    del app
    for node in list(doctree.findall(nodes.literal)):
        if re.fullmatch(r'[a-z]+(\.\w+)+', node.astext()) and not isinstance(node.parent, addnodes.pending_xref):
            link = addnodes.pending_xref('', node.deepcopy(), refdomain='py', reftype='obj', reftarget=node.astext())
            node.replace_self(link)
    for cell in doctree.findall(nodes.entry):
        for node in list(cell.findall(nodes.Text)):
            node.parent.replace(node, nodes.Text(re.sub(r'(?<=\d) (?=[±(])|(?<=±) ', '\u00a0', node)))


def resolve(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Links `losses.soft_targets`, as one writes it after `from kdjax import losses`."""
    target = f'kdjax.{node.get("reftarget")}'
    domain = env.get_domain('py')
    if node.get('refdomain') != 'py' or target not in domain.objects:
        return None
    return domain.resolve_xref(env, node['refdoc'], app.builder, 'obj', target, node, content)


def check_names(app: Any, exception: Exception | None) -> None:
    """Fails where the reference lacks a public name."""
    missing = listed_names() - set(app.env.get_domain('py').objects)
    if missing and exception is None:
        raise SphinxError(f'the reference lacks {", ".join(sorted(missing))}')


def setup(app: Any) -> None:
    """Writes the reference's pages, and connects what is above."""
    write_pages(HERE / 'reference')
    app.connect('autodoc-process-docstring', process_docstring, priority=100)
    app.connect('autodoc-process-signature', process_signature)
    app.connect('autodoc-skip-member', skip_member)
    app.connect('doctree-read', finish_page)
    app.connect('missing-reference', resolve)
    app.connect('build-finished', check_names)
