"""Ways to train beyond a loop over given batches: expectation maximization, clients that keep their data, text of one's own."""

from kdjax.regimes._expectation_maximization import (
    Bounds,
    ExpectationMaximization,
    ExpectationMaximizationState,
    expectation_maximization,
    until_convergence,
)
from kdjax.regimes._federated import average_clients, client_mesh, client_updates
from kdjax.regimes._on_policy import on_policy

__all__ = [
    'Bounds',
    'ExpectationMaximization',
    'ExpectationMaximizationState',
    'average_clients',
    'client_mesh',
    'client_updates',
    'expectation_maximization',
    'on_policy',
    'until_convergence',
]
