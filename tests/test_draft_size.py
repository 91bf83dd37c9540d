"""The best draft size against the published table, a grid, and the condition of an optimum."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64

from jaxsd import costmodel
from jaxsd.costmodel import draft_size

# SDSL, arXiv 2603.11053, table 5: target parameters M, target tokens D', and for draft tokens of
# 180e9, 2.4e12 and 18e12 the optimal draft size and the throughput. The paper prints D' = 3e12 for
# the first row; the values are those of 4e12.
DRAFT_TOKENS = (180e9, 2.4e12, 18e12)
TABLE_5 = {
    "Qwen1.5-14B": (
        (14167290880, 4e12),
        (124039820.3, 115390938.2, 112685392.4),
        ("8.947e-11", "9.165e-11", "9.235e-11"),
    ),
    "Qwen2.5-72B": (
        (72706203648, 18e12),
        (318409631.5, 295409960.3, 288221790.3),
        ("1.861e-11", "1.900e-11", "1.912e-11"),
    ),
    "LLaMa3-70B": (
        (70553706496, 15e12),
        (312760391.8, 290182058.1, 283125440.3),
        ("1.916e-11", "1.957e-11", "1.970e-11"),
    ),
    "OPT-13B": (
        (12853473280, 180e9),
        (117313808.6, 109171489.6, 106623620.8),
        ("1.009e-10", "1.034e-10", "1.043e-10"),
    ),
}
LLAMA = (70553706496, 15e12, 2.4e12)


def _size_and_design(*arguments):
    design = costmodel.optimal_draft_size(*arguments)
    return design.parameters, design


# Compiled once per precision for all tests of traced searches.
traced = jax.jit(jax.value_and_grad(_size_and_design, argnums=(0, 1, 2, 3), has_aux=True))


def plain_alpha(size, target, target_tokens, draft_tokens):
    """Both laws in numpy and float64, with powers, as printed."""
    x = np.exp(1.8172 + 482.01 / size**0.3478 + 2085.43 / draft_tokens**0.3658)
    y = np.exp(1.8172 + 482.01 / target**0.3478 + 2085.43 / target_tokens**0.3658)
    return -0.0067 * x + 0.012971 * y + 0.642084


def plain_speedup(size, gamma, target, target_tokens, draft_tokens):
    """Equation 1 of the paper with c = N / M, wherever the law gives a probability."""
    alpha = plain_alpha(size, target, target_tokens, draft_tokens)
    alpha = np.where((alpha > 0) & (alpha < 1), alpha, np.nan)
    return (1 - alpha ** (gamma + 1)) / (1 - alpha) / (1 + gamma * size / target)


@pytest.mark.parametrize("name", TABLE_5)
def test_published_optima_are_reproduced(name):
    (target, target_tokens), sizes, throughputs = TABLE_5[name]
    for draft_tokens, size, printed in zip(DRAFT_TOKENS, sizes, throughputs, strict=True):
        design = costmodel.optimal_draft_size(target, target_tokens, draft_tokens)
        assert design.parameters == pytest.approx(size, rel=1e-7)
        assert f"{design.throughput:.3e}" == printed
        assert not design.extrapolated
        # The other fields follow from these by the formulas of the paper.
        alpha = plain_alpha(design.parameters, target, target_tokens, draft_tokens)
        assert design.alpha == pytest.approx(alpha, rel=1e-12)
        assert design.speedup == pytest.approx(2 * target * design.throughput, rel=1e-12)
        gain = plain_speedup(design.parameters, design.gamma, target, target_tokens, draft_tokens)
        assert design.speedup == pytest.approx(gain, rel=1e-12)


def test_first_order_condition_holds_at_the_optimum():
    """The paper's throughput is stationary in N, by a formula that no code of the search uses."""
    target = LLAMA[0]
    design = costmodel.optimal_draft_size(*LLAMA)
    n, g, a = design.parameters, design.gamma, design.alpha
    alpha_slope = 0.0067 * 482.01 * 0.3478 * design.draft_perplexity * n ** (-0.3478 - 1)
    log_tokens_slope = 1 / (1 - a) - (g + 1) * a**g / (1 - a ** (g + 1))
    lost, gained = g * n / (target + g * n), n * alpha_slope * log_tokens_slope
    assert 0.03 < lost < 0.05
    assert gained == pytest.approx(lost, rel=1e-9)


@pytest.mark.parametrize("gamma", [1, 4, 7.5, 100])
def test_optimum_at_a_given_gamma_beats_a_grid(gamma):
    design = costmodel.optimal_draft_size(*LLAMA, gamma=gamma)
    grid = LLAMA[0] * np.exp(np.linspace(math.log(1e-5), math.log(0.2), 400_001))
    values = plain_speedup(grid, gamma, *LLAMA)
    best = np.nanargmax(values)
    assert design.gamma == gamma
    assert design.parameters == pytest.approx(grid[best], rel=1e-3)  # the grid's own flatness
    assert design.speedup == pytest.approx(values[best], rel=1e-9)
    assert design.speedup >= values[best] * (1 - 1e-14)


def test_best_gamma_is_no_worse_than_any_given_one():
    free = costmodel.optimal_draft_size(*LLAMA)
    same = costmodel.optimal_draft_size(*LLAMA, gamma=free.gamma)
    assert same.parameters == pytest.approx(free.parameters, rel=1e-9)
    assert same.speedup == pytest.approx(free.speedup, rel=1e-13)
    for gamma in (free.gamma - 1, free.gamma + 1):
        assert costmodel.optimal_draft_size(*LLAMA, gamma=gamma).speedup < free.speedup


@pytest.mark.parametrize(
    ("arguments", "gamma"),
    [
        (LLAMA, 0),
        ((70e9, 15e12, 1e3), None),  # a draft that has seen nothing
        ((70e9, 15e12, 1e3), 4),
        ((70e9, 15e12, 1e7), None),  # alpha below 0 by the law at every size
        ((1e6, 1e12, 1e12), None),  # a target too small to have a draft
    ],
)
def test_plain_decoding_is_the_answer_where_no_draft_gains(arguments, gamma):
    design = costmodel.optimal_draft_size(*arguments, gamma=gamma)
    assert (design.parameters, design.gamma, design.alpha, design.speedup) == (0, 0, 0, 1)
    assert design.throughput == pytest.approx(1 / (2 * arguments[0]), rel=1e-12)
    assert design.draft_perplexity == math.inf
    assert math.isfinite(design.target_perplexity)
    assert not design.extrapolated


def test_an_optimum_on_the_bound_says_so():
    """A law in which size alone counts: the draft grows until the search forbids it."""
    steep = costmodel.Laws(
        loss=costmodel.BESIROGLU,
        acceptance=costmodel.AcceptanceLaw(draft_slope=-1.0, target_slope=0.0, intercept=8.0),
    )
    design = costmodel.optimal_draft_size(70e9, 15e12, 15e12, laws=steep)
    assert design.extrapolated
    assert design.parameters == pytest.approx(0.2 * 70e9, rel=1e-12)


def test_scalars_give_python_floats_and_arrays_broadcast():
    one = costmodel.optimal_draft_size(*LLAMA)
    assert all(type(x) is float for x in one[:-1])
    assert type(one.extrapolated) is bool
    json.dumps(one._asdict(), allow_nan=False)
    targets, drafts = np.array([70553706496, 12853473280]), np.array([[2.4e12], [180e9], [1e3]])
    grid = costmodel.optimal_draft_size(targets, 15e12, drafts)
    assert grid.parameters.shape == (3, 2)
    assert grid.parameters.dtype == np.float64
    assert grid.parameters[0, 0] == pytest.approx(one.parameters, rel=1e-12)
    np.testing.assert_array_equal(grid.speedup[2], 1.0)


def test_search_leaves_the_callers_precision_alone():
    assert not jax.config.jax_enable_x64
    costmodel.optimal_draft_size(*LLAMA)
    assert not jax.config.jax_enable_x64
    assert jnp.zeros(()).dtype == jnp.float32
    with enable_x64():
        inside = costmodel.optimal_draft_size(*LLAMA)
    assert inside == costmodel.optimal_draft_size(*LLAMA)


def test_new_numbers_do_not_compile_anew(monkeypatch):
    """The objective is Python: it runs while a search is traced and at no other time."""
    costmodel.optimal_draft_size(*LLAMA)
    calls = []
    original = draft_size._speedup
    monkeypatch.setattr(draft_size, "_speedup", lambda *args: calls.append(1) or original(*args))
    laws = costmodel.SDSL._replace(loss=costmodel.HOFFMANN)
    costmodel.optimal_draft_size(13e9, 2e12, 300e9)
    costmodel.optimal_draft_size(int(8e9), np.float32(2e12), np.float64(3e11), laws)
    assert not calls
    costmodel.optimal_draft_size(np.full(5, 13e9), 2e12, 300e9)
    assert calls, "a new shape must compile, or this test cannot fail"


def test_hoffmann_constants_move_the_optimum_as_published():
    """70B, D = D' = 1e13: 283 million parameters become 258 million."""
    laws = costmodel.SDSL._replace(loss=costmodel.HOFFMANN)
    assert round(costmodel.optimal_draft_size(70e9, 1e13, 1e13).parameters / 1e6) == 283
    assert round(costmodel.optimal_draft_size(70e9, 1e13, 1e13, laws).parameters / 1e6) == 258


def test_optimum_is_differentiable_in_every_argument_and_law():
    """Against differences of the search itself, which no derivative enters."""
    arguments = (*LLAMA, costmodel.SDSL)
    with enable_x64():
        _, gradients = traced(*map(float, LLAMA), costmodel.SDSL)
    leaves, structure = jax.tree.flatten(arguments)
    for i, (value, gradient) in enumerate(zip(leaves, jax.tree.leaves(gradients), strict=True)):
        if not np.isfinite(value):  # a range without an upper end
            continue
        step = 1e-5 * (abs(value) or 1.0)
        ends = []
        for sign in (1, -1):
            moved = list(leaves)
            moved[i] = value + sign * step
            ends.append(_size_and_design(*jax.tree.unflatten(structure, moved))[0])
        difference = (ends[0] - ends[1]) / (2 * step)
        # The differences carry about 1e-12 of the size over a step of 1e-5.
        scale = abs(value) or 1.0
        assert float(gradient) * scale == pytest.approx(difference * scale, rel=1e-6, abs=1.0), i


def test_traced_search_agrees_in_float32():
    (_, design), gradients = traced(*map(float, LLAMA), costmodel.SDSL)
    exact = costmodel.optimal_draft_size(*LLAMA)
    assert design.parameters.dtype == jnp.float32
    assert float(design.parameters) == pytest.approx(exact.parameters, rel=1e-3)
    assert float(design.speedup) == pytest.approx(exact.speedup, rel=1e-5)
    assert all(np.isfinite(x) for x in jax.tree.leaves(gradients))


def test_gradients_are_zero_where_no_draft_gains():
    """And not NaN, as a perplexity of infinity behind a mask would make them."""
    (size, design), gradients = traced(70e9, 15e12, 1e3, costmodel.SDSL)
    assert (float(size), float(design.speedup)) == (0, 1)
    assert all(float(x) == 0 for x in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: costmodel.optimal_draft_size(0, 1e12, 1e12), "target_parameters=0 must be pos"),
        (lambda: costmodel.optimal_draft_size(7e10, -1, 1e12), "target_tokens=-1"),
        (lambda: costmodel.optimal_draft_size(7e10, 1e12, math.nan), "draft_tokens=nan"),
        (lambda: costmodel.optimal_draft_size(7e10, 1e12, math.inf), "draft_tokens=inf"),
        (lambda: costmodel.optimal_draft_size(7e10, 1e12, 1e12, gamma=-1), "gamma=-1"),
        (
            lambda: costmodel.optimal_draft_size(
                7e10,
                1e12,
                1e12,
                costmodel.SDSL._replace(loss=costmodel.BESIROGLU._replace(tokens_coefficient=-1.0)),
            ),
            "LossLaw.tokens_coefficient=-1",
        ),
    ],
)
def test_wrong_numbers_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
