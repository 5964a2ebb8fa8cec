"""Training: one pure step, epochs on the device, evaluation, sharding, checkpoints, and the loop that joins them."""

from kdjax.training.checkpoints import checkpoint_manager as checkpoint_manager
from kdjax.training.checkpoints import restore as restore
from kdjax.training.checkpoints import restore_newest as restore_newest
from kdjax.training.checkpoints import save as save
from kdjax.training.epochs import Epoch as Epoch
from kdjax.training.epochs import epoch as epoch
from kdjax.training.epochs import steps_per_epoch as steps_per_epoch
from kdjax.training.evaluation import evaluator as evaluator
from kdjax.training.loop import Fitted as Fitted
from kdjax.training.loop import NonFiniteLossError as NonFiniteLossError
from kdjax.training.loop import fit as fit
from kdjax.training.sharding import data_parallel as data_parallel
from kdjax.training.sharding import replicate as replicate
from kdjax.training.sharding import shard_batch as shard_batch
from kdjax.training.step import Distillation as Distillation
from kdjax.training.step import TrainState as TrainState
from kdjax.training.step import distillation as distillation
from kdjax.training.step import supervised as supervised
from kdjax.training.sweep import sweep as sweep
