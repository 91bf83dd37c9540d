"""What the counts of a generation mean, in the field's definitions."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from . import trees
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


def acceptance_by_rank(stats: Statistics, parents: Sequence[int]) -> np.ndarray:
    """How often a node's child of each rank was the one accepted, by depth: `[D, R]`.

    Of the rounds in which some node of depth d that has a child of rank r was reached, the share in
    which that child was accepted: what `trees.best` asks for.

    Args:
      stats: of a drafter with a fixed tree; fields `[B]`, or sums over rows.
      parents: that tree.
    """
    if isinstance(stats.accepted_by_node, tuple):
        raise ValueError("stats.accepted_by_node=() must be counts by node")
    parents = trees.check(parents)
    accepted = np.asarray(stats.accepted_by_node, np.float64).reshape(-1, len(parents)).sum(0)
    reached = np.concatenate([[np.asarray(stats.num_rounds, np.float64).sum()], accepted])
    depths, ranks = np.array(trees.depths(parents)), np.array(trees.rank(parents))
    shape = (depths.max(), ranks.max() + 1)
    taken, tried = np.zeros(shape), np.zeros(shape)
    np.add.at(taken, (depths - 1, ranks), accepted)
    np.add.at(tried, (depths - 1, ranks), reached[np.array(parents) + 1])
    return taken / np.maximum(tried, 1)


def total(stats: Statistics) -> Statistics:
    """Sums over rows: the statistics of the whole batch.

    >>> from jax import numpy as jnp
    >>> ones = jnp.ones((3,), jnp.int32)
    >>> batch = total(Statistics(2 * ones, 4 * ones, 3 * ones, jnp.ones((3, 2), jnp.int32)))
    >>> float(acceptance_rate(batch)), float(mean_acceptance_length(batch))
    (0.75, 2.5)
    """
    return jax.tree.map(functools.partial(jnp.sum, axis=0), stats)


def _ratio(count: Array, out_of: Array) -> Array:
    safe = jnp.maximum(out_of, 1).astype(jnp.float32)
    ratio = count.astype(jnp.float32) / safe
    return jnp.where(out_of > 0, ratio, jnp.zeros_like(ratio))
