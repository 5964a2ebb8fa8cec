"""Training on batches that a loader of somebody else's makes: torch's DataLoader, a batched grain data set, a generator."""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from kdjax.batches import Batch, check_batch, count_examples
from kdjax.metrics import Average
from kdjax.networks import Variables
from kdjax.parallel import distribute, shard_batch
from kdjax.problems import Problem, TrainState
from kdjax.training._augmentation import Augment, augmented
from kdjax.training._epochs import Epoch, Stop, cached, stream
from kdjax.training._streaming import AHEAD


class LoadedBatches:
    """The batches of a loader, one pass over it after the other, and where they stand.

    Attributes:
      length: batches in a pass, None for a loader that does not say.
      position: batches taken so far.
    """

    def __init__(self, loader: Iterable[Batch]) -> None:
        self.length = len(loader) if isinstance(loader, Sized) else None
        self.position = 0
        # It may know more than to iterate: its length, its state.
        self._loader: Any = loader
        # Not by calling iter, which may start the processes of a loader.
        self._once = isinstance(loader, Iterator)
        self._iterator: Any = None
        # The next batch, if it has been looked at, and the loader's state before that.
        self._ahead: tuple[Batch, Any] | None = None
        if self.length == 0:
            raise ValueError('the loader has no batches')

    def peek(self) -> Batch:
        """The next batch, which stays the next."""
        if self._ahead is None:
            before = self._state()
            self._ahead = _checked(self._read()), before
        return self._ahead[0]

    def take(self) -> Batch:
        """The next batch."""
        batch = self.peek()
        self._ahead = None
        self.position += 1
        return batch

    def state(self) -> Any:
        """Where the loader stands, by its own account, in what JSON can hold; None from a loader that keeps none."""
        return self._state() if self._ahead is None else self._ahead[1]

    def seek(self, position: int, state: Any = None) -> bool:
        """Goes on from a position: by the loader's own state where it has one, else by reading all up to there.

        Returns:
          Whether batches had to be read and left out.
        """
        if state is not None and self._restore(state):
            self._ahead, self.position = None, position
            return False
        if position < self.position:
            raise ValueError(
                f'{self.position} batches are taken already, and a loader does not go back to {position}: begin anew'
            )
        skipped = self.position < position
        while self.position < position:
            self.take()
        return skipped

    def _read(self) -> Any:
        begins = self.length is not None and self.position > 0 and self.position % self.length == 0
        if self._iterator is None or (begins and not self._once):
            self._iterator = iter(self._loader)
        for _ in range(2):
            try:
                return next(self._iterator)
            except StopIteration:
                if self.length is not None and self.position % self.length:
                    raise ValueError(
                        f'the loader says that it has {self.length} batches and ended after {self.position % self.length}'
                    ) from None
                if self._once:
                    break
                self._iterator = iter(self._loader)
        raise ValueError(f'the data ended after {self.position} batches: pass more, ask for fewer steps, or pass a loader')

    def _state(self) -> Any:
        if self._iterator is None:
            return None
        for owner, name in ((self._iterator, 'get_state'), (self._loader, 'state_dict')):
            if hasattr(owner, name):
                state = getattr(owner, name)()
                try:
                    return json.loads(json.dumps(state.decode() if isinstance(state, bytes) else state))
                except (TypeError, ValueError):
                    return None
        return None

    def _restore(self, state: Any) -> bool:
        if hasattr(self._loader, 'load_state_dict'):
            self._loader.load_state_dict(state)
            self._iterator = iter(self._loader)
            return True
        self._iterator = iter(self._loader)
        if not hasattr(self._iterator, 'set_state'):
            return False
        self._iterator.set_state(state.encode() if isinstance(self._iterator.get_state(), bytes) else state)
        return True


def loader_epoch(problem: Problem, *, augment: Augment | None = None, mesh: Mesh | None = None) -> Epoch:
    """Makes a function that runs one pass over a loader; its data are `LoadedBatches`, which it moves on.

    Args:
      problem: the training problem.
      augment: applied to every example's inputs with a key of its own: of the run, the step and the place in the batch.
      mesh: devices to split each batch over; every host must have the whole batch.

    Returns:
      The function. With a loader that does not say how many batches it has, an epoch has no end, and needs a `limit`.
    """
    dispatch = cached(_dispatcher, problem, augment, mesh)
    put: Callable[[Any], Any] = jax.device_put if mesh is None else functools.partial(shard_batch, mesh)

    def run(
        state: TrainState,
        teacher_variables: Variables | None,
        data: LoadedBatches,
        stop: Stop | None,
        begin: int,
        limit: int | None,
    ) -> tuple[TrainState, list[dict[str, Average]]]:
        if limit is None and data.length is None:
            raise ValueError('a loader without a length has no epochs: give limit')
        data.seek(begin)
        left = None if data.length is None else data.length - begin % data.length
        metrics = []
        for _ in range(min(count for count in (left, limit) if count is not None)):
            state, some = dispatch(state, teacher_variables, put(data.take()))
            metrics.append(some)
            if len(metrics) >= AHEAD:
                # Else a fast loader would fill the device with batches that wait for their step.
                jax.block_until_ready(metrics[-AHEAD])
            if stop is not None and stop():
                break
        return state, metrics

    return Epoch(run, None)


@functools.lru_cache(maxsize=32)
def _dispatcher(problem: Problem, augment: Augment | None, mesh: Mesh | None) -> Any:
    if mesh is not None:
        problem = distribute(mesh, problem)

    @functools.partial(jax.jit, donate_argnums=0)
    def dispatch(state: TrainState, teacher_variables: Any, batch: Batch) -> Any:
        places = jax.numpy.arange(count_examples(batch))
        inputs = augmented(batch['inputs'], places, state.step, augment=augment, key=stream(state.key, 'augment'))
        state, metrics = problem.step(state, teacher_variables, {**batch, 'inputs': inputs})
        return state, jax.tree.map(lambda x: x[None], metrics)

    return dispatch


def _checked(batch: Any) -> Batch:
    if isinstance(batch, (tuple, list)):
        raise ValueError(
            f"a batch must be a dictionary {{'inputs': ..., 'labels': ...}}, got a {type(batch).__name__} of {len(batch)}: map "
            "the loader, as in ({'inputs': x, 'labels': y} for x, y in loader)"
        )
    try:
        batch = jax.tree.map(np.asarray, batch)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f'a batch must hold arrays that numpy can read: {error}') from error
    check_batch(batch)
    return batch
