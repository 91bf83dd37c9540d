"""Acceptance by position as a function of perplexity: what it is, and all that is built on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import DRAFT, FOUR_H100, LLAMA_1B, LLAMA_70B, TARGET
from gradients import assert_gradient_is_a_difference
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxsd import costmodel

# Later tokens are accepted more often, given those before them, as where easy places come in runs.
SLOPES = np.array([-0.9, -0.75, -0.7, -0.68])
INTERCEPTS = np.array([3.0, 2.9, 2.95, 3.0])
LAW = costmodel.PositionAcceptanceLaw(SLOPES, INTERCEPTS, costmodel.PerplexityRange(5.0, 40.0))
LAWS = costmodel.SDSL._replace(acceptance=LAW)
LOAD = costmodel.Workload(4, 2000)


def slow_shares(slopes, intercepts, x):
    """One position after the other, in plain Python."""
    shares, share = [], 1.0
    for slope, intercept in zip(slopes, intercepts, strict=True):
        odds = np.exp(intercept) * x**slope
        share *= odds / (1 + odds)
        shares.append(share)
    return shares


def shares_of(law, x, y=7.0):
    return law.shares(*costmodel.laws.as_floats(x, y))


@jax.jit
def _estimate(laws, design):
    result = costmodel.throughput(design, TARGET, FOUR_H100, LOAD, laws)
    names = "speedup", "tokens_per_round", "alpha", "draft_perplexity", "extrapolation"
    return {name: getattr(result, name) for name in names}


def estimate(laws=LAWS, design=DRAFT):
    """What acceptance has to do with, compiled once for a structure and its shapes."""
    return costmodel.Estimate(
        **{**dict.fromkeys(costmodel.Estimate._fields), **_estimate(laws, design)}
    )


def test_shares_are_products_of_odds_that_are_powers_of_perplexity(x64):
    x = np.array([[6.0], [12.0], [30.0]])
    shares = shares_of(LAW, x)
    assert shares.shape == (3, 1, 4)
    expected = [[slow_shares(SLOPES, INTERCEPTS, float(one[0]))] for one in x]
    np.testing.assert_allclose(shares, expected, rtol=1e-13)
    first = costmodel.acceptance(LAW, x, 7.0)
    np.testing.assert_array_equal(first, shares[..., 0])
    certain = costmodel.PositionAcceptanceLaw(SLOPES, INTERCEPTS + 6)
    first = costmodel.acceptance(certain, x, 7.0)
    assert float(first[0, 0]) > 0.999  # not bent
    np.testing.assert_array_equal(first, shares_of(certain, x)[..., 0])


def test_equal_positions_are_one_alpha(x64):
    """At whole lengths, beyond the last position too; between them the two interpolate apart."""
    law = costmodel.PositionAcceptanceLaw(np.full(4, -0.8), np.full(4, 3.1))
    alpha = float(1 / (1 + np.exp(0.8 * np.log(14.0) - 3.1)))
    np.testing.assert_allclose(shares_of(law, 14.0), alpha ** np.arange(1, 5), rtol=1e-13)
    gammas = np.arange(0.0, 9.0)
    laws, design = LAWS._replace(acceptance=law), DRAFT._replace(gamma=gammas)
    result = estimate(laws, design)
    perplexity = np.asarray(result.draft_perplexity)
    alpha = 1 / (1 + np.exp(0.8 * np.log(perplexity) - 3.1))
    tokens = costmodel.expected_tokens(alpha, gammas)
    np.testing.assert_allclose(result.tokens_per_round, tokens, rtol=1e-12)
    np.testing.assert_allclose(result.alpha, np.full(9, alpha), rtol=1e-9)
    np.testing.assert_array_equal(result.extrapolation.alpha, 0)


@jax.jit
def _shares_and_slope(slopes, intercepts, log_x):
    def shares(slopes, intercepts, log_x):
        law = costmodel.PositionAcceptanceLaw(slopes, intercepts)
        return law.shares(jnp.exp(log_x), jnp.ones_like(log_x))

    total = jax.grad(lambda *numbers: shares(*numbers).sum(), argnums=(0, 1, 2))
    return shares(slopes, intercepts, log_x), total(slopes, intercepts, log_x)


NUMBERS = hnp.arrays(np.float32, 6, elements=st.floats(-1e6, 1e6, width=32))
MILD = hnp.arrays(np.float32, 6, elements=st.floats(-2, 2, width=32))


@given(slopes=NUMBERS, intercepts=NUMBERS, log_x=st.floats(0, 20, width=32))
def test_any_numbers_make_shares_that_do_not_rise_and_finite_gradients(slopes, intercepts, log_x):
    shares, gradient = _shares_and_slope(slopes, intercepts, np.float32(log_x))
    costmodel.PositionAcceptance(shares).check()  # probabilities, and not a rounding upwards
    assert all(np.isfinite(part).all() for part in gradient)


@given(slopes=MILD, intercepts=MILD, log_x=st.floats(0, 5, width=32))
def test_shares_lie_inside_and_fall_wherever_float32_can_tell(slopes, intercepts, log_x):
    shares, _ = _shares_and_slope(slopes, intercepts, np.float32(log_x))
    assert (np.asarray(shares) > 0).all()
    assert (np.diff(np.asarray(shares), prepend=1.0) < 0).all()


def test_a_gradient_survives_where_acceptance_is_all_but_certain():
    """1 - s has no digits left in float32 at a logit of 20; the slope s (1 - s) does."""
    slope = jax.grad(lambda b: shares_of(costmodel.PositionAcceptanceLaw([0.0], [b]), 9.0).sum())
    assert float(slope(20.0)) == pytest.approx(np.exp(-20.0), rel=1e-5)


def test_tokens_per_round_are_the_sum_of_the_shares_at_the_predicted_perplexity(x64):
    gammas = np.arange(0.0, 9.0)
    result = estimate(design=DRAFT._replace(gamma=gammas))
    perplexity = float(result.draft_perplexity)
    shares = slow_shares(SLOPES, INTERCEPTS, perplexity)
    sums = 1 + np.cumsum([0.0, *shares])
    np.testing.assert_allclose(result.tokens_per_round[:5], sums, rtol=1e-12)
    beyond = shares[-1] ** (1 + np.arange(1, 5) / 4)  # as it fell on average up to there
    np.testing.assert_allclose(
        result.tokens_per_round[5:], sums[-1] + np.cumsum(beyond), rtol=1e-12
    )
    alike = costmodel.expected_tokens(result.alpha, gammas)
    np.testing.assert_allclose(alike, result.tokens_per_round, rtol=1e-9)
    assert float(result.speedup[0]) == 1.0
    assert float(result.alpha[0]) == pytest.approx(shares[0], rel=1e-12)
    constants = LAWS._replace(acceptance=costmodel.PositionAcceptance(np.array(shares)))
    same = estimate(constants, DRAFT._replace(gamma=gammas))
    np.testing.assert_allclose(same.speedup, result.speedup, rtol=1e-12)
    distance = np.log(perplexity / 2)
    narrow = costmodel.PositionAcceptanceLaw(
        SLOPES, INTERCEPTS + 6, costmodel.PerplexityRange(1.0, 2.0)
    )
    far = estimate(LAWS._replace(acceptance=narrow), DRAFT._replace(gamma=gammas)).extrapolation
    assert float(far.draft_perplexity) == pytest.approx(distance, rel=1e-9)
    assert float(far.alpha) == 0  # nothing is bent, however certain


def test_gradients_of_the_throughput_match_finite_differences(x64):
    """In every number of the law, in what makes the perplexity, and in the length."""

    def log_rates(point):
        law = costmodel.PositionAcceptanceLaw(point[:4], point[4:8])
        scale = costmodel.PerplexityScale(point[8], point[9])
        laws = LAWS._replace(acceptance=law, perplexity_scale=scale)
        result = estimate(laws, DRAFT._replace(tokens=point[10], gamma=point[11:]))
        return (jnp.log(result.speedup) + result.alpha).sum()

    lengths = 2.6, 5.3  # among the positions, and beyond the last
    point = [*SLOPES, *INTERCEPTS, 0.2, 1.1, 9e12, *lengths]
    assert_gradient_is_a_difference(log_rates, point, rel=1e-5)


def test_gradient_in_the_perplexity_matches_finite_differences(x64):
    def tokens(point):
        return costmodel.expected_tokens_by_position(shares_of(LAW, point), 3.5).sum()

    assert_gradient_is_a_difference(tokens, [1.5, 9.0, 60.0])


def test_fields_broadcast_and_maps_agree():
    """Widths and lengths against one law, as many laws against one design, and both mapped."""
    gammas, widths = jnp.arange(0.0, 5.0), jnp.linspace(512.0, 4096.0, 5)
    slopes = np.linspace(0.8, 1.2, 5, dtype=np.float32)[:, None] * SLOPES.astype(np.float32)

    def tokens(gamma, width, slopes):
        shape = LLAMA_1B._replace(d_model=width, n_heads=width / 64)
        intercepts = jnp.broadcast_to(INTERCEPTS.astype(np.float32), slopes.shape)
        laws = LAWS._replace(acceptance=costmodel.PositionAcceptanceLaw(slopes, intercepts))
        return _estimate(laws, DRAFT._replace(shape=shape, gamma=gamma))["tokens_per_round"]

    mapped = jax.jit(jax.vmap(tokens))(gammas, widths, slopes)
    np.testing.assert_allclose(tokens(gammas, widths, slopes), mapped, rtol=1e-6)
    one_law = tokens(gammas, widths, slopes[2])
    assert one_law.shape == (5,)
    assert float(one_law[2]) == pytest.approx(float(mapped[2]), rel=1e-6)
    assert float(one_law[3]) != pytest.approx(float(mapped[3]), rel=1e-3)


@pytest.mark.parametrize(
    "law",
    [
        costmodel.PositionAcceptanceLaw(SLOPES.tolist(), tuple(INTERCEPTS.tolist())),
        costmodel.PositionAcceptance([0.8, 0.7, 0.6]),
    ],
    ids=["law", "measured"],
)
def test_lists_of_numbers_pass_through_jit(law):
    """A list's numbers are traced one by one; asking for its shape used to raise."""
    compiled = jax.jit(lambda law: costmodel.acceptance(law, 9.0, 7.0))
    assert float(compiled(law)) == pytest.approx(float(costmodel.acceptance(law, 9.0, 7.0)))


def test_search_equals_a_grid():
    """The best depth and length on one chip, by the public function over all of them."""
    chips = FOUR_H100.target
    hardware = costmodel.Hardware(chips, chips._replace(tensor_parallel=1))
    template = costmodel.draft_template(LLAMA_70B, tokens=1e12)
    free = {"n_layers": (1.0, 24.0), "gamma": (0.25, 12.0)}
    # The factor of the shape without the range it was fitted on: any depth.
    loss = costmodel.SHAPE_AWARE._replace(fitted=costmodel.LossRange())
    laws = costmodel.SHAPE_AWARE_SDSL._replace(loss=loss, acceptance=LAW)
    result = costmodel.search(TARGET, hardware, template, free, workload=LOAD, laws=laws)

    layers, gammas = np.arange(1.0, 25.0)[:, None], np.arange(0.0, 13.0)[None]
    shape = template.shape._replace(n_layers=layers)
    grid = jax.jit(costmodel.throughput)(
        template._replace(shape=shape, gamma=gammas), TARGET, hardware, LOAD, laws
    )
    fits = np.asarray(grid.memory.excess_ratio) <= 1
    rates = np.where(fits, np.asarray(grid.tokens_per_second), 0)
    i, j = np.unravel_index(rates.argmax(), rates.shape)
    best = result.best
    assert (best.design.shape.n_layers, best.design.gamma) == (layers[i, 0], gammas[0, j])
    assert best.objective == pytest.approx(rates[i, j], rel=1e-5)
    assert 1 < gammas[0, j] < 12
    assert 1 < layers[i, 0] < 24


def test_elasticities_take_every_position():
    """Of a field with one number per position: what one percent more of all of them changes."""
    design = DRAFT._replace(gamma=3.0)
    table = costmodel.elasticities(design, TARGET, FOUR_H100, LOAD, LAWS)
    size = costmodel.parameters_total(DRAFT.shape)
    x = float(costmodel.perplexity(costmodel.BESIROGLU, size, DRAFT.tokens))
    # Of the speed-up, the law moves the tokens per round alone.
    ends = [
        np.log(1 + sum(slow_shares(SLOPES, INTERCEPTS * (1 + 1e-5 * sign), x)[:3]))
        for sign in (1, -1)
    ]
    expected = (ends[0] - ends[1]) / 2e-5
    assert table["laws.acceptance.intercepts"] == pytest.approx(expected, rel=1e-5)
    assert not any(".fitted." in name for name in table)


class FirstOnly(tuple):
    """A law of one's own: the methods are all that is asked for."""

    fitted = costmodel.PerplexityRange()

    def predict(self, x, y):
        return self.shares(x, y)[..., 0]

    def shares(self, x, y):
        del y
        return jnp.stack([1 / x, 0 * x], -1)

    def check(self):
        pass


def test_a_law_of_ones_own_needs_only_the_methods():
    law = FirstOnly()
    assert isinstance(law, costmodel.AnyPositionLaw)
    assert not isinstance(costmodel.SDSL_ACCEPTANCE, costmodel.AnyPositionLaw)
    result = costmodel.throughput(DRAFT, TARGET, FOUR_H100, LOAD, LAWS._replace(acceptance=law))
    expected = 1 + 1 / float(result.draft_perplexity)
    assert float(result.tokens_per_round) == pytest.approx(expected, rel=1e-6)


POSITIONS = r"PositionAcceptanceLaw\.slopes of shape "


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: costmodel.acceptance(LAW._replace(slopes=-0.9), 9, 7), POSITIONS + r"\(\)"),
        (lambda: costmodel.acceptance(LAW._replace(slopes=[-0.9]), 9, 7), POSITIONS + r"\(1,\)"),
        (
            lambda: costmodel.acceptance(costmodel.PositionAcceptanceLaw([], []), 9, 7),
            POSITIONS + r"\(0,\) and intercepts of shape \(0,\) must have one shape",
        ),
        (
            lambda: costmodel.acceptance(LAW._replace(slopes=[-1, np.nan, -1, -1]), 9, 7),
            r"PositionAcceptanceLaw\.slopes=nan .* must be finite",
        ),
        (
            lambda: costmodel.throughput(
                DRAFT,
                TARGET,
                FOUR_H100,
                LOAD,
                LAWS._replace(acceptance=LAW._replace(intercepts=[np.inf] * 4)),
            ),
            r"PositionAcceptanceLaw\.intercepts=inf .* must be finite",
        ),
        (lambda: costmodel.acceptance(LAW, 0.5, 7.0), "draft_perplexity=0.5 must be at least 1"),
        (
            lambda: costmodel.calibrate_acceptance(LAW, 9.0, 7.0, 0.7),
            "PositionAcceptanceLaw: one alpha does not say how to move every position",
        ),
        (
            lambda: costmodel.optimal_draft_size(7e10, 15e12, 180e9, LAWS),
            "laws.acceptance is a PositionAcceptanceLaw: this optimum rests on one alpha",
        ),
        (
            lambda: costmodel.optimal_draft_size(
                7e10,
                15e12,
                180e9,
                LAWS._replace(acceptance=costmodel.PositionAcceptance([0.8, 0.7])),
            ),
            "laws.acceptance is a PositionAcceptance: this optimum",
        ),
        (
            lambda: costmodel.speedup_interval(DRAFT, TARGET, FOUR_H100, LOAD, LAWS),
            "PositionAcceptanceLaw, which has no standard errors",
        ),
    ],
)
def test_wrong_numbers_and_questions_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
