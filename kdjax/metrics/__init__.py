"""What is measured, as sums that stay right when they are added up: over batches, devices, hosts and masked positions.

`training.evaluator(network, metrics={'accuracy': accuracy(), ...})` measures a data set. Each metric is a function
`metric(outputs, batch) -> sums` of a network's outputs and a batch of `kdjax.batches`; one's own may return an `Average`, as
`mean` makes it, or any other pytree of sums with a method `compute`.

Classes: `accuracy`, `top_k_accuracy`, `nll`, `perplexity`, `calibration_error`, and `agreement` with a teacher; for each class,
`confusion_matrix` and `intersection_over_union`. Several labels at once: `binary_accuracy`, `label_ranking_average_precision`.
Numbers: `squared_error`, `absolute_error`.
"""

from kdjax.metrics.averages import Average as Average
from kdjax.metrics.averages import Sums as Sums
from kdjax.metrics.averages import add as add
from kdjax.metrics.averages import compute as compute
from kdjax.metrics.averages import divide as divide
from kdjax.metrics.averages import mean as mean
from kdjax.metrics.classification import CalibrationError as CalibrationError
from kdjax.metrics.classification import Metric as Metric
from kdjax.metrics.classification import Perplexity as Perplexity
from kdjax.metrics.classification import accuracy as accuracy
from kdjax.metrics.classification import agreement as agreement
from kdjax.metrics.classification import calibration_error as calibration_error
from kdjax.metrics.classification import nll as nll
from kdjax.metrics.classification import perplexity as perplexity
from kdjax.metrics.classification import top_k_accuracy as top_k_accuracy
from kdjax.metrics.confusion import ConfusionMatrix as ConfusionMatrix
from kdjax.metrics.confusion import IntersectionOverUnion as IntersectionOverUnion
from kdjax.metrics.confusion import confusion_matrix as confusion_matrix
from kdjax.metrics.confusion import intersection_over_union as intersection_over_union
from kdjax.metrics.multilabel import binary_accuracy as binary_accuracy
from kdjax.metrics.multilabel import label_ranking_average_precision as label_ranking_average_precision
from kdjax.metrics.regression import absolute_error as absolute_error
from kdjax.metrics.regression import squared_error as squared_error
