"""Quantization: integer arithmetic of arrays, the ranges and scales it needs, and trees of weights as integers."""

from kdjax.quantization._arrays import QuantizedArray, dequantize, fake_quantize, integer_range, quantize
from kdjax.quantization._calibrate import calibrate
from kdjax.quantization._fake_quantize_network import fake_quantize_network
from kdjax.quantization._fold_batch_norm import fold_batch_norm
from kdjax.quantization._learned_step import initial_step, learned_step
from kdjax.quantization._quantize_network import quantize_network, quantize_variables
from kdjax.quantization._ranges import (
    Range,
    absmax_range,
    average_range,
    minmax_range,
    moving_average_range,
    mse_range,
    percentile_range,
    union_range,
)
from kdjax.quantization._reports import Site, report, table
from kdjax.quantization._rules import Rule, Rules
from kdjax.quantization._scales import affine_scale, shared_scale, symmetric_scale, symmetric_scale_of_range
from kdjax.quantization._weights import cast_weights, dequantize_weights, quantize_weights

__all__ = [
    'QuantizedArray',
    'Range',
    'Rule',
    'Rules',
    'Site',
    'absmax_range',
    'affine_scale',
    'average_range',
    'calibrate',
    'cast_weights',
    'dequantize',
    'dequantize_weights',
    'fake_quantize',
    'fake_quantize_network',
    'fold_batch_norm',
    'initial_step',
    'integer_range',
    'learned_step',
    'minmax_range',
    'moving_average_range',
    'mse_range',
    'percentile_range',
    'quantize',
    'quantize_network',
    'quantize_variables',
    'quantize_weights',
    'report',
    'shared_scale',
    'symmetric_scale',
    'symmetric_scale_of_range',
    'table',
    'union_range',
]
