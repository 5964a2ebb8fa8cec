"""Recipes for a pair of transformers whose stages are their blocks."""

from collections.abc import Callable

from kdjax import objectives
from kdjax.objectives import Objective
from kdjax.recipes._pair import Pair, on_layers


@on_layers
def hidden_cosine(pair: Pair) -> Objective:
    """DistilBERT (Sanh 2019): hard labels + the cosine of hidden states at every layer."""
    return _over_layers(pair, 'hidden', 1.0, objectives.hidden_cosine, '')


@on_layers
def attention_maps(pair: Pair) -> Objective:
    """TinyBERT (Jiao 2020): hard labels + squared differences of attention scores at every layer."""
    return _over_layers(pair, 'attention', 1.0, objectives.attention_maps, '/attention/scores')


@on_layers
def value_relations(pair: Pair) -> Objective:
    """MiniLM (Wang 2020): hard labels + divergence of attention and of value relations at the last layer."""
    layers = f'{pair.student[-1]}/attention', f'{pair.teacher[-1]}/attention'
    attention = objectives.attention_maps(*(f'{layer}/scores' for layer in layers), variant='kl')
    values = objectives.value_relations(*(f'{layer}/values' for layer in layers))
    return objectives.combine(hard=objectives.hard_labels(), relations=attention + values)


def _over_layers(pair: Pair, name: str, weight: float, method: Callable[[str, str], Objective], tap: str) -> Objective:
    layers = objectives.uniform_layers([path + tap for path in pair.student], [path + tap for path in pair.teacher])
    return objectives.combine(hard=objectives.hard_labels(), **{name: weight * objectives.over_layers(method, layers)})
