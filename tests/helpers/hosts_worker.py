"""A small experiment on all devices of all hosts: `python hosts_worker.py FOLDER`, as one process or as several."""

import json
import pathlib
import sys

import jax
import numpy as np
import optax

from kdjax import metrics, models, networks, objectives, parallel, training

BATCH = 16
STUDENT = networks.from_linen(models.MLP((128, 128)), features='hidden1')
TEACHER = networks.from_linen(models.MLP((256, 128)), features='hidden1')
OBJECTIVE = objectives.combine(
    hard=objectives.hard_labels(),
    soft=objectives.soft_targets(temperature=2.0),
    distances=objectives.rkd_distance('hidden1', 'hidden1'),
)


def examples():
    """Images with a label that can be learned."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 4 * BATCH).astype(np.int32)
    inputs = rng.normal(size=(4 * BATCH, 8, 8, 1)) + labels[:, None, None, None] / 5
    return {'inputs': inputs.astype(np.float32), 'labels': labels}


def run(folder, mesh, calls=(1, 2)):
    """Calls `fit` once for each number of epochs; every call takes up the checkpoint of the one before."""
    data = examples()
    evaluate = training.evaluator(STUDENT, teacher=TEACHER, batch_size=30)
    problem = training.distillation(STUDENT, TEACHER, OBJECTIVE, optax.sgd(0.02, momentum=0.9))
    teacher_variables = parallel.shard(mesh, TEACHER.init(jax.random.key(9), data['inputs'][:1]))
    for epochs in calls:
        fitted = training.fit(
            problem,
            data,
            teacher_variables,
            key=jax.random.key(0),
            batch_size=BATCH,
            epochs=epochs,
            mesh=mesh,
            validate=lambda variables: evaluate(variables, data, teacher_variables),
            directory=folder / 'checkpoints',
            log=folder / 'metrics.jsonl',
            progress=False,
        )
    kernel = fitted.state.params['hidden1']['kernel']
    mine = np.array_split(data['inputs'], jax.process_count())[jax.process_index()]
    joined = parallel.batch_from_hosts(mesh, {'inputs': mine})['inputs']
    return {
        'devices': [jax.local_device_count(), jax.device_count()],
        'resumed_from': fitted.resumed_from,
        'joined': [*joined.shape, *joined.addressable_shards[0].data.shape],
        'joined_as_read': np.array_equal(jax.device_get(parallel.replicate(mesh, joined)), data['inputs']),
        'share': kernel.addressable_shards[0].data.size / kernel.size,
        'kernel': np.asarray(jax.device_get(parallel.replicate(mesh, kernel))).tolist(),
        'measured': metrics.compute(evaluate(fitted.state.variables, data, teacher_variables)),
    }


if __name__ == '__main__':
    parallel.initialize_distributed()
    output = pathlib.Path(sys.argv[1])
    (output / f'result{jax.process_index()}.json').write_text(json.dumps(run(output, parallel.data_parallel(fsdp=8))))
