"""Ways to train that are more than a loop over batches: expectation maximization, and clients that keep their data."""

from kdjax.regimes._expectation_maximization import (
    Bounds,
    ExpectationMaximization,
    ExpectationMaximizationState,
    expectation_maximization,
    until_convergence,
)
from kdjax.regimes._federated import average_clients, client_mesh, client_updates

__all__ = [
    'Bounds',
    'ExpectationMaximization',
    'ExpectationMaximizationState',
    'average_clients',
    'client_mesh',
    'client_updates',
    'expectation_maximization',
    'until_convergence',
]
