"""Who proposes: prompt lookup against a slow search, model drafts against the law they claim."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jaxsd
from jaxsd import testing

LENGTH = 14
SETTINGS = [(1, 3, 1), (4, 3, 1), (6, 2, 2), (16, 4, 1)]
LOOKUPS = {s: jaxsd.prompt_lookup(s[0], max_ngram=s[1], min_ngram=s[2]) for s in SETTINGS}
PROPOSE = {
    setting: jax.jit(
        lambda tokens, lengths, d=drafter: d.propose({}, (), tokens, lengths, None, None)
    )
    for setting, drafter in LOOKUPS.items()
}


@pytest.mark.parametrize("setting", SETTINGS)
@hypothesis.settings(max_examples=60)
@hypothesis.given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=LENGTH), min_size=3, max_size=3),
    st.integers(0, 2),
)
def test_prompt_lookup_equals_a_slow_search(setting, texts, garbage):
    """Longest ending first, then its latest occurrence, then the pattern repeats.

    Beyond a row's length the buffer holds garbage that would match if it were looked at.
    """
    tokens = np.full((3, LENGTH), garbage, np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    lengths = np.array([len(text) for text in texts], np.int32)
    proposal = jax.tree.map(np.asarray, PROPOSE[setting](tokens, lengths))
    for row, text in enumerate(texts):
        want = reference.prompt_lookup(text, *setting)
        assert proposal.proposed[row].tolist() == [bool(want)] * setting[0]
        if want:
            assert proposal.tokens[row].tolist() == want


def test_model_drafter_claims_the_law_it_draws_from():
    """Exactly, by enumeration: P(draft) is the product of the rows of `probs` it came with."""
    model = testing.MarkovModel(vocab_size=3, order=1)
    params = {"draft": model.init(jax.random.key(3))}
    drafter = jaxsd.model_drafter(model, num_tokens=2)
    tokens, lengths = jnp.array([[2, 1, 0, 0]]), jnp.array([2])
    sampling = jaxsd.Sampling(jnp.array([0.8]), jnp.array([0]), jnp.array([0.9]))
    state = drafter.prefill(params, drafter.init(params, 1, 4), tokens[:, :2], lengths)
    propose = jax.jit(jax.vmap(drafter.propose, in_axes=(None, None, None, None, 0, None)))
    keys = jax.random.split(jax.random.key(0), (20_000, 1))
    proposal = jax.tree.map(
        np.asarray, propose(params, state, tokens, lengths, keys, sampling)._replace(state=None)
    )
    drawn, probs = proposal.tokens[:, 0], proposal.probs[:, 0]
    first = probs[0, 0]
    second = {int(a): row for a, row in zip(drawn[:, 0], probs[:, 1], strict=True)}
    # Five standard deviations of a frequency, over at most nine cells: false alarm below 1e-5.
    for a, row in second.items():
        for b in range(3):
            want = first[a] * row[b]
            share = np.mean((drawn[:, 0] == a) & (drawn[:, 1] == b))
            assert abs(share - want) <= 5 * np.sqrt(want * (1 - want) / 20_000)
    np.testing.assert_array_equal(probs[:, 0], np.broadcast_to(first, probs[:, 0].shape))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jaxsd.model_drafter(testing.MarkovModel(3), 0), "num_tokens=0 must be"),
        (lambda: jaxsd.model_drafter(testing.MarkovModel(3), True), "num_tokens=True must be"),
        (lambda: jaxsd.model_drafter(testing.MarkovModel(3), 2.0), "num_tokens=2.0 must be"),
        (lambda: jaxsd.prompt_lookup(0), "num_tokens=0 must be"),
        (lambda: jaxsd.prompt_lookup(2, min_ngram=0), "min_ngram=0 must be"),
        (lambda: jaxsd.prompt_lookup(2, max_ngram=1, min_ngram=2), "max_ngram=1 must be"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
