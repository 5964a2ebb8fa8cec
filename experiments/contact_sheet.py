"""Shows every augmentation of `kdjax.data.augment` on real images, as one picture.

    python -m experiments.contact_sheet
    python -m experiments.contact_sheet --dataset fashion_mnist --output runs/contact_sheet_fashion

A row for each augmentation, and in it a few examples, each first as it is and then as it comes out under several keys. The
default is scikit-learn's photograph of a flower, in pieces of 64 x 64 pixels. The picture is `contact_sheet.png`; nothing is
trained.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from experiments import figures, runs, settings
from experiments.settings import Count
from kdjax import data

augment = data.augment
AUGMENTATIONS = {
    'shift': augment.random_shift(pixels=8),
    'crop': augment.random_crop(padding=8),
    'rotation': augment.random_rotation(degrees=30),
    'scale': augment.random_scale(change=0.3),
    'flip': augment.random_flip(),
    'vertical flip': augment.random_vertical_flip(),
    'brightness': augment.random_brightness(change=0.3),
    'contrast': augment.random_contrast(change=0.6),
    'saturation': augment.random_saturation(change=0.9),
    'blur': augment.random_blur(deviation=3.0),
    'noise': augment.random_noise(deviation=0.1),
    'cutout': augment.random_cutout(pixels=20),
}
MIXUP = augment.mixup(alpha=1.0)
SIDE = 64


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run."""

    dataset: str = 'photograph'
    """'photograph' and 'digits', which come with scikit-learn, or the name of an image data set of TensorFlow Datasets."""
    data_dir: str | None = None
    """Where TensorFlow Datasets keeps its data; its own default if not given."""
    examples: Count = 3
    """Images in a row."""
    versions: Count = 3
    """Keys for each of them."""
    output: settings.Folder = 'runs/contact_sheet'
    """Folder for the picture."""


def main(config: Config) -> None:
    """Augments and draws."""
    settings.check_ranges(config)
    if config.dataset == 'photograph':
        images = photograph()
    else:
        images = data.load(config.dataset, data_dir=config.data_dir).train['inputs']
    if config.examples > len(images):
        raise ValueError(f'--examples must be at most {len(images)}, the number of images, got {config.examples}')
    rows = sheet(images[: config.examples], config.versions)
    output = pathlib.Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    draw(output / 'contact_sheet.png', rows, 1 + config.versions)
    print(f'The picture is {output / "contact_sheet.png"}')


def photograph() -> np.ndarray:
    """Pieces of a photograph that comes with scikit-learn, uint8 [examples, 64, 64, 3], the busiest first."""
    from sklearn.datasets import load_sample_image

    # At half its size a piece shows more than a petal.
    image = load_sample_image('flower.jpg')[::2, ::2]
    rows, columns = (side // SIDE for side in image.shape[:2])
    pieces = image[: rows * SIDE, : columns * SIDE].reshape(rows, SIDE, columns, SIDE, 3)
    pieces = pieces.swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3)
    return pieces[np.argsort(-pieces.std(axis=(1, 2, 3)))]


def sheet(images: np.ndarray, versions: int) -> dict[str, np.ndarray]:
    """For every augmentation, each image and then its versions, [examples, 1 + versions, height, width, channels].

    Saturation is left out for images without colours.
    """
    keys = jax.random.split(jax.random.key(0), (len(images), versions))
    rows = {}
    for name, function in AUGMENTATIONS.items():
        if name == 'saturation' and images.shape[-1] != 3:
            continue
        augmented = jax.jit(jax.vmap(jax.vmap(function, in_axes=(0, None))))(keys, jnp.asarray(images))
        rows[name] = np.concatenate([images[:, None], augmented], axis=1)
    mixed = jax.jit(jax.vmap(lambda key: MIXUP(key, {'inputs': jnp.asarray(images)})['inputs']))(keys[0])
    rows['mixup'] = np.concatenate([images[:, None], np.swapaxes(mixed, 0, 1)], axis=1)
    return rows


def draw(path: pathlib.Path, rows: dict[str, np.ndarray], group: int) -> None:
    """Draws the rows; the first image of every group is the one that went in."""
    columns = next(iter(rows.values())).shape[0] * group
    figure, axes = plt.subplots(len(rows), columns, figsize=(0.9 * columns + 1, 0.95 * len(rows)), squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for place, image in zip(line, images.reshape(-1, *images.shape[2:]), strict=True):
            place.imshow(image.squeeze(), cmap='gray', vmin=0, vmax=255)
            place.set(xticks=[], yticks=[])
        for original in line[::group]:
            original.spines[:].set(color='tab:orange', linewidth=2.5)
        line[0].set_ylabel(name, rotation=0, ha='right', va='center')
    figure.subplots_adjust(0.09, 0.01, 0.99, 0.99, 0.05, 0.05)
    figures.save(figure, path)


if __name__ == '__main__':
    runs.command_line(Config, main)
