import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from kdjax import networks, objectives, training
from kdjax.training._logs import Progress

DATA = {'inputs': np.arange(80, dtype=np.float32)[:, None] / 80, 'labels': np.arange(80, dtype=np.int32) % 2}
STUDENT = networks.from_linen(nn.Dense(2))
PROBLEM = training.distillation(STUDENT, None, objectives.hard_labels(), optax.sgd(0.1))


@pytest.mark.parametrize('steps,traced', [(40, (5, 10)), (8, (4, 8)), (1, (0, 1))])
def test_a_profile_is_of_a_few_steps_and_changes_none(steps, traced, tmp_path, monkeypatch):
    calls, trace, stop = [], jax.profiler.start_trace, jax.profiler.stop_trace
    done = []
    monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder: (calls.append(sum(done)), trace(folder)))
    monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: (calls.append(sum(done)), stop()))
    monkeypatch.setattr(Progress, 'advance', lambda self, steps: done.append(steps))

    def fit(**more):
        done.clear()
        fitted = training.fit(PROBLEM, DATA, key=jax.random.key(0), batch_size=4, steps=steps, progress=False, **more)
        return np.asarray(fitted.variables['params']['kernel'])

    plain = fit()
    assert calls == []
    np.testing.assert_array_equal(fit(profile=tmp_path), plain)
    assert calls == list(traced)
    assert [path for path in tmp_path.rglob('*.xplane.pb') if path.stat().st_size > 0]


def test_an_error_within_the_traced_steps_ends_the_trace(tmp_path):
    data = {**DATA, 'inputs': np.full_like(DATA['inputs'], np.nan)}
    for folder in (tmp_path / 'a', tmp_path / 'b'):
        with pytest.raises(training.NonFiniteLossError):
            training.fit(PROBLEM, data, key=jax.random.key(0), batch_size=4, steps=12, every=6, progress=False, profile=folder)
