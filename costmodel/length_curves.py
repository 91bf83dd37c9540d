"""How many drafted tokens does a round accept on average, by how many it drafts?

The curve l(gamma) counts accepted draft tokens alone. The token that the target itself adds to
every round is not among them: a round commits 1 + l(gamma) tokens. A sequence has the same curve
however many others share its batch.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ._inputs import NON_NEGATIVE, POSITIVE, PROBABILITY, as_floats, is_traced, require
from ._least_squares import Fit, Model, host_numbers, range_of, solve, value_and_jacobian
from ._numerics import geometric_sum, safe_log

# A mean over some hundred prompts is off by a percent. A combination of parameters that such errors
# move by all of its value was not measured.
_THRESHOLD = 0.01
# Shares of rounds are differences of lengths, and these are rounded.
_ROUNDING = 1e-5

LengthForm = Literal["power", "geometric"]


class AnyLengthCurve(Protocol):
    """Any NamedTuple with these two methods is an accepted-length curve."""

    def accepted(self, gamma: Array) -> Array:
        """Mean number of accepted draft tokens; 0 at 0, rising ever more slowly."""
        ...

    def check(self) -> None:
        """Raises ValueError if a field is wrong."""
        ...


class PowerCurve(NamedTuple):
    """Accepted tokens `coefficient * gamma^exponent`."""

    coefficient: ArrayLike  # acceptance of the first token
    exponent: ArrayLike  # above 0, at most 1

    def accepted(self, gamma: Array) -> Array:
        """The power; its slope at 0, which is infinite, is given as 0."""
        coefficient, exponent, gamma = as_floats(*self, gamma)
        drafted = gamma > 0
        power = jnp.exp(exponent * jnp.log(jnp.where(drafted, gamma, 1)))
        return jnp.where(drafted, coefficient * power, 0)

    def check(self) -> None:
        """Raises ValueError unless the curve rises and bends down."""
        require("PowerCurve.coefficient", self.coefficient, POSITIVE)
        require("PowerCurve.exponent", self.exponent, _EXPONENT)


class GeometricCurve(NamedTuple):
    """Every token is accepted with the same probability: `alpha + alpha^2 + ... + alpha^gamma`."""

    alpha: ArrayLike

    def accepted(self, gamma: Array) -> Array:
        """The sum of powers, smooth in gamma."""
        alpha, gamma = as_floats(self.alpha, gamma)
        return alpha * geometric_sum(safe_log(alpha), gamma)

    def check(self) -> None:
        """Raises ValueError unless alpha is a probability."""
        require("GeometricCurve.alpha", self.alpha, PROBABILITY)


class MeasuredCurve(NamedTuple):
    """Accepted tokens measured at some draft lengths, joined by straight lines from (0, 0) on."""

    gammas: ArrayLike  # [K] positive, rising
    lengths: ArrayLike  # [K] mean accepted draft tokens at each, the target's own not counted

    def accepted(self, gamma: Array) -> Array:
        """The lines; beyond the last length acceptance falls on as it did on average up to there.

        At a measured length the slope is the mean of those on both sides.
        """
        zero = np.zeros(1, np.float32)
        knots, lengths, gamma = as_one_dtype(self.gammas, self.lengths, gamma)
        knots = jnp.concatenate([zero.astype(knots.dtype), knots])
        lengths = jnp.concatenate([zero.astype(lengths.dtype), lengths])
        return _joined(gamma, knots, jnp.diff(lengths))

    def check(self) -> None:
        """Raises ValueError unless lengths rise, by at most one token for every token drafted."""
        shape = np.shape(self.gammas)
        if len(shape) != 1 or shape[0] == 0 or np.shape(self.lengths) != shape:
            raise ValueError(
                f"MeasuredCurve.gammas of shape {shape} and lengths of shape "
                f"{np.shape(self.lengths)} must both have shape [K]"
            )
        if is_traced(self):
            return
        require("MeasuredCurve.gammas", self.gammas, POSITIVE)
        require("MeasuredCurve.gammas", np.diff(self.gammas, prepend=0.0), _RISING)
        require("MeasuredCurve.lengths", self.lengths, NON_NEGATIVE)
        slopes = np.diff(self.lengths, prepend=0.0) / np.diff(self.gammas, prepend=0.0)
        require("the slope of MeasuredCurve.lengths", slopes, PROBABILITY)


class PositionCurve(NamedTuple):
    """Acceptance by position, as the decoder reports it.

    The shares are cumulative: those of rounds in which at least so many tokens were accepted, what
    SDSL and the decoder's statistics call acceptance at a position. From conditional ones, of a
    token given that all before it were accepted, they follow by `jnp.cumprod`.
    """

    # [K] share of rounds in which at least 1, 2, ..., K drafted tokens were accepted; falling.
    by_position: ArrayLike

    def accepted(self, gamma: Array) -> Array:
        """The sum of the shares; beyond the last one they go on to fall as they did on average.

        Between whole lengths it is linear, as varying the length between rounds would be; at a
        whole length the slope is the mean of those on both sides.
        """
        shares, gamma = as_one_dtype(self.by_position, gamma)
        return _joined(gamma, jnp.arange(shares.shape[0] + 1).astype(shares.dtype), shares)

    def check(self) -> None:
        """Raises ValueError unless the shares are probabilities that do not rise."""
        shape = np.shape(self.by_position)
        if len(shape) != 1 or shape[0] == 0:
            raise ValueError(f"PositionCurve.by_position of shape {shape} must have shape [K]")
        require("PositionCurve.by_position", self.by_position, PROBABILITY)
        if not is_traced(self.by_position):
            rises = np.diff(np.asarray(self.by_position, np.float64), prepend=1.0)
            falls = rises <= _ROUNDING * shape[0]
            require("PositionCurve.by_position", self.by_position, (lambda _: falls, _CUMULATIVE))


def accepted_length(curve: AnyLengthCurve, gamma: ArrayLike) -> Array:
    """Returns the mean number of draft tokens that a round accepts, l(gamma).

    Exactly 0 at `gamma=0`; the token that the target adds is not counted, so that a round commits
    `1 + accepted_length`. Continuous; power, geometric and position curves rise and bend down.

        power      c gamma^g
        geometric  (alpha - alpha^(gamma + 1)) / (1 - alpha)
        measured   lines through (0, 0) and the measured points
        position   share of at least 1 + share of at least 2 + ... + share of at least gamma

    Args:
      curve: `PowerCurve`, `GeometricCurve`, `MeasuredCurve`, `PositionCurve` or your own.
      gamma: draft tokens per round, at least 0; a real number interpolates.

    Returns:
      Tokens, in the shape of gamma (broadcast with the numbers of a power or geometric curve).

    Raises:
      ValueError: a field of the curve or gamma is outside its range, NaN or of the wrong shape.

    Example:
      >>> from jaxsd import costmodel
      >>> curves = (
      ...     costmodel.PowerCurve(0.9, 0.548),
      ...     costmodel.GeometricCurve(0.8),
      ...     costmodel.MeasuredCurve([2, 4, 8], [1.4, 2.3, 3.5]),
      ...     costmodel.PositionCurve([0.8, 0.6, 0.5, 0.4]),
      ... )
      >>> [round(float(costmodel.accepted_length(curve, 4)), 3) for curve in curves]
      [1.924, 2.362, 2.3, 2.3]

    Source: Su et al., arXiv 2310.18813 (the measured curve and its power); Leviathan et al.,
    arXiv 2211.17192, eq. 1 less the target's token.
    """
    curve.check()
    require("gamma", gamma, NON_NEGATIVE)
    (gamma_,) = in_dtype_of(curve, gamma)
    return curve.accepted(gamma_)


def acceptance_by_position(curve: AnyLengthCurve, max_gamma: int) -> Array:
    """Returns the share of rounds that accept at least 1, 2, ..., max_gamma tokens.

    These shares add up to the curve, and are what a simulation draws from.

        share_i = l(i) - l(i - 1)

    Args:
      curve: an accepted-length curve.
      max_gamma: K, a Python integer (it is a shape), at least 1.

    Returns:
      `[K]` cumulative shares, in [0, 1], falling.

    Raises:
      ValueError: a field of the curve is outside its range, `max_gamma` is below 1, or no chances
        make this curve: it rises by more than one token for one token drafted, or bends up.

    Example:
      >>> from jaxsd import costmodel
      >>> print(costmodel.acceptance_by_position(costmodel.GeometricCurve(0.5), 4))
      [0.5    0.25   0.125  0.0625]
    """
    require("max_gamma", max_gamma, (lambda x: x >= 1, "at least 1"))
    shares = jnp.diff(accepted_length(curve, np.arange(max_gamma + 1)))
    if not is_traced(shares):
        rises = np.diff(np.asarray(shares, np.float64), prepend=1.0)
        if not (rises <= _ROUNDING * max_gamma).all():
            worst = int(rises.argmax()) + 1
            raise ValueError(
                f"{type(curve).__name__} rises by {float(shares[worst - 1]):.4g} tokens at draft "
                f"token {worst}, and the shares of rounds that accept so many must be at most 1 "
                "and fall"
            )
    return jnp.clip(shares, 0, 1)


def fit_length_curve(
    gammas: ArrayLike,
    lengths: ArrayLike,
    form: LengthForm = "power",
    groups: Sequence[Any] | None = None,
) -> Fit:
    """Returns the power or geometric curve that measured lengths follow best.

    Minimises the squares of `lengths - l(gamma)`, in tokens. Neither form is right in general:
    over draft lengths 1 to 8 a power misses a geometric curve by up to a quarter, at the
    first token. Compare their errors, and keep the measured curve where it reaches far enough.

    Args:
      gammas: `[n]` draft tokens per round, positive.
      lengths: `[n]` mean accepted draft tokens, the target's own token not counted, at least 0 and
        at most gamma; a mean acceptance length, less 1.
      form: `power` or `geometric`.
      groups: `[n]` labels; the held-out error is of rows predicted without their group. By default
        every row is a group.

    Returns:
      The fit, whose `result` is a `PowerCurve` or a `GeometricCurve`.

    Raises:
      ValueError: an argument is outside its range, not finite or of the wrong length, there are too
        few rows, or they do not determine the parameters.

    Example:
      >>> from jaxsd import costmodel
      >>> fit = costmodel.fit_length_curve([1, 2, 4, 8], [0.8, 1.25, 1.9, 2.7])
      >>> print(f"{fit.result.coefficient:.2f} gamma^{fit.result.exponent:.2f}")
      0.84 gamma^0.56

    Source: Su et al., arXiv 2310.18813.
    """
    if form not in _NAMES:
        raise ValueError(f"form={form!r} must be one of {', '.join(_NAMES)}")
    drafted = host_numbers("gammas", gammas)
    measured = host_numbers("lengths", lengths, len(drafted))
    require("gammas", drafted, POSITIVE)
    require("lengths", measured, NON_NEGATIVE)
    require("lengths per token of gammas", measured / drafted, PROBABILITY)
    names = _NAMES[form]
    model = Model(
        evaluate=lambda unknowns: _LENGTHS[form](unknowns, drafted),
        measured=measured,
        starts=_STARTS[form],
        lower=np.zeros(len(names)),
        upper=_UPPER[form],
        report=lambda unknowns: (unknowns, np.eye(len(names))),
        names=names,
        is_relative=np.zeros(len(names), bool),
        advice=_ADVICE,
        threshold=_THRESHOLD,
    )
    curve = {"power": PowerCurve, "geometric": GeometricCurve}[form]
    return solve(
        model, lambda unknowns: curve(*map(float, unknowns)), {"gamma": range_of(drafted)}, groups
    )


_ARRAYS = (Array, np.ndarray, np.generic)
_EXPONENT = (lambda x: (x > 0) & (x <= 1), "above 0 and at most 1")
_RISING = (lambda x: x > 0, "in rising order")
_CUMULATIVE = "shares of rounds that do not rise"

_NAMES = {"power": ("coefficient", "exponent"), "geometric": ("alpha",)}
_STARTS = {
    "power": np.array([[0.8, 0.5], [0.3, 0.9]]),
    "geometric": np.array([[0.2], [0.6], [0.9]]),
}
_UPPER = {"power": np.array([np.inf, 1.0]), "geometric": np.array([1.0])}
_ADVICE = {"coefficient": "lengths at one more gamma", "exponent": "lengths at one more gamma"}
_LENGTHS = {
    "power": value_and_jacobian(lambda x, gammas: PowerCurve(x[0], x[1]).accepted(gammas)),
    "geometric": value_and_jacobian(lambda x, gammas: GeometricCurve(x[0]).accepted(gammas)),
}


def _joined(gamma: Array, knots: Array, increments: Array) -> Array:
    """A curve from 0 at the first knot up by so much to every next one, and its continuation."""
    column = (1,) * gamma.ndim + (-1,)
    starts, widths, rises = (
        x.reshape(column) for x in (knots[:-1], jnp.diff(knots), increments)
    )  # [..., K]
    # No length is below 0. Clipped there, the first line would have half its slope at 0.
    lowest = jnp.where(starts > 0, 0, -1)
    inside = (jnp.clip((gamma[..., None] - starts) / widths, lowest, 1) * rises).sum(-1)
    # The slope after the last knot is that before it times decay, decay^2, ...
    last, end = increments[-1] / (knots[-1] - knots[-2]), knots[-1]
    log_decay = jnp.where(last > 0, safe_log(last) / end, safe_log(jnp.zeros_like(last)))
    log_decay = jnp.broadcast_to(log_decay, gamma.shape)
    more = jnp.maximum(gamma - end, 0)
    return inside + last * jnp.exp(log_decay) * geometric_sum(log_decay, more)


def in_dtype_of(tree: Any, *values: ArrayLike) -> list[Array]:
    """Values as floating arrays, in the dtype that they share with the arrays of a curve or times.

    A Python number has no dtype of its own: where 64-bit types are on, a float32 curve stays one.
    """
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, _ARRAYS)]
    return as_one_dtype(*arrays, *values)[len(arrays) :]


def as_one_dtype(*values: Any) -> list[Array]:
    """Arrays of one floating dtype, as `as_floats`, but each of its own shape."""
    (common, *_) = as_floats(*(x.ravel()[:1] if isinstance(x, _ARRAYS) else 0.0 for x in values))
    return [
        x.astype(common.dtype) if isinstance(x, Array) else jnp.asarray(np.asarray(x, common.dtype))
        for x in values
    ]
