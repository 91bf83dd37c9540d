"""The gradient search against exhaustive grids, its limits, and what it refuses."""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import (
    A100,
    COMPILED,
    FOUR_H100,
    H100,
    IDEAL,
    LLAMA_8B,
    LLAMA_70B,
    TARGET,
    cubic_shape,
)

from jaxsd import costmodel

FREE = ("d_model", "n_layers", "gamma")
TEMPLATE = costmodel.draft_template(LLAMA_70B, tokens=1e12)
# The factor of the shape without the range it was fitted on: any width and depth.
ANY_SHAPE = costmodel.SHAPE_AWARE_SDSL._replace(
    loss=costmodel.SHAPE_AWARE._replace(fitted=costmodel.LossRange())
)


@jax.jit
def _grid_estimates(template, target, hardware, workload, laws, layers, widths, gammas):
    """Every combination, by the public function alone."""

    def one(n_layers, d_model, gamma):
        shape = template.shape
        scale = d_model / shape.d_model
        shape = shape._replace(
            d_model=d_model,
            n_layers=n_layers,
            n_heads=shape.n_heads * scale,
            n_kv_heads=jnp.maximum(jnp.round(shape.n_kv_heads * scale), 1),
            d_ff=jnp.round(shape.d_ff * scale / 128) * 128,
        )
        design = template._replace(shape=shape, gamma=gamma)
        result = costmodel.throughput(design, target, hardware, workload, laws)
        return result.tokens_per_second, result.memory.excess_ratio

    over_gamma = jax.vmap(one, (None, None, 0))
    over_width = jax.vmap(over_gamma, (None, 0, None))
    return jax.vmap(over_width, (0, None, None))(layers, widths, gammas)


def exhaustive(template, target, hardware, workload, laws, widths=None, layers=None):
    """The best of a grid under the limits of the search, or plain decoding."""
    layers = np.arange(1.0, 49.0) if layers is None else layers
    widths = 128.0 * np.arange(1, 49) if widths is None else widths
    gammas = np.arange(0.0, 33.0)
    question = jax.tree.map(
        lambda x: np.asarray(x, np.float32), (template, target, hardware, workload, laws)
    )
    rates, excess = _grid_estimates(*question, *(np.float32(x) for x in (layers, widths, gammas)))
    ratio = widths[None, :] / layers[:, None]
    fitted = laws.loss.fitted
    allowed = (ratio >= fitted.min_aspect_ratio) & (ratio <= fitted.max_aspect_ratio)
    allowed &= layers[:, None] >= fitted.min_layers
    ok = (np.asarray(excess) <= 1) & (allowed[:, :, None] | (gammas == 0))
    rates = np.where(ok, rates, 0)
    i, j, k = np.unravel_index(np.argmax(rates), rates.shape)
    return float(rates[i, j, k]), int(layers[i]), int(widths[j]), int(gammas[k])


def test_published_regime_equals_brute_force():
    """A target of 65B on four A100s, 50 us a layer: five layers, as Yan et al. found by trial."""
    width = math.sqrt(65e9 / 12 / 80)
    target = costmodel.Target(cubic_shape(width, 80.0), 1e12)
    stack = costmodel.Stack(0.8, 0.8, 200e-6, 50e-6, 0.0, 0.0, 64.0, 0.0)
    hardware = costmodel.Hardware(costmodel.Devices(A100, stack, 4))
    template = costmodel.Design(cubic_shape(1024.0, 8.0), 1e12, 4.0)
    load = costmodel.Workload(1, 0)
    result = costmodel.search(target, hardware, template, FREE, workload=load, laws=ANY_SHAPE)
    best = result.best
    grid = exhaustive(template, target, hardware._replace(draft=hardware.target), load, ANY_SHAPE)
    # Heads of 128 on four chips: widths are multiples of 512, so the grid is cut to those too.
    coarse = exhaustive(
        template,
        target,
        hardware._replace(draft=hardware.target),
        load,
        ANY_SHAPE,
        widths=512.0 * np.arange(1, 13),
    )
    shape = best.design.shape
    assert (shape.n_layers, shape.d_model, best.design.gamma) == coarse[1:]
    assert best.objective == pytest.approx(coarse[0], rel=1e-5)
    assert grid[1:] == (5, 2304, 6)
    assert best.continuous["n_layers"] == pytest.approx(4.8, abs=0.3)
    assert best.continuous["d_model"] == pytest.approx(2300, rel=0.05)
    assert best.continuous_objective >= grid[0] * (1 - 1e-5)
    # The draft on one chip of the four: its widths are multiples of 128 then.
    one_chip = costmodel.Hardware(hardware.target, costmodel.Devices(A100, stack, 1))
    fine = costmodel.search(target, one_chip, template, FREE, workload=load, laws=ANY_SHAPE).best
    expected = exhaustive(template, target, one_chip, load, ANY_SHAPE)
    assert (fine.design.shape.n_layers, fine.design.shape.d_model, fine.design.gamma) == expected[
        1:
    ]


@pytest.mark.parametrize("seed", range(20))
def test_random_problems_are_within_half_a_percent_of_an_exhaustive_grid(seed):
    rng = np.random.default_rng(seed)
    shape = (LLAMA_8B, LLAMA_70B)[seed % 2]
    target = costmodel.Target(shape, 10 ** rng.uniform(12, 13.5))
    chip = (H100, A100)[rng.integers(2)]
    chip = chip._replace(bytes_per_second=chip.bytes_per_second * rng.uniform(0.5, 2))
    stack = costmodel.Stack(
        rng.uniform(0.5, 0.9),
        rng.uniform(0.3, 0.8),
        10 ** rng.uniform(-5, -3.5),
        10 ** rng.uniform(-5, -3.3),
        10 ** rng.uniform(-6, -4.5),
        1e-6,
        rng.uniform(2, 16),
        10 ** rng.uniform(-6, -3),
    )
    devices = costmodel.Devices(chip, stack, 8)
    hardware = costmodel.Hardware(devices, devices._replace(tensor_parallel=1))
    load = costmodel.Workload(float(2 ** rng.integers(0, 8)), float(rng.integers(1, 8192)))
    template = costmodel.draft_template(shape, tokens=10 ** rng.uniform(11, 13))
    result = costmodel.search(target, hardware, template, FREE, workload=load)
    best = result.best
    rate, *_ = exhaustive(template, target, hardware, load, costmodel.SHAPE_AWARE_SDSL)
    assert best.objective >= rate * (1 - 5e-3)
    # What it says of its answer is what the public function says.
    again = costmodel.throughput(
        best.design, target, hardware, best.workload, costmodel.SHAPE_AWARE_SDSL
    )
    assert float(again.tokens_per_second) == pytest.approx(best.objective, rel=1e-5)
    assert float(again.memory.excess_ratio) <= 1


def test_a_shape_can_be_built():
    free = ("d_model", "n_layers", "ff_ratio", "n_kv_heads", "tokens", "gamma", "batch")
    result = costmodel.search(
        TARGET,
        FOUR_H100,
        TEMPLATE,
        free,
        workload=costmodel.Workload(context=2048),
        limits=costmodel.Limits(training_flops=1e21, seconds_per_token=0.02),
    )
    best = result.best
    shape = best.design.shape
    assert shape.d_model % 512 == 0  # whole heads of 128 on four chips
    assert shape.d_ff % 128 == 0
    assert shape.n_heads * shape.head_dim == shape.d_model
    assert shape.n_heads % shape.n_kv_heads == 0
    assert shape.n_kv_heads % 4 == 0 or 4 % shape.n_kv_heads == 0
    whole = (shape.d_model, shape.n_layers, shape.d_ff, shape.n_kv_heads, best.design.gamma)
    assert all(value == int(value) for value in (*whole, best.workload.batch))
    # The budget is spent to the last FLOP, and no limit is broken.
    assert float(best.estimate.training_flops) == pytest.approx(1e21, rel=1e-9)
    assert float(best.estimate.seconds_per_token) <= 0.02
    assert float(best.estimate.memory.excess_ratio) <= 1
    assert "training FLOPs of the draft" in result.at_bound
    assert "time per token" in result.at_bound


def test_choices_are_enumerated_and_the_infeasible_named():
    one = costmodel.Devices(H100, COMPILED)
    choices = costmodel.hardware_choices(one, 4, LLAMA_70B)
    placements = {
        (c.target.tensor_parallel, c.draft.tensor_parallel, c.draft_apart) for c in choices
    }
    assert (4, 1, 0.0) in placements
    assert (2, 2, 1.0) in placements
    assert (4, 1, 1.0) not in placements  # five chips
    result = costmodel.search(TARGET, choices, TEMPLATE, FREE)
    assert len(result.solutions) + len(result.infeasible) == len(choices)
    assert all("memory of a chip is" in reason for reason in result.infeasible)
    assert int(result.best.hardware.target.tensor_parallel) == 4
    rates = [solution.objective for solution in result.solutions]
    assert rates == sorted(rates, reverse=True)
    alone = costmodel.search(TARGET, result.best.hardware, TEMPLATE, FREE).best
    assert alone.design == result.best.design


def test_formats_are_choices_too():
    int8 = TEMPLATE._replace(formats=costmodel.INT8)
    best = costmodel.search(TARGET, FOUR_H100, [TEMPLATE, int8], FREE).best
    assert best.design.formats.weight_bytes == 1.0


def test_what_does_not_fit_is_refused_with_the_reason_and_by_how_much():
    one = costmodel.Hardware(costmodel.Devices(A100, COMPILED))
    with pytest.raises(ValueError, match=r"memory of a chip is 1\.9\d times what is allowed"):
        costmodel.search(TARGET, one, TEMPLATE, FREE)
    hurry = costmodel.Limits(seconds_per_token=1e-4)
    with pytest.raises(ValueError, match=r"time per token is \d+\.?\d* times"):
        costmodel.search(TARGET, FOUR_H100, TEMPLATE, FREE, limits=hurry)


def test_no_speculation_is_an_answer():
    """A batch so large that every verified token costs its arithmetic."""
    slow = costmodel.Chip(1e12, 0, 0, 3.35e12, 80e9, 450e9)
    hardware = costmodel.Hardware(costmodel.Devices(slow, COMPILED, 4))
    load = costmodel.Workload(64, 128)
    result = costmodel.search(TARGET, hardware, TEMPLATE, FREE, workload=load)
    assert result.best.plain
    assert result.best.design.gamma == 0
    assert float(result.best.estimate.speedup) == 1


@pytest.mark.parametrize("objective", ["latency", "cost", "throughput_per_chip", "speedup"])
def test_other_objectives_agree_where_they_must(objective):
    """At a fixed batch and placement all of these are the time of a token."""
    best = costmodel.search(TARGET, FOUR_H100, TEMPLATE, FREE, objective=objective).best
    reference = costmodel.search(TARGET, FOUR_H100, TEMPLATE, FREE).best
    assert best.design == reference.design
    value = {
        "latency": best.estimate.seconds_per_token,
        "cost": best.estimate.cost_per_million_tokens,
        "throughput_per_chip": best.estimate.tokens_per_second / 4,
        "speedup": best.estimate.speedup,
    }[objective]
    assert best.objective == pytest.approx(float(value), rel=1e-9)


def test_training_is_worth_more_where_more_is_served():
    """Total cost alone bounds the training tokens from above, without a budget."""
    tokens = []
    for served in (1e9, 1e11):
        result = costmodel.search(
            TARGET,
            FOUR_H100,
            TEMPLATE,
            {"tokens": (1e9, 1e14), "gamma": (1, 16)},
            workload=costmodel.Workload(served_tokens=served),
            objective="total_cost",
        )
        best = result.best
        tokens.append(best.design.tokens)
        assert 1.1e9 < best.design.tokens < 0.9e14
        for factor in (0.9, 1.1):
            other = best.design._replace(tokens=factor * best.design.tokens)
            costs = costmodel.throughput(other, TARGET, best.hardware, best.workload).total_cost
            assert float(costs) > best.objective * (1 - 1e-6)
    assert tokens[1] > 5 * tokens[0]


@pytest.mark.parametrize(
    ("hardware", "laws", "reason"),
    [
        (FOUR_H100, costmodel.SDSL, "LossLaw, does not depend on d_model / n_layers"),
        (
            costmodel.Hardware(costmodel.Devices(H100, IDEAL)),
            costmodel.SHAPE_AWARE_SDSL,
            "a layer costs no time of its own",
        ),
    ],
)
def test_width_and_depth_that_nothing_tells_apart_are_not_answered(hardware, laws, reason):
    with pytest.raises(ValueError, match=f"width and depth are not identified: .*{reason}"):
        costmodel.search(TARGET, hardware, TEMPLATE, FREE, laws=laws)
    # One of the two is fine.
    eight = costmodel.Hardware(hardware.target._replace(tensor_parallel=8))
    assert not costmodel.search(TARGET, eight, TEMPLATE, ("d_model", "gamma"), laws=laws).best.plain


def test_new_numbers_do_not_compile_anew(monkeypatch):
    costmodel.search(TARGET, FOUR_H100, TEMPLATE, FREE)
    traces = []
    # The function `search` hides the module of its name.
    search_module = sys.modules["jaxsd.costmodel.search"]
    original = search_module.throughput
    monkeypatch.setattr(
        search_module, "throughput", lambda *args: traces.append(1) or original(*args)
    )
    faster = FOUR_H100._replace(target=FOUR_H100.target._replace(chip=A100))
    costmodel.search(
        TARGET._replace(tokens=2e12),
        faster,
        TEMPLATE._replace(tokens=3e11),
        FREE,
        workload=costmodel.Workload(4, 100),
        limits=costmodel.Limits(draft_parameters=3e8),
    )
    assert not traces
    costmodel.search(TARGET, faster, TEMPLATE, ("n_layers", "tokens"), objective="latency")
    assert not traces
    kaplan = costmodel.SHAPE_AWARE._replace(base=costmodel.KAPLAN)
    laws = costmodel.SDSL._replace(loss=kaplan)
    costmodel.search(TARGET, faster, TEMPLATE, FREE, laws=laws)
    assert traces, "a law of another form must compile, or this test cannot fail"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"free": ["width"]}, "must be one or more of d_model, n_layers"),
        ({"free": []}, "must be one or more of"),
        ({"free": "gamma"}, "must be a sequence of names"),
        ({"free": {"gamma": (4, 1)}}, "must be positive, finite and rising"),
        ({"free": {"gamma": (4,)}}, "must be a pair"),
        ({"objective": "speed"}, "objective='speed' must be one of throughput"),
        ({"objective": "total_cost"}, "workload.served_tokens=0 must be positive"),
        ({"hardware": []}, "at least one choice"),
        ({"target": TARGET._replace(tokens=-1)}, r"target\.tokens=-1"),
    ],
)
def test_wrong_questions_are_refused_by_name(change, message):
    given = {"target": TARGET, "hardware": FOUR_H100, "template": TEMPLATE, "free": FREE} | change
    with pytest.raises(ValueError, match=message):
        costmodel.search(**given)
