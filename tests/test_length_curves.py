"""Accepted-length curves against enumeration, simulation, other converters and other fits."""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from conftest import enable_x64
from gradients import assert_gradient_is_a_difference
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxsd import costmodel

SHARES = np.array([0.82, 0.61, 0.5, 0.44])
MEASURED = costmodel.MeasuredCurve(np.array([2.0, 4.0, 8.0]), np.array([1.4, 2.3, 3.5]))
CURVES = {
    "power": costmodel.PowerCurve(0.9, 0.548),
    "geometric": costmodel.GeometricCurve(0.8),
    "measured": MEASURED,
    "position": costmodel.PositionCurve(SHARES),
}

# Compiled once for each kind of curve and shape of gamma.
accepted_length = jax.jit(costmodel.accepted_length)
slope = jax.jit(jax.grad(costmodel.accepted_length, argnums=1))

chances = st.floats(0.0, 1.0, width=32)
# Falling shares are products of chances, each given that all tokens before were accepted.
share_lists = st.lists(chances, min_size=5, max_size=5).map(
    lambda x: np.cumprod(np.array(x, np.float32))
)
curves = st.one_of(
    st.builds(costmodel.PowerCurve, st.floats(2**-7, 1, width=32), st.floats(2**-7, 1, width=32)),
    st.builds(costmodel.GeometricCurve, chances),
    st.builds(costmodel.PositionCurve, share_lists),
    st.builds(
        costmodel.MeasuredCurve,
        st.just(np.array([1, 2, 4, 7, 8], np.float32)),
        share_lists.map(lambda x: np.cumsum(x * np.diff([0, 1, 2, 4, 7, 8]).astype(np.float32))),
    ),
)
# From 0 to a thousand. Smaller positive ones are no lengths, and a power is infinitely steep there.
lengths = st.one_of(st.just(0.0), st.floats(2**-10, 1000.0, width=32))


def arrays(curve):
    """The same curve with arrays for fields, as a compiled function is best given them."""
    return type(curve)(*map(np.asarray, curve))


def lengths_at(curve, gammas):
    """The curve at some lengths, one after the other, so that nothing is compiled again."""
    return [float(accepted_length(curve, float(gamma))) for gamma in gammas]


def expectation(conditional):
    """Mean accepted tokens over every pattern of hits and misses, up to the first miss."""
    total = 0.0
    for hits in itertools.product((True, False), repeat=len(conditional)):
        weight = math.prod(c if hit else 1 - c for c, hit in zip(conditional, hits, strict=True))
        total += weight * (hits.index(False) if False in hits else len(hits))
    return total


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.35, 0.8, 1.0])
def test_geometric_curve_equals_enumeration(alpha, x64):
    found = lengths_at(costmodel.GeometricCurve(alpha), range(9))
    assert found == pytest.approx([expectation([alpha] * g) for g in range(9)], abs=1e-13)


def test_position_curve_equals_enumeration_of_conditional_chances(x64):
    """The shares are the running products of the chances given that all before were accepted."""
    conditional = np.array([0.9, 0.7, 1.0, 0.4, 0.6, 0.0, 0.5])
    found = lengths_at(costmodel.PositionCurve(np.cumprod(conditional)), range(8))
    assert found == pytest.approx([expectation(conditional[:g]) for g in range(8)], abs=1e-13)


def test_power_curve_is_a_power(x64):
    gamma = np.array([1e-3, 0.5, 1.0, 2.0, 7.5, 300.0])
    np.testing.assert_allclose(lengths_at(CURVES["power"], gamma), 0.9 * gamma**0.548, rtol=1e-13)


def test_measured_curve_joins_its_points_from_zero_on(x64):
    gamma = np.linspace(0, 8, 161)
    expected = np.interp(gamma, [0, *MEASURED.gammas], [0, *MEASURED.lengths])
    np.testing.assert_allclose(lengths_at(MEASURED, gamma), expected, atol=1e-14)


@pytest.mark.parametrize("kind", CURVES)
def test_nothing_drafted_nothing_accepted(kind):
    assert float(accepted_length(CURVES[kind], 0.0)) == 0


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.85, 1.0])
def test_beyond_what_was_measured_acceptance_falls_on_as_it_fell(alpha, x64):
    """One alpha behind all positions goes on to be the same alpha, and between them it is a sum."""
    positions = np.arange(1, 5)
    geometric = costmodel.GeometricCurve(alpha)
    by_position = costmodel.PositionCurve(alpha**positions)
    measured = costmodel.MeasuredCurve(positions.astype(float), np.cumsum(alpha**positions))
    gamma = np.array([4.0, 4.5, 5.0, 9.0, 60.0])
    beyond = lengths_at(geometric, gamma)
    np.testing.assert_allclose(lengths_at(by_position, gamma), beyond, atol=1e-12)
    np.testing.assert_allclose(lengths_at(measured, gamma), beyond, atol=1e-12)


def test_sparse_measurements_go_on_at_the_slope_of_their_last_line(x64):
    """Slopes (0.7, 0.45, 0.3): per token beyond 8 the share falls by 0.3^(1/8)."""
    decay = 0.3 ** (1 / 8)
    expected = [3.5 + 0.3 * sum(decay**k for k in range(1, more + 1)) for more in range(5)]
    assert lengths_at(MEASURED, range(8, 13)) == pytest.approx(expected, rel=1e-13)


@settings(max_examples=60)
@given(curve=curves, ends=st.tuples(lengths, lengths, lengths))
def test_curves_rise_and_all_but_measured_ones_bend_down(curve, ends):
    low, middle, high = sorted(ends)
    with enable_x64():
        values = lengths_at(arrays(jax.tree.map(np.float64, curve)), (low, middle, high))
    assert 0 <= values[0] <= values[1] * (1 + 1e-12) <= values[2] * (1 + 1e-11)
    if isinstance(curve, costmodel.PowerCurve):
        assert values[2] <= max(high, high ** float(curve.exponent)) * (1 + 1e-12)
    else:
        assert values[2] <= high * (1 + 1e-12)  # no more than were drafted
    if high > low:
        weight = (middle - low) / (high - low)
        chord = values[0] + weight * (values[2] - values[0])
        assert values[1] >= chord * (1 - 1e-9)


@settings(max_examples=60)
@given(curve=curves, gamma=st.floats(2**-10, 100.0, width=32))
@example(curve=MEASURED, gamma=8.0)
@example(curve=CURVES["position"], gamma=4.0)
def test_curves_are_continuous(curve, gamma):
    """Also where one piece ends and the next begins: no curve is steeper than at half of gamma."""
    with enable_x64():
        curve = arrays(jax.tree.map(np.float64, curve))
        below, above = lengths_at(curve, (gamma * (1 - 1e-9), gamma * (1 + 1e-9)))
    assert above - below == pytest.approx(0, abs=4e-9 * (above + gamma))


# --- conversions ---------------------------------------------------------------------------------


def test_the_targets_token_is_all_that_other_lengths_count_besides(x64):
    alpha, gamma = 0.73, np.array([1.0, 2.5, 6.0])
    length = 1 + np.array(lengths_at(costmodel.GeometricCurve(alpha), gamma))
    np.testing.assert_allclose(length, costmodel.expected_tokens(alpha, gamma), rtol=1e-14)
    back = costmodel.acceptance_length_to_alpha(length, gamma)
    np.testing.assert_allclose(back, alpha, rtol=1e-11)
    gamma = np.array([0.0, 0.5, 3.0, 4.0, 11.0])
    np.testing.assert_allclose(
        1 + np.array(lengths_at(CURVES["position"], gamma)),
        costmodel.expected_tokens_by_position(SHARES, gamma),
        rtol=1e-14,
    )


@pytest.mark.parametrize("kind", CURVES)
def test_shares_by_position_are_the_curve_at_whole_lengths(kind, x64):
    curve = CURVES[kind]
    shares = np.asarray(costmodel.acceptance_by_position(curve, 10))
    assert shares.shape == (10,)
    expected = lengths_at(curve, range(11))
    np.testing.assert_allclose(np.concatenate([[0], np.cumsum(shares)]), expected, atol=1e-13)
    again = costmodel.PositionCurve(np.minimum.accumulate(shares))  # equal to the last digit only
    np.testing.assert_allclose(lengths_at(again, range(11)), expected, atol=1e-13)


def test_simulated_rounds_accept_what_the_curve_says():
    """100000 rounds; 5.5 standard errors are left by chance once in 2.6e7."""
    shares = costmodel.acceptance_by_position(costmodel.PowerCurve(0.8, 0.6), 6)
    tokens = np.asarray(costmodel.simulate_tokens(jax.random.key(0), shares, 100_000)) - 1
    for gamma in (1, 3, 6):
        accepted = np.minimum(tokens, gamma)
        error = accepted.std() / math.sqrt(len(tokens))
        expected = float(costmodel.accepted_length(costmodel.PowerCurve(0.8, 0.6), gamma))
        assert abs(accepted.mean() - expected) < 5.5 * error


def test_no_chances_make_a_curve_that_bends_up_or_rises_too_fast():
    with pytest.raises(ValueError, match=r"PowerCurve rises by 1\.2 tokens at draft token 1"):
        costmodel.acceptance_by_position(costmodel.PowerCurve(1.2, 0.5), 3)
    bent_up = costmodel.MeasuredCurve([1, 2, 3], [0.2, 0.4, 1.2])
    with pytest.raises(ValueError, match=r"MeasuredCurve rises by 0\.8 tokens at draft token 3"):
        costmodel.acceptance_by_position(bent_up, 3)
    assert costmodel.acceptance_by_position(bent_up, 2).shape == (2,)  # up to there chances do


# --- slopes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["measured", "position"])
def test_slope_at_a_measured_length_is_the_mean_of_both_sides(kind, x64):
    """The last length used to have half the slope before it, and 0 half the slope after it."""
    curve = CURVES[kind]
    knots = np.arange(1.0, 5.0) if kind == "position" else curve.gammas
    for knot in knots:
        left, right = (float(slope(curve, knot * (1 + x))) for x in (-1e-10, 1e-10))
        assert left > right > 0
        assert float(slope(curve, knot)) == pytest.approx((left + right) / 2, rel=1e-8)
    assert float(slope(curve, 0.0)) == pytest.approx(float(slope(curve, 0.5)), rel=1e-14)


def test_slope_of_a_power_at_zero_is_given_as_zero():
    assert float(slope(CURVES["power"], 0.0)) == 0


@pytest.mark.parametrize("kind", CURVES)
def test_gradients_match_finite_differences(kind, x64):
    """Of lengths and of shares, each with a weight of its own so that none can stand for another.

    A measured length is a corner: fields and lengths are chosen so that no corner is looked at.
    """
    curve = CURVES[kind]
    if kind == "measured":
        curve = curve._replace(gammas=curve.gammas + 0.02)
    fields = [np.ravel(field) for field in curve]
    ends = np.cumsum([*map(len, fields), 3])[:-1]

    def weighted(point):
        *parts, gammas = jnp.split(point, ends)
        shapes = map(np.shape, curve)
        made = type(curve)(*(x.reshape(s) for x, s in zip(parts, shapes, strict=True)))
        lengths = costmodel.accepted_length(made, gammas)
        shares = costmodel.acceptance_by_position(made, 10)
        return lengths @ jnp.array([1.0, -2.0, 3.0]) + shares @ jnp.arange(1.0, 11.0)

    assert_gradient_is_a_difference(weighted, np.concatenate([*fields, [2.6, 5.3, 11.7]]))


_value_and_gradients = jax.jit(jax.value_and_grad(costmodel.accepted_length, argnums=(0, 1)))


@settings(max_examples=200)
@given(curve=curves, gamma=lengths)
@example(curve=costmodel.GeometricCurve(1.0), gamma=1000.0)
@example(curve=costmodel.GeometricCurve(0.0), gamma=0.0)
@example(curve=costmodel.PositionCurve(np.zeros(5, np.float32)), gamma=5.0)
@example(curve=costmodel.PositionCurve(np.ones(5, np.float32)), gamma=1000.0)
@example(curve=costmodel.PositionCurve(np.full(5, 1e-38, np.float32)), gamma=7.0)
def test_values_and_gradients_are_finite_in_float32(curve, gamma):
    curve = arrays(jax.tree.map(np.float32, curve))
    value, gradients = _value_and_gradients(curve, np.float32(gamma))
    assert value.dtype == np.float32
    assert 0 <= float(value) < np.inf
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


# --- fits ----------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(coefficient=st.floats(0.2, 1.0), exponent=st.floats(0.1, 1.0), alpha=st.floats(0.05, 0.99))
def test_fits_recover_what_made_the_lengths(coefficient, exponent, alpha):
    gamma = np.array([1, 2, 3, 5, 8])
    fit = costmodel.fit_length_curve(gamma, coefficient * gamma**exponent)
    assert isinstance(fit.result, costmodel.PowerCurve)
    np.testing.assert_allclose(fit.result, [coefficient, exponent], rtol=1e-7)
    assert fit.residual_error < 1e-8
    lengths = [sum(alpha**k for k in range(1, g + 1)) for g in gamma]
    fit = costmodel.fit_length_curve(gamma, lengths, "geometric")
    assert isinstance(fit.result, costmodel.GeometricCurve)
    assert fit.result.alpha == pytest.approx(alpha, rel=1e-7)


@pytest.mark.parametrize(
    ("form", "function"),
    [
        ("power", lambda g, c, e: c * g**e),
        ("geometric", lambda g, a: (a - a ** (g + 1)) / (1 - a)),
    ],
)
def test_fits_equal_another_least_squares(form, function):
    gamma = np.arange(1.0, 9.0)
    rng = np.random.default_rng(0)
    lengths = np.minimum(0.85 * gamma**0.55 + rng.normal(0, 0.02, 8), gamma)
    fit = costmodel.fit_length_curve(gamma, lengths, form)
    start = [0.5] * len(fit.names)
    solution, covariance = scipy.optimize.curve_fit(
        function, gamma, lengths, p0=start, xtol=1e-14, ftol=1e-14
    )
    np.testing.assert_allclose(fit.estimates, solution, rtol=1e-7)
    np.testing.assert_allclose(fit.covariance, covariance, rtol=1e-4)
    assert fit.ranges == {"gamma": (1.0, 8.0)}
    np.testing.assert_allclose(fit.predicted, function(gamma, *solution), rtol=1e-7)


@pytest.mark.parametrize(
    ("alpha", "error"), [(0.6, 0.23), (0.7, 0.24), (0.8, 0.21), (0.9, 0.14), (0.99, 0.02)]
)
def test_a_power_misses_a_geometric_curve_by_up_to_a_quarter(alpha, error):
    """What the docstring of the fit says, over draft lengths 1 to 8; worst at the first token."""
    gamma = np.arange(1, 9)
    lengths = np.cumsum(alpha**gamma)
    fit = costmodel.fit_length_curve(gamma, lengths)
    assert error - 0.01 < fit.max_relative_error < error
    assert np.abs(fit.predicted / lengths - 1).argmax() == 0
    assert fit.held_out_max_error > fit.max_relative_error
    assert costmodel.fit_length_curve(gamma, lengths, "geometric").max_relative_error < 1e-9


def test_fits_predict_rows_that_they_have_not_seen():
    """Held out by prompt: the error of the third row is that of the fit of the others."""
    gamma, lengths = np.array([1, 2, 4, 8]), np.array([0.8, 1.25, 1.9, 2.7])
    fit = costmodel.fit_length_curve(gamma, lengths, groups=["a", "a", "b", "a"])
    others = costmodel.fit_length_curve(gamma[[0, 1, 3]], lengths[[0, 1, 3]])
    without_b = abs(float(costmodel.accepted_length(others.result, 4)) / 1.9 - 1)
    assert fit.num_held_out == 1  # without `a` one row is left, for two parameters
    assert fit.held_out_error == pytest.approx(without_b, rel=1e-4)


# --- the contract of every function --------------------------------------------------------------


@pytest.mark.parametrize("kind", CURVES)
def test_curves_map_trace_and_broadcast_alike(kind):
    gamma = np.array([[0.0, 1.0, 2.5], [4.0, 8.0, 20.0]], np.float32)
    curve = arrays(jax.tree.map(np.float32, CURVES[kind]))
    expected = costmodel.accepted_length(curve, gamma)
    assert expected.shape == gamma.shape
    assert expected.dtype == np.float32
    one = jax.jit(jax.vmap(costmodel.accepted_length, (None, 0)))
    np.testing.assert_allclose(one(curve, gamma.ravel()), expected.ravel(), rtol=1e-6)
    shares = jax.jit(costmodel.acceptance_by_position, static_argnums=1)(curve, 2)
    np.testing.assert_allclose(shares, np.diff(lengths_at(curve, range(3))), rtol=1e-5)


def test_the_widest_dtype_of_the_arguments_is_the_dtype_of_the_result(x64):
    """A Python number for gamma used to make a float32 curve one of float64."""
    narrow, wide = (costmodel.GeometricCurve(dtype(0.5)) for dtype in (np.float32, np.float64))
    assert costmodel.accepted_length(narrow, 2).dtype == np.float32
    assert costmodel.accepted_length(narrow, np.float64(2)).dtype == np.float64
    assert costmodel.accepted_length(wide, np.float32(2)).dtype == np.float64
    assert costmodel.acceptance_by_position(costmodel.GeometricCurve(0.5), 2).dtype == np.float64


def test_numbers_of_a_curve_broadcast_with_lengths():
    curve = costmodel.GeometricCurve(np.array([[0.5], [0.9]], np.float32))
    table = costmodel.accepted_length(curve, np.array([0, 1, 2]))
    np.testing.assert_allclose(table, [[0, 0.5, 0.75], [0, 0.9, 1.71]], rtol=1e-6)


def test_lists_and_arrays_are_the_same_curve():
    lists = costmodel.MeasuredCurve([2, 4, 8], [1.4, 2.3, 3.5])
    for gamma in (1, 4, 9):
        expected = float(costmodel.accepted_length(MEASURED, gamma))
        assert float(costmodel.accepted_length(lists, gamma)) == expected


class Saturating(NamedTuple):
    """A curve of one's own: tokens approach a limit."""

    limit: float

    def accepted(self, gamma):
        return -self.limit * jnp.expm1(-gamma)

    def check(self):
        if self.limit <= 0:
            raise ValueError(f"limit={self.limit}")


def test_own_curves_are_curves():
    found = costmodel.accepted_length(Saturating(1.0), np.array([0.0, 1.0, 2.0]))
    np.testing.assert_allclose(found, 1 - np.exp([0.0, -1.0, -2.0]), rtol=1e-6)
    with pytest.raises(ValueError, match="limit=0"):
        costmodel.accepted_length(Saturating(0), 1)
    shares = costmodel.acceptance_by_position(Saturating(1.0), 2)
    np.testing.assert_allclose(shares, np.diff(1 - np.exp([0.0, -1.0, -2.0])), rtol=1e-5)


def length_of(curve, gamma=1):
    """A function without arguments, to be refused."""
    return lambda: costmodel.accepted_length(curve, gamma)


def fit_of(*arguments):
    """The same of a fit."""
    return lambda: costmodel.fit_length_curve(*arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (length_of(CURVES["power"], -1), "gamma=-1 must be at least 0 and finite"),
        (length_of(CURVES["power"], math.nan), "gamma=nan"),
        (length_of(CURVES["power"], [1, math.inf]), r"gamma=inf \(in an array of shape \(2,\)\)"),
        (length_of(costmodel.PowerCurve(0.0, 0.5)), r"PowerCurve\.coefficient=0 must be positive"),
        (length_of(costmodel.PowerCurve(0.9, 0.0)), r"PowerCurve\.exponent=0 must be above 0"),
        (length_of(costmodel.PowerCurve(0.9, 1.1)), r"PowerCurve\.exponent=1.1 must be above 0"),
        (length_of(costmodel.GeometricCurve(1.1)), r"alpha=1.1 must be in \[0, 1\]"),
        (length_of(costmodel.GeometricCurve(math.nan)), r"GeometricCurve\.alpha=nan"),
        (
            length_of(costmodel.MeasuredCurve([1, 2], [0.5])),
            r"gammas of shape \(2,\) and lengths of shape \(1,\) must both have shape \[K\]",
        ),
        (length_of(costmodel.MeasuredCurve([], [])), r"gammas of shape \(0,\)"),
        (length_of(costmodel.MeasuredCurve(1.0, 0.5)), r"gammas of shape \(\)"),
        (length_of(costmodel.MeasuredCurve([0, 2], [0, 1])), "gammas=0"),
        (length_of(costmodel.MeasuredCurve([2, 1], [0.5, 1])), "must be in rising order"),
        (length_of(costmodel.MeasuredCurve([1, 2], [-0.5, 1])), r"MeasuredCurve\.lengths=-0.5"),
        (length_of(costmodel.MeasuredCurve([1, 2], [0.9, 0.8])), "slope of MeasuredCurve.lengths"),
        (length_of(costmodel.MeasuredCurve([1, 2], [0.9, 2.0])), r"lengths=1.1 .* in \[0, 1\]"),
        (length_of(costmodel.PositionCurve(0.5)), r"by_position of shape \(\)"),
        (length_of(costmodel.PositionCurve([])), r"by_position of shape \(0,\)"),
        (length_of(costmodel.PositionCurve([1.2])), r"PositionCurve\.by_position=1.2"),
        (length_of(costmodel.PositionCurve([0.5, 0.6])), "shares of rounds that do not rise"),
        (
            lambda: costmodel.acceptance_by_position(CURVES["power"], 0),
            "max_gamma=0 must be at least 1",
        ),
        (fit_of([1, 2, 4], [0.5, 1, 1.5], "cubic"), "form='cubic' must be one of power, geometric"),
        (fit_of([0, 2, 4], [0, 1, 1.5]), "gammas=0"),
        (fit_of([1, 2, 4], [0.5, -1, 1.5]), "lengths=-1"),
        (fit_of([1, 2, 4], [1.5, 1, 1.5]), "lengths per token of gammas=1.5"),
        (fit_of([1, 2, 4], [0.5, 1]), "lengths"),
        (fit_of([1, 2], [0.5, 0.8]), "2 rows do not determine 2 parameters"),
        (fit_of([4, 4, 4], [1.9, 2.0, 2.1]), "exponent"),
        (fit_of([4], [2], "geometric"), "1 rows do not determine 1 parameters"),
    ],
)
def test_wrong_numbers_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_traced_numbers_pass_unchecked():
    assert np.isfinite(accepted_length(costmodel.GeometricCurve(1.5), 3.0))
