"""The contact sheet, of three small pieces of the photograph: every augmentation has a row, and shows what it does."""

import numpy as np
import pytest

from experiments import contact_sheet
from kdjax.data import augment


def test_every_augmentation_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(contact_sheet, 'SIDE', 16)
    drawn = {}
    monkeypatch.setattr(contact_sheet, 'draw', lambda path, rows, group: drawn.update(rows, path=path, group=group))
    contact_sheet.main(contact_sheet.Config(examples=3, versions=4, output=str(tmp_path / 'sheet')))
    assert 'The picture is' in capsys.readouterr().out
    images = contact_sheet.photograph()[:3]
    assert drawn.pop('group') == 5
    assert drawn.pop('path') == tmp_path / 'sheet' / 'contact_sheet.png'
    public = {name.removeprefix('random_').replace('_', ' ') for name in dir(augment) if name.startswith('random_')}
    assert set(drawn) == {*public, 'mixup'}
    for row in drawn.values():
        assert row.shape == (3, 5, 16, 16, 3)
        assert row.dtype == np.uint8
        np.testing.assert_array_equal(row[:, 0], images)
        assert not np.array_equal(row[:, 1:], np.broadcast_to(images[:, None], row[:, 1:].shape))


def test_the_picture_is_drawn(tmp_path):
    rows = {'shift': np.zeros((1, 2, 8, 8, 1), np.uint8), 'mixup': np.full((1, 2, 8, 8, 1), 255, np.uint8)}
    contact_sheet.draw(tmp_path / 'picture.png', rows, 2)
    assert (tmp_path / 'picture.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'versions': 0}, '--versions must be at least 1, got 0'),
        ({'examples': 1000}, '--examples must be at most 15, the number of images, got 1000'),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        contact_sheet.main(contact_sheet.Config(output=str(tmp_path / 'sheet'), **changes))
    assert not list(tmp_path.iterdir())
