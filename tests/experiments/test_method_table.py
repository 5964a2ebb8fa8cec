"""The comparison of methods, shrunk to seconds."""

import json
import shutil

import pytest
from helpers import scenario

from experiments import architectures, method_table, shipping
from kdjax.recipes import RECIPES

SMALL = architectures.resnet(8, (2, 2, 2, 2))


@pytest.fixture
def one_family(monkeypatch):
    family = method_table.FAMILIES[0]._replace(teacher=SMALL, student=SMALL)
    monkeypatch.setattr(method_table, 'FAMILIES', (family,))


def test_the_table_is_written_and_resumes(one_family, tmp_path, capsys):
    output = tmp_path / 'run'
    config = scenario.config(method_table, seeds=2, epochs=2, examples=64, batch_size=61, methods=('hint',), output=str(output))
    method_table.main(config)
    report = json.loads((output / 'report.json').read_text())
    names = ['teacher', 'alone', 'soft_targets', 'hint']
    assert [row['name'] for row in report['rows']] == [f'convolutional {name}' for name in names]
    assert report['rows'][2].keys() >= {'accuracy_mean', 'gain_over_alone', 'relative_time', 'bytes', 'latency_ms'}
    assert report['rows'][3].keys() >= {'with_soft_targets_mean', 'with_soft_targets_std', 'gain_over_soft_targets_error'}
    assert (output / 'figure.png').stat().st_size > 1000
    assert '| convolutional hint |' in (output / 'report.md').read_text()
    # Students of two seeds differ, and so do those that had soft targets too.
    students = {
        (seed, kind): (output / f'networks/seed{seed}/convolutional-hint{kind}.safetensors').read_bytes()
        for seed in range(2)
        for kind in ('', '-with-soft-targets')
    }
    assert len(set(students.values())) == 4

    # A run that died while it trained its last method goes on there, and ends as if it had not.
    accuracies = [row['accuracy_mean'] for row in report['rows']]
    (output / 'report.json').unlink()
    (output / 'methods' / 'convolutional-hint.json').unlink()
    shutil.rmtree(output / 'networks' / 'seed1')
    (output / 'methods' / 'convolutional-soft_targets.json').unlink()
    method_table.main(config)
    assert [row['accuracy_mean'] for row in json.loads((output / 'report.json').read_text())['rows']] == accuracies
    capsys.readouterr()
    method_table.main(config)
    assert 'finished already' in capsys.readouterr().out


@pytest.mark.parametrize(
    'changes,message',
    [
        ({'methods': ('hints',)}, "--methods: there is no 'hints'; there are: activation_boundary"),
        ({'examples': 10}, 'the training split has 10 examples, fewer than one batch of 64'),
        ({'seeds': 0}, '--seeds must be at least 1, got 0'),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        method_table.main(scenario.config(method_table, output=str(tmp_path / 'run'), **changes))
    assert not (tmp_path / 'run').exists()


def test_every_recipe_stands_in_a_family():
    assert set(method_table.FAMILIES[0].recipes) == set(RECIPES)
    assert shipping.file_name('convolutional hint') == 'convolutional-hint.safetensors'
