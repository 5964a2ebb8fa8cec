"""The student as a folder: it runs without kdjax, is small, is written whole or not at all, and notices damage."""

import functools
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.artefact_checks import CNN, FILES, IMAGES, random_variables
from helpers.token_networks import CASES
from helpers.toy_problem import SILENT

from kdjax import export, models, networks
from kdjax.quantization import quantize_weights


class Normalized(nn.Module):
    """Batch norm has state, which is exported too."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x.reshape(x.shape[0], -1)))
        return nn.Dense(3)(nn.relu(x))


def logits(network: networks.Network, variables: Any, inputs: Any) -> np.ndarray:
    return np.asarray(jax.jit(lambda variables, inputs: network.apply(variables, inputs)[0].logits)(variables, inputs))


# What is computed.


WITHOUT_KDJAX = """
import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('kdjax', 'flax', 'optax'):
            raise ImportError(f'{name} is not installed')


sys.meta_path.insert(0, Blocker())
try:
    import kdjax
except ImportError:
    pass
else:
    raise SystemExit('kdjax could be imported')
sys.path.insert(0, sys.argv[1])
import jax
import numpy as np
import load
for folder in sys.argv[1:]:
    student = load.load(folder)
    inputs = dict(np.load(f'{folder}.npz'))
    inputs = inputs if len(inputs) > 1 else inputs['images']
    for size in (1, 7):
        np.save(f'{folder}-{size}.npy', student(jax.tree.map(lambda x: x[:size], inputs)))
"""

TOKENS = {'ids': np.arange(42, dtype=np.int32).reshape(7, 6) % 11, 'types': np.tile(np.array([0, 1], np.int32), (7, 3))}


def test_it_runs_in_a_process_that_cannot_import_kdjax(saved: pathlib.Path, variables: Any, tmp_path: pathlib.Path) -> None:
    """An int8 network of images, and a network of tokens whose inputs are a dictionary."""
    token_network = CASES['tokens'].network
    token_variables = random_variables(token_network, TOKENS)
    folders = [pathlib.Path(shutil.copytree(saved, tmp_path / 'elsewhere')), tmp_path / 'tokens']
    export.save(folders[1], token_network, token_variables, jax.tree.map(lambda x: x[:3], TOKENS))
    cases = [({'images': IMAGES}, logits(export.dequantizing(CNN), quantize_weights(variables), IMAGES))]
    cases.append((TOKENS, logits(token_network, token_variables, TOKENS)))
    for folder, (inputs, _) in zip(folders, cases, strict=True):
        np.savez(f'{folder}.npz', **inputs)
    arguments = [sys.executable, '-c', WITHOUT_KDJAX, *map(str, folders)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    for folder, (_, expected) in zip(folders, cases, strict=True):
        for size in (1, 7):
            np.testing.assert_allclose(np.load(f'{folder}-{size}.npy'), expected[:size], rtol=0, atol=1e-5)


@pytest.mark.parametrize('size', [1, 7])
def test_it_computes_what_the_network_computes_at_every_size_of_batch(
    size: int, variables: Any, tmp_path: pathlib.Path
) -> None:
    export.save(tmp_path / 'student', CNN, variables, jax.ShapeDtypeStruct((3, 8, 8, 1), jnp.float32))
    student = export.load(tmp_path / 'student')
    got = student(IMAGES[:size])
    assert got.shape == (size, 10)
    np.testing.assert_allclose(got, logits(CNN, variables, IMAGES[:size]), rtol=0, atol=1e-5)


def test_the_statistics_of_batch_norm_are_exported_and_training_is_not(tmp_path: pathlib.Path) -> None:
    network = networks.from_linen(Normalized())
    variables = random_variables(network)
    export.save(tmp_path / 'student', network, variables, IMAGES)
    student = export.load(tmp_path / 'student')
    # One image at a time: statistics of the batch would give other logits.
    one_by_one = np.concatenate([student(IMAGES[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(one_by_one, logits(network, variables, IMAGES)[:3], rtol=0, atol=1e-5)


def test_nnx_networks(tmp_path: pathlib.Path) -> None:
    network, inputs = networks.from_nnx(functools.partial(nnx.Linear, 5, 3)), np.ones((4, 5), np.float32)
    variables = network.init(jax.random.key(0), inputs)
    export.save(tmp_path / 'student', network, variables, inputs)
    np.testing.assert_allclose(export.load(tmp_path / 'student')(inputs), logits(network, variables, inputs), rtol=0, atol=1e-5)


DESCRIBED = {
    'floats': {'x': {'shape': ['batch', 4], 'dtype': 'float32'}, 'gate': {'shape': ['batch', 1], 'dtype': 'float32'}},
    'a pair': [{'shape': ['batch', 3], 'dtype': 'float32'}, {'shape': ['batch', 2], 'dtype': 'float32'}],
}


@pytest.mark.parametrize('name', DESCRIBED)
def test_inputs_of_several_arrays(name: str, tmp_path: pathlib.Path) -> None:
    network, inputs, *_ = CASES[name]
    variables = network.init(jax.random.key(0), inputs)
    export.save(tmp_path / 'student', network, variables, inputs)
    student = export.load(tmp_path / 'student')
    assert student.manifest['inputs'] == DESCRIBED[name]
    for size in (1, 7):
        own = jax.tree.map(lambda x, size=size: np.resize(x, (size, *x.shape[1:])), inputs)
        np.testing.assert_allclose(student(own), logits(network, variables, own), rtol=0, atol=1e-5)
    batch = {'inputs': inputs, 'labels': np.zeros(4, np.int32)}
    with pytest.raises(ValueError, match='same pytree structure'):
        student(batch)
    with pytest.raises(ValueError, match=r"^the network does not take these inputs \(.*\); .* give batch\['inputs'\]"):
        export.save(tmp_path / 'batch', network, variables, batch)
    assert not (tmp_path / 'batch').exists()


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_weights_of_half_precision_stay_so(dtype: str, variables: Any, tmp_path: pathlib.Path) -> None:
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    with jax.numpy_dtype_promotion('standard'):  # the layers multiply them with inputs in float32
        export.save(tmp_path / 'student', CNN, half, IMAGES)
        expected = logits(CNN, half, IMAGES)
    student = export.load(tmp_path / 'student')
    assert {leaf.dtype.name for leaf in student.weights.values()} == {dtype}
    np.testing.assert_allclose(student(IMAGES), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('bits', [4, 8])
def test_weights_stay_integers_up_to_the_program(bits: int, variables: Any, tmp_path: pathlib.Path) -> None:
    small = quantize_weights(variables, bits=bits)
    export.save(tmp_path / 'student', export.dequantizing(CNN), small, IMAGES)
    student = export.load(tmp_path / 'student')
    assert student.weights['params/stage1/conv/kernel'].dtype == jnp.int8
    np.testing.assert_array_equal(
        student.weights['params/stage1/conv/kernel'], small['params']['stage1']['conv']['kernel'].values
    )
    np.testing.assert_allclose(student(IMAGES), logits(export.dequantizing(CNN), small, IMAGES), rtol=0, atol=1e-5)


def test_a_network_that_takes_integers_gets_them(variables: Any, tmp_path: pathlib.Path) -> None:
    """`save` dequantizes nothing by itself."""

    def apply(variables: Any, inputs: Any, *, train: bool = False, rng: Any = None) -> Any:
        kernel = variables['kernel']
        x = jnp.clip(jnp.round(inputs), -127, 127).astype(jnp.int8)
        product = jax.lax.dot_general(x, kernel.values, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
        return networks.Outputs(product.astype(jnp.float32) * kernel.scale), {}

    network = networks.Network(lambda key, inputs: {}, apply)
    small = quantize_weights({'kernel': jnp.asarray(IMAGES[:5, :, 0, 0].T)})
    inputs = np.arange(16, dtype=np.float32).reshape(2, 8)
    export.save(tmp_path / 'student', network, small, inputs)
    program = jax.export.deserialize(bytearray((tmp_path / 'student' / 'model.stablehlo').read_bytes())).mlir_module()
    assert 'tensor<8x5xi8>) -> tensor<?x5xi32>' in program
    np.testing.assert_array_equal(export.load(tmp_path / 'student')(inputs), logits(network, small, inputs))


# What is written.


def test_the_manifest_says_what_there_is(saved: pathlib.Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == FILES
    manifest = json.loads((saved / 'manifest.json').read_text(encoding='utf-8'))
    assert manifest['format'] == 'kdjax-artefact-1'
    assert manifest['jax'] == jax.__version__
    assert manifest['platforms'] == ['cpu', 'cuda']
    assert manifest['inputs'] == {'shape': ['batch', 8, 8, 1], 'dtype': 'float32'}
    assert manifest['outputs'] == {'shape': ['batch', 10], 'dtype': 'float32'}
    assert manifest['metadata'] == {'classes': ['ä', 'b']}
    for name in ('model.stablehlo', 'weights.safetensors', 'load.py'):
        content = (saved / name).read_bytes()
        assert manifest['files'][name] == {'bytes': len(content), 'sha256': hashlib.sha256(content).hexdigest()}


def test_the_program_takes_the_weights_in_the_order_of_the_manifest(tmp_path: pathlib.Path) -> None:
    """All of them, those that it does not use too, so that a runtime without jax can pass them one by one."""

    def apply(variables: Any, inputs: Any, *, train: bool = False, rng: Any = None) -> Any:
        return networks.Outputs(inputs @ variables['b'] + variables['a']), {}

    weights = {'unused': jnp.ones(6), 'b': jnp.ones((5, 3)), 'a': jnp.ones((1, 3))}
    export.save(
        tmp_path / 'student', networks.Network(lambda key, inputs: {}, apply), weights, jnp.ones((2, 5)), platforms='cpu'
    )
    student = export.load(tmp_path / 'student')
    assert student.manifest['weights'] == ['a', 'b', 'unused']
    program = jax.export.deserialize(bytearray((tmp_path / 'student' / 'model.stablehlo').read_bytes()))
    main = next(line for line in program.mlir_module().splitlines() if '@main' in line)
    shapes = [main.index(f'tensor<{shape}xf32>') for shape in ('1x3', '5x3', '6', '?x5')]
    assert shapes == sorted(shapes)


def test_it_is_lowered_for_platforms_that_are_not_here(saved: pathlib.Path, variables: Any, tmp_path: pathlib.Path) -> None:
    program = jax.export.deserialize(bytearray((saved / 'model.stablehlo').read_bytes()))
    assert program.platforms == ('cpu', 'cuda')
    export.save(tmp_path / 'elsewhere', CNN, variables, IMAGES, platforms=('cuda', 'tpu'))
    student = export.load(tmp_path / 'elsewhere')
    assert student.manifest['platforms'] == ['cuda', 'tpu']
    with pytest.raises(ValueError, match=r"exported for platforms '\('cuda', 'tpu'\)' but it is used on '\('cpu',\)'"):
        student(IMAGES)


def test_the_weights_are_no_part_of_the_program(saved: pathlib.Path, tmp_path: pathlib.Path) -> None:
    network = networks.from_linen(models.CNN((8, 16), (512,)))
    export.save(tmp_path / 'wide', network, random_variables(network), IMAGES)
    assert (tmp_path / 'wide' / 'weights.safetensors').stat().st_size > 140_000
    assert (tmp_path / 'wide' / 'model.stablehlo').stat().st_size < 12_000


def largest_quarter(x: jax.Array) -> jax.Array:
    return jnp.where(abs(x) >= jnp.quantile(abs(x), 0.75), x, 0) if x.ndim > 1 else x


def test_the_program_says_nothing_of_this_machine_and_equal_networks_give_equal_ones(
    saved: pathlib.Path, variables: Any, tmp_path: pathlib.Path
) -> None:
    program = (saved / 'model.stablehlo').read_bytes()
    assert b'.py' not in program
    assert str(pathlib.Path(export.__file__).parent).encode() not in program
    frames = jax.config.jax_traceback_in_locations_limit
    same = lambda: export.save(tmp_path / 'student', export.dequantizing(CNN), quantize_weights(variables), IMAGES)  # noqa: E731
    same()
    assert (tmp_path / 'student' / 'model.stablehlo').read_bytes() == program
    assert jax.config.jax_traceback_in_locations_limit == frames


def test_pruned_is_smaller_than_int8_is_smaller_than_float(tmp_path: pathlib.Path) -> None:
    network = networks.from_linen(models.CNN((8, 16), (512,)))
    dense = random_variables(network)
    pruned = jax.tree.map(largest_quarter, dense)
    trees = {
        'float': (network, dense),
        'int8': (export.dequantizing(network), quantize_weights(dense)),
        'pruned int8': (export.dequantizing(network), quantize_weights(pruned)),
        'pruned int4': (export.dequantizing(network), quantize_weights(pruned, bits=4)),
    }
    sizes = {name: export.save(tmp_path / name, *tree, IMAGES) for name, tree in trees.items()}
    for name, size in sizes.items():
        assert size == sum(path.stat().st_size for path in (tmp_path / name).iterdir())
    assert sizes['float'] > sizes['int8'] > sizes['pruned int8'] > sizes['pruned int4']
    weights = {name: (tmp_path / name / 'weights.safetensors').stat().st_size for name in trees}
    kernels, channels = 9 * 8 + 9 * 8 * 16 + 2 * 2 * 16 * 512 + 512 * 10, 8 + 16 + 512 + 10
    biases, scales, header = 4 * channels, 4 * channels, 2_000
    assert weights['float'] < 4 * kernels + biases + header
    assert weights['int8'] < kernels + biases + scales + header
    # One bit for every weight; and 8, or 4, for a quarter of them.
    assert weights['pruned int8'] < kernels / 8 + kernels / 4 + biases + scales + header
    assert weights['pruned int4'] < kernels / 8 + kernels / 8 + biases + scales + header


# Whole or not at all.


def test_an_artefact_is_replaced_and_nothing_is_left_beside_it(variables: Any, copied: pathlib.Path) -> None:
    changed = jax.tree.map(lambda leaf: leaf + 1, variables)
    (copied / '__pycache__').mkdir()  # as Python does where load.py was imported
    export.save(copied, CNN, changed, IMAGES)
    np.testing.assert_allclose(export.load(copied)(IMAGES), logits(CNN, changed, IMAGES), rtol=1e-5)
    assert [path.name for path in copied.parent.iterdir()] == ['student']


def test_missing_folders_are_made_and_an_empty_one_is_taken(variables: Any, tmp_path: pathlib.Path) -> None:
    (tmp_path / 'empty').mkdir()
    for folder in (tmp_path / 'empty', tmp_path / 'a' / 'b'):
        export.save(folder, CNN, variables, IMAGES)
        assert sorted(path.name for path in folder.iterdir()) == FILES


def test_what_is_no_artefact_is_not_overwritten(variables: Any, copied: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / 'file').write_text('mine')
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder' / 'thesis.tex').write_text('mine')
    (copied / 'notes.txt').write_text('mine')
    for folder in (tmp_path / 'file', tmp_path / 'folder', copied):
        with pytest.raises(
            ValueError, match='holds something else than an artefact, and is left as it is: choose another folder'
        ):
            export.save(folder, CNN, variables, IMAGES)
    assert (tmp_path / 'file').read_text() == 'mine'
    assert (tmp_path / 'folder' / 'thesis.tex').read_text() == 'mine'
    assert sorted(path.name for path in copied.iterdir()) == sorted([*FILES, 'notes.txt'])


@pytest.mark.parametrize('failing', ['write_bytes', 'write_text', 'rename'])
def test_a_full_disk_leaves_the_old_artefact(
    failing: str, variables: Any, copied: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    works = getattr(pathlib.Path, failing)

    def fails(path: pathlib.Path, *arguments: Any, **keywords: Any) -> Any:
        if failing == 'rename' and path.name != 'new':
            return works(path, *arguments, **keywords)
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, failing, fails)
        with pytest.raises(OSError, match='No space left'):
            export.save(copied, CNN, variables, IMAGES)
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before
    assert [path.name for path in copied.parent.iterdir()] == ['student']


# Mistakes.


def test_inputs_that_do_not_fit_are_errors(saved: pathlib.Path) -> None:
    student = export.load(saved)
    for inputs in (IMAGES[:, :7], IMAGES[0], IMAGES.astype(np.int32), {'image': IMAGES}):
        with pytest.raises(ValueError, match=r'args\[1\]'):
            student(inputs)


def test_networks_that_do_not_fit_are_errors(variables: Any, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r'save: the network does not take QuantizedArrays: pass dequantizing\(network\)'):
        export.save(tmp_path / 'student', CNN, quantize_weights(variables), IMAGES)
    with pytest.raises(ValueError, match='save: the network must give logits, one array, got 0'):
        export.save(tmp_path / 'student', SILENT, {}, IMAGES)
    with pytest.raises(ValueError, match='cannot store str at params/kernel'):
        export.save(tmp_path / 'student', CNN, {'params': {'kernel': 'text'}}, IMAGES)
    with pytest.raises(ValueError, match='save: every array of inputs must have the batch as its first axis'):
        export.save(tmp_path / 'student', CNN, variables, np.float32(1))
    assert not list(tmp_path.iterdir())


def test_arguments_that_mean_nothing_are_errors(variables: Any, tmp_path: pathlib.Path) -> None:
    for platforms in ('gpu', ('cpu', 'gpu')):
        with pytest.raises(ValueError, match="save: platforms must be some of cpu, cuda, rocm, tpu, got 'gpu'"):
            export.save(tmp_path / 'student', CNN, variables, IMAGES, platforms=platforms)
    with pytest.raises(ValueError, match=r"save: platforms must be some of .* got 'none'"):
        export.save(tmp_path / 'student', CNN, variables, IMAGES, platforms=())
    for metadata in ({'classes': {1, 2}}, {'accuracy': float('nan')}, {'array': IMAGES}):
        with pytest.raises(ValueError, match='save: metadata must be what JSON can hold'):
            export.save(tmp_path / 'student', CNN, variables, IMAGES, metadata=metadata)
    assert not list(tmp_path.iterdir())
