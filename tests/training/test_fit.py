"""Epochs and the loop around them: order, augmentation, resuming, and what goes wrong."""

import gc
import json
import warnings

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.toy_problem import make, spoilt_from

from kdjax import data, metrics, networks, objectives, parallel, training


@pytest.fixture(scope='module')
def problem():
    return make()


@pytest.fixture(scope='module')
def one_epoch(problem):
    return training.in_memory_epoch(problem.distillation, batch_size=16, augment=SHIFT)


SHIFT = data.augment.random_shift(pixels=1)


def fit(problem, epochs=None, **more):
    arguments = {'key': jax.random.key(0), 'batch_size': 16, 'augment': SHIFT, 'progress': False, **more}
    return training.fit(problem.distillation, problem.data, problem.teacher_variables, epochs=epochs, **arguments)


def host(state):
    return jax.device_get(state._replace(key=jax.random.key_data(state.key)))


def validate_with(problem):
    evaluate = training.evaluator(problem.student)
    return lambda variables: evaluate(variables, problem.data)


def recording_distillation():
    """A problem whose 'training' adds up the examples that it sees, in the student's state."""
    network = networks.from_linen(nn.Dense(2))
    seen = objectives.from_function('seen', lambda student, teacher, batch: batch['inputs'][:, 0])
    return training.distillation(network, None, seen, optax.sgd(0.0))


@pytest.mark.parametrize('steps_per_dispatch', [1, 2, 3, None])
def test_every_example_is_seen_once_an_epoch(steps_per_dispatch):
    problem = recording_distillation()
    examples = {'inputs': 2.0 ** np.arange(12, dtype=np.float32)[:, None]}
    run = training.in_memory_epoch(problem, batch_size=4, steps_per_dispatch=steps_per_dispatch)
    state = problem.init(jax.random.key(0), examples)
    orders = []
    for _ in range(2):
        state, measured = run(state, {}, examples)
        totals = np.concatenate([np.asarray(chunk['seen'].total) for chunk in measured])
        assert len(totals) == 3
        assert totals.sum() == 2**12 - 1, 'each power of two exactly once'
        orders.append(tuple(totals))
    assert orders[0] != orders[1], 'a new order each epoch'


def test_steps_per_dispatch_changes_nothing(problem):
    ends = []
    for steps_per_dispatch in (1, 2, 4):
        run = training.in_memory_epoch(problem.distillation, batch_size=16, steps_per_dispatch=steps_per_dispatch)
        state, _ = run(problem.start(), problem.teacher_variables, problem.data)
        ends.append(host(state).params)
    chex.assert_trees_all_close(*ends, rtol=1e-4, atol=1e-4)


def test_augmentation_depends_on_key_epoch_and_index_alone():
    """The same example looks the same in an epoch whatever the batch size, and differs between epochs."""
    network = networks.from_linen(nn.Dense(2))
    seen = objectives.from_function('seen', lambda student, teacher, batch: batch['inputs'][:, 0])
    problem = training.distillation(network, None, seen, optax.sgd(0.0))
    examples = {'inputs': np.zeros((8, 1), np.float32)}
    totals = []
    for batch_size in (1, 2, 8):
        run = training.in_memory_epoch(
            problem, batch_size=batch_size, augment=lambda key, x: x + jax.random.uniform(key, x.shape)
        )
        state, sums = problem.init(jax.random.key(0), examples), []
        for _ in range(2):
            state, measured = run(state, {}, examples)
            sums.append(metrics.add(*measured) if batch_size == 8 else sum(float(m['seen'].total.sum()) for m in measured))
        totals.append([float(np.sum(s['seen'].total)) if isinstance(s, dict) else s for s in sums])
    np.testing.assert_allclose(totals[0], totals[1], rtol=1e-6)
    np.testing.assert_allclose(totals[0], totals[2], rtol=1e-6)
    assert abs(totals[0][0] - totals[0][1]) > 1e-3


def test_epoch_on_eight_devices_equals_one():
    problem = make(optimizer=optax.sgd(0.05, momentum=0.9))
    mesh = parallel.data_parallel()
    alone, _ = training.in_memory_epoch(problem.distillation, batch_size=16)(
        problem.start(), problem.teacher_variables, problem.data
    )
    state, teacher_variables, examples = parallel.replicate(mesh, (problem.start(), problem.teacher_variables, problem.data))
    run = training.in_memory_epoch(problem.distillation, batch_size=16, mesh=mesh)
    together, _ = run(state, teacher_variables, examples)
    chex.assert_trees_all_close(host(alone).params, host(together).params, rtol=1e-5, atol=1e-5)


def test_2n_epochs_equal_n_and_resume_and_n_bit_for_bit(problem, tmp_path):
    whole = fit(problem, 4, directory=tmp_path / 'whole', validate=validate_with(problem))
    fit(problem, 2, directory=tmp_path / 'halves', validate=validate_with(problem))
    resumed = fit(problem, 4, directory=tmp_path / 'halves', validate=validate_with(problem))
    assert (whole.resumed_from, resumed.resumed_from) == (0, 8)
    chex.assert_trees_all_equal(host(whole.state), host(resumed.state))
    assert whole.best_step == resumed.best_step
    chex.assert_trees_all_equal(jax.device_get(whole.best_variables), jax.device_get(resumed.best_variables))


def test_checkpointing_does_not_disturb_training(problem, tmp_path):
    plain = fit(problem, 3)
    saved = fit(problem, 3, directory=tmp_path / 'c', log=tmp_path / 'log.jsonl', validate=validate_with(problem))
    chex.assert_trees_all_equal(host(plain.state), host(saved.state))


def test_a_finished_run_is_returned_as_it_is(problem, tmp_path):
    first = fit(problem, 2, directory=tmp_path / 'c')
    again = fit(problem, 2, directory=tmp_path / 'c')
    assert again.resumed_from == 8
    chex.assert_trees_all_equal(host(first.state), host(again.state))
    with pytest.raises(ValueError, match='holds 8 steps, more than the 4 asked for'):
        fit(problem, 1, directory=tmp_path / 'c')


def test_best_step_is_kept_beside_the_newest(problem, tmp_path):
    accuracies = iter([0.1, 0.9, 0.3, 0.2, 0.1])
    kept = {}

    def validate(variables):
        accuracy = next(accuracies)
        kept[accuracy] = jax.device_get(variables)
        return {'accuracy': metrics.Average(accuracy, 1.0)}

    result = fit(problem, 5, directory=tmp_path / 'c', validate=validate)
    assert result.best_step == 8
    chex.assert_trees_all_equal(jax.device_get(result.best_variables), kept[0.9])
    assert sorted(int(path.name) for path in (tmp_path / 'c').iterdir() if path.is_dir()) == [8, 16, 20]
    found = fit(problem, 5, directory=tmp_path / 'c', validate=validate)
    assert found.best_step == 8
    chex.assert_trees_all_equal(jax.device_get(found.best_variables), kept[0.9])


def test_of_equally_good_epochs_the_last_is_best_however_the_run_was_reached(problem, tmp_path):
    def validate(variables):
        return {'accuracy': metrics.Average(0.5, 1.0)}

    fresh = fit(problem, 4, directory=tmp_path / 'c', validate=validate)
    found = fit(problem, 4, directory=tmp_path / 'c', validate=validate)
    assert fresh.best_step == found.best_step == 16
    chex.assert_trees_all_equal(jax.device_get(fresh.best_variables), jax.device_get(found.best_variables))


@pytest.mark.parametrize('measured', [{'accuracy': metrics.Average(np.nan, 1.0)}, {'nll': metrics.Average(1.0, 1.0)}])
def test_a_monitor_that_is_missing_or_not_finite_is_an_error(problem, measured):
    with pytest.raises(ValueError, match="the metric 'accuracy' after step 4 is missing or not finite"):
        fit(problem, 2, validate=lambda variables: measured)


def test_a_folder_without_validation_has_no_best_step(problem, tmp_path):
    fit(problem, 1, directory=tmp_path / 'c')
    with pytest.raises(ValueError, match='was trained without validation, so nothing in it is best'):
        fit(problem, 1, directory=tmp_path / 'c', validate=validate_with(problem))


@pytest.mark.parametrize('steps_per_dispatch', [1, 2])
def test_an_epoch_that_is_stopped_goes_on_where_it_stands(steps_per_dispatch):
    """`stop` is asked after every dispatch; the parts are the whole, example by example."""
    problem = recording_distillation()
    examples = {'inputs': 2.0 ** np.arange(12, dtype=np.float32)[:, None]}
    run = training.in_memory_epoch(problem, batch_size=2, steps_per_dispatch=steps_per_dispatch)
    _, whole = run(problem.init(jax.random.key(0), examples), {}, examples)
    state, parts = problem.init(jax.random.key(0), examples), []
    for stops in (1, 7):
        answers = iter([False] * (stops - 1) + [True])
        state, measured = run(state, {}, examples, lambda answers=answers: next(answers))
        parts.append(measured)
    totals = [np.concatenate([chunk['seen'].total for chunk in measured]).tolist() for measured in (whole, *parts)]
    assert totals[0] == totals[1] + totals[2]
    assert [len(part) for part in totals] == [6, steps_per_dispatch, 6 - steps_per_dispatch]


def test_two_runs_of_one_seed_are_equal_bit_for_bit(problem, tmp_path):
    runs = []
    for name in ('one', 'other'):
        # Compiled anew, with augmentation, dropout and checkpoints.
        again = data.augment.random_shift(pixels=1)
        runs.append(fit(problem, 2, augment=again, directory=tmp_path / name, log=tmp_path / f'{name}.jsonl', name='run'))
    chex.assert_trees_all_equal(host(runs[0].state), host(runs[1].state))
    assert (tmp_path / 'one.jsonl').read_text() == (tmp_path / 'other.jsonl').read_text()


def test_log_holds_every_epoch_once_even_after_a_crash(problem, tmp_path):
    log = tmp_path / 'log.jsonl'
    other = json.dumps({'run': 'other', 'epoch': 9, 'step': 36})
    log.write_text(other + '\n')
    fit(problem, 2, directory=tmp_path / 'c', log=log, name='a')
    with log.open('a') as file:  # an epoch after the last checkpoint, and half a line: what a killed run leaves
        file.write(json.dumps({'run': 'a', 'epoch': 3, 'step': 12, 'loss': 1.0}) + '\n{"run": "a", "epo')
    fit(problem, 4, directory=tmp_path / 'c', log=log, name='a')
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert records[0] == json.loads(other)
    assert [(r['epoch'], r['step']) for r in records[1:]] == [(1, 4), (2, 8), (3, 12), (4, 16)]
    assert {'loss', 'hard', 'soft', 'soft/weighted', 'soft/weight', 'hint', 'similarity'} <= set(records[-1])


@pytest.mark.filterwarnings(  # Orbax's own abandoned coroutines
    'ignore::pytest.PytestUnraisableExceptionWarning', 'ignore:coroutine .* was never awaited:RuntimeWarning'
)
def test_half_written_newest_checkpoint_is_passed_over(problem, tmp_path):
    whole = fit(problem, 3, directory=tmp_path / 'whole')
    fit(problem, 2, directory=tmp_path / 'c')
    for file in (tmp_path / 'c' / '8' / 'default').rglob('*'):
        if file.is_file() and file.parent.name == 'd':
            file.write_bytes(file.read_bytes()[:10])
    with pytest.warns(UserWarning, match='checkpoint 8 .* cannot be read; training resumes from 4'):
        resumed = fit(problem, 3, directory=tmp_path / 'c')
    assert resumed.resumed_from == 4
    chex.assert_trees_all_equal(host(whole.state), host(resumed.state))
    gc.collect()  # here, where the warning is let pass


def test_checkpoint_of_another_model_is_refused_and_left_alone(problem, tmp_path):
    fit(problem, 1, directory=tmp_path / 'c')
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / 'c').rglob('*'))
    wider = networks.from_linen(nn.Dense(3))
    other = training.distillation(wider, None, objectives.hard_labels(), optax.sgd(0.1))
    flat = {'inputs': problem.data['inputs'].reshape(72, -1), 'labels': problem.data['labels']}
    with pytest.raises(ValueError, match=r'is of another model or recipe: .* choose another folder'):
        training.fit(other, flat, key=jax.random.key(0), batch_size=8, epochs=2, directory=tmp_path / 'c')
    assert before == sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / 'c').rglob('*'))


def test_non_finite_loss_names_step_and_term_and_keeps_the_last_good_checkpoint(tmp_path):
    network = networks.from_linen(nn.Dense(3))
    problem = training.distillation(network, None, objectives.hard_labels() + 0.0 * spoilt_from(6), optax.sgd(0.1))
    examples = {'inputs': np.ones((16, 2), np.float32), 'labels': np.zeros(16, np.int32)}
    arguments = {'key': jax.random.key(0), 'batch_size': 4, 'directory': tmp_path, 'progress': False}
    with pytest.raises(
        training.NonFiniteLossError, match=r'not finite at step 6, from term spoilt; the last good checkpoint is in'
    ):
        training.fit(problem, examples, epochs=3, **arguments)
    assert [int(path.name) for path in tmp_path.iterdir() if path.is_dir()] == [4]


def test_non_finite_term_of_a_nested_objective_is_named():
    network = networks.from_linen(nn.Dense(2))
    bad = objectives.from_function('bad', lambda student, teacher, batch: jnp.log(batch['inputs'][:, 0]))
    objective = objectives.combine(good=objectives.hard_labels(), outer=bad + objectives.hard_labels())
    problem = training.distillation(network, None, objective, optax.sgd(0.1))
    examples = {'inputs': np.array([[1.0], [-1.0]], np.float32), 'labels': np.zeros(2, np.int32)}
    with pytest.raises(training.NonFiniteLossError, match=r'from term outer/bad; no checkpoints are kept'):
        training.fit(problem, examples, key=jax.random.key(0), batch_size=2, epochs=1, progress=False)


def test_bad_arguments(problem, one_epoch):
    for wrong, message in (
        ({'epochs': 0}, 'epochs must be a whole number of at least 1, got 0'),
        ({'steps': 2.5}, 'steps must be a whole number of at least 1, got 2.5'),
        ({}, 'give either epochs or steps'),
        ({'epochs': 1, 'steps': 1}, 'give either epochs or steps'),
        ({'epochs': 1, 'every': 0}, 'every must be above 0, got 0'),
        ({'epochs': 1, 'every': np.nan}, 'every must be above 0, got nan'),
        ({'epochs': 1, 'patience': 1}, 'target and patience need validate'),
        ({'epochs': 1, 'skip_nonfinite': -1}, 'skip_nonfinite must be at least 0, got -1'),
        ({'epochs': 1, 'validate': len, 'monitor': 'mine'}, "is 'mine' best where it is largest or smallest"),
        ({'epochs': 1, 'validate': len, 'mode': 'maximum'}, "mode must be 'min' or 'max', got 'maximum'"),
        ({'epochs': 1, 'batch_size': None}, 'data in memory need a batch_size'),
        ({'epochs': 1, 'batch_size': 100}, 'the training split has 72 examples, fewer than one batch of 100'),
    ):
        with pytest.raises(ValueError, match=message):
            fit(problem, **wrong)
    with pytest.raises(ValueError, match='batch_size must be at least 1'):
        training.in_memory_epoch(problem.distillation, batch_size=0)
    with pytest.raises(ValueError, match='a batch of 12 does not divide over 8 devices'):
        training.in_memory_epoch(problem.distillation, batch_size=12, mesh=parallel.data_parallel())
    with pytest.raises(ValueError, match='the training split has 8 examples, fewer than one batch of 16'):
        one_epoch(problem.start(), problem.teacher_variables, {name: x[:8] for name, x in problem.data.items()})


def test_no_warning_in_an_ordinary_run(problem, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fit(problem, 1, directory=tmp_path / 'c', log=tmp_path / 'log.jsonl', validate=validate_with(problem))


def test_jnp_data_and_numpy_data_are_the_same(problem, one_epoch):
    on_device = {name: jnp.asarray(x) for name, x in problem.data.items()}
    one, _ = one_epoch(problem.start(), problem.teacher_variables, problem.data)
    other, _ = one_epoch(problem.start(), problem.teacher_variables, on_device)
    chex.assert_trees_all_equal(host(one), host(other))


def traced_once(problem):
    """The problem, with a step that refuses to be traced again."""
    step = chex.assert_max_traces(problem.distillation.step.__wrapped__, n=1)
    return problem.distillation._replace(step=step)


def test_a_run_with_validation_and_a_resume_traces_its_step_once(problem, tmp_path):
    once = problem._replace(distillation=traced_once(problem))
    more = {'validate': validate_with(problem), 'directory': tmp_path}
    fit(once, 2, **more)
    assert fit(once, 4, **more).resumed_from == 8


def test_another_batch_size_traces_the_step_again(problem):
    once = problem._replace(distillation=traced_once(problem))
    fit(once, 1, batch_size=8)
    with pytest.raises(AssertionError, match='traced > 1 times'):
        fit(once, 1)
