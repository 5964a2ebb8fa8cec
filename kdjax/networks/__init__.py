"""Networks as pairs of pure functions, made from Flax modules and from each other."""

from kdjax.networks._chunks import map_in_chunks, sum_in_chunks
from kdjax.networks._copy_layers import copy_layers
from kdjax.networks._ensemble import ensemble, ensemble_variables, member_variables
from kdjax.networks._in_parts import in_parts
from kdjax.networks._label_union import label_union
from kdjax.networks._linear_head import linear_head
from kdjax.networks._linear_logits import LinearLogits, dense_logits
from kdjax.networks._linen import from_linen
from kdjax.networks._multitask import multitask
from kdjax.networks._network import Apply, Network, Outputs, Variables
from kdjax.networks._nnx import from_nnx
from kdjax.networks._precision import mixed_precision
from kdjax.networks._preprocess import postprocess, preprocess
from kdjax.networks._rematerialize import rematerialize
from kdjax.networks._taps import tap_jacobian, tap_logits, tap_parameters

__all__ = [
    'Apply',
    'LinearLogits',
    'Network',
    'Outputs',
    'Variables',
    'copy_layers',
    'dense_logits',
    'ensemble',
    'ensemble_variables',
    'from_linen',
    'from_nnx',
    'in_parts',
    'label_union',
    'linear_head',
    'map_in_chunks',
    'member_variables',
    'mixed_precision',
    'multitask',
    'postprocess',
    'preprocess',
    'rematerialize',
    'sum_in_chunks',
    'tap_jacobian',
    'tap_logits',
    'tap_parameters',
]
