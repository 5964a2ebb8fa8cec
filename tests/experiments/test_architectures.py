"""Every name on the command line makes a network that has the features which recipes ask for."""

import jax
import jax.numpy as jnp
import pytest

from experiments.architectures import ARCHITECTURES, network
from kdjax import models, networks, recipes

IMAGES = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)


@pytest.mark.parametrize('name', list(ARCHITECTURES))
def test_logits_and_stages(name):
    made = network(ARCHITECTURES[name], 7)
    variables = jax.eval_shape(lambda: made.init(jax.random.key(0), IMAGES))
    outputs = jax.eval_shape(lambda variables, inputs: made.apply(variables, inputs)[0], variables, IMAGES)
    assert outputs.logits.shape == (2, 7)
    stages = [outputs.features[stage] for stage in ARCHITECTURES[name].stages]
    assert all(stage.shape[0] == 2 for stage in stages)
    pair = recipes.pair(made, made, IMAGES, steps_per_epoch=1)
    assert pair.student == pair.teacher == ARCHITECTURES[name].stages
    assert pair.student_norms == pair.teacher_norms == ARCHITECTURES[name].norms
    areas = [stage.shape[1] * stage.shape[2] for stage in stages if stage.ndim == 4]
    assert areas == sorted(areas, reverse=True)


def test_a_recipe_for_layers_says_which_network_taps_none():
    module = models.CNN((4, 8), (8,))
    bare, tapped = networks.from_linen(module), networks.from_linen(module, features=('stage0', 'stage1'))
    pair = recipes.pair(tapped, bare, IMAGES, steps_per_epoch=1)
    recipes.soft_targets(pair)
    for recipe, what in (
        (recipes.hint, 'layers, and the teacher'),
        (recipes.hidden_cosine, 'layers, and the teacher'),
        (recipes.pkt, 'embeddings, and the student'),
        (recipes.overhaul, 'stages before their last ReLU, and the student'),
    ):
        with pytest.raises(ValueError, match=f'the recipe {recipe.__name__} compares {what} taps none'):
            recipe(pair)


def test_stages_are_in_the_order_of_their_numbers():
    network = networks.from_linen(models.MLP((2,) * 12), features=[f'hidden{i}' for i in range(12)])
    pair = recipes.pair(network, network, jax.ShapeDtypeStruct((2, 3), jnp.float32), steps_per_epoch=1)
    assert pair.student == tuple(f'hidden{i}' for i in range(12))
