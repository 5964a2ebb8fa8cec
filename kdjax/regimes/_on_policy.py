"""On-policy distillation: a student that learns from text of its own."""

from collections.abc import Callable

import jax

from kdjax.batches import Batch
from kdjax.networks import Variables
from kdjax.problems import Problem
from kdjax.training import transform_batches


def on_policy(
    problem: Problem, generate: Callable[[jax.Array, Batch, Variables, Variables], Batch], *, share: float = 0.5
) -> Problem:
    """The same problem, some of whose steps see a batch that a network has written itself.

    At each step, with probability `share`, `generate` makes the batch anew: GKD's λ, with `objectives.jensen_shannon` or
    `objectives.reverse_kl` over the completion. What the student would write, right or wrong, is where it is corrected, while
    from given text alone it never learns to go on from its own. No gradient flows through the writing. With
    `generation.completions(teacher, by='teacher', ...)` and a share of 1 it is sequence-level distillation.

    The choice and the text are made of the state's key and step, so a run that resumes goes on alike. Only steps that
    generate pay for it.

    Args:
      problem: the problem.
      generate: `generate(key, batch, student_variables, teacher_variables) -> batch` of the same shapes, such as
        `generation.completions`.
      share: λ, of the steps, in [0, 1].

    Raises:
      ValueError: the share is out of range; from the step, if the batch that was made has other shapes.

    >>> from kdjax import generation, models, networks, objectives, training
    >>> import jax, jax.numpy as jnp, optax
    >>> module = models.Decoder(vocabulary=32, depth=1, width=16, heads=2, hidden=24)
    >>> student = networks.from_linen(module)
    >>> writer = networks.from_linen(module.clone(cache=8), mutable=('cache',))
    >>> objective = objectives.over_positions(objectives.jensen_shannon(), 'completion')
    >>> problem = training.distillation(student, student, objective, optax.adam(1e-3))
    >>> problem = on_policy(problem, generation.completions(writer, new_tokens=2), share=1.0)
    >>> text = jnp.array([[5, 7, 2, 9, 4, 1, 3]])
    >>> batch = {'inputs': text[:, :-1], 'labels': text[:, 1:], 'completion': jnp.arange(6)[None] >= 4}
    >>> teacher_variables = student.init(jax.random.key(1), text)
    >>> state, metrics = problem.step(problem.init(jax.random.key(0), batch), teacher_variables, batch)
    >>> bool(metrics['loss'].compute() > 0)
    True

    Reference:
      Agarwal, Vieillard, Zhou, Stanczyk, Ramos, Geist, Bachem. On-Policy Distillation of Language Models: Learning from
      Self-Generated Mistakes. 2024. https://arxiv.org/abs/2306.13649
    """
    if not 0 <= share <= 1:
        raise ValueError(f'on_policy: share must be from 0 to 1, got {share}')

    def transform(key: jax.Array, batch: Batch, student_variables: Variables, teacher_variables: Variables) -> Batch:
        choice, writing = jax.random.split(key)

        def write() -> Batch:
            return generate(writing, batch, student_variables, teacher_variables)

        given, made = (jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(each)) for each in (lambda: batch, write))
        if given != made:
            raise ValueError(f'on_policy: what generate makes must have the shapes of the batch, {given}, got {made}')
        return jax.lax.cond(jax.random.uniform(choice) < share, write, lambda: batch)

    return transform_batches(problem, transform)
