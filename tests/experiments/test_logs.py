import pathlib
import struct

import flax.linen as nn
import jax
import numpy as np
import optax
from tensorboardX.proto.event_pb2 import Event

from experiments import logs
from kdjax import networks, objectives, training

DATA = {'inputs': np.ones((16, 5), np.float32), 'labels': np.arange(16, dtype=np.int32) % 3}
NETWORK = networks.from_linen(nn.Dense(3, use_bias=False))


def events(folder: pathlib.Path) -> list[tuple[int, str, float]]:
    """Steps, names and values of the scalars in a folder's event files, in the order in which they were written."""
    told = []
    for file in sorted(folder.glob('events.*')):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from('<Q', content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            told += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            at += length + 16
    return told


def test_a_summary_counts_parameters_bytes_and_operations():
    optimizer = optax.sgd(0.1)
    alone = training.distillation(NETWORK, None, objectives.hard_labels(), optimizer)
    told = logs.summary(alone, DATA, 8, None)
    assert told.startswith('network 15 parameters, 60 bytes; '), told
    assert told.endswith(' operations a step of 8 examples')
    teacher = NETWORK.init(jax.random.key(0), DATA['inputs'])
    taught = training.distillation(NETWORK, NETWORK, objectives.soft_targets(), optimizer)
    assert logs.summary(taught, DATA, 8, teacher).startswith(
        'student 15 parameters, 60 bytes; teacher 15 parameters, 60 bytes; '
    )

    # A batch of twice the examples takes more operations than another, and no more than twice as many.
    def operations(batch_size):
        number = logs.summary(alone, DATA, batch_size, None).split('; ')[1].split(' ')[0]
        return float(number.rstrip('k')) * (1000 if number.endswith('k') else 1)

    assert 1.5 * operations(4) < operations(8) <= 2 * operations(4)


def test_event_files_hold_what_the_log_holds(tmp_path):
    problem = training.distillation(NETWORK, None, objectives.hard_labels(), optax.sgd(0.1))
    records = []
    with logs.tensorboard(tmp_path) as on_record:

        def both(record):
            records.append(record)
            on_record(record)

        training.fit(problem, DATA, key=jax.random.key(0), batch_size=8, epochs=2, every=1, on_record=both, progress=False)
    expected = [(record['step'], name, value) for record in records for name, value in record.items() if name != 'step']
    found = [each for each in events(tmp_path) if each[1] != '']
    assert [each[:2] for each in found] == [each[:2] for each in expected]
    np.testing.assert_allclose([each[2] for each in found], [each[2] for each in expected], rtol=1e-6)


def test_without_a_folder_nothing_is_written():
    with logs.tensorboard(None) as on_record:
        assert on_record is None
