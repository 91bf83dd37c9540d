"""Which law by position does a family of drafts follow, and how well is it known?

The drafts differ and the target is one: as a draft's perplexity falls, acceptance rises at every
position, and at every position at a pace of its own.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._inputs import AT_LEAST_ONE, POSITIVE, float64_on_host, is_traced, require
from ._least_squares import (
    CONFIDENCE,
    Fit,
    Model,
    Numbers,
    group_labels,
    host_numbers,
    range_of,
    solve,
    t_quantile,
)
from .laws import PerplexityRange
from .position_laws import PositionAcceptanceLaw, cumulative_shares
from .sensitivity import Interval
from .speculation import expected_tokens_by_position

# As in the fits of one alpha: a perplexity that moves acceptance by less than it is measured to
# says nothing of a slope.
_THRESHOLD = 0.005
_ADVICE = {"slope": "drafts of other perplexities"}


class PositionFit(NamedTuple):
    """A fitted law by position, how well drafts determine it, and how well it predicts a draft."""

    result: PositionAcceptanceLaw
    standard_errors: np.ndarray  # [K, 2] of every position's slope and intercept
    intervals: np.ndarray  # [K, 2, 2] ends of their 95 % confidence intervals
    covariance: np.ndarray  # [2 K, 2 K] of all slopes, then all intercepts
    degrees_of_freedom: int  # drafts - 2, at every position
    # [K] standard deviation of the logit of one draft's conditional acceptance around the law.
    residual_error: np.ndarray
    # [K, K] of these: a draft above the law at one position tends to be so at the next. Of rank
    # degrees_of_freedom at most.
    residual_covariance: np.ndarray
    r_squared: np.ndarray  # [K] on the scale of logits
    predicted: np.ndarray  # [n, K] shares
    mean_relative_error: float  # mean of |predicted / measured - 1|, of tokens per round, gamma = K
    max_relative_error: float
    # The same of drafts predicted by a fit without their group. NaN where none is determined.
    held_out_error: float
    held_out_max_error: float
    num_held_out: int  # drafts that could be predicted so, of n
    ranges: dict[str, tuple[float, float]]  # of what was varied; beyond them it is extrapolation


def fit_position_acceptance(
    draft_perplexity: Numbers,
    shares: Any,
    groups: Sequence[Any] | None = None,
) -> PositionFit:
    """Returns the law by position that measured drafts of one target follow best.

    Ordinary least squares at every position, in the logit of the conditional acceptance. All
    positions see the same drafts, so nothing is gained by solving them together, but their errors
    go together, and the covariance says how.

        logit(share_i / share_{i-1}) = slope_i * ln(draft perplexity) + intercept_i,  share_0 = 1

    Args:
      draft_perplexity: `[n]` at least 1, of at least three drafts.
      shares: `[n, K]` measured shares of rounds that accepted at least 1, 2, ..., K drafted tokens,
        strictly between 0 and 1 and strictly falling. A conditional acceptance of exactly 0 or 1
        has no logit: measure more rounds, or leave out the position.
      groups: `[n]` labels; the held-out error is of drafts predicted without their group. By
        default every draft is a group.

    Returns:
      The fit, whose `result` is a `PositionAcceptanceLaw`.

    Raises:
      ValueError: an argument is outside its range, not finite or of the wrong shape, there are too
        few drafts, or their perplexities are too much alike.

    Example:
      >>> from jaxsd import costmodel
      >>> shares = [[0.8, 0.67, 0.57], [0.72, 0.56, 0.45], [0.65, 0.47, 0.36], [0.6, 0.42, 0.3]]
      >>> fit = costmodel.fit_position_acceptance([10.0, 16.0, 24.0, 30.0], shares)
      >>> fit.result.slopes.round(2).tolist()
      [-0.88, -0.73, -0.72]

    Source: SDSL, arXiv 2603.11053, eq. 5, for acceptance as a function of perplexity; Zellner, J.
    American Statistical Association 57 (1962) 348, for regressions whose errors go together.
    """
    x = host_numbers("draft_perplexity", draft_perplexity)
    require("draft_perplexity", x, AT_LEAST_ONE)
    measured = _share_matrix(shares, len(x))
    conditional = measured / np.concatenate([np.ones((len(x), 1)), measured[:, :-1]], 1)
    logits = np.log(conditional) - np.log1p(-conditional)  # [n, K]
    matrix = np.stack([np.log(x), np.ones(len(x))], 1)
    fits = [_fit_one(matrix, column) for column in logits.T]
    coefficients = np.stack([fit.estimates for fit in fits], 1)  # [2, K]
    freedom = fits[0].degrees_of_freedom
    residuals = logits - matrix @ coefficients
    scatter = residuals.T @ residuals / freedom
    predicted = _shares(matrix @ coefficients)
    tokens = _tokens(measured)
    errors = np.abs(_tokens(predicted) / tokens - 1)
    held_out = _hold_out(matrix, logits, group_labels(groups, len(x)))
    errors_out = np.abs(held_out / tokens - 1)[np.isfinite(held_out)]
    return PositionFit(
        result=PositionAcceptanceLaw(
            slopes=coefficients[0],
            intercepts=coefficients[1],
            fitted=PerplexityRange(*range_of(x)),
        ),
        standard_errors=np.stack([fit.standard_errors for fit in fits]),
        intervals=np.stack([fit.intervals for fit in fits]),
        covariance=np.kron(np.linalg.inv(matrix.T @ matrix), scatter),
        degrees_of_freedom=freedom,
        residual_error=np.array([fit.residual_error for fit in fits]),
        residual_covariance=scatter,
        r_squared=np.array([fit.r_squared for fit in fits]),
        predicted=predicted,
        mean_relative_error=float(errors.mean()),
        max_relative_error=float(errors.max()),
        held_out_error=float(errors_out.mean()) if len(errors_out) else math.nan,
        held_out_max_error=float(errors_out.max()) if len(errors_out) else math.nan,
        num_held_out=len(errors_out),
        ranges={"draft_perplexity": range_of(x)},
    )


def tokens_interval(
    fit: PositionFit, draft_perplexity: float, gamma: float | None = None
) -> Interval:
    """Returns the tokens per round of a draft of a given perplexity, with their 95 % intervals.

    By the delta method in the logit of the mean accepted share, so that no end leaves what is
    possible, from 1 to gamma + 1. At gamma = 1 exact for errors that are normal in logits.

        u = logit((E - 1) / gamma),   u +- t sqrt(g C g^T),   of one draft sqrt(g C g^T + h S h^T)

    g is the gradient of u in the law's numbers and C their covariance; h the gradient in the
    logits of the positions and S the covariance of the residuals; t Student's quantile with the
    fit's `degrees_of_freedom`: few drafts leave wide intervals.

    Args:
      fit: of `fit_position_acceptance`.
      draft_perplexity: at least 1.
      gamma: draft tokens per round, positive; by default the fit's K.

    Returns:
      The tokens and their intervals: `low` and `high` where the mean over many such drafts lies,
      `pair_low` and `pair_high` where one draft does. Errors of counting rounds are among its
      scatter as far as the fitted drafts had them.

    Raises:
      ValueError: an argument is not one number, outside its range or NaN.

    Example:
      >>> from jaxsd import costmodel
      >>> shares = [[0.8, 0.67, 0.57], [0.72, 0.56, 0.45], [0.65, 0.47, 0.36], [0.6, 0.42, 0.3]]
      >>> fit = costmodel.fit_position_acceptance([10.0, 16.0, 24.0, 30.0], shares)
      >>> tokens = costmodel.tokens_interval(fit, 20.0)
      >>> print(f"{tokens.value:.2f}, of one draft {tokens.pair_low:.2f} to {tokens.pair_high:.2f}")
      2.60, of one draft 2.53 to 2.66

    Source: the delta method; Student's t because one combination of positions is one regression.
    """
    drafted = len(fit.residual_error) if gamma is None else gamma
    for name, value in (("draft_perplexity", draft_perplexity), ("gamma", drafted)):
        if np.ndim(value):
            raise ValueError(f"{name} of shape {np.shape(value)} must be one number")
    require("draft_perplexity", draft_perplexity, AT_LEAST_ONE)
    require("gamma", drafted, POSITIVE)
    length, row = float(drafted), np.array([math.log(draft_perplexity), 1.0])
    logits = row @ np.stack([fit.result.slopes, fit.result.intercepts])
    with float64_on_host():
        value, slopes = jax.device_get(_ACCEPTED(logits, length))
    of_slopes = np.kron(row, slopes)
    of_law = float(of_slopes @ fit.covariance @ of_slopes)
    of_pair = of_law + float(slopes @ fit.residual_covariance @ slopes)
    quantile = t_quantile(0.5 + CONFIDENCE / 2, fit.degrees_of_freedom)

    def tokens(reach: float) -> float:
        return float(1 + length * _logistic(value + quantile * reach))

    law, pair = math.sqrt(max(of_law, 0.0)), math.sqrt(max(of_pair, 0.0))
    return Interval(tokens(0.0), tokens(-law), tokens(law), tokens(-pair), tokens(pair))


def _share_matrix(shares: Any, num_rows: int) -> np.ndarray:
    """Measured shares as `[n, K]` float64; or says which of them no law can meet."""
    if is_traced(shares):
        raise ValueError("shares must be numbers: fits look at them, so not inside jit or grad")
    try:
        measured = np.asarray(shares, np.float64)
    except (TypeError, ValueError):
        raise ValueError("shares must be numbers, as many in every row") from None
    if measured.ndim != 2 or len(measured) != num_rows or not measured.shape[1]:
        raise ValueError(
            f"shares of shape {measured.shape} must have shape [{num_rows}, K], a row per draft"
        )
    before = np.concatenate([np.ones((num_rows, 1)), measured[:, :-1]], 1)
    wrong = np.argwhere(~((measured > 0) & (measured < before)))
    if len(wrong):
        row, place = map(int, wrong[0])
        above = f"shares[{row}, {place - 1}]={before[row, place]:.9g}" if place else "1"
        raise ValueError(
            f"shares[{row}, {place}]={measured[row, place]:.9g} must be above 0 and below {above}: "
            "a conditional acceptance of 0 or 1 has no logit; measure more rounds, or leave out "
            "the position"
        )
    return measured


def _fit_one(matrix: np.ndarray, logits: np.ndarray) -> Fit:
    """The line of one position."""
    model = Model(
        evaluate=lambda unknowns: (matrix @ unknowns, matrix),
        measured=logits,
        starts=np.zeros((1, 2)),
        lower=np.full(2, -np.inf),
        upper=np.full(2, np.inf),
        report=lambda unknowns: (unknowns, np.eye(2)),
        names=("slope", "intercept"),
        is_relative=np.zeros(2, bool),
        advice=_ADVICE,
        threshold=_THRESHOLD,
    )
    # What is held out is tokens per round, of all positions, and not here: all rows are one group.
    return solve(model, lambda unknowns: unknowns, {}, [0] * len(logits))


def _hold_out(matrix: np.ndarray, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[n] Tokens per round of drafts by a fit without their group; NaN where undetermined."""
    out = np.full(len(labels), np.nan)
    for label in range(labels.max() + 1):
        mine = labels == label
        rest = matrix[~mine]
        if len(rest) < 2 or np.linalg.svd(rest / np.linalg.norm(rest, axis=0))[1][-1] < 1e-8:
            continue
        coefficients = np.linalg.lstsq(rest, logits[~mine])[0]
        out[mine] = _tokens(_shares(matrix[mine] @ coefficients))
    return out


def _logistic(logits: Any) -> Any:
    """The probability; no logit overflows."""
    return np.exp(-np.logaddexp(0.0, -logits))


def _shares(logits: np.ndarray) -> np.ndarray:
    return np.cumprod(_logistic(logits), -1)


def _tokens(shares: np.ndarray) -> np.ndarray:
    """Tokens per round at a gamma as large as the positions are many."""
    return 1 + shares.sum(-1)


def _accepted(logits: Array, gamma: Array) -> Array:
    """The logit of the mean share of drafted tokens that a round accepts."""
    accepted = expected_tokens_by_position(cumulative_shares(logits), gamma) - 1
    return jnp.log(accepted) - jnp.log(gamma - accepted)


_ACCEPTED = jax.jit(jax.value_and_grad(_accepted))
