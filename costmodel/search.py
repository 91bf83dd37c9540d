"""Which draft is best for a target, its chips and its load?

A gradient search over any subset of the draft's width, depth, MLP ratio, key and value heads,
training tokens and length, and the batch, under constraints; then real shapes: multiples of 128,
whole heads, degrees of parallelism that divide. Every variable is searched as its logarithm.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from ._inputs import POSITIVE, float64_on_host, require
from ._lattice import Lattice, round_design
from ._problem import (
    DEFAULT_BOUNDS,
    FALLING,
    LIMIT_NAMES,
    OBJECTIVES,
    VARIABLES,
    Limits,
    Problem,
    assign,
    excesses,
    minimised,
    within_budget,
)
from .estimate import (
    Design,
    Devices,
    Estimate,
    Hardware,
    Target,
    Workload,
    check,
    draft_devices,
    law_parameters,
    throughput,
)
from .hardware import parallel_degrees
from .laws import SHAPE_AWARE_SDSL, Laws, loss
from .shapes import Formats, Shape

_NUM_STARTS = 64
_NUM_ADAM_STEPS = 400
_NUM_ENDS = 4
_CHUNK = 8
# A violated constraint costs this much per factor of e. No objective gains as much by violating
# one: throughput, the steepest, gains a factor of e from a batch e times as large.
_PENALTY = 8.0
_FIRST_SHARPNESS, _LAST_SHARPNESS = 10.0, 2000.0


class Solution(NamedTuple):
    """The best real design on one choice of hardware and formats."""

    design: Design  # whole numbers but for the training tokens
    workload: Workload  # with the batch, where that was free
    hardware: Hardware
    target: Target
    estimate: Estimate
    objective: float  # what was asked for, in its own unit
    continuous: dict[str, float]  # the free variables before rounding
    continuous_objective: float
    rounding_loss: float  # relative, of the objective
    plain: bool  # True: no draft helps; the answer is plain decoding, gamma 0


class SearchResult(NamedTuple):
    """The best solution of all choices, and what to know about it."""

    best: Solution
    solutions: tuple[Solution, ...]  # one per feasible choice, the best first
    infeasible: tuple[str, ...]  # why the others were rejected, and by how much
    free: tuple[str, ...]
    objective: str
    at_bound: tuple[str, ...]  # which variables and limits the answer leans on
    problems: tuple[Problem, ...]  # of the solutions
    width_multiple: int


def search(
    target: Target,
    hardware: Hardware | Sequence[Hardware],
    template: Design | Sequence[Design],
    free: Sequence[str] | Mapping[str, tuple[float, float]],
    *,
    workload: Workload = Workload(),  # noqa: B008 (a NamedTuple: nothing in it can change)
    laws: Laws = SHAPE_AWARE_SDSL,
    limits: Limits = Limits(),  # noqa: B008
    objective: str = "throughput",
    width_multiple: int = 128,
) -> SearchResult:
    """Returns the best draft, by gradient from many starts, rounded to a shape that can be built.

    Every combination of the given hardware and templates is searched, all of them and all starts
    in one compiled call: the degree of parallelism, formats and the place of the draft are choices,
    not variables. The smooth optimum is then rounded, and all its neighbours, and theirs, are
    compared under the hard limits until none is better. Plain decoding, gamma 0, is always among
    the answers. The box is cut to the aspect ratios that the loss law was fitted on. Computed in
    float64 on the host.

        minimise over the free variables   -ln(objective) + penalties,  then over their lattice

    Args:
      target: the target and its training tokens.
      hardware: one choice of chips, or several.
      template: what is not free, or several: the formats to try. Query heads and, unless they are
        free, the MLP and the key and value heads keep their proportion to `d_model`.
      free: names out of d_model, n_layers, ff_ratio, n_kv_heads, tokens, gamma, batch; or a dict
        with the bounds of each.
      workload: batch, context and the like.
      laws: loss law, acceptance law, scale of perplexities.
      limits: what a design may not exceed.
      objective: throughput, throughput_per_chip, speedup, latency, cost (per served token) or
        total_cost (training and `workload.served_tokens`).
      width_multiple: of which d_model and d_ff have to be multiples.

    Returns:
      The best design, the others, and what limits it.

    Raises:
      ValueError: a name or a number is out of range; width and depth are both free and nothing in
        the problem tells them apart; or no design is feasible, with the reason and by how much.

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
      >>> shape = result.best.design.shape
      >>> shape.n_layers, shape.d_model, result.best.design.gamma
      (3, 1024, 7)

    Source: the objective is SDSL's, arXiv 2603.11053, eq. 1, with the time of a pass of a shape
    (`pass_time`) in place of its parameters.
    """
    bounds = _bounds(free)
    names = tuple(bounds)
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r} must be one of {', '.join(OBJECTIVES)}")
    if objective == "total_cost":
        require("workload.served_tokens", workload.served_tokens, POSITIVE)
    templates = [template] if isinstance(template, Design) else list(template)
    choices = [hardware] if isinstance(hardware, Hardware) else list(hardware)
    if not templates or not choices:
        raise ValueError("hardware and template must each hold at least one choice")
    for choice, one in itertools.product(choices, templates):
        check(one, target, choice, workload, laws)
        _require_identified(names, one, choice, laws)
    problems = [
        _problem(one, target, choice, workload, laws, limits, bounds, objective)
        for choice, one in itertools.product(choices, templates)
    ]
    outcomes = solve(problems, names, width_multiple)
    solutions = [(x, i) for i, x in enumerate(outcomes) if isinstance(x, Solution)]
    infeasible = tuple(x for x in outcomes if isinstance(x, str))
    if not solutions:
        raise ValueError("no design is feasible: " + "; ".join(dict.fromkeys(infeasible)))
    # Ties, as between several choices that all say plain decoding, go to the first.
    sign = 1 if objective in FALLING else -1
    solutions.sort(key=lambda pair: sign * pair[0].objective)
    best, index = solutions[0]
    return SearchResult(
        best=best,
        solutions=tuple(solution for solution, _ in solutions),
        infeasible=infeasible,
        free=names,
        objective=objective,
        at_bound=_at_bound(best, problems[index], bounds),
        problems=tuple(problems[i] for _, i in solutions),
        width_multiple=width_multiple,
    )


def solve(
    problems: list[Problem], names: tuple[str, ...], width_multiple: int
) -> "list[Solution | str]":
    """Solves problems of one structure, the smooth part in one call; or says why one has none."""
    with float64_on_host():
        points = _continuous(problems, names)
        return [
            _round(problem, values, names, width_multiple)
            for problem, values in zip(problems, points, strict=True)
        ]


def draft_template(
    target_shape: Shape,
    tokens: ArrayLike,
    *,
    gamma: ArrayLike = 4,
    d_model: int = 1024,
    n_layers: int = 8,
    head_dim: int = 128,
    group: int = 4,
    ff_ratio: float = 3.5,
    formats: Formats | None = None,
) -> Design:
    """Returns a Llama-like draft with a target's vocabulary, to search from.

    The defaults are the proportions of Llama 3: four query heads to a key and value head, a gated
    MLP three and a half times as wide as the model; embeddings tied, as small models have them.

    Args:
      target_shape: for its vocabulary.
      tokens: to train the draft on.
      gamma: draft tokens per round.
      d_model: width.
      n_layers: depth.
      head_dim: width of a head.
      group: query heads per key and value head.
      ff_ratio: width of the MLP / d_model.
      formats: bytes per number; 16 bits for everything by default.

    Returns:
      The design.

    Example:
      >>> from jaxsd import costmodel
      >>> template = costmodel.draft_template(costmodel.named_shape("llama-3.1-70b"), tokens=1e12)
      >>> costmodel.parameters_total(template.shape)
      240403456.0
    """
    shape = Shape(
        vocab_size=target_shape.vocab_size,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=d_model / head_dim,
        n_kv_heads=max(d_model / head_dim / group, 1),
        head_dim=head_dim,
        d_ff=ff_ratio * d_model,
        tied_embeddings=True,
    )
    return Design(shape, tokens, gamma, Formats() if formats is None else formats)


def hardware_choices(
    devices: Devices,
    num_chips: int,
    target_shape: Shape,
    draft_shape: Shape | None = None,
) -> list[Hardware]:
    """Returns the ways to place a target and a draft on so many equal chips.

    Beside each other, the target on all chips that it can be cut for and the draft on one of them
    or on more; or apart, the draft on chips of its own.

    Args:
      devices: the chip and its software; its degree of parallelism is not used.
      num_chips: how many there are.
      target_shape: for the degrees it can be cut into.
      draft_shape: for its degrees, if its heads are known; else powers of two up to 8.

    Returns:
      The choices, those beside each other first.

    Raises:
      ValueError: `num_chips` is below 1.

    Example:
      >>> from jaxsd import costmodel
      >>> one = costmodel.Devices(costmodel.named_chip("tpu-v5p"), costmodel.named_stack("xla-tpu"))
      >>> choices = costmodel.hardware_choices(one, 4, costmodel.named_shape("llama-3.1-70b"))
      >>> [(c.target.tensor_parallel, c.draft.tensor_parallel, c.draft_apart) for c in choices][:4]
      [(1, 1, 0.0), (2, 1, 0.0), (2, 2, 0.0), (4, 1, 0.0)]
    """
    degrees = parallel_degrees(target_shape, num_chips)
    if draft_shape is None:
        draft_degrees = tuple(2**i for i in range(4))
    else:
        draft_degrees = parallel_degrees(draft_shape, num_chips)
    beside, apart = [], []
    for degree, draft_degree in itertools.product(degrees, draft_degrees):
        placed = devices._replace(tensor_parallel=degree)
        drafting = devices._replace(tensor_parallel=draft_degree)
        if draft_degree <= degree:
            beside.append(Hardware(placed, drafting, 0.0))
        if degree + draft_degree <= num_chips:
            apart.append(Hardware(placed, drafting, 1.0))
    return beside + apart


def _bounds(
    free: Sequence[str] | Mapping[str, tuple[float, float]],
) -> dict[str, tuple[float, float]]:
    """Bounds of the free variables, in one order however they were given."""
    if isinstance(free, str):
        raise ValueError(f"free={free!r} must be a sequence of names")
    given = dict(free) if isinstance(free, Mapping) else dict.fromkeys(free)
    unknown = [name for name in given if name not in VARIABLES]
    if unknown or not given:
        raise ValueError(f"free={sorted(given)} must be one or more of {', '.join(VARIABLES)}")
    bounds = {}
    for name in VARIABLES:
        if name not in given:
            continue
        pair = given[name] or DEFAULT_BOUNDS[name]
        try:
            low, high = map(float, pair)
        except (TypeError, ValueError):
            raise ValueError(f"free[{name!r}]={pair!r} must be a pair (low, high)") from None
        if not 0 < low < high < math.inf:
            raise ValueError(f"free[{name!r}]={pair!r} must be positive, finite and rising")
        bounds[name] = (low, high)
    return bounds


def _problem(
    template: Design,
    target: Target,
    hardware: Hardware,
    workload: Workload,
    laws: Laws,
    limits: Limits,
    bounds: dict[str, tuple[float, float]],
    objective: str,
) -> Problem:
    """One choice as a problem: every variable with bounds, those that are not free of width 0."""
    box = np.log([bounds.get(name, (1.0, 1.0)) for name in VARIABLES])
    return Problem(
        template,
        target,
        _with_draft(hardware),
        workload,
        laws,
        limits,
        is_free=np.array([float(name in bounds) for name in VARIABLES]),
        low=box[:, 0],
        high=box[:, 1],
        objective=float(list(OBJECTIVES).index(objective)),
    )


def _with_draft(hardware: Hardware) -> Hardware:
    """With devices of the draft spelled out: choices of one structure are searched in one call."""
    return hardware._replace(draft=draft_devices(hardware))


def _require_identified(
    names: tuple[str, ...], template: Design, hardware: Hardware, laws: Laws
) -> None:
    """Raises ValueError if width and depth are free and nothing prices one against the other.

    Time then depends on the number of parameters alone, or loss does. In the first case the optimum
    is as narrow and deep, in the second as wide and shallow as the box allows; in both, any.
    """
    if not {"d_model", "n_layers"} <= set(names):
        return
    devices = draft_devices(hardware)
    stack = devices.stack
    per_layer = float(stack.layer_seconds)
    if float(devices.tensor_parallel) > 1:
        per_layer += float(stack.collective_seconds) + float(stack.hop_seconds)
    size = float(law_parameters(template.shape, laws.loss.embeddings_counted))
    one, other = (float(loss(laws.loss, size, template.tokens, ratio)) for ratio in (50.0, 100.0))
    missing = []
    if per_layer == 0:
        missing.append("a layer costs no time of its own (Stack.layer_seconds is 0)")
    if one == other:
        missing.append(
            f"the loss law, {type(laws.loss).__name__}, does not depend on d_model / n_layers"
        )
    if missing:
        raise ValueError(
            "width and depth are not identified: "
            + " and ".join(missing)
            + ", so the answer would be a corner of the box. Free one of d_model and n_layers and "
            "fix the other, or give a stack with layer_seconds and a loss law with a shape term "
            "(costmodel.SHAPE_AWARE_SDSL)"
        )


def _continuous(problems: list[Problem], names: tuple[str, ...]) -> list[np.ndarray]:
    """The smooth optimum of every problem: `[4, 7]` values of the variables, the best few ends.

    Problems of one structure, which is what choices of hardware and formats are, share a call.
    """
    starts = np.full((_NUM_STARTS, len(VARIABLES)), 0.5)
    starts[:, [VARIABLES.index(name) for name in names]] = _starts(len(names))
    # One problem or chunks of eight: every other number would compile anew.
    size = 1 if len(problems) == 1 else _CHUNK
    points = []
    for first in range(0, len(problems), size):
        some = problems[first : first + size]
        padded = some + some[:1] * (size - len(some))
        stacked = jax.tree.map(
            lambda *leaves: np.stack([np.asarray(x, np.float64) for x in leaves]), *padded
        )
        logs = jax.device_get(_search_all(stacked, starts))
        points += list(np.exp(logs[: len(some)]))
    return points


def _cost(problem: Problem, point: Array, sharpness: ArrayLike) -> Array:
    """What the smooth search minimises, at `[7]` places in the unit cube."""
    logs = problem.low + point * (problem.high - problem.low)
    design, workload = assign(problem, jnp.exp(logs))
    estimate = throughput(design, problem.target, problem.hardware, workload, problem.laws)
    total = minimised(problem, estimate)
    for excess in excesses(problem, design, estimate):
        limited = jnp.isfinite(excess)
        excess = jnp.where(limited, excess, -1)
        smooth = jax.nn.softplus(sharpness * excess) / sharpness
        total += jnp.where(limited, _PENALTY * smooth, 0)
    return total


# Forward mode: the variables are few, and it compiles several times faster.
_slope = jax.jacfwd(_cost, argnums=1)


def _descend(problem: Problem, start: Array) -> Array:
    """Adam from one start, the limits growing harder on the way."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, _NUM_ADAM_STEPS, alpha=0.002))

    def step(i: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        point, state = carry
        done = i.astype(point.dtype) / _NUM_ADAM_STEPS
        ratio = _LAST_SHARPNESS / _FIRST_SHARPNESS
        gradient = _slope(problem, point, _FIRST_SHARPNESS * ratio**done)
        # One start that meets an infinity must not keep it in its averages.
        gradient = jnp.where(jnp.isfinite(gradient), gradient, 0)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, point)
        moved: Any = optax.apply_updates(point, updates)
        return optax.projections.projection_box(moved, 0.0, 1.0), state

    state = optimizer.init(start)
    return jax.lax.fori_loop(0, _NUM_ADAM_STEPS, step, (start, state))[0]


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None))
def _search_all(problem: Problem, starts: Array) -> Array:
    """`[4, 7]` logarithms at the best ends of all starts."""
    ends = jax.vmap(functools.partial(_descend, problem))(starts)
    values = jax.vmap(functools.partial(_cost, problem, sharpness=_LAST_SHARPNESS))(ends)
    best = ends[jnp.argsort(jnp.where(jnp.isnan(values), jnp.inf, values))[:_NUM_ENDS]]
    return problem.low[None] + best * (problem.high - problem.low)[None]


def _starts(num_variables: int) -> np.ndarray:
    """`[64, n]` points that fill the unit cube evenly, the same ones every time."""
    # A rank-one lattice: the multiples of powers of a root of x^(n + 1) = x + 1, modulo 1.
    root = 1.5
    for _ in range(50):
        root = (1 + root) ** (1 / (num_variables + 1))
    steps = root ** -np.arange(1, num_variables + 1, dtype=np.float64)
    return (0.5 + np.arange(1, _NUM_STARTS + 1)[:, None] * steps[None, :]) % 1.0


def _round(
    problem: Problem, points: np.ndarray, names: tuple[str, ...], width_multiple: int
) -> "Solution | str":
    """The best design of the lattice around the smooth optima, or why there is none."""
    lattice = Lattice(names, problem, width_multiple)
    found = round_design(lattice, points, _evaluator(names, problem))
    if isinstance(found, str):
        return found
    workload = problem.workload._replace(batch=found.batch)
    estimate = _estimate(found.design, problem, workload)
    smooth_design, smooth_load = jax.device_get(assign(problem, jnp.asarray(points[0])))
    smooth_estimate = _estimate(smooth_design, problem, smooth_load)
    objective = list(OBJECTIVES)[int(problem.objective)]
    at_smooth = float(OBJECTIVES[objective](smooth_estimate))
    reached = float(OBJECTIVES[objective](estimate))
    sign = 1.0 if objective in FALLING else -1.0
    continuous = {name: float(points[0][VARIABLES.index(name)]) for name in names}
    if "tokens" in names:
        continuous["tokens"] = float(smooth_design.tokens)
    return Solution(
        design=found.design,
        workload=workload,
        hardware=problem.hardware,
        target=problem.target,
        estimate=estimate,
        objective=math.exp(sign * reached),
        continuous=continuous,
        continuous_objective=math.exp(sign * at_smooth),
        rounding_loss=math.expm1(reached - at_smooth),
        plain=float(found.design.gamma) == 0,
    )


def _estimate(design: Design, problem: Problem, workload: Workload) -> Estimate:
    """The estimate, compiled: outside a jit it is a thousand small computations."""
    question = design, problem.target, problem.hardware, workload, problem.laws
    return jax.device_get(_compiled_throughput(*as_float64(question)))


# Called with numbers of one type, or an int in place of a float would compile anew.
_compiled_throughput = jax.jit(throughput)


def as_float64(tree: Any) -> Any:
    """Every leaf as a number of double precision."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def _evaluator(
    names: tuple[str, ...], problem: Problem
) -> Callable[[Problem, Design, Array], tuple[Array, Array, Array]]:
    """The compiled cost of `[C]` designs: what is minimised, `[C, limits]` excesses, tokens."""
    # More training is better, up to the budget, for every objective but the one that pays for it.
    has_best_tokens = list(OBJECTIVES)[int(problem.objective)] == "total_cost"
    if "tokens" in names and has_best_tokens:
        return _evaluate_with_best_tokens
    return _evaluate_with_most_tokens


def _evaluate(problem: Problem, design: Design, batch: Array) -> tuple[Array, Array, Array]:
    """The cost of one design, its excesses, and the tokens that it can be trained on."""
    design = within_budget(problem, design)
    workload = problem.workload._replace(batch=batch)
    estimate = throughput(design, problem.target, problem.hardware, workload, problem.laws)
    excess = jnp.stack(excesses(problem, design, estimate))
    return minimised(problem, estimate), excess, design.tokens


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0, 0))
def _evaluate_with_most_tokens(
    problem: Problem, design: Design, batch: Array
) -> tuple[Array, Array, Array]:
    return _evaluate(problem, design, batch)


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0, 0))
def _evaluate_with_best_tokens(
    problem: Problem, design: Design, batch: Array
) -> tuple[Array, Array, Array]:
    place = VARIABLES.index("tokens")
    tokens = _best_tokens(
        lambda count: _evaluate(problem, design._replace(tokens=count), batch)[0],
        problem.low[place],
        problem.high[place],
    )
    return _evaluate(problem, design._replace(tokens=tokens), batch)


def evaluate_designs(
    problem: Problem, names: tuple[str, ...], pairs: list[tuple[Design, float]]
) -> tuple[np.ndarray, np.ndarray]:
    """What is minimised, and the largest excess, of many designs with their batch, in one call."""
    designs = jax.tree.map(lambda *x: np.array(x, np.float64), *(design for design, _ in pairs))
    if "tokens" in names:
        most = float(np.exp(problem.high[VARIABLES.index("tokens")]))
        designs = designs._replace(tokens=np.full(len(pairs), most))
    batch: Any = np.array([size for _, size in pairs], np.float64)
    question = as_float64(problem)
    costs, excess, _ = jax.device_get(_evaluator(names, problem)(question, designs, batch))
    return np.where(np.isnan(costs), np.inf, costs), excess.max(axis=1)


def _best_tokens(cost: Callable[[Array], Array], low: Array, high: Array) -> Array:
    """Minimises a function of the training tokens, smooth with one minimum, by zooming in."""
    for _ in range(4):
        grid = jnp.linspace(low, high, 33)
        best = jnp.argmin(jax.vmap(lambda x: cost(jnp.exp(x)))(grid))
        low, high = grid[jnp.maximum(best - 1, 0)], grid[jnp.minimum(best + 1, 32)]
    return jnp.exp((low + high) / 2)


def _at_bound(
    solution: Solution,
    problem: Problem,
    bounds: dict[str, tuple[float, float]],
) -> tuple[str, ...]:
    """What the answer leans on: bounds of the box, and limits that are nearly met."""
    leaning = []
    if solution.plain:
        return ()
    for name, (low, high) in bounds.items():
        value = solution.continuous[name]
        if value <= low * 1.001:
            leaning.append(f"{name} at its lower bound {low:g}")
        elif value >= high / 1.001:
            leaning.append(f"{name} at its upper bound {high:g}")
    every = excesses(problem, solution.design, solution.estimate)
    for name, excess in zip(LIMIT_NAMES, every, strict=True):
        if float(excess) > -0.02:
            leaning.append(name)
    return tuple(leaning)
