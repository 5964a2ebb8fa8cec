"""A run that is stopped, by SIGTERM or SIGKILL, ends with the numbers of one that is not."""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import chex
import jax
import numpy as np
import pytest
from helpers import interrupted

from experiments import runs
from kdjax import training
from kdjax.training import _preemption


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a command."""

    folder: str = ''


def host(fitted):
    state = fitted.state._replace(key=jax.random.key_data(fitted.state.key))
    return jax.device_get((state, fitted.best_variables, fitted.best_step))


@pytest.fixture
def stopped_after(monkeypatch):
    """A function that has SIGTERM arrive while one of some steps runs, in every run from then on."""
    listen = _preemption.notices

    def stopped_after(*steps):
        @contextlib.contextmanager
        def notices(begun):
            with listen(begun) as stop:
                step = begun

                def asked(*arguments):
                    nonlocal step
                    step += not arguments
                    if not arguments and step in steps:
                        signal.raise_signal(signal.SIGTERM)
                    return stop(*arguments)

                yield asked

        monkeypatch.setattr(_preemption, 'notices', notices)

    return stopped_after


@pytest.fixture(scope='module')
def undisturbed():
    return host(interrupted.fit(epochs=5))


def lines(folder):
    return [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]


@pytest.mark.parametrize('every', [1, 2])
def test_a_run_stopped_within_epochs_and_at_their_ends_ends_with_the_same_numbers(undisturbed, tmp_path, stopped_after, every):
    before = signal.getsignal(signal.SIGTERM)
    whole = host(interrupted.fit(epochs=5, every=every))
    for step in (1, 6, 7, 12, 20):
        stopped_after(step)
        with pytest.raises(training.Preempted, match=f'at step {step}, which is saved in .*same command resumes') as raised:
            interrupted.fit(tmp_path, epochs=5, every=every)
        assert len(str(raised.value).splitlines()) == 1
        assert (tmp_path / 'checkpoints' / str(step)).is_dir()
        assert signal.getsignal(signal.SIGTERM) is before
    stopped_after()
    resumed = interrupted.fit(tmp_path, epochs=5, every=every)
    assert resumed.resumed_from == 20
    chex.assert_trees_all_equal(host(resumed), whole)
    if every == 1:
        chex.assert_trees_all_equal(host(resumed), undisturbed)


def test_the_log_has_a_line_for_each_part_of_an_epoch(tmp_path, stopped_after):
    for step in (6, 7):
        stopped_after(step)
        with pytest.raises(training.Preempted):
            interrupted.fit(tmp_path, epochs=3)
    stopped_after()
    interrupted.fit(tmp_path, epochs=3)
    trained = [(line['epoch'], line['step']) for line in lines(tmp_path) if 'loss' in line]
    validated = [(line['epoch'], line['step']) for line in lines(tmp_path) if 'validation/accuracy' in line]
    assert trained == [(1, 4), (2, 6), (2, 7), (2, 8), (3, 12)]
    assert validated == [(1, 4), (2, 8), (3, 12)]


def test_without_a_folder_nothing_is_kept_and_the_message_says_so(stopped_after):
    stopped_after(2)
    with pytest.raises(training.Preempted, match='at step 2; nothing is kept, as there is no folder'):
        interrupted.fit(epochs=5)


def test_other_batches_are_refused_within_an_epoch_and_after_it(tmp_path, stopped_after):
    turned = {**interrupted.data, 'labels': 2 - interrupted.data['labels']}
    for step in (4, 6):
        stopped_after(step)
        with pytest.raises(training.Preempted):
            interrupted.fit(tmp_path, epochs=5)
        for other, message in (
            ({'batch_size': 7}, r'of a run with batch_size 8, not 7: .* another folder'),
            ({'data': {name: x[:33] for name, x in interrupted.data.items()}}, 'of a run with examples 35, not 33'),
            ({'data': turned}, r'of a run with data [0-9a-f]*, not [0-9a-f]*: its steps were other batches'),
            ({'key': jax.random.key(1)}, 'a run with another key, whose steps were other batches: choose another folder'),
        ):
            with pytest.raises(ValueError, match=message):
                interrupted.fit(tmp_path, epochs=5, **other)


def test_a_signal_that_nobody_acted_upon_goes_to_the_earlier_handler():
    received = []
    earlier = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with _preemption.notices(0) as stop:
            assert not stop()
            signal.raise_signal(signal.SIGTERM)
            assert stop()
            assert received == []
        assert received == [signal.SIGTERM]
        with contextlib.suppress(training.Preempted), _preemption.notices(0):
            signal.raise_signal(signal.SIGTERM)
            raise training.Preempted
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, earlier)


def test_other_threads_train_as_ever(undisturbed):
    ended = []
    thread = threading.Thread(target=lambda: ended.append(host(interrupted.fit(epochs=5))))
    thread.start()
    thread.join()
    chex.assert_trees_all_equal(ended[0], undisturbed)


def test_a_command_that_sigterm_stopped_says_so_in_one_line_and_ends_with_143(monkeypatch, capsys, tmp_path, stopped_after):
    monkeypatch.setattr(sys, 'argv', ['command', '--folder', str(tmp_path)])

    def main(config):
        stopped_after(3)
        interrupted.fit(config.folder, epochs=5)

    with pytest.raises(SystemExit) as ended:
        runs.command_line(Config, main)
    assert ended.value.code == 143
    assert capsys.readouterr().err.splitlines() == [
        f'stopped by SIGTERM at step 3, which is saved in {tmp_path / "checkpoints"}: the same command resumes there'
    ]


def start(folder, last):
    """A process that trains, and waits for a signal from its step `last` on."""
    tests = pathlib.Path(interrupted.__file__).parents[1]
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(tests), str(tests.parent)])}
    return subprocess.Popen(
        [sys.executable, interrupted.__file__, str(folder), str(last)], env=environment, stderr=subprocess.PIPE, text=True
    )


def newest(folder):
    names = [path.name for path in (folder / 'checkpoints').glob('*') if path.name.isdigit()]
    return max(map(int, names), default=0)


def stop_after(folder, step, number):
    """Starts the program, waits until the checkpoint of a step is there, and a little more, and sends a signal."""
    process = start(folder, step + 40)
    while newest(folder) < step and process.poll() is None:
        time.sleep(0.002)
    time.sleep(random.Random(step).uniform(0.0, 0.06))
    process.send_signal(number)
    (folder / 'signalled').touch()
    errors = process.communicate(timeout=600)[1]
    (folder / 'signalled').unlink()
    return process.returncode, errors


def test_a_program_that_is_killed_and_terminated_ends_with_the_same_numbers(tmp_path):
    for step in (20, 80):
        code, errors = stop_after(tmp_path, step, signal.SIGKILL)
        assert code == -signal.SIGKILL, errors
        assert step <= newest(tmp_path) < interrupted.EPOCHS * interrupted.STEPS
    code, errors = stop_after(tmp_path, 120, signal.SIGTERM)
    assert code == 1, errors
    assert f'Preempted: stopped by SIGTERM at step {newest(tmp_path)}, which is saved in' in errors.splitlines()[-1]
    resumed = interrupted.fit(tmp_path)
    assert 120 <= resumed.resumed_from < interrupted.EPOCHS * interrupted.STEPS
    chex.assert_trees_all_equal(host(resumed), host(interrupted.fit()))
    whole = [line['epoch'] for line in lines(tmp_path) if 'validation/accuracy' in line]
    assert whole == list(range(1, interrupted.EPOCHS + 1))
    assert np.isfinite(host(resumed)[0].params['layers_0']['kernel']).all()
    assert not list((tmp_path / 'checkpoints').glob('*tmp*'))
