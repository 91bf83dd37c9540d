"""The loss and acceptance laws against numbers worked out in plain Python, and their gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64
from gradients import assert_gradient_is_a_difference

from jaxsd import costmodel


@pytest.mark.parametrize(
    ("law", "constants"),
    [
        (costmodel.BESIROGLU, (1.8172, 482.01, 0.3478, 2085.43, 0.3658)),
        (costmodel.HOFFMANN, (1.69, 406.4, 0.34, 410.7, 0.28)),
    ],
    ids=["besiroglu", "hoffmann"],
)
@pytest.mark.parametrize(("parameters", "tokens"), [(1e8, 1.8e11), (70553706496, 15e12)])
def test_loss_is_the_printed_formula(law, constants, parameters, tokens):
    """The library takes logarithms first; the test raises to powers as the papers print it."""
    irreducible, a, a_exponent, b, b_exponent = constants
    expected = irreducible + a / parameters**a_exponent + b / tokens**b_exponent
    assert float(costmodel.loss(law, parameters, tokens)) == pytest.approx(expected, rel=1e-6)
    with enable_x64():
        exact = float(costmodel.loss(law, parameters, tokens))
        perplexity = float(costmodel.perplexity(law, parameters, tokens))
    assert exact == pytest.approx(expected, rel=1e-14)
    assert perplexity == pytest.approx(math.exp(expected), rel=1e-13)


def test_loss_broadcasts_sizes_against_tokens():
    sizes, tokens = np.array([1e8, 1e9, 1e10]), np.array([[1e11], [1e13]])
    grid = costmodel.loss(costmodel.BESIROGLU, sizes, tokens)
    assert grid.shape == (2, 3)
    assert (np.diff(grid, axis=0) < 0).all()
    assert (np.diff(grid, axis=1) < 0).all()


def test_loss_takes_whatever_dtypes_it_is_given():
    """Strict promotion is on in these tests; mixing dtypes in one call must still work."""
    expected = 1.8172 + 482.01 / 7e10**0.3478 + 2085.43 / 1e12**0.3658
    for size in (70_000_000_000, np.float64(7e10), jnp.float32(7e10), np.array([7e10], np.float32)):
        value = costmodel.loss(costmodel.BESIROGLU, size, np.float64(1e12))
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_law_gradients_match_finite_differences():
    with enable_x64():

        @jax.jit
        def alpha_of(constants):
            loss = costmodel.LossLaw(*constants[:5])
            law = costmodel.AcceptanceLaw(*constants[5:8])
            draft = costmodel.perplexity(loss, jnp.exp(constants[8]), 1e12)
            target = costmodel.perplexity(loss, 7e10, 1e13)
            return costmodel.acceptance(law, draft, target)

        point = np.array([*costmodel.BESIROGLU[:5], *costmodel.SDSL_ACCEPTANCE[:3], math.log(3e8)])
        gradient = np.asarray(jax.jit(jax.grad(alpha_of))(jnp.asarray(point)))
        for i, value in enumerate(point):
            step = np.zeros_like(point)
            step[i] = 1e-6 * abs(value)
            difference = float(alpha_of(point + step)) - float(alpha_of(point - step))
            assert gradient[i] == pytest.approx(difference / (2 * step[i]), rel=1e-6), i


def test_acceptance_is_the_affine_law_inside():
    """Not one bit of a published alpha may change: the clip is the identity between its margins."""
    law = costmodel.SDSL_ACCEPTANCE
    with enable_x64():
        draft = jnp.linspace(5.0, 95.0, 200)
        affine = law.draft_slope * draft + law.target_slope * 10.0 + law.intercept
        assert float(affine.min()) > 0.01
        np.testing.assert_array_equal(costmodel.acceptance(law, draft, 10.0), affine)


def test_sdsl_constants_are_table_3():
    assert dict(list(costmodel.SDSL.acceptance._asdict().items())[:6]) == {
        "draft_slope": -0.0067,
        "target_slope": 0.012971,
        "intercept": 0.642084,
        "draft_slope_error": 0.000607,
        "target_slope_error": 0.001545,
        "intercept_error": 0.021228,
    }
    assert costmodel.SDSL.loss == costmodel.BESIROGLU


@pytest.mark.parametrize("perplexity", [95.0, 1e2, 1e3, 1e4, 1e6])
def test_acceptance_of_a_hopeless_draft_is_positive_and_has_a_gradient(perplexity):
    """A hard clip would leave the search without a direction there."""
    value, slope = jax.value_and_grad(costmodel.acceptance, argnums=1)(
        costmodel.SDSL_ACCEPTANCE, perplexity, 7.0
    )
    assert 0 < value < 0.1
    assert -0.0067 * 1.0001 < slope < 0


@pytest.mark.parametrize("intercept", [0.95, 0.98, 0.99, 1.0, 2.0, 30.0])
def test_acceptance_stays_below_one_with_a_gradient(intercept):
    law = costmodel.AcceptanceLaw(draft_slope=-0.01, target_slope=0.0, intercept=intercept)
    value, slope = jax.value_and_grad(costmodel.acceptance, argnums=1)(law, 1.0, 1.0)
    assert 0.9 < value < 1
    assert -0.01 * 1.0001 < slope < 0


def test_acceptance_is_smooth_and_monotone_through_both_margins():
    law = costmodel.AcceptanceLaw(draft_slope=-1e-3, target_slope=0.0, intercept=1.2)
    with enable_x64():
        slope_of = jax.jit(jax.vmap(jax.grad(lambda x: costmodel.acceptance(law, x, 1.0))))
        for margin in (210.0, 1190.0):  # where the affine law is 0.99 and 0.01
            below, above = slope_of(jnp.array([margin - 1e-3, margin + 1e-3]))
            assert float(below) == pytest.approx(float(above), rel=1e-3)
        alpha = costmodel.acceptance(law, jnp.linspace(1.0, 3000.0, 5000), 1.0)
        assert (np.diff(alpha) < 0).all()


def test_hopeless_losses_keep_every_gradient_finite():
    """Three training tokens: the perplexity would overflow float32, and masks would not help."""

    def alpha(tokens):
        draft = costmodel.perplexity(costmodel.BESIROGLU, 1e9, tokens)
        return costmodel.acceptance(costmodel.SDSL_ACCEPTANCE, draft, 7.0)

    assert np.isfinite(costmodel.perplexity(costmodel.BESIROGLU, 1e9, 3.0))
    assert np.isfinite(jax.jit(jax.grad(alpha))(3.0))
    assert np.isfinite(jax.jit(jax.grad(jax.grad(alpha)))(3.0))


def test_kaplan_is_the_printed_formula(x64):
    for size, tokens in ((1e6, 1e9), (1e9, 1e10)):
        expected = ((6.4e13 / size) ** (0.076 / 0.103) + 1.8e13 / tokens) ** 0.103
        got = float(costmodel.loss(costmodel.KAPLAN, size, tokens))
        assert got == pytest.approx(expected, rel=1e-12)
    assert costmodel.KAPLAN.embeddings_counted == 0  # fitted without token tables


def test_a_product_of_powers_is_the_formula(x64):
    law = costmodel.ProductLossLaw(30.0, 0.05, 0.06, 0.02, 64.0)
    expected = 30.0 / (1e9**0.05 * 1e12**0.06)
    assert float(costmodel.loss(law, 1e9, 1e12)) == pytest.approx(expected, rel=1e-12)
    wide = float(costmodel.loss(law, 1e9, 1e12, 128.0))
    assert wide == pytest.approx(expected * 2**0.02, rel=1e-12)
    with pytest.raises(ValueError, match=r"ProductLossLaw\.tokens_exponent=0 must be positive"):
        costmodel.loss(law._replace(tokens_exponent=0.0), 1e9, 1e12)


def test_shape_laws_are_the_printed_formula(x64):
    size, tokens, ratio = 1.6e8, 3.2e9, 64.0
    law = costmodel.MORPH
    base = law.base
    plain = (
        base.irreducible
        + base.parameters_coefficient / size**base.parameters_exponent
        + base.tokens_coefficient / tokens**base.tokens_exponent
    )
    expected = plain * (1 + law.coefficient * ratio**law.exponent)
    assert float(costmodel.loss(law, size, tokens, ratio)) == pytest.approx(expected, rel=1e-12)
    # The published loss of 164M_v1, 12 layers of 768 on 3.288e9 tokens.
    published = float(costmodel.loss(law, 162417408, 3.28833e9, 64.0))
    assert published == pytest.approx(4.096, rel=0.01)
    # Relative to a reference, another law's losses stay what they are at that shape.
    aware = costmodel.SHAPE_AWARE
    at_reference = float(costmodel.loss(aware, 1e9, 1e12, 64.0))
    assert at_reference == pytest.approx(
        float(costmodel.loss(costmodel.BESIROGLU, 1e9, 1e12)), rel=1e-14
    )
    assert float(costmodel.loss(aware, 1e9, 1e12)) == pytest.approx(at_reference, rel=1e-14)
    wide, narrow = (float(costmodel.loss(aware, 1e9, 1e12, r)) for r in (384, 17))
    assert wide > at_reference > narrow


def test_other_acceptance_laws_are_their_formulas(x64):
    x = np.array([12.0, 20.0, 29.0])
    log = costmodel.LogAcceptanceLaw(-0.165206, 1.155850)
    power = costmodel.PowerAcceptanceLaw(1.382782, -0.247168)
    np.testing.assert_allclose(
        costmodel.acceptance(log, x, 10.0), -0.165206 * np.log(x) + 1.155850, rtol=1e-13
    )
    np.testing.assert_allclose(
        costmodel.acceptance(power, x, 10.0), 1.382782 * x**-0.247168, rtol=1e-13
    )
    measured = costmodel.MeasuredAcceptance(1.0)
    assert float(costmodel.acceptance(measured, 9.0, 8.0)) == 1.0  # not bent
    by_position = costmodel.PositionAcceptance([0.8, 0.7])
    assert float(costmodel.acceptance(by_position, 9.0, 8.0)) == 0.8


def test_distribution_acceptance_is_the_overlap(x64):
    rng = np.random.default_rng(0)
    target, draft = rng.dirichlet(np.ones(7), 5), rng.dirichlet(np.ones(7), 5)
    expected = 1 - np.abs(target - draft).sum(-1) / 2
    got = costmodel.distribution_acceptance(target, draft)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    same = costmodel.distribution_acceptance(target[0], target[0])
    assert float(same) == pytest.approx(1, rel=1e-14)
    slope = jax.grad(lambda p: costmodel.distribution_acceptance(p, draft[0]))(target[0])
    np.testing.assert_array_equal(slope, (target[0] < draft[0]).astype(float))


def test_perplexity_scale_meets_what_was_measured(x64):
    law = costmodel.BESIROGLU
    sizes, tokens = np.array([125e6, 1.3e9, 13e9]), 180e9
    one = costmodel.calibrate_perplexity(law, sizes[0], tokens, 29.79)
    assert float(one.slope) == 1
    assert float(costmodel.perplexity(law, sizes[0], tokens, scale=one)) == pytest.approx(29.79)
    measured = np.exp(0.4 + 1.2 * np.asarray(costmodel.loss(law, sizes, tokens)))
    several = costmodel.calibrate_perplexity(law, sizes, tokens, measured)
    assert float(several.offset) == pytest.approx(0.4, abs=1e-9)
    assert float(several.slope) == pytest.approx(1.2, rel=1e-9)
    np.testing.assert_allclose(
        costmodel.perplexity(law, sizes, tokens, scale=several), measured, rtol=1e-9
    )
    same_twice = costmodel.calibrate_perplexity(law, sizes[[0, 0]], tokens, [20.0, 22.0])
    assert float(same_twice.slope) == 1  # two measurements of one model say nothing of a slope
    slope = jax.grad(lambda y: costmodel.calibrate_perplexity(law, sizes, tokens, y).slope)(
        measured
    )
    assert np.isfinite(slope).all()


@pytest.mark.parametrize(
    "law",
    [
        costmodel.SDSL_ACCEPTANCE,
        costmodel.LogAcceptanceLaw(-0.15, 1.1),
        costmodel.PowerAcceptanceLaw(1.3, -0.24),
    ],
)
def test_calibrated_acceptance_meets_a_pair_and_keeps_its_slope(law, x64):
    moved = costmodel.calibrate_acceptance(law, 20.0, 10.0, 0.71)
    assert float(costmodel.acceptance(moved, 20.0, 10.0)) == pytest.approx(0.71, rel=1e-12)
    assert type(moved) is type(law)
    slope = jax.grad(lambda x: costmodel.acceptance(law, x, 10.0))(20.0)
    new_slope = jax.grad(lambda x: costmodel.acceptance(moved, x, 10.0))(20.0)
    assert float(new_slope) == pytest.approx(float(slope), rel=0.15)
    with pytest.raises(ValueError, match="MeasuredAcceptance, which has no intercept"):
        costmodel.calibrate_acceptance(costmodel.MeasuredAcceptance(0.5), 20.0, 10.0, 0.7)


def kaplan_loss(x):
    return costmodel.loss(costmodel.KaplanLossLaw(*x[:4]), x[4], x[5])


def shape_loss(x):
    law = costmodel.ShapeLossLaw(costmodel.BESIROGLU, x[0], x[1], x[2])
    return costmodel.loss(law, x[3], x[4], x[5])


def product_loss(x):
    return costmodel.loss(costmodel.ProductLossLaw(*x[:5]), x[5], x[6], x[7])


def scaled_perplexity(x):
    scale = costmodel.PerplexityScale(x[0], x[1])
    return costmodel.perplexity(costmodel.BESIROGLU, x[2], x[3], scale=scale)


def log_acceptance(x):
    return costmodel.acceptance(costmodel.LogAcceptanceLaw(x[0], x[1]), x[2], 9.0)


def power_acceptance(x):
    return costmodel.acceptance(costmodel.PowerAcceptanceLaw(x[0], x[1]), x[2], 9.0)


def calibrated_acceptance(x):
    law = costmodel.calibrate_acceptance(costmodel.SDSL_ACCEPTANCE, x[0], x[1], x[2])
    return costmodel.acceptance(law, 15.0, 8.0)


def calibrated_scale(x):
    sizes = np.array([1e8, 1e9, 1e10])
    scale = costmodel.calibrate_perplexity(costmodel.BESIROGLU, sizes, 1e12, x)
    return scale.offset + 2 * scale.slope


@pytest.mark.parametrize(
    ("function", "point"),
    [
        (kaplan_loss, [6.4e13, 0.076, 1.8e13, 0.103, 1e9, 1e11]),
        (shape_loss, [2e-5, 1.25, 64.0, 1e9, 1e12, 100.0]),
        (product_loss, [30.0, 0.05, 0.06, 0.02, 64.0, 1e9, 1e12, 100.0]),
        (scaled_perplexity, [0.3, 1.1, 1e9, 1e12]),
        (log_acceptance, [-0.15, 1.1, 17.0]),
        (power_acceptance, [1.3, -0.24, 17.0]),
        (calibrated_acceptance, [20.0, 10.0, 0.7]),
        (calibrated_scale, [20.0, 12.0, 9.0]),
    ],
)
def test_gradients_of_every_law_match_finite_differences(function, point, x64):
    assert_gradient_is_a_difference(function, point)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: costmodel.loss(costmodel.BESIROGLU, 0, 1e9), "parameters=0 must be positive"),
        (lambda: costmodel.loss(costmodel.BESIROGLU, 1e9, -1.0), "tokens=-1 must be positive"),
        (lambda: costmodel.perplexity(costmodel.BESIROGLU, math.nan, 1e9), "parameters=nan"),
        (
            lambda: costmodel.loss(costmodel.BESIROGLU._replace(tokens_exponent=-0.3), 1e9, 1e9),
            "LossLaw.tokens_exponent=-0.3",
        ),
        (
            lambda: costmodel.acceptance(costmodel.SDSL_ACCEPTANCE, 0.5, 7.0),
            "draft_perplexity=0.5 must be at least 1",
        ),
        (
            lambda: costmodel.acceptance(costmodel.SDSL_ACCEPTANCE, [9.0, 0.5], 7.0),
            r"draft_perplexity=0.5 \(in an array of shape \(2,\)\)",
        ),
        (
            lambda: costmodel.acceptance(costmodel.AcceptanceLaw(math.nan, 0.0, 0.5), 9.0, 7.0),
            "AcceptanceLaw.draft_slope=nan must be finite",
        ),
        (
            lambda: costmodel.loss(costmodel.SHAPE_AWARE, 1e9, 1e9, aspect_ratio=0),
            "aspect_ratio=0 must be positive",
        ),
        (
            lambda: costmodel.loss(costmodel.SHAPE_AWARE._replace(exponent=-1), 1e9, 1e9),
            r"ShapeLossLaw\.exponent=-1 must be positive",
        ),
        (
            lambda: costmodel.perplexity(
                costmodel.BESIROGLU, 1e9, 1e9, scale=costmodel.PerplexityScale(0, -1)
            ),
            r"PerplexityScale\.slope=-1 must be positive",
        ),
        (
            lambda: costmodel.acceptance(costmodel.PositionAcceptance([0.5, 0.6]), 9, 9),
            "must be shares of rounds that do not rise",
        ),
        (
            lambda: costmodel.acceptance(costmodel.PositionAcceptance([]), 9, 9),
            r"of shape \(0,\) must have shape \[K\]",
        ),
        (
            lambda: costmodel.distribution_acceptance([0.5, 0.5], [1.0]),
            "must end in the same vocabulary size",
        ),
        (
            lambda: costmodel.calibrate_perplexity(costmodel.BESIROGLU, 1e9, 1e9, 0.5),
            "perplexities=0.5 must be at least 1",
        ),
    ],
)
def test_wrong_numbers_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
