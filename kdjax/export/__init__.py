"""The student as files: its weights in one, or all that it takes to run it without kdjax in a folder."""

from kdjax.export.artefact import dequantizing as dequantizing
from kdjax.export.artefact import save as save
from kdjax.export.onnx import save_onnx as save_onnx
from kdjax.export.runtime import Artefact as Artefact
from kdjax.export.runtime import load as load
from kdjax.export.weights import load_weights as load_weights
from kdjax.export.weights import save_weights as save_weights
