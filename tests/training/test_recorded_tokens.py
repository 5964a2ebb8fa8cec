"""Recorded teachers of tokens: what a mask leaves, largest logits in few bytes, hidden states; equal to the live teacher."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import losses, networks, objectives, parallel, training

CLASSES, LENGTH, WIDTH = 13, 7, 6
RNG = np.random.default_rng(3)
DATA = {
    'inputs': RNG.integers(0, CLASSES, (18, LENGTH)).astype(np.int32),
    'labels': RNG.integers(0, CLASSES, (18, LENGTH)).astype(np.int32),
    'mask': np.arange(LENGTH) < RNG.integers(3, LENGTH + 1, (18, 1)),
}
DATA['completion'] = DATA['mask'] & (np.arange(LENGTH) >= RNG.integers(0, 4, (18, 1)))
DATA['completion'][5] = False


def network(width, softcap=None, bias='layers_2/bias'):
    """A network of tokens with its linear head, and the same with logits that are arrays."""
    layers = [
        nn.Embed(CLASSES, width),
        nn.LayerNorm(),
        nn.Dense(CLASSES, use_bias=bias is not None, bias_init=nn.initializers.normal()),
    ]
    dense = networks.from_linen(nn.Sequential(layers), features='layers_1')
    return networks.linear_head(dense, 'layers_1', 'layers_2/kernel', bias=bias, softcap=softcap, chunk=16), dense


TEACHER, DENSE = network(WIDTH)
STUDENT = network(4)[0]
VARIABLES = jax.jit(TEACHER.init)(jax.random.key(1), DATA['inputs'][:1])
LOGITS = np.asarray(jax.jit(DENSE.apply)(VARIABLES, DATA['inputs'])[0].logits)
KEPT = int(DATA['completion'].sum())


def record(folder, teacher=TEACHER, data=DATA, **options):
    return training.record_teacher(teacher, VARIABLES, data, folder, **{'batch_size': 4, 'examples_per_file': 8, **options})


def stored_bytes(folder):
    """The bytes of the values alone, by name, over all files."""
    sizes = {}
    for path in folder.glob('*.npz'):
        with np.load(path) as file:
            for name, array in file.items():
                sizes[name] = sizes.get(name, 0) + array.nbytes
    return sizes


def test_only_the_positions_of_a_mask_are_stored(tmp_path):
    """And read back equal to those of the teacher; where nothing was stored it is NaN."""
    found = record(tmp_path, where='completion')['teacher_logits']
    assert found.shape == (18, LENGTH, CLASSES)
    np.testing.assert_allclose(found[:][DATA['completion']], LOGITS[DATA['completion']], rtol=1e-5, atol=1e-6)
    assert np.isnan(found[:][~DATA['completion']]).all()
    sizes = stored_bytes(tmp_path)
    # A bit for each position, and 8 bytes for each example, which say where.
    assert sizes == {'teacher_logits': KEPT * CLASSES * 4, 'stored': 18, 'starts': 18 * 8}
    training.recorded_teacher(tmp_path, data=DATA)
    other = {**DATA, 'completion': DATA['mask']}
    with pytest.raises(ValueError, match='recorded with other positions'):
        training.recorded_teacher(tmp_path, data=other)
    with pytest.raises(ValueError, match='recorded with other positions'):
        record(tmp_path, data=other, where='completion')
    with pytest.raises(ValueError, match='recorded with other where: completion there, mask here'):
        record(tmp_path, data={**DATA, 'mask': DATA['completion']}, where='mask')
    source = [{name: array[i] for name, array in DATA.items()} for i in range(18)]
    np.testing.assert_array_equal(found, record(tmp_path / 'source', data=source, where='completion')['teacher_logits'])


def test_views_of_stored_positions(tmp_path):
    """Each view has the positions of the mask."""
    views = training.Views(lambda key, tokens: jax.random.permutation(key, tokens), jax.random.key(4), 3)
    whole, found = (
        record(tmp_path / str(where), views=views, where=where, top_k=2, temperature=1.0) for where in (None, 'completion')
    )
    for name, missing in (('top_logits', np.nan), ('top_indices', 0), ('rest', np.nan)):
        expected = np.array(whole[name])
        assert expected.shape[:3] == (18, 3, LENGTH)
        np.moveaxis(expected, 1, 2)[~DATA['completion']] = missing
        np.testing.assert_array_equal(found[name], expected, strict=True)
        np.testing.assert_array_equal(found[name][np.array([4, 17, 5]), 1], expected[[4, 17, 5], 1])


@pytest.mark.parametrize(
    'classes, dtype, index, entry_bytes',
    [(13, 'bfloat16', 'uint16', 4), (65_536, 'float16', 'uint16', 4), (70_000, 'bfloat16', 'int32', 6)],
)
def test_bytes_of_the_largest_logits(classes, dtype, index, entry_bytes, tmp_path):
    """At most 6 for each that is kept, measured on disk, and 4 for the rest at every temperature."""
    table = np.random.default_rng(0).standard_normal((4, classes)).astype(np.float32)
    table[:, -1] = 9  # the last class is among the largest, whose index needs the most bits
    teacher = networks.Network(
        lambda key, x: {}, lambda variables, x, **more: (networks.Outputs(jnp.take(variables['params'], x, axis=0)), {})
    )
    data = {'inputs': RNG.integers(0, 4, (6, 50)).astype(np.int32), 'kept': RNG.random((6, 50)) < 0.5}
    options = {'where': 'kept', 'top_k': 5, 'dtype': dtype, 'batch_size': 6}
    found = training.record_teacher(teacher, {'params': table}, data, tmp_path, temperature=(1.0, 4.0), **options)
    kept, sizes = int(data['kept'].sum()), stored_bytes(tmp_path)
    assert sizes['top_logits'] + sizes['top_indices'] == kept * 5 * entry_bytes
    assert sizes['rest_at_1'] == sizes['rest_at_4'] == kept * 4
    on_disk = sum(file.stat().st_size for file in tmp_path.glob('*.npz'))
    assert on_disk < kept * (5 * entry_bytes + 8) + 6 * (7 + 8) + 6 * 400  # names and headers of six arrays
    assert (found['top_logits'].dtype, found['top_indices'].dtype) == (jnp.dtype(dtype), np.dtype(index))
    expected = [np.asarray(x)[data['inputs']] for x in losses.top_k_logits(table, 5, temperature=4.0)]
    for name, wanted in zip(('top_logits', 'top_indices', 'rest_at_4'), expected, strict=True):
        wanted = wanted.astype(found[name].dtype) if name != 'rest_at_4' else wanted
        np.testing.assert_allclose(
            found[name][:][data['kept']].astype(np.float32), wanted[data['kept']].astype(np.float32), rtol=1e-6
        )
    # The losses take them as they are, and equal those of the same numbers in float32 and int32.
    batch = {name: array[:2] for name, array in {**data, **found}.items()}
    student = networks.Outputs(jnp.asarray(RNG.standard_normal((2, 50, classes)), jnp.float32))
    soft = objectives.over_positions(objectives.top_k_soft_targets(temperature=4.0), 'kept')
    wide = {**batch, 'top_logits': batch['top_logits'].astype(np.float32), 'top_indices': batch['top_indices'].astype(np.int32)}
    values = [
        soft.apply(
            *soft.init(jax.random.key(0), student, networks.Outputs(None), x), student, networks.Outputs(None), x, step=0
        )[0]
        for x in (batch, wide)
    ]
    np.testing.assert_allclose(*values, rtol=2e-6)
    assert np.isfinite(values[0])


def test_an_objective_finds_the_rest_of_its_temperature(tmp_path):
    """One recording, several temperatures; one that was not recorded is an error."""
    recorded = record(tmp_path, top_k=4, temperature=(1.0, 2.5))
    assert sorted(recorded) == ['recorded_views', 'rest_at_1', 'rest_at_2.5', 'top_indices', 'top_logits']
    batch = {**DATA, **{name: np.asarray(array) for name, array in recorded.items()}}
    student = networks.Outputs(jnp.asarray(RNG.standard_normal(LOGITS.shape), jnp.float32))

    def value(objective, batch):
        arguments = student, networks.Outputs(None), batch
        return objective.apply(*objective.init(jax.random.key(0), *arguments), *arguments, step=0)[0]

    for make in (objectives.top_k_soft_targets, objectives.top_k_reverse_kl, objectives.top_k_jensen_shannon):
        for temperature in (1.0, 2.5):
            triple = losses.top_k_logits(LOGITS, 4, temperature=temperature)
            given = {**DATA, **dict(zip(('top_logits', 'top_indices', 'rest'), triple, strict=True))}
            objective = make(temperature=temperature)
            np.testing.assert_allclose(value(objective, batch), value(objective, given), rtol=1e-5)
        with pytest.raises(ValueError, match=r'was not recorded for temperature 2; the batch has rest_at_1, rest_at_2.5'):
            value(make(temperature=2), batch)
    training.recorded_teacher(tmp_path, temperature=2.5)
    with pytest.raises(ValueError, match=r'recorded with other temperature: \[1.0, 2.5\] there, 4.0 here'):
        training.recorded_teacher(tmp_path, temperature=4.0)
    with pytest.raises(ValueError, match='temperatures must differ in their first six digits'):
        record(tmp_path / 'other', top_k=4, temperature=(1.0, 1.00000001))


OBJECTIVE = (
    objectives.soft_targets(temperature=2.0)
    + objectives.reverse_kl()
    + objectives.jensen_shannon(beta=0.3)
    + 0.5 * objectives.hard_labels()
)
OVER = objectives.over_positions(OBJECTIVE, 'completion')


def fitted(objective, teacher, variables, data, student=STUDENT, **options):
    """What a student has learned in some steps."""
    problem = training.distillation(student, teacher, objective, optax.sgd(0.5))
    options = {'batch_size': 6, 'steps': 5, 'progress': False, **options}
    return training.fit(problem, data, variables, key=jax.random.key(0), **options).variables


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected)


def on_disk(folder):
    """The data as memory maps, which are streamed."""
    for name, array in DATA.items():
        np.save(folder / f'{name}.npy', array)
    return {name: np.load(folder / f'{name}.npy', mmap_mode='r') for name in DATA}


@pytest.fixture(scope='module')
def live():
    """Training with the teacher itself, in memory and streamed, whose orders differ."""
    source = [{name: array[i] for name, array in DATA.items()} for i in range(18)]
    return fitted(OVER, TEACHER, VARIABLES, DATA), fitted(OVER, TEACHER, VARIABLES, source)


@pytest.mark.parametrize('what', ['logits', 'hidden'])
def test_training_from_a_recording_is_training_with_the_teacher(what, live, tmp_path):
    """In memory, streamed from memory maps and joined to a source; of stored positions alone."""
    recorded = record(tmp_path / 'recorded', where='completion', what=what)
    head, variables = training.recorded_head(tmp_path / 'recorded') if what == 'hidden' else (None, {})
    objective = objectives.from_recorded_logits(OVER)
    source = [{name: array[i] for name, array in DATA.items()} for i in range(18)]
    in_memory = fitted(objective, head, variables, {**DATA, **recorded})
    assert_close(in_memory, live[0])
    assert_close(fitted(objective, head, variables, {**on_disk(tmp_path), **recorded}), live[1])
    assert_close(fitted(objective, head, variables, training.JoinedSource(source, recorded)), live[1])


def values_and_gradients(objective, teacher, batch):
    """Of the terms, by the student's parameters."""
    variables = jax.jit(STUDENT.init)(jax.random.key(2), DATA['inputs'][:1])

    def loss(params, teacher, batch):
        student = STUDENT.apply({**variables, 'params': params}, batch['inputs'])[0]
        params, state = objective.init(jax.random.key(0), student, teacher, batch)
        value, metrics, _ = objective.apply(params, state, student, teacher, batch, step=0)
        return value, {name: each.total / each.count for name, each in metrics.items()}

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables['params'], teacher, batch)


@pytest.mark.parametrize('dtype, rtol', [('float32', 1e-5), ('float16', 2e-2), ('bfloat16', 1e-1)])
def test_objectives_on_recorded_hidden_states_are_those_of_the_teacher(dtype, rtol, tmp_path):
    """With the head of the recording, or of the network that was recorded; with a softcap and a bias."""
    teacher, _ = network(WIDTH, softcap=3.0)
    recorded = record(tmp_path, teacher, what='hidden', dtype=dtype)
    hidden = recorded['teacher_hidden']
    assert (hidden.shape, hidden.dtype) == ((18, LENGTH, WIDTH), jnp.dtype(dtype))
    sizes = stored_bytes(tmp_path)
    assert sizes == {
        'teacher_hidden': 18 * LENGTH * WIDTH * hidden.dtype.itemsize, 'kernel': WIDTH * CLASSES * 4, 'bias': CLASSES * 4,
    }  # fmt: skip
    head, variables = training.recorded_head(tmp_path)
    outputs = jax.jit(teacher.apply)(VARIABLES, DATA['inputs'])[0]
    expected = values_and_gradients(OVER, outputs, DATA)
    from_disk = objectives.from_recorded_logits(OVER)
    batch = {**DATA, 'teacher_hidden': np.asarray(hidden)}
    assert_close(values_and_gradients(from_disk, head.apply(variables, None)[0], batch), expected, rtol, rtol / 10)
    if dtype == 'float32':
        # The network itself, whose hidden states are not used.
        spoiled = networks.Outputs(jax.tree.map(lambda x: x * jnp.nan if x.ndim == 3 else x, outputs.logits))
        assert_close(values_and_gradients(from_disk, spoiled, batch), expected, rtol, rtol / 10)


def test_hidden_states_with_views_and_a_transposed_head_in_half_precision(tmp_path):
    """A table of embeddings in bfloat16 is the head; it is recorded as it is."""
    dense = networks.from_linen(nn.Sequential([nn.Embed(CLASSES, 8)]), features='layers_0')
    tied = networks.linear_head(dense, 'layers_0', 'layers_0/embedding', transposed=True)
    variables = jax.tree.map(lambda x: x.astype(jnp.bfloat16), jax.jit(dense.init)(jax.random.key(0), DATA['inputs'][:1]))
    views = training.Views(lambda key, tokens: jax.random.permutation(key, tokens), jax.random.key(4), 2)
    recorded = training.record_teacher(tied, variables, DATA, tmp_path, what='hidden', dtype='bfloat16', views=views)
    assert recorded['teacher_hidden'].shape == (18, 2, LENGTH, 8)
    head, found = training.recorded_head(tmp_path)
    kernel = variables['params']['layers_0']['embedding']
    np.testing.assert_array_equal(found['params']['kernel'], kernel, strict=True)
    assert jax.tree.map(lambda x: x.dtype, head.init(jax.random.key(0), None)) == {'params': {'kernel': jnp.bfloat16}}
    objective = objectives.from_recorded_logits(objectives.reverse_kl())
    live = fitted(objectives.reverse_kl(), tied, variables, DATA, views=views)
    assert_close(fitted(objective, head, found, {**DATA, **recorded}, views=views), live, 1e-4, 1e-5)


def test_a_mesh_takes_a_recording_and_its_head(live, tmp_path):
    """Replicated data in memory, the head sharded as any teacher."""
    mesh = parallel.data_parallel(jax.devices()[:2])
    recorded = record(tmp_path, where='completion', what='hidden')
    head, variables = training.recorded_head(tmp_path)
    found = fitted(objectives.from_recorded_logits(OVER), head, variables, {**DATA, **recorded}, mesh=mesh)
    assert_close(jax.device_get(found), live[0], 1e-4, 1e-5)


def test_an_objective_over_more_than_was_stored_is_no_number(tmp_path):
    """And so it is no silent mistake."""
    recorded = record(tmp_path, where='completion', top_k=3, temperature=1.0)
    with pytest.raises(training.NonFiniteLossError):
        fitted(objectives.top_k_reverse_kl(), None, {}, {**DATA, **recorded})


@pytest.mark.parametrize(
    'options, message',
    [
        ({'where': 'absent'}, "where='absent' must be among the data, which have completion, inputs, labels, mask"),
        ({'where': 'labels'}, r"where='labels' must be booleans \[examples, positions\], got int32"),
        ({'where': 'short'}, r'the mask of where is \[3\] for each example, and teacher_logits \[7, 13\]'),
        ({'what': 'features'}, "what must be 'logits', or 'hidden' without top_k, got 'features'"),
        ({'what': 'hidden', 'top_k': 2}, "what must be 'logits', or 'hidden' without top_k, got 'hidden' and top_k 2"),
        ({'what': 'hidden', 'teacher': DENSE}, 'needs a teacher that networks.linear_head has made'),
        ({'examples_per_file': 0}, 'examples_per_file must be at least 1, got 0'),
    ],
)
def test_what_cannot_be_recorded_of_tokens(options, message, tmp_path):
    data = {**DATA, 'short': DATA['mask'][:, :3]} if options.get('where') == 'short' else DATA
    with pytest.raises(ValueError, match=message):
        record(tmp_path, data=data, **options)
    assert not list(tmp_path.iterdir())


def test_hidden_states_without_their_head_are_an_error(tmp_path):
    recorded = record(tmp_path / 'hidden', what='hidden')
    data = {**DATA, **recorded}
    objective = objectives.from_recorded_logits(objectives.soft_targets())
    for teacher, variables in ((None, {}), (DENSE, VARIABLES)):
        with pytest.raises(ValueError, match=r"batch\['teacher_hidden'\] needs the teacher's head: .*recorded_head"):
            fitted(objective, teacher, variables, data)
    with pytest.raises(ValueError, match=r'\(18, 7, 6\)|\(6, 7, 6\) was recorded of another head than one of 4 numbers'):
        fitted(objective, STUDENT, jax.jit(STUDENT.init)(jax.random.key(0), DATA['inputs'][:1]), data)
    record(tmp_path / 'logits')
    with pytest.raises(ValueError, match='holds logits, which need no head'):
        training.recorded_head(tmp_path / 'logits')
    # Another cap is another program, though hidden states and variables are the same.
    with pytest.raises(ValueError, match='was recorded by another program'):
        record(tmp_path / 'hidden', network(WIDTH, softcap=3.0)[0], what='hidden')
