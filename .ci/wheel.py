"""Runs in an environment that holds the wheel and what it requires: everything can be imported, and a recipe runs."""

import importlib
import pkgutil

import jax
import numpy as np
import optax

import kdjax
from kdjax import metrics, models, networks, objectives, recipes, training

assert 'site-packages' in kdjax.__file__, f'{kdjax.__file__} is not an installed package'
modules = [each.name for each in pkgutil.walk_packages(kdjax.__path__, 'kdjax.')]
for name in modules:
    importlib.import_module(name)

rng = np.random.default_rng(0)
inputs = rng.normal(size=(256, 8)).astype(np.float32)
examples = {'inputs': inputs, 'labels': inputs[:, :4].argmax(axis=1).astype(np.int32)}
layers = ('hidden0', 'hidden1')
teacher = networks.from_linen(models.MLP((32, 32), classes=4), features=layers)
student = networks.from_linen(models.MLP((8, 8), classes=4), features=layers)
key = jax.random.key(0)
alone = objectives.hard_labels()
settings = {'key': key, 'batch_size': 64, 'epochs': 20, 'progress': False}
teacher_variables = training.fit(training.distillation(teacher, None, alone, optax.adam(1e-2)), examples, **settings).variables
recipe = recipes.hint(recipes.Pair(student=layers, teacher=layers, steps_per_epoch=4))
variables = training.fit(
    training.distillation(student, teacher, recipe, optax.adam(1e-2)), examples, teacher_variables, **settings
).variables
accuracy = metrics.compute(training.evaluator(student)(variables, examples))['accuracy']
assert accuracy > 0.5, accuracy
print(f'kdjax {kdjax.__version__} with jax {jax.__version__}: {len(modules)} modules, student accuracy {accuracy:.2f}')
