"""How much does a design depend on what went into it, and how sharp is its optimum?

Elasticities and intervals come from the gradients of the one function that predicts; the flat
region and the front from the designs around the best one.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ._inputs import NON_NEGATIVE, POSITIVE, as_floats, float64_on_host, require
from ._lattice import Lattice
from ._problem import FALLING, OBJECTIVES
from .draft_size import optimal_draft_size
from .estimate import Design, Hardware, Target, Workload, throughput
from .laws import SDSL, AcceptanceLaw, Laws
from .search import SearchResult, Solution, as_float64, evaluate_designs, solve
from .shapes import parameters_total

# 95 % of a normal distribution lies within so many standard deviations.
NORMAL_QUANTILE = 1.959963984540054
_NUM_PLACEMENTS = 4  # of a front


class Interval(NamedTuple):
    """A prediction and how well the acceptance law lets it be known, both at 95 %."""

    value: float
    low: float  # of the law itself: where the average over many pairs of models lies
    high: float
    pair_low: float  # of one pair: its alpha scatters around the law as the fitted pairs do
    pair_high: float


class FlatRegion(NamedTuple):
    """The real designs that lose no more than a given share against the best."""

    loss: float  # relative, of the objective
    num_designs: int
    ranges: dict[str, tuple[float, float]]  # of each free variable and of `parameters`
    cut_off: tuple[str, ...]  # variables whose range goes on beyond what was looked at


class FrontPoint(NamedTuple):
    """The best design under one limit."""

    limit: float
    solution: Solution


def elasticities(
    design: Design,
    target: Target,
    hardware: Hardware,
    workload: Workload,
    laws: Any,
    objective: str = "speedup",
) -> dict[str, float]:
    """Returns by how many percent the objective changes for one percent of every parameter.

    At an optimum these are the elasticities of the optimum itself, for parameters that are not
    free: what re-optimising gains is of second order (envelope theorem).

        d ln(objective) / d ln(parameter)

    Args:
      design: the draft.
      target: the target.
      hardware: chips of both.
      workload: batch, context and the like.
      laws: loss law, acceptance law, scale of perplexities.
      objective: one of those of `search`; "cost" and "latency" rise where things get worse.

    Returns:
      Elasticity by name, such as `hardware.target.chip.bytes_per_second`, the largest first;
      those of exactly 0 are left out. A parameter at 0 has none.

    Raises:
      ValueError: `objective` is unknown, or a number is out of range.

    Example:
      >>> from jaxsd import costmodel
      >>> chips = costmodel.Devices(
      ...     costmodel.named_chip("h100-sxm"), costmodel.named_stack("torch-compile"), 4
      ... )
      >>> table = costmodel.elasticities(
      ...     costmodel.Design(costmodel.named_shape("llama-3.2-1b"), tokens=9e12, gamma=5),
      ...     costmodel.Target(costmodel.named_shape("llama-3.1-70b"), tokens=15e12),
      ...     costmodel.Hardware(chips),
      ...     costmodel.Workload(),
      ...     costmodel.SHAPE_AWARE_SDSL,
      ... )
      >>> round(table["design.shape.n_layers"], 2)
      -0.24

    Source: the envelope theorem; the quantities are those of `throughput`.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r} must be one of {', '.join(OBJECTIVES)}")
    question = design, target, hardware, workload, laws
    throughput(*question)  # refuses what is out of range, by name
    with float64_on_host():
        gradient = jax.device_get(_log_gradient(objective)(as_float64(question)))
    out = {}
    roots = ("design", "target", "hardware", "workload", "laws")
    leaves = jax.tree_util.tree_leaves_with_path(as_float64(question))
    for (path, value), slope in zip(leaves, jax.tree.leaves(gradient), strict=True):
        name = roots[path[0].idx] + jax.tree_util.keystr(path[1:])
        elasticity = np.asarray(slope) * np.where(np.isfinite(value), value, 0)
        if ".fitted." not in name and np.any(elasticity != 0):
            out[name] = float(np.sum(elasticity))
    return dict(sorted(out.items(), key=lambda item: -abs(item[1])))


def delta_method(
    function: Callable[[Array], Array], parameters: ArrayLike, covariance: ArrayLike
) -> tuple[Array, Array]:
    """Returns a function's value and its standard error, from those of its parameters.

        error^2 = g C g^T,  g the gradient of the function, C the covariance

    Exact for a linear function and good where it is nearly so within the errors.

    Args:
      function: of `[n]` parameters, to a scalar.
      parameters: `[n]` their estimates.
      covariance: `[n, n]` of the estimates.

    Returns:
      The value and its standard error.

    Raises:
      ValueError: the shapes do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsd import costmodel
      >>> mean, error = costmodel.delta_method(jnp.sum, [1.0, 2.0], [[0.04, 0.0], [0.0, 0.09]])
      >>> round(float(error), 4)
      0.3606
    """
    (point,) = as_floats(parameters)
    (spread,) = as_floats(covariance)
    if point.ndim != 1 or spread.shape != (point.size, point.size):
        raise ValueError(
            f"covariance of shape {spread.shape} must be [n, n] for parameters of shape "
            f"{point.shape}"
        )
    value, gradient = jax.value_and_grad(function)(point)
    return value, jnp.sqrt(jnp.maximum(gradient @ spread @ gradient, 0))


def acceptance_covariance(law: AcceptanceLaw) -> Array:
    """Returns the covariance of a fitted law's two slopes and intercept.

    Args:
      law: with standard errors and, where they are known, correlations.

    Returns:
      `[3, 3]`, in the order draft slope, target slope, intercept.

    Raises:
      ValueError: an error is negative, or the law has none.

    Example:
      >>> from jaxsd import costmodel
      >>> covariance = costmodel.acceptance_covariance(costmodel.SDSL_ACCEPTANCE)
      >>> round(float(covariance[2, 2]) ** 0.5, 6)
      0.021228
    """
    if not isinstance(law, AcceptanceLaw):
        raise ValueError(f"law is a {type(law).__name__}, which has no standard errors")
    law.check()
    for name in ("draft_slope_error", "target_slope_error", "intercept_error", "residual_error"):
        require(f"AcceptanceLaw.{name}", getattr(law, name), NON_NEGATIVE)
    a, b, c, ab, ac, bc = as_floats(*law[3:9])
    rows = [[a * a, ab * a * b, ac * a * c], [ab * a * b, b * b, bc * b * c]]
    rows.append([ac * a * c, bc * b * c, c * c])
    return jnp.stack([jnp.stack(row) for row in rows])


def speedup_interval(
    design: Design, target: Target, hardware: Hardware, workload: Workload, laws: Any
) -> Interval:
    """Returns the predicted speed-up with its 95 % intervals, by the delta method.

    What is uncertain here is the acceptance law alone: its coefficients, as fitted, and how far
    a single pair of models lies from it. Errors of times and of the loss law are not in it.

        ln S +- 1.96 sqrt(g C g^T + (d ln S / d alpha)^2 residual_error^2)

    Args:
      design: the draft.
      target: the target.
      hardware: chips of both.
      workload: batch, context and the like.
      laws: with an `AcceptanceLaw` that has standard errors.

    Returns:
      The speed-up and its intervals.

    Raises:
      ValueError: the acceptance law has no standard errors, or a number is out of range.

    Example:
      >>> from jaxsd import costmodel
      >>> chips = costmodel.Devices(
      ...     costmodel.named_chip("h100-sxm"), costmodel.named_stack("torch-compile"), 4
      ... )
      >>> interval = costmodel.speedup_interval(
      ...     costmodel.Design(costmodel.named_shape("llama-3.2-1b"), tokens=9e12, gamma=5),
      ...     costmodel.Target(costmodel.named_shape("llama-3.1-70b"), tokens=15e12),
      ...     costmodel.Hardware(chips),
      ...     costmodel.Workload(),
      ...     costmodel.SHAPE_AWARE_SDSL,
      ... )
      >>> bool(interval.pair_low < interval.low < interval.value < interval.high)
      True
    """
    law = laws.acceptance
    question = design, target, hardware, workload, laws
    throughput(*question)  # refuses what is out of range, by name
    with float64_on_host():
        covariance = np.asarray(acceptance_covariance(law))
        value, gradient = jax.device_get(_speedup_slopes(as_float64(question)))
        gradient = np.asarray(gradient)
        of_law = float(gradient @ covariance @ gradient)
        # The intercept moves alpha one for one, as a pair's own scatter does.
        of_pair = of_law + float(gradient[2] * law.residual_error) ** 2
    value = float(value)
    law_factor = math.exp(NORMAL_QUANTILE * math.sqrt(of_law))
    pair_factor = math.exp(NORMAL_QUANTILE * math.sqrt(of_pair))
    return Interval(
        value=value,
        low=value / law_factor,
        high=value * law_factor,
        pair_low=value / pair_factor,
        pair_high=value * pair_factor,
    )


class SizeIntervals(NamedTuple):
    """The optimum of SDSL with its standard errors, in logarithms: a factor up or down."""

    parameters: float
    parameters_log_error: float
    gamma: float
    gamma_log_error: float
    speedup: float
    speedup_log_error: float


def draft_size_intervals(
    target_parameters: float, target_tokens: float, draft_tokens: float, laws: Laws = SDSL
) -> SizeIntervals:
    """Returns SDSL's best draft size, length and speed-up with their standard errors.

    By the delta method, through the optimum itself: how it moves with the acceptance law follows
    from the condition that it meets. Read `parameters * exp(+-1.96 parameters_log_error)`.

        error^2 = g C g^T,  g = d ln(optimum) / d(draft slope, target slope, intercept)

    Args:
      target_parameters: M, number of parameters of the target, positive.
      target_tokens: number of tokens the target was trained on, positive.
      draft_tokens: number of tokens the draft will be trained on, positive.
      laws: with an `AcceptanceLaw` that has standard errors.

    Returns:
      The optimum and its errors.

    Raises:
      ValueError: as `optimal_draft_size`; the law has no standard errors; or no draft helps.

    Example:
      >>> from jaxsd import costmodel
      >>> design = costmodel.draft_size_intervals(70553706496, 15e12, 180e9)
      >>> print(f"{design.parameters / 1e6:.0f}M +- {100 * design.parameters_log_error:.0f} %")
      313M +- 7 %

    Source: SDSL, arXiv 2603.11053, eq. 9 and table 3.
    """
    best = optimal_draft_size(target_parameters, target_tokens, draft_tokens, laws)
    if best.parameters == 0:
        raise ValueError("no draft makes this target faster: there is no optimum to move")
    with float64_on_host():
        covariance = np.asarray(acceptance_covariance(laws.acceptance))
        question = as_float64((target_parameters, target_tokens, draft_tokens, laws))
        slopes = np.asarray(_optimum_slopes(question))
    errors = np.sqrt(np.einsum("ij,jk,ik->i", slopes, covariance, slopes))
    return SizeIntervals(
        best.parameters,
        float(errors[0]),
        best.gamma,
        float(errors[1]),
        best.speedup,
        float(errors[2]),
    )


@jax.jit
def _optimum_slopes(question: Any) -> Array:
    """`[3, 3]` slopes of ln size, ln gamma, ln speed-up in the acceptance law's coefficients."""
    target, target_tokens, draft_tokens, laws = question
    law = laws.acceptance

    def optimum(coefficients: Array) -> Array:
        moved = law._replace(
            draft_slope=coefficients[0], target_slope=coefficients[1], intercept=coefficients[2]
        )
        best = optimal_draft_size(
            target, target_tokens, draft_tokens, laws._replace(acceptance=moved)
        )
        return jnp.log(jnp.stack([best.parameters, best.gamma, best.speedup]))

    return jax.jacobian(optimum)(jnp.stack([law.draft_slope, law.target_slope, law.intercept]))


def flat_region(result: SearchResult, losses: Sequence[float] = (0.01, 0.05)) -> list[FlatRegion]:
    """Returns which real designs are nearly as good as the best: optima of this kind are flat.

    Looks at every width and depth, where those are free, at all draft lengths, up to four times
    those of the best; what else is free stays as in the best design, training tokens at the budget.

    Args:
      result: of `search`.
      losses: shares of the objective that may be lost, each in (0, 1).

    Returns:
      One region per loss.

    Raises:
      ValueError: a loss is not positive, or the best design is plain decoding.

    Example:
      >>> from jaxsd import costmodel
      >>> chips = costmodel.Devices(
      ...     costmodel.named_chip("h100-sxm"), costmodel.named_stack("torch-compile"), 4
      ... )
      >>> result = costmodel.search(
      ...     costmodel.Target(costmodel.named_shape("llama-3.1-70b"), 15e12),
      ...     costmodel.Hardware(chips),
      ...     costmodel.draft_template(costmodel.named_shape("llama-3.1-70b"), tokens=1e12),
      ...     free=["d_model", "n_layers", "gamma"],
      ... )
      >>> one, five = costmodel.flat_region(result)
      >>> one.num_designs < five.num_designs
      True
    """
    for loss in losses:
        require("losses", loss, POSITIVE)
    if result.best.plain:
        raise ValueError("the best design is plain decoding, which has no neighbours")
    problem, names = result.problems[0], result.free
    lattice = Lattice(names, problem, result.width_multiple)
    axes, edges = _grid(lattice, result.best)
    points = [point for point in itertools.product(*axes) if lattice.allowed(point)]
    pairs = [(lattice.design(point), lattice.batch(point)) for point in points]
    with float64_on_host():
        costs, excess = evaluate_designs(problem, names, pairs)
    feasible = excess <= 1e-9
    # The descent that found the best may have left this grid's sparser part.
    sign = 1 if result.objective in FALLING else -1
    best = min(sign * math.log(result.best.objective), costs[feasible].min(initial=math.inf))
    regions = []
    for loss in losses:
        inside = feasible & (costs <= best + math.log1p(loss))
        regions.append(_region(loss, lattice, points, pairs, inside, edges))
    return regions


def pareto_front(
    result: SearchResult, against: str = "draft_parameters", num_points: int = 12
) -> list[FrontPoint]:
    """Returns the best designs under a falling limit on one of their costs.

    The smooth searches are vmapped, eight in a call. Tries the best few placements of the result;
    points that another one beats in both are left out.

    Args:
      result: of `search`: the question, and the unlimited answer at the end of the front.
      against: what is limited: draft_parameters, draft_memory_bytes or training_flops.
      num_points: how many limits are tried, down to a thirtieth of the unlimited answer's.

    Returns:
      Points of the front, the cheapest first.

    Raises:
      ValueError: `against` is unknown, or the best design is plain decoding.

    Example:
      >>> from jaxsd import costmodel
      >>> chips = costmodel.Devices(
      ...     costmodel.named_chip("h100-sxm"), costmodel.named_stack("torch-compile"), 4
      ... )
      >>> result = costmodel.search(
      ...     costmodel.Target(costmodel.named_shape("llama-3.1-70b"), 15e12),
      ...     costmodel.Hardware(chips),
      ...     costmodel.draft_template(costmodel.named_shape("llama-3.1-70b"), tokens=1e12),
      ...     free=["d_model", "n_layers", "gamma"],
      ... )
      >>> front = costmodel.pareto_front(result, num_points=4)
      >>> all(a.solution.objective < b.solution.objective for a, b in zip(front, front[1:]))
      True
    """
    known = ("draft_parameters", "draft_memory_bytes", "training_flops")
    if against not in known:
        raise ValueError(f"against={against!r} must be one of {', '.join(known)}")
    if result.best.plain:
        raise ValueError("the best design is plain decoding: there is no front")
    last = _amount(result.best, against)
    limits = np.geomspace(last / 30, last * (1 + 1e-6), num_points).tolist()
    some = result.problems[:_NUM_PLACEMENTS]
    problems = [
        problem._replace(limits=problem.limits._replace(**{against: limit}))
        for limit, problem in itertools.product(limits, some)
    ]
    outcomes = solve(problems, result.free, result.width_multiple)
    sign = 1 if result.objective in FALLING else -1
    front: list[FrontPoint] = []
    for place, limit in enumerate(limits):
        here = outcomes[place * len(some) : (place + 1) * len(some)]
        drafts = [x for x in here if not isinstance(x, str) and not x.plain]
        if not drafts:
            continue
        best = min(drafts, key=lambda solution: sign * solution.objective)
        if not front or sign * best.objective < sign * front[-1].solution.objective:
            front.append(FrontPoint(limit, best))
    return front


@functools.lru_cache(maxsize=16)
def _log_gradient(objective: str) -> Callable[[Any], Any]:
    """The compiled gradient of the logarithm of an objective, in its own unit."""
    rises = objective not in FALLING

    def log_objective(question: Any) -> Array:
        value = OBJECTIVES[objective](throughput(*question))
        return -value if rises else value

    return jax.jit(jax.grad(log_objective))


@jax.jit
def _speedup_slopes(question: Any) -> tuple[Array, Array]:
    """The speed-up, and the slopes of its logarithm in the acceptance law's coefficients."""
    design, target, hardware, workload, laws = question

    def log_speedup(coefficients: Array) -> Array:
        law = laws.acceptance
        law = law._replace(
            draft_slope=coefficients[0], target_slope=coefficients[1], intercept=coefficients[2]
        )
        moved = laws._replace(acceptance=law)
        return jnp.log(throughput(design, target, hardware, workload, moved).speedup)

    law = laws.acceptance
    point = jnp.stack([law.draft_slope, law.target_slope, law.intercept])
    value, slopes = jax.value_and_grad(log_speedup)(point)
    return jnp.exp(value), slopes


def _grid(lattice: Lattice, best: Solution) -> tuple[list[list[int]], dict[str, tuple[int, int]]]:
    """Values of every variable to look at, and the first and last of those that are varied."""
    shape = best.design.shape
    fixed = {
        "d_model": shape.d_model,
        "n_layers": shape.n_layers,
        "ff_ratio": shape.d_ff,
        "n_kv_heads": shape.n_kv_heads,
        "gamma": best.design.gamma,
        "batch": best.workload.batch,
    }
    axes, edges = [], {}
    for name in lattice.names:
        value = int(fixed[name])
        if name not in ("d_model", "n_layers", "gamma"):
            axes.append([value])
            continue
        step = lattice.width_step if name == "d_model" else 1
        low, high = lattice.box[name]
        last = int(min(4 * value + 4 * step, high))
        # At most some forty values: a wide range is looked at in larger steps.
        stride = step * max(1, -(-last // (40 * step)))
        start = value % stride or stride
        values = [x for x in range(start, last + 1, stride) if x >= low]
        axes.append(values or [value])
        edges[name] = (axes[-1][0], axes[-1][-1])
    return axes, edges


def _region(
    loss: float,
    lattice: Lattice,
    points: list[tuple[int, ...]],
    pairs: list[tuple[Design, float]],
    inside: np.ndarray,
    edges: dict[str, tuple[int, int]],
) -> FlatRegion:
    """Ranges of the designs that are inside."""
    chosen = [i for i in range(len(points)) if inside[i]]
    ranges: dict[str, tuple[float, float]] = {}
    cut_off = []
    for place, name in enumerate(lattice.names):
        if name not in edges:
            continue
        values = [points[i][place] for i in chosen]
        ranges[name] = (float(min(values)), float(max(values)))
        top = lattice.box[name][1]
        if max(values) == edges[name][1] and edges[name][1] < top * 0.99:
            cut_off.append(name)
    sizes = [float(parameters_total(pairs[i][0].shape)) for i in chosen]
    ranges["parameters"] = (min(sizes), max(sizes))
    return FlatRegion(loss, len(chosen), ranges, tuple(cut_off))


def _amount(solution: Solution, against: str) -> float:
    """How much of a limited quantity a solution takes."""
    if against == "draft_parameters":
        return float(parameters_total(solution.design.shape))
    if against == "draft_memory_bytes":
        return float(solution.estimate.memory.draft_bytes)
    return float(solution.estimate.training_flops)
