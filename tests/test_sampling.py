"""From logits to probabilities: order of the filters, ties, off switches, rows kept apart."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from reference import probabilities as slow_probabilities

import jaxsd
from jaxsd import Sampling, probabilities

VOCAB = 6
PLAIN = jax.jit(probabilities)
# Eighths: closer logits may tie after the shift by the maximum, which no user can tell.
LOGIT = st.one_of(st.just(-np.inf), st.integers(-64, 64).map(lambda i: i / 8))
ROW = st.lists(LOGIT, min_size=VOCAB, max_size=VOCAB).filter(lambda row: max(row) > -np.inf)
SETTING = st.tuples(
    st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.9]),
    st.integers(0, VOCAB + 2),
    st.sampled_from([0.05, 0.31, 0.5, 0.77, 0.93, 1.0]),
)


def rows(settings):
    """Settings `[(temperature, top_k, top_p)]` as one `Sampling` with a field per row."""
    temperature, top_k, top_p = zip(*settings, strict=True)
    return Sampling(
        np.array(temperature, np.float32), np.array(top_k, np.int32), np.array(top_p, np.float32)
    )


@hypothesis.settings(max_examples=60)
@hypothesis.given(st.lists(st.tuples(ROW, SETTING), min_size=4, max_size=4))
def test_probabilities_equal_a_slow_reference_row_by_row(cases):
    """Temperature, then top-k, then top-p, lower id first; all kinds of rows in one batch."""
    logits = np.array([row for row, _ in cases], np.float32)
    got = np.asarray(PLAIN(logits, rows([setting for _, setting in cases])))
    for index, (row, setting) in enumerate(zip(logits, [s for _, s in cases], strict=True)):
        want, margin = slow_probabilities(row, *setting)
        if margin < 1e-5:
            continue  # mass above a token equals top-p within rounding: either answer is right
        np.testing.assert_allclose(got[index], want, atol=2e-6, rtol=2e-5)
        np.testing.assert_array_equal(got[index] > 0, want > 1e-37)


@hypothesis.given(ROW, st.floats(0.05, 3.0))
def test_top_k_of_one_is_greedy_whatever_the_temperature(row, temperature):
    logits = np.array([row], np.float32)
    one = PLAIN(logits, rows([(temperature, 1, 1.0)]))
    greedy = PLAIN(logits, rows([(0.0, 0, 1.0)]))
    np.testing.assert_array_equal(one, greedy)


@hypothesis.given(ROW, ROW, SETTING)
def test_a_row_does_not_depend_on_its_neighbours_to_the_bit(row, other, setting):
    """A neighbour that filters makes the batch sort; a row that does not must not notice."""
    quiet, loud = (1.0, 0, 1.0), (0.8, 2, 0.6)
    logits = np.array([row, other], np.float32)
    first = np.asarray(PLAIN(logits, rows([setting, quiet])))[0]
    second = np.asarray(PLAIN(logits, rows([setting, loud])))[0]
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("off", [(1.0, VOCAB, 1.0), (1.0, 999, 1.0), (1.0, 0, 1.0)])
def test_filters_that_are_off_leave_softmax_bit_for_bit(off):
    logits = jax.random.normal(jax.random.key(0), (3, VOCAB))
    want = jax.jit(jax.nn.softmax)(logits - jnp.max(logits, axis=-1, keepdims=True))
    np.testing.assert_array_equal(PLAIN(logits, rows([off] * 3)), want)


def test_temperature_comes_before_top_p():
    """With top-p first, the two tokens of mass 0.9 at temperature 1 would stay; at 4 three do."""
    logits = jnp.log(jnp.array([[0.6, 0.3, 0.08, 0.02]]))
    kept = probabilities(logits, Sampling(temperature=4.0, top_p=0.85)) > 0
    assert kept.tolist() == [[True, True, True, False]]


def test_greedy_takes_the_first_of_equal_logits():
    probs = PLAIN(jnp.array([[1.0, 3.0, 3.0]]), Sampling())
    assert probs.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6, 1e30])
def test_extreme_temperatures_stay_finite_and_reach_their_limits(temperature):
    logits = jnp.array([[300.0, -200.0, 299.0, -jnp.inf]])
    probs = probabilities(logits, Sampling(temperature=temperature))
    third = 1 / 3
    want = [[1.0, 0.0, 0.0, 0.0]] if temperature < 1 else [[third, third, third, 0.0]]
    np.testing.assert_allclose(probs, want, atol=2e-4)


def test_settings_apply_to_all_places_of_a_row():
    logits = jax.random.normal(jax.random.key(1), (2, 3, VOCAB))
    sampling = rows([(0.0, 0, 1.0), (0.9, 2, 0.8)])
    got = np.asarray(PLAIN(logits, sampling))
    for place in range(3):
        want = PLAIN(np.asarray(logits)[:, place], sampling)
        np.testing.assert_allclose(got[:, place], want, rtol=1e-6)


def test_float64_logits_give_float64_probabilities(x64):
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((1, VOCAB)))
    got = probabilities(logits, Sampling(temperature=0.5, top_k=3))
    assert got.dtype == jnp.float64
    want, _ = slow_probabilities(logits[0], 0.5, 3, 1.0)
    np.testing.assert_allclose(got[0], want, atol=1e-15)


def test_bfloat16_logits_are_computed_in_float32():
    logits = jnp.array([[1.0, 2.0]], jnp.bfloat16)
    assert probabilities(logits, Sampling(temperature=1.0)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(temperature=-0.5), "sampling.temperature=-0.5 must be"),
        (Sampling(temperature=float("nan")), "sampling.temperature=nan must be"),
        (Sampling(temperature=float("inf")), "sampling.temperature=inf must be"),
        (Sampling(top_k=-1), "sampling.top_k=-1 must be"),
        (Sampling(top_k=1.5), "sampling.top_k=1.5 must be"),
        (Sampling(top_p=0.0), "sampling.top_p=0.0 must be"),
        (Sampling(top_p=1.5), "sampling.top_p=1.5 must be"),
        (Sampling(temperature=np.array([1.0, -2.0])), "sampling.temperature=-2.0 must be"),
        (Sampling(temperature=np.ones(3)), r"sampling.temperature has shape \(3,\)"),
    ],
)
def test_wrong_settings_are_named(sampling, message):
    with pytest.raises(ValueError, match=message):
        probabilities(jnp.zeros((2, VOCAB)), sampling)


def test_categorical_never_draws_a_token_of_probability_zero():
    probs = jnp.array([0.0, 1e-30, 0.0, 1.0, 0.0])
    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = jax.vmap(jaxsd.categorical, in_axes=(0, None))(keys, probs)
    assert set(drawn.tolist()) <= {1, 3}
    assert drawn.dtype == jnp.int32


@pytest.mark.parametrize("size", [1, 2, 3, 17, 1000])
def test_categorical_draws_from_the_law_it_is_given_and_nothing_of_probability_zero(size):
    """Chi-square of 100,000 draws; the chance of a false alarm is below 1e-6 for each size."""
    probs = np.asarray(jax.random.dirichlet(jax.random.key(size), np.ones(size, np.float32)))
    probs = np.where(np.arange(size) % 3 == 1, 0.0, probs).astype(np.float32)
    probs /= probs.sum()
    keys = jax.random.split(jax.random.key(0), 100_000)
    drawn = jax.jit(jax.vmap(jaxsd.categorical, in_axes=(0, None)))(keys, probs)
    counts = np.bincount(np.asarray(drawn), minlength=size)
    assert counts.size == size
    assert np.all(counts[probs == 0] == 0)
    # Cells expected fewer than 20 times are taken together: the tail formula needs full cells.
    expected = probs * len(keys)
    small = expected < 20
    cells = np.append(counts[~small], counts[small].sum())
    wanted = np.append(expected[~small], expected[small].sum())
    cells, wanted = cells[wanted > 0], wanted[wanted > 0]
    statistic = np.sum((cells - wanted) ** 2 / wanted)
    assert statistic <= scipy.stats.chi2.isf(1e-6, max(len(cells) - 1, 1))
