"""The student as files: its weights in one, or all that it takes to run it without kdjax in a folder."""

from kdjax.export._artefact import dequantizing, save
from kdjax.export._onnx import save_onnx
from kdjax.export._runtime import Artefact, load
from kdjax.export._weights import load_weights, save_weights

__all__ = [
    'Artefact',
    'dequantizing',
    'load',
    'load_weights',
    'save',
    'save_onnx',
    'save_weights',
]
