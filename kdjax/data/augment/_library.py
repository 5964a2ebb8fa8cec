"""The library behind some of the augmentation."""

from types import ModuleType

from kdjax.dependencies import needed_for


def dm_pix() -> ModuleType:
    """The package dm-pix, imported where an augmentation is made."""
    with needed_for('augmentation'):
        import dm_pix
    return dm_pix
