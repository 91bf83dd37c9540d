"""Times of rounds against other interpolations, formulas said again, and lines that are known."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.interpolate
from conftest import enable_x64
from examples import COMPILED, H100, LLAMA_1B, LLAMA_8B, LLAMA_70B
from gradients import assert_gradient_is_a_difference
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxsd import costmodel

BATCHES = np.array([1.0, 4.0, 16.0])
GAMMAS = np.array([0.0, 1.0, 3.0, 8.0])
# Two batch sizes at which arithmetic begins to count at the sixth and the third token.
GRID = np.array(
    [[0.010, 0.0101, 0.0102, 0.013], [0.0105, 0.011, 0.012, 0.02], [0.011, 0.013, 0.02, 0.04]]
)
LINEAR = costmodel.LinearTimes(
    BATCHES,
    np.array([0.020, 0.021, 0.025]),
    np.array([0.001, 0.002, 0.010]),
    np.array([0.001, 0.0011, 0.002]),
)
MEASURED = costmodel.MeasuredTimes(BATCHES, GAMMAS, GRID, np.array([0.001, 0.001, 0.0015]))
ROOFLINE = costmodel.RooflineTimes(
    costmodel.Roofline(0.010, 0.0002, 0.0001, 0.0005, 6.0),
    costmodel.Roofline(0.001, 0.00002, 0.00001, 0.0002, 3.0),
)
HARDWARE = costmodel.HardwareTimes(
    LLAMA_8B, LLAMA_1B, H100, COMPILED._replace(host_seconds=1e-4), 2000.0, 2.0
)
TIMES = {"linear": LINEAR, "roofline": ROOFLINE, "hardware": HARDWARE, "measured": MEASURED}

# Compiled once for each kind of times.
round_seconds = jax.jit(costmodel.round_seconds)
slope = jax.jit(jax.grad(costmodel.round_seconds, argnums=2))


def doubles(times):
    """Fields as float64, so that nothing is compiled again for an integer."""
    return jax.tree.map(np.float64, times)


def on_a_line(x, knots, values):
    """Straight lines through points, constant before the first, rising on beyond the last."""
    if x <= knots[-1] or len(knots) == 1:
        return float(np.interp(x, knots, values))
    rise = (values[-1] - values[-2]) / (knots[-1] - knots[-2])
    return float(values[-1] + max(rise, 0) * (x - knots[-1]))


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [0.5, 1.0, 2.5, 4.0, 13.0, 16.0, 100.0])
@pytest.mark.parametrize("gamma", [0.0, 2.0, 3.5, 40.0])
def test_linear_times_are_lines_between_lines(batch, gamma, x64):
    fixed, token, draft = (on_a_line(batch, BATCHES, values) for values in LINEAR[1:])
    found = float(round_seconds(LINEAR, batch, gamma))
    assert found == pytest.approx(fixed + token * gamma + gamma * draft, rel=1e-13)


def test_times_that_fell_do_not_fall_on(x64):
    """A chip is not faster with more work; noise of the last two sizes would say so."""
    times = costmodel.LinearTimes(
        np.array([1.0, 8.0, 16.0]), np.array([1.0, 1.2, 1.1]), np.zeros(3), np.zeros(3)
    )
    for batch, seconds in ((12.0, 1.15), (16.0, 1.1), (1000.0, 1.1)):
        assert float(round_seconds(times, batch, 3.0)) == pytest.approx(seconds, rel=1e-14)


def test_one_batch_size_stands_for_all(x64):
    times = costmodel.LinearTimes(*(np.array([x]) for x in (8.0, 1.0, 0.1, 0.2)))
    for batch in (1.0, 8.0, 500.0):
        assert float(round_seconds(times, batch, 2.0)) == pytest.approx(1.6, rel=1e-14)


@pytest.mark.parametrize("sharpness", [1.0, 2.5, 8.0, math.inf])
@pytest.mark.parametrize(("batch", "gamma"), [(1.0, 0.0), (8.0, 3.0), (64.0, 8.0)])
def test_roofline_is_memory_or_arithmetic(sharpness, batch, gamma, x64):
    def seconds(roofline, rows):
        memory = roofline.weight_seconds + batch * roofline.cache_seconds
        arithmetic = roofline.token_seconds * batch * rows
        if sharpness == math.inf:
            return roofline.fixed_seconds + max(memory, arithmetic)
        power = memory**sharpness + arithmetic**sharpness
        return roofline.fixed_seconds + power ** (1 / sharpness)

    passes = [x._replace(sharpness=sharpness) for x in ROOFLINE]
    expected = gamma * seconds(passes[1], 1) + seconds(passes[0], gamma + 1)
    found = float(round_seconds(costmodel.RooflineTimes(*passes), batch, gamma))
    assert found == pytest.approx(expected, rel=1e-12 if sharpness < math.inf else 1e-6)


def test_hardware_times_are_passes_of_two_shapes_and_the_host(x64):
    formats = costmodel.Formats(weight_bytes=1.0)
    times = costmodel.HardwareTimes(
        LLAMA_70B, LLAMA_8B, H100, HARDWARE.stack, 1000.0, 4.0, draft_formats=formats
    )

    def seconds(shape, rows, formats):
        return float(
            costmodel.pass_seconds(shape, H100, 16.0, rows, 1000.0, 4.0, formats, stack=COMPILED)
        )

    wide = costmodel.Formats()
    expected = 5 * seconds(LLAMA_8B, 1.0, formats) + seconds(LLAMA_70B, 6.0, wide) + 1e-4
    assert float(costmodel.round_seconds(times, 16.0, 5.0)) == pytest.approx(expected, rel=1e-12)


def test_measured_times_equal_another_interpolation(x64):
    other = scipy.interpolate.RegularGridInterpolator((BATCHES, GAMMAS), GRID)
    rng = np.random.default_rng(0)
    points = np.stack([rng.uniform(1, 16, 60), rng.uniform(0, 8, 60)], 1)
    points = np.concatenate([points, np.stack(np.meshgrid(BATCHES, GAMMAS), -1).reshape(-1, 2)])
    for batch, gamma in points:
        expected = other((batch, gamma)) + gamma * np.interp(batch, BATCHES, MEASURED.draft_seconds)
        found = float(round_seconds(MEASURED, batch, gamma))
        assert found == pytest.approx(float(expected), rel=1e-13)


def test_measured_times_rise_on_beyond_the_grid(x64):
    at = {b: on_a_line(20.0, GAMMAS, row) for b, row in zip(BATCHES, GRID, strict=True)}
    assert at[1.0] == pytest.approx(0.013 + 12 * 0.0028 / 5)
    for batch, expected in (
        (0.25, at[1.0]),
        (1.0, at[1.0]),
        (10.0, (at[4.0] + at[16.0]) / 2),
        (28.0, at[16.0] + (at[16.0] - at[4.0])),
    ):
        draft = 20 * on_a_line(batch, BATCHES, MEASURED.draft_seconds)
        found = float(round_seconds(MEASURED, batch, 20.0))
        assert found == pytest.approx(expected + draft, rel=1e-13)


@settings(max_examples=50)
@given(batch=st.floats(0.1, 200.0), gamma=st.floats(0.0, 50.0))
def test_lines_measured_on_a_grid_are_the_same_lines(batch, gamma):
    """On the grid, between its points and beyond them."""
    grid = LINEAR.fixed_seconds[:, None] + LINEAR.token_seconds[:, None] * GAMMAS
    measured = costmodel.MeasuredTimes(BATCHES, GAMMAS, grid, LINEAR.draft_seconds)
    with enable_x64():
        expected = float(round_seconds(LINEAR, batch, gamma))
        assert float(round_seconds(measured, batch, gamma)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", TIMES)
def test_a_round_is_a_step_of_plain_decoding_and_what_drafting_adds(kind, x64):
    """Never less for more tokens, and the draft is not run where nothing is drafted."""
    times = doubles(TIMES[kind])
    for batch in (1.0, 3.0, 40.0):
        seconds = [float(round_seconds(times, batch, g)) for g in (0.0, 0.5, 1.0, 4.0, 9.0)]
        assert seconds == sorted(seconds)
        plain = float(times.verify(np.float64(batch), np.float64(0)))
        assert seconds[0] == pytest.approx(plain, rel=1e-14)
        verify = float(times.verify(np.float64(batch), np.float64(4)))
        draft = float(times.draft(np.float64(batch)))
        assert draft > 0
        assert seconds[3] == pytest.approx(verify + 4 * draft, rel=1e-14)


@pytest.mark.parametrize("kind", TIMES)
def test_slope_of_the_first_token_is_that_to_its_right(kind, x64):
    """That of a measured grid used to be half of it at 0, where a step of plain decoding is."""
    times = doubles(TIMES[kind])
    step = 1e-6
    ends = (float(round_seconds(times, 2.0, x)) for x in (0.0, step))
    difference = -(next(ends) - next(ends)) / step
    assert float(slope(times, 2.0, 0.0)) == pytest.approx(difference, rel=1e-5)


# --- lines through measurements ------------------------------------------------------------------


@settings(max_examples=30)
@given(
    fixed=st.lists(st.floats(1e-3, 1.0), min_size=3, max_size=3),
    token=st.lists(st.floats(0.0, 0.3), min_size=3, max_size=3),
)
def test_fit_recovers_the_lines_that_made_the_times(fixed, token):
    fixed, token = np.array(fixed), np.array(token)
    draft = np.array([0.1, 0.2, 0.3])
    grid = fixed[:, None] + token[:, None] * GAMMAS
    with enable_x64():
        found = costmodel.fit_linear_times(costmodel.MeasuredTimes(BATCHES, GAMMAS, grid, draft))
    np.testing.assert_array_equal(found.batches, BATCHES)
    np.testing.assert_array_equal(found.draft_seconds, draft)
    np.testing.assert_allclose(found.fixed_seconds, fixed, rtol=0, atol=1e-14)
    np.testing.assert_allclose(found.token_seconds, token, rtol=0, atol=1e-14)


def test_fit_is_least_squares_of_every_batch_size_on_its_own(x64):
    found = costmodel.fit_linear_times(MEASURED)
    for i, row in enumerate(GRID):
        token, fixed = np.polyfit(GAMMAS, row, 1)
        assert float(found.token_seconds[i]) == pytest.approx(token, rel=1e-12)
        assert float(found.fixed_seconds[i]) == pytest.approx(fixed, rel=1e-12)


def test_a_slope_below_zero_is_zero_and_the_line_the_mean():
    """The nearest of the lines that do not fall, by noise where verification is free."""
    times = costmodel.MeasuredTimes([1], [0, 1, 2], [[0.0103, 0.0100, 0.0097]], [0.001])
    found = costmodel.fit_linear_times(times)
    assert float(found.token_seconds[0]) == 0
    assert float(found.fixed_seconds[0]) == pytest.approx(0.01, rel=1e-6)


def test_fit_refuses_what_no_line_describes():
    one = costmodel.MeasuredTimes([1, 2], [0], [[0.01], [0.02]], [0.001, 0.001])
    with pytest.raises(ValueError, match="gammas of one length do not make a line"):
        costmodel.fit_linear_times(one)
    bent = costmodel.MeasuredTimes([1], [0, 1, 2, 10], [[0.01, 0.01, 0.01, 1.0]], [0.001])
    with pytest.raises(ValueError, match=r"fixed_seconds of the fitted line=-0\.\d+ .* positive"):
        costmodel.fit_linear_times(bent)
    short = MEASURED._replace(verify_seconds=GRID[:, :3])
    with pytest.raises(ValueError, match=r"verify_seconds of shape \(3, 3\) must have shape"):
        costmodel.fit_linear_times(short)


def test_fit_is_differentiable_and_traces(x64):
    def weighted(point):
        times = MEASURED._replace(verify_seconds=point[:12].reshape(3, 4), draft_seconds=point[12:])
        found = costmodel.fit_linear_times(times)
        weights = np.array([1.0, 2.0, 3.0])
        return weights @ found.fixed_seconds + weights[::-1] @ found.token_seconds / 3

    point = np.concatenate([GRID.ravel(), MEASURED.draft_seconds])
    assert_gradient_is_a_difference(weighted, point)
    mapped = jax.vmap(lambda x: costmodel.fit_linear_times(MEASURED._replace(verify_seconds=x)))(
        np.stack([GRID, 2 * GRID])
    )
    np.testing.assert_allclose(mapped.token_seconds[1], 2 * mapped.token_seconds[0], rtol=1e-13)


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TIMES)
def test_gradients_match_finite_differences(kind, x64):
    """By every field, by batch and by gamma, within the grid and beyond it.

    Of hardware by its context and its chips alone; shapes and the rest are those of its passes.
    """
    is_hardware = kind == "hardware"
    varied = (HARDWARE.context, HARDWARE.tensor_parallel) if is_hardware else TIMES[kind]
    leaves, structure = jax.tree.flatten(varied)
    fields = [np.ravel(np.float64(leaf)) for leaf in leaves]
    ends = np.cumsum([*map(len, fields), 2])[:-1]

    def seconds(point):
        *parts, batches, gammas = jnp.split(point, [*ends, ends[-1] + 2])
        shapes = [np.shape(leaf) for leaf in leaves]
        parts = [x.reshape(s) for x, s in zip(parts, shapes, strict=True)]
        times = jax.tree.unflatten(structure, parts)
        if is_hardware:
            times = HARDWARE._replace(context=times[0], tensor_parallel=times[1])
        return costmodel.round_seconds(times, batches, gammas) @ jnp.array([1.0, 2.0])

    point = np.concatenate([*fields, [2.7, 20.0], [3.4, 9.1]])
    # In shares of each number: of bytes per second a step of 1e-6 is none.
    assert_gradient_is_a_difference(lambda shares: 100 * seconds(point * shares), 0 * point + 1)


@jax.jit
def _value_and_gradients(*question):
    """Of hardware only the context is not fixed."""

    def seconds(times, batch, gamma):
        if not isinstance(times, tuple):
            times = HARDWARE._replace(context=times)
        return costmodel.round_seconds(times, batch, gamma)

    return jax.value_and_grad(seconds, argnums=(0, 1, 2))(*question)


positive_seconds = st.floats(2**-30, 2**10, width=32)
some_seconds = st.one_of(st.just(0.0), positive_seconds)
roofline = st.builds(
    costmodel.Roofline,
    positive_seconds,
    positive_seconds,
    some_seconds,
    some_seconds,
    st.floats(1.0, 2**20, width=32) | st.just(math.inf),
)


def rows(strategy, *shape):
    """Arrays of numbers."""
    size = math.prod(shape)
    return st.lists(strategy, min_size=size, max_size=size).map(
        lambda x: np.array(x, np.float32).reshape(shape)
    )


@settings(max_examples=200)
@given(
    times=st.one_of(
        st.builds(
            costmodel.LinearTimes,
            st.just(BATCHES),
            rows(positive_seconds, 3),
            rows(some_seconds, 3),
            rows(some_seconds, 3),
        ),
        st.builds(
            costmodel.MeasuredTimes,
            st.just(BATCHES),
            st.just(GAMMAS),
            rows(positive_seconds, 3, 4),
            rows(some_seconds, 3),
        ),
        st.builds(costmodel.RooflineTimes, roofline, roofline),
        st.floats(0.0, 2**20, width=32),
    ),
    batch=st.floats(2**-4, 2**16, width=32),
    gamma=st.floats(0.0, 1000.0, width=32),
)
@example(times=MEASURED, batch=16.0, gamma=8.0)
@example(times=LINEAR, batch=1.0, gamma=0.0)
def test_values_and_gradients_are_finite_in_float32(times, batch, gamma):
    """Seconds from a nanosecond to a quarter of an hour, or none where none are needed."""
    times = jax.tree.map(np.float32, times)
    value, gradients = _value_and_gradients(times, np.float32(batch), np.float32(gamma))
    assert value.dtype == np.float32
    assert 0 < float(value) < np.inf
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


# --- the contract of every function --------------------------------------------------------------


@pytest.mark.parametrize("kind", TIMES)
def test_times_map_trace_and_broadcast_alike(kind):
    times = jax.tree.map(np.float32, TIMES[kind])
    batch, gamma = np.array([[1.0], [6.0], [64.0]], np.float32), np.array([0.0, 3.0], np.float32)
    table = costmodel.round_seconds(times, batch, gamma)
    assert table.shape == (3, 2)
    assert table.dtype == np.float32
    mapped = jax.jit(jax.vmap(jax.vmap(costmodel.round_seconds, (None, None, 0)), (None, 0, None)))
    np.testing.assert_allclose(mapped(times, batch[:, 0], gamma), table, rtol=2e-6)


def test_the_widest_dtype_of_the_arguments_is_the_dtype_of_the_result(x64):
    """Python numbers for batch and gamma used to make float32 times ones of float64."""
    narrow, wide = (jax.tree.map(kind, LINEAR) for kind in (np.float32, np.float64))
    assert costmodel.round_seconds(narrow, 4, 2).dtype == np.float32
    assert costmodel.round_seconds(narrow, 4, np.float64(2)).dtype == np.float64
    assert costmodel.round_seconds(wide, 4, 2).dtype == np.float64


def test_lists_and_arrays_are_the_same_times():
    lists = costmodel.MeasuredTimes(*(x.tolist() for x in MEASURED))
    expected = float(costmodel.round_seconds(MEASURED, 3, 2))
    assert float(costmodel.round_seconds(lists, 3, 2)) == expected


class Constant(NamedTuple):
    """Times of one's own."""

    seconds: float

    def draft(self, batch):
        return 0 * batch

    def verify(self, batch, gamma):
        return self.seconds + 0 * batch * gamma

    def check(self):
        if self.seconds <= 0:
            raise ValueError(f"seconds={self.seconds}")


def test_own_times_are_times():
    assert float(costmodel.round_seconds(Constant(2.0), 7, 3)) == 2
    with pytest.raises(ValueError, match="seconds=-2"):
        costmodel.round_seconds(Constant(-2.0), 7, 3)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (LINEAR._replace(batches=1.0), r"LinearTimes\.batches of shape \(\) must have shape \[n\]"),
        (costmodel.LinearTimes([], [], [], []), r"LinearTimes\.batches of shape \(0,\)"),
        (LINEAR._replace(batches=[0, 4, 16]), r"LinearTimes\.batches=0"),
        (LINEAR._replace(batches=[1, 16, 4]), r"batches=\[1, 16, 4\] must be in rising order"),
        (LINEAR._replace(batches=[1, 4, 4]), "must be in rising order"),
        (
            LINEAR._replace(fixed_seconds=[1, 1]),
            r"LinearTimes\.fixed_seconds of shape \(2,\) must have shape \(3,\)",
        ),
        (LINEAR._replace(token_seconds=0.1), r"token_seconds of shape \(\)"),
        (LINEAR._replace(draft_seconds=[0.1]), r"draft_seconds of shape \(1,\)"),
        (LINEAR._replace(fixed_seconds=[1, 0, 1]), r"LinearTimes\.fixed_seconds=0"),
        (LINEAR._replace(token_seconds=[1, -1, 1]), r"LinearTimes\.token_seconds=-1"),
        (LINEAR._replace(draft_seconds=[1, math.nan, 1]), r"LinearTimes\.draft_seconds=nan"),
        (MEASURED._replace(batches=[1, 4, 2]), r"MeasuredTimes\.batches=\[1, 4, 2\]"),
        (MEASURED._replace(batches=[-1, 4, 8]), r"MeasuredTimes\.batches=-1"),
        (MEASURED._replace(gammas=[0, 2, 1, 4]), r"MeasuredTimes\.gammas=\[0, 2, 1, 4\]"),
        (MEASURED._replace(gammas=[-1, 0, 1, 4]), r"MeasuredTimes\.gammas=-1"),
        (MEASURED._replace(gammas=[1, 2, 3, 4]), "begin at 1 and must begin at 0, plain decoding"),
        (MEASURED._replace(verify_seconds=GRID.T), r"verify_seconds of shape \(4, 3\)"),
        (MEASURED._replace(verify_seconds=-GRID), r"MeasuredTimes\.verify_seconds=-0.01"),
        (MEASURED._replace(draft_seconds=[1, 2]), r"draft_seconds of shape \(2,\)"),
        (MEASURED._replace(draft_seconds=[1, -1, 1]), r"MeasuredTimes\.draft_seconds=-1"),
        (
            ROOFLINE._replace(target_pass=costmodel.Roofline(0, 1)),
            r"target_pass\.weight_seconds=0 must be positive",
        ),
        (
            ROOFLINE._replace(draft_pass=costmodel.Roofline(1, -1)),
            r"draft_pass\.token_seconds=-1",
        ),
        (ROOFLINE._replace(draft_pass=costmodel.Roofline(1, 1, -1)), "cache_seconds=-1"),
        (ROOFLINE._replace(draft_pass=costmodel.Roofline(1, 1, 0, -1)), "fixed_seconds=-1"),
        (
            ROOFLINE._replace(draft_pass=costmodel.Roofline(1, 1, 0, 0, 0.5)),
            r"draft_pass\.sharpness=0.5 must be at least 1",
        ),
        (HARDWARE._replace(context=-1), r"HardwareTimes\.context=-1"),
        (HARDWARE._replace(tensor_parallel=0), r"HardwareTimes\.tensor_parallel=0"),
        (
            HARDWARE._replace(chip=H100._replace(flops_per_second=0)),
            r"Chip\.flops_per_second=0",
        ),
        (
            HARDWARE._replace(stack=COMPILED._replace(host_seconds=-1)),
            r"Stack\.host_seconds=-1",
        ),
        (
            HARDWARE._replace(draft_formats=costmodel.Formats(weight_bytes=0)),
            r"Formats\.weight_bytes=0",
        ),
    ],
)
def test_wrong_times_are_refused_by_name(times, message):
    with pytest.raises(ValueError, match=message):
        costmodel.round_seconds(times, 1, 1)


@pytest.mark.parametrize(
    ("batch", "gamma", "message"),
    [
        (0, 1, "batch=0 must be positive and finite"),
        (math.inf, 1, "batch=inf"),
        (1, -1, "gamma=-1 must be at least 0"),
        (1, [0, math.nan], r"gamma=nan \(in an array of shape \(2,\)\)"),
    ],
)
def test_wrong_numbers_are_refused_by_name(batch, gamma, message):
    with pytest.raises(ValueError, match=message):
        costmodel.round_seconds(LINEAR, batch, gamma)


def test_traced_numbers_pass_unchecked():
    assert np.isfinite(jax.jit(lambda g: costmodel.round_seconds(LINEAR, 1, g))(-1.0))
