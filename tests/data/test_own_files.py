"""Data sets of one's own: folders, tables, arrays and Hugging Face's, read as what they hold or refused in one line."""

import json
import pathlib
import shutil
from typing import Any

import chex
import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from PIL import Image

from kdjax import data, networks, objectives, training
from kdjax.data import _cache, _pixels

COLOURS = {'crème brûlée': (250, 20, 20), 'plain red': (20, 250, 20), 'zebra': (20, 20, 250)}
"""The colour of every class's images, so that labels can be told from pixels."""


def picture(colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (6, 8)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 5, (*size, 3))
    return Image.fromarray((np.array(colour) + noise).astype(np.uint8))


def photos(folder: pathlib.Path, splits: dict[str, int], **options: Any) -> pathlib.Path:
    """A folder of PNGs by class, below a folder for each split; the split '' stands for none."""
    for part, (split, number) in enumerate(splits.items()):
        for name, colour in COLOURS.items():
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(number):
                picture(colour, 100 * part + i, **options).save(place / f'{i} photo.png')
    return folder


def fits(dataset: data.Dataset) -> None:
    """Labels are those of the colours, and names those of the classes."""
    assert dataset.class_names == tuple(COLOURS)
    for split in (dataset.train, dataset.validation, dataset.test):
        assert split['inputs'].dtype == np.uint8
        assert split['labels'].dtype == np.int32
        assert np.array_equal(split['inputs'][..., :].mean((1, 2)).argmax(-1), split['labels'])


def same(one: data.Dataset, other: data.Dataset) -> None:
    assert one.class_names == other.class_names
    chex.assert_trees_all_equal(list(one[2:5]), list(other[2:5]))


@pytest.fixture
def folder(tmp_path):
    return photos(tmp_path / 'my photos ü', {'': 10})


def test_a_folder_by_class_is_split_in_proportion_and_the_same_every_time(folder):
    dataset = data.load(folder)
    fits(dataset)
    assert dataset.name == 'my photos ü'
    assert [np.bincount(split['labels']).tolist() for split in dataset[2:5]] == [[7] * 3, [1] * 3, [2] * 3]
    same(dataset, data.load(str(folder)))
    assert not np.array_equal(data.load(folder, seed=1).test['inputs'], dataset.test['inputs'])
    everything = np.concatenate([split['inputs'] for split in dataset[2:5]])
    assert len(np.unique(everything.reshape(30, -1), axis=0)) == 30


def test_official_splits_are_kept(tmp_path):
    dataset = data.load(photos(tmp_path / 'all', {'train': 4, 'val': 3, 'test': 2}))
    fits(dataset)
    assert [len(split['labels']) for split in dataset[2:5]] == [12, 9, 6]
    dataset = data.load(photos(tmp_path / 'two', {'train': 4, 'test': 2}), validation=0.25)
    assert [len(split['labels']) for split in dataset[2:5]] == [9, 3, 6]


def test_what_is_no_image_is_left_out(folder):
    (folder / '.hidden').mkdir()
    (folder / 'zebra' / '.DS_Store').write_bytes(b'x')
    (folder / 'zebra' / 'notes.txt').write_text('x')
    deeper = folder / 'zebra' / 'deeper'
    deeper.mkdir()
    picture(COLOURS['zebra'], 99).save(deeper / 'more.PNG')
    dataset = data.load(folder)
    fits(dataset)
    assert sum(len(split['labels']) for split in dataset[2:5]) == 31


def test_sizes_that_differ_are_resized_once_and_kept(folder, tmp_path, monkeypatch):
    picture(COLOURS['zebra'], 50, (20, 12)).save(folder / 'zebra' / 'large.png')
    with pytest.raises(ValueError, match=r'has images of 2 sizes, from 6 x 8 to 20 x 12 .*: give the size .* image_size=6'):
        data.load(folder)
    dataset = data.load(folder, image_size=5, data_dir=str(tmp_path / 'kept'))
    fits(dataset)
    assert dataset.train['inputs'].shape[1:] == (5, 5, 3)
    with monkeypatch.context() as patch:
        patch.setattr(_pixels, 'decode', lambda *rest, **more: pytest.fail('decoded again'))
        patch.setattr('kdjax.data._folders.decode', lambda *rest, **more: pytest.fail('decoded again'))
        same(data.load(folder, image_size=5, data_dir=str(tmp_path / 'kept')), dataset)
    picture(COLOURS['zebra'], 51, (20, 12)).save(folder / 'zebra' / 'large.png')
    again = data.load(folder, image_size=5, data_dir=str(tmp_path / 'kept'))
    assert not all(np.array_equal(a['inputs'], b['inputs']) for a, b in zip(dataset[2:5], again[2:5], strict=True))
    assert data.load(folder, image_size=(3, 9), data_dir=str(tmp_path)).train['inputs'].shape[1:] == (3, 9, 3)


def test_resizing_keeps_the_middle_and_does_not_stretch():
    image = np.zeros((10, 30, 1), np.uint8)
    image[:, 10:20] = 255
    assert np.array_equal(_pixels.resize(image, (10, 10)), np.full((10, 10, 1), 255, np.uint8))
    assert np.array_equal(_pixels.resize(image, (10, 30)), image)


def test_gray_colour_and_transparent_images_mix(folder):
    gray = np.full((6, 8), 7, np.uint8)
    Image.fromarray(gray).save(folder / 'zebra' / 'gray.png')
    clear = np.zeros((6, 8, 4), np.uint8)
    Image.fromarray(clear, 'RGBA').save(folder / 'zebra' / 'clear.png')
    Image.fromarray(np.full((6, 8), 0x1234, np.uint16)).save(folder / 'zebra' / 'deep.png')
    picture(COLOURS['zebra'], 3).convert('P').save(folder / 'zebra' / 'palette.png')
    dataset = data.load(folder)
    everything = np.concatenate([split['inputs'] for split in dataset[2:5]])
    assert everything.shape == (34, 6, 8, 3)
    means = {tuple(np.round(image.mean((0, 1))).astype(int).tolist()) for image in everything}
    assert {(7, 7, 7), (255, 255, 255), (0x12, 0x12, 0x12)} <= means


def test_gray_images_alone_have_one_channel_and_cameras_are_turned(tmp_path):
    for name, value in (('dark', 10), ('light', 200)):
        (tmp_path / 'gray' / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.full((4, 6), value, np.uint8)
            exif = Image.Exif()
            exif[0x0112] = 6  # on its side
            Image.fromarray(pixels).save(tmp_path / 'gray' / name / f'{i}.jpg', exif=exif)
    dataset = data.load(tmp_path / 'gray', validation=0.3, test=0.3)
    assert dataset.train['inputs'].shape[1:] == (6, 4, 1)
    assert dataset.class_names == ('dark', 'light')


def test_an_image_of_one_pixel_is_an_image(tmp_path):
    dataset = data.load(photos(tmp_path / 'tiny', {'': 4}, size=(1, 1)))
    fits(dataset)
    assert dataset.train['inputs'].shape[1:] == (1, 1, 3)


def test_large_data_stay_on_disk_and_train_as_those_in_memory(folder, tmp_path, monkeypatch, capsys):
    whole = data.load(folder)
    assert not isinstance(whole.train['inputs'], np.memmap)
    monkeypatch.setattr(_cache, 'free_memory', lambda: 10_000)
    mapped = data.load(folder, data_dir=str(tmp_path / 'kept'))
    assert 'my photos ü: 0.0 GB of images, 0.0 GB of memory free: they are read from disk' in capsys.readouterr().err
    assert all(isinstance(split['inputs'], np.memmap) for split in mapped[2:5])
    same(whole, mapped)
    assert not isinstance(data.load(folder, stream=False).train['inputs'], np.memmap)
    assert data.channel_statistics(mapped.train['inputs']) == data.channel_statistics(whole.train['inputs'])
    hidden = data.hide_labels(mapped.train, keep=3)
    assert isinstance(hidden['inputs'], np.memmap)
    network = networks.preprocess(networks.from_linen(nn.Dense(3)), lambda x: x.reshape(len(x), -1).astype(np.float32) / 255)
    problem = training.distillation(network, None, objectives.hard_labels(), optax.sgd(0.1))
    options = {'key': jax.random.key(0), 'batch_size': 7, 'epochs': 40, 'progress': False}
    trained = training.fit(problem, mapped.train, **options).variables
    accuracies = [training.evaluator(network)(trained, split.test)['accuracy'].compute() for split in (mapped, whole)]
    assert accuracies == [1.0, 1.0]


def test_chosen_examples_of_data_on_disk_stay_there(folder, tmp_path):
    """Some of them, some of these, and the labelled ones repeated: as the arrays in memory would be, to every index."""
    whole, mapped = data.load(folder), data.load(folder, data_dir=str(tmp_path / 'kept'), stream=True)
    few = [data.hide_labels(split.train, keep=3) for split in (whole, mapped)]
    order = np.random.default_rng(0).permutation(len(few[0]['labels']))
    for choose in (lambda split: data.take(split, order[:9]), data.repeat_labelled):
        in_memory, on_disk = (data.take(choose(split), np.array([4, 0, 4, 7])) for split in few)
        rows, array = on_disk['inputs'], in_memory['inputs']
        assert not isinstance(rows, np.ndarray)
        assert (rows.shape, rows.dtype, rows.ndim, rows.size, len(rows)) == (array.shape, array.dtype, 4, array.size, 4)
        for index in (2, -1, slice(1, 3), np.array([3, 3, 0]), (slice(None), 1, slice(2)), array[:, 0, 0, 0] > 0):
            np.testing.assert_array_equal(rows[index], array[index])
        np.testing.assert_array_equal(np.asarray(rows), array)
        assert np.asarray(rows, np.float32).dtype == np.float32
        np.testing.assert_array_equal(on_disk['labels'], in_memory['labels'])
        with pytest.raises(ValueError, match='cannot become an array without a copy'):
            np.array(rows, copy=False)
    network = networks.preprocess(networks.from_linen(nn.Dense(3)), lambda x: x.reshape(len(x), -1).astype(np.float32) / 255)
    problem = training.distillation(network, None, objectives.hard_labels(), optax.sgd(0.1))
    options = {'key': jax.random.key(0), 'batch_size': 7, 'epochs': 2, 'progress': False}
    repeated = data.repeat_labelled(few[1])
    # Streamed, as a memory map of the same rows is.
    np.save(tmp_path / 'rows.npy', np.asarray(repeated['inputs']))
    written = {**repeated, 'inputs': np.load(tmp_path / 'rows.npy', mmap_mode='r')}
    found, expected = (training.fit(problem, split, **options).variables for split in (repeated, written))
    chex.assert_trees_all_equal(found, expected)


def table(folder: pathlib.Path, file: pathlib.Path, split: bool = False) -> list[dict[str, str]]:
    rows = []
    for path in sorted(folder.rglob('*.png')):
        row = {'filename': str(path.relative_to(file.parent)), 'label': path.parent.name}
        rows.append(row | ({'split': 'test' if path.stem.startswith(('0', '1')) else 'train'} if split else {}))
    return rows


@pytest.mark.parametrize('suffix', ['.csv', '.parquet'])
def test_tables_name_files(folder, suffix):
    file = folder.parent / f'table{suffix}'
    rows = table(folder, file, split=True)
    if suffix == '.csv':
        lines = [','.join(rows[0]), *(','.join(row.values()) for row in rows)]
        file.write_text('\n'.join(lines), encoding='utf-8')
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    dataset = data.load(file)
    fits(dataset)
    assert [len(split['labels']) for split in dataset[2:5]] == [21, 3, 6]


def arrays(number: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(number) % 3
    inputs = np.random.default_rng(seed).integers(0, 5, (number, 4, 4, 3)).astype(np.uint8)
    inputs[np.arange(number), ..., labels] += 100
    return inputs, labels


def test_arrays_in_files_of_all_spellings(tmp_path):
    (x, y), (x_test, y_test) = arrays(30), arrays(6, 1)
    names = np.array(list(COLOURS))
    np.savez(tmp_path / 'keras.npz', x_train=x, y_train=y[:, None], x_test=x_test, y_test=y_test[:, None], class_names=names)
    np.savez(tmp_path / 'ours.npz', inputs=np.concatenate([x, x_test]), labels=names[np.concatenate([y, y_test])])
    np.savez(tmp_path / 'front.npz', train_images=x, train_labels=y, test_images=x_test, test_labels=y_test, class_names=names)
    (tmp_path / 'folder').mkdir()
    for name, array in {'x_train': x, 'y_train': y, 'x_test': x_test, 'y_test': y_test, 'class_names': names}.items():
        np.save(tmp_path / 'folder' / f'{name}.npy', array)
    found = {name: data.load(tmp_path / name) for name in ('keras.npz', 'ours.npz', 'front.npz', 'folder')}
    for dataset in found.values():
        fits(dataset)
    same(found['keras.npz'], found['front.npz'])
    same(found['keras.npz'], found['folder'])
    assert np.array_equal(found['keras.npz'].test['inputs'], x_test)
    assert data.load(tmp_path / 'keras.npz', image_size=2).train['inputs'].shape[1:] == (2, 2, 3)


@pytest.mark.parametrize(
    'given, wanted',
    [
        (np.array([[[0.0, 0.5], [0.25, 1.0]]]), [0, 128, 64, 255]),
        (np.array([[[0, 5], [17, 255]]], np.int64), [0, 5, 17, 255]),
        (np.array([[[0, 0x1234], [0x0100, 0xFFFF]]], np.uint16), [0, 0x12, 1, 255]),
        (np.array([[[True, False], [False, True]]]), [255, 0, 0, 255]),
    ],
    ids=['shares', 'integers', '16 bits', 'booleans'],
)
def test_pixels_of_other_types_become_bytes(given, wanted):
    assert _pixels.as_pixels(given, where='x').ravel().tolist() == wanted


def test_labels_that_do_not_count_up_from_zero_keep_what_they_were():
    dataset = data.from_arrays(np.zeros((30, 2)), [10, 20, 30] * 10)
    assert dataset.class_names == ('10', '20', '30')
    assert np.bincount(dataset.train['labels']).tolist() == [7, 7, 7]
    given = data.from_arrays({'a': np.arange(6)}, [0, 1] * 3, validation=0.5, test=({'a': np.arange(2)}, [1, 0]))
    assert given.test['labels'].tolist() == [1, 0]
    assert given.test['inputs']['a'].tolist() == [0, 1]


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """Hugging Face's format, with a test split."""
    import datasets

    features = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=list(COLOURS))})

    def rows(number, seed):
        return {
            'image': [picture(colour, seed + i) for i in range(number) for colour in COLOURS.values()],
            'label': list(range(3)) * number,
        }

    parts = {split: datasets.Dataset.from_dict(rows(n, s), features) for split, n, s in (('train', 6, 0), ('test', 2, 60))}
    folder = tmp_path_factory.mktemp('hub') / 'saved'
    datasets.DatasetDict(parts).save_to_disk(folder)
    return folder


def test_data_sets_of_hugging_face_from_disk(saved, tmp_path):
    dataset = data.load(saved)
    fits(dataset)
    assert [len(split['labels']) for split in dataset[2:5]] == [15, 3, 6]
    small = data.load(saved, image_size=3, data_dir=str(tmp_path))
    fits(small)
    assert small.train['inputs'].shape[1:] == (3, 3, 3)


def remove_all_but(folder: pathlib.Path, *names: str) -> None:
    for each in folder.iterdir():
        if each.name not in names:
            shutil.rmtree(each)


def cut(folder: pathlib.Path) -> None:
    file = folder / 'zebra' / '0 photo.png'
    file.write_bytes(file.read_bytes()[:60])


@pytest.mark.parametrize(
    'damage, message',
    [
        (lambda folder: remove_all_but(folder), 'must hold a folder of images for each of at least two classes.* none'),
        (lambda folder: remove_all_but(folder, 'zebra'), 'at least two classes.*it holds images of zebra'),
        (cut, r'zebra/0 photo.png cannot be read \(.*\): remove or replace it'),
        (lambda folder: (folder / 'Zebra').mkdir(), 'two classes that differ in case alone, such as Zebra'),
        (lambda folder: [x.unlink() for x in folder.rglob('*.png')], 'holds no image'),
        (lambda folder: (folder / 'empty').mkdir(), 'holds no image of the class empty'),
        (lambda folder: (folder / 'zebra' / 'a.png').write_text('text'), 'a.png cannot be read'),
    ],
    ids=['empty', 'one class', 'truncated', 'case', 'no image', 'empty class', 'text'],
)
def test_folders_that_cannot_be_read_are_refused_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        data.load(folder)
    assert '\n' not in str(error.value)


def test_all_that_cannot_be_read_are_counted(folder):
    for name in ('a', 'b', 'c'):
        (folder / 'zebra' / f'{name}.png').write_bytes(b'no image')
    with pytest.raises(ValueError, match=r'zebra/a.png and 2 more cannot be read'):
        data.load(folder)


def test_a_class_that_is_in_the_test_alone_is_named(tmp_path):
    folder = photos(tmp_path / 'all', {'train': 4, 'test': 2})
    shutil.rmtree(folder / 'train' / 'zebra')
    with pytest.raises(ValueError, match="class 'zebra' is in the test split and not in the training split"):
        data.load(folder)


@pytest.mark.parametrize('name', ['./photos', '~/no such photos', '/no/photos', 'photos.npz', 'photos.csv'])
def test_paths_that_are_not_there_say_so(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r'there is no file or folder .*photos'):
        data.load(name)


@pytest.mark.parametrize(
    'contents, message',
    [
        ({'x': np.zeros((4, 2, 2)), 'z': np.zeros(4)}, r'lacks an array called one of labels, y, .*; it has x, z'),
        ({'a': np.zeros(3)}, "must hold 'inputs' and 'labels'.*; it has a"),
        ({'x': np.zeros((4, 2, 2)), 'y': np.zeros(3, int)}, 'there are 4 images and 3 labels in the train split'),
        (
            {'x': np.zeros((4, 2)), 'y': np.arange(4) % 2},
            r'images must be \[examples, height, width\], or .*got \(4, 2\)',
        ),
        ({'x': np.full((4, 2, 2), -1.0), 'y': np.arange(4) % 2}, 'pixels must be from 0 to 1, or from 0 to 255, got -1 to -1'),
        ({'x': np.full((4, 2, 2), np.nan), 'y': np.arange(4) % 2}, 'pixels must be from 0 to 1'),
        ({'x': np.zeros((4, 2, 2)), 'y': np.zeros(4, int)}, 'there must be at least two classes, got 0'),
        ({'x': np.zeros((4, 2, 2)), 'y': np.eye(4)}, r'labels must be integers or names \[examples\], got float64 \(4, 4\)'),
        ({'x': np.zeros((4, 2, 2)), 'y': np.arange(4), 'class_names': np.array(['a', 'b'])}, 'label 3 is beyond the 2 classes'),
    ],
)
def test_arrays_that_do_not_fit_are_refused_in_one_line(tmp_path, contents, message):
    np.savez(tmp_path / 'bad.npz', **contents)
    with pytest.raises(ValueError, match=message) as error:
        data.load(tmp_path / 'bad.npz')
    assert '\n' not in str(error.value)


def test_pickles_and_torn_files_are_refused(tmp_path):
    np.savez(tmp_path / 'pickled.npz', x=np.array([{}, {}], object), y=np.arange(2))
    (tmp_path / 'torn.npz').write_bytes(b'PK\x03\x04torn')
    for name in ('pickled.npz', 'torn.npz'):
        with pytest.raises(ValueError, match='cannot be read as numpy arrays'):
            data.load(tmp_path / name)


@pytest.mark.parametrize(
    'text, message',
    [
        ('a,b\n1,2\n', 'needs a column called one of path, file'),
        ('path,b\n1,2\n', 'needs a column called one of label, class'),
        ('path,label\nnone.png,a\nnone2.png,b\n', 'names .*none.png and 1 more, which is not there'),
        ('path,label,split\nnone.png,a,holdout\nnone.png,b,train\n', "a split is train, val or test, got 'holdout'"),
        ('path,label\nnone.png\n', 'rows of more or fewer cells'),
        ('', 'needs a column called'),
    ],
)
def test_tables_that_do_not_fit_are_refused_in_one_line(tmp_path, text, message):
    (tmp_path / 'table.csv').write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        data.load(tmp_path / 'table.csv')
    assert '\n' not in str(error.value)


def test_folders_of_hugging_face_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / 'bad').mkdir()
    (tmp_path / 'bad' / 'dataset_dict.json').write_text(json.dumps({'splits': ['train']}))
    with pytest.raises(ValueError, match='cannot be read as a data set of Hugging Face'):
        data.load(tmp_path / 'bad')


def test_sizes_out_of_range_are_refused(folder):
    for size in (0, -3, (4,), (0, 4)):
        with pytest.raises(ValueError, match='image_size must be a positive number'):
            data.load(folder, image_size=size)
