"""What the counts of a generation mean, in the field's definitions."""

import jax.numpy as jnp
from jax import Array

from .types import Statistics


def acceptance_rate(stats: Statistics) -> Array:
    """Accepted over drafted tokens.

    This is not the theory's alpha, which is per token given that all before it were accepted;
    `jaxsd.costmodel.acceptance_rate_to_alpha` converts.

    Args:
      stats: fields `[B]`, or sums over rows.

    Returns:
      `[B]` in [0, 1]; 0 where nothing was drafted.
    """
    return _ratio(stats.num_accepted, stats.num_drafted)


def mean_acceptance_length(stats: Statistics) -> Array:
    """Tokens committed per target pass, recovered or bonus token included: 1 + accepted / rounds.

    Args:
      stats: fields `[B]`, or sums over rows.

    Returns:
      `[B]` in [1, K + 1]; 1 where there was no round.
    """
    return 1.0 + _ratio(stats.num_accepted, stats.num_rounds)


def acceptance_by_position(stats: Statistics) -> Array:
    """Rounds with at least i + 1 accepted tokens over all rounds, `[B, K]`; falls with i."""
    return _ratio(stats.accepted_by_position, stats.num_rounds[..., None])


def total(stats: Statistics) -> Statistics:
    """Sums over rows: the statistics of the whole batch.

    >>> from jax import numpy as jnp
    >>> ones = jnp.ones((3,), jnp.int32)
    >>> batch = total(Statistics(2 * ones, 4 * ones, 3 * ones, jnp.ones((3, 2), jnp.int32)))
    >>> float(acceptance_rate(batch)), float(mean_acceptance_length(batch))
    (0.75, 2.5)
    """
    return Statistics(*(jnp.sum(field, axis=0) for field in stats))


def _ratio(count: Array, out_of: Array) -> Array:
    safe = jnp.maximum(out_of, 1).astype(jnp.float32)
    ratio = count.astype(jnp.float32) / safe
    return jnp.where(out_of > 0, ratio, jnp.zeros_like(ratio))
