"""Exact laws of drafters and of whole rounds on toys: every draw replaced by all its outcomes.

`testing` runs a function once for every way its draws come out, but not draws under `vmap`. Here
the batch is one row, and `vmap` is a Python loop over it.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np

import jaxsd
from jaxsd import replay


@contextlib.contextmanager
def loops_instead_of_vmap():
    """`jax.vmap` as a loop over the leading axis, for whoever looks it up at the call."""

    def at(arg, axis, row):
        return arg if axis is None else jax.tree.map(lambda leaf: leaf[row], arg)

    def slow_vmap(fn, in_axes=0):
        def mapped(*args):
            axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
            pairs = list(zip(args, axes, strict=True))
            size = next(jax.tree.leaves(arg)[0].shape[0] for arg, axis in pairs if axis == 0)
            results = [fn(*(at(*pair, row) for pair in pairs)) for row in range(size)]
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

        return mapped

    original = jax.vmap
    jax.vmap = slow_vmap
    try:
        yield
    finally:
        jax.vmap = original


def exact_law(sample):
    """Probability by outcome of `sample(key)`, a tuple of arrays; no key may be used twice."""
    law = {}
    with loops_instead_of_vmap():
        for outcome, weight, run in replay.walk(sample, jax.random.key(0), 10_000):
            keys = [np.asarray(data).tobytes() for data in run.keys]
            assert len(set(keys)) == len(keys), f"a key is used twice, among {run.samplers}"
            frozen = replay.freeze(outcome)
            law[frozen] = law.get(frozen, 0.0) + weight
    return law


def exact_proposals(drafter, params, text, sampling, *, target_cache=None):
    """Every way a drafter can propose after a text: (tokens, its probability, probs, proposed)."""
    tokens, lengths = jnp.array([text]), jnp.array([len(text)])
    width = len(text) + 2
    state = drafter.prefill(params, drafter.init(params, 1, width), tokens, lengths)
    if drafter.shares_target_cache:
        state = jaxsd.SharedState(state, target_cache)
    buffer = jnp.zeros((1, width), jnp.int32).at[:, : len(text)].set(tokens)
    types = (jnp.float32, jnp.int32, jnp.float32)
    fields = [jnp.asarray([f], one) for f, one in zip(sampling, types, strict=True)]

    def sample(key):
        settings = jaxsd.Sampling(*fields)
        proposal = drafter.propose(params, state, buffer, lengths, key[None], settings)
        proposed = proposal.proposed
        proposed = jnp.ones_like(proposal.tokens, bool) if proposed is None else proposed
        return proposal.tokens[0], proposal.probs[0], proposed[0]

    law = exact_law(sample)
    return [(np.array(t), weight, np.array(p), np.array(o)) for (t, p, o), weight in law.items()]


def assert_laws_are_reported(outcomes, tolerance=1e-6):
    """P(tokens) is the product of the reported rows at the tokens, for every outcome and in sum."""
    assert abs(sum(weight for _, weight, _, _ in outcomes) - 1) <= tolerance
    chances = {}
    for tokens, weight, probs, _ in outcomes:
        np.testing.assert_allclose(probs.sum(-1), 1, atol=tolerance)
        # Equal tokens may come with rows that were computed in other passes, and round otherwise.
        chance = np.prod(probs[np.arange(len(tokens)), tokens])
        before, total = chances.get(tuple(tokens), (chance, 0.0))
        assert abs(before - chance) <= tolerance
        chances[tuple(tokens)] = chance, total + weight
    for tokens, (chance, weight) in chances.items():
        assert abs(chance - weight) <= tolerance, (tokens, chance, weight)


def exact_round(decoder, params, state):
    """The law of the text that one round commits, of a batch of one row: text to probability."""

    def sample(key):
        _, info = decoder.step(params, state._replace(keys=key[None]))
        return (info.tokens[0, : int(info.num_tokens[0])],)

    return {text: weight for (text,), weight in exact_law(sample).items()}


def distance(law, conditional, num_tokens):
    """Largest |emitted - wanted| over texts of `num_tokens`; shorter ones are continued.

    `conditional(text)` is the wanted law of the token after what was generated so far, `[V]`.
    """

    def continued(texts):
        while any(len(text) < num_tokens for text in texts):
            longer = {}
            for text, mass in texts.items():
                whole = len(text) >= num_tokens
                follows = {text: 1.0}
                if not whole:
                    follows = {(*text, t): float(p) for t, p in enumerate(conditional(text))}
                for one, chance in follows.items():
                    longer[one] = longer.get(one, 0.0) + mass * chance
            texts = longer
        return texts

    emitted, wanted = continued(law), continued({(): 1.0})
    return max(abs(emitted.get(t, 0.0) - wanted.get(t, 0.0)) for t in {*emitted, *wanted})
