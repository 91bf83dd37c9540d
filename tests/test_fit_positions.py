"""Laws by position from measured shares: what they recover, promise and refuse."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from conftest import enable_x64

from jaxsd import costmodel

SLOPES = np.array([-0.9, -0.75, -0.7, -0.68])
INTERCEPTS = np.array([3.0, 2.9, 2.95, 3.0])
X = np.geomspace(6.0, 40.0, 9)


def planted(x, noise=0.0):
    """Shares that the planted law gives, its conditional logits moved by so much."""
    logits = SLOPES * np.log(x)[:, None] + INTERCEPTS + noise
    return np.cumprod(scipy.special.expit(logits), axis=1)


def scattered(seed, num_drafts=9, scale=0.2):
    """Noise of which a draft's positions share a part, as those of a draft that is odd do."""
    rng = np.random.default_rng(seed)
    own = rng.normal(size=(num_drafts, 1)) + rng.normal(size=(num_drafts, 4))
    return scale * own / np.sqrt(2)


@pytest.fixture(scope="module")
def families():
    """200 families of nine drafts around one law."""
    return [
        costmodel.fit_position_acceptance(X, planted(X, scattered(seed))) for seed in range(200)
    ]


def test_noiseless_shares_give_the_planted_law_back():
    fit = costmodel.fit_position_acceptance(X.tolist(), planted(X).tolist())
    np.testing.assert_allclose(fit.result.slopes, SLOPES, rtol=1e-10)
    np.testing.assert_allclose(fit.result.intercepts, INTERCEPTS, rtol=1e-10)
    np.testing.assert_allclose(fit.predicted, planted(X), rtol=1e-10)
    assert fit.residual_error.max() < 1e-10
    assert fit.held_out_max_error < 1e-10
    assert fit.num_held_out == 9
    assert fit.degrees_of_freedom == 7
    np.testing.assert_allclose(fit.r_squared, 1, rtol=1e-12)
    np.testing.assert_allclose(fit.result.fitted[:2], (6.0, 40.0), rtol=1e-12)
    assert fit.ranges == {"draft_perplexity": fit.result.fitted[:2]}


def test_noisy_shares_give_it_back_within_the_errors_that_are_reported(families):
    """Estimates average to the planted ones, and products of their errors to the reported.

    Means of 200 within 4.5 of their standard errors: 8 numbers fail by chance once in 18000 runs.
    """
    laws = [fit.result for fit in families]
    estimates = [np.concatenate([law.slopes, law.intercepts]) for law in laws]
    covariances = [fit.covariance for fit in families]
    off = np.array(estimates) - np.concatenate([SLOPES, INTERCEPTS])
    assert (np.abs(off.mean(0)) < 4.5 * off.std(0) / np.sqrt(200)).all()
    # Noise of 0.2, half of its variance common to the positions of a draft.
    matrix = np.stack([np.log(X), np.ones(9)], 1)
    exact = np.kron(np.linalg.inv(matrix.T @ matrix), 0.02 * (np.eye(4) + np.ones((4, 4))))
    scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    np.testing.assert_allclose(np.mean(covariances, 0) / scale, exact / scale, atol=0.17)
    np.testing.assert_allclose(off.T @ off / 200 / scale, exact / scale, atol=0.45)


def test_every_position_is_the_textbook_regression():
    shares = planted(X, scattered(3))
    fit = costmodel.fit_position_acceptance(X, shares)
    conditional = shares / np.concatenate([np.ones((9, 1)), shares[:, :3]], 1)
    logits = scipy.special.logit(conditional)
    reach = scipy.stats.t.ppf(0.975, 7)
    for i in range(4):
        line = scipy.stats.linregress(np.log(X), logits[:, i])
        errors = np.array([line.stderr, line.intercept_stderr])
        found = np.array([fit.result.slopes[i], fit.result.intercepts[i]])
        np.testing.assert_allclose(found, [line.slope, line.intercept], rtol=1e-9)
        np.testing.assert_allclose(fit.standard_errors[i], errors, rtol=1e-9)
        ends = np.stack([found - reach * errors, found + reach * errors], 1)
        np.testing.assert_allclose(fit.intervals[i], ends, rtol=1e-8)
        assert fit.r_squared[i] == pytest.approx(line.rvalue**2, rel=1e-9)
        rest = logits[:, i] - line.slope * np.log(X) - line.intercept
        assert fit.residual_error[i] == pytest.approx(math.sqrt(rest @ rest / 7), rel=1e-9)
    np.testing.assert_allclose(np.sqrt(np.diag(fit.covariance)), fit.standard_errors.T.ravel())
    np.testing.assert_allclose(np.sqrt(np.diag(fit.residual_covariance)), fit.residual_error)
    with enable_x64():
        law = fit.result.shares(jnp.asarray(X), jnp.ones(9))
    np.testing.assert_allclose(fit.predicted, law, rtol=1e-12)


def test_held_out_drafts_are_predicted_without_their_group():
    shares, groups = planted(X, scattered(5)), list("aabbccddd")
    fit = costmodel.fit_position_acceptance(X, shares, groups=groups)
    measured, errors = 1 + shares.sum(1), []
    for i in range(9):
        rest = np.array([label != groups[i] for label in groups])
        without = costmodel.fit_position_acceptance(X[rest], shares[rest]).result
        logits = without.slopes * np.log(X[i]) + without.intercepts
        predicted = 1 + np.cumprod(scipy.special.expit(logits)).sum()
        errors.append(abs(predicted / measured[i] - 1))
    assert fit.num_held_out == 9
    assert fit.held_out_error == pytest.approx(np.mean(errors), rel=1e-9)
    assert fit.held_out_max_error == pytest.approx(np.max(errors), rel=1e-9)
    seen = np.abs((1 + fit.predicted.sum(1)) / measured - 1)
    assert fit.mean_relative_error == pytest.approx(seen.mean(), rel=1e-12)
    assert fit.max_relative_error == pytest.approx(seen.max(), rel=1e-12)
    alone = costmodel.fit_position_acceptance(X, shares, groups=["a"] * 9)
    assert math.isnan(alone.held_out_error)
    assert alone.num_held_out == 0
    # Without the draft of its own perplexity, the rest have one perplexity and no slope.
    three = costmodel.fit_position_acceptance([9.0, 9.0, 20.0], shares[:3])
    assert three.num_held_out == 2


def beta_shares(x, num_positions=6, concentration=3.0):
    """Shares where every round has an alpha of its own, beta-distributed: `E[alpha^i]`, exactly."""
    mean = scipy.special.expit(2.6 - 0.75 * np.log(x))[:, None]
    a, i = concentration * mean, np.arange(num_positions)
    return np.cumprod((a + i) / (concentration + i), axis=1)


@pytest.mark.parametrize("gamma", [2, 4, 6])
def test_where_alpha_varies_it_predicts_new_drafts_better_than_one_alpha_does(gamma):
    """Drafts between the fitted ones and beyond; the shares are exact, so nothing is chance.

    One alpha is taken from the first position, and, at its best, from the tokens per round at a
    gamma of 6: a single number then hides what each position does, and fails at other gammas.
    """
    x, new = np.geomspace(8.0, 30.0, 5), np.array([6.0, 10.0, 14.0, 19.0, 26.0, 35.0])
    shares, truth = beta_shares(x), 1 + beta_shares(new)[:, :gamma].sum(1)
    law = costmodel.fit_position_acceptance(x, shares).result
    logits = law.slopes * np.log(new)[:, None] + law.intercepts
    by_position = 1 + np.cumprod(scipy.special.expit(logits), 1)[:, :gamma].sum(1)
    error = np.abs(by_position / truth - 1)

    def one_alpha(alphas):
        one = costmodel.fit_acceptance(x, 7.0, alphas, form="log").result
        alpha = np.asarray(costmodel.acceptance(one, new, 7.0))
        return np.abs(np.asarray(costmodel.expected_tokens(alpha, gamma)) / truth - 1)

    first = one_alpha(shares[:, 0])
    at_six = one_alpha(np.asarray(costmodel.acceptance_length_to_alpha(1 + shares.sum(1), 6)))
    assert error.mean() < 0.3 * at_six.mean()
    assert error.mean() < 0.1 * first.mean()
    assert error.max() < 0.006


def test_interval_at_one_token_is_the_textbook_one():
    """Prediction and mean of a simple regression, in the logit of the first share."""
    shares = planted(X, scattered(7))
    fit = costmodel.fit_position_acceptance(X, shares)
    interval = costmodel.tokens_interval(fit, 12.0, 1.0)
    line = scipy.stats.linregress(np.log(X), scipy.special.logit(shares[:, 0]))
    rest = scipy.special.logit(shares[:, 0]) - line.slope * np.log(X) - line.intercept
    centred = np.log(X) - np.log(X).mean()
    leverage = 1 / 9 + (np.log(12.0) - np.log(X).mean()) ** 2 / (centred @ centred)
    middle, error = line.slope * np.log(12.0) + line.intercept, math.sqrt(rest @ rest / 7)
    reach = scipy.stats.t.ppf(0.975, 7) * error
    ends = middle + reach * np.array(
        [
            0,
            -math.sqrt(leverage),
            math.sqrt(leverage),
            -math.sqrt(1 + leverage),
            math.sqrt(1 + leverage),
        ]
    )
    np.testing.assert_allclose(interval, 1 + scipy.special.expit(ends), rtol=1e-9)


def test_interval_of_several_tokens_is_the_delta_method(x64):
    """By the public function for it, over all slopes and intercepts."""
    fit = costmodel.fit_position_acceptance(X, planted(X, scattered(11)))

    def logit_share(numbers, gamma):
        law = costmodel.PositionAcceptanceLaw(numbers[:4], numbers[4:])
        shares = law.shares(jnp.float64(15.0), jnp.float64(7.0))
        share = (costmodel.expected_tokens_by_position(shares, gamma) - 1) / gamma
        return jnp.log(share / (1 - share))

    numbers = np.concatenate([fit.result.slopes, fit.result.intercepts])
    pair = fit.covariance.copy()
    pair[4:, 4:] += fit.residual_covariance  # the intercepts move the logits one for one
    quantile = scipy.stats.t.ppf(0.975, 7)
    for gamma in (2.5, 7.0):
        ends = []
        for covariance in (fit.covariance, pair):
            value, error = costmodel.delta_method(
                lambda n, gamma=gamma: logit_share(n, gamma), numbers, covariance
            )
            ends += [float(value - quantile * error), float(value + quantile * error)]
        expected = 1 + gamma * scipy.special.expit(np.array([float(value), *ends]))
        interval = costmodel.tokens_interval(fit, 15.0, gamma)
        np.testing.assert_allclose(interval, expected, rtol=1e-8)
    assert costmodel.tokens_interval(fit, 15.0) == costmodel.tokens_interval(fit, 15.0, 4)


def test_intervals_hold_what_they_promise(families):
    """Every family is asked for one more draft: 95 % of its tokens and of the law's.

    Between 177 and 199 hits of 200: binomial, missed by chance once in 5000 runs.
    """
    hits = np.zeros(2)
    new = np.array([25.0])
    truth = 1 + planted(new).sum()
    for seed, fit in enumerate(families):
        one = 1 + planted(new, scattered(9000 + seed, 1)).sum()
        interval = costmodel.tokens_interval(fit, 25.0)
        hits[0] += interval.low <= truth <= interval.high
        hits[1] += interval.pair_low <= one <= interval.pair_high
    assert ((hits >= 177) & (hits <= 199)).all(), hits


GOOD = planted(X)


def with_share(row, place, value):
    shares = GOOD.copy()
    shares[row, place] = value
    return shares


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda fit: fit(X, GOOD[:8]), r"shares of shape \(8, 4\) must have shape \[9, K\]"),
        (lambda fit: fit(X, GOOD[:, 0]), r"shares of shape \(9,\) must have shape \[9, K\]"),
        (lambda fit: fit(X, GOOD[:, :0]), r"shares of shape \(9, 0\) must have shape \[9, K\]"),
        (lambda fit: fit(X, [[0.5, 0.4], [0.3]]), "shares must be numbers, as many in every row"),
        (
            lambda fit: fit(X, with_share(2, 0, 1.0)),
            r"shares\[2, 0\]=1 must be above 0 and below 1: .* no logit",
        ),
        (
            lambda fit: fit(X, with_share(4, 3, 0.0)),
            r"shares\[4, 3\]=0 must be above 0 and below shares\[4, 2\]=0\.\d+: .* more rounds",
        ),
        (
            lambda fit: fit(X, with_share(1, 2, GOOD[1, 1])),
            r"shares\[1, 2\]=0\.\d+ must be above 0 and below shares\[1, 1\]",
        ),
        (lambda fit: fit(X, with_share(1, 2, 0.99)), r"shares\[1, 2\]=0\.99 must be"),
        (lambda fit: fit(X, with_share(1, 2, np.nan)), r"shares\[1, 2\]=nan must be"),
        (lambda fit: fit(X / 10, GOOD), "draft_perplexity=0.6 .* must be at least 1"),
        (lambda fit: fit(9.0, GOOD), r"draft_perplexity of shape \(\) must have shape \[n\]"),
        (
            lambda fit: fit(X[:2], GOOD[:2]),
            r"2 rows do not determine 2 parameters \(slope, intercept\): at least 3 rows",
        ),
        (
            lambda fit: fit([9.0, 9.01, 9.02], GOOD[:3]),
            "do not tell slope and intercept apart.* add drafts of other perplexities",
        ),
        (lambda fit: fit(X, GOOD, groups=["a"]), "groups of length 1 must name a group per row, 9"),
        (
            lambda fit: jax.jit(lambda shares: fit(X, shares).result.slopes)(GOOD),
            "shares must be numbers: fits look at them",
        ),
        (
            lambda fit: costmodel.tokens_interval(fit(X, GOOD), 0.5),
            "draft_perplexity=0.5 must be at least 1",
        ),
        (
            lambda fit: costmodel.tokens_interval(fit(X, GOOD), 9.0, 0),
            "gamma=0 must be positive and finite",
        ),
        (
            lambda fit: costmodel.tokens_interval(fit(X, GOOD), X),
            r"draft_perplexity of shape \(9,\) must be one number",
        ),
    ],
)
def test_wrong_rows_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(costmodel.fit_position_acceptance)
