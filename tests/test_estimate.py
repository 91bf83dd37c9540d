"""The one function that joins laws, shapes, chips and acceptance."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64
from examples import (
    A100,
    COMPILED,
    DRAFT,
    FOUR_H100,
    H100,
    IDEAL,
    LLAMA_1B,
    LLAMA_8B,
    LLAMA_70B,
    MIXTRAL,
    TARGET,
    cubic_shape,
)
from hypothesis import given

from jaxsd import costmodel

# Every overhead above 0, so that every one has a slope to check.
STACK = costmodel.Stack(0.8, 0.7, 1e-4, 47.5e-6, 20.6e-6, 1e-6, 8.0, 2e-4)
APART = costmodel.Hardware(
    costmodel.Devices(H100, STACK, 4, 2.5), costmodel.Devices(A100, STACK, 2, 1.5), draft_apart=1.0
)
LOAD = costmodel.Workload(16, 4096, 2048, 8192, 1e12)
QUESTION = (
    costmodel.Design(LLAMA_1B, 9e12, 4.5),
    TARGET,
    APART,
    LOAD,
    costmodel.SHAPE_AWARE_SDSL,
)


def estimate(design=DRAFT, target=TARGET, hardware=FOUR_H100, load=LOAD, laws=costmodel.SDSL):
    return costmodel.throughput(design, target, hardware, load, laws)


def test_the_parts_of_a_round_add_up_to_it():
    result = estimate(hardware=APART)
    parts = result.round
    total = parts.draft_seconds + parts.verify_seconds + parts.host_seconds + parts.transfer_seconds
    assert float(total) == pytest.approx(float(parts.seconds), rel=1e-6)
    for time in (parts.draft_step, parts.verify_pass, parts.plain_pass):
        fields = time.fixed_seconds, time.layers_seconds, time.collectives_seconds
        assert float(sum(fields) + time.roofline_seconds) == pytest.approx(
            float(time.seconds), rel=1e-6
        )


def test_tokens_per_second_is_the_formula_from_public_parts():
    result, gamma = estimate(), 5

    def seconds(shape, rows):
        return float(costmodel.pass_seconds(shape, H100, 16, rows, 4096, 4, stack=COMPILED))

    drafting = (gamma - 1) * seconds(LLAMA_1B, 1) + seconds(LLAMA_1B, 2)
    round_seconds = drafting + seconds(LLAMA_70B, gamma + 1)
    x = costmodel.perplexity(costmodel.BESIROGLU, costmodel.parameters_total(LLAMA_1B), 9e12)
    y = costmodel.perplexity(costmodel.BESIROGLU, costmodel.parameters_total(LLAMA_70B), 15e12)
    alpha = costmodel.acceptance(costmodel.SDSL_ACCEPTANCE, x, y)
    tokens = float(costmodel.expected_tokens(alpha, gamma))
    assert float(result.alpha) == pytest.approx(float(alpha), rel=1e-6)
    assert float(result.tokens_per_second) == pytest.approx(16 * tokens / round_seconds, rel=1e-5)
    plain = seconds(LLAMA_70B, 1)
    assert float(result.plain_tokens_per_second) == pytest.approx(16 / plain, rel=1e-5)
    assert float(result.speedup) == pytest.approx(tokens * plain / round_seconds, rel=1e-5)
    assert float(result.seconds_per_token) == pytest.approx(round_seconds / tokens, rel=1e-5)


def test_no_draft_tokens_are_plain_decoding_to_the_last_bit():
    for hardware in (FOUR_H100, APART):
        result = estimate(DRAFT._replace(gamma=0), hardware=hardware)
        assert float(result.speedup) == 1.0
        assert float(result.tokens_per_round) == 1.0
        assert float(result.round.draft_seconds) == 0.0
        assert float(result.memory.draft_bytes) == 0.0
        assert float(result.num_chips) == 4
        assert float(result.training_cost) == 0


def test_without_overheads_it_is_the_scaling_laws_speedup(x64):
    """Bytes alone, an ideal stack: cost ratio N / M, which is eq. 1 of SDSL."""
    target = costmodel.Target(cubic_shape(8192.0, 80.0), 15e12)
    draft = costmodel.Design(cubic_shape(1024.0, 24.0), 2e12, 7.0)
    endless = H100._replace(flops_per_second=1e30)
    hardware = costmodel.Hardware(costmodel.Devices(endless, IDEAL))
    load = costmodel.Workload(1, 0)
    no_cache = costmodel.Formats(kv_bytes=1e-30)
    result = estimate(
        draft._replace(formats=no_cache), target._replace(formats=no_cache), hardware, load
    )
    ratio = costmodel.parameters_read(draft.shape) / costmodel.parameters_read(target.shape)
    assert float(result.speedup) == pytest.approx(
        float(costmodel.speedup(result.alpha, 7, ratio)), rel=1e-6
    )


def test_measured_acceptance_takes_the_place_of_the_law():
    measured = costmodel.SDSL._replace(acceptance=costmodel.MeasuredAcceptance(0.8))
    result = estimate(laws=measured)
    assert float(result.alpha) == pytest.approx(0.8)
    assert float(result.tokens_per_round) == pytest.approx(
        float(costmodel.expected_tokens(0.8, 5)), rel=1e-6
    )
    shares = 0.8 ** np.arange(1, 8)
    by_position = costmodel.SDSL._replace(acceptance=costmodel.PositionAcceptance(shares))
    same = estimate(laws=by_position)
    assert float(same.tokens_per_round) == pytest.approx(float(result.tokens_per_round), rel=1e-5)
    assert float(same.alpha) == pytest.approx(0.8, rel=1e-4)


def test_perplexity_scale_feeds_the_acceptance_law_what_was_measured():
    scale = costmodel.PerplexityScale(0.3, 1.1)
    result = estimate(laws=costmodel.SDSL._replace(perplexity_scale=scale))
    plain = estimate()
    assert float(result.draft_perplexity) == pytest.approx(
        float(np.exp(0.3 + 1.1 * np.log(plain.draft_perplexity))), rel=1e-5
    )
    alpha = costmodel.acceptance(
        costmodel.SDSL_ACCEPTANCE, result.draft_perplexity, result.target_perplexity
    )
    assert float(result.alpha) == pytest.approx(float(alpha), rel=1e-6)
    assert float(result.alpha) != pytest.approx(float(plain.alpha), rel=1e-3)


def test_memory_counts_weights_and_caches_of_the_fullest_chip():
    result = estimate()
    room = 8192 + 5 + 1
    target = float(costmodel.memory_bytes(LLAMA_70B, 16, room)) / 4
    draft = float(costmodel.memory_bytes(LLAMA_1B, 16, room)) / 4
    assert float(result.memory.target_bytes) == pytest.approx(target, rel=1e-5)
    assert float(result.memory.draft_bytes) == pytest.approx(draft, rel=1e-5)
    excess = (target + draft) / (0.9 * 80e9)
    assert float(result.memory.excess_ratio) == pytest.approx(excess, rel=1e-5)
    apart = estimate(hardware=APART).memory
    assert float(apart.excess_ratio) == pytest.approx(target / (0.9 * 80e9), rel=1e-5)


def test_a_draft_on_its_own_chips_hands_over_its_distributions():
    result = estimate(hardware=APART)
    size = 16 * 5 * 128256 * 4
    expected = size / 300e9 + 2 * STACK.hop_seconds
    assert float(result.round.transfer_seconds) == pytest.approx(expected, rel=1e-5)
    assert float(result.num_chips) == 6
    per_hour = 4 * 2.5 + 2 * 1.5
    rate = float(result.tokens_per_second)
    assert float(result.cost_per_million_tokens) == pytest.approx(
        1e6 * per_hour / 3600 / rate, rel=1e-5
    )
    assert float(estimate().round.transfer_seconds) == 0


def test_costs_of_training_and_serving():
    result = estimate(hardware=APART)
    flops = 6 * costmodel.parameters_active(LLAMA_1B) * 9e12
    assert float(result.training_flops) == pytest.approx(flops, rel=1e-5)
    training = flops / (989e12 * 0.4) / 3600 * 2.5
    assert float(result.training_cost) == pytest.approx(training, rel=1e-5)
    serving = 1e12 / 1e6 * float(result.cost_per_million_tokens)
    assert float(result.total_cost) == pytest.approx(training + serving, rel=1e-5)


def test_first_token_waits_for_both_models():
    result = estimate()

    def read(shape):
        return float(costmodel.pass_seconds(shape, H100, 1, 2048, 0, 4, stack=COMPILED))

    assert float(result.time_to_first_token_seconds) == pytest.approx(
        read(LLAMA_70B) + read(LLAMA_1B), rel=1e-5
    )
    with_prompt = estimate(load=LOAD._replace(prompt=None))
    longer = float(with_prompt.time_to_first_token_seconds)
    assert longer > float(result.time_to_first_token_seconds)  # the context of 4096 then


def alone(draft_apart=0.0, chip=H100, **overheads):
    """One chip without overheads but these."""
    devices = costmodel.Devices(chip, IDEAL._replace(**overheads))
    return costmodel.Hardware(devices, None, draft_apart)


@pytest.mark.parametrize(
    ("changes", "term"),
    [
        ({}, "verify memory"),
        ({"load": costmodel.Workload(2000, 16)}, "verify compute"),
        (
            {"hardware": alone(layer_seconds=1.0), "design": DRAFT._replace(gamma=3)},
            "verify layers",
        ),
        ({"design": DRAFT._replace(shape=LLAMA_8B, gamma=60.0)}, "draft memory"),
        ({"hardware": alone(host_seconds=1.0)}, "host"),
        ({"hardware": alone(1.0, H100._replace(link_bytes_per_second=1e6))}, "transfer"),
    ],
)
def test_the_largest_part_is_named(changes, term):
    assert costmodel.TERMS[int(estimate(**changes).binding)] == term


def test_extrapolation_is_reported_with_its_distance():
    result = estimate().extrapolation
    assert float(result.draft_parameters) == 0
    assert float(result.target_parameters) == pytest.approx(np.log(70553706496 / 16e9), rel=1e-5)
    assert float(result.target_tokens) == pytest.approx(np.log(15e12 / 500e9), rel=1e-5)
    assert float(result.target_perplexity) < 0
    deep = DRAFT._replace(shape=LLAMA_1B._replace(n_layers=2))
    outside = estimate(deep, laws=costmodel.SHAPE_AWARE_SDSL).extrapolation
    assert float(outside.draft_layers) == pytest.approx(np.log(2 / 3), rel=1e-5)
    assert float(outside.draft_aspect_ratio) == pytest.approx(np.log(1024 / 384), rel=1e-5)
    inside = estimate(
        costmodel.Design(LLAMA_1B, 400e9, 4),
        costmodel.Target(LLAMA_8B, 400e9),
        laws=costmodel.SHAPE_AWARE_SDSL,
    ).extrapolation
    fields = ("draft_parameters", "draft_tokens", "draft_aspect_ratio", "draft_layers", "alpha")
    assert all(float(getattr(inside, field)) == 0 for field in fields)
    hopeless = costmodel.Design(cubic_shape(16.0, 1.0), 1e6, 4)
    assert float(estimate(hopeless).extrapolation.alpha) < 0


def test_fields_broadcast_and_vmap_agrees():
    gammas, widths = jnp.arange(0.0, 5.0), jnp.linspace(512.0, 4096.0, 5)

    def speedup(gamma, width):
        shape = LLAMA_1B._replace(d_model=width, n_heads=width / 64)
        return estimate(DRAFT._replace(shape=shape, gamma=gamma)).speedup

    together = speedup(gammas, widths)
    mapped = jax.jit(jax.vmap(speedup))(gammas, widths)
    one_by_one = [float(speedup(g, w)) for g, w in zip(gammas, widths, strict=True)]
    np.testing.assert_allclose(together, one_by_one, rtol=1e-5)
    np.testing.assert_allclose(mapped, one_by_one, rtol=1e-5)


def test_it_is_compiled_once_for_all_numbers():
    traces = []

    @jax.jit
    def run(question):
        traces.append(1)
        return costmodel.throughput(*question).tokens_per_second

    floats = jax.tree.map(float, QUESTION)
    first = run(floats)
    other = jax.tree.map(lambda x: x * 1.01, floats)
    assert float(run(other)) != float(first)
    assert len(traces) == 1


def test_gradients_over_every_leaf_match_finite_differences():
    """All fields of all five arguments, in float64, with experts and windows in the target."""
    shape = MIXTRAL._replace(n_local_layers=5, window=1000, position_rows=7, other_parameters=11)
    question = (
        QUESTION[0]._replace(shape=LLAMA_1B._replace(n_experts=4, experts_per_token=1.5)),
        costmodel.Target(shape, 15e12, costmodel.Formats(1.0, 2.0, 2.0, 10.0, 0.1, 0.2)),
        *QUESTION[2:],
    )
    question = (*question[:2], question[2]._replace(draft_apart=0.4), *question[3:])
    leaves, structure = jax.tree.flatten(jax.tree.map(float, question))
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(question)]
    fields = ("tokens_per_second", "speedup", "time_to_first_token_seconds", "total_cost")
    with enable_x64():

        @jax.jit
        def logs(leaves):
            result = costmodel.throughput(*jax.tree.unflatten(structure, leaves))
            chosen = [getattr(result, field) for field in fields]
            return jnp.log(jnp.stack([*chosen, result.memory.target_bytes]))

        point = np.array(leaves)
        jacobian = jax.jit(jax.jacrev(logs))(list(point))
        moved_by_any = 0
        for i, (path, value) in enumerate(zip(paths, point, strict=True)):
            assert np.isfinite(jacobian[i]).all(), path
            if not np.isfinite(value):
                continue
            scale = abs(value) or 1.0
            ends = []
            for sign in (1, -1):
                moved = list(point)
                moved[i] = value + sign * 1e-5 * scale
                ends.append(np.asarray(logs(moved)))
            expected = (ends[0] - ends[1]) / 2e-5
            np.testing.assert_allclose(
                np.asarray(jacobian[i]) * scale, expected, rtol=2e-5, atol=2e-9, err_msg=path
            )
            moved_by_any += bool(np.any(expected != 0))
        assert moved_by_any > 90


@jax.jit
def _value_and_slope(point):
    def log_rate(point):
        width, layers, ratio, tokens, gamma, batch, context, chips = jnp.exp(point)
        shape = LLAMA_8B._replace(
            d_model=width, n_layers=layers, n_heads=width / 128, d_ff=ratio * width
        )
        hardware = costmodel.Hardware(costmodel.Devices(H100, COMPILED, chips))
        result = costmodel.throughput(
            costmodel.Design(shape, tokens, gamma),
            TARGET,
            hardware,
            costmodel.Workload(batch, context),
        )
        return jnp.log(result.tokens_per_second)

    return jax.value_and_grad(log_rate)(point)


@given(
    width=st.floats(64, 20000),
    layers=st.floats(1, 200),
    ratio=st.floats(0.5, 16),
    tokens=st.floats(1e6, 1e15),
    gamma=st.floats(1e-3, 100),
    batch=st.floats(1, 4096),
    context=st.floats(1, 1e6),
    chips=st.floats(1, 64),
)
def test_values_and_gradients_are_finite_over_the_box_in_float32(**inputs):
    point = jnp.log(jnp.array(list(inputs.values()), jnp.float32))
    value, slope = _value_and_slope(point)
    assert np.isfinite(value)
    assert np.isfinite(slope).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"design": DRAFT._replace(gamma=-1)}, r"design\.gamma=-1 must be at least 0"),
        ({"design": DRAFT._replace(tokens=0)}, r"design\.tokens=0 must be positive"),
        ({"target": TARGET._replace(tokens=np.nan)}, r"target\.tokens=nan"),
        (
            {"design": DRAFT._replace(shape=LLAMA_1B._replace(n_layers=0))},
            r"design\.shape\.n_layers=0 must be positive",
        ),
        (
            {"hardware": FOUR_H100._replace(target=FOUR_H100.target._replace(tensor_parallel=0))},
            r"hardware\.target\.tensor_parallel=0 must be at least 1",
        ),
        ({"load": LOAD._replace(batch=0)}, r"workload\.batch=0 must be positive"),
        ({"load": LOAD._replace(max_context=-5)}, r"workload\.max_context=-5"),
        (
            {"laws": costmodel.SDSL._replace(acceptance=costmodel.MeasuredAcceptance(1.5))},
            r"MeasuredAcceptance\.alpha=1\.5 must be in \[0, 1\]",
        ),
        (
            {"laws": costmodel.SDSL._replace(loss=costmodel.BESIROGLU._replace(tokens_exponent=0))},
            r"LossLaw\.tokens_exponent=0 must be positive",
        ),
    ],
)
def test_wrong_numbers_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        estimate(**change)
