"""What is measured, as sums that stay right when they are added up: over batches, devices, hosts and masked positions.

`training.evaluator(network, metrics={'accuracy': accuracy(), ...})` measures a data set. Each metric is a function
`metric(outputs, batch) -> sums` of a network's outputs and a batch of `kdjax.batches`; one's own may return an `Average`, as
`mean` makes it, or any other pytree of sums with a method `compute`.

Classes: `accuracy`, `top_k_accuracy`, `nll`, `perplexity`, `bits_per_byte`, `calibration_error`, and `agreement` with a
teacher; for each class, `confusion_matrix` and `intersection_over_union`. Several labels at once: `binary_accuracy`,
`label_ranking_average_precision`. Numbers: `squared_error`, `absolute_error`.
"""

from kdjax.metrics._averages import Average, Sums, add, compute, divide, mean
from kdjax.metrics._classification import CalibrationError, Metric, accuracy, agreement, calibration_error, top_k_accuracy
from kdjax.metrics._confusion import ConfusionMatrix, IntersectionOverUnion, confusion_matrix, intersection_over_union
from kdjax.metrics._multilabel import binary_accuracy, label_ranking_average_precision
from kdjax.metrics._perplexity import Perplexity, bits_per_byte, nll, perplexity
from kdjax.metrics._regression import absolute_error, squared_error

__all__ = [
    'Average',
    'CalibrationError',
    'ConfusionMatrix',
    'IntersectionOverUnion',
    'Metric',
    'Perplexity',
    'Sums',
    'absolute_error',
    'accuracy',
    'add',
    'agreement',
    'binary_accuracy',
    'bits_per_byte',
    'calibration_error',
    'compute',
    'confusion_matrix',
    'divide',
    'intersection_over_union',
    'label_ranking_average_precision',
    'mean',
    'nll',
    'perplexity',
    'squared_error',
    'top_k_accuracy',
]
