"""Turning, scaling, hiding, colours, blur and noise: against numpy, scipy and colorsys; and what holds for all of them."""

import colorsys
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from kdjax.data import augment

IMAGE = np.random.default_rng(0).integers(0, 256, (6, 5, 3)).astype(np.uint8)
KEYS = jax.random.split(jax.random.key(0), 40)

MAKERS = {
    'rotation': lambda strength: augment.random_rotation(degrees=90.0 * strength),
    'scale': lambda strength: augment.random_scale(change=0.5 * strength),
    'cutout': lambda strength: augment.random_cutout(pixels=int(3 * strength)),
    'brightness': lambda strength: augment.random_brightness(change=0.9 * strength),
    'contrast': lambda strength: augment.random_contrast(change=0.9 * strength),
    'saturation': lambda strength: augment.random_saturation(change=0.9 * strength),
    'blur': lambda strength: augment.random_blur(deviation=2.0 * strength),
    'noise': lambda strength: augment.random_noise(deviation=0.5 * strength),
}
every = pytest.mark.parametrize('name', MAKERS)


@functools.cache
def versions(name: str, strength: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Of the image in uint8 and in float32, 40 versions each, [40, height, width, channels]."""
    function = MAKERS[name](strength)
    images = jnp.asarray(IMAGE), jnp.asarray(IMAGE).astype(jnp.float32) / 255
    many = jax.jit(lambda keys, images: [jax.vmap(function, in_axes=(0, None))(keys, image) for image in images])
    return tuple(np.asarray(image) for image in many(KEYS, images))


@every
def test_nothing_changes_at_strength_zero(name: str) -> None:
    integers, floats = versions(name, 0.0)
    np.testing.assert_array_equal(integers, np.broadcast_to(IMAGE, integers.shape))
    np.testing.assert_allclose(floats, np.broadcast_to(IMAGE / 255, floats.shape), atol=1e-6)


@every
def test_dtype_range_and_both_dtypes_agree(name: str) -> None:
    integers, floats = versions(name)
    assert (integers.dtype, floats.dtype) == (np.uint8, np.float32)
    assert floats.min() >= 0
    assert floats.max() <= 1
    np.testing.assert_allclose(integers, 255 * floats.astype(np.float64), atol=0.5 + 1e-3)


@every
def test_the_key_alone_decides(name: str) -> None:
    """One image alone, outside of jit and vmap, comes out as it does among others; and other keys give other images."""
    integers, _ = versions(name)
    image = jnp.asarray(IMAGE)
    np.testing.assert_allclose(MAKERS[name](1.0)(KEYS[3], image).astype(jnp.int32), integers[3].astype(int), atol=1)
    np.testing.assert_array_equal(image, IMAGE)
    assert len({version.tobytes() for version in integers}) > 10


def matrices(name: str) -> list[np.ndarray]:
    """For each key, the map from positions in the new image to positions in the old one, about the centre."""
    if name == 'scale':
        factors = [float(jax.random.uniform(key, minval=0.5, maxval=1.5)) for key in KEYS[:4]]
        return [np.eye(2) / factor for factor in factors]
    angles = [np.deg2rad(float(jax.random.uniform(key, minval=-90.0, maxval=90.0))) for key in KEYS[:4]]
    return [np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) for angle in angles]


@pytest.mark.parametrize('name', ['rotation', 'scale'])
def test_turned_and_scaled_images_are_those_of_scipy(name: str) -> None:
    _, floats = versions(name)
    centre = np.array([2.5, 2.0])
    for image, matrix in zip(floats, matrices(name), strict=False):
        for channel in range(3):
            wanted = scipy.ndimage.affine_transform(
                IMAGE[..., channel] / 255, matrix, centre - matrix @ centre, order=1, mode='nearest'
            )
            np.testing.assert_allclose(image[..., channel], wanted, atol=1e-5)


def test_cutout_hides_a_rectangle_no_larger_than_the_square() -> None:
    bright = np.maximum(IMAGE, 1)
    hidden = jax.vmap(MAKERS['cutout'](1.0), in_axes=(0, None))(KEYS, jnp.asarray(bright))
    sizes = set()
    for image in np.asarray(hidden):
        zero = image == 0
        assert np.all(zero == zero[..., :1])
        rows, columns = (np.flatnonzero(zero[..., 0].any(axis)) for axis in (1, 0))
        assert np.array_equal(zero[..., 0], np.isin(np.arange(6), rows)[:, None] & np.isin(np.arange(5), columns))
        assert np.all(np.diff(rows) == 1)
        assert np.all(np.diff(columns) == 1)
        np.testing.assert_array_equal(image[~zero], bright[~zero])
        sizes.add((len(rows), len(columns)))
    # The centre may be at the edge, which leaves two of three rows inside, and never less.
    assert sizes == {(2, 2), (2, 3), (3, 2), (3, 3)}


def test_brightness_adds_one_number_and_contrast_keeps_the_means() -> None:
    exact = IMAGE / 255
    for image, key in zip(versions('brightness')[1], KEYS, strict=True):
        change = float(jax.random.uniform(key, (), minval=-0.9, maxval=0.9))
        np.testing.assert_allclose(image, np.clip(exact + change, 0, 1), atol=1e-6)
    means = exact.mean((0, 1))
    for image, key in zip(versions('contrast')[1], KEYS, strict=True):
        factor = float(jax.random.uniform(key, (), minval=0.1, maxval=1.9))
        np.testing.assert_allclose(image, np.clip(means + factor * (exact - means), 0, 1), atol=1e-6)


def test_saturation_is_that_of_colorsys() -> None:
    for image, key in zip(versions('saturation')[1][:4], KEYS, strict=False):
        factor = float(jax.random.uniform(key, (), minval=0.1, maxval=1.9))
        for got, pixel in zip(image.reshape(-1, 3), IMAGE.reshape(-1, 3) / 255, strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            np.testing.assert_allclose(got, colorsys.hsv_to_rgb(hue, min(factor * saturation, 1.0), value), atol=1e-4)


def test_blur_weighs_by_a_gaussian_that_sums_to_one_at_the_edge_too() -> None:
    exact = IMAGE / 255
    for image, key in zip(versions('blur')[1][:4], KEYS, strict=False):
        width = 2 * float(jax.random.uniform(key))
        blurred = exact
        for axis in (0, 1):
            distance = np.subtract.outer(np.arange(IMAGE.shape[axis]), np.arange(IMAGE.shape[axis]))
            weights = np.exp(-0.5 * (distance / width) ** 2)
            weights /= weights.sum(1, keepdims=True)
            blurred = np.tensordot(weights, blurred, axes=(1, axis))
            blurred = np.moveaxis(blurred, 0, axis)
        np.testing.assert_allclose(image, blurred, atol=1e-5)


def test_noise_has_its_deviation_and_no_mean() -> None:
    grey = jnp.full((40, 40, 3), 0.5)
    drawn = np.asarray(augment.random_noise(deviation=0.05)(KEYS[0], grey), np.float64) - 0.5
    assert abs(drawn.mean()) < 5 * 0.05 / np.sqrt(4800)
    np.testing.assert_allclose(drawn.std(), 0.05, rtol=5 / np.sqrt(2 * 4800))


def test_vertical_flip_gives_the_image_or_its_mirror() -> None:
    images = jax.vmap(augment.random_vertical_flip(), in_axes=(0, None))(KEYS, jnp.asarray(IMAGE))
    flipped = np.array([np.array_equal(image, IMAGE[::-1]) for image in images])
    kept = np.array([np.array_equal(image, IMAGE) for image in images])
    assert np.all(flipped ^ kept)
    assert abs(flipped.sum() - 20) < 5 * np.sqrt(40) / 2


def test_all_go_through_a_chain_in_bfloat16() -> None:
    function = augment.chain(*(make(0.2) for make in MAKERS.values()))
    image = jax.jit(function)(KEYS[0], jnp.asarray(IMAGE / 255, jnp.bfloat16))
    assert image.dtype == jnp.bfloat16
    assert np.all(np.isfinite(image.astype(jnp.float32)))


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: augment.random_rotation(degrees=-1), 'random_rotation: degrees must not be negative, got -1'),
        (lambda: augment.random_scale(change=1.0), 'random_scale: change must be from 0 to below 1, got 1.0'),
        (lambda: augment.random_cutout(pixels=-1), 'the number of pixels must not be negative, got -1'),
        (lambda: augment.random_brightness(change=1.5), 'random_brightness: change must be from 0 to 1, got 1.5'),
        (lambda: augment.random_blur(deviation=-1), 'random_blur: deviation must not be negative, got -1'),
        (lambda: augment.random_noise(deviation=0.1)(KEYS[0], jnp.ones((2, 2, 1), jnp.int32)), 'needs uint8 .*got int32'),
        (lambda: augment.random_saturation(change=0.1)(KEYS[0], jnp.ones((2, 2, 1))), r'red, green and blue, got \(2, 2, 1\)'),
    ],
)
def test_what_cannot_be_is_an_error(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
