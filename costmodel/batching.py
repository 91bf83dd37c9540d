"""How many tokens should be drafted, given how many sequences are decoded together?

Verifying more tokens is free while reading the weights takes longer than the arithmetic, and costs
in full from there on. A larger batch gets there sooner, so its best draft is shorter, down to none.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ._inputs import (
    AT_LEAST_ONE,
    NON_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    as_floats,
    is_traced,
    require,
)
from .length_curves import AnyLengthCurve, accepted_length, as_one_dtype
from .round_times import (
    AnyRoundTimes,
    MeasuredTimes,
    checked_round_seconds,
    last_gamma,
    round_seconds,
)

# The longest draft that is looked at, where it is not given and the times know no end.
_MAX_GAMMA = 32
# Shares of rounds are differences of lengths, and these are rounded.
_ROUNDING = 1e-5
# Halvings of an interval of two tokens: to the last digit of float64.
_BISECTIONS = 56


def token_seconds(
    curve: AnyLengthCurve, times: AnyRoundTimes, batch: ArrayLike, gamma: ArrayLike
) -> Array:
    """Returns the mean time per token of each sequence of a batch.

    At `gamma=0` it is that of plain decoding. The time per token of the whole batch, which papers
    on serving report, is this over `batch`.

        t(b, gamma) = T(b, gamma) / (1 + l(gamma))

    Args:
      curve: l, accepted draft tokens by draft length.
      times: T, seconds per round by batch and draft length.
      batch: b, sequences decoded together, positive.
      gamma: draft tokens of each per round, at least 0.

    Returns:
      Seconds, in the broadcast shape of batch and gamma.

    Raises:
      ValueError: a field or an argument is outside its range, NaN or of the wrong shape.

    Example:
      >>> from jaxsd import costmodel
      >>> times = costmodel.LinearTimes([1, 32], [0.020, 0.025], [0.001, 0.010], [0.001, 0.001])
      >>> curve = costmodel.PowerCurve(0.9, 0.548)
      >>> for batch in (1, 32):  # ms per token, drafting 0, 1, 2 and 4
      ...     t = costmodel.token_seconds(curve, times, batch, [0, 1, 2, 4])
      ...     print([round(1e3 * float(x), 1) for x in t])
      [20.0, 11.6, 10.4, 9.6]
      [25.0, 18.9, 20.3, 23.6]

    Source: Su et al., arXiv 2310.18813.
    """
    tokens, seconds = as_floats(accepted_length(curve, gamma), round_seconds(times, batch, gamma))
    return seconds / (1 + tokens)


def goodput(
    curve: AnyLengthCurve, times: AnyRoundTimes, batch: ArrayLike, gamma: ArrayLike
) -> Array:
    """Returns the tokens per second that all sequences of a batch commit together.

    Rejected tokens do not count, the target's own do.

        b (1 + l(gamma)) / T(b, gamma)

    Args:
      curve: l, accepted draft tokens by draft length.
      times: T, seconds per round by batch and draft length.
      batch: b, sequences decoded together, positive.
      gamma: draft tokens of each per round, at least 0.

    Returns:
      Tokens per second, in the broadcast shape of batch and gamma.

    Raises:
      ValueError: a field or an argument is outside its range, NaN or of the wrong shape.

    Example:
      >>> from jaxsd import costmodel
      >>> times = costmodel.LinearTimes([1, 32], [0.020, 0.025], [0.001, 0.010], [0.001, 0.001])
      >>> print(round(float(costmodel.goodput(costmodel.GeometricCurve(0.8), times, 32, 1))))
      1600

    Source: Liu et al. (SmartSpec), arXiv 2406.14066.
    """
    per_token, batch_ = as_floats(token_seconds(curve, times, batch, gamma), batch)
    return batch_ / per_token


def marginal_gain(
    curve: AnyLengthCurve, times: AnyRoundTimes, batch: ArrayLike, gamma: ArrayLike
) -> Array:
    """Returns by which share of itself goodput grows with one more drafted token.

    The first-order condition is that this be 0. For curves that bend down and times that do not it
    is positive up to one best length and negative from there on. Of a power curve at 0, where it is
    infinitely steep, only the loss is counted.

        d ln goodput / d gamma = l'(gamma) / (1 + l(gamma)) - T'(b, gamma) / T(b, gamma)

    Args:
      curve: l, accepted draft tokens by draft length.
      times: T, seconds per round by batch and draft length.
      batch: b, sequences decoded together, positive.
      gamma: draft tokens of each per round, at least 0.

    Returns:
      The share per token, in the broadcast shape of batch and gamma.

    Raises:
      ValueError: a field or an argument is outside its range, NaN or of the wrong shape.

    Example:
      >>> from jaxsd import costmodel
      >>> times = costmodel.LinearTimes([1], [1.0], [0.1], [0.1])
      >>> curve = costmodel.PowerCurve(0.9, 0.548)
      >>> [round(float(costmodel.marginal_gain(curve, times, 1, s)), 3) for s in (1, 2, 4)]
      [0.093, 0.013, -0.021]

    Source: Su et al., arXiv 2310.18813, for the quotient that is maximised.
    """
    accepted_length(curve, gamma)
    round_seconds(times, batch, gamma)
    curve, times, batch_, gamma_ = _as_arrays((curve, times, batch, gamma))
    return _slope(curve, times, *as_floats(batch_, gamma_))


def optimal_gamma_for_batch(
    curve: AnyLengthCurve,
    times: AnyRoundTimes,
    batch: ArrayLike,
    max_gamma: int | None = None,
) -> Array:
    """Returns the number of draft tokens, a real number, that makes goodput largest at a batch.

    0 means: do not speculate. Found by its first-order condition near the best whole number, so
    that the steps of a measured grid do not hide a better length further on. Differentiable in
    curve, times and batch to any order, by the implicit function; the gradient is zero at 0, at
    `max_gamma` and at a corner of a measured curve or grid.

        argmax over gamma in [0, max_gamma] of b (1 + l(gamma)) / T(b, gamma)

    A power curve rises infinitely steeply from 0, so that some fraction of a token always seems to
    pay. Below 1 only `optimal_integer_gamma_for_batch` says whether it does.

    Args:
      curve: l, accepted draft tokens by draft length.
      times: T, seconds per round by batch and draft length.
      batch: b, sequences decoded together, positive.
      max_gamma: the largest length considered, a Python integer (it is a shape); by default 32, or
        the last length of `MeasuredTimes` (in a jit no more than 32).

    Returns:
      Draft tokens per round, in [0, max_gamma], in the shape of batch.

    Raises:
      ValueError: a field or an argument is outside its range, NaN or of the wrong shape, or
        `max_gamma` is beyond the last measured length.

    Example:
      >>> from jaxsd import costmodel
      >>> times = costmodel.LinearTimes([1, 32], [0.020, 0.025], [0.001, 0.010], [0.001, 0.001])
      >>> curve = costmodel.GeometricCurve(0.8)
      >>> [f"{float(costmodel.optimal_gamma_for_batch(curve, times, b)):.2f}" for b in (1, 8, 32)]
      ['5.76', '4.02', '2.00']

    Source: Su et al., arXiv 2310.18813.
    """
    return _optimum(*_question(curve, times, batch, max_gamma))


def optimal_integer_gamma_for_batch(
    curve: AnyLengthCurve,
    times: AnyRoundTimes,
    batch: ArrayLike,
    max_gamma: int | None = None,
) -> Array:
    """Returns the whole number of draft tokens that makes goodput largest at a batch.

    The smallest one where several are equally good, so 0, do not speculate, wherever nothing is
    gained. Every length is tried: measured times have steps. Not differentiable.

        argmax over gamma in {0, ..., max_gamma} of b (1 + l(gamma)) / T(b, gamma)

    Args:
      curve: l, accepted draft tokens by draft length.
      times: T, seconds per round by batch and draft length.
      batch: b, sequences decoded together, positive.
      max_gamma: the largest length considered, a Python integer (it is a shape); by default 32, or
        the last length of `MeasuredTimes` (in a jit no more than 32).

    Returns:
      Draft tokens per round, int32, in 0..max_gamma, in the shape of batch.

    Raises:
      ValueError: a field or an argument is outside its range, NaN or of the wrong shape, or
        `max_gamma` is beyond the last measured length.

    Example:
      >>> from jaxsd import costmodel
      >>> times = costmodel.LinearTimes([1, 32], [0.020, 0.025], [0.001, 0.030], [0.001, 0.001])
      >>> curve = costmodel.PowerCurve(0.9, 0.548)
      >>> print(costmodel.optimal_integer_gamma_for_batch(curve, times, [1, 8, 32]))
      [6 1 0]

    Source: Su et al., arXiv 2310.18813.
    """
    return _integer_optimum(*_question(curve, times, batch, max_gamma))


def run_to_completion_rounds(
    acceptance_by_position: ArrayLike, num_tokens: int, batch: ArrayLike
) -> Array:
    """Returns the mean number of rounds until the slowest of a batch's sequences is done.

    A batch that is decoded until all of it is done waits for its least lucky sequence. The mean is
    exact, over every course that independent sequences can take: with P_n the chance that one
    has its tokens after n rounds,

        rounds = sum over n >= 0 of 1 - P_n^b

    Over the value at `batch=1` it is what such batches lose to those that refill every round.

    Args:
      acceptance_by_position: `[K]` share of rounds in which at least 1, 2, ..., K drafted tokens
        are accepted, in [0, 1], falling; `acceptance_by_position(curve, K)` of a curve.
      num_tokens: tokens that every sequence must commit, a Python integer (it is a shape), at
        least 1.
      batch: b, sequences, at least 1; a real number interpolates.

    Returns:
      Rounds, in the shape of batch.

    Raises:
      ValueError: an argument is outside its range, NaN or of the wrong shape.

    Example:
      >>> from jaxsd import costmodel
      >>> shares = costmodel.acceptance_by_position(costmodel.GeometricCurve(0.7), 4)
      >>> rounds = costmodel.run_to_completion_rounds(shares, 128, [1, 8, 32])
      >>> [round(float(x), 1) for x in rounds]
      [46.6, 52.2, 55.0]

    Source: Su et al., arXiv 2310.18813, whose server decodes so.
    """
    shape = np.shape(acceptance_by_position)
    if len(shape) != 1:
        raise ValueError(f"acceptance_by_position of shape {shape} must have shape [K]")
    require("acceptance_by_position", acceptance_by_position, PROBABILITY)
    if not is_traced(acceptance_by_position):
        rises = np.diff(np.asarray(acceptance_by_position, np.float64), prepend=1.0)
        falls = (lambda _: rises <= _ROUNDING * len(rises), "shares of rounds that do not rise")
        require("acceptance_by_position", acceptance_by_position, falls)
    require("num_tokens", num_tokens, AT_LEAST_ONE)
    require("batch", batch, AT_LEAST_ONE)
    shares, batch_ = as_one_dtype(acceptance_by_position, batch)
    return _slowest_rounds(shares, batch_, np.zeros(num_tokens, np.int8))


def _question(
    curve: AnyLengthCurve, times: AnyRoundTimes, batch: ArrayLike, max_gamma: int | None
) -> tuple[AnyLengthCurve, AnyRoundTimes, Array, Array]:
    """The arguments, checked and as arrays of one type, and the lengths that are tried."""
    curve.check()
    times.check()
    require("batch", batch, POSITIVE)
    last, is_given = last_gamma(times), max_gamma is not None
    if max_gamma is None:
        max_gamma = _MAX_GAMMA if last is None else int(last)
    require("max_gamma", max_gamma, NON_NEGATIVE)
    if last is not None and max_gamma > last:
        raise ValueError(
            f"max_gamma={max_gamma} lies beyond the measured draft lengths, which end at {last:g}"
        )
    gammas = np.arange(max_gamma + 1)
    if isinstance(times, MeasuredTimes) and last is None and not is_given:
        # Inside a jit the last length is no shape: it is tried again in place of longer ones.
        every, end = as_floats(gammas, jnp.asarray(times.gammas)[-1])
        return _as_arrays((curve, times, batch, jnp.minimum(every, jnp.floor(end))))
    return _as_arrays((curve, times, batch, gammas))


def _as_arrays(question: Any) -> Any:
    """Every leaf as an array, all of one floating dtype."""

    def is_list(node: Any) -> bool:
        """Whether it would reach a compiled function as so many separate numbers."""
        return isinstance(node, list) or (type(node) is tuple and node is not question)

    leaves, tree = jax.tree.flatten(question, is_leaf=is_list)
    return jax.tree.unflatten(tree, as_one_dtype(*leaves))


def _token_seconds(
    curve: AnyLengthCurve, times: AnyRoundTimes, batch: Array, gamma: Array
) -> Array:
    """`token_seconds` of checked arrays."""
    tokens, seconds = as_floats(curve.accepted(gamma), checked_round_seconds(times, batch, gamma))
    return seconds / (1 + tokens)


def _on_grid(
    curve: AnyLengthCurve, times: AnyRoundTimes, batch: Array, gammas: Array
) -> tuple[Array, Array]:
    """`[M + 1, ...]` seconds per token of every length, and the batches in their full shape."""
    shape = jax.eval_shape(_token_seconds, curve, times, batch, jnp.zeros_like(batch)).shape
    batch = jnp.broadcast_to(batch, shape)
    gammas = gammas.reshape(-1, *(1,) * len(shape))
    return _token_seconds(curve, times, *as_floats(batch[None], gammas)), batch


@jax.jit
def _integer_optimum(
    curve: AnyLengthCurve, times: AnyRoundTimes, batch: Array, gammas: Array
) -> Array:
    """The first of the best lengths."""
    seconds, _ = _on_grid(curve, times, batch, gammas)
    return jnp.argmin(seconds, axis=0).astype(jnp.int32)


@jax.jit
def _slope(curve: AnyLengthCurve, times: AnyRoundTimes, batch: Array, gamma: Array) -> Array:
    """`marginal_gain` of checked arrays."""
    gain, loss = _slopes(curve, times, batch, gamma)
    return gain - loss


def _slopes(
    curve: AnyLengthCurve, times: AnyRoundTimes, batch: Array, gamma: Array
) -> tuple[Array, Array]:
    """By which share one more drafted token adds to a round's tokens, and to its time."""
    one = jnp.ones_like(gamma)
    tokens, more_tokens = jax.jvp(curve.accepted, (gamma,), (one,))
    seconds, more_seconds = jax.jvp(partial(checked_round_seconds, times, batch), (gamma,), (one,))
    gain, cost = as_floats(more_tokens / (1 + tokens), more_seconds / seconds)
    return gain, cost


@jax.jit
def _optimum(curve: AnyLengthCurve, times: AnyRoundTimes, batch: Array, gammas: Array) -> Array:
    """The root of the first-order condition beside the best whole length."""
    seconds, batch = _on_grid(curve, times, batch, gammas)
    if gammas.shape[0] == 1:
        return jnp.zeros_like(batch)
    best = 1 + jnp.argmin(seconds[1:], axis=0).astype(gammas.dtype)
    low, high = best - 1, jnp.minimum(best + 1, gammas[-1])

    def bisect(condition: Callable[[Array], Array], start: Array) -> Array:
        def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            middle = (ends[0] + ends[1]) / 2
            rises = condition(middle) > 0
            return jnp.where(rises, middle, ends[0]), jnp.where(rises, ends[1], middle)

        ends = jax.lax.fori_loop(0, _BISECTIONS, halve, jax.lax.stop_gradient((low, high)))
        return (ends[0] + ends[1]) / 2

    def divide(linear: Callable[[Array], Array], value: Array) -> Array:
        slope = linear(jnp.ones_like(value))
        return value / jnp.where(slope == 0, 1, slope)

    gamma = jax.lax.custom_root(partial(_slope, curve, times, batch), best, bisect, divide)
    gain, loss = _slopes(curve, times, batch, gamma)
    # At an end, and at a corner of what was measured, the condition changes sign without a root.
    is_root = jnp.abs(gain - loss) <= jnp.finfo(gain.dtype).eps ** 0.5 * (gain + loss)
    gamma = jnp.where(is_root, gamma, jax.lax.stop_gradient(gamma))
    pays = _token_seconds(curve, times, batch, gamma) < seconds[0]
    return jnp.where(pays, gamma, 0)


@jax.jit
def _slowest_rounds(shares: Array, batch: Array, tokens: Array) -> Array:
    """`run_to_completion_rounds`; `tokens` only says how many there are."""
    num_tokens, num_drafted = tokens.shape[0], shares.shape[0]
    before = jnp.concatenate([jnp.ones(1, shares.dtype), shares])
    after = jnp.concatenate([shares, jnp.zeros(1, shares.dtype)])
    exactly = before - after  # [K + 1] chance of a round of 1, 2, ..., K + 1 tokens

    def play(so_far: Array, _: None) -> tuple[Array, Array]:
        """From the law of the tokens committed, of those not done, to that one round later."""
        padded = jnp.concatenate([jnp.zeros(num_drafted + 1, so_far.dtype), so_far])
        moved = [
            exactly[k] * padded[num_drafted - k : num_drafted - k + num_tokens]
            for k in range(num_drafted + 1)
        ]
        return jnp.stack(moved).sum(0), so_far.sum()

    start = jnp.zeros(num_tokens, shares.dtype).at[0].set(1)
    _, open_ = jax.lax.scan(play, start, None, length=num_tokens)  # 1 - P_n for n = 0, 1, ...
    # 1 - (1 - x)^b without cancellation; where x is 1 the logarithm must stay finite.
    open_ = jnp.minimum(open_, 1 - jnp.finfo(open_.dtype).eps)
    open_ = open_.reshape(-1, *(1,) * batch.ndim)
    return -jnp.expm1(batch[None] * jnp.log1p(-open_)).sum(0)
