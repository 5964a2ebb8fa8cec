"""Artefacts that were changed, truncated or swapped are refused in one line."""

import hashlib
import json
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import pytest
from helpers.artefact_checks import FILES

from kdjax import export
from kdjax.quantization import quantize_weights


def write_manifest(folder: pathlib.Path, **changes: Any) -> None:
    """Changes a manifest as someone would who knows how its checksum is made."""
    manifest = json.loads((folder / 'manifest.json').read_bytes()) | changes
    del manifest['sha256']
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / 'manifest.json').write_text(json.dumps(manifest | {'sha256': digest}))


def replace_file(folder: pathlib.Path, name: str, content: bytes) -> None:
    """Replaces a file together with its checksum."""
    (folder / name).write_bytes(content)
    files = json.loads((folder / 'manifest.json').read_bytes())['files']
    write_manifest(folder, files=files | {name: {'bytes': len(content), 'sha256': hashlib.sha256(content).hexdigest()}})


def assert_refused(folder: pathlib.Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        export.load(folder)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['load.py', 'model.stablehlo', 'weights.safetensors'])
@pytest.mark.parametrize('position', [0, 0.5, -1])
def test_one_changed_bit_is_refused(name: str, position: float, copied: pathlib.Path) -> None:
    content = bytearray((copied / name).read_bytes())
    content[int(position * len(content)) if position >= 0 else -1] ^= 1
    (copied / name).write_bytes(content)
    assert_refused(copied, rf'load: .*{name} is damaged or was changed')


@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('length', [0, 100, -1])
def test_truncated_files_are_refused(name: str, length: int, copied: pathlib.Path) -> None:
    (copied / name).write_bytes((copied / name).read_bytes().rstrip(b'\n')[:length])
    assert_refused(copied, rf'load: .*{name} is damaged')


@pytest.mark.parametrize('name', FILES)
def test_missing_files_are_refused(name: str, copied: pathlib.Path) -> None:
    (copied / name).unlink()
    assert_refused(copied, rf'load: .*student (has no|is no artefact: it has no) {name}')


def test_folders_that_are_none_are_refused(tmp_path: pathlib.Path) -> None:
    assert_refused(tmp_path, 'is no artefact: it has no manifest.json')
    assert_refused(tmp_path / 'missing', 'is no artefact: it has no manifest.json')


@pytest.mark.parametrize('content', [b'', b'[]', b'3', b'null', b'{"format": ', b'\xff\xfe\x00', pickle.dumps({'format': 1})])
def test_manifests_that_are_none_are_refused(content: bytes, copied: pathlib.Path) -> None:
    (copied / 'manifest.json').write_bytes(content)
    assert_refused(copied, r'load: .*manifest\.json is damaged: it is no JSON object')


def test_a_changed_manifest_is_refused(copied: pathlib.Path) -> None:
    text = (copied / 'manifest.json').read_text(encoding='utf-8')
    for old, new in [
        ('"b"', '"c"'),
        ('"batch"', '3'),
        ('"cuda"', '"tpu"'),
        ('"sha256": "', '"sha256": "0'),
        ('float32', 'int32'),
    ]:
        assert old in text
        (copied / 'manifest.json').write_text(text.replace(old, new, 1), encoding='utf-8')
        assert_refused(copied, r'load: .*manifest\.json is damaged or was changed')
    # Only what it says counts, not how it is written.
    (copied / 'manifest.json').write_text(json.dumps(json.loads(text), indent=7, sort_keys=True))
    export.load(copied)


def test_another_version_is_refused(copied: pathlib.Path) -> None:
    write_manifest(copied, format='kdjax-artefact-2')
    assert_refused(copied, r"is of the format 'kdjax-artefact-2', and this reads 'kdjax-artefact-1': use a matching kdjax")


def test_a_manifest_of_other_files_is_refused(copied: pathlib.Path) -> None:
    """Such as one of a file outside of the folder."""
    files = json.loads((copied / 'manifest.json').read_bytes())['files']
    write_manifest(copied, files=files | {'../student/load.py': files['load.py']})
    assert_refused(copied, r'manifest\.json is damaged or was changed')


@pytest.mark.parametrize(
    'damage',
    [lambda content: b'', lambda content: content[: len(content) // 2], lambda content: pickle.dumps([1, 2, 3] * 100)],
    ids=['empty', 'half', 'pickle'],
)
def test_a_damaged_program_with_a_right_checksum_is_refused(damage: Callable[[bytes], bytes], copied: pathlib.Path) -> None:
    replace_file(copied, 'model.stablehlo', damage((copied / 'model.stablehlo').read_bytes()))
    assert_refused(copied, r'model\.stablehlo, written by jax \S+, cannot be read by jax ')


def test_weights_of_another_network_are_refused(variables: Any, copied: pathlib.Path, tmp_path: pathlib.Path) -> None:
    fewer = {'params': {name: layer for name, layer in variables['params'].items() if name != 'head'}}
    other_shapes = jax.tree.map(lambda leaf: leaf[..., :1], quantize_weights(variables))
    for tree in (fewer, other_shapes, variables):
        export.save_weights(tmp_path / 'other.safetensors', tree)
        replace_file(copied, 'weights.safetensors', (tmp_path / 'other.safetensors').read_bytes())
        assert_refused(copied, r'is damaged: its \d+ weights are not the 12 of the program')
