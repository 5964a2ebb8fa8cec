"""LoRA by qwix on networks of both kinds: they begin as the network itself, and adapters alone are trained."""

import functools

import jax
import numpy as np
import optax
import pytest
import qwix
from flax import nnx

from kdjax import models, networks, objectives, optimizers, training
from kdjax.paths import leaves_with_paths, map_with_paths

# qwix 0.1.8 asks flax 0.12 for names of before.
pytestmark = [
    pytest.mark.filterwarnings('ignore::DeprecationWarning:qwix'),
    pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning"),
]
TOKENS = np.random.default_rng(0).integers(0, 16, (32, 7)).astype(np.int32)
BATCH = {'inputs': TOKENS[:, :-1], 'labels': TOKENS[:, 1:]}
ADAPTERS = ('*_lora_a', '*_lora_b')
RANK, ALPHA = 2, 4.0


def logits_of(network, variables):
    """Compiled."""
    return jax.jit(lambda variables: network.apply(variables, BATCH['inputs'])[0].logits)(variables)


class Words(nnx.Module):
    """An embedding and two layers."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(16, 8, rngs=rngs)
        self.inner = nnx.Linear(8, 12, rngs=rngs)
        self.head = nnx.Linear(12, 16, rngs=rngs)

    def __call__(self, tokens):
        return self.head(nnx.relu(self.inner(self.tokens(tokens))))


def provider(module_path):
    return qwix.LoraProvider(module_path=module_path, rank=RANK, alpha=ALPHA)


@functools.cache
def pair(kind):
    """A network and its variables, and the same network with adapters and its variables."""
    if kind == 'linen':
        module = models.Decoder(vocabulary=16, depth=1, width=8, heads=2, hidden=12)
        plain, adapted = (
            networks.from_linen(x) for x in (module, qwix.apply_lora_to_model(module, provider('.*(query|value|up|down)')))
        )
        variables = jax.jit(plain.init)(jax.random.key(0), BATCH['inputs'])
    else:
        module = Words(rngs=nnx.Rngs(0))
        made = qwix.apply_lora_to_model(module, provider('inner|head'), BATCH['inputs'], rngs=nnx.Rngs(1))
        plain, adapted = networks.from_nnx(Words(rngs=nnx.Rngs(0))), networks.from_nnx(made)
        variables = plain.init(jax.random.key(0), BATCH['inputs'])
    start = networks.copy_layers(variables, jax.jit(adapted.init)(jax.random.key(1), BATCH['inputs']), lambda path, leaf: True)
    return plain, variables, adapted, start


@pytest.mark.parametrize('kind', ['linen', 'nnx'])
def test_adapters_alone_are_trained_and_can_be_merged(kind):
    plain, variables, adapted, start = pair(kind)
    variables, start = jax.device_get((variables, start))
    np.testing.assert_array_equal(logits_of(adapted, start), logits_of(plain, variables))
    optimizer = optimizers.train_only(optax.adam(1e-2), ADAPTERS)
    problem = training.distillation(adapted, plain, objectives.hard_labels() + objectives.soft_targets(), optimizer)
    fitted = training.fit(problem, BATCH, variables, key=jax.random.key(2), batch_size=32, steps=20, student_variables=start)
    before, after = (leaves_with_paths(jax.device_get(tree)['params']) for tree in (start, fitted.variables))
    for path, leaf in after.items():
        assert np.array_equal(leaf, before[path]) != path.endswith(('_lora_a', '_lora_b')), path

    def merged(path, leaf):
        name = path.removeprefix('params/')
        if f'{name}_lora_a' not in after:
            return leaf
        return after[name] + np.float32(ALPHA / RANK) * after[f'{name}_lora_a'] @ after[f'{name}_lora_b']

    tuned = logits_of(adapted, fitted.variables)
    np.testing.assert_allclose(logits_of(plain, map_with_paths(merged, variables)), tuned, rtol=1e-4, atol=1e-5)
    losses = [
        np.mean(optax.softmax_cross_entropy_with_integer_labels(logits, BATCH['labels']))
        for logits in (logits_of(adapted, start), tuned)
    ]
    assert losses[1] < losses[0]
