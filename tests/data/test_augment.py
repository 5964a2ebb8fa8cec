"""Augmentation: what comes out is a shifted or mirrored copy of what goes in, decided by the key alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.data import augment, channel_statistics, normalize

IMAGE = np.random.default_rng(0).integers(1, 256, (6, 5, 3)).astype(np.uint8)
KEYS = jax.random.split(jax.random.key(0), 200)


@functools.cache
def many(function: augment.Augment) -> np.ndarray:
    """Of one image, 200 versions: [200, height, width, channels]."""
    return np.asarray(jax.jit(jax.vmap(function, in_axes=(0, None)))(KEYS, jnp.asarray(IMAGE)))


def slices(padded: np.ndarray) -> dict[tuple[int, int], bytes]:
    """Every cut of the image's size out of a padded image, by offset."""
    height, width = IMAGE.shape[:2]
    rows, columns = padded.shape[0] - height + 1, padded.shape[1] - width + 1
    return {(i, j): padded[i : i + height, j : j + width].tobytes() for i in range(rows) for j in range(columns)}


AUGMENTS = {
    'crop': augment.random_crop(padding=2),
    'shift': augment.random_shift(pixels=2),
    'flip': augment.random_flip(),
    'chain': augment.chain(augment.random_crop(padding=1), augment.random_flip()),
}
every = pytest.mark.parametrize('function', AUGMENTS.values(), ids=AUGMENTS)


@pytest.mark.parametrize('name, mode', [('crop', 'constant'), ('shift', 'edge')])
def test_crops_and_shifts_are_slices_of_the_padded_image_at_every_offset(name: str, mode: str) -> None:
    offsets = {cut: offset for offset, cut in slices(np.pad(IMAGE, ((2, 2), (2, 2), (0, 0)), mode=mode)).items()}
    assert len(offsets) == 25
    drawn = [offsets[image.tobytes()] for image in many(AUGMENTS[name])]
    counts = np.zeros((5, 5), int)
    np.add.at(counts, tuple(np.array(drawn).T), 1)
    # Uniform: with 200 draws each of the 25 comes 8 times, give or take 2.8.
    assert counts.min() >= 1
    assert counts.max() <= 8 + 5 * 2.8


def test_flip_gives_the_image_or_its_mirror_equally_often() -> None:
    mirrored = IMAGE[:, ::-1]
    versions = many(AUGMENTS['flip'])
    flipped = np.array([np.array_equal(image, mirrored) for image in versions])
    kept = np.array([np.array_equal(image, IMAGE) for image in versions])
    assert np.all(flipped ^ kept)
    assert abs(flipped.sum() - 100) < 5 * np.sqrt(200) / 2


def test_chain_applies_one_after_the_other_with_keys_of_their_own() -> None:
    both = many(AUGMENTS['chain'])
    offsets = {cut: (offset, False) for offset, cut in slices(np.pad(IMAGE, ((1, 1), (1, 1), (0, 0)))).items()}
    offsets |= {
        np.frombuffer(cut, np.uint8).reshape(IMAGE.shape)[:, ::-1].tobytes(): (offset, True)
        for cut, (offset, _) in offsets.items()
    }
    drawn = [offsets[image.tobytes()] for image in both]
    # Every offset comes mirrored and not.
    assert {flipped for offset, flipped in drawn if offset == drawn[0][0]} == {False, True}
    keys = []
    record = lambda key, image: keys.append(tuple(jax.random.key_data(key).tolist())) or image  # noqa: E731
    augment.chain(record, record, record)(KEYS[0], jnp.asarray(IMAGE))
    assert len(set(keys)) == 3
    # Order matters: a mark that is set first is seen by what comes second.
    mark = lambda key, image: image.at[0, 0].set(0)  # noqa: E731
    double = lambda key, image: image * 2  # noqa: E731
    ones = jnp.ones((2, 2, 1), jnp.uint8)
    np.testing.assert_array_equal(augment.chain(mark, double)(KEYS[0], ones).ravel(), [0, 2, 2, 2])


def test_an_empty_chain_changes_nothing() -> None:
    np.testing.assert_array_equal(augment.chain()(KEYS[0], jnp.asarray(IMAGE)), IMAGE)


@every
def test_augmentation_is_a_pure_function_of_the_key(function: augment.Augment) -> None:
    image = jnp.asarray(IMAGE)
    one = function(KEYS[0], image)
    assert one.dtype == jnp.uint8
    assert one.shape == IMAGE.shape
    np.testing.assert_array_equal(function(KEYS[0], image), one)
    np.testing.assert_array_equal(image, IMAGE)
    versions = many(function)
    np.testing.assert_array_equal(versions[0], one)
    assert len({version.tobytes() for version in versions}) > 1


def test_batches_of_images_each_have_a_key() -> None:
    function = AUGMENTS['chain']
    images = np.stack([IMAGE, 255 - IMAGE, IMAGE // 2])
    together = jax.jit(jax.vmap(function))(KEYS[:3], images)
    for i in range(3):
        np.testing.assert_array_equal(together[i], function(KEYS[i], jnp.asarray(images[i])))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int32'])
def test_any_dtype_is_kept(dtype: str) -> None:
    function = AUGMENTS['chain']
    image = jnp.asarray(IMAGE).astype(dtype)
    got = function(KEYS[1], image)
    assert got.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(got.astype(jnp.uint8), function(KEYS[1], jnp.asarray(IMAGE)))


def test_without_padding_nothing_moves_and_negative_padding_is_an_error() -> None:
    for make in (lambda n: augment.random_crop(padding=n), lambda n: augment.random_shift(pixels=n)):
        np.testing.assert_array_equal(make(0)(KEYS[0], jnp.asarray(IMAGE)), IMAGE)
        with pytest.raises(ValueError, match='the number of pixels must not be negative, got -1'):
            make(-1)


@pytest.mark.parametrize('mean, deviation', [(0.5, 0.25), ((0.1, 0.2, 0.3), (0.5, 0.25, 2.0)), ((0.1, 0.2, 0.3), 1.0)])
def test_normalize_is_numpys_for_images_and_batches(mean, deviation) -> None:
    function = normalize(mean, deviation)
    wanted = (IMAGE.astype(np.float64) / 255 - np.array(mean)) / np.array(deviation)
    for images in (jnp.asarray(IMAGE), jnp.asarray(IMAGE)[None, None]):
        got = jax.jit(function)(images)
        assert got.dtype == jnp.float32
        assert got.shape == images.shape
        np.testing.assert_allclose(np.squeeze(got), wanted, rtol=1e-5, atol=1e-6)


def test_normalize_undoes_the_mean_and_the_deviation_of_the_pixels() -> None:
    pixels = IMAGE.astype(np.float64) / 255
    function = normalize(tuple(pixels.mean((0, 1))), tuple(pixels.std((0, 1))))
    got = np.asarray(function(jnp.asarray(IMAGE)), np.float64)
    np.testing.assert_allclose(got.mean((0, 1)), 0, atol=1e-6)
    np.testing.assert_allclose(got.std((0, 1)), 1, rtol=1e-6)


def test_augmentation_runs_inside_scan_with_keys_made_there() -> None:
    """As in training: the key is made of the epoch and the example's index, and what comes out can be computed again."""

    def epoch(carry: None, number: jax.Array) -> tuple[None, jax.Array]:
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(KEYS[0], number), i))(jnp.arange(2))
        return carry, jax.vmap(AUGMENTS['chain'], in_axes=(0, None))(keys, jnp.asarray(IMAGE))

    _, images = jax.jit(lambda: jax.lax.scan(epoch, None, jnp.arange(3)))()
    key = jax.random.fold_in(jax.random.fold_in(KEYS[0], 2), 1)
    np.testing.assert_array_equal(images[2, 1], AUGMENTS['chain'](key, jnp.asarray(IMAGE)))


def test_channel_statistics_of_many_pixels_are_exact() -> None:
    """Summed in float32 along the first axes, this many pixels give a mean of 0.36."""
    images = np.broadcast_to(np.array([0, 255], np.uint8)[:, None, None, None], (2, 5_000, 4_000, 1))
    mean, deviation = channel_statistics(images)
    np.testing.assert_allclose([*mean, *deviation], 0.5, rtol=1e-9)
