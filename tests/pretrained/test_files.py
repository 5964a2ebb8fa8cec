"""Every format gives the same arrays, and whatever is wrong with a file is one line."""

import json
import sys

import ml_dtypes
import numpy as np
import pytest
from helpers.pretrained_files import random, write_safetensors

from kdjax.pretrained import read_state_dict

ARRAYS = {
    'a': random(2, 3),
    'b': random(5).astype(ml_dtypes.bfloat16),
    'c': np.arange(3),
    'd': random(4).astype(np.float16),
    'e': np.array(2.5),
}


def check(found, arrays=ARRAYS):
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].shape == array.shape
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(found[name]), array)


def write_shards(folder):
    shards = {'model-1.safetensors': ['a', 'b'], 'model-2.safetensors': ['c', 'd', 'e']}
    for file, names in shards.items():
        write_safetensors(folder / file, {name: ARRAYS[name] for name in names})
    index = {'metadata': {}, 'weight_map': {name: file for file, names in shards.items() for name in names}}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    return index


def test_safetensors_are_mapped(tmp_path):
    write_safetensors(tmp_path / 'model.safetensors', ARRAYS)
    check(read_state_dict(tmp_path / 'model.safetensors'))
    found = read_state_dict(str(tmp_path))
    check(found)
    assert not any(array.flags.owndata or array.flags.writeable for array in found.values())


def test_shards_are_one(tmp_path):
    write_shards(tmp_path)
    check(read_state_dict(tmp_path))


def test_npz_is_read_an_array_at_a_time(tmp_path):
    plain = {name: array for name, array in ARRAYS.items() if array.dtype != ml_dtypes.bfloat16}
    np.savez(tmp_path / 'w.npz', **plain)
    check(read_state_dict(tmp_path / 'w.npz'), plain)
    np.savez(tmp_path / 'o.npz', x=np.array([{}], object))
    with pytest.raises(ValueError, match=r'o\.npz is damaged or no file of numpy.savez: x.npy holds Python objects, which are'):
        read_state_dict(tmp_path / 'o.npz')


def test_state_dicts_of_torch(tmp_path):
    torch = pytest.importorskip('torch', reason='torch is no dependency')
    plain = {name: torch.from_numpy(array.copy()) for name, array in ARRAYS.items() if name != 'b'}
    torch.save(plain | {'b': torch.tensor(ARRAYS['b'].astype(np.float32)).bfloat16()}, tmp_path / 'w.pt')
    check(read_state_dict(tmp_path / 'w.pt'))
    torch.save({'x': print}, tmp_path / 'code.pt')
    with pytest.raises(ValueError, match=r'^\S+code\.pt is no file of weights alone that torch can map: [^\n]+$'):
        read_state_dict(tmp_path / 'code.pt')
    torch.save({'model': plain}, tmp_path / 'nested.bin')
    with pytest.raises(ValueError, match=r'must hold a state_dict, tensors by their names, and nothing beside$'):
        read_state_dict(tmp_path / 'nested.bin')


@pytest.mark.parametrize('module, file, extra', [('torch', 'w.bin', 'torch'), ('gguf', 'w.gguf', r"'kdjax\[pretrained\]'")])
def test_what_is_not_installed_is_named(tmp_path, monkeypatch, module, file, extra):
    (tmp_path / file).write_bytes(b'')
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'needs {module}, which is not installed: pip install {extra}'):
        read_state_dict(tmp_path / file)


@pytest.mark.parametrize('kept', [4, 40, -1])
def test_truncated_files(tmp_path, kept):
    path = tmp_path / 'model.safetensors'
    write_safetensors(path, ARRAYS)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r'^\S+model\.safetensors is damaged or no safetensors file: [^\n]+$'):
        read_state_dict(path)
    np.savez(tmp_path / 'w.npz', a=ARRAYS['a'])
    (tmp_path / 'w.npz').write_bytes((tmp_path / 'w.npz').read_bytes()[:kept])
    with pytest.raises(ValueError, match=r'^\S+w\.npz is damaged or no file of numpy.savez: [^\n]+$'):
        read_state_dict(tmp_path / 'w.npz')


def test_dtypes_that_numpy_lacks_are_named(tmp_path):
    write_safetensors(tmp_path / 'w.safetensors', {'x': np.zeros(4, np.int64)}, {'int64': 'C64'})
    with pytest.raises(ValueError, match=r'^\S+w.safetensors has arrays of C64; known are BOOL, '):
        read_state_dict(tmp_path / 'w.safetensors')


def test_shards_that_do_not_fit_their_index(tmp_path):
    index = write_shards(tmp_path)
    file = tmp_path / 'model.safetensors.index.json'
    index['weight_map']['f'] = 'model-2.safetensors'
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r'model-2.safetensors and \S+ disagree on f: they are not of one save$'):
        read_state_dict(tmp_path)
    index['weight_map']['f'] = '../model-3.safetensors'
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r'lists files that are not beside it: \.\./model-3\.safetensors$'):
        read_state_dict(tmp_path)
    (tmp_path / 'model-1.safetensors').unlink()
    with pytest.raises(
        ValueError, match=r'lists files that are not beside it: \.\./model-3\.safetensors, model-1\.safetensors$'
    ):
        read_state_dict(file)
    file.write_text('[1]')
    with pytest.raises(ValueError, match=r'is damaged or no index of weights: it must be JSON with a weight_map$'):
        read_state_dict(file)


def test_what_is_not_there_or_of_no_known_format(tmp_path):
    (tmp_path / 'notes.txt').write_text('')
    with pytest.raises(
        ValueError, match=r'has neither model.safetensors nor model.safetensors.index.json; there is: notes.txt$'
    ):
        read_state_dict(tmp_path)
    with pytest.raises(ValueError, match=r'notes.txt must be one of .safetensors, .json, .gguf, .npz, .bin, .pt, .pth, or a'):
        read_state_dict(tmp_path / 'notes.txt')
    with pytest.raises(ValueError, match=r'^there is no \S+w.npz$'):
        read_state_dict(tmp_path / 'w.npz')
    write_shards(tmp_path)
    write_safetensors(tmp_path / 'model.safetensors', ARRAYS)
    with pytest.raises(ValueError, match=r'has both model.safetensors and model.safetensors.index.json: name the file'):
        read_state_dict(tmp_path)
