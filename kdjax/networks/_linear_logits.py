"""Logits that are a product which nobody has computed yet: hidden states and the kernel of a head."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kdjax.numerics import known


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('hidden', 'kernel', 'bias'),
    meta_fields=('softcap', 'transposed', 'chunk'),
)
@dataclasses.dataclass(frozen=True)
class LinearLogits:
    """Logits hidden · kernel + bias as the factors that they are made of, for `Outputs.logits`; `linear_head` makes them.

    Objectives and metrics on logits compute as many positions at a time as `chunk` says, and again in the gradient, so that the
    logits of all positions are never in memory. `logits[..., start:stop]` are those of some classes, as of a vocabulary without
    its padding. Whatever needs all at once takes `dense_logits(logits)`.

    Attributes:
      hidden: [batch, ..., width].
      kernel: [width, classes], or [classes, width] where it is `transposed`.
      bias: [classes], or None.
      softcap: c of logits c · tanh(z / c), which stay between -c and c; None for z itself.
      transposed: whether the kernel has its classes first, as a table of embeddings has.
      chunk: number of positions on a device that are computed at a time.

    >>> import jax.numpy as jnp
    >>> logits = LinearLogits(jnp.ones((2, 5, 3)), jnp.ones((3, 7)))
    >>> logits.shape, logits[..., :4].shape, float(dense_logits(logits)[0, 0, 0])
    ((2, 5, 7), (2, 5, 4), 3.0)
    """

    hidden: Any
    kernel: Any
    bias: Any = None
    softcap: float | None = None
    transposed: bool = False
    chunk: int = 512

    @property
    def shape(self) -> tuple[int, ...]:
        """[batch, ..., classes], that of the logits."""
        return (*self.hidden.shape[:-1], self.kernel.shape[0 if self.transposed else 1])

    @property
    def ndim(self) -> int:
        """The number of their axes."""
        return len(self.hidden.shape)

    @property
    def dtype(self) -> Any:
        """float32, in which products of any precision are summed."""
        return jnp.dtype(jnp.float32)

    def __getitem__(self, index: Any) -> 'LinearLogits':
        """The logits of some classes, `logits[..., start:stop]`, still not computed.

        Raises:
          ValueError: the index is another.
        """
        if not (isinstance(index, tuple) and len(index) == 2 and index[0] is Ellipsis and isinstance(index[1], slice)):
            raise ValueError(
                f'LinearLogits: pick classes, logits[..., start:stop], or take dense_logits(logits) first, got {index}'
            )
        kernel = self.kernel[index[1]] if self.transposed else self.kernel[:, index[1]]
        return dataclasses.replace(self, kernel=kernel, bias=None if self.bias is None else self.bias[index[1]])


def dense_logits(logits: Any) -> jax.Array:
    """Logits as an array: those of `LinearLogits` computed, all at once, in float32; others as they are.

    >>> import jax.numpy as jnp
    >>> print(dense_logits(LinearLogits(jnp.array([[3.0, 4.0]]), jnp.eye(2), bias=jnp.ones(2), softcap=5.0)))
    [[3.3201842 3.807971 ]]
    """
    if not isinstance(logits, LinearLogits):
        return logits
    return _finished(logits, _product(logits.hidden, logits.kernel, logits.transposed))


def chunk_logits(logits: LinearLogits, dtype: Any) -> jax.Array:
    """`dense_logits` of a kernel in float32 whose numbers are of `dtype`, for chunks over which its gradient is added up.

    The product is that of the halves, where both factors are; the gradient of the kernel, and the products that make it, are in
    float32, and so not rounded for every chunk.
    """
    if logits.hidden.dtype == dtype != jnp.float32:
        return _finished(logits, _half_product(logits.transposed, logits.hidden, logits.kernel))
    return dense_logits(logits)


def _finished(logits: LinearLogits, result: jax.Array) -> jax.Array:
    """Logits from the product of their factors."""
    if logits.bias is not None:
        result = result + logits.bias.astype(jnp.float32).reshape((1,) * (result.ndim - 1) + (-1,))
    return result if logits.softcap is None else logits.softcap * jnp.tanh(result / logits.softcap)


def _product(x: jax.Array, kernel: jax.Array, transposed: bool) -> jax.Array:
    """The product of hidden states and a kernel, summed in float32."""
    if x.dtype != kernel.dtype:
        with jax.numpy_dtype_promotion('standard'):  # the rule is this function's, whatever the caller's own code forbids
            common = jnp.promote_types(x.dtype, kernel.dtype)
        x, kernel = x.astype(common), kernel.astype(common)
    axes = ((x.ndim - 1,), (1 if transposed else 0,)), ((), ())
    return jax.lax.dot_general(x, kernel, axes, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _half_product(transposed: bool, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`_product` of hidden states [positions, width] in half precision and a kernel in float32 that is cast to theirs."""
    return _product(x, kernel.astype(x.dtype), transposed)


def _half_product_forward(transposed: bool, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _half_product(transposed, x, kernel), (x, kernel)


def _half_product_backward(
    transposed: bool, factors: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = factors
    full = x.astype(jnp.float32)
    of_kernel = jnp.matmul(cotangent.T, full) if transposed else jnp.matmul(full.T, cotangent)
    return _product(cotangent, kernel, not transposed).astype(x.dtype), of_kernel


_half_product.defvjp(_half_product_forward, _half_product_backward)


def check_linear(owner: str, logits: LinearLogits) -> LinearLogits:
    """The same logits, once shapes, dtypes and options are known to fit.

    Raises:
      ValueError: hidden states, kernel or bias do not fit, or softcap or chunk is not positive.
    """
    hidden, kernel, bias = logits.hidden, logits.kernel, logits.bias
    for name, x in (('hidden states', hidden), ('the kernel', kernel), *(() if bias is None else (('the bias', bias),))):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f'{owner}: {name} must be floating point, got {x.dtype}')
    if hidden.ndim < 2:
        raise ValueError(f'{owner}: hidden states must be [batch, ..., width], got {hidden.shape}')
    wanted = '[vocabulary, width]' if logits.transposed else '[width, vocabulary]'
    if kernel.ndim != 2 or kernel.shape[1 if logits.transposed else 0] != hidden.shape[-1]:
        other = ', or give transposed=True' if kernel.ndim == 2 and kernel.shape[1] == hidden.shape[-1] else ''
        raise ValueError(
            f'{owner}: the kernel must be {wanted} with the width of hidden states {hidden.shape}{other}, got {kernel.shape}'
        )
    if bias is not None and bias.shape != logits.shape[-1:]:
        raise ValueError(f'{owner}: the bias must be {logits.shape[-1:]}, one number for each class, got {bias.shape}')
    return logits


def check_options(owner: str, softcap: float | None, chunk: int) -> None:
    """Raises unless a chunk is of one position or more, and a softcap a positive number."""
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f'{owner}: chunk must be an integer of at least 1, got {chunk}')
    if softcap is not None and (known(softcap) is None or not softcap > 0):
        raise ValueError(f'{owner}: softcap must be a positive number, got {softcap}')
