"""Training: one pure step, epochs on the device, evaluation, sharding, checkpoints, and the loop that joins them."""

from kdjax.problems import Problem, TrainState
from kdjax.training._augmentation import Views, one_view
from kdjax.training._checkpoints import checkpoint_manager, restore, restore_best, restore_newest, restore_variables, save
from kdjax.training._epochs import Epoch, in_memory_epoch, steps_per_epoch
from kdjax.training._evaluation import Evaluate, best_class_shift, evaluator
from kdjax.training._loaders import LoadedBatches, loader_epoch
from kdjax.training._loop import Fitted, fit
from kdjax.training._nonfinite import skip_nonfinite
from kdjax.training._preemption import Preempted
from kdjax.training._reading import NonFiniteLossError
from kdjax.training._recorded import recorded_head, recorded_teacher
from kdjax.training._recording import record_teacher
from kdjax.training._step import distillation
from kdjax.training._streaming import JoinedSource, Source, read_batches, streaming_epoch
from kdjax.training._sweeps import sweep
from kdjax.training._transformation import transform_batches

__all__ = [
    'Epoch',
    'Evaluate',
    'Fitted',
    'JoinedSource',
    'LoadedBatches',
    'NonFiniteLossError',
    'Preempted',
    'Problem',
    'Source',
    'TrainState',
    'Views',
    'best_class_shift',
    'checkpoint_manager',
    'distillation',
    'evaluator',
    'fit',
    'in_memory_epoch',
    'loader_epoch',
    'one_view',
    'read_batches',
    'record_teacher',
    'recorded_head',
    'recorded_teacher',
    'restore',
    'restore_best',
    'restore_newest',
    'restore_variables',
    'save',
    'skip_nonfinite',
    'steps_per_epoch',
    'streaming_epoch',
    'sweep',
    'transform_batches',
]
