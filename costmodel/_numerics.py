"""The few functions whose plain form loses its value or its gradient where speculation needs it.

They are jitted so that a call outside any jit runs one computation and not fifty small ones.
"""

import jax
import jax.numpy as jnp
from jax import Array

# Below this |x|, expm1(x) / x and what is built on it are evaluated as a series; above it the
# quotient loses nothing, neither in value nor in derivative.
_SERIES_RADIUS = 0.7
_SERIES_TERMS = 16  # 0.7^16 / 17! is below half a unit of float64


def safe_log(alpha: Array) -> Array:
    """ln(alpha), cut off where its first two derivatives would leave the range of the dtype.

    That is below 1e-19 in float32. No power of alpha that is added to 1 can tell the difference.
    """
    return jnp.log(jnp.maximum(alpha, jnp.finfo(alpha.dtype).tiny ** 0.5))


def _expm1_series(x: Array) -> Array:
    """(e^x - 1) / x for |x| < 0.7, exactly 1 at 0 and smooth through it."""
    total = jnp.ones_like(x)
    for k in range(_SERIES_TERMS, 1, -1):
        total = 1 + x / k * total
    return total


@jax.jit
def expm1_over(x: Array) -> Array:
    """(e^x - 1) / x for every x."""
    near = jnp.abs(x) < _SERIES_RADIUS
    far_x = jnp.where(near, 1, x)
    return jnp.where(near, _expm1_series(jnp.where(near, x, 0)), jnp.expm1(far_x) / far_x)


@jax.jit
def geometric_sum(log_alpha: Array, count: Array) -> Array:
    """(1 - alpha^count) / (1 - alpha): the sum of `count` powers of alpha, from the zeroth on.

    Smooth through alpha = 1, where it is `count`. The plain quotient is 0 / 0 there, and its
    derivative in float32 is off by a factor of two at 1 - 1e-6.
    """
    near = jnp.maximum(count, 1) * jnp.abs(log_alpha) < _SERIES_RADIUS
    near_log = jnp.where(near, log_alpha, 0)
    near_sum = count * _expm1_series(count * near_log) / _expm1_series(near_log)
    far_log = jnp.where(near, -1, log_alpha)
    return jnp.where(near, near_sum, _one_minus_exp(count * far_log) / _one_minus_exp(far_log))


def _one_minus_exp(x: Array) -> Array:
    """1 - e^x for x <= 0."""
    # JAX differentiates expm1 as expm1 + 1, which has no digits left where e^x is small.
    near = x > -_SERIES_RADIUS
    return jnp.where(near, -jnp.expm1(jnp.where(near, x, 0)), 1 - jnp.exp(x))


def _log_excess(w: Array) -> Array:
    """w - ln(1 + w) for w >= 0, without cancellation near 0."""
    small = jnp.where(w < 0.1, w, 0)
    # ln(1 + w) = 2 atanh(z), and w - 2 z = w z.
    z = small / (2 + small)
    tail = sum((z * z) ** k / (2 * k + 3) for k in range(7))
    return jnp.where(w < 0.1, small * z - 2 * z**3 * tail, w - jnp.log1p(w))


@jax.jit
def log_excess_inverse(s: Array) -> Array:
    """Solves w - ln(1 + w) = s for w > 0, given s > 0; this is -1 - W(-exp(-1 - s)), branch -1."""
    return _log_excess_inverse(s)


@jax.custom_jvp
def _log_excess_inverse(s: Array) -> Array:
    def newton(_: int, w: Array) -> Array:
        return w - (_log_excess(w) - s) * (1 + w) / w

    # The start is an upper bound of the root, by e^x >= 1 + x + x^2 / 2 at x = sqrt(2 s), and the
    # function is convex: Newton descends to the root and is at the last digit after five steps.
    return jax.lax.fori_loop(0, 5, newton, s + jnp.sqrt(2 * s))


@_log_excess_inverse.defjvp
def _log_excess_inverse_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    w = _log_excess_inverse(*primals)
    return w, (1 + w) / w * tangents[0]
