"""Rejections and passes on chains, against algorithms that are walked outcome by outcome.

The reference here knows no formula. It draws every block that can be drafted and passes every
verdict that can be passed, and adds up what comes out with its probability.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from conftest import enable_x64
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsd
from jaxsd import costmodel

# --- the reference -------------------------------------------------------------------------------


def row_of(chain, history):
    """The law after a history, as the chain's own definition says."""
    if isinstance(chain, costmodel.Chain):
        row = chain.first if not history else chain.kernels[len(history) - 1][history[-1]]
    else:
        vocab_size = np.shape(chain.tables[0])[-1]
        number = functools.reduce(lambda n, token: n * vocab_size + token, history, 0)
        row = chain.tables[len(history)][number]
    return np.asarray(row, np.float64)


def length_of(chain):
    """T."""
    if isinstance(chain, costmodel.Chain):
        return len(chain.kernels) + 1
    return len(chain.tables)


def normalised(weights):
    """Weights as a law; all zeros where there is nothing, which then has probability zero."""
    total = weights.sum()
    return weights / total if total > 0 else weights


def drafted_blocks(draft, history, size):
    """Every block of drafted tokens with its probability."""
    for block in itertools.product(range(len(row_of(draft, ()))), repeat=size):
        laws = [row_of(draft, history + block[:i]) for i in range(size)]
        yield block, math.prod(law[token] for law, token in zip(laws, block, strict=True)), laws


def token_verdicts(draft, target, history, block, laws, probability):
    """The rule token by token: (probability, tokens of the draft that are kept, law after them)."""
    for i, token in enumerate(block):
        law, wanted = laws[i], row_of(target, history + block[:i])
        chance = min(1, wanted[token] / law[token]) if law[token] > 0 else 0
        yield probability * (1 - chance), block[:i], normalised(np.maximum(wanted - law, 0))
        probability *= chance
    yield probability, block, None


def block_verdicts(draft, target, history, block, laws, probability):
    """Block verification by its thresholds: the last place whose coin falls below is kept."""
    size = len(block)
    wanted = [row_of(target, history + block[:i]) for i in range(size)]
    weights, thresholds = [1.0], []
    for i, token in enumerate(block):
        ratio = wanted[i][token] / laws[i][token] if laws[i][token] > 0 else 0
        weights.append(min(1, weights[-1] * ratio))
    for i in range(1, size):
        excess = np.maximum(weights[i] * wanted[i] - laws[i], 0).sum()
        below = excess + 1 - weights[i]
        thresholds.append(excess / below if below > 0 else 1.0)
    thresholds.append(weights[size])
    for i in range(size, 0, -1):
        chance = thresholds[i - 1]
        left = None if i == size else normalised(np.maximum(weights[i] * wanted[i] - laws[i], 0))
        yield probability * chance, block[:i], left
        probability *= 1 - chance
    yield probability, (), normalised(np.maximum(wanted[0] - laws[0], 0))


def single_draft_round(verdicts, gamma, has_bonus):
    """A round: (probability, tokens that it adds, whether the last replaces a drafted one)."""

    def outcomes(draft, target, history):
        size = min(gamma, length_of(target) - len(history))
        for block, probability, laws in drafted_blocks(draft, history, size):
            for chance, kept, left in verdicts(draft, target, history, block, laws, probability):
                whole = left is None
                ends = len(history) + len(kept) == length_of(target)
                if whole and (ends or not has_bonus):
                    yield chance, kept, False
                    continue
                law = row_of(target, history + kept) if whole else left
                for token, share in enumerate(law):
                    yield chance * share, (*kept, token), not whole

    return outcomes


def batch_round(num_drafts):
    """The batch algorithm: M drafts to the end of the text; their first tokens tried in turn."""

    def outcomes(draft, target, history):
        size = length_of(target) - len(history)
        blocks = [entry for entry in drafted_blocks(draft, history, size) if entry[1] > 0]
        law = row_of(draft, history)
        for drafts in itertools.product(blocks, repeat=num_drafts):
            left = row_of(target, history)
            failed = math.prod(probability for _, probability, _ in drafts)
            for block, _, laws in drafts:
                first = block[0]
                chance = min(1, left[first] / law[first])
                rest = token_verdicts(
                    draft, target, (*history, first), block[1:], laws[1:], failed * chance
                )
                for share, kept, residual in rest:
                    if residual is None:
                        yield share, (first, *kept), False
                        continue
                    for token, part in enumerate(residual):
                        yield share * part, (first, *kept, token), True
                failed *= 1 - chance
                left = normalised(np.maximum(left - law, 0))
            for token, part in enumerate(left):
                yield failed * part, (token,), True

    return outcomes


def play(outcomes, draft, target):
    """Law of the text, passes and rejections by position, from the first token to the last."""
    length = length_of(target)
    begins, law = {(): 1.0}, {}
    calls, rejections = np.zeros(length), np.zeros(length)
    for n in range(length):
        for history in [one for one in begins if len(one) == n]:
            reached = begins.pop(history)
            calls[n] += reached
            for probability, added, is_rejection in outcomes(draft, target, history):
                text = history + added
                where = law if len(text) == length else begins
                where[text] = where.get(text, 0) + reached * probability
                rejections[len(text) - 1] += is_rejection * reached * probability
    return law, calls, rejections


def law_of(chain):
    """Probability of every text."""
    texts = itertools.product(range(len(row_of(chain, ()))), repeat=length_of(chain))
    return {
        text: math.prod(row_of(chain, text[:i])[token] for i, token in enumerate(text))
        for text in texts
    }


def assert_same_law(got, chain):
    for text, probability in law_of(chain).items():
        assert got.get(text, 0.0) == pytest.approx(probability, abs=1e-12)
    assert sum(got.values()) == pytest.approx(1, abs=1e-12)


# --- chains to try -------------------------------------------------------------------------------


def random_rows(rng, shape, holes):
    """Random laws; with holes, a third of their probabilities is zero."""
    rows = rng.random(shape) + 0.02
    if holes:
        rows = rows * (rng.random(shape) > 1 / 3)
        rows[..., 0] += rows.sum(-1) == 0
    return rows / rows.sum(-1, keepdims=True)


def random_pair(kind, seed, length, vocab_size, holes=False):
    """A draft and a target."""
    rng = np.random.default_rng(seed)
    if kind == "first-order":
        return tuple(
            costmodel.Chain(
                random_rows(rng, (vocab_size,), holes),
                random_rows(rng, (length - 1, vocab_size, vocab_size), holes),
            )
            for _ in range(2)
        )
    return tuple(
        costmodel.HistoryChain(
            tuple(random_rows(rng, (vocab_size**n, vocab_size), holes) for n in range(length))
        )
        for _ in range(2)
    )


# Every shape is one compilation of everything, so there are few.
PAIRS = [
    ("first-order", 0, 3, 3, False),
    ("first-order", 1, 3, 3, True),
    ("history", 2, 4, 2, False),
    ("history", 3, 4, 2, True),
]
pairs = pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p[0]}{'-holes' * p[-1]}")


def check_calls(answer, outcomes, draft, target):
    """Compares with the walk, and the walk's text with the target's law."""
    law, calls, rejections = play(outcomes, draft, target)
    assert_same_law(law, target)
    np.testing.assert_allclose(answer.calls_by_position, calls, atol=1e-12)
    np.testing.assert_allclose(answer.rejections_by_position, rejections, atol=1e-12)
    assert float(answer.calls) == pytest.approx(calls.sum(), abs=1e-12)
    assert float(answer.rejections) == pytest.approx(rejections.sum(), abs=1e-12)
    assert float(answer.tokens_per_call) == pytest.approx(len(calls) / calls.sum(), abs=1e-12)


# --- every draft and every verdict ---------------------------------------------------------------


@pairs
def test_rejections_and_calls_of_the_token_rule_equal_enumeration(x64, pair):
    """Look-ahead 1 to T, with and without the bonus token; the text is the target's."""
    draft, target = random_pair(*pair)
    length = length_of(target)
    by_theorem = costmodel.expected_rejections(draft, target)
    for gamma, has_bonus in itertools.product(range(1, length + 1), (False, True)):
        outcomes = single_draft_round(token_verdicts, gamma, has_bonus)
        answer = costmodel.expected_calls(draft, target, gamma, has_bonus)
        check_calls(answer, outcomes, draft, target)
        if not has_bonus:
            assert float(answer.rejections) == pytest.approx(float(by_theorem.total), abs=1e-12)
            np.testing.assert_allclose(
                answer.rejections_by_position, by_theorem.by_position, atol=1e-12
            )
    unlimited = costmodel.expected_calls(draft, target)
    check_calls(unlimited, single_draft_round(token_verdicts, length, False), draft, target)


@pairs
def test_block_verification_equals_enumeration(x64, pair):
    draft, target = random_pair(*pair)
    for gamma, has_bonus in itertools.product(range(1, length_of(target) + 1), (False, True)):
        outcomes = single_draft_round(block_verdicts, gamma, has_bonus)
        answer = costmodel.expected_block_calls(draft, target, gamma, has_bonus)
        check_calls(answer, outcomes, draft, target)


@pairs
def test_batch_rejections_equal_enumeration(x64, pair):
    """All combinations of M drafts, up to 3 where they are few enough."""
    draft, target = random_pair(*pair)
    for num_drafts in (1, 2) if pair[0] == "history" else (1, 2, 3):
        if num_drafts == 3:  # (V^T)^M combinations: the first two positions will do
            draft, target = (c._replace(kernels=c.kernels[:1]) for c in (draft, target))
        law, calls, rejections = play(batch_round(num_drafts), draft, target)
        assert_same_law(law, target)
        answer = costmodel.expected_batch_rejections(draft, target, num_drafts)
        np.testing.assert_allclose(answer.by_position, rejections, atol=1e-12)
        np.testing.assert_allclose(answer.fresh_by_position, calls, atol=1e-12)
        assert float(answer.total) == pytest.approx(rejections.sum(), abs=1e-12)
        by_theorem = costmodel.expected_rejections(draft, target)
        np.testing.assert_allclose(
            answer.by_position + answer.improvement_by_position, by_theorem.by_position, atol=1e-12
        )
        assert float(answer.improvement) == pytest.approx(
            float(by_theorem.total) - rejections.sum(), abs=1e-12
        )


@pairs
def test_shares_of_a_round_equal_enumeration(x64, pair):
    draft, target = random_pair(*pair)
    size = length_of(target)
    for rule, verdicts in (("token", token_verdicts), ("block", block_verdicts)):
        kept_by = np.zeros(size + 1)
        for block, probability, laws in drafted_blocks(draft, (), size):
            for chance, kept, _ in verdicts(draft, target, (), block, laws, probability):
                kept_by[len(kept)] += chance
        expected = np.cumsum(kept_by[::-1])[::-1][1:]
        got = costmodel.round_acceptance(draft, target, rule)
        np.testing.assert_allclose(got, expected, atol=1e-12)


@pairs
def test_no_rule_of_the_class_has_fewer_rejections(x64, pair):
    """Random acceptances, each with the one law of replacement that removes the bias."""
    rng = np.random.default_rng(5)
    draft, target = random_pair(*pair)
    bound = float(costmodel.rejection_lower_bound(draft, target))
    assert bound == float(costmodel.expected_rejections(draft, target).total)

    def verdicts(generosity):
        @functools.cache
        def acceptance(history):
            law, wanted = row_of(draft, history), row_of(target, history)
            most = np.divide(wanted, law, out=np.zeros_like(law), where=law > 0)
            return np.minimum(most, 1) * (generosity + (1 - generosity) * rng.random(len(law)))

        def by_token(draft, target, history, block, laws, probability):
            for i, token in enumerate(block):
                accepted = acceptance(history + block[:i])
                left = row_of(target, history + block[:i]) - accepted * laws[i]
                yield probability * (1 - accepted[token]), block[:i], normalised(left)
                probability *= accepted[token]
            yield probability, block, None

        return by_token

    for generosity in (0.0, 0.5, 0.9, 1.0):
        outcomes = single_draft_round(verdicts(generosity), 2, False)
        law, _, rejections = play(outcomes, draft, target)
        assert_same_law(law, target)
        assert rejections.sum() >= bound - 1e-12
        if generosity == 1:
            assert rejections.sum() == pytest.approx(bound, abs=1e-12)
        else:
            assert rejections.sum() > bound + 1e-3


def test_the_reference_finds_a_biased_rule(x64):
    """Block acceptance with the token rule's residual: a port of it was once shipped like that."""
    draft, target = random_pair(*PAIRS[0])

    def wrong(draft, target, history, block, laws, probability):
        for chance, kept, left in block_verdicts(draft, target, history, block, laws, probability):
            if left is not None:
                wanted = row_of(target, history + kept)
                left = normalised(np.maximum(wanted - laws[len(kept)], 0))
            yield chance, kept, left

    law, _, _ = play(single_draft_round(wrong, 2, True), draft, target)
    assert max(abs(law[text] - p) for text, p in law_of(target).items()) > 1e-3


# --- one route and another -----------------------------------------------------------------------


def test_first_order_and_history_routes_agree(x64):
    draft, target = random_pair("first-order", 6, 4, 2)
    long = [costmodel.as_history_chain(chain) for chain in (draft, target)]
    for chain, table in itertools.product((draft, target), range(4)):
        for history in itertools.product(range(2), repeat=table):
            np.testing.assert_array_equal(
                row_of(chain, history), row_of(costmodel.as_history_chain(chain), history)
            )
    assert costmodel.as_history_chain(long[0]).tables[3].shape == (8, 2)
    for function in (
        costmodel.expected_rejections,
        functools.partial(costmodel.expected_calls, gamma=2),
        functools.partial(costmodel.expected_block_calls, gamma=2),
        functools.partial(costmodel.expected_batch_rejections, num_drafts=2),
        functools.partial(costmodel.expected_batch_rejections, num_drafts=math.inf),
        functools.partial(costmodel.batch_rejection_curve, max_drafts=3),
        functools.partial(costmodel.round_acceptance, rule="block"),
    ):
        one, other = function(draft, target), function(*long)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-14), one, other)


def test_relations_between_the_ways_to_look_ahead(x64):
    """What must be equal is equal, and what must be ordered is."""
    draft, target = random_pair(*PAIRS[0])
    rejections = costmodel.expected_rejections(draft, target)
    by_gamma = {
        (gamma, has_bonus): costmodel.expected_calls(draft, target, gamma, has_bonus)
        for gamma, has_bonus in itertools.product((1, 2, 3, 99), (False, True))
    }
    # A pass ends with its last draft, whatever becomes of it: a bonus token is one draft more.
    for gamma in (1, 2):
        np.testing.assert_allclose(
            by_gamma[gamma, True].calls_by_position,
            by_gamma[gamma + 1, False].calls_by_position,
            atol=1e-14,
        )
    assert float(by_gamma[1, False].calls) == pytest.approx(3, abs=1e-12)
    unlimited = costmodel.expected_calls(draft, target)
    for key in itertools.product((3, 99), (False, True)):
        np.testing.assert_allclose(
            by_gamma[key].calls_by_position, unlimited.calls_by_position, atol=1e-14
        )
    assert float(unlimited.calls) == pytest.approx(
        1 + float(rejections.by_position[:-1].sum()), abs=1e-12
    )
    # Positions of bonus tokens are not drafted.
    bonus = [float(by_gamma[gamma, True].rejections) for gamma in (1, 2)]
    assert bonus[0] < bonus[1] < float(rejections.total)
    # Without drafts every token is a pass of its own.
    plain = costmodel.expected_calls(draft, target, 0)
    assert (float(plain.calls), float(plain.rejections)) == pytest.approx((3, 0))
    same = costmodel.expected_block_calls(draft, target, 1)
    np.testing.assert_allclose(
        same.calls_by_position, by_gamma[1, True].calls_by_position, atol=1e-14
    )
    for has_bonus in (False, True):
        by_block = costmodel.expected_block_calls(draft, target, 2, has_bonus)
        by_token = by_gamma[2, has_bonus]
        assert float(by_block.calls) <= float(by_token.calls) + 1e-14
        assert float(by_block.rejections) < float(by_token.rejections)


def test_one_block_beats_one_token_at_every_place(x64):
    """What block verification keeps of each draft is at least what the token rule keeps of it."""
    for seed in range(20):
        draft, target = random_pair("first-order", seed, 3, 3, bool(seed % 2))
        by_token, by_block = (
            np.asarray(costmodel.round_acceptance(draft, target, rule))
            for rule in ("token", "block")
        )
        assert (by_block >= by_token - 1e-15).all()
        assert by_block[0] == pytest.approx(by_token[0], abs=1e-15)
        assert by_block[-1] > by_token[-1] or seed % 2


def test_long_run_rate_is_that_of_long_texts(x64):
    """Per round and per token agree: what a long text adds per token is the rate of one round."""
    laws = [0.5, 0.5], [0.8, 0.2]
    rate = costmodel.rejections_per_token(
        costmodel.round_acceptance(*(costmodel.memoryless_chain(law, 4) for law in laws), "block")
    )
    text = costmodel.expected_block_calls(
        *(costmodel.memoryless_chain(law, 150) for law in laws), 4, has_bonus=False
    )
    late = text.rejections_by_position[80:140].mean()
    # Renewals forget their start, but not at once: rounds are one to four tokens long.
    assert float(late) == pytest.approx(float(rate), rel=1e-10)


# --- published and recorded numbers --------------------------------------------------------------


def test_block_verification_passes_below_the_bound(x64):
    """The two memoryless pairs whose rates are known, and the exact fractions of the second."""
    for draft_law, target_law, bound, rates in (
        ([0.5, 0.5], [0.8, 0.2], 0.3, {2: 0.265, 4: 0.222, 8: 0.192, 16: 0.171}),
        ([2 / 3, 1 / 3], [1 / 3, 2 / 3], 1 / 3, {2: 0.267, 4: 0.231, 8: 0.202}),
    ):
        for gamma, rate in rates.items():
            pair = [costmodel.memoryless_chain(law, gamma) for law in (draft_law, target_law)]
            shares = {rule: costmodel.round_acceptance(*pair, rule) for rule in ("token", "block")}
            got = {rule: float(costmodel.rejections_per_token(a)) for rule, a in shares.items()}
            assert got["token"] == pytest.approx(bound, abs=1e-12)
            if gamma == 4:
                limit = float(costmodel.rejection_lower_bound(*pair))
                assert limit / gamma == pytest.approx(bound, abs=1e-12)
            assert got["block"] == pytest.approx(rate, abs=5e-4)
    fractions = {
        2: (10 / 9, 11 / 9),
        3: (38 / 27, 5 / 3),
        4: (130 / 81, 166 / 81),
        8: (12610 / 6561, 20384 / 6561),
    }
    for gamma, expected in fractions.items():
        pair = [costmodel.memoryless_chain(p, gamma) for p in ([2 / 3, 1 / 3], [1 / 3, 2 / 3])]
        got = [float(costmodel.round_acceptance(*pair, rule).sum()) for rule in ("token", "block")]
        assert got == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("gamma", [4, 16])
def test_block_shares_are_those_of_a_reflected_walk(x64, gamma):
    """Ratios 2 and 1/2: log2 w steps up by one, never above 0, or down by one."""
    at = np.zeros(gamma + 1)  # at[k]: probability that w = 2^-k
    at[0], expected = 1, []
    for _ in range(gamma):
        up, down = at / 3, at * 2 / 3
        at = np.append(up[1:], 0) + np.append(0, down[:-1])
        at[0] += up[0]
        expected.append(float(at @ 0.5 ** np.arange(gamma + 1)))
    pair = [costmodel.memoryless_chain(p, gamma) for p in ([2 / 3, 1 / 3], [1 / 3, 2 / 3])]
    np.testing.assert_allclose(costmodel.round_acceptance(*pair, "block"), expected, atol=1e-13)


def test_batch_rejections_have_the_recorded_values(x64):
    draft = costmodel.memoryless_chain([0.5, 0.3, 0.2], 5)
    target = costmodel.memoryless_chain([0.2, 0.3, 0.5], 5)
    curve = np.asarray(costmodel.batch_rejection_curve(draft, target, 1000))
    np.testing.assert_allclose(curve[:3], [1.5, 1.3745104704, 1.282708231084], atol=1e-12)
    assert curve[-1] == pytest.approx(0.9759, abs=1e-12)
    assert float(
        costmodel.expected_batch_rejections(draft, target, math.inf).total
    ) == pytest.approx(0.9759, abs=1e-12)
    assert float(costmodel.expected_rejections(draft, target).total) == pytest.approx(1.5)


def test_random_chains_are_like_the_papers(x64):
    """T = 50 and V = 7: 16.36 +- 0.27 over chains; the paper's one chain has 16.41."""
    keys = jax.random.split(jax.random.key(0), (60, 2))
    totals = np.array(
        [
            costmodel.expected_rejections(
                *(costmodel.random_chain(key, 50, 7) for key in pair)
            ).total
            for pair in keys
        ]
    )
    assert totals.mean() == pytest.approx(16.36, abs=0.1)
    assert totals.std() == pytest.approx(0.27, abs=0.06)
    assert abs(16.41 - totals.mean()) < 2 * totals.std()


# --- Monte Carlo ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_pair():
    with enable_x64():
        keys = jax.random.split(jax.random.key(7))
        yield tuple(costmodel.random_chain(key, 50, 7) for key in keys)


def test_simulated_texts_have_the_predicted_means(x64, long_pair):
    """5000 texts of 50 tokens; a mean is off by 5.5 standard errors once in 2.6e7.

    Without an end to the look-ahead, the example of `simulate_rejections` is the check.
    """
    runs = costmodel.simulate_rejections(jax.random.key(1), *long_pair, 5000, 4)
    expected = costmodel.expected_calls(*long_pair, 4)
    for got, mean in ((runs.rejections, expected.rejections), (runs.calls, expected.calls)):
        error = float(got.std()) / math.sqrt(got.size)
        assert 0 < error < 0.1
        assert abs(float(got.mean()) - float(mean)) < 5.5 * error


def test_simulated_batches_have_the_predicted_mean(x64, long_pair):
    """5000 texts of 50 tokens; 5.5 standard errors once in 2.6e7."""
    runs = costmodel.simulate_batch_rejections(jax.random.key(2), *long_pair, 5000, 4)
    expected = costmodel.expected_batch_rejections(*long_pair, 4)
    error = float(runs.rejections.std()) / math.sqrt(5000)
    assert abs(float(runs.rejections.mean()) - float(expected.total)) < 5.5 * error
    error = float(runs.calls.std()) / math.sqrt(5000)
    calls = float(expected.fresh_by_position.sum())
    assert abs(float(runs.calls.mean()) - calls) < 5.5 * error


def test_simulated_texts_have_the_targets_law():
    """In float32, 200000 texts of 27 kinds, 13 of them possible: a false alarm at p = 1e-7, twice.

    What the target never says is never said.
    """
    draft, target = random_pair("history", 11, 3, 3, holes=True)
    key, other = jax.random.split(jax.random.key(3))
    for runs in (
        costmodel.simulate_rejections(key, draft, target, 200_000, 1),
        costmodel.simulate_batch_rejections(other, draft, target, 200_000, 2),
    ):
        law = law_of(target)
        vocab_size = len(row_of(target, ()))
        place = vocab_size ** np.arange(length_of(target))[::-1]
        counts = np.bincount(np.asarray(runs.tokens) @ place, minlength=len(law))
        expected = 200_000 * np.array(list(law.values()))
        assert (counts[expected == 0] == 0).all()
        possible = expected > 0
        # Half a dozen expected at least, or the statistic is not chi-square.
        assert expected[possible].min() > 6
        assert scipy.stats.chisquare(counts[possible], expected[possible]).pvalue > 1e-7


def test_the_decoders_verifier_accepts_as_predicted():
    """20000 rounds of 3 drafts: 5.5 standard errors in three places, 1e-7 in all."""
    draft, target = (np.array(law, np.float32) for law in ([0.5, 0.3, 0.2], [0.2, 0.3, 0.5]))
    size, num_rounds = 3, 20_000

    @jax.jit
    @jax.vmap
    def accepted(key):
        draft_key, verdict_key = jax.random.split(key)
        tokens = jax.random.choice(draft_key, 3, (size,), p=jnp.asarray(draft)).astype(jnp.int32)
        proposal = jaxsd.Draft(tokens, jnp.tile(draft, (size, 1)))
        wanted = jnp.tile(target, (size + 1, 1))
        return jaxsd.rejection_sampling(verdict_key, wanted, proposal).num_accepted

    counts = np.asarray(accepted(jax.random.split(jax.random.key(6), num_rounds)))
    shares = np.asarray(
        costmodel.round_acceptance(
            costmodel.memoryless_chain(draft, size), costmodel.memoryless_chain(target, size)
        )
    )
    for i, share in enumerate(shares):
        error = math.sqrt(share * (1 - share) / num_rounds)
        assert abs((counts > i).mean() - share) < 5.5 * error


# --- several drafts ------------------------------------------------------------------------------


@pytest.mark.parametrize("holes", [False, True], ids=["covered", "with-holes"])
def test_batch_curve_falls_to_its_limit(x64, holes):
    """Also where the draft never says what the target does; the limit is then higher."""
    draft, target = random_pair("first-order", 11, 6, 4, holes)
    curve = np.asarray(costmodel.batch_rejection_curve(draft, target, 2000))
    limit = costmodel.expected_batch_rejections(draft, target, math.inf)
    assert (np.diff(curve) <= 1e-14).all()
    assert (np.diff(curve[:4]) < 0).all()
    assert curve[-1] == pytest.approx(float(limit.total), abs=1e-10)
    assert limit.total > 0.1
    assert curve[0] == pytest.approx(
        float(costmodel.expected_rejections(draft, target).total), abs=1e-13
    )
    one = costmodel.expected_batch_rejections(draft, target, 3)
    assert curve[2] == pytest.approx(float(one.total), abs=1e-14)
    np.testing.assert_allclose(one.improvement, curve[0] - curve[2], atol=1e-13)
    missing = np.where(np.asarray(draft.first) > 0, 0, np.asarray(target.first)).sum()
    assert float(limit.by_position[0]) == pytest.approx(missing, abs=1e-15)
    assert (missing > 0) == holes


def test_residuals_are_those_of_the_definition(x64):
    """By dividing step after step, on a batch of laws with holes."""
    rng = np.random.default_rng(2)
    draft, target = random_rows(rng, (8, 5), True), random_rows(rng, (8, 5), True)
    got = costmodel.residual_sequence(draft, target, 4)
    assert got.residuals.shape == (8, 5, 5)
    for i in range(8):
        residual, failed = target[i], 1.0
        for m in range(4):
            np.testing.assert_allclose(got.residuals[i, m], residual, atol=1e-12)
            distance = 0.5 * abs(residual - draft[i]).sum()
            failed *= distance
            assert float(got.rejection_probs[i, m]) == pytest.approx(distance, abs=1e-12)
            assert float(got.all_rejected[i, m + 1]) == pytest.approx(failed, abs=1e-12)
            residual = normalised(np.maximum(residual - draft[i], 0))
            assert residual.sum() > 0
    np.testing.assert_array_equal(got.all_rejected[:, 0], 1)


def test_residual_of_nothing_is_the_target(x64):
    law = np.array([0.25, 0.75])
    got = costmodel.residual_sequence(law, law, 3)
    np.testing.assert_array_equal(got.residuals, np.tile(law, (4, 1)))
    np.testing.assert_array_equal(got.rejection_probs, 0)
    np.testing.assert_array_equal(got.all_rejected, [1, 0, 0, 0])


def test_bernoulli_closed_form_equals_the_recursion(x64):
    draft, target = np.meshgrid(np.linspace(0, 1, 11), np.linspace(0, 1, 11))
    sequence = costmodel.residual_sequence(
        np.stack([1 - draft, draft], -1), np.stack([1 - target, target], -1), 6
    )
    saved = sequence.all_rejected[..., 1:2] - sequence.all_rejected[..., 1:]
    closed = costmodel.bernoulli_batch_improvement(
        draft[..., None], target[..., None], np.arange(1, 7)
    )
    np.testing.assert_allclose(closed, saved, atol=1e-14)
    pair = [costmodel.memoryless_chain([1 - u, u], 2) for u in (0.3, 0.6)]
    answer = costmodel.expected_batch_rejections(*pair, 4)
    assert float(answer.improvement_by_position[0]) == pytest.approx(
        float(costmodel.bernoulli_batch_improvement(0.3, 0.6, 4)), abs=1e-15
    )


def test_uniform_closed_form_equals_the_recursion(x64):
    sizes, largest = np.arange(3, 25), 24
    token = np.arange(largest)
    draft = (token < sizes[:, None]) / sizes[:, None]
    target = np.broadcast_to((token < 3) / 3, draft.shape)
    sequence = costmodel.residual_sequence(draft, target, 5)
    saved = sequence.all_rejected[:, 1:2] - sequence.all_rejected[:, 1:]
    closed = np.asarray(costmodel.uniform_batch_improvement(sizes[:, None], 3, np.arange(1, 6)))
    np.testing.assert_allclose(closed, saved, atol=1e-14)
    # It rises with the ratio of the two vocabularies, and falls from its maximum on.
    for m in (2, 5):
        best = closed[:, m - 1].argmax()
        assert 0 < best < len(sizes) - 1
        assert (np.diff(closed[: best + 1, m - 1]) > 0).all()
        assert (np.diff(closed[best:, m - 1]) < 0).all()
    assert closed[:, 4].argmax() > closed[:, 1].argmax()


# --- derivatives ---------------------------------------------------------------------------------

LENGTH, VOCAB_SIZE = 3, 3
NUM_ROWS = 1 + (LENGTH - 1) * VOCAB_SIZE


def chains_of(rows):
    """Draft and target from rows `[2, NUM_ROWS, V]`."""
    shape = (LENGTH - 1, VOCAB_SIZE, VOCAB_SIZE)
    return [costmodel.Chain(half[0], half[1:].reshape(shape)) for half in rows]


def scalars(rows):
    """A number out of every function of two chains, and one out of each of their parts."""
    draft, target = chains_of(rows)
    weights = jnp.asarray([1.0, -0.5, 0.3], rows.dtype)
    theorem = costmodel.expected_rejections(draft, target)
    calls = costmodel.expected_calls(draft, target, 2)
    unlimited = costmodel.expected_calls(draft, target)
    block = costmodel.expected_block_calls(draft, target, 2)
    batch = costmodel.expected_batch_rejections(draft, target, 3)
    limit = costmodel.expected_batch_rejections(draft, target, math.inf)
    sequence = costmodel.residual_sequence(rows[0], rows[1], 2)
    shares = costmodel.round_acceptance(draft, target, "block")
    return {
        "rejections": theorem.total,
        "acceleration": theorem.acceleration,
        "bound": costmodel.rejection_lower_bound(draft, target),
        "calls": calls.calls,
        "calls' rejections": calls.rejections,
        "tokens per call": calls.tokens_per_call,
        "unlimited calls": (unlimited.calls_by_position * weights).sum(),
        "block calls": (block.calls_by_position * weights).sum(),
        "block rejections": block.rejections,
        "token shares": (costmodel.round_acceptance(draft, target) * weights).sum(),
        "block shares": (shares * weights).sum(),
        "rejections per token": costmodel.rejections_per_token(shares),
        "batch": (batch.by_position * weights).sum(),
        "improvement": batch.improvement,
        "limit": limit.total,
        "curve": (costmodel.batch_rejection_curve(draft, target, 3) * weights).sum(),
        "residuals": (sequence.residuals[:, 2] * weights[None]).sum(),
        "rejection probabilities": sequence.rejection_probs[:, 1].sum(),
        "all rejected": sequence.all_rejected[:, 2].sum(),
        "bernoulli": costmodel.bernoulli_batch_improvement(rows[0, 0, 0], rows[1, 0, 0], 3),
        "uniform": costmodel.uniform_batch_improvement(2 + rows[0, 0, 0], 1 + rows[1, 0, 0], 3),
    }


@jax.jit
def evaluate(rows):
    """Gradients and values of all of them. Compiled once per dtype, for everything below."""
    return jax.jacrev(lambda rows: (scalars(rows),) * 2, has_aux=True)(rows)


def values_of(rows):
    return {name: float(value) for name, value in evaluate(rows)[1].items()}


def sample_rows(seed, holes=False):
    """Rows `[2, NUM_ROWS, V]`."""
    return random_rows(np.random.default_rng(seed), (2, NUM_ROWS, VOCAB_SIZE), holes)


def test_gradients_match_finite_differences(x64):
    """In every probability by itself: the functions go on smoothly where rows do not sum to one."""
    rows = sample_rows(22) ** 3
    rows /= rows.sum(-1, keepdims=True)
    gradients, values = evaluate(rows)
    assert values["rejections"] > 1  # below that the acceleration stands still
    step = 1e-6
    moves = step * np.eye(rows.size).reshape(-1, *rows.shape)
    ends = [[evaluate(rows + sign * move)[1] for move in moves] for sign in (1, -1)]
    for name, gradient in gradients.items():
        above, below = (np.array([float(value[name]) for value in end]) for end in ends)
        expected = ((above - below) / (2 * step)).reshape(rows.shape)
        assert abs(expected).max() > 1e-3, name
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-8, err_msg=name)


def corners():
    """Rows at which a quotient or a root would fail: no mass, no difference, no overlap."""
    sure = np.zeros((NUM_ROWS, VOCAB_SIZE))
    sure[:, 0] = 1
    other = np.roll(sure, 1, axis=1)
    mixed = sample_rows(4)[0]
    faint = np.broadcast_to([1.0, 1e-30, 0.0], sure.shape)
    return {
        "equal": (mixed, mixed),
        "sure and equal": (sure, sure),
        "disjoint": (sure, other),
        "sure draft": (sure, mixed),
        "sure target": (mixed, sure),
        "holes": tuple(sample_rows(5, holes=True)),
        "faint draft": (faint, mixed),
        "faint target": (sure, faint),
        "nearly equal": (mixed, mixed * (1 + 1e-7 * np.array([1, -1, 0]))),
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nothing_is_infinite_at_the_corners(dtype):
    with enable_x64():
        for name, pair in corners().items():
            rows = np.stack(pair).astype(dtype)
            gradients, values = evaluate(rows)
            for part in (*values.values(), *gradients.values()):
                assert part.dtype == dtype
                assert np.isfinite(part).all(), name
    assert values_of(np.stack(corners()["equal"]))["rejections"] == 0
    assert values_of(np.stack(corners()["disjoint"]))["batch"] > 0


def test_equal_and_disjoint_laws_have_the_two_extreme_speeds(x64):
    """T times as fast where nothing is rejected; as fast as without a draft where all is."""
    for name, rejections, acceleration, calls in (
        ("equal", 0, 3, 1),
        ("disjoint", 3, 1, 3),
    ):
        draft, target = chains_of(np.stack(corners()[name]))
        answer = costmodel.expected_rejections(draft, target)
        assert float(answer.total) == pytest.approx(rejections, abs=1e-12)
        assert float(answer.acceleration) == pytest.approx(acceleration)
        assert float(costmodel.expected_calls(draft, target).calls) == pytest.approx(calls)


probability_rows = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-6, 1.0), st.sampled_from([1e-38, 1e-20, 1e-7, 1.0])),
    min_size=2 * NUM_ROWS * VOCAB_SIZE,
    max_size=2 * NUM_ROWS * VOCAB_SIZE,
)


@settings(max_examples=100, deadline=None)
@given(numbers=probability_rows)
def test_float32_values_are_finite_and_in_range(numbers):
    rows = np.array(numbers).reshape(2, NUM_ROWS, VOCAB_SIZE)
    rows[..., 0] += rows.sum(-1) == 0
    rows = (rows / rows.sum(-1, keepdims=True)).astype(np.float32)
    gradients, values = evaluate(rows)
    for name, part in (*values.items(), *gradients.items()):
        assert np.isfinite(part).all(), name
    slack = 1e-5
    assert -slack <= values["limit"] <= values["rejections"] + slack <= LENGTH + 2 * slack
    assert values["calls' rejections"] <= values["rejections"] + slack
    assert 1 - slack <= values["calls"] <= LENGTH + slack
    assert 1 - slack <= values["acceleration"] <= LENGTH + slack
    assert values["block rejections"] <= values["calls' rejections"] + slack
    assert -slack <= values["improvement"] <= values["rejections"] + slack


def test_a_batch_of_chains_is_mapped_over(x64):
    """vmap of the public functions equals one call after the other."""
    rows = np.stack([sample_rows(seed) for seed in range(3)])

    @jax.jit
    @jax.vmap
    def mapped(rows):
        draft, target = chains_of(rows)
        return {
            "rejections": costmodel.expected_rejections(draft, target).total,
            "calls": costmodel.expected_calls(draft, target, 2).calls,
            "block rejections": costmodel.expected_block_calls(draft, target, 2).rejections,
            "improvement": costmodel.expected_batch_rejections(draft, target, 3).improvement,
        }

    for name, numbers in mapped(rows).items():
        expected = [values_of(one)[name] for one in rows]
        np.testing.assert_allclose(numbers, expected, atol=1e-14, err_msg=name)


# --- what is refused -----------------------------------------------------------------------------

GOOD = costmodel.memoryless_chain(np.array([0.5, 0.5], np.float32), 3)
HISTORY = costmodel.as_history_chain(GOOD)
LAW = [0.5, 0.5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: costmodel.memoryless_chain([0.5, 0.6], 3), r"probs has a row that sums to 1\.1"),
        (lambda: costmodel.memoryless_chain([[0.5, 0.5]], 3), r"probs of shape \(1, 2\)"),
        (lambda: costmodel.memoryless_chain(LAW, 0), "length=0 must be an integer, at least 1"),
        (lambda: costmodel.stationary_chain(LAW, [LAW], 2), r"kernel of shape \(1, 2\)"),
        (lambda: costmodel.stationary_chain([1.5, -0.5], [LAW, LAW], 2), r"first holds -0\.5"),
        (
            lambda: costmodel.stationary_chain(LAW, [LAW, [math.nan, 1.0]], 2),
            "kernel holds nan",
        ),
        (lambda: costmodel.random_chain(jax.random.key(0), 0, 3), "length=0"),
        (lambda: costmodel.random_chain(jax.random.key(0), 3, 2.0), r"vocab_size=2\.0"),
        (lambda: costmodel.as_history_chain(LAW), "chain: list"),
        (
            lambda: costmodel.as_history_chain(costmodel.memoryless_chain(LAW, 40)),
            r"chain of T=40 positions and V=2 tokens has 2\^39",
        ),
        (
            lambda: costmodel.expected_rejections(GOOD, HISTORY),
            "draft: Chain, target: HistoryChain: .* of one kind",
        ),
        (
            lambda: costmodel.expected_rejections(GOOD, costmodel.memoryless_chain(LAW, 4)),
            "draft of T=3, V=2 and target of T=4, V=2",
        ),
        (
            lambda: costmodel.expected_rejections(GOOD._replace(first=[0.5, 0.4]), GOOD),
            r"draft\.first has a row that sums to 0\.9",
        ),
        (
            lambda: costmodel.expected_rejections(GOOD, GOOD._replace(kernels=[[LAW]])),
            r"target\.kernels of shape \(1, 1, 2\) must have shape \[T - 1, 2, 2\]",
        ),
        (
            lambda: costmodel.expected_rejections(*[costmodel.HistoryChain(())] * 2),
            "draft.tables must hold at least one table",
        ),
        (
            lambda: costmodel.expected_rejections(
                HISTORY, costmodel.HistoryChain((HISTORY.tables[0], HISTORY.tables[2]))
            ),
            r"target\.tables\[1\] of shape \(4, 2\) must have shape \[2, 2\]",
        ),
        (lambda: costmodel.expected_calls(GOOD, GOOD, 0, False), "gamma=0 must be an integer, at"),
        (lambda: costmodel.expected_calls(GOOD, GOOD, -1), "gamma=-1 .* at least 0 with the bonus"),
        (lambda: costmodel.expected_calls(GOOD, GOOD, 1.5), "gamma=1.5"),
        (lambda: costmodel.expected_block_calls(GOOD, GOOD, None), "gamma=None"),
        (
            lambda: costmodel.expected_block_calls(*[costmodel.memoryless_chain(LAW, 50)] * 2, 30),
            r"gamma .* V=2 tokens make 2\^31 blocks",
        ),
        (lambda: costmodel.round_acceptance(GOOD, GOOD, "tree"), "rule='tree' must be"),
        (
            lambda: costmodel.round_acceptance(*[costmodel.memoryless_chain(LAW, 50)] * 2, "block"),
            r"2\^50 blocks",
        ),
        (lambda: costmodel.rejections_per_token([0.5, 1.5]), r"acceptance_by_position=1\.5"),
        (lambda: costmodel.rejections_per_token(0.5), r"acceptance_by_position of shape \(\)"),
        (lambda: costmodel.expected_batch_rejections(GOOD, GOOD, 0), "num_drafts=0"),
        (lambda: costmodel.expected_batch_rejections(GOOD, GOOD, 2.5), "num_drafts=2.5"),
        (lambda: costmodel.batch_rejection_curve(GOOD, GOOD, 0), "max_drafts=0"),
        (lambda: costmodel.residual_sequence(LAW, [0.2, 0.3, 0.5], 2), r"draft_probs of shape \(2"),
        (lambda: costmodel.residual_sequence(LAW, [0.2, 0.3], 2), "target_probs has a row"),
        (lambda: costmodel.bernoulli_batch_improvement(1.2, 0.5, 2), r"draft_prob=1\.2"),
        (lambda: costmodel.bernoulli_batch_improvement(0.2, math.nan, 2), "target_prob=nan"),
        (lambda: costmodel.bernoulli_batch_improvement(0.2, 0.5, 1.5), "num_drafts=1.5 must be a"),
        (lambda: costmodel.uniform_batch_improvement(0, 1, 2), "draft_size=0 must be positive"),
        (lambda: costmodel.uniform_batch_improvement(3, 4, 2), "target_size=4 must be at most"),
        (
            lambda: costmodel.simulate_rejections(jax.random.key(0), GOOD, GOOD, 0),
            "num_runs=0",
        ),
        (
            lambda: costmodel.simulate_batch_rejections(jax.random.key(0), GOOD, GOOD, 1, 0),
            "num_drafts=0",
        ),
    ],
)
def test_wrong_arguments_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rounding_of_a_row_is_forgiven_by_its_type():
    """Half of the digits: 3e-4 in float32, 1.5e-8 in float64."""
    off = np.array([0.5, 0.5 + 1e-4])
    costmodel.memoryless_chain(off.astype(np.float32), 2)
    with enable_x64():
        costmodel.memoryless_chain(np.array([0.5, 0.5 + 1e-9]), 2)
        with pytest.raises(ValueError, match="within 1e-08"):
            costmodel.memoryless_chain(off, 2)


def test_lists_and_mixed_types_are_taken(x64):
    lists = costmodel.Chain([0.5, 0.5], [[[0.9, 0.1], [0.2, 0.8]]])
    arrays = costmodel.Chain(np.float32([0.5, 0.5]), np.zeros((1, 2, 2), np.float32) + 0.5)
    answer = costmodel.expected_rejections(lists, arrays)
    assert float(answer.total) == pytest.approx(0.5 * (0.4 + 0.3), abs=1e-7)
    one = costmodel.memoryless_chain([0.25, 0.75], 1)
    assert float(costmodel.expected_calls(one, one, 3).calls) == 1
