"""The best draft length of a batch against grids, other optima and theorems; rounds by courses."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64
from examples import COMPILED, H100, LLAMA_1B, LLAMA_8B
from gradients import assert_gradient_is_a_difference
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxsd import costmodel

MOST = 16
GRID = np.arange(0, MOST * 32 + 1) / 32
BATCHES = np.array([1.0, 4.0, 16.0])
# The power that fits what the serving script of arXiv 2310.18813 looks up.
POWER = costmodel.PowerCurve(0.9, 0.548)
HARDWARE = costmodel.HardwareTimes(LLAMA_8B, LLAMA_1B, H100, COMPILED, 2000.0, 2.0)
GAMMAS = np.array([0.0, 1.0, 2.0, 5.0, 16.0])
KNOTS = np.array([1.0, 2.0, 4.0, 6.0, 9.0])


def numbers(low, high, size):
    """Arrays of that many numbers."""
    return st.lists(st.floats(low, high), min_size=size, max_size=size).map(np.array)


def bent_up(steps):
    """Times measured at five lengths, whose slopes do not fall, for three batch sizes."""
    plain, slopes = steps[:3], np.sort(steps[3:].reshape(3, 4), axis=1)
    rises = np.cumsum(slopes * np.diff(GAMMAS), axis=1)
    grid = 0.1 + plain[:, None] + np.concatenate([np.zeros((3, 1)), rises], axis=1)
    return costmodel.MeasuredTimes(BATCHES, GAMMAS, grid, plain / 4)


# Falling shares are products of chances, each given that all tokens before were accepted.
shares = numbers(0.0, 1.0, 5).map(np.cumprod)
roofline = st.builds(
    costmodel.Roofline,
    st.floats(0.05, 1.0),
    st.floats(0.001, 0.1),
    st.floats(0.0, 0.1),
    st.floats(0.0, 0.2),
    st.floats(1.0, 16.0),
)
CURVES = {
    "power": st.builds(costmodel.PowerCurve, st.floats(0.1, 1.0), st.floats(0.05, 1.0)),
    "geometric": st.builds(costmodel.GeometricCurve, st.floats(0.0, 1.0)),
    "measured": shares.map(
        lambda x: costmodel.MeasuredCurve(KNOTS, np.cumsum(x * np.diff(KNOTS, prepend=0)))
    ),
    "position": shares.map(costmodel.PositionCurve),
}
TIMES = {
    "linear": st.builds(
        costmodel.LinearTimes,
        st.just(BATCHES),
        numbers(0.2, 2.0, 3),
        numbers(0.0, 0.8, 3),
        numbers(0.0, 0.3, 3),
    ),
    "roofline": st.builds(costmodel.RooflineTimes, roofline, roofline),
    "hardware": st.builds(HARDWARE._replace, context=st.floats(0.0, 30000.0)),
    "measured": numbers(0.0, 0.5, 15).map(bent_up),
}
# Every curve on lines and rooflines, and all times for a curve with corners and one without.
PAIRS = [
    (curve, times)
    for curve, times in itertools.product(CURVES, TIMES)
    if times in ("linear", "roofline") or curve in ("power", "position")
]


@jax.jit
def solve(curve, times, batch):
    """Both optima, and what the objective is made of on the grid and, last, at the optimum."""
    best = costmodel.optimal_gamma_for_batch(curve, times, batch, MOST)
    whole = costmodel.optimal_integer_gamma_for_batch(curve, times, batch, MOST)
    gammas = jnp.concatenate([jnp.asarray(GRID, best.dtype), best[None]])
    tokens = costmodel.accepted_length(curve, gammas)
    return best, whole, tokens, costmodel.round_seconds(times, batch, gammas)


def solved(curve, times, batch):
    """The same as numbers of the host, in float64; compiled once for a kind of curve and times."""
    with enable_x64():
        question = jax.tree.map(np.float64, (curve, times, batch))
        best, whole, tokens, seconds = map(np.asarray, solve(*question))
    return float(best), int(whole), seconds / (1 + tokens)


def lines(ratio, draft=0.0):
    """Times on a line: a plain step 1, verifying a token that ratio of it, and drafting one."""
    ones = np.ones(3)
    return costmodel.LinearTimes(BATCHES, ones, ratio * ones, draft * ones)


MEASURED = bent_up(np.concatenate([[0.3, 0.4, 0.7], np.linspace(0.02, 0.3, 12)]))
ROOFLINE = costmodel.RooflineTimes(
    costmodel.Roofline(1.0, 0.1, 0.01, 0.05, 4.0),
    costmodel.Roofline(0.05, 0.002, 0.001, 0.01, 8.0),
)
LINEAR = costmodel.LinearTimes(
    BATCHES, np.array([1.0, 1.1, 1.4]), np.array([0.02, 0.05, 0.2]), np.array([0.03, 0.03, 0.04])
)
MEASURED_CURVE = costmodel.MeasuredCurve(KNOTS, np.array([0.8, 1.4, 2.4, 3.2, 4.1]))
# At batch sizes whose best length is no corner. Gradients of hardware are those of its passes.
EXAMPLES = {
    "power-linear": (POWER, LINEAR, 3.0),
    "geometric-measured": (costmodel.GeometricCurve(0.9), MEASURED, 2.5),
    "measured-roofline": (MEASURED_CURVE, ROOFLINE, 3.0),
}


# --- the best length -----------------------------------------------------------------------------


@pytest.mark.parametrize(("curve_kind", "times_kind"), PAIRS)
def test_optima_equal_an_exhaustive_grid(curve_kind, times_kind):
    """Over 513 lengths, in float64; of equally good whole lengths it is the smallest.

    Beyond the largest batch measured times do not bend up in every case, as they would have to.
    """
    batches = st.floats(0.5, 16.0 if times_kind == "measured" else 40.0)

    @settings(max_examples=40)
    @given(CURVES[curve_kind], TIMES[times_kind], batches)
    def check(curve, times, batch):
        best, whole, per_token = solved(curve, times, batch)
        assert 0 <= best <= MOST
        assert per_token[-1] <= per_token[:-1].min() * (1 + 1e-12)
        at_whole = per_token[:-1:32]
        assert at_whole[whole] <= at_whole.min() * (1 + 1e-12)
        assert (at_whole[:whole] > at_whole[whole] * (1 - 1e-12)).all()
        if best == 0:
            assert at_whole[whole] >= at_whole[0] * (1 - 1e-12)

    check()


@settings(max_examples=50)
@given(
    curve=CURVES["power"],
    grid=numbers(0.1, 1.0, 15),
    draft=numbers(0.0, 0.2, 3),
    batch=st.floats(0.5, 40.0),
)
def test_steps_of_a_measured_grid_do_not_hide_a_better_whole_length(curve, grid, draft, batch):
    """Times that jump up and down, as kernels do from size to size: all lengths are tried."""
    times = costmodel.MeasuredTimes(BATCHES, GAMMAS, grid.reshape(3, 5), draft)
    _, whole, per_token = solved(curve, times, batch)
    assert int(np.argmin(per_token[:-1:32])) == whole
    assert per_token[-1] <= per_token[:-1:32].min() * (1 + 1e-12)


@pytest.mark.parametrize(
    ("ratio", "gamma"), [(0.05, 15.7), (0.1, 6.4), (0.2, 2.4), (0.4, 0.80), (0.8, 0.24)]
)
def test_best_length_of_a_power_solves_its_condition(ratio, gamma):
    """a (1 + (1 - g) c s^g) = g c s^(g - 1): the root, and what it comes to, worked out apart."""
    c, g = POWER
    found = solved(POWER, lines(ratio), 1.0)[0]
    left = ratio * (1 + (1 - g) * c * found**g)
    assert left == pytest.approx(g * c * found ** (g - 1), rel=1e-12)
    assert found == pytest.approx(gamma, abs=0.05 if gamma > 1 else 0.006)


@pytest.mark.parametrize("curve", [POWER, costmodel.GeometricCurve(0.8)])
def test_whole_lengths_change_exactly_where_two_are_equally_good(curve):
    """Both sides of the ratio at which (1 + r s) / (1 + l(s)) is that of one token less."""
    with enable_x64():
        lengths = np.asarray(costmodel.accepted_length(curve, np.arange(MOST + 1.0)))
    for s in range(1, MOST + 1):
        gained = lengths[s] - lengths[s - 1]
        ratio = gained / (s * (1 + lengths[s - 1]) - (s - 1) * (1 + lengths[s]))
        assert solved(curve, lines(ratio * (1 - 1e-6)), 1.0)[1] == s
        assert solved(curve, lines(ratio * (1 + 1e-6)), 1.0)[1] == s - 1


@pytest.mark.parametrize("alpha", [0.2, 0.6, 0.9])
@pytest.mark.parametrize(("token", "draft"), [(0.0, 0.05), (0.1, 0.02), (0.3, 0.3)])
def test_one_sequence_is_the_textbooks_optimum(alpha, token, draft, x64):
    """By Lambert's function there, by bisection here."""
    found = solved(costmodel.GeometricCurve(alpha), lines(token, draft), 1.0)[0]
    expected = costmodel.optimal_gamma(alpha, draft, verify_slope=token)
    assert found == pytest.approx(float(expected), abs=1e-9)


@pytest.mark.parametrize("ratio", [0.42, 0.44, 0.45])
def test_a_best_length_just_beyond_the_last_measured_one_is_found(ratio):
    """The slope at the last length used to be half of what it is, and the search went back."""
    curve = costmodel.PositionCurve(np.array([0.95, 0.9, 0.85, 0.8, 0.75]))
    best, _, per_token = solved(curve, lines(ratio), 1.0)
    assert 5 < best < 6
    assert per_token[-1] < per_token[32 * 5] * (1 - 1e-6)
    assert per_token[-1] <= per_token[:-1].min()


def test_no_speculation_wherever_nothing_is_gained():
    """A drafted token that costs as much as it brings is not drafted, nor is a part of it."""
    half = costmodel.GeometricCurve(0.5)
    assert solved(half, lines(0.5), 1.0)[1] == 0
    assert solved(half, lines(math.log(2) - 1e-6), 1.0)[0] > 0  # its slope at 0 is the logarithm
    assert solved(half, lines(math.log(2) + 1e-6), 1.0)[:2] == (0, 0)
    by_position = costmodel.PositionCurve(0.5 ** np.arange(1.0, 6.0))
    assert solved(by_position, lines(0.5), 1.0)[:2] == (0, 0)
    assert solved(costmodel.GeometricCurve(0.0), lines(0.0), 1.0)[:2] == (0, 0)


@pytest.mark.parametrize("most", [0, 1, 7])
def test_a_free_draft_is_as_long_as_it_may_be(most):
    question = costmodel.GeometricCurve(1.0), lines(0.0), 1
    assert float(costmodel.optimal_gamma_for_batch(*question, most)) == most
    assert int(costmodel.optimal_integer_gamma_for_batch(*question, most)) == most


def test_nobody_drafts_more_than_32_tokens_by_default():
    question = costmodel.GeometricCurve(1.0), lines(0.0), 1
    assert int(costmodel.optimal_integer_gamma_for_batch(*question)) == 32


def test_measured_times_end_the_search():
    """By default at their last length, inside a jit as outside, where it used to be 32."""
    times = costmodel.MeasuredTimes(
        np.array([1.0]), np.array([0.0, 2.0, 5.0]), np.array([[1.0, 1.0, 1.0]]), np.array([0.0])
    )
    curve = costmodel.GeometricCurve(0.9)
    for function in (costmodel.optimal_gamma_for_batch, costmodel.optimal_integer_gamma_for_batch):
        assert float(function(curve, times, 1.0)) == 5
        assert float(jax.jit(function)(curve, times, 1.0)) == 5
        assert float(function(curve, times, 1.0, 3)) == 3
        with pytest.raises(ValueError, match="max_gamma=6 lies beyond the measured draft lengths"):
            function(curve, times, 1.0, 6)


# --- the fall of the best length in the batch ----------------------------------------------------


@settings(max_examples=60)
@given(
    curve=st.one_of(*CURVES.values()),
    fixed=numbers(0.1, 2.0, 3),
    ratios=numbers(0.0, 1.5, 3).map(np.sort),
    draft=st.floats(0.0, 1.0),
    batches=st.tuples(st.floats(0.5, 16.0), st.floats(0.5, 16.0)).map(sorted),
)
def test_best_length_never_rises_with_the_batch_on_lines_of_rising_ratio(
    curve, fixed, ratios, draft, batches
):
    """Where a drafted token costs an ever larger share of a plain step; for every curve.

    Longer against shorter, (1 + l') / (1 + l) stays while (1 + r s') / (1 + r s) rises in r.
    Between batch sizes the ratio of two interpolated numbers lies between theirs.
    """
    whole = fixed * ratios
    times = costmodel.LinearTimes(BATCHES, fixed, (1 - draft) * whole, draft * whole)
    few, many = (solved(curve, times, batch) for batch in batches)
    assert many[0] <= few[0] + 1e-7
    # Ties are broken downwards, but for their rounding.
    at_whole = few[2][:-1:32]
    assert many[1] <= few[1] or at_whole[many[1]] <= at_whole[few[1]] * (1 + 1e-12)


@pytest.mark.parametrize("curve", [POWER, costmodel.GeometricCurve(0.8)])
def test_best_length_falls_strictly_with_the_ratio(curve):
    """For a curve without corners, as long as it is neither 0 nor the longest."""
    found = np.array([solved(curve, lines(x), 1.0)[0] for x in np.geomspace(0.03, 2.0, 40)])
    inside = (found > 0) & (found < MOST)
    assert inside.sum() > 20
    assert (np.diff(found[inside]) < 0).all()
    assert (np.diff(found) <= 0).all()


@settings(max_examples=60)
@given(
    curve=st.one_of(*CURVES.values()),
    target=st.tuples(st.floats(0.05, 1.0), st.floats(0.001, 0.1), st.floats(0.0, 0.3)),
    draft=st.tuples(st.floats(0.001, 0.5), st.floats(0.0001, 0.05), st.floats(0.0, 0.1)),
    batches=st.tuples(st.floats(0.5, 60.0), st.floats(0.5, 60.0)).map(sorted),
)
def test_best_length_never_rises_with_the_batch_on_a_hinge_without_cache(
    curve, target, draft, batches
):
    """Reading weights or arithmetic, whichever is longer: up to the hinge only the draft's steps
    count, and these do not get cheaper; beyond it a token costs more the larger the batch, or,
    where a draft step outweighs all that is fixed, no curve is steep enough that accepts at most
    what is drafted. A power accepts more below one token, so its parts of tokens are left out.
    """
    times = costmodel.RooflineTimes(
        costmodel.Roofline(target[0], target[1], 0.0, target[2], math.inf),
        costmodel.Roofline(draft[0], draft[1], 0.0, draft[2], math.inf),
    )
    few, many = (solved(curve, times, batch) for batch in batches)
    # The hinge is a smooth maximum of sharpness 1e6, and ends that far from a corner.
    assert many[0] <= max(few[0], 1.0 if isinstance(curve, costmodel.PowerCurve) else 0.0) + 1e-4
    at_whole = few[2][:-1:32]
    assert many[1] <= few[1] or at_whole[many[1]] <= at_whole[few[1]] * (1 + 2e-6)


def test_best_length_rises_where_only_the_target_reads_a_long_cache():
    """A counterexample to the fall: with a cache to read per sequence a plain step takes ever
    longer, tokens to verify come free, and the same draft step is an ever smaller share.
    """
    times = costmodel.RooflineTimes(
        costmodel.Roofline(weight_seconds=10e-3, token_seconds=1e-7, cache_seconds=2e-3),
        costmodel.Roofline(weight_seconds=4e-3, token_seconds=1e-8),
    )
    curve = costmodel.GeometricCurve(0.8)
    found = [solved(curve, times, batch)[:2] for batch in (1.0, 4.0, 16.0, 64.0)]
    assert (np.diff(found, axis=0) > 0.5).all()


# --- goodput -------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    curve=CURVES["geometric"],
    times=TIMES["linear"],
    batch=st.floats(0.5, 40.0),
    gamma=st.floats(0.0, 40.0),
)
def test_goodput_is_tokens_of_all_sequences_over_time(curve, times, batch, gamma):
    with enable_x64():
        question = jax.tree.map(np.float64, (curve, times, batch, gamma))
        seconds, tokens, per_token, good, plain = map(float, _measures(*question))
    assert good * seconds == pytest.approx(batch * (1 + tokens), rel=1e-12)
    assert good * per_token == pytest.approx(batch, rel=1e-12)
    # Over plain decoding it is the speed-up, as it is defined for one sequence.
    gain = costmodel.speedup(
        np.float64(curve.alpha), gamma, 1e-30, verify_ratio=seconds / (batch / plain)
    )
    assert good / plain == pytest.approx(float(gain), rel=1e-5)


@jax.jit
def _measures(curve, times, batch, gamma):
    """Seconds, tokens, seconds per token, and goodput with and without speculation."""
    return (
        costmodel.round_seconds(times, batch, gamma),
        costmodel.accepted_length(curve, gamma),
        costmodel.token_seconds(curve, times, batch, gamma),
        costmodel.goodput(curve, times, batch, gamma),
        costmodel.goodput(curve, times, batch, 0.0 * gamma),
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_marginal_gain_is_positive_up_to_the_best_length_and_negative_beyond(name, x64):
    """And its integral is what the logarithm of goodput gains: the slope of nothing else."""
    curve, times, batch = EXAMPLES[name]
    best, _, per_token = solved(curve, times, batch)
    middles = (GRID[1:] + GRID[:-1]) / 2
    every = np.concatenate([GRID, middles, [best]])
    every = np.asarray(costmodel.marginal_gain(curve, times, batch, every))
    gain, between, at_best = np.split(every, [len(GRID), -1])
    # A power is infinitely steep at 0, and its slope there is given as 0.
    start = int(isinstance(curve, costmodel.PowerCurve))
    assert (gain[start:][GRID[start:] < best - 1e-3] > 0).all()
    assert (gain[best + 1e-3 < GRID] < 0).all()
    assert abs(float(at_best[0])) < 1e-12
    gained = -np.diff(np.log(per_token[:-1]))
    np.testing.assert_allclose(between[32:] / 32, gained[32:], rtol=1e-3, atol=1e-6)


def test_marginal_gain_of_the_first_token_counts_all_of_it(x64):
    """Measured curves and measured times used to begin with half their slopes."""
    curve = costmodel.PositionCurve(np.array([0.8, 0.6]))
    times = costmodel.MeasuredTimes(*map(np.array, ([1.0], [0.0, 2.0], [[1.0, 1.4]], [0.1])))
    assert float(costmodel.marginal_gain(curve, times, 1.0, 0.0)) == pytest.approx(0.8 - 0.3)


# --- batches that wait for their slowest sequence ------------------------------------------------


@pytest.mark.parametrize(("batch", "rounds"), [(1, 46.6), (8, 52.2), (32, 55.0)])
def test_rounds_of_128_tokens_worked_out_apart(batch, rounds):
    """alpha 0.7, four drafted tokens, 128 tokens: printed to a tenth."""
    curve_shares = costmodel.acceptance_by_position(costmodel.GeometricCurve(0.7), 4)
    found = float(costmodel.run_to_completion_rounds(curve_shares, 128, batch))
    assert found == pytest.approx(rounds, abs=0.05)


def courses(curve_shares, num_tokens):
    """Every course of one sequence: rounds until it has its tokens, and the chance of it."""
    chances = -np.diff([1.0, *curve_shares, 0.0])
    paths = [(0, 0, 1.0)]
    while paths:
        tokens, rounds, chance = paths.pop()
        if tokens >= num_tokens:
            yield rounds, chance
        else:
            paths += [(tokens + k, rounds + 1, chance * p) for k, p in enumerate(chances, 1)]


@pytest.mark.parametrize(
    ("curve_shares", "num_tokens"), [([0.7, 0.3], 5), ([0.9, 0.9, 0.0], 4), ([0.4], 6), ([1.0], 1)]
)
def test_rounds_equal_enumeration_of_all_courses_of_all_sequences(curve_shares, num_tokens, x64):
    paths = list(courses(curve_shares, num_tokens))
    law = {n: sum(p for rounds, p in paths if rounds == n) for n, _ in paths}
    for batch in (1, 2, 3):
        expected = sum(
            max(n for n, _ in together) * math.prod(p for _, p in together)
            for together in itertools.product(law.items(), repeat=batch)
        )
        found = costmodel.run_to_completion_rounds(np.array(curve_shares), num_tokens, batch)
        assert float(found) == pytest.approx(expected, rel=1e-13)


def test_rounds_of_one_sequence_solve_the_renewal_equation(x64):
    """m(n) = 1 + sum over k of p_k m(n - k)."""
    curve_shares = np.array([0.8, 0.55, 0.5, 0.2])
    chances = -np.diff([1.0, *curve_shares, 0.0])
    mean = [0.0]
    for n in range(1, 101):
        mean.append(1 + sum(p * mean[max(n - k, 0)] for k, p in enumerate(chances, 1)))
    found = float(costmodel.run_to_completion_rounds(curve_shares, 100, 1))
    assert found == pytest.approx(mean[100], rel=1e-13)
    assert found >= 100 / (1 + curve_shares.sum())


def test_rounds_equal_a_simulation_of_batches():
    """4000 batches of 8; 5.5 standard errors are left by chance once in 2.6e7."""
    curve_shares = np.array([0.7, 0.5, 0.1])
    draws = np.random.default_rng(0).random((4000, 8, 40))
    tokens = 1 + (draws[..., None] < curve_shares).sum(-1)
    rounds = (np.cumsum(tokens, axis=2) < 40).sum(2).max(1) + 1
    expected = float(costmodel.run_to_completion_rounds(curve_shares, 40, 8))
    assert abs(rounds.mean() - expected) < 5.5 * rounds.std() / math.sqrt(4000)


def test_certain_rounds_are_counted_exactly():
    """Nothing or everything is accepted, or nothing is drafted: all sequences keep step."""
    for curve_shares, rounds in (([0.0, 0.0], 10), ([1.0, 1.0], 4), ([1.0, 1.0, 0.0], 4), ([], 10)):
        found = costmodel.run_to_completion_rounds(np.array(curve_shares), 10, [1, 5, 1000])
        np.testing.assert_allclose(found, rounds, rtol=1e-5)


def test_rounds_rise_with_the_batch_and_with_nothing_else_to_wait_for_stay_below_the_tokens(x64):
    batches = np.array([1.0, 1.5, 2.0, 8.0, 1e3, 1e9])
    found = np.asarray(costmodel.run_to_completion_rounds(np.array([0.7, 0.4]), 10, batches))
    assert (np.diff(found) > 0).all()
    assert (found <= 10).all()
    assert found[-1] > 9.999


# --- gradients -----------------------------------------------------------------------------------


def measure(curve, times, batch, gamma):
    """What there is to differentiate."""
    return (
        costmodel.token_seconds(curve, times, batch, gamma),
        jnp.log(costmodel.goodput(curve, times, batch, gamma)),
        costmodel.marginal_gain(curve, times, batch, gamma),
        costmodel.optimal_gamma_for_batch(curve, times, batch, MOST),
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_gradients_match_finite_differences(name, x64):
    """Of every function, in shares of every number of curve and times, of batch and of gamma."""
    leaves, structure = jax.tree.flatten((*EXAMPLES[name], 2.6))
    point = np.concatenate([np.ravel(np.float64(leaf)) for leaf in leaves])
    ends = np.cumsum([np.size(leaf) for leaf in leaves])[:-1]

    def weighted(shares):
        parts = zip(jnp.split(point * shares, ends), leaves, strict=True)
        question = jax.tree.unflatten(structure, [x.reshape(np.shape(y)) for x, y in parts])
        seconds, log_goodput, gain, best = measure(*question)
        return seconds + 0.3 * log_goodput + gain + best / 10

    best = solved(*EXAMPLES[name])[0]
    assert 0.5 < best < MOST - 0.5
    assert abs(best - round(best)) > 1e-3
    assert_gradient_is_a_difference(weighted, np.ones(len(point)), rel=2e-6)


def test_second_derivatives_pass_through_the_root(x64):
    """The bisection is not differentiated; the rule in its place must itself differentiate."""

    def best(ratio):
        times = lines(0.0)._replace(token_seconds=ratio * jnp.ones(3))
        return costmodel.optimal_gamma_for_batch(POWER, times, 1.0, MOST)

    step = 1e-4
    ends = [solved(POWER, lines(0.2 + x), 1.0)[0] for x in (-step, 0.0, step)]
    difference = (ends[0] - 2 * ends[1] + ends[2]) / step**2
    assert float(jax.jit(jax.hessian(best))(0.2)) == pytest.approx(difference, rel=1e-4)


def test_best_length_does_not_move_from_an_end_or_a_corner(x64):
    def best(curve, ratio):
        times = lines(1.0)._replace(token_seconds=ratio * jnp.ones(3))
        return costmodel.optimal_gamma_for_batch(curve, times, 1.0, MOST)

    both = jax.jit(jax.value_and_grad(best, argnums=(0, 1)))
    corner = MEASURED_CURVE._replace(lengths=np.array([0.8, 1.4, 2.4, 2.6, 2.8]))
    free, dear = (corner._replace(lengths=x * KNOTS) for x in (0.99, 0.5))
    for curve, ratio, expected in ((dear, 0.9, 0), (free, 0.001, MOST), (corner, 0.3, 4)):
        value, slopes = both(curve, ratio)
        assert float(value) == pytest.approx(expected, abs=1e-12)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(slopes))


def test_gradients_of_rounds_match_finite_differences(x64):
    def weighted(point):
        rounds = costmodel.run_to_completion_rounds(point[:3], 17, point[3:])
        return rounds @ jnp.array([1.0, -2.0])

    assert_gradient_is_a_difference(weighted, [0.8, 0.5, 0.3, 2.5, 7.0])


# --- float32 -------------------------------------------------------------------------------------

seconds_32 = st.floats(2**-20, 16.0, width=32)
perhaps_seconds_32 = st.just(0.0) | seconds_32
chances_32 = st.floats(0.0, 1.0, width=32)


def rows(strategy, size):
    """Arrays of numbers of that type."""
    return st.lists(strategy, min_size=size, max_size=size).map(lambda x: np.array(x, np.float32))


shares_32 = rows(chances_32, 5).map(np.cumprod)
roofline_32 = st.builds(
    costmodel.Roofline,
    seconds_32,
    seconds_32,
    perhaps_seconds_32,
    perhaps_seconds_32,
    st.floats(1.0, 2**20, width=32) | st.just(math.inf),
)
BOXES = {
    "power-linear": (
        st.builds(
            costmodel.PowerCurve, st.floats(2**-7, 1, width=32), st.floats(2**-7, 1, width=32)
        ),
        st.builds(
            costmodel.LinearTimes,
            st.just(BATCHES),
            rows(seconds_32, 3),
            rows(perhaps_seconds_32, 3),
            rows(perhaps_seconds_32, 3),
        ),
    ),
    "geometric-measured": (
        st.builds(costmodel.GeometricCurve, chances_32),
        st.builds(
            costmodel.MeasuredTimes,
            st.just(BATCHES),
            st.just(GAMMAS),
            rows(seconds_32, 15).map(lambda x: x.reshape(3, 5)),
            rows(perhaps_seconds_32, 3),
        ),
    ),
    "measured-roofline": (
        shares_32.map(
            lambda x: costmodel.MeasuredCurve(
                KNOTS, np.cumsum(x * np.diff(KNOTS, prepend=0).astype(np.float32))
            )
        ),
        st.builds(costmodel.RooflineTimes, roofline_32, roofline_32),
    ),
}


@jax.jit
def _values_and_gradients(*question):
    """A number that is not finite leaves no sum finite."""

    def total(question):
        values = measure(*question)
        return sum(values), values

    (_, values), gradients = jax.value_and_grad(total, has_aux=True)(question)
    return values, gradients


@pytest.mark.parametrize("name", BOXES)
def test_values_and_gradients_are_finite_in_float32(name):
    """Times from a microsecond to 16 seconds, batches up to 65536, lengths 0 and 2^-10 to 64."""
    curves, many_times = BOXES[name]

    @settings(max_examples=100)
    @given(
        curve=curves,
        times=many_times,
        batch=st.floats(2**-4, 2**16, width=32),
        gamma=st.just(0.0) | st.floats(2**-10, 64.0, width=32),
    )
    def check(curve, times, batch, gamma):
        question = jax.tree.map(np.float32, (curve, times, batch, gamma))
        values, gradients = _values_and_gradients(*question)
        assert all(value.dtype == np.float32 for value in values)
        assert np.isfinite(values).all()
        assert values[0] > 0
        assert 0 <= values[3] <= MOST
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))

    check()


_rounds_and_gradients = jax.jit(
    jax.value_and_grad(
        lambda shares, batch: costmodel.run_to_completion_rounds(shares, 30, batch), (0, 1)
    )
)


@settings(max_examples=100)
@given(curve_shares=shares_32, batch=st.floats(1.0, 2**20, width=32))
@example(curve_shares=np.ones(5, np.float32), batch=1.0)
@example(curve_shares=np.zeros(5, np.float32), batch=1000.0)
def test_rounds_and_their_gradients_are_finite_in_float32(curve_shares, batch):
    value, gradients = _rounds_and_gradients(curve_shares, np.float32(batch))
    assert value.dtype == np.float32
    assert 5 * (1 - 1e-5) <= float(value) <= 30 * (1 + 1e-5)
    assert all(np.isfinite(leaf).all() for leaf in gradients)


@settings(max_examples=60)
@given(curve=CURVES["geometric"], times=TIMES["roofline"], batch=st.floats(0.5, 100.0))
def test_float32_finds_lengths_as_good_as_float64(curve, times, batch):
    """The optimum is flat, so the lengths themselves are not compared."""
    question = jax.tree.map(np.float32, (curve, times, batch))
    narrow = float(_optimum(*question))
    best = solved(*question)[2][-1]
    with enable_x64():
        found = float(_token_seconds(*jax.tree.map(np.float64, question), narrow))
    assert found == pytest.approx(best, rel=1e-6)


_optimum = jax.jit(lambda *question: costmodel.optimal_gamma_for_batch(*question, MOST))
_token_seconds = jax.jit(costmodel.token_seconds)


# --- the contract of every function --------------------------------------------------------------


def test_functions_map_trace_and_broadcast_alike():
    curve = costmodel.GeometricCurve(np.float32(0.8))
    times = jax.tree.map(np.float32, ROOFLINE)
    batch, gamma = np.float32([1, 6, 40]), np.float32([[0], [2.5]])
    tables = measure(curve, times, batch, gamma)
    assert [table.shape for table in tables] == [(2, 3), (2, 3), (2, 3), (3,)]
    by_batch = jax.vmap(measure, (None, None, 0, None))
    mapped = jax.jit(jax.vmap(by_batch, (None, None, None, 0)))(curve, times, batch, gamma[:, 0])
    for table, other in zip(tables, mapped, strict=True):
        np.testing.assert_allclose(other, np.broadcast_to(table, (2, 3)), rtol=1e-5, atol=1e-6)
    whole = costmodel.optimal_integer_gamma_for_batch(curve, times, batch, MOST)
    assert whole.dtype == np.int32
    one = jax.vmap(lambda b: costmodel.optimal_integer_gamma_for_batch(curve, times, b, MOST))
    np.testing.assert_array_equal(jax.jit(one)(batch), whole)
    found_shares = np.float32([0.5, 0.2])
    rounds = costmodel.run_to_completion_rounds(found_shares, 9, batch)
    one = jax.vmap(lambda b: costmodel.run_to_completion_rounds(found_shares, 9, b))
    np.testing.assert_allclose(jax.jit(one)(batch), rounds, rtol=1e-6)


def test_numbers_of_a_curve_broadcast_with_batches():
    curve = costmodel.GeometricCurve(np.float32([[0.5], [0.9]]))
    found = costmodel.optimal_integer_gamma_for_batch(curve, LINEAR, [1, 16], MOST)
    assert found.shape == (2, 2)
    for row, alpha in zip(found, (0.5, 0.9), strict=True):
        for whole, batch in zip(row, (1.0, 16.0), strict=True):
            assert int(whole) == solved(costmodel.GeometricCurve(alpha), LINEAR, batch)[1]


def test_the_widest_dtype_of_the_arguments_is_the_dtype_of_the_result(x64):
    """Found by tracing, which leaves Python numbers what they are."""
    curve = costmodel.GeometricCurve(np.float32(0.8))
    times = jax.tree.map(np.float32, LINEAR)

    def dtypes(gamma, times):
        return [x.dtype for x in jax.eval_shape(lambda c, t: measure(c, t, 3, gamma), curve, times)]

    assert dtypes(2, times) == [np.float32] * 4
    assert dtypes(np.float64(2), times) == [np.float64] * 3 + [np.float32]
    assert dtypes(2, LINEAR) == [np.float64] * 4
    rounds = jax.eval_shape(
        lambda x: costmodel.run_to_completion_rounds(x, 3, 2), np.float32([0.5])
    )
    assert rounds.dtype == np.float32


def test_lists_and_arrays_are_the_same_question():
    curve = costmodel.MeasuredCurve(*(x.tolist() for x in MEASURED_CURVE))
    times = costmodel.LinearTimes(*(x.tolist() for x in LINEAR))
    found = costmodel.optimal_gamma_for_batch(curve, times, [1, 8], MOST)
    for x, batch in zip(found, (1.0, 8.0), strict=True):
        assert float(x) == pytest.approx(solved(MEASURED_CURVE, LINEAR, batch)[0], rel=1e-5)


@pytest.mark.parametrize(
    "function", [costmodel.token_seconds, costmodel.goodput, costmodel.marginal_gain]
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch=0 must be positive"),
        ({"batch": math.nan}, "batch=nan"),
        ({"gamma": -1}, "gamma=-1 must be at least 0"),
        ({"gamma": [1, math.inf]}, "gamma=inf"),
        ({"curve": costmodel.GeometricCurve(1.5)}, r"GeometricCurve\.alpha=1.5"),
        ({"times": LINEAR._replace(fixed_seconds=[0, 1, 1])}, "fixed_seconds=0"),
    ],
)
def test_wrong_numbers_are_refused_by_name(function, change, message):
    question = {"curve": POWER, "times": LINEAR, "batch": 1, "gamma": 1} | change
    with pytest.raises(ValueError, match=message):
        function(**question)


@pytest.mark.parametrize(
    "function", [costmodel.optimal_gamma_for_batch, costmodel.optimal_integer_gamma_for_batch]
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch=0 must be positive"),
        ({"batch": [1, math.nan]}, "batch=nan"),
        ({"max_gamma": -1}, "max_gamma=-1 must be at least 0"),
        ({"curve": costmodel.PowerCurve(0.9, 1.5)}, r"PowerCurve\.exponent=1.5"),
        ({"times": LINEAR._replace(draft_seconds=[0, -1, 1])}, "draft_seconds=-1"),
        ({"times": MEASURED._replace(gammas=[])}, r"MeasuredTimes\.gammas of shape \(0,\)"),
        ({"times": MEASURED._replace(gammas=3.0)}, r"MeasuredTimes\.gammas of shape \(\)"),
    ],
)
def test_wrong_questions_are_refused_by_name(function, change, message):
    question = {"curve": POWER, "times": LINEAR, "batch": 1} | change
    with pytest.raises(ValueError, match=message):
        function(**question)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5, 3, 1), r"acceptance_by_position of shape \(\) must have shape \[K\]"),
        (([[0.5]], 3, 1), r"acceptance_by_position of shape \(1, 1\)"),
        (([1.5], 3, 1), "acceptance_by_position=1.5"),
        (([0.2, 0.5], 3, 1), r"acceptance_by_position=0.5 .* shares of rounds that do not rise"),
        (([0.5], 0, 1), "num_tokens=0 must be at least 1"),
        (([0.5], 3, 0.5), "batch=0.5 must be at least 1"),
        (([0.5], 3, [1, math.nan]), "batch=nan"),
    ],
)
def test_wrong_batches_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        costmodel.run_to_completion_rounds(*arguments)


def test_traced_numbers_pass_unchecked():
    assert np.isfinite(jax.jit(lambda b: costmodel.token_seconds(POWER, LINEAR, b, 1))(-1.0))
