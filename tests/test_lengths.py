"""Draft lengths chosen in the loop: the law of the text, the passes made, the policies' choices."""

import collections
import functools
import re

import enumeration
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import strategies as st

import jaxsd
from jaxsd import lengths, models, testing

VOCAB, EOS, K, MAX_LEN = 4, 3, 4, 26
MODEL = testing.MarkovModel(VOCAB, 2)
PARAMS = {"target": MODEL.init(jax.random.key(0)), "draft": MODEL.init(jax.random.key(1))}
ITSELF = {"target": PARAMS["target"], "draft": PARAMS["target"]}
PROMPTS = np.array([[2, 0, 1, 0], [1, 0, 0, 0], [0, 2, 0, 0]], np.int32)
LENGTHS = np.array([4, 1, 2], np.int32)
KEY = jax.random.key(2)
MIXED = jaxsd.Sampling(
    np.array([0.0, 1.0, 0.7], np.float32), np.array([0, 0, 3]), np.array([1.0, 1.0, 0.8])
)
SECONDS = np.array([1.0, 1.3, 1.6, 1.9, 2.2])
POLICIES = {
    "off": lengths.fixed_length(0),
    "one": lengths.fixed_length(1),
    "three": lengths.fixed_length(3),
    "all": lengths.fixed_length(K),
    "by active rows": lengths.length_by_active([4, 0, 3]),
    "by cost": lengths.cost_aware_length(SECONDS, decay=0.8),
}


# ---- The law


TOY = testing.MarkovModel(3, 1)
TOY_PARAMS = {"target": TOY.init(jax.random.key(3)), "draft": TOY.init(jax.random.key(4))}
SETTING = jaxsd.Sampling(0.9)


def toy_round(drafter, verifier, draft_lengths=None, count=None):
    """The law of what a round commits, and how far it is from the target's."""
    text = [1, 2]
    decoder = jaxsd.speculative(TOY, drafter, verifier, max_len=8, draft_lengths=draft_lengths)
    policy = None if count is None else lengths.fixed_length(count)
    state = decoder.start(TOY_PARAMS, [text], None, KEY, sampling=SETTING, policy=policy)
    law = enumeration.exact_round(decoder, TOY_PARAMS, state)

    def conditional(more):
        logits = reference.markov_logits(TOY_PARAMS["target"], [*text, *more], 1)
        return reference.probabilities(logits, *SETTING)[0]

    return law, enumeration.distance(law, conditional, drafter.num_tokens + 1)


@pytest.mark.parametrize("verifier", [jaxsd.rejection_sampling, jaxsd.block_verification])
@pytest.mark.parametrize(
    ("draft_lengths", "count"), [((2,), 0), ((0, 2), 0), ((0, 2), 1), ((1, 2), 1), ((1, 2), 2)]
)
def test_a_round_of_any_length_is_exactly_a_round_of_a_drafter_of_that_length(
    verifier, draft_lengths, count
):
    """All draws enumerated: the target's law to 1e-6, and the very round of a decoder with K equal
    to the length, whatever the width of the pass that verified it."""
    law, far = toy_round(jaxsd.model_drafter(TOY, 2), verifier, draft_lengths, count)
    assert far <= 1e-6
    alone = jaxsd.model_drafter(TOY, count) if count else jaxsd.no_drafter()
    same, _ = toy_round(alone, verifier)
    assert law.keys() == same.keys()
    for text, mass in law.items():
        assert mass == pytest.approx(same[text], abs=1e-6)


def dropping(is_dropped):
    """A drafter that takes back what it has drafted, from the first place where it says so."""
    drafter = jaxsd.model_drafter(TOY, 2)

    def propose(*arguments):
        proposal = drafter.propose(*arguments)
        keeps = ~is_dropped(proposal.tokens, proposal.probs)
        return proposal._replace(proposed=jnp.cumprod(keeps, axis=1).astype(bool))

    return drafter._replace(propose=propose)


@pytest.mark.parametrize("verifier", [jaxsd.rejection_sampling, jaxsd.block_verification])
def test_dropping_a_token_for_its_own_value_is_biased_and_for_its_law_is_not(verifier):
    def is_zero(tokens, probs):
        del probs
        return tokens == 0

    def is_unlikely(tokens, probs):
        return jnp.take_along_axis(probs, tokens[..., None], axis=2)[..., 0] < 0.4

    def is_unsure(tokens, probs):
        del tokens
        return jnp.max(probs, axis=2) < 0.6

    _, far = toy_round(dropping(is_unsure), verifier)
    assert far <= 1e-6
    for rule in (is_zero, is_unlikely):
        _, far = toy_round(dropping(rule), verifier)
        assert far > 0.02


# ---- The loop


@functools.cache
def decoder(kind, verifier=jaxsd.block_verification, draft_lengths=(0, 2, K)):
    drafter = {
        "plain": jaxsd.no_drafter,
        "model": lambda: jaxsd.model_drafter(MODEL, K),
        "shared noise": lambda: jaxsd.model_drafter(MODEL, K, shares_noise=True),
        "lookup": lambda: jaxsd.prompt_lookup(K),
        "exit": lambda: jaxsd.early_exit_drafter(MODEL, K),
    }[kind]()
    return jaxsd.speculative(
        MODEL,
        drafter,
        verifier,
        max_len=MAX_LEN,
        eos_id=EOS,
        log_probs=True,
        draft_lengths=None if kind == "plain" else draft_lengths,
    )


def generate(decoder, params=PARAMS, **options):
    return decoder.generate(params, PROMPTS, LENGTHS, KEY, **options)


@pytest.mark.parametrize("policy", POLICIES)
def test_with_shared_noise_every_policy_gives_the_text_of_plain_decoding(policy):
    plain = generate(decoder("plain", jaxsd.gumbel_coupling), sampling=MIXED)
    found = generate(
        decoder("shared noise", jaxsd.gumbel_coupling), sampling=MIXED, policy=POLICIES[policy]
    )
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    np.testing.assert_array_equal(found.lengths, plain.lengths)
    np.testing.assert_allclose(found.log_probs, plain.log_probs, atol=1e-6)


@pytest.mark.parametrize("policy", ["off", "three", "by active rows", "by cost"])
@pytest.mark.parametrize("kind", ["model", "lookup", "exit"])
def test_greedy_text_under_constraints_is_that_of_plain_decoding(kind, policy):
    """Ragged rows, penalties, a least length, stops, limits per row, log-probabilities."""
    constraints = jaxsd.Constraints(
        repetition_penalty=1.3,
        frequency_penalty=0.4,
        min_new_tokens=np.array([3, 0, 7], np.int32),
        stop=jaxsd.stop_sequences([[1, 1], [0, 2, 0]]),
    )
    asked = {"constraints": constraints, "max_new_tokens": np.array([5, 30, 12])}
    plain = generate(decoder("plain"), **asked)
    found = generate(decoder(kind), policy=POLICIES[policy], **asked)
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    np.testing.assert_allclose(found.log_probs, plain.log_probs, atol=1e-6)


def test_sampled_rows_keep_the_targets_law_while_cost_chooses():
    """Greedy, sampled and filtered rows in one batch; the chance of a false alarm is 1e-6."""

    choosing = functools.partial(decoder("model").generate, policy=POLICIES["by cost"])
    report = testing.check_decoder(
        decoder("model")._replace(generate=choosing),
        MODEL,
        PARAMS,
        [[2, 0, 1], [1]],
        sampling=[jaxsd.Sampling(0.0), jaxsd.Sampling(1.0), jaxsd.Sampling(0.7, 3, 0.8)],
        eos_id=EOS,
        num_new_tokens=3,
        num_samples=2000,
    )
    assert report, report


def test_a_draft_that_was_off_knows_the_text_when_it_is_asked_again():
    """The target drafts for itself: a cache that lacks or confuses anything shows as a rejection.
    Lengths change from round to round, through a pause longer than one pass of catching up."""
    config = models.CONFIGS["tiny"]
    model = models.language_model(config)
    weights = models.init_params(config, jax.random.key(0))
    params = {"target": weights, "draft": weights}
    decoder = jaxsd.speculative(
        model, jaxsd.model_drafter(model, K), max_len=96, draft_lengths=(0, K)
    )
    prompts = np.arange(3 * 5, dtype=np.int32).reshape(3, 5) % config.vocab_size
    plain = jaxsd.speculative(model, jaxsd.no_drafter(), max_len=96)
    wanted = plain.generate(params, prompts, np.array([5, 1, 3]), KEY)
    state = decoder.start(params, prompts, np.array([5, 1, 3]), KEY)
    drafted = 0
    for count in [0, 0, 3, 4, 0, 1, 1, 0, *[0] * 20, 4, 2, 0, 3]:
        policy = lengths.checked(lengths.fixed_length(count), 3, K)
        state = decoder.run(params, state._replace(policy=policy), np.int32(1))
        drafted += count
        assert state.stats.num_drafted.tolist() == [drafted] * 3
        assert state.stats.num_accepted.tolist() == [drafted] * 3
    state = decoder.run(params, state, jaxsd.UNTIL_DONE)
    np.testing.assert_array_equal(state.tokens, wanted.tokens)
    by_position = np.asarray(state.stats.drafted_by_position)
    np.testing.assert_array_equal(by_position.sum(1), state.stats.num_drafted)


class Metered:
    """A model whose cache counts what is asked of it: `[2]`, passes and positions."""

    def init_cache(self, batch_size, max_len):
        return MODEL.init_cache(batch_size, max_len), jnp.zeros((2,), jnp.int32)

    def apply(self, params, tokens, positions, cache):
        TRACES[tokens.shape[1]] += 1
        logits, inner = MODEL.apply(params, tokens, positions, cache[0])
        return logits, (inner, cache[1] + jnp.array([1, tokens.shape[1]], jnp.int32))


TRACES = collections.Counter()


def test_a_round_makes_the_passes_that_its_length_asks_for_and_no_new_trace():
    """Off is one token wide and free of the draft; else the next compiled length decides."""
    metered = Metered()
    decoder = jaxsd.speculative(
        metered, jaxsd.model_drafter(metered, K), max_len=64, draft_lengths=(0, 2, K)
    )
    state = decoder.start(ITSELF, PROMPTS, LENGTHS, KEY)
    traces = None
    before = [np.array(state.target_cache[1]), np.array(state.drafter_state.cache[1])]
    for count, width, passes, positions in [
        (4, 5, 4, 5),  # the first pass of a round reads the last two tokens
        (3, 5, 3, 4),
        (2, 3, 2, 3),
        (1, 3, 1, 2),
        (0, 1, 0, 0),
        (0, 1, 0, 0),
        (2, 3, 3, 3 + 16),  # two unread tokens: one pass to catch up
        (2, 3, 2, 3),
    ]:
        policy = lengths.checked(lengths.fixed_length(count), 3, K)
        state = decoder.run(ITSELF, state._replace(policy=policy), np.int32(1))
        after = [np.array(state.target_cache[1]), np.array(state.drafter_state.cache[1])]
        (target, draft) = (b - a for a, b in zip(before, after, strict=True))
        assert target.tolist() == [1, width]
        assert draft.tolist() == [passes, positions]
        before = after
        if traces is None:
            traces = dict(TRACES)
    for policy in POLICIES.values():
        state = decoder.start(PARAMS, PROMPTS, LENGTHS, KEY, sampling=MIXED, policy=policy)
        decoder.run(PARAMS, state, jaxsd.UNTIL_DONE)
    assert dict(TRACES) == traces


def test_a_drafter_that_knows_no_length_is_asked_for_all_and_cut():
    decoder_ = decoder("lookup")
    state = decoder_.start(PARAMS, [[0, 1, 2, 0, 1]], None, KEY, policy=lengths.fixed_length(3))
    state = decoder_.run(PARAMS, state, np.int32(1))
    assert state.stats.drafted_by_position.tolist() == [[1, 1, 1, 0]]


def test_by_active_rows_the_length_changes_when_a_row_ends():
    decoder_ = decoder("model")
    state = decoder_.start(
        ITSELF,
        PROMPTS,
        LENGTHS,
        KEY,
        max_new_tokens=np.array([1, 4, 20]),
        constraints=jaxsd.Constraints(min_new_tokens=20),
        policy=lengths.length_by_active([1, 2, 4]),
    )
    drafted = []
    while not np.all(state.done):
        before = np.array(state.stats.num_drafted)
        state = decoder_.run(ITSELF, state, np.int32(1))
        drafted.append((np.asarray(state.stats.num_drafted) - before).tolist())
    assert drafted[:3] == [[4, 4, 4], [0, 0, 1], [0, 0, 1]]


def test_by_cost_a_draft_that_is_right_drafts_all_and_one_that_is_wrong_stops():
    decoder_ = jaxsd.speculative(
        MODEL, jaxsd.model_drafter(MODEL, K), max_len=400, draft_lengths=(0, K)
    )
    contrary = {"target": PARAMS["target"], "draft": -10 * PARAMS["target"]}
    policy = lengths.cost_aware_length(SECONDS)
    found = []
    for params in (ITSELF, contrary):
        out = decoder_.generate(params, PROMPTS, LENGTHS, KEY, policy=policy)
        found.append(np.asarray(out.stats.num_drafted / out.stats.num_rounds))
    assert np.all(found[0] > K - 0.05)
    # Not none at all: what was seen fades, and drafting is tried again.
    assert np.all((found[1] > 0) & (found[1] < 0.5))


# ---- The policies


def slow_choice(policy, num_active, num_tokens):
    """The docstring's equations."""
    row = min(num_active, len(policy.seconds)) - 1
    if not policy.is_cost_aware:
        return int(policy.by_active[row])
    pooled = (sum(policy.accepted) + policy.weight * policy.acceptance) / (
        sum(policy.judged) + policy.weight
    )
    best, fastest, chance, tokens = 0, 0.0, 1.0, 1.0
    for count in range(num_tokens + 1):
        if count:
            place = count - 1
            chance *= (policy.accepted[place] + policy.weight * pooled) / (
                policy.judged[place] + policy.weight
            )
            tokens += chance
        if tokens / policy.seconds[row][count] > fastest * (1 + 1e-5):
            best, fastest = count, tokens / policy.seconds[row][count]
    return best


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=60, deadline=None)
def test_the_choice_is_the_fastest_by_a_slow_recount(data):
    numbers = st.floats(0.125, 8, width=32)
    judged = data.draw(st.lists(st.integers(0, 40), min_size=K, max_size=K))
    accepted = [data.draw(st.integers(0, most)) for most in judged]
    policy = lengths.cost_aware_length(
        [data.draw(st.lists(numbers, min_size=K + 1, max_size=K + 1)) for _ in range(3)],
        acceptance=data.draw(st.floats(0, 1, width=32)),
        weight=data.draw(numbers),
    )
    policy = policy._replace(
        judged=np.array(judged, np.float32), accepted=np.array(accepted, np.float32)
    )
    policy = lengths.checked(policy, 3, K)
    num_active = data.draw(st.integers(1, 3))
    slow = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), policy)
    found, wanted = int(choose(policy, jnp.int32(num_active))), slow_choice(slow, num_active, K)

    def rate(count):
        seconds = np.full_like(slow.seconds, np.inf)
        seconds[:, count] = slow.seconds[:, count]
        pooled = (slow.accepted.sum() + slow.weight * slow.acceptance) / (
            slow.judged.sum() + slow.weight
        )
        rates = (slow.accepted + slow.weight * pooled) / (slow.judged + slow.weight)
        return (1 + np.cumprod(rates)[:count].sum()) / seconds[num_active - 1, count]

    assert found == wanted or rate(found) == pytest.approx(rate(wanted), rel=2e-5)


choose = jax.jit(lengths.choose)


def test_what_was_judged_and_accepted_is_counted_and_fades():
    policy = lengths.cost_aware_length(SECONDS, decay=0.5)
    policy = lengths.checked(policy, 3, K)
    proposed = np.array([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]], bool)
    active = np.array([True, True, False])
    for _ in range(2):
        policy = lengths.update(policy, jnp.array([1, 3, 3]), proposed, active)
    assert policy.judged.tolist() == [3.0, 3.0, 1.5, 0.0]
    assert policy.accepted.tolist() == [3.0, 1.5, 1.5, 0.0]


def test_infinite_seconds_forbid_a_length():
    policy = lengths.cost_aware_length([np.inf, 5.0, np.inf, 1.0, np.inf], acceptance=0.1)
    assert int(choose(lengths.checked(policy, 3, K), jnp.int32(2))) == 3


# ---- What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lengths.fixed_length(-1), "num_tokens=-1 must be an integer of at least 0"),
        (lambda: lengths.fixed_length(2.0), "num_tokens=2.0 must be an integer"),
        (lambda: lengths.length_by_active([]), "num_tokens of shape (0,)"),
        (lambda: lengths.length_by_active([1.5]), "type float64 must be a one-dimensional"),
        (lambda: lengths.length_by_active([3, -1]), "num_tokens=-1 must be at least 0"),
        (lambda: lengths.cost_aware_length(1.0), "round_seconds has shape ()"),
        (lambda: lengths.cost_aware_length([0.0, 1.0]), "round_seconds must be positive"),
        (lambda: lengths.cost_aware_length([np.nan, 1.0]), "round_seconds must be positive"),
        (lambda: lengths.cost_aware_length([np.inf]), "at least one is finite"),
        (lambda: lengths.cost_aware_length([1.0], decay=1.1), "decay=1.1 must be a number from 0"),
        (lambda: lengths.cost_aware_length([1.0], weight=0.0), "weight=0.0 must be a number"),
        (lambda: lengths.cost_aware_length([1.0], acceptance=np.nan), "acceptance=nan must be"),
        (lambda: generate(decoder("model"), policy=3), "policy=3 must be made by"),
        (
            lambda: generate(decoder("model"), policy=lengths.fixed_length(5)),
            "policy asks for 5 draft tokens; the drafter's num_tokens is 4",
        ),
        (
            lambda: generate(decoder("model"), policy=lengths.cost_aware_length([1.0, 2.0])),
            "policy has seconds of 2 lengths; wanted those of 0 to num_tokens=4",
        ),
        (
            lambda: generate(decoder("plain"), policy=lengths.fixed_length(0)),
            "policy needs a decoder that can choose",
        ),
        (lambda: decoder("model", draft_lengths=(0, 2)), "draft_lengths=(0, 2) must be integers"),
        (lambda: decoder("model", draft_lengths=(2, 1, 4)), "rise from 0 or more to the drafter's"),
        (lambda: decoder("model", draft_lengths=(-1, 4)), "draft_lengths=(-1, 4) must be"),
        (lambda: decoder("model", draft_lengths=4), "draft_lengths=4 must be integers"),
        (
            lambda: jaxsd.speculative(
                MODEL, jaxsd.tree_drafter(MODEL, (-1, -1)), max_len=9, draft_lengths=(0, 2)
            ),
            "draft_lengths are for drafters of chains",
        ),
    ],
)
def test_wrong_input_is_named(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
