"""What the losslessness checker tries: kernels of target and draft, and the law that must come."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import trees as tree_lib
from .types import LanguageModel, Sampling


class Case(NamedTuple):
    """One pair of history-dependent kernels; level i is an array `[V] * i + [V]`.

    name: the kind.
    target: levels 0..D, float64, rows summing to 1; the law to be emitted; D is the tree's depth.
    given: levels 0..D, what the function gets for them: probabilities or logits.
    draft: levels 0..D-1, rows summing to 1, or to 0 where nothing is proposed.
    parents: of every node; a chain's if there is no tree.
    siblings: how children are drawn from their parent's draft kernel.
    """

    name: str
    target: list[np.ndarray]
    given: list[np.ndarray]
    draft: list[np.ndarray]
    parents: tuple[int, ...]
    siblings: str = "independent"

    @property
    def length(self) -> int:
        return len(self.parents)

    @property
    def vocab_size(self) -> int:
        return self.target[0].shape[-1]

    def paths(self) -> list[list[int]]:
        """Of every node the nodes from the root down to it."""
        found: list[list[int]] = []
        for node, parent in enumerate(self.parents):
            found.append([*(found[parent] if parent >= 0 else []), node])
        return found

    def node_probs(self, node: int, tokens: np.ndarray) -> np.ndarray:
        """What node's token is drawn from, `[N, V]`, given the tokens `[N, >= node]` before it."""
        path = self.paths()[node][:-1]
        row = self.draft[len(path)][tuple(tokens[:, path].T)]
        row = np.broadcast_to(row, (len(tokens), self.vocab_size))
        family = [i for i, parent in enumerate(self.parents) if parent == self.parents[node]]
        place = family.index(node)
        eye = np.eye(self.vocab_size, dtype=row.dtype)
        if self.siblings == "distinct":
            left = row * (1 - eye[tokens[:, family[:place]]].sum(1, dtype=row.dtype))
            total = left.sum(-1, keepdims=True)
            return np.where(total > 0, left / np.where(total > 0, total, 1), 0).astype(row.dtype)
        if self.siblings in ("chosen", "mixed"):
            # Nothing is proposed by a child that a kernel of this support has no token for.
            order = np.argsort(-row, axis=-1, kind="stable")
            num_chosen = len(family) - (self.siblings == "mixed")
            at = place - (self.siblings == "mixed")
            if at < 0:
                left = row * (1 - eye[order[:, :num_chosen]].sum(1, dtype=row.dtype))
                total = left.sum(-1, keepdims=True)
                left = np.where(total > 0, left / np.where(total > 0, total, 1), 0)
                return left.astype(row.dtype)
            if at >= self.vocab_size:
                return np.zeros_like(row)
            has = np.take_along_axis(row, order[:, at : at + 1], axis=-1) > 0
            return eye[order[:, at]] * has
        return row

    def drafts(self) -> tuple[np.ndarray, np.ndarray]:
        """All drafts of positive probability `[N, K]`, and their probabilities `[N]`."""
        tokens = np.zeros((1, 0), np.int32)
        weight = np.ones(1)
        for node in range(self.length):
            probs = self.node_probs(node, tokens).astype(np.float64)
            # Where nothing is proposed the token is a filler.
            probs = probs + np.eye(self.vocab_size)[0] * (probs.sum(-1, keepdims=True) == 0)
            rows, drawn = np.nonzero(probs)
            weight = weight[rows] * probs[rows, drawn]
            tokens = np.concatenate([tokens[rows], drawn[:, None].astype(np.int32)], axis=1)
        return tokens, weight

    def inputs(self, tokens: np.ndarray) -> tuple[np.ndarray, ...]:
        """For drafts `[N, K]` what the function gets: tokens, draft_probs, target, parents."""
        count = len(tokens)
        probs = [self.node_probs(node, tokens[:, :node]) for node in range(self.length)]
        shape = (count, 0, self.vocab_size)
        stacked = np.stack(probs, axis=1) if probs else np.zeros(shape, self.given[0].dtype)
        rows = [self.given[len(path)][tuple(tokens[:, path].T)] for path in [[], *self.paths()]]
        rows = [np.broadcast_to(row, (count, self.vocab_size)) for row in rows]
        parents = np.broadcast_to(np.array(self.parents, np.int32), (count, self.length))
        return tokens, stacked, np.stack(rows, axis=1), parents

    def law(self) -> np.ndarray:
        """The target's joint law of D + 1 tokens, `[V] * (D + 1)`."""
        law = self.target[0]
        for level in self.target[1:]:
            law = law[..., None] * level
        return law

    def completed(
        self, tokens: np.ndarray, num_accepted: np.ndarray, weight: np.ndarray
    ) -> np.ndarray:
        """The law of D + 1 tokens that emitted outputs `[M, K + 1]` have with the target's tail."""
        law = np.zeros(())
        for place, level in enumerate(self.target):
            law = law[..., None] * level
            ends = num_accepted == place
            np.add.at(law, tuple(tokens[ends, : place + 1].T), weight[ends])
        return law


def chain_parents(length: int) -> tuple[int, ...]:
    return tuple(range(-1, length - 1))


def verifier_cases(
    rng: np.random.Generator, vocab_size: int, parents: tuple[int, ...], siblings: str, dtype: str
) -> list[Case]:
    length = max(tree_lib.depths(parents), default=0)

    def levels(count: int, row: Callable[[], np.ndarray]) -> list[np.ndarray]:
        made = []
        for i in range(count):
            rows = [row() for _ in range(vocab_size**i)]
            made.append(np.array(rows, dtype).reshape((vocab_size,) * (i + 1)))
        return made

    def dense() -> np.ndarray:
        return rng.dirichlet(np.ones(vocab_size))

    def sparse() -> np.ndarray:
        row = dense() * (rng.random(vocab_size) < 0.6)
        row[rng.integers(vocab_size)] += 0.1
        return row / row.sum()

    def sharp() -> np.ndarray:
        return 0.999 * certain() + 0.001 / vocab_size

    def certain() -> np.ndarray:
        return np.eye(vocab_size)[rng.integers(vocab_size)]

    def nothing() -> np.ndarray:
        return np.zeros(vocab_size)

    kinds = [
        ("random", dense, dense),
        ("supports with zeros", sparse, sparse),
        ("nearly deterministic", sharp, sharp),
        ("deterministic target", certain, dense),
        ("chosen (one-hot) draft", dense, certain),
        ("chosen (one-hot) draft, deterministic target", certain, certain),
        ("nothing proposed", dense, nothing),
    ]
    pairs = [(name, levels(length + 1, p), levels(length, q)) for name, p, q in kinds]
    target = levels(length + 1, dense)
    pairs.append(("equal laws", target, target[:length]))
    lower = np.arange(vocab_size) < vocab_size // 2
    pairs.append(("disjoint supports", *_restricted(target, lower, levels(length, dense))))
    partly = levels(length, certain)
    partly = [level * (i < (length + 1) // 2) for i, level in enumerate(partly)]
    pairs.append(("fewer tokens proposed than K", target, partly))
    if parents != chain_parents(len(parents)):
        pairs = [(f"{name}, siblings {siblings}, tree {parents}", *pair) for name, *pair in pairs]
    return [
        # A float32 row sums to 1 within rounding only; the law is that of the row as it is given.
        Case(name, [x.astype(np.float64) for x in target], target, draft, parents, siblings)
        for name, target, draft in pairs
    ]


def _restricted(
    target: list[np.ndarray], support: np.ndarray, draft: list[np.ndarray]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The target on `support`, the draft off it."""

    def on(levels: list[np.ndarray], mask: np.ndarray) -> list[np.ndarray]:
        kept = [np.where(mask, level, np.zeros_like(level)) for level in levels]
        return [level / level.sum(-1, keepdims=True) for level in kept]

    return on(target, support), on(draft, ~support)


def function_cases(
    rng: np.random.Generator,
    vocab_size: int,
    length: int,
    dtype: str,
    sampling: Sampling,
    chosen_drafts: bool,
) -> list[Case]:
    def logits(count: int) -> list[np.ndarray]:
        made = []
        for i in range(count):
            rows = []
            while len(rows) < vocab_size**i:
                row = (2 * rng.standard_normal(vocab_size)).astype(dtype)
                if _top_p_margin(row, sampling) > 1e-4:  # else rounding decides what top-p keeps
                    rows.append(row)
            made.append(np.array(rows).reshape((vocab_size,) * (i + 1)))
        return made

    def law(levels: list[np.ndarray]) -> list[np.ndarray]:
        return [_reference_probabilities(level, sampling) for level in levels]

    target, draft = logits(length + 1), logits(length)
    probs = [level.astype(dtype) for level in law(draft)]
    equal = [level.astype(dtype) for level in law(target[:length])]
    cases = [
        Case("random", law(target), target, probs, chain_parents(length)),
        Case("equal laws", law(target), target, equal, chain_parents(length)),
    ]
    if chosen_drafts:
        greedy = [np.eye(vocab_size, dtype=dtype)[level.argmax(-1)] for level in draft]
        cases.append(
            Case("chosen (one-hot) draft", law(target), target, greedy, chain_parents(length))
        )
    return cases


def _reference_probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Temperature, then top-k, then top-p, one row at a time in float64; `logits` `[..., V]`."""
    rows = np.asarray(logits, np.float64).reshape(-1, logits.shape[-1])
    return np.stack([_reference_row(row, sampling)[0] for row in rows]).reshape(logits.shape)


def _top_p_margin(logits: np.ndarray, sampling: Sampling) -> float:
    """How far the mass above any kept or dropped token is from top-p: below it rounding decides."""
    return _reference_row(np.asarray(logits, np.float64), sampling)[1]


def _reference_row(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, float]:
    # The traced fields are float32: the law wanted is that of the rounded setting.
    temperature = float(np.float32(sampling.temperature))  # pyright: ignore[reportArgumentType]
    top_p = float(np.float32(sampling.top_p))  # pyright: ignore[reportArgumentType]
    top_k = int(sampling.top_k)  # pyright: ignore[reportArgumentType]
    if temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)], 1.0
    order = np.argsort(-logits, kind="stable")
    weights = np.exp((logits - logits.max()) / temperature)
    kept = order[:top_k] if top_k > 0 else order
    margin = 1.0
    if top_p < 1:
        above = np.concatenate([[0.0], np.cumsum(weights[kept])[:-1]]) / weights[kept].sum()
        margin = float(np.abs(above - top_p).min())
        kept = kept[(above < top_p) | (np.arange(len(kept)) == 0)]
    probs = np.zeros_like(logits)
    probs[kept] = weights[kept] / weights[kept].sum()
    return probs, margin


def target_law(
    target: LanguageModel,
    params: Any,
    prompt: Sequence[int],
    sampling: Sampling,
    num_new_tokens: int,
    ends: Sequence[int],
) -> dict[tuple[int, ...], float]:
    """The exact law of continuations: the model without its cache, over all of them, in numpy."""
    law: dict[tuple[int, ...], float] = {}
    open_texts: dict[tuple[int, ...], float] = {(): 1.0}
    apply = jax.jit(target.apply)
    for place in range(num_new_tokens):
        texts = np.array([[*prompt, *text] for text in open_texts], np.int32)
        positions = np.broadcast_to(np.arange(texts.shape[1], dtype=np.int32), texts.shape)
        cache = target.init_cache(*texts.shape)
        logits, _ = apply(params, jnp.asarray(texts), jnp.asarray(positions), cache)
        probs = _reference_probabilities(np.asarray(logits[:, -1]), sampling)
        extended: dict[tuple[int, ...], float] = {}
        for (text, mass), row in zip(open_texts.items(), probs, strict=True):
            for token in np.flatnonzero(row).tolist():
                is_end = token in ends or place == num_new_tokens - 1
                (law if is_end else extended)[(*text, token)] = mass * float(row[token])
        open_texts = extended
        if not open_texts:
            break
    return law
