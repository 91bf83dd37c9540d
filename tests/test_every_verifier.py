"""Every verifier and drafter, asked for everything at once, beside plain decoding.

Ragged prompts, greedy and sampled rows, an end of text, stop sequences across blocks, a limit and a
least length per row, penalties, biases, log-probabilities: one batch, and the law of every group of
rows is enumerated slowly in Python.
"""

import functools

import jax
import numpy as np
import pytest
import test_constraints
from test_constraints import EOS, MODEL, PARAMS, VOCAB

import jaxsd
from jaxsd import lossy, testing, trees

K, MAX_LEN, COUNT, CHANCE = 3, 9, 700, 1e-6
TABLE = jaxsd.ngram_table([[0, 1, 2, 0, 1, 2, 3], [2, 0, 1, 1, 0, 2, 3]], VOCAB, 3, min_count=1)
WEIGHTS = {**PARAMS, "ngram": TABLE}
# What the test asks for, of every row alike.
ASKED = jaxsd.Constraints(
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.2,
    logit_bias=np.array([0.3, 0.0, -0.5, 0.2], np.float32),
    stop=jaxsd.stop_sequences([[1, 1], [0, 2, 0]]),
)
# Prompt, temperature, limit, least length: a group of rows each.
GROUPS = [
    ([2], 1.0, 4, 0),
    ([1, 0, 1], 0.7, 3, 2),
    ([0, 1], 0.0, 6, 0),
    ([1, 0, 1], 0.0, 4, 3),
    ([3], 0.0, 1, 1),
]


def tree(siblings, parents=(-1, -1, 0)):
    return jaxsd.tree_drafter(MODEL, parents, siblings=siblings)


WAYS = {
    "plain": lambda: (jaxsd.no_drafter(), jaxsd.block_verification),
    "rejection": lambda: (jaxsd.model_drafter(MODEL, K), jaxsd.rejection_sampling),
    "block": lambda: (jaxsd.model_drafter(MODEL, K), jaxsd.block_verification),
    "chain recursive": lambda: (jaxsd.model_drafter(MODEL, K), jaxsd.recursive_rejection),
    "chain matching": lambda: (jaxsd.model_drafter(MODEL, K), jaxsd.target_matching),
    "coupled": lambda: (
        jaxsd.model_drafter(MODEL, K, shares_noise=True),
        jaxsd.gumbel_coupling,
    ),
    "k-seq": lambda: (tree("independent", trees.parallel(2, 2)), jaxsd.k_sequential),
    "batch": lambda: (tree("independent", trees.parallel(2, 2)), jaxsd.recursive_rejection),
    "distinct": lambda: (tree("distinct"), jaxsd.recursive_rejection),
    "traversal": lambda: (tree("distinct"), jaxsd.traversal_verification),
    "mixed": lambda: (tree("mixed"), jaxsd.recursive_rejection),
    "chosen": lambda: (tree("chosen"), jaxsd.target_matching),
    "confident": lambda: (
        jaxsd.confident_tree_drafter(MODEL, 4, depth=2, width=2),
        jaxsd.target_matching,
    ),
    "lookup": lambda: (jaxsd.prompt_lookup(K), jaxsd.block_verification),
    "n-gram": lambda: (jaxsd.ngram_drafter(K), jaxsd.block_verification),
    "early exit": lambda: (jaxsd.early_exit_drafter(MODEL, K), jaxsd.block_verification),
    "cascade": lambda: (
        jaxsd.cascade_drafter(MODEL, jaxsd.prompt_lookup(2), K),
        jaxsd.rejection_sampling,
    ),
    "lossy at nothing": lambda: (jaxsd.model_drafter(MODEL, K), lossy.over_acceptance(0.0)),
}


@functools.cache
def generation(name):
    """Every group `COUNT` times, in turns."""
    decoder = jaxsd.speculative(MODEL, *WAYS[name](), max_len=MAX_LEN, eos_id=EOS, log_probs=True)
    prompts, temperatures, limits, least = zip(*GROUPS, strict=True)
    padded = [[*prompt, *[0] * (3 - len(prompt))] for prompt in prompts]
    out = decoder.generate(
        WEIGHTS,
        np.tile(np.array(padded, np.int32), (COUNT, 1)),
        np.tile([len(prompt) for prompt in prompts], COUNT),
        jax.random.key(3),
        sampling=jaxsd.Sampling(np.tile(np.array(temperatures, np.float32), COUNT)),
        max_new_tokens=np.tile(limits, COUNT),
        constraints=ASKED._replace(min_new_tokens=np.tile(least, COUNT)),
    )
    return jax.device_get(out)


def findings(out, index, constraints):
    """What speaks against the law of a group's text; the chance of a false alarm is 1e-6 in all."""
    prompt, temperature, limit, least = GROUPS[index]
    rows = slice(index, None, len(GROUPS))
    constraints = constraints._replace(min_new_tokens=least)
    want = test_constraints.law(constraints, None, prompt, temperature, limit)
    counts = {}
    for tokens, length in zip(out.tokens[rows], out.lengths[rows], strict=True):
        text = tuple(tokens[len(prompt) : length].tolist())
        counts[text] = counts.get(text, 0) + 1
        assert not tokens[length:].any()
    return testing._compare_counts("texts", want, counts, CHANCE / len(GROUPS)).findings


@pytest.mark.parametrize("name", WAYS)
def test_text_is_that_of_plain_decoding_whatever_is_asked(name):
    """Greedy rows token for token, the others' law by chi-square; log-probabilities the model's own
    of every generated token, before any constraint or temperature, and nothing elsewhere."""
    out, plain = generation(name), generation("plain")
    for index, (_, temperature, _, _) in enumerate(GROUPS):
        assert not findings(out, index, ASKED)
        if temperature == 0:
            rows = slice(index, None, len(GROUPS))
            np.testing.assert_array_equal(out.tokens[rows], plain.tokens[rows])
            np.testing.assert_array_equal(out.lengths[rows], plain.lengths[rows])

    table = np.asarray(jax.nn.log_softmax(PARAMS["target"]))
    starts = np.tile([len(group[0]) for group in GROUPS], COUNT)
    place = np.arange(MAX_LEN)[None, :]
    is_new = (place >= starts[:, None]) & (place < out.lengths[:, None])
    padded = np.pad(out.tokens, ((0, 0), (2, 0)))
    want = table[padded[:, :-2], padded[:, 1:-1], padded[:, 2:]]
    np.testing.assert_allclose(out.log_probs, np.where(is_new, want, 0), atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        {"repetition_penalty": 1.0},
        {"presence_penalty": 0.0},
        {"logit_bias": np.zeros(VOCAB, np.float32)},
        {"stop": jaxsd.stop_sequences([[1, 1]])},
    ],
)
def test_a_law_without_one_of_the_constraints_is_told_apart(other):
    out = generation("block")
    assert any(findings(out, index, ASKED._replace(**other)) for index in range(len(GROUPS)))
