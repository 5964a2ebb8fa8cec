"""Linear heads over many devices: hidden states stay where they are, kernels travel once, and gradients are those of one."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from helpers.linear_checks import assert_close
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdjax import objectives, parallel
from kdjax.networks import LinearLogits, Outputs

RNG = np.random.default_rng(0)
LENGTH = 5


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


SHARDED = objectives.hard_labels() + objectives.soft_targets() + objectives.reverse_kl()
NOTHING = {key: {} for key in SHARDED.names}


def step_of(student, teacher, batch):
    """The gradients of a sum of terms."""

    def loss(student):
        return SHARDED.apply(NOTHING, NOTHING, Outputs(student), Outputs(teacher), batch, step=0)[0]

    return jax.value_and_grad(loss)(student)


def sharded_arrays(rows):
    """Heads over 2048 classes: kernels large enough that `parallel.shard` splits them."""
    width, classes = 8, 2048
    student, teacher = (LinearLogits(draw(rows, LENGTH, width), draw(width, classes), draw(classes), chunk=3) for _ in range(2))
    return student, teacher, {'labels': RNG.integers(-1, classes, (rows, LENGTH)).astype(np.int32)}


@pytest.mark.parametrize('fsdp', [1, 4, 8])
def test_hidden_states_stay_on_their_devices_and_the_kernel_travels_once(fsdp):
    """Every collective is outside of the loops; gathers are of kernels, and the gradient of one is summed once."""
    student, teacher, batch = sharded_arrays(16)
    mesh = parallel.data_parallel(fsdp=fsdp)
    rows = parallel.shard_batch(mesh, {'student': student.hidden, 'teacher': teacher.hidden, 'batch': batch})

    def placed(logits, hidden):
        kernel, bias = parallel.shard(mesh, (logits.kernel, logits.bias))
        return dataclasses.replace(logits, hidden=hidden, kernel=kernel, bias=bias)

    arguments = placed(student, rows['student']), placed(teacher, rows['teacher']), rows['batch']
    layout = None, jax.tree.map(lambda x: x.sharding, arguments[0])
    program = jax.jit(step_of, out_shardings=layout).lower(*arguments).compile()
    assert_close(program(*arguments), jax.jit(step_of)(student, teacher, batch))
    entry, loops = program.as_text().split('ENTRY ')[::-1]
    kind = r' = (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\('
    assert not re.findall(kind, loops)
    found = re.findall(kind, entry)
    gathers = [result for result, name in found if name == 'all-gather']
    assert all('[8,2048]' in result for result in gathers)
    assert len(gathers) == (0 if fsdp == 1 else 2)
    assert {name for _, name in found} <= {'all-gather', 'all-reduce', 'reduce-scatter'}


def test_rows_that_the_devices_do_not_divide():
    student, teacher, batch = sharded_arrays(3)
    mesh = jax.make_mesh((8,), ('any',), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    arguments = jax.device_put((student, teacher, batch), whole)
    assert_close(jax.jit(step_of)(*arguments), jax.jit(step_of)(student, teacher, batch))
    assert_close(SHARDED.apply(NOTHING, NOTHING, *map(Outputs, arguments[:2]), arguments[2], step=0)[0], step_of(*arguments)[0])


def test_a_mesh_with_explicit_axes():
    student, teacher, batch = sharded_arrays(16)
    mesh = jax.make_mesh((8,), ('data',))
    with jax.set_mesh(mesh):
        split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec('data'), PartitionSpec()))
        layout = [LinearLogits(split, whole, whole, chunk=3)] * 2
        arguments = jax.device_put((student, teacher, batch), (*layout, split))
        found = jax.jit(step_of)(*arguments)
    assert_close(found, jax.jit(step_of)(student, teacher, batch))


def test_gradients_inside_shard_map():
    """Of the kernel the sum over the devices of those of their own means, of hidden states the device's own."""
    student, teacher, batch = sharded_arrays(8)
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec('data'), PartitionSpec()
    layout = LinearLogits(split, whole, whole, chunk=3)
    batch['labels'] = np.abs(batch['labels'])  # as many on each device

    def gradients(student, teacher, batch):
        return step_of(student, teacher, batch)[1]

    inside = jax.shard_map(gradients, mesh=mesh, in_specs=(layout, layout, split), out_specs=layout)
    expected = jax.tree.map(lambda x: 8 * x, jax.jit(gradients)(student, teacher, batch))
    assert_close(jax.jit(inside)(student, teacher, batch), expected)
