"""Networks as pairs of pure functions, made from Flax modules and from each other."""

from kdjax.networks._computation import mixed_precision, rematerialize
from kdjax.networks._layers import copy_layers
from kdjax.networks._linen import from_linen
from kdjax.networks._members import member_variables, tap_logits
from kdjax.networks._network import Apply, Network, Outputs, Variables
from kdjax.networks._nnx import from_nnx
from kdjax.networks._parts import in_parts
from kdjax.networks._tasks import multitask
from kdjax.networks._transformations import ensemble, ensemble_variables, postprocess, preprocess, tap_jacobian, tap_parameters
from kdjax.networks._unions import label_union

__all__ = [
    'Apply',
    'Network',
    'Outputs',
    'Variables',
    'copy_layers',
    'ensemble',
    'ensemble_variables',
    'from_linen',
    'from_nnx',
    'in_parts',
    'label_union',
    'member_variables',
    'mixed_precision',
    'multitask',
    'postprocess',
    'preprocess',
    'rematerialize',
    'tap_jacobian',
    'tap_logits',
    'tap_parameters',
]
