"""The decoder against float64 numpy, with and without its cache, packed and alone, unrolled and scanned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import models, networks, paths

VOCABULARY, LENGTH = 19, 7
BASE = {'vocabulary': VOCABULARY, 'depth': 2, 'width': 16, 'heads': 4, 'hidden': 24}
VARIANTS = {
    'plain': {},
    'grouped': {'key_value_heads': 2},
    'biased and tied': {'attention_bias': True, 'tied': True, 'key_value_heads': 1},
    'windowed and capped': {'window': 3, 'softcap': 2.0, 'head_width': 6, 'theta': 100.0},
}
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (3, LENGTH))


def random_like(variables, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.5, x.dtype), variables)


@functools.cache
def made(variant, **more):
    """The network and random variables of a variant."""
    network = networks.from_linen(models.Decoder(**BASE, **VARIANTS[variant], **more))
    return network, random_like(jax.eval_shape(network.init, jax.random.key(0), TOKENS))


def rms_norm(x, scale, epsilon=1e-5):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + epsilon) * scale


def rotate(x, theta):
    """Turns each pair (x_i, x_(i + half)) of [length, width] by position · theta^(-2i / width)."""
    half = x.shape[-1] // 2
    turned = np.empty_like(x)
    for position in range(len(x)):
        for i in range(half):
            angle = position * theta ** (-2 * i / x.shape[-1])
            a, b = x[position, i], x[position, i + half]
            turned[position, i], turned[position, i + half] = (
                a * np.cos(angle) - b * np.sin(angle),
                b * np.cos(angle) + a * np.sin(angle),
            )
    return turned


def dense(p, x):
    return x @ p['kernel'] + p.get('bias', 0.0)


def oracle(p, tokens, options):
    """Of one row of tokens, head by head."""
    heads, groups = options['heads'], options.get('key_value_heads', options['heads'])
    width, theta, window = (
        options.get('head_width', options['width'] // heads),
        options.get('theta', 1e4),
        options.get('window'),
    )
    x = p['tokens']['embedding'][tokens]
    for i in range(options['depth']):
        block = p[f'block{i}']
        a, y = block['attention'], rms_norm(x, block['attention_norm']['scale'])
        q, k, v = (dense(a[name], y).reshape(len(x), -1, width) for name in ('query', 'key', 'value'))
        found = []
        for head in range(heads):
            group = head * groups // heads
            scores = rotate(q[:, head], theta) @ rotate(k[:, group], theta).T / np.sqrt(width)
            behind = np.arange(len(x))[:, None] - np.arange(len(x))[None]
            scores = np.where((behind < 0) | (behind >= (window or 99)), -np.inf, scores)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            found.append(weights / weights.sum(-1, keepdims=True) @ v[:, group])
        x = x + dense(a['output'], np.concatenate(found, -1))
        y = rms_norm(x, block['mlp_norm']['scale'])
        gate = dense(block['gate'], y)
        x = x + dense(block['down'], gate / (1 + np.exp(-gate)) * dense(block['up'], y))
    x = rms_norm(x, p['hidden']['scale'])
    logits = x @ (p['tokens']['embedding'].T if options.get('tied') else p['head']['kernel'])
    cap = options.get('softcap')
    return cap * np.tanh(logits / cap) if cap else logits


@pytest.mark.parametrize('variant', VARIANTS)
def test_logits_equal_the_oracle(variant):
    network, variables = made(variant)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), variables['params'])
    logits = jax.jit(lambda v: network.apply(v, TOKENS)[0].logits)(variables)
    for row, tokens in zip(logits, TOKENS, strict=True):
        expected = oracle(exact, tokens, {**BASE, **VARIANTS[variant]})
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize('variant', VARIANTS)
def test_step_by_step_with_a_cache_equals_all_at_once(variant):
    """A prompt of three, then one at a time, each row at a position of its own; and going back is going on from there."""
    network, variables = made(variant)
    whole = network.apply(variables, TOKENS)[0].logits
    cached = networks.from_linen(models.Decoder(**BASE, **VARIANTS[variant], cache=LENGTH), mutable=('cache',))
    call = jax.jit(
        lambda state, tokens, positions: cached.apply({**variables, **state}, {'tokens': tokens, 'positions': positions})
    )
    outputs, state = cached.apply(variables, {'tokens': TOKENS[:, :3]})
    state = {name: state[name] for name in ('cache',)}
    np.testing.assert_allclose(outputs.logits, whole[:, :3], rtol=1e-5, atol=1e-5)
    for i in range(3, LENGTH):
        outputs, state = call(state, TOKENS[:, i : i + 1], np.full((3, 1), i))
        np.testing.assert_allclose(outputs.logits[:, 0], whole[:, i], rtol=1e-5, atol=1e-5)
    back = np.array([[2], [5], [3]])
    outputs, _ = call(state, np.take_along_axis(TOKENS, back, 1), back)
    np.testing.assert_allclose(outputs.logits, np.take_along_axis(whole, back[..., None], 1), rtol=1e-5, atol=1e-5)
    outputs, _ = call(state, TOKENS[:, :1], np.full((3, 1), LENGTH))
    assert np.all(np.isnan(outputs.logits))


@pytest.mark.parametrize('variant', ['grouped', 'windowed and capped'])
def test_packed_texts_equal_rows_of_their_own(variant):
    network, variables = made(variant)
    lengths, segments = (3, 2, 2), np.repeat([4, 1, 2], (3, 2, 2))[None]
    packed = network.apply(variables, {'tokens': TOKENS[:1], 'segments': segments})[0].logits[0]
    begin = 0
    for length in lengths:
        alone = network.apply(variables, TOKENS[:1, begin : begin + length])[0].logits[0]
        np.testing.assert_allclose(packed[begin : begin + length], alone, rtol=1e-5, atol=1e-5)
        begin += length


def test_scanned_blocks_equal_unrolled_ones_with_their_cache():
    network, variables = made('grouped')
    scanned = networks.from_linen(models.Decoder(**BASE, **VARIANTS['grouped'], scan=True, cache=LENGTH), mutable=('cache',))
    params = dict(variables['params'])
    blocks = [params.pop(f'block{i}') for i in range(2)]
    params['blocks'] = {'block': jax.tree.map(lambda *x: jnp.stack(x), *blocks)}
    outputs, state = scanned.apply({'params': params}, {'tokens': TOKENS[:, :4]})
    whole = network.apply(variables, TOKENS)[0].logits
    np.testing.assert_allclose(outputs.logits, whole[:, :4], rtol=1e-5, atol=1e-5)
    outputs, _ = scanned.apply(
        {'params': params, **state}, {'tokens': TOKENS[:, 4:], 'positions': np.tile(np.arange(4, LENGTH), (3, 1))}
    )
    np.testing.assert_allclose(outputs.logits, whole[:, 4:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    'variant, head',
    [('plain', {'kernel': 'head/kernel'}), ('biased and tied', {'kernel': 'tokens/embedding', 'transposed': True})],
)
def test_the_hidden_state_and_the_kernel_are_what_linear_head_takes(variant, head):
    options = {**BASE, **VARIANTS[variant], 'softcap': 3.0}
    dense, (_, variables) = networks.from_linen(models.Decoder(**options)), made(variant)
    tapped = networks.from_linen(models.Decoder(**options), features='hidden')
    linear = networks.linear_head(tapped, 'hidden', softcap=3.0, **head)
    found, expected = (each.apply(variables, TOKENS)[0].logits for each in (linear, dense))
    np.testing.assert_allclose(networks.dense_logits(found), expected, rtol=1e-5, atol=1e-5)
    half = networks.from_linen(models.Decoder(**options, dtype=jnp.bfloat16), features=('hidden', 'block1'))
    shapes = jax.eval_shape(lambda: half.apply(variables, TOKENS)[0].features)
    assert {x.dtype for x in shapes.values()} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize('scan', [False, True])
def test_a_narrower_mlp_computes_what_the_whole_does_with_channels_at_zero(scan):
    module = models.Decoder(**BASE, scan=scan)
    variables = random_like(jax.eval_shape(module.init, jax.random.key(0), TOKENS))
    kept = np.array([0, 3, 4, 11, 17])

    def change(path, leaf, of_makers, of_readers):
        of = {'gate': of_makers, 'up': of_makers, 'down': of_readers}.get(path.split('/')[-2])
        return leaf if of is None or path.startswith('params/block0/') else of(leaf)

    smaller, zeroed = (
        paths.map_with_paths(functools.partial(change, of_makers=makers, of_readers=readers), variables)
        for makers, readers in (
            (lambda x: x[..., kept], lambda x: jnp.take(x, kept, axis=-2)),
            (lambda x: jnp.asarray(np.where(np.isin(np.arange(x.shape[-1]), kept), x, np.float32(0))), lambda x: x),
        )
    )
    narrow = models.narrow(module, smaller, TOKENS)
    below = 'blocks/block' if scan else 'block1'
    assert dict(narrow.narrowed) == {f'{below}/gate': 5, f'{below}/up': 5}
    expected = module.apply(zeroed, TOKENS)
    np.testing.assert_allclose(narrow.apply(smaller, TOKENS), expected, rtol=1e-5, atol=1e-5 * float(np.abs(expected).max()))


def test_later_tokens_change_nothing_before_them_and_unknown_ones_no_plausible_number():
    network, variables = made('plain')
    whole = network.apply(variables, TOKENS)[0].logits
    changed = TOKENS.copy()
    changed[:, 4:] = (changed[:, 4:] + 1) % VOCABULARY
    other = network.apply(variables, changed)[0].logits
    np.testing.assert_array_equal(other[:, :4], whole[:, :4])
    assert np.all(np.any(np.asarray(other[:, 4:] != whole[:, 4:]), axis=-1))
    for unknown in (-1, VOCABULARY):
        changed[1, 3] = unknown
        logits = network.apply(variables, changed)[0].logits
        assert np.all(np.isnan(logits[1, 3:]))
        np.testing.assert_array_equal(logits[::2], other[::2])


def test_half_precision_keeps_logits_in_float32_and_near():
    network, variables = made('grouped', dtype=jnp.bfloat16)
    logits = network.apply(variables, TOKENS)[0].logits
    exact, _ = made('grouped')
    assert logits.dtype == jnp.float32
    assert np.any(np.asarray(logits != logits.astype(jnp.bfloat16).astype(jnp.float32)))  # nor were they rounded before
    # jax cannot compile the gradient of its own attention in half precision where promotion is strict.
    with jax.numpy_dtype_promotion('standard'):
        gradient = jax.grad(lambda v: network.apply(v, TOKENS)[0].logits.sum())(variables)
    assert all(x.dtype == jnp.float32 and np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient))
    expected = exact.apply(variables, TOKENS)[0].logits
    assert np.linalg.norm(logits - expected) < 0.03 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    'options, inputs, message',
    [
        ({'heads': 3}, TOKENS, 'must divide 3 heads, and these the width 16'),
        ({'key_value_heads': 3}, TOKENS, '3 heads of keys and values must divide 4 heads'),
        ({'head_width': 5}, TOKENS, 'must be even'),
        ({}, TOKENS.astype(np.float32), 'integers'),
        ({}, TOKENS[0], 'batch, length'),
        ({'cache': 9}, {'tokens': TOKENS, 'segments': TOKENS}, 'without a cache'),
        ({}, {'tokens': TOKENS, 'segments': TOKENS[:, 1:]}, 'segments must be integers of the shape of the tokens'),
        ({}, {'tokens': TOKENS, 'positions': np.arange(LENGTH)}, 'positions must be integers of the shape of the tokens'),
        ({'window': 0}, TOKENS, 'window must be positive'),
        ({'cache': 0}, TOKENS, 'cache must be positive'),
        ({'softcap': -1.0}, TOKENS, 'softcap must be positive'),
    ],
)
def test_what_does_not_fit_is_named(options, inputs, message):
    network = networks.from_linen(models.Decoder(**{**BASE, **options}))
    with pytest.raises(ValueError, match=rf'^Decoder: [^\n]*{message}'):
        jax.eval_shape(network.init, jax.random.key(0), inputs)


def test_a_cache_of_another_batch_is_named():
    network = networks.from_linen(models.Decoder(**BASE, cache=4), mutable='cache')
    variables = jax.eval_shape(network.init, jax.random.key(0), TOKENS[:, :4])
    with pytest.raises(ValueError, match=r'^Decoder: the cache must have the shape \(2, 4, 4, 4\)'):
        jax.eval_shape(network.apply, variables, TOKENS[:2, :4])
