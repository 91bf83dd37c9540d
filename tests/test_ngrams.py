"""N-gram tables against counting in a dict, and the drafter that reads them against exact laws."""

import collections
import functools

import enumeration
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jaxsd
from jaxsd import ngrams, testing

EOS, MAX_LEN = 3, 16
MODEL = testing.MarkovModel(4, 2)
DOCUMENTS = [[0, 1, 2, 0, 1, 2, 3], [2, 0, 1, 1, 0, 2, 0, 1, 2, 3], [1, 2, 2, 0, 1, 2]]
TABLE = ngrams.ngram_table(DOCUMENTS, 4, 3, min_count=1, novelty=1.0)
TARGET = MODEL.init(jax.random.key(0))
PARAMS = {"target": TARGET, "ngram": TABLE}
SETTINGS = [
    jaxsd.Sampling(0.0),
    jaxsd.Sampling(1.0),
    jaxsd.Sampling(0.7, 3, 0.8),
]
KEY = jax.random.key(5)


# ---- The table


def slow_contexts(documents, order, num_contexts, min_count):
    """What followed every context that is kept, counted one token at a time."""
    follows = collections.defaultdict(collections.Counter)
    for document in documents:
        for end, token in enumerate(document):
            for size in range(1, min(order - 1, end) + 1):
                follows[tuple(document[end - size : end])][token] += 1
    total = {context: sum(counts.values()) for context, counts in follows.items()}
    kept = sorted((c for c in follows if total[c] >= min_count), key=lambda c: (-total[c], len(c)))
    return {context: follows[context] for context in kept[:num_contexts]}


def slow_law(documents, contexts, vocab_size, context, num_successors, novelty):
    """The docstring's equation, and how long the longest context is that is known."""
    counts = collections.Counter(token for document in documents for token in document)
    size = sum(counts.values()) + novelty * len(counts)
    law = np.array([counts[token] / size for token in range(vocab_size)])
    law += (1 - law.sum()) / vocab_size
    depth = 0
    for length in range(1, len(context) + 1):
        counts = contexts.get(tuple(context[-length:]))
        if counts is None:
            continue
        depth = length
        size = sum(counts.values()) + novelty * len(counts)
        best = sorted(counts, key=lambda token: (-counts[token], token))[:num_successors]
        share = np.zeros(vocab_size)
        share[best] = [counts[token] / size for token in best]
        law = share + (1 - share.sum()) * law
    return law, depth


read = jax.jit(jax.vmap(ngrams._read, in_axes=(None, 0)))


@pytest.mark.parametrize(
    ("vocab_size", "order", "num_contexts", "num_successors", "min_count", "novelty"),
    [
        (3, 2, None, 8, 1, 1.0),
        (5, 4, None, 2, 1, 4.0),
        (40, 3, 120, 3, 2, 0.5),
        (200, 5, None, 16, 1, 2.0),  # thousands of contexts: full buckets, second choices
    ],
)
def test_table_holds_the_law_of_a_slow_count(
    vocab_size, order, num_contexts, num_successors, min_count, novelty
):
    rng = np.random.default_rng(vocab_size)
    sizes = rng.integers(0, 600, 6)
    # Squares crowd at small tokens, as in text.
    documents = [(rng.random(size) ** 2 * vocab_size).astype(np.int32) for size in sizes]
    options = {"num_contexts": num_contexts, "num_successors": num_successors}
    options |= {"min_count": min_count, "novelty": novelty}
    table = ngrams.ngram_table(documents, vocab_size, order, **options)
    documents = [document.tolist() for document in documents]
    if num_contexts is not None:
        # Which of equally frequent contexts is kept is not for the slow count to say.
        stored = np.asarray(table.contexts).reshape(-1, order - 1)
        stored = {tuple(t for t in row if t >= 0) for row in stored.tolist()} - {()}
        known = slow_contexts(documents, order, None, min_count)
        total = {context: sum(counts.values()) for context, counts in known.items()}
        assert len(stored) == num_contexts < len(known)
        left_out = max(total[context] for context in known if context not in stored)
        assert min(total[context] for context in stored) >= left_out
        known = {context: known[context] for context in stored}
    else:
        known = slow_contexts(documents, order, None, min_count)
    texts = [list(context) for context in known][:1500] + rng.integers(
        0, vocab_size, (200, order - 1)
    ).tolist()
    padded = np.array([[-1] * (order - 1 - len(text)) + text for text in texts], np.int32)
    laws, depths = read(table, padded)
    for text, law, depth in zip(texts, np.asarray(laws), np.asarray(depths), strict=True):
        want, known_depth = slow_law(documents, known, vocab_size, text, num_successors, novelty)
        assert depth == known_depth
        np.testing.assert_allclose(law, want, rtol=1e-5, atol=1e-7)
        assert law.min() > 0


def test_every_context_is_found_however_many_there_are():
    """Every place of the hash table, read through the public law; none is lost to a full bucket."""
    rng = np.random.default_rng(0)
    table = ngrams.ngram_table([rng.integers(0, 5000, 60_000)], 5000, 3, min_count=1)
    stored = np.asarray(table.contexts).reshape(-1, 2)
    stored = stored[stored[:, -1] >= 0]
    assert len(np.unique(stored, axis=0)) == len(stored) == 50_000
    assert len(stored) > 0.3 * table.contexts.size / 2  # and not by wasting memory
    lone = stored[:: len(stored) // 3000]
    depths = jax.jit(jax.vmap(lambda c: ngrams._read(table, c)[1]))(lone)
    np.testing.assert_array_equal(depths, (lone >= 0).sum(1))


def test_buckets_are_the_same_on_host_and_device():
    contexts = np.random.default_rng(1).integers(-1, 2**31 - 1, (500, 3)).astype(np.int32)
    for seed in ngrams._SEEDS:
        host = ngrams._bucket(contexts, seed, 977)
        np.testing.assert_array_equal(host, ngrams._bucket(jnp.asarray(contexts), seed, 977))
        # Each of the three tokens counts (one that does not would crowd the buckets).
        for column in range(3):
            other = contexts.copy()
            other[:, column] += 1
            assert np.mean(host == ngrams._bucket(other, seed, 977)) < 0.05


def test_contexts_do_not_reach_into_the_next_document():
    table = ngrams.ngram_table([[0, 1], [2, 3]], 4, 2, min_count=1)
    stored = set(np.asarray(table.contexts).reshape(-1).tolist())
    assert stored == {-1, 0, 2}


# ---- The drafter


TRACES = collections.Counter()


class Counted:
    """The target, counting how often it is traced, by block length."""

    init_cache = MODEL.init_cache

    def apply(self, params, tokens, positions, cache):
        TRACES[tokens.shape[1]] += 1
        return MODEL.apply(params, tokens, positions, cache)


@functools.cache
def decoder(name):
    drafters = {
        "none": jaxsd.no_drafter,
        "drawn": lambda: ngrams.ngram_drafter(3),
        "known": lambda: ngrams.ngram_drafter(3, chosen=True, min_context=2),
        "noisy": lambda: ngrams.ngram_drafter(3, shares_noise=True),
        "noise": jaxsd.no_drafter,
    }
    verifier = jaxsd.gumbel_coupling if name in ("noisy", "noise") else jaxsd.block_verification
    return jaxsd.speculative(Counted(), drafters[name](), verifier, max_len=MAX_LEN, eos_id=EOS)


@pytest.mark.parametrize("setting", SETTINGS)
def test_reported_law_is_that_of_the_tokens_and_of_the_table(setting):
    """By enumeration: P(tokens) = product of the rows, and a row is the slow law as sampled."""
    text = [2, 0, 1]
    outcomes = enumeration.exact_proposals(ngrams.ngram_drafter(2), PARAMS, text, setting)
    enumeration.assert_laws_are_reported(outcomes)
    contexts = slow_contexts(DOCUMENTS, 3, None, 1)
    for tokens, _, probs, proposed in outcomes:
        assert proposed.all()
        for place, row in enumerate(probs):
            context = [*text, *tokens[:place].tolist()][-2:]
            law, _ = slow_law(DOCUMENTS, contexts, 4, context, 16, 1.0)
            want, margin = reference.probabilities(np.log(law), *setting)
            assert margin > 1e-4
            np.testing.assert_allclose(row, want, atol=1e-6)


def test_chosen_tokens_are_the_most_probable_ones_and_one_hot():
    drafter = ngrams.ngram_drafter(3, chosen=True)
    [(tokens, weight, probs, _)] = enumeration.exact_proposals(
        drafter, PARAMS, [2, 0, 1], jaxsd.Sampling(1.3)
    )
    assert weight == 1
    np.testing.assert_array_equal(probs, np.eye(4)[tokens])
    assert tokens.tolist() == [2, 3, 2]  # 0 1 -> 2, 1 2 -> 3, and 2 is the most frequent of all


def test_a_whole_round_has_exactly_the_targets_law():
    """Drafting, verifying and committing, all draws enumerated; V = 2, K = 2."""
    model = testing.MarkovModel(2, 2)
    table = ngrams.ngram_table([[0, 1, 1, 0, 1, 0, 0, 1]], 2, 3, min_count=1)
    params = {"target": model.init(jax.random.key(2)), "ngram": table}
    small = jaxsd.speculative(model, ngrams.ngram_drafter(2), max_len=8)
    state = small.start(params, [[0, 1]], None, KEY, sampling=jaxsd.Sampling(0.8))

    def conditional(text):
        logits = reference.markov_logits(params["target"], [0, 1, *text], 2)
        return reference.probabilities(logits, 0.8, 0, 1.0)[0]

    law = enumeration.exact_round(small, params, state)
    assert {len(text) for text in law} == {1, 2, 3}
    assert enumeration.distance(law, conditional, 3) <= 1e-6


@pytest.mark.parametrize("name", ["drawn", "known"])
def test_decoders_keep_the_targets_law_in_mixed_batches(name):
    """Ragged prompts, greedy, sampled and filtered rows, ends; false alarm 1e-6 per decoder."""
    report = testing.check_decoder(
        decoder(name), MODEL, PARAMS, [[2, 0, 1], [1]], sampling=SETTINGS, eos_id=EOS
    )
    assert report, report


def test_a_law_that_was_not_drawn_from_is_condemned():
    """Planted: tokens drawn at temperature 1/2, the law of temperature 1 reported."""
    true = ngrams.ngram_drafter(2)

    def lying(*arguments):
        proposal = true.propose(*arguments)
        probs = jnp.sqrt(proposal.probs)
        return proposal._replace(probs=probs / probs.sum(-1, keepdims=True))

    drafter, setting = true._replace(propose=lying), jaxsd.Sampling(0.5)
    with pytest.raises(AssertionError):
        enumeration.assert_laws_are_reported(
            enumeration.exact_proposals(drafter, PARAMS, [2, 0, 1], setting)
        )


PROMPTS = np.array([[2, 0, 1, 2, 2], [1, 0, 0, 0, 0], [0, 1, 2, 0, 0]], np.int32)
LENGTHS = np.array([5, 1, 3], np.int32)


def proposer(chosen_from):
    """What the drafter proposes for a greedy row, slowly; nothing from an unknown context on."""
    contexts = slow_contexts(DOCUMENTS, 3, None, 1)

    def propose(history):
        drafted = []
        for _ in range(3):
            law, depth = slow_law(DOCUMENTS, contexts, 4, [*history, *drafted][-2:], 16, 1.0)
            if depth < chosen_from:
                break
            drafted.append(int(np.argmax(law)))
        return drafted

    return propose


@pytest.mark.parametrize(("name", "min_context"), [("drawn", 0), ("known", 2)])
def test_greedy_text_and_counts_equal_a_slow_recount(name, min_context):
    """A ragged batch with a limit per row; what is not proposed does not count as drafted."""
    limits = np.array([9, 15, 4])
    for target in (TARGET, -TARGET):
        params = {**PARAMS, "target": target}
        out = decoder(name).generate(params, PROMPTS, LENGTHS, KEY, max_new_tokens=limits)
        for row, limit in enumerate(limits):
            prompt = PROMPTS[row, : LENGTHS[row]].tolist()
            want, counts = reference.greedy_rounds(
                lambda history, target=target: reference.markov_logits(target, history, 2),
                proposer(min_context),
                prompt,
                num_tokens=3,
                max_new_tokens=int(limit),
                max_len=MAX_LEN,
                eos_ids=(EOS,),
            )
            assert out.tokens[row, : out.lengths[row]].tolist() == want
            got = {field: np.asarray(getattr(out.stats, field))[row].tolist() for field in counts}
            assert got == counts


def test_shared_noise_gives_the_text_of_plain_decoding():
    sampling = jaxsd.Sampling(np.float32([1.0, 0.0, 0.7]), np.array([0, 0, 3]))
    plain = decoder("noise").generate(PARAMS, PROMPTS, LENGTHS, KEY, sampling=sampling)
    out = decoder("noisy").generate(PARAMS, PROMPTS, LENGTHS, KEY, sampling=sampling)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    assert int(out.stats.num_accepted.sum()) > 0
    wrong = jaxsd.speculative(MODEL, ngrams.ngram_drafter(1, shares_noise=True), max_len=8)
    with pytest.raises(ValueError, match="shares_noise=True of the drafter must fit"):
        wrong.generate(PARAMS, PROMPTS, LENGTHS, KEY)


def test_another_table_of_the_same_shapes_traces_nothing_again():
    decoder("drawn").generate(PARAMS, PROMPTS, LENGTHS, KEY)
    first = dict(TRACES)
    params = {**PARAMS, "ngram": TABLE._replace(unigram=TABLE.unigram[::-1])}
    sampling = jaxsd.Sampling(0.8, 3, 0.9)
    decoder("drawn").generate(params, PROMPTS + 1, None, KEY, sampling=sampling)
    params = {**PARAMS, "ngram": jax.tree.map(np.asarray, TABLE)}
    decoder("drawn").generate(params, PROMPTS, LENGTHS, KEY, max_new_tokens=[1, 2, 3])
    assert dict(TRACES) == first


# ---- Files


def test_a_saved_table_comes_back_as_it_was(tmp_path):
    path = tmp_path / "table.npz"
    ngrams.save_ngram_table(TABLE, path)
    back = ngrams.load_ngram_table(path)
    for field, array in zip(back._fields, back, strict=True):
        np.testing.assert_array_equal(array, getattr(TABLE, field))
        assert array.dtype == getattr(TABLE, field).dtype
    assert [one.name for one in tmp_path.iterdir()] == ["table.npz"]


def test_a_table_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "table.npz"
    ngrams.save_ngram_table(TABLE, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="table has shapes"):
        ngrams.save_ngram_table(TABLE._replace(unigram=np.zeros(())), path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probs": None}, r"it lacks \['probs'\]"),
        ({"unigram": np.float64([0.25] * 4)}, "table has types"),
        ({"backoff": np.zeros((3, 4), np.float32)}, "table has shapes"),
        ({"successors": np.full(TABLE.successors.shape, 4, np.int32)}, "tokens outside 0..3"),
        ({"contexts": np.full(TABLE.contexts.shape, -2, np.int32)}, "tokens outside -1..3"),
        ({"unigram": np.float32([0.5, 0.5, 0.5, 0.5])}, "do not sum to 1"),
        ({"backoff": np.full(TABLE.backoff.shape, 2, np.float32)}, "do not sum to 1"),
        ({"probs": np.array([object()])}, "holds no n-gram table"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, change, message):
    arrays = {field: np.asarray(array) for field, array in TABLE._asdict().items()} | change
    path = tmp_path / "table.npz"
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(ValueError, match=message):
        ngrams.load_ngram_table(path)


@pytest.mark.parametrize("keep", [0, 20, 300, -1])
def test_a_damaged_file_is_refused(tmp_path, keep):
    path = tmp_path / "table.npz"
    ngrams.save_ngram_table(TABLE, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="holds no n-gram table"):
        ngrams.load_ngram_table(path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    np.save(tmp_path / "table.npy", np.zeros(3))
    with pytest.raises(ValueError, match="holds no n-gram table"):
        ngrams.load_ngram_table(tmp_path / "table.npy")
    with pytest.raises(FileNotFoundError):
        ngrams.load_ngram_table(tmp_path / "nothing.npz")


# ---- Wrong arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ngrams.ngram_drafter(0), "num_tokens=0 must be"),
        (lambda: ngrams.ngram_drafter(True), "num_tokens=True must be"),
        (lambda: ngrams.ngram_drafter(2, min_context=-1), "min_context=-1 must be"),
        (lambda: ngrams.ngram_table([], 4), "documents must hold at least one token"),
        (lambda: ngrams.ngram_table([[]], 4), "documents must hold at least one token"),
        (lambda: ngrams.ngram_table([[0], [4]], 4), r"documents\[1\] has token 4; wanted 0..3"),
        (lambda: ngrams.ngram_table([[0, -1]], 4), r"documents\[0\] has token -1"),
        (lambda: ngrams.ngram_table([[0.5]], 4), r"documents\[0\] of shape \(1,\) and type float"),
        (lambda: ngrams.ngram_table([[[1]]], 4), r"documents\[0\] of shape \(1, 1\)"),
        (lambda: ngrams.ngram_table([[1]], 0), "vocab_size=0 must be"),
        (lambda: ngrams.ngram_table([[1]], 4, 1), "order=1 must be"),
        (lambda: ngrams.ngram_table([[1]], 4, num_contexts=0), "num_contexts=0 must be"),
        (lambda: ngrams.ngram_table([[1]], 4, num_successors=0), "num_successors=0 must be"),
        (lambda: ngrams.ngram_table([[1]], 4, min_count=0), "min_count=0 must be"),
        (lambda: ngrams.ngram_table([[1]], 4, novelty=0), "novelty=0 must be"),
        (lambda: ngrams.ngram_table([[1]], 4, novelty=np.nan), "novelty=nan must be"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_something_else_in_place_of_a_table_is_refused():
    with pytest.raises(ValueError, match="ngram has shapes"):
        decoder("drawn").generate({**PARAMS, "ngram": TARGET}, PROMPTS, LENGTHS, KEY)
