"""Checkpoints on disk: what is damaged is found out and passed over, a full disk says so, and devices may change."""

import gc
import pathlib
import resource
import shutil
import warnings

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import networks, objectives, parallel, training
from kdjax.training import _checkpoints
from kdjax.training._checksums import checksums

# Orbax abandons coroutines where a file is damaged; Python says so when it collects them, which must not be in another test.
pytestmark = pytest.mark.filterwarnings(
    'ignore::pytest.PytestUnraisableExceptionWarning', 'ignore:coroutine .* was never awaited:RuntimeWarning'
)


@pytest.fixture(autouse=True)
def collect_coroutines():
    gc.freeze()  # what all tests before have left behind, which takes seconds to look through
    yield
    gc.collect()
    gc.unfreeze()


def state_after(step):
    """A state of all kinds of leaves, told apart by its step."""
    params = {'kernel': jax.random.normal(jax.random.key(step), (5, 3)), 'half': jnp.full(7, step / 3, jnp.bfloat16)}
    return training.TrainState(
        step=jnp.int32(step),
        params=params,
        model_state={'seen': jnp.arange(6).reshape(2, 3) + step},
        opt_state=(jnp.uint8(step), jnp.array([True, False])),
        objective_params={},
        objective_state={},
        objective_opt_state=(),
        key=jax.random.key(step),
    )


SETTINGS = {'batch_size': 16}


def host(state):
    return jax.device_get(state._replace(key=jax.random.key_data(state.key)))


def write(folder, steps=(4, 8)):
    with training.checkpoint_manager(folder, monitor='accuracy') as manager:
        for step in steps:
            training.save(manager, step, state_after(step), {'accuracy': step / 10}, SETTINGS)


def read(folder, settings=SETTINGS):
    with training.checkpoint_manager(folder, monitor='accuracy') as manager:
        return training.restore_newest(manager, state_after(0), settings)


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1 << int(place * 7)
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = {
    'a bit at the start': lambda file: flip(file, 0.05),
    'a bit in the middle': lambda file: flip(file, 0.5),
    'a bit at the end': lambda file: flip(file, 0.95),
    'half of it': truncate,
    'all of its bytes': lambda file: file.write_bytes(b''),
    'all of it': pathlib.Path.unlink,
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_damage_to_any_file_is_found_out_or_does_no_harm(tmp_path, damage):
    """Each file of the newest checkpoint in turn: the state is the one that was saved, or the one before with a warning."""
    write(tmp_path / 'whole')
    files = [path.relative_to(tmp_path / 'whole') for path in (tmp_path / 'whole' / '8').rglob('*') if path.is_file()]
    passed_over = 0
    for number, file in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / 'whole', folder)
        DAMAGES[damage](folder / file)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            step, state = read(folder)
        assert step in (4, 8)
        chex.assert_trees_all_equal(host(state), host(state_after(step)))
        if step == 4:
            assert any('checkpoint 8 ' in str(each.message) for each in caught), f'{file}: no warning'
            passed_over += 1
            write(folder, steps=(8,))
            assert read(folder)[0] == 8, f'{file}: what was left blocks the next save'
    assert passed_over >= 2


def test_every_bit_counts_in_the_checksum():
    leaves = {
        'float': jnp.array([1.0, -0.0, jnp.nan]),
        'half': jnp.array([1.0, 2.0], jnp.bfloat16),
        'int': jnp.array([[-1, 2]], jnp.int8),
        'bool': jnp.array([True, False]),
        'complex': jnp.array([1 + 2j]),
        'key': jax.random.key(3),
    }
    names = list(jax.tree.leaves({name: name for name in leaves}))
    before = checksums(leaves)
    for name, array in leaves.items():
        raw = np.array(jax.random.key_data(array) if name == 'key' else array)
        for bit in range(1 if name == 'bool' else 8 * raw.dtype.itemsize):
            changed = raw.copy()
            view = changed.reshape(-1)[-1:].view(np.uint8)
            view[bit // 8] ^= 1 << (bit % 8)
            changed = jax.random.wrap_key_data(jnp.asarray(changed)) if name == 'key' else jnp.asarray(changed)
            after = checksums({**leaves, name: changed})
            assert [each for each, one, other in zip(names, before, after, strict=True) if one != other] == [name], bit
    swapped = checksums({**leaves, 'half': leaves['half'][::-1]})
    assert (swapped != before).sum() == 1


def test_checksum_is_a_sum_with_odd_weights_and_ignores_the_layout():
    values = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    bits = values.view(np.uint32).astype(object).ravel()
    expected = sum((2 * i + 1) * int(b) for i, b in enumerate(bits)) % 2**32
    mesh = parallel.data_parallel()
    for layout in (jnp.asarray(values), parallel.shard_batch(mesh, values), parallel.replicate(mesh, values)):
        assert checksums({'x': layout}).tolist() == [expected]


def test_damaged_metrics_of_an_older_checkpoint_cost_it_the_title_only(tmp_path):
    with training.checkpoint_manager(tmp_path, monitor='accuracy') as manager:
        for step, accuracy in ((4, 0.9), (8, 0.8), (12, 0.1)):
            training.save(manager, step, state_after(step), {'accuracy': accuracy}, SETTINGS)
    file = tmp_path / '4' / 'metrics' / 'metrics'
    file.write_text(file.read_text().replace('0.9', '0.7'))
    with pytest.warns(UserWarning, match='checkpoint 4 does not count as the best'):
        manager = training.checkpoint_manager(tmp_path, monitor='accuracy')
    with manager:
        assert training.restore_newest(manager, state_after(0), SETTINGS)[0] == 12
        assert training.restore_best(manager, state_after(0))[0] == 8


def test_a_damaged_best_checkpoint_makes_way_for_the_next_best(tmp_path):
    with training.checkpoint_manager(tmp_path, monitor='accuracy') as manager:
        for step, accuracy in ((4, 0.9), (8, 0.8), (12, 0.1)):
            training.save(manager, step, state_after(step), {'accuracy': accuracy}, SETTINGS)
    shutil.rmtree(tmp_path / '4' / 'default' / 'd')
    manager = training.checkpoint_manager(tmp_path, monitor='accuracy')
    with manager, pytest.warns(UserWarning, match=r'the best checkpoint 4 in .* cannot be read; the next best counts'):
        step, state = training.restore_best(manager, state_after(0))
    assert step == 8
    chex.assert_trees_all_equal(host(state), host(state_after(8)))


def test_other_settings_are_refused_in_one_line(tmp_path):
    write(tmp_path)
    with pytest.raises(
        ValueError, match=r'checkpoint 8 in .* is of a run with batch_size 16, not 32: .*another folder'
    ) as raised:
        read(tmp_path, {'batch_size': 32})
    assert len(str(raised.value).splitlines()) == 1
    assert read(tmp_path)[0] == 8


@pytest.mark.parametrize('limit', [200, 4000, 30_000])
def test_a_full_disk_says_so_and_keeps_the_last_good_checkpoint(tmp_path, limit):
    """Files may not grow beyond the limit, which stops a save at its metadata or at its arrays."""
    state = state_after(4)
    large = state._replace(params={'kernel': jax.random.normal(jax.random.key(0), (200, 200))})
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    with training.checkpoint_manager(tmp_path) as manager:
        training.save(manager, 4, large, settings=SETTINGS)
    manager = training.checkpoint_manager(tmp_path)

    def save_and_wait():
        training.save(manager, 8, large, settings=SETTINGS)
        _checkpoints.wait(manager)

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    try:
        with pytest.raises(
            OSError, match=r'could not be written to .*; the last whole one is of step 4: File too large'
        ) as raised:
            save_and_wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert len(str(raised.value).splitlines()) == 1
    _checkpoints.close(manager)
    with training.checkpoint_manager(tmp_path) as manager:
        step, restored = training.restore_newest(manager, large, SETTINGS)
        assert step == 4
        chex.assert_trees_all_equal(host(restored), host(large))
        training.save(manager, 8, large, settings=SETTINGS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['4', '8']


def test_a_run_goes_on_with_other_numbers_of_devices(tmp_path):
    """Eight devices, then one, then four: what is restored is what was saved, and training goes on as if nothing were."""
    network = networks.from_linen(nn.Dense(3))
    problem = training.distillation(network, None, objectives.hard_labels(), optax.sgd(0.1, momentum=0.9))
    rng = np.random.default_rng(0)
    data = {'inputs': rng.normal(size=(72, 5)).astype(np.float32), 'labels': rng.integers(0, 3, 72).astype(np.int32)}

    def fit(devices, epochs, **more):
        mesh = parallel.data_parallel(jax.devices()[:devices])
        arguments = {'key': jax.random.key(0), 'batch_size': 16, 'mesh': mesh, 'progress': False}
        return training.fit(problem, data, epochs=epochs, **arguments, **more)

    whole, saved = fit(8, 3), None
    for epochs, devices in enumerate((8, 1, 4), start=1):
        mesh = parallel.data_parallel(jax.devices()[:devices])
        if saved is not None:
            like = parallel.replicate(mesh, problem.init(jax.random.key(0), data))
            with training.checkpoint_manager(tmp_path) as manager:
                _, restored = training.restore_newest(manager, like, {'examples': 72, 'batch_size': 16})
            chex.assert_trees_all_equal(host(restored), saved)
            assert restored.params['kernel'].sharding.device_set == set(jax.devices()[:devices])
        fitted = fit(devices, epochs, directory=tmp_path)
        assert fitted.resumed_from == 4 * (epochs - 1)
        saved = host(fitted.state)
    chex.assert_trees_all_close(saved.params, host(whole.state).params, rtol=1e-5, atol=1e-5)


def test_the_best_is_found_where_the_newest_checkpoints_lie_within_an_epoch(tmp_path):
    with training.checkpoint_manager(tmp_path, monitor='accuracy') as manager:
        training.save(manager, 4, state_after(4), {'accuracy': 0.5}, SETTINGS)
        for step in (5, 6, 7):
            training.save(manager, step, state_after(step), {}, SETTINGS)
        assert training.restore_best(manager, state_after(0))[0] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ['4', '6', '7']


@pytest.mark.parametrize('place', [0.2, 0.5, 0.8])
def test_a_flipped_bit_that_storage_reads_without_a_word_is_found_by_the_checksum(tmp_path, place):
    """Numbers that do not compress are stored as they are."""
    states = [state_after(step) for step in (4, 8)]
    states = [each._replace(params={'kernel': jax.random.normal(each.key, (100, 100))}) for each in states]
    with training.checkpoint_manager(tmp_path) as manager:
        for state in states:
            training.save(manager, int(state.step), state, settings=SETTINGS)
    large = [path for path in (tmp_path / '8').rglob('*') if path.is_file() and path.stat().st_size > 30_000]
    for file in large:
        flip(file, place)
    manager = training.checkpoint_manager(tmp_path)
    with manager, pytest.warns(UserWarning, match=r'8 .* cannot be read; .* 4: state/params/kernel is not what was saved'):
        step, state = training.restore_newest(manager, states[0], SETTINGS)
    assert step == 4
    chex.assert_trees_all_equal(host(state), host(states[0]))


def test_variables_are_read_without_the_optimizer_that_trained_them(tmp_path):
    network = networks.from_linen(nn.Sequential([nn.Dense(4), nn.Dense(3)]))
    data = {'inputs': np.eye(6, dtype=np.float32), 'labels': np.arange(6, dtype=np.int32) % 3}
    problem = training.distillation(network, None, objectives.hard_labels(), optax.adam(0.1))
    ranks = iter([0.2, 0.9, 0.5])
    fitted = training.fit(
        problem,
        data,
        key=jax.random.key(0),
        batch_size=3,
        epochs=3,
        directory=tmp_path / 'run',
        validate=lambda variables: {'accuracy': next(ranks)},
        progress=False,
    )
    assert fitted.best_step == 4
    found = training.restore_variables(tmp_path / 'run')
    chex.assert_trees_all_equal(found, jax.device_get(fitted.best_variables))
    # What is best is a question of the metric.
    newest = training.restore_variables(tmp_path / 'run', monitor='nll')
    chex.assert_trees_all_equal(newest, jax.device_get(fitted.variables))
    with pytest.raises(ValueError, match='is no folder of checkpoints'):
        training.restore_variables(tmp_path / 'none')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='holds no checkpoint that can be read'):
        training.restore_variables(tmp_path / 'empty')


def test_damaged_variables_are_never_returned(tmp_path, monkeypatch):
    network = networks.from_linen(nn.Dense(3))
    data = {'inputs': np.eye(6, dtype=np.float32), 'labels': np.arange(6, dtype=np.int32) % 3}
    problem = training.distillation(network, None, objectives.hard_labels(), optax.sgd(0.1))
    options = {'key': jax.random.key(0), 'batch_size': 3, 'epochs': 1, 'directory': tmp_path / 'run', 'progress': False}
    training.fit(problem, data, **options)
    # As if a bit of one array had changed.
    monkeypatch.setattr(_checkpoints, 'checksums', lambda tree: checksums(tree) ^ (np.arange(len(checksums(tree))) == 0))
    with pytest.raises(ValueError, match='holds no checkpoint that can be read: an array is not what was saved'):
        training.restore_variables(tmp_path / 'run')
