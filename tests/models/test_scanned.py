"""The scanned network that other tests transform is the plain loop over its layers, with and without rematerialization."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers.model_checks import filled
from helpers.scanned import ScannedMLP


def test_scanned_network_is_the_loop_over_its_layers() -> None:
    inputs = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 4)), jnp.float32)
    variables = filled(ScannedMLP(3, 5, classes=2), inputs)
    assert variables['params']['layers']['dense']['kernel'].shape == (3, 5, 5)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables['params'])
    x = np.asarray(inputs, np.float64).reshape(3, 8) @ params['embed']['kernel'] + params['embed']['bias']
    for kernel, bias in zip(params['layers']['dense']['kernel'], params['layers']['dense']['bias'], strict=True):
        x = np.maximum(x @ kernel + bias, 0)
    wanted = x @ params['head']['kernel'] + params['head']['bias']

    def loss(variables: dict, module: ScannedMLP) -> tuple[jax.Array, jax.Array]:
        logits = module.apply(variables, inputs)
        return jnp.sum(logits**2), logits

    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    plain, rematerialized = (gradient(variables, ScannedMLP(3, 5, 2, rematerialized)) for rematerialized in (False, True))
    np.testing.assert_allclose(plain[1], wanted, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), rematerialized, plain)
