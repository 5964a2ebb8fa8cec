"""Files of weights: what is saved comes back bit for bit, takes as few bytes as it should, and damage is noticed."""

import json
import pathlib
import pickle
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from kdjax import networks
from kdjax.export import load_weights, save_weights
from kdjax.quantization import QuantizedArray, dequantize_weights, quantize_weights

is_quantized = lambda leaf: isinstance(leaf, QuantizedArray)  # noqa: E731


def sparse(shape: tuple[int, ...], share: float, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    """Random numbers, that share of which is zero."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 50 + np.copysign(1, rng.standard_normal(shape))
    x.ravel()[rng.permutation(x.size)[: round(share * x.size)]] = 0
    return x.astype(dtype)


def quantized(x: np.ndarray) -> QuantizedArray:
    return quantize_weights({'kernel': jnp.asarray(x)})['kernel']


def assert_round_trip(tree: dict, folder: pathlib.Path) -> dict:
    """Saves and loads; every array must come back with its dtype, its shape and its bytes."""
    file = folder / 'weights.safetensors'
    size = save_weights(file, tree)
    assert size == file.stat().st_size
    assert [path.name for path in folder.iterdir()] == [file.name]
    loaded = load_weights(file)
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    for got, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(tree), strict=True):
        assert isinstance(got, np.ndarray)
        assert got.dtype == wanted.dtype
        assert got.shape == wanted.shape
        assert got.tobytes() == np.asarray(wanted).tobytes()
    return loaded


SPECIAL = np.array([0, -1, np.inf, -np.inf, np.nan, 1e-45, 3e38, 1], np.float32)


@pytest.mark.parametrize('share', [0.0, 0.02, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16', 'int8', 'int32', 'uint8', 'bool'])
def test_arrays_come_back_bit_for_bit_whatever_share_of_them_is_zero(dtype: str, share: float, tmp_path: pathlib.Path) -> None:
    # 77 elements do not fill their last byte of bits.
    array = sparse((7, 11), share).astype('int8').astype(dtype) if dtype == 'uint8' else sparse((7, 11), share, dtype)
    assert_round_trip({'params': {'kernel': array, 'other': sparse((300,), share, dtype)}}, tmp_path)


def test_arrays_on_the_device_infinities_nans_and_subnormals_come_back(tmp_path: pathlib.Path) -> None:
    many_zeros = np.concatenate([SPECIAL, np.zeros(500, np.float32)])
    tree = {
        'a': jnp.asarray(SPECIAL),
        'b': many_zeros,
        'c': jnp.asarray(many_zeros, jnp.bfloat16),
        'd': many_zeros[None, :, None],
    }
    assert_round_trip({'params': tree}, tmp_path)


@pytest.mark.parametrize('share', [0.0, 0.9, 1.0])
def test_quantized_arrays_come_back_with_their_scales(share: float, tmp_path: pathlib.Path) -> None:
    tree = {'params': {'conv': {'kernel': quantized(sparse((3, 3, 8, 16), share)), 'bias': jnp.ones(16)}}}
    loaded = assert_round_trip(tree, tmp_path)
    back = dequantize_weights(loaded)['params']['conv']['kernel']
    np.testing.assert_array_equal(back, tree['params']['conv']['kernel'].dequantize())


@pytest.mark.parametrize('share', [0.0, 0.75, 1.0])
@pytest.mark.parametrize('bits', [2, 3, 4, 5, 7, 8])
def test_integers_of_every_width_come_back(bits: int, share: float, tmp_path: pathlib.Path) -> None:
    """All of them from the smallest to the largest, in numbers that do not fill their last byte; and with zero points."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    values = np.resize(np.arange(low, high + 1), (7, 59)).astype(np.int8)
    values[sparse(values.shape, share) == 0] = 0
    scale, zero_point = np.full((7, 1), 0.5, np.float32), np.full((7, 1), high, np.int8)
    symmetric, affine = QuantizedArray(values, scale, bits=bits), QuantizedArray(values, scale, zero_point, bits=bits)
    one = QuantizedArray(values[:1, :1], scale[:1], bits=bits)
    assert_round_trip({'params': {'symmetric': symmetric, 'affine': affine, 'one': one}}, tmp_path)


def test_integers_with_a_scale_for_every_group_come_back(tmp_path: pathlib.Path) -> None:
    x = jnp.asarray(sparse((64, 6), 0.0))
    tree = quantize_weights({'kernel': x}, bits=4, group_size=32, group_axis=0)
    loaded = assert_round_trip(tree, tmp_path)
    np.testing.assert_array_equal(loaded['kernel'].dequantize(), tree['kernel'].dequantize())


def test_two_integers_of_4_bits_stand_in_a_byte(tmp_path: pathlib.Path) -> None:
    values = np.array([[1, -1, 7], [-8, 0, 3]], np.int8)
    file = tmp_path / 'weights.safetensors'
    save_weights(file, {'kernel': QuantizedArray(values, np.ones((1, 3), np.float32), bits=4)})
    with safetensors.safe_open(file, framework='numpy') as opened:
        np.testing.assert_array_equal(opened.get_tensor('kernel'), [0x1F, 0x78, 0x03])
        assert json.loads(opened.metadata()['bits']) == {'kernel': 4}
        assert json.loads(opened.metadata()['shapes']) == {'kernel': [2, 3]}


@pytest.mark.parametrize('value', [-9, 8, 100])
def test_integers_that_need_more_bits_than_they_say_are_errors(value: int, tmp_path: pathlib.Path) -> None:
    array = QuantizedArray(np.array([0, value], np.int8), np.ones(1, np.float32), bits=4)
    with pytest.raises(ValueError, match='save_weights: kernel holds integers that need more than its 4 bits'):
        save_weights(tmp_path / 'a', {'kernel': array})
    assert not list(tmp_path.iterdir())


def test_empty_arrays_and_deep_names_come_back(tmp_path: pathlib.Path) -> None:
    tree = {'params': {'a b': {'0': {'ä.x-y_z': np.ones((2, 3), np.float32)}}, 'empty': np.zeros((0, 3), np.float32)}}
    assert_round_trip(tree, tmp_path)
    assert_round_trip({'params': {'empty': jnp.zeros((4, 0), jnp.bfloat16)}}, tmp_path)
    assert_round_trip({}, tmp_path)


def test_arrays_that_are_not_contiguous_come_back(tmp_path: pathlib.Path) -> None:
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert_round_trip({'transposed': x.T, 'strided': x[:, ::2], 'reversed': x[::-1], 'fortran': np.asfortranarray(x)}, tmp_path)


def test_scalars_come_back(tmp_path: pathlib.Path) -> None:
    assert_round_trip({'step': np.array(7, np.int32), 'scale': jnp.float32(0.5), 'zero': jnp.float32(0.0)}, tmp_path)


def test_minus_zero_comes_back(tmp_path: pathlib.Path) -> None:
    assert_round_trip({'kernel': np.concatenate([np.array([-0.0, 1.0], np.float32), np.zeros(500, np.float32)])}, tmp_path)


def test_dense_minus_zero_comes_back(tmp_path: pathlib.Path) -> None:
    assert_round_trip({'kernel': np.array([-0.0, 1.0, 2.0], np.float32)}, tmp_path)


# Size.


def test_pruned_and_quantized_files_are_small(tmp_path: pathlib.Path) -> None:
    kernel, pruned = sparse((100, 200), 0.0), sparse((100, 200), 0.9)
    sizes = {
        name: save_weights(tmp_path / name, {'params': {'kernel': tree, 'bias': np.ones(10, np.float32)}})
        for name, tree in {
            'dense': kernel,
            'pruned': pruned,
            'int8': quantized(kernel),
            'both': quantized(pruned),
            'zeros': np.zeros_like(kernel),
        }.items()
    }
    assert sizes['dense'] < kernel.nbytes + 500
    assert sizes['pruned'] < sizes['dense'] / 5
    assert sizes['int8'] < sizes['dense'] * 0.3
    assert sizes['both'] < sizes['int8'] * 0.3
    # One bit for every weight, 4 bytes or 1 for each of the tenth that is left, 4 for a scale; and some header.
    assert sizes['pruned'] < 20_000 / 8 + 2_000 * 4 + 700
    assert sizes['both'] < 20_000 / 8 + 2_000 + 200 * 4 + 700
    assert sizes['zeros'] < 20_000 / 8 + 700


@pytest.mark.parametrize('share', [0.0, 0.01, 0.05, 0.1, 0.2, 0.3])
def test_leaving_zeros_out_never_makes_a_file_larger(share: float, tmp_path: pathlib.Path) -> None:
    """Than safetensors makes it of the same arrays; but for the note that it is kdjax's, and padding."""
    for dtype in (np.float32, np.int8):
        tree = {f'kernel{i}': sparse((8, 4 << i), share, dtype, seed=i) for i in range(6)}
        plain = len(safetensors.numpy.save(tree))
        assert save_weights(tmp_path / 'a', tree) <= plain + 64


# Use.


def test_loaded_weights_apply(tmp_path: pathlib.Path) -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
            return nn.Dense(3)(nn.relu(x))

    network = networks.from_linen(Net())
    x = jnp.asarray(sparse((5, 4), 0.0))
    shapes = jax.eval_shape(network.init, jax.random.key(1), x)
    variables = jax.tree.map(lambda leaf: jnp.asarray(abs(sparse(leaf.shape, 0.0))), shapes)
    apply = jax.jit(lambda variables: network.apply(variables, x)[0].logits)
    loaded = assert_round_trip(variables, tmp_path)
    np.testing.assert_array_equal(apply(loaded), apply(variables))
    small = quantize_weights(variables)
    save_weights(tmp_path / 'small', small)
    loaded = dequantize_weights(load_weights(tmp_path / 'small'))
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    np.testing.assert_array_equal(apply(loaded), apply(dequantize_weights(small)))


def test_the_file_is_a_safetensors_file_without_pickle(tmp_path: pathlib.Path) -> None:
    """Safetensors reads it by itself, and it holds what the table in the module's docstring says."""
    file = tmp_path / 'weights.safetensors'
    kernel = sparse((10, 30), 0.9)
    int8 = quantized(sparse((4, 5), 0.0))
    save_weights(file, {'params': {'kernel': kernel, 'head': int8, 'bias': np.ones(3, np.float32)}})
    with safetensors.safe_open(file, framework='numpy') as opened:
        arrays = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    assert sorted(arrays) == ['params/bias', 'params/head', 'params/head:scale', 'params/kernel', 'params/kernel:mask']
    np.testing.assert_array_equal(arrays['params/kernel'], kernel[kernel != 0])
    bits = np.unpackbits(arrays['params/kernel:mask'], bitorder='big')
    np.testing.assert_array_equal(bits[:300].reshape(10, 30), kernel != 0)
    assert not np.any(bits[300:])
    np.testing.assert_array_equal(arrays['params/head'], int8.values)
    np.testing.assert_array_equal(arrays['params/head:scale'], int8.scale)
    assert metadata['format'] == 'kdjax-weights-1'
    assert json.loads(metadata['shapes']) == {'params/kernel': [10, 30]}
    with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, KeyError, IndexError)):
        pickle.loads(file.read_bytes())


# Damage.


def example() -> dict:
    return {'params': {'kernel': sparse((20, 30), 0.9), 'head': quantized(sparse((5, 4), 0.0)), 'bias': np.ones(3, np.float32)}}


def test_a_truncated_file_is_an_error_wherever_it_ends(tmp_path: pathlib.Path) -> None:
    file = tmp_path / 'weights.safetensors'
    save_weights(file, example())
    whole = file.read_bytes()
    for length in [*range(0, len(whole) - 1, 29), len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r'weights\.safetensors is damaged or no safetensors file'):
            load_weights(file)


def test_a_damaged_header_is_an_error(tmp_path: pathlib.Path) -> None:
    file = tmp_path / 'weights.safetensors'
    save_weights(file, example())
    whole = file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], 'little')

    def rejected(old: bytes, new: bytes) -> None:
        assert whole[:end].count(old) == 1
        assert len(old) == len(new)
        file.write_bytes(whole.replace(old, new, 1))
        with pytest.raises(ValueError, match=r'weights\.safetensors (is damaged|was not written by)'):
            load_weights(file)

    for position in (0, 1, 7, 8):
        flipped = bytearray(whole)
        flipped[position] ^= 0xFF
        file.write_bytes(flipped)
        with pytest.raises(ValueError, match='is damaged or no safetensors file'):
            load_weights(file)
    rejected(b'kdjax-weights-1', b'kdjax-weights-9')
    rejected(b'"format"', b'"formaT"')
    rejected(b'[20,30]', b'[20, 3]')
    rejected(b'params/kernel:mask', b'params/kernel:musk')


def test_a_damaged_name_of_a_sparse_array_is_an_error(tmp_path: pathlib.Path) -> None:
    file = tmp_path / 'weights.safetensors'
    save_weights(file, example())
    file.write_bytes(file.read_bytes().replace(rb'{\"params/kernel\":', rb'{\"params/kernal\":', 1))
    with pytest.raises(ValueError, match='damaged'):
        load_weights(file)


@pytest.mark.parametrize('bits', [b'{"kernel":3}', b'{"kernal":4}', b'{"kernel":9}', b'["kernel:4"]'])
def test_damaged_bits_are_an_error(bits: bytes, tmp_path: pathlib.Path) -> None:
    file = tmp_path / 'weights.safetensors'
    save_weights(file, {'kernel': QuantizedArray(np.ones((3, 5), np.int8), np.ones(1, np.float32), bits=4)})
    old, new = (text.replace(b'"', b'\\"') for text in (b'{"kernel":4}', bits))
    whole = file.read_bytes()
    assert whole.count(old) == 1
    file.write_bytes(whole.replace(old, new))
    with pytest.raises(ValueError, match='damaged'):
        load_weights(file)


@pytest.mark.parametrize('shape', [b'[20,31]', b'[20.30]', b'[99,99]'])
def test_a_damaged_shape_is_an_error(shape: bytes, tmp_path: pathlib.Path) -> None:
    file = tmp_path / 'weights.safetensors'
    save_weights(file, example())
    file.write_bytes(file.read_bytes().replace(b'[20,30]', shape, 1))
    with pytest.raises(ValueError, match='damaged'):
        load_weights(file)


def test_files_of_others_are_an_error_and_a_missing_one_is_missing(tmp_path: pathlib.Path) -> None:
    foreign = tmp_path / 'foreign.safetensors'
    safetensors.numpy.save_file({'weight': np.ones(3, np.float32)}, foreign)
    with pytest.raises(ValueError, match=r'foreign\.safetensors was not written by kdjax\.export: its format is None'):
        load_weights(foreign)
    safetensors.numpy.save_file({'weight': np.ones(3, np.float32)}, foreign, metadata={'format': 'pt'})
    with pytest.raises(ValueError, match="its format is 'pt'"):
        load_weights(foreign)
    foreign.write_bytes(pickle.dumps({'weight': [1, 2, 3] * 100}))
    with pytest.raises(ValueError, match='is damaged or no safetensors file'):
        load_weights(foreign)
    with pytest.raises(FileNotFoundError):
        load_weights(tmp_path / 'missing.safetensors')


def test_a_failed_save_leaves_the_old_file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the tree is refused or the disk is full half way; and the next save is none the worse."""
    file = tmp_path / 'weights.safetensors'
    save_weights(file, example())
    before = file.read_bytes()
    with pytest.raises(ValueError, match='cannot store'):
        save_weights(file, {'params': {'good': np.ones(3), 'bad': [1, 2]}})
    assert file.read_bytes() == before

    write = pathlib.Path.write_bytes

    def half(path: pathlib.Path, content: bytes) -> None:
        write(path, content[:100])
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, 'write_bytes', half)
        with pytest.raises(OSError, match='No space left'):
            save_weights(file, {'params': {'kernel': np.ones((50, 50), np.float32)}})
    assert file.read_bytes() == before
    assert_round_trip({'params': {'kernel': np.ones((50, 50), np.float32)}}, tmp_path)


@pytest.mark.parametrize('name', ['a/b', 'a:b', 'kernel:mask', '/', '', 3, ('a',)])
def test_names_that_would_be_read_otherwise_are_errors(name: Any, tmp_path: pathlib.Path) -> None:
    for tree in ({name: np.ones(3)}, {'params': {name: {'kernel': np.ones(3)}}}):
        with pytest.raises(ValueError, match=r'cannot store the name .*: names are strings without / and :'):
            save_weights(tmp_path / 'a', tree)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('leaf', [None, 'text', [np.ones(3)], object()], ids=['None', 'str', 'list', 'object'])
def test_what_is_no_array_is_an_error_that_says_where(leaf: Any, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=f'cannot store {type(leaf).__name__} at params/kernel: only dictionaries of arrays'):
        save_weights(tmp_path / 'a', {'params': {'kernel': leaf}})
    assert not list(tmp_path.iterdir())
