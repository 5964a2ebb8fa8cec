"""The benchmark of memory, shrunk, and the numbers of the paper plan."""

import contextlib
import io
import json
import pathlib
import re

import numpy as np
import pytest

import kdjax
from experiments.benchmarks import memory

PLAN = pathlib.Path(kdjax.__file__).parent.parent / 'docs/results/scale.md'


def test_memory_reports_shares_and_collectives(capsys):
    memory.main(memory.Config(devices=(1, 8), depth=1, width=64, images=4))
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary['name'] == 'memory'
    assert 1.0 <= summary['ratio'] < 1.1
    alone, replicated, split = summary['rows']
    assert [(row['devices'], row['fsdp']) for row in summary['rows']] == [(1, 1), (8, 1), (8, 8)]
    assert alone['collectives'] == {}
    assert replicated['collectives'].keys() == {'all-reduce'}
    assert 'all-gather' in split['collectives']
    assert alone['sharded_bytes'] == replicated['sharded_bytes'] == alone['whole_bytes']
    assert split['argument_bytes'] < 0.5 * replicated['argument_bytes']


def test_collectives_are_counted_with_the_bytes_that_they_yield():
    text = """
      %a = (f32[4,2]{1,0}, f32[]) all-reduce(%b, %c), to_apply=%sum
      %d = bf16[3,5]{1,0} all-gather(%e), dimensions={0}
      %f = pred[7]{0} all-gather-start(%g)
      %h = f32[8]{0} add(%a, %d)
    """
    assert memory.collectives(text) == {'all-reduce': (1, 36), 'all-gather': (2, 37)}


def test_memory_refuses_devices_that_are_not_there():
    with pytest.raises(ValueError, match='asks for 16 devices, but there are only 8'):
        memory.main(memory.Config(devices=(1, 16)))


@pytest.fixture(scope='module')
def plan():
    """The page, and the names that its Python block defines, with what the block prints."""
    page = PLAN.read_text()
    (block,) = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(block, names)
    return page, names, printed.getvalue()


def test_the_plans_block_prints_its_table(plan):
    page, _, printed = plan
    assert printed.strip()
    assert printed.strip() in page


def test_the_plans_parameters_are_those_of_the_model(plan):
    """The formula counts what `models.VisionTransformer` of that size has."""
    import jax
    import jax.numpy as jnp

    from kdjax import models

    _, names, _ = plan
    for depth, width, heads in ((2, 64, 4), (3, 32, 2)):
        module = models.VisionTransformer(depth=depth, width=width, heads=heads, patches=14, classes=100)
        shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
        counted = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        assert names['parameters'](depth, width, classes=100) == counted


def test_the_plans_flops_are_those_of_the_compiled_model(plan):
    import jax
    import jax.numpy as jnp

    from kdjax import models

    _, names, _ = plan
    module = models.VisionTransformer(depth=2, width=64, heads=4, patches=14, classes=100)
    images = jnp.zeros((1, 224, 224, 3))
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    cost = jax.jit(module.apply).lower(variables, images).compile().cost_analysis()
    np.testing.assert_allclose(names['forward_flops'](2, 64, classes=100), cost['flops'], rtol=0.1)
