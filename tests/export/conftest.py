"""An artefact that tests read, and a copy that they may damage."""

import pathlib
import shutil
from typing import Any

import pytest
from helpers.artefact_checks import CNN, IMAGES, random_variables

from kdjax import export
from kdjax.quantization import quantize_weights


@pytest.fixture(scope='module')
def variables() -> dict[str, Any]:
    return random_variables(CNN)


@pytest.fixture(scope='module')
def saved(variables: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An artefact of a quantized network, which no test changes."""
    folder = tmp_path_factory.mktemp('artefact') / 'student'
    export.save(folder, export.dequantizing(CNN), quantize_weights(variables), IMAGES, metadata={'classes': ['ä', 'b']})
    return folder


@pytest.fixture
def copied(saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(saved, tmp_path / 'student'))
