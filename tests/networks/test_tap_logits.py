"""Members of an ensemble, one by one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.toy_problem import SILENT

from kdjax import networks


def test_the_logits_of_every_member_are_features(key: jax.Array) -> None:
    members = [networks.from_linen(nn.Dense(3)), networks.from_linen(nn.Dense(2))]
    variables = [member.init(key, jnp.ones((4, 5))) for member in members]
    tapped = [networks.tap_logits(member) for member in members]
    joined = networks.label_union(tapped, [[0, 1, 2], [2, 3]])
    outputs, _ = joined.apply(networks.ensemble_variables(variables), jnp.ones((4, 5)))
    for i, (member, own) in enumerate(zip(members, variables, strict=True)):
        np.testing.assert_array_equal(outputs.features[f'{i}/logits'], member.apply(own, jnp.ones((4, 5)))[0].logits)


def test_there_are_no_logits_of_nothing() -> None:
    with pytest.raises(ValueError, match='tap_logits: the network gives no logits'):
        networks.tap_logits(SILENT).apply({}, None)


def test_member_variables_take_apart_what_ensemble_variables_join() -> None:
    members = [{'params': {'a': 1}}, {'params': {'b': 2}, 'batch_stats': {'c': 3}}]
    joined = networks.ensemble_variables(members)
    assert [networks.member_variables(joined, i) for i in range(2)] == members
    with pytest.raises(ValueError, match='there is no member 2; there are: 0, 1'):
        networks.member_variables(joined, 2)
