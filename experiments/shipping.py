"""The files to ship, and what a user would load from them."""

import pathlib
from typing import Any

from kdjax import export, networks, parallel, quantization


def ship(output: pathlib.Path, name: str, seed: int, variables: Any) -> tuple[int, dict[str, Any]]:
    """Writes the file to ship, and returns its size and what a user would load from it."""
    file = output / 'networks' / f'seed{seed}' / file_name(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    parallel.on_first_host(lambda: export.save_weights(file, variables), str(file))
    return shipped(output, name, seed)


def shipped(output: pathlib.Path, name: str, seed: int) -> tuple[int, dict[str, Any]]:
    """The size of a file that `ship` wrote, and what a user would load from it."""
    file = output / 'networks' / f'seed{seed}' / file_name(name)
    return file.stat().st_size, quantization.dequantize_weights(export.load_weights(file))


def as_network(artefact: export.Artefact) -> networks.Network:
    """The program that `export.load` read, as a network whose variables are weights of such an artefact."""

    def apply(variables: Any, inputs: Any, *, train: bool = False, rng: Any = None) -> tuple[networks.Outputs, dict[str, Any]]:
        del train, rng
        return networks.Outputs(artefact.apply(variables, inputs)), {}

    return networks.Network(lambda key, inputs: artefact.weights, apply)


def file_name(name: str) -> str:
    """A row's name as the name of a file."""
    return f'{folder_name(name)}.safetensors'


def folder_name(name: str) -> str:
    """A row's name as the name of a folder."""
    return '-'.join(''.join(c if c.isalnum() else ' ' for c in name).split())
