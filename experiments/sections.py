"""What a report says of a classifier beyond its accuracy: class by class, what it takes for what, how sure it may be."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from experiments import figures
from experiments.reporting import Section

_BINS = 10


def of_classifiers(
    output: pathlib.Path, labels: np.ndarray, logits: Mapping[str, np.ndarray], class_names: Sequence[str]
) -> list[Section]:
    """Sections on the test split of several networks; the figures are of the last of them.

    Args:
      output: folder for the figures.
      labels: integers [examples].
      logits: [examples, classes] of every network, by name.
      class_names: by label.
    """
    name, last = list(logits.items())[-1]
    figures.draw_confusion(output / 'confusion.png', confusion(labels, last), class_names, f'What {name} takes for what')
    figures.draw_reliability(output / 'calibration.png', *reliability(labels, last), f'How sure {name} may be')
    found = {each: recall(labels, chosen, len(class_names)) for each, chosen in logits.items()}
    figures.draw_classes(output / 'classes.png', found, class_names, 'How much of each class is found')
    return [
        Section('Class by class', per_class(labels, logits, class_names), 'classes.png'),
        Section('Confusion', f'Rows are the classes of the test examples, columns those that {name} prefers.', 'confusion.png'),
        Section('Calibration', f'Right answers of {name} by its confidence; the diagonal is ideal.', 'calibration.png'),
    ]


def recall(labels: np.ndarray, logits: np.ndarray, classes: int) -> np.ndarray:
    """The share of each class that is found, NaN for a class without examples.

    >>> recall(np.array([0, 0, 2]), np.array([[2., 1., 0.], [1., 2., 0.], [0., 0., 1.]]), 3).tolist()
    [0.5, nan, 1.0]
    """
    right, counts = labels == np.argmax(logits, -1), np.bincount(labels[labels >= 0], minlength=classes)
    found = np.bincount(labels[right & (labels >= 0)], minlength=classes)
    return np.divide(found, counts, out=np.full(classes, np.nan), where=counts > 0)


def per_class(labels: np.ndarray, logits: Mapping[str, np.ndarray], class_names: Sequence[str]) -> str:
    """A table of every class: its examples, and of every network the share of them that it finds, and its precision."""
    chosen = {name: np.argmax(each, -1) for name, each in logits.items()}
    heads = ['class', 'examples', *(f'{name}: {what} (%)' for name in chosen for what in ('recall', 'precision'))]
    lines = ['| ' + ' | '.join(heads) + ' |', '|---' * len(heads) + '|']
    for label, name in enumerate(class_names):
        of_class = labels == label
        cells = [name.replace('|', '\\|'), f'{of_class.sum():,}']
        for each in chosen.values():
            right = np.sum(of_class & (each == label))
            cells += [_percent(right, of_class.sum()), _percent(right, np.sum((each == label) & (labels >= 0)))]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def confusion(labels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Numbers of examples [class, preferred class].

    >>> confusion(np.array([0, 0, 1]), np.array([[2., 1.], [1., 2.], [1., 2.]])).tolist()
    [[1, 1], [0, 1]]
    """
    kept, classes = labels >= 0, logits.shape[-1]
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (labels[kept], np.argmax(logits[kept], -1)), 1)
    return counts


def reliability(labels: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean confidence, accuracy and number of examples in each of ten bins of confidence; NaN in empty ones."""
    logits, labels = logits[labels >= 0].astype(np.float64), labels[labels >= 0]
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    confidence = (shares / shares.sum(-1, keepdims=True)).max(-1)
    right = np.argmax(logits, -1) == labels
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    counts = np.bincount(bins, minlength=_BINS)
    means = [np.bincount(bins, weights=each, minlength=_BINS) for each in (confidence, right.astype(float))]
    with np.errstate(invalid='ignore'):
        return means[0] / counts, means[1] / counts, counts


def _percent(part: int, whole: int) -> str:
    return f'{100 * part / whole:.1f}' if whole else '-'
