"""ONNX is an extra: what is said where it is not installed. It checks each conversion by itself where it is."""

import pathlib
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest

from kdjax import export, networks


@pytest.mark.parametrize('missing', ['jax2onnx', 'onnxruntime'])
def test_without_the_extra_one_line_says_what_to_install(
    missing: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = networks.from_linen(nn.Dense(3))
    inputs = np.ones((2, 5), np.float32)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"^save_onnx needs jax2onnx and onnxruntime: pip install 'kdjax\[onnx\]'$"):
        export.save_onnx(tmp_path / 'student.onnx', network, network.init(jax.random.key(0), inputs), inputs)
    assert not list(tmp_path.iterdir())
