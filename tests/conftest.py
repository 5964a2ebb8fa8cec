"""Strict JAX on eight fake devices, for every test."""

import jax

# Before anything asks for a device.
jax.config.update('jax_num_cpu_devices', 8)

import pytest


@pytest.fixture(autouse=True)
def strict_jax():
    """Implicit dtype promotion and rank promotion are errors, as they hide mistakes."""
    with jax.numpy_dtype_promotion('strict'), jax.numpy_rank_promotion('raise'):
        yield


@pytest.fixture
def key(request: pytest.FixtureRequest) -> jax.Array:
    """A random key that is the test's own and the same in every run."""
    name = request.node.nodeid.encode()
    return jax.random.key(sum(byte * (i + 1) for i, byte in enumerate(name)) % 2**31)
