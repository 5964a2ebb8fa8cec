"""Transformations in the sense of optax: averaged parameters, frozen ones, and priors."""

from kdjax.optimizers.averaging import AverageState as AverageState
from kdjax.optimizers.averaging import average_parameters as average_parameters
from kdjax.optimizers.averaging import averaged_variables as averaged_variables
from kdjax.optimizers.freezing import FreezeState as FreezeState
from kdjax.optimizers.freezing import keep_frozen_state as keep_frozen_state
from kdjax.optimizers.freezing import train_only as train_only
from kdjax.optimizers.priors import PriorState as PriorState
from kdjax.optimizers.priors import gaussian_prior as gaussian_prior
