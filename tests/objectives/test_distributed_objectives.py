"""Objectives that remember and that relate the examples of a batch: eight devices give what one gives, and runs resume."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.objective_checks import compile_quickly
from jax.sharding import NamedSharding, PartitionSpec

from kdjax import losses, networks, objectives, parallel, training

BATCH, EXAMPLES = 16, 24
LABELS = np.arange(EXAMPLES, dtype=np.int32) % 3


class Stages(nn.Module):
    """Two stages and a head."""

    width: int

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.tanh(nn.Conv(self.width, (2, 2), name='first')(x))
        x = nn.tanh(nn.Conv(2 * self.width, (2, 2), (2, 2), name='last')(x))
        return nn.Dense(3)(x.mean((1, 2)))


def make():
    """The problem, its teacher and three batches, of which the last has a mask."""
    paths = ('first', 'last')
    student, teacher = (networks.from_linen(Stages(width), features=paths) for width in (2, 3))
    pair = ('last', 'last')
    objective = objectives.combine(
        pkt=100.0 * objectives.pkt(*pair),
        rkd_distance=objectives.rkd_distance(*pair),
        rkd_angle=objectives.rkd_angle(*pair),
        congruence=objectives.correlation_congruence(*pair),
        graph=0.1 * objectives.instance_graph(paths, paths),
        dist=objectives.dist(),
        info_nce=objectives.info_nce(*pair, width=4),
        context=objectives.hierarchical_context(paths, paths),
        crd=0.1 * objectives.crd(*pair, LABELS, negatives=7, width=4),
        standardized=objectives.pearson_features(*pair),
        channels=objectives.inter_channel(*pair),
        srd=objectives.srd(*pair),
        reuse=objectives.simkd(*pair),
        calibration=objectives.semckd(paths, paths, width=3),
        dense=objectives.fbkd(*pair, guided=0.1, attention=0.1, non_local=0.1),
        generation=objectives.masked_generation(*pair),
        factors=objectives.factor_transfer(*pair, pretraining=2),
    )
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(EXAMPLES, 4, 4, 1)).astype(np.float32)
    orders = [rng.permutation(EXAMPLES)[:BATCH].astype(np.int32) for _ in range(3)]
    mask = np.ones(BATCH, bool)
    batches = [{'inputs': inputs[i], 'labels': LABELS[i], 'index': i, 'mask': mask} for i in orders]
    batches[-1]['mask'] = np.arange(BATCH) % 5 != 0
    problem = training.distillation(student, teacher, objective, optax.sgd(0.01), objective_optimizer=optax.adam(1e-2))
    problem = problem._replace(step=compile_quickly(problem.step.__wrapped__))
    return problem, filled(jax.eval_shape(teacher.init, jax.random.key(9), inputs[:1]), 1), batches


def filled(shapes, seed):
    """Numbers in place of shapes; to have the networks and connectors draw them takes seconds."""
    rng = np.random.default_rng(seed)

    def fill(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(seed)
        return jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype)

    return jax.tree.map(fill, shapes)


def start(problem, batch):
    """A random state of training, with the labels as they are and nothing in the optimizers."""
    state = filled(jax.eval_shape(problem.init, jax.random.key(0), batch), 2)
    state.objective_state['crd'] |= {'classes': losses.class_index(LABELS)._asdict(), 'normalizers': jnp.zeros(2)}
    empty = jax.tree.map(jnp.zeros_like, (state.step, state.opt_state, state.objective_opt_state))
    state = state._replace(step=empty[0], opt_state=empty[1], objective_opt_state=empty[2])
    # Committed to its device as a restored state is, which then needs no program of its own.
    return jax.device_put(state, jax.devices()[0])


@pytest.fixture(scope='module')
def run():
    """One device's run: the problem, the states before, between and after three steps, and the metrics of the steps."""
    problem, teacher_variables, batches = make()
    states, metrics = [start(problem, batches[0])], []
    for batch in batches:
        state, measured = problem.step(states[-1], teacher_variables, batch)
        states.append(state)
        metrics.append(jax.device_get(measured))
    return problem, teacher_variables, batches, states, metrics


def host(state):
    """A state as numpy arrays."""
    return jax.tree.map(
        lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x), state
    )


def test_eight_devices_give_what_one_gives_with_banks_sharded_over_their_rows(run):
    problem, teacher_variables, batches, states, metrics = run
    mesh = parallel.data_parallel()
    teacher_variables = parallel.replicate(mesh, teacher_variables)
    rows = NamedSharding(mesh, PartitionSpec('data'))
    # Each step begins where one device stood: Adam divides by the size of the gradient, and makes much of one that is zero but
    # for rounding, which would add up over the steps.
    for i, batch in enumerate(batches):
        state = parallel.replicate(mesh, states[i])
        for name in ('student_bank', 'teacher_bank'):
            state.objective_state['crd'][name] = jax.device_put(state.objective_state['crd'][name], rows)
        state, measured = problem.step(state, teacher_variables, parallel.shard_batch(mesh, batch))
        assert len(measured['loss'].total.sharding.device_set) == 8
        for x, y in zip(jax.tree.leaves(measured), jax.tree.leaves(metrics[i]), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
        one, eight = host(states[i + 1]), host(state)
        for part in ('params', 'objective_state', 'key'):
            for x, y in zip(jax.tree.leaves(getattr(one, part)), jax.tree.leaves(getattr(eight, part)), strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_a_run_resumes_bit_for_bit(run, tmp_path):
    """Banks, their constants and key, the key of the masks, and the paraphraser that is about to stay as it is."""
    problem, teacher_variables, batches, states, _ = run
    with training.checkpoint_manager(tmp_path) as manager:
        training.save(manager, 1, states[1])
        manager.wait_until_finished()
        epoch, state = training.restore_newest(manager, states[0])
    assert epoch == 1
    for batch in batches[1:]:
        state, _ = problem.step(state, teacher_variables, batch)
    resumed, straight = host(state), host(states[-1])
    assert jax.tree.structure(resumed) == jax.tree.structure(straight)
    for x, y in zip(jax.tree.leaves(resumed), jax.tree.leaves(straight), strict=True):
        np.testing.assert_array_equal(x, y)
    first = host(states[0])
    for name in ('student_bank', 'teacher_bank', 'normalizers'):
        assert not np.array_equal(first.objective_state['crd'][name], straight.objective_state['crd'][name])
