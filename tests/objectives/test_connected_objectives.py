"""Objectives on features against their connectors and losses by hand, all in one program; each term has layers of its own.

The oracle sees only the examples that count, so that it also says what a mask must do to values and gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.objective_checks import abstract_init, arrays, batch_norm, compile_quickly, convolution, init_error, random_params

from kdjax import losses, objectives
from kdjax.networks import Outputs

BATCH, EXAMPLES, NEGATIVES, STEP = 8, 12, 5, 3
MASK = np.array([True, False, True, True, False, True, True, False])
INDEX = np.array([3, 5, 0, 11, 7, 2, 8, 1], np.int32)
CLASSES = np.array([0, 1, 2, -1, 0, 1, 2, 1, 0, 2, 2, 1], np.int32)
IMAGE, SMALL, VECTOR = (BATCH, 4, 4, 3), (BATCH, 2, 2, 5), (BATCH, 7)
TEACHER_SHAPES = {
    'image': (BATCH, 4, 4, 6),
    'image/scale': (6,),
    'image/bias': (6,),
    'narrow': (BATCH, 4, 4, 3),
    'small': (BATCH, 2, 2, 4),
    'vector': (BATCH, 9),
}
STUDENT_SHAPES = {
    'nst': IMAGE,
    'singular_vectors': IMAGE,
    'fsp/begin': IMAGE,
    'fsp/end': IMAGE,
    'channel_wise': IMAGE,
    'activation_boundary': IMAGE,
    'masked_generation': IMAGE,
    'vid': (BATCH, 8, 8, 3),
    'factor_transfer': (BATCH, 8, 8, 3),
    'overhaul': IMAGE,
    'hierarchical_context/first': IMAGE,
    'hierarchical_context/last': SMALL,
    'pearson_features': (BATCH, 8, 8, 3),
    'inter_channel': (BATCH, 8, 8, 3),
    'srd': IMAGE,
    'fbkd': (BATCH, 8, 8, 3),
    'simkd': (BATCH, 8, 8, 3),
    'semckd/first': (BATCH, 8, 8, 3),
    'semckd/last': SMALL,
    'info_nce': IMAGE,
    'crd': VECTOR,
    'pkt': VECTOR,
    'rkd_distance': VECTOR,
    'rkd_angle': VECTOR,
    'correlation_congruence': VECTOR,
    'instance_graph/first': IMAGE,
    'instance_graph/last': VECTOR,
}
TERMS = {
    'nst': objectives.nst('nst', 'image'),
    'singular_vectors': objectives.singular_vectors('singular_vectors', 'image', rank=2),
    'fsp': objectives.fsp(('fsp/begin', 'fsp/end'), ('image', 'narrow')),
    'channel_wise': objectives.channel_wise('channel_wise', 'image', temperature=3.0),
    'activation_boundary': objectives.activation_boundary(
        'activation_boundary', 'image', margin=optax.linear_schedule(0.0, 5.0, 10)
    ),
    'masked_generation': objectives.masked_generation('masked_generation', 'image', share=0.4),
    'vid': objectives.vid('vid', 'image'),
    'factor_transfer': objectives.factor_transfer('factor_transfer', 'image', variant='attention'),
    'overhaul': objectives.overhaul('overhaul', 'image'),
    'hierarchical_context': objectives.hierarchical_context(
        ['hierarchical_context/first', 'hierarchical_context/last'], ['image', 'small']
    ),
    'simkd': objectives.simkd('simkd', 'image'),
    'semckd': objectives.semckd(['semckd/first', 'semckd/last'], ['image', 'small', 'narrow'], temperature=0.3, width=4),
    'fbkd': objectives.fbkd('fbkd', 'image', guided=0.3, attention=0.4, non_local=0.5, temperature=0.7),
    'srd': objectives.srd('srd', 'vector', exponent=2.0),
    'inter_channel': objectives.inter_channel('inter_channel', 'image'),
    'pearson_features': objectives.pearson_features('pearson_features', 'image'),
    'info_nce': objectives.info_nce('info_nce', 'vector', temperature=0.2, width=4),
    'crd': objectives.crd('crd', 'vector', CLASSES, negatives=NEGATIVES, width=4, temperature=0.3, momentum=0.8),
    'pkt': objectives.pkt('pkt', 'vector'),
    'rkd_distance': objectives.rkd_distance('rkd_distance', 'vector'),
    'rkd_angle': objectives.rkd_angle('rkd_angle', 'vector'),
    'correlation_congruence': objectives.correlation_congruence('correlation_congruence', 'vector', gamma=0.3, order=3),
    'instance_graph': objectives.instance_graph(['instance_graph/first', 'instance_graph/last'], ['image', 'vector']),
}
OBJECTIVE = objectives.combine(**TERMS)
BATCH_SHAPES = {'index': jax.ShapeDtypeStruct((BATCH,), jnp.int32)}


def by_hand(params, state, student, teacher, rows, keep):
    """The terms' values for a batch of which every example counts, with what was drawn for it."""
    s, t = student.features, teacher.features

    def one_by_one(name, image):
        return convolution(params[name]['Conv_0'], image)

    def normalized(name):
        return batch_norm(params[name]['BatchNorm_0'], one_by_one(name, s[name]))

    def convolutions(params, x, slope):
        for i in range(len(params)):
            x = convolution(
                params.get(f'Conv_{i}', params.get(f'ConvTranspose_{i}')), x if i == 0 else jnp.maximum(x, slope * x)
            )
        return x

    def halved(image):
        return image.reshape(len(image), 4, 2, 4, 2, -1).mean((2, 4))

    def embedded(name, side, x):
        layer = params[name][side]['Dense_0']
        y = x.reshape(len(x), -1, x.shape[-1]).mean(1) @ layer['kernel'] + layer['bias'][None]
        return y / jnp.linalg.norm(y, axis=1, keepdims=True)

    def vid(p):
        variance = jnp.log1p(jnp.exp(p['rho'])) + 1e-5
        squares = (convolutions(p['mean'], halved(s['vid']), 0.0) - t['image']) ** 2
        return (squares / variance.reshape(1, 1, 1, -1)).mean() / 2 + jnp.log(variance).mean() / 2

    def activated(params, x):
        """Three convolutions, each with a leaky ReLU, and with batch norm before it if there is one."""
        for i in range(3):
            x = convolution(params.get(f'Conv_{i}', params.get(f'ConvTranspose_{i}')), x)
            x = batch_norm(params[f'BatchNorm_{i}'], x) if f'BatchNorm_{i}' in params else x
            x = jnp.maximum(x, 0.1 * x)
        return x

    def factor_transfer(p):
        assert 'BatchNorm_2' in p['translator']
        assert 'BatchNorm_0' not in p['encoder']
        factor = activated(p['encoder'], t['image'])
        error = ((activated(p['decoder'], factor) - t['image']) ** 2).mean()
        translated = activated(p['translator'], halved(s['factor_transfer']))
        return error + losses.factor_transfer(translated, jax.lax.stop_gradient(factor), variant='attention').mean()

    def overhaul():
        margin = losses.overhaul_margin(t['image/bias'], t['image/scale'])
        return losses.overhaul(normalized('overhaul'), t['image'], margin).mean()

    def hierarchical_context(p):
        def reduced(i, x):
            return batch_norm(p[f'reduce_norm{i}'], convolution(p[f'reduce{i}'], x))

        def expanded(i, x):
            return batch_norm(p[f'expand_norm{i}'], convolution(p[f'expand{i}'], x))

        last = reduced(1, s['hierarchical_context/last'])
        first = reduced(0, s['hierarchical_context/first'])
        enlarged = last.repeat(2, 1).repeat(2, 2)
        attention = 1 / (1 + jnp.exp(-convolution(p['attention0'], jnp.concatenate([first, enlarged], -1))))
        fused = first * attention[..., :1] + enlarged * attention[..., 1:]
        pairs = (expanded(0, fused), t['image']), (expanded(1, last), t['small'])
        return sum(losses.hierarchical_context(*pair).mean() for pair in pairs)

    def crd():
        """The paper's h, of p / Z with Z = examples · mean of the first batch, and a share of noise K / examples + 1e-7."""
        total = 0.0
        sides = {'student': embedded('crd', 'student', s['crd']), 'teacher': embedded('crd', 'teacher', t['vector'])}
        for side, other in (('student', 'teacher'), ('teacher', 'student')):
            p = jnp.exp(jnp.einsum('bd,bkd->bk', sides[side], state['crd'][f'{other}_bank'][rows]) / 0.3)
            p = p / jax.lax.stop_gradient(EXAMPLES * p.mean())
            h = p / (p + NEGATIVES / EXAMPLES + 1e-7)
            total -= jnp.log(h[:, 0]) + jnp.log(1 - h[:, 1:]).sum(1)
        return total.mean()

    def bottleneck(p, x, activated):
        for i in range(3):
            x = convolution(p[f'Conv_{i}'], x)
            x = jnp.maximum(batch_norm(p[f'BatchNorm_{i}'], x), 0.0) if i < activated else x
        return x

    def semckd(p):
        def embedding(p, x):
            hidden = x.mean((1, 2)) @ p['Dense_0']['kernel'] + p['Dense_0']['bias'][None]
            y = jnp.maximum(hidden, 0.0) @ p['Dense_1']['kernel'] + p['Dense_1']['bias'][None]
            return y / jnp.linalg.norm(y, axis=1, keepdims=True)

        first, last = s['semckd/first'], s['semckd/last']
        queries = [embedding(p[f'query{i}'], x) for i, x in enumerate((first, last))]
        keys = [embedding(p[f'key{j}'], t[name]) for j, name in enumerate(('image', 'small', 'narrow'))]
        weights = jnp.exp(jnp.array([[jnp.sum(q * k, axis=1) / 0.3 for k in keys] for q in queries]))
        weights = weights / weights.sum(1, keepdims=True)
        quarter, half = first.reshape(len(first), 2, 4, 2, 4, 3).mean((2, 4)), halved(first)
        smaller = {name: t[name].reshape(len(first), 2, 2, 2, 2, -1).mean((2, 4)) for name in ('image', 'narrow')}
        pairs = {
            (0, 0): (half, t['image']),
            (0, 1): (quarter, t['small']),
            (0, 2): (half, t['narrow']),
            (1, 0): (last, smaller['image']),
            (1, 1): (last, t['small']),
            (1, 2): (last, smaller['narrow']),
        }
        return sum(
            jnp.mean(weights[i, j] * jnp.mean((bottleneck(p[f'project{i}_{j}'], x, 2) - y) ** 2, axis=(1, 2, 3))) / 2
            for (i, j), (x, y) in pairs.items()
        )

    def fbkd(p):
        def dense(p, x):
            return x @ p['kernel'] + p['bias'].reshape((1,) * (x.ndim - 1) + (-1,))

        def relations(p, x):
            flat = x.reshape(len(x), -1, x.shape[-1])
            theta, phi, g = (dense(p[name], flat) for name in ('theta', 'phi', 'g'))
            weights = jnp.einsum('bic,bjc->bij', theta, phi) / flat.shape[1]
            return (flat + dense(p['out'], jnp.einsum('bij,bjc->bic', weights, g))).reshape(x.shape)

        source = halved(s['fbkd'])
        of_student = dense(p['adapt_relations'], relations(p['student_relations'], source))
        difference = relations(p['teacher_relations'], t['image']) - of_student
        options = {'guided': 0.3, 'attention': 0.4, 'temperature': 0.7}
        adapted = losses.fbkd(dense(p['adapt'], source), t['image'], **options)
        return jnp.mean(adapted + 0.5 * jnp.sqrt(jnp.sum(difference**2, axis=(1, 2, 3))))

    def srd():
        def standardized(x):
            return (x - x.mean(0, keepdims=True)) / jnp.sqrt(x.var(0, keepdims=True) + 1e-4)

        projected = s['srd'].mean((1, 2)) @ params['srd']['Dense_0']['kernel']
        return losses.srd(standardized(projected), standardized(t['vector']), exponent=2.0).mean()

    begin = convolution(params['fsp']['begin']['Conv_0'], s['fsp/begin'])
    aligned = convolution(params['masked_generation']['align']['Conv_0'], s['masked_generation'])
    generated = convolutions(params['masked_generation']['generator'], aligned * keep, 0.0)
    return {
        'nst': losses.nst(s['nst'], t['image']).mean(),
        'singular_vectors': losses.singular_vectors(s['singular_vectors'], t['image'], rank=2).mean(),
        'fsp': losses.fsp(begin, s['fsp/end'], t['image'], t['narrow']).mean(),
        'channel_wise': losses.channel_wise(one_by_one('channel_wise', s['channel_wise']), t['image'], temperature=3.0).mean(),
        'activation_boundary': losses.activation_boundary(
            normalized('activation_boundary'), t['image'], margin=0.5 * STEP
        ).mean(),
        'masked_generation': losses.masked_generation(generated, t['image']).mean(),
        'vid': vid(params['vid']),
        'factor_transfer': factor_transfer(params['factor_transfer']),
        'overhaul': overhaul(),
        'hierarchical_context': hierarchical_context(params['hierarchical_context']),
        'simkd': jnp.mean((bottleneck(params['simkd'], halved(s['simkd']), 3) - t['image']) ** 2),
        'semckd': semckd(params['semckd']),
        'fbkd': fbkd(params['fbkd']),
        'srd': srd(),
        'inter_channel': losses.inter_channel(
            batch_norm(
                params['inter_channel']['BatchNorm_0'],
                convolution(params['inter_channel']['Conv_0'], halved(s['inter_channel'])),
            ),
            t['image'],
        ).mean(),
        'pearson_features': losses.pearson_features(
            halved(s['pearson_features']) @ params['pearson_features']['kernel'], t['image']
        ).mean(),
        'info_nce': losses.info_nce(
            embedded('info_nce', 'student', s['info_nce']), embedded('info_nce', 'teacher', t['vector']), temperature=0.2
        ),
        'crd': crd(),
        'pkt': losses.pkt(s['pkt'], t['vector']),
        'rkd_distance': losses.rkd_distance(s['rkd_distance'], t['vector']),
        'rkd_angle': losses.rkd_angle(s['rkd_angle'], t['vector']),
        'correlation_congruence': losses.correlation_congruence(
            s['correlation_congruence'], t['vector'], gamma=0.3, order=3
        ).mean(),
        'instance_graph': losses.instance_graph(
            student.logits,
            teacher.logits,
            [s['instance_graph/first'], s['instance_graph/last']],
            [t['image'], t['vector']],
        ),
    }


def outputs():
    return tuple(
        Outputs(arrays({'logits': (BATCH, 4)}, seed)['logits'], arrays(shapes, seed + 1))
        for seed, shapes in ((0, STUDENT_SHAPES), (2, TEACHER_SHAPES))
    )


@functools.cache
def parameters_and_state():
    student, teacher = outputs()
    params = random_params(OBJECTIVE, student, teacher, BATCH_SHAPES)
    _, state = abstract_init(OBJECTIVE, student, teacher, BATCH_SHAPES)
    banks = arrays({'student_bank': (EXAMPLES, 4), 'teacher_bank': (EXAMPLES, 4)}, 5)
    state['crd'] = {
        **jax.tree.map(jnp.asarray, banks),
        'normalizers': jnp.zeros(2),
        'classes': losses.class_index(CLASSES)._asdict(),
        'key': jax.random.key(6),
    }
    state['masked_generation'] = {'key': jax.random.key(7)}
    state['simkd'] = jax.tree.map(lambda x: jnp.ones(x.shape), state['simkd'])
    return params, state


@compile_quickly
def run(params, state, student, teacher, batch):
    def loss(params, student, teacher):
        value, metrics, _ = OBJECTIVE.apply(params, state, student, teacher, batch, step=STEP)
        return value, metrics

    gradients, metrics = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, student, teacher)
    return metrics, gradients


@functools.cache
def computed(kept):
    params, state = parameters_and_state()
    batch = {'index': INDEX, 'mask': MASK if kept else np.zeros(BATCH, bool)}
    return jax.device_get(run(params, state, *outputs(), batch))


def sliced(outputs):
    """The examples that count; parameters among the features have none."""
    return Outputs(outputs.logits[MASK], {name: x[MASK] if x.shape[0] == BATCH else x for name, x in outputs.features.items()})


@functools.cache
def expected():
    params, state = parameters_and_state()
    student, teacher = (sliced(side) for side in outputs())
    index = losses.class_index(CLASSES)

    def loss(params, student):
        drawn = losses.crd_negatives(jax.random.fold_in(state['crd']['key'], STEP), INDEX, index, NEGATIVES)
        rows = jnp.concatenate([INDEX[:, None], drawn], axis=1)[MASK]
        keep = jax.random.bernoulli(jax.random.fold_in(state['masked_generation']['key'], STEP), 0.6, (BATCH, 4, 4, 1))
        values = by_hand(params, state, student, teacher, rows, jnp.float32(keep)[MASK])
        return sum(values.values()), values

    gradients, values = compile_quickly(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, student)
    return jax.device_get((values, gradients))


def layers(name):
    return [path for path in STUDENT_SHAPES if path.split('/')[0] == name]


every_term = pytest.mark.parametrize('name', list(TERMS))


def check_close(computed, expected):
    """To a few units in the last place of the largest number in the tree: some gradients are zero but for rounding."""
    leaves = list(zip(jax.tree.leaves(computed), jax.tree.leaves(expected), strict=True))
    largest = max((np.abs(y).max() for _, y in leaves), default=0.0)
    for x, y in leaves:
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * largest)


@every_term
def test_the_value_is_that_of_connectors_and_loss_by_hand_on_the_examples_that_count(name):
    metric = computed(True)[0][name]
    np.testing.assert_allclose(metric.total / metric.count, expected()[0][name], rtol=2e-5)


@every_term
def test_gradients_reach_student_and_connectors_as_by_hand_and_never_what_is_masked_out(name):
    params_gradient, student_gradient, _ = computed(True)[1]
    params_expected, student_expected = expected()[1]
    for path in layers(name):
        gradient = student_gradient.features[path]
        check_close(gradient[MASK], student_expected.features[path])
        assert np.any(gradient[MASK] != 0)
        np.testing.assert_array_equal(gradient[~MASK], np.zeros_like(gradient[~MASK]))
    check_close(params_gradient[name], params_expected[name])


def test_the_graph_s_gradient_reaches_the_logits():
    gradient = computed(True)[1][1].logits
    check_close(gradient[MASK], expected()[1][1].logits)
    assert np.any(gradient != 0)
    np.testing.assert_array_equal(gradient[~MASK], np.zeros_like(gradient[~MASK]))


def test_no_gradient_reaches_the_teacher():
    for leaf in jax.tree.leaves(computed(True)[1][2]):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_all_connectors_are_trained():
    """Biases have no say before a batch norm, nor before a softmax over positions."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(computed(True)[1][0]):
        idle = jax.tree_util.keystr(path, simple=True, separator='/') in (
            'activation_boundary/Conv_0/bias',
            'channel_wise/Conv_0/bias',
            'overhaul/Conv_0/bias',
        )
        assert idle or np.any(np.abs(leaf) > 1e-6), path


@every_term
def test_a_batch_that_is_masked_out_gives_zero_and_no_gradient(name):
    metrics, (params_gradient, student_gradient, _) = computed(False)
    assert metrics[name].total == 0
    for leaf in jax.tree.leaves((params_gradient[name], [student_gradient.features[path] for path in layers(name)])):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


@every_term
def test_missing_layers_are_an_error_that_says_whose(name):
    student, teacher = outputs()
    message = init_error(TERMS[name], Outputs(student.logits), teacher, BATCH_SHAPES)
    assert message.startswith(f'{name}: the student gives no feature {layers(name)[0]!r} (it gives: none)')
    message = init_error(TERMS[name], student, Outputs(teacher.logits), BATCH_SHAPES)
    assert message.startswith(f'{name}: the teacher gives no feature ')


def test_half_precision_networks_get_float32_connectors_and_losses():
    halves = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), outputs())
    params, state = abstract_init(OBJECTIVE, *halves, BATCH_SHAPES)
    apply = functools.partial(OBJECTIVE.apply, step=0)
    loss, metrics, new_state = jax.eval_shape(apply, params, state, *halves, BATCH_SHAPES)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, loss, metrics))} == {jnp.dtype('float32')}
    # What training remembers keeps its shapes and dtypes, as scans and checkpoints need.
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
