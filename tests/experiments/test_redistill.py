"""The recipe from one domain to another, shrunk to seconds: what each step changes, and what it learns from."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import scenario

from experiments import redistill, settings, shipping
from kdjax.paths import leaves_with_paths


@pytest.fixture(scope='module')
def output(tmp_path_factory):
    output = tmp_path_factory.mktemp('runs') / 'redistill'
    # A batch that no number of devices divides compiles for one, which is faster.
    redistill.main(
        scenario.config(redistill, dataset='digits', examples=64, seeds=1, epochs=2, batch_size=31, output=str(output))
    )
    return output


@pytest.fixture(scope='module')
def splits():
    return redistill.split(settings.load(settings.Data(examples=64)), settings.load(settings.Data()))


def variables(output, name):
    return leaves_with_paths(shipping.shipped(output, name, 0)[1])


def changed(one, other):
    return {path for path in one if not np.array_equal(one[path], other[path])}


def test_only_a_few_labels_of_the_target_are_ever_seen(splits):
    assert len(splits.few['labels']) == len(splits.validation['target']['labels']) == redistill.LABELS
    assert 'labels' not in splits.both
    np.testing.assert_array_equal(np.bincount(splits.few['labels']), 10)
    np.testing.assert_array_equal(np.bincount(splits.both['domains']), [64, 64])
    np.testing.assert_array_equal(splits.both['inputs'][:64], splits.source['inputs'])
    labels = redistill.labels_of_source(splits)['labels']
    np.testing.assert_array_equal(labels, np.concatenate([splits.source['labels'], np.full(64, -1)]))
    assert splits.both['inputs'].shape == (128, 14, 14, 1)
    assert splits.both['inputs'].dtype == np.uint8


def test_fine_tuning_changes_the_chosen_layer_alone_and_hands_it_over(output):
    teacher, tuned = variables(output, redistill.TEACHER), variables(output, redistill.TUNED)
    chosen = {'params/hidden0/kernel', 'params/hidden0/bias'}
    assert changed(teacher, tuned) == chosen
    assert changed(teacher, variables(output, redistill.EVERYTHING)) == teacher.keys()
    handed = variables(output, redistill.HANDED)
    assert all(np.array_equal(handed[path], tuned[path]) for path in chosen)
    assert handed['params/hidden1/kernel'].shape != tuned['params/hidden1/kernel'].shape


def test_distilled_students_read_no_labels_and_only_the_aligned_one_has_an_adversary(output):
    lines = [json.loads(line) for line in (output / 'metrics.jsonl').read_text().splitlines()]
    terms = {
        line['run']: {'hard_labels', 'soft_targets', 'domain_discrimination'} & line.keys() for line in lines if 'loss' in line
    }

    def of(name):
        return terms[f'seed0/{shipping.folder_name(name)}']

    assert of(redistill.ADAPTED) == {'hard_labels', 'domain_discrimination'}
    assert of(redistill.AGREEING) == {'soft_targets'}
    assert of(redistill.ALIGNED) == {'soft_targets', 'domain_discrimination'}
    assert of(redistill.KEPT) == of(redistill.TUNED) == {'hard_labels'}


def test_each_domain_has_a_teacher_of_its_own(splits):
    def apply(variables, inputs):
        return redistill.networks.Outputs(jnp.full((len(inputs), 2), variables, jnp.float32)), {}

    logits = redistill.recorded_logits(redistill.networks.Network(None, apply), splits.both, 3.0, 7.0)
    np.testing.assert_array_equal(logits[:, 0], np.where(splits.both['domains'] == 0, 3.0, 7.0))


def test_the_best_epoch_in_both_domains_is_kept(output):
    name = f'seed0/{shipping.folder_name(redistill.KEPT)}'
    lines = [json.loads(line) for line in (output / 'metrics.jsonl').read_text().splitlines()]
    measured = [line for line in lines if line['run'] == name and 'validation/lower' in line]
    assert 1 <= len(measured) <= 2
    for line in measured:
        assert line['validation/lower'] == pytest.approx(min(line['validation/source'], line['validation/target']), abs=1e-6)


def test_rows_are_means_over_both_domains(output):
    rows = json.loads((output / 'report.json').read_text())['rows']
    assert {row['name'] for row in rows} == {
        redistill.TEACHER,
        redistill.ADAPTED,
        redistill.ALONE,
        redistill.EVERYTHING,
        redistill.TUNED,
        redistill.HANDED,
        redistill.AGREEING,
        redistill.ALIGNED,
        redistill.AGAIN,
        redistill.KEPT,
    }
    assert all(row['accuracy_mean'] == pytest.approx((row['source_mean'] + row['target_mean']) / 2) for row in rows)
    # Source and target are the same digits here, so their test splits are too.
    assert all(row['source_mean'] == row['target_mean'] for row in rows)


def test_domains_of_other_classes_are_refused(tmp_path, monkeypatch):
    load = settings.load

    def letters_and_digits(flags):
        name, classes = flags.dataset, {'digits': 10, 'letters': 7}[flags.dataset]
        return load(settings.Data())._replace(name=name, classes=classes)

    monkeypatch.setattr(settings, 'load', letters_and_digits)
    with pytest.raises(ValueError, match='letters has 7 classes, digits 10: they must be the same'):
        redistill.main(scenario.config(redistill, dataset='letters', output=str(tmp_path / 'run')))
    assert not (tmp_path / 'run').exists()
