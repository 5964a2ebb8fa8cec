"""What `fit` tells, validates by, stops at and refuses, on a network of one layer."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.toy_problem import spoilt_from

from kdjax import networks, objectives, training


def flat_problem(objective=None, rate=0.1):
    network = networks.from_linen(nn.Dense(3))
    return training.distillation(network, None, objective or objectives.hard_labels(), optax.sgd(rate))


FLAT = {
    'inputs': np.random.default_rng(0).normal(size=(80, 2)).astype(np.float32),
    'labels': np.arange(80, dtype=np.int32) % 3,
}


def fit_flat(problem, **more):
    return training.fit(problem, FLAT, **{'key': jax.random.key(0), 'batch_size': 2, 'progress': False, **more})


def says(*values, name='accuracy'):
    """A validation that gives these numbers, one after the other."""
    left = iter(values)
    return lambda variables: {name: next(left)}


def test_one_epoch_logs_validates_and_saves_as_often_as_asked(tmp_path):
    records = []
    arguments = {'log': tmp_path / 'log.jsonl', 'directory': tmp_path / 'c', 'on_record': records.append}
    fit_flat(flat_problem(), epochs=1, every=0.25, validate=says(0.1, 0.9, 0.2, 0.3), **arguments)
    assert [record['step'] for record in records] == [10, 10, 20, 20, 30, 30, 40, 40]
    assert [record['validation/accuracy'] for record in records[1::2]] == [0.1, 0.9, 0.2, 0.3]
    lines = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    assert lines == [{'run': 'train', **record} for record in records]
    assert {'loss', 'gradient_norm', 'epoch'} <= records[0].keys()
    assert sorted(int(path.name) for path in (tmp_path / 'c').iterdir()) == [20, 30, 40], 'the best and the newest two'


def test_a_nan_of_the_first_steps_is_found_within_one_interval():
    seen = []
    with pytest.raises(training.NonFiniteLossError, match='the loss is not finite at step 2, from term spoilt'):
        fit_flat(
            flat_problem(objectives.hard_labels() + spoilt_from(2)), steps=40, every=4, validate=lambda v: seen.append(0) or {}
        )
    assert seen == []


@pytest.mark.parametrize(
    'monitor,mode,values,best',
    [
        ('nll', None, (0.9, 0.2, 0.5, 0.6), 20),
        ('accuracy', None, (0.9, 0.2, 0.5, 0.6), 10),
        ('accuracy', 'min', (0.9, 0.2, 0.5, 0.6), 20),
        ('mine', 'min', (0.9, 0.5, 0.2, 0.2), 40),
        ('top_5_accuracy', None, (0.1, 0.2, 0.3, 0.3), 40),
    ],
)
def test_the_best_is_the_largest_or_the_smallest_as_the_metric_has_it(monitor, mode, values, best, tmp_path):
    for directory in (None, tmp_path):
        fitted = fit_flat(
            flat_problem(),
            steps=40,
            every=10,
            validate=says(*values, name=monitor),
            monitor=monitor,
            mode=mode,
            directory=directory,
        )
        assert fitted.best_step == best
    with training.checkpoint_manager(
        tmp_path, monitor=monitor, mode='min' if mode == 'min' or monitor == 'nll' else 'max'
    ) as it:
        assert it.best_step() == best


def test_patience_ends_a_run_and_counts_on_where_a_run_was_stopped(tmp_path):
    arguments = {'every': 10, 'patience': 2}
    whole = fit_flat(flat_problem(), steps=80, validate=says(0.5, 0.6, 0.3, 0.4), **arguments)
    assert (int(whole.state.step), whole.best_step) == (40, 20)
    arguments['directory'] = tmp_path
    fit_flat(flat_problem(), steps=30, validate=says(0.5, 0.6, 0.3), **arguments)
    resumed = fit_flat(flat_problem(), steps=80, validate=says(0.4), **arguments)
    assert (int(resumed.state.step), resumed.best_step) == (40, 20)
    ended = fit_flat(flat_problem(), steps=80, validate=says(), **arguments)
    assert (int(ended.state.step), ended.best_step) == (40, 20)


def test_the_log_tells_the_learning_rate_where_the_optimizer_does():
    records = []
    schedule = optax.inject_hyperparams(optax.sgd)(learning_rate=optax.linear_schedule(0.4, 0.0, 4))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), schedule)
    network = networks.from_linen(nn.Dense(3))
    problem = training.distillation(network, None, objectives.hard_labels(), optimizer)
    fit_flat(problem, steps=4, every=1, on_record=records.append)
    np.testing.assert_allclose([record['learning_rate'] for record in records], [0.4, 0.3, 0.2, 0.1], rtol=1e-6)
    gradient = jax.grad(
        lambda params: optax.losses.softmax_cross_entropy_with_integer_labels(
            FLAT['inputs'] @ params['kernel'] + params['bias'][None], jnp.asarray(FLAT['labels'])
        ).mean()
    )
    whole = []
    training.fit(
        problem,
        FLAT,
        key=jax.random.key(1),
        batch_size=80,
        steps=1,
        student_variables={'params': START},
        on_record=whole.append,
    )
    assert whole[0]['gradient_norm'] == pytest.approx(float(optax.tree.norm(gradient(START))), rel=1e-5)


START = {'kernel': jnp.array([[0.5, -1.0, 0.2], [0.1, 0.3, -0.7]]), 'bias': jnp.zeros(3)}


def test_a_term_that_was_added_dropped_or_renamed_is_named(tmp_path):
    hard, size = objectives.hard_labels(), objectives.from_function('size', lambda s, t, batch: jnp.mean(s.logits**2))
    fit_flat(flat_problem(hard + size), steps=2, directory=tmp_path)
    for objective, message in (
        (hard, 'it has the term size, which the objective lacks; choose another folder'),
        (hard + size + size, 'it lacks the term size_2 of the objective; choose'),
        (hard + objectives.combine(norm=size), 'it has the term size, which the objective lacks and it lacks the term norm'),
    ):
        with pytest.raises(ValueError, match=message):
            fit_flat(flat_problem(objective), steps=4, directory=tmp_path)


def test_a_run_on_other_data_or_another_key_is_refused(tmp_path):
    fit_flat(flat_problem(), steps=2, directory=tmp_path)
    with pytest.raises(ValueError, match='holds a run with another key'):
        fit_flat(flat_problem(), steps=4, directory=tmp_path, key=jax.random.key(1))
    moved = {**FLAT, 'inputs': FLAT['inputs'] + np.float32(1e-6)}
    with pytest.raises(ValueError, match=r'of a run with data [0-9a-f]{16}, not [0-9a-f]{16}: its steps were other batches'):
        training.fit(flat_problem(), moved, key=jax.random.key(0), batch_size=2, steps=4, directory=tmp_path)
