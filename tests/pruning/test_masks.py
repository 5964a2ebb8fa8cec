"""Masks with exact counts, over all arrays together and array by array."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdjax import pruning
from kdjax.pruning._masks import keep_largest

SHAPES = {'a': (2, 3), 'b': (5,), 'c': (1, 2, 2), 'd': ()}
SIZE = 16
MANY_TIES = [0.0, 1.0, -1.0, 0.5, -0.5, 1e-45, -1e-45, 3e38, -3e38, np.inf, -np.inf]

checked = settings(derandomize=True, deadline=None, max_examples=25)
any_float = st.floats(width=32, allow_nan=False).map(lambda x: x + 0.0)  # without -0.0
values = st.one_of(
    st.lists(st.sampled_from(MANY_TIES), min_size=SIZE, max_size=SIZE),
    st.lists(st.sampled_from([0.0, 1.0]), min_size=SIZE, max_size=SIZE),
    st.lists(any_float, min_size=SIZE, max_size=SIZE),
)


def split(flat: np.ndarray) -> dict[str, np.ndarray]:
    """Cuts 16 numbers into arrays of four shapes."""
    ends = np.cumsum([int(np.prod(shape)) for shape in SHAPES.values()])
    pieces = np.split(flat, ends[:-1])
    return {path: piece.reshape(shape) for (path, shape), piece in zip(SHAPES.items(), pieces, strict=True)}


def joined(arrays: dict[str, jax.Array]) -> np.ndarray:
    return np.concatenate([np.ravel(array) for array in arrays.values()])


def largest_by_stable_sort(flat: np.ndarray, number: int) -> np.ndarray:
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind='stable')[:number]] = True
    return mask


keep = jax.jit(keep_largest)
traced_global = jax.jit(pruning.global_masks)
traced_layer = jax.jit(pruning.layer_masks)


@checked
@given(values, st.integers(0, SIZE))
def test_largest_are_kept_with_the_exact_count_and_the_first_of_ties(flat: list[float], number: int) -> None:
    flat = np.array(flat, np.float32)
    masks = keep([jnp.asarray(x) for x in split(flat).values()], number)
    assert [mask.shape for mask in masks] == list(SHAPES.values())
    got = np.concatenate([mask.ravel() for mask in masks])
    assert got.dtype == bool
    assert got.sum() == number
    np.testing.assert_array_equal(got, largest_by_stable_sort(flat, number))


def minus_zeros() -> tuple[np.ndarray, np.ndarray]:
    flat = np.array([-0.0, 1.0, 0.0, -0.0, 0.0, -1.0], np.float32)
    return flat, largest_by_stable_sort(flat, 3)


def test_minus_zero_ties_with_zero() -> None:
    flat, wanted = minus_zeros()
    np.testing.assert_array_equal(keep_largest([jnp.asarray(flat)], 3)[0], wanted)


def test_minus_zero_ties_with_zero_under_jit() -> None:
    flat, wanted = minus_zeros()
    np.testing.assert_array_equal(keep([jnp.asarray(flat)], 3)[0], wanted)


@checked
@given(values, st.integers(0, 64))
def test_global_and_layer_masks_prune_the_exact_share(flat: list[float], sixty_fourths: int) -> None:
    """Of all weights together, or of every array; sixty-fourths are exact in float32, so halves round to even."""
    sparsity = sixty_fourths / 64
    scores = split(np.array(flat, np.float32))
    together, each = (traced(scores, sparsity) for traced in (traced_global, traced_layer))
    assert list(together) == list(each) == list(SHAPES)
    assert (~joined(together)).sum() == round(sparsity * SIZE)
    np.testing.assert_array_equal(joined(together), largest_by_stable_sort(joined(scores), SIZE - round(sparsity * SIZE)))
    for path, score in scores.items():
        number = score.size - round(sparsity * score.size)
        np.testing.assert_array_equal(np.ravel(each[path]), largest_by_stable_sort(score.ravel(), number))


def ninety_five() -> dict[str, np.ndarray]:
    """A single array with many ties, and one without elements."""
    scores = np.random.default_rng(0).integers(-5, 5, (19, 5)).astype(np.float32)
    scores[0, :2] = np.inf, -np.inf
    return {'a': scores, 'empty': np.zeros((0, 2), np.float32)}


def test_traced_and_static_sparsity_and_global_and_layer_masks_agree_on_a_single_array() -> None:
    sparsities = (0, 0.28125, 0.5, 1.0)
    static = jax.jit(lambda scores: [pruning.global_masks(scores, sparsity) for sparsity in sparsities])(ninety_five())
    for sparsity, masks in zip(sparsities, static, strict=True):
        number = 95 - round(95 * sparsity)
        np.testing.assert_array_equal(masks['a'].ravel(), largest_by_stable_sort(ninety_five()['a'].ravel(), number))
        for traced in (traced_global, traced_layer):
            jax.tree.map(np.testing.assert_array_equal, traced(ninety_five(), jnp.float32(sparsity)), masks)
    assert np.all(static[0]['a'])
    assert not np.any(static[-1]['a'])


def test_static_sparsity_counts_in_double_precision() -> None:
    """0.3 of 95 is 28.5, and rounds to the even 28; float32's 0.3 is a little more, and rounds to 29."""
    assert (~jax.jit(functools.partial(pruning.layer_masks, sparsity=0.3))(ninety_five())['a']).sum() == 28
    assert (~traced_layer(ninety_five(), jnp.float32(0.3))['a']).sum() == 29


def test_global_masks_prune_the_array_of_small_scores_and_layer_masks_every_one() -> None:
    scores = split(np.arange(16, dtype=np.float32))
    together, each = traced_global(scores, 6 / 16), traced_layer(scores, 0.5)
    assert not np.any(together['a'])
    assert all(np.all(together[path]) for path in 'bcd')
    np.testing.assert_array_equal(each['a'], [[False] * 3, [True] * 3])
    np.testing.assert_array_equal(each['c'], [[[False] * 2, [True] * 2]])


@pytest.mark.parametrize('sparsity', [-0.1, 1.1, float('nan'), 2, -1])
@pytest.mark.parametrize('masks', [pruning.global_masks, pruning.layer_masks])
def test_static_sparsity_out_of_range_is_an_error(masks, sparsity: float) -> None:
    with pytest.raises(ValueError, match=f'sparsity must be between 0 and 1, got {sparsity}'):
        masks({'a': jnp.ones(4)}, sparsity)


def test_magnitude_is_the_absolute_value_in_float32() -> None:
    scores = pruning.magnitude({'a': jnp.array([-2.0, 0.0, -0.0, 3.0], jnp.bfloat16)})
    assert scores['a'].dtype == jnp.float32
    np.testing.assert_array_equal(scores['a'], [2, 0, 0, 3])
    assert not np.signbit(scores['a'][2])


def test_sharded_scores_give_the_masks_of_one_device() -> None:
    """The first of equal scores are kept in the order of the whole arrays, wherever their parts lie."""
    mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    scores = {'a': rng.integers(0, 3, (8, 6)), 'b': rng.integers(0, 3, (16,)), 'c': rng.integers(0, 3, (2, 4, 3))}
    scores = {path: score.astype(np.float32) for path, score in scores.items()}
    specs = {'a': PartitionSpec('x', 'y'), 'b': PartitionSpec(('x', 'y')), 'c': PartitionSpec(None, 'x')}
    sharded = {path: jax.device_put(score, NamedSharding(mesh, specs[path])) for path, score in scores.items()}
    assert all(len(score.sharding.device_set) == 8 for score in sharded.values())
    together, each = traced_global(sharded, 0.625), traced_layer(sharded, 0.625)
    np.testing.assert_array_equal(joined(together), largest_by_stable_sort(joined(scores), 33))
    for path, kept in {'a': 18, 'b': 6, 'c': 9}.items():
        np.testing.assert_array_equal(each[path].ravel(), largest_by_stable_sort(scores[path].ravel(), kept))


SIZES = {'first': (3, 3, 1, 4), 'middle': (3, 3, 4, 16), 'dense': (40, 10), 'scale': (16,)}


def evci_densities(shapes: list[tuple[int, ...]], sparsity: float) -> list[float]:
    """As published: arrays whose density would exceed 1 become dense one after the other, and ε is found anew."""
    dense: set[int] = set()
    while True:
        sparse = [i for i in range(len(shapes)) if i not in dense]
        left = (1 - sparsity) * sum(map(np.prod, shapes)) - sum(np.prod(shapes[i]) for i in dense)
        raw = [np.sum(shape) / np.prod(shape) for shape in shapes]
        epsilon = left / sum(raw[i] * np.prod(shapes[i]) for i in sparse) if sparse else 0.0
        exceeding = {i for i in sparse if raw[i] * epsilon > 1}
        if not exceeding:
            return [1.0 if i in dense else epsilon * raw[i] for i in range(len(shapes))]
        dense |= {max(exceeding, key=raw.__getitem__)}


traced_erk = jax.jit(pruning.erk_masks)


@pytest.mark.parametrize('sparsity', [0.0, 0.125, 0.5, 0.84375, 0.953125, 1.0])
def test_erk_masks_have_the_published_densities_and_the_exact_count(sparsity: float) -> None:
    scores = {path: np.random.default_rng(0).permuted(np.arange(np.prod(s), dtype=np.float32)) for path, s in SIZES.items()}
    scores = {path: score.reshape(SIZES[path]) for path, score in scores.items()}
    masks = traced_erk(scores, sparsity)
    total = sum(score.size for score in scores.values())
    assert sum(mask.sum() for mask in masks.values()) == total - round(sparsity * total)
    for (path, score), density in zip(scores.items(), evci_densities(list(SIZES.values()), sparsity), strict=True):
        kept = int(masks[path].sum())
        np.testing.assert_allclose(kept, density * score.size, atol=1)
        np.testing.assert_array_equal(np.ravel(masks[path]), score.ravel() >= score.size - kept)


def test_more_sparsity_never_leaves_an_array_more_with_erk_masks() -> None:
    """At each of the 43 counts; the largest remainders would break this."""
    scores = {'a': jnp.zeros((2, 2)), 'b': jnp.zeros((5, 3)), 'c': jnp.zeros((4, 6))}
    counts = jax.jit(jax.vmap(lambda s: jnp.stack([jnp.sum(mask) for mask in pruning.erk_masks(scores, s).values()])))
    found = np.asarray(counts(jnp.arange(44, dtype=jnp.float32) / 43))
    np.testing.assert_array_equal(found.sum(1), 43 - np.arange(44))
    assert np.all(np.diff(found, axis=0) <= 0)


def test_erk_masks_reject_a_sparsity_out_of_range() -> None:
    with pytest.raises(ValueError, match='sparsity must be between 0 and 1, got 1\\.5'):
        pruning.erk_masks({'a': jnp.ones(4)}, 1.5)


def test_too_many_entries_to_count_are_an_error() -> None:
    many = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
    with pytest.raises(ValueError, match=r'keep_largest: counts up to 2\*\*31 - 1 entries, got 2147483648'):
        jax.eval_shape(lambda x: keep_largest([x], 1), many)


PATTERNS = {'n_m': pruning.n_m_masks(2, 4), 'block': pruning.block_masks((4, 4))}
EVERYWHERE = {'global': pruning.global_masks, 'erk': pruning.erk_masks, **PATTERNS}


@pytest.mark.parametrize('masks', EVERYWHERE.values(), ids=EVERYWHERE.keys())
def test_sharded_scores_are_not_gathered(masks) -> None:
    """Devices exchange numbers, not arrays."""
    mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(AxisType.Auto,) * 2)
    scores = jax.random.bernoulli(jax.random.key(0), shape=(64, 32)).astype(jnp.float32)
    sharded = jax.device_put(scores, NamedSharding(mesh, PartitionSpec('x', 'y')))
    function = jax.jit(lambda scores: masks({'kernel': scores}, 0.5)['kernel'])
    program = function.lower(sharded).compile().as_text()
    assert not re.search('all-gather|all-to-all|collective-permute|reduce-scatter', program)
    for shapes in re.findall(r'= (.*?) all-reduce', program):
        assert not re.search(r'\[\d', shapes), shapes
    assert function(sharded).sharding.spec == PartitionSpec('x', 'y')
    np.testing.assert_array_equal(function(sharded), function(scores))
