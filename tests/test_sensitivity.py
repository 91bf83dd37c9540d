"""Elasticities, intervals, flat regions and fronts, against finite steps, samples and grids."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64
from examples import DRAFT, FOUR_H100, LLAMA_70B, TARGET

from jaxsd import costmodel

LOAD = costmodel.Workload(4, 2000)
LAWS = costmodel.SHAPE_AWARE_SDSL
QUESTION = (DRAFT, TARGET, FOUR_H100, LOAD, LAWS)
TEMPLATE = costmodel.draft_template(LLAMA_70B, tokens=1e12)


@pytest.fixture(scope="module")
def result():
    """A draft on one chip of the four: widths are multiples of 128."""
    hardware = costmodel.Hardware(FOUR_H100.target, FOUR_H100.target._replace(tensor_parallel=1))
    free = ("d_model", "n_layers", "gamma")
    return costmodel.search(TARGET, hardware, TEMPLATE, free, workload=LOAD)


def test_elasticities_are_what_one_percent_changes():
    table = costmodel.elasticities(*QUESTION)
    with enable_x64():

        def speedup(**changes):
            chip = FOUR_H100.target.chip
            if "bandwidth" in changes:
                chip = chip._replace(bytes_per_second=chip.bytes_per_second * changes["bandwidth"])
            hardware = FOUR_H100._replace(target=FOUR_H100.target._replace(chip=chip))
            shape = DRAFT.shape
            shape = shape._replace(n_layers=shape.n_layers * changes.get("layers", 1.0))
            design = DRAFT._replace(shape=shape)
            law = LAWS.acceptance
            law = law._replace(intercept=law.intercept * changes.get("intercept", 1.0))
            laws = LAWS._replace(acceptance=law)
            question = jax.tree.map(np.float64, (design, TARGET, hardware, LOAD, laws))
            return math.log(float(costmodel.throughput(*question).speedup))

        for change, name in (
            ("bandwidth", "hardware.target.chip.bytes_per_second"),
            ("layers", "design.shape.n_layers"),
            ("intercept", "laws.acceptance.intercept"),
        ):
            step = 1e-5
            slope = (speedup(**{change: 1 + step}) - speedup(**{change: 1 - step})) / (2 * step)
            assert table[name] == pytest.approx(slope, rel=1e-4), name
    sizes = [abs(value) for value in table.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert not any(".fitted." in name for name in table)
    assert "workload.served_tokens" not in table  # the speed-up does not depend on it
    cost = costmodel.elasticities(*QUESTION, objective="cost")
    assert cost["hardware.target.cost_per_chip_hour"] == pytest.approx(1)


def test_delta_method_is_exact_for_a_linear_function():
    covariance = np.array([[0.04, 0.01], [0.01, 0.09]])
    value, error = costmodel.delta_method(lambda x: 2 * x[0] - x[1], [1.0, 3.0], covariance)
    assert float(value) == -1.0
    assert float(error) == pytest.approx(math.sqrt(4 * 0.04 - 4 * 0.01 + 0.09), rel=1e-6)
    with pytest.raises(ValueError, match=r"covariance of shape \(2, 2\) must be \[n, n\]"):
        costmodel.delta_method(jnp.sum, [1.0, 2.0, 3.0], covariance)


def test_covariance_has_the_published_errors_and_is_one():
    with enable_x64():
        covariance = np.asarray(costmodel.acceptance_covariance(costmodel.SDSL_ACCEPTANCE))
    errors = costmodel.SDSL_ACCEPTANCE[3:6]
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), errors, rtol=1e-12)
    np.testing.assert_array_equal(covariance, covariance.T)
    assert np.linalg.eigvalsh(covariance).min() > 0
    with pytest.raises(ValueError, match="MeasuredAcceptance, which has no standard errors"):
        costmodel.acceptance_covariance(costmodel.MeasuredAcceptance(0.5))


def test_interval_agrees_with_samples_of_the_law():
    """200000 laws drawn from the fit's normal distribution.

    The standard error of a quantile of ln S at 2.5 % is 2.7 spreads / sqrt(n), 0.6 % of a spread;
    the tolerance, 4 % of one, is more than six of these, a chance below 1e-9, and leaves room for
    the curvature that the delta method neglects.
    """
    interval = costmodel.speedup_interval(*QUESTION)
    law = LAWS.acceptance
    rng = np.random.default_rng(0)
    with enable_x64():
        covariance = np.asarray(costmodel.acceptance_covariance(law))
        draws = rng.multivariate_normal(law[:3], covariance, 200_000)

        @jax.jit
        @jax.vmap
        def speedup(a, b, c):
            moved = law._replace(draft_slope=a, target_slope=b, intercept=c)
            laws = LAWS._replace(acceptance=moved)
            question = jax.tree.map(float, (DRAFT, TARGET, FOUR_H100, LOAD))
            return costmodel.throughput(*question, laws).speedup

        logs = np.log(np.asarray(speedup(*draws.T)))
        pairs = draws[:, 2] + rng.normal(0, law.residual_error, len(draws))
        pair_logs = np.log(np.asarray(speedup(draws[:, 0], draws[:, 1], pairs)))
    for samples, low, high in (
        (logs, interval.low, interval.high),
        (pair_logs, interval.pair_low, interval.pair_high),
    ):
        spread = samples.std()
        expected = np.quantile(samples, [0.025, 0.975])
        # ln S bends a little over the wide interval of a pair: 12 % of a spread there.
        room = 0.04 if samples is logs else 0.12
        np.testing.assert_allclose(np.log([low, high]), expected, atol=room * spread)
    assert interval.pair_low < interval.low < interval.value < interval.high < interval.pair_high


def test_errors_of_the_best_size_agree_with_samples_of_the_law():
    """2000 laws, each designed anew in one vmapped call.

    The spread of 2000 samples is known to 1.6 %; 10 % is six times that, a chance below 1e-9, and
    leaves room for the curvature that the delta method neglects.
    """
    design = costmodel.draft_size_intervals(70553706496, 15e12, 2.4e12)
    law = costmodel.SDSL_ACCEPTANCE
    with enable_x64():
        covariance = np.asarray(costmodel.acceptance_covariance(law))
    draws = np.random.default_rng(1).multivariate_normal(law[:3], covariance, 2000)
    moved = law._replace(draft_slope=draws[:, 0], target_slope=draws[:, 1], intercept=draws[:, 2])
    laws = costmodel.SDSL._replace(acceptance=moved)
    samples = costmodel.optimal_draft_size(70553706496, 15e12, 2.4e12, laws)
    for name in ("parameters", "gamma", "speedup"):
        spread = np.log(getattr(samples, name)).std()
        error = getattr(design, f"{name}_log_error")
        assert error == pytest.approx(spread, rel=0.1), name
        middle = np.median(getattr(samples, name))
        assert getattr(design, name) == pytest.approx(middle, rel=0.02)
    with pytest.raises(ValueError, match="no draft makes this target faster"):
        costmodel.draft_size_intervals(70e9, 15e12, 1e3)


def test_flat_region_is_every_design_that_loses_no_more(result):
    """Against a list made without the lattice's code."""
    (region,) = costmodel.flat_region(result, [0.01])
    best = result.best
    inside = []
    for n_layers in range(3, 20):
        for d_model in range(128, 128 * 40, 128):
            ratio = d_model / n_layers
            if not 17 <= ratio <= 384:
                continue
            heads = d_model // 128
            wanted = heads / 4
            kv = min(
                (n for n in range(1, heads + 1) if heads % n == 0),
                key=lambda n: abs(math.log(n / wanted)),
            )
            inside.append((n_layers, d_model, heads, kv, max(round(3.5 * d_model / 128), 1) * 128))
    layers, widths, heads, kvs, ffs = (
        np.array(x, np.float64)[:, None] for x in zip(*inside, strict=True)
    )
    gammas = np.arange(1.0, 33.0)[None, :]
    with enable_x64():
        shape = best.design.shape._replace(
            n_layers=layers, d_model=widths, n_heads=heads, n_kv_heads=kvs, d_ff=ffs
        )
        design = best.design._replace(shape=shape, gamma=gammas)
        rates = costmodel.throughput(design, TARGET, best.hardware, LOAD, LAWS).tokens_per_second
    rates = np.asarray(rates)
    near = rates >= best.objective / 1.01
    assert rates.max() == pytest.approx(best.objective, rel=1e-9)
    assert region.num_designs == near.sum()
    for name, values in (("n_layers", layers), ("d_model", widths)):
        rows = near.any(axis=1)
        assert region.ranges[name] == (values[rows].min(), values[rows].max())
    assert region.ranges["gamma"] == tuple(gammas[0, near.any(axis=0)][[0, -1]])
    assert region.cut_off == ()


def test_a_front_rises_and_keeps_its_limits(result):
    front = costmodel.pareto_front(result, num_points=6)
    assert len(front) >= 4
    for point in front:
        size = float(costmodel.parameters_total(point.solution.design.shape))
        assert size <= point.limit * (1 + 1e-9)
    rates = [point.solution.objective for point in front]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(result.best.objective)
    flops = costmodel.pareto_front(result, "training_flops", num_points=3)
    assert float(flops[0].solution.estimate.training_flops) <= flops[0].limit * (1 + 1e-9)


def test_wrong_questions_are_refused_by_name(result):
    with pytest.raises(ValueError, match="objective='fast' must be one of"):
        costmodel.elasticities(*QUESTION, objective="fast")
    with pytest.raises(ValueError, match="against='watts' must be one of"):
        costmodel.pareto_front(result, "watts")
    with pytest.raises(ValueError, match="losses=0 must be positive"):
        costmodel.flat_region(result, [0])
    plain = result._replace(best=result.best._replace(plain=True))
    for question in (costmodel.flat_region, costmodel.pareto_front):
        with pytest.raises(ValueError, match="plain decoding"):
            question(plain)
    laws = LAWS._replace(acceptance=costmodel.MeasuredAcceptance(0.7))
    with pytest.raises(ValueError, match="no standard errors"):
        costmodel.speedup_interval(*QUESTION[:4], laws)
