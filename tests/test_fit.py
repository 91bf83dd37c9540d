"""Fits against other implementations, against the laws that made the rows, and against papers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from conftest import enable_x64
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsd import costmodel
from jaxsd.cli import sdsl_losses, sdsl_measurements
from jaxsd.costmodel import _least_squares, fit_times

PAIRS = costmodel.published("sdsl_alpha_pairs")
X, Y, ALPHA = (
    np.array([row[name] for row in PAIRS])
    for name in ("draft_perplexity", "target_perplexity", "alpha")
)
TARGETS = [row["target"] for row in PAIRS]
MORPH = costmodel.published("morph_losses")
A100 = costmodel.Chip(312e12, 624e12, 0.0, 2.039e12, 80e9, 300e9)
LLAMA = costmodel.Shape(32000, 4096, 32, 32, 32, 128, 11008, False)
# Depth, width, batch, tokens per sequence and chips all vary, and two shapes project embeddings.
SHAPES = [
    LLAMA,
    LLAMA._replace(n_layers=4),
    LLAMA._replace(d_model=1024, n_heads=8, n_kv_heads=8, d_ff=2816, n_layers=24),
    LLAMA._replace(d_model=2048, n_heads=16, n_kv_heads=4, d_ff=5504, n_layers=8),
    LLAMA._replace(d_model=1024, n_heads=8, n_kv_heads=8, n_layers=12, embedding_dim=512),
]
PASSES = [  # (shape, batch, rows, context, chips)
    *((shape, 1, 1, 128, 1) for shape in SHAPES),
    *((shape, 4, 1024, 0, 1) for shape in SHAPES[:3]),
    (SHAPES[3], 2, 64, 500, 1),
    (SHAPES[0], 1, 100, 64, 1),
    (SHAPES[2], 1, 200, 64, 1),
    *((shape, 1, 1, 128, chips) for shape in SHAPES[:2] for chips in (2, 4, 8)),
]
DEFAULTS = costmodel.Stack(0.8, 0.7, 0.0, 0.0, 0.0, 0.0, 8.0, 0.0)


def timed(stack, passes=PASSES):
    """Passes with the times that a stack would give them, in float64."""
    with enable_x64():
        return [
            costmodel.TimedPass(
                shape,
                float(costmodel.pass_seconds(shape, A100, *numbers, stack=stack)),
                *numbers,
            )
            for shape, *numbers in passes
        ]


@pytest.fixture(scope="module")
def plane():
    return costmodel.fit_acceptance(X, Y, ALPHA)


@pytest.fixture(scope="module")
def morph():
    return sdsl_losses.compute()


@pytest.fixture(scope="module")
def measured():
    return sdsl_measurements.compute()


# --- acceptance ----------------------------------------------------------------------------------


def test_plane_equals_the_normal_equations(plane):
    matrix = np.stack([X, Y, np.ones_like(X)], 1)
    solution, squares, _, _ = np.linalg.lstsq(matrix, ALPHA, rcond=None)
    variance = squares[0] / 127
    covariance = variance * np.linalg.inv(matrix.T @ matrix)
    np.testing.assert_allclose(plane.estimates, solution, rtol=1e-11)
    np.testing.assert_allclose(plane.covariance, covariance, rtol=1e-9, atol=1e-17)
    np.testing.assert_allclose(plane.predicted, matrix @ solution, rtol=1e-12)
    assert plane.residual_error == pytest.approx(math.sqrt(variance), rel=1e-12)
    reach = scipy.stats.t.ppf(0.975, 127) * np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(plane.intervals[:, 1] - solution, reach, rtol=1e-9)
    np.testing.assert_allclose(solution - plane.intervals[:, 0], reach, rtol=1e-9)
    assert plane.names == ("draft_slope", "target_slope", "intercept")
    assert plane.degrees_of_freedom == 127
    assert plane.at_bound == ()


def test_plane_is_the_published_one(plane):
    """SDSL, table 3, and the digits that its data have beyond the printed ones."""
    np.testing.assert_allclose(
        plane.estimates, [-0.00670008, 0.01297071, 0.64208401], rtol=0, atol=5e-9
    )
    assert [f"{e:.6f}" for e in plane.standard_errors] == ["0.000607", "0.001545", "0.021228"]
    ends = [f"{e:.6f}" for e in plane.intervals.ravel()]
    assert ends == ["-0.007901", "-0.005499", "0.009914", "0.016027", "0.600078", "0.684090"]
    assert f"{plane.mean_squared_error:.8f}" == "0.00128420"
    assert f"{plane.r_squared:.8f}" == "0.60229586"


def test_the_shipped_law_is_its_own_refit(plane):
    """Ten numbers to the digits in which they are written down, and the range, rounded outwards."""
    shipped, ours = costmodel.SDSL_ACCEPTANCE, plane.result
    for name in ours._fields[:-1]:
        assert round(getattr(ours, name), 6) == getattr(shipped, name), name
    np.testing.assert_allclose(ours.fitted, shipped.fitted, rtol=0, atol=1e-3)


def test_errors_of_the_law_give_the_error_of_a_prediction(plane):
    """Through the correlations: what the textbook has for a point of the plane."""
    law = plane.result
    point = np.array([20.0, 11.0, 1.0])
    errors = np.array([law.draft_slope_error, law.target_slope_error, law.intercept_error])
    correlations = np.eye(3)
    for i, j, value in (
        (0, 1, law.draft_target_correlation),
        (0, 2, law.draft_intercept_correlation),
        (1, 2, law.target_intercept_correlation),
    ):
        correlations[i, j] = correlations[j, i] = value
    variance = (point * errors) @ correlations @ (point * errors)
    matrix = np.stack([X, Y, np.ones_like(X)], 1)
    expected = law.residual_error**2 * point @ np.linalg.solve(matrix.T @ matrix, point)
    assert variance == pytest.approx(expected, rel=1e-9)
    assert math.sqrt(variance) < 0.2 * law.intercept_error  # mostly undone by the slopes'


@pytest.mark.parametrize(
    ("form", "function"),
    [
        ("log", lambda x, a, b: a * np.log(x) + b),
        ("power", lambda x, a, b: b * x**a),
        ("linear", lambda x, a, b: a * x + b),
    ],
)
def test_forms_equal_another_least_squares(form, function):
    mine = [i for i, name in enumerate(TARGETS) if name == "LLaMa3-70B"]
    x, alpha = X[mine], ALPHA[mine]
    fit = costmodel.fit_acceptance(x, 11.0, alpha, form)
    solution, covariance = scipy.optimize.curve_fit(
        function, x, alpha, p0=[-0.1, 1.0], xtol=1e-14, ftol=1e-14
    )
    np.testing.assert_allclose(fit.estimates, solution, rtol=1e-7)
    np.testing.assert_allclose(fit.covariance, covariance, rtol=1e-5)
    curve = costmodel.acceptance(fit.result, x, 11.0)
    np.testing.assert_allclose(curve, function(x, *solution), rtol=1e-6)
    assert fit.result.fitted.min_draft_perplexity == x.min()


def test_an_intercept_per_target_explains_most():
    fit = costmodel.fit_acceptance(X, Y, ALPHA, targets=TARGETS)
    names = list(dict.fromkeys(TARGETS))
    dummies = np.array([[name == target for target in names] for name in TARGETS], float)
    solution = np.linalg.lstsq(np.column_stack([X, dummies]), ALPHA, rcond=None)[0]
    np.testing.assert_allclose(fit.estimates, solution, rtol=1e-10)
    assert fit.r_squared == pytest.approx(0.9537, abs=1e-4)
    assert set(fit.result) == set(names)
    law = fit.result["OPT-66B"]
    assert law.intercept == pytest.approx(solution[1 + names.index("OPT-66B")], rel=1e-10)
    index = fit.names.index("intercept[OPT-66B]")
    assert law.intercept_error == fit.standard_errors[index]
    assert law.draft_intercept_correlation == pytest.approx(
        fit.covariance[0, index] / (fit.standard_errors[0] * fit.standard_errors[index])
    )
    assert law.fitted.min_target_perplexity == law.fitted.max_target_perplexity
    assert fit.held_out_error < 0.02


@settings(max_examples=25, deadline=None)
@given(slope=st.floats(-0.02, 0.02), other=st.floats(-0.02, 0.02), intercept=st.floats(0.45, 0.55))
def test_an_exact_plane_is_recovered(slope, other, intercept):
    x, y = np.array([5.0, 9.0, 14.0, 6.0, 12.0]), np.array([4.0, 4.0, 5.0, 7.0, 3.0])
    fit = costmodel.fit_acceptance(x, y, slope * x + other * y + intercept)
    np.testing.assert_allclose(fit.estimates, [slope, other, intercept], rtol=0, atol=1e-13)
    assert fit.residual_error < 1e-13
    assert fit.max_relative_error < 1e-12


def test_one_alpha_behind_a_sweep():
    gamma = np.arange(1, 10)
    tokens = np.array([costmodel.expected_tokens(0.73, int(g)) for g in gamma], float)
    fit = costmodel.fit_alpha(gamma, tokens)
    assert fit.result.alpha == pytest.approx(0.73, rel=1e-6)
    rng = np.random.default_rng(0)
    noisy = np.clip(tokens + rng.normal(0, 0.02, 9), 1, gamma + 1)
    fit = costmodel.fit_alpha(gamma, noisy)
    solution, covariance = scipy.optimize.curve_fit(
        lambda g, a: (1 - a ** (g + 1)) / (1 - a), gamma, noisy, p0=[0.5]
    )
    assert fit.result.alpha == pytest.approx(solution[0], rel=1e-6)
    assert fit.standard_errors[0] == pytest.approx(math.sqrt(covariance[0, 0]), rel=1e-4)


# --- regression ----------------------------------------------------------------------------------


def test_robust_errors_equal_the_sum_over_rows():
    """HC3 as it is defined: each row's residual over one less its leverage."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 30))
    values = 1 + 2 * a - b + rng.normal(size=30) * (1 + np.abs(a))
    fit = costmodel.fit_linear({"a": a, "b": b}, values, robust=True)
    matrix = np.column_stack([a, b, np.ones(30)])
    inverse = np.linalg.inv(matrix.T @ matrix)
    residuals = values - matrix @ fit.estimates
    middle = np.zeros((3, 3))
    for row, residual in zip(matrix, residuals, strict=True):
        leverage = row @ inverse @ row
        middle += np.outer(row, row) * (residual / (1 - leverage)) ** 2
    np.testing.assert_allclose(fit.covariance, inverse @ middle @ inverse, rtol=1e-9)
    plain = costmodel.fit_linear({"a": a, "b": b}, values)
    np.testing.assert_allclose(plain.estimates, fit.estimates)
    assert not np.allclose(plain.covariance, fit.covariance, rtol=0.05)
    assert plain.result["intercept"] == plain.estimates[-1]


def test_held_out_rows_are_predicted_by_fits_without_them():
    rng = np.random.default_rng(2)
    a = rng.normal(size=12)
    values = 5 + a + rng.normal(size=12)
    for groups in (None, [i // 4 for i in range(12)]):
        fit = costmodel.fit_linear({"a": a}, values, groups=groups)
        labels = np.array(range(12) if groups is None else groups)
        errors = []
        for label in np.unique(labels):
            mine = labels == label
            slope, intercept = np.polyfit(a[~mine], values[~mine], 1)
            errors += list(np.abs((slope * a[mine] + intercept) / values[mine] - 1))
        assert fit.held_out_error == pytest.approx(np.mean(errors), rel=1e-9)
        assert fit.held_out_max_error == pytest.approx(max(errors), rel=1e-9)
        assert fit.num_held_out == 12
        assert fit.held_out_error > fit.mean_relative_error


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 50, 127, 1999, 2000, 10**6])
@pytest.mark.parametrize("probability", [0.55, 0.9, 0.975, 0.9995])
def test_t_quantile_equals_scipys(degrees, probability):
    ours = _least_squares.t_quantile(probability, degrees)
    assert ours == pytest.approx(scipy.stats.t.ppf(probability, degrees), rel=1e-6)


# --- losses --------------------------------------------------------------------------------------


def test_morph_is_reproduced(morph):
    """R2 over all 76 rows of laws fitted on 27, as the paper has it: .9895 and .9982."""
    losses = sdsl_losses.columns(MORPH)[-1]
    r_squared = {
        name: sdsl_losses.r_squared(predicted, losses)
        for name, predicted in morph.predictions.items()
    }
    assert morph.is_fitted.sum() == 27
    assert r_squared["without shape"] == pytest.approx(0.98951, abs=5e-6)
    assert r_squared["with shape"] == pytest.approx(0.99824, abs=5e-6)
    assert r_squared["with shape, free exponent"] == pytest.approx(0.99845, abs=5e-6)
    large = np.array([row["name"].startswith("1B") for row in MORPH])
    for name, low, high in (("with shape", 0.006, 0.013), ("without shape", 0.027, 0.042)):
        errors = np.abs(morph.predictions[name] / losses - 1)[large]
        assert low < errors.min() < errors.max() < high


@pytest.mark.parametrize(
    ("name", "shipped"),
    [
        ("with shape", costmodel.MORPH),
        ("with shape, free exponent", costmodel.MORPH_FREE_EXPONENT),
    ],
)
def test_the_shipped_morph_laws_are_refits(morph, name, shipped):
    """The numbers to a permille, which the rounding of the published tokens leaves open."""
    fitted = morph.fits[name].result
    ours = [*fitted.base[:5], fitted.coefficient, fitted.exponent]
    theirs = [*shipped.base[:5], shipped.coefficient, shipped.exponent]
    np.testing.assert_allclose(ours, theirs, rtol=2e-3)
    n, d, layers, width, _ = sdsl_losses.columns(MORPH)
    np.testing.assert_allclose(
        morph.predictions[name], costmodel.loss(shipped, n, d, width / layers), rtol=5e-5
    )


def test_shape_and_embeddings_are_confounded(morph):
    """Without token tables in N, the sign of the shape's exponent turns."""
    found = {name: fit.r_squared for name, fit in morph.confound.items()}
    assert found["all parameters, without shape"] == pytest.approx(0.9948, abs=5e-5)
    assert found["non-embedding, without shape"] == pytest.approx(0.9982, abs=5e-5)
    assert found["all parameters, with shape"] == pytest.approx(0.9993, abs=5e-5)
    assert found["non-embedding, with shape"] == pytest.approx(0.9994, abs=5e-5)
    turned = morph.confound["non-embedding, with shape"].result
    assert turned.exponent < 0 < morph.confound["all parameters, with shape"].result.exponent
    assert turned.embeddings_counted == 0
    with pytest.raises(ValueError, match=r"ShapeLossLaw.exponent=-1.8.* must be positive"):
        costmodel.loss(turned, 1e8, 1e9, 64.0)


def test_covariance_of_a_loss_law_equals_scipys(morph):
    n, d, _, _, losses = sdsl_losses.columns(MORPH)
    fit = costmodel.fit_loss(n, d, losses)

    def law(_, irreducible, log_a, a, log_b, b):
        return irreducible + np.exp(log_a - a * np.log(n)) + np.exp(log_b - b * np.log(d))

    start = [*fit.estimates]
    start[1], start[3] = math.log(start[1]), math.log(start[3])
    solution, covariance = scipy.optimize.curve_fit(
        law, n, losses, p0=start, xtol=1e-15, ftol=1e-15
    )
    # From logarithms of coefficients to the coefficients.
    chain = np.array([1.0, fit.estimates[1], 1.0, fit.estimates[3], 1.0])
    solution[1], solution[3] = math.exp(solution[1]), math.exp(solution[3])
    np.testing.assert_allclose(fit.estimates, solution, rtol=1e-5)
    np.testing.assert_allclose(fit.covariance, covariance * np.outer(chain, chain), rtol=2e-3)


N, D = (
    values.ravel()
    for values in np.meshgrid([1e8, 3e8, 1e9, 4e9], [3e9, 2e10, 1e11, 5e11], indexing="ij")
)
RATIO = np.array([20.0, 100.0, 300.0, 50.0] * 4)
GEOMEAN = float(np.exp(np.log(RATIO).mean()))


@settings(max_examples=12, deadline=None)
@given(
    irreducible=st.floats(0.5, 2.5),
    size=st.floats(0.2, 1.5),  # what the terms are at 1e8 parameters and 3e9 tokens
    data=st.floats(0.2, 1.5),
    exponent=st.floats(0.2, 0.7),
    tokens_exponent=st.floats(0.2, 0.7),
)
def test_an_exact_loss_law_is_recovered(irreducible, size, data, exponent, tokens_exponent):
    """From whatever starts the fit has, the law that made the rows is found."""
    law = costmodel.LossLaw(
        irreducible, size * 1e8**exponent, exponent, data * 3e9**tokens_exponent, tokens_exponent
    )
    with enable_x64():
        losses = np.asarray(costmodel.loss(law, N, D))
    fit = costmodel.fit_loss(N, D, losses)
    np.testing.assert_allclose(fit.estimates, law[:5], rtol=1e-6)
    np.testing.assert_allclose(fit.predicted, losses, rtol=1e-11)


@pytest.mark.parametrize(
    ("law", "form", "exponents"),
    [
        (costmodel.MORPH, "shape", "equal"),
        (costmodel.MORPH_FREE_EXPONENT, "shape", "shape_free"),
        (costmodel.MORPH_FREE_EXPONENT, "shape", "free"),
        (costmodel.KaplanLossLaw(6.4e13, 0.076, 1.8e11, 0.2), "kaplan", "free"),
        (costmodel.ProductLossLaw(60.0, 0.07, 0.08), "product", "free"),
        (costmodel.ProductLossLaw(60.0, 0.07, 0.08, 0.02, GEOMEAN), "product_shape", "free"),
        (costmodel.ProductLossLaw(60.0, 0.07, 0.07, -0.02, GEOMEAN), "product_shape", "equal"),
    ],
)
def test_every_form_recovers_its_law(law, form, exponents):
    with enable_x64():
        losses = np.asarray(costmodel.loss(law, N, D, RATIO))
    fit = costmodel.fit_loss(N, D, losses, 8 * np.ones(16), 8 * RATIO, form, exponents)
    if form == "shape":
        ours = [*fit.result.base[:5], *fit.result[1:4]]
        theirs = [*law.base[:5], *law[1:4]]
    elif form == "product":
        ours, theirs = (
            fit.result[:4],
            law[:4],
        )  # its reference is that of the rows, and plays no part
    else:
        num = 5 if form == "product_shape" else 4
        ours, theirs = fit.result[:num], law[:num]
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    ranges = fit.result.fitted
    assert (ranges.min_parameters, ranges.max_tokens) == (1e8, 5e11)
    assert (ranges.min_aspect_ratio, ranges.max_aspect_ratio, ranges.min_layers) == (20, 300, 8)


# --- times ---------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(
    memory=st.floats(0.3, 1.0),
    compute=st.floats(0.2, 0.9),
    fixed=st.floats(0.0, 1e-3),
    layer=st.floats(0.0, 3e-4),
    collective=st.floats(0.0, 1e-4),
    overlap=st.floats(1.2, 6.0),
)
def test_an_exact_stack_is_recovered(memory, compute, fixed, layer, collective, overlap):
    stack = DEFAULTS._replace(
        memory_efficiency=memory,
        compute_efficiency=compute,
        fixed_seconds=fixed,
        layer_seconds=layer,
        collective_seconds=collective,
        overlap=overlap,
    )
    free = [name for name, a, b in zip(stack._fields, stack, DEFAULTS, strict=True) if a != b]
    fit = costmodel.fit_pass_times(timed(stack), A100, free)
    np.testing.assert_allclose(fit.result, stack, rtol=2e-5, atol=2e-9)
    assert fit.max_relative_error < 1e-6


def test_covariance_of_a_stack_equals_scipys():
    stack = DEFAULTS._replace(layer_seconds=5e-5, fixed_seconds=2e-4, collective_seconds=2e-5)
    free = ("memory_efficiency", "layer_seconds", "fixed_seconds", "compute_efficiency")
    rng = np.random.default_rng(3)
    passes = [
        one._replace(seconds=one.seconds * math.exp(rng.normal(0, 0.03))) for one in timed(stack)
    ]
    fit = costmodel.fit_pass_times(passes, A100, free, stack)
    data, seconds = fit_times._as_arrays(passes, A100)
    columns = [stack._fields.index(name) for name in free]

    def log_seconds(_, *values):
        fields = np.array(stack)
        fields[columns] = values
        return fit_times._LOG_SECONDS(fields, *data)[0]

    scale = fit.estimates
    solution, covariance = scipy.optimize.curve_fit(
        lambda x, *v: log_seconds(x, *(np.array(v) * scale)),
        seconds,
        np.log(seconds),
        p0=np.ones(4),
        xtol=1e-14,
        ftol=1e-14,
    )
    np.testing.assert_allclose(solution, 1, rtol=1e-5)
    np.testing.assert_allclose(fit.covariance, covariance * np.outer(scale, scale), rtol=1e-3)
    # 4 standard errors each way: a false alarm has a chance of 3e-4 a field, and the seed is fixed.
    true = np.array(stack)[columns]
    assert (np.abs(fit.estimates - true) < 4 * fit.standard_errors).all()
    assert fit.residual_error == pytest.approx(0.03, rel=0.5)


def test_jacobian_of_the_times_equals_differences():
    """And the times are those of `pass_seconds`, though shapes with projections are among them."""
    stack = np.array(DEFAULTS._replace(layer_seconds=5e-5, fixed_seconds=1e-4, hop_seconds=1e-6))
    passes = timed(costmodel.Stack(*stack))
    data, seconds = fit_times._as_arrays(passes, A100)
    value, jacobian = fit_times._LOG_SECONDS(stack, *data)
    np.testing.assert_allclose(np.exp(value), seconds, rtol=1e-12)
    for i in range(len(stack) - 1):
        step = 1e-6 * (stack[i] or 1e-4)
        ends = []
        for sign in (1, -1):
            moved = stack.copy()
            moved[i] += sign * step
            ends.append(fit_times._LOG_SECONDS(moved, *data)[0])
        difference = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(jacobian[:, i], difference, rtol=1e-6, atol=1e-8)


def test_an_overhead_that_would_be_negative_is_zero():
    """Rows from a chip that is faster with more layers, as noise may have it."""
    passes = [
        one._replace(seconds=one.seconds * (0.9 if one.shape.n_layers > 8 else 1.1))
        for one in timed(DEFAULTS, [p for p in PASSES if p[2] == 1])
    ]
    fit = costmodel.fit_pass_times(passes, A100, ["memory_efficiency", "layer_seconds"])
    assert fit.result.layer_seconds == 0
    assert fit.at_bound == ("layer_seconds",)
    assert fit.standard_errors[1] > 0
    assert math.isfinite(fit.held_out_error)


def test_default_fields_are_those_that_the_passes_determine():
    stack = DEFAULTS._replace(layer_seconds=5e-5, collective_seconds=2e-5, compute_efficiency=0.6)
    everything = costmodel.fit_pass_times(timed(stack), A100)
    assert everything.names == (
        "memory_efficiency",
        "layer_seconds",
        "collective_seconds",
        "compute_efficiency",
    )
    np.testing.assert_allclose(everything.result, stack, rtol=1e-6)
    decoding = timed(stack, [p for p in PASSES if p[2] == 1 and p[4] == 1])
    fit = costmodel.fit_pass_times(decoding, A100)
    assert fit.names == ("memory_efficiency", "layer_seconds")
    assert fit.ranges["d_model"] == (1024, 4096)
    assert fit.ranges["tensor_parallel"] == (1, 1)


def test_gpt_fast_is_predicted(measured):
    """13 rows of four models on 1 to 8 chips, and each model from the others."""
    rows, fit = measured.gpt_fast["bf16"]
    assert len(rows) == 13
    assert fit.mean_relative_error <= 0.03
    assert fit.held_out_error <= 0.06
    assert fit.num_held_out == 13
    assert fit.result.memory_efficiency == pytest.approx(0.81, abs=0.005)
    assert fit.result.layer_seconds == pytest.approx(47.5e-6, rel=0.02)
    assert fit.result.collective_seconds == pytest.approx(21e-6, rel=0.03)
    assert sdsl_measurements.roofline_error(measured) > 0.4
    # 8-bit weights reach less of the memory's speed, 4-bit ones less still.
    int8, int4 = (measured.gpt_fast[name][1].result for name in ("int8", "int4"))
    assert int4.memory_efficiency < int8.memory_efficiency < fit.result.memory_efficiency
    assert int8.layer_seconds == fit.result.layer_seconds


def test_depth_predicts_yans_draft(measured):
    found = measured.yan
    assert found["ratio"] == pytest.approx(1.97, abs=0.02)
    assert found["gamma"] == pytest.approx(7.98, abs=0.005)
    assert found["verify_seconds"] == pytest.approx(60.1e-3, abs=0.05e-3)
    assert found["layer_seconds"] == pytest.approx(0.537e-3, abs=0.5e-6)
    assert found["fixed_seconds"] == pytest.approx(0.25e-3, abs=0.5e-6)


def test_as_many_passes_as_fields_have_no_errors():
    stack = DEFAULTS._replace(layer_seconds=5e-5)
    passes = timed(stack, [PASSES[0], PASSES[2]])
    fit = costmodel.fit_pass_times(passes, A100, ["memory_efficiency", "layer_seconds"])
    np.testing.assert_allclose(fit.result, stack, rtol=1e-9)
    assert np.isnan(fit.standard_errors).all()
    assert np.isnan(fit.intervals).all()
    assert math.isnan(fit.residual_error)
    assert fit.num_held_out == 0


# --- refusals ------------------------------------------------------------------------------------

DEPTHS = [(LLAMA._replace(n_layers=n), 1, 1, 128, 1) for n in (4, 8, 16, 24, 32)]
DECODING = [p for p in PASSES if p[2] == 1 and p[4] == 1]
LAYERS = DEFAULTS._replace(layer_seconds=5e-5)


@pytest.mark.parametrize(
    ("passes", "free", "names", "advice"),
    [
        (DEPTHS, None, ("memory_efficiency", "layer_seconds"), "another width"),
        (DEPTHS, ["memory_efficiency", "layer_seconds", "fixed_seconds"], (), "another width"),
        (DECODING, ["collective_seconds"], ("collective_seconds",), "on one chip and on several"),
        (DECODING, ["compute_efficiency"], ("compute_efficiency",), "many tokens"),
        (DECODING, ["memory_efficiency", "overlap"], ("overlap",), "as long as their bytes"),
        (DECODING[:1], ["memory_efficiency", "layer_seconds"], (), "at least 2 rows are needed"),
        (
            [(shape, 1, 1, 128, 2) for shape in SHAPES],
            ["memory_efficiency", "layer_seconds", "collective_seconds"],
            ("layer_seconds", "collective_seconds"),
            "passes on one chip and on several",
        ),
    ],
)
def test_passes_that_do_not_determine_a_stack_are_refused(passes, free, names, advice):
    with pytest.raises(ValueError, match=advice) as refusal:
        costmodel.fit_pass_times(timed(LAYERS, passes), A100, free)
    for name in names:
        assert name in str(refusal.value)


def test_one_width_is_told_apart_once_another_is_added():
    """The rows that the refusal asks for are enough, even with noise."""
    others = [(LLAMA._replace(d_model=1024, d_ff=2816, n_layers=n), 1, 1, 128, 1) for n in (8, 32)]
    passes = timed(LAYERS, DEPTHS + others)
    rng = np.random.default_rng(4)
    noisy = [one._replace(seconds=one.seconds * (1 + 0.01 * rng.normal())) for one in passes]
    fit = costmodel.fit_pass_times(noisy, A100)
    assert fit.result.layer_seconds == pytest.approx(5e-5, rel=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: costmodel.fit_acceptance(X[:10], Y[:10], ALPHA[:10]),
            "target_slope and intercept apart.*add targets of other perplexities",
        ),
        (
            lambda: costmodel.fit_acceptance(X, Y, ALPHA, "affine", TARGETS),
            r"target_slope, intercept\[.*add targets",
        ),
        (
            lambda: costmodel.fit_acceptance([20.0] * 4, 10.0, [0.6, 0.61, 0.62, 0.63], "log"),
            "slope and intercept apart.*add drafts of other perplexities",
        ),
        (
            lambda: costmodel.fit_acceptance(X[:2], Y[:2], ALPHA[:2]),
            "2 rows do not determine 3 parameters.*at least 4",
        ),
        (
            lambda: costmodel.fit_loss(N, 1e10, 2 + N**-0.1),
            "nothing of tokens_exponent.*add the same models trained on other numbers",
        ),
        (lambda: costmodel.fit_loss(1e8, D, 2 + D**-0.1), "other sizes"),
        (
            lambda: costmodel.fit_loss(N, D, 2 + 300 * N**-0.3 + 900 * D**-0.3, 8, 640, "shape"),
            "coefficient and exponent.*models of the same size",
        ),
        (
            lambda: costmodel.fit_linear({"a": [1, 2, 3, 4], "b": [2, 4, 6, 8]}, [1, 2, 4, 3]),
            "a and b apart",
        ),
    ],
)
def test_rows_that_do_not_determine_a_law_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: costmodel.fit_acceptance(X, Y, [*ALPHA[:-1], math.nan]), r"alpha\[129\]=nan"),
        (lambda: costmodel.fit_acceptance(X, Y, ALPHA[:-1]), r"shape \(130,\) must have .*129"),
        (lambda: costmodel.fit_acceptance(X, Y, 2 * ALPHA), "alpha=1.19.*at most 1"),
        (lambda: costmodel.fit_acceptance(X / 20, Y, ALPHA), "draft_perplexity=0.*at least 1"),
        (lambda: costmodel.fit_acceptance(X, Y, ALPHA, "cubic"), "form='cubic' must be one of"),
        (lambda: costmodel.fit_acceptance(X, Y, ALPHA, targets=["a"]), "targets of length 1"),
        (lambda: costmodel.fit_acceptance(X, Y, ALPHA, groups=["a"]), "groups of length 1"),
        (lambda: costmodel.fit_acceptance(X, Y, ["a"] * 130), "alpha must be numbers"),
        (lambda: costmodel.fit_acceptance(X, Y, 0.5), r"alpha of shape \(\)"),
        (lambda: costmodel.fit_alpha([1, 2], [1.5, 3.5]), "tokens_per_round=3.5.*from 1 to gamma"),
        (lambda: costmodel.fit_alpha([0, 2], [1.0, 1.5]), "gamma=0"),
        (lambda: costmodel.fit_loss(-N, D, N), "parameters=-100000000 "),
        (lambda: costmodel.fit_loss(N, D, [math.inf] * 16), r"losses\[0\]=inf"),
        (lambda: costmodel.fit_loss(N, D, N, form="shape"), "needs n_layers and d_model"),
        (lambda: costmodel.fit_loss(N, D, N, form="cube"), "form='cube' must be one of size"),
        (lambda: costmodel.fit_loss(N, D, N, exponents="odd"), "exponents='odd' must be one of"),
        (lambda: costmodel.fit_linear({}, [1.0], intercept=None), "nothing to fit"),
        (lambda: costmodel.fit_pass_times([], A100), "passes is empty"),
        (
            lambda: costmodel.fit_pass_times(timed(LAYERS), A100, ["layers"]),
            r"free=\['layers'\] must be names among memory_efficiency",
        ),
        (lambda: costmodel.fit_pass_times(timed(LAYERS), A100, []), r"free=\[\] must be names"),
        (
            lambda: costmodel.fit_pass_times([costmodel.TimedPass(LLAMA, -1.0)] * 3, A100),
            "seconds=-1",
        ),
        (
            lambda: costmodel.fit_pass_times([costmodel.TimedPass(LLAMA, 1.0, batch=0)], A100),
            "batch=0",
        ),
        (
            lambda: costmodel.fit_pass_times(timed(LAYERS), A100._replace(bytes_per_second=0.0)),
            "Chip.bytes_per_second=0",
        ),
        (
            lambda: jax.jit(lambda a: costmodel.fit_acceptance(X, Y, a).result)(ALPHA),
            "alpha must be numbers: fits look at them",
        ),
    ],
)
def test_wrong_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_fits_leave_the_callers_precision_alone():
    """Rows in float32, or from JAX, are fitted in float64 all the same."""
    ours = costmodel.fit_acceptance(jnp.asarray(X), np.float32(Y), ALPHA.tolist())
    assert not jax.config.jax_enable_x64
    assert ours.estimates.dtype == np.float64
    assert type(ours.result.intercept) is float
    np.testing.assert_allclose(
        ours.estimates, costmodel.fit_acceptance(X, Y, ALPHA).estimates, rtol=1e-4
    )
    with enable_x64():
        inside = costmodel.fit_acceptance(X, Y, ALPHA)
    np.testing.assert_array_equal(inside.estimates, costmodel.fit_acceptance(X, Y, ALPHA).estimates)
