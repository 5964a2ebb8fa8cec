"""Text that a language model writes: by itself, or checked by a larger one.

A decoder here is a `Network` that keeps a cache as its state, such as
`networks.from_linen(models.Decoder(..., cache=512), mutable=('cache',))`: its inputs are `{'tokens': [batch, length],
'positions': [batch, length]}`, its logits [batch, length, vocabulary], and a call at a position sees what was given at
earlier ones. All functions are pure, of fixed shapes, and may be jitted.
"""

from kdjax.generation._completions import completions
from kdjax.generation._sample import Generated, sample
from kdjax.generation._speculative import Speculated, speculative_sample

__all__ = ['Generated', 'Speculated', 'completions', 'sample', 'speculative_sample']
