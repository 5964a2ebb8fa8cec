"""Strict JAX on eight fake devices, for every test and doctest."""

import jax

# Before anything asks for a device.
jax.config.update('jax_num_cpu_devices', 8)
# Nearly all the time goes into compiling programs that run once.
jax.config.update('jax_disable_most_optimizations', True)
# Implicit promotion of dtypes and ranks hides mistakes.
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')

import pytest  # noqa: E402


@pytest.fixture
def key(request: pytest.FixtureRequest) -> jax.Array:
    """A random key that is the test's own and the same in every run."""
    name = request.node.nodeid.encode()
    return jax.random.key(sum(byte * (i + 1) for i, byte in enumerate(name)) % 2**31)
