"""Draft trees in the loop: the law of the text, caches after every round, counts, keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsd
from jaxsd import models, testing, trees

VOCAB, EOS = 4, 3
MODEL = testing.MarkovModel(VOCAB, order=2)
PARAMS = {
    "target": MODEL.init(jax.random.key(0), 1.5),
    "draft": MODEL.init(jax.random.key(1), 1.5),
}
TREE = trees.balanced((3, 2, 1))
PROMPTS = [[1], [2, 0, 1]]
MIXED = [jaxsd.Sampling(0.0), jaxsd.Sampling(1.0), jaxsd.Sampling(0.7, 3, 1.0)]


def tree(siblings, parents=TREE):
    return jaxsd.tree_drafter(MODEL, parents, siblings=siblings)


CASES = {
    "distinct, traversal": (tree("distinct"), jaxsd.traversal_verification),
    "mixed, recursive": (tree("mixed"), jaxsd.recursive_rejection),
    "independent, K-SEQ": (tree("independent"), jaxsd.k_sequential),
    "the batch algorithm": (
        tree("independent", trees.parallel(2, 2)),
        jaxsd.recursive_rejection,
    ),
    "chosen, matching": (tree("chosen"), jaxsd.target_matching),
    "confident, matching": (
        jaxsd.confident_tree_drafter(MODEL, 8, depth=3, width=2),
        jaxsd.target_matching,
    ),
    "chain, block": (jaxsd.model_drafter(MODEL, 3), jaxsd.block_verification),
    "chain, coupled": (
        jaxsd.model_drafter(MODEL, 3, shares_noise=True),
        jaxsd.gumbel_coupling,
    ),
}


@functools.cache
def decoder(name, max_len=9):
    return jaxsd.speculative(MODEL, *CASES[name], max_len=max_len, eos_id=EOS)


@pytest.mark.parametrize("name", CASES)
def test_decoders_have_the_targets_law_in_mixed_batches_with_ends(name):
    """Greedy, sampled and filtered rows of two prompts together. False alarm 1e-6."""
    options = {"num_new_tokens": 4, "num_samples": 1000, "eos_id": EOS, "sampling": MIXED}
    report = testing.check_decoder(decoder(name), MODEL, PARAMS, PROMPTS, **options)
    assert report, report
    assert report.num_cases == 6


def misplaced(*args):
    """A drafter whose siblings' laws are not those they were drawn from, but their neighbours'."""
    proposal = CASES["distinct, traversal"][0].propose(*args)
    return proposal._replace(tokens=jnp.roll(proposal.tokens, 1, axis=1))


class Unmoved(testing.MarkovModel):
    """A target that leaves the accepted path where it was in the tree."""

    def keep(self, cache, starts, sources):
        return cache


@pytest.mark.parametrize(
    "parts",
    [{"drafter": tree("distinct")._replace(propose=misplaced)}, {"target": Unmoved(VOCAB, 2)}],
    ids=["laws of neighbours", "path not moved"],
)
def test_a_faulty_tree_decoder_is_condemned(parts):
    parts = {"target": MODEL, "drafter": tree("distinct")} | parts
    faulty = jaxsd.speculative(
        parts["target"], parts["drafter"], jaxsd.traversal_verification, max_len=9, eos_id=EOS
    )
    report = testing.check_decoder(
        faulty,
        MODEL,
        PARAMS,
        PROMPTS,
        num_new_tokens=4,
        num_samples=1000,
        eos_id=EOS,
        sampling=MIXED,
    )
    assert not report


# ---- Real transformers: greedy text token for token, caches slot for slot

CONFIG = models.CONFIGS["tiny"]
TARGET = models.language_model(CONFIG)
WEIGHTS = models.init_params(CONFIG, jax.random.key(3))
RAGGED = np.array([[5, 9, 2, 7], [1, 0, 0, 0], [3, 4, 0, 0]], np.int32)
LENGTHS = np.array([4, 1, 2], np.int32)


@functools.cache
def plain_text():
    plain = jaxsd.speculative(TARGET, jaxsd.no_drafter(), max_len=24)
    out = plain.generate({"target": WEIGHTS}, RAGGED, LENGTHS, jax.random.key(0))
    return np.asarray(out.tokens)


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["fixed", "confident"])
def test_greedy_text_of_a_transformer_equals_plain_decoding(kind, noise):
    """The draft is the target, or the target with noise: whole paths are accepted, or parts."""
    if kind == "fixed":
        drafter = jaxsd.tree_drafter(TARGET, trees.balanced((2, 2)), siblings="chosen")
    else:
        drafter = jaxsd.confident_tree_drafter(TARGET, 5, depth=3, width=2)
    keys = iter(jax.random.split(jax.random.key(4), 100))
    draft = jax.tree.map(
        lambda leaf: leaf * (1 + noise * jax.random.normal(next(keys), leaf.shape)), WEIGHTS
    )
    decoder = jaxsd.speculative(TARGET, drafter, jaxsd.target_matching, max_len=24)
    params = {"target": WEIGHTS, "draft": draft}
    out = decoder.generate(params, RAGGED, LENGTHS, jax.random.key(0))
    assert np.asarray(out.tokens).tolist() == plain_text().tolist()
    rounds = np.asarray(out.stats.num_rounds)
    if noise == 0 and kind == "fixed":
        # Every round accepts a whole path, but the last, which the buffer's end cuts.
        new = 24 - LENGTHS
        assert rounds.tolist() == np.ceil(new / (drafter.depth + 1)).astype(int).tolist()
    elif noise:
        accepted = np.asarray(out.stats.num_accepted)
        assert np.all(accepted > 0)
        assert np.all(accepted < drafter.depth * rounds)
    by_node = np.asarray(out.stats.accepted_by_node)
    assert by_node.sum(1).tolist() == np.asarray(out.stats.num_accepted).tolist()


apply, apply_tree = jax.jit(TARGET.apply), jax.jit(TARGET.apply_tree)
forward = jax.jit(functools.partial(models.forward, CONFIG))


def test_a_tree_is_scored_as_each_of_its_paths_alone():
    """In one block, and level by level; the cache holds garbage beyond the text."""
    parents = (-1, -1, 0, 0, 1, 4)
    paths = [[0], [1], [0, 2], [0, 3], [1, 4], [1, 4, 5]]
    rng = np.random.default_rng(0)
    text = rng.integers(0, CONFIG.vocab_size, (2, 5)).astype(np.int32)
    nodes = rng.integers(0, CONFIG.vocab_size, (2, 6)).astype(np.int32)
    starts = jnp.array([5, 3])  # the second row's text is shorter
    cache = jax.tree.map(lambda leaf: leaf + 3.0, TARGET.init_cache(2, 16))
    positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
    _, cache = apply(WEIGHTS, jnp.array(text), positions, cache)
    depth = jnp.array(trees.depths(parents)) - 1
    seen = np.zeros((6, 6), bool)
    for node, path in enumerate(paths):
        seen[node, path] = True
    seen = jnp.broadcast_to(jnp.array(seen), (2, 6, 6))
    where = starts[:, None] + depth[None, :]
    whole, after = apply_tree(WEIGHTS, jnp.array(nodes), where, cache, starts, seen)
    pieces, by_level = [], cache
    for first, last in ((0, 2), (2, 5), (5, 6)):
        logits, by_level = apply_tree(
            WEIGHTS,
            jnp.array(nodes[:, first:last]),
            where[:, first:last],
            by_level,
            starts,
            seen[:, first:last, :last],
        )
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, atol=2e-5)
    for row, length in enumerate((5, 3)):
        for node, path in enumerate(paths):
            tokens = np.concatenate([text[row, :length], nodes[row, path]])
            padded = np.pad(tokens, (0, 8 - len(tokens)))[None]
            alone = forward(WEIGHTS, padded)[0, len(tokens) - 1]
            np.testing.assert_allclose(whole[row, node], alone, atol=2e-5)
    # The accepted path 1, 4, 5 moved to the front equals a cache that read it as text.
    sources = starts[:, None] + jnp.array([1, 4, 5])[None, :]
    moved = TARGET.keep(after, starts, sources)
    for row, length in enumerate((5, 3)):
        tokens = np.concatenate([text[row, :length], nodes[row, [1, 4, 5]]])
        end = len(tokens)
        padded = np.pad(tokens, (0, 8 - end))[None]
        _, fresh = apply(WEIGHTS, padded, jnp.arange(8)[None], TARGET.init_cache(1, 16))
        for got, want in zip(jax.tree.leaves(moved), jax.tree.leaves(fresh), strict=True):
            np.testing.assert_allclose(got[row, :, :end], want[0, :, :end], atol=2e-5)


# ---- Coupling, counts, traces


def test_coupled_text_depends_on_the_seed_alone():
    """Three drafters, plain decoding, other batch places: the same text, sampled."""
    coupled = functools.partial(jaxsd.model_drafter, shares_noise=True)
    texts = []
    for drafter in (jaxsd.no_drafter(), coupled(MODEL, 1), coupled(MODEL, 3)):
        made = jaxsd.speculative(MODEL, drafter, jaxsd.gumbel_coupling, max_len=16, eos_id=EOS)
        for draft in ("draft", "target"):
            params = {"target": PARAMS["target"], "draft": PARAMS[draft]}
            keys = jax.random.split(jax.random.key(8), 5)
            out = made.generate(params, [[1]] * 5, None, keys, sampling=jaxsd.Sampling(1.0))
            texts.append(np.asarray(out.tokens))
        # With its own weights as the draft's, every token is accepted.
        if drafter.num_tokens:
            stats = jaxsd.stats.total(out.stats)
            assert int(stats.num_accepted) == int(stats.num_drafted)
    for text in texts[1:]:
        np.testing.assert_array_equal(text, texts[0])
    assert len(np.unique(texts[0], axis=0)) > 1


def test_acceptance_by_rank_counts_what_was_accepted():
    """1000 rows of a fixed tree; by depth and rank, from the counts by node."""
    name = "chosen, matching"
    out = decoder(name).generate(
        PARAMS, [[1]] * 1000, None, jax.random.key(5), sampling=jaxsd.Sampling(1.0)
    )
    shares = jaxsd.stats.acceptance_by_rank(out.stats, TREE)
    assert shares.shape == (3, 3)
    by_node = np.asarray(out.stats.accepted_by_node).sum(0)
    rounds = int(out.stats.num_rounds.sum())
    np.testing.assert_allclose(shares[0], by_node[:3] / rounds)
    np.testing.assert_allclose(shares[1, 0], by_node[[3, 5, 7]].sum() / by_node[:3].sum())
    by_position = np.asarray(out.stats.accepted_by_position).sum(0)
    np.testing.assert_allclose(
        by_position[:3], [by_node[:3].sum(), by_node[3:9].sum(), by_node[9:].sum()]
    )
    expected = 1 + by_node.sum() / rounds
    assert trees.expected_tokens(TREE, np.where(shares > 0, shares, 0)) == pytest.approx(
        expected, rel=0.05
    )


def test_other_prompts_keys_and_temperatures_make_no_new_trace():
    traces, counts = [], []

    class Counting(testing.MarkovModel):
        def apply_tree(self, *args):
            traces.append(1)
            return testing.MarkovModel.apply_tree(self, *args)

    model = Counting(VOCAB, 2)
    made = jaxsd.speculative(
        model, jaxsd.tree_drafter(model, TREE), jaxsd.traversal_verification, max_len=12
    )
    for seed, temperature in enumerate((0.0, 1.0, 0.5)):
        made.generate(
            PARAMS,
            [[seed], [2]],
            None,
            jax.random.key(seed),
            sampling=jaxsd.Sampling(temperature),
            max_new_tokens=3 + seed,
        )
        counts.append(len(traces))
    assert counts[0] > 0
    assert counts == counts[:1] * 3


class NoTrees:
    """A model of chains alone."""

    init_cache = MODEL.init_cache
    apply = MODEL.apply


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tree("sorted"), "siblings='sorted' must be"),
        (lambda: tree("distinct", (-1, 0, -1)), "level by level"),
        (lambda: tree("distinct", (1,)), "node 0 has parent 1"),
        (lambda: jaxsd.tree_drafter(NoTrees(), TREE), "must have apply_tree"),
        (
            lambda: jaxsd.speculative(NoTrees(), tree("distinct"), max_len=8),
            "this drafter proposes trees",
        ),
        (
            lambda: jaxsd.confident_tree_drafter(MODEL, 30, depth=2, width=2),
            "num_tokens=30 must be at most the 6 nodes",
        ),
        (lambda: jaxsd.confident_tree_drafter(MODEL, 2, depth=0, width=2), "depth=0 must be"),
        (
            lambda: jaxsd.speculative(
                MODEL, tree("distinct"), jaxsd.block_verification, max_len=8
            ).generate(PARAMS, [[1]], None, jax.random.key(0)),
            "needs a verifier of trees",
        ),
        (
            lambda: jaxsd.speculative(
                MODEL, jaxsd.model_drafter(MODEL, 2), jaxsd.gumbel_coupling, max_len=8
            ).generate(PARAMS, [[1]], None, jax.random.key(0)),
            "shares_noise=False of the drafter must fit",
        ),
    ],
)
def test_wrong_parts_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
