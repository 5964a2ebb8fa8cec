"""The main job, shrunk to seconds: its files, resuming, and what it refuses."""

import json
import math
import sys

import pytest
from helpers import scenario

from experiments import quickstart, runs, shipping
from kdjax import export, training

NAMES = [
    'teacher',
    'student alone (few labels)',
    'student alone (all labels)',
    'distilled',
    'distilled + pruned',
    'distilled + pruned + int8',
]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp('runs') / 'with a space' / 'quickstart'
    config = scenario.config(quickstart, seeds=2, epochs=1, batch_size=61, output=str(output))
    quickstart.main(config)
    return config, output


def files(folder):
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob('*') if path.is_file())


def test_writes_what_it_promises(finished):
    _, output = finished
    report = json.loads((output / 'report.json').read_text())
    assert report['dataset'] == 'digits'
    assert report['seeds'] == 2
    assert report['wall_clock_s'] > 0
    assert [row['name'] for row in report['rows']] == NAMES
    for row in report['rows']:
        numbers = ('accuracy_mean', 'accuracy_std', 'parameters', 'nonzero', 'bytes', 'latency_ms')
        assert all(math.isfinite(row[key]) for key in numbers)
        assert 0 <= row['accuracy_mean'] <= 1
    assert {
        'config.json',
        'metrics.jsonl',
        'report.json',
        'report.md',
        'report.html',
        'figure.png',
        'checkpoints',
        'networks',
    } == {path.name for path in output.iterdir()}
    assert all(name in (output / 'report.md').read_text() for name in NAMES)


def test_bytes_are_those_of_the_files_and_fall(finished):
    _, output = finished
    rows = {row['name']: row for row in json.loads((output / 'report.json').read_text())['rows']}
    for name, row in rows.items():
        sizes = [(output / 'networks' / f'seed{seed}' / shipping.file_name(name)).stat().st_size for seed in range(2)]
        assert row['bytes'] == max(sizes)
    dense, pruned, small = (rows[name]['bytes'] for name in NAMES[3:])
    assert dense > 2 * pruned > 2 * small
    kernels = [80 - 8, 1168 - 16, 2080 - 32, 330 - 10]
    biases = rows['distilled']['parameters'] - sum(kernels)
    assert rows['distilled + pruned']['nonzero'] <= sum(kernels) - round(quickstart.SPARSITY * sum(kernels)) + biases
    shipped = export.load_weights(output / 'networks' / 'seed0' / 'distilled-pruned-int8.safetensors')
    assert shipped['params']['hidden0']['kernel'].values.dtype == 'int8'


def test_a_finished_run_says_so_and_is_left_alone(finished, capsys):
    config, output = finished
    before = files(output)
    quickstart.main(config)
    assert 'finished already' in capsys.readouterr().out
    assert files(output) == before


def test_an_interrupted_run_resumes_to_the_same_numbers(finished, tmp_path, monkeypatch, capsys):
    _, output = finished
    interrupted = scenario.config(quickstart, seeds=2, epochs=1, batch_size=61, output=str(tmp_path / 'run'))
    fit, count = training.fit, iter(range(100))

    def stops_at_the_sixth(*arguments, **more):
        if next(count) == 5:
            raise KeyboardInterrupt
        return fit(*arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(training, 'fit', stops_at_the_sixth)
        with pytest.raises(KeyboardInterrupt):
            quickstart.main(interrupted)
    assert not (tmp_path / 'run' / 'report.json').exists()
    quickstart.main(interrupted)
    assert 'Resuming the run' in capsys.readouterr().out
    one, other = (json.loads((folder / 'report.json').read_text())['rows'] for folder in (output, tmp_path / 'run'))
    for left, right in zip(one, other, strict=True):
        assert {k: v for k, v in left.items() if k != 'latency_ms'} == {k: v for k, v in right.items() if k != 'latency_ms'}


@pytest.mark.parametrize(
    'changes,message',
    [
        ({'epochs': 0}, '--epochs must be at least 1, got 0'),
        ({'seeds': 0}, '--seeds must be at least 1, got 0'),
        ({'skip_nonfinite': -1}, '--skip-nonfinite must be at least 0, got -1'),
        ({'dataset': 'digit'}, "no data set 'digit'.*did you mean digits"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        quickstart.main(scenario.config(quickstart, output=str(tmp_path / 'run'), **changes))
    assert not (tmp_path / 'run').exists()


def test_other_settings_need_another_folder(finished):
    config, output = finished
    before = files(output)
    with pytest.raises(ValueError, match='holds a run with epochs 1, not 2: choose another --output'):
        quickstart.main(scenario.config(quickstart, seeds=2, epochs=2, batch_size=61, output=config.output))
    assert files(output) == before


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / 'precious.txt').write_text('mine')
    with pytest.raises(ValueError, match='is not empty and holds no run'):
        quickstart.main(scenario.config(quickstart, output=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ['precious.txt']


def test_command_line_explains_and_refuses_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, 'argv', ['quickstart', '--help'])
    with pytest.raises(SystemExit) as ended:
        runs.command_line(quickstart.Config, quickstart.main)
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in ('--dataset', '--data-dir', '--seeds', '--epochs', '--output'))
    monkeypatch.setattr(sys, 'argv', ['quickstart', '--epochs', '0', '--output', str(tmp_path / 'run')])
    with pytest.raises(SystemExit) as ended:
        runs.command_line(quickstart.Config, quickstart.main)
    assert ended.value.code == 'error: --epochs must be at least 1, got 0'
