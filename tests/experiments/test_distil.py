"""From data of every kind to a folder to ship, shrunk to seconds: it runs with jax alone and is as accurate as reported."""

import html.parser
import json
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from helpers import scenario
from PIL import Image

from experiments import distil, stages
from kdjax import data, export

NAMES = ('crème', 'plain red', 'zebra')
ALONE = """
import sys
for name in ('kdjax', 'flax', 'optax', 'orbax'):
    sys.modules[name] = None
import importlib.util
import numpy as np
spec = importlib.util.spec_from_file_location('loader', sys.argv[1] + '/load.py')
loader = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loader)
student, test = loader.load(sys.argv[1]), np.load(sys.argv[2])
print(np.mean(np.argmax(student(test['inputs']), -1) == test['labels']), *student.manifest['metadata']['classes'], sep='|')
"""


def pictures(number: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(number) % 3
    images = np.random.default_rng(0).integers(0, 200, (number, 6, 6, 3))
    images[np.arange(number), ..., labels] += 30
    return images.astype(np.uint8), labels


def folder(place: pathlib.Path) -> pathlib.Path:
    images, labels = pictures(90)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (place / NAMES[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / NAMES[label] / f'{i}.png')
    return place


def archive(place: pathlib.Path) -> pathlib.Path:
    images, labels = pictures(90)
    np.savez(place.with_suffix('.npz'), x=images, y=labels, class_names=NAMES)
    return place.with_suffix('.npz')


def table(place: pathlib.Path) -> pathlib.Path:
    files = sorted(folder(place).rglob('*.png'))
    lines = ['path,label', *(f'{file.relative_to(place.parent)},{file.parent.name}' for file in files)]
    place.with_suffix('.csv').write_text('\n'.join(lines), encoding='utf-8')
    return place.with_suffix('.csv')


def hub(place: pathlib.Path) -> pathlib.Path:
    import datasets

    images, labels = pictures(90)
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=list(NAMES))})
    rows = {'image': [Image.fromarray(image) for image in images], 'label': labels.tolist()}
    datasets.DatasetDict({'train': datasets.Dataset.from_dict(rows, features)}).save_to_disk(place)
    return place


def config(tmp_path: pathlib.Path, **flags: Any) -> Any:
    flags = {'teacher': 'mlp_30', 'student': 'mlp_30', 'seeds': 1, 'epochs': 1, 'batch_size': 16, 'baseline': False} | flags
    places = {'output': str(tmp_path / 'run'), 'teachers': str(tmp_path / 'teachers')}
    return scenario.config(distil, **{**places, **flags})


def report(tmp_path: pathlib.Path) -> dict[str, dict[str, Any]]:
    return {row['name']: row for row in json.loads((tmp_path / 'run' / 'report.json').read_text())['rows']}


LONG = [pytest.param(make, marks=pytest.mark.long) for make in (archive, table, hub)]


@pytest.mark.parametrize('make', [folder, *LONG])
def test_data_of_every_kind_become_a_student_that_runs_alone(make, tmp_path):
    path = make(tmp_path / 'my photos ü')
    kept = str(tmp_path / 'kept')
    distil.main(config(tmp_path, dataset=str(path), image_size=5, data_dir=kept, quantize='dynamic'))
    rows = report(tmp_path)
    assert list(rows) == ['teacher', 'distilled', 'int8']
    assert rows['int8']['bytes'] < rows['distilled']['bytes'] / 2
    test = data.load(path, image_size=5, data_dir=kept).test
    assert test['inputs'].shape[1:] == (5, 5, 3)
    np.savez(tmp_path / 'test.npz', **test)
    command = [sys.executable, '-c', ALONE, str(tmp_path / 'run' / 'student'), str(tmp_path / 'test.npz')]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    accuracy, *classes = done.stdout.strip().split('|')
    assert tuple(classes) == NAMES
    assert float(accuracy) == pytest.approx(rows['int8']['accuracy_mean'], abs=1e-7)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """All stages, of two seeds, with averages."""
    place = tmp_path_factory.mktemp('whole')
    flags = {'student': 'cnn_8_16', 'prune': 'channels', 'quantize': 'quantization-aware', 'seeds': 2, 'labels': 100}
    flags |= {'baseline': True, 'epochs': 2, 'batch_size': 255, 'average': 0.5}
    made = config(place, **flags)
    distil.main(made)
    return made, place


def test_every_stage_has_a_row_and_a_folder(finished):
    _, place = finished
    rows = report(place)
    assert list(rows) == ['teacher', 'student alone', 'distilled', 'pruned', 'int8']
    assert all(row['runs'] == (1 if name == 'teacher' else 2) for name, row in rows.items())
    assert rows['pruned']['parameters'] < rows['distilled']['parameters'] / 2
    assert rows['int8']['bytes'] < rows['pruned']['bytes'] < rows['distilled']['bytes']
    shipped = export.load(place / 'run' / 'student')
    each = [export.load(place / 'run' / 'networks' / f'seed{seed}' / 'int8') for seed in range(2)]
    assert shipped.manifest['sha256'] in [artefact.manifest['sha256'] for artefact in each]
    assert {array.dtype for name, array in shipped.weights.items() if name.endswith('kernel')} == {np.dtype('int8')}
    seconds = json.loads((place / 'run' / 'seconds.json').read_text())
    assert set(seconds) == {
        'teacher', *(f'seed{seed}/{name}' for seed in range(2) for name in ('student-alone', 'distilled', 'pruned', 'int8'))
    }  # fmt: skip


def test_the_report_is_one_page_with_all_that_it_says(finished):
    _, place = finished
    markdown = (place / 'run' / 'report.md').read_text()
    page = (place / 'run' / 'report.html').read_text()
    for title in ('Learning curves', 'Class by class', 'Confusion', 'Calibration', 'What each training cost'):
        assert f'## {title}' in markdown
        assert f'<h2>{title}</h2>' in page
    assert page.count('src="data:image/png;base64,') == page.count('<img') == 5
    assert 'src="figure.png"' not in page
    html.parser.HTMLParser().feed(page)
    # Every class has its examples, of which the columns of recall are shares.
    test = data.load('digits').test
    for label, number in enumerate(np.bincount(test['labels'])):
        assert f'| {label} | {number} |' in markdown


def test_a_run_that_was_stopped_between_stages_ends_with_the_same_numbers(finished, tmp_path, monkeypatch):
    made, place = finished
    again = scenario.settings.with_flags(made, output=str(tmp_path / 'run'))
    train, count = stages._train, iter(range(100))

    def stops_at_the_fourth(*arguments, **more):
        if next(count) == 3:
            raise KeyboardInterrupt
        return train(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(stages, '_train', stops_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            distil.main(again)
    distil.main(again)
    for name, row in report(place).items():
        other = report(tmp_path)[name]
        assert {k: v for k, v in row.items() if k != 'latency_ms'} == {k: v for k, v in other.items() if k != 'latency_ms'}


def test_a_teacher_is_read_from_checkpoints_or_weights(finished, tmp_path):
    made, place = finished
    (checkpoints,) = (place / 'teachers').glob('*/checkpoints/teacher')
    distil.main(config(tmp_path, teacher=made.teacher, teacher_from=str(checkpoints), batch_size=255))
    assert not (tmp_path / 'teachers').exists()
    assert set(report(tmp_path)) == {'teacher', 'distilled'}
    with pytest.raises(ValueError, match=r'holds another teacher than this one of 10 classes: params/.* is .* there and'):
        distil.main(config(tmp_path / 'other', teacher='cnn_8_16', teacher_from=str(checkpoints)))
    assert not (tmp_path / 'other').exists()


@pytest.mark.parametrize('recipe', ['crd'])
def test_recipes_and_few_labels(recipe, tmp_path):
    distil.main(
        config(tmp_path, recipe=recipe, labels=100, augment='crop_flip', batch_size=255, accumulate=3, rematerialize=True)
    )
    assert {'best_accuracy_mean', 'agreement_mean', 'nll_mean'} <= report(tmp_path)['distilled'].keys()


@pytest.mark.parametrize(
    'flags, message',
    [
        ({'epochs': 0}, '--epochs must be at least 1, got 0'),
        ({'learning_rate': float('nan')}, '--learning-rate must be above 0, got nan'),
        ({'learning_rate': -1.0}, '--learning-rate must be above 0, got -1'),
        ({'clip_norm': 0.0}, '--clip-norm must be above 0, got 0'),
        ({'sparsity': 1.0}, '--sparsity must be above 0 and below 1, got 1'),
        ({'average': 1.5}, '--average must be from 0 to 1, got 1.5'),
        ({'labels': 100_000}, 'keep must be between 1 and 1293'),
        ({'batch_size': 1_000_000_000}, 'fewer than one batch of 1000000000'),
        ({'dataset': './nothing'}, 'there is no file or folder nothing'),
        ({'recipe': 'overhaul'}, 'the recipe overhaul compares stages before their last ReLU, and the student taps none'),
        ({'recipe': 'overhaul', 'teacher': 'cnn_8_16', 'student': 'cnn_8_16'}, 'the recipe overhaul needs a teacher whose'),
        ({'student': 'resnet8', 'accumulate': 2, 'teacher': 'mlp_30'}, 'the network changes its state'),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        distil.main(config(tmp_path, **flags))
    assert '\n' not in str(error.value)
    assert not list(tmp_path.iterdir())
