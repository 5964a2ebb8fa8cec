"""Networks whose logits are factors: those of the network itself, whatever is put around it, and not computed twice."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.linear_checks import assert_close

from kdjax import networks, objectives, parallel, training
from kdjax.networks import LinearLogits, Outputs, dense_logits

CLASSES, WIDTH = 11, 6
TOKENS = np.random.default_rng(0).integers(0, CLASSES, (8, 3)).astype(np.int32)
LABELS = np.random.default_rng(1).integers(-1, CLASSES, (8, 3)).astype(np.int32)


class Language(nn.Module):
    """Embeds tokens, and has a head of its own or the table of embeddings for one."""

    tied: bool = False
    softcap: float | None = None
    classes: int = CLASSES
    width: int = WIDTH
    dropout: float = 0.0

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        table = nn.Embed(self.classes, self.width, name='table')
        x = nn.tanh(nn.Dense(self.width, name='body')(table(tokens)))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.LayerNorm(name='norm')(x)
        logits = table.attend(x) if self.tied else nn.Dense(self.classes, name='head')(x)
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)


HEADS = {
    'own': ({}, {'kernel': 'head/kernel', 'bias': 'head/bias'}),
    'tied': ({'tied': True}, {'kernel': 'table/embedding', 'transposed': True}),
    'capped': ({'softcap': 0.5}, {'kernel': 'head/kernel', 'bias': 'head/bias', 'softcap': 0.5}),
}


def pair(name, **options):
    """A network and the same with a linear head."""
    module, head = HEADS[name]
    network = networks.from_linen(Language(**module, **options), features='norm')
    return network, networks.linear_head(network, 'norm', **head, chunk=5)


@functools.cache
def variables(name):
    """Of either of a pair, with biases that are not zero."""
    start = jax.jit(pair(name)[0].init)(jax.random.key(0), TOKENS)
    return jax.tree.map(lambda x: x + 0.1, start)


def gradient(network, name, inputs=TOKENS):
    """The value and gradient of two terms, of a network that learns from itself with other parameters."""
    objective = objectives.hard_labels() + objectives.soft_targets()
    nothing = {key: {} for key in objective.names}
    teacher = network.apply(jax.tree.map(lambda x: 2 * x, variables(name)), inputs)[0]

    def loss(variables):
        student = network.apply(variables, inputs)[0]
        return objective.apply(nothing, nothing, student, teacher, {'labels': LABELS}, step=0)[0]

    return jax.jit(jax.value_and_grad(loss))(variables(name))


@pytest.mark.parametrize('name', HEADS)
def test_the_logits_are_those_of_the_network(name):
    network, linear = pair(name)
    dense, outputs = (each.apply(variables(name), TOKENS)[0] for each in (network, linear))
    assert isinstance(outputs.logits, LinearLogits)
    assert (outputs.logits.shape, outputs.logits.ndim) == (dense.logits.shape, 3)
    assert outputs.logits.dtype == dense.logits.dtype
    np.testing.assert_allclose(dense_logits(outputs.logits), dense.logits, rtol=1e-5, atol=1e-6)
    assert dense_logits(dense.logits) is dense.logits
    assert list(outputs.features) == ['norm']
    assert_close(gradient(linear, name), gradient(network, name))


@pytest.mark.parametrize('name', ['own', 'tied'])
def test_in_parts_the_kernel_stays_in_one_piece(name):
    network, linear = pair(name)
    expected = gradient(network, name)
    for parts in (networks.in_parts(linear, 4), networks.in_parts(networks.rematerialize(linear), 2)):
        assert_close(gradient(parts, name), expected)
    _, head = HEADS[name]
    assert_close(gradient(networks.linear_head(networks.in_parts(network, 4), 'norm', **head), name), expected)
    outputs, _ = networks.in_parts(linear, 4).apply(variables(name), TOKENS)
    assert outputs.logits.kernel.shape == ((CLASSES, WIDTH) if name == 'tied' else (WIDTH, CLASSES))


def test_in_half_precision_the_factors_are_halves_and_the_logits_are_not():
    network, linear = pair('own')
    outputs, _ = networks.mixed_precision(linear).apply(variables('own'), TOKENS)
    assert outputs.logits.hidden.dtype == outputs.logits.kernel.dtype == jnp.bfloat16
    assert outputs.features['norm'].dtype == outputs.logits.dtype == jnp.float32
    value, gradients = gradient(networks.mixed_precision(linear), 'own')
    expected, wanted = gradient(network, 'own')
    np.testing.assert_allclose(value, expected, rtol=0.02)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(gradients))
    assert_close(gradients, wanted, 0.05)


def test_networks_around_it_take_its_logits_as_they_are():
    network, linear = pair('own')
    own = variables('own')
    two = networks.ensemble_variables([own, jax.tree.map(lambda x: 2 * x, own)])

    def same(wrap, variables=own):
        ours, naive = (dense_logits(wrap(each).apply(variables, TOKENS)[0].logits) for each in (linear, network))
        np.testing.assert_allclose(ours, naive, rtol=1e-5, atol=1e-6)

    same(lambda each: networks.ensemble([networks.tap_logits(each)] * 2), two)
    same(lambda each: networks.preprocess(each, lambda x: x[:, ::-1]))
    same(lambda each: networks.postprocess(each, lambda logits: logits[..., :7]))
    same(lambda each: networks.postprocess(each, lambda logits: 2 * dense_logits(logits)))
    same(lambda each: networks.label_union([each, each], [range(CLASSES), range(2, CLASSES + 2)]), two)
    tapped, _ = networks.ensemble([networks.tap_logits(linear)] * 2).apply(two, TOKENS)
    assert isinstance(tapped.features['1/logits'], LinearLogits)
    sliced, _ = networks.postprocess(linear, lambda logits: logits[..., :7]).apply(own, TOKENS)
    assert isinstance(sliced.logits, LinearLogits)


def test_the_network_s_own_logits_are_not_computed():
    """Neither by the network nor for its gradient: what a step needs is far from the logits of a batch."""
    network = networks.from_linen(Language(classes=8192, width=8), features='norm')
    linear = networks.linear_head(network, 'norm', 'head/kernel', bias='head/bias', chunk=16)
    tokens, objective = jax.ShapeDtypeStruct((16, 32), jnp.int32), objectives.soft_targets()

    def step(variables, teacher_variables, tokens):
        def loss(variables):
            outputs = (linear.apply(each, tokens)[0] for each in (variables, teacher_variables))
            return objective.apply({'soft_targets': {}}, {'soft_targets': {}}, *outputs, {}, step=0)[0]

        return jax.value_and_grad(loss)(variables)

    shapes = jax.eval_shape(linear.init, jax.random.key(0), tokens)
    program = jax.jit(step).lower(shapes, shapes, tokens).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * 16 * 32 * 8192 / 2
    assert '16,32,8192' not in program.as_text()


@pytest.mark.parametrize('fsdp', [1, 8])
def test_a_training_step_on_eight_devices_is_that_of_one_with_logits(fsdp):
    """With dropout and Adam; the head is large enough to be split."""
    made = [
        pair('own', classes=1024, width=32, dropout=0.2),
        pair('tied', classes=1024, width=32),
    ]
    batch = {'inputs': np.random.default_rng(0).integers(0, 1024, (16, 5)).astype(np.int32)}
    batch['labels'] = np.roll(batch['inputs'], -1, axis=1)
    ends = []
    for i in range(2):
        (student, teacher), mesh = (each[i] for each in made), parallel.data_parallel(fsdp=fsdp)
        problem = training.distillation(
            student, teacher, objectives.hard_labels() + objectives.reverse_kl(), optax.sgd(0.5, momentum=0.9)
        )
        teacher_variables = jax.jit(teacher.init)(jax.random.key(1), batch['inputs'])
        placed = batch
        if i == 1:
            problem = parallel.distribute(mesh, problem)
            teacher_variables, placed = parallel.shard(mesh, teacher_variables), parallel.shard_batch(mesh, batch)
        state = problem.init(jax.random.key(0), placed)
        for _ in range(2):
            state, metrics = problem.step(state, teacher_variables, placed)
        ends.append(jax.device_get((state.params, metrics)))
    assert_close(ends[1], ends[0])


WRONG = {
    'feature': ({'hidden': 'nrom'}, r"no feature 'nrom'; there are: norm$"),
    'kernel': ({'kernel': 'kernel'}, r"no parameter 'kernel'; there are: body/bias, .*head/kernel"),
    'bias': ({'bias': 'head/b'}, r"no parameter 'head/b'; there are"),
    'kernel_shape': ({'kernel': 'norm/scale'}, r'the kernel must be \[width, vocabulary\] .*\(8, 3, 6\), got \(6,\)$'),
    'not_transposed': ({'kernel': 'table/embedding'}, r'or give transposed=True, got \(11, 6\)$'),
    'transposed': ({'transposed': True}, r'the kernel must be \[vocabulary, width\] .*got \(6, 11\)$'),
    'bias_shape': ({'bias': 'body/bias'}, r'the bias must be \(11,\), .*got \(6,\)$'),
    'chunk': ({'chunk': 0}, r'chunk must be an integer of at least 1, got 0$'),
    'part_of_a_chunk': ({'chunk': 2.0}, r'chunk must be an integer of at least 1, got 2.0$'),
    'softcap': ({'softcap': -1.0}, r'softcap must be a positive number, got -1.0$'),
}


@pytest.mark.parametrize('name', WRONG)
def test_what_does_not_fit_is_one_line(name):
    network, _ = pair('own')
    options, message = WRONG[name]
    options = {'hidden': 'norm', 'kernel': 'head/kernel', **options}
    with pytest.raises(ValueError, match=f'^linear_head: [^\n]*{message}'):
        networks.linear_head(network, **options).apply(variables('own'), TOKENS)


def test_a_network_without_features_says_where_to_name_them():
    network = networks.linear_head(networks.from_linen(Language()), 'norm', 'head/kernel')
    with pytest.raises(ValueError, match=r"^linear_head: [^\n]*'norm'; there are: none; name it in features="):
        network.apply(variables('own'), TOKENS)


def test_hidden_states_of_integers_are_no_hidden_states():
    network = networks.Network(lambda *_: {}, lambda v, x, **_: (Outputs(None, {'x': x}), {}))
    with pytest.raises(ValueError, match=r'^linear_head: hidden states must be floating point, got int32$'):
        networks.linear_head(network, 'x', 'w').apply({'params': {'w': np.ones((3, 2), np.float32)}}, TOKENS)
    with pytest.raises(ValueError, match=r'^linear_head: hidden states must be \[batch, ..., width\], got \(3,\)$'):
        networks.linear_head(network, 'x', 'w').apply({'params': {'w': jnp.ones((3, 2))}}, jnp.ones(3))


def test_functions_that_need_all_logits_say_how_to_have_them():
    _, linear = pair('own')
    for function in (lambda logits: logits + 1, lambda logits: logits.max(-1)):
        with pytest.raises(ValueError, match=r'^postprocess: [^\n]*networks.dense_logits\(logits\)[^\n]*$'):
            networks.postprocess(linear, function).apply(variables('own'), TOKENS)
    outputs, _ = linear.apply(variables('own'), TOKENS)
    with pytest.raises(ValueError, match=r'^LinearLogits: [^\n]*dense_logits[^\n]*$'):
        outputs.logits[0]
