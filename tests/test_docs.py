"""The site: guides that run as they stand, a reference that lacks no public name, and links that lead somewhere."""

import doctest
import importlib
import pathlib
import re
import subprocess
import sys

import pytest
from snippets import run_snippets

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / 'docs'
PAGES = sorted(
    path
    for folder in (DOCS, ROOT / 'experiments')
    for path in folder.rglob('*.md')
    if '_build' not in path.relative_to(ROOT).parts
)


@pytest.fixture
def modules(monkeypatch):
    """The modules that write the site, as Sphinx imports them."""
    monkeypatch.syspath_prepend(DOCS)
    yield {name: importlib.import_module(name) for name in ('markup', 'reference', 'signatures')}
    for name in ('markup', 'reference', 'signatures'):
        sys.modules.pop(name)


# Of qwix 0.1.8, which asks flax 0.12 for names of before.
@pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")
@pytest.mark.parametrize('page', sorted((DOCS / 'guides').glob('*.md')), ids=lambda page: page.stem)
def test_guides_run_from_the_top(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_snippets(page)


def test_the_reference_has_every_public_name(modules, tmp_path):
    reference = modules['reference']
    reference.write_pages(tmp_path)
    documented = set()
    for module in reference.public_modules():
        text = (tmp_path / f'{module.__name__}.rst').read_text()
        names = re.findall(r'^\.\. (?:autoclass|autofunction|py:data):: (\S+)', text, re.MULTILINE)
        assert len(names) == len(set(names))
        documented |= {(module.__name__, name) for name in names}
    packages = [module for module in reference.public_modules() if hasattr(module, '__path__')]
    assert {module.__name__ for module in packages} >= {'kdjax.losses', 'kdjax.recipes', 'kdjax.data.augment'}
    for module in packages:
        listed = {(module.__name__, name) for name in module.__all__ if not hasattr(getattr(module, name), '__path__')}
        assert listed <= documented
    # Modules beside the packages, and the values in them that are no functions.
    assert {('kdjax.batches', 'Batch'), ('kdjax.jaxprs', 'products'), ('kdjax.paths', 'path_of')} <= documented
    index = (tmp_path / 'index.rst').read_text()
    assert all(module.__name__ in index for module in reference.public_modules())


def test_pages_of_modules_that_are_gone_go_too(modules, tmp_path):
    (tmp_path / 'kdjax.gone.rst').write_text('')
    modules['reference'].write_pages(tmp_path)
    assert not (tmp_path / 'kdjax.gone.rst').exists()


def test_docstrings_become_markup(modules):
    tried = doctest.testmod(modules['markup'], optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried.attempted
    assert not tried.failed
    table = modules['markup'].as_restructured_text('| a | b |\n|---|---|\n| `x_` | y_ |\n\n>>> 2 * 3\n6')
    expected = r'.. list-table:: :header-rows: 1 * - a - b * - `x_` - y\_ >>> 2 * 3 6'
    assert ' '.join(table.split()) == expected


def test_signatures_are_those_of_the_sources(modules):
    from kdjax import networks, objectives, training

    signature_of = modules['signatures'].signature_of
    assert signature_of(training.one_view) == ('(batch: Batch, view: Any)', 'Batch')
    assert signature_of(networks.Network) == ('(init: Callable[[jax.Array, Any], dict[str, Any]], apply: Apply)', None)
    assert signature_of(objectives.Objective.__mul__, bound=True) == ('(weight: Weight)', 'Objective')
    assert signature_of(training.NonFiniteLossError) is None


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r'\]\((?!https?:)([^)]+)\)', re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)):
        name, _, heading = target.partition('#')
        path = page.parent / name
        assert path.exists() or path.parent == DOCS / 'reference', target
        if heading:
            slugs = {
                re.sub(r'[^\w\- ]', '', line.lower()).strip().replace(' ', '-')
                for line in re.findall(r'^#+ (.*)', path.read_text(), re.MULTILINE)
            }
            assert heading in slugs, target


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip('sphinx', reason='the docs extra is not installed')
    command = [sys.executable, '-m', 'sphinx', '-W', '-q', '-b', 'dummy', '-d', tmp_path / 'trees', DOCS, tmp_path / 'site']
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
