"""Tokens per round, the best number of draft tokens, and the converters, each by another route."""

import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from conftest import enable_x64
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxsd import costmodel

# (alpha, 1 / cost_ratio) -> u, gamma, speed-up: computed with scipy's Lambert W to ten digits.
GOLDEN = [
    (0.5, 10, 9.488393992, 2.246164, 1.461042),
    (0.65, 100, 47.508415558, 7.962535, 2.590716),
    (0.65, 247, 111.688309399, 9.946841, 2.721947),
    (0.8, 50, 14.616161911, 11.019742, 3.816726),
    (0.9, 20, 4.507618838, 13.291588, 4.674775),
]
# (alpha, cost_ratio) -> gamma. In the last, Lambert's argument is 1e-52, below float32.
GOLDEN_GAMMA = [
    (0.75, 0.02, 9.0444),
    (0.8, 0.04, 8.5879),
    (0.82, 0.11, 5.972),
    (0.6, 0.1, 2.978),
    (0.9, 0.01, 24.099),
    (0.7, 0.003, 12.523),
]

alphas = st.floats(0.0, 1.0, width=32)
gammas = st.one_of(st.integers(1, 200), st.floats(1.0, 200.0, width=32))
quick = settings(max_examples=150, deadline=None)

# Compiled once for scalars: a property is checked on hundreds of them.
expected_tokens = jax.jit(costmodel.expected_tokens)
optimal_gamma = jax.jit(costmodel.optimal_gamma)
optimal_speedup = jax.jit(costmodel.optimal_speedup)
alpha_to_rate = jax.jit(costmodel.alpha_to_acceptance_rate)
rate_to_alpha = jax.jit(costmodel.acceptance_rate_to_alpha)
rate_to_length = jax.jit(costmodel.acceptance_rate_to_length)
length_to_rate = jax.jit(costmodel.acceptance_length_to_rate)
length_to_alpha = jax.jit(costmodel.acceptance_length_to_alpha)
tokens_gradient = jax.jit(jax.grad(costmodel.expected_tokens, argnums=(0, 1)))


def geometric_sum(alpha, gamma):
    """Tokens per round for a whole gamma: added up one by one, smallest first."""
    return math.fsum(alpha**k for k in range(gamma + 1))


def plain_speedup(alpha, gamma, cost_ratio):
    """The formula of the papers in float64, for alpha < 1 and any real gamma."""
    return (1 - alpha ** (gamma + 1)) / (1 - alpha) / (gamma * cost_ratio + 1)


# --- tokens per round ----------------------------------------------------------------------------


@quick
@given(alpha=alphas, gamma=st.integers(0, 200))
@example(alpha=1.0, gamma=200)
@example(alpha=float(np.float32(1 - 2**-24)), gamma=200)
@example(alpha=float(np.finfo(np.float32).tiny), gamma=1)
def test_expected_tokens_equals_the_sum_of_powers(alpha, gamma):
    value = float(expected_tokens(alpha, float(gamma)))
    assert value == pytest.approx(geometric_sum(alpha, gamma), rel=2e-6)
    assert 1 <= value <= (gamma + 1) * (1 + 2e-6)


def test_expected_tokens_is_exact_at_its_ends():
    gamma = np.array([0.0, 0.3, 1.0, 5.0, 64.0, 1000.0])
    np.testing.assert_array_equal(costmodel.expected_tokens(1.0, gamma), gamma.astype("f4") + 1)
    np.testing.assert_array_equal(costmodel.expected_tokens(0.0, gamma), 1.0)
    alpha = np.linspace(0, 1, 101)
    np.testing.assert_array_equal(costmodel.expected_tokens(alpha, 0), 1.0)


def test_expected_tokens_is_the_mean_of_simulated_rounds():
    """Independent coin flips, cut at the first miss. False alarm: 6 standard errors, 2e-9 each."""
    rng = np.random.default_rng(0)
    num_rounds = 200_000
    for alpha, gamma in [(0.3, 1), (0.65, 10), (0.9, 5), (0.99, 40)]:
        accepted = np.cumprod(rng.random((num_rounds, gamma)) < alpha, axis=1).sum(1)
        tokens = 1 + accepted
        standard_error = tokens.std() / math.sqrt(num_rounds)
        expected = float(costmodel.expected_tokens(alpha, gamma))
        assert abs(tokens.mean() - expected) < 6 * standard_error


@pytest.mark.parametrize("gamma", [1, 2, 4, 10, 64])
@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.05, 0.1, 0.3, 0.9, 1.0])
def test_expected_tokens_has_float32_gradients_up_to_both_ends(gamma, gap):
    """The quotient as printed gives 20 instead of 10 at alpha = 1 - 1e-6 and NaN at 1."""
    alpha = np.float32(1 - gap)
    by_alpha, by_gamma = tokens_gradient(alpha, float(gamma))
    a = float(alpha)
    expected = math.fsum(k * a ** (k - 1) for k in range(1, gamma + 1))
    assert by_alpha == pytest.approx(expected, rel=1e-5)
    # d/dgamma of (1 - a^(gamma + 1)) / (1 - a), and its limits at the ends.
    if a == 1:
        expected = 1 + 0.0 * gamma
    elif a == 0:
        expected = 0.0
    else:
        expected = -math.log(a) * a ** (gamma + 1) / (1 - a)
    assert by_gamma == pytest.approx(expected, rel=1e-5, abs=1e-30)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, g: costmodel.expected_tokens(a, g),
        lambda a, g: costmodel.speedup(a, g, 0.1),
        lambda a, g: costmodel.alpha_to_acceptance_rate(a, g + 0.5),
        lambda a, g: costmodel.acceptance_rate_to_alpha(a, g + 0.5),
        lambda a, g: costmodel.optimal_gamma(a, 0.01 * (g + 1)),
        lambda a, g: costmodel.optimal_speedup(a, 0.01 * (g + 1)),
    ],
    ids=["tokens", "speedup", "rate", "alpha", "optimal_gamma", "optimal_speedup"],
)
def test_every_gradient_is_finite(function):
    alpha = [0.0, 1e-45, 1e-38, 1e-20, 1e-3, 0.4999, 0.5, 0.93, 0.999999, 1.0]
    alpha, gamma = np.meshgrid(np.float32(alpha), np.float32([0.0, 0.25, 0.5, 1.0, 7.5, 100.0]))
    gradient = jax.jit(jax.vmap(jax.grad(function, argnums=(0, 1))))
    for part in gradient(alpha.ravel(), gamma.ravel()):
        assert np.isfinite(part).all()


def test_expected_tokens_is_seamless_where_its_two_forms_meet():
    """Series inside, quotient outside: any jump would show beside the change of the function."""
    with enable_x64():
        gamma = np.array([0.0, 0.5, 1.0, 3.0, 20.0, 500.0])
        seam = np.exp(-0.7 / np.maximum(gamma, 1.0))
        values = jax.jit(jax.vmap(jax.value_and_grad(costmodel.expected_tokens, argnums=(0, 1))))
        inside, outside = values(seam * (1 + 1e-15), gamma), values(seam * (1 - 1e-15), gamma)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-11), inside, outside)


def test_gradients_match_finite_differences_in_float64():
    functions = {
        "expected_tokens": (costmodel.expected_tokens, (0.7, 4.3)),
        "speedup": (costmodel.speedup, (0.7, 4.3, 0.05)),
        "optimal_gamma": (costmodel.optimal_gamma, (0.7, 0.05)),
        "optimal_speedup": (costmodel.optimal_speedup, (0.7, 0.05)),
        "sdsl_throughput": (costmodel.sdsl_throughput, (0.7, 4.3, 3.0, 70.0)),
        "optimal_sdsl_throughput": (costmodel.optimal_sdsl_throughput, (0.7, 3.0, 70.0)),
        "alpha_to_acceptance_rate": (costmodel.alpha_to_acceptance_rate, (0.7, 4.3)),
        "acceptance_rate_to_alpha": (costmodel.acceptance_rate_to_alpha, (0.4, 4.3)),
        "acceptance_length_to_alpha": (costmodel.acceptance_length_to_alpha, (2.5, 4.3)),
    }
    with enable_x64():
        for name, (function, point) in functions.items():
            gradients = jax.jit(jax.grad(function, argnums=tuple(range(len(point)))))(*point)
            function = jax.jit(function)
            for i, value in enumerate(point):
                step = 1e-5 * value
                up, down = list(point), list(point)
                up[i], down[i] = value + step, value - step
                difference = (float(function(*up)) - float(function(*down))) / (2 * step)
                assert float(gradients[i]) == pytest.approx(difference, rel=1e-8), (name, i)


def test_second_derivatives_pass_through_the_root():
    """Newton's steps are not differentiated; the rule in their place must itself differentiate."""
    with enable_x64():
        for function in (costmodel.optimal_gamma, costmodel.optimal_speedup):
            slope = jax.jit(jax.grad(function))
            difference = (float(slope(0.7 + 1e-6, 0.05)) - float(slope(0.7 - 1e-6, 0.05))) / 2e-6
            assert float(jax.grad(slope)(0.7, 0.05)) == pytest.approx(difference, rel=1e-7)


# --- the best gamma ------------------------------------------------------------------------------


@pytest.mark.parametrize(("x64", "tolerance"), [(False, 2e-6), (True, 1e-9)])
def test_golden_optima(x64, tolerance):
    alpha, ratio, u, gamma, gain = np.array(GOLDEN).T
    with enable_x64() if x64 else contextlib.nullcontext():
        found = np.asarray(costmodel.optimal_gamma(alpha, 1 / ratio), np.float64)
        best = costmodel.optimal_speedup(alpha, 1 / ratio)
    np.testing.assert_allclose(found, gamma, rtol=tolerance, atol=1e-6)  # printed to six digits
    np.testing.assert_allclose(best, gain, rtol=tolerance, atol=1e-6)
    # One identity ties the three together.
    np.testing.assert_allclose(alpha ** (found + 1) * u, 1, rtol=20 * tolerance)


def test_golden_gammas():
    alpha, cost_ratio, gamma = np.array(GOLDEN_GAMMA).T
    np.testing.assert_allclose(costmodel.optimal_gamma(alpha, cost_ratio), gamma, atol=6e-4)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.65, 0.9, 0.99])
@pytest.mark.parametrize("cost_ratio", [0.001, 0.02, 0.2, 0.5])
def test_optimal_gamma_beats_brute_force(alpha, cost_ratio):
    grid = np.linspace(0, 400, 400_001)
    values = plain_speedup(alpha, grid, cost_ratio)
    best = values.argmax()
    with enable_x64():
        gamma = float(costmodel.optimal_gamma(alpha, cost_ratio))
        gain = float(costmodel.optimal_speedup(alpha, cost_ratio))
        assert float(costmodel.speedup(alpha, gamma, cost_ratio)) == pytest.approx(gain, rel=1e-12)
    assert gamma == pytest.approx(grid[best], abs=1e-3)
    assert gain == pytest.approx(values[best], rel=1e-7)
    assert gain >= values[best] * (1 - 1e-13)


@quick
@given(alpha=st.floats(0.02, 0.98), cost_ratio=st.floats(0.003, 0.99))
def test_optimal_gamma_is_lamberts_lower_branch(alpha, cost_ratio):
    exponent = (1 / cost_ratio - 1) * math.log(alpha) - 1
    if exponent < -700:
        return  # the argument of W underflows float64 there; other tests have no W
    u = -scipy.special.lambertw(-math.exp(exponent), -1).real
    unclipped = (u - 1) / -math.log(alpha) - 1 / cost_ratio
    with enable_x64():
        gamma = float(optimal_gamma(alpha, cost_ratio))
    # The test's own W is ill-conditioned at its branch point, u = 1.
    tolerance = 1e-9 + 1e-14 * u / (u - 1) / -math.log(alpha) / cost_ratio
    assert gamma == pytest.approx(max(unclipped, 0), abs=tolerance)


@quick
@given(alpha=st.floats(0.0, 1.0, width=32), cost_ratio=st.floats(2**-20, 4.0, width=32))
@example(alpha=1.0, cost_ratio=1.0)
@example(alpha=1.0, cost_ratio=0.5)
def test_do_not_speculate_is_exactly_where_nothing_gains(alpha, cost_ratio):
    gamma = float(optimal_gamma(alpha, cost_ratio))
    gain = float(optimal_speedup(alpha, cost_ratio))
    assert gamma >= 0
    assert gain >= 1
    if alpha == 1:
        threshold = 1.0
    else:
        threshold = -alpha * math.log(alpha) / (1 - alpha) if alpha > 0 else 0.0
    if cost_ratio > threshold * (1 + 1e-5):
        assert gamma == 0
        assert gain == 1
    if cost_ratio < threshold * (1 - 1e-3):
        assert gamma > 0
    if alpha > 0.01 and cost_ratio < threshold * (1 - 0.05):  # else it rounds to 1 in float32
        assert gain > 1


def test_certain_acceptance_drafts_without_end():
    assert float(costmodel.optimal_gamma(1.0, 0.25)) == math.inf
    assert float(costmodel.optimal_speedup(1.0, 0.25)) == 4.0
    assert float(jax.grad(costmodel.optimal_speedup, argnums=1)(1.0, 0.25)) == -16.0


@pytest.mark.parametrize("most", [0, 1, 7, 64])
def test_integer_gamma_equals_brute_force(most):
    """Near-ties may fall either way, to the rounding of the dtype: the speed-ups are compared."""
    rng = np.random.default_rng(2)
    alpha = np.concatenate([[0.0, 0.5, 1.0, 1.0], rng.uniform(0, 1, 500)])
    cost_ratio = np.concatenate([[0.5, 0.5, 0.5, 2.0], np.exp(rng.uniform(-6, 1, 500))])
    gamma = np.arange(most + 1)
    tokens = np.cumsum(alpha[:, None] ** gamma, axis=1)
    gains = tokens / (gamma * cost_ratio[:, None] + 1)
    for x64, tolerance in ((False, 1e-6), (True, 1e-14)):
        with enable_x64() if x64 else contextlib.nullcontext():
            found = costmodel.optimal_integer_gamma(alpha, cost_ratio, most)
        assert found.dtype == np.int32
        chosen = np.take_along_axis(gains, np.asarray(found)[:, None], axis=1)[:, 0]
        assert (chosen >= gains.max(axis=1) * (1 - tolerance)).all()


def test_integer_gamma_breaks_a_tie_downwards():
    """alpha = cost_ratio: one draft token takes exactly as long as it saves."""
    assert int(costmodel.optimal_integer_gamma(0.5, 0.5)) == 0


def test_speedup_of_zero_draft_tokens_is_one():
    np.testing.assert_array_equal(costmodel.speedup(np.linspace(0, 1, 11), 0, 0.3), 1.0)


def test_speedup_counts_verification_and_overhead():
    expected = geometric_sum(0.8, 5) / (5 * 0.05 + 1.3 + 0.2)
    value = costmodel.speedup(0.8, 5, 0.05, verify_ratio=1.3, overhead_ratio=0.2)
    assert float(value) == pytest.approx(expected, rel=1e-6)


def test_throughput_is_speedup_over_two_reads_of_the_target():
    alpha, draft, target = 0.65, 0.3e9, 70553706496
    expected = geometric_sum(alpha, 8) / (2 * (target + 8 * draft))
    assert float(costmodel.sdsl_throughput(alpha, 8, draft, target)) == pytest.approx(
        expected, rel=1e-6
    )
    assert float(costmodel.sdsl_throughput(alpha, 0, draft, target)) == pytest.approx(
        1 / (2 * target), rel=1e-6
    )
    best = scipy.optimize.minimize_scalar(
        lambda gamma: -plain_speedup(alpha, gamma, draft / target), bounds=(0, 50), method="bounded"
    )
    assert float(costmodel.optimal_sdsl_throughput(alpha, draft, target)) == pytest.approx(
        -best.fun / (2 * target), rel=1e-6
    )


# --- converters ----------------------------------------------------------------------------------


@quick
@given(alpha=alphas, gamma=gammas)
@example(alpha=1.0, gamma=3)
@example(alpha=0.0, gamma=3)
@example(alpha=0.0009765625, gamma=200)
@example(alpha=float(np.float32(1 - 2**-24)), gamma=1)
def test_alpha_survives_the_round_trip_through_rate_and_length(alpha, gamma):
    gamma = float(gamma)
    rate = alpha_to_rate(alpha, gamma)
    back = float(rate_to_alpha(rate, gamma))
    assert abs(back - alpha) < 1e-6
    if alpha in (0, 1):
        assert back == alpha
    length = float(rate_to_length(rate, gamma))
    assert length == pytest.approx(float(expected_tokens(alpha, gamma)), rel=1e-6)
    with enable_x64():
        length = expected_tokens(alpha, gamma)
        assert abs(float(length_to_alpha(length, gamma)) - alpha) < 1e-12
        rate = float(length_to_rate(length, gamma))
        assert rate == pytest.approx(float(alpha_to_rate(alpha, gamma)), abs=1e-13)


@quick
@given(rate=st.floats(0.0, 1.0, width=32), gamma=gammas)
def test_rate_survives_the_round_trip_through_alpha(rate, gamma):
    gamma = float(gamma)
    back = float(alpha_to_rate(rate_to_alpha(rate, gamma), gamma))
    # Rounding alpha to float32 moves the rate by up to half of gamma + 1 such roundings.
    assert abs(back - rate) < 1e-6 + gamma * 6e-8


def test_alpha_of_a_rate_agrees_with_bracketing():
    """Against scipy's brentq on the sum of powers: another equation and another method."""
    with enable_x64():
        for gamma in (1, 2, 5, 30):
            for rate in (1e-6, 0.02, 0.36, 0.8, 0.999):
                root = scipy.optimize.brentq(
                    lambda a, gamma=gamma, rate=rate: (geometric_sum(a, gamma) - 1) / gamma - rate,
                    0.0,
                    1.0,
                    xtol=1e-15,
                )
                alpha = float(rate_to_alpha(rate, float(gamma)))
                assert alpha == pytest.approx(root, abs=1e-14)


def test_rate_of_one_draft_token_is_alpha():
    alpha = np.linspace(0, 1, 33, dtype=np.float32)
    np.testing.assert_allclose(costmodel.alpha_to_acceptance_rate(alpha, 1), alpha, rtol=1e-6)


@pytest.mark.parametrize("gamma", [1, 4, 10])
def test_converter_gradients_at_the_ends_are_the_limits(gamma):
    """d rate / d alpha is 1 / gamma at 0 and (gamma + 1) / 2 at 1; the inverse has the inverses."""
    slope, inverse_slope = jax.jit(jax.grad(alpha_to_rate)), jax.jit(jax.grad(rate_to_alpha))
    gamma = float(gamma)
    for end, expected in ((0.0, 1 / gamma), (1.0, (gamma + 1) / 2)):
        assert float(slope(end, gamma)) == pytest.approx(expected, rel=1e-6)
        assert float(inverse_slope(end, gamma)) == pytest.approx(1 / expected, rel=1e-6)


# --- prediction from measured times --------------------------------------------------------------


@pytest.mark.parametrize("per_step", [True, False])
def test_prediction_from_times_equals_a_slow_loop(per_step):
    rng = np.random.default_rng(1)
    alpha, target_seconds = 0.72, 0.021
    verify_seconds = 0.02 + np.cumsum(rng.uniform(0, 2e-3, 9))
    draft_seconds = 0.0015 if per_step else np.concatenate([[0], np.cumsum(np.full(8, 2e-3))])
    prediction = costmodel.best_num_tokens(alpha, target_seconds, draft_seconds, verify_seconds)
    gains = [1.0]
    for k in range(1, 9):
        draft = k * draft_seconds if per_step else draft_seconds[k]
        tokens = geometric_sum(alpha, k)
        gains.append(tokens / (draft + verify_seconds[k]) * target_seconds)
        assert float(prediction.mean_acceptance_length[k]) == pytest.approx(tokens, rel=1e-6)
    assert 0 < int(np.argmax(gains)) < 8
    assert int(prediction.num_tokens) == int(np.argmax(gains))
    np.testing.assert_allclose(prediction.speedup, gains, rtol=1e-6)
    np.testing.assert_allclose(
        prediction.tokens_per_second, np.array(gains) / target_seconds, rtol=1e-6
    )


def test_prediction_recommends_not_to_speculate():
    """A draft as slow as its target, as on a CPU where verification is not free."""
    prediction = costmodel.best_num_tokens(0.9, 0.02, 0.02, 0.02 * np.arange(1, 6))
    assert int(prediction.num_tokens) == 0
    assert float(prediction.speedup[0]) == 1.0
    assert (np.asarray(prediction.speedup[1:]) < 1).all()


# --- the contract of every function --------------------------------------------------------------


def test_functions_map_trace_and_broadcast_alike():
    alpha = np.array([0.3, 0.7, 0.9], np.float32)
    other = np.array([[0.05], [0.2]], np.float32)
    for function in (
        costmodel.optimal_gamma,
        costmodel.optimal_integer_gamma,
        lambda a, c: costmodel.acceptance_rate_to_alpha(a, c * 100),
    ):
        broadcast = function(alpha, other)
        assert broadcast.shape == (2, 3)
        mapped = jax.jit(jax.vmap(lambda c, f=function: jax.vmap(lambda a: f(a, c))(alpha)))(
            other[:, 0]
        )
        np.testing.assert_allclose(broadcast, mapped, rtol=1e-5)
        np.testing.assert_allclose(broadcast[1, 2], function(0.9, 0.2), rtol=1e-5)


def test_the_widest_dtype_of_the_arguments_is_the_dtype_of_the_result():
    with enable_x64():
        assert costmodel.expected_tokens(np.float32(0.5), np.float64(3)).dtype == np.float64
        assert costmodel.expected_tokens(jnp.float32(0.5), np.float32(3)).dtype == np.float32
        assert costmodel.expected_tokens(jnp.float32(0.5), 3).dtype == np.float32
        assert costmodel.optimal_gamma(0.5, 0.1).dtype == np.float64
    assert costmodel.expected_tokens(jnp.bfloat16(0.5), 3).dtype == np.float32
    assert costmodel.optimal_gamma(np.float64(0.5), 0.1).dtype == np.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: costmodel.expected_tokens(1.01, 3), r"alpha=1.01 must be in \[0, 1\]"),
        (lambda: costmodel.expected_tokens(-0.1, 3), "alpha=-0.1"),
        (lambda: costmodel.expected_tokens(math.nan, 3), "alpha=nan"),
        (lambda: costmodel.expected_tokens(0.5, -1), "gamma=-1 must be at least 0"),
        (lambda: costmodel.speedup(0.5, 3, 0.0), "cost_ratio=0 must be positive"),
        (lambda: costmodel.speedup(0.5, 3, 0.1, verify_ratio=0), "verify_ratio=0"),
        (lambda: costmodel.speedup(0.5, 3, 0.1, overhead_ratio=-1), "overhead_ratio=-1"),
        (lambda: costmodel.optimal_gamma(0.5, -0.1), "cost_ratio=-0.1"),
        (lambda: costmodel.optimal_gamma(np.array([0.5, math.nan]), 0.1), "alpha=nan"),
        (lambda: costmodel.optimal_gamma(jnp.array([0.5, 2.0]), 0.1), "alpha=2"),
        (lambda: costmodel.optimal_speedup(0.5, math.nan), "cost_ratio=nan"),
        (lambda: costmodel.optimal_integer_gamma(0.5, 0.1, -1), "max_gamma=-1"),
        (lambda: costmodel.sdsl_throughput(0.5, 1, 0, 1e9), "draft_parameters=0"),
        (lambda: costmodel.optimal_sdsl_throughput(0.5, 1e8, -1e9), r"target_parameters=-1e\+09"),
        (lambda: costmodel.alpha_to_acceptance_rate(0.5, 0), "gamma=0 must be positive"),
        (lambda: costmodel.acceptance_rate_to_alpha(1.2, 4), "rate=1.2"),
        (lambda: costmodel.acceptance_rate_to_length(-0.2, 4), "rate=-0.2"),
        (lambda: costmodel.acceptance_length_to_rate(0.9, 4), "length=0.9 must be at least 1"),
        (lambda: costmodel.acceptance_length_to_alpha(5.1, 4), "length=5.1 must be at most gamma"),
        (lambda: costmodel.best_num_tokens(0.5, 0.0, 0.1, [1, 1]), "target_seconds=0"),
        (lambda: costmodel.best_num_tokens(0.5, 1.0, 0.1, [1, -1]), "verify_seconds=-1"),
        (lambda: costmodel.best_num_tokens(0.5, 1.0, 0.1, 1.0), r"verify_seconds of shape \(\)"),
        (
            lambda: costmodel.best_num_tokens(0.5, 1.0, [0.1, 0.2, 0.3], [1, 1]),
            r"draft_seconds of shape \(3,\)",
        ),
        (lambda: costmodel.best_num_tokens([0.5] * 2, 1.0, 0.1, [1, 1]), r"alpha of shape \(2,\)"),
    ],
)
def test_wrong_numbers_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_traced_numbers_pass_unchecked():
    assert np.isfinite(jax.jit(costmodel.expected_tokens)(1.5, 3.0))


def test_tokens_by_position_agree_with_one_alpha(x64):
    """At whole lengths, and beyond the last measured position, where acceptance falls on alike."""
    alpha = 0.83
    shares = alpha ** np.arange(1, 5)
    for gamma in (0, 1, 3, 4, 7, 20):
        got = float(costmodel.expected_tokens_by_position(shares, gamma))
        assert got == pytest.approx(float(costmodel.expected_tokens(alpha, gamma)), rel=1e-12)
    between = float(costmodel.expected_tokens_by_position(shares, 2.5))
    assert between == pytest.approx(1 + shares[0] + shares[1] + 0.5 * shares[2], rel=1e-12)
    grid = costmodel.expected_tokens_by_position(shares, np.array([1.0, 2.0]))
    assert grid.shape == (2,)
    zero = float(costmodel.expected_tokens_by_position([0.5, 0.0], 9))
    assert zero == pytest.approx(1.5, abs=1e-12)


def test_gradients_of_tokens_by_position_match_finite_differences(x64):
    shares, gamma = np.array([0.8, 0.5, 0.3]), 4.5
    slopes = jax.grad(costmodel.expected_tokens_by_position, argnums=(0, 1))(shares, gamma)
    step = 1e-6
    for i in range(3):
        ends = [
            float(costmodel.expected_tokens_by_position(shares + sign * step * np.eye(3)[i], gamma))
            for sign in (1, -1)
        ]
        assert float(slopes[0][i]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6)
    ends = [
        float(costmodel.expected_tokens_by_position(shares, gamma + sign * step))
        for sign in (1, -1)
    ]
    assert float(slopes[1]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("shares", [0.7 ** np.arange(1, 6), np.array([0.9, 0.4, 0.4, 0.1])])
def test_simulated_rounds_have_the_predicted_mean_and_law(shares):
    """100000 rounds; 5.5 standard errors are left by chance once in 2.6e7."""
    tokens = np.asarray(costmodel.simulate_tokens(jax.random.key(3), shares, 100_000))
    expected = float(costmodel.expected_tokens_by_position(shares, len(shares)))
    error = tokens.std() / math.sqrt(len(tokens))
    assert abs(tokens.mean() - expected) < 5.5 * error
    for position, share in enumerate(shares, 1):
        count = (tokens > position).mean()
        assert abs(count - share) < 5.5 * math.sqrt(share * (1 - share) / len(tokens))


@pytest.mark.parametrize(("slope", "overhead"), [(0.0, 0.2), (0.03, 0.0), (0.05, 0.15)])
@pytest.mark.parametrize(("alpha", "cost"), [(0.8, 0.05), (0.6, 0.1), (0.95, 0.01), (0.2, 0.3)])
def test_optimum_with_linear_verification_and_overhead_beats_a_grid(alpha, cost, slope, overhead):
    with enable_x64():
        keywords = {"verify_slope": slope, "overhead_ratio": overhead}
        gamma = float(costmodel.optimal_gamma(alpha, cost, **keywords))
        best = float(costmodel.optimal_speedup(alpha, cost, **keywords))
        grid = np.linspace(0.01, 60, 60_000)
        tokens = (1 - alpha ** (grid + 1)) / (1 - alpha)
        values = tokens / (1 + overhead + grid * (cost + slope))
        reached = max(values.max(), 1.0)
        assert best == pytest.approx(reached, rel=1e-6)
        if reached > 1:
            assert gamma == pytest.approx(grid[values.argmax()], abs=2e-3)
            again = costmodel.speedup(
                alpha, gamma, cost, verify_ratio=1 + slope * gamma, overhead_ratio=overhead
            )
            assert float(again) == pytest.approx(best, rel=1e-12)
        else:
            assert gamma == 0


def test_best_length_from_acceptance_by_position_and_overhead():
    shares = np.array([0.9, 0.3, 0.29])
    times = np.array([1.0, 1.05, 1.1, 1.15])
    result = costmodel.best_num_tokens(shares, 1.0, 0.05, times, overhead_seconds=0.1)
    expected = [1.0, 1.9 / 1.2, 2.2 / 1.3, 2.49 / 1.4]
    np.testing.assert_allclose(result.speedup, expected, rtol=1e-6)
    assert int(result.num_tokens) == 3
    flat = costmodel.best_num_tokens(0.7, 1.0, 0.05, times)
    same = costmodel.best_num_tokens(0.7 ** np.arange(1, 4), 1.0, 0.05, times)
    np.testing.assert_allclose(same.speedup, flat.speedup, rtol=1e-6)
