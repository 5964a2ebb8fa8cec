"""Ways to train that are more than a loop over batches: expectation maximization, and clients that keep their data."""

from kdjax.regimes.federated import average_clients as average_clients
from kdjax.regimes.federated import client_mesh as client_mesh
from kdjax.regimes.federated import client_updates as client_updates
from kdjax.regimes.maximization import Bounds as Bounds
from kdjax.regimes.maximization import ExpectationMaximization as ExpectationMaximization
from kdjax.regimes.maximization import ExpectationMaximizationState as ExpectationMaximizationState
from kdjax.regimes.maximization import expectation_maximization as expectation_maximization
from kdjax.regimes.maximization import until_convergence as until_convergence
