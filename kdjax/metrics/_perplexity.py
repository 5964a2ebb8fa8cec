"""How likely the labels are to a network: their negative log likelihood, perplexity, and bits for each byte of text."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from kdjax.batches import Batch
from kdjax.meshes import on_any_mesh
from kdjax.metrics._averages import Average
from kdjax.metrics._classification import Metric
from kdjax.metrics._predictions import entry_of, in_chunks, label_logits, predictions
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


def bits_per_byte(entry: str = 'bytes', *, ignore: int | None = None) -> Callable[[Outputs, Batch], Average]:
    """The negative log likelihood of the labels in bits, for each byte of text that they stand for.

    Σ -log2 softmax(z)_y / Σ bytes(y), over the labels that count. Networks with other tokens can be compared by it, as
    perplexities cannot: fewer tokens of the same text are each harder to tell.

    Args:
      entry: the name of the batch's numbers of bytes [batch, ...], one for each label, such as `len` of the token's bytes.
      ignore: a label, beside the negative ones, that stands for none.

    Raises:
      ValueError: from the metric, as in `accuracy`, or if the entry is missing or has another shape than the labels.

    >>> import jax.numpy as jnp
    >>> batch = {'labels': jnp.array([[0, 5, 7]]), 'bytes': jnp.array([[4, 1, 1]])}
    >>> round(bits_per_byte()(Outputs(jnp.zeros((1, 3, 8))), batch).compute(), 3)
    1.5
    """

    @on_any_mesh
    @in_chunks
    def bits_per_byte(outputs: Outputs, batch: Batch) -> Average:
        p = predictions('bits_per_byte', outputs, batch, ignore)
        sizes = entry_of('bits_per_byte', batch, entry)
        if sizes.shape != p.labels.shape:
            raise ValueError(
                f"bits_per_byte: batch['{entry}'] {sizes.shape} must have the shape of the labels, {p.labels.shape}"
            )
        bits = p.mean((jax.nn.logsumexp(p.logits, axis=-1) - label_logits(p)) / np.float32(np.log(2)))
        return Average(bits.total, p.mean(sizes).total)

    return bits_per_byte
