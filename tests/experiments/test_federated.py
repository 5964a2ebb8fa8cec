"""Federations, shrunk to seconds: what clients keep to themselves, and what the server sees."""

import json

import jax
import numpy as np
import pytest
from helpers import scenario

from experiments import federated, settings, shipping
from kdjax import models, networks

CONFIG = {'seeds': 1, 'clients': 4, 'rounds': 2, 'steps': 2, 'server_epochs': 1, 'batch_size': 16, 'concentrations': (0.5,)}
NAMES = [federated.CENTRAL, *(federated.row_name(way, 0.5) for way in ('averaging', 'ensemble distillation'))]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp('runs') / 'federated'
    config = scenario.config(federated, **CONFIG, output=str(output))
    federated.main(config)
    return config, output


def test_report_and_curves(finished):
    _, output = finished
    rows = {row['name']: row for row in json.loads((output / 'report.json').read_text())['rows']}
    assert list(rows) == [*NAMES, federated.row_name(federated.ENSEMBLE, 0.5)]
    assert all(len(rows[name]['validation']) == 2 for name in NAMES)
    assert rows[federated.row_name(federated.ENSEMBLE, 0.5)]['parameters'] == 4 * rows[federated.CENTRAL]['parameters']
    assert 'ensemble distillation changes the accuracy after 2 rounds' in (output / 'report.md').read_text()
    assert (output / 'figure.png').stat().st_size > 1000


def test_a_finished_seed_is_not_run_again(finished, monkeypatch):
    config, output = finished
    before = json.loads((output / 'report.json').read_text())['rows']
    (output / 'report.json').unlink()
    monkeypatch.setattr(federated, 'one_seed', None)
    federated.main(config)
    after = json.loads((output / 'report.json').read_text())['rows']
    assert [row['accuracy_mean'] for row in before] == [row['accuracy_mean'] for row in after]
    assert shipping.shipped(output, NAMES[1], 0)[0] == after[1]['bytes']


def test_every_client_has_examples_of_its_own_and_the_server_has_no_labels():
    train = {'inputs': np.arange(200, dtype=np.uint8)[:, None], 'labels': np.arange(200, dtype=np.int32) % 10}
    shards, examples, unlabelled = federated.share(train, 5, 0.3, 1)
    assert unlabelled.keys() == {'inputs'}
    own = [set(inputs.ravel().tolist()) for inputs in shards['inputs']]
    assert [len(each) for each in own] == examples.tolist()
    everyone = [*own, set(unlabelled['inputs'].ravel().tolist())]
    assert len(everyone[-1]) == 40
    assert sum(map(len, everyone)) == 200 == len(set.union(*everyone))
    np.testing.assert_array_equal(shards['labels'], shards['inputs'][..., 0] % 10)


def test_the_server_gets_variables_and_counts_and_its_own_images_alone():
    dataset = settings.load(settings.Data(examples=200))
    network = networks.preprocess(networks.from_linen(models.MLP((4,))), lambda x: x.astype(np.float32) / 255)
    config = scenario.config(federated, **CONFIG)
    federation = federated.federate(config, network)
    seen = []

    def spy(*arguments):
        seen.append(arguments)
        return federation.fuse[federated.AVERAGED](*arguments)

    federated.one_seed(federation._replace(fuse={federated.AVERAGED: spy}), config, dataset, 0)
    shapes = jax.tree.map(lambda x: x.shape, jax.eval_shape(network.init, jax.random.key(0), dataset.train['inputs'][:1]))
    clients = [len(examples) for _, _, examples, _ in seen]
    assert clients == [4, 4, 1, 1]
    for (_, variables, _, unlabelled), number in zip(seen, clients, strict=True):
        assert jax.tree.map(lambda x: x.shape, variables) == jax.tree.map(
            lambda shape, number=number: (number, *shape), shapes, is_leaf=lambda x: isinstance(x, tuple)
        )
        assert unlabelled.keys() == {'inputs'}
        assert len(unlabelled['inputs']) == 40
