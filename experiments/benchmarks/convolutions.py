"""The layers of small convolutional networks on CPUs, values and both gradients: kdjax's lowerings against XLA's own.

    python -m experiments.benchmarks.convolutions

Every layer runs as `models.cpu_convolution` would have it, which chooses among products of windows, Winograd's filtering and
XLA's convolution, and as XLA's convolution; pooling runs as two maxima and as Flax's reduction over windows. Times are medians,
taken in turns; GFLOP/s count the multiplications and additions of a convolution as it is defined, however it is computed.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments import runs, settings
from experiments.benchmarks import turns
from experiments.settings import Count
from kdjax import models
from kdjax.models import max_pool


class Layer(NamedTuple):
    """A 3x3 convolution of square images."""

    side: int
    incoming: int
    width: int


LAYERS = (Layer(32, 3, 32), Layer(32, 16, 16), Layer(32, 32, 32), Layer(16, 64, 64), Layer(16, 128, 128), Layer(8, 256, 256))
POOLED = Layer(32, 64, 64)


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes to measure."""

    batch_size: Count = 128
    """Images a call."""
    repeats: Count = 15
    """Timed calls of each, in turns."""


def main(config: Config) -> None:
    """Measures and prints."""
    settings.check_ranges(config)
    device = jax.devices()[0].device_kind
    print(f'batch {config.batch_size}, float32, {device}, jax {jax.__version__}: milliseconds, kdjax and XLA')
    rows = [compare_convolutions(layer, config) for layer in LAYERS]
    rows.append(compare_pooling(config))
    for row in rows:
        speed = ', '.join(f'{row[key]:.0f}' for key in ('ours_gflops_per_s', 'theirs_gflops_per_s') if key in row)
        print(f'{row["layer"]:28} {row["ours_ms"]:8.1f} {row["theirs_ms"]:8.1f} {row["ratio"]:6.2f}  {speed}')
    worst = max(rows, key=lambda row: row['ratio'])
    print(json.dumps({'name': 'convolutions', **worst, 'layers': rows, 'device': device}))


def compare_convolutions(layer: Layer, config: Config) -> dict[str, Any]:
    """One layer, by `models.cpu_convolution` and by XLA."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 3, layer.incoming, layer.width), np.float32)

    def applied(lowering: models.Convolution) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return lambda x, w: lowering(x, w, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))

    ours, theirs = applied(models.cpu_convolution), applied(jax.lax.conv_general_dilated)
    row = compare(f'{layer.incoming} to {layer.width} at {layer.side}x{layer.side}', ours, theirs, layer, config, kernel)
    # The values, and the two gradients, are as many operations each.
    operations = 3 * 2 * 9 * config.batch_size * layer.side**2 * layer.incoming * layer.width
    speeds = {f'{side}_gflops_per_s': operations / row[f'{side}_ms'] / 1e6 for side in ('ours', 'theirs')}
    return row | speeds


def compare_pooling(config: Config) -> dict[str, Any]:
    """2x2 pooling as in `kdjax.models`, and by Flax."""
    name = f'2x2 pooling of {POOLED.width} at {POOLED.side}x{POOLED.side}'
    return compare(name, max_pool, lambda x: nn.max_pool(x, (2, 2), (2, 2)), POOLED, config)


def compare(name: str, ours: Callable, theirs: Callable, layer: Layer, config: Config, *parameters: Any) -> dict[str, Any]:
    """Times the values and the gradients of images and parameters."""
    rng = np.random.default_rng(1)
    images = rng.standard_normal((config.batch_size, layer.side, layer.side, layer.incoming), np.float32)
    arguments = jax.device_put((images, *parameters))
    cotangent = jnp.asarray(rng.standard_normal(jax.eval_shape(ours, *arguments).shape, np.float32))

    def forward_and_backward(function: Callable) -> Callable[[], Any]:
        @jax.jit
        def run(arguments: tuple[jax.Array, ...], cotangent: jax.Array) -> Any:
            values, backward = jax.vjp(function, *arguments)
            return values, backward(cotangent)

        return lambda: run(arguments, cotangent)

    return {'layer': name, **turns.compare(forward_and_backward(ours), forward_and_backward(theirs), config.repeats)}


if __name__ == '__main__':
    runs.command_line(Config, main)
