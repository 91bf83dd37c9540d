"""Who proposes: the parts that suggest the next tokens of every row."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from . import sampling as sampling_lib
from . import trees
from .draws import drawer, empty_chain, extend_chain
from .types import Drafter, LanguageModel, Params, Proposal, Sampling, TreeLanguageModel

Siblings = Literal["distinct", "independent", "chosen", "mixed"]


class DraftState(NamedTuple):
    """What a draft model remembers.

    cache: its own.
    num_read: `[B]` int32, tokens that are in it, of the text and of what was drafted after it.
    """

    cache: Any
    num_read: Array


def no_drafter() -> Drafter:
    """Proposes nothing: the loop becomes plain decoding, one token per target pass.

    This is the baseline of every comparison. It is the same compiled loop with K = 0, not a second
    one.

    >>> no_drafter().num_tokens
    0
    """

    def init(params: Params, batch_size: int, max_len: int) -> tuple[()]:
        del params, batch_size, max_len
        return ()

    def propose(
        params: Params,
        state: tuple[()],
        tokens: Array,
        lengths: Array,
        keys: Array,
        sampling: Sampling,
    ) -> Proposal:
        del params, lengths, keys, sampling
        empty = jnp.zeros((tokens.shape[0], 0), jnp.int32)
        return Proposal(tokens=empty, probs=None, proposed=None, state=state)

    return Drafter(0, (), init, _no_prefill, propose)


def model_drafter(
    model: LanguageModel, num_tokens: int, *, name: str = "draft", shares_noise: bool = False
) -> Drafter:
    """A small language model drafts `num_tokens` tokens, one pass each, as the row's sampling says.

    Its distributions go through the same `probabilities` as the target's, so that with the same
    weights on both sides every token is accepted.

    Args:
      model: the draft model; it shares the target's vocabulary.
      num_tokens: K, at least 1.
      name: the entry of `params` with its weights.
      shares_noise: draws with the random numbers that `gumbel_coupling` draws the target's tokens
        with; for that verifier alone.

    Raises:
      ValueError: if `num_tokens` is not an integer of at least 1.

    >>> import jax, jaxsd
    >>> from jaxsd import testing
    >>> model = testing.MarkovModel(vocab_size=3)
    >>> jaxsd.model_drafter(model, num_tokens=4).num_tokens
    4
    """
    _check_num_tokens(num_tokens)

    def init(params: Params, batch_size: int, max_len: int) -> DraftState:
        del params
        cache = model.init_cache(batch_size, max_len + num_tokens)
        return DraftState(cache, jnp.zeros((batch_size,), jnp.int32))

    def prefill(params: Params, state: DraftState, prompts: Array, lengths: Array) -> DraftState:
        return DraftState(read_prompts(model, params[name], state.cache, prompts, lengths), lengths)

    def propose(
        params: Params,
        state: DraftState,
        tokens: Array,
        lengths: Array,
        keys: Array,
        sampling: Sampling,
    ) -> Proposal:
        return draft(params[name], state.cache, tokens, lengths, keys, sampling, 1, num_tokens)

    def propose_some(
        params: Params,
        state: DraftState,
        tokens: Array,
        lengths: Array,
        keys: Array,
        sampling: Sampling,
        count: Array,
    ) -> Proposal:
        # Drafted tokens of the last round that the target did not take are not the text's.
        num_read = jnp.minimum(state.num_read, lengths - 1)
        weights, is_drafting = params[name], count > 0
        cache = _catch_up(model, weights, state.cache, tokens, lengths, num_read, is_drafting)
        first = jnp.minimum(count, 1)
        proposal = draft(weights, cache, tokens, lengths, keys, sampling, first, count)
        num_read = jnp.where(is_drafting, proposal.state.num_read, num_read)
        return proposal._replace(state=DraftState(proposal.state.cache, num_read))

    def draft(
        weights: Params,
        cache: Any,
        tokens: Array,
        lengths: Array,
        keys: Array,
        sampling: Sampling,
        first: Array | int,  # whether there is a first token: 0 or 1
        count: Array | int,
    ) -> Proposal:
        rules, draw = drawer(keys, sampling, lengths, shares_noise=shares_noise)

        def score_first(cache: Any, token: Array, index: Array | int) -> tuple[Array, Any]:
            del token, index
            return read_last(model, weights, cache, tokens, lengths)

        def score(cache: Any, token: Array, index: Array | int) -> tuple[Array, Any]:
            positions = (lengths + (index - 1))[:, None]
            logits, cache = model.apply(weights, token[:, None], positions, cache)
            return logits[:, 0], cache

        chain = empty_chain(model, weights, cache, tokens, lengths, num_tokens, rules)
        chain = extend_chain(chain, score_first, draw, 0, first)
        chain = extend_chain(chain, score, draw, 1, count)
        return Proposal(
            tokens=chain.tokens,
            probs=chain.probs,
            proposed=None,
            state=DraftState(chain.cache, lengths + (count - 1)),
        )

    return Drafter(num_tokens, (name,), init, prefill, propose, propose_some=propose_some)


def tree_drafter(
    model: TreeLanguageModel,
    parents: Sequence[int],
    *,
    siblings: Siblings = "distinct",
    name: str = "draft",
) -> Drafter:
    """A small language model fills a tree of a fixed topology, one pass per level.

    How the children of one node are made decides what they are worth, and to which verifier:

    - "distinct": drawn from the draft's distribution without replacement. `recursive_rejection`,
      `traversal_verification`.
    - "independent": each drawn from it anew, so that tokens repeat. `k_sequential`, and what the
      theory of several drafts is about.
    - "chosen": its most probable tokens. `target_matching`; best at temperature 0.
    - "mixed": its most probable tokens but one, and first a token drawn from the rest. Accepts
      sum of p over the chosen and of min(p, q) over the rest: nearly the most that is possible.

    Greedy rows always get the most probable tokens.

    Args:
      model: the draft model; it shares the target's vocabulary.
      parents: the tree (see `jaxsd.trees`), level by level.
      siblings: as above.
      name: the entry of `params` with its weights.

    Raises:
      ValueError: if the tree is empty or not in the order of levels, or `siblings` is unknown.

    References:
      Jeon et al., 2024, https://arxiv.org/abs/2402.14160 (distinct); Miao et al., 2023,
      https://arxiv.org/abs/2305.09781 (independent).

    >>> import jaxsd
    >>> from jaxsd import testing
    >>> drafter = tree_drafter(testing.MarkovModel(vocab_size=5), jaxsd.trees.balanced((3, 2)))
    >>> drafter.num_tokens, drafter.depth
    (9, 2)
    """
    parents = trees.check(parents)
    levels = np.array(trees.depths(parents))
    if not parents or np.any(np.diff(levels) < 0):
        raise ValueError(f"parents={parents} must hold at least one node, level by level")
    if siblings not in ("distinct", "independent", "chosen", "mixed"):
        raise ValueError(
            f"siblings={siblings!r} must be 'distinct', 'independent', 'chosen' or 'mixed'"
        )
    if not hasattr(model, "apply_tree"):
        raise ValueError(f"model={model!r} must have apply_tree (jaxsd.TreeLanguageModel)")
    num_tokens, depth = len(parents), int(levels.max())
    children = [[i for i, p in enumerate(parents) if p == node] for node in range(-1, num_tokens)]
    paths = np.zeros((num_tokens, num_tokens), bool)  # which nodes lie on every node's path
    for node, parent in enumerate(parents):
        paths[node] = paths[parent] if parent >= 0 else False
        paths[node, node] = True

    def init(params: Params, batch_size: int, max_len: int) -> Any:
        del params
        return model.init_cache(batch_size, max_len + num_tokens)

    def prefill(params: Params, state: Any, prompts: Array, lengths: Array) -> Any:
        return read_prompts(model, params[name], state, prompts, lengths)

    def propose(
        params: Params,
        state: Any,
        tokens: Array,
        lengths: Array,
        keys: Array,
        sampling: Sampling,
    ) -> Proposal:
        logits, cache = read_last(model, params[name], state, tokens, lengths)
        logits = logits[:, None]  # [B, nodes of a level that have children, V]
        level = [-1]
        drafted: list[Array] = [jnp.zeros_like(lengths)] * num_tokens
        laws: list[Array] = [jnp.zeros_like(logits[:, 0], jnp.float32)] * num_tokens
        guide = getattr(sampling, "guide", None)
        given = jnp.minimum(lengths, 0)[:, None] + jnp.array(parents, jnp.int32)[None, :]
        for number in range(1, depth + 1):
            if guide is not None:
                known = level[-1] + 1  # nodes so far, as far as they are asked for
                above = jnp.stack([*drafted[:known], lengths], axis=1)[:, :known]
                nodes = jnp.broadcast_to(jnp.array(level, jnp.int32)[None], logits.shape[:2])
                logits = guide.constrain_nodes(logits, nodes, lengths, above, given[:, :known])
            # Families of one size are drawn together.
            for count in sorted({len(children[node + 1]) for node in level}):
                places = [i for i, node in enumerate(level) if len(children[node + 1]) == count]
                heads = [children[level[i] + 1] for i in places]
                made = draw_families(keys, logits[:, np.array(places)], sampling, heads, siblings)
                for child, token, law in made:
                    drafted[child], laws[child] = token, law
            level = [i for i in range(num_tokens) if levels[i] == number and children[i + 1]]
            if not level:
                break
            # Nodes without children between them are read too: slots stay in a row.
            first, last = level[0], level[-1] + 1
            block = jnp.stack(drafted[first:last], axis=1)
            positions = jnp.broadcast_to((lengths + (number - 1))[:, None], block.shape)
            seen = jnp.asarray(paths[first:last, :last])[None]
            # No length is negative; a literal of this size XLA would fold for seconds.
            seen = seen | (lengths < 0)[:, None, None]
            logits, cache = model.apply_tree(params[name], block, positions, cache, lengths, seen)
            logits = logits[:, np.array(level) - first]
        probs = jnp.stack(laws, axis=1)
        return Proposal(
            tokens=jnp.stack(drafted, axis=1),
            probs=probs,
            proposed=jnp.any(probs > 0, axis=-1),
            state=cache,
            parents=given,
        )

    def keep(state: Any, lengths: Array, path: Array) -> Any:
        return model.keep(state, lengths, lengths[:, None] + path)

    return Drafter(num_tokens, (name,), init, prefill, propose, depth, keep)


def confident_tree_drafter(
    model: TreeLanguageModel,
    num_tokens: int,
    *,
    depth: int,
    width: int,
    name: str = "draft",
) -> Drafter:
    """A small language model grows the tree that it believes in most, anew in every round.

    A node's value is the product of the draft's probabilities along its path. On every level the
    `width` nodes of largest value are given their `width` most probable children; at the end the
    `num_tokens` nodes of largest value of all are proposed. Tokens are chosen, not drawn:
    `target_matching` is the verifier. Shapes are static; the topology is data.

    Args:
      model: the draft model; it shares the target's vocabulary.
      num_tokens: K, nodes that the target verifies; at most all that are made, `width` on the first
        level and `width^2` on the others.
      depth: levels, each one pass of the draft over `width` tokens.
      width: as above; at most the vocabulary.
      name: the entry of `params` with its weights.

    Raises:
      ValueError: if a number is not an integer in its range.

    References:
      Li et al., 2024, EAGLE-2, https://arxiv.org/abs/2406.16858, section 4.

    >>> from jaxsd import testing
    >>> model = testing.MarkovModel(vocab_size=5)
    >>> confident_tree_drafter(model, num_tokens=6, depth=3, width=2).depth
    3
    """
    for argument, value in (("depth", depth), ("width", width)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{argument}={value!r} must be an integer of at least 1")
    _check_num_tokens(num_tokens)
    num_made = width + (depth - 1) * width * width
    if num_tokens > num_made:
        raise ValueError(
            f"num_tokens={num_tokens} must be at most the {num_made} nodes that depth={depth} and "
            f"width={width} make"
        )
    if not hasattr(model, "apply_tree"):
        raise ValueError(f"model={model!r} must have apply_tree (jaxsd.TreeLanguageModel)")
    num_read = (depth - 1) * width
    room = max(num_tokens, num_read)

    def init(params: Params, batch_size: int, max_len: int) -> Any:
        del params
        slots = jnp.zeros((batch_size, num_tokens), jnp.int32)
        return model.init_cache(batch_size, max_len + room), slots

    def prefill(params: Params, state: Any, prompts: Array, lengths: Array) -> Any:
        return read_prompts(model, params[name], state[0], prompts, lengths), state[1]

    def propose(
        params: Params,
        state: Any,
        tokens: Array,
        lengths: Array,
        keys: Array,
        sampling: Sampling,
    ) -> Proposal:
        del keys
        guide = getattr(sampling, "guide", None)
        logits, cache = read_last(model, params[name], state[0], tokens, lengths)
        if guide is not None:
            logits = guide.constrain(guide.rules, logits, lengths)
        chances, made = lax.top_k(jax.nn.log_softmax(logits.astype(jnp.float32)), width)
        # Of all nodes made so far: token, value, parent, and the slot it was read into, or none.
        all_tokens, all_values = made, chances
        all_parents = jnp.full_like(made, -1)
        all_slots = jnp.full_like(made, -1)
        frontier = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None, :], made.shape)
        frontier_values = chances
        seen = jnp.zeros((*made.shape, 0), bool)  # [B, width, slots read so far]
        for number in range(1, depth):
            first = (number - 1) * width
            block = jnp.take_along_axis(all_tokens, frontier, axis=1)
            own = jnp.eye(width, dtype=bool)[None]
            own = jnp.broadcast_to(own, (block.shape[0], width, width))
            seen = jnp.concatenate([seen, own], axis=2)
            positions = jnp.broadcast_to((lengths + (number - 1))[:, None], block.shape)
            logits, cache = model.apply_tree(params[name], block, positions, cache, lengths, seen)
            slot = jnp.broadcast_to(first + jnp.arange(width, dtype=jnp.int32)[None], block.shape)
            all_slots = jax.vmap(lambda into, at, one: into.at[at].set(one))(
                all_slots, frontier, slot
            )
            if guide is not None:
                logits = guide.constrain_nodes(logits, frontier, lengths, all_tokens, all_parents)
            log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
            chances, made = lax.top_k(log_probs, width)  # [B, width, width]
            values = (frontier_values[:, :, None] + chances).reshape(len(made), -1)
            start = all_tokens.shape[1]
            parent = jnp.broadcast_to(frontier[:, :, None], made.shape).reshape(len(made), -1)
            all_tokens = jnp.concatenate([all_tokens, made.reshape(len(made), -1)], axis=1)
            all_values = jnp.concatenate([all_values, values], axis=1)
            all_parents = jnp.concatenate([all_parents, parent], axis=1)
            all_slots = jnp.concatenate([all_slots, jnp.full_like(parent, -1)], axis=1)
            frontier_values, best = lax.top_k(values, width)
            frontier = start + best
            seen = jnp.take_along_axis(seen, (best // width)[:, :, None], axis=1)
        # A child is worth at most its parent, and comes after it: of equals the earlier is taken,
        # so that the nodes chosen are a tree. In their own order, parents come first.
        _, chosen = lax.top_k(all_values, num_tokens)
        chosen = jnp.sort(chosen, axis=1)
        pick = lambda values: jnp.take_along_axis(values, chosen, axis=1)  # noqa: E731
        parent = pick(all_parents)
        is_parent = chosen[:, None, :] == parent[:, :, None]
        place = jnp.argmax(is_parent, axis=2).astype(jnp.int32)
        return Proposal(
            tokens=pick(all_tokens),
            probs=None,
            proposed=None,
            state=(cache, jnp.maximum(pick(all_slots), 0)),
            parents=jnp.where(parent < 0, -1, place),
        )

    def keep(state: Any, lengths: Array, path: Array) -> Any:
        # A node that was not read has no children: it is the last of its path, and the next round
        # reads the last two tokens.
        cache, slots = state
        on_path = jnp.take_along_axis(slots, path, axis=1)
        # Never from before where it goes to: what is moved there is not used then.
        on_path = jnp.maximum(on_path, jnp.arange(path.shape[1], dtype=jnp.int32)[None, :])
        return model.keep(cache, lengths, lengths[:, None] + on_path), slots

    return Drafter(num_tokens, (name,), init, prefill, propose, depth, keep)


def draw_families(
    keys: Array,
    logits: Array,
    sampling: Sampling,
    families: list[list[int]],
    siblings: Siblings,
) -> list[tuple[int, Array, Array]]:
    """The children of several nodes: of each its number, its token `[B]` and its law `[B, V]`.

    Args:
      keys: `[B]`; every family folds its first child's number into them.
      logits: `[B, F, V]` of the draft, after every parent.
      sampling: with `[B]` fields.
      families: F lists of children, equally long.
      siblings: see `tree_drafter`.
    """
    batch, num_families, size = logits.shape
    heads = jnp.array([family[0] for family in families], jnp.uint32)
    fold = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)), in_axes=(0, None))
    fields = (sampling.temperature, sampling.top_k, sampling.top_p)
    rows = Sampling(*(jnp.repeat(jnp.asarray(field), num_families) for field in fields))
    tokens, laws = draw_siblings(
        fold(keys, heads).reshape(-1), logits.reshape(-1, size), rows, len(families[0]), siblings
    )
    made = []
    for place, (token, law) in enumerate(zip(tokens, laws, strict=True)):
        token, law = token.reshape(batch, num_families), law.reshape(batch, num_families, size)
        for index, family in enumerate(families):
            made.append((family[place], token[:, index], law[:, index]))
    return made


def draw_siblings(
    keys: Array, logits: Array, sampling: Sampling, count: int, siblings: Siblings
) -> tuple[list[Array], list[Array]]:
    """Children of one node of every row: tokens `[B]` and what each was drawn from `[B, V]`.

    Args:
      keys: `[B]`, consumed.
      logits: `[B, V]` of the draft.
      sampling: with `[B]` fields.
      count: how many children.
      siblings: see `tree_drafter`.
    """
    probs = sampling_lib.probabilities(logits, sampling)
    size = probs.shape[-1]
    _, likeliest = lax.top_k(logits, min(count, size))
    is_greedy = jnp.broadcast_to(jnp.asarray(sampling.temperature) <= 0, probs.shape[:1])[:, None]

    def chosen(rank: int) -> Array:
        """One-hot, or nothing when the vocabulary is exhausted."""
        if rank >= size:
            return jnp.zeros_like(probs)
        return jax.nn.one_hot(likeliest[:, rank], size, dtype=probs.dtype)

    tokens, laws = [], []
    left = probs
    if siblings == "mixed":
        for rank in range(count - 1):
            left = left * (1 - chosen(rank))
        left = _normalised(left)
    for place in range(count):
        if siblings == "chosen":
            law = chosen(place)
        elif siblings == "mixed":
            law = left if place == 0 else chosen(place - 1)
        else:
            law = left
        law = jnp.where(is_greedy, chosen(place), law)
        place_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, place)
        token = jax.vmap(sampling_lib.categorical)(place_keys, law)
        if siblings == "distinct":
            left = _normalised(left * (1 - jax.nn.one_hot(token, size, dtype=left.dtype)))
        tokens.append(token)
        laws.append(law)
    return tokens, laws


def _normalised(weights: Array) -> Array:
    """Rows `[B, V]` that sum to 1, or stay zero."""
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, jnp.ones_like(total))


def read_last(
    model: LanguageModel, params: Params, cache: Any, tokens: Array, lengths: Array
) -> tuple[Array, Any]:
    """A draft's logits `[B, V]` after the last committed token, and its cache.

    When all K tokens of the last round were accepted, the draft has not read the K-th: the pass
    takes the last two tokens. Reading a token again at its own place changes nothing.
    """
    starts = jnp.maximum(lengths - 2, 0)
    pair = starts[:, None] + jnp.arange(2, dtype=jnp.int32)[None, :]
    last_two = jnp.take_along_axis(tokens, pair, axis=1, mode="clip")
    logits, cache = model.apply(params, last_two, pair, cache)
    last = (lengths - 1 - starts)[:, None, None]
    return jnp.take_along_axis(logits, last, axis=1)[:, 0], cache


# Tokens that a draft reads in one pass when it has to make up for rounds without it: enough to keep
# the passes few, and few enough to be one tile of a matrix product.
_CATCH_UP_TOKENS = 16


def _catch_up(
    model: LanguageModel,
    params: Params,
    cache: Any,
    tokens: Array,
    lengths: Array,
    num_read: Array,
    is_drafting: Array,
) -> Any:
    """The cache with all committed tokens but the last two, which `read_last` reads; if drafting.

    A row that has read more reads its last ones again, which changes nothing.
    """
    width = min(_CATCH_UP_TOKENS, tokens.shape[1])
    ends = lengths - 2
    steps = jnp.arange(width, dtype=jnp.int32)[None, :]

    def is_behind(carry: tuple[Any, Array]) -> Array:
        return is_drafting & jnp.any(carry[1] < ends)

    def read(carry: tuple[Any, Array]) -> tuple[Any, Array]:
        cache, num_read = carry
        # Not beyond the buffer; what a short text has not reached yet is written over later.
        starts = jnp.maximum(jnp.minimum(num_read, ends - width), 0)
        positions = starts[:, None] + steps
        block = jnp.take_along_axis(tokens, positions, axis=1, mode="clip")
        _, cache = model.apply(params, block, positions, cache)
        return cache, jnp.maximum(num_read, starts + width)

    return lax.while_loop(is_behind, read, (cache, num_read))[0]


def prompt_lookup(num_tokens: int, *, max_ngram: int = 3, min_ngram: int = 1) -> Drafter:
    """Copies what followed the last occurrence of the row's own ending, without any model.

    The longest ending of at most `max_ngram` and at least `min_ngram` tokens that occurs earlier in
    the row decides; among its occurrences the latest. The tokens after it are proposed; a copy that
    reaches the end of the row goes on as the pattern repeats. Where nothing matches, nothing is
    proposed and nothing counts as drafted. It pays where text repeats itself: code, edits,
    summaries, quotations.

    Args:
      num_tokens: K, at least 1.
      max_ngram: longest ending to look for.
      min_ngram: shortest.

    Raises:
      ValueError: if a number is not an integer in its range.

    References:
      Saxena, 2023, "Prompt Lookup Decoding".

    >>> prompt_lookup(num_tokens=8).num_tokens
    8
    """
    _check_num_tokens(num_tokens)
    for argument, value, low in (("min_ngram", min_ngram, 1), ("max_ngram", max_ngram, min_ngram)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{argument}={value!r} must be an integer of at least {low}")

    def init(params: Params, batch_size: int, max_len: int) -> tuple[()]:
        del params, batch_size, max_len
        return ()

    def propose(
        params: Params,
        state: tuple[()],
        tokens: Array,
        lengths: Array,
        keys: Array,
        sampling: Sampling,
    ) -> Proposal:
        del params, keys, sampling
        drafted, proposed = jax.vmap(lookup)(tokens, lengths)
        return Proposal(tokens=drafted, probs=None, proposed=proposed, state=state)

    def lookup(tokens: Array, length: Array) -> tuple[Array, Array]:
        """One row: tokens `[L]`, length `[]` to drafted `[K]`, proposed `[K]`."""
        ends = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        # matched[e] counts how many tokens ending at e equal the row's last ones, up to max_ngram.
        matched = jnp.zeros_like(ends)
        running = jnp.ones(tokens.shape, bool)
        for offset in range(max_ngram):
            wanted = jnp.take(tokens, jnp.maximum(length - 1 - offset, 0))
            shifted = jnp.take(tokens, jnp.maximum(ends - offset, 0))
            running &= (shifted == wanted) & (ends >= offset)
            matched += running.astype(jnp.int32)
        # An occurrence ends before the row's last token: something follows it.
        matched = jnp.where((ends < length - 1) & (matched >= min_ngram), matched, 0)
        best = jnp.max(matched)
        latest = jnp.max(jnp.where(matched == best, ends, -1))
        # Past the row's end the copy goes on with what it has itself proposed: a repeating pattern.
        period = jnp.maximum(length - 1 - latest, 1)
        source = latest + 1 + jnp.arange(num_tokens, dtype=jnp.int32) % period
        found = best > 0
        drafted = jnp.take(tokens, jnp.where(found, source, 0))
        return jnp.where(found, drafted, 0), jnp.broadcast_to(found, (num_tokens,))

    return Drafter(num_tokens, (), init, _no_prefill, propose)


def block_positions(tokens: Array, lengths: Array) -> Array:
    """Positions 0..T-1 of every row `[B, T]`.

    They depend on `lengths` in a way that adds nothing (a length is never negative): as literals,
    XLA would spend seconds folding masks and softmaxes of whole buffers at compile time.
    """
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    return jnp.minimum(lengths, 0).astype(jnp.int32)[:, None] + steps[None, :]


def read_prompts(
    model: LanguageModel, params: Params, cache: Any, prompts: Array, lengths: Array
) -> Any:
    """The cache with the prompts in it, read in pieces.

    The scores of a piece take `[B, heads, piece, slots]`: those of a long prompt at once would take
    more memory than the model. Nobody asks for the logits, so the compiler drops the vocabulary
    projection.
    """
    positions, width = block_positions(prompts, lengths), prompts.shape[1]
    piece = _PROMPT_PIECE
    if width <= piece:
        return model.apply(params, prompts, positions, cache)[1]

    def read(index: Array, cache: Any) -> Any:
        # The last piece ends with the prompt, and may so begin among tokens that were read before.
        start = jnp.minimum(index * piece, width - piece)
        tokens, places = (
            lax.dynamic_slice_in_dim(x, start, piece, axis=1) for x in (prompts, positions)
        )
        return model.apply(params, tokens, places, cache)[1]

    return lax.fori_loop(0, -(-width // piece), read, cache)


_PROMPT_PIECE = 512


def _no_prefill(params: Params, state: object, prompts: Array, lengths: Array) -> object:
    del params, prompts, lengths
    return state


def _check_num_tokens(num_tokens: int) -> None:
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or num_tokens < 1:
        raise ValueError(
            f"num_tokens={num_tokens!r} must be an integer of at least 1; "
            "for plain decoding use no_drafter()"
        )
