"""The layout: nothing imports upward or in a circle, private modules stay private, and what is public is listed."""

import ast
import graphlib
import importlib
import pathlib
import pkgutil
import re

import pytest

import kdjax

ROOT = pathlib.Path(kdjax.__file__).parent.parent
# From the top down; a package imports only from those below it. What stands in one line does not know each other.
LAYERS = (
    ('recipes', 'regimes', 'export', 'testing', 'generation', 'pretrained'),
    ('training',),
    ('optimizers', 'parallel', 'quantization'),
    ('pruning', 'data'),
    ('problems', 'objectives', 'models'),
    ('metrics',),
    ('networks', 'losses'),
    ('batches', 'jaxprs', 'pooling'),
    ('dependencies', 'errors', 'files', 'meshes', 'numerics', 'paths'),
)
FILES = sorted(path for folder in ('kdjax', 'experiments') for path in (ROOT / folder).rglob('*.py'))


def imported(path: pathlib.Path) -> set[tuple[str, ...]]:
    """The modules of kdjax that a file imports, and the names that it imports from packages, as their parts."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {tuple(name.name.split('.')) for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {(*node.module.split('.'), name.name) for name in node.names}
    return {parts[1:] for parts in found if parts[0] == 'kdjax' and len(parts) > 1}


def package(path: pathlib.Path) -> str:
    """The package of kdjax, or the module beside them, that a file belongs to."""
    parts = path.relative_to(ROOT).parts
    return '' if parts[0] != 'kdjax' or parts[1:] == ('__init__.py',) else parts[1].removesuffix('.py')


def test_every_package_has_its_layer() -> None:
    assert {name for layer in LAYERS for name in layer} == {package(path) for path in FILES} - {''}


def test_nothing_imports_upward_or_beside() -> None:
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    wrong = [
        f'{path.relative_to(ROOT)} imports {".".join(parts)}'
        for path in FILES
        if package(path)
        for parts in imported(path)
        if parts[0] in level and parts[0] != package(path) and level[parts[0]] <= level[package(path)]
    ]
    assert not wrong, wrong


def test_no_package_imports_itself_in_a_circle() -> None:
    graph = {
        '.'.join(path.relative_to(ROOT).with_suffix('').parts): {
            name
            for parts in imported(path)
            for name in ('.'.join(('kdjax', *parts[:i])) for i in (2, 3))
            if (ROOT / f'{name.replace(".", "/")}.py').exists()
        }
        for path in FILES
        if package(path)
    }
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_private_modules_are_imported_within_their_package_alone() -> None:
    wrong = [
        f'{path.relative_to(ROOT)} imports {".".join(parts)}'
        for path in FILES
        for parts in imported(path)
        if any(part.startswith('_') for part in parts[1:]) and parts[0] != package(path)
    ]
    assert not wrong, wrong


@pytest.mark.parametrize('name', [name for layer in LAYERS for name in layer])
def test_what_is_public_is_listed_and_there(name: str) -> None:
    module = importlib.import_module(f'kdjax.{name}')
    assert getattr(kdjax, name) is module
    if not hasattr(module, '__path__'):
        return
    listed = module.__all__
    assert len(set(listed)) == len(listed)
    assert all(hasattr(module, each) for each in listed)
    # Whatever else can be seen is private, or a package of its own.
    submodules = {each.name for each in pkgutil.iter_modules(module.__path__)}
    assert {each for each in vars(module) if not each.startswith('_')} - submodules == set(listed) - submodules
    assert all(each.startswith('_') or each in listed or (ROOT / 'kdjax' / name / each).is_dir() for each in submodules)


def test_every_package_is_an_attribute() -> None:
    """`import kdjax; kdjax.generation` works, and type checkers know it."""
    there = {each.name for each in pkgutil.iter_modules(kdjax.__path__)}
    assert there <= set(dir(kdjax))
    assert {getattr(kdjax, name).__name__ for name in there} == {f'kdjax.{name}' for name in there}
    declared = re.findall(r'from kdjax import (\w+) as \1', (ROOT / 'kdjax' / '__init__.py').read_text())
    assert set(declared) == there
