"""Tables of draft lengths: what is stored, what is looked up, and which times they imply."""

import bisect
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64
from gradients import assert_gradient_is_a_difference
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsd import costmodel

# The power that the table in the serving script of arXiv 2310.18813 is best explained by.
POWER = costmodel.PowerCurve(0.9, 0.548)
BATCHES = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])

lookup = jax.jit(costmodel.lookup_length)
interpolate = jax.jit(costmodel.interpolate_length)


def lines(ratios):
    """Times on lines, whose drafted tokens cost a share of a plain step that depends on batch."""
    ratios = np.asarray(ratios, float)
    ones = np.ones(len(BATCHES))
    return costmodel.LinearTimes(BATCHES, 0.02 * ones, 0.005 * ratios, 0.015 * ratios)


# --- tables --------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    ratios=st.lists(st.floats(0.01, 1.0), min_size=6, max_size=6).map(sorted),
    alpha=st.floats(0.0, 0.99),
)
def test_every_entry_is_the_fastest_whole_length(ratios, alpha):
    """By trying all of them; rising ratios make falling entries."""
    with enable_x64():
        curve = costmodel.GeometricCurve(alpha)
        table = costmodel.build_length_table(curve, lines(ratios), BATCHES, 12)
        gammas = np.asarray(table.gammas)
    tokens = np.array([sum(alpha**k for k in range(g + 1)) for g in range(13)])
    for entry, ratio in zip(gammas, ratios, strict=True):
        seconds = (1 + ratio * np.arange(13)) / tokens
        assert seconds[entry] <= seconds.min() * (1 + 1e-12)
    assert (np.diff(gammas) <= 0).all()
    assert int(table.default) == gammas[-1]
    np.testing.assert_array_equal(table.batches, BATCHES)


def test_a_table_may_say_not_to_speculate():
    table = costmodel.build_length_table(POWER, lines([0.05, 0.1, 0.3, 0.8, 1.0, 2.0]), BATCHES)
    assert table.gammas.tolist() == [16, 6, 1, 1, 0, 0]
    assert table.gammas.dtype == np.int32
    assert lookup(table, np.float32(1000)) == 0


def test_a_measured_grid_gives_the_fastest_of_its_lengths():
    rng = np.random.default_rng(0)
    gammas = np.array([0, 1, 2, 4, 8])
    seconds = rng.uniform(0.01, 0.02, (6, 5))
    table = costmodel.measured_length_table(BATCHES, gammas, seconds)
    expected = [int(gammas[min(range(5), key=lambda i, row=row: row[i])]) for row in seconds]
    assert len(set(expected)) > 2
    assert table.gammas.tolist() == expected
    assert table.gammas.dtype == np.int32
    assert int(table.default) == expected[-1]


def test_of_equally_fast_lengths_the_shortest_is_taken():
    table = costmodel.measured_length_table([1, 2], [0, 3, 5], [[2.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    assert table.gammas.tolist() == [3, 0]


def test_measured_decoding_and_times_make_the_same_table():
    """Seconds per token of a grid, as one would measure them, and the model that made them."""
    with enable_x64():
        times = lines([0.02, 0.1, 0.15, 0.3, 0.5, 0.9])
        gammas = np.arange(9)
        seconds = costmodel.token_seconds(POWER, times, BATCHES[:, None], gammas)
        measured = costmodel.measured_length_table(BATCHES, gammas, seconds)
        built = costmodel.build_length_table(POWER, times, BATCHES, 8)
        assert measured.gammas.tolist() == built.gammas.tolist()
        assert len(set(built.gammas.tolist())) > 3


# --- looking up ----------------------------------------------------------------------------------


@settings(max_examples=100)
@given(
    bounds=st.lists(st.integers(1, 200), min_size=6, max_size=6, unique=True).map(sorted),
    gammas=st.lists(st.integers(0, 20), min_size=7, max_size=7),
    batch=st.integers(1, 250) | st.floats(0.25, 250.0, width=32),
)
def test_lookup_takes_the_first_bound_that_is_not_below(bounds, gammas, batch):
    table = costmodel.LengthTable(
        np.array(bounds, np.float32), np.array(gammas[:6]), np.array(gammas[6])
    )
    found = lookup(table, np.float32(batch))
    assert int(found) == gammas[bisect.bisect_left(bounds, batch)]
    assert found.dtype == np.int32


def test_published_lookups():
    """Public serving script of arXiv 2310.18813; the default is that of the last entry."""
    batches = np.arange(1.0, 41.0, dtype=np.float32)
    expected = [7, 6, 4, 4, 4, 4, 4, 4, *[3] * 8, *[1] * 24]
    np.testing.assert_array_equal(costmodel.lookup_length(costmodel.SU_TABLE, batches), expected)


@settings(max_examples=100)
@given(
    lengths=st.lists(st.floats(0.0, 20.0, width=32), min_size=7, max_size=7),
    batch=st.floats(0.25, 60.0, width=32),
)
def test_interpolation_is_on_lines_between_the_batch_sizes(lengths, batch):
    table = costmodel.LengthTable(
        BATCHES.astype(np.float32), np.float32(lengths[:6]), np.float32(lengths[6])
    )
    expected = np.interp(batch, BATCHES, lengths[:6]) if batch <= 32 else lengths[6]
    found = interpolate(table, np.float32(batch))
    assert float(found) == pytest.approx(float(expected), rel=1e-5, abs=1e-5)
    assert found.dtype == np.float32


def test_lookup_and_interpolation_agree_at_the_bounds():
    for batch, gamma in zip(BATCHES, costmodel.SU_TABLE.gammas, strict=True):
        assert float(interpolate(costmodel.SU_TABLE, batch)) == gamma
        assert int(lookup(costmodel.SU_TABLE, batch)) == gamma


# --- what a table says of times ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gamma", "low", "high"),
    [
        (7, 0.089, 0.099),
        (6, 0.099, 0.112),
        (4, 0.130, 0.156),
        (3, 0.156, 0.197),
        (1, 0.280, 0.900),
        (0, 0.900, math.inf),
    ],
)
def test_intervals_of_a_power_worked_out_apart(gamma, low, high):
    """For l(s) = 0.9 s^0.548, printed to three digits."""
    found = costmodel.slope_ratio_intervals(POWER)
    assert float(found.low[gamma]) == pytest.approx(low, abs=5e-4)
    assert float(found.high[gamma]) == pytest.approx(high, abs=5e-4)


def test_published_table_read_backwards():
    """Shares of a plain step per drafted token: about .09, .11, .14, .14, .18 and .3 to .9."""
    found = costmodel.table_slope_ratios(POWER, costmodel.SU_TABLE)
    middles = (np.asarray(found.low) + np.asarray(found.high)) / 2
    np.testing.assert_allclose(middles[:5], [0.09, 0.11, 0.14, 0.14, 0.18], atol=0.006)
    assert found.low[5] < 0.3
    assert found.high[5] == pytest.approx(0.9, rel=1e-6)
    # Ratios that rise with the batch meet all of them, so the table follows from such times.
    ratios = np.maximum.accumulate(np.asarray(found.low) + 1e-4)
    assert (ratios < np.asarray(found.high)).all()
    table = costmodel.build_length_table(POWER, lines(ratios), BATCHES)
    assert table.gammas.tolist() == costmodel.SU_TABLE.gammas.tolist()


@settings(max_examples=40)
@given(
    curve=st.builds(costmodel.PowerCurve, st.floats(0.2, 1.0), st.floats(0.1, 0.9))
    | st.builds(costmodel.GeometricCurve, st.floats(0.3, 0.99))
)
def test_a_length_is_the_best_exactly_within_its_interval(curve):
    """Both sides of every end of every interval, all lengths compared; neighbours touch."""
    with enable_x64():
        low, high = map(np.asarray, _intervals(curve))
        lengths = np.asarray(_accepted(curve, np.arange(13.0)))
    assert low[12] == 0
    assert high[0] == math.inf
    np.testing.assert_allclose(low[:-1], high[1:], rtol=1e-9)
    for s, end in itertools.product(range(13), (low, high)):
        for inside in (True, False):
            outwards = (end is high) == (not inside)
            ratio = float(end[s]) * (1 + 1e-6 if outwards else 1 - 1e-6)
            if not 0 < ratio < math.inf or low[s] * (1 + 3e-6) > high[s]:
                continue
            seconds = (1 + ratio * np.arange(13)) / (1 + lengths)
            assert (int(seconds.argmin()) == s) == inside


_intervals = jax.jit(lambda curve: costmodel.slope_ratio_intervals(curve, 12))
_accepted = jax.jit(costmodel.accepted_length)


def test_a_length_that_is_never_the_best_has_an_empty_interval():
    """The second token adds as little as the third and fourth: two are no better than one or four,
    except on a point.
    """
    curve = costmodel.PositionCurve([0.9, 0.3, 0.3, 0.3, 0.0])
    found = costmodel.slope_ratio_intervals(curve, 5)
    assert found.low[5] == 0
    assert float(found.high[5]) == 0  # a token that is never accepted pays only if it is free
    for s in (2, 3):
        assert float(found.low[s]) == pytest.approx(float(found.high[s]), rel=1e-5)
    assert float(found.low[1]) == pytest.approx(0.3 / 1.6, rel=1e-5)
    unsteady = costmodel.LengthTable(np.array([1, 2]), np.array([1, 4]), 4)
    implied = costmodel.table_slope_ratios(curve, unsteady, 5)
    assert implied.low[0] >= implied.high[1]  # a longer draft for a larger batch: no rising ratio


# --- gradients and the contract ------------------------------------------------------------------


def test_gradients_match_finite_differences(x64):
    def lengths(point):
        table = costmodel.LengthTable(point[:3], point[3:6], point[6])
        found = costmodel.interpolate_length(table, point[7:])
        return found @ jnp.array([1.0, 2.0, 3.0, 5.0])

    assert_gradient_is_a_difference(lengths, [1.0, 4.0, 9.0, 7.0, 5.5, 2.0, 1.5, 0.5, 2.0, 7, 40])

    def ends(point):
        curve = costmodel.PowerCurve(point[0], point[1])
        low, high = costmodel.slope_ratio_intervals(curve, 8)
        of_table = costmodel.table_slope_ratios(curve, costmodel.SU_TABLE, 8)
        weights = jnp.arange(1.0, 10.0)
        return low @ weights - 2 * high[1:] @ weights[1:] + of_table.low @ weights[:6]

    assert_gradient_is_a_difference(ends, [0.8, 0.6])


@settings(max_examples=100)
@given(
    coefficient=st.floats(2**-7, 1.0, width=32),
    exponent=st.floats(2**-7, 1.0, width=32),
    alpha=st.floats(0.0, 1.0, width=32),
    batch=st.floats(2**-7, 2**20, width=32),
)
def test_values_and_gradients_are_finite_in_float32(coefficient, exponent, alpha, batch):
    """All but the high end for no draft at all, which is infinite."""
    values, gradients = _values_and_gradients(
        *map(np.float32, (coefficient, exponent, alpha, batch))
    )
    assert values.dtype == np.float32
    assert np.isfinite(values).all()
    assert all(np.isfinite(leaf).all() for leaf in gradients)


@jax.jit
def _values_and_gradients(*point):
    def values(coefficient, exponent, alpha, batch):
        curves = costmodel.PowerCurve(coefficient, exponent), costmodel.GeometricCurve(alpha)
        found = [costmodel.slope_ratio_intervals(curve, 8) for curve in curves]
        table = costmodel.LengthTable(np.float32([1, 8, 64]), 9 * jnp.stack(point[:3]), 3 * alpha)
        parts = [costmodel.interpolate_length(table, batch)[None]]
        return jnp.concatenate([*parts, *(x.low for x in found), *(x.high[1:] for x in found)])

    def total(*point):
        return values(*point).sum(), values(*point)

    (_, found), gradients = jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True)(*point)
    return found, gradients


def test_functions_map_and_trace_alike():
    table = jax.tree.map(np.float32, costmodel.SU_TABLE)
    batches = np.float32([[1, 3, 12], [32, 33, 100]])
    for function in (costmodel.lookup_length, costmodel.interpolate_length):
        expected = function(table, batches)
        assert expected.shape == (2, 3)
        mapped = jax.jit(jax.vmap(jax.vmap(function, (None, 0)), (None, 0)))
        np.testing.assert_array_equal(mapped(table, batches), expected)
    built = costmodel.build_length_table(POWER, lines(np.linspace(0.05, 1, 6)), BATCHES, 8)
    traced = jax.jit(lambda c, t: costmodel.build_length_table(c, t, BATCHES, 8))
    again = traced(POWER, lines(np.linspace(0.05, 1, 6)))
    np.testing.assert_array_equal(again.gammas, built.gammas)
    seconds = np.random.default_rng(0).uniform(1, 2, (4, 2, 3))
    mapped = jax.vmap(lambda x: costmodel.measured_length_table([1, 2], [0, 1, 2], x).gammas)
    expected = [costmodel.measured_length_table([1, 2], [0, 1, 2], x).gammas for x in seconds]
    np.testing.assert_array_equal(mapped(seconds), expected)
    one = jax.jit(jax.vmap(lambda c: costmodel.table_slope_ratios(c, costmodel.SU_TABLE, 8)))
    curves = costmodel.PowerCurve(np.float32([0.8, 0.9]), np.float32([0.6, 0.548]))
    expected = costmodel.table_slope_ratios(POWER, costmodel.SU_TABLE, 8)
    np.testing.assert_allclose(one(curves).low[1], expected.low, rtol=1e-5)


def test_lists_and_arrays_are_the_same_table():
    lists = costmodel.LengthTable(*(np.asarray(x).tolist() for x in costmodel.SU_TABLE))
    for batch in (1, 3, 100):
        assert int(costmodel.lookup_length(lists, batch)) == int(lookup(costmodel.SU_TABLE, batch))
        found = float(costmodel.interpolate_length(lists, batch))
        assert found == float(interpolate(costmodel.SU_TABLE, batch))


SU = costmodel.SU_TABLE


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: costmodel.lookup_length(SU, 0), "batch=0 must be positive"),
        (lambda: costmodel.lookup_length(SU, [1, math.nan]), "batch=nan"),
        (lambda: costmodel.interpolate_length(SU, -1), "batch=-1 must be positive"),
        (lambda: costmodel.lookup_length(SU._replace(batches=3), 1), r"batches of shape \(\)"),
        (
            lambda: costmodel.lookup_length(costmodel.LengthTable([], [], 1), 1),
            r"LengthTable\.batches of shape \(0,\) must have shape \[n\]",
        ),
        (
            lambda: costmodel.lookup_length(SU._replace(gammas=[1, 2]), 1),
            r"LengthTable\.gammas of shape \(2,\) must have the shape of batches, \(6,\)",
        ),
        (
            lambda: costmodel.interpolate_length(SU._replace(default=[1]), 1),
            r"default of shape \(1,\) be a scalar",
        ),
        (
            lambda: costmodel.lookup_length(costmodel.LengthTable([2, 1], [1, 1], 1), 1),
            r"LengthTable\.batches=\[2, 1\] must be in rising order",
        ),
        (
            lambda: costmodel.lookup_length(costmodel.LengthTable([0, 1], [1, 1], 1), 1),
            r"LengthTable\.batches=0",
        ),
        (
            lambda: costmodel.lookup_length(costmodel.LengthTable([1, 2], [1, 0.5], 1), 1),
            r"LengthTable\.gammas=0.5 .* must be a whole number",
        ),
        (
            lambda: costmodel.lookup_length(costmodel.LengthTable([1], [1], 1.5), 1),
            r"LengthTable\.default=1.5 must be a whole number",
        ),
        (
            lambda: costmodel.interpolate_length(costmodel.LengthTable([1], [-1], 1), 1),
            r"LengthTable\.gammas=-1",
        ),
        (
            lambda: costmodel.interpolate_length(costmodel.LengthTable([1], [1], math.inf), 1),
            r"LengthTable\.default=inf",
        ),
        (
            lambda: costmodel.build_length_table(POWER, lines(np.ones(6)), [2, 1]),
            r"batches=\[2, 1\] must be in rising order",
        ),
        (
            lambda: costmodel.build_length_table(POWER, lines(np.ones(6)), 2),
            r"batches of shape \(\) must have shape \[n\]",
        ),
        (
            lambda: costmodel.build_length_table(POWER, lines(np.ones(6)), [1], -1),
            "max_gamma=-1",
        ),
        (
            lambda: costmodel.measured_length_table([1, 2], [0, 1], [[1, 1]]),
            r"token_seconds of shape \(1, 2\) must have shape \[n, m\], with batches of shape \(2,",
        ),
        (lambda: costmodel.measured_length_table([1], 0, [1.0]), r"gammas of shape \(\)"),
        (lambda: costmodel.measured_length_table([1], [], [[]]), r"gammas of shape \(0,\)"),
        (lambda: costmodel.measured_length_table([1], [0, 1.5], [[1, 1]]), "gammas=1.5"),
        (
            lambda: costmodel.measured_length_table([1], [2, 0], [[1, 1]]),
            r"gammas=\[2, 0\] must be in rising order",
        ),
        (lambda: costmodel.measured_length_table([1], [0, 1], [[1, 0]]), "token_seconds=0"),
        (lambda: costmodel.measured_length_table([0], [0, 1], [[1, 1]]), "batches=0"),
        (lambda: costmodel.slope_ratio_intervals(POWER, 0), "max_gamma=0 must be at least 1"),
        (
            lambda: costmodel.slope_ratio_intervals(costmodel.PowerCurve(1.2, 0.5), 3),
            "PowerCurve rises by 1.2 tokens at draft token 1",
        ),
        (
            lambda: costmodel.slope_ratio_intervals(costmodel.MeasuredCurve([1, 2], [0.2, 0.9]), 3),
            "MeasuredCurve rises by 0.7 tokens at draft token 2",
        ),
        (
            lambda: costmodel.table_slope_ratios(POWER, SU, 6),
            r"LengthTable\.gammas=7 .* at most max_gamma=6",
        ),
        (
            lambda: costmodel.table_slope_ratios(POWER, SU._replace(gammas=0.5 + SU.gammas)),
            r"LengthTable\.gammas=7.5 .* whole number",
        ),
        (lambda: costmodel.table_slope_ratios(POWER, SU._replace(batches=1)), "batches of shape"),
    ],
)
def test_wrong_numbers_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
