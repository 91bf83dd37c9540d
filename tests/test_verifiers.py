"""Rejection sampling: its exact law, its acceptance, its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsd
from jaxsd import testing


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rejection_sampling_has_exactly_the_targets_law(dtype):
    """K = 0..3, sampled drafts, chosen drafts, nothing proposed, zeros; to 1e-6 and 1e-12."""
    report = testing.check_verifier(jaxsd.rejection_sampling, dtype=dtype, num_repeats=1)
    assert report, report
    assert report.method == "exact"
    assert report.num_cases == 4 * 10


@pytest.mark.parametrize(
    "sampling",
    [
        jaxsd.Sampling(temperature=0.0),
        jaxsd.Sampling(temperature=0.6, top_k=3, top_p=0.8),
        jaxsd.Sampling(temperature=2.0, top_p=0.7),
    ],
)
def test_filters_and_rejection_together_have_the_law_of_the_filtered_target(sampling):
    """The sampling setting goes in as one row of a mixed batch, as it does in the decoder."""

    other = jaxsd.Sampling(temperature=1.3, top_k=2, top_p=0.9)
    both = jaxsd.Sampling(*(np.array(pair) for pair in zip(sampling, other, strict=True)))

    def fn(key, tokens, probs, logits):
        target = jaxsd.probabilities(jnp.stack([logits, 2.0 - logits]), both)[0]
        return jaxsd.rejection_sampling(key, target, jaxsd.Draft(tokens, probs))

    report = testing.check_function(fn, sampling, num_tokens=[2], num_repeats=2)
    assert report, report
    assert report.method == "exact"


def test_acceptance_of_a_place_is_one_minus_total_variation():
    """Exact, by enumerating both draws: sum(min(p, q)) is the most any rule of its kind reaches."""
    p, q = np.array([0.2, 0.5, 0.3], np.float32), np.array([0.6, 0.1, 0.3], np.float32)

    def num_accepted(key):
        """Draws the draft as well, so that its law is enumerated too."""
        draft_key, key = jax.random.split(key)
        token = jaxsd.categorical(draft_key, jnp.asarray(q))
        draft = jaxsd.Draft(token[None], jnp.asarray(q)[None, :])
        return jaxsd.rejection_sampling(key, jnp.asarray(np.stack([p, p])), draft).num_accepted

    law = testing.exact_law(num_accepted)
    np.testing.assert_allclose(law[1], np.minimum(p, q).sum(), atol=1e-6)


def test_equal_laws_accept_every_token():
    probs = jax.nn.softmax(jax.random.normal(jax.random.key(0), (4, 5)))
    keys = jax.random.split(jax.random.key(1), 200)
    draft = jaxsd.Draft(jnp.array([1, 4, 0]), probs[:3])
    verify = jax.jit(jax.vmap(jaxsd.rejection_sampling, in_axes=(0, None, None)))
    verdicts = verify(keys, probs, draft)
    assert verdicts.num_accepted.tolist() == [3] * 200


def test_where_nothing_is_proposed_nothing_is_accepted():
    """All-zero draft rows, even with a filler token that the target is certain of."""
    target = jnp.eye(3)[jnp.array([0, 0, 0])]
    draft = jaxsd.Draft(jnp.zeros((2,), jnp.int32), jnp.zeros((2, 3)))
    verdict = jax.jit(jaxsd.rejection_sampling)(jax.random.key(0), target, draft)
    assert verdict.num_accepted == 0
    assert verdict.tokens.tolist() == [0, 0, 0]


def test_shapes_and_types_are_as_promised():
    verdict = jax.eval_shape(
        jaxsd.rejection_sampling,
        jax.random.key(0),
        jnp.zeros((4, 7)),
        jaxsd.Draft(jnp.zeros((3,), jnp.int32), jnp.zeros((3, 7))),
    )
    assert (verdict.tokens.shape, verdict.tokens.dtype) == ((4,), jnp.int32)
    assert (verdict.num_accepted.shape, verdict.num_accepted.dtype) == ((), jnp.int32)
