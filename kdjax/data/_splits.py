"""Examples that are still to be read, and how they are shared out among training, validation and test."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

SPLITS = ('train', 'validation', 'test')


class Images(NamedTuple):
    """Labelled images, which are read when they are asked for.

    Attributes:
      labels: int32 [examples].
      read: `read(indices, size) -> [uint8 [height, width, channels], ...]`, of those examples, resized if the size is not None.
      shapes: `shapes() -> {(height, width, channels), ...}`, of all of them, found without reading them where that is possible.
    """

    labels: np.ndarray
    read: Callable[[np.ndarray, tuple[int, int] | None], Sequence[np.ndarray] | np.ndarray]
    shapes: Callable[[], set[tuple[int, int, int]]]


class Found(NamedTuple):
    """A data set that was found.

    Attributes:
      class_names: of all classes, by label.
      splits: some of `SPLITS`, `'train'` among them.
      identity: what tells it from others, and from itself once it was changed; None for what is quick to read again.
      stratified: whether splits that are drawn have every class in proportion.
    """

    class_names: tuple[str, ...]
    splits: Mapping[str, Images]
    identity: Any = None
    stratified: bool = True


def share_out(found: Found, *, name: str, validation: float, test: float, seed: int) -> dict[str, tuple[Images, np.ndarray]]:
    """Draws the splits that a data set does not have from its training split.

    Returns:
      Of every split where it is read, and the indices there, in rising order.

    Raises:
      ValueError: a split is empty, or a class of another split is not in the training split.
    """
    for option, share in (('validation', validation), ('test', test)):
        if not 0 < share < 1:
            raise ValueError(f'{option} must be a share between 0 and 1, got {share}')
    train = found.splits['train']
    rest = np.arange(len(train.labels))
    shared: dict[str, tuple[Images, np.ndarray]] = {}
    for split, share in (('test', test), ('validation', validation)):
        if split in found.splits:
            shared[split] = found.splits[split], np.arange(len(found.splits[split].labels))
        else:
            chosen = _draw(train.labels[rest], share, seed, stratified=found.stratified or split == 'test')
            shared[split] = train, rest[chosen]
            rest = np.delete(rest, chosen)
    shared['train'] = train, rest
    labels = {split: images.labels[indices] for split, (images, indices) in shared.items()}
    for split in SPLITS:
        if not len(labels[split]):
            raise ValueError(
                f'{name}: the {split} split is empty, with {len(train.labels)} training examples, validation={validation} and '
                f'test={test}'
            )
        # Where classes are drawn in proportion the training split has all that there are.
        unknown = sorted({*labels[split].tolist()} - {*labels['train'].tolist()} - {-1})
        if unknown and found.stratified:
            raise ValueError(
                f'{name}: class {found.class_names[unknown[0]]!r} is in the {split} split and not in the training split'
            )
    return {split: shared[split] for split in SPLITS}


def _draw(labels: np.ndarray, share: float, seed: int, *, stratified: bool) -> np.ndarray:
    """Indices of a share of the examples, in rising order."""
    order = np.random.default_rng(seed).permutation(len(labels))
    if not stratified:
        return np.sort(order[: round(share * len(labels))])
    chosen = []
    for label in np.unique(labels):
        members = order[labels[order] == label]
        # A class of two or more is in every split that is drawn, and in what is left.
        number = min(max(1, round(share * len(members))), len(members) - 1)
        chosen.append(members[: max(0, number)])
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, int)
