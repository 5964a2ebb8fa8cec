"""The README's code runs as it is typed, from the top, and its links lead to files that exist."""

import ast
import importlib.util
import pathlib
import re
import tomllib
from typing import Any

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
BLOCK = re.compile(r'^```python\n(.*?)^```$', re.MULTILINE | re.DOTALL)
# Libraries that kdjax works with and does not need: blocks that import them run where they are installed.
ELSEWHERE = {'equinox', 'torch'}
MISSING = {name for name in ELSEWHERE if importlib.util.find_spec(name) is None}


def imported(code: str) -> set[str]:
    """The modules that a block names in `import` statements."""
    return {each.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import) for each in node.names}


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where the code writes."""
    return tmp_path_factory.mktemp('readme')


@pytest.fixture(scope='module')
def names(folder: pathlib.Path) -> dict[str, Any]:
    """What the blocks define, run one after another; of the first, what it prints, too."""
    namespace: dict[str, Any] = {'__name__': '__main__', 'printed': []}
    namespace['print'] = namespace['printed'].append
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in BLOCK.finditer(README):
            if imported(block[1]) & MISSING:
                continue
            # Lines are numbered as in the file.
            code = compile('\n' * README[: block.start(1)].count('\n') + block[1], 'README.md', 'exec')
            # As readers have it: the tests' own settings are stricter.
            with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
                exec(code, namespace)
    return namespace


def test_the_first_block_trains_a_good_student(names: dict[str, Any]) -> None:
    (measured,) = names['printed']
    assert sorted(measured) == ['accuracy', 'calibration_error', 'nll']
    assert measured['accuracy'] > 0.8


def test_the_last_blocks_leave_what_they_say(names: dict[str, Any], folder: pathlib.Path) -> None:
    assert {'teacher.safetensors', 'runs', 'student', 'teacher-logits'} <= {path.name for path in folder.iterdir()}
    assert names['export'].load(folder / 'student')(names['images']).shape == (64, 10)
    whole = names['module'].init(jax.random.key(0), names['rescale'](names['images']))
    before, after = (sum(np.size(leaf) for leaf in jax.tree.leaves(tree)) for tree in (whole, names['smaller']))
    assert after < 0.6 * before


def test_links_lead_to_files_of_the_repository() -> None:
    """Whole addresses, since a package index shows the page too."""
    start = f'{PROJECT["urls"]["Homepage"]}/blob/main/'
    targets = [*re.findall(r'\]\(([^)]+)\)', README), *re.findall(r'^\[[^]]+\]: (.+)$', README, re.MULTILINE)]
    assert len(targets) > 5
    assert all(target.startswith('https://') for target in targets)
    ours = [target.removeprefix(start) for target in targets if target.startswith(start)]
    assert ours
    assert not [path for path in ours if not (ROOT / path).exists()]


def test_every_link_that_is_defined_is_used() -> None:
    prose = README.replace('\n', ' ')
    assert not [label for label in re.findall(r'^\[([^]]+)\]: ', README, re.MULTILINE) if prose.count(f'[{label}]') < 2]


def test_extras_that_are_named_exist() -> None:
    named = {extra for extras in re.findall(r"'\.\[([a-z0-9,]+)\]'", README) for extra in extras.split(',')}
    assert named <= set(PROJECT['optional-dependencies'])
