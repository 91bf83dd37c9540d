"""Which draft size, and how many draft tokens, make a given target fastest?"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from . import speculation
from ._inputs import (
    NON_NEGATIVE,
    POSITIVE,
    as_floats,
    float64_on_host,
    is_traced,
    require,
)
from .laws import (
    CLIP_MARGIN,
    SDSL,
    AnyPositionLaw,
    Laws,
    acceptance,
    perplexity,
)

# The search looks at drafts from a millionth to a fifth of the target. An acceptance law is fitted
# on pairs further apart than five to one and says nothing of a draft that is nearly the target.
SMALLEST_DRAFT = 1e-6
LARGEST_DRAFT = 0.2

_NUM_STARTS = 16
_NUM_ADAM_STEPS = 200
_NUM_NEWTON_STEPS = 8


class DraftDesign(NamedTuple):
    """The draft that makes a target fastest; no parameters, gamma 0, speed-up 1 where none does."""

    parameters: Any  # N*, number of parameters of the draft
    gamma: Any  # draft tokens per round
    alpha: Any  # predicted probability that a drafted token is accepted
    speedup: Any  # over plain decoding, at least 1
    throughput: Any  # tokens per two parameters read: SDSL's "tokens per FLOP"
    draft_perplexity: Any  # infinite where there is no draft
    target_perplexity: Any
    extrapolated: Any  # True: the optimum lies on a bound of the search or of the acceptance law


def optimal_draft_size(
    target_parameters: ArrayLike,
    target_tokens: ArrayLike,
    draft_tokens: ArrayLike,
    laws: Laws = SDSL,
    gamma: ArrayLike | None = None,
) -> DraftDesign:
    """Returns the draft size that makes speculative decoding of a target fastest.

    Maximises SDSL's throughput over the draft's parameters and, unless it is given, over gamma. The
    answer meets the first-order condition to the precision of the arithmetic: given numbers, that
    is float64 on the host, whatever the caller's settings. Where no draft speeds the target up,
    that is the answer: gamma 0, speed-up 1, no parameters. New numbers never compile anew; a new
    shape of the arguments does, and so does giving gamma where there was none.

    The optimum is flat. A draft half or twice as large costs a percent or two of the speed-up, so
    compare designs by speed-up and not by distance in parameters.

        maximise over N   ln S(alpha(N), gamma, N / M)
        alpha(N) = acceptance(exp L(N, draft_tokens), exp L(M, target_tokens))

    Args:
      target_parameters: M, number of parameters of the target, positive.
      target_tokens: number of tokens the target was trained on, positive.
      draft_tokens: number of tokens the draft will be trained on, positive.
      laws: the loss law and the acceptance law.
      gamma: number of tokens drafted per round, at least 0, not necessarily whole; `None` for the
        best one at every size. 0 asks for plain decoding.

    Returns:
      The design. From scalars, its fields are Python floats (`extrapolated` a bool); from arrays,
      which broadcast, NumPy arrays; inside jit, grad or vmap, JAX arrays of the caller's precision,
      differentiable in every argument and in the laws (in float32, `parameters` is good to about
      four digits).

    Raises:
      ValueError: an argument, or a constant of the laws, is outside its range or NaN; or
        acceptance is by position, for which `search` finds the best draft.

    Example:
      >>> from jaxsd import costmodel
      >>> design = costmodel.optimal_draft_size(70553706496, 15e12, 180e9)
      >>> print(f"{design.parameters / 1e6:.2f}M {design.gamma:.2f} {design.speedup:.3f}")
      312.76M 9.71 2.704

    Source: SDSL, arXiv 2603.11053, eq. 9 and table 5.
    """
    require("target_parameters", target_parameters, POSITIVE)
    require("target_tokens", target_tokens, POSITIVE)
    require("draft_tokens", draft_tokens, POSITIVE)
    if gamma is not None:
        require("gamma", gamma, NON_NEGATIVE)
    laws.loss.check()
    laws.acceptance.check()
    if isinstance(laws.acceptance, AnyPositionLaw):
        raise ValueError(
            f"laws.acceptance is a {type(laws.acceptance).__name__}: this optimum rests on one "
            "alpha for all positions; use costmodel.search"
        )
    problem = _Problem(target_parameters, target_tokens, draft_tokens, laws, gamma)
    if is_traced(problem):
        return _solve(problem)
    with float64_on_host():
        design = jax.device_get(_solve(jax.device_get(problem)))
    return jax.tree.map(lambda x: x.item() if x.ndim == 0 else x, design)


class _Problem(NamedTuple):
    target_parameters: Any
    target_tokens: Any
    draft_tokens: Any
    laws: Laws
    gamma: Any  # None, and then no leaf of the pytree: to be optimised


def _solve(problem: _Problem) -> DraftDesign:
    """Brings all numbers to one dtype and shape and maps the search over that shape."""
    leaves, structure = jax.tree.flatten(problem)
    leaves = as_floats(*leaves)
    rows = jax.tree.unflatten(structure, [x.reshape(-1) for x in leaves])
    return jax.tree.map(lambda x: x.reshape(leaves[0].shape), _search(rows))


@jax.jit
@jax.vmap
def _search(problem: _Problem) -> DraftDesign:
    """Solves one problem of scalars."""
    log_target = jnp.log(problem.target_parameters)
    low = log_target + math.log(SMALLEST_DRAFT)
    high = log_target + math.log(LARGEST_DRAFT)

    def objective(log_size: Array) -> Array:
        size = jnp.exp(log_size)
        return -jnp.log(_speedup(problem, size, _alpha(problem, size)))

    def search(_: Any, start: Array) -> Array:
        del start  # there are many
        return _polish(objective, _descend(objective, low, high), low, high)

    # The implicit function theorem makes the optimum differentiable: not the steps that led to it
    # are differentiated but the condition that it meets.
    log_size = jax.lax.custom_root(_slope(objective), high, search, _divide_by_slope)
    at_bound = (log_size <= low) | (log_size >= high)
    # On a bound that condition does not hold, and the size moves with the bound.
    log_size = jnp.where(at_bound, jnp.clip(jax.lax.stop_gradient(log_size), low, high), log_size)
    best = _design(problem, jnp.exp(log_size))
    # Where alpha sits on the lower tail of the soft clip the law itself gives no acceptance.
    pays = (best.speedup > 1) & (best.alpha >= CLIP_MARGIN)
    unusual = at_bound | (best.alpha > 1 - CLIP_MARGIN)
    best = best._replace(extrapolated=unusual)
    return jax.tree.map(lambda x, y: jnp.where(pays, x, y), best, _no_draft(best, problem))


def _alpha(problem: _Problem, size: Array) -> Array:
    """How often the target accepts a token of a draft of a given size."""
    law, target = problem.laws, problem.target_parameters
    return acceptance(
        law.acceptance,
        _perplexity(law, size, problem.draft_tokens),
        _perplexity(law, target, problem.target_tokens),
    )


def _perplexity(laws: Laws, size: Array, tokens: Array) -> Array:
    """Perplexity on the scale of the acceptance law."""
    return perplexity(laws.loss, size, tokens, scale=laws.perplexity_scale)


def _speedup(problem: _Problem, size: Array, alpha: Array) -> Array:
    """What that gains, with the best gamma or the given one."""
    cost_ratio = size / problem.target_parameters
    if problem.gamma is None:
        return speculation.optimal_speedup(alpha, cost_ratio)
    return speculation.speedup(alpha, problem.gamma, cost_ratio)


def _design(problem: _Problem, size: Array) -> DraftDesign:
    """Everything about a draft of a given size."""
    law, target, gamma = problem.laws, problem.target_parameters, problem.gamma
    alpha = _alpha(problem, size)
    speedup = _speedup(problem, size, alpha)
    return DraftDesign(
        parameters=size,
        gamma=speculation.optimal_gamma(alpha, size / target) if gamma is None else gamma,
        alpha=alpha,
        speedup=speedup,
        throughput=speedup / (2 * target),
        draft_perplexity=_perplexity(law, size, problem.draft_tokens),
        target_perplexity=_perplexity(law, target, problem.target_tokens),
        extrapolated=jnp.zeros_like(size, bool),
    )


def _no_draft(design: DraftDesign, problem: _Problem) -> DraftDesign:
    """Plain decoding as a design: the limit of a draft of no parameters."""
    zero = jnp.zeros_like(design.parameters)
    return DraftDesign(
        parameters=zero,
        gamma=zero,
        alpha=zero,
        speedup=zero + 1,
        throughput=1 / (2 * problem.target_parameters),
        draft_perplexity=zero + jnp.inf,
        target_perplexity=design.target_perplexity,
        extrapolated=jnp.zeros_like(zero, bool),
    )


def _descend(objective: Callable[[Array], Array], low: Array, high: Array) -> Array:
    """Adam from many starts between the bounds; returns the best end."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.3, _NUM_ADAM_STEPS))
    gradient = jax.vmap(_slope(objective))

    def step(_: int, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        points, state = carry
        # Optax takes powers with its integer count of steps, which the caller may have forbidden.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient(points), state, points)
        moved: Any = optax.apply_updates(points, updates)
        return optax.projections.projection_box(moved, low, high), state

    starts = jnp.linspace(low, high, _NUM_STARTS)
    points, _ = jax.lax.fori_loop(0, _NUM_ADAM_STEPS, step, (starts, optimizer.init(starts)))
    return points[jnp.argmin(jax.vmap(objective)(points))]


def _polish(objective: Callable[[Array], Array], point: Array, low: Array, high: Array) -> Array:
    """Newton on the first-order condition: the objective is too flat for its values to decide."""
    slope_fn = _slope(objective)

    def step(_: int, point: Array) -> Array:
        slope, bend = jax.jvp(slope_fn, (point,), (jnp.ones_like(point),))
        convex = bend > 0  # elsewhere Newton would climb, as on the plateau where no draft pays
        move = jnp.where(convex, slope / jnp.where(convex, bend, 1), 0)
        return jnp.clip(point - move, low, high)

    return jax.lax.fori_loop(0, _NUM_NEWTON_STEPS, step, point)


def _slope(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """The derivative of a function of one number; forward mode compiles several times faster."""
    return lambda x: jax.jvp(function, (x,), (jnp.ones_like(x),))[1]


def _divide_by_slope(linear: Callable[[Array], Array], value: Array) -> Array:
    """Solves a linear equation in one unknown; 0 where every unknown solves it."""
    slope = linear(jnp.ones_like(value))
    return jnp.where(slope == 0, 0, value / jnp.where(slope == 0, 1, slope))
