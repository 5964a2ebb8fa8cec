"""What takes long to import is imported only once it is needed, and what is missing is named."""

import subprocess
import sys

import pytest

from kdjax import dependencies


def run(code: str) -> str:
    """What a program prints in a process of its own, where nothing is imported yet."""
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout


def test_nothing_that_reads_data_is_imported_before_data_are_read() -> None:
    """Nor anything that augments them, nor what is an extra."""
    slow = ('tensorflow_datasets', 'tensorflow', 'grain', 'array_record', 'PIL', 'dm_pix', 'sklearn')
    printed = run(f'import sys, kdjax.data, kdjax.training, kdjax.recipes; print([*filter(sys.modules.get, {slow})])')
    assert printed == '[]\n'


def test_what_is_missing_is_named_with_the_command_that_installs_it() -> None:
    printed = run("""
import sys
from kdjax import data, training

def without(module, use):
    sys.modules[module] = None
    try:
        use()
    except ModuleNotFoundError as error:
        print(error)
    del sys.modules[module]

examples = [{'inputs': 1.0}] * 4
without('dm_pix', data.augment.random_flip)
without('sklearn', lambda: data.load('digits'))
without('grain', lambda: next(training.read_batches(examples, 2, seed=0)))
for module in ('array_record', 'grain', 'PIL', 'tensorflow_datasets'):
    without(module, lambda: data.load('mnist'))""")
    assert printed.splitlines() == [
        f'{purpose} needs {package}, which is not installed: pip install {package}'
        for purpose, package in (
            ('augmentation', 'dm-pix'),
            ('the data set of digits', 'scikit-learn'),
            ('reading examples from a source', 'grain'),
            ('mnist', 'array_record'),
            ('mnist', 'grain'),
            ('mnist', 'pillow'),
            ('mnist', 'tensorflow-datasets'),
        )
    ]


@pytest.mark.parametrize('raised', [ValueError('not about imports'), ModuleNotFoundError('about none in particular')])
def test_other_errors_stay_as_they_are(raised: Exception) -> None:
    with pytest.raises(type(raised)) as caught, dependencies.needed_for('this'):
        raise raised
    assert caught.value is raised
