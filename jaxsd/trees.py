"""Topologies of draft trees as data: for every node the node before it; and which tree is best.

A tree of K draft tokens is a tuple of K parents. Node i follows node `parents[i]`; -1 is the row's
last committed token. Parents come before their children, siblings are tried in their order. A chain
is `(-1, 0, 1, ...)`.
"""

import heapq
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

Parents = tuple[int, ...]


def chain(num_tokens: int) -> Parents:
    """One token after the other.

    >>> chain(3)
    (-1, 0, 1)
    """
    return parallel(1, num_tokens)


def parallel(num_paths: int, num_tokens: int) -> Parents:
    """Several chains side by side, level by level: the drafts of the batch algorithm.

    References:
      Yin et al., 2024, https://arxiv.org/abs/2411.00841, algorithm 4.

    >>> parallel(2, 3)
    (-1, -1, 0, 1, 2, 3)
    """
    _check_count("num_paths", num_paths)
    _check_count("num_tokens", num_tokens)
    return tuple(max(i - num_paths, -1) for i in range(num_paths * num_tokens))


def balanced(branching: Sequence[int]) -> Parents:
    """Every node of level d has `branching[d]` children.

    >>> balanced((3, 1))
    (-1, -1, -1, 0, 1, 2)
    """
    parents: list[int] = []
    level = [-1]
    for count in branching:
        _check_count("branching", count)
        start = len(parents)
        parents += [node for node in level for _ in range(count)]
        level = list(range(start, len(parents)))
    return tuple(parents)


def best(
    acceptance_by_rank: ArrayLike, num_tokens: int, max_depth: int | None = None
) -> tuple[Parents, float]:
    """The tree of `num_tokens` nodes that commits most tokens per round.

    A node's child of rank r is accepted with a probability that depends on r alone, or on r and the
    depth. The chance that a node is on the accepted path is the product along its own path, and

        expected tokens = 1 + sum over nodes of that product

    so the best tree takes the most likely node next, again and again; a child is never likelier
    than its parent, and never likelier than an elder sibling once ranks are sorted. This greedy
    choice finds what Sequoia's dynamic program finds, in K log K.

    Args:
      acceptance_by_rank: `[R]`, or `[D, R]` by depth, probabilities that the child of rank r is the
        one accepted (not given that those before it were rejected); they sum to at most 1.
      num_tokens: K, at least 1.
      max_depth: longest path; by default K, or D.

    Returns:
      The parents, level by level, and the expected tokens per round.

    Raises:
      ValueError: if a number is outside its range, or fewer than K nodes can be accepted at all.

    References:
      Chen et al., 2024, Sequoia, https://arxiv.org/abs/2402.12374, section 3.1.

    >>> parents, tokens = best([0.6, 0.2, 0.1], num_tokens=4)
    >>> parents, round(tokens, 3)
    ((-1, -1, 0, 2), 2.376)
    """
    _check_count("num_tokens", num_tokens)
    chances = _chances(acceptance_by_rank, num_tokens)
    deepest = len(chances) if max_depth is None else min(max_depth, len(chances))
    nodes = list(itertools.islice(_likeliest(chances, deepest), num_tokens))
    if len(nodes) < num_tokens:
        raise ValueError(f"num_tokens={num_tokens}: only {len(nodes)} nodes can be accepted at all")
    return _tree([path for path, _ in nodes]), 1.0 + sum(chance for _, chance in nodes)


def fastest(
    acceptance_by_rank: ArrayLike,
    draft_seconds: ArrayLike,
    verify_seconds: ArrayLike,
) -> tuple[Parents, float]:
    """The tree that commits most tokens per second, its size and depth chosen by measured times.

        expected tokens / (draft_seconds of its levels + verify_seconds of its size)

    over the `best` trees of every size and depth, the empty one, which is plain decoding, included.
    Of equals the smallest and then the shallowest is taken. `tree_drafter` makes one pass a level.

    Args:
      acceptance_by_rank: as for `best`.
      draft_seconds: of a pass of the draft; or `[D]`, of that which makes level 1, 2, ...
      verify_seconds: `[N + 1]`, of a pass of the target over 0, 1, ..., N draft tokens and the one
        before them; N is the largest size considered. Infinite where a size was not measured.

    Returns:
      The parents, level by level, and the expected tokens per second.

    Raises:
      ValueError: if a number is outside its range.

    References:
      Chen et al., 2024, Sequoia, https://arxiv.org/abs/2402.12374, section 3.3.

    >>> parents, speed = fastest([0.6, 0.2, 0.1], 0.1, [1.0, 1.05, 1.1, 1.15, 1.6])
    >>> parents, round(speed, 3)
    ((-1, -1, 0), 1.6)
    >>> fastest([0.6, 0.2, 0.1], 0.5, [1.0, 1.5, 2.0])
    ((), 1.0)
    """
    verify = np.asarray(verify_seconds, np.float64)
    if verify.ndim != 1 or not verify.size or not np.all(verify > 0):
        raise ValueError(f"verify_seconds={verify.tolist()} must be [N + 1] positive numbers")
    size = len(verify) - 1
    draft = np.asarray(draft_seconds, np.float64)
    if draft.ndim > 1 or not draft.size or not np.all(draft >= 0):
        raise ValueError(
            f"draft_seconds={draft.tolist()} must be one number of at least 0, or one a level"
        )
    chances = _chances(acceptance_by_rank, max(size, 1))
    deepest = min(size, len(chances), *draft.shape)
    levels = np.concatenate([[0.0], np.cumsum(np.broadcast_to(draft, (deepest,)))])
    best_speed, best_paths = 1.0 / verify[0], []
    for depth in range(1, deepest + 1):
        expected, paths = 1.0, []
        for path, chance in itertools.islice(_likeliest(chances, depth), size):
            expected += chance
            paths.append(path)
            deep = max(map(len, paths))
            speed = expected / (levels[deep] + verify[len(paths)])
            # Beyond rounding: a child that costs as much as it brings is left out.
            better = speed > best_speed * (1 + 1e-12)
            as_good = speed >= best_speed * (1 - 1e-12) and len(paths) < len(best_paths)
            if better or as_good:
                best_speed, best_paths = speed, list(paths)
    return _tree(best_paths), float(best_speed)


def _chances(acceptance_by_rank: ArrayLike, num_levels: int) -> np.ndarray:
    """Probabilities `[D, R]` by depth and rank, checked."""
    chances = np.asarray(acceptance_by_rank, np.float64)
    if chances.ndim not in (1, 2) or 0 in chances.shape:
        raise ValueError(f"acceptance_by_rank has shape {chances.shape}; wanted [R] or [D, R]")
    if not np.all((chances >= 0) & (chances.sum(-1, keepdims=True) <= 1 + 1e-6)):
        raise ValueError(
            f"acceptance_by_rank={chances.tolist()} must be at least 0 and sum to at most 1"
        )
    if chances.ndim == 1:
        chances = np.broadcast_to(chances, (num_levels, chances.size))
    return chances


def _likeliest(chances: np.ndarray, deepest: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """All nodes that can be accepted, likeliest first: the ranks from the root on, and the chance.

    The ranks are places in the order of likelihood.
    """
    order = np.argsort(-chances, axis=1, kind="stable")
    # Of every node the next sibling and the first child wait.
    waiting: list[tuple[float, tuple[int, ...], float]] = []

    def offer(above: float, path: tuple[int, ...]) -> None:
        """A node under one of this chance."""
        depth, place = len(path) - 1, path[-1]
        if depth < deepest and place < chances.shape[1]:
            chance = above * float(chances[depth, order[depth, place]])
            if chance > 0:
                heapq.heappush(waiting, (-chance, path, above))

    offer(1.0, (0,))
    while waiting:
        negative, path, above = heapq.heappop(waiting)
        yield path, -negative
        offer(above, (*path[:-1], path[-1] + 1))
        offer(-negative, (*path, 0))


def _tree(paths: Sequence[tuple[int, ...]]) -> Parents:
    """The topology of nodes given by their ranks from the root on, level by level."""
    ordered = sorted(paths, key=lambda path: (len(path), path))
    index = {path: i for i, path in enumerate(ordered)}
    return tuple(index.get(path[:-1], -1) for path in ordered)


def expected_tokens(parents: Sequence[int], acceptance_by_rank: ArrayLike) -> float:
    """Tokens per round of a tree whose children are accepted by rank: 1 + sum of path products.

    Args:
      parents: the tree.
      acceptance_by_rank: as for `best`, ranks in the order of siblings.

    >>> round(expected_tokens(chain(2), [0.5]), 3)
    1.75
    """
    parents = check(parents)
    chances = np.asarray(acceptance_by_rank, np.float64)
    levels, ranks = depths(parents), rank(parents)
    if chances.ndim == 1:
        chances = np.broadcast_to(chances, (max(levels, default=0) + 1, chances.size))
    if max(levels, default=0) > len(chances) or max(ranks, default=-1) >= chances.shape[1]:
        raise ValueError(
            f"acceptance_by_rank of shape {chances.shape} must cover the tree: "
            f"{max(levels)} levels, {max(ranks) + 1} siblings"
        )
    on_path = [1.0]  # of the root, then of every node
    for parent, level, place in zip(parents, levels, ranks, strict=True):
        on_path.append(on_path[parent + 1] * float(chances[level - 1, place]))
    return sum(on_path)


def depths(parents: Sequence[int]) -> tuple[int, ...]:
    """Level of every node; children of the root are at 1.

    >>> depths((-1, -1, 0, 2))
    (1, 1, 2, 3)
    """
    found: list[int] = []
    for parent in check(parents):
        found.append(1 + (found[parent] if parent >= 0 else 0))
    return tuple(found)


def rank(parents: Sequence[int]) -> tuple[int, ...]:
    """Place of every node among its siblings, from 0.

    >>> rank((-1, -1, 0, 0))
    (0, 1, 0, 1)
    """
    seen: dict[int, int] = {}
    found = []
    for parent in check(parents):
        found.append(seen.get(parent, 0))
        seen[parent] = found[-1] + 1
    return tuple(found)


def check(parents: Sequence[int]) -> Parents:
    """The tree as a tuple of Python integers.

    Raises:
      ValueError: if a parent does not come before its child.
    """
    given = tuple(int(parent) for parent in parents)
    for node, parent in enumerate(given):
        if not -1 <= parent < node:
            raise ValueError(
                f"parents={given}: node {node} has parent {parent}; wanted an earlier node, or -1"
            )
    return given


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer of at least 1")
