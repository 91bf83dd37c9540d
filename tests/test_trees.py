"""Topologies: their order, their value, and which is best."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsd import trees


def test_named_topologies():
    assert trees.chain(3) == (-1, 0, 1)
    assert trees.parallel(3, 2) == (-1, -1, -1, 0, 1, 2)
    assert trees.balanced((2, 2)) == (-1, -1, 0, 0, 1, 1)
    assert trees.depths(trees.balanced((2, 1, 3))) == (1, 1, 2, 2, *(3,) * 6)
    assert trees.rank((-1, -1, 0, 1, 0)) == (0, 1, 0, 0, 1)


def all_trees(num_tokens):
    """Every tree of so many nodes, level by level, each once (children of a node are alike)."""
    for parents in itertools.product(*(range(-1, i) for i in range(num_tokens))):
        if list(parents) == sorted(parents):
            yield parents


def sequoia(chances, num_tokens):
    """The dynamic program of Sequoia: best value of a tree of n nodes whose root has children."""
    best = {0: 0.0, 1: 1.0}  # nodes, the root of the subtree included, to expected accepted
    for size in range(2, num_tokens + 2):
        # Of the children of ranks r, r + 1, ... with so many nodes among them: the best value.
        value = {(len(chances), left): -np.inf for left in range(size)}
        value[len(chances), 0] = 0.0
        for r in reversed(range(len(chances))):
            for left in range(size):
                value[r, left] = 0.0 if left == 0 else -np.inf
                for own in range(1, left + 1):
                    rest = value[r + 1, left - own]
                    value[r, left] = max(value[r, left], chances[r] * best[own] + rest)
        best[size] = 1.0 + value[0, size - 1]
    return best[num_tokens + 1]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=4), st.floats(0.2, 1.0))
def test_best_tree_equals_the_dynamic_program_and_exhaustive_search(weights, total):
    chances = np.sort(np.array(weights) / np.sum(weights) * total)[::-1]
    parents, value = trees.best(chances, num_tokens=5)
    assert value == pytest.approx(trees.expected_tokens(parents, chances))
    assert value == pytest.approx(sequoia(chances, 5))
    fitting = [p for p in all_trees(5) if max(trees.rank(p)) < chances.size]
    assert value == pytest.approx(max(trees.expected_tokens(p, chances) for p in fitting))


def test_best_tree_by_depth_obeys_its_depth_and_orders_levels():
    chances = np.array([[0.6, 0.3], [0.5, 0.4], [0.9, 0.05]])
    parents, value = trees.best(chances, num_tokens=6, max_depth=2)
    assert max(trees.depths(parents)) == 2
    assert list(trees.depths(parents)) == sorted(trees.depths(parents))
    assert value == pytest.approx(1 + 0.6 + 0.3 + 0.6 * 0.9 + 0.3 * 0.9)
    assert value == pytest.approx(trees.expected_tokens(parents, chances))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trees.check((0,)), "node 0 has parent 0"),
        (lambda: trees.check((-1, -2)), "node 1 has parent -2"),
        (lambda: trees.chain(0), "num_tokens=0 must be"),
        (lambda: trees.parallel(True, 2), "num_paths=True must be"),
        (lambda: trees.best([0.6, 0.6], 2), "sum to at most 1"),
        (lambda: trees.best([[[0.5]]], 2), "wanted \\[R\\] or \\[D, R\\]"),
        (lambda: trees.best([0.5], 4, max_depth=3), "only 3 nodes can be accepted"),
        (lambda: trees.expected_tokens((-1, -1), [0.5]), "must cover the tree"),
    ],
)
def test_wrong_trees_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.01, 1.0), min_size=1, max_size=3),
    st.floats(0.2, 1.0),
    st.lists(st.floats(0.0, 0.5), min_size=4, max_size=4),
    st.lists(st.floats(0.0, 0.5), min_size=4, max_size=4),
)
def test_fastest_tree_beats_every_tree_of_every_size_and_depth(weights, total, draft, more):
    chances = np.sort(np.array(weights) / np.sum(weights) * total)[::-1]
    verify = 1.0 + np.concatenate([[0.0], np.cumsum(more)])

    def speed(parents):
        deep = max(trees.depths(parents), default=0)
        tokens = trees.expected_tokens(parents, chances) if parents else 1.0
        return tokens / (sum(draft[:deep]) + verify[len(parents)])

    parents, found = trees.fastest(chances, draft, verify)
    assert found == pytest.approx(speed(parents), rel=1e-9)
    every = [tree for size in range(5) for tree in all_trees(size)]
    fitting = [tree for tree in every if max(trees.rank(tree), default=0) < chances.size]
    assert found == pytest.approx(max(map(speed, fitting)), rel=1e-9)


def test_fastest_tree_skips_sizes_that_were_not_measured():
    parents, _ = trees.fastest([0.7, 0.2], 0.0, [1.0, np.inf, np.inf, 1.01, np.inf])
    assert len(parents) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5], 0.1, []), "verify_seconds"),
        (([0.5], 0.1, [1.0, 0.0]), "verify_seconds"),
        (([0.5], -0.1, [1.0, 1.0]), "draft_seconds"),
        (([0.5], np.nan, [1.0, 1.0]), "draft_seconds"),
        (([1.5], 0.1, [1.0, 1.0]), "acceptance_by_rank"),
    ],
)
def test_fastest_names_wrong_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        trees.fastest(*arguments)
