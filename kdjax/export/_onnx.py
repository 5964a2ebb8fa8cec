"""The student as an ONNX file, by way of jax2onnx; an extra, `pip install 'kdjax[onnx]'`.

What goes through: networks in floating point; `dequantizing(network)`, whose weights are int8 in the file too; and
fake-quantized networks without max pooling, whose roundings become Div, Round, Clip and Mul, not QuantizeLinear. What does not,
as of jax2onnx 0.17: products of integers, which it writes as Gemm and Conv of integers, that ONNX does not have; and max
pooling, unless by `nn.max_pool(x, window_shape=..., strides=...)` with the names of the arguments.
"""

# The converter is an extra, which who checks types need not have.
# pyright: reportMissingImports=false

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.export
import jax.extend.core
import numpy as np

from kdjax.errors import first_line
from kdjax.files import write_whole
from kdjax.networks import Network, dense_logits


def save_onnx(
    path: str | os.PathLike, network: Network, variables: Mapping[str, Any], inputs: Any, *, tolerance: float = 1e-4
) -> int:
    """Writes `network.apply(variables, inputs)` up to the logits as an ONNX model, if onnxruntime computes the same with it.

    Args:
      path: the file, conventionally `*.onnx`; its folder must exist. A file that is there is replaced.
      network: the student.
      variables: its parameters and state, which become part of the file.
      inputs: a batch of real inputs, one array, with which the model is checked; the size of the batch is left open.
      tolerance: how far logits may be from those of jax, for this batch and for its first example alone. Where activations are
        rounded to a grid, a rounding that falls the other way is a step of the grid.

    Returns:
      The size of the file in bytes.

    Raises:
      ImportError: jax2onnx or onnxruntime is not installed.
      ValueError: the network holds what the converter does not know, or onnxruntime computes something else; no file is
        written then.
    """
    try:
        import jax2onnx
        import onnxruntime
    except ImportError as error:
        raise ImportError("save_onnx needs jax2onnx and onnxruntime: pip install 'kdjax[onnx]'") from error
    if not isinstance(inputs, (np.ndarray, jax.Array)) or inputs.ndim == 0:
        raise ValueError(f'save_onnx: inputs must be one array whose first axis is the batch, got {type(inputs).__name__}')

    def forward(inputs: jax.Array) -> jax.Array:
        return dense_logits(network.apply(variables, inputs)[0].logits)

    shapes = jax.export.symbolic_args_specs(inputs, 'batch, ...')
    traced = jax.make_jaxpr(forward)(shapes)
    if len(traced.out_avals) != 1:
        raise ValueError(f'save_onnx: the network must give logits, one array, got {len(traced.out_avals)}')
    # Each by itself, for ranges that are taken from the batch make an example's logits depend on the others.
    batches = [inputs[:1], inputs]
    expected = [np.asarray(jax.jit(forward)(batch)) for batch in batches]

    def convert(program: Callable[[jax.Array], jax.Array]) -> bytes:
        model = jax2onnx.to_onnx(program, [shapes], model_name='student').SerializeToString()
        session = onnxruntime.InferenceSession(model, providers=['CPUExecutionProvider'])
        for inputs, logits in zip(batches, expected, strict=True):
            (result,) = session.run(None, {session.get_inputs()[0].name: np.asarray(inputs)})
            difference = np.max(np.abs(result - logits))
            if not difference <= tolerance:
                raise ValueError(f'the logits of onnxruntime differ by {difference:.2g}, more than {tolerance:g}')
        return model

    # The converter knows some layers only as jax writes them, and some only as Flax does.
    as_traced = lambda inputs: jax.extend.core.jaxpr_as_fun(traced)(inputs)[0]  # noqa: E731
    reasons = []
    for program in (as_traced, forward):
        try:
            model = convert(program)
        except Exception as error:  # whatever the converter raises for what it does not know
            reasons.append(first_line(error))
            continue
        write_whole(path, model)
        return len(model)
    raise ValueError(f'save_onnx: jax2onnx cannot convert this network: {"; ".join(dict.fromkeys(reasons))}')
