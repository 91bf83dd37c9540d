"""Drafts with another vocabulary: the table of shared tokens, and the exact law on toys."""

import collections
import functools

import enumeration
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jaxsd
from jaxsd import testing, vocabularies

# The target has a, b, ab and an end; the draft c, b, a in another order. c and ab have no partner.
TARGET_TOKENS = ["a", "b", "ab", "<end>"]
DRAFT_TOKENS = ["c", "b", None, "a", "</s>"]
EOS, MAX_LEN = 3, 12
SHARED = vocabularies.translate_vocabulary(DRAFT_TOKENS, TARGET_TOKENS, same=[(4, 3)])
TARGET, DRAFT = testing.MarkovModel(4, 2), testing.MarkovModel(5, 2)
DRAFT_WEIGHTS = DRAFT.init(jax.random.key(1))
PARAMS = {
    "target": TARGET.init(jax.random.key(0)),
    "draft": vocabularies.TranslatedParams(DRAFT_WEIGHTS, SHARED),
}
TRACES = collections.Counter()
KEY = jax.random.key(2)
SETTINGS = [jaxsd.Sampling(0.0), jaxsd.Sampling(1.0), jaxsd.Sampling(0.7, 3, 0.8)]


class Counted:
    """The draft, counting how often it is traced, by block length."""

    init_cache = DRAFT.init_cache

    def apply(self, params, tokens, positions, cache):
        TRACES[tokens.shape[1]] += 1
        return DRAFT.apply(params, tokens, positions, cache)


MODEL = vocabularies.shared_vocabulary_model(Counted())


@functools.cache
def decoder():
    return jaxsd.speculative(TARGET, jaxsd.model_drafter(MODEL, 2), max_len=MAX_LEN, eos_id=EOS)


def slow_row(text, setting):
    """The draft's law after a text of the target's tokens: translated, restricted, as sampled."""
    own = [{0: 3, 1: 1, 2: 1, 3: 4}[token] for token in text]  # ab is read as the b it ends with
    logits = reference.markov_logits(DRAFT_WEIGHTS, own, 2).astype(np.float64)
    probs = np.exp(logits) / np.exp(logits).sum()
    restricted = np.array([probs[3], probs[1], 0.0, probs[4]])
    with np.errstate(divide="ignore"):
        return reference.probabilities(np.log(restricted / restricted.sum()), *setting)[0]


# ---- The table


def test_tokens_are_paired_by_their_text():
    assert SHARED.to_draft.tolist() == [3, 1, 1, 4]
    assert SHARED.is_shared.tolist() == [True, True, False, True]
    assert SHARED.to_target.tolist() == [-1, 1, -1, 0, 3]


def test_what_the_draft_lacks_is_read_as_the_longest_ending_it_has():
    shared = vocabularies.translate_vocabulary(
        [b"x", b"ing", b"g", b"go", b""], [b"going", b"dog", b"cat", b"go", None], unknown_id=3
    )
    assert shared.to_draft.tolist() == [1, 2, 3, 3, 3]
    assert shared.is_shared.tolist() == [False, False, False, True, False]


def test_padded_vocabularies_of_one_tokenizer_share_everything_but_the_padding():
    tokens = [b"a", b"b", b"c"]
    shared = vocabularies.translate_vocabulary(tokens, [*tokens, None, None])
    assert shared.to_draft.tolist() == [0, 1, 2, 0, 0]
    assert shared.is_shared.tolist() == [True, True, True, False, False]


def test_pairs_that_are_given_come_before_pairs_of_equal_text():
    shared = vocabularies.translate_vocabulary(["a", "b"], ["a", "b"], same=[(0, 1)])
    assert shared.to_draft.tolist() == [0, 0]  # nothing else ends like a: the unknown id
    assert shared.is_shared.tolist() == [False, True]
    assert shared.to_target.tolist() == [1, -1]


texts = st.lists(st.none() | st.binary(max_size=3), min_size=1, max_size=12)


@hypothesis.given(texts, texts, st.data())
def test_pairs_are_one_to_one_and_of_equal_text(draft, target, data):
    unknown = data.draw(st.integers(0, len(draft) - 1))
    common = ({*draft} & {*target}) - {None, b""}
    if not common:
        with pytest.raises(ValueError, match="share no token"):
            vocabularies.translate_vocabulary(draft, target, unknown_id=unknown)
        return
    shared = vocabularies.translate_vocabulary(draft, target, unknown_id=unknown)
    to_draft, is_shared, to_target = (array.tolist() for array in shared)
    assert {target[i] for i in range(len(target)) if is_shared[i]} == common
    for index, text in enumerate(target):
        own = to_draft[index]
        if is_shared[index]:
            assert to_target[own] == index
            assert draft[own] == text
        else:
            endings = [e for e in draft if e and text is not None and text.endswith(e)]
            longest = max(endings, key=len, default=None)
            assert own == unknown if longest is None else draft[own] == longest
    assert sum(index >= 0 for index in to_target) == sum(is_shared) == len(common)


# ---- The law


@pytest.mark.parametrize("setting", SETTINGS[1:])
def test_draft_tokens_have_the_restricted_law_and_report_it(setting):
    """All draws enumerated; the text holds a token that the draft does not have."""
    text = [0, 2, 1]
    outcomes = enumeration.exact_proposals(jaxsd.model_drafter(MODEL, 2), PARAMS, text, setting)
    enumeration.assert_laws_are_reported(outcomes)
    for tokens, _, probs, _ in outcomes:
        assert 2 not in tokens
        for place, row in enumerate(probs):
            want = slow_row([*text, *tokens[:place].tolist()], setting)
            np.testing.assert_allclose(row, want, atol=1e-6)


@pytest.mark.parametrize("num_shared", [1, 2])
def test_a_whole_round_has_exactly_the_targets_law(num_shared):
    """Target of three tokens, draft of two, one or both shared; K = 2, all draws enumerated."""
    target, draft = testing.MarkovModel(3, 2), testing.MarkovModel(2, 2)
    shared = vocabularies.translate_vocabulary(
        ["x", "z"], ["y", "z", "x" if num_shared == 2 else "w"]
    )
    weights = vocabularies.TranslatedParams(draft.init(jax.random.key(4)), shared)
    assert int(shared.is_shared.sum()) == num_shared
    params = {"target": target.init(jax.random.key(3)), "draft": weights}
    drafter = jaxsd.model_drafter(vocabularies.shared_vocabulary_model(draft), 2)
    small = jaxsd.speculative(target, drafter, max_len=8)
    state = small.start(params, [[1, 0]], None, KEY, sampling=jaxsd.Sampling(0.8))

    def conditional(text):
        logits = reference.markov_logits(params["target"], [1, 0, *text], 2)
        return reference.probabilities(logits, 0.8, 0, 1.0)[0]

    law = enumeration.exact_round(small, params, state)
    assert enumeration.distance(law, conditional, 3) <= 1e-6


def test_decoder_keeps_the_targets_law_in_mixed_batches():
    """Ragged prompts, greedy, sampled and filtered rows, ends; false alarm 1e-6."""
    report = testing.check_decoder(
        decoder(), TARGET, PARAMS, [[2, 0, 1], [2]], sampling=SETTINGS, eos_id=EOS, num_samples=2000
    )
    assert report, report


def test_a_law_that_is_not_renormalised_is_condemned():
    """Planted: what the draft drew outside the shared tokens is lost, and not drawn again."""
    true = jaxsd.model_drafter(MODEL, 2)

    def leaking(*arguments):
        proposal = true.propose(*arguments)
        return proposal._replace(probs=0.8 * proposal.probs)

    outcomes = enumeration.exact_proposals(
        true._replace(propose=leaking), PARAMS, [0, 2, 1], SETTINGS[1]
    )
    with pytest.raises(AssertionError):
        enumeration.assert_laws_are_reported(outcomes)


# ---- The model


def test_every_token_shared_is_the_draft_itself():
    shared = vocabularies.translate_vocabulary(list("abcde"), list("abcde"))
    params = vocabularies.TranslatedParams(DRAFT_WEIGHTS, shared)
    tokens, positions = jnp.array([[4, 0, 3]]), jnp.array([[0, 1, 2]])
    cache = DRAFT.init_cache(1, 4)
    got = MODEL.apply(params, tokens, positions, cache)
    want = DRAFT.apply(DRAFT_WEIGHTS, tokens, positions, cache)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_probabilities_stay_a_law_where_constraints_forbid_all_shared_tokens(temperature, dtype):
    weights = vocabularies.TranslatedParams(DRAFT_WEIGHTS.astype(dtype), SHARED)
    logits, _ = MODEL.apply(weights, jnp.array([[0]]), jnp.array([[0]]), DRAFT.init_cache(1, 2))
    plain = jaxsd.probabilities(logits, jaxsd.Sampling(temperature))
    assert plain[0, 0, 2] == 0
    forbidden = jnp.where(SHARED.is_shared[None, None], -jnp.inf, logits)
    left = jaxsd.probabilities(forbidden, jaxsd.Sampling(temperature))
    np.testing.assert_array_equal(left[0, 0], [0, 0, 1, 0])


def test_no_second_call_traces_anything_again():
    prompts, lengths = np.array([[2, 0, 1], [1, 0, 0]], np.int32), np.array([3, 1])
    decoder().generate(PARAMS, prompts, lengths, KEY)
    first = dict(TRACES)
    other = SHARED._replace(is_shared=~SHARED.is_shared)
    weights = {**PARAMS, "draft": vocabularies.TranslatedParams(-DRAFT_WEIGHTS, other)}
    decoder().generate(weights, prompts + 1, None, KEY, sampling=jaxsd.Sampling(0.7, 2, 0.9))
    assert dict(TRACES) == first


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((["a"], ["b"]), {}, "share no token"),
        ((["a"], [b"a"]), {}, "share no token"),
        ((["a", 3], ["a"]), {}, r"draft_tokens\[1\]=3 must be bytes"),
        ((["a"], [("a",)]), {}, r"target_tokens\[0\]=\('a',\) must be bytes"),
        ((["a"], ["a"]), {"same": [(0, 1)]}, r"same has \(0, 1\); wanted ids in 0..0"),
        ((["a"], ["a"]), {"same": [(-1, 0)]}, r"same has \(-1, 0\)"),
        ((["a"], ["a"]), {"unknown_id": 1}, "unknown_id=1 must be in 0..0"),
    ],
)
def test_wrong_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        vocabularies.translate_vocabulary(*arguments, **options)


def test_a_vocabulary_that_does_not_fit_the_models_is_refused():
    short = vocabularies.translate_vocabulary(["a", "b"], TARGET_TOKENS)
    weights = vocabularies.TranslatedParams(DRAFT_WEIGHTS, short)
    with pytest.raises(ValueError, match="logits are over 5 tokens, its vocabulary has 2"):
        decoder().generate({**PARAMS, "draft": weights}, [[1]], None, KEY)
    long = vocabularies.translate_vocabulary(DRAFT_TOKENS, [*TARGET_TOKENS, None])
    weights = vocabularies.TranslatedParams(DRAFT_WEIGHTS, long)
    with pytest.raises(ValueError, match="vocabulary has 5 tokens, the target's 4"):
        decoder().generate({**PARAMS, "draft": weights}, [[1]], None, KEY)
