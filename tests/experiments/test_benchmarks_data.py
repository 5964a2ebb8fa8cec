"""The benchmarks of recorded logits, sweeps and input, shrunk to seconds."""

import json

import pytest

from experiments.benchmarks import input_pipeline, recorded_teacher, sweep


def summary_of(capsys):
    """The line of JSON that a benchmark ends with."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_recorded_teacher(capsys):
    recorded_teacher.main(
        recorded_teacher.Config('mlp_30', 'mlp_30', examples=8, batch_size=4, classes=100, top_k=2, repeats=1)
    )
    summary = summary_of(capsys)
    assert summary['name'] == 'recorded_teacher'
    assert summary['ratio'] > 0
    # 8 examples in 2 views, with all 100 logits, or two with indices of two bytes and the rest; of two arrays more the headers,
    # numpy's and the archive's.
    values = 8 * 2 * (4 * 100 - (4 + 2) * 2 - 4)
    assert summary['bytes'] - summary['top_k_bytes'] == pytest.approx(values - 2 * (128 + 128), abs=300)


def test_sweep(capsys):
    sweep.main(sweep.Config(batch_size=2, image=4, shrink=400, cases=('mlp',), repeats=1))
    summary = summary_of(capsys)
    assert summary['name'] == 'sweep'
    assert [name for name, ratio in summary['ratio'].items() if ratio > 0] == ['mlp']
    assert set(sweep.Config().cases) == set(sweep.pairs(1))
    with pytest.raises(ValueError, match="there is no case 'rnn'; there are: mlp; "):
        sweep.main(sweep.Config(cases=('rnn',)))


def test_input_pipeline(capsys):
    config = input_pipeline.Config('digits', None, 'mlp_30', 'mlp_30', batch_size=8, steps=3, workers=(0,), repeats=1)
    input_pipeline.main(config)
    summary = summary_of(capsys)
    assert summary['name'] == 'input_pipeline'
    assert summary['ratio'] == summary['ratios']['0'] > 0
    assert summary['reading_examples_per_second']['0'] > 0
    assert 0 <= summary['starved']['0'] < 1
    with pytest.raises(ValueError, match='digits has 1293 examples, fewer than 3 x 800'):
        input_pipeline.main(input_pipeline.Config('digits', batch_size=800, steps=3))
