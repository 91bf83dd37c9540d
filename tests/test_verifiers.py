"""Every verifier: its exact law, its planted faults, what it accepts, its edges."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsd
from jaxsd import cases, testing, trees, verifiers

TREES = ((-1, -1), (-1, 0, 0), (-1, -1, 0), (-1, -1, 0, 1))
ALL = testing.SIBLINGS
CHAIN_VERIFIERS = {
    "rejection_sampling": jaxsd.rejection_sampling,
    "block_verification": jaxsd.block_verification,
    "gumbel_coupling": jaxsd.gumbel_coupling,
}
TREE_VERIFIERS = {
    "recursive_rejection": (jaxsd.recursive_rejection, ALL),
    "traversal_verification": (jaxsd.traversal_verification, ALL),
    "k_sequential": (jaxsd.k_sequential, ("independent",)),
    "target_matching": (jaxsd.target_matching, ALL),
}


# ---- The law


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CHAIN_VERIFIERS)
def test_verifiers_of_chains_have_exactly_the_targets_law(name, dtype):
    """K = 0..3, sampled drafts, chosen drafts, nothing proposed, zeros; to 1e-6 and 1e-12."""
    report = testing.check_verifier(CHAIN_VERIFIERS[name], dtype=dtype, num_repeats=1)
    assert report, report
    assert report.method == "exact"
    assert report.num_cases == 4 * 10


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", TREE_VERIFIERS)
def test_verifiers_of_trees_have_exactly_the_targets_law(name, dtype):
    """Four trees, siblings drawn in every way, and chains; to 1e-6 and 1e-12."""
    verifier, siblings = TREE_VERIFIERS[name]
    report = testing.check_verifier(
        verifier, trees=TREES, siblings=siblings, dtype=dtype, num_tokens=(0, 1, 2), num_repeats=1
    )
    assert report, report
    assert report.method == "exact"
    assert report.num_cases == 3 * 10 + len(TREES) * len(siblings) * 10


VOCABULARY_TREES = {2: ((-1, -1, 0, 0, 1),), 4: ((-1, -1, 0),), 5: ((-1, -1, -1),)}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("vocab_size", VOCABULARY_TREES)
@pytest.mark.parametrize("name", [*CHAIN_VERIFIERS, *TREE_VERIFIERS])
def test_other_vocabularies_have_exactly_the_targets_law(name, vocab_size, dtype):
    """Every rule, where every other test here has a vocabulary of 3; to 1e-6 and 1e-12."""
    verifier, options = CHAIN_VERIFIERS.get(name), {}
    if verifier is None:
        verifier, siblings = TREE_VERIFIERS[name]
        shapes = VOCABULARY_TREES[vocab_size]
        if name == "target_matching" and vocab_size == 5:
            shapes = ((-1, -1),)  # it draws a token at every node: 5**3 times as many cases
        options = {"trees": shapes, "siblings": siblings}
    report = testing.check_verifier(
        verifier, vocab_size=vocab_size, num_tokens=(2,), num_repeats=1, dtype=dtype, **options
    )
    assert report, report
    assert report.method == "exact"


@pytest.mark.parametrize(
    "sampling",
    [
        jaxsd.Sampling(temperature=0.0),
        jaxsd.Sampling(temperature=0.6, top_k=3, top_p=0.8),
        jaxsd.Sampling(temperature=2.0, top_p=0.7),
    ],
)
@pytest.mark.parametrize(
    "verifier",
    [
        jaxsd.rejection_sampling,
        jaxsd.block_verification,
        jaxsd.gumbel_coupling,
        jaxsd.recursive_rejection,
        jaxsd.traversal_verification,
        jaxsd.k_sequential,
        jaxsd.target_matching,
    ],
)
def test_filters_and_verification_together_have_the_law_of_the_filtered_target(verifier, sampling):
    """The sampling setting goes in as one row of a mixed batch, as it does in the decoder."""
    other = jaxsd.Sampling(temperature=1.3, top_k=2, top_p=0.9)
    both = jaxsd.Sampling(*(np.array(pair) for pair in zip(sampling, other, strict=True)))

    def fn(key, tokens, probs, logits):
        target = jaxsd.probabilities(jnp.stack([logits, 2.0 - logits]), both)[0]
        if getattr(verifier, "shares_noise", False):
            key = jax.random.split(key, 3)  # one for each place, as the decoder gives them
        return verifier(key, target, jaxsd.Draft(tokens, probs))[:2]

    report = testing.check_function(fn, sampling, num_tokens=[2], num_repeats=2)
    assert report, report
    assert report.method == "exact"


# ---- Planted faults: each a way in which shipped samplers went wrong


def block(key, target_probs, draft, *, residual=None, capped=True, chance=None):
    """`block_verification` written anew, one place after the other, with places for faults."""
    accept_key, token_key = jax.random.split(key)
    weight, kept, law = jnp.float32(1.0), jnp.int32(0), None
    num_tokens = draft.tokens.shape[0]
    coins = jax.random.split(accept_key, max(num_tokens, 1))
    laws = [None] * (num_tokens + 1)
    zero = jnp.zeros_like(target_probs[0])
    for place in range(num_tokens + 1):
        after = draft.probs[place] if place < num_tokens else zero
        left = jnp.maximum(weight * target_probs[place] - after, 0.0)
        token_rule = jnp.maximum(target_probs[place] - after, 0.0)
        total = jnp.sum(left)
        law = token_rule if residual == "token" else left
        law = jnp.where(jnp.sum(law) > 0, law, target_probs[place])
        laws[place] = law / jnp.sum(law)
        if place:
            out_of = total + 1.0 - weight
            h = jnp.where(out_of > 0, total / jnp.where(out_of > 0, out_of, 1.0), 1.0)
            h = jnp.clip(h, 0.0, 1.0) if chance is None else chance(weight)
            accepted = jax.random.bernoulli(coins[place - 1], h)
            kept = jnp.where(accepted, place, kept)
        if place < num_tokens:
            q = draft.probs[place, draft.tokens[place]]
            ratio = target_probs[place, draft.tokens[place]] / jnp.where(q > 0, q, 1.0)
            weight = weight * jnp.where(q > 0, ratio, 0.0)
            weight = jnp.minimum(weight, 1.0) if capped else weight
    token = jaxsd.categorical(token_key, jnp.stack(laws)[kept])
    return verifiers.verdict(draft.tokens, kept, token)


def siblings_with_replacement(key, target_probs, draft):
    """Drafts were drawn without replacement, but the residual takes off the full distribution."""
    parents = draft.parents
    first = jnp.argmax(parents[None, :] == parents[:, None], axis=1)
    return jaxsd.recursive_rejection(key, target_probs, draft._replace(probs=draft.probs[first]))


def eager_tree(key, target_probs, draft):
    """Siblings are tried against the target itself instead of what earlier ones left."""

    def attempt(carry, node):
        index, parent, token, probs, after, node_key = node
        current, law, residual = carry
        ratio = law[token] / jnp.where(probs[token] > 0, probs[token], 1.0)
        chance = jnp.where((parent == current) & (probs[token] > 0), jnp.minimum(ratio, 1.0), 0.0)
        accepted = jax.random.bernoulli(node_key, chance)
        left = jnp.where(parent == current, verifiers._residual(residual, probs), residual)
        pick = functools.partial(jnp.where, accepted)
        return (pick(index, current), pick(after, law), pick(after, left)), accepted

    keys = jax.random.split(key, draft.tokens.size + 1)
    index = jnp.arange(draft.tokens.size, dtype=jnp.int32)
    parents = verifiers._parents(draft)
    nodes = (index, parents, draft.tokens, draft.probs, target_probs[1:], keys[:-1])
    start = (jnp.int32(-1), target_probs[0], target_probs[0])
    (_, _, residual), accepted = jax.lax.scan(attempt, start, nodes)
    return verifiers._tree_verdict(draft, accepted, jaxsd.categorical(keys[-1], residual))


def one_coin(key, target_probs, draft):
    """One uniform for all places."""
    accept_key, token_key = jax.random.split(key)
    p = jnp.take_along_axis(target_probs[:-1], draft.tokens[:, None], 1)[:, 0]
    q = jnp.take_along_axis(draft.probs, draft.tokens[:, None], 1)[:, 0]
    u = jax.random.uniform(accept_key)
    kept = jnp.stack([(u < one) for one in jnp.where(q > 0, p / jnp.where(q > 0, q, 1.0), 0.0)])
    num = jnp.sum(jnp.cumprod(kept.astype(jnp.int32)))
    laws = jnp.stack(
        [verifiers._residual(target_probs[i], draft.probs[i]) for i in range(len(kept))]
        + [target_probs[-1]]
    )
    return verifiers.verdict(draft.tokens, num, jaxsd.categorical(token_key, laws[num]))


def stale_key(key, target_probs, draft):
    """The key that decided is used again to draw."""
    accept_key, _ = jax.random.split(key)
    verdict = jaxsd.block_verification(key, target_probs, draft)
    again = jaxsd.categorical(accept_key, target_probs[verdict.num_accepted])
    place = jnp.arange(verdict.tokens.size) == verdict.num_accepted
    return verdict._replace(tokens=jnp.where(place, again, verdict.tokens))


def follows_any(key, target_probs, draft):
    """`target_matching` that emits the draw at the root after whatever it accepted."""
    drawn = jaxsd.categorical(key, target_probs)
    verdict = verifiers._follow(draft, drawn)
    place = jnp.arange(verdict.tokens.size) == verdict.num_accepted
    return verdict._replace(tokens=jnp.where(place, drawn[0], verdict.tokens))


def threshold_of_one(key, target_probs, draft):
    """K-SEQ's residual for a threshold that was not used in accepting."""
    loose = draft._replace(probs=jnp.minimum(1.0, 2.0 * draft.probs))
    return jaxsd.k_sequential(key, target_probs, loose)


def loses_the_path(key, target_probs, draft):
    verdict = jaxsd.recursive_rejection(key, target_probs, draft)
    return verdict._replace(path=verdict.path + 1)


FAULTS = {
    "block: residual of the token rule": (
        functools.partial(block, residual="token"),
        {"num_tokens": [3], "num_repeats": 3},
        "emitted law differs",
    ),
    "block: joint ratio not capped": (
        functools.partial(block, capped=False),
        {"num_tokens": [2]},
        "emitted law differs",
    ),
    "block: chance w in place of h": (
        functools.partial(block, chance=lambda weight: weight),
        {"num_tokens": [2]},
        "emitted law differs",
    ),
    "rejection: one uniform for all places": (one_coin, {"num_tokens": [2]}, "law differs"),
    "block: stale key": (stale_key, {"num_tokens": [2]}, "a key is used twice"),
    "recursive: with-replacement residual of distinct drafts": (
        siblings_with_replacement,
        {"trees": [(-1, -1, -1)], "siblings": ["distinct"], "num_tokens": [], "vocab_size": 4},
        "emitted law differs",
    ),
    "recursive: siblings tried against the target": (
        eager_tree,
        {"trees": [(-1, -1)], "siblings": ["independent"], "num_tokens": []},
        "emitted law differs",
    ),
    "matching: token of another node": (
        follows_any,
        {"trees": [(-1, -1, 0)], "siblings": ["chosen"], "num_tokens": []},
        "emitted law differs",
    ),
    "K-SEQ: another threshold in the residual": (
        threshold_of_one,
        {"trees": [(-1, -1)], "siblings": ["independent"], "num_tokens": []},
        "emitted law differs",
    ),
    "K-SEQ on distinct drafts": (
        jaxsd.k_sequential,
        {"trees": [(-1, -1)], "siblings": ["distinct"], "num_tokens": []},
        "emitted law differs",
    ),
    "path of other nodes": (
        loses_the_path,
        {"trees": [(-1, -1)], "siblings": ["chosen"], "num_tokens": []},
        "path does not lead",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_verifier_is_condemned_exactly(name):
    verifier, options, message = FAULTS[name]
    report = testing.check_verifier(verifier, **({"num_repeats": 1} | options))
    assert not report
    assert report.method == "exact"
    with pytest.raises(AssertionError, match=message):
        report.raise_if_failed()


def test_block_verification_written_anew_without_a_fault_passes():
    report = testing.check_verifier(block, num_tokens=[1, 2], num_repeats=1)
    assert report.raise_if_failed().method == "exact"


# ---- What is accepted, exactly


def accepted_length(verifier, p, q, num_tokens, parents=None, siblings="independent"):
    """Mean number of accepted tokens of memoryless laws: every draft and every draw enumerated."""
    p, q = (np.asarray(law, np.float64) for law in (p, q))
    parents = tuple(range(-1, num_tokens - 1)) if parents is None else parents
    depth = max(trees.depths(parents))

    def levels(law, count):
        return [np.broadcast_to(law, (p.size,) * (i + 1)) for i in range(count)]

    target = levels(p, depth + 1)
    case = cases.Case("", target, target, levels(q, depth), parents, siblings)

    def emit(key, tokens, probs, target, parents):
        verdict = verifier(key, target, jaxsd.Draft(tokens, probs, parents))
        return verdict.tokens, verdict.num_accepted, verdict.path

    with enable_x64():
        outputs, _ = testing._enumerate(emit, [case])
    _, (_, num_accepted, _), weight, _ = outputs[0]
    np.testing.assert_allclose(weight.sum(), 1.0, atol=1e-12)
    return float((num_accepted * weight).sum())


def on_chain(verifier):
    return lambda key, target, draft: verifier(key, target, draft._replace(parents=None))._replace(
        path=jnp.arange(draft.tokens.size)
    )


@pytest.mark.parametrize(
    ("num_tokens", "token_rule", "block_rule"),
    [(2, 10 / 9, 11 / 9), (3, 38 / 27, 5 / 3), (4, 130 / 81, 166 / 81)],
)
def test_accepted_tokens_of_the_published_example(num_tokens, token_rule, block_rule):
    """p = (2/3, 1/3) drafted, (1/3, 2/3) wanted; Sun et al., arXiv 2403.10444."""
    mean = functools.partial(accepted_length, p=(1 / 3, 2 / 3), q=(2 / 3, 1 / 3))
    rules = {
        on_chain(jaxsd.rejection_sampling): token_rule,
        on_chain(jaxsd.block_verification): block_rule,
        jaxsd.recursive_rejection: token_rule,
        jaxsd.traversal_verification: block_rule,
    }
    for verifier, want in rules.items():
        np.testing.assert_allclose(mean(verifier, num_tokens=num_tokens), want, atol=1e-12)


TWO = ((-1, -1), {"p": (0.2, 0.3, 0.5), "q": (0.5, 0.3, 0.2), "num_tokens": 2})


@pytest.mark.parametrize(
    ("verifier", "siblings", "want"),
    [
        (jaxsd.recursive_rejection, "independent", 0.76),
        (jaxsd.k_sequential, "independent", 0.791355),
        (jaxsd.recursive_rejection, "distinct", 0.82),
        (jaxsd.recursive_rejection, "mixed", 0.90),
        (jaxsd.traversal_verification, "mixed", 0.90),
        (jaxsd.target_matching, "chosen", 0.50),
    ],
)
def test_acceptance_of_two_drafts_of_one_token(verifier, siblings, want):
    parents, laws = TWO
    got = accepted_length(verifier, parents=parents, siblings=siblings, **laws)
    np.testing.assert_allclose(got, want, atol=5e-7)


def test_traversal_accepts_more_than_recursive_rejection_of_the_same_tree():
    """Children 2 then 1, V = 3: both exact, and both below the transport bound of their nodes."""
    parents, laws = (-1, -1, 0, 1), {"p": (0.2, 0.3, 0.5), "q": (0.5, 0.3, 0.2), "num_tokens": 4}
    recursive, traversal = (
        accepted_length(rule, parents=parents, siblings="independent", **laws)
        for rule in (jaxsd.recursive_rejection, jaxsd.traversal_verification)
    )
    assert recursive + 0.01 < traversal


def random_law(size):
    weights = st.lists(st.floats(0.01, 1.0), min_size=size, max_size=size)
    return weights.map(lambda x: np.array(x) / np.sum(x))


@settings(max_examples=30, deadline=None)
@given(random_law(3), random_law(3), st.integers(1, 4))
def test_no_rule_exceeds_the_transport_bound_and_block_never_accepts_less(p, q, num_drafts):
    """Closed forms on random laws; the bound by brute force over all sets of tokens."""
    bound = float(jaxsd.optimal_acceptance(jnp.asarray(p), jnp.asarray(q), num_drafts))
    subsets = itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in range(4))
    brute = 1 + min(p[list(H)].sum() - q[list(H)].sum() ** num_drafts for H in subsets)
    np.testing.assert_allclose(bound, brute, atol=2e-6)
    residual, left = p.copy(), 1.0
    for _ in range(num_drafts):
        after = np.maximum(residual - q, 0)
        left *= after.sum()
        residual = after / max(after.sum(), 1e-300)
    assert 1 - left <= bound + 2e-6
    # K-SEQ's acceptance at its own threshold.
    threshold, _ = verifiers._sequential_threshold(
        jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32), jnp.int32(num_drafts)
    )
    mass = np.minimum(q, p / float(threshold)).sum()
    sequential = 1 - (1 - mass) ** num_drafts
    assert (1 - 1 / np.e) * bound - 1e-5 <= sequential <= bound + 1e-5
    token = block = 0.0
    for drafted in itertools.product(range(3), repeat=num_drafts):
        chance, weight, product = np.prod(q[list(drafted)]), 1.0, 1.0
        for x in drafted:
            weight, product = min(1.0, weight * p[x] / q[x]), product * min(1.0, p[x] / q[x])
            token, block = token + chance * product, block + chance * weight
    assert block >= token - 1e-12


def test_block_verification_accepts_its_closed_form():
    """The mean of the sum of w_i, on random memoryless laws, by enumeration of the verifier."""
    rng = np.random.default_rng(3)
    for _ in range(3):
        p, q = rng.dirichlet(np.ones(3), 2)
        want = 0.0
        for drafted in itertools.product(range(3), repeat=3):
            weight = 1.0
            for x in drafted:
                weight = min(1.0, weight * p[x] / q[x])
                want += np.prod(q[list(drafted)]) * weight
        got = accepted_length(on_chain(jaxsd.block_verification), p, q, 3)
        np.testing.assert_allclose(got, want, atol=1e-12)


def test_coupled_draws_agree_as_often_as_their_closed_form_says():
    """200 000 draws; false alarm below 1e-6 (5 standard errors of a frequency)."""
    p, q = jnp.array([0.2, 0.3, 0.5]), jnp.array([0.5, 0.3, 0.2])
    want = sum(1 / sum(max(q[y] / q[x], p[y] / p[x]) for y in range(3)) for x in range(3))
    np.testing.assert_allclose(want, 0.630769, atol=1e-6)
    keys = jax.random.split(jax.random.key(0), 200_000)
    draw = jax.jit(jax.vmap(verifiers.shared_categorical, in_axes=(0, None)))
    same = float(jnp.mean(draw(keys, p) == draw(keys, q)))
    assert abs(same - float(want)) < 5 * (0.25 / 200_000) ** 0.5


def test_acceptance_of_a_place_is_one_minus_total_variation():
    """Exact, by enumerating both draws: sum(min(p, q)) is the most any rule of its kind reaches."""
    p, q = (0.2, 0.5, 0.3), (0.6, 0.1, 0.3)
    got = accepted_length(on_chain(jaxsd.rejection_sampling), p, q, 1)
    np.testing.assert_allclose(got, np.minimum(p, q).sum(), atol=1e-12)


# ---- Edges


@pytest.mark.parametrize(
    "verifier",
    [jaxsd.rejection_sampling, jaxsd.block_verification, jaxsd.traversal_verification],
)
def test_equal_laws_accept_every_token(verifier):
    probs = jax.nn.softmax(jax.random.normal(jax.random.key(0), (4, 5)))
    keys = jax.random.split(jax.random.key(1), 200)
    draft = jaxsd.Draft(jnp.array([1, 4, 0]), probs[:3])
    verify = jax.jit(jax.vmap(verifier, in_axes=(0, None, None)))
    assert verify(keys, probs, draft).num_accepted.tolist() == [3] * 200


@pytest.mark.parametrize("name", [*CHAIN_VERIFIERS, *TREE_VERIFIERS])
def test_where_nothing_is_proposed_nothing_is_accepted(name):
    """All-zero draft rows, even with a filler token that the target is certain of."""
    verifier = CHAIN_VERIFIERS.get(name) or TREE_VERIFIERS[name][0]
    key = jax.random.key(0)
    key = jax.random.split(key, 3) if name == "gumbel_coupling" else key
    target = jnp.eye(3)[jnp.array([0, 0, 0])]
    draft = jaxsd.Draft(jnp.zeros((2,), jnp.int32), jnp.zeros((2, 3)))
    verdict = jax.jit(verifier)(key, target, draft)
    assert verdict.num_accepted == 0
    assert verdict.tokens.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", [*CHAIN_VERIFIERS, *TREE_VERIFIERS])
def test_shapes_and_types_are_as_promised(name):
    verifier = CHAIN_VERIFIERS.get(name) or TREE_VERIFIERS[name][0]
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 4))
    one = jax.eval_shape(lambda: jax.random.key(0))
    draft = jaxsd.Draft(jnp.zeros((3,), jnp.int32), jnp.zeros((3, 7)))
    key = keys if name == "gumbel_coupling" else one
    verdict = jax.eval_shape(verifier, key, jnp.zeros((4, 7)), draft)
    assert (verdict.tokens.shape, verdict.tokens.dtype) == ((4,), jnp.int32)
    assert (verdict.num_accepted.shape, verdict.num_accepted.dtype) == ((), jnp.int32)
    assert verdict.path is None
    if name in TREE_VERIFIERS:
        draft = draft._replace(parents=jnp.array([-1, -1, 0]))
        verdict = jax.eval_shape(verifier, key, jnp.zeros((4, 7)), draft)
        assert (verdict.path.shape, verdict.path.dtype) == ((3,), jnp.int32)


@pytest.mark.parametrize("parents", [(-1, -1, 0, 1, 1, 2), (-1, 0, 1, 2), (-1, -1, -1)])
def test_ancestors_and_walk_order_equal_a_walk_in_python(parents):
    above = np.asarray(verifiers.ancestors(jnp.array(parents)))
    for node, parent in enumerate(parents):
        path = {node + 1}
        while parent >= 0:
            path.add(parent + 1)
            parent = parents[parent]
        assert set(np.flatnonzero(above[node])) == path | {0}
    entered, left = [], []

    def walk(node):
        entered.append(node)
        for child, parent in enumerate(parents):
            if parent == node:
                walk(child)
        left.append(node)

    walk(-1)
    whole = np.concatenate([np.eye(len(parents) + 1, dtype=bool)[:1], above])
    padded = np.concatenate([[0], np.array(parents, np.int32) + 1])
    enter_at, exit_at = verifiers._depth_first(jnp.array(padded), jnp.array(whole))
    assert (np.argsort(enter_at) - 1).tolist() == entered
    assert (np.argsort(exit_at) - 1).tolist() == left
