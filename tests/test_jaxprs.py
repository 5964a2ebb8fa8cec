"""Products are found wherever JAX hides them, and a program evaluated again is the function that it was traced from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import jaxprs

RNG = np.random.default_rng(0)
PARAMS = {
    'a': jnp.asarray(RNG.standard_normal((3, 3)), jnp.float32),
    'b': jnp.asarray(RNG.standard_normal((3, 3)), jnp.float32),
    'layers': jnp.asarray(RNG.standard_normal((2, 3, 3)), jnp.float32),
    'gain': jnp.asarray(RNG.standard_normal(3), jnp.float32),
    'filters': jnp.asarray(RNG.standard_normal((2, 3, 3)), jnp.float32),
}
X = jnp.asarray(RNG.standard_normal((4, 3)), jnp.float32)


@jax.custom_jvp
def own_tangent(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.tanh(x @ kernel)


@own_tangent.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return jax.jvp(lambda x, kernel: jnp.tanh(x @ kernel), primals, tangents)


@jax.custom_vjp
def own_gradient(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.tanh(x @ kernel)


own_gradient.defvjp(
    lambda x, kernel: (own_gradient(x, kernel), (x, kernel)),
    lambda kept, g: jax.vjp(lambda x, kernel: jnp.tanh(x @ kernel), *kept)[1](g),
)

layer = jax.jit(lambda x, kernel: jnp.tanh(x @ kernel))


def scanned(p: Any, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel + x @ p['a']), None), x, p['layers'])[0]


def nested_scans(p: Any, x: jax.Array) -> jax.Array:
    outer = lambda x, _: (jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, p['layers'], reverse=True)[0], x)  # noqa: E731
    return sum(jnp.sum(x) for x in jax.lax.scan(outer, x, None, length=3))


def carried(p: Any, x: jax.Array) -> jax.Array:
    """The kernel is carried, and from the second round on depends on the input."""
    return jax.lax.scan(lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1] + c[0][:3]), None), (x, p['a']), None, length=2)[0][0]


def by_policy(p: Any, x: jax.Array) -> jax.Array:
    policy = jax.checkpoint_policies.nothing_saveable
    return jax.checkpoint(lambda x: jnp.tanh(x @ p['a']) @ p['b'], policy=policy)(x)


def gradient(p: Any, x: jax.Array) -> jax.Array:
    return jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p['a'])))(x)


def convolved(p: Any, x: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x[:, :, None], p['filters'][:, :1], (1,), 'SAME', dimension_numbers=('NWC', 'WIO', 'NWC')
    )


FUNCTIONS: dict[str, tuple[Callable[..., jax.Array], list[str]]] = {
    'plain': (lambda p, x: x @ p['a'], ['a']),
    'one call, two kernels': (lambda p, x: layer(layer(x, p['a']), p['b']), ['a', 'b']),
    'tied': (lambda p, x: layer(layer(x, p['a']), p['a']) @ p['a'], ['a', 'a_2', 'a_3']),
    'call of a call': (lambda p, x: jax.jit(lambda x: 2 * layer(x, p['a']))(x), ['a']),
    'reversed': (lambda p, x: p['a'] @ x.T, ['a']),
    'transposed': (lambda p, x: x @ p['a'].T, ['a']),
    'scaled by a vector': (lambda p, x: x @ (p['gain'][:, None] * p['a']), ['a']),
    'of parameters alone': (lambda p, x: x @ (p['a'] @ p['b']), ['a']),
    'of inputs alone': (lambda p, x: (x @ x.T) @ (x @ p['a']), ['products/0', 'a', 'products/1']),
    'of a kernel that inputs change': (lambda p, x: x @ (p['a'] * x[:1]), ['products/0']),
    'of a constant': (lambda p, x: x @ np.eye(3, dtype=np.float32), ['products/0']),
    'scan': (scanned, ['layers', 'a']),
    'scans in a scan': (nested_scans, ['layers']),
    'carried': (carried, ['products/0']),
    'remat': (lambda p, x: jax.checkpoint(lambda x: jnp.tanh(x @ p['a']) @ p['b'])(x), ['a', 'b']),
    'remat by policy': (by_policy, ['a', 'b']),
    'custom_jvp': (lambda p, x: own_tangent(x, p['a']), ['a']),
    'custom_vjp': (lambda p, x: own_gradient(x, p['a']), ['a']),
    'vmap': (lambda p, x: jax.vmap(lambda kernel: x @ kernel)(p['layers']), ['layers']),
    'grad': (gradient, ['a', 'a_2']),
    'convolution': (convolved, ['filters']),
    'control flow without products': (lambda p, x: jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x) @ p['a'], ['a']),
}


def again(function: Callable[..., Any]) -> Callable[..., jax.Array]:
    """The function, traced and evaluated."""

    def evaluated(params: Any, x: jax.Array) -> jax.Array:
        program, _ = jaxprs.trace(lambda variables, x: function(variables['params'], x), {'params': params}, x)
        leaves = jax.tree.leaves((params, x))
        (output,), changed = jaxprs.evaluate(program, leaves, lambda product, lhs, rhs, _: (product(lhs, rhs), None), {})
        assert not changed
        return output

    return evaluated


def found(function: Callable[..., Any]) -> list[jaxprs.Product]:
    program, _ = jaxprs.trace(lambda variables, x: function(variables['params'], x), {'params': PARAMS, 'state': {'c': X}}, X)
    return list(jaxprs.products(program))


@pytest.mark.parametrize('name', FUNCTIONS)
def test_products_are_found_and_named(name: str) -> None:
    function, names = FUNCTIONS[name]
    products = found(function)
    assert [product.name for product in products] == names
    assert [product.weights is None for product in products] == [name.startswith('products/') for name in names]


@pytest.mark.parametrize('name', FUNCTIONS)
def test_evaluation_is_the_function_with_its_derivatives_compiled_and_mapped(name: str) -> None:
    function, _ = FUNCTIONS[name]

    def measures(function: Callable[..., jax.Array]) -> Callable[..., Any]:
        loss = lambda p, x: jnp.sum(jnp.sin(function(p, x)))  # noqa: E731
        mapped = jax.vmap(function, in_axes=(None, 0))
        return jax.jit(lambda p, x: (function(p, x), jax.grad(loss, argnums=(0, 1))(p, x), mapped(p, jnp.stack([x, 2 * x]))))

    wanted, got = measures(function)(PARAMS, X), measures(again(function))(PARAMS, X)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), got, wanted)
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(got[1]))


@pytest.mark.parametrize('name', ['remat', 'remat by policy'])
def test_backward_passes_still_compute_again(name: str) -> None:
    function, _ = FUNCTIONS[name]
    loss = lambda function: lambda p, x: jnp.sum(jnp.sin(function(p, x)))  # noqa: E731
    plain, evaluated = (str(jax.make_jaxpr(jax.grad(loss(f)))(PARAMS, X)).count(' tanh ') for f in (function, again(function)))
    assert evaluated == plain == 2


def test_states_run_along_scans_and_stay_apart() -> None:
    """Every product multiplies by its own state and counts; the inner scan runs backwards."""

    def function(variables: Any, x: jax.Array) -> jax.Array:
        p = variables['params']
        outer = lambda x, _: (jax.lax.scan(lambda x, k: (x @ k, None), x, p['layers'], reverse=True)[0], None)  # noqa: E731
        return jax.lax.scan(outer, jax.jit(lambda x: x @ p['a'])(x), None, length=3)[0]

    program, _ = jaxprs.trace(function, {'params': PARAMS}, X)
    inner, outer = jnp.asarray(RNG.uniform(0.5, 1, (3, 2)), jnp.float32), jnp.float32(2.0)
    assert [product.length for product in jaxprs.products(program)] == [(), (3, 2)]
    leaves = jax.tree.leaves(({'params': PARAMS}, X))
    states = {'layers': inner, 'a': outer}
    (output,), changed = jaxprs.evaluate(program, leaves, lambda product, x, k, s: (s * product(x, k), s + 1), states)
    kernels = np.asarray(PARAMS['layers'], np.float64)
    wanted = 2.0 * np.asarray(X, np.float64) @ np.asarray(PARAMS['a'], np.float64)
    for i in range(3):
        wanted = wanted @ kernels[1] @ kernels[0] * inner[i, 0].item() * inner[i, 1].item()
    np.testing.assert_allclose(output, wanted, rtol=1e-5)
    np.testing.assert_array_equal(changed['layers'], inner + 1)
    np.testing.assert_array_equal(changed['a'], 3.0)


def test_only_named_states_come_back() -> None:
    program, _ = jaxprs.trace(lambda v, x: layer(x, v['params']['a']) @ v['params']['b'], {'params': PARAMS}, X)
    leaves = jax.tree.leaves(({'params': PARAMS}, X))
    change = lambda product, x, k, s: (product(x, k), jnp.float32(1) if product.name == 'b' else None)  # noqa: E731
    _, changed = jaxprs.evaluate(program, leaves, change, {})
    assert changed == {'b': 1.0}


@pytest.mark.parametrize('loop', ['while', 'cond'])
def test_products_in_other_control_flow_are_an_error(loop: str) -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        if loop == 'while':
            return jax.lax.while_loop(lambda x: jnp.sum(x) < 1, lambda x: jnp.abs(x @ p['a']), x)
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ p['a'], lambda x: x, x)

    with pytest.raises(ValueError, match=rf"^products within '{loop}' are not supported: only within calls and scans$"):
        found(function)
    with pytest.raises(ValueError, match='within calls and scans'):
        found(lambda p, x: jax.jit(lambda x: function(p, x))(x))


DOTS = {
    'plain': (((1,), (0,)), ((), ())),
    'both last': (((1,), (1,)), ((), ())),
    'batched': (((3, 0), (2, 1)), ((2,), (0,))),
    'outer': (((), ()), ((0,), (1,))),
}


@pytest.mark.parametrize('name', DOTS)
def test_axes_of_dots_are_placed_as_they_broadcast(name: str) -> None:
    """Scales of the kept axes, taken out of the operands, are the same scales of the output."""
    (contracted, batch) = DOTS[name]
    shapes = ((2, 3, 4, 5), (4, 2, 5, 3)) if name == 'batched' else ((4, 3), (3, 4) if name != 'both last' else (5, 3))
    lhs, rhs = (jnp.asarray(RNG.standard_normal(shape), jnp.float32) for shape in shapes)
    (product,) = found_between(lambda x, y: jax.lax.dot_general(x, y, (contracted, batch)), lhs, rhs)
    for i, operand in enumerate((lhs, rhs)):
        assert set(product.contracted(i)) == set(contracted[i])
        shape = [1 if axis in contracted[i] else length for axis, length in enumerate(operand.shape)]
        scales = jnp.asarray(RNG.uniform(1, 2, shape), jnp.float32)
        scaled = [lhs, rhs]
        scaled[i] = operand * scales
        np.testing.assert_allclose(product(*scaled), product(lhs, rhs) * product.place(i, scales), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('layout', [('NHWC', 'HWIO', 'NHWC'), ('NCHW', 'OIHW', 'NHWC'), ('HWNC', 'HOWI', 'CNHW')])
def test_axes_of_convolutions_are_placed_as_they_broadcast(layout: tuple[str, str, str]) -> None:
    sizes = [{'N': 2, 'H': 5, 'W': 4, 'C': 6}, {'H': 3, 'W': 2, 'I': 3, 'O': 8}]
    lhs, rhs = (
        jnp.asarray(RNG.standard_normal([size[letter] for letter in letters]), jnp.float32)
        for size, letters in zip(sizes, layout, strict=False)
    )
    convolve = lambda x, y: jax.lax.conv_general_dilated(  # noqa: E731
        x, y, (1, 1), 'SAME', dimension_numbers=layout, feature_group_count=2
    )
    (product,) = found_between(convolve, lhs, rhs)
    for i, (operand, kept) in enumerate(((lhs, 'N'), (rhs, 'O'))):
        shape = [length if letter == kept else 1 for letter, length in zip(layout[i], operand.shape, strict=True)]
        scales = jnp.asarray(RNG.uniform(1, 2, shape), jnp.float32)
        scaled = [lhs, rhs]
        scaled[i] = operand * scales
        np.testing.assert_allclose(product(*scaled), product(lhs, rhs) * product.place(i, scales), rtol=1e-5, atol=1e-5)


def found_between(function: Callable[..., jax.Array], lhs: jax.Array, rhs: jax.Array) -> list[jaxprs.Product]:
    program, _ = jaxprs.trace(lambda variables, lhs, rhs: function(lhs, rhs), {'params': {}}, lhs, rhs)
    return list(jaxprs.products(program))


class Halves(NamedTuple):
    """A packed array: the sum of its halves."""

    one: Any
    other: Any

    shape = property(lambda self: self.one.shape)
    size = property(lambda self: self.one.size)

    def sum(self) -> jax.Array:
        return self.one + self.other


def test_packed_parameters_meet_only_products_or_are_unpacked() -> None:
    """Through calls, casts and the slices of a scan the kernel stays packed; where it is added it is not."""

    def function(variables: Any, x: jax.Array) -> jax.Array:
        p = variables['params']
        x = layer(x, p['a'])
        x, _ = jax.lax.scan(
            lambda x, k: ((x.astype(jnp.bfloat16) @ k.astype(jnp.bfloat16)).astype(jnp.float32), None), x, p['layers']
        )
        return x + p['b'][:1]

    packed = jax.tree.map(lambda leaf: Halves(0.25 * leaf, 0.75 * leaf), PARAMS)
    program, _ = jaxprs.trace(function, {'params': packed}, X, packed=Halves)
    met = []

    def multiply(product: jaxprs.Product, x: Any, kernel: Any, _: Any) -> tuple[jax.Array, None]:
        met.append((product.name, type(x) is not Halves, type(kernel) is Halves))
        return product(x, kernel.sum().astype(x.dtype)), None

    leaves = jax.tree.leaves((packed, X), is_leaf=lambda leaf: isinstance(leaf, Halves))
    unpack = lambda value: value.sum() if isinstance(value, Halves) else value  # noqa: E731
    (output,), _ = jaxprs.evaluate(program, leaves, multiply, {}, unpack)
    assert set(met) == {('a', True, True), ('layers', True, True)}
    np.testing.assert_allclose(output, function({'params': PARAMS}, X), rtol=1e-2, atol=1e-2)
