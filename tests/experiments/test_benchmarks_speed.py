"""The benchmarks of steps, their dispatch and imports, shrunk to seconds."""

import json
import sys

import numpy as np
import pytest

from experiments.benchmarks import convolutions, dispatch, importing, language, linear_soft_targets, pruning_threshold, step


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_dispatch(capsys):
    dispatch.main(dispatch.Config(batch_size=2, steps=8, repeats=2))
    found = last_line(capsys)
    assert found['name'] == 'dispatch'
    assert found['ours_ms'] > 0
    with pytest.raises(ValueError, match='--steps must be a multiple of 8, got 9'):
        dispatch.main(dispatch.Config(steps=9))


def test_importing(capsys):
    importing.main(importing.Config(repeats=1))
    found = last_line(capsys)
    assert found['theirs_ms'] > 0
    assert found['ratio'] == pytest.approx(found['ours_ms'] / found['theirs_ms'], rel=0.02)  # all three are rounded


def test_pruning_threshold(capsys):
    pruning_threshold.main(pruning_threshold.Config(rows=20, columns=30, repeats=1))
    found = last_line(capsys)
    assert [row['weights'] for row in found['cases']] == ['normal', 'ties']
    assert min(found[key] for key in ('ratio', 'ours_ms', 'theirs_ms')) > 0


def test_linear_soft_targets(capsys):
    linear_soft_targets.main(linear_soft_targets.Config(tokens=8, width=4, vocabulary=1024, chunk=2, repeats=1))
    lines = capsys.readouterr().out.splitlines()
    values = [line.split(' value ')[1].split()[0] for line in lines if ' value ' in line]
    assert len(values) == 4
    assert len(set(values)) == 1
    found = json.loads(lines[-1])
    assert found['ours_mb'] < found['theirs_mb']
    assert found['ratio'] > 0


def test_convolutions(capsys, monkeypatch):
    monkeypatch.setattr(convolutions, 'LAYERS', (convolutions.Layer(4, 3, 5), convolutions.Layer(4, 32, 32)))
    convolutions.main(convolutions.Config(batch_size=2, repeats=1))
    found = last_line(capsys)
    assert [row['layer'] for row in found['layers']] == ['3 to 5 at 4x4', '32 to 32 at 4x4', '2x2 pooling of 64 at 32x32']
    row = found['layers'][1]
    # Values and two gradients of 9 taps, two operations each.
    assert row['ours_gflops_per_s'] * row['ours_ms'] * 1e6 == pytest.approx(3 * 2 * 9 * 2 * 4**2 * 32**2)
    assert found['ratio'] == max(row['ratio'] for row in found['layers'])


def test_step_needs_torch_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)
    with pytest.raises(ValueError, match='PyTorch, which is not installed: pip install torch'):
        step.main(step.Config(pairs=('resnet20',)))


def test_our_side_of_the_step(monkeypatch):
    """Its flops are those of the layers, counted by hand for the CNN pair."""
    images, labels = np.zeros((2, 32, 32, 3), np.float32), np.zeros(2, int)
    run, _, flops = step._ours('cnn', step.Config(batch_size=2), images, labels)
    run()

    def forward(first, second, hidden):
        # Of 3 · 32 taps along an axis two fall on the padding.
        convolutions = (3 * 32 - 2) ** 2 * 3 * first + (3 * 16 - 2) ** 2 * first * second
        return 2 * (convolutions + 64 * second * hidden + 100 * hidden)

    wanted = 2 * (forward(64, 128, 512) + 3 * forward(32, 64, 256))
    assert flops == pytest.approx(wanted, rel=0.02)


def test_language(capsys):
    language.main(language.Config(vocabularies=(512,), tokens=64, width=4, chunk=4, half=True))
    found = last_line(capsys)
    assert [row['objective'] for row in found['rows']] == list(language.MEASURED)
    assert found['memory_ratio'] == max(row['memory_ratio'] for row in found['rows']) < 1
    assert found['ratio'] > 0
