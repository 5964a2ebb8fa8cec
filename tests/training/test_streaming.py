"""Streaming epochs: which examples are seen, where a run resumes, and what the reader may not do."""

import gc
import multiprocessing

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import networks, objectives, parallel, training

EXAMPLES, BATCH_SIZE = 14, 4
STEPS = EXAMPLES // BATCH_SIZE
NETWORK = networks.from_linen(nn.Dense(3))
RNG = np.random.default_rng(0)
# The first number of an input says which example it is, so that a sum says which were in a batch.
ARRAYS = {
    'inputs': np.stack([2.0 ** np.arange(EXAMPLES), RNG.normal(size=EXAMPLES)], axis=1).astype(np.float32),
    'labels': RNG.integers(0, 3, EXAMPLES).astype(np.int32),
}
SOURCE = [{name: array[i] for name, array in ARRAYS.items()} for i in range(EXAMPLES)]


class Reads:
    """The source, with a note of every example that is read."""

    def __init__(self):
        self.indices = []

    def __len__(self):
        return EXAMPLES

    def __getitem__(self, index):
        self.indices.append(index)
        return SOURCE[index]


class Batches(Reads):
    """The same, which reads a batch at once."""

    def __getitems__(self, indices):
        self.indices.append(tuple(indices))
        return [SOURCE[i] for i in indices]


def seen(student, teacher, batch):
    """Which examples, as the sum of their powers of two, and some slope to follow."""
    return batch['inputs'][:, 0]


PROBLEM = training.distillation(
    networks.preprocess(NETWORK, lambda x: x[:, 1:]),
    None,
    objectives.from_function('seen', seen) + objectives.hard_labels(),
    optax.sgd(0.1, momentum=0.9),
)


@pytest.fixture(scope='module')
def begin():
    return jax.jit(PROBLEM.init)


@pytest.fixture(scope='module')
def run():
    return training.streaming_epoch(PROBLEM, batch_size=BATCH_SIZE)


def sums(measured):
    return [int(some['seen'].total[0]) for some in measured]


def host(state):
    return jax.device_get(state._replace(key=jax.random.key_data(state.key)))


def train(run, state, data, epochs):
    """The state after some epochs, and which examples were seen in each."""
    orders = []
    for _ in range(epochs):
        state, measured = run(state, {}, data)
        orders.append(sums(measured))
    return state, orders


def test_every_example_is_seen_at_most_once_an_epoch(run, begin):
    """And none is left out for good: those that do not fill a batch change with the order, which the key decides."""
    _, orders = train(run, begin(jax.random.key(0), ARRAYS), SOURCE, 6)
    assert [len(order) for order in orders] == [STEPS] * 6
    for order in orders:
        assert np.bitwise_or.reduce(order) == sum(order)
        assert sum(order).bit_count() == STEPS * BATCH_SIZE
    assert len(set(map(tuple, orders))) == 6
    assert np.bitwise_or.reduce([sum(order) for order in orders]) == 2**EXAMPLES - 1
    _, again = train(run, begin(jax.random.key(0), ARRAYS), SOURCE, 2)
    _, other = train(run, begin(jax.random.key(1), ARRAYS), SOURCE, 2)
    assert again == orders[:2]
    assert other != orders[:2]


@pytest.mark.parametrize('data', [ARRAYS, Batches()], ids=['arrays', 'batches'])
def test_all_kinds_of_data_are_read_in_the_same_order(data, run, begin):
    one, orders = train(run, begin(jax.random.key(0), ARRAYS), SOURCE, 2)
    other, same = train(run, begin(jax.random.key(0), ARRAYS), data, 2)
    assert orders == same
    chex.assert_trees_all_equal(host(one), host(other))


@pytest.mark.parametrize('at', [1, 2, STEPS, STEPS + 2])
def test_a_run_that_was_stopped_goes_on_with_the_very_same_examples(at, run, begin):
    """In a process of its own, so with a fresh reader; bit for bit."""
    whole, orders = train(run, begin(jax.random.key(0), ARRAYS), SOURCE, 2)
    asked = []

    def stop():
        asked.append(None)
        return len(asked) == at

    state, first = begin(jax.random.key(0), ARRAYS), []
    for _ in range(-(-at // STEPS)):
        state, measured = run(state, {}, SOURCE, stop)
        first += sums(measured)
    assert (len(first), int(state.step)) == (at, at)
    fresh = training.streaming_epoch(PROBLEM, batch_size=BATCH_SIZE)
    state, then = train(fresh, state, SOURCE, 2 - at // STEPS)
    np.testing.assert_array_equal(np.concatenate([first, *then]), np.concatenate(orders))
    chex.assert_trees_all_equal(host(state), host(whole))


def test_reading_goes_on_from_epoch_to_epoch(begin):
    """So nothing is read twice, and not much more than is needed."""
    source = Reads()
    run = training.streaming_epoch(PROBLEM, batch_size=BATCH_SIZE)
    train(run, begin(jax.random.key(0), ARRAYS), source, 5)
    del run
    assert 5 * STEPS * BATCH_SIZE <= len(source.indices) <= (5 * STEPS + 12) * BATCH_SIZE
    batches = Batches()
    run = training.streaming_epoch(PROBLEM, batch_size=BATCH_SIZE)
    train(run, begin(jax.random.key(0), ARRAYS), batches, 1)
    assert {len(indices) for indices in batches.indices} == {BATCH_SIZE}
    # Another run takes up the same function from its own beginning.
    _, orders = train(run, begin(jax.random.key(3), ARRAYS), batches, 1)
    assert orders == train(run, begin(jax.random.key(3), ARRAYS), SOURCE, 1)[1]


def test_workers_change_nothing_and_end_with_the_function(run, begin):
    _, orders = train(run, begin(jax.random.key(0), ARRAYS), SOURCE, 2)
    workers = training.streaming_epoch(PROBLEM, batch_size=BATCH_SIZE, workers=2)
    recorded = {'rest': np.arange(EXAMPLES, dtype=np.float32)}
    _, same = train(workers, begin(jax.random.key(0), ARRAYS), training.JoinedSource(SOURCE, recorded), 2)
    assert orders == same
    assert len(multiprocessing.active_children()) == 2
    del workers
    gc.collect()
    assert not multiprocessing.active_children()


def mean_input(student, teacher, batch):
    return batch['inputs'].mean(axis=-1)


@pytest.mark.parametrize('views', [None, 2])
def test_examples_are_augmented_as_on_the_device(views):
    """The sum over an epoch of all examples is the same, whatever the order; views come again."""

    def noisy(key, x):
        return x + jax.random.uniform(key, x.shape)

    how = {'augment': noisy} if views is None else {'views': training.Views(noisy, jax.random.key(4), views)}
    problem = training.distillation(NETWORK, None, objectives.from_function('mean', mean_input), optax.sgd(0.0))
    data = {'inputs': np.zeros((12, 3), np.float32)}
    totals = []
    for make in (training.streaming_epoch, training.in_memory_epoch):
        run, state = make(problem, batch_size=4, **how), jax.jit(problem.init)(jax.random.key(0), data)
        for _ in range(3):
            state, measured = run(state, {}, data)
            totals.append(sum(float(some['mean'].total[0]) for some in measured))
    np.testing.assert_allclose(totals[:3], totals[3:], rtol=1e-6)
    assert len({round(total, 4) for total in totals}) == (3 if views is None else 2)


def test_recorded_logits_join_the_examples(tmp_path):
    """Of the view that the epoch shows; training is then that with the teacher, on the same images."""
    views = training.Views(lambda key, x: x * jax.random.uniform(key, (2,)), jax.random.key(4), 2)
    variables = jax.jit(NETWORK.init)(jax.random.key(1), ARRAYS['inputs'])
    recorded = training.record_teacher(NETWORK, variables, ARRAYS, tmp_path, batch_size=BATCH_SIZE, views=views)
    ends = []
    for problem, data, teacher_variables in (
        (training.distillation(NETWORK, NETWORK, objectives.logit_mse(), optax.sgd(1e-9)), SOURCE, variables),
        (
            training.distillation(NETWORK, None, objectives.from_recorded_logits(objectives.logit_mse()), optax.sgd(1e-9)),
            training.JoinedSource(SOURCE, recorded),
            {},
        ),
    ):
        batch = training.one_view({**ARRAYS, **recorded}, 0)
        state = jax.jit(problem.init)(jax.random.key(0), batch)
        run = training.streaming_epoch(problem, batch_size=BATCH_SIZE, views=views)
        for _ in range(3):
            state, measured = run(state, teacher_variables, data)
        ends.append((host(state), jax.device_get(measured)))
    chex.assert_trees_all_equal(*ends)
    with pytest.raises(ValueError, match='was recorded with other views'):
        training.streaming_epoch(problem, batch_size=4, views=views._replace(number=3))(state, {}, data)


def test_eight_devices_are_as_one(run, begin):
    mesh, state = parallel.data_parallel(), begin(jax.random.key(0), ARRAYS)
    data = {name: np.concatenate([array, array]) for name, array in ARRAYS.items()}
    alone, orders = train(training.streaming_epoch(PROBLEM, batch_size=8), jax.tree.map(jnp.copy, state), data, 1)
    together, same = train(training.streaming_epoch(PROBLEM, batch_size=8, mesh=mesh), parallel.shard(mesh, state), data, 1)
    assert orders == same
    chex.assert_trees_all_close(host(alone).params, host(together).params, rtol=1e-5, atol=1e-6)


def test_it_goes_where_an_epoch_goes(tmp_path):
    """Into `fit`, which resumes a run bit for bit."""
    arguments = {'key': jax.random.key(0), 'batch_size': BATCH_SIZE, 'progress': False}
    whole = training.fit(PROBLEM, SOURCE, epochs=3, **arguments)
    training.fit(PROBLEM, SOURCE, epochs=1, directory=tmp_path, **arguments)
    resumed = training.fit(PROBLEM, SOURCE, epochs=3, directory=tmp_path, **arguments)
    assert resumed.resumed_from == STEPS
    chex.assert_trees_all_equal(host(whole.state), host(resumed.state))


def test_bad_arguments(run, begin):
    state = begin(jax.random.key(0), ARRAYS)
    for arguments in ({'batch_size': 0}, {'batch_size': 4, 'workers': -1}):
        with pytest.raises(ValueError, match='batch_size must be at least 1 and workers at least 0'):
            training.streaming_epoch(PROBLEM, **arguments)
    with pytest.raises(ValueError, match='a batch of 12 does not divide over 8 devices'):
        training.streaming_epoch(PROBLEM, batch_size=12, mesh=parallel.data_parallel())
    with pytest.raises(ValueError, match=r"the source has 14 examples, and the arrays have \{'rest': 3\}"):
        training.JoinedSource(SOURCE, {'rest': np.zeros(3)})
    with pytest.raises(ValueError, match='has 3 examples, fewer than one batch of 4'):
        run(state, {}, SOURCE[:3])
    with pytest.raises(ValueError, match="an example needs 'inputs', got image, label: map the source to these names"):
        run(state, {}, [{'image': np.zeros(2), 'label': 0}] * EXAMPLES)
    ragged = [{'inputs': np.zeros(2 + i % 2, np.float32)} for i in range(EXAMPLES)]
    with pytest.raises(ValueError, match=r"the examples have 'inputs' of 2 shapes, such as \[\(2,\), \(3,\)\]"):
        run(state, {}, ragged)
