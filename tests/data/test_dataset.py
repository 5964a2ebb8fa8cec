"""Data sets in memory: splits that share nothing and stay the same, few labels, and TFDS from end to end without TensorFlow."""

import functools
import importlib.util
import io
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import chex
import flax.linen as nn
import grain
import jax
import numpy as np
import optax
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from kdjax import networks, objectives, training
from kdjax.data import Dataset, hide_labels, load, take

TRAINING, TESTING = 1437, 360


def rows(split: dict[str, np.ndarray]) -> list[tuple[bytes, int]]:
    return [(image.tobytes(), int(label)) for image, label in zip(split['inputs'], split['labels'], strict=True)]


@functools.cache
def digits(**options: Any) -> Dataset:
    return load('digits', **options)


# Digits.


def test_digits_have_three_splits_of_images_and_labels() -> None:
    dataset = digits()
    assert dataset.name == 'digits'
    assert dataset.classes == 10
    sizes = {'train': TRAINING - round(0.1 * TRAINING), 'validation': round(0.1 * TRAINING), 'test': TESTING}
    for split, size in sizes.items():
        examples = getattr(dataset, split)
        assert sorted(examples) == ['inputs', 'labels']
        assert examples['inputs'].shape == (size, 8, 8, 1)
        assert examples['inputs'].dtype == np.uint8
        assert examples['labels'].shape == (size,)
        assert examples['labels'].dtype == np.int32
        assert examples['inputs'].min() == 0
        assert examples['inputs'].max() == 255
        assert set(examples['labels'].tolist()) == set(range(10))


def test_splits_are_disjoint_and_together_all_of_the_digits() -> None:
    """As a multiset of images with labels, they are scikit-learn's 1797, so none is missing and none is in two splits."""
    dataset = digits()
    ours = [row for split in dataset[2:5] for row in rows(split)]
    source = load_digits()
    images = np.round(source.images[..., None] * 255 / 16).astype(np.uint8)
    assert len(ours) == 1797
    assert sorted(ours) == sorted(rows({'inputs': images, 'labels': source.target}))
    # Classes are as balanced in the test split as drawing by chance makes them: 36 each, give or take 5.
    assert np.abs(np.bincount(dataset.test['labels']) - 36).max() < 5 * 5


def test_the_seed_decides_the_validation_split_and_nothing_else() -> None:
    first, other = digits(), digits(seed=1)
    again = load('digits', seed=0)
    for split in ('train', 'validation', 'test'):
        for key in ('inputs', 'labels'):
            np.testing.assert_array_equal(getattr(first, split)[key], getattr(again, split)[key])
    assert rows(first.test) == rows(other.test)
    assert rows(first.validation) != rows(other.validation)
    assert sorted(rows(first.train) + rows(first.validation)) == sorted(rows(other.train) + rows(other.validation))
    assert len(set(rows(first.validation)) & set(rows(other.validation))) < 40


@pytest.mark.parametrize('validation, held_out', [(0.5, 718), (1 / 3, 479), (0.001, 1), (0.9995, 1436)])
def test_validation_is_the_share_that_is_held_out(validation: float, held_out: int) -> None:
    dataset = digits(validation=validation)
    assert len(dataset.validation['labels']) == held_out
    assert len(dataset.train['labels']) == TRAINING - held_out
    assert rows(dataset.test) == rows(digits().test)


@pytest.mark.parametrize('validation', [0, 1, -0.1, 1.5, float('nan')])
def test_validation_out_of_range_is_an_error(validation: float) -> None:
    with pytest.raises(ValueError, match=f'validation must be a share between 0 and 1, got {validation}'):
        load('digits', validation=validation)


@pytest.mark.parametrize('validation, split', [(1e-6, 'validation'), (0.9999, 'train')])
def test_an_empty_split_is_an_error(validation: float, split: str) -> None:
    with pytest.raises(
        ValueError, match=f'digits: the {split} split is empty, with 1437 training examples, validation={validation}'
    ):
        load('digits', validation=validation)


def test_digits_without_scikit_learn_are_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(ImportError, match=r'digits needs scikit-learn, which is not installed: pip install scikit-learn'):
        load('digits')


# Choosing examples and labels.


def test_take_picks_examples_from_every_array() -> None:
    taken = take({'inputs': np.arange(12).reshape(4, 3), 'labels': np.array([5, 6, 7, 8])}, np.array([3, 0, 3]))
    assert taken['inputs'].tolist() == [[9, 10, 11], [0, 1, 2], [9, 10, 11]]
    assert taken['labels'].tolist() == [8, 5, 8]


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 5), st.data())
def test_hide_labels_keeps_the_exact_number_as_balanced_as_can_be(labels: list[int], seed: int, drawn: st.DataObject) -> None:
    keep = drawn.draw(st.integers(1, len(labels)))
    split = {'inputs': np.arange(len(labels)), 'labels': np.array(labels, np.int32)}
    hidden = hide_labels(split, keep=keep, seed=seed)
    kept = hidden['labels'] >= 0
    assert kept.sum() == keep
    assert hidden['labels'].dtype == np.int32
    np.testing.assert_array_equal(hidden['labels'], np.where(kept, split['labels'], -1))
    assert hidden['inputs'] is split['inputs']
    assert split['labels'].tolist() == labels
    # A class has fewer than another by more than one only if all of its labels are kept.
    there = np.bincount(labels, minlength=4)
    counts = np.bincount(split['labels'][kept], minlength=4)
    for label in np.flatnonzero(there):
        assert counts[label] >= min(there[label], counts.max() - 1)


def test_hide_labels_is_a_function_of_its_seed() -> None:
    split = digits().train
    one, again, other = (hide_labels(split, keep=100, seed=seed)['labels'] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(np.bincount(one[one >= 0]), 10)
    np.testing.assert_array_equal(hide_labels(split, keep=len(one))['labels'], split['labels'])


def test_examples_that_have_no_label_do_not_count_as_labelled() -> None:
    hidden = hide_labels({'labels': np.array([-1, -1, -1, 0, 1], np.int32)}, keep=2)
    np.testing.assert_array_equal(hidden['labels'], [-1, -1, -1, 0, 1])


@pytest.mark.parametrize('keep', [0, -1, 5])
def test_more_labels_than_examples_or_none_are_an_error(keep: int) -> None:
    with pytest.raises(ValueError, match=f'hide_labels: keep must be between 1 and 4, the number of labels, got {keep}'):
        hide_labels({'labels': np.arange(4)}, keep=keep)


# TensorFlow Datasets.


def png(image: np.ndarray) -> io.BytesIO:
    """What an `Image` feature takes without TensorFlow: encoded bytes."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'png')
    file.seek(0)
    return file


def drawn_images(split: str, examples: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(len(split))
    return rng.integers(0, 256, (examples, 5, 4, 3), np.uint8), rng.integers(0, 3, examples)


class KdjaxTiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Thirty small images in three classes, and a test split."""

    VERSION = tfds.core.Version('1.2.0')
    name = 'kdjax_tiny'
    SPLITS = ('train', 'test')
    SUPERVISED = ('image', 'label')
    SHAPES: tuple[int, ...] = (5,)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            'image': tfds.features.Image(shape=(None, 4, 3)),
            'label': tfds.features.ClassLabel(num_classes=3),
            'weight': tfds.features.Scalar(np.float32),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=self.SUPERVISED
        )

    def _split_generators(self, download_manager: Any) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in self.SPLITS}

    def _generate_examples(self, split: str) -> Iterator:
        for i, (image, label) in enumerate(zip(*drawn_images(split, 30), strict=True)):
            yield i, {'image': png(image[: self.SHAPES[i % len(self.SHAPES)]]), 'label': int(label), 'weight': 0.5}


def prepare(folder: pathlib.Path, **attributes: Any) -> str:
    """Prepares the tiny data set, or a variant of it, and returns the folder."""
    builder = type(
        'Variant', (KdjaxTiny,), {'__module__': __name__, 'name': KdjaxTiny.name, **attributes}, skip_registration=True
    )
    builder(data_dir=folder, file_format='array_record').download_and_prepare()
    return str(folder)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepare(tmp_path_factory.mktemp('tfds'))


def test_a_prepared_data_set_is_read_bit_for_bit_without_tensorflow(prepared: str) -> None:
    others = 'tensorflow' in sys.modules
    dataset = load('kdjax_tiny', data_dir=prepared, validation=0.2)
    assert dataset.name == 'kdjax_tiny'
    assert dataset.classes == 3
    assert [len(split['labels']) for split in dataset[2:5]] == [24, 6, 30]
    for split in dataset[2:5]:
        assert sorted(split) == ['inputs', 'labels']
        assert split['inputs'].dtype == np.uint8
        assert split['inputs'].shape[1:] == (5, 4, 3)
        assert split['labels'].dtype == np.int32
    for name, splits in {'train': dataset[2:4], 'test': dataset[4:5]}.items():
        images, labels = drawn_images(name, 30)
        assert sorted(row for split in splits for row in rows(split)) == sorted(rows({'inputs': images, 'labels': labels}))
    assert ('tensorflow' in sys.modules) == others


def test_a_prepared_data_set_is_the_same_every_time(prepared: str) -> None:
    one, again, other = (load('kdjax_tiny:1.2.0', data_dir=prepared, seed=seed) for seed in (0, 0, 1))
    assert [rows(split) for split in one[2:5]] == [rows(split) for split in again[2:5]]
    assert rows(one.validation) != rows(other.validation)
    assert rows(one.test) == rows(other.test)


def test_data_sets_of_more_than_one_chunk_keep_every_example(prepared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import kdjax.data._tfds

    whole = load('kdjax_tiny', data_dir=prepared)
    for chunk in (1, 7, 15):
        monkeypatch.setattr(kdjax.data._tfds, '_CHUNK', chunk)
        again = load('kdjax_tiny', data_dir=prepared)
        assert [rows(split) for split in again[2:5]] == [rows(split) for split in whole[2:5]]


@pytest.mark.parametrize(
    'attributes, message',
    [
        ({'SPLITS': ('unlabelled',)}, 'kdjax_tiny needs a split called train; it has unlabelled'),
        ({'SUPERVISED': ('image', 'weight')}, "not a classification data set: its supervised keys are \\('image', 'weight'\\)"),
        ({'SUPERVISED': None}, 'not a classification data set: its supervised keys are None'),
        ({'SHAPES': (5, 3)}, 'kdjax_tiny has images of 2 sizes'),
    ],
    ids=['splits', 'regression', 'unsupervised', 'sizes'],
)
def test_data_sets_that_do_not_fit_are_errors(attributes: dict, message: str, tmp_path: pathlib.Path) -> None:
    folder = prepare(tmp_path, **attributes)
    with pytest.raises(ValueError, match=message):
        load('kdjax_tiny', data_dir=folder)


def test_a_validation_split_stands_in_for_a_test_split(tmp_path: pathlib.Path) -> None:
    folder = prepare(tmp_path, SPLITS=('train', 'validation'))
    dataset = load('kdjax_tiny', data_dir=folder)
    images, labels = drawn_images('validation', 30)
    assert sorted(rows(dataset.test)) == sorted(rows({'inputs': images, 'labels': labels}))


def test_without_a_test_split_one_is_drawn_and_said(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    folder = prepare(tmp_path, SPLITS=('train', 'unlabelled'))
    dataset = load('kdjax_tiny', data_dir=folder)
    assert 'kdjax_tiny has no test split: one is drawn' in capsys.readouterr().err
    images, labels = drawn_images('train', 30)
    assert sorted(row for split in dataset[2:5] for row in rows(split)) == sorted(rows({'inputs': images, 'labels': labels}))
    assert set(dataset.test['labels'].tolist()) == {0, 1, 2}


def test_images_of_several_sizes_are_resized(tmp_path: pathlib.Path) -> None:
    dataset = load('kdjax_tiny', data_dir=prepare(tmp_path, SHAPES=(5, 3)), image_size=4)
    assert [split['inputs'].shape for split in dataset[2:5]] == [(27, 4, 4, 3), (3, 4, 4, 3), (30, 4, 4, 3)]
    # Those of height 4 would stay what they are; a lower one is scaled to cover the square.
    assert dataset.class_names == ('0', '1', '2')


@pytest.mark.parametrize('name, suggestion', [('mnistt', 'mnist'), ('digit', 'digits'), ('cifar-10', 'cifar10')])
def test_an_unknown_name_is_an_error_with_a_suggestion(name: str, suggestion: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=f'there is no data set {name!r}.*did you mean .*{suggestion}'):
        load(name, data_dir=str(tmp_path))


@pytest.fixture
def find_spec(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Lets a test say whether TensorFlow is installed."""
    answers: dict[str, Any] = {}
    actual = importlib.util.find_spec
    monkeypatch.setattr(
        'kdjax.data._tfds.importlib.util.find_spec',
        lambda name, *rest: answers.get(name) if name in answers else actual(name, *rest),
    )
    return answers


class Unprepared(KdjaxTiny, skip_registration=True):
    """The tiny data set, whose code TFDS knows, and which nobody has prepared."""

    name = KdjaxTiny.name


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the tiny data set one of those whose code TFDS finds by name."""
    monkeypatch.setattr(tfds, 'list_builders', lambda **options: ['kdjax_tiny'])
    monkeypatch.setattr(tfds, 'builder', lambda name, **options: Unprepared(**options))


def test_unprepared_without_tensorflow_is_an_error_that_says_what_to_do(find_spec: dict, tmp_path: pathlib.Path) -> None:
    find_spec['tensorflow'] = None
    with pytest.raises(ValueError, match=r'mnist is not prepared in .*pip install tensorflow') as error:
        load('mnist', data_dir=str(tmp_path))
    assert str(tmp_path) in str(error.value)
    command = f"tfds.builder('mnist', data_dir={str(tmp_path)!r}, file_format='array_record').download_and_prepare()"
    assert command in str(error.value)
    assert not [path for path in tmp_path.rglob('*') if path.is_file()]


@pytest.mark.parametrize('name', ['mnist/no_such_config', 'no such name'])
def test_names_that_tfds_cannot_resolve_are_value_errors(name: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=name.split('/')[-1]):
        load(name, data_dir=str(tmp_path))


@pytest.mark.parametrize('name, error', [('cifar10:9.9.9', None), ('mnist', ModuleNotFoundError('tensorflow'))])
def test_errors_of_the_builder_itself_are_value_errors(
    name: str, error: Exception | None, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as of a version that there is not, or of a data set whose code needs TensorFlow as soon as it is made, like COCO."""

    def fail(name: str, **options: Any) -> None:
        raise error

    if error is not None:
        monkeypatch.setattr(tfds, 'builder', fail)
    with pytest.raises(ValueError, match=name.split(':')[0]):
        load(name, data_dir=str(tmp_path))


@pytest.mark.usefixtures('known')
def test_a_refusal_leaves_nothing_behind_that_breaks_a_later_preparation(find_spec: dict, tmp_path: pathlib.Path) -> None:
    find_spec['tensorflow'] = None
    with pytest.raises(ValueError, match='preparing it needs TensorFlow once'):
        load('kdjax_tiny', data_dir=str(tmp_path))
    prepare(tmp_path)
    assert len(load('kdjax_tiny', data_dir=str(tmp_path)).test['labels']) == 30


@pytest.mark.usefixtures('known')
@pytest.mark.parametrize(
    'error', [OSError('no route to host\nsecond line'), RuntimeError(), AssertionError('checksum')], ids=repr
)
def test_a_failed_download_is_an_error_of_one_line_and_can_be_repeated(
    error: Exception, find_spec: dict, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec['tensorflow'] = importlib.util.find_spec('numpy')

    def fail(self: Any, **options: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Unprepared, 'download_and_prepare', fail)
        with pytest.raises(ValueError, match=r'kdjax_tiny is not prepared in .* and could not be downloaded') as caught:
            load('kdjax_tiny', data_dir=str(tmp_path))
    message = str(caught.value)
    assert '\n' not in message
    assert (str(error).split('\n')[0] or type(error).__name__) in message
    assert 'download_and_prepare()' in message
    assert caught.value.__cause__ is error
    # With TensorFlow there and the network up again, it is prepared on the spot.
    assert len(load('kdjax_tiny', data_dir=str(tmp_path)).test['labels']) == 30


@pytest.mark.usefixtures('known')
def test_a_preparation_that_breaks_off_half_way_can_be_repeated(
    find_spec: dict, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec['tensorflow'] = importlib.util.find_spec('numpy')

    def broken(self: Any, split: str) -> Iterator:
        yield from list(KdjaxTiny._generate_examples(self, split))[:20]
        raise OSError('disk full')

    with monkeypatch.context() as patch:
        patch.setattr(Unprepared, '_generate_examples', broken)
        with pytest.raises(ValueError, match=r'could not be downloaded .*disk full'):
            load('kdjax_tiny', data_dir=str(tmp_path))
    assert len(load('kdjax_tiny', data_dir=str(tmp_path)).test['labels']) == 30


def test_a_prepared_data_set_streams_through_fit_and_is_taken_up_again(prepared: str, tmp_path: pathlib.Path) -> None:
    read = tfds.builder('kdjax_tiny', data_dir=prepared).as_data_source('train')
    source = grain.MapDataset.source(read).map(
        lambda example: {'inputs': example['image'].astype(np.float32) / 255, 'labels': example['label']}
    )
    network = networks.from_linen(nn.Sequential([lambda x: x.reshape(x.shape[0], -1), nn.Dense(3)]))
    problem = training.distillation(network, None, objectives.hard_labels(), optax.sgd(0.1))
    arguments = {'key': jax.random.key(0), 'batch_size': 8, 'every': 2, 'progress': False}
    whole = training.fit(problem, source, steps=6, **arguments)
    training.fit(problem, source, steps=4, directory=tmp_path, **arguments)
    resumed = training.fit(problem, source, steps=6, directory=tmp_path, **arguments)
    assert resumed.resumed_from == 4
    chex.assert_trees_all_equal(jax.device_get(whole.variables), jax.device_get(resumed.variables))
    with pytest.raises(ValueError, match=r"a batch is a dictionary with 'inputs' .* got image, label, weight"):
        training.fit(problem, read, steps=1, **arguments)
