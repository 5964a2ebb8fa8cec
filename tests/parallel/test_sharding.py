"""Data parallelism and FSDP: the layout of every array, and steps that equal those of one device."""

import collections

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdjax import metrics, networks, objectives, parallel, pruning, training

BATCH = 32
RNG = np.random.default_rng(0)
DATA = {
    'inputs': RNG.normal(size=(2 * BATCH, 4, 4, 16)).astype(np.float32),
    'labels': RNG.integers(0, 10, 2 * BATCH).astype(np.int32),
}


class Network(nn.Module):
    """Batch norm between a layer that is split along its last axis and one that is along its first."""

    width: int

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name='norm')(nn.Dense(64, name='embed')(x))
        x = x.reshape(len(x), -1)
        hidden = nn.relu(nn.Dense(self.width, name='hidden')(x))
        return nn.Dense(10, name='head')(hidden)


STUDENT = networks.from_linen(Network(32), features='hidden')
TEACHER = networks.from_linen(Network(64), features='hidden')


def make_problem():
    objective = objectives.combine(
        hard=objectives.hard_labels(),
        soft=objectives.soft_targets(temperature=2.0),
        distances=5.0 * objectives.rkd_distance('hidden', 'hidden'),
        hint=objectives.hint('hidden', 'hidden'),
    )
    optimizer = pruning.prune(optax.sgd(0.02, momentum=0.9), sparsity=pruning.one_shot(0.5, step=1))
    return training.distillation(STUDENT, TEACHER, objective, optimizer, objective_optimizer=optax.sgd(0.02))


@pytest.fixture(scope='module')
def problem():
    return make_problem()


@pytest.fixture(scope='module')
def teacher_variables():
    return TEACHER.init(jax.random.key(1), DATA['inputs'][:1])


def batch_at(start):
    return {name: array[start : start + BATCH] for name, array in DATA.items()}


def run(problem, teacher_variables, steps, place=lambda tree: tree, state=None):
    """Steps through the data; without a state from the beginning."""
    if state is None:
        state = place(problem.init(jax.random.key(0), batch_at(0)))
    teacher_variables, losses = place(teacher_variables), []
    for number in range(steps):
        state, measured = problem.step(state, teacher_variables, batch_at(number % 2 * BATCH))
        losses.append(metrics.compute(measured)['loss'])
    return state, losses


def host(state):
    return jax.device_get(state._replace(key=jax.random.key_data(state.key)))


@pytest.fixture(scope='module')
def alone(problem, teacher_variables):
    return run(problem, teacher_variables, 4)


def parts(leaf):
    """Into how many different pieces an array is split."""
    return len({str(shard.index) for shard in leaf.addressable_shards})


@pytest.mark.parametrize('fsdp, data', [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_equals_one_device_in_every_array_and_keeps_its_layout(problem, teacher_variables, alone, fsdp, data):
    mesh = parallel.data_parallel(fsdp=fsdp)
    assert dict(mesh.shape) == {'data': data, 'fsdp': fsdp}
    start = parallel.shard(mesh, problem.init(jax.random.key(0), batch_at(0)))
    before = jax.tree.map(lambda leaf: leaf.sharding, start)
    state, losses = run(
        parallel.distribute(mesh, problem), teacher_variables, 4, lambda tree: parallel.shard(mesh, tree), start
    )
    chex.assert_trees_all_close(host(alone[0]), host(state), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(losses, alone[1], rtol=1e-5)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == before
    kernel = state.params['hidden']['kernel']
    assert kernel.addressable_shards[0].data.shape == (1024 // fsdp, 32)
    assert np.sum(np.asarray(kernel) == 0) == pytest.approx(kernel.size / 2, rel=0.1), 'the pruning of all layers together'
    # The kernel, its momentum and its mask are split; nothing else is large enough.
    assert collections.Counter(map(parts, jax.tree.leaves(state)))[fsdp] == (3 if fsdp > 1 else len(jax.tree.leaves(state)))


def test_the_teacher_is_split_too(teacher_variables):
    placed = parallel.shard(parallel.data_parallel(fsdp=8), teacher_variables)
    assert placed['params']['hidden']['kernel'].addressable_shards[0].data.shape == (128, 64)
    assert parts(placed['params']['head']['kernel']) == 1


def test_compiles_once(teacher_variables, caplog):
    mesh = parallel.data_parallel(fsdp=8)
    counted = parallel.distribute(mesh, make_problem())
    start = counted.init(jax.random.key(0), batch_at(0))
    with jax.log_compiles():
        run(counted, teacher_variables, 4, lambda tree: parallel.shard(mesh, tree), start)
    assert sum(record.getMessage().startswith('Compiling jit(step)') for record in caplog.records) == 1


def test_epochs_on_a_mesh_equal_one_device(problem, teacher_variables, caplog):
    mesh, ends = jax.make_mesh((2, 4), ('data', 'fsdp')), []  # with Explicit axes
    for where in (None, mesh):
        epoch = training.in_memory_epoch(problem, batch_size=BATCH, mesh=where, steps_per_dispatch=2)
        state, teacher = problem.init(jax.random.key(0), batch_at(0)), teacher_variables
        if where is not None:
            state, teacher = parallel.shard(mesh, (state, teacher))
        caplog.clear()
        with jax.log_compiles():
            for _ in range(2):
                state, _ = epoch(state, teacher, DATA if where is None else parallel.replicate(mesh, DATA))
        assert sum(record.getMessage().startswith('Compiling jit(dispatch)') for record in caplog.records) == 1
        ends.append(state)
    chex.assert_trees_all_close(*map(host, ends), rtol=1e-5, atol=1e-5)
    assert parts(ends[1].params['hidden']['kernel']) == 4


def test_saved_on_one_mesh_and_restored_on_another(problem, teacher_variables, alone, tmp_path):
    eight, four = parallel.data_parallel(fsdp=8), parallel.data_parallel(jax.devices()[:4], fsdp=2)
    state, _ = run(parallel.distribute(eight, problem), teacher_variables, 2, lambda tree: parallel.shard(eight, tree))
    with training.checkpoint_manager(tmp_path) as manager:
        training.save(manager, 1, state)
        manager.wait_until_finished()
        like = parallel.shard(four, problem.init(jax.random.key(5), batch_at(0)))
        _, restored = training.restore_newest(manager, like)
    chex.assert_trees_all_equal(host(state), host(restored))
    assert restored.params['hidden']['kernel'].sharding == like.params['hidden']['kernel'].sharding
    moved, _ = run(parallel.distribute(four, problem), teacher_variables, 2, lambda tree: parallel.shard(four, tree), restored)
    chex.assert_trees_all_close(host(alone[0]), host(moved), rtol=1e-5, atol=1e-5)


def test_evaluation_splits_its_batches_and_counts_every_example_once(problem, teacher_variables):
    mesh = parallel.data_parallel(fsdp=8)
    examples = {name: array[:53] for name, array in DATA.items()}
    student_variables = STUDENT.init(jax.random.key(3), DATA['inputs'][:1])
    expected, measured = (
        metrics.compute(
            training.evaluator(STUDENT, teacher=TEACHER, batch_size=20)(
                place(student_variables), examples, place(teacher_variables)
            )
        )
        for place in (lambda tree: tree, lambda tree: parallel.shard(mesh, tree))
    )
    for name, value in expected.items():
        np.testing.assert_allclose(measured[name], value, rtol=1e-5, err_msg=name)


def test_layout_comes_from_shapes_alone(problem):
    mesh = parallel.data_parallel(fsdp=8)
    shapes = jax.eval_shape(problem.init, jax.random.key(0), batch_at(0))
    placed = parallel.shard(mesh, problem.init(jax.random.key(0), batch_at(0)))
    assert parallel.shardings(mesh, shapes) == jax.tree.map(lambda leaf: leaf.sharding, placed)


@pytest.mark.parametrize(
    'shape, spec',
    [
        ((128, 128), ('fsdp',)),
        ((127, 128), ()),
        ((127, 136), (None, 'fsdp')),
        ((3, 3, 512, 16), (None, None, 'fsdp')),
        ((201, 203), ()),
        ((2**14,), ('fsdp',)),
    ],
)
def test_the_longest_axis_that_divides_is_split(shape, spec):
    mesh = parallel.data_parallel(fsdp=8)
    assert parallel.shardings(mesh, jax.ShapeDtypeStruct(shape, jnp.float32)).spec == PartitionSpec(*spec)


def test_a_mesh_with_data_alone_still_serves():
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    assert parallel.shard_batch(mesh, batch_at(0))['inputs'].addressable_shards[0].data.shape == (BATCH // 8, 4, 4, 16)
    assert parallel.shard(mesh, jnp.ones((256, 256))).is_fully_replicated


def test_a_host_alone_has_the_whole_batch():
    mesh = parallel.data_parallel(fsdp=2)
    one, other = parallel.shard_batch(mesh, batch_at(0)), parallel.batch_from_hosts(mesh, batch_at(0))
    chex.assert_trees_all_equal(one, other)
    assert one['inputs'].sharding == other['inputs'].sharding
    with pytest.raises(ValueError, match='a batch of 12 does not divide over 8 devices'):
        parallel.batch_from_hosts(mesh, {'inputs': np.ones((12, 2), np.float32)})


def test_fsdp_must_divide_the_devices():
    with pytest.raises(ValueError, match='fsdp must divide the 8 devices, got 3'):
        parallel.data_parallel(fsdp=3)
    with pytest.raises(ValueError, match='a batch of 12 does not divide over 8 devices: use 8 or 16'):
        parallel.shard_batch(parallel.data_parallel(fsdp=4), {'inputs': jnp.ones((12, 2))})


def test_a_mesh_with_explicit_axes_serves_as_one_with_auto_axes(problem, teacher_variables, alone):
    """It is what `jax.make_mesh` makes by default. A batch may be on it already."""
    mesh = jax.make_mesh((8,), ('data',))
    assert mesh.axis_types == (AxisType.Explicit,)
    assert parallel.batch_sharding(mesh).mesh.axis_types == (AxisType.Auto,)

    def place(tree):
        return parallel.shard(mesh, tree)

    distributed = parallel.distribute(mesh, problem)
    first = jax.device_put(batch_at(0), NamedSharding(mesh, PartitionSpec('data')))
    state, measured = distributed.step(place(problem.init(jax.random.key(0), batch_at(0))), place(teacher_variables), first)
    np.testing.assert_allclose(metrics.compute(measured)['loss'], alone[1][0], rtol=1e-5)
    state, losses = run(distributed, teacher_variables, 4, place)
    np.testing.assert_allclose(losses, alone[1], rtol=1e-5)
    chex.assert_trees_all_close(host(alone[0]), host(state), rtol=1e-5, atol=1e-5)
