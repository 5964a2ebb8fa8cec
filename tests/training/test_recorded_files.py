"""Files of a recording: whole or not there, of several recorders, taken up after a kill, and damage that is found."""

import hashlib
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import networks, training

DATA = {'inputs': np.random.default_rng(0).standard_normal((23, 5), np.float32)}
OPTIONS = {'batch_size': 4, 'examples_per_file': 6}


def scaled(read=lambda: None):
    """A teacher of plain functions, and what is to happen where it is traced."""

    def apply(variables, inputs, **more):
        read()
        return networks.Outputs(inputs * variables['params']), {}

    return networks.Network(lambda key, inputs: {'params': jnp.float32(1)}, apply)


VARIABLES = {'params': np.float32(1.5)}


def contents(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


class Dying:
    """A source that fails after a number of examples, as a process that is killed."""

    def __init__(self, reads):
        self.reads = reads

    def __len__(self):
        return 23

    def __getitem__(self, index):
        self.reads -= 1
        if self.reads < 0:
            raise KeyboardInterrupt
        return {'inputs': DATA['inputs'][index]}


def record(folder, data=DATA, teacher=None, **options):
    return training.record_teacher(teacher or scaled(), VARIABLES, data, folder, **{**OPTIONS, **options})


def test_a_recording_that_was_killed_goes_on_and_is_what_it_would_have_been(tmp_path):
    """Bit for bit, file by file; what is there is not made again."""
    undisturbed = record(tmp_path / 'whole')
    wanted = contents(tmp_path / 'whole')
    assert len(wanted) == 1 + 4
    # 23 examples for the digest, 4 for the trace; files take two batches of 4 each.
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path / 'killed', Dying(23 + 4 + 2 * 8 + 4))
    left = contents(tmp_path / 'killed')
    assert left.items() < wanted.items()
    assert len(left) == 1 + 2
    with pytest.raises(ValueError, match=r'run record_teacher again, which goes on .* \(2 of 4 files are missing\)'):
        training.recorded_teacher(tmp_path / 'killed')
    with pytest.raises(ValueError, match='recorded with other dtype: float32 there, float16 here; choose another folder'):
        record(tmp_path / 'killed', dtype='float16')
    with pytest.raises(ValueError, match='recorded by another program'):
        record(tmp_path / 'killed', teacher=networks.postprocess(scaled(), jnp.tanh))
    # In batches and files of what was begun, whatever is asked for.
    resumed = record(tmp_path / 'killed', batch_size=9, examples_per_file=2)
    assert contents(tmp_path / 'killed') == wanted
    np.testing.assert_array_equal(resumed['teacher_logits'], undisturbed['teacher_logits'])
    np.testing.assert_array_equal(undisturbed['teacher_logits'], DATA['inputs'] * np.float32(1.5))


class Interrupted(Dying):
    """A source that lets something else happen before the batch of the first file is read to its end."""

    def __init__(self, happens):
        super().__init__(1000)
        self.happens, self.left = happens, 23 + 4 + 6

    def __getitem__(self, index):
        self.left -= 1
        if self.left == 0:
            self.happens()
        return super().__getitem__(index)


def test_recorders_of_one_folder_find_what_the_other_has_written(tmp_path):
    """One inside of the other: it begins while the first has a file in the making, and ends before that is written."""
    record(tmp_path / 'alone')
    source = Interrupted(lambda: record(tmp_path / 'both'))
    outer = record(tmp_path / 'both', source, batch_size=3, examples_per_file=9)
    # Whoever writes first says how large batches and files are.
    assert contents(tmp_path / 'both') == contents(tmp_path / 'alone')
    np.testing.assert_array_equal(outer['teacher_logits'], DATA['inputs'] * np.float32(1.5))


def test_the_first_to_write_says_what_the_folder_holds(tmp_path):
    """Two that begin in an empty folder with other settings: the later one is told, and nothing of the first is lost."""
    source = Interrupted(lambda: record(tmp_path, dtype='float16'))
    with pytest.raises(ValueError, match='recorded with other dtype: float16 there, float32 here'):
        record(tmp_path, source)
    assert training.recorded_teacher(tmp_path)['teacher_logits'].dtype == np.float16


PROCESS = """
import sys
sys.path[:0] = {path!r}
from training.test_recorded_files import record
import pathlib
record(pathlib.Path({folder!r}))
"""


@pytest.mark.long
def test_two_processes_record_into_one_folder(tmp_path):
    tests = [str(pathlib.Path(__file__).parent.parent), *sys.path]
    command = [sys.executable, '-c', PROCESS.format(path=tests, folder=str(tmp_path / 'both'))]
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    both = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    found = training.recorded_teacher(tmp_path / 'both', data=DATA)['teacher_logits']
    np.testing.assert_array_equal(found, DATA['inputs'] * np.float32(1.5))
    assert len(list((tmp_path / 'both').iterdir())) == 1 + 4


def test_every_host_records_its_share(tmp_path, monkeypatch):
    """And waits for the others, before it reads what all have written."""
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    shares = []

    def waits(name):
        shares.append({int(file.stem[-6:]) for file in tmp_path.glob('*.npz')})
        if len(shares) == 1:
            monkeypatch.setattr(jax, 'process_index', lambda: 1)
            record(tmp_path)

    monkeypatch.setattr('kdjax.training._recording.wait_for_hosts', waits)
    found = record(tmp_path)
    assert shares == [{0, 2}, {0, 1, 2, 3}]
    np.testing.assert_array_equal(found['teacher_logits'], DATA['inputs'] * np.float32(1.5))


def test_a_changed_byte_is_found_wherever_it_matters(tmp_path):
    """Every byte of a file: either it is told, or what is read is the same, as after a change of a date."""
    data = {'inputs': DATA['inputs'][:3], 'kept': np.eye(3, 5, dtype=np.bool_)}
    teacher = networks.postprocess(scaled(), lambda x: jnp.stack([x, 1 - x], -1))
    wanted = np.asarray(record(tmp_path, data, teacher=teacher, where='kept', top_k=1)['top_logits'])
    file = next(tmp_path.glob('*.npz'))
    whole, found = file.read_bytes(), 0
    for i in range(0, len(whole), 3):
        file.write_bytes(whole[:i] + bytes([whole[i] ^ 0x11]) + whole[i + 1 :])
        told = ''
        try:
            read = np.asarray(training.recorded_teacher(tmp_path)['top_logits'])
        except ValueError as error:
            told = str(error)
            found += 1
        if told:
            assert 'is truncated or damaged: remove it, and record_teacher writes it again' in told
        else:
            np.testing.assert_array_equal(read, wanted)
    assert found > len(whole) / 9
    file.unlink()
    np.testing.assert_array_equal(record(tmp_path, data, teacher=teacher, where='kept', top_k=1)['top_logits'], wanted)


def test_the_check_can_be_left_out(tmp_path):
    """Then files are opened where they are read."""
    record(tmp_path)
    last = max(tmp_path.glob('*.npz'))
    last.write_bytes(b'')
    found = training.recorded_teacher(tmp_path, check=False)['teacher_logits']
    np.testing.assert_array_equal(found[:6], DATA['inputs'][:6] * np.float32(1.5))
    with pytest.raises(ValueError, match=r'000003\.npz is truncated or damaged'):
        found[22]
    last.unlink()
    with pytest.raises(ValueError, match=r'\(1 of 4 files are missing\)'):
        training.recorded_teacher(tmp_path, check=False)


INDICES = [
    3, -1, np.int64(22), slice(None), slice(4, 19, 3), slice(20, 2, -1), np.array([22, 0, 7, 7, -23]), [1, 12], [],
    np.array([[5, 6], [18, 0]]), np.arange(23) % 4 == 1, (2, 1), (slice(3, 9), slice(None), 1), (np.array([4, 8]), 2),
    ..., (..., 0), (None, 2),
]  # fmt: skip


@pytest.mark.parametrize('where', [None, 'kept'])
def test_it_is_indexed_as_an_array_is(where, tmp_path):
    data = {'inputs': DATA['inputs'], 'kept': DATA['inputs'] > 0.3}
    data['kept'][[4, 9]] = False
    teacher = networks.postprocess(scaled(), lambda x: jnp.stack([x, 1 - x], -1))
    found = record(tmp_path, data, teacher=teacher, where=where)['teacher_logits']
    array = np.stack([1.5 * DATA['inputs'], 1 - 1.5 * DATA['inputs']], -1)
    if where is not None:
        array[~data['kept']] = np.nan
    assert (len(found), found.shape, found.ndim, found.size, found.dtype, found.nbytes) == (
        (23, (23, 5, 2), 3, 230, np.float32, 920)
    )
    for index in INDICES:
        own = np.asarray(index, np.int32) if isinstance(index, list) else index
        np.testing.assert_array_equal(found[index], array[own], strict=True)
    np.testing.assert_array_equal(found, array)
    np.testing.assert_array_equal(np.stack(list(found)), array)
    for wrong in (23, -24, np.array([0, 23]), np.ones(5, np.bool_), 1.5):
        with pytest.raises(IndexError):
            found[wrong]
