"""What does speculation gain, and how many tokens should be drafted?

Everything here follows from three numbers: alpha, the probability that one drafted token is
accepted (independently of the others), gamma, the number of tokens drafted per round, and the
cost ratio, the time of a draft step over the time of a target pass. All functions broadcast,
work under jit, grad and vmap, and compute in float32 or, where the arguments are, in float64.
"""

from typing import NamedTuple

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
from ._numerics import expm1_over, geometric_sum, log_excess_inverse, safe_log


class NumTokensPrediction(NamedTuple):
    """Predicted effect of drafting K = 0, 1, ..., K_max tokens per round on one sequence."""

    num_tokens: Array  # [] int32, the fastest K; 0 = do not speculate
    speedup: Array  # [K_max + 1] over plain decoding; 1 at K = 0
    tokens_per_second: Array  # [K_max + 1]
    mean_acceptance_length: Array  # [K_max + 1] tokens per target pass; 1 at K = 0


def expected_tokens(alpha: ArrayLike, gamma: ArrayLike) -> Array:
    """Returns the mean number of tokens that one round of speculation commits.

    Counts the accepted draft tokens and the one that the target adds itself. Exactly 1 at
    `gamma=0` and exactly `gamma + 1` at `alpha=1`, with accurate gradients at both ends of alpha.
    A gamma that is not an integer interpolates smoothly.

        E = 1 + alpha + ... + alpha^gamma = (1 - alpha^(gamma + 1)) / (1 - alpha)

    Args:
      alpha: probability that a drafted token is accepted, in [0, 1].
      gamma: number of tokens drafted per round, at least 0.

    Returns:
      Tokens per round, in [1, gamma + 1].

    Raises:
      ValueError: an argument is outside its range or NaN.

    Example:
      >>> from jaxsd import costmodel
      >>> round(float(costmodel.expected_tokens(0.8, 4)), 4)
      3.3616

    Source: Leviathan et al., arXiv 2211.17192, eq. 1.
    """
    require("alpha", alpha, PROBABILITY)
    require("gamma", gamma, NON_NEGATIVE)
    alpha_, gamma_ = as_floats(alpha, gamma)
    return 1 + alpha_ * geometric_sum(safe_log(alpha_), gamma_)


def speedup(
    alpha: ArrayLike,
    gamma: ArrayLike,
    cost_ratio: ArrayLike,
    *,
    verify_ratio: ArrayLike = 1.0,
    overhead_ratio: ArrayLike = 0.0,
) -> Array:
    """Returns how much faster speculation is than plain decoding.

    Below 1 it is slower. Times are counted in target passes over one token per sequence.

        S = E(alpha, gamma) / (gamma * cost_ratio + verify_ratio + overhead_ratio)

    Args:
      alpha: probability that a drafted token is accepted, in [0, 1].
      gamma: number of tokens drafted per round, at least 0.
      cost_ratio: time of one draft step / time of one target pass, positive.
      verify_ratio: time of the target's pass over gamma + 1 tokens / over one token, positive;
        1 as long as reading the weights takes longer than the arithmetic, as it does for few
        sequences.
      overhead_ratio: other time per round / time of one target pass, at least 0.

    Returns:
      Tokens per second with speculation / without.

    Raises:
      ValueError: an argument is outside its range or NaN.

    Example:
      >>> from jaxsd import costmodel
      >>> round(float(costmodel.speedup(0.8, 5, 0.05)), 4)
      2.9514
      >>> round(float(costmodel.speedup(0.8, 5, 0.05, verify_ratio=1.2)), 4)
      2.5443

    Source: Leviathan et al., arXiv 2211.17192, theorem 3.8; SDSL, arXiv 2603.11053, eq. 1.
    """
    require("cost_ratio", cost_ratio, POSITIVE)
    require("verify_ratio", verify_ratio, POSITIVE)
    require("overhead_ratio", overhead_ratio, NON_NEGATIVE)
    tokens, gamma_, draft, verify, overhead = as_floats(
        expected_tokens(alpha, gamma), gamma, cost_ratio, verify_ratio, overhead_ratio
    )
    return tokens / (gamma_ * draft + verify + overhead)


def optimal_gamma(alpha: ArrayLike, cost_ratio: ArrayLike) -> Array:
    """Returns the number of draft tokens, a real number, that makes the speed-up largest.

    0 means: do not speculate. That is the answer exactly where no positive gamma gains, so where
    `cost_ratio >= -alpha ln(alpha) / (1 - alpha)`. At `alpha=1` with `cost_ratio < 1` every
    further token pays and the answer is infinite. Differentiable to any order; the gradient is
    zero where the answer is 0 or infinite.

        u - ln u = 1 - (1 / cost_ratio - 1) ln(alpha),  u > 1
        gamma = ln u / (-ln alpha) - 1

    Here u is `-W(z)` on the -1 branch of Lambert's function; the form above needs no z, which
    underflows float32 for cheap drafts. A fractional gamma is reached on average by varying the
    number of draft tokens between rounds; for a fixed one see `optimal_integer_gamma`.

    Args:
      alpha: probability that a drafted token is accepted, in [0, 1].
      cost_ratio: time of one draft step / time of one target pass, positive.

    Returns:
      Draft tokens per round, at least 0.

    Raises:
      ValueError: an argument is outside its range or NaN.

    Example:
      >>> from jaxsd import costmodel
      >>> round(float(costmodel.optimal_gamma(0.8, 0.02)), 4)
      11.0197
      >>> float(costmodel.optimal_gamma(0.3, 0.6))
      0.0

    Source: SDSL, arXiv 2603.11053, eq. 13.
    """
    require("alpha", alpha, PROBABILITY)
    require("cost_ratio", cost_ratio, POSITIVE)
    optimum = _optimum(*as_floats(alpha, cost_ratio))
    bounded = optimum.log_alpha < 0
    # alpha^(gamma + 1) = 1 / u. The textbook form, (u - 1) / (-ln alpha) - 1 / cost_ratio, is the
    # same number as a difference of two large ones.
    log_u = jnp.log1p(optimum.u_minus_one)
    gamma = log_u / -jnp.where(bounded, optimum.log_alpha, -1) - 1
    gamma = jnp.where(bounded, jnp.maximum(gamma, 0), jnp.inf)
    return jnp.where(optimum.pays, gamma, 0)


def optimal_speedup(alpha: ArrayLike, cost_ratio: ArrayLike) -> Array:
    """Returns the largest speed-up over all gamma, real and at least 0.

    Never below 1, for plain decoding is among the choices, and never above `1 / cost_ratio`.
    Equals `speedup(alpha, optimal_gamma(alpha, cost_ratio), cost_ratio)` and stays finite where
    that gamma does not: at `alpha=1` it is `1 / cost_ratio`.

        S = -ln(alpha) / (cost_ratio * u * (1 - alpha)),  u as in `optimal_gamma`

    Args:
      alpha: probability that a drafted token is accepted, in [0, 1].
      cost_ratio: time of one draft step / time of one target pass, positive.

    Returns:
      Tokens per second with speculation / without, at least 1.

    Raises:
      ValueError: an argument is outside its range or NaN.

    Example:
      >>> from jaxsd import costmodel
      >>> round(float(costmodel.optimal_speedup(0.8, 0.02)), 4)
      3.8167

    Source: SDSL, arXiv 2603.11053, eq. 4.
    """
    require("alpha", alpha, PROBABILITY)
    require("cost_ratio", cost_ratio, POSITIVE)
    alpha_, cost = as_floats(alpha, cost_ratio)
    optimum = _optimum(alpha_, cost)
    alpha_below_one = expm1_over(optimum.log_alpha)  # (1 - alpha) / -ln(alpha)
    best = 1 / (cost * (1 + optimum.u_minus_one) * alpha_below_one)
    return jnp.where(optimum.pays, jnp.maximum(best, 1), 1)


def optimal_integer_gamma(alpha: ArrayLike, cost_ratio: ArrayLike, max_gamma: int = 64) -> Array:
    """Returns the whole number of draft tokens that makes the speed-up largest.

    The smallest one where several are equally good, so 0, do not speculate, wherever nothing is
    gained. Not differentiable.

        argmax over gamma in {0, ..., max_gamma} of speedup(alpha, gamma, cost_ratio)

    Args:
      alpha: probability that a drafted token is accepted, in [0, 1].
      cost_ratio: time of one draft step / time of one target pass, positive.
      max_gamma: the largest gamma considered, a Python integer (it is a shape).

    Returns:
      Draft tokens per round, int32, in 0..max_gamma.

    Raises:
      ValueError: an argument is outside its range or NaN.

    Example:
      >>> from jaxsd import costmodel
      >>> [int(costmodel.optimal_integer_gamma(alpha, 0.1)) for alpha in (0.05, 0.5, 0.9)]
      [0, 2, 10]

    Source: Leviathan et al., arXiv 2211.17192, section 3.5.
    """
    require("alpha", alpha, PROBABILITY)
    require("cost_ratio", cost_ratio, POSITIVE)
    require("max_gamma", max_gamma, NON_NEGATIVE)
    alpha_, cost = as_floats(alpha, cost_ratio)
    alpha_, cost, gamma = as_floats(alpha_[..., None], cost[..., None], np.arange(max_gamma))
    # The speed-up is concave over affine in gamma: it rises, then falls. So the optimum is the
    # number of steps up, and whether a step goes up is a comparison of the tokens it adds with the
    # time it adds, which float32 decides where two nearly equal speed-ups would not.
    added_tokens = alpha_ ** (gamma + 1)
    goes_up = added_tokens * (1 + gamma * cost) > cost * expected_tokens(alpha_, gamma)
    return goes_up.sum(-1, dtype=jnp.int32)


def throughput(
    alpha: ArrayLike, gamma: ArrayLike, draft_parameters: ArrayLike, target_parameters: ArrayLike
) -> Array:
    """Returns tokens per FLOP in the sense of SDSL, with the cost ratio N / M.

    The paper charges two FLOPs for every parameter that a pass reads, and a verify pass as one
    pass however many tokens it scores. That is the price of memory traffic for a single sequence
    and not a count of arithmetic: twice this number is tokens per parameter read.

        T = E(alpha, gamma) / (2 (M + gamma N))

    Args:
      alpha: probability that a drafted token is accepted, in [0, 1].
      gamma: number of tokens drafted per round, at least 0.
      draft_parameters: N, positive.
      target_parameters: M, positive.

    Returns:
      Tokens per two parameters read; `1 / (2 M)` for plain decoding.

    Raises:
      ValueError: an argument is outside its range or NaN.

    Example:
      >>> from jaxsd import costmodel
      >>> print(f"{costmodel.throughput(0.65, 8, 0.3e9, 70e9):.4g}")
      1.932e-11

    Source: SDSL, arXiv 2603.11053, eq. 3.
    """
    require("draft_parameters", draft_parameters, POSITIVE)
    require("target_parameters", target_parameters, POSITIVE)
    alpha_, gamma_, draft, target = as_floats(alpha, gamma, draft_parameters, target_parameters)
    return speedup(alpha_, gamma_, draft / target) / (2 * target)


def optimal_throughput(
    alpha: ArrayLike, draft_parameters: ArrayLike, target_parameters: ArrayLike
) -> Array:
    """Returns the largest `throughput` over all gamma, real and at least 0.

        T = -ln(alpha) / (2 N u (1 - alpha)),  u as in `optimal_gamma` with cost ratio N / M

    Args:
      alpha: probability that a drafted token is accepted, in [0, 1].
      draft_parameters: N, positive.
      target_parameters: M, positive.

    Returns:
      Tokens per two parameters read, the unit of `throughput`; at least `1 / (2 M)`.

    Raises:
      ValueError: an argument is outside its range or NaN.

    Example:
      >>> from jaxsd import costmodel
      >>> print(f"{costmodel.optimal_throughput(0.65, 0.3e9, 70e9):.4g}")
      1.94e-11

    Source: SDSL, arXiv 2603.11053, eq. 4.
    """
    require("draft_parameters", draft_parameters, POSITIVE)
    require("target_parameters", target_parameters, POSITIVE)
    alpha_, draft, target = as_floats(alpha, draft_parameters, target_parameters)
    return optimal_speedup(alpha_, draft / target) / (2 * target)


def alpha_to_acceptance_rate(alpha: ArrayLike, gamma: ArrayLike) -> Array:
    """Returns the share of drafted tokens that are accepted.

    Logs print this as acceptance rate. It is lower than alpha for `gamma > 1`, since nothing after
    the first rejection counts. Exactly 0 and 1 at `alpha` 0 and 1.

        rate = (E - 1) / gamma = alpha (1 - alpha^gamma) / (gamma (1 - alpha))

    Args:
      alpha: probability that a drafted token is accepted, in [0, 1].
      gamma: number of tokens drafted per round, positive.

    Returns:
      Accepted tokens / drafted tokens, in [0, 1].

    Raises:
      ValueError: an argument is outside its range or NaN.

    Example:
      >>> from jaxsd import costmodel
      >>> round(float(costmodel.alpha_to_acceptance_rate(0.8, 10)), 4)
      0.3571
    """
    require("alpha", alpha, PROBABILITY)
    require("gamma", gamma, POSITIVE)
    return _rate(*as_floats(alpha, gamma))


def acceptance_rate_to_alpha(rate: ArrayLike, gamma: ArrayLike) -> Array:
    """Returns the alpha that yields a measured acceptance rate: the one to compare and to model.

    The inverse of `alpha_to_acceptance_rate`, to a few units of the last digit, and differentiable
    in both arguments. A rate that falls with gamma is often one and the same alpha.

        solve alpha (1 - alpha^gamma) / (gamma (1 - alpha)) = rate

    Args:
      rate: accepted tokens / drafted tokens, in [0, 1].
      gamma: number of tokens drafted per round, positive.

    Returns:
      Probability that a drafted token is accepted, in [0, 1]; exactly 0 and 1 at `rate` 0 and 1.

    Raises:
      ValueError: an argument is outside its range or NaN.

    Example:
      >>> import numpy as np
      >>> from jaxsd import costmodel
      >>> rates = costmodel.acceptance_rate_to_alpha(np.array([0.8, 0.59, 0.357]), [1, 4, 10])
      >>> [round(float(rate), 2) for rate in rates]
      [0.8, 0.8, 0.8]
    """
    require("rate", rate, PROBABILITY)
    require("gamma", gamma, POSITIVE)
    return _rate_inverse(*as_floats(rate, gamma))


def acceptance_rate_to_length(rate: ArrayLike, gamma: ArrayLike) -> Array:
    """Returns the mean acceptance length, tokens per target pass with the target's own token.

    Holds for any pattern of acceptance, independent or not.

        length = 1 + gamma * rate

    Args:
      rate: accepted tokens / drafted tokens, in [0, 1].
      gamma: number of tokens drafted per round, at least 0.

    Returns:
      Tokens per round, in [1, gamma + 1].

    Raises:
      ValueError: an argument is outside its range or NaN.

    Example:
      >>> from jaxsd import costmodel
      >>> float(costmodel.acceptance_rate_to_length(0.5, 4))
      3.0
    """
    require("rate", rate, PROBABILITY)
    require("gamma", gamma, NON_NEGATIVE)
    rate_, gamma_ = as_floats(rate, gamma)
    return 1 + gamma_ * rate_


def acceptance_length_to_rate(length: ArrayLike, gamma: ArrayLike) -> Array:
    """Returns the share of drafted tokens that are accepted, from a mean acceptance length.

    Some engines count the target's own token in the length and some do not; here it counts, so a
    length is at least 1.

        rate = (length - 1) / gamma

    Args:
      length: tokens per round, in [1, gamma + 1].
      gamma: number of tokens drafted per round, positive.

    Returns:
      Accepted tokens / drafted tokens, in [0, 1].

    Raises:
      ValueError: an argument is outside its range or NaN.

    Example:
      >>> from jaxsd import costmodel
      >>> float(costmodel.acceptance_length_to_rate(3.0, 4))
      0.5
    """
    require("gamma", gamma, POSITIVE)
    require("length", length, AT_LEAST_ONE)
    if not is_traced(gamma):
        most = np.asarray(gamma) + 1
        require("length", length, (lambda x: x <= most, "at most gamma + 1"))
    length_, gamma_ = as_floats(length, gamma)
    return (length_ - 1) / gamma_


def acceptance_length_to_alpha(length: ArrayLike, gamma: ArrayLike) -> Array:
    """Returns the alpha that yields a mean acceptance length; the inverse of `expected_tokens`.

        solve (1 - alpha^(gamma + 1)) / (1 - alpha) = length

    Args:
      length: tokens per round with the target's own token, in [1, gamma + 1].
      gamma: number of tokens drafted per round, positive.

    Returns:
      Probability that a drafted token is accepted, in [0, 1].

    Raises:
      ValueError: an argument is outside its range or NaN.

    Example:
      >>> from jaxsd import costmodel
      >>> round(float(costmodel.acceptance_length_to_alpha(3.3616, 4)), 4)
      0.8
    """
    rate = acceptance_length_to_rate(length, gamma)
    return _rate_inverse(*as_floats(rate, gamma))


def best_num_tokens(
    alpha: ArrayLike,
    target_seconds: ArrayLike,
    draft_seconds: ArrayLike,
    verify_seconds: ArrayLike,
) -> NumTokensPrediction:
    """Returns the predicted speed-up for every number of draft tokens, from measured times.

    Needs no assumption on how times grow: measure each pass at the batch size of interest. The
    prediction is for one sequence of that batch. K = 0 is plain decoding, predicted at exactly 1,
    and is the answer wherever no K is faster.

        tokens_per_second[K] = E(alpha, K) / (draft_seconds[K] + verify_seconds[K])
        tokens_per_second[0] = 1 / target_seconds

    Args:
      alpha: probability that a drafted token is accepted, in [0, 1]; a scalar (`jax.vmap` for
        more). From a measured rate: `acceptance_rate_to_alpha`.
      target_seconds: time of one plain decoding step, positive.
      draft_seconds: time of one draft step, or `[K_max + 1]` times of drafting K = 0..K_max tokens
        (the first is not used); at least 0.
      verify_seconds: `[K_max + 1]` times of the target's pass over K + 1 tokens, K = 0..K_max (the
        first is not used), positive.

    Returns:
      The fastest K and, for every K, speed-up, tokens per second and mean acceptance length.

    Raises:
      ValueError: an argument is outside its range or NaN, or has the wrong shape.

    Example:
      >>> import numpy as np
      >>> from jaxsd import costmodel
      >>> verify_seconds = np.array([0.020, 0.021, 0.022, 0.025, 0.030])
      >>> prediction = costmodel.best_num_tokens(0.7, 0.020, 0.002, verify_seconds)
      >>> int(prediction.num_tokens), [round(float(s), 2) for s in prediction.speedup]
      (2, [1.0, 1.48, 1.68, 1.63, 1.46])
    """
    verify_shape, draft_shape = np.shape(verify_seconds), np.shape(draft_seconds)
    if len(verify_shape) != 1 or verify_shape[0] == 0:
        raise ValueError(f"verify_seconds of shape {verify_shape} must have shape [K_max + 1]")
    if draft_shape not in ((), verify_shape):
        raise ValueError(
            f"draft_seconds of shape {draft_shape} must be a scalar or have the shape of "
            f"verify_seconds, {verify_shape}"
        )
    if np.shape(alpha) or np.shape(target_seconds):
        raise ValueError(
            f"alpha of shape {np.shape(alpha)} and target_seconds of shape "
            f"{np.shape(target_seconds)} must be scalars"
        )
    require("target_seconds", target_seconds, POSITIVE)
    require("draft_seconds", draft_seconds, NON_NEGATIVE)
    require("verify_seconds", verify_seconds, POSITIVE)
    num_tokens = np.arange(verify_shape[0])
    tokens = expected_tokens(alpha, num_tokens)
    tokens, count, target, draft, verify = as_floats(
        tokens, num_tokens, target_seconds, draft_seconds, verify_seconds
    )
    drafting = draft if draft_shape else count * draft
    round_seconds = jnp.where(count > 0, drafting + verify, target)
    gain = tokens * target / round_seconds
    return NumTokensPrediction(
        num_tokens=jnp.argmax(gain).astype(jnp.int32),  # the first, so the smallest, of equals
        speedup=gain,
        tokens_per_second=tokens / round_seconds,
        mean_acceptance_length=tokens,
    )


class _Optimum(NamedTuple):
    pays: Array  # whether any gamma > 0 gains
    u_minus_one: Array  # u of `optimal_gamma`, less 1; 0 at alpha = 1 and where nothing pays
    log_alpha: Array


@jax.jit
def _optimum(alpha: Array, cost_ratio: Array) -> _Optimum:
    """Solves the first-order condition of the speed-up in gamma."""
    log_alpha = safe_log(alpha)
    # The slope of the speed-up at gamma = 0 is positive: -alpha ln(alpha) > c (1 - alpha).
    pays = cost_ratio * expm1_over(log_alpha) < alpha
    solvable = pays & (log_alpha < 0)
    s_minus_one = -log_alpha * (1 - cost_ratio) / cost_ratio
    u_minus_one = log_excess_inverse(jnp.where(solvable, s_minus_one, 1))
    return _Optimum(pays, jnp.where(solvable, u_minus_one, 0), log_alpha)


def _log_rate(log_alpha: Array, gamma: Array) -> Array:
    """Logarithm of the acceptance rate, as a function of the logarithm of alpha."""
    return log_alpha + jnp.log(geometric_sum(log_alpha, gamma) / gamma)


@jax.jit
def _rate(alpha: Array, gamma: Array) -> Array:
    """The acceptance rate, smooth and exact at both ends of alpha."""
    return alpha * geometric_sum(safe_log(alpha), gamma) / gamma


@jax.jit  # outside a jit of the caller's, a loop would be compiled anew at every call
def _rate_inverse(rate: Array, gamma: Array) -> Array:
    """Solves `_rate(alpha, gamma) = rate` for alpha."""
    return _rate_root(rate, gamma)


@jax.custom_jvp
def _rate_root(rate: Array, gamma: Array) -> Array:
    """The same, with its derivative from the equation and not from the steps."""
    inside = (rate > 0) & (rate < 1)
    log_rate = jnp.log(jnp.where(inside, rate, 0.5))
    # ln(rate) is convex in ln(alpha) for gamma >= 1, with a slope from 1 to gamma, and nearly
    # straight below. From an upper bound, alpha <= gamma * rate, Newton cannot overshoot.
    start = jnp.minimum(log_rate + jnp.log(jnp.maximum(gamma, 1)), 0)

    def newton(_: int, log_alpha: Array) -> Array:
        value, slope = jax.jvp(
            lambda x: _log_rate(x, gamma), (log_alpha,), (jnp.ones_like(log_alpha),)
        )
        return jnp.minimum(log_alpha - (value - log_rate) / slope, 0)

    # 4 steps are enough for gamma = 10, 12 for 10 million.
    log_alpha = jax.lax.fori_loop(0, 12, newton, start)
    return jnp.where(inside, jnp.exp(log_alpha), rate)


@_rate_root.defjvp
def _rate_root_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (_, gamma), (rate_dot, gamma_dot) = primals, tangents
    alpha = _rate_root(*primals)
    _, slope = jax.jvp(lambda a: _rate(a, gamma), (alpha,), (jnp.ones_like(alpha),))
    _, from_gamma = jax.jvp(lambda g: _rate(alpha, g), (gamma,), (gamma_dot,))
    return alpha, (rate_dot - from_gamma) / slope
