"""Recorded teachers: training from disk is training with the teacher, and what does not belong together is refused."""

import functools
import json
import os
import subprocess
import sys

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.toy_problem import SILENT

from kdjax import losses, models, networks, objectives, training
from kdjax.training import _augmentation as augmentation
from kdjax.training import _fingerprints

CLASSES = 10
RNG = np.random.default_rng(0)
# 26 examples are no multiple of the batch size, so the last batch of a recording is filled up.
DATA = {
    'inputs': RNG.integers(0, 256, (26, 6, 6, 1)).astype(np.uint8),
    'labels': RNG.integers(0, CLASSES, 26).astype(np.int32),
}
BATCH_SIZE = 8


class Small(nn.Module):
    """A convolution, batch norm and a head."""

    width: int

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(self.width, (3, 3), name='conv')(x.astype(jnp.float32) / 255)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name='norm')(x))
        return nn.Dense(CLASSES, name='head')(x.mean((1, 2)))


STUDENT, TEACHER = (networks.from_linen(Small(width)) for width in (3, 8))
FULL = 0.5 * objectives.hard_labels() + objectives.soft_targets(temperature=2.0)


def shift(key, image):
    """Rolls the rows of an image by a random number."""
    return jnp.roll(image, jax.random.randint(key, (), 0, 6), axis=0)


VIEWS = training.Views(shift, jax.random.key(5), 2)


@pytest.fixture(scope='module')
def variables():
    return jax.jit(TEACHER.init)(jax.random.key(1), DATA['inputs'][:1])


def live(objective):
    return training.distillation(STUDENT, TEACHER, objective, optax.sgd(0.1, momentum=0.9))


def alone(objective):
    return training.distillation(STUDENT, None, objective, optax.sgd(0.1, momentum=0.9))


def train(problem, teacher_variables, data, views=None):
    """The state after three epochs, and the losses of all steps."""
    batch = {name: array[:BATCH_SIZE] for name, array in data.items()}
    state = jax.jit(problem.init)(jax.random.key(0), batch if views is None else training.one_view(batch, 0))
    run, all_losses = training.in_memory_epoch(problem, batch_size=BATCH_SIZE, views=views), []
    for _ in range(3):
        state, measured = run(state, teacher_variables, data)
        all_losses += [float(some['loss'].total[0]) for some in measured]
    return state._replace(key=jax.random.key_data(state.key)), all_losses


@pytest.mark.parametrize('views', [None, VIEWS], ids=['as they are', 'views'])
def test_training_from_recorded_logits_is_training_with_the_teacher(views, variables, tmp_path):
    """Bit for bit, where the teacher saw batches of the same size."""
    recorded = training.record_teacher(TEACHER, variables, DATA, tmp_path, batch_size=BATCH_SIZE, views=views)
    assert recorded['teacher_logits'].shape == ((26, CLASSES) if views is None else (26, 2, CLASSES))
    with_teacher, live_losses = train(live(FULL), variables, DATA, views)
    from_disk, recorded_losses = train(alone(objectives.from_recorded_logits(FULL)), {}, {**DATA, **recorded}, views)
    assert live_losses == recorded_losses
    chex.assert_trees_all_equal(with_teacher, from_disk)
    assert len(set(live_losses)) == 9


def top_k_of_the_teacher(student, teacher, batch):
    """The top-k loss of a teacher that runs."""
    return losses.top_k_soft_targets(student.logits, *losses.top_k_logits(teacher.logits, 3, temperature=2.0), temperature=2.0)


def test_training_from_the_largest_logits_is_training_with_those_of_the_teacher(variables, tmp_path):
    """Bit for bit, with views."""
    recorded = training.record_teacher(
        TEACHER, variables, DATA, tmp_path, batch_size=BATCH_SIZE, views=VIEWS, top_k=3, temperature=2.0
    )
    assert {name: (array.shape, array.dtype.name) for name, array in recorded.items()} == {
        'top_logits': ((26, 2, 3), 'float32'),
        'top_indices': ((26, 2, 3), 'uint16'),
        'rest': ((26, 2), 'float32'),
        'recorded_views': ((26,), 'uint32'),
    }
    with_teacher, live_losses = train(live(objectives.from_function('soft', top_k_of_the_teacher)), variables, DATA, VIEWS)
    from_disk, recorded_losses = train(
        alone(objectives.combine(soft=objectives.top_k_soft_targets(temperature=2.0))), {}, {**DATA, **recorded}, VIEWS
    )
    assert live_losses == recorded_losses
    chex.assert_trees_all_equal(with_teacher.params, from_disk.params)


def test_recorded_logits_are_those_of_the_network(variables, tmp_path):
    """By example and view; a batch of another size changes rounding alone, and float16 keeps 11 bits."""
    views = training.Views(shift, jax.random.key(5), 3)
    full, half = (
        training.record_teacher(TEACHER, variables, DATA, tmp_path / name, batch_size=11, views=views, dtype=name)
        for name in ('float32', 'float16')
    )
    keys = jax.random.fold_in(views.key, 2), jax.random.fold_in(views.key, 0)
    for view, example, key in ((2, 25, keys[0]), (0, 4, keys[1])):
        image = shift(jax.random.fold_in(key, example), jnp.asarray(DATA['inputs'][example]))
        expected = TEACHER.apply(variables, image[None])[0].logits[0]
        np.testing.assert_allclose(full['teacher_logits'][example, view], expected, rtol=1e-5, atol=1e-6)
    assert half['teacher_logits'].dtype == np.float16
    np.testing.assert_allclose(half['teacher_logits'], full['teacher_logits'], rtol=2**-11, atol=2**-24)
    files = [next((tmp_path / name).glob('*.npz')) for name in ('float32', 'float16')]
    with np.load(files[0]) as whole, np.load(files[1]) as halves:  # numpy's own files
        assert [x['teacher_logits'].nbytes for x in (whole, halves)] == [26 * 3 * CLASSES * size for size in (4, 2)]


def test_a_source_is_recorded_as_arrays_are(variables, tmp_path):
    """And is the same data to the check."""
    source = [{name: array[i] for name, array in DATA.items()} for i in range(26)]
    from_arrays, from_source = (
        training.record_teacher(TEACHER, variables, data, tmp_path / kind, views=VIEWS)
        for kind, data in (('arrays', DATA), ('source', source))
    )
    np.testing.assert_array_equal(from_arrays['teacher_logits'], from_source['teacher_logits'])
    training.recorded_teacher(tmp_path / 'source', data=DATA)
    with pytest.raises(ValueError, match='other data'):
        training.recorded_teacher(tmp_path / 'arrays', data=source[::-1])
    with pytest.raises(ValueError, match=r"a batch is a dictionary with 'inputs' .* got image"):
        training.recorded_teacher(tmp_path / 'arrays', data=[{'image': 0}])


@pytest.fixture
def small(variables, tmp_path):
    """A recording, and what it was made of."""
    training.record_teacher(TEACHER, variables, DATA, tmp_path / 'recorded', batch_size=13, views=VIEWS)
    return tmp_path / 'recorded'


def counting(calls):
    """The teacher, with a note of every time that it is traced."""

    def apply(variables, inputs, **more):
        calls.append(inputs.shape)
        return TEACHER.apply(variables, inputs, **more)

    return TEACHER._replace(apply=apply)


def test_a_finished_recording_is_found_and_an_unfinished_one_is_made_again(small, variables):
    """To find one the teacher is traced, once, and does not run."""
    calls = []
    arguments = (counting(calls), variables, DATA, small)
    before = np.array(training.recorded_teacher(small)['teacher_logits'])
    again = training.record_teacher(*arguments, batch_size=13, views=VIEWS)
    assert calls == [(13, 6, 6, 1)]
    np.testing.assert_array_equal(before, again['teacher_logits'])
    # As a kill leaves it: half a file under another name.
    file = next(small.glob('*.npz'))
    file.with_name(f'{file.name}.1-0.partial').write_bytes(file.read_bytes()[:500])
    file.unlink()
    with pytest.raises(ValueError, match=r'no finished recording of a teacher: run record_teacher .*1 of 1 files are missing'):
        training.recorded_teacher(small)
    made = training.record_teacher(*arguments, batch_size=13, views=VIEWS)
    assert calls == 2 * [(13, 6, 6, 1)]
    np.testing.assert_array_equal(before, made['teacher_logits'])
    assert not list(small.glob('*.partial'))


def changed(tree):
    """The same with one number changed in its last array."""
    leaves, structure = jax.tree.flatten(jax.tree.map(np.array, tree))
    leaves[-1].flat[-1] += 1
    return structure.unflatten(leaves)


def test_what_a_recording_is_not_of_is_refused(small, variables):
    other = {**DATA, 'inputs': changed(DATA['inputs'])}
    training.recorded_teacher(small, data=DATA, variables=variables, views=VIEWS)
    for name, given in (
        ('data', {'data': other}),
        ('variables', {'variables': changed(variables)}),
        ('views', {'views': VIEWS._replace(number=3)}),
        ('views', {'views': VIEWS._replace(key=jax.random.key(6))}),
        ('temperature', {'temperature': 2.0}),
    ):
        with pytest.raises(ValueError, match=f'recorded was recorded with other {name}: .*choose another folder'):
            training.recorded_teacher(small, **given)
    for name, arguments, settings in (
        ('data', (variables, other), {'views': VIEWS}),
        ('variables', (changed(variables), DATA), {'views': VIEWS}),
        ('views', (variables, DATA), {}),
        ('top_k', (variables, DATA), {'views': VIEWS, 'top_k': 2}),
        ('dtype', (variables, DATA), {'views': VIEWS, 'dtype': 'float16'}),
    ):
        with pytest.raises(ValueError, match=f'recorded was recorded with other {name}: .*choose another folder'):
            training.record_teacher(TEACHER, *arguments, small, **settings)


def small_network(activation=nn.relu, dtype=None):
    """A network of its own, whatever was traced before, that has the variables of all others."""

    def apply(variables, inputs, **_):
        kernel = variables['params'].astype(dtype or jnp.float32)
        hidden = activation(inputs.reshape(len(inputs), -1).astype(kernel.dtype) @ kernel + jnp.asarray(OFFSET, kernel.dtype))
        return networks.Outputs(jax.lax.scan(lambda x, _: (jnp.sin(x), None), hidden, length=2)[0]), {}

    return networks.Network(lambda key, inputs: {'params': jnp.ones((36, 3))}, apply)


OFFSET = np.linspace(0, 1, 3)[None]


def test_the_same_variables_in_another_program_are_refused(tmp_path):
    """Such as another activation, precision or preprocessing: it gives other logits."""
    variables = {'params': RNG.standard_normal((36, 3), np.float32)}
    record = functools.partial(training.record_teacher, variables=variables, data=DATA, folder=tmp_path)
    wanted = np.array(record(small_network())['teacher_logits'])
    jax.clear_caches()
    for same in (small_network(), networks.rematerialize(small_network())):
        np.testing.assert_array_equal(record(same, batch_size=7)['teacher_logits'], wanted)
    for other in (
        small_network(activation=jnp.tanh),
        small_network(dtype=jnp.bfloat16),
        networks.preprocess(small_network(), lambda x: x.astype(jnp.float32) / 255),
        networks.postprocess(small_network(), lambda x: x + 1e-6),
    ):
        with pytest.raises(
            ValueError, match=r'was recorded by another program .*: choose another folder; recorded_teacher opens'
        ):
            record(other)


FINGERPRINT = """
import jax, numpy as np
from kdjax import models, networks
from kdjax.training import _fingerprints
network = networks.from_linen(models.ResNet(8))
images, key = np.zeros((2, 8, 8, 3), np.float32), jax.random.key(0)
variables = jax.eval_shape(network.init, key, images)
print(_fingerprints.of_program(jax.make_jaxpr(network.apply)(variables, images)))
"""


def test_a_program_has_the_same_fingerprint_in_another_process():
    """Where hashes and addresses are others."""
    environment = {**os.environ, 'PYTHONHASHSEED': '3', 'PYTHONPATH': os.pathsep.join(sys.path)}
    other = subprocess.Popen([sys.executable, '-c', FINGERPRINT], env=environment, stdout=subprocess.PIPE, text=True)
    network = networks.from_linen(models.ResNet(8))
    images = np.zeros((2, 8, 8, 3), np.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    found = _fingerprints.of_program(jax.make_jaxpr(network.apply)(variables, images))
    assert other.communicate(timeout=600)[0].strip() == found


def test_predictions_of_any_positions_from_inputs_of_any_tree(tmp_path):
    """Tokens with their types, in views: by example, view and position."""
    data = {'inputs': {'ids': RNG.integers(0, 9, (5, 4)), 'types': RNG.integers(0, 2, (5, 4))}}

    def apply(variables, inputs, **_):
        return networks.Outputs(
            jax.nn.one_hot(inputs['ids'], 9) * variables + inputs['types'][..., None].astype(jnp.float32)
        ), {}

    def rolled(key, example):
        return {**example, 'ids': jnp.roll(example['ids'], jax.random.randint(key, (), 0, 4))}

    teacher, views = networks.Network(lambda key, inputs: jnp.float32(3), apply), training.Views(rolled, jax.random.key(2), 3)
    recorded = training.record_teacher(teacher, jnp.float32(3), data, tmp_path, views=views, batch_size=4)
    assert recorded['teacher_logits'].shape == (5, 3, 4, 9)
    key = jax.random.fold_in(jax.random.fold_in(views.key, 2), 4)
    seen = rolled(key, jax.tree.map(lambda leaf: jnp.asarray(leaf[4]), data['inputs']))
    np.testing.assert_array_equal(recorded['teacher_logits'][4, 2], apply(jnp.float32(3), seen)[0].logits)
    training.recorded_teacher(tmp_path, data=data)
    other = {'inputs': {**data['inputs'], 'types': 1 - data['inputs']['types']}}
    with pytest.raises(ValueError, match='other data'):
        training.recorded_teacher(tmp_path, data=other)


@pytest.mark.parametrize(
    'recorded, augment, views, message',
    [
        (None, shift, None, 'has teacher_logits, recorded of inputs that augment would change: record with views='),
        (VIEWS, shift, None, 'has teacher_logits, recorded of inputs that augment would change: record with views='),
        (None, None, VIEWS, 'recorded without views: record it with views=, or train without them'),
        (VIEWS, None, None, 'recorded with views: give the same views='),
        (VIEWS, None, VIEWS._replace(key=jax.random.key(6)), 'recorded with other views: give those of the recording'),
        (VIEWS, None, VIEWS._replace(number=3), 'recorded with other views: give those of the recording'),
    ],
)
def test_what_the_teacher_has_not_seen_is_refused(recorded, augment, views, message, tmp_path):
    data = {'inputs': np.ones((2, 6, 3), np.float32)}
    arrays = training.record_teacher(linear(np.float32(2)), {}, data, tmp_path, views=recorded)
    augmentation.check_recorded({**data, **arrays}, None, recorded)
    augmentation.check_recorded(data, augment, views)
    for entries in ({**data, **arrays}, training.JoinedSource([{'inputs': 1.0}] * 2, arrays)):
        with pytest.raises(ValueError, match=message):
            augmentation.check_recorded(entries, augment, views)


def test_damaged_files_are_refused(small):
    file, manifest = next(small.glob('*.npz')), small / 'manifest.json'
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:50], b'', b'x' + whole[1:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r'npz is truncated or damaged: remove it, and record_teacher writes it again'):
            training.recorded_teacher(small)
    file.write_bytes(whole)
    assert training.recorded_teacher(small)['teacher_logits'].shape == (26, 2, CLASSES)
    content = json.loads(manifest.read_text())
    outside = {**content, 'arrays': {'../secret': content['arrays']['teacher_logits']}}
    changed_setting = manifest.read_text().replace('float32', 'float16')
    for text in ('{', '[]', '{}', json.dumps(outside), changed_setting):
        manifest.write_text(text)
        with pytest.raises(ValueError, match=r'manifest.json is damaged: remove the folder'):
            training.recorded_teacher(small)
    manifest.write_text(json.dumps({'arrays': content['arrays'], 'settings': content['settings']}))
    with pytest.raises(ValueError, match=r'recorded in format 1, and this .* reads 2: remove the folder and record again'):
        training.recorded_teacher(small)


def test_recordings_and_epochs_of_other_views_do_not_meet(small, variables):
    data = {**DATA, **training.recorded_teacher(small)}
    problem = alone(objectives.from_recorded_logits(FULL))
    with pytest.raises(ValueError, match='was recorded with other views: give those of the recording'):
        train(problem, {}, data, VIEWS._replace(number=3))
    with pytest.raises(ValueError, match='was recorded with other views: give those of the recording'):
        train(problem, {}, data, VIEWS._replace(key=jax.random.key(99)))
    with pytest.raises(ValueError, match='was recorded with views: give the same views='):
        train(problem, {}, training.one_view(data, 0))
    with pytest.raises(ValueError, match='recorded of inputs that augment would change'):
        training.fit(problem, data, key=jax.random.key(0), batch_size=2, epochs=1, augment=shift, progress=False)
    # Logits that somebody else has recorded do not say of what.
    theirs = {name: x for name, x in data.items() if name != 'recorded_views'}
    with pytest.raises(ValueError, match=r'teacher_logits \(8, 2, 10\) was not recorded with 3 views'):
        train(problem, {}, theirs, VIEWS._replace(number=3))
    with pytest.raises(ValueError, match=r'recorded logits \(8, 2, 10\) do not fit .*training.one_view takes one'):
        train(problem, {}, theirs)
    with pytest.raises(ValueError, match=r"from_recorded_logits needs batch\['teacher_logits'\]; the batch has inputs, labels"):
        train(problem, {}, DATA)
    with pytest.raises(ValueError, match='either augment or views'):
        training.in_memory_epoch(problem, batch_size=2, augment=shift, views=VIEWS)
    with pytest.raises(ValueError, match='the number of views must be at least 1, got 0'):
        training.in_memory_epoch(problem, batch_size=2, views=VIEWS._replace(number=0))


def linear(kernel):
    """A teacher with one number."""
    return networks.Network(lambda key, x: {'params': kernel}, lambda variables, x, **more: (networks.Outputs(x * kernel), {}))


@pytest.mark.parametrize(
    'kernel, settings, message',
    [
        (1e5, {'dtype': 'float16'}, 'logits that are NaN or too large for float16'),
        (np.nan, {}, 'logits that are NaN or too large for float32'),
        (1.0, {'dtype': 'int8'}, 'dtype must be float32, float16 or bfloat16, got int8'),
        (1.0, {'batch_size': 0}, 'batch_size and examples must be at least 1, got 0 and 2'),
        (1.0, {'top_k': 4}, 'k must be between 1 and the number of classes, 3, got 4'),
        (1.0, {'views': VIEWS._replace(number=0)}, 'the number of views must be at least 1'),
    ],
)
def test_what_cannot_be_recorded_is_an_error(kernel, settings, message, tmp_path):
    data = {'inputs': np.ones((2, 3), np.float32)}
    with pytest.raises(ValueError, match=message):
        training.record_teacher(linear(np.float32(kernel)), {}, data, tmp_path, **settings)
    assert not (tmp_path / 'manifest.json').exists()


def test_a_masked_class_stays_masked(tmp_path):
    """Minus infinity is a logit that both dtypes hold."""
    data = {'inputs': np.array([[1.0, -np.inf]], np.float32)}
    recorded = training.record_teacher(linear(np.float32(1.0)), {}, data, tmp_path, dtype=np.float16)
    np.testing.assert_array_equal(recorded['teacher_logits'], data['inputs'])


def test_a_teacher_without_logits_is_an_error(tmp_path):
    with pytest.raises(ValueError, match='record_teacher: the teacher gives no logits'):
        training.record_teacher(SILENT, {}, DATA, tmp_path)
