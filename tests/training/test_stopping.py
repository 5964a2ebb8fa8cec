"""Training that stops at a target: the epochs it takes, what it returns, and how it is taken up again."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import networks, objectives, training
from kdjax.metrics import Average

PROBLEM = training.distillation(networks.from_linen(nn.Dense(3)), None, objectives.hard_labels(), optax.sgd(0.1))
RNG = np.random.default_rng(0)
DATA = {'inputs': RNG.normal(size=(72, 4)).astype(np.float32), 'labels': RNG.integers(0, 3, 72).astype(np.int32)}


def fit(**settings):
    return training.fit(PROBLEM, DATA, key=jax.random.key(0), batch_size=36, progress=False, **settings)


def run(values, **settings):
    """Trains with a validation that says these values, one after every epoch; returns it with the variables of each."""
    seen = []

    def validate(variables):
        kernel = np.asarray(variables['params']['kernel'])
        if not any(np.array_equal(kernel, each) for each in seen):
            seen.append(kernel)
        number = next(i for i, each in enumerate(seen) if np.array_equal(kernel, each))
        return {'accuracy': Average(jnp.float32(values[number]), jnp.float32(1.0))}

    settings = {'target': 0.875, 'epochs': 5, **settings}
    fitted = fit(validate=validate, **settings)
    return fitted, seen


@pytest.mark.parametrize(
    'values,steps,best', [([0.95], 2, 1), ([0.1, 0.3, 0.875], 6, 3), ([0.5, 0.8, 0.1, 0.2, 0.3], 10, 2), ([0.4] * 5, 10, 5)]
)
def test_stops_at_the_target_or_after_all_epochs_with_the_best(values, steps, best):
    fitted, seen = run(values)
    assert int(fitted.state.step) == steps
    assert fitted.best_step == 2 * best
    np.testing.assert_array_equal(fitted.best_variables['params']['kernel'], seen[best - 1])


def test_epochs_are_those_of_fit():
    fitted, _ = run([0.1] * 3, epochs=3)
    plain = fit(epochs=3)
    assert jax.tree.all(jax.tree.map(np.array_equal, fitted.state.params, plain.state.params))


def test_a_run_that_had_stopped_stays_so_and_another_goes_on(tmp_path):
    stopped, _ = run([0.1, 0.95], directory=tmp_path / 'stopped')
    again, _ = run([0.95], directory=tmp_path / 'stopped')
    assert (int(again.state.step), again.resumed_from, again.best_step) == (4, 4, 4)
    assert jax.tree.all(jax.tree.map(np.array_equal, stopped.best_variables, again.best_variables))
    run([0.1, 0.2], directory=tmp_path / 'limited', epochs=2)
    longer, _ = run([0.3, 0.92], directory=tmp_path / 'limited')
    assert (int(longer.state.step), longer.resumed_from) == (8, 4)


def test_a_target_needs_something_that_measures():
    with pytest.raises(ValueError, match='fit: target and patience need validate'):
        fit(epochs=1, target=0.5)
