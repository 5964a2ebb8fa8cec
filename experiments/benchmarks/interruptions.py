"""A run that is killed again and again ends with the numbers of one that is not, bit for bit.

    python -m experiments.benchmarks.interruptions

Distils one small network into another on the digits, with a checkpoint after each epoch, in a process of its own, and kills
that process with SIGKILL at random moments: every third time from when it begins to restore, else from its first checkpoint on,
when it is mostly saving. The same call takes it up each time; a run that reaches its end between kills is compared and starts
again in another folder. At the end the parameters, the state of the optimizer and all else are compared with those of an
undisturbed run. The ratio is that of the time per run, with all starts, with kills and without. Expect `"equal": true`.
"""

import dataclasses
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import optax

from experiments import runs, settings
from experiments.settings import Count, Positive
from kdjax import data, models, networks, objectives, training


@dataclasses.dataclass(frozen=True)
class Config:
    """How often and when to kill."""

    kills: Count = 30
    """Number of kills."""
    epochs: Count = 300
    """Epochs of the run, each with a checkpoint."""
    window: Positive = 2.0
    """Seconds within which a process is killed, evenly."""
    seed: int = 0
    """Of the moments."""


def main(config: Config) -> None:
    """Trains undisturbed, trains with kills, compares and prints."""
    settings.check_ranges(config)
    moments = random.Random(config.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        theirs = _finish(folder / 'undisturbed', config.epochs)
        kills = inside_a_save = resumed = finished = 0
        equal, ours, run = True, 0.0, folder / 'run0'
        while kills < config.kills or finished == 0:
            started = time.perf_counter()
            before = _newest(run)
            child = _start(run, config.epochs)
            if kills < config.kills and kills % 3:
                while _newest(run) == before and child.poll() is None:
                    time.sleep(0.005)
            if kills == config.kills or _ends_within(child, moments.uniform(0.0, config.window)):
                _wait(child)
                ours += time.perf_counter() - started
                equal &= (run / 'final.npz').read_bytes() == (folder / 'undisturbed' / 'final.npz').read_bytes()
                finished += 1
                run = folder / f'run{finished}'
                continue
            child.kill()
            child.communicate()
            ours += time.perf_counter() - started
            kills += 1
            saved = [path.name for path in (run / 'checkpoints').glob('*')]
            inside = any('tmp' in name for name in saved)
            inside_a_save += inside
            resumed += _newest(run) > 0
            print(f'kill {kills:2}, newest checkpoint {_newest(run):5}{", inside a save" if inside else ""}', flush=True)
    summary = {
        'name': 'interruptions',
        'ratio': ours / finished / theirs,
        'ours_ms': 1e3 * ours / finished,
        'theirs_ms': 1e3 * theirs,
        'kills': kills,
        'kills_inside_a_save': inside_a_save,
        'resumes': resumed,
        'runs_finished': finished,
        'equal': equal,
    }
    print(json.dumps({**summary, 'epochs': config.epochs, 'device': jax.devices()[0].device_kind, 'jax': jax.__version__}))
    if not equal:
        raise RuntimeError('a run that was killed ended with other numbers than one that was not')


def train(folder: str, epochs: int) -> None:
    """The run, in a process of its own: says when it begins to train, and writes its final state to `final.npz`."""
    dataset = data.load('digits', validation=0.2)
    rescale = data.normalize(0.0, 1.0)
    teacher = networks.preprocess(networks.from_linen(models.MLP((64,), dataset.classes)), rescale)
    student = networks.preprocess(networks.from_linen(models.MLP((16,), dataset.classes)), rescale)
    objective = 0.1 * objectives.hard_labels() + 0.9 * objectives.soft_targets(temperature=2.0)
    steps = training.steps_per_epoch(dataset.train, 128)
    problem = training.distillation(student, teacher, objective, optax.adam(optax.cosine_decay_schedule(1e-2, epochs * steps)))
    shift = data.augment.random_shift(pixels=1)
    evaluate = training.evaluator(student)
    variables = teacher.init(jax.random.key(1), dataset.train['inputs'][:1])
    print('training', flush=True)
    fitted = training.fit(
        problem,
        dataset.train,
        variables,
        key=jax.random.key(0),
        batch_size=128,
        augment=shift,
        epochs=epochs,
        validate=lambda variables: evaluate(variables, dataset.validation),
        directory=pathlib.Path(folder) / 'checkpoints',
        log=pathlib.Path(folder) / 'metrics.jsonl',
        progress=False,
    )
    final = fitted.state._replace(key=jax.random.key_data(fitted.state.key))
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves((final, fitted.best_variables))]
    np.savez(pathlib.Path(folder) / 'final.npz', *arrays)


def _start(folder: pathlib.Path, epochs: int) -> subprocess.Popen[str]:
    """Starts the run, and returns when it begins to train."""
    folder.mkdir(exist_ok=True)
    code = f'from experiments.benchmarks import interruptions; interruptions.train({str(folder)!r}, {epochs})'
    child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    child.stdout.readline()
    return child


def _newest(folder: pathlib.Path) -> int:
    return max((int(path.name) for path in (folder / 'checkpoints').glob('*') if path.name.isdigit()), default=0)


def _ends_within(child: subprocess.Popen[str], seconds: float) -> bool:
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _wait(child: subprocess.Popen[str]) -> None:
    child.communicate()
    if child.returncode:
        raise RuntimeError(f'the run ended with status {child.returncode}')


def _finish(folder: pathlib.Path, epochs: int) -> float:
    """Runs to the end; returns the seconds that it took."""
    started = time.perf_counter()
    _wait(_start(folder, epochs))
    return time.perf_counter() - started


if __name__ == '__main__':
    runs.command_line(Config, main)
