"""Tables of pass times by tokens: what they give back, what they refuse, rounds made of them."""

import jax
import numpy as np
import pytest

from jaxsd import costmodel

SHAPE = costmodel.Shape(2048, 512, 6, 8, 2, 64, 1408, True)
OTHER = costmodel.Shape(2048, 96, 2, 3, 1, 32, 320, True)
# A kernel in tiles of four: what no roofline says.
TOKENS = np.array([1.0, 2.0, 4.0, 5.0, 8.0, 9.0, 16.0])
SECONDS = np.array([3.2e-3, 5.2e-3, 5.1e-3, 7.3e-3, 7.4e-3, 10.1e-3, 12.0e-3])
TABLE = costmodel.TokenTimes(TOKENS, SECONDS, 0.9e-6, 0.25e-6)


def timed(table, points):
    """Passes that take what a table says."""
    passes = []
    for batch, rows, context in points:
        seconds = np.interp(batch * rows, table.tokens, table.seconds)
        seconds += batch * context * (table.context_seconds + rows * table.row_context_seconds)
        passes.append(costmodel.TimedPass(SHAPE, seconds, batch, rows, context))
    return passes


SIZES = [(1, 1), (1, 2), (2, 1), (1, 4), (4, 1), (1, 5), (1, 8), (4, 2), (1, 9), (4, 4)]
POINTS = [(batch, rows, context) for batch, rows in SIZES for context in (128, 1024)]


def test_a_table_is_found_again():
    found = costmodel.fit_token_times(timed(TABLE, POINTS))
    np.testing.assert_array_equal(found.tokens, TOKENS)
    np.testing.assert_allclose(found.seconds, SECONDS, rtol=1e-9)
    assert found.context_seconds == pytest.approx(0.9e-6, rel=1e-9)
    assert found.row_context_seconds == pytest.approx(0.25e-6, rel=1e-9)


def test_noise_moves_it_by_as_much_as_the_noise():
    rng = np.random.default_rng(0)
    passes = [
        one._replace(seconds=one.seconds * np.exp(rng.normal(0, 0.02)))
        for one in timed(TABLE, POINTS * 4)
    ]
    found = costmodel.fit_token_times(passes)
    np.testing.assert_allclose(found.seconds, SECONDS, rtol=0.05)


def test_attention_that_is_free_costs_nothing_rather_than_less():
    """Passes that get faster with the context: the slope that would be negative is 0."""
    passes = [
        one._replace(seconds=float(one.seconds * (1 - 1e-5 * one.context)))
        for one in timed(TABLE._replace(context_seconds=0.0, row_context_seconds=0.0), POINTS)
    ]
    found = costmodel.fit_token_times(passes)
    assert found.context_seconds == 0 == found.row_context_seconds
    assert (np.asarray(found.seconds) < SECONDS).all()


def test_times_per_cached_token_leave_something_for_the_table():
    """Noise by which a context three times as long takes ten times as long."""
    passes = [
        costmodel.TimedPass(SHAPE, seconds, rows=rows, context=context)
        for rows in (1, 2)
        for seconds, context in ((1e-4, 16), (1e-3, 48))
    ]
    found = costmodel.fit_token_times(passes)
    assert (np.asarray(found.seconds) > 0).all()
    assert found.context_seconds == 0 == found.row_context_seconds


def test_between_the_measured_numbers_it_is_a_line_and_beyond_it_rises_on():
    table = costmodel.TokenTimes(TOKENS, SECONDS)
    times = costmodel.TokenRoundTimes(table, table, 0.0)
    for rows, want in [(6, 7.3e-3 + 0.1e-3 / 3), (23, 12.0e-3 + 1.9e-3)]:
        got = costmodel.round_seconds(times, 1, rows - 1) - (rows - 1) * SECONDS[0]
        assert float(got) == pytest.approx(want, rel=1e-4)


def test_a_round_is_its_passes_and_its_own_time():
    times = costmodel.TokenRoundTimes(TABLE, TABLE, 100.0, 1e-4, 3e-4, 5e-5)
    one = SECONDS[0] + 100 * 1.15e-6
    assert float(costmodel.round_seconds(times, 1, 0)) == pytest.approx(one + 1e-4, rel=1e-5)
    five = SECONDS[3] + 100 * (0.9e-6 + 5 * 0.25e-6)
    want = five + 4 * (one + 5e-5) + 1e-4 + 3e-4
    assert float(costmodel.round_seconds(times, 1, 4)) == pytest.approx(want, rel=1e-5)
    # Two sequences of two tokens stand in the table where four tokens stand.
    pair = SECONDS[2] + 2 * 100 * (0.9e-6 + 2 * 0.25e-6)
    drafted = SECONDS[1] + 2 * 100 * 1.15e-6
    want = pair + drafted + 5e-5 + 4e-4
    assert float(costmodel.round_seconds(times, 2, 1)) == pytest.approx(want, rel=1e-5)


def test_rounds_are_differentiable_in_the_measured_times():
    times = jax.tree.map(np.float32, costmodel.TokenRoundTimes(TABLE, TABLE, 100.0))
    slope = jax.grad(lambda times: costmodel.round_seconds(times, 1, 4))(times)
    np.testing.assert_allclose(slope.target_pass.seconds, [0, 0, 0, 1, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(slope.draft_pass.seconds, [4, 0, 0, 0, 0, 0, 0], atol=1e-6)
    assert float(slope.token_seconds) == 4


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([], "passes is empty"),
        (
            [costmodel.TimedPass(SHAPE, 1.0), costmodel.TimedPass(OTHER, 1.0)],
            "2 values of shape",
        ),
        ([costmodel.TimedPass(SHAPE, 0.0)], "seconds"),
        ([costmodel.TimedPass(SHAPE, 1.0, context=-1)], "context"),
        (
            [costmodel.TimedPass(SHAPE, 1.0, rows=r, context=r) for r in (1, 2, 3)],
            "do not determine 3 numbers of tokens and 2 times per cached token",
        ),
    ],
)
def test_passes_that_make_no_table_are_refused(passes, message):
    with pytest.raises(ValueError, match=message):
        costmodel.fit_token_times(passes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [2.0, 1.0]}, "rising"),
        ({"seconds": [1.0]}, "shape"),
        ({"seconds": [1.0, 0.0]}, "seconds"),
        ({"context_seconds": -1.0}, "context_seconds"),
    ],
)
def test_wrong_tables_are_refused_by_name(change, message):
    table = costmodel.TokenTimes([1.0, 2.0], [1.0, 2.0])._replace(**change)
    good = costmodel.TokenTimes([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(ValueError, match=message):
        costmodel.round_seconds(costmodel.TokenRoundTimes(good, table, 1.0), 1, 1)
    with pytest.raises(ValueError, match="host_seconds"):
        costmodel.round_seconds(costmodel.TokenRoundTimes(good, good, 1.0, -1.0), 1, 1)
