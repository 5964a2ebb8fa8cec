"""Networks as pairs of pure functions, made from Flax modules and from each other."""

from kdjax.networks.computation import mixed_precision as mixed_precision
from kdjax.networks.computation import rematerialize as rematerialize
from kdjax.networks.layers import copy_layers as copy_layers
from kdjax.networks.linen import from_linen as from_linen
from kdjax.networks.members import member_variables as member_variables
from kdjax.networks.members import tap_logits as tap_logits
from kdjax.networks.network import Apply as Apply
from kdjax.networks.network import Network as Network
from kdjax.networks.network import Outputs as Outputs
from kdjax.networks.network import Variables as Variables
from kdjax.networks.nnx import from_nnx as from_nnx
from kdjax.networks.parts import in_parts as in_parts
from kdjax.networks.tasks import multitask as multitask
from kdjax.networks.transformations import ensemble as ensemble
from kdjax.networks.transformations import ensemble_variables as ensemble_variables
from kdjax.networks.transformations import postprocess as postprocess
from kdjax.networks.transformations import preprocess as preprocess
from kdjax.networks.transformations import tap_jacobian as tap_jacobian
from kdjax.networks.transformations import tap_parameters as tap_parameters
from kdjax.networks.unions import label_union as label_union
