"""Which parameters fit measurements best, how well are they known, and are they known at all?

Damped Gauss-Newton in NumPy's float64, over a prediction and its Jacobian that JAX computes. The
problems have a dozen parameters and some hundred rows: what costs time is compiling the prediction,
so refits without a group of rows give these no weight instead of another shape.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ._inputs import float64_on_host, is_traced

CONFIDENCE = 0.95
# Rows may come as lists, as they do from a file.
Numbers = ArrayLike | Sequence[float]

_MAX_STEPS = 300
_DAMPING = 1e-3  # to begin with
_MAX_DAMPING = 1e12
_NUM_POLISHING_STEPS = 20
# A parameter belongs to a direction that the rows do not determine if its share of it is at least
# this, of the largest share, in columns of one length.
_SHARE = 0.3


class Fit(NamedTuple):
    """Fitted parameters, how well the rows determine them, and how well they predict rows."""

    result: Any  # the law, or the Stack; from `targets`, a dict of laws; of a regression, of floats
    names: tuple[str, ...]  # of the p parameters; "a = b" is one parameter in two places
    estimates: np.ndarray  # [p]
    standard_errors: np.ndarray  # [p]; NaN where there are as many parameters as rows
    intervals: np.ndarray  # [p, 2] ends of the 95 % confidence intervals
    covariance: np.ndarray  # [p, p] of the estimates
    at_bound: tuple[str, ...]  # parameters that the rows would have below 0, or beyond their range
    degrees_of_freedom: int  # rows - parameters
    # The next three on the scale on which squares were summed: nats of loss, logarithms of seconds.
    residual_error: float  # root of the sum of squares over the degrees of freedom
    mean_squared_error: float  # sum of squares over the number of rows
    r_squared: float
    predicted: np.ndarray  # [n]
    mean_relative_error: float  # mean of |predicted / measured - 1|
    max_relative_error: float
    # [n] Of rows predicted by a fit without their group; NaN where no such fit is determined.
    held_out: np.ndarray
    # The same errors of these.
    held_out_error: float
    held_out_max_error: float
    num_held_out: int  # rows that could be predicted so, of n
    ranges: dict[str, tuple[float, float]]  # of what was varied; beyond them it is extrapolation


class Model(NamedTuple):
    """What is fitted, in coordinates in which a straight step makes sense."""

    # [p] unknowns -> [n] predictions and their [n, p] Jacobian, on the scale of the residuals.
    evaluate: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    measured: np.ndarray  # [n] on that scale
    starts: np.ndarray  # [s, p]
    lower: np.ndarray  # [p]
    upper: np.ndarray  # [p]
    # [p] unknowns -> [p] parameters as they are reported and their [p, p] Jacobian.
    report: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    names: tuple[str, ...]
    # [p] Whether an unknown that moves by 1 changes the parameter by as much as its value.
    is_relative: np.ndarray
    advice: Mapping[str, str]  # parameter -> the rows that would tell it from others
    # The relative error of a row. Parameters count as not identified if such errors move a
    # combination of them by all of its value: if the smallest singular value of the Jacobian, its
    # columns scaled to length 1, is below this.
    threshold: float
    to_measurement: Callable[[np.ndarray], np.ndarray] = lambda x: x  # from that scale


def value_and_jacobian(function: Callable[..., Array]) -> Callable[..., tuple[Any, Any]]:
    """The compiled function of unknowns and data, with its derivative by the unknowns."""

    @jax.jit
    def both(unknowns: Array, *data: Any) -> tuple[Array, Array]:
        return function(unknowns, *data), jax.jacfwd(function)(unknowns, *data)

    def on_host(unknowns: np.ndarray, *data: Any) -> tuple[np.ndarray, np.ndarray]:
        with float64_on_host():
            value, jacobian = jax.device_get(both(unknowns, *data))
        return value, jacobian

    return on_host


def solve(
    model: Model,
    make_result: Callable[[np.ndarray], Any],
    ranges: dict[str, tuple[float, float]],
    groups: Sequence[Any] | None,
    spare_rows: int = 1,
    robust: bool = False,
) -> Fit:
    """Solves a problem, refuses it if the rows do not determine it, and says how good it is.

    Raises:
      ValueError: too few rows, or parameters that no row tells apart.
    """
    num_rows, num_unknowns = len(model.measured), len(model.names)
    if num_rows < num_unknowns + spare_rows:
        raise ValueError(
            f"{num_rows} rows do not determine {num_unknowns} parameters "
            f"({', '.join(model.names)}): at least {num_unknowns + spare_rows} rows are needed"
        )
    labels = group_labels(groups, num_rows)
    weights = np.ones(num_rows)
    unknowns = _best(model, weights)
    predicted, jacobian = model.evaluate(unknowns)
    _require_identified(model, jacobian)

    residuals = predicted - model.measured
    freedom = num_rows - num_unknowns
    squares = float(residuals @ residuals)
    variance = squares / freedom if freedom else math.nan
    inner = _covariance(jacobian, residuals, variance, robust)
    estimates, chain = model.report(unknowns)
    covariance = chain @ inner @ chain.T
    errors = np.sqrt(np.diag(covariance))
    reach = t_quantile(0.5 + CONFIDENCE / 2, freedom) * errors
    spread = float(np.square(model.measured - model.measured.mean()).sum())
    held_out = _hold_out(model, labels, unknowns)
    relative = _relative_error(model, predicted)
    relative_out = _relative_error(model, held_out)
    bound = (unknowns <= model.lower) | (unknowns >= model.upper)
    return Fit(
        result=make_result(unknowns),
        names=model.names,
        estimates=estimates,
        standard_errors=errors,
        intervals=np.stack([estimates - reach, estimates + reach], 1),
        covariance=covariance,
        at_bound=tuple(name for name, at in zip(model.names, bound, strict=True) if at),
        degrees_of_freedom=freedom,
        residual_error=math.sqrt(variance),
        mean_squared_error=squares / num_rows,
        r_squared=1 - squares / spread if spread else math.nan,
        predicted=model.to_measurement(predicted),
        mean_relative_error=float(relative.mean()) if len(relative) else math.nan,
        max_relative_error=float(relative.max()) if len(relative) else math.nan,
        held_out=model.to_measurement(held_out),
        held_out_error=float(relative_out.mean()) if len(relative_out) else math.nan,
        held_out_max_error=float(relative_out.max()) if len(relative_out) else math.nan,
        num_held_out=len(relative_out),
        ranges=ranges,
    )


def t_quantile(probability: float, degrees_of_freedom: int) -> float:
    """The value below which Student's t lies with a probability of at least one half.

    For whole degrees of freedom its distribution is a finite sum of powers of a cosine, solved here
    by bisection; from 2000 on it is expanded around the normal distribution (to within 1e-8).

    >>> round(t_quantile(0.975, 127), 6), round(t_quantile(0.975, 1), 4)
    (1.97882, 12.7062)
    """
    if degrees_of_freedom < 1:
        return math.nan
    if degrees_of_freedom >= 2000:
        z = statistics.NormalDist().inv_cdf(probability)
        first, second = z**3 + z, 5 * z**5 + 16 * z**3 + 3 * z
        return z + first / (4 * degrees_of_freedom) + second / (96 * degrees_of_freedom**2)
    odd = degrees_of_freedom % 2
    count = np.arange(1, (degrees_of_freedom - odd) // 2)
    # Odd: 1, 2/3, 2 4 / 3 5, ...; even: 1, 1/2, 1 3 / 2 4, ...
    ratios = 2 * count / (2 * count + 1) if odd else (2 * count - 1) / (2 * count)
    terms = np.cumprod(np.concatenate([[1.0], ratios]))
    powers = 2 * np.arange(len(terms)) + odd

    def central(angle: float) -> float:
        """Probability of |t| < sqrt(degrees) tan(angle)."""
        if degrees_of_freedom == 1:
            return 2 * angle / math.pi
        total = float(terms @ np.cos(angle) ** powers) * math.sin(angle)
        return 2 / math.pi * (angle + total) if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if central(middle) < 2 * probability - 1 else (low, middle)
    return math.sqrt(degrees_of_freedom) * math.tan(low)


def host_numbers(name: str, value: Any, num_rows: int | None = None) -> np.ndarray:
    """A measurement as a float64 vector; scalars are repeated.

    Raises:
      ValueError: it is traced, not numbers, or of another length.
    """
    if is_traced(value):
        raise ValueError(f"{name} must be numbers: fits look at them, so not inside jit or grad")
    try:
        numbers = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers") from None
    if num_rows is not None and numbers.ndim == 0:
        numbers = np.full(num_rows, numbers)
    if numbers.ndim != 1 or (num_rows is not None and len(numbers) != num_rows):
        wanted = "[n]" if num_rows is None else f"[{num_rows}], a number per row"
        raise ValueError(f"{name} of shape {numbers.shape} must have shape {wanted}")
    if not np.isfinite(numbers).all():
        wrong = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise ValueError(f"{name}[{wrong}]={numbers[wrong]} must be finite")
    return numbers


def range_of(values: np.ndarray) -> tuple[float, float]:
    """The smallest and the largest of some numbers."""
    return float(values.min()), float(values.max())


def group_labels(groups: Sequence[Any] | None, num_rows: int) -> np.ndarray:
    """The number of every row's group, every row its own group by default."""
    if groups is None:
        return np.arange(num_rows)
    if len(groups) != num_rows:
        raise ValueError(f"groups of length {len(groups)} must name a group per row, {num_rows}")
    known: dict[Any, int] = {}
    return np.array([known.setdefault(label, len(known)) for label in groups])


def _best(model: Model, weights: np.ndarray) -> np.ndarray:
    """The best end of all starts."""
    ends = [_descend(model, start, weights) for start in model.starts]
    costs = [cost for _, cost in ends]
    if not np.isfinite(costs).any():
        raise ValueError("no start of the fit gives finite predictions: are the units right?")
    return ends[int(np.nanargmin(costs))][0]


def _descend(
    model: Model, start: np.ndarray, weights: np.ndarray, damping: float = _DAMPING
) -> tuple[np.ndarray, float]:
    """Levenberg-Marquardt within the bounds; the end and its sum of squares."""

    def evaluate(unknowns: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        with np.errstate(over="ignore", invalid="ignore"):  # a step too far is just not taken
            predicted, jacobian = model.evaluate(unknowns)
            residuals = (predicted - model.measured) * weights
            cost = float(residuals @ residuals)
        is_finite = math.isfinite(cost) and np.isfinite(jacobian).all()
        return residuals, jacobian * weights[:, None], cost if is_finite else math.inf

    point = np.clip(start, model.lower, model.upper)
    residuals, jacobian, cost = evaluate(point)
    for _ in range(_MAX_STEPS):
        if not math.isfinite(cost) or damping > _MAX_DAMPING:
            break
        trial = _step(model, point, residuals, jacobian, damping)
        if _reach(jacobian, trial - point) <= 1e-9 * math.sqrt(cost):
            break
        new_residuals, new_jacobian, new_cost = evaluate(trial)
        if new_cost < cost:
            done = cost - new_cost < 1e-14 * cost
            point, residuals, jacobian, cost = trial, new_residuals, new_jacobian, new_cost
            damping /= 10
            if done:
                break
        else:
            damping = max(10 * damping, _DAMPING)
    return _polish(model, evaluate, point, residuals, jacobian, cost)


def _polish(
    model: Model,
    evaluate: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, float]],
    point: np.ndarray,
    residuals: np.ndarray,
    jacobian: np.ndarray,
    cost: float,
) -> tuple[np.ndarray, float]:
    """Plain Gauss-Newton for the last digits: the sum of squares is too flat there to decide."""
    shortest = math.inf
    for _ in range(_NUM_POLISHING_STEPS):
        if not math.isfinite(cost):
            break
        trial = _step(model, point, residuals, jacobian, 0.0)
        reach = _reach(jacobian, trial - point)
        new_residuals, new_jacobian, new_cost = evaluate(trial)
        if not (new_cost <= cost * (1 + 1e-12) + 1e-300 and reach < shortest):
            break
        shortest = reach
        point, residuals, jacobian, cost = trial, new_residuals, new_jacobian, new_cost
        if shortest <= 1e-13 * math.sqrt(cost):
            break
    return point, cost


def _step(
    model: Model, point: np.ndarray, residuals: np.ndarray, jacobian: np.ndarray, damping: float
) -> np.ndarray:
    """One step in the directions that do not lead out of the bounds."""
    slope = jacobian.T @ residuals
    lengths = np.linalg.norm(jacobian, axis=0)
    blocked = ((point <= model.lower) & (slope > 0)) | ((point >= model.upper) & (slope < 0))
    free = ~blocked & (lengths > 0)
    if not free.any():
        return point
    # Columns of one length make the step independent of units, and the damping a number. That the
    # product squares the condition costs digits of the step, not of the point where steps end.
    columns = jacobian[:, free] / lengths[free]
    product = columns.T @ columns + damping * np.eye(free.sum())
    try:
        move = np.linalg.solve(product, -columns.T @ residuals)
    except np.linalg.LinAlgError:
        return point
    trial = point.copy()
    trial[free] += move / lengths[free]
    return np.clip(trial, model.lower, model.upper)


def _reach(jacobian: np.ndarray, move: np.ndarray) -> float:
    """How far the unknown that does most moves the predictions, to first order."""
    return float((np.linalg.norm(jacobian, axis=0) * np.abs(move)).max())


def _covariance(
    jacobian: np.ndarray, residuals: np.ndarray, variance: float, robust: bool
) -> np.ndarray:
    """Of the unknowns: residuals alike, or each with its own variance (HC3, by leverage)."""
    lengths = np.linalg.norm(jacobian, axis=0)
    left, values, right = np.linalg.svd(jacobian / lengths, full_matrices=False)
    pseudo = (right.T / values) @ left.T  # [p, n] from residuals to columns of one length
    if robust:
        leverage = np.square(left).sum(1)
        inner = (pseudo * np.square(residuals / (1 - leverage))) @ pseudo.T
    else:
        inner = variance * pseudo @ pseudo.T
    return inner / np.outer(lengths, lengths)


def _require_identified(model: Model, jacobian: np.ndarray) -> None:
    """Raises ValueError naming the parameters that the rows do not tell apart."""
    lengths = np.linalg.norm(jacobian, axis=0)
    reach = np.abs(jacobian).max(0)
    silent = (reach == 0) | (model.is_relative & (reach < model.threshold))
    if silent.any():
        names = [name for name, is_silent in zip(model.names, silent, strict=True) if is_silent]
        raise ValueError(
            f"the rows say nothing of {_and(names)}: no prediction depends on it"
            f"{_advise(model, names)}"
        )
    _, values, right = np.linalg.svd(jacobian / lengths, full_matrices=False)
    if values[-1] >= model.threshold:
        return
    weak = np.abs(right[values < model.threshold])
    shares = (weak / weak.max(1, keepdims=True)).max(0)
    names = [name for name, share in zip(model.names, shares, strict=True) if share >= _SHARE]
    raise ValueError(
        f"the rows do not tell {_and(names)} apart: they move together (smallest scaled singular "
        f"value {values[-1]:.1g}, at least {model.threshold:g} is needed){_advise(model, names)}"
    )


def _advise(model: Model, names: Sequence[str]) -> str:
    """Which rows to add, for parameters of which there is something to say."""
    found = dict.fromkeys(text for name in names if (text := _find(model.advice, name)))
    return f"; add {', or '.join(found)}" if found else ""


def _find(advice: Mapping[str, str], name: str) -> str | None:
    """The advice for a parameter, whatever else its name says."""
    return next(
        (text for key, text in advice.items() if key in name.replace("[", " ").split()), None
    )


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _hold_out(model: Model, labels: np.ndarray, unknowns: np.ndarray) -> np.ndarray:
    """[n] Predictions of every row by a fit without its group; NaN where that is undetermined."""
    out = np.full(len(labels), np.nan)
    for label in range(labels.max() + 1):
        weights = (labels != label).astype(np.float64)
        if weights.sum() < len(unknowns):
            continue
        refit, _ = _descend(model, unknowns, weights, damping=0.0)  # it is near already
        predicted, jacobian = model.evaluate(refit)
        jacobian = jacobian * weights[:, None]
        lengths = np.linalg.norm(jacobian, axis=0)
        if not lengths.all() or np.linalg.svd(jacobian / lengths)[1][-1] < 1e-8:
            continue
        out[labels == label] = predicted[labels == label]
    return out


def _relative_error(model: Model, predicted: np.ndarray) -> np.ndarray:
    """|predicted / measured - 1| of the rows that were predicted and are not 0."""
    measured = model.to_measurement(model.measured)
    there = np.isfinite(predicted) & (measured != 0)
    return np.abs(model.to_measurement(predicted[there]) / measured[there] - 1)
