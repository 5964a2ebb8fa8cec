"""The notebooks run from top to bottom, and end with numbers that bear out what they say."""

import contextlib
import io
import json
import pathlib
from typing import Any

import jax
import pytest

FOLDER = pathlib.Path(__file__).parent.parent / 'notebooks'
NAMES = ('compose_a_loss', 'distil_prune_quantize', 'write_your_own_method')


def cells(name: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads((FOLDER / f'{name}.ipynb').read_text())['cells'] if cell['cell_type'] == 'code']


def run(name: str) -> tuple[dict[str, Any], list[str]]:
    """The names that the code cells define, and what each of them prints."""
    namespace: dict[str, Any] = {'__name__': '__main__'}
    printed = []
    for number, cell in enumerate(cells(name), start=1):
        # As readers have it: optax's schedules promote dtypes implicitly.
        with contextlib.redirect_stdout(io.StringIO()) as output, jax.numpy_dtype_promotion('standard'):
            exec(compile(''.join(cell['source']), f'{name}, cell {number}', 'exec'), namespace)
        printed.append(output.getvalue())
    return namespace, printed


def test_the_folder_holds_the_notebooks_that_are_run() -> None:
    assert sorted(path.stem for path in FOLDER.glob('*.ipynb')) == sorted(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_outputs_are_those_of_one_run_and_small(name: str) -> None:
    assert [cell['execution_count'] for cell in cells(name)] == list(range(1, len(cells(name)) + 1))
    assert not any(output['output_type'] == 'error' for cell in cells(name) for output in cell['outputs'])
    assert (FOLDER / f'{name}.ipynb').stat().st_size < 20_000


def stored(name: str) -> list[bool]:
    """Which cells have an output."""
    return [bool(cell['outputs']) for cell in cells(name)]


def test_compose_a_loss() -> None:
    names, printed = run('compose_a_loss')
    assert [bool(text) for text in printed] == stored('compose_a_loss')
    # The first step's numbers: the schedules stand where they begin.
    assert 'soft/temperature    4.000' in printed[4]
    assert 'hint/weight         0.100' in printed[4]
    assert names['teacher_accuracy'] > 0.95
    assert names['student_accuracy'] > names['alone_accuracy'] > 0.7


def test_distil_prune_quantize() -> None:
    names, printed = run('distil_prune_quantize')
    assert [bool(text) for text in printed] == stored('distil_prune_quantize')
    accuracy, size = ({name: row[i] for name, row in names['measured'].items()} for i in (0, 1))
    assert accuracy['distilled'] > accuracy['student alone']
    assert accuracy['pruned, int8'] > accuracy['distilled'] - 0.05
    assert size['teacher'] > 10 * size['distilled'] > 20 * size['pruned'] > 30 * size['pruned, int8']
    kernels = [layer['kernel'] for layer in names['pruned']['params'].values()]
    total = sum(kernel.size for kernel in kernels)
    assert sum(int((kernel == 0).sum()) for kernel in kernels) == round(0.75 * total)


def test_write_your_own_method() -> None:
    names, printed = run('write_your_own_method')
    assert [bool(text) for text in printed] == stored('write_your_own_method')
    assert names['objective'].names == ('hard_labels', 'ordered', 'direction')
    assert names['student_accuracy'] > 0.85
    assert len(''.join(cells('write_your_own_method')[1]['source']).splitlines()) <= 15
