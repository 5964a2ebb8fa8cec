"""The pipeline of compression, shrunk to seconds: what it ships, what it reports, and how it resumes."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import scenario

from experiments import compress, compression, figures, shipping
from kdjax import data, export, models, objectives, training

STUDENT = models.CNN((4,), (8,))
WAYS_TO_PRUNE = compression.ways_to_prune
# Nearly all the time goes into compiling the stages, so the whole is run without one way to prune, which has its own tests.
NAMES = ['teacher', *(name for name in compression.names() if 'unstructured' not in name)]
KINDS = (compress.ALONE, compress.DISTILLED)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp('runs') / 'compress'
    config = scenario.config(compress, seeds=1, epochs=2, examples=105, batch_size=35, output=str(output))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress, 'TEACHER', models.CNN((4,), (16,), dropout=0.3))
        patch.setattr(compress, 'STUDENT', STUDENT)
        patch.setattr(compression, 'PRUNINGS', ('2:4', 'channels'))
        patch.setattr(
            compression,
            'ways_to_prune',
            lambda *rest: {name: way for name, way in WAYS_TO_PRUNE(*rest).items() if name != 'unstructured'},
        )
        compress.main(config)
        yield config, output


@pytest.fixture(scope='module')
def rows(finished):
    report = json.loads((finished[1] / 'report.json').read_text())
    return {row['name']: row for row in report['rows']}


def folder(output, *name):
    return output.joinpath('networks', 'seed0', *map(shipping.folder_name, name))


def weights(output, *name):
    return export.load(folder(output, *name)).weights


def kernels(output, *name):
    found = {path: np.asarray(array) for path, array in weights(output, *name).items() if path.endswith('kernel')}
    assert found
    return found


def test_every_combination_has_a_row_with_every_number(finished, rows):
    _, output = finished
    assert list(rows) == NAMES
    assert len(NAMES) == 1 + 1 + 2 + 3 * (1 + 2 + 2)
    numbers = ('accuracy_mean', 'parameters', 'nonzero', 'bytes', 'folder_bytes', 'of_teacher', 'of_student')
    for name, row in rows.items():
        keys = (*numbers, 'latency_ms', 'latency_128_ms', *(() if name == 'teacher' else ('without_distillation_mean',)))
        assert all(math.isfinite(row[key]) for key in keys)
    text = (output / 'report.md').read_text()
    assert all(f'| {name} |' in text for name in NAMES)
    assert 'The smallest network within a point of the distilled student is' in text
    assert (output / 'figure.png').stat().st_size > 1000


def test_bytes_are_those_on_disk(finished, rows):
    _, output = finished
    for name, row in rows.items():
        files = list(folder(output, *(() if name == 'teacher' else (compress.DISTILLED,)), name).iterdir())
        (file,) = (file for file in files if file.name == 'weights.safetensors')
        assert row['bytes'] == file.stat().st_size
        assert row['folder_bytes'] == sum(file.stat().st_size for file in files)
        assert row['of_teacher'] == row['bytes'] / rows['teacher']['bytes']
        assert row['of_student'] == row['bytes'] / rows['student']['bytes']


def test_accuracy_is_that_of_the_folder_to_ship(finished, rows):
    _, output = finished
    test = data.load('digits', validation=0.2).test
    for kind, key in zip(KINDS, ('without_distillation_mean', 'accuracy_mean'), strict=True):
        for name in ('student', 'channels, then static', f'{compression.AWARE}, then 2:4'):
            logits = np.asarray(export.load(folder(output, kind, name))(test['inputs']))
            assert rows[name][key] == pytest.approx(np.mean(logits.argmax(-1) == test['labels']), abs=1e-6)


@pytest.mark.parametrize('kind', KINDS)
def test_what_is_shipped_is_quantized_and_pruned_as_its_name_says(finished, kind):
    _, output = finished
    dense = {path: array.size for path, array in kernels(output, kind, 'student').items()}
    for name in NAMES[1:]:
        found = kernels(output, kind, name)
        assert {array.dtype for array in found.values()} == {
            np.dtype('int8' if set(name.split(', then ')) & set(compression.QUANTIZATIONS) else 'float32')
        }
        assert ('quantization/steps' in weights(output, kind, name)) == ('static' in name or compression.AWARE in name)
        nonzero = {path: np.count_nonzero(array) for path, array in found.items()}
        if '2:4' in name:
            for path in found.keys() - {'params/stage0/conv/kernel'}:
                groups = np.moveaxis(found[path], -2, -1).reshape(-1, 4)
                assert np.count_nonzero(groups, axis=1).max() <= 2
        elif 'channels' in name:
            widths = {path.split('/')[-2]: array.shape[-1] for path, array in found.items() if 'stage' not in path}
            assert widths == {'hidden0': 4, 'head': 10}
            assert found['params/stage0/conv/kernel'].shape == (3, 3, 1, 2)
        else:
            assert sum(nonzero.values()) > 0.9 * sum(dense.values())


def test_removed_channels_leave_fewer_parameters(rows):
    for name in NAMES[1:]:
        assert (rows[name]['parameters'] < rows['student']['parameters'] / 2) == ('channels' in name)


def test_zeros_outlive_quantization_aware_training(finished):
    _, output = finished
    before = kernels(output, compress.DISTILLED, '2:4')
    after = kernels(output, compress.DISTILLED, f'2:4, then {compression.AWARE}')
    assert not any(np.any(after[path][before[path] == 0]) for path in before)
    scales = weights(output, compress.DISTILLED, f'2:4, then {compression.AWARE}')
    moved = [np.abs(after[path] * np.asarray(scales[f'{path}:scale']) - before[path]).max() for path in before]
    assert max(moved) > 1e-3  # or nothing was trained


def test_distillation_changes_what_is_learned(finished):
    _, output = finished
    for name in ('student', '2:4', compression.AWARE):
        one, other = (weights(output, kind, name) for kind in KINDS)
        assert any(not np.array_equal(one[path], other[path]) for path in one)


def test_an_interrupted_run_resumes_to_the_same_numbers(finished, rows, capsys):
    config, output = finished
    # A program remembers the lines of code that made it, and they are called from elsewhere here.
    stale = ('latency_ms', 'latency_128_ms', 'folder_bytes')
    shutil.rmtree(folder(output, compress.DISTILLED, NAMES[-1]))
    shutil.rmtree(folder(output, compress.ALONE, 'channels'))
    shutil.rmtree(output / 'checkpoints' / 'seed0' / 'distilled' / shipping.folder_name(NAMES[-1]))
    (output / 'report.json').unlink()
    compress.main(config)
    assert 'Resuming the run' in capsys.readouterr().out
    again = json.loads((output / 'report.json').read_text())['rows']
    for row in again:
        before = rows[row['name']]
        assert {k: v for k, v in row.items() if k not in stale} == {k: v for k, v in before.items() if k not in stale}


def test_a_run_whose_networks_are_all_there_only_measures(finished, monkeypatch):
    config, output = finished
    (output / 'report.json').unlink()
    monkeypatch.delattr(training, 'fit')

    def stop(*rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(compress, 'measure', stop)
    with pytest.raises(KeyboardInterrupt):
        compress.main(config)


@pytest.mark.parametrize(
    'changes,message',
    [
        ({'examples': 10}, 'the training split has 10 examples, fewer than one batch of 64'),
        ({'examples': 2000}, '--examples must be between 1 and 1150, got 2000'),
        ({'batch_size': 0}, '--batch-size must be at least 1, got 0'),
        ({'epochs': 0}, '--epochs must be at least 1, got 0'),
        ({'seeds': 0}, '--seeds must be at least 1, got 0'),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        compress.main(scenario.config(compress, output=str(tmp_path / 'run'), **changes))
    assert not (tmp_path / 'run').exists()


@pytest.fixture(scope='module')
def unstructured():
    inputs = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), np.uint8)
    rescale = data.normalize(0.0, 1.0)
    student = compression.network_of(STUDENT, rescale)
    way = WAYS_TO_PRUNE(STUDENT, rescale, inputs)['unstructured']
    stages = compression.stages(student, {'unstructured': way}, learning_rate=1e-2, epochs=4, steps=3)
    return student, way, stages, {'inputs': inputs, 'labels': np.arange(16, dtype=np.int32) % 10}


def four_fifths(params):
    return round(0.8 * sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim >= 2))


def zeros(params):
    return sum(np.count_nonzero(leaf == 0) for leaf in jax.tree.leaves(params) if leaf.ndim >= 2)


def test_unstructured_pruning_at_once_takes_the_smallest(unstructured):
    student, way, _, batch = unstructured
    params = jax.device_get(jax.jit(student.init)(jax.random.key(0), batch['inputs'])['params'])
    pruned = jax.device_get(way.at_once(params))
    magnitudes = np.sort(np.concatenate([abs(leaf).ravel() for leaf in jax.tree.leaves(params) if leaf.ndim >= 2]))
    threshold = magnitudes[four_fifths(params)]
    expected = jax.tree.map(lambda leaf: np.where(abs(leaf) >= threshold, leaf, 0) if leaf.ndim >= 2 else leaf, params)
    jax.tree.map(np.testing.assert_array_equal, pruned, expected)
    assert zeros(pruned) == four_fifths(params)


def test_the_stage_of_unstructured_pruning_reaches_its_sparsity_in_half_its_steps(unstructured):
    _, _, stages, batch = unstructured
    assert {name: stage.epochs for name, stage in stages.items()} == {
        'student': 4,
        compression.AWARE: 2,
        'unstructured': 2,
        f'unstructured, then {compression.AWARE}': 2,
        f'{compression.AWARE}, then unstructured': 2,
    }
    stage = stages['unstructured']
    problem = training.distillation(stage.network, None, objectives.hard_labels(), stage.optimizer)
    state = problem.init(jax.random.key(0), batch)
    sparsities = [zeros(state.params)]
    for _ in range(6):
        state, _ = problem.step(state, {}, batch)
        sparsities.append(zeros(state.params))
    # Steps are counted from 0, so the fourth update is that of step 3, where the schedule ends.
    assert sparsities == [0, 0, 0, 0] + 3 * [four_fifths(state.params)]


def test_keep_zeros_is_of_kernels_only():
    params = {'kernel': jnp.array([[0.0, 1.0]]), 'bias': jnp.array([0.0, 1.0])}
    optimizer = optax.chain(optax.trace(0.9), compression.keep_zeros())
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update({'kernel': jnp.ones((1, 2)), 'bias': jnp.ones(2)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params['kernel'][0] == 0, [True, False])
    assert params['bias'][0] > 1


def test_the_pareto_front_is_what_nothing_beats():
    rng = np.random.default_rng(0)
    results = [
        {'cost': int(c), 'accuracy_mean': float(a)} for c, a in zip(rng.integers(1, 20, 60), rng.random(60), strict=True)
    ]
    front = figures.pareto_front(results, 'cost')
    beaten = [
        any(
            other['cost'] <= row['cost']
            and other['accuracy_mean'] >= row['accuracy_mean']
            and (other['cost'], other['accuracy_mean']) != (row['cost'], row['accuracy_mean'])
            for other in results
        )
        for row in results
    ]
    assert sorted(map(id, front)) == sorted(id(row) for row, lost in zip(results, beaten, strict=True) if not lost)
    assert [row['cost'] for row in front] == sorted(row['cost'] for row in front)
