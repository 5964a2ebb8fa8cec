"""The warm-up that recipes share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import recipes
from kdjax.networks import Outputs
from kdjax.recipes import Pair

STEPS, EPOCHS = 5, 48
PAIR = Pair((), (), steps_per_epoch=STEPS, epochs=EPOCHS)


def test_the_published_warm_up_is_a_twelfth_of_the_epochs():
    """Four of 48, as 20 of 240; the first step has no weight, and all of the rest the whole."""
    weights = [float(recipes.over_epochs(PAIR)(step)) for step in range(STEPS * EPOCHS)]
    np.testing.assert_allclose(weights, np.minimum(np.arange(STEPS * EPOCHS) / (4 * STEPS), 1), rtol=1e-6)


def test_a_weight_may_grow_between_any_two_shares():
    weight = jax.jit(jax.vmap(recipes.over_epochs(PAIR, begin=0.25, end=0.75)))
    steps = jnp.arange(STEPS * EPOCHS)
    expected = np.clip((np.arange(STEPS * EPOCHS) / (STEPS * EPOCHS) - 0.25) / 0.5, 0, 1)
    np.testing.assert_allclose(weight(steps), expected, rtol=1e-5, atol=1e-6)
    assert weight(steps).dtype == jnp.float32


def test_a_run_shorter_than_the_warm_up_takes_one_step():
    weight = recipes.over_epochs(Pair((), (), steps_per_epoch=1, epochs=1))
    assert [float(weight(step)) for step in range(3)] == [0, 1, 1]


@pytest.mark.parametrize('begin, end', [(-0.1, 0.5), (0.5, 0.5), (0.6, 0.5), (0.0, 1.5), (0.0, float('nan'))])
def test_what_are_no_shares_is_refused(begin, end):
    with pytest.raises(
        ValueError, match=rf'^over_epochs: begin and end must be shares of the epochs .*, got {begin} and {end}$'
    ):
        recipes.over_epochs(PAIR, begin=begin, end=end)


def test_decoupled_kd_warms_up():
    """What the step makes of its weight, as the metrics say it."""
    objective, rng = recipes.decoupled_kd(PAIR), np.random.default_rng(0)
    student, teacher = (Outputs(rng.normal(size=(4, 3)).astype(np.float32)) for _ in range(2))
    batch = {'labels': np.array([0, 1, 2, 0], np.int32)}
    nothing = {name: {} for name in objective.names}
    apply = jax.jit(lambda step: objective.apply(nothing, nothing, student, teacher, batch, step=step)[1])
    weights = [float(apply(jnp.int32(step))['dkd/weight'].total) for step in (0, 10, 20, 200)]
    np.testing.assert_allclose(weights, [0.0, 0.5, 1.0, 1.0], rtol=1e-6)
