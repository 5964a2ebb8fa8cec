"""Augmentation that changes the values of pixels."""

from typing import Any

import jax
import jax.numpy as jnp

from kdjax.data.augment._composition import Augment
from kdjax.data.augment._library import dm_pix


def random_brightness(*, change: float) -> Augment:
    """Adds up to `change` of the whole range to all pixels, or takes it away.

    >>> import jax, jax.numpy as jnp
    >>> image = random_brightness(change=0.2)(jax.random.key(0), jnp.full((2, 2, 1), 100, jnp.uint8))
    >>> bool((image == image[0, 0, 0]).all()), 49 <= int(image[0, 0, 0]) <= 151
    (True, True)
    """
    _check_change('random_brightness', change)
    brighten = dm_pix().random_brightness
    return _on_unit_range(lambda key, image: brighten(key, image, change))


def random_contrast(*, change: float) -> Augment:
    """Multiplies the distance of each pixel from its channel's mean by a factor from 1 - change to 1 + change.

    >>> import jax, jax.numpy as jnp
    >>> random_contrast(change=0.5)(jax.random.key(0), jnp.ones((4, 4, 3), jnp.uint8)).dtype
    dtype('uint8')
    """
    _check_change('random_contrast', change)
    contrast = dm_pix().random_contrast
    return _on_unit_range(lambda key, image: contrast(key, image, 1 - change, 1 + change))


def random_saturation(*, change: float) -> Augment:
    """Multiplies the saturation (of hue, saturation and value) by a factor from 1 - change to 1 + change.

    Raises:
      ValueError: the change is not from 0 to 1; or, from the function, the image has not three channels.

    >>> import jax, jax.numpy as jnp
    >>> grey = jnp.full((2, 2, 3), 100, jnp.uint8)
    >>> bool((random_saturation(change=0.5)(jax.random.key(0), grey) == grey).all())
    True
    """
    _check_change('random_saturation', change)
    resaturate = dm_pix().random_saturation

    def saturate(key: jax.Array, image: jax.Array) -> Any:
        if image.shape[-1] != 3:
            raise ValueError(f'random_saturation: needs images with red, green and blue, got {image.shape}')
        return resaturate(key, image, 1 - change, 1 + change)

    return _on_unit_range(saturate)


def random_blur(*, deviation: float) -> Augment:
    """Blurs by a Gaussian whose standard deviation is drawn from 0 to `deviation` pixels; the edge weighs only what is there.

    >>> import jax, jax.numpy as jnp
    >>> print(random_blur(deviation=1.0)(jax.random.key(0), jnp.ones((2, 2, 1))).ravel())
    [1. 1. 1. 1.]
    """
    _check_deviation('random_blur', deviation)

    def blur(key: jax.Array, image: jax.Array) -> jax.Array:
        width = jnp.maximum(deviation * jax.random.uniform(key), 1e-3)

        def weights(side: int) -> jax.Array:
            distance = jnp.arange(side, dtype=jnp.float32)[:, None] - jnp.arange(side, dtype=jnp.float32)[None]
            return jax.nn.softmax(-0.5 * jnp.square(distance / width), axis=-1)

        # Products of matrices: under vmap, convolutions with a kernel for every example take twenty times as long on CPUs.
        return jnp.einsum('ih,hwc,jw->ijc', weights(image.shape[0]), image, weights(image.shape[1]), precision='highest')

    return _on_unit_range(blur)


def random_noise(*, deviation: float) -> Augment:
    """Adds Gaussian noise, drawn for every pixel and channel, with a standard deviation of so much of the whole range.

    >>> import jax, jax.numpy as jnp
    >>> random_noise(deviation=0.1)(jax.random.key(0), jnp.ones((4, 4, 1))).shape
    (4, 4, 1)
    """
    _check_deviation('random_noise', deviation)
    return _on_unit_range(lambda key, image: image + deviation * jax.random.normal(key, image.shape))


def _on_unit_range(function: Augment) -> Augment:
    """Applies a function to the image as float32 from 0 to 1, clips what comes out, and gives range and dtype back."""

    def augment(key: jax.Array, image: jax.Array) -> jax.Array:
        if image.dtype != jnp.uint8 and not jnp.issubdtype(image.dtype, jnp.floating):
            raise ValueError(
                f'augmentation of pixels needs uint8 from 0 to 255 or floating point from 0 to 1, got {image.dtype}'
            )
        largest = 255.0 if image.dtype == jnp.uint8 else 1.0
        # dm_pix promotes dtypes implicitly, which would fail for users who forbid that in their own code.
        with jax.numpy_dtype_promotion('standard'):
            changed = function(key, image.astype(jnp.float32) / largest)
        changed = largest * jnp.clip(changed, 0.0, 1.0)
        return (jnp.round(changed) if image.dtype == jnp.uint8 else changed).astype(image.dtype)

    return augment


def _check_change(name: str, change: float) -> None:
    if not 0 <= change <= 1:
        raise ValueError(f'{name}: change must be from 0 to 1, got {change}')


def _check_deviation(name: str, deviation: float) -> None:
    if deviation < 0:
        raise ValueError(f'{name}: deviation must not be negative, got {deviation}')
