"""Soft targets between heads so wide that their logits should never be in memory: from hidden states and kernels."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kdjax import meshes, numerics
from kdjax.meshes import on_any_mesh


@on_any_mesh
def linear_soft_targets(
    student_hidden: ArrayLike,
    student_kernel: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_kernel: ArrayLike,
    *,
    student_bias: ArrayLike | None = None,
    teacher_bias: ArrayLike | None = None,
    temperature: ArrayLike = 4.0,
    chunk: int = 256,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """`soft_targets` of the logits hidden · kernel + bias, without ever holding those of all tokens; per example, here a token.

    T² · KL(p_t || p_s), with p = softmax((h W + b) / T). The value is computed for `chunk` tokens at a time; the gradient
    computes the logits again, for all tokens and as large a share of the vocabulary, so that no gradient of a kernel is summed
    over chunks. Memory is that of chunk · vocabulary logits, for half more products of matrices than autodiff needs. All arrays
    have gradients; under `jit` those that are not asked for are not computed. Reverse mode only.

    Other divergences, and sums of several, are objectives on the logits of a `networks.linear_head`.

    Hidden states that are split over devices stay where they are: each device computes its own tokens of every chunk.

    Args:
      student_hidden: [..., width of the student], floating point of any precision; products are summed in float32.
      student_kernel: [width of the student, vocabulary].
      teacher_hidden: [..., width of the teacher].
      teacher_kernel: [width of the teacher, vocabulary].
      student_bias: [vocabulary], if the student's head has one.
      teacher_bias: [vocabulary], if the teacher's has.
      temperature: T > 0, a number or a traced scalar.
      chunk: number of tokens at a time, at least 1; it changes memory and speed, and the result by rounding alone.
      axis: the axis of both hidden states that the kernels are multiplied with.
      where: boolean, broadcastable to the hidden states without `axis`: tokens to keep.

    Returns:
      float32 of shape [...], in nats, never negative; 0 for tokens that are not kept.

    Raises:
      ValueError: shapes or dtypes do not fit, the temperature is not positive, or `chunk` is not an integer of at least 1.

    >>> import jax.numpy as jnp
    >>> student, teacher, kernel = jnp.array([[2., 0.]]), jnp.array([[0., 2.]]), jnp.eye(2)
    >>> print(linear_soft_targets(student, kernel, teacher, kernel, temperature=1.0))
    [1.523]

    Reference:
      Hinton, Vinyals, Dean. Distilling the Knowledge in a Neural Network. 2015. https://arxiv.org/abs/1503.02531
    """
    numerics.check_positive('linear_soft_targets', temperature=temperature)
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f'linear_soft_targets: chunk must be an integer of at least 1, got {chunk}')
    hidden = (
        _floating('the hidden states of the student', student_hidden),
        _floating('the hidden states of the teacher', teacher_hidden),
    )
    kernels = _floating('the kernel of the student', student_kernel), _floating('the kernel of the teacher', teacher_kernel)
    for x in hidden:
        numerics.check_axis('linear_soft_targets', axis, x.shape)
    shapes = ' and '.join(f'{x.shape} · {kernel.shape}' for x, kernel in zip(hidden, kernels, strict=True))
    hidden = tuple(jnp.moveaxis(x, axis, -1) for x in hidden)
    if any(kernel.shape[:-1] != x.shape[-1:] for x, kernel in zip(hidden, kernels, strict=True)):
        raise ValueError(f'linear_soft_targets: kernels must be [width, vocabulary], got hidden states and kernels {shapes}')
    tokens = hidden[0].shape[:-1]
    if tokens != hidden[1].shape[:-1] or kernels[0].shape[1] != kernels[1].shape[1]:
        raise ValueError(f'linear_soft_targets: student and teacher must have the same tokens and vocabulary, got {shapes}')

    biases = tuple(
        jnp.zeros(kernels[0].shape[1], jnp.float32) if bias is None else _floating(f'the bias of the {side}', bias)
        for side, bias in (('student', student_bias), ('teacher', teacher_bias))
    )
    for bias in biases:
        if bias.shape != kernels[0].shape[1:]:
            raise ValueError(f'linear_soft_targets: a bias must be {kernels[0].shape[1:]}, as the vocabulary, got {bias.shape}')

    if kernels[0].shape[1] == 1:
        raise ValueError(f'linear_soft_targets: probabilities of one class are all 1, got kernels of one column in {shapes}')

    hidden = tuple(x.reshape(-1, x.shape[-1]) for x in hidden)
    if where is not None:
        where = numerics.mask('linear_soft_targets', where, tokens or (1,), -1).reshape(-1)
        # What is masked may be as large as it likes, and must not reach the products.
        hidden = tuple(jnp.where(where[:, None], x, jnp.zeros_like(x)) for x in hidden)
    operands = meshes.varying_alike((hidden, kernels, biases, jnp.asarray(temperature, jnp.float32)))
    values = jnp.asarray(_linear_soft_targets(chunk, *operands))
    return (values if where is None else jnp.where(where, values, 0.0)).reshape(tokens)


Two = tuple[jax.Array, ...]  # the student's and the teacher's


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_soft_targets(chunk: int, hidden: Two, kernels: Two, biases: Two, temperature: jax.Array) -> jax.Array:
    """T²·KL for hidden states [tokens, width], for so many tokens at a time."""
    return _linear_forward(chunk, hidden, kernels, biases, temperature)[0]


def _linear_forward(
    chunk: int, hidden: Two, kernels: Two, biases: Two, temperature: jax.Array
) -> tuple[jax.Array, tuple[Two, Two, Two, jax.Array, jax.Array, Two]]:
    tokens = len(hidden[0])
    blocks = _blocks(tokens, chunk)
    # Devices that share the tokens share every block evenly, if there are as many as this or fewer, and a power of two.
    unit = math.gcd(chunk, 64)
    size = tokens if blocks == 1 else -(-tokens // (blocks * unit)) * unit

    def block(hidden: Two) -> tuple[jax.Array, Two]:
        scaled = [_logits(*each) / temperature for each in zip(hidden, kernels, biases, strict=True)]
        log_totals = tuple(jax.nn.logsumexp(x, axis=-1, keepdims=True) for x in scaled)
        log_s, log_t = (x - log_total for x, log_total in zip(scaled, log_totals, strict=True))
        return numerics.divergence(log_t, log_s), log_totals

    # A block holds every blocks-th token, so that each device has its part already. A block of neighbours would be on a few
    # devices, and all would gather all hidden states.
    padded = [jnp.pad(x, ((0, blocks * size - tokens), (0, 0))) for x in hidden]
    results = jax.lax.map(block, tuple(x.reshape(size, blocks, x.shape[1]).swapaxes(0, 1) for x in padded))
    divergence, log_totals = jax.tree.map(lambda x: x.reshape(blocks, size).T.reshape(blocks * size)[:tokens], results)
    return jnp.square(temperature) * divergence, (hidden, kernels, biases, temperature, divergence, log_totals)


def _linear_backward(
    chunk: int, residuals: tuple[Two, Two, Two, jax.Array, jax.Array, Two], cotangent: jax.Array
) -> tuple[Two, Two, Two, jax.Array]:
    hidden, kernels, biases, temperature, divergence, log_totals = residuals
    vocabulary = kernels[0].shape[1]
    blocks = _blocks(len(hidden[0]), chunk)
    size = -(-vocabulary // blocks)
    scale = (temperature * cotangent)[:, None]

    def block(i: jax.Array, gradients: tuple[Two, Two, Two]) -> tuple[Two, Two, Two]:
        # Where the vocabulary does not divide, the last blocks begin early and meet some classes again. They write the
        # gradients of those columns again, which are the same, but must not add to those of the hidden states again.
        start = jnp.minimum(i * size, vocabulary - size)
        new = start + jnp.arange(size) >= i * size
        columns = [jax.lax.dynamic_slice_in_dim(kernel, start, size, axis=1) for kernel in kernels]
        parts = [jax.lax.dynamic_slice_in_dim(bias, start, size) for bias in biases]
        log_s, log_t = (
            _logits(x, kernel, bias) / temperature - log_total[:, None]
            for x, kernel, bias, log_total in zip(hidden, columns, parts, log_totals, strict=True)
        )
        p_s, p_t = jnp.exp(log_s), jnp.exp(log_t)
        of_logits = scale * (p_s - p_t), scale * p_t * (log_t - log_s - divergence[:, None])
        of_hidden, of_kernels, of_biases = gradients
        of_hidden = tuple(
            total + _product(gradient, jnp.where(new, kernel, jnp.zeros_like(kernel)).T)
            for total, gradient, kernel in zip(of_hidden, of_logits, columns, strict=True)
        )
        of_kernels = tuple(
            jax.lax.dynamic_update_slice_in_dim(whole, _product(x.T, gradient).astype(whole.dtype), start, axis=1)
            for whole, gradient, x in zip(of_kernels, of_logits, hidden, strict=True)
        )
        of_biases = tuple(
            jax.lax.dynamic_update_slice_in_dim(whole, jnp.sum(gradient, axis=0), start, axis=0)
            for whole, gradient in zip(of_biases, of_logits, strict=True)
        )
        return of_hidden, of_kernels, of_biases

    zeros = (
        tuple(jnp.zeros_like(x, jnp.float32) for x in hidden),
        tuple(jnp.zeros_like(kernel) for kernel in kernels),
        tuple(jnp.zeros_like(bias, jnp.float32) for bias in biases),
    )
    of_hidden, of_kernels, of_biases = jax.lax.fori_loop(0, blocks, block, zeros)
    # T enters by the factor T² and by z / T, and Σ_c z ∂L/∂z = h · ∂L/∂h + b · ∂L/∂b.
    factors = zip((*hidden, *biases), (*of_hidden, *of_biases), strict=True)
    along = sum(jnp.sum(x.astype(jnp.float32) * gradient) for x, gradient in factors)
    of_temperature = 2 * temperature * jnp.sum(cotangent * divergence) - along / temperature
    of_hidden, of_biases = (
        tuple(gradient.astype(x.dtype) for x, gradient in zip(arrays, found, strict=True))
        for arrays, found in ((hidden, of_hidden), (biases, of_biases))
    )
    return of_hidden, of_kernels, of_biases, of_temperature


_linear_soft_targets.defvjp(_linear_forward, _linear_backward)


def _blocks(tokens: int, chunk: int) -> int:
    """Into how many blocks the tokens are cut, and in the gradient the vocabulary."""
    return max(1, -(-tokens // chunk))


def _logits(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return _product(x, kernel) + bias.astype(jnp.float32)[None]


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    """The product of two matrices, summed in float32; those of one dtype are not cast first, so that no copy is made."""
    if x.dtype != y.dtype:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _floating(name: str, x: ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f'linear_soft_targets: {name} must be floating point, got {x.dtype}')
    return x
