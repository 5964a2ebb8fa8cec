"""What is unknown with one seed is said to be, and so is how many devices trained."""

import json
import types

import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments import figures, method_table, reporting, runs
from kdjax import networks

NETWORK = networks.from_linen(nn.Dense(3))
INPUTS = np.ones((64, 2), np.float32)


def row(name: str, *accuracies: float) -> reporting.Row:
    variables = NETWORK.init(jax.random.key(0), INPUTS)
    extra = reporting.mean_and_deviation('nll', [0.5] * len(accuracies))
    return reporting.Row(name, accuracies, 10, NETWORK, variables, extra)


def written(tmp_path, rows, draw) -> tuple[dict, str]:
    dataset = types.SimpleNamespace(name='ones', test={'inputs': INPUTS})
    notes = reporting.in_points(*reporting.difference(rows[1], rows[0]))
    options = {'title': 'Two', 'started': 0.0, 'notes': notes, 'draw': draw, 'devices': 2}
    reporting.write_report(tmp_path, rows, dataset=dataset, **options)
    # Python alone reads NaN in JSON.
    refuse = lambda name: pytest.fail(f'{name} is no JSON')  # noqa: E731
    return json.loads((tmp_path / 'report.json').read_text(), parse_constant=refuse), (tmp_path / 'report.md').read_text()


@pytest.mark.parametrize('draw', [figures.draw_rows, figures.draw_accuracy])
def test_with_one_seed_deviation_and_standard_error_are_unknown(draw, tmp_path):
    report, text = written(tmp_path, [row('a', 0.953), row('b', 0.96)], draw)
    assert [(found['accuracy_mean'], found['accuracy_std'], found['nll_std']) for found in report['rows']] == [
        (0.953, None, None),
        (0.96, None, None),
    ]
    assert '±' not in text
    assert '| a | 95.3 |' in text
    assert '+0.70 points (standard error unknown with one seed)' in text
    assert 'one seed, so that deviations are unknown' in text
    assert '2 of 8 x cpu' in text
    assert (tmp_path / 'figure.png').stat().st_size > 1000


def test_with_more_seeds_they_are_those_of_the_sample(tmp_path):
    report, text = written(tmp_path, [row('a', 0.9, 0.92), row('b', 0.93, 0.97)], figures.draw_rows)
    assert report['rows'][0]['accuracy_std'] == pytest.approx(np.std([0.9, 0.92], ddof=1))
    assert '| a | 91.0 ± 1.4 |' in text
    # Seed by seed, the changes are 3 and 5 points.
    assert '+4.00 points (standard error 1.00)' in text
    assert 'over 2 seeds' in text


def test_no_name_is_cut_off_at_the_edge_of_a_figure(tmp_path):
    """However long names are, which are the user's: nothing but paper stands at the edge."""
    rows = [row(f'a network with a name that goes on and on, number {i}', 0.9, 0.92) for i in range(7)]
    written(tmp_path, rows, figures.draw_accuracy)
    image = plt.imread(tmp_path / 'figure.png')[..., :3]
    for edge in (image[0], image[-1], image[:, 0], image[:, -1]):
        np.testing.assert_array_equal(edge, np.ones_like(edge))


def test_bytes_are_explained_where_there_are_any(tmp_path):
    _, text = written(tmp_path, [row('a', 0.9), row('b', 0.92)], figures.draw_rows)
    assert 'Bytes are the size' in text
    dataset = types.SimpleNamespace(name='ones', test={'inputs': INPUTS})
    options = {'title': 'Two', 'started': 0.0, 'notes': '', 'draw': figures.draw_rows, 'devices': 1}
    reporting.write_report(
        tmp_path, [row('a', 0.9)], dataset=dataset, table=lambda results: '| network |\n|---|\n| a |', **options
    )
    assert 'Bytes are the size' not in (tmp_path / 'report.md').read_text()


def test_the_difference_of_two_means_has_an_error_only_if_both_have_one():
    change, error = reporting.difference_of_means([0.9, 0.92], [0.8, 0.84])
    assert change == pytest.approx(0.09)
    assert error == pytest.approx(np.hypot(0.01, 0.02))
    for one, other in (([0.9], [0.8, 0.84]), ([0.9, 0.92], [0.8]), ([0.9], [0.8])):
        assert reporting.difference_of_means(one, other)[1] is None
    assert method_table._signed({'gain': 0.012, 'gain_error': None}, 'gain') == '+1.2'
    assert method_table._signed({'gain': 0.012, 'gain_error': 0.003}, 'gain') == '+1.2 (0.3)'


@pytest.mark.parametrize('batch_size, used, all_with', [(50, 2, 56), (64, 8, None), (9, 1, 16)])
def test_devices_that_a_batch_leaves_idle_are_named(batch_size, used, all_with, capsys):
    assert runs.mesh(batch_size).size == runs.devices_used(batch_size) == used
    left = ', '.join(str(device) for device in jax.devices()[used:])
    told = f'as many as divide a batch of {batch_size}, without {left}; batches of {all_with} would use all'
    said = f'Training on {used} of 8 devices, {told}\n'
    assert capsys.readouterr().out == ('' if all_with is None else said)
    assert reporting.machine(used).startswith('8 x ' if used == 8 else f'{used} of 8 x ')
