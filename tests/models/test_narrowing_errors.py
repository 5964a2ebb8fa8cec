"""Variables that differ from the module's in more than channels that can be removed are errors that name the layer."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from helpers.model_checks import abstract_variables

from kdjax import models, paths

INPUTS = jax.ShapeDtypeStruct((3, 4, 4, 2), jnp.float32)
MODULES = {
    'cnn': models.CNN((4, 3), (5,)),
    'resnet': models.ResNet(8, widths=(4, 4, 6, 5)),
    'mobilenet': models.MobileNetV2(((2, 4, 1, 1),), stem=3, last=6),
    'transformer': models.VisionTransformer(depth=1, width=4, heads=2, patches=2),
}


def replaced(case: str, shapes: dict[str, tuple[int, ...] | None]) -> tuple[nn.Module, dict]:
    """A module, and its parameters with other shapes, without those that are None, and with new ones."""
    module = MODULES[case]
    standard = paths.leaves_with_paths(abstract_variables(module, INPUTS))
    tree: dict = {}
    for path, shape in ({path: leaf.shape for path, leaf in standard.items()} | shapes).items():
        *parents, name = path.split('/')
        node = functools.reduce(lambda node, parent: node.setdefault(parent, {}), parents, tree)
        if shape is not None:
            node[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return module, tree


@pytest.mark.parametrize(
    'case, shapes, message',
    [
        ('cnn', {'params/stage9/conv/kernel': (3, 3, 2, 4)}, r"unknown: \['params/stage9/conv/kernel'\], missing: \[\]"),
        ('cnn', {'params/stage0/conv/bias': None}, r"unknown: \[\], missing: \['params/stage0/conv/bias'\]"),
        (
            'cnn',
            {'params/stage0/conv/kernel': (5, 5, 2, 4)},
            r'stage0/conv/kernel of CNN must .* \(3, 3, 2, 4\) .* \(5, 5, 2, 4\)',
        ),
        (
            'cnn',
            {'params/stage0/conv/kernel': (3, 3, 2, 3)},
            r'stage0/conv/bias of CNN must have the shape \(3,\) .* got \(4,\)',
        ),
        ('cnn', {'params/stage0/conv/kernel': (3, 3, 2, 7)}, r'stage0/conv of CNN must have 1 to 4 channels, got 7'),
        ('cnn', {'params/hidden0/kernel': (3, 0)}, r'hidden0 of CNN must have 1 to 5 channels, got 0'),
        ('cnn', {'params/hidden0/kernel': ()}, r'hidden0 of CNN must have 1 to 5 channels, got 0'),
        ('cnn', {'params/head/kernel': (5, 7), 'params/head/bias': (7,)}, r'head/bias of CNN must have the shape \(10,\)'),
        ('transformer', {'params/embed/kernel': (2, 2, 2, 3)}, r'embed/kernel of VisionTransformer must have the shape'),
        ('transformer', {'params/block0/attention/key/kernel': (4, 2, 1)}, r'attention/key/kernel of VisionTransformer must'),
        (
            'mobilenet',
            {'params/stage1/block0/depthwise/kernel': (3, 3, 1, 5)},
            r'stage1/block0/depthwise/kernel of MobileNetV2 must have the shape \(3, 3, 1, 6\)',
        ),
        (
            'resnet',
            {'params/stage1/block0/conv2/kernel': (3, 3, 4, 3)},
            r"ResNet cannot have the channels \{'stage1/block0/conv2': 3\}; additions need equal ones: ",
        ),
    ],
)
def test_variables_that_do_not_fit_otherwise_are_errors(case: str, shapes: dict, message: str) -> None:
    module, variables = replaced(case, shapes)
    with pytest.raises(ValueError, match=f'^narrow: .*{message}') as error:
        models.narrow(module, variables, INPUTS)
    assert '\n' not in str(error.value)


def test_modules_without_the_field_are_errors() -> None:
    with pytest.raises(ValueError, match=r'^narrow: Dense has no field `narrowed`'):
        models.narrow(nn.Dense(3), {'params': {}}, INPUTS)
