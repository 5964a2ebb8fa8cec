"""Which positions along which axes of a network's variables are the same channel: a walk over its jaxpr.

Every position along every axis of every value has a label. An equation that combines two positions one to one makes their
labels the same; one that depends on how many positions there are, or of which this walk does not know what it does, makes them
fixed. What has the same label in the end, and is not fixed, can only be removed together, and can be.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from kdjax import jaxprs
from kdjax.networks import Network, dense_logits
from kdjax.paths import leaves_with_paths

Labels = list[np.ndarray]
"""One array of labels for every axis of a value."""

FIXED = 0

_ELEMENTWISE = (
    'abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type copy copy_p cos cosh div '
    'eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul name ne neg '
    'nextafter not optimization_barrier or pow reduce_precision rem round rsqrt select_n sharding_constraint sign sin sinh '
    'sqrt square stop_gradient sub tan tanh xor'
)
_REDUCTIONS = 'argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor'


def same_channels(network: Network, variables: Mapping[str, Any], inputs: Any) -> list[dict[tuple[str, int], list[int]]]:
    """The channels of a network: for each, its positions by path and axis of the variables.

    Only channels that some product makes and some product reads are listed, in the order of their first position.
    """

    def logits(variables: Any, inputs: Any) -> jax.Array:
        return dense_logits(network.apply(variables, inputs)[0].logits)

    program, _ = jaxprs.trace(logits, dict(variables), inputs)
    walk = _Walk()
    named = leaves_with_paths(dict(variables))
    labels = [walk.fresh(leaf.shape) for leaf in named.values()]
    fixed = [walk.fixed(leaf.shape) for leaf in jax.tree.leaves(inputs)]
    for output in walk.run(program, [*labels, *fixed]):
        walk.fix(output)
    made, read = (set(map(walk.root, labels)) for labels in (walk.made, walk.read))
    channels: dict[int, dict[tuple[str, int], list[int]]] = {}
    for path, axes in zip(named, labels, strict=True):
        for axis, along in enumerate(axes):
            for position, label in enumerate(along):
                root = walk.root(label)
                if root in made and root in read and root != walk.root(FIXED):
                    channels.setdefault(root, {}).setdefault((path, axis), []).append(position)
    return list(channels.values())


class _Walk:
    """The labels, as sets that are merged."""

    def __init__(self) -> None:
        self.parents = [FIXED]
        self.made: list[int] = []
        self.read: list[int] = []

    def fresh(self, shape: Sequence[int]) -> Labels:
        labels = []
        for length in shape:
            labels.append(np.arange(len(self.parents), len(self.parents) + length))
            self.parents.extend(range(len(self.parents), len(self.parents) + length))
        return labels

    @staticmethod
    def fixed(shape: Sequence[int]) -> Labels:
        return [np.full(length, FIXED) for length in shape]

    def root(self, label: int) -> int:
        while self.parents[label] != label:
            self.parents[label] = self.parents[self.parents[label]]
            label = self.parents[label]
        return int(label)

    def same(self, one: np.ndarray, other: np.ndarray) -> None:
        if one is not other:
            for a, b in zip(one, other, strict=True):
                a, b = self.root(a), self.root(b)
                self.parents[max(a, b)] = min(a, b)  # so that the root of what is fixed stays FIXED

    def fix(self, labels: Labels) -> None:
        for along in labels:
            self.same(along, np.full(len(along), FIXED))

    def run(self, program: jaxprs.Program, arguments: Sequence[Labels]) -> list[Labels]:
        """Labels of what a program returns."""
        known = dict(zip(program.jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> Labels:
            # Constants are no parameters, and cannot be cut.
            shape = atom.aval.shape
            return self.fixed(shape) if isinstance(atom, core.Literal) or atom not in known else known[atom]

        for equation, step in zip(program.jaxpr.eqns, program.steps, strict=True):
            outputs = self.equation(equation, step, [read(atom) for atom in equation.invars])
            known.update(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in program.jaxpr.outvars]

    def equation(self, equation: Any, step: Any, operands: list[Labels]) -> list[Labels]:
        name, options = equation.primitive.name, equation.params
        shapes = [atom.aval.shape for atom in equation.outvars]
        if isinstance(step, jaxprs.Product) and step.weights is not None:
            return [self.product(step, step.weights, *operands)]
        if name == 'scan':
            return self.scan(equation, step, operands)
        if (inner := jaxprs.called(equation)) is not None:
            program = step if isinstance(step, jaxprs.Program) else jaxprs.without_products(inner)
            return self.run(program, operands)
        if name in _ELEMENTWISE.split() and all(not labels or len(labels) == len(shapes[0]) for labels in operands):
            return self.elementwise(operands, shapes)
        if name in _REDUCTIONS.split():
            (labels,) = operands
            self.fix([labels[axis] for axis in options['axes']])
            return [[along for axis, along in enumerate(labels) if axis not in options['axes']]]
        if name == 'broadcast_in_dim':
            return [self.broadcast(operands[0], options['shape'], options['broadcast_dimensions'])]
        if name == 'transpose':
            return [[operands[0][axis] for axis in options['permutation']]]
        if name == 'squeeze':
            return [[along for axis, along in enumerate(operands[0]) if axis not in options['dimensions']]]
        if name == 'reshape':
            return [self.reshape(operands[0], shapes[0])]
        if name == 'concatenate':
            return [self.concatenate(operands, options['dimension'])]
        if name in ('slice', 'pad') or name.startswith('reduce_window'):
            # Whole axes go through. A window that slides along channels changes their number, or stops at the first and last.
            untouched = _untouched_axes(name, options, operands[0], shapes[0])
            self.fix([along for axis, along in enumerate(operands[0]) if axis not in untouched])
            return [
                [operands[0][axis] if axis in untouched else np.full(length, FIXED) for axis, length in enumerate(shape)]
                for shape in shapes
            ]
        for labels in operands:
            self.fix(labels)
        return [self.fixed(shape) for shape in shapes]

    def product(self, product: jaxprs.Product, side: int, lhs: Labels, rhs: Labels) -> Labels:
        operands, options = (lhs, rhs), product.options
        output = self.fixed(product.output.shape)
        for i, labels in enumerate(operands):
            for axis, to in product.kept(i).items():
                output[to] = labels[axis]
        weights = operands[side]
        self.made.extend(np.concatenate([weights[axis] for axis in product.kept(side)] or [np.array([], int)]))
        if product.primitive == 'dot_general':
            for one, other in zip(*options['dimension_numbers'][0], strict=True):
                self.same(lhs[one], rhs[other])
                self.read.extend(weights[other if side == 1 else one])
            for one, other in zip(*options['dimension_numbers'][1], strict=True):
                self.same(lhs[one], rhs[other])
            return output
        numbers = options['dimension_numbers']
        features, (outputs, inputs) = lhs[numbers.lhs_spec[1]], (rhs[axis] for axis in numbers.rhs_spec[:2])
        self.fix([lhs[axis] for axis in numbers.lhs_spec[2:]] + [rhs[axis] for axis in numbers.rhs_spec[2:]])
        if options['feature_group_count'] == 1 and options['batch_group_count'] == 1:
            self.same(features, inputs)
            self.read.extend(inputs)
        elif len(inputs) == 1 and options['batch_group_count'] == 1:
            self.same(np.repeat(features, len(outputs) // len(features)), outputs)
            self.read.extend(outputs)
            self.fix([inputs])
        else:
            self.fix([features, outputs, inputs])
        return output

    def elementwise(self, operands: list[Labels], shapes: list[Any]) -> list[Labels]:
        result = self.fresh(shapes[0])
        for labels in operands:
            for axis, along in enumerate(labels):
                if len(along) == shapes[0][axis]:
                    self.same(result[axis], along)
                else:
                    self.fix([along])
        return [result] * len(shapes)

    def broadcast(self, labels: Labels, shape: Sequence[int], axes: Sequence[int]) -> Labels:
        result = self.fresh(shape)
        for along, axis in zip(labels, axes, strict=True):
            if len(along) == shape[axis]:
                result[axis] = along
            else:
                self.fix([along])
        return result

    def reshape(self, labels: Labels, shape: Sequence[int]) -> Labels:
        result = self.fixed(shape)
        self.fix([along for along in labels if len(along) == 1])
        for before, after in _blocks([len(along) for along in labels], shape):
            parts = [labels[axis] for axis in before]
            free = [i for i, along in enumerate(parts) if any(self.root(label) != FIXED for label in along)]
            if len(after) == 1 and len(free) == 1:
                # Merged with axes that stay, every position carries the channel that it had.
                where = np.indices([len(along) for along in parts])[free[0]].ravel()
                result[after[0]] = parts[free[0]][where]
            else:
                self.fix(parts)
        return result

    def concatenate(self, operands: list[Labels], dimension: int) -> Labels:
        first = list(operands[0])
        for labels in operands[1:]:
            for axis, along in enumerate(labels):
                if axis != dimension:
                    self.same(first[axis], along)
        first[dimension] = np.concatenate([labels[dimension] for labels in operands])
        return first

    def scan(self, equation: Any, step: Any, operands: list[Labels]) -> list[Labels]:
        body = equation.params['jaxpr']
        program = step if isinstance(step, jaxprs.Program) else jaxprs.without_products(body)
        constants, carries = jaxprs.scan_counts(equation)
        stacked = operands[constants + carries :]
        self.fix([labels[0] for labels in stacked])
        initial = operands[constants : constants + carries]
        outputs = self.run(program, [*operands[:constants], *initial, *(labels[1:] for labels in stacked)])
        for before, after in zip(initial, outputs, strict=False):
            for one, other in zip(before, after, strict=True):
                self.same(one, other)
        length = equation.params['length']
        return [*outputs[:carries], *([np.full(length, FIXED), *labels] for labels in outputs[carries:])]


def _untouched_axes(name: str, options: Mapping[str, Any], labels: Labels, shape: Sequence[int]) -> list[int]:
    same_length = [axis for axis, along in enumerate(labels) if len(along) == shape[axis]]
    if name == 'slice':
        return same_length
    if name == 'pad':
        return [axis for axis in same_length if tuple(options['padding_config'][axis]) == (0, 0, 0)]
    return [axis for axis in same_length if options['window_dimensions'][axis] == 1]


def _blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Axes of two shapes of one size, without those of length 1, in the smallest blocks whose products agree."""
    left, right = ([axis for axis, length in enumerate(shape) if length != 1] for shape in (before, after))
    blocks = []
    while left or right:
        one, other = [left.pop(0)], [right.pop(0)]
        while (size := math.prod(before[axis] for axis in one)) != (other_size := math.prod(after[axis] for axis in other)):
            if size < other_size:
                one.append(left.pop(0))
            else:
                other.append(right.pop(0))
        blocks.append((one, other))
    return blocks
