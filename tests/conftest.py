"""Strict JAX on eight fake devices, for every test and doctest."""

import gc
import os
import pathlib

import jax

if jax.__version_info__[:2] == (0, 10):  # another XLA may not know these flags, and would end the process
    # Compiling is nearly all of the time, and takes a third of it without these two: newer emitters, and 32 parts a program.
    flags = '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flags}'

# Before anything asks for a device.
jax.config.update('jax_num_cpu_devices', 8)
# These programs run once.
jax.config.update('jax_disable_most_optimizations', True)
# Implicit promotion of dtypes and ranks hides mistakes.
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')

import numpy as np  # noqa: E402
import pytest  # noqa: E402

TESTS = pathlib.Path(__file__).parent
# What starts processes, trains whole pairs, breaks files one by one, or compiles every objective into one program.
SLOW = (
    'experiments',
    'export/test_artefact.py',
    'generation/test_sampling.py',
    'losses/test_channels.py',
    'losses/test_contrastive.py',
    'losses/test_derivatives.py',
    'losses/test_instance_graph.py',
    'losses/test_language_divergences.py',
    'losses/test_meshes.py',
    'losses/test_relations.py',
    'losses/test_unsupervised.py',
    'losses/test_vocabularies.py',
    'models/test_convolutions.py',
    'models/test_decoder.py',
    'models/test_families.py',
    'models/test_light_models.py',
    'models/test_models.py',
    'models/test_narrowing.py',
    'models/test_winograd.py',
    'networks/test_lora.py',
    'networks/test_precision.py',
    'objectives/test_any_batch.py',
    'objectives/test_connected_objectives.py',
    'objectives/test_distributed_objectives.py',
    'objectives/test_linear_logits.py',
    'objectives/test_linear_logits_on_meshes.py',
    'objectives/test_published_masks.py',
    'objectives/test_target_objectives.py',
    'objectives/test_unsupervised_objectives.py',
    'optimizers/test_averaging.py',
    'parallel/test_hosts.py',
    'parallel/test_sharding.py',
    'pretrained/test_encoders.py',
    'pruning/test_channels.py',
    'pruning/test_low_rank.py',
    'pruning/test_prune_everywhere.py',
    'pruning/test_structured.py',
    'pruning/test_vgg.py',
    'quantization/test_any_inputs.py',
    'quantization/test_aware_training.py',
    'quantization/test_fake_quantize_network.py',
    'quantization/test_learned_step.py',
    'quantization/test_quantize_network.py',
    'regimes/test_on_policy.py',
    'test_docs.py',
    'test_notebooks.py',
    'test_readme.py',
    'training/test_checkpoints.py',
    'training/test_data_kinds.py',
    'training/test_evaluation.py',
    'training/test_fit.py',
    'training/test_monitoring.py',
    'training/test_interruptions.py',
    'training/test_nonfinite.py',
    'training/test_recorded_tokens.py',
    'training/test_recording.py',
    'training/test_step.py',
    'training/test_streaming.py',
    'training/test_sweep.py',
)
# Of these, what takes minutes and seldom breaks alone: CI leaves it out, to be done in its time, and `make test-all` does not;
# so with single tests that are marked `long` where they stand.
LONG = (
    'experiments/test_assistant.py',
    'experiments/test_benchmarks_data.py',
    'experiments/test_benchmarks_scale.py',
    'experiments/test_benchmarks_speed.py',
    'experiments/test_cifar10.py',
    'experiments/test_compress.py',
    'experiments/test_contact_sheet.py',
    'experiments/test_ensemble.py',
    'experiments/test_federated.py',
    'experiments/test_hints.py',
    'experiments/test_label_union.py',
    'experiments/test_method_table.py',
    'experiments/test_missing_class.py',
    'experiments/test_multitask.py',
    'experiments/test_mutual.py',
    'experiments/test_recipes.py',
    'experiments/test_redistill.py',
    'experiments/test_schedules.py',
    'experiments/test_strategies.py',
    'experiments/test_student_as_teacher.py',
    'experiments/test_unlabelled.py',
    'losses/test_meshes.py',
    'models/test_winograd.py',
    'networks/test_lora.py',
    'parallel/test_hosts.py',
    'pruning/test_channels.py',
    'pruning/test_vgg.py',
    'test_notebooks.py',
    'training/test_interruptions.py',
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the slow lane, which `make test` leaves to `make test-all`."""
    slow, long = ([TESTS / name for name in names] for names in (SLOW, LONG))
    missing = [str(path) for path in (*slow, *long) if not path.exists()]
    if missing:
        raise pytest.UsageError(f'tests/conftest.py names slow tests that are not there: {", ".join(missing)}')
    for item in items:
        if any(item.path.is_relative_to(path) for path in slow):
            item.add_marker('slow')
        if item.path in long:
            item.add_marker('long')


def pytest_collection_finish() -> None:
    """Has no garbage collection look through what was imported, which all tests need."""
    gc.freeze()


def seed_of(item: pytest.Item) -> int:
    """A seed that is the test's own and the same in every run."""
    return sum(byte * (i + 1) for i, byte in enumerate(item.nodeid.encode())) % 2**31


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Has the numbers that a test draws from its module's `RNG` not depend on the tests before it."""
    rng = getattr(getattr(item, 'module', None), 'RNG', None)
    if rng is not None:
        rng.bit_generator.state = np.random.default_rng(seed_of(item)).bit_generator.state


@pytest.fixture
def key(request: pytest.FixtureRequest) -> jax.Array:
    """A random key that is the test's own and the same in every run."""
    return jax.random.key(seed_of(request.node))
