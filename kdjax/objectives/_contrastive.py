"""Contrastive objectives: trained embeddings of both networks, and memory banks as state.

An embedding is a linear map of a layer [batch, channels], a pooled one in the papers; of a layer with positions it takes the
mean over those that count, so that what is trained does not depend on the size of an image or the length of a text.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax import losses
from kdjax.batches import Batch, counted_examples
from kdjax.losses import ClassIndex
from kdjax.metrics import Average
from kdjax.networks import Outputs
from kdjax.objectives._arguments import batch_mean, require_entry
from kdjax.objectives._embeddings import Embeddings
from kdjax.objectives._labels import raise_where
from kdjax.objectives._objective import Objective, Term, Weight, with_parameters


def info_nce(student: str, teacher: str, *, temperature: Weight = 0.07, width: int = 128) -> Objective:
    """InfoNCE: `losses.info_nce` of trained linear embeddings of two layers; the negatives are the rest of the batch.

    A scalar: of the batch's weights it matters only which are 0.

    Args:
      student: path of the student's layer.
      teacher: path of the teacher's layer.
      temperature: a number or a schedule.
      width: of the embeddings.
    """
    embed = Embeddings('info_nce', student, teacher, width)

    def loss(params: Any, student: Outputs, teacher: Outputs, batch: Batch, **hyperparameters: Any) -> jax.Array:
        return losses.info_nce(*embed.apply(params, student, teacher, batch), where=counted_examples(batch), **hyperparameters)

    return with_parameters('info_nce', embed.init, loss, temperature=temperature)


def crd(
    student: str,
    teacher: str,
    labels: ArrayLike,
    *,
    negatives: int = 16384,
    width: int = 128,
    temperature: float = 0.07,
    momentum: float = 0.5,
) -> Objective:
    """CRD, contrastive representation distillation: `losses.crd` of trained linear embeddings of two layers.

    `batch['index']` says which training examples a batch holds; one outside the banks is an error where its value is at hand,
    and makes the value NaN where it is traced. The state is two banks [examples, width], one row per training example and
    network, each moved towards the embedding when its example comes by; the two constants Z, fixed from the first batch; and a
    random key for the negatives, drawn from examples of other classes. Banks may be sharded over their rows.
    `kdjax.recipes.crd` has the published weight.

    Args:
      student: path of the student's layer, the one before the logits in the paper.
      teacher: path of the teacher's.
      labels: classes of all training examples [examples], in the order of `batch['index']`; negative where unknown.
      negatives: how many there are for each example.
      width: of the embeddings.
      temperature: τ.
      momentum: the share of its old value that a row keeps.
    """
    embed = Embeddings('crd', student, teacher, width)
    classes = losses.class_index(labels)
    examples = int(np.shape(labels)[0])

    def in_bank(batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Which examples count, and which of them have a row."""
        indices, counted = require_entry('crd', batch, 'index'), counted_examples(batch)
        inside = (indices >= 0) & (indices < examples)
        counted = jnp.ones(indices.shape, jnp.bool_) if counted is None else counted
        raise_where(counted & ~inside, indices, f"crd: batch['index'] must be one of the {examples} examples with labels")
        return counted, counted & inside

    def check(student: Outputs, teacher: Outputs, batch: Batch) -> None:
        del student, teacher
        in_bank(batch)

    def init(key: jax.Array, student: Outputs, teacher: Outputs, batch: Batch) -> tuple[Any, Any]:
        require_entry('crd', batch, 'index')
        keys = jax.random.split(key, 4)
        bound = np.sqrt(3 / width)

        def bank(key: jax.Array) -> jax.Array:
            return jax.random.uniform(key, (examples, width), jnp.float32, -bound, bound)

        state = {
            'student_bank': bank(keys[1]),
            'teacher_bank': bank(keys[2]),
            'normalizers': jnp.zeros(2),
            'classes': classes._asdict(),
            'key': keys[3],
        }
        return embed.init(keys[0], student, teacher, batch), state

    def apply(
        params: Any, state: Any, student: Outputs, teacher: Outputs, batch: Batch, *, step: jax.Array
    ) -> tuple[Average, dict[str, Average], Any]:
        counted, known = in_bank(batch)
        # Whatever stands where nothing counts, and what is no row, must neither be looked up nor written.
        indices = jnp.where(known, jnp.asarray(batch['index']).astype(jnp.int32), 0)
        embedding_s, embedding_t = embed.apply(params, student, jax.lax.stop_gradient(teacher), batch)
        drawn = losses.crd_negatives(jax.random.fold_in(state['key'], step), indices, ClassIndex(**state['classes']), negatives)
        rows = jnp.concatenate([indices[:, None].astype(drawn.dtype), drawn], axis=1)
        memory_s, memory_t = state['student_bank'][rows], state['teacher_bank'][rows]
        shared: dict[str, Any] = {'examples': examples, 'temperature': temperature, 'where': known}
        firsts = (losses.crd_normalizer(*pair, **shared) for pair in ((embedding_s, memory_t), (embedding_t, memory_s)))
        normalizers = jnp.where(state['normalizers'] > 0, state['normalizers'], jnp.stack(list(firsts)))
        values = losses.crd(
            embedding_s,
            embedding_t,
            memory_s,
            memory_t,
            student_normalizer=normalizers[0],
            teacher_normalizer=normalizers[1],
            **shared,
        )
        moved = {
            name: losses.crd_update_memory(state[name], indices, jax.lax.stop_gradient(x), momentum=momentum, where=known)
            for name, x in (('student_bank', embedding_s), ('teacher_bank', embedding_t))
        }
        # A batch of which nothing counts is not the first.
        fixed = jnp.where(jnp.any(known), normalizers, state['normalizers'])
        values = values * jnp.where(known | ~counted, jnp.float32(1.0), jnp.float32(jnp.nan))
        return batch_mean(values, batch), {}, {**state, **moved, 'normalizers': fixed}

    return Objective((Term('crd', init, apply, check=check),))
