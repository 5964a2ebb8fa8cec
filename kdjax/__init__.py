"""kdjax: knowledge distillation in JAX, with pruning and int8 quantization of the student.

From the bottom up: `losses`, `pruning` and `quantization` are pure functions of arrays; `networks` makes pairs of pure
functions of Flax modules, and `objectives` lifts losses to them; `training` turns student, teacher, objective and optimizer
into one step.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdjax import batches as batches
    from kdjax import data as data
    from kdjax import dependencies as dependencies
    from kdjax import errors as errors
    from kdjax import export as export
    from kdjax import files as files
    from kdjax import generation as generation
    from kdjax import jaxprs as jaxprs
    from kdjax import losses as losses
    from kdjax import meshes as meshes
    from kdjax import metrics as metrics
    from kdjax import models as models
    from kdjax import networks as networks
    from kdjax import numerics as numerics
    from kdjax import objectives as objectives
    from kdjax import optimizers as optimizers
    from kdjax import parallel as parallel
    from kdjax import paths as paths
    from kdjax import pooling as pooling
    from kdjax import pretrained as pretrained
    from kdjax import problems as problems
    from kdjax import pruning as pruning
    from kdjax import quantization as quantization
    from kdjax import recipes as recipes
    from kdjax import regimes as regimes
    from kdjax import testing as testing
    from kdjax import training as training

__version__ = '0.1.0'

_PACKAGES = (
    'batches',
    'data',
    'dependencies',
    'errors',
    'export',
    'files',
    'generation',
    'jaxprs',
    'losses',
    'meshes',
    'metrics',
    'models',
    'networks',
    'numerics',
    'objectives',
    'optimizers',
    'parallel',
    'paths',
    'pooling',
    'pretrained',
    'problems',
    'pruning',
    'quantization',
    'recipes',
    'regimes',
    'testing',
    'training',
)


def __getattr__(name: str) -> Any:
    # Imported where they are first used: NNX, Orbax and grain take longer to import than jax, and a loss needs none of them.
    if name in _PACKAGES:
        return importlib.import_module(f'kdjax.{name}')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted([*globals(), *_PACKAGES])
