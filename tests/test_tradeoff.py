"""Bias and speed of lossy verification, against linear programs, enumeration and the front."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from conftest import enable_x64
from gradients import assert_gradient_is_a_difference
from hypothesis import example, given
from hypothesis import strategies as st

from jaxsd import costmodel

V = 5
DRAFT, TARGET = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])


CHAIN, LONGER = (
    costmodel.Chain(np.full(2, 0.5), np.full((length - 1, 2, 2), 0.5)) for length in (2, 3)
)
ONES = jax.tree.map(np.ones_like, CHAIN)


def law_of(weights):
    """Weights as a law; all zero is the law that is all on the first token."""
    weights = np.asarray(weights, np.float64)
    return weights / weights.sum() if weights.sum() else np.eye(len(weights))[0]


def probabilities(width=64):
    """Zeros, ones and what is between."""
    return st.one_of(st.just(0.0), st.just(1.0), st.floats(0.0, 1.0, width=width))


laws = st.lists(probabilities(), min_size=V, max_size=V).map(law_of)
acceptances = st.lists(probabilities(), min_size=V, max_size=V).map(np.array)

# Compiled once: properties are checked on hundreds of laws of one size.
total_variation = jax.jit(costmodel.total_variation)
rejection_probability = jax.jit(costmodel.rejection_probability)
emitted_law = jax.jit(costmodel.emitted_law)
residual_loss = jax.jit(costmodel.residual_loss)
optimal_residual = jax.jit(costmodel.optimal_residual)
over_acceptance = jax.jit(costmodel.over_acceptance)
blended_acceptance = jax.jit(costmodel.blended_acceptance)
bias_speed_front = jax.jit(costmodel.bias_speed_front)


def random_pairs(seed, count, size):
    """Laws of the draft and the target, some of whose tokens have no probability."""
    rng = np.random.default_rng(seed)
    weights = rng.exponential(size=(2, count, size)) * (rng.random((2, count, size)) < 0.85)
    weights[:, :, 0] += 1e-3
    draft, target = weights / weights.sum(-1, keepdims=True)
    return rng, draft, target


def slow_total_variation(first, second):
    """The largest difference that the two laws give to one event, over all events."""
    events = (np.arange(2 ** len(first))[:, None] >> np.arange(len(first))) & 1
    return (events @ (first - second)).max()


def best_residual(acceptance, draft, target):
    """A linear program: the residual law P and the distances t, to make half of sum t small."""
    size = len(draft)
    kept, rejected = acceptance * draft, 1 - acceptance @ draft
    eye = np.eye(size)
    result = scipy.optimize.linprog(
        np.r_[np.zeros(size), np.full(size, 0.5)],
        A_ub=np.block([[rejected * eye, -eye], [-rejected * eye, -eye]]),
        b_ub=np.r_[target - kept, kept - target],
        A_eq=np.r_[np.ones(size), np.zeros(size)][None],
        b_eq=[1.0],
    )
    assert result.success
    return result.fun


def best_acceptance_and_residual(rejected, draft, target):
    """Another: what is kept k <= draft, what replaces the rest m, and the distances t."""
    size = len(draft)
    eye, zero = np.eye(size), np.zeros(size)
    result = scipy.optimize.linprog(
        np.r_[zero, zero, np.full(size, 0.5)],
        A_ub=np.block([[eye, eye, -eye], [-eye, -eye, -eye]]),
        b_ub=np.r_[target, -target],
        A_eq=[np.r_[np.ones(size), zero, zero], np.r_[zero, np.ones(size), zero]],
        b_eq=[1 - rejected, rejected],
        bounds=[(0, p) for p in draft] + [(0, None)] * (2 * size),
    )
    assert result.success
    return result.fun


# --- one token -----------------------------------------------------------------------------------


def test_total_variation_is_the_largest_difference_over_all_events(x64):
    _, draft, target = random_pairs(0, 50, 6)
    got = costmodel.total_variation(draft, target)
    expected = [slow_total_variation(p, q) for p, q in zip(draft, target, strict=True)]
    np.testing.assert_allclose(got, expected, atol=1e-15)
    overlap = costmodel.distribution_acceptance(target, draft)
    np.testing.assert_allclose(got, 1 - overlap, atol=1e-15)


def test_total_variation_of_close_laws_keeps_its_digits_in_float32():
    """1 - sum of min, in float32, is off by a third here."""
    target = np.float32([0.5, 0.25, 0.25])
    draft = target + np.float32([1.5e-7, -1.5e-7, 0])
    exact = float(draft[0]) - 0.5
    assert float(costmodel.total_variation(draft, target)) == pytest.approx(exact, rel=0.1)


def test_no_residual_is_better_than_the_optimal_one(x64):
    """200 random pairs of laws with random acceptances, by a linear program each."""
    rng, draft, target = random_pairs(1, 200, 6)
    acceptance = rng.random(draft.shape)
    acceptance[::3] = np.maximum(
        acceptance, np.minimum(1, target / np.where(draft, draft, 1e-300))
    )[::3]  # a third are nowhere below the lossless rule
    expected = [best_residual(*row) for row in zip(acceptance, draft, target, strict=True)]
    loss = costmodel.residual_loss(acceptance, draft, target)
    np.testing.assert_allclose(loss, expected, atol=1e-9)
    residual = costmodel.optimal_residual(acceptance, draft, target)
    np.testing.assert_allclose(residual.sum(-1), 1, rtol=1e-14)
    reached = costmodel.total_variation(costmodel.emitted_law(acceptance, draft, residual), target)
    np.testing.assert_allclose(reached, loss, atol=1e-14)


def test_no_acceptance_is_below_the_line(x64):
    """The best of all acceptances and residuals at a given rejection: TV - rejection, or 0."""
    rng, draft, target = random_pairs(2, 100, 5)
    variation = np.asarray(costmodel.total_variation(draft, target))
    rejected = rng.random(100) * np.minimum(1, 1.3 * variation)
    expected = [
        best_acceptance_and_residual(*row) for row in zip(rejected, draft, target, strict=True)
    ]
    np.testing.assert_allclose(np.maximum(variation - rejected, 0), expected, atol=1e-9)
    # The blended acceptance is there.
    weight = np.maximum(1 - rejected / variation, 0)
    acceptance = costmodel.blended_acceptance(draft, target, weight)
    loss = costmodel.residual_loss(acceptance, draft, target)
    np.testing.assert_allclose(loss, expected, atol=1e-9)


@given(acceptance=acceptances, draft=laws, target=laws)
def test_rejection_and_loss_are_the_total_variation_at_least(acceptance, draft, target):
    with enable_x64():
        variation = float(total_variation(draft, target))
        rejection = float(rejection_probability(acceptance, draft))
        loss = float(residual_loss(acceptance, draft, target))
        residual = np.asarray(optimal_residual(acceptance, draft, target))
        emitted = emitted_law(acceptance, draft, residual)
        assert rejection + loss >= variation - 1e-15
        assert (residual >= 0).all()
        assert residual.sum() == pytest.approx(1, abs=1e-14)
        assert float(total_variation(emitted, target)) == pytest.approx(loss, abs=1e-14)
        # No other residual is better, among them the lossless rule's and the target's law.
        for other in (target, draft, np.asarray(optimal_residual(np.ones(V), draft, target))):
            biased = emitted_law(acceptance, draft, other)
            assert float(total_variation(biased, target)) >= loss - 1e-14


@given(draft=laws, target=laws, raised=acceptances)
@example(draft=law_of([1, 0, 0, 0, 0]), target=law_of([0, 0, 0, 0, 1]), raised=np.zeros(V))
@example(draft=law_of([1, 1, 0, 0, 0]), target=law_of([1, 1, 0, 0, 0]), raised=np.zeros(V))
def test_accepting_more_than_the_lossless_rule_is_on_the_line(draft, target, raised):
    """Theorem 5, for any acceptance that is nowhere below, by random amounts above."""
    with enable_x64():
        lossless = np.asarray(over_acceptance(draft, target, 0.0))
        acceptance = lossless + raised * (1 - lossless)
        rejection = float(rejection_probability(acceptance, draft))
        loss = float(residual_loss(acceptance, draft, target))
        variation = float(total_variation(draft, target))
        assert rejection + loss == pytest.approx(variation, abs=1e-15)
        # And its residual is that of the lossless rule, wherever it is ever drawn from.
        if rejection > 1e-12:
            lossless_residual = optimal_residual(lossless, draft, target)
            residual = optimal_residual(acceptance, draft, target)
            np.testing.assert_allclose(residual, lossless_residual, atol=1e-12)


def test_the_lossless_rule_is_lossless(x64):
    _, draft, target = random_pairs(3, 50, 6)
    acceptance = costmodel.over_acceptance(draft, target, 0)
    residual = costmodel.optimal_residual(acceptance, draft, target)
    emitted = costmodel.emitted_law(acceptance, draft, residual)
    np.testing.assert_allclose(emitted, target, atol=1e-15)
    rejection = costmodel.rejection_probability(acceptance, draft)
    np.testing.assert_allclose(rejection, costmodel.total_variation(draft, target), atol=1e-15)


def test_the_emitted_law_is_that_of_simulated_tokens():
    """400000 tokens, kept or replaced; 6 standard errors are passed by chance once in 5e8."""
    rng = np.random.default_rng(4)
    acceptance, residual = np.array([0.3, 0.9, 1.0]), np.array([0.1, 0.2, 0.7])
    count = 400_000
    drafted = rng.choice(3, count, p=DRAFT)
    kept = rng.random(count) < acceptance[drafted]
    tokens = np.where(kept, drafted, rng.choice(3, count, p=residual))
    for token, expected in enumerate(costmodel.emitted_law(acceptance, DRAFT, residual)):
        error = np.sqrt(expected * (1 - expected) / count)
        assert abs((tokens == token).mean() - expected) < 6 * error
    rejected = float(costmodel.rejection_probability(acceptance, DRAFT))
    assert abs((~kept).mean() - rejected) < 6 * np.sqrt(rejected * (1 - rejected) / count)


# --- families and fronts -------------------------------------------------------------------------


@given(draft=laws, target=laws, epsilon=probabilities())
def test_front_is_what_its_acceptance_gives(draft, target, epsilon):
    """Closed forms against the acceptance, its emitted law and their total variation."""
    with enable_x64():
        front = bias_speed_front(draft, target, np.array([epsilon]))
        acceptance = np.asarray(over_acceptance(draft, target, epsilon))
        rejection = float(rejection_probability(acceptance, draft))
        loss = float(residual_loss(acceptance, draft, target))
        resampled = total_variation(emitted_law(acceptance, draft, target), target)
        assert float(front.rejection[0]) == pytest.approx(rejection, abs=1e-14)
        assert float(front.loss_optimal[0]) == pytest.approx(loss, abs=1e-14)
        assert float(front.loss_target_resampling[0]) == pytest.approx(float(resampled), abs=1e-14)
        assert float(front.loss_optimal[0]) <= float(front.loss_target_resampling[0]) + 1e-15
        variation = float(total_variation(draft, target))
        assert rejection + loss == pytest.approx(variation, abs=1e-14)
        # The acceptance itself, by a loop.
        for p, q, b in zip(draft, target, acceptance, strict=True):
            expected = min(1.0, (q + epsilon) / p) if p > 1e-100 else 1.0
            assert b == pytest.approx(expected, abs=1e-15) or p < 1e-100


@given(draft=laws, target=laws, weight=probabilities())
def test_blending_is_linear(draft, target, weight):
    with enable_x64():
        acceptance = np.asarray(blended_acceptance(draft, target, weight))
        assert (acceptance <= 1).all()
        variation = float(total_variation(draft, target))
        rejection = float(rejection_probability(acceptance, draft))
        loss = float(residual_loss(acceptance, draft, target))
        assert rejection == pytest.approx((1 - weight) * variation, abs=1e-15)
        assert loss == pytest.approx(weight * variation, abs=1e-15)


def test_front_goes_from_lossless_to_everything_accepted(x64):
    _, draft, target = random_pairs(5, 30, 6)
    epsilons = np.linspace(0, 1, 101)
    front = costmodel.bias_speed_front(draft, target, epsilons)
    assert front.rejection.shape == (30, 101)
    variation = np.asarray(costmodel.total_variation(draft, target))
    np.testing.assert_allclose(front.rejection[:, 0], variation, atol=1e-15)
    np.testing.assert_array_equal(front.loss_optimal[:, 0], 0)
    np.testing.assert_array_equal(front.rejection[:, -1], 0)
    np.testing.assert_allclose(front.loss_optimal[:, -1], variation, atol=1e-15)
    np.testing.assert_allclose(front.loss_target_resampling[:, -1], variation, atol=1e-15)
    assert (np.diff(front.rejection, axis=1) <= 0).all()
    assert (np.diff(front.loss_optimal, axis=1) >= 0).all()
    on_the_line = front.rejection + front.loss_optimal
    np.testing.assert_allclose(on_the_line, np.tile(variation[:, None], 101), atol=1e-15)
    # Drawing from the target's law is biased even where nothing too much is accepted.
    assert (front.loss_target_resampling[:, 0] > 1e-3).all()


def test_vectors_of_a_small_pair(x64):
    """TV = 0.3 is all from the first token, so every epsilon up to 0.3 is forgiven once."""
    front = costmodel.bias_speed_front(DRAFT, TARGET, [0, 0.05, 0.1, 0.3, 0.9])
    np.testing.assert_allclose(front.rejection, [0.3, 0.25, 0.2, 0, 0], atol=1e-15)
    np.testing.assert_allclose(front.loss_optimal, [0, 0.05, 0.1, 0.3, 0.3], atol=1e-15)
    # Kept 0.2, 0.3, 0.2 and 0.3 of the target's law: 0.06 and 0.09 too much, 0.15 missing.
    resampled = front.loss_target_resampling
    np.testing.assert_allclose(resampled, [0.15, 0.175, 0.2, 0.3, 0.3], atol=1e-15)


def test_two_tokens_above_their_probability_forgive_epsilon_each(x64):
    """TV 0.4755 and two tokens that have more than 0.05 too much: 0.3755 rejected, 0.1 biased."""
    target = np.array([0.05, 0.1, 0.2, 0.25, 0.15, 0.25])
    draft = target + np.array([0.3, 0.1755, -0.15, -0.1755, -0.05, -0.1])
    front = costmodel.bias_speed_front(draft, target, [0.0, 0.05])
    np.testing.assert_allclose(front.rejection, [0.4755, 0.3755], atol=1e-12)
    np.testing.assert_allclose(front.loss_optimal, [0.0, 0.1], atol=1e-12)
    assert (front.loss_target_resampling > front.loss_optimal + 0.01).all()


# --- whole sequences -----------------------------------------------------------------------------


def random_chain(rng, kind, length, size, is_law=True):
    """Random rows, some of them with zeros; `is_law=False`: numbers in [0, 1]."""

    def rows(*shape):
        numbers = rng.random((*shape, size)) * (rng.random((*shape, size)) < 0.8)
        if not is_law:
            return numbers
        numbers[..., 0] += 1e-3
        return numbers / numbers.sum(-1, keepdims=True)

    if kind == "history":
        return costmodel.HistoryChain(tuple(rows(size**n) for n in range(length)))
    return costmodel.Chain(rows(), rows(length - 1, size))


def row_after(chain, history, size):
    """The row of a chain after some tokens, read from its documentation."""
    if isinstance(chain, costmodel.HistoryChain):
        number = 0
        for token in history:
            number = number * size + token
        return np.asarray(chain.tables[len(history)])[number]
    if not history:
        return np.asarray(chain.first)
    return np.asarray(chain.kernels)[len(history) - 1, history[-1]]


def enumerate_runs(acceptance, draft, target, residual, length, size):
    """Every run of the lossy decoder: each token drafted and kept, or drafted and replaced.

    Returns expected rejections, the law of the emitted texts, and the target's.
    """
    laws = {"emitted": {}, "target": {}}
    expected_rejections = 0.0

    def run(history, weight, num_rejected):
        nonlocal expected_rejections
        if len(history) == length:
            expected_rejections += weight * num_rejected
            laws["emitted"][history] = laws["emitted"].get(history, 0.0) + weight
            return
        p, b = row_after(draft, history, size), row_after(acceptance, history, size)
        replacements = row_after(residual, history, size)
        for x in range(size):
            if p[x] * b[x]:
                run((*history, x), weight * p[x] * b[x], num_rejected)
            for y in range(size):
                if p[x] * (1 - b[x]) * replacements[y]:
                    rejected = weight * p[x] * (1 - b[x]) * replacements[y]
                    run((*history, y), rejected, num_rejected + 1)

    run((), 1.0, 0)
    for text in np.ndindex(*(size,) * length):
        steps = [row_after(target, text[:n], size)[text[n]] for n in range(length)]
        laws["target"][text] = np.prod(steps)
    return expected_rejections, laws["emitted"], laws["target"]


def slow_mean(emitted, step, length):
    """Sum over positions of the mean, over the emitted texts, of a number of the tokens before."""
    return sum(w * step(text[:n]) for text, w in emitted.items() for n in range(length))


@pytest.mark.parametrize("kind", ["chain", "history"])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, None], ids=["lossless", "lossy", "arbitrary"])
def test_sequences_against_every_run_of_the_decoder(kind, epsilon, x64):
    length, size = 4, 3 if kind == "chain" else 2
    rng = np.random.default_rng(7)
    draft, target = (random_chain(rng, kind, length, size) for _ in range(2))
    if epsilon is None:
        acceptance = random_chain(rng, kind, length, size, is_law=False)
    else:
        acceptance = jax.tree.map(
            lambda p, q: costmodel.over_acceptance(p, q, epsilon), draft, target
        )
    optimal = jax.tree.map(costmodel.optimal_residual, acceptance, draft, target)
    for residual, argument in ((optimal, None), (target, target)):
        found = costmodel.sequence_tradeoff(acceptance, draft, target, argument)
        rejections, emitted, wanted = enumerate_runs(
            acceptance, draft, target, residual, length, size
        )
        assert float(found.rejection.sum()) == pytest.approx(rejections, abs=1e-12)

        def variation(history):
            p, q = (row_after(chain, history, size) for chain in (draft, target))
            return slow_total_variation(p, q)

        def loss(history, residual=residual):
            p, q = (row_after(chain, history, size) for chain in (draft, target))
            b, other = (row_after(chain, history, size) for chain in (acceptance, residual))
            return slow_total_variation(b * p + (1 - b @ p) * other, q)

        variations = slow_mean(emitted, variation, length)
        losses = slow_mean(emitted, loss, length)
        assert float(found.total_variation.sum()) == pytest.approx(variations, abs=1e-12)
        assert float(found.loss.sum()) == pytest.approx(losses, abs=1e-12)
        bias = sum(max(weight - wanted[text], 0) for text, weight in emitted.items())
        assert bias <= losses + 1e-13
        if argument is None and epsilon is not None:  # the identity, of runs that were counted
            assert rejections + losses == pytest.approx(variations, abs=1e-12)
            assert bias > 0.05 or epsilon == 0
        else:
            assert rejections + losses > variations + 0.05
        if epsilon == 0 and argument is None:
            assert bias < 1e-14


def test_the_identity_holds_position_by_position(x64):
    draft, target = (costmodel.random_chain(jax.random.key(seed), 30, 7) for seed in (0, 1))
    for epsilon in (0.0, 0.01, 0.1, 1.0):
        acceptance = jax.tree.map(
            lambda p, q, e=epsilon: costmodel.over_acceptance(p, q, e), draft, target
        )
        found = costmodel.sequence_tradeoff(acceptance, draft, target)
        assert found.rejection.shape == (30,)
        together = found.rejection + found.loss
        np.testing.assert_allclose(together, found.total_variation, atol=1e-14)
        resampled = costmodel.sequence_tradeoff(acceptance, draft, target, target)
        assert (resampled.rejection + resampled.loss >= resampled.total_variation - 1e-14).all()


def test_a_sequence_of_one_token_is_that_token(x64):
    draft, target = (costmodel.memoryless_chain(law, 1) for law in (DRAFT, TARGET))
    acceptance = jax.tree.map(lambda p, q: costmodel.over_acceptance(p, q, 0.1), draft, target)
    found = costmodel.sequence_tradeoff(acceptance, draft, target)
    np.testing.assert_allclose(np.ravel(found), [0.2, 0.1, 0.3], atol=1e-15)


def test_gradients_of_a_sequence_match_finite_differences(x64):
    rng = np.random.default_rng(8)
    chains = tuple(
        costmodel.Chain(*(0.05 + 0.25 * rng.random(shape) for shape in ((3,), (2, 3, 3))))
        for _ in range(4)
    )
    point, unravel = jax.flatten_util.ravel_pytree(chains)
    for count in (3, 4):

        def weighed(x, count=count):
            found = costmodel.sequence_tradeoff(*unravel(x)[:count])
            return found.rejection.sum() + 2 * found.loss.sum() + 3 * found.total_variation[-1]

        assert_gradient_is_a_difference(weighed, np.asarray(point), rel=1e-6)


def test_gradients_of_a_sequence_are_finite_in_float32():
    """With rows that are equal, rows that share no token, and rows of one token."""
    draft = costmodel.Chain(np.eye(3, dtype="f4")[0], np.tile(np.eye(3, dtype="f4"), (2, 1, 1)))
    target = costmodel.Chain(
        np.eye(3, dtype="f4")[0],
        np.float32(
            [[[1, 0, 0], [0, 0, 1], [1e-30, 0.5, 0.5]], [[1, 0, 0], [0.5, 0.5, 0], [0, 0, 1]]]
        ),
    )

    @jax.jit
    def gradients(epsilon):
        def total(epsilon, draft, target):
            acceptance = jax.tree.map(
                lambda p, q: costmodel.over_acceptance(p, q, epsilon), draft, target
            )
            found = costmodel.sequence_tradeoff(acceptance, draft, target)
            return sum(part.sum() for part in found)

        return jax.value_and_grad(total, argnums=(0, 1, 2))(epsilon, draft, target)

    for epsilon in (0.0, 1e-20, 0.1, 1.0):
        for part in jax.tree.leaves(gradients(np.float32(epsilon))):
            assert np.isfinite(part).all()


# --- the contract of every function --------------------------------------------------------------

# (draft, target, knob) -> one number that every entry of the result moves.
FUNCTIONS = {
    "total_variation": lambda p, q, e: total_variation(p, q),
    "rejection_probability": lambda p, q, e: rejection_probability(over_acceptance(q, p, e), p),
    "emitted_law": lambda p, q, e: emitted_law(0.9 * q, p, q)[..., 0] * e,
    "residual_loss": lambda p, q, e: residual_loss(0.5 + 0.5 * p, p, q) + 0 * e,
    "optimal_residual": lambda p, q, e: jnp.square(optimal_residual(0.3 + e * p, p, q)).sum(-1),
    "over_acceptance": lambda p, q, e: jnp.square(over_acceptance(p, q, e)).sum(-1),
    "blended_acceptance": lambda p, q, e: jnp.square(blended_acceptance(p, q, e)).sum(-1),
    "lossy": lambda p, q, e: total_variation(
        emitted_law(
            blended_acceptance(p, q, e), p, optimal_residual(over_acceptance(p, q, e), p, q)
        ),
        q,
    ),
    "rejection": lambda p, q, e: bias_speed_front(p, q, e[None]).rejection[..., 0],
    "loss_optimal": lambda p, q, e: bias_speed_front(p, q, e[None]).loss_optimal[..., 0],
    "resampling": lambda p, q, e: bias_speed_front(p, q, e[None]).loss_target_resampling[..., 0],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_match_finite_differences(name, x64):
    def at(x):
        return FUNCTIONS[name](x[:V], x[V : 2 * V], x[2 * V])

    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        point = np.r_[law_of(rng.exponential(size=V)), law_of(rng.exponential(size=V)), 0.07]
        assert_gradient_is_a_difference(at, point, rel=1e-6)


# Everything that float32 has, from nothing to certainty.
tiny = st.sampled_from([0.0, 1e-45, 1e-38, 1e-30, 1e-20, 1e-19, 1e-10, 1e-4, 0.1, 0.5, 1.0])
edges = st.lists(tiny, min_size=V, max_size=V).map(law_of)


@jax.jit
def values_and_gradients(draft, target, epsilon):
    """Every function and its derivatives by everything."""
    return {
        name: jax.value_and_grad(function, argnums=(0, 1, 2))(draft, target, epsilon)
        for name, function in FUNCTIONS.items()
    }


@given(draft=edges, target=edges, epsilon=st.sampled_from([0.0, 1e-38, 1e-20, 1e-8, 0.1, 1.0]))
@example(draft=law_of([1, 0, 0, 0, 0]), target=law_of([1, 1e-30, 0, 0, 0]), epsilon=0.0)
def test_values_and_gradients_are_finite_in_float32(draft, target, epsilon):
    found = values_and_gradients(np.float32(draft), np.float32(target), np.float32(epsilon))
    for name, parts in found.items():
        for part in jax.tree.leaves(parts):
            assert part.dtype == np.float32
            assert np.isfinite(part).all(), name


def test_functions_broadcast_map_and_agree_on_a_dtype():
    _, draft, target = random_pairs(6, 4, V)
    epsilons = np.array([0.0, 0.1, 0.2, 0.3])
    grid = costmodel.over_acceptance(draft, target[0], epsilons)
    assert grid.shape == (4, V)
    for i in range(4):
        alone = costmodel.over_acceptance(draft[i], target[0], epsilons[i])
        np.testing.assert_allclose(grid[i], alone, rtol=1e-6)
    assert costmodel.over_acceptance(DRAFT, TARGET, np.zeros((2, 3))).shape == (2, 3, 3)
    front = costmodel.bias_speed_front(draft, target, epsilons)
    mapped = jax.vmap(lambda p, q: costmodel.bias_speed_front(p, q, epsilons))(draft, target)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), front, mapped)
    with enable_x64():
        single = jnp.asarray(DRAFT, jnp.float32), jnp.asarray(TARGET, jnp.float32)
        assert costmodel.bias_speed_front(*single, [0.1]).rejection.dtype == np.float32
        assert costmodel.over_acceptance(*single, 0.1).dtype == np.float32
        assert costmodel.total_variation(single[0], TARGET).dtype == np.float64
    bfloat = jnp.asarray(DRAFT, jnp.bfloat16)
    assert costmodel.total_variation(bfloat, TARGET.astype("f4")).dtype == np.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: costmodel.total_variation([0.5, 0.6], [0.5, 0.5]),
            "the sum of draft_probs=1.1 must be",
        ),
        (lambda: costmodel.total_variation([0.5, 0.5], [1.5, -0.5]), "target_probs=-0.5"),
        (lambda: costmodel.total_variation([0.5, 0.5], [np.nan, 1.0]), "target_probs=nan"),
        (
            lambda: costmodel.total_variation([1.0], [0.5, 0.5]),
            r"draft_probs of shape \(1,\), target_probs",
        ),
        (lambda: costmodel.total_variation(1.0, 1.0), r"draft_probs of shape \(\)"),
        (
            lambda: costmodel.total_variation(np.ones((2, 1)), np.ones((3, 1))),
            r"target_probs of shape \(3, 1\)",
        ),
        (lambda: costmodel.rejection_probability([1.1, 0.5], [0.5, 0.5]), "acceptance=1.1"),
        (
            lambda: costmodel.rejection_probability([1.0, 0.5], [0.5, 0.0]),
            "the sum of draft_probs=0.5",
        ),
        (
            lambda: costmodel.emitted_law([1, 1], [0.5, 0.5], [0.5, 0.6]),
            "the sum of residual_probs=1.1",
        ),
        (
            lambda: costmodel.residual_loss([1, 1], [0.5, 0.5], [1.0, 0.1]),
            "the sum of target_probs=1.1",
        ),
        (lambda: costmodel.optimal_residual([2, 1], [0.5, 0.5], [1, 0]), "acceptance=2"),
        (lambda: costmodel.over_acceptance(DRAFT, TARGET, -0.1), "epsilon=-0.1 must be at least 0"),
        (
            lambda: costmodel.over_acceptance(DRAFT[None].repeat(2, 0), TARGET, [0.1, 0.2, 0.3]),
            r"epsilon of shape \(3,\)",
        ),
        (lambda: costmodel.blended_acceptance(DRAFT, TARGET, 1.5), r"weight=1.5 must be in \[0, 1"),
        (lambda: costmodel.bias_speed_front(DRAFT, TARGET, 0.1), r"epsilons of shape \(\)"),
        (lambda: costmodel.bias_speed_front(DRAFT, TARGET, [-1.0]), "epsilons=-1"),
        (lambda: costmodel.sequence_tradeoff(ONES, CHAIN, LONGER), "target of T=3, V=2 must"),
        (lambda: costmodel.sequence_tradeoff(ONES, CHAIN, CHAIN, LONGER), "residual of T=3, V=2"),
        (
            lambda: costmodel.sequence_tradeoff(CHAIN, LONGER, LONGER),
            r"acceptance: Chain of shapes",
        ),
        (lambda: costmodel.sequence_tradeoff((1.0, 1.0), CHAIN, CHAIN), "acceptance: tuple"),
        (
            lambda: costmodel.sequence_tradeoff(CHAIN._replace(first=2 * ONES.first), CHAIN, CHAIN),
            "acceptance=2",
        ),
        (
            lambda: costmodel.sequence_tradeoff(ONES, CHAIN._replace(first=ONES.first), CHAIN),
            "draft.first has a row that sums to 2",
        ),
    ],
)
def test_what_is_no_law_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
