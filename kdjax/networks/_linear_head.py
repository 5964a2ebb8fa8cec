"""A network whose logits stay factors, for vocabularies so large that the logits of a batch should never be in memory."""

from typing import Any

import jax

from kdjax.networks._linear_logits import LinearLogits, check_linear, check_options
from kdjax.networks._network import Network, Outputs
from kdjax.paths import leaves_with_paths


def linear_head(
    network: Network,
    hidden: str,
    kernel: str,
    *,
    bias: str | None = None,
    transposed: bool = False,
    softcap: float | None = None,
    chunk: int = 512,
) -> Network:
    """The same network, whose logits are `LinearLogits`: hidden states and the parameters of its head, not multiplied yet.

    logits = hidden · kernel + bias, then softcap · tanh(logits / softcap) if there is a softcap.

    Objectives and metrics on logits then compute `chunk` positions at a time on each device, and compute them again in the
    gradient. No array [positions, classes] exists for any of them, nor for their sum: all terms of an objective share one pass.
    It costs the products of the forward pass once more, and saves writing and reading the logits. Terms that compare positions
    with each other (`objectives.dist`, `objectives.diversity`), those that one's own function computes, and networks that mix
    the logits of several (`ensemble`, `multitask`), take all logits at once; `objectives.by_position` says of one's own
    function that it need not. Teacher and student may differ in this: one may have logits that are an array.

    The network's own logits are not used, and what is not used `jit` does not compute. Outside of `jit` it does. Products are
    summed in float32, whatever the precision of the factors, as within `mixed_precision`. On a mesh (see `kdjax.parallel`)
    every device computes its own positions; only the kernel is gathered, and its gradient summed, once. `in_parts` goes outside
    of this, and so do the transformations of `kdjax.quantization`, which leave this head in floating point.

    Args:
      network: the network; it has the hidden states among its features.
      hidden: the path of the feature [batch, ..., width] that enters the head, after the last norm.
      kernel: the path of the head's kernel [width, classes], such as `'lm_head/kernel'`, in the parameters.
      bias: the path of its bias [classes], if it has one.
      transposed: the kernel is [classes, width]: a table of embeddings that is the head's kernel too.
      softcap: the largest magnitude of a logit, where the network caps them.
      chunk: number of positions on a device that are computed at a time. More of them need more memory, of two to four logits
        for each class and network, and less time: after each the gradient of the whole kernel is read and written.

    Raises:
      ValueError: chunk is less than 1 or softcap not positive; from `apply`, when traced: there is no such feature or
        parameter, where the message lists those there are, or their shapes do not fit.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from kdjax import objectives
    >>> from kdjax.networks import from_linen
    >>> module = nn.Sequential([nn.Embed(50, 8), nn.LayerNorm(), nn.Dense(50)])
    >>> network = linear_head(from_linen(module, features='layers_1'), 'layers_1', 'layers_2/kernel', bias='layers_2/bias')
    >>> tokens = jnp.array([[3, 1, 4, 1]])
    >>> outputs, _ = network.apply(network.init(jax.random.key(0), tokens), tokens)
    >>> outputs.logits.shape, outputs.logits.hidden.shape
    ((1, 4, 50), (1, 4, 8))

    References:
      Hsu, Dai, Kothapalli, Song, Tang, Zhu, Shimizu, Sahni, Ning, Chen. Liger Kernel: Efficient Triton Kernels for LLM
      Training. 2024. https://arxiv.org/abs/2410.10989
      Chen, Xu, Zhang, Guestrin. Training Deep Nets with Sublinear Memory Cost. 2016. https://arxiv.org/abs/1604.06174
    """
    check_options('linear_head', softcap, chunk)
    named = {'kernel': kernel, 'bias': bias}

    def apply(
        variables: dict[str, Any], inputs: Any, *, train: bool = False, rng: jax.Array | None = None
    ) -> tuple[Outputs, dict[str, Any]]:
        outputs, state = network.apply(variables, inputs, train=train, rng=rng)
        if hidden not in outputs.features:
            there = ', '.join(sorted(outputs.features)) or 'none; name it in features= where the network is made'
            raise ValueError(f'linear_head: the network gives no feature {hidden!r}; there are: {there}')
        params = leaves_with_paths(variables.get('params', {}))
        for path in named.values():
            if path is not None and path not in params:
                raise ValueError(f'linear_head: the network has no parameter {path!r}; there are: {", ".join(sorted(params))}')
        factors = {name: None if path is None else params[path] for name, path in named.items()}
        logits = LinearLogits(outputs.features[hidden], **factors, softcap=softcap, transposed=transposed, chunk=chunk)
        return Outputs(check_linear('linear_head', logits), outputs.features), state

    return Network(network.init, apply)
