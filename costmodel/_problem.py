"""What is searched, under which limits, for which objective?"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from ._inputs import as_floats
from .draft_size import LARGEST_DRAFT
from .estimate import Design, Estimate, Hardware, Target, Workload, law_parameters
from .laws import Laws
from .shapes import Number, parameters_total, training_flops

# What may be free, and the range that is searched where none is given.
DEFAULT_BOUNDS = {
    "d_model": (128.0, 16384.0),
    "n_layers": (1.0, 128.0),
    "ff_ratio": (1.0, 8.0),  # d_ff / d_model
    "n_kv_heads": (1.0, 64.0),
    "tokens": (1e9, 1e14),  # to train on
    "gamma": (0.25, 64.0),
    "batch": (1.0, 1024.0),
}
VARIABLES = tuple(DEFAULT_BOUNDS)
# What may be asked for; each is the logarithm of something to be small.
OBJECTIVES: dict[str, Callable[[Estimate], Array]] = {
    "throughput": lambda estimate: -jnp.log(estimate.tokens_per_second),
    "throughput_per_chip": lambda e: jnp.log(e.num_chips) - jnp.log(e.tokens_per_second),
    "speedup": lambda estimate: -jnp.log(estimate.speedup),
    "latency": lambda estimate: jnp.log(estimate.seconds_per_token),
    "cost": lambda estimate: jnp.log(estimate.cost_per_million_tokens),
    "total_cost": lambda estimate: jnp.log(estimate.total_cost),
}


# Objectives that are better when small: their own unit is what is minimised.
FALLING = ("latency", "cost", "total_cost")


class Limits(NamedTuple):
    """What a design may not exceed; memory is always among it. Smooth in the search, hard after."""

    training_flops: Number = jnp.inf  # of the draft
    time_to_first_token_seconds: Number = jnp.inf
    seconds_per_token: Number = jnp.inf  # of one sequence
    draft_parameters: Number = jnp.inf  # in total
    draft_memory_bytes: Number = jnp.inf  # of one chip, weights and caches
    draft_share: Number = LARGEST_DRAFT  # of the target's parameters, as the loss law counts


class Problem(NamedTuple):
    """One question: what is given, and the box in which the free variables are searched."""

    template: Design  # what is not free, and the proportions of what follows the width
    target: Target
    hardware: Hardware
    workload: Workload
    laws: Laws
    limits: Limits
    # What is free and what is asked for are numbers too: another choice compiles nothing anew.
    is_free: Any  # [7] 1 or 0, in the order of `VARIABLES`
    low: Any  # [7] logarithms of the bounds; both the value itself where it is not free
    high: Any  # [7]
    objective: Any  # [] place in `OBJECTIVES`


def minimised(problem: Problem, estimate: Estimate) -> Array:
    """The logarithm that the problem's objective makes small."""
    every = as_floats(*(objective(estimate) for objective in OBJECTIVES.values()))
    # An index, not a sum of products: an objective that is not asked for may be infinite.
    return jnp.stack(every)[jnp.asarray(problem.objective, jnp.int32)]


def assign(problem: Problem, values: Array) -> tuple[Design, Workload]:
    """The design and workload at `[7]` values of the variables; what is not free follows."""
    free = [flag > 0 for flag in problem.is_free]
    shape = problem.template.shape
    width, layers, ff_ratio, kv, tokens, gamma, batch = values
    scale = jnp.where(free[0], width / shape.d_model, 1.0)
    new_shape = shape._replace(
        d_model=shape.d_model * scale,
        n_layers=jnp.where(free[1], layers, shape.n_layers),
        n_heads=shape.n_heads * scale,
        n_kv_heads=jnp.maximum(jnp.where(free[3], kv, shape.n_kv_heads * scale), 1.0),
        d_ff=jnp.where(free[2], ff_ratio * shape.d_model, shape.d_ff) * scale,
    )
    design = problem.template._replace(
        shape=new_shape,
        tokens=jnp.where(free[4], tokens, problem.template.tokens),
        gamma=jnp.where(free[5], gamma, problem.template.gamma),
    )
    batch = jnp.where(free[6], batch, problem.workload.batch)
    return within_budget(problem, design), problem.workload._replace(batch=batch)


def within_budget(problem: Problem, design: Design) -> Design:
    """The design, where its training tokens are free, with no more than the budget pays for."""
    affordable = problem.limits.training_flops / training_flops(design.shape, 1.0)
    free = problem.is_free[VARIABLES.index("tokens")] > 0
    tokens = jnp.where(free, jnp.minimum(design.tokens, affordable), design.tokens)
    return design._replace(tokens=tokens)


# What `excesses` reports, in its order.
LIMIT_NAMES = (
    "memory of a chip",
    "time to first token",
    "time per token",
    "training FLOPs of the draft",
    "parameters of the draft",
    "memory of the draft",
    "the draft's share of the target",
    "the loss law's greatest d_model / n_layers",
    "the loss law's least d_model / n_layers",
    "the loss law's least number of layers",
)
_NUM_WITHOUT_DRAFT = 3  # of these, plain decoding has to meet so many


def excesses(problem: Problem, design: Design, estimate: Estimate) -> list[Array]:
    """ln(value / limit) of everything that is limited: above 0 is too much."""
    limits, laws, shape = problem.limits, problem.laws, design.shape
    counted, fitted = laws.loss.embeddings_counted, laws.loss.fitted
    share = law_parameters(shape, counted) / law_parameters(problem.target.shape, counted)
    ratio = shape.d_model / shape.n_layers
    pairs = (
        (estimate.memory.excess_ratio, 1.0),
        (estimate.time_to_first_token_seconds, limits.time_to_first_token_seconds),
        (estimate.seconds_per_token, limits.seconds_per_token),
        (estimate.training_flops, limits.training_flops),
        (parameters_total(shape), limits.draft_parameters),
        (estimate.memory.draft_bytes, limits.draft_memory_bytes),
        (share, limits.draft_share),
        (ratio, fitted.max_aspect_ratio),
        (fitted.min_aspect_ratio, ratio),
        (fitted.min_layers, shape.n_layers),
    )
    out = []
    for index, (value, limit) in enumerate(pairs):
        value_, limit_, gamma = as_floats(value, limit, design.gamma)
        limited = jnp.isfinite(limit_)
        if index >= _NUM_WITHOUT_DRAFT:
            limited &= gamma > 0
        value_ = jnp.maximum(value_, jnp.finfo(value_.dtype).tiny)
        excess = jnp.log(value_) - jnp.log(jnp.where(limited, limit_, 1))
        out.append(jnp.where(limited, excess, -jnp.inf))
    return out
