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
    NON_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    as_floats,
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


def expected_tokens_by_position(acceptance_by_position: ArrayLike, gamma: ArrayLike) -> Array:
    """Returns the mean number of tokens per round from acceptance measured position by position.

    Holds for any pattern of acceptance, where `expected_tokens` needs one alpha for all positions;
    with `acceptance_by_position[i] = alpha^(i + 1)` the two agree. A gamma between whole numbers
    interpolates linearly, as varying the length between rounds would. Beyond the last measured
    position acceptance goes on to fall as it did on average up to there.

        E = 1 + sum over i < gamma of acceptance_by_position[i]

    Args:
      acceptance_by_position: `[..., K]` share of rounds in which at least 1, 2, ..., K drafted
        tokens were accepted, in [0, 1], falling.
      gamma: `[...]` number of tokens drafted per round, at least 0.

    Returns:
      `[...]` tokens per round, in [1, gamma + 1].

    Raises:
      ValueError: an argument is outside its range or NaN, or has no positions.

    Example:
      >>> from jaxsd import costmodel
      >>> float(costmodel.expected_tokens_by_position([0.75, 0.5, 0.5], 2))
      2.25
    """
    shape = np.shape(acceptance_by_position)
    if not shape or not shape[-1]:
        raise ValueError(f"acceptance_by_position of shape {shape} must have shape [..., K]")
    require("acceptance_by_position", acceptance_by_position, PROBABILITY)
    require("gamma", gamma, NON_NEGATIVE)
    gammas = jnp.asarray(gamma)[..., None]
    shares, gammas, positions = as_floats(acceptance_by_position, gammas, np.arange(shape[-1]))
    measured = (jnp.clip(gammas - positions, 0, 1) * shares).sum(-1)
    last, gamma_ = shares[..., -1], gammas[..., 0]
    # acceptance[K - 1 + n] = last * decay^n, n = 1, 2, ...
    log_decay = jnp.where(last > 0, safe_log(last) / shape[-1], safe_log(jnp.zeros_like(last)))
    more = jnp.maximum(gamma_ - shape[-1], 0)
    beyond = jnp.where(more > 0, last * jnp.exp(log_decay) * geometric_sum(log_decay, more), 0)
    return 1 + measured + beyond


def simulate_tokens(key: Array, acceptance_by_position: ArrayLike, num_rounds: int) -> Array:
    """Returns the number of tokens that each of many simulated rounds commits.

    The check of every formula here that shares no step with them: tokens are accepted or not, one
    after the other, up to the first that is not.

    Args:
      key: a JAX random key.
      acceptance_by_position: `[gamma]` share of rounds in which at least 1, 2, ..., gamma drafted
        tokens are accepted, in [0, 1], falling; for one alpha its powers from the first on.
      num_rounds: how many, a Python integer (it is a shape).

    Returns:
      `[num_rounds]` int32, 1 to gamma + 1; the mean is `expected_tokens` up to its sampling error.

    Raises:
      ValueError: a share is outside its range or NaN, or the shape is not `[gamma]`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxsd import costmodel
      >>> alpha = 0.8 ** jnp.arange(1.0, 5.0)
      >>> tokens = costmodel.simulate_tokens(jax.random.key(0), alpha, 100_000)
      >>> bool(abs(tokens.mean() - costmodel.expected_tokens(0.8, 4)) < 0.03)  # 6 standard errors
      True
    """
    if np.ndim(acceptance_by_position) != 1:
        raise ValueError(
            f"acceptance_by_position of shape {np.shape(acceptance_by_position)} must have shape "
            "[gamma]"
        )
    require("acceptance_by_position", acceptance_by_position, PROBABILITY)
    (shares,) = as_floats(acceptance_by_position)
    before = jnp.concatenate([jnp.ones(1, shares.dtype), shares[:-1]])
    # The chance of a position given the one before it.
    conditional = jnp.where(before > 0, shares / jnp.where(before > 0, before, 1), 0)
    draws = jax.random.uniform(key, (num_rounds, shares.shape[0]), shares.dtype)
    accepted = jnp.cumprod((draws < conditional[None, :]).astype(jnp.int32), axis=1)
    return 1 + accepted.sum(1, dtype=jnp.int32)


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


def optimal_gamma(
    alpha: ArrayLike,
    cost_ratio: ArrayLike,
    *,
    verify_slope: ArrayLike = 0.0,
    overhead_ratio: ArrayLike = 0.0,
) -> Array:
    """Returns the number of draft tokens, a real number, that makes the speed-up largest.

    0 means: do not speculate. That is the answer exactly where no positive gamma gains; without
    overhead, where `cost_ratio + verify_slope >= -alpha ln(alpha) / (1 - alpha)`. At `alpha=1`
    with that sum below 1 every further token pays and the answer is infinite. Differentiable to any
    order; the gradient is zero where the answer is 0 or infinite.

        u - ln u = 1 - (1 / c - 1) ln(alpha),  u > 1
        gamma = ln u / (-ln alpha) - 1
        c = (cost_ratio + verify_slope) / (1 + overhead_ratio)

    Here u is `-W(z)` on the -1 branch of Lambert's function; the form above needs no z, which
    underflows float32 for cheap drafts. A fractional gamma is reached on average by varying the
    number of draft tokens between rounds; for a fixed one see `optimal_integer_gamma`.

    Args:
      alpha: probability that a drafted token is accepted, in [0, 1].
      cost_ratio: time of one draft step / time of one target pass, positive.
      verify_slope: time that one more token adds to the target's pass / time of the pass over one
        token, at least 0; 0 while reading the weights takes longer than the arithmetic.
      overhead_ratio: other time per round / time of one target pass, at least 0.

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
    optimum = _linear_optimum(alpha, cost_ratio, verify_slope, overhead_ratio)
    bounded = optimum.log_alpha < 0
    # alpha^(gamma + 1) = 1 / u. The textbook form, (u - 1) / (-ln alpha) - 1 / cost_ratio, is the
    # same number as a difference of two large ones.
    log_u = jnp.log1p(optimum.u_minus_one)
    gamma = log_u / -jnp.where(bounded, optimum.log_alpha, -1) - 1
    gamma = jnp.where(bounded, jnp.maximum(gamma, 0), jnp.inf)
    return jnp.where(optimum.pays, gamma, 0)


def optimal_speedup(
    alpha: ArrayLike,
    cost_ratio: ArrayLike,
    *,
    verify_slope: ArrayLike = 0.0,
    overhead_ratio: ArrayLike = 0.0,
) -> Array:
    """Returns the largest speed-up over all gamma, real and at least 0.

    Never below 1, for plain decoding is among the choices, and never above
    `1 / (cost_ratio + verify_slope)`. Equals `speedup` at `optimal_gamma` and stays finite where
    that gamma does not: at `alpha=1` it is that upper bound.

        S = -ln(alpha) / ((cost_ratio + verify_slope) u (1 - alpha)),  u as in `optimal_gamma`

    Args:
      alpha: probability that a drafted token is accepted, in [0, 1].
      cost_ratio: time of one draft step / time of one target pass, positive.
      verify_slope: time that one more token adds to the target's pass / time of the pass over one
        token, at least 0; 0 while reading the weights takes longer than the arithmetic.
      overhead_ratio: other time per round / time of one target pass, at least 0.

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
    optimum = _linear_optimum(alpha, cost_ratio, verify_slope, overhead_ratio)
    return jnp.where(optimum.pays, jnp.maximum(optimum.speedup, 1), 1)


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


def sdsl_throughput(
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
      >>> print(f"{costmodel.sdsl_throughput(0.65, 8, 0.3e9, 70e9):.4g}")
      1.932e-11

    Source: SDSL, arXiv 2603.11053, eq. 3.
    """
    require("draft_parameters", draft_parameters, POSITIVE)
    require("target_parameters", target_parameters, POSITIVE)
    alpha_, gamma_, draft, target = as_floats(alpha, gamma, draft_parameters, target_parameters)
    return speedup(alpha_, gamma_, draft / target) / (2 * target)


def optimal_sdsl_throughput(
    alpha: ArrayLike, draft_parameters: ArrayLike, target_parameters: ArrayLike
) -> Array:
    """Returns the largest `sdsl_throughput` over all gamma, real and at least 0.

        T = -ln(alpha) / (2 N u (1 - alpha)),  u as in `optimal_gamma` with cost ratio N / M

    Args:
      alpha: probability that a drafted token is accepted, in [0, 1].
      draft_parameters: N, positive.
      target_parameters: M, positive.

    Returns:
      Tokens per two parameters read, the unit of `sdsl_throughput`; at least `1 / (2 M)`.

    Raises:
      ValueError: an argument is outside its range or NaN.

    Example:
      >>> from jaxsd import costmodel
      >>> print(f"{costmodel.optimal_sdsl_throughput(0.65, 0.3e9, 70e9):.4g}")
      1.94e-11

    Source: SDSL, arXiv 2603.11053, eq. 4.
    """
    require("draft_parameters", draft_parameters, POSITIVE)
    require("target_parameters", target_parameters, POSITIVE)
    alpha_, draft, target = as_floats(alpha, draft_parameters, target_parameters)
    return optimal_speedup(alpha_, draft / target) / (2 * target)


def best_num_tokens(
    alpha: ArrayLike,
    target_seconds: ArrayLike,
    draft_seconds: ArrayLike,
    verify_seconds: ArrayLike,
    overhead_seconds: ArrayLike = 0.0,
) -> NumTokensPrediction:
    """Returns the predicted speed-up for every number of draft tokens, from measured times.

    Needs no assumption on how times grow: measure each pass at the batch size of interest. The
    prediction is for one sequence of that batch. K = 0 is plain decoding, predicted at exactly 1,
    and is the answer wherever no K is faster.

        tokens_per_second[K] = E(K) / (draft_seconds[K] + verify_seconds[K] + overhead_seconds)
        tokens_per_second[0] = 1 / target_seconds

    Args:
      alpha: probability that a drafted token is accepted, in [0, 1]; a scalar (`jax.vmap` for
        more). From a measured rate: `acceptance_rate_to_alpha`. Or `[K_max]` acceptance by
        position: the share of rounds in which at least 1, 2, ..., K_max tokens are accepted.
      target_seconds: time of one plain decoding step, positive.
      draft_seconds: time of one draft step, or `[K_max + 1]` times of drafting K = 0..K_max tokens
        (the first is not used); at least 0.
      verify_seconds: `[K_max + 1]` times of the target's pass over K + 1 tokens, K = 0..K_max (the
        first is not used), positive.
      overhead_seconds: other time of a round of speculation, at least 0.

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
    if np.shape(target_seconds) or np.shape(overhead_seconds):
        raise ValueError(
            f"target_seconds of shape {np.shape(target_seconds)} and overhead_seconds of shape "
            f"{np.shape(overhead_seconds)} must be scalars"
        )
    if np.shape(alpha) not in ((), (verify_shape[0] - 1,)):
        raise ValueError(
            f"alpha of shape {np.shape(alpha)} must be a scalar or have shape [K_max], "
            f"[{verify_shape[0] - 1}]"
        )
    require("target_seconds", target_seconds, POSITIVE)
    require("draft_seconds", draft_seconds, NON_NEGATIVE)
    require("verify_seconds", verify_seconds, POSITIVE)
    require("overhead_seconds", overhead_seconds, NON_NEGATIVE)
    num_tokens = np.arange(verify_shape[0])
    if np.shape(alpha) and verify_shape[0] > 1:
        tokens = expected_tokens_by_position(jnp.asarray(alpha)[None, :], num_tokens)
    else:
        tokens = expected_tokens(alpha, num_tokens)
    tokens, count, target, draft, verify, overhead = as_floats(
        tokens, num_tokens, target_seconds, draft_seconds, verify_seconds, overhead_seconds
    )
    drafting = draft if draft_shape else count * draft
    round_seconds = jnp.where(count > 0, drafting + verify + overhead, target)
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
    speedup: Array  # at that gamma


def _linear_optimum(
    alpha: ArrayLike, cost_ratio: ArrayLike, verify_slope: ArrayLike, overhead_ratio: ArrayLike
) -> _Optimum:
    """The best gamma where a round takes a fixed time and a time for every drafted token."""
    require("alpha", alpha, PROBABILITY)
    require("cost_ratio", cost_ratio, POSITIVE)
    require("verify_slope", verify_slope, NON_NEGATIVE)
    require("overhead_ratio", overhead_ratio, NON_NEGATIVE)
    return _optimum(*as_floats(alpha, cost_ratio, verify_slope, overhead_ratio))


@jax.jit
def _optimum(alpha: Array, cost_ratio: Array, slope: Array, overhead: Array) -> _Optimum:
    """Solves the first-order condition of the speed-up in gamma."""
    log_alpha = safe_log(alpha)
    alpha_below_one = expm1_over(log_alpha)  # (1 - alpha) / -ln(alpha)
    per_token, fixed = cost_ratio + slope, 1 + overhead
    ratio = per_token / fixed
    # The slope of tokens per second at gamma = 0 is positive: -alpha ln(alpha) > c (1 - alpha).
    rises = ratio * alpha_below_one < alpha
    solvable = rises & (log_alpha < 0)
    s_minus_one = -log_alpha * (1 - ratio) / ratio
    u_minus_one = log_excess_inverse(jnp.where(solvable, s_minus_one, 1))
    u_minus_one = jnp.where(solvable, u_minus_one, 0)
    best = 1 / (per_token * (1 + u_minus_one) * alpha_below_one)
    # Without overhead what rises from gamma = 0 rises from plain decoding, and rounding must not
    # decide. With overhead, plain decoding is ahead by that overhead at gamma = 0.
    pays = rises & ((best > 1) | (overhead == 0))
    return _Optimum(pays, jnp.where(pays, u_minus_one, 0), log_alpha, best)
