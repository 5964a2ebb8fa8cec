"""Data of every kind go through `fit`: any pytree of inputs, and every kind of loader, stopped and taken up again."""

import importlib.util
import itertools
import sys

import chex
import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import networks, objectives, parallel, training

EXAMPLES, BATCH_SIZE = 24, 4
PASS = EXAMPLES // BATCH_SIZE
RNG = np.random.default_rng(0)


class Tokens(nn.Module):
    """Tokens and their types, pooled."""

    @nn.compact
    def __call__(self, inputs):
        embedded = nn.Embed(9, 6, name='ids')(inputs['ids']) + nn.Embed(2, 6, name='types')(inputs['types'])
        return nn.Dense(3, name='head')(jnp.tanh(embedded).mean(axis=1))


DATA = {
    'inputs': {
        'ids': RNG.integers(0, 9, (EXAMPLES, 5)).astype(np.int32),
        'types': RNG.integers(0, 2, (EXAMPLES, 5)).astype(np.int32),
    },
    'labels': RNG.integers(0, 3, EXAMPLES).astype(np.int32),
}
STUDENT = networks.from_linen(Tokens())
OBJECTIVE = 0.5 * objectives.hard_labels() + 0.5 * objectives.soft_targets(temperature=2.0)
PROBLEM = training.distillation(STUDENT, STUDENT, OBJECTIVE, optax.sgd(0.1, momentum=0.9))
TEACHER = STUDENT.init(jax.random.key(9), jax.tree.map(lambda x: x[:1], DATA['inputs']))


def example(i):
    return jax.tree.map(lambda x: x[i], DATA)


def batches(start=0):
    return [example(slice(i, i + BATCH_SIZE)) for i in range(start, EXAMPLES, BATCH_SIZE)]


def endless():
    yield from itertools.cycle(batches())


class Loader:
    """Batches that are made anew for every pass."""

    def __len__(self):
        return PASS

    def __iter__(self):
        return iter(batches())


class StatefulLoader(Loader):
    """A loader that shuffles by a state of its own, as torchdata's do."""

    def __init__(self):
        self.seen = 0

    def __iter__(self):
        for i in range(self.seen % PASS, PASS):
            batch = batches()[(self.seen // PASS + 5 * i) % PASS]
            self.seen += 1
            yield batch

    def state_dict(self):
        return {'seen': self.seen}

    def load_state_dict(self, state):
        self.seen = state['seen']


def grain_batches():
    source = grain.MapDataset.range(EXAMPLES).seed(3).shuffle().map(lambda i: example(int(i)))
    return source.batch(BATCH_SIZE).repeat().to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))


def torch_loader():
    import torch

    class Examples(torch.utils.data.Dataset):
        def __len__(self):
            return EXAMPLES

        def __getitem__(self, i):
            return jax.tree.map(lambda x: torch.as_tensor(np.asarray(x)), example(i))

    return torch.utils.data.DataLoader(Examples(), batch_size=BATCH_SIZE)


def host(state):
    return jax.device_get(state._replace(key=jax.random.key_data(state.key)))


def fit(data, **more):
    arguments = {'key': jax.random.key(0), 'every': 2, 'progress': False, **more}
    return training.fit(PROBLEM, data, TEACHER, **arguments)


KINDS = {
    'arrays': (lambda: DATA, {'batch_size': BATCH_SIZE}),
    'source': (lambda: [example(i) for i in range(EXAMPLES)], {'batch_size': BATCH_SIZE}),
    'grain source': (lambda: grain.MapDataset.range(EXAMPLES).map(lambda i: example(int(i))), {'batch_size': BATCH_SIZE}),
    'list of batches': (batches, {}),
    'loader': (Loader, {'batch_size': BATCH_SIZE}),
    'loader with a state': (StatefulLoader, {}),
    'generator': (endless, {}),
    'grain batches': (grain_batches, {}),
}
if importlib.util.find_spec('torch') is not None:  # which no other test needs
    KINDS['torch'] = torch_loader, {}


@pytest.mark.parametrize('kind', KINDS)
def test_a_run_that_is_stopped_and_taken_up_ends_with_the_same_numbers(kind, tmp_path):
    make, more = KINDS[kind]
    whole = fit(make(), steps=9, **more)
    fit(make(), steps=4, directory=tmp_path, **more)
    resumed = fit(make(), steps=9, directory=tmp_path, **more)
    assert (resumed.resumed_from, int(resumed.state.step)) == (4, 9)
    chex.assert_trees_all_equal(host(whole.state), host(resumed.state))


def test_a_loader_without_a_state_is_read_up_to_where_it_was_and_this_is_said_once(tmp_path, capsys):
    fit(endless(), steps=4, directory=tmp_path)
    assert capsys.readouterr().err == ''
    fit(endless(), steps=6, directory=tmp_path, progress=True)
    told = capsys.readouterr().err.splitlines()
    assert len([line for line in told if 'keeps no state of its own: 4 batches were read and left out' in line]) == 1


def test_batches_of_a_loader_train_as_the_step_does():
    fitted = fit(Loader(), epochs=2)
    state = PROBLEM.init(jax.random.key(0), batches()[0])
    for batch in [*batches(), *batches()]:
        state, _ = PROBLEM.step(state, TEACHER, batch)
    chex.assert_trees_all_equal(host(fitted.state), host(state))


@pytest.mark.parametrize('kind', ['arrays', 'loader'])
def test_a_mesh_changes_nothing(kind):
    make, _ = KINDS[kind]
    more = {'batch_size': 8} if kind == 'arrays' else {}
    data = make() if kind == 'arrays' else [example(slice(0, 8)), example(slice(8, 16))]
    alone = fit(data, steps=4, **more)
    together = fit(data, steps=4, mesh=parallel.data_parallel(), **more)
    chex.assert_trees_all_close(host(alone.state).params, host(together.state).params, rtol=1e-5, atol=1e-6)


X, Y = DATA['inputs']['ids'], DATA['labels']


@pytest.mark.parametrize(
    'data,message',
    [
        ((X, Y), r"the data are a pair of arrays: pass \{'inputs': x, 'labels': y\}"),
        ([X, Y], r'an example must be a dictionary .*, got ndarray: map the source'),
        (X, r"the data are one array \(24, 5\): pass \{'inputs': array\}"),
        ({'x': X}, r"a batch is a dictionary with 'inputs' .* got x"),
        ({'inputs': X, 'labels': Y[:3]}, r'must have the same number of examples'),
        ({'inputs': X, 'labels': 3}, r'must have the same number of examples'),
        ('folder', r'a loader of such batches, got str'),
        (None, r'a loader of such batches, got NoneType'),
        ([(x, y) for x, y in zip(X, Y, strict=True)], r'an example must be a dictionary .*, got tuple: map the source'),
        (((x, y) for x, y in zip(X, Y, strict=True)), r'a batch must be a dictionary .* got a tuple of 2: map the loader'),
        (iter([]), r'the data ended after 0 batches'),
        (iter(batches()), r'data that do not say how many batches they have need steps, not epochs'),
        (Loader, r'a loader of such batches, got type'),
    ],
)
def test_wrong_data_get_a_line_that_helps(data, message):
    with pytest.raises(ValueError, match=message) as raised:
        fit(data, epochs=1, batch_size=2 if not hasattr(data, '__next__') else None)
    assert len(str(raised.value).splitlines()) == 1


def test_data_that_end_too_soon_or_are_not_as_many_as_they_say_are_told():
    class Short(Loader):
        def __len__(self):
            return PASS + 1

    with pytest.raises(ValueError, match='the data ended after 6 batches: pass more, ask for fewer steps'):
        fit(iter(batches()), steps=7)
    with pytest.raises(ValueError, match='says that it has 7 batches and ended after 6'):
        fit(Short(), epochs=1)
    taken = training.LoadedBatches(Loader())
    taken.seek(3)
    with pytest.raises(ValueError, match='3 batches are taken already, and a loader does not go back to 1: begin anew'):
        taken.seek(1)
    with pytest.raises(ValueError, match='the first batch has 4 examples, and batch_size is 5'):
        fit(Loader(), epochs=1, batch_size=5)
    with pytest.raises(ValueError, match='views need to know which example is which'):
        fit(Loader(), epochs=1, views=training.Views(lambda key, x: x, jax.random.key(0), 2))


def test_a_data_set_of_several_splits_is_told_apart():
    from kdjax import data

    digits = data.load('digits')
    for call in (
        lambda: fit(digits, epochs=1, batch_size=4),
        lambda: training.in_memory_epoch(PROBLEM, batch_size=4)(None, {}, digits, begin=0),
    ):
        with pytest.raises(
            ValueError, match=r'the data are a Dataset of several splits: pass one of them, such as its \.train'
        ):
            call()
    with pytest.raises(ValueError, match=r'got Loader: training.fit and training.streaming_epoch take sources'):
        training.in_memory_epoch(PROBLEM, batch_size=4)(None, {}, Loader(), begin=0)


def test_lines_replace_the_bar_where_nobody_watches_a_terminal(capsys):
    assert not sys.stderr.isatty()
    fit(Loader(), epochs=1, progress=True, validate=lambda variables: {'accuracy': 0.25}, every=0.5)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(',')[0] for line in lines] == [f'train: step {step} of 6' for step in (3, 3, 6, 6)]
    assert 'loss' in lines[0]
    assert 'validation/accuracy 0.25' in lines[1]
