"""How likely the labels are to a network: their negative log likelihood, and perplexity."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from kdjax.batches import Batch
from kdjax.meshes import on_any_mesh
from kdjax.metrics._averages import Average
from kdjax.metrics._classification import Metric
from kdjax.metrics._predictions import in_chunks, label_logits, predictions
from kdjax.networks import Outputs


def nll(*, ignore: int | None = None) -> Callable[[Outputs, Batch], Average]:
    """The mean negative log likelihood of the labels, -log softmax(z)_y, in nats.

    It is inf where a label's class is ruled out, by a logit of -inf.

    Args:
      ignore: a label, beside the negative ones, that stands for none.

    Raises:
      ValueError: from the metric, as in `accuracy`.

    >>> import jax.numpy as jnp
    >>> outputs = Outputs(jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1]])))
    >>> round(nll()(outputs, {'labels': jnp.array([0, -1])}).compute(), 3)
    0.693
    """

    @on_any_mesh
    @in_chunks
    def nll(outputs: Outputs, batch: Batch) -> Average:
        p = predictions('nll', outputs, batch, ignore)
        return p.mean(jax.nn.logsumexp(p.logits, axis=-1) - label_logits(p))

    return nll


class Perplexity(NamedTuple):
    """`exp(total / count)` of summed negative log likelihoods: they add up, their exponentials do not."""

    total: ArrayLike
    count: ArrayLike

    def compute(self) -> float:
        """The perplexity; NaN where nothing was counted, inf beyond the largest float."""
        with np.errstate(over='ignore'):
            return float(np.exp(Average(*self).compute()))


def perplexity(*, ignore: int | None = None) -> Metric:
    """The exponential of the mean negative log likelihood of the labels: the number of equally likely tokens to choose from.

    Args:
      ignore: a label, beside the negative ones, that stands for none.

    Raises:
      ValueError: from the metric, as in `accuracy`.

    >>> import jax.numpy as jnp
    >>> round(perplexity()(Outputs(jnp.zeros((1, 3, 8))), {'labels': jnp.array([[0, 5, 7]])}).compute(), 3)
    8.0
    """

    @on_any_mesh
    def perplexity(outputs: Outputs, batch: Batch) -> Perplexity:
        return Perplexity(*measure(outputs, batch))

    measure = nll(ignore=ignore)
    return perplexity
