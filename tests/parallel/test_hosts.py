"""Several hosts: two real processes of four fake devices each that meet on the loopback interface."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import hosts_worker

from kdjax import parallel
from kdjax.parallel import _hosts

ROOT = pathlib.Path(__file__).parents[2]
VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')


def two_processes(*command, timeout):
    """Runs a command of this Python twice, as the processes of one program; returns what they printed."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{probe.getsockname()[1]}'
    shared = {
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'JAX_NUM_CPU_DEVICES': '4',
        'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true',
        'JAX_COORDINATOR_ADDRESS': address,
        'JAX_NUM_PROCESSES': '2',
        'PYTHONPATH': str(ROOT),
    }
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True, 'cwd': ROOT}
    processes = [
        subprocess.Popen([sys.executable, *map(str, command)], env={**shared, 'JAX_PROCESS_ID': str(number)}, **pipes)
        for number in range(2)
    ]
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], '\n'.join(printed)
    return printed


def test_two_hosts_train_as_one_and_keep_one_checkpoint_and_one_log(tmp_path):
    one, two = tmp_path / 'one', tmp_path / 'two'
    one.mkdir()
    two.mkdir()
    two_processes(ROOT / 'tests' / 'helpers' / 'hosts_worker.py', two, timeout=600)
    expected = hosts_worker.run(one, parallel.data_parallel(fsdp=8))
    results = [json.loads((two / f'result{number}.json').read_text()) for number in range(2)]
    assert results[0] == results[1], 'all hosts see the same numbers'
    assert (results[0]['devices'], results[0]['resumed_from'], results[0]['share']) == ([4, 8], 4, 1 / 8)
    assert results[0]['joined'] == [64, 8, 8, 1, 8, 8, 8, 1]
    assert results[0]['joined_as_read'], 'each host gave half of the examples'
    for name, value in expected['measured'].items():
        np.testing.assert_allclose(results[0]['measured'][name], value, rtol=1e-6, err_msg=name)
    lines = [[json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()] for folder in (one, two)]
    assert [line['epoch'] for line in lines[1]] == [1, 1, 2, 2], 'training and validation, once each'
    for line, other in zip(*lines, strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() - {'run'}:
            np.testing.assert_allclose(other[name], line[name], rtol=1e-6, err_msg=name)
    # One process with another mesh takes up what the two have written.
    restored = hosts_worker.run(two, parallel.data_parallel(fsdp=4), calls=(2,))
    assert (restored['resumed_from'], restored['share']) == (8, 1 / 4)
    assert restored['kernel'] == results[0]['kernel']


def test_an_experiment_of_two_hosts_writes_its_files_once(tmp_path):
    flags = {'dataset': 'digits', 'epochs': 1, 'seeds': 1, 'teacher': 'mlp_30', 'student': 'mlp_30'}
    flags |= {'output': tmp_path / 'run', 'teachers': tmp_path / 'teachers'}
    flags = [part for name, value in flags.items() for part in (f'--{name}', value)]
    first, second = two_processes('-m', 'experiments.distil', *flags, timeout=600)
    assert 'The report is' in first
    assert 'report' not in second
    report = json.loads((tmp_path / 'run' / 'report.json').read_text())
    assert [row['name'] for row in report['rows']] == ['teacher', 'student alone', 'distilled']
    lines = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    assert [line['run'] for line in lines] == ['seed0/student-alone'] * 2 + ['seed0/distilled'] * 2
    assert not list((tmp_path / 'run').rglob('*.partial'))


RECORD = """
import sys, jax, numpy as np
from kdjax import networks, parallel, training
parallel.initialize_distributed()
network = networks.Network(lambda key, x: {}, lambda variables, x, **more: (networks.Outputs(x * variables['params']), {}))
variables = parallel.replicate(parallel.data_parallel(), {'params': np.float32(3)})
data = {'inputs': np.arange(20, dtype=np.float32).reshape(10, 2)}
recorded = training.record_teacher(network, variables, data, sys.argv[1], batch_size=2, examples_per_file=2)
np.testing.assert_array_equal(recorded['teacher_logits'], 3 * data['inputs'])
"""


def test_two_hosts_record_a_teacher_into_one_folder(tmp_path):
    """Each its share, and each then reads all of it."""
    two_processes('-c', RECORD, tmp_path / 'teacher', timeout=300)
    assert len(list((tmp_path / 'teacher').iterdir())) == 1 + 5


@pytest.fixture
def joined(monkeypatch):
    """What `initialize_distributed` asks of jax, without doing it; no launcher's variables are set."""
    calls = []
    for name in (*VARIABLES, 'SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE', 'MEGASCALE_NUM_SLICES', 'TPU_WORKER_HOSTNAMES'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
    monkeypatch.setattr(jax.distributed, 'initialize', lambda *args, **more: calls.append(args))
    return calls


def test_a_process_alone_joins_nobody(joined, monkeypatch):
    parallel.initialize_distributed()
    monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '1')
    monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'localhost')
    parallel.initialize_distributed()
    for name, value in zip(VARIABLES, ('host:1234', '1', '0'), strict=True):
        monkeypatch.setenv(name, value)
    parallel.initialize_distributed()
    assert joined == []


@pytest.mark.parametrize(
    'name, value',
    [
        ('SLURM_STEP_NUM_TASKS', '16'),
        ('OMPI_COMM_WORLD_SIZE', '2'),
        ('MEGASCALE_NUM_SLICES', '2'),
        ('TPU_WORKER_HOSTNAMES', 'tpu-0,tpu-1'),
    ],
)
def test_launchers_are_left_to_jax(joined, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    parallel.initialize_distributed()
    assert joined == [()]


def test_variables_of_the_user_come_first(joined, monkeypatch):
    monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '16')
    for name, value in zip(VARIABLES, ('host:1234', '4', '3'), strict=True):
        monkeypatch.setenv(name, value)
    parallel.initialize_distributed()
    assert joined == [('host:1234', 4, 3)]


def test_half_a_description_is_refused(joined, monkeypatch):
    monkeypatch.setenv('JAX_NUM_PROCESSES', '2')
    with pytest.raises(ValueError, match='JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID is missing'):
        parallel.initialize_distributed()
    for name, value in zip(VARIABLES, ('host:1234', 'two', '0'), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="must be numbers, got 'two' and '0'"):
        parallel.initialize_distributed()


def test_a_launcher_that_jax_does_not_know_is_named(joined, monkeypatch):
    def fail():
        raise ValueError('coordinator_address should be defined.')

    monkeypatch.setenv('OMPI_COMM_WORLD_SIZE', '2')
    monkeypatch.setattr(jax.distributed, 'initialize', fail)
    with pytest.raises(ValueError, match=r'coordinator_address should be defined.*: set JAX_COORDINATOR_ADDRESS'):
        parallel.initialize_distributed()


def test_one_host_writes_at_once():
    written = []
    _hosts.on_first_host(lambda: written.append(1), 'test')
    assert written == [1]
