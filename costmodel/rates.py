"""What does a logged acceptance rate, or a mean acceptance length, say about alpha?

A log counts accepted over drafted tokens, or tokens per round. Theory counts alpha, the probability
that one token is accepted given that those before it were. The functions here turn each into the
others; all broadcast and work under jit, grad and vmap.
"""

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
from ._numerics import geometric_sum, safe_log


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
