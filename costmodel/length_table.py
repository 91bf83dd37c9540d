"""Which draft length does a server look up for a batch, and what does its table say of its times?

A server profiles draft lengths offline, keeps the best one for some batch sizes, and looks it up
before every round. Looking up costs nothing; the table is all that adaptive speculation adds.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ._inputs import AT_LEAST_ONE, NON_NEGATIVE, POSITIVE, as_floats, is_traced, require
from .batching import optimal_integer_gamma_for_batch
from .length_curves import AnyLengthCurve, acceptance_by_position, as_one_dtype
from .round_times import AnyRoundTimes


class LengthTable(NamedTuple):
    """Draft lengths by batch size, each up to a bound; `batches[i - 1] < batch <= batches[i]`."""

    batches: ArrayLike  # [n] largest batch size of each entry, rising
    gammas: ArrayLike  # [n] draft tokens per round; 0: do not speculate
    default: ArrayLike  # the length beyond the last bound


class SlopeRatios(NamedTuple):
    """The ends of intervals of a time per drafted token over that of a plain step."""

    low: Array  # at least 0
    high: Array  # infinite for 0 drafted tokens, which every larger ratio also calls for


# What the serving script of Su et al., arXiv 2310.18813, looks up (its public code, not the paper).
SU_TABLE = LengthTable(np.array([1, 2, 4, 8, 16, 32]), np.array([7, 6, 4, 4, 3, 1]), 1)


def build_length_table(
    curve: AnyLengthCurve,
    times: AnyRoundTimes,
    batches: ArrayLike,
    max_gamma: int | None = None,
) -> LengthTable:
    """Returns the table of the best draft lengths at some batch sizes.

    Every entry is `optimal_integer_gamma_for_batch` at its bound, so it may be 0: do not speculate.
    The last entry also stands for larger batches.

    Args:
      curve: accepted draft tokens by draft length.
      times: seconds per round by batch and draft length, a model or measured.
      batches: `[n]` the bounds, positive, rising.
      max_gamma: the largest length considered, a Python integer (it is a shape); by default 32, or
        the last length of `MeasuredTimes`.

    Returns:
      The table, its lengths int32.

    Raises:
      ValueError: a field or an argument is outside its range, NaN or of the wrong shape.

    Example:
      >>> from jaxsd import costmodel
      >>> times = costmodel.LinearTimes([1, 32], [0.020, 0.025], [0.001, 0.030], [0.001, 0.001])
      >>> curve = costmodel.PowerCurve(0.9, 0.548)
      >>> print(costmodel.build_length_table(curve, times, [1, 2, 4, 8, 16, 32]).gammas)
      [6 4 2 1 1 0]

    Source: Su et al., arXiv 2310.18813.
    """
    _check_bounds(batches)
    gammas = optimal_integer_gamma_for_batch(curve, times, batches, max_gamma)
    return LengthTable(jnp.asarray(batches), gammas, gammas[-1])


def measured_length_table(
    batches: ArrayLike, gammas: ArrayLike, token_seconds: ArrayLike
) -> LengthTable:
    """Returns the table of the fastest draft lengths of a measured grid.

    For whoever has timed decoding as a whole, without a curve of acceptance or times of passes. The
    shortest of equally fast lengths is taken.

        gammas[argmin of token_seconds[b]]  for every batch size b

    Args:
      batches: `[n]` batch sizes, positive, rising.
      gammas: `[m]` draft lengths, whole numbers, rising; with 0, plain decoding, among them the
        table can say when not to speculate.
      token_seconds: `[n, m]` measured time per token, positive.

    Returns:
      The table, its lengths int32.

    Raises:
      ValueError: an argument is outside its range, NaN or of the wrong shape.

    Example:
      >>> from jaxsd import costmodel
      >>> table = costmodel.measured_length_table(
      ...     batches=[1, 32],
      ...     gammas=[0, 2, 4],
      ...     token_seconds=[[0.020, 0.011, 0.009], [0.0009, 0.0010, 0.0014]],
      ... )
      >>> print(table.gammas)
      [4 0]

    Source: Su et al., arXiv 2310.18813.
    """
    _check_bounds(batches)
    _check_whole("gammas", gammas)
    shape = (*np.shape(batches), *np.shape(gammas))
    if np.ndim(gammas) != 1 or np.shape(token_seconds) != shape or 0 in shape:
        raise ValueError(
            f"token_seconds of shape {np.shape(token_seconds)} must have shape [n, m], with batches"
            f" of shape {np.shape(batches)} and gammas of shape {np.shape(gammas)}"
        )
    _check_rising("gammas", gammas)
    require("token_seconds", token_seconds, POSITIVE)
    (seconds,) = as_floats(jnp.asarray(token_seconds))
    found = jnp.asarray(gammas).astype(jnp.int32)[jnp.argmin(seconds, axis=1)]
    return LengthTable(jnp.asarray(batches), found, found[-1])


def lookup_length(table: LengthTable, batch: ArrayLike) -> Array:
    """Returns the draft length of a table for a batch: that of the first bound not below it.

    Args:
      table: whole lengths by batch size.
      batch: sequences decoded together, positive.

    Returns:
      Draft tokens per round, int32, in the shape of batch.

    Raises:
      ValueError: the table or batch is outside its range, NaN or of the wrong shape.

    Example:
      >>> from jaxsd import costmodel
      >>> print(costmodel.lookup_length(costmodel.SU_TABLE, [1, 2, 3, 16, 17, 100]))
      [7 6 4 3 1 1]

    Source: Su et al., arXiv 2310.18813.
    """
    _check_table(table)
    _check_whole("LengthTable.gammas", table.gammas)
    _check_whole("LengthTable.default", table.default)
    require("batch", batch, POSITIVE)
    bounds, lengths, default, batch_ = as_one_dtype(*table, batch)
    index = jnp.searchsorted(bounds, batch_)
    every = jnp.concatenate([lengths, default[None]])
    return jnp.round(every[index]).astype(jnp.int32)


def interpolate_length(table: LengthTable, batch: ArrayLike) -> Array:
    """Returns a draft length, a real number, on straight lines between a table's batch sizes.

    Up to the first batch size it is the first entry, beyond the last one the default. A length
    between whole numbers is reached on average, by varying it between rounds. Differentiable in
    batch and lengths.

    Args:
      table: lengths by batch size; its bounds are taken as the sizes that were profiled.
      batch: sequences decoded together, positive.

    Returns:
      Draft tokens per round, in the shape of batch.

    Raises:
      ValueError: the table or batch is outside its range, NaN or of the wrong shape.

    Example:
      >>> from jaxsd import costmodel
      >>> print(costmodel.interpolate_length(costmodel.SU_TABLE, [1, 3, 12, 24, 100]))
      [7.  5.  3.5 2.  1. ]

    Source: Su et al., arXiv 2310.18813.
    """
    _check_table(table)
    require("batch", batch, POSITIVE)
    bounds, lengths, default, batch_ = as_one_dtype(*table, batch)
    inside = jnp.interp(batch_, bounds, lengths)
    return jnp.where(batch_ > bounds[-1], default, inside)


def slope_ratio_intervals(curve: AnyLengthCurve, max_gamma: int = 32) -> SlopeRatios:
    """Returns for which times each draft length is the best, where a round's time is a line.

    A round of gamma drafted tokens takes `fixed + slope * gamma`, draft steps included; the best
    length then depends on their ratio alone. Length s is best where no shorter and no longer one,
    up to `max_gamma`, is better:

        max over j > s of (l_j - l_s) / ((1 + l_s) j - (1 + l_j) s) <= slope / fixed
            <= min over j < s of (l_s - l_j) / ((1 + l_j) s - (1 + l_s) j)

    The intervals of neighbouring lengths touch. Differentiable in the curve.

    Args:
      curve: l, accepted draft tokens by draft length.
      max_gamma: M, the longest draft that is compared, a Python integer (it is a shape), at least
        1. It bounds the interval of M itself by nothing but 0.

    Returns:
      `[M + 1]` ends of the intervals of lengths 0, 1, ..., M. An interval whose low end is above
      its high end is empty: that length is never the best.

    Raises:
      ValueError: a field of the curve is outside its range, the curve does not bend down, or
        `max_gamma` is below 1.

    Example:
      >>> from jaxsd import costmodel
      >>> found = costmodel.slope_ratio_intervals(costmodel.PowerCurve(0.9, 0.548))
      >>> for s in (7, 6, 4, 3, 1, 0):
      ...     print(s, round(float(found.low[s]), 3), round(float(found.high[s]), 3))
      7 0.089 0.099
      6 0.099 0.112
      4 0.13 0.156
      3 0.156 0.197
      1 0.28 0.9
      0 0.9 inf

    Source: derived from the model of Su et al., arXiv 2310.18813.
    """
    require("max_gamma", max_gamma, AT_LEAST_ONE)
    shares = acceptance_by_position(curve, max_gamma)
    lengths = jnp.concatenate([jnp.zeros(1, shares.dtype), jnp.cumsum(shares)])
    s = jnp.arange(max_gamma + 1).astype(lengths.dtype)
    gained = lengths[None, :] - lengths[:, None]  # [s, j]
    paid = (1 + lengths[:, None]) * s[None, :] - (1 + lengths[None, :]) * s[:, None]
    # The curve bends down from 0, so that paid is 0 on the diagonal alone.
    ratio = gained / jnp.where(paid == 0, 1, paid)
    low = jnp.where(s[None, :] > s[:, None], ratio, 0).max(1)
    high = jnp.where(s[None, :] < s[:, None], ratio, jnp.inf).min(1)
    return SlopeRatios(low, high)


def table_slope_ratios(
    curve: AnyLengthCurve, table: LengthTable, max_gamma: int = 32
) -> SlopeRatios:
    """Returns which times a table implies: for every entry the ratios for which it is the best.

    Reads a table backwards. At a larger batch the ratio of the time per drafted token to the time
    of a plain step can only be larger, so a table whose intervals cannot be met by rising ratios
    was not made for times on a line and this curve.

    Args:
      curve: accepted draft tokens by draft length.
      table: whole lengths, each at most `max_gamma`.
      max_gamma: the longest draft that was compared, a Python integer (it is a shape).

    Returns:
      `[n]` ends of the interval of each entry.

    Raises:
      ValueError: a field is outside its range, or the table has a length beyond `max_gamma`.

    Example:
      >>> from jaxsd import costmodel
      >>> curve = costmodel.PowerCurve(0.9, 0.548)
      >>> found = costmodel.table_slope_ratios(curve, costmodel.SU_TABLE)
      >>> print([f"{low:.3f}" for low in found.low])
      ['0.089', '0.099', '0.130', '0.130', '0.156', '0.280']

    Source: derived from the model of Su et al., arXiv 2310.18813.
    """
    _check_table(table)
    _check_whole("LengthTable.gammas", table.gammas)
    within = (lambda x: x <= max_gamma, f"at most max_gamma={max_gamma}")
    require("LengthTable.gammas", table.gammas, within)
    every = slope_ratio_intervals(curve, max_gamma)
    lengths = jnp.asarray(table.gammas).astype(jnp.int32)
    return SlopeRatios(every.low[lengths], every.high[lengths])


def _check_table(table: LengthTable) -> None:
    """Raises ValueError unless there is a length for every bound."""
    _check_bounds(table.batches, "LengthTable.batches")
    if np.shape(table.gammas) != np.shape(table.batches) or np.shape(table.default):
        raise ValueError(
            f"LengthTable.gammas of shape {np.shape(table.gammas)} must have the shape of batches, "
            f"{np.shape(table.batches)}, and default of shape {np.shape(table.default)} be a scalar"
        )
    for name in ("gammas", "default"):
        require(f"LengthTable.{name}", getattr(table, name), NON_NEGATIVE)


def _check_bounds(batches: ArrayLike, name: str = "batches") -> None:
    """Raises ValueError unless these are positive and rise."""
    if np.ndim(batches) != 1 or np.shape(batches)[0] == 0:
        raise ValueError(f"{name} of shape {np.shape(batches)} must have shape [n]")
    require(name, batches, POSITIVE)
    _check_rising(name, batches)


def _check_rising(name: str, value: ArrayLike) -> None:
    """Raises ValueError unless every number is larger than the one before it."""
    if not is_traced(value) and (np.diff(np.asarray(value, np.float64)) <= 0).any():
        raise ValueError(f"{name}={np.asarray(value).tolist()} must be in rising order")


def _check_whole(name: str, value: ArrayLike) -> None:
    """Raises ValueError unless the lengths are whole numbers from 0 on."""
    require(name, value, (lambda x: (x >= 0) & (x == np.round(x)), "a whole number, at least 0"))
