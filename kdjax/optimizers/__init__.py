"""Transformations in the sense of optax: averaged parameters, frozen ones, and priors."""

from kdjax.optimizers._averaging import AverageState, average_parameters, averaged_variables
from kdjax.optimizers._freezing import FreezeState, keep_frozen_state, train_only
from kdjax.optimizers._priors import PriorState, gaussian_prior

__all__ = [
    'AverageState',
    'FreezeState',
    'PriorState',
    'average_parameters',
    'averaged_variables',
    'gaussian_prior',
    'keep_frozen_state',
    'train_only',
]
