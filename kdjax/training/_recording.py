"""A teacher's predictions on disk, made once, so that training does not run the teacher.

views = Views(augment, jax.random.key(7), 8)
recorded = record_teacher(teacher, variables, data, folder, views=views)
problem = distillation(student, None, objectives.from_recorded_logits(objective), optimizer)
run = in_memory_epoch(problem, batch_size=128, views=views)
state, metrics = run(state, {}, {**data, **recorded})
"""

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import losses
from kdjax.batches import Batch, rest_entry
from kdjax.networks import LinearLogits, Network, Variables, dense_logits, map_in_chunks
from kdjax.parallel import wait_for_hosts
from kdjax.training import _fingerprints
from kdjax.training._augmentation import Views, augmented, check_augmentation, describe_views
from kdjax.training._recorded import (
    FORMAT,
    check_settings,
    data_settings,
    file_paths,
    manifest_text,
    read_manifest,
    reader,
    recorded_teacher,
)
from kdjax.training._recorded_files import clear, joined, packed, write_arrays, write_first
from kdjax.training._streaming import Source

_BYTES_PER_FILE = 2**28
_DTYPES = ('float32', 'float16', 'bfloat16')


def record_teacher(
    teacher: Network,
    variables: Variables,
    data: Batch | Source,
    folder: str | pathlib.Path,
    *,
    batch_size: int = 256,
    views: Views | None = None,
    where: str | None = None,
    what: Literal['logits', 'hidden'] = 'logits',
    top_k: int | None = None,
    temperature: float | tuple[float, ...] = 4.0,
    dtype: Any = np.float32,
    examples_per_file: int | None = None,
) -> dict[str, Any]:
    """Runs the teacher once over the data and writes its logits, or finds them written.

    Bytes for each position and view, with 2 bytes a number in float16 and bfloat16, and 4 in float32:

    - all logits: classes numbers;
    - the k largest with the mass of the rest, for `objectives.top_k_soft_targets` and its like: k numbers, k indices of 2
      bytes, or 4 where there are more than 65,536 classes, and 4 for every temperature: in half precision 4 k + 4, or 6 k + 4;
    - hidden states, of a `networks.linear_head`: width numbers, and the head once. The logits are those of the teacher, all of
      them, for every objective on logits and every temperature; see `recorded_head`.

    With `where` positions that it leaves out take a bit each, such as padding and prompts.

    Files of some examples are written one after the other, each whole or not at all. A recording that was killed goes on with
    the first file that is missing, and is then what it would have been. Several may record into one folder at a time; what one
    has written the others find. Where several hosts call this, each records its share, and returns when all have: the folder
    must be one that all of them see. Recorded logits equal those that a training step computes from the same inputs, up to the
    rounding of batches of another size.

    Args:
      teacher: the network; it runs with `train=False`.
      variables: its variables; with several hosts, whole on each.
      data: `'inputs'`, a pytree of arrays [examples, ...], which may be memory maps, or a `Source`; other entries are not used,
        but for that of `where`. It is read twice.
      folder: where to write; made if it is not there.
      batch_size: examples at a time; the last batch is filled up, so that all have one shape.
      views: the augmented views to record; None records the inputs as they are.
      where: the name of an entry of the data, booleans [examples, ...] of the positions to store; they are those of every view.
      what: `'logits'`, or `'hidden'` for the hidden states that enter a linear head.
      top_k: how many of the largest logits to keep; None keeps all.
      temperature: of the rest, which must be that of the loss, or several; only with `top_k`.
      dtype: of what is written, float32, float16 or bfloat16; the rest is always in float32.
      examples_per_file: None for as many as take 256 MB, before `where` leaves any out; a file is made in memory.

    Returns:
      What `recorded_teacher` reads, to be merged into the data.

    Raises:
      ValueError: the folder holds the recording of another teacher, of the same variables in another network or precision, of
        other data, views or settings, or a damaged file; an argument is out of range, or there is a number that the dtype
        cannot hold.

    >>> import flax.linen as nn, tempfile
    >>> from kdjax import networks
    >>> teacher, data = networks.from_linen(nn.Dense(3)), {'inputs': np.ones((10, 4), np.float32)}
    >>> variables = teacher.init(jax.random.key(0), data['inputs'])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     record_teacher(teacher, variables, data, folder)['teacher_logits'].shape
    (10, 3)
    """
    folder, stored, (read, examples) = pathlib.Path(folder), jnp.dtype(dtype), reader(data, where)
    temperatures = temperature if isinstance(temperature, (tuple, list)) else None
    if stored.name not in _DTYPES:
        raise ValueError(f'record_teacher: dtype must be {", ".join(_DTYPES[:-1])} or {_DTYPES[-1]}, got {stored}')
    if batch_size < 1 or not examples:
        raise ValueError(f'record_teacher: batch_size and examples must be at least 1, got {batch_size} and {examples}')
    if examples_per_file is not None and examples_per_file < 1:
        raise ValueError(f'record_teacher: examples_per_file must be at least 1, got {examples_per_file}')
    if what not in ('logits', 'hidden') or (what == 'hidden' and top_k is not None):
        raise ValueError(f"record_teacher: what must be 'logits', or 'hidden' without top_k, got {what!r} and top_k {top_k}")
    if temperatures is not None and (not temperatures or len(set(map(rest_entry, temperatures))) < len(temperatures)):
        raise ValueError(f'record_teacher: temperatures must differ in their first six digits, got {temperatures}')
    check_augmentation(None, views)
    variables = _on_this_host(variables)
    settings = {
        **data_settings(data, where),
        'variables': _fingerprints.of_arrays(variables),
        'views': describe_views(views),
        'where': where,
        'what': what,
        'top_k': top_k,
        'temperature': None if top_k is None else temperature if temperatures is None else list(temperatures),
        'dtype': stored.name,
    }
    begun = read_manifest(folder) if (folder / 'manifest.json').exists() else None
    if begun is not None:
        check_settings(folder, begun['settings'], settings)
        # The program is compared for batches of one size, and how large they are does not matter; nor how they are in files.
        batch_size = begun['settings']['batch_size']

    def logits_of(variables: Variables, inputs: Any, indices: Any, view: Any) -> Any:
        logits = teacher.apply(variables, augmented(inputs, indices, view, views=views), train=False)[0].logits
        if logits is None:
            raise ValueError('record_teacher: the teacher gives no logits')
        if what == 'hidden' and not isinstance(logits, LinearLogits):
            raise ValueError("record_teacher: what='hidden' needs a teacher that networks.linear_head has made")
        return logits

    @jax.jit
    def predict(*arguments: Any) -> dict[str, jax.Array]:
        logits = logits_of(*arguments)
        if what == 'hidden':
            return {'teacher_hidden': logits.hidden}
        if top_k is None:
            return {'teacher_logits': dense_logits(logits).astype(np.float32)}
        return map_in_chunks(functools.partial(_largest, k=top_k, temperature=temperature), logits)

    first = np.minimum(np.arange(batch_size), examples - 1)
    entries = read(first)
    arguments = variables, entries['inputs'], first.astype(np.int32), np.int32(0)
    traced = predict.trace(*arguments)
    # What is done with hidden states belongs to the program too.
    program = traced if what == 'logits' else jax.jit(lambda *arguments: dense_logits(logits_of(*arguments))).trace(*arguments)
    settings |= {'batch_size': batch_size, 'program': _fingerprints.of_program(program.jaxpr)}
    if begun is not None:
        check_settings(folder, begun['settings'], settings)
        manifest = begun
    else:
        head = jax.eval_shape(logits_of, *arguments) if what == 'hidden' else None
        layout = _layout(traced.out_info, head, stored, views, entries.get('where'), examples, batch_size, examples_per_file)
        manifest = json.loads(json.dumps({**layout, 'settings': settings}))

    def predict_batch(start: int, stop: int) -> dict[str, np.ndarray]:
        indices = np.minimum(np.arange(start, start + batch_size), examples - 1)
        entries, kept = read(indices), min(batch_size, stop - start)
        numbers = range(1 if views is None else views.number)
        seen = [predict(variables, entries['inputs'], indices.astype(np.int32), np.int32(view)) for view in numbers]
        seen = jax.device_get(seen[0] if views is None else jax.tree.map(lambda *each: jnp.stack(each, axis=1), *seen))
        own = {name: _stored(array[:kept], manifest['arrays'][name]['dtype']) for name, array in seen.items()}
        return packed(own, None if where is None else entries['where'][:kept], None if views is None else views.number)

    head_path, paths = file_paths(folder, manifest)
    per_file = manifest['examples_per_file']
    for number in range(jax.process_index(), len(paths), jax.process_count()):
        if paths[number].exists():
            continue
        begin, end = number * per_file, min((number + 1) * per_file, examples)
        arrays = joined([predict_batch(start, end) for start in range(begin, end, batch_size)])
        # Not before there is something to write: what cannot be recorded leaves no trace.
        if begun is None:
            folder.mkdir(parents=True, exist_ok=True)
            write_first(folder / 'manifest.json', manifest_text(manifest))
            begun = read_manifest(folder)
            if begun != manifest:  # someone else was first, perhaps in other batches
                options: dict[str, Any] = {'views': views, 'where': where, 'what': what, 'top_k': top_k, 'dtype': dtype}
                return record_teacher(teacher, variables, data, folder, temperature=temperature, **options)
        write_arrays(paths[number], arrays)
    if head_path is not None and not head_path.exists():
        factors = jax.jit(lambda *arguments: dataclasses.replace(logits_of(*arguments), hidden=None))(*arguments)
        write_arrays(head_path, {name: np.asarray(getattr(factors, name)) for name in manifest['head']['arrays']})
    wait_for_hosts('record_teacher')
    recorded = recorded_teacher(folder)
    clear(folder)
    return recorded


def _largest(logits: jax.Array, k: int, temperature: float | tuple[float, ...]) -> dict[str, jax.Array]:
    """The k largest logits and the rest, by the names of the entries."""
    several = isinstance(temperature, (tuple, list))
    rests = {}
    for each in temperature if several else (temperature,):
        largest, indices, rests[rest_entry(each) if several else 'rest'] = losses.top_k_logits(logits, k, temperature=each)
    narrow = jnp.uint16 if logits.shape[-1] <= 2**16 else jnp.int32
    return {'top_logits': largest, 'top_indices': indices.astype(narrow), **rests}


def _layout(
    shapes: dict[str, jax.ShapeDtypeStruct],
    head: LinearLogits | None,
    stored: np.dtype,
    views: Views | None,
    where: np.ndarray | None,
    examples: int,
    batch_size: int,
    examples_per_file: int | None,
) -> dict[str, Any]:
    """What a manifest says of the files, by the shapes of a batch of predictions."""
    positions = [] if where is None else list(where.shape[1:])
    of_views = [] if views is None else [views.number]
    arrays = {}
    for name, x in shapes.items():
        if list(x.shape[1 : 1 + len(positions)]) != positions:
            raise ValueError(
                f'record_teacher: the mask of where is {positions} for each example, and {name} {list(x.shape[1:])}'
            )
        halved = jnp.issubdtype(x.dtype, jnp.floating) and not name.startswith('rest')
        kept = stored.name if halved else x.dtype.name
        arrays[name] = {'shape': [*of_views, *x.shape[1:]], 'dtype': kept}
    if examples_per_file is None:
        size = sum(math.prod(own['shape']) * jnp.dtype(own['dtype']).itemsize for own in arrays.values())
        examples_per_file = max(1, _BYTES_PER_FILE // size // batch_size) * batch_size
    layout = {'format': FORMAT, 'arrays': arrays, 'head': None, 'positions': positions}
    if head is not None:
        factors = {name: x for name in ('kernel', 'bias') if (x := getattr(head, name)) is not None}
        layout['head'] = {
            'arrays': {name: {'shape': list(x.shape), 'dtype': x.dtype.name} for name, x in factors.items()},
            'options': {name: getattr(head, name) for name in ('softcap', 'transposed', 'chunk')},
        }
    return {**layout, 'examples': examples, 'examples_per_file': examples_per_file}


def _stored(array: np.ndarray, dtype: str) -> np.ndarray:
    """The array in the dtype of storage; class indices stay integers."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    with np.errstate(over='ignore'):
        stored = array.astype(jnp.dtype(dtype))
    if np.isnan(array).any() or (np.isinf(stored) & ~np.isinf(array)).any():
        raise ValueError(f'record_teacher: the teacher gives logits that are NaN or too large for {dtype}')
    return stored


def _on_this_host(variables: Variables) -> Variables:
    """Variables that this host can compute with alone."""

    def own(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return x
        if not x.is_fully_replicated:
            raise ValueError('record_teacher: the variables are split over hosts: give each of them all of them')
        return x.addressable_data(0)

    return jax.tree.map(own, variables)
