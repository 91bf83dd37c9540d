"""Speculation inside the draft: the draft's exact law, the passes it takes, its cache."""

import collections
import functools
import math

import enumeration
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import test_compile

import jaxsd
from jaxsd import cascades, models, ngrams, testing

VOCAB, EOS, MAX_LEN, K, WIDTH = 4, 3, 22, 4, 2
MODEL = testing.MarkovModel(VOCAB, 2)
TARGET, DRAFT = (np.asarray(MODEL.init(jax.random.key(seed))) for seed in (0, 1))
TABLE = ngrams.ngram_table(
    [[0, 1, 2, 0, 1, 2, 3], [2, 0, 1, 1, 0, 2, 0, 1, 2, 3]], VOCAB, 3, min_count=1
)
PARAMS = {"target": TARGET, "draft": DRAFT, "ngram": TABLE}
KEY = jax.random.key(3)
SETTINGS = [jaxsd.Sampling(0.0), jaxsd.Sampling(1.0), jaxsd.Sampling(0.7, 3, 0.8)]
PROMPTS = np.array([[3, 1, 0, 1, 3], [2, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 2, 1, 2, 0]], np.int32)
LENGTHS = np.array([5, 3, 1, 4], np.int32)


TRACES = collections.Counter()


class Counted:
    """The draft model, counting how often it is traced, by block length."""

    init_cache = MODEL.init_cache

    def apply(self, params, tokens, positions, cache):
        TRACES[tokens.shape[1]] += 1
        return MODEL.apply(params, tokens, positions, cache)


@functools.cache
def decoder(name):
    drafters = {
        "model": lambda: jaxsd.model_drafter(MODEL, K),
        "cascade": lambda: cascades.cascade_drafter(Counted(), ngrams.ngram_drafter(WIDTH), K),
    }
    return jaxsd.speculative(
        MODEL, drafters[name](), jaxsd.block_verification, max_len=MAX_LEN, eos_id=EOS
    )


# ---- The law


TOY = testing.MarkovModel(2, 2)
TOY_PARAMS = {
    "target": TOY.init(jax.random.key(0)),
    "draft": TOY.init(jax.random.key(1)),
    "ngram": ngrams.ngram_table([[0, 1, 1, 0, 1, 0, 0, 1]], 2, 3, min_count=1),
}


def toy_row(name, text, setting):
    logits = reference.markov_logits(TOY_PARAMS[name], text, 2)
    return reference.probabilities(logits, *setting)[0]


@pytest.mark.parametrize(
    ("inner", "num_tokens", "setting"),
    [
        (jaxsd.prompt_lookup(2), 2, jaxsd.Sampling(1.5)),  # one pass may bring more than K
        (ngrams.ngram_drafter(1), 2, jaxsd.Sampling(0.8)),
    ],
)
def test_tokens_have_exactly_the_draft_models_law_and_report_it(inner, num_tokens, setting):
    """All draws of the inner rounds enumerated: P(tokens) = product of the rows, to 1e-6, and the
    rows are the draft model's own. One pass suffices, or two do."""
    text = [1, 0, 1]
    drafter = cascades.cascade_drafter(TOY, inner, num_tokens)
    outcomes = enumeration.exact_proposals(drafter, TOY_PARAMS, text, setting)
    enumeration.assert_laws_are_reported(outcomes)
    for tokens, _, probs, _ in outcomes:
        for place, row in enumerate(probs):
            want = toy_row("draft", [*text, *tokens[:place].tolist()], setting)
            np.testing.assert_allclose(row, want, atol=1e-6)


def test_decoder_keeps_the_targets_law_in_mixed_batches():
    """Ragged prompts, greedy, sampled and filtered rows, ends; false alarm 1e-6."""
    report = testing.check_decoder(
        decoder("cascade"),
        MODEL,
        PARAMS,
        [[2, 0, 1], [1]],
        sampling=SETTINGS,
        eos_id=EOS,
        num_new_tokens=3,
        num_samples=2000,
    )
    assert report, report


@pytest.mark.parametrize("fault", ["accepts everything", "rows one too late"])
def test_planted_faults_are_condemned(fault):
    def gullible(key, target_probs, draft):
        bonus = jaxsd.categorical(key, target_probs[-1])
        return jaxsd.Verdict(jnp.append(draft.tokens, bonus), jnp.int32(draft.tokens.size))

    verifier = gullible if fault == "accepts everything" else jaxsd.rejection_sampling
    drafter = cascades.cascade_drafter(TOY, ngrams.ngram_drafter(1), 2, verifier=verifier)
    if fault == "rows one too late":
        true = drafter.propose

        def late(*arguments):
            proposal = true(*arguments)
            return proposal._replace(probs=jnp.roll(proposal.probs, 1, axis=1))

        drafter = drafter._replace(propose=late)
    outcomes = enumeration.exact_proposals(drafter, TOY_PARAMS, [1, 0, 1], jaxsd.Sampling(0.8))
    with pytest.raises(AssertionError):
        enumeration.assert_laws_are_reported(outcomes)


# ---- What it drafts and how many passes that takes


def slow_cascade(history, num_read):
    """Greedy: what the cache holds of text and draft when K tokens are drafted, and the passes."""
    text, passes = list(history), 0
    num_read = min(num_read, len(history) - 1)
    while len(text) < len(history) + K:
        missed = max(len(text) - 1 - num_read, 0)
        assert missed <= 1
        accepted = []
        for _ in range(WIDTH - missed):
            proposed = greedy_ngram(*([-1, *text, *accepted][-2:]))
            if greedy_draft(text + accepted) != proposed:
                break
            accepted.append(proposed)
        num_read = len(text) + len(accepted)
        text += [*accepted, greedy_draft(text + accepted)]
        passes += 1
    end = len(history) + K
    return min(num_read, end), passes


def greedy_draft(text):
    return int(np.argmax(reference.markov_logits(DRAFT, text, 2)))


@functools.cache
def greedy_ngram(*context):
    return int(np.argmax(ngram_law(TABLE, jnp.array(context))))


ngram_law = jax.jit(ngrams.ngram_law)


def test_passes_equal_a_slow_recount_and_counts_those_of_a_plain_draft():
    """Greedy rows: the cascade drafts what model_drafter drafts, in the passes that a slow loop
    takes, over whole generations; with a target that takes all, some or nothing of it."""
    for target in (DRAFT, DRAFT + 0.6 * TARGET, -DRAFT):
        params = {**PARAMS, "target": target}
        plain = decoder("model").generate(params, PROMPTS, LENGTHS, KEY)
        state = decoder("cascade").start(params, PROMPTS, LENGTHS, KEY)
        assert state.drafter_state.num_read.tolist() == LENGTHS.tolist()
        texts = [PROMPTS[row, : LENGTHS[row]].tolist() for row in range(4)]
        reads, passes = list(LENGTHS), [0] * 4
        for _ in range(MAX_LEN):
            # Rows that are done draft on, to no avail.
            done = [slow_cascade(text, reads[row]) for row, text in enumerate(texts)]
            most = max(more for _, more in done)
            for row, (num_read, more) in enumerate(done):
                # A row that waits for others reads its last token meanwhile.
                reads[row] = num_read if more == most else len(texts[row]) + K
                passes[row] += more
            state = decoder("cascade").run(params, state, np.int32(1))
            lengths = np.asarray(state.lengths)
            texts = [np.asarray(state.tokens)[row, : lengths[row]].tolist() for row in range(4)]
            assert state.drafter_state.num_passes.tolist() == passes
            assert state.drafter_state.num_read.tolist() == reads
            if np.all(state.done):
                break
        np.testing.assert_array_equal(state.tokens, plain.tokens)
        for got, want in zip(state.stats, plain.stats, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("num_tokens", "width"), [(5, 2), (3, 4)])
def test_a_draft_that_repeats_itself_takes_the_fewest_passes(num_tokens, width):
    """A counting draft and a prompt that counted round: every inner proposal stands."""
    counting = np.zeros(DRAFT.shape, np.float32)
    for last in range(VOCAB):
        counting[:, last, (last + 1) % VOCAB] = 5.0
    drafter = cascades.cascade_drafter(MODEL, jaxsd.prompt_lookup(width), num_tokens)
    prompt = jnp.array([[2, 3, 0, 1, 2, 3, 0, 1]])
    lengths = jnp.array([8])
    params = {"draft": jnp.asarray(counting)}
    state = drafter.prefill(params, drafter.init(params, 1, 8), prompt, lengths)
    sampling = jaxsd.Sampling(jnp.zeros(1), jnp.zeros(1, jnp.int32), jnp.ones(1))
    proposal = drafter.propose(params, state, prompt, lengths, KEY[None], sampling)
    want = [(2 + i) % VOCAB for i in range(num_tokens)]
    assert proposal.tokens.tolist() == [want]
    assert proposal.state.num_passes.tolist() == [math.ceil(num_tokens / (width + 1))]


def test_no_second_call_traces_anything_again():
    call = functools.partial(decoder("cascade").generate, PARAMS)
    call(PROMPTS, LENGTHS, KEY)
    first = dict(TRACES)
    # Prefill; the shape of the logits; the loop's own pass, which is the first of a round as well.
    assert set(first) == {5, 1, WIDTH + 1}
    call(PROMPTS + 1, None, KEY, sampling=jaxsd.Sampling(0.7, 5, 0.9))
    call(PROMPTS, LENGTHS, jax.random.key(9), max_new_tokens=[1, 2, 3, 0])
    assert dict(TRACES) == first


def test_loop_within_the_loop_copies_no_cache():
    """Neither the target's nor the draft's, on CPU; every buffer is the caller's own."""
    draft = models.language_model(test_compile.DRAFT)
    drafter = cascades.cascade_drafter(draft, jaxsd.prompt_lookup(2), 3)
    decoder, params, state = test_compile.abstract_loop(drafter, 2)
    compiled = decoder.run.lower(params, state, jaxsd.UNTIL_DONE).compile()
    text = compiled.as_text()
    assert text.count(" while(") >= 2
    assert test_compile.cache_copies(text, state) == []
    own = state._replace(target_cache=state.drafter_state.cache)
    assert test_compile.cache_copies(text, own) == []
    sizes = compiled.memory_analysis()
    caches = jax.tree.leaves((state.target_cache, state.drafter_state))
    if sizes is not None:
        assert sizes.alias_size_in_bytes >= sum(leaf.size * leaf.dtype.itemsize for leaf in caches)


# ---- Wrong arguments


LOSSY = functools.partial(jaxsd.rejection_sampling)
LOSSY.is_lossy = True


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (jaxsd.prompt_lookup(2), 0), "num_tokens=0 must be"),
        (lambda: (jaxsd.prompt_lookup(2), 2.0), "num_tokens=2.0 must be"),
        (lambda: (jaxsd.no_drafter(), 2), "inner_drafter must propose at least one token"),
        (lambda: (jaxsd.tree_drafter(MODEL, (-1, -1)), 2), "inner_drafter must propose chains"),
        (lambda: (jaxsd.prompt_lookup(2), 2, jaxsd.gumbel_coupling), "verifier must be lossless"),
        (lambda: (jaxsd.prompt_lookup(2), 2, LOSSY), "verifier must be lossless"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    inner, num_tokens, *verifier = make()
    options = {"verifier": verifier[0]} if verifier else {}
    with pytest.raises(ValueError, match=message):
        cascades.cascade_drafter(MODEL, inner, num_tokens, **options)


@pytest.mark.parametrize(
    ("inner", "verifier", "message"),
    [
        (jaxsd.model_drafter(MODEL, 1), jaxsd.rejection_sampling, "inner_drafter must keep no"),
        (jaxsd.prompt_lookup(1), jaxsd.gumbel_coupling, "a cascade shares no noise"),
        (ngrams.ngram_drafter(1), jaxsd.rejection_sampling, "vocabulary has 2 tokens, the draft"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_anything_runs(inner, verifier, message):
    wrong = jaxsd.speculative(
        MODEL, cascades.cascade_drafter(MODEL, inner, 2), verifier, max_len=MAX_LEN
    )
    with pytest.raises(ValueError, match=message):
        wrong.generate({**PARAMS, "ngram": TOY_PARAMS["ngram"]}, PROMPTS, LENGTHS, KEY)
