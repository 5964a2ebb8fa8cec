"""The flags that scripts share: what is learned from, and how it is computed. A script's `Config` holds them beside its own."""

import dataclasses
import math
import os
import pathlib
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np
import optax
import tyro

from kdjax import data, networks, optimizers, training
from kdjax.batches import Batch


class Within(NamedTuple):
    """The numbers that a flag may be.

    Attributes:
      least: the smallest.
      most: the largest.
      open: whether the ends themselves are outside.
    """

    least: float
    most: float = math.inf
    open: bool = False


Count = Annotated[int, Within(1)]
"""How many, at least one."""

Positive = Annotated[float, Within(0, open=True)]
"""A finite number above 0."""

Share = Annotated[float, Within(0, 1)]
"""A part of a whole."""

Folder = Annotated[str, tyro.conf.arg(metavar='FOLDER')]
"""The path of a folder."""


@dataclasses.dataclass(frozen=True)
class Data:
    """What is learned from."""

    dataset: str = 'digits'
    """'digits', which is embedded; the path of a folder of images by class, of an .npz, .csv or .parquet file; or a name of
    TensorFlow Datasets: see `kdjax.data.load`."""
    data_dir: Folder | None = None
    """Where TensorFlow Datasets keeps its data, and resized images are kept; their own defaults if not given."""
    image_size: Count | None = None
    """Height and width to which all images are resized, once; needed where they differ."""
    examples: Count | None = None
    """Training examples that are used; all if not given."""
    stream: bool = False
    """Read examples from disk while training, even where they would fit in memory."""


@dataclasses.dataclass(frozen=True)
class Training:
    """How it is computed, and where the results go."""

    seeds: Count = 3
    """Number of repetitions."""
    batch_size: Count = 64
    """Examples a step, over all devices and hosts."""
    precision: Literal['float32', 'bfloat16'] = 'float32'
    """Of the arithmetic of networks; parameters and losses stay in float32."""
    accumulate: Count = 1
    """Parts of a batch that are computed one after the other, exactly, to save memory; not with batch norm."""
    rematerialize: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a forward pass more."""
    average: Annotated[float | None, Within(0, 1)] = None
    """Decay of a moving average of the parameters, which is then what is measured and shipped, such as 0.999."""
    fsdp: Count = 1
    """Devices that share one copy of large parameters, teacher's and optimizer's too; 1 for a copy on each."""
    skip_nonfinite: Annotated[int, Within(0)] = 0
    """Steps of each network that may come out infinite or NaN and are then skipped; at the first one above it the run stops."""
    deterministic: bool = False
    """Only operations that give the same bits every time on GPUs; slower."""
    compilation_cache: Folder | None = None
    """Keep compiled programs in this folder for the next run."""
    profile: Folder | None = None
    """Trace a few steps of each training into this folder, for XProf, TensorBoard or Perfetto."""
    tensorboard: Folder | None = None
    """Write the numbers of each training as TensorBoard's event files into this folder too."""


OF_NO_CONSEQUENCE = ('compilation_cache', 'profile', 'tensorboard')
"""Flags that change no number: a run may be taken up again with others."""


def without_consequence() -> dict[str, Any]:
    """The defaults of the flags that change no number."""
    return {field.name: field.default for field in dataclasses.fields(Training) if field.name in OF_NO_CONSEQUENCE}


def fields(config: Any) -> Iterator[tuple[str, Any, Any]]:
    """The name, the type and the value of every flag, those of the shared settings too."""
    types = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value)
        else:
            yield field.name, types[field.name], value


def check_ranges(config: Any) -> None:
    """Raises for the first flag that is not among the numbers that its type allows.

    >>> check_ranges(Training(seeds=0))
    Traceback (most recent call last):
    ...
    ValueError: --seeds must be at least 1, got 0
    >>> check_ranges(Training(average=float('nan')))
    Traceback (most recent call last):
    ...
    ValueError: --average must be from 0 to 1, got nan
    """
    for name, type_, value in fields(config):
        for range_ in _ranges(type_):
            for number in value if isinstance(value, tuple | list) else (value,):
                if isinstance(number, int | float) and not _within(number, range_):
                    raise ValueError(f'--{name.replace("_", "-")} must be {_in_words(range_)}, got {number}')


def refuse(settings: Training, why: str, *names: str) -> None:
    """Raises for the first of these flags that is given to a script that has no use for it.

    >>> refuse(Training(fsdp=2), 'clients are apart', 'fsdp')
    Traceback (most recent call last):
    ...
    ValueError: --fsdp does nothing here: clients are apart
    """
    for name in names:
        if getattr(settings, name) != getattr(Training(), name):
            raise ValueError(f'--{name.replace("_", "-")} does nothing here: {why}')


def with_flags(config: Any, **flags: Any) -> Any:
    """A config with other values of its flags, wherever they stand.

    >>> with_flags(Training(), seeds=5).seeds
    5
    """
    own = {field.name for field in dataclasses.fields(config)}
    changes = {name: value for name, value in flags.items() if name in own}
    rest = {name: value for name, value in flags.items() if name not in own}
    for name in own:
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            inner = {flag for flag, _, _ in fields(value)}
            changes[name] = with_flags(value, **{flag: rest.pop(flag) for flag in inner & rest.keys()})
    if rest:
        raise ValueError(f'there is no flag --{next(iter(rest)).replace("_", "-")}')
    return dataclasses.replace(config, **changes)


def load(settings: Data, *, validation: float = 0.2) -> data.Dataset:
    """Loads what the flags name.

    Args:
      settings: the flags.
      validation: share of the training split that is held out where the data set has no validation split of its own.

    Raises:
      ValueError: there is no such data set, or its training split has fewer examples.
    """
    dataset = data.load(
        settings.dataset,
        data_dir=settings.data_dir,
        image_size=settings.image_size,
        validation=validation,
        stream=True if settings.stream else None,
    )
    everything = len(dataset.train['labels'])
    if settings.examples is None:
        return dataset
    if settings.examples > everything:
        raise ValueError(f'--examples must be between 1 and {everything}, got {settings.examples}')
    chosen = np.random.default_rng(0).permutation(everything)[: settings.examples]
    return dataset._replace(train=data.take(dataset.train, chosen))


def part_in_order(split: Batch, examples: int | None) -> Batch:
    """So many examples of a split, the same in every run, in the order in which they are there; all for None."""
    everything = len(split['labels'])
    if examples is None:
        return split
    if examples > everything:
        raise ValueError(f'--examples must be between 1 and {everything}, got {examples}')
    return data.take(split, np.sort(np.random.default_rng(0).permutation(everything)[:examples]))


def distillation(
    settings: Training,
    student: networks.Network,
    teacher: networks.Network | None,
    objective: Any,
    optimizer: optax.GradientTransformation,
) -> training.Problem:
    """`training.distillation` with networks and averages that are computed as the flags say."""
    if settings.average is not None:
        optimizer = optimizers.average_parameters(optimizer, settings.average)
    taught_by = None if teacher is None else _computed(settings, teacher)
    return training.distillation(_computed(settings, student), taught_by, objective, optimizer)


def variables_of(settings: Training) -> Any:
    """What a state's variables are: those of the network, or with averages of its parameters."""
    return optimizers.averaged_variables if settings.average is not None else _own


def prepare_jax(settings: Training) -> None:
    """Tells jax what must be known before it looks for devices."""
    if settings.deterministic:
        # What is in the environment already stays, and wins.
        os.environ['XLA_FLAGS'] = f'--xla_gpu_deterministic_ops=true {os.environ.get("XLA_FLAGS", "")}'
    if settings.compilation_cache is not None:
        jax.config.update('jax_compilation_cache_dir', str(pathlib.Path(settings.compilation_cache).absolute()))


def _computed(settings: Training, network: networks.Network) -> networks.Network:
    if settings.precision != 'float32':
        network = networks.mixed_precision(network, settings.precision)
    if settings.rematerialize:
        network = networks.rematerialize(network)
    return networks.in_parts(network, settings.accumulate)


def _own(state: training.TrainState) -> dict[str, Any]:
    return state.variables


def _ranges(type_: Any) -> Iterator[Within]:
    """The ranges in a type, those of a part of it too: `Count | None`, `tuple[Share, ...]`."""
    yield from (each for each in getattr(type_, '__metadata__', ()) if isinstance(each, Within))
    for part in typing.get_args(type_):
        yield from _ranges(part)


def _within(number: float, range_: Within) -> bool:
    if range_.open:
        return range_.least < number < range_.most
    return range_.least <= number <= range_.most and math.isfinite(number)


def _in_words(range_: Within) -> str:
    if range_.open:
        return f'above {range_.least:g}' + ('' if math.isinf(range_.most) else f' and below {range_.most:g}')
    if math.isinf(range_.most):
        return f'at least {range_.least:g}'
    return f'from {range_.least:g} to {range_.most:g}'
