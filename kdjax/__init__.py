"""kdjax: knowledge distillation in JAX, with pruning and int8 quantization of the student.

From the bottom up: `losses`, `pruning` and `quantization` are pure functions of arrays; `networks` makes pairs of pure
functions of Flax modules, and `objectives` lifts losses to them; `training` turns student, teacher, objective and optimizer
into one step.
"""

from kdjax import data as data
from kdjax import export as export
from kdjax import losses as losses
from kdjax import metrics as metrics
from kdjax import models as models
from kdjax import networks as networks
from kdjax import objectives as objectives
from kdjax import paths as paths
from kdjax import pruning as pruning
from kdjax import quantization as quantization
from kdjax import training as training

__version__ = '0.1.0'
