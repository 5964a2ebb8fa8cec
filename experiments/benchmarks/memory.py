"""Memory and collectives of one distillation step on 1, 2, 4 and 8 devices: replicated and fully sharded (FSDP).

    python -m experiments.benchmarks.memory

A vision transformer of depth 4 and width 384 teaches one of width 192, with Adam; every device has as many images, however
many devices there are. On CPUs these are made up, which changes no byte. All numbers are per device, from the plan of the
compiled program (`memory_analysis`) and its text:

- sharded: arguments that `parallel.shard` splits: large arrays of student, optimizer and teacher. Each device should hold
  1 / fsdp of them;
- argument: these, the small arrays that every device keeps whole, and the device's images;
- temporary: activations, gradients and, with FSDP, gathered parameters. On CPUs XLA does not order the gathers by their use,
  so all may be alive at once;
- peak: arguments, results that replace no argument, and temporary memory;
- collectives, with the bytes of what they yield. With replicated parameters one all-reduce sums all gradients. FSDP gathers
  every split array of teacher and student before its use (all-gather; backward uses it again), sums every gradient and keeps
  one share of it: a reduce-scatter, for which XLA on CPUs does an all-reduce of which each device takes its slice. XLA may
  exchange activations in place of parameters where they are smaller: see `--images 8`.

The ratio is the worst of measured to ideal bytes of the sharded part, over all lines of the table: it should be below 1.1. It
is exact, and the same on every machine.
"""

import collections
import dataclasses
import json
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import runs, settings
from experiments.settings import Count
from kdjax import models, networks, objectives, parallel, training


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes to measure."""

    devices: tuple[Count, ...] = (1, 2, 4, 8)
    """Numbers of devices."""
    depth: Count = 4
    """Blocks of teacher and student."""
    width: Count = 192
    """Width of the student; the teacher's is twice as large."""
    images: Count = 64
    """Images a device, of 32 x 32 pixels."""


COLLECTIVE = re.compile(r' = (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(')
ARRAY = re.compile(r'\b(pred|[a-z]+\d+)\[([\d,]*)\]')


def main(config: Config) -> None:
    """Compiles and prints."""
    settings.check_ranges(config)
    if max(config.devices, default=0) > jax.device_count():
        there = f'{jax.device_count()}: ask for fewer, or set JAX_PLATFORMS=cpu'
        raise ValueError(f'--devices asks for {max(config.devices)} devices, but there are only {there}')
    rows = []
    for number in config.devices:
        for fsdp in sorted({1, number}):
            rows.append(measure(config, number, fsdp))
            print_row(rows[-1], header=len(rows) == 1)
    ratio = max(row['sharded_bytes'] / (row['whole_bytes'] / row['fsdp']) for row in rows)
    print(f'The sharded part is at worst {ratio:.4f} times {rows[0]["whole_bytes"] / 1e6:.2f} MB / fsdp')
    device = jax.devices()[0].device_kind
    most = max(rows, key=lambda row: row['fsdp'])
    megabytes = {'ours_mb': most['sharded_bytes'] / 1e6, 'theirs_mb': most['whole_bytes'] / 1e6}
    summary = {'name': 'memory', 'ratio': ratio, **megabytes, 'rows': rows}
    print(json.dumps({**summary, 'device': device, 'jax': jax.__version__}))


def measure(config: Config, number: int, fsdp: int) -> dict[str, Any]:
    """Compiles the step for a mesh, and reads its plan."""
    mesh = parallel.data_parallel(jax.devices()[:number], fsdp=fsdp)

    def network(width: int) -> networks.Network:
        return networks.from_linen(models.VisionTransformer(depth=config.depth, width=width, heads=4))

    student, teacher = network(config.width), network(2 * config.width)
    problem = training.distillation(student, teacher, objectives.soft_targets(), optax.adam(1e-3))
    images = jax.ShapeDtypeStruct((config.images * number, 32, 32, 3), jnp.float32)
    state = jax.eval_shape(problem.init, jax.random.key(0), {'inputs': images})
    state, variables = on_mesh(mesh, (state, jax.eval_shape(teacher.init, jax.random.key(0), images)))
    batch = {'inputs': jax.ShapeDtypeStruct(images.shape, images.dtype, sharding=parallel.batch_sharding(mesh))}
    compiled = parallel.distribute(mesh, problem).step.lower(state, variables, batch).compile()
    plan = compiled.memory_analysis()
    extra = plan.output_size_in_bytes - plan.alias_size_in_bytes
    leaves = jax.tree.leaves((state, variables))
    large = [leaf for leaf in leaves if leaf.size >= parallel.SMALLEST_SPLIT]
    small = [leaf for leaf in leaves if leaf.size < parallel.SMALLEST_SPLIT]
    return {
        'devices': number,
        'fsdp': fsdp,
        'whole_bytes': sum(leaf.size * leaf.dtype.itemsize for leaf in large),
        # What the program takes, without what is known not to be split: not what the layout promises.
        'sharded_bytes': plan.argument_size_in_bytes - sum(map(share, small)) - share(batch['inputs']),
        'argument_bytes': plan.argument_size_in_bytes,
        'temporary_bytes': plan.temp_size_in_bytes,
        'peak_bytes': plan.argument_size_in_bytes + extra + plan.temp_size_in_bytes,
        'collectives': collectives(compiled.as_text()),
    }


def on_mesh(mesh: jax.sharding.Mesh, shapes: Any) -> Any:
    """Shapes with the layout that `parallel.shard` would give to arrays of them."""
    return jax.tree.map(
        lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
        shapes,
        parallel.shardings(mesh, shapes),
    )


def share(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array on each device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """How many collectives of each kind a compiled program has, and the bytes that they yield.

    >>> collectives('%a = (f32[4,2]{1,0}, f32[]) all-reduce(%b, %c), to_apply=%sum')
    {'all-reduce': (1, 36)}
    """
    found: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    for result, name in COLLECTIVE.findall(text):
        count, size = found[name]
        found[name] = count + 1, size + sum(array_bytes(*array) for array in ARRAY.findall(result))
    return dict(found)


def array_bytes(kind: str, shape: str) -> int:
    """Bytes of an array as compiled programs write its type, such as f32[3,4]."""
    bits = 8 if kind == 'pred' else int(re.search(r'\d+', kind)[0])
    return math.prod(int(length) for length in shape.split(',') if length) * bits // 8


def print_row(row: dict[str, Any], *, header: bool) -> None:
    """Prints one line of the table, in MB."""
    names = ('sharded', 'argument', 'temporary', 'peak')
    if header:
        print('devices  fsdp  ' + '  '.join(f'{name:>9}' for name in names) + '  MB per device; collectives (MB)')
    sizes = '  '.join(f'{row[f"{name}_bytes"] / 1e6:9.2f}' for name in names)
    kinds = ', '.join(f'{count} {name} ({size / 1e6:.2f})' for name, (count, size) in sorted(row['collectives'].items()))
    print(f'{row["devices"]:7}  {row["fsdp"]:4}  {sizes}  {kinds or "none"}')


if __name__ == '__main__':
    # Made-up devices, where there are none.
    jax.config.update('jax_num_cpu_devices', 8)
    runs.command_line(Config, main)
