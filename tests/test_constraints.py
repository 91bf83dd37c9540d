"""Constraints: the law of the text, speculative and plain alike; stops; grammars; log-probs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsd
from jaxsd import testing, trees

VOCAB, EOS, NEW = 4, 3, 4
MODEL = testing.MarkovModel(VOCAB, order=2)
PARAMS = {
    "target": MODEL.init(jax.random.key(0), 1.5),
    "draft": MODEL.init(jax.random.key(1), 1.5),
}
ITSELF = {"target": PARAMS["target"], "draft": PARAMS["target"]}
# A token may not follow itself, and 0 does not follow 2.
GRAMMAR = jaxsd.table_grammar([[0, 1, 2, 3], [0, -1, 2, 3], [-1, 1, -1, 3], [0, 1, 2, 3]])
PARTS = {
    "plain": (jaxsd.no_drafter(), jaxsd.rejection_sampling),
    "chain": (jaxsd.model_drafter(MODEL, 3), jaxsd.block_verification),
    "tree": (
        jaxsd.tree_drafter(MODEL, trees.balanced((2, 2))),
        jaxsd.traversal_verification,
    ),
}
CONFIDENT = jaxsd.confident_tree_drafter(MODEL, 4, depth=2, width=2), jaxsd.target_matching
BIAS = np.array([0.5, -1.0, -np.inf, 0.0], np.float32)
PENALTIES = jaxsd.Constraints(repetition_penalty=1.7, presence_penalty=0.6, frequency_penalty=0.3)
CASES = {
    "penalties": (PENALTIES, None),
    "bias and a least length": (
        jaxsd.Constraints(logit_bias=BIAS, min_new_tokens=2),
        None,
    ),
    "allowed and stops": (
        jaxsd.Constraints(
            allowed=np.array([True, True, False, True]),
            stop=jaxsd.stop_sequences([[1, 1], [0, 1, 0]]),
        ),
        None,
    ),
    "grammar": (jaxsd.Constraints(), GRAMMAR),
}


@functools.cache
def decoder(parts, has_grammar, log_probs=False, max_len=12):
    return jaxsd.speculative(
        MODEL,
        *(PARTS | {"confident tree": CONFIDENT})[parts],
        max_len=max_len,
        eos_id=EOS,
        grammar=GRAMMAR if has_grammar else None,
        log_probs=log_probs,
    )


# ---- A slow reference: one token after the other, in Python


def place_law(constraints, grammar, prompt, text, temperature):
    """The law of the next token."""
    history = [0, 0, *prompt, *text]
    logits = np.asarray(PARAMS["target"])[tuple(history[-2:])].astype(np.float64)
    for token in range(VOCAB):
        if constraints.repetition_penalty is not None and token in [*prompt, *text]:
            r = constraints.repetition_penalty
            logits[token] = logits[token] / r if logits[token] > 0 else logits[token] * r
        if constraints.presence_penalty is not None and token in text:
            logits[token] -= constraints.presence_penalty
        if constraints.frequency_penalty is not None:
            logits[token] -= constraints.frequency_penalty * text.count(token)
    if constraints.logit_bias is not None:
        logits += constraints.logit_bias
    if constraints.allowed is not None:
        logits[~constraints.allowed] = -np.inf
    if constraints.min_new_tokens is not None and len(text) < constraints.min_new_tokens:
        logits[EOS] = -np.inf
    if grammar is not None:
        state = 0
        for token in text:
            state = int(grammar.advance(jnp.int32(state), jnp.int32(token)))
        logits[~np.asarray(grammar.allowed(jnp.int32(state)))] = -np.inf
    if temperature == 0:
        return np.eye(VOCAB)[np.argmax(logits)]
    weights = np.exp((logits - logits.max()) / temperature)
    return weights / weights.sum()


def has_ended(constraints, text):
    if text and text[-1] == EOS:
        return True
    if constraints.stop is None:
        return False
    for row in constraints.stop.tolist():
        sequence = [token for token in row if token >= 0]
        if len(text) >= len(sequence) and text[-len(sequence) :] == sequence:
            return True
    return False


def law(constraints, grammar, prompt, temperature, new=NEW):
    """Every continuation of at most `new` tokens, with its probability."""
    found, open_texts = {}, {(): 1.0}
    while open_texts:
        text, mass = open_texts.popitem()
        if len(text) == new or has_ended(constraints, list(text)):
            found[text] = mass
            continue
        probs = place_law(constraints, grammar, prompt, list(text), temperature)
        for token in np.flatnonzero(probs):
            open_texts[(*text, int(token))] = mass * float(probs[token])
    return found


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", CASES)
def test_texts_have_the_law_of_the_constrained_target(name, parts):
    """Two prompts and two temperatures mixed. Chi-square, false alarm 1e-6 over the four."""
    constraints, grammar = CASES[name]
    groups = [([2], 1.0), ([1, 0, 1], 1.0), ([2], 0.0), ([1, 0, 1], 0.0)]
    count = 1000
    prompts = np.array([[*prompt, *[0] * (3 - len(prompt))] for prompt, _ in groups], np.int32)
    lengths = np.array([len(prompt) for prompt, _ in groups])
    out = decoder(parts, grammar is not None).generate(
        PARAMS,
        np.tile(prompts, (count, 1)),
        np.tile(lengths, count),
        jax.random.key(3),
        sampling=jaxsd.Sampling(np.tile([t for _, t in groups], count)),
        max_new_tokens=NEW,
        constraints=constraints,
    )
    tokens, ends = np.asarray(out.tokens), np.asarray(out.lengths)
    for index, (prompt, temperature) in enumerate(groups):
        counts = {}
        for row in range(index, len(tokens), len(groups)):
            text = tuple(tokens[row, len(prompt) : ends[row]].tolist())
            counts[text] = counts.get(text, 0) + 1
        want = law(constraints, grammar, prompt, temperature)
        judged = testing._compare_counts(name, want, counts, 1e-6 / len(groups))
        assert not judged.findings, judged.findings


@pytest.mark.parametrize("parts", ["chain", "tree", "confident tree"])
def test_a_draft_that_is_the_target_is_accepted_whole_if_it_follows_the_rules(parts):
    """Drafters are guided by the rules: with the target's weights nothing is rejected, and every
    round reaches the end of its chain or tree."""
    out = decoder(parts, True).generate(
        ITSELF,
        [[1]] * 50,
        None,
        jax.random.key(0),
        # The most probable tokens are the target's own where it is greedy.
        sampling=jaxsd.Sampling(0.0 if parts == "confident tree" else 1.0),
        max_new_tokens=8,
        constraints=PENALTIES._replace(logit_bias=BIAS),
    )
    stats = jaxsd.stats.total(out.stats)
    depth = 3 if parts == "chain" else 2
    assert int(stats.num_accepted) == depth * int(stats.num_rounds)


def test_rows_have_their_own_constraints_and_others_make_no_new_trace():
    traces = []

    class Counting(testing.MarkovModel):
        def apply(self, *args):
            traces.append(1)
            return testing.MarkovModel.apply(self, *args)

    model = Counting(VOCAB, 2)
    made = jaxsd.speculative(model, jaxsd.model_drafter(model, 2), max_len=8, eos_id=EOS)
    seen = []
    for bias in (-50.0, 50.0):
        only = np.zeros((2, VOCAB), np.float32)
        only[0, 1], only[1, 2] = bias, bias
        out = made.generate(
            PARAMS,
            [[0], [0]],
            None,
            jax.random.key(1),
            sampling=jaxsd.Sampling(1.0),
            constraints=jaxsd.Constraints(logit_bias=only, min_new_tokens=np.array([0, 7])),
        )
        texts = np.asarray(out.tokens)[:, 1:]
        seen.append(len(traces))
        if bias > 0:
            assert texts.tolist() == [[1] * 7, [2] * 7]
        else:
            assert 1 not in texts[0]
            assert 2 not in texts[1]
    assert seen[0] == seen[1] > 0


@pytest.mark.parametrize("parts", ["plain", "chain"])
def test_a_stop_sequence_ends_a_row_where_it_ends_and_not_in_its_prompt(parts):
    """A model that counts 0 1 2 0 1 2: the sequence lies across the borders of blocks."""
    weights = np.full((VOCAB,) * 3, -9.0, np.float32)
    for last in range(3):
        weights[:, last, (last + 1) % 3] = 9.0
    params = {"target": jnp.array(weights), "draft": jnp.array(weights)}
    for stop, want in (
        ([[0, 1]], [2, 0, 1]),
        ([[2, 0, 1, 2, 0]], [2, 0, 1, 2, 0]),
        ([[1, 2]], [2, 0, 1, 2]),  # 1, 2 spans prompt and text at first: not a stop
        ([[9], [0]], [2, 0]),
    ):
        out = decoder(parts, False).generate(
            params,
            [[0, 1]],
            None,
            jax.random.key(0),
            constraints=jaxsd.Constraints(stop=jaxsd.stop_sequences(stop)),
        )
        assert np.asarray(out.tokens)[0, 2 : int(out.lengths[0])].tolist() == want
        assert not np.asarray(out.tokens)[0, int(out.lengths[0]) :].any()


@pytest.mark.parametrize("parts", PARTS)
def test_log_probs_are_those_of_the_model_for_every_generated_token(parts):
    """Of the model itself, whatever the temperature and the constraints."""
    out = decoder(parts, False, log_probs=True).generate(
        PARAMS,
        [[2, 1], [0, 0]],
        [2, 1],
        jax.random.key(5),
        sampling=jaxsd.Sampling([0.7, 0.0]),
        constraints=PENALTIES,
        max_new_tokens=8,
    )
    scores = np.asarray(out.log_probs)
    table = np.asarray(jax.nn.log_softmax(PARAMS["target"]))
    for row, start in enumerate((2, 1)):
        text = np.asarray(out.tokens)[row, : int(out.lengths[row])].tolist()
        padded = [0, 0, *text]
        for place in range(out.tokens.shape[1]):
            inside = start <= place < len(text)
            want = table[tuple(padded[place : place + 3])] if inside else 0.0
            assert scores[row, place] == pytest.approx(want, abs=1e-5)
    assert decoder(parts, False).generate(PARAMS, [[1]], None, jax.random.key(0)).log_probs is None


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ({"repetition_penalty": 0.0}, "constraints.repetition_penalty=0.0 must be above 0"),
        ({"presence_penalty": math.nan}, "presence_penalty=nan must be finite"),
        ({"min_new_tokens": 1.5}, "min_new_tokens=1.5 must be whole"),
        ({"logit_bias": np.zeros(3)}, "logit_bias has 3 tokens; the vocabulary 4"),
        ({"logit_bias": np.zeros((3, 4))}, "wanted \\[V\\] or one per row, 1 of them"),
        ({"logit_bias": np.full(4, np.inf)}, "must be below inf"),
        ({"allowed": np.zeros(4, bool)}, "must be true for some token"),
        ({"stop": [[1, -1]]}, "must be padded on the left"),
        ({"frequency_penalty": [1.0, 2.0]}, "wanted a scalar or one per row, 1 of them"),
    ],
)
def test_wrong_constraints_are_refused_by_name(constraints, message):
    with pytest.raises(ValueError, match=message):
        decoder("plain", False).generate(
            PARAMS, [[1]], None, jax.random.key(0), constraints=jaxsd.Constraints(**constraints)
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jaxsd.stop_sequences([]), "at least one sequence"),
        (lambda: jaxsd.stop_sequences([[1], []]), "none empty"),
        (lambda: jaxsd.table_grammar([[1, 0]]), "must lead to states 0..0"),
        (lambda: jaxsd.table_grammar([[1, -1], [-1, -1]]), "states \\[1\\] can be reached"),
        (lambda: jaxsd.table_grammar([[0.5]]), "wanted integers"),
    ],
)
def test_wrong_stops_and_grammars_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
