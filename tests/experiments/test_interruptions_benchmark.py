"""The benchmark that kills a run: what it starts and compares; tests/training/test_interruptions.py kills for real."""

import numpy as np
import pytest

from experiments.benchmarks import interruptions


def test_its_run_says_when_it_begins_and_is_found_finished_with_the_same_numbers(tmp_path, capsys):
    contents = []
    for _ in range(2):
        interruptions.train(str(tmp_path), 2)
        contents.append((tmp_path / 'final.npz').read_bytes())
    assert contents[0] == contents[1]
    assert capsys.readouterr().out.splitlines() == ['training', 'training']
    with np.load(tmp_path / 'final.npz') as final:
        assert len(final.files) > 10


@pytest.mark.parametrize('changes', [{'kills': 0}, {'epochs': 0}, {'window': 0.0}])
def test_bad_flags(changes):
    with pytest.raises(ValueError, match='must be'):
        interruptions.main(interruptions.Config(**changes))
