"""What users ask of a text beyond the model: penalties, biases, forbidden tokens, stops, grammars.

All of it is applied to the logits of every place before temperature, top-k and top-p, in drafting,
in verification and in plain decoding alike, so that speculation stays lossless: the law of the text
is that of plain decoding under the same constraints.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from .verifiers import ancestors


class Constraints(NamedTuple):
    """Constraints on the text of every row; None is off.

    Numbers are for all rows, or `[B]`; arrays of tokens `[V]`, or `[B, V]`. All are traced: other
    values never compile anew, another set of fields does. They are applied in this order:

    repetition_penalty: positive; the logits of tokens that occur in prompt or text are divided by
      it where they are positive and multiplied by it where they are negative. 1 is off.
    presence_penalty: subtracted from the logits of tokens that occur in the generated text.
    frequency_penalty: subtracted once for every occurrence in the generated text.
    logit_bias: added to the logits; `-inf` bans a token.
    allowed: bool, tokens that may occur at all.
    min_new_tokens: the ids that end a text are forbidden before so many tokens are generated.
    stop: `[S, M]` or `[B, S, M]` int32, token sequences that end a row, padded with -1 on the left.
      The row keeps the sequence and nothing after it. It is found wherever it ends, across rounds
      too, within the generated text. `stop_sequences` makes the array.
    """

    repetition_penalty: ArrayLike | None = None
    presence_penalty: ArrayLike | None = None
    frequency_penalty: ArrayLike | None = None
    logit_bias: ArrayLike | None = None
    allowed: ArrayLike | None = None
    min_new_tokens: ArrayLike | None = None
    stop: ArrayLike | None = None


NONE = Constraints()


class Grammar(NamedTuple):
    """Which tokens may come next, by a state that every token moves; functions of one row.

    They run on the device, traced. Every state that can be reached must allow a token.

    start: the state before the first generated token, a pytree of arrays.
    advance: `(state, token []) -> state`.
    allowed: `state -> [V]` bool.
    """

    start: Any
    advance: Callable[[Any, Array], Any]
    allowed: Callable[[Any], Array]


class Rules(NamedTuple):
    """Constraints of a batch and what they need to know of its texts: part of the decoder's state.

    constraints: fields `[B, ...]` or None.
    in_prompt: `[B, V]` bool, or None where nothing asks for it.
    counts: `[B, V]` int32, generated so far, or None.
    grammar: states of every row, or None.
    prompt_lengths: `[B]`.
    """

    constraints: Constraints
    in_prompt: Array | None
    counts: Array | None
    grammar: Any
    prompt_lengths: Array


class Guide(NamedTuple):
    """How a drafter follows the rules while it drafts; it may ignore them, and accept less.

    rules: as they stand before the round; to be carried from token to token.
    grammar: the decoder's.
    eos_ids: ids that end a text.
    """

    rules: Rules
    grammar: Grammar | None
    eos_ids: tuple[int, ...]

    def constrain(self, rules: Rules, logits: Array, lengths: Array) -> Array:
        """Logits `[B, V]` under the rules, of the token at place `lengths`."""
        nothing = jnp.zeros((logits.shape[0], 0), jnp.int32)
        return apply(rules, self.grammar, logits[:, None], lengths, nothing, None, self.eos_ids)[
            :, 0
        ]

    def constrain_nodes(
        self, logits: Array, nodes: Array, lengths: Array, tokens: Array, parents: Array
    ) -> Array:
        """Logits `[B, N, V]` under the rules, of the tokens that follow some nodes of a tree.

        Args:
          logits: `[B, N, V]`.
          nodes: `[B, N]` int32; -1 is the text before the tree.
          lengths: `[B]`, of that text.
          tokens: `[B, K]`, all nodes so far.
          parents: `[B, K]`, as in `Draft`.
        """
        if tokens.shape[1] == 0:
            return apply(self.rules, self.grammar, logits, lengths, tokens, None, self.eos_ids)
        batch_size, _, size = logits.shape
        rows = jnp.arange(batch_size, dtype=jnp.int32)[:, None]
        every = jnp.zeros((batch_size, tokens.shape[1] + 1, size), logits.dtype)
        every = every.at[rows, nodes + 1].set(logits)
        every = apply(self.rules, self.grammar, every, lengths, tokens, parents, self.eos_ids)
        return jnp.take_along_axis(every, (nodes + 1)[:, :, None], axis=1)

    def advance(self, rules: Rules, tokens: Array) -> Rules:
        """The rules after one token `[B]` more."""
        return advance(rules, self.grammar, tokens[:, None], jnp.ones_like(tokens))


class GuidedSampling(NamedTuple):
    """What a drafter is given in place of `Sampling` when texts are constrained."""

    temperature: ArrayLike
    top_k: ArrayLike
    top_p: ArrayLike
    guide: Guide


def stop_sequences(sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """`[S, M]` int32: token sequences as `Constraints.stop` wants them.

    Raises:
      ValueError: if there is none, or an empty one.

    >>> stop_sequences([[5], [7, 8]]).tolist()
    [[-1, 5], [7, 8]]
    """
    rows = [list(sequence) for sequence in sequences]
    if not rows or not all(rows):
        raise ValueError(f"sequences={rows} must hold at least one sequence, and none empty")
    width = max(map(len, rows))
    return np.array([[-1] * (width - len(row)) + row for row in rows], np.int32)


def table_grammar(transitions: ArrayLike, start: int = 0) -> Grammar:
    """A finite automaton: `transitions[s, token]` is the next state, -1 forbids the token.

    Args:
      transitions: `[S, V]` integers.
      start: the first state.

    Raises:
      ValueError: if a transition leads nowhere, or a state that can be reached allows nothing.

    >>> grammar = table_grammar([[1, -1], [-1, 0]])  # 0 1 0 1 ...
    >>> grammar.allowed(grammar.start).tolist()
    [True, False]
    """
    table = np.asarray(transitions)
    if table.ndim != 2 or not np.issubdtype(table.dtype, np.integer):
        raise ValueError(
            f"transitions has shape {table.shape} and dtype {table.dtype}; wanted integers [S, V]"
        )
    if np.any((table < -1) | (table >= len(table))):
        raise ValueError(f"transitions must lead to states 0..{len(table) - 1}, or be -1")
    reached, frontier = set(), {int(start)}
    while frontier:
        reached |= frontier
        frontier = {int(s) for state in frontier for s in table[state] if s >= 0} - reached
    stuck = sorted(state for state in reached if np.all(table[state] < 0))
    if stuck:
        raise ValueError(f"transitions: states {stuck} can be reached and allow no token")
    on_device = jnp.asarray(table, jnp.int32)
    return Grammar(
        start=jnp.int32(start),
        # After a forbidden token, which is never accepted, any state will do.
        advance=lambda state, token: jnp.maximum(on_device[state, token], 0),
        allowed=lambda state: on_device[state] >= 0,
    )


def checked(constraints: Constraints, batch_size: int) -> Constraints:
    """Constraints with fields `[B, ...]` of fixed types, or a ValueError."""
    numbers = {
        "repetition_penalty": ((lambda x: x > 0), "above 0", np.float32),
        "presence_penalty": (np.isfinite, "finite", np.float32),
        "frequency_penalty": (np.isfinite, "finite", np.float32),
        "min_new_tokens": (
            (lambda x: (x >= 0) & (x == np.floor(x))),
            "whole, at least 0",
            np.int32,
        ),
    }
    fields: dict[str, Any] = {}
    for name, (is_valid, wanted, dtype) in numbers.items():
        value = getattr(constraints, name)
        if value is not None:
            _require(name, value, is_valid, wanted)
            fields[name] = _per_row(name, value, batch_size, 0, dtype)
    if constraints.logit_bias is not None:
        _require("logit_bias", constraints.logit_bias, lambda x: x < np.inf, "below inf")
        fields["logit_bias"] = _per_row(
            "logit_bias", constraints.logit_bias, batch_size, 1, np.float32
        )
    if constraints.allowed is not None:
        _require("allowed", constraints.allowed, lambda x: x.any(-1), "true for some token")
        fields["allowed"] = _per_row("allowed", constraints.allowed, batch_size, 1, bool)
    if constraints.stop is not None:
        _require("stop", constraints.stop, lambda x: x >= -1, "token ids, padded with -1")
        _require("stop", constraints.stop, lambda x: x[..., -1] >= 0, "padded on the left")
        fields["stop"] = _per_row("stop", constraints.stop, batch_size, 2, np.int32)
    return constraints._replace(**fields)


def begin(
    constraints: Constraints,
    grammar: Grammar | None,
    prompts: Array,
    lengths: Array,
    vocab_size: int,
) -> Rules | None:
    """The rules of a batch whose prompts `[B, P]` were read; None if there are none."""
    if grammar is None and all(field is None for field in constraints):
        return None
    for name in ("logit_bias", "allowed"):
        value = getattr(constraints, name)
        if value is not None and value.shape[-1] != vocab_size:
            raise ValueError(
                f"constraints.{name} has {value.shape[-1]} tokens; the vocabulary {vocab_size}"
            )
    batch_size = prompts.shape[0]
    in_prompt = counts = states = None
    if constraints.repetition_penalty is not None:
        inside = jnp.arange(prompts.shape[1], dtype=jnp.int32)[None, :] < lengths[:, None]
        rows = jnp.arange(batch_size)[:, None]
        where = jnp.where(inside, prompts, vocab_size)
        in_prompt = jnp.zeros((batch_size, vocab_size), bool).at[rows, where].set(True, mode="drop")
    if any(penalty is not None for penalty in constraints[:3]):
        counts = jnp.zeros((batch_size, vocab_size), jnp.int32)
    if grammar is not None:
        states = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (batch_size, *jnp.shape(leaf))), grammar.start
        )
    return Rules(constraints, in_prompt, counts, states, lengths)


def advance(rules: Rules, grammar: Grammar | None, tokens: Array, count: Array) -> Rules:
    """The rules after the first `count` `[B]` of `tokens` `[B, T]` were appended."""
    place = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    inside = place[None, :] < count[:, None]
    counts, states = rules.counts, rules.grammar
    if counts is not None:
        rows = jnp.arange(tokens.shape[0])[:, None]
        where = jnp.where(inside, tokens, counts.shape[1])
        counts = counts.at[rows, where].add(1, mode="drop")
    if grammar is not None:
        move = grammar.advance

        def one(state: Any, step: tuple[Array, Array]) -> tuple[Any, None]:
            token, moves = step
            return jax.tree.map(
                lambda new, old: jnp.where(moves, new, old), move(state, token), state
            ), None

        states = jax.vmap(lambda state, *steps: lax.scan(one, state, steps)[0])(
            states, tokens, inside
        )
    return rules._replace(counts=counts, grammar=states)


def apply(
    rules: Rules,
    grammar: Grammar | None,
    logits: Array,
    lengths: Array,
    tokens: Array,
    parents: Array | None,
    eos_ids: Sequence[int],
) -> Array:
    """Logits `[B, K + 1, V]` of every place of a block under the rules.

    Args:
      rules: as they stand before the block.
      grammar: the decoder's.
      logits: of the target; row 0 after the committed text, row i + 1 after draft token i.
      lengths: `[B]`, of the committed text.
      tokens: `[B, K]`, drafted.
      parents: `[B, K]` of a tree, or None for a chain.
      eos_ids: ids that end a text.
    """
    constraints, num_tokens = rules.constraints, tokens.shape[1]
    size = logits.shape[-1]
    if parents is None:
        steps = jnp.arange(num_tokens + 1)
        on_path = jnp.broadcast_to(
            (steps[:, None] > steps[None, :-1])[None], (len(tokens), num_tokens + 1, num_tokens)
        )
        parents = jnp.broadcast_to(jnp.arange(-1, num_tokens - 1, dtype=jnp.int32), tokens.shape)
    else:
        on_path = jax.vmap(ancestors)(parents)[:, :, 1:]
        on_path = jnp.concatenate([jnp.zeros_like(on_path[:, :1]), on_path], axis=1)
    if rules.counts is not None:
        drafted = jax.nn.one_hot(tokens, size, dtype=jnp.float32)
        # Small whole numbers: exact in any precision of the product.
        counts = jnp.einsum("btk,bkv->btv", on_path.astype(jnp.float32), drafted)
        counts = counts + rules.counts[:, None].astype(jnp.float32)
        logits = _penalized(constraints, rules.in_prompt, counts, logits)
    if constraints.logit_bias is not None:
        logits = logits + jnp.asarray(constraints.logit_bias)[:, None].astype(logits.dtype)
    if constraints.allowed is not None:
        logits = jnp.where(jnp.asarray(constraints.allowed)[:, None], logits, -jnp.inf)
    if constraints.min_new_tokens is not None and eos_ids:
        depth = jnp.sum(on_path, axis=2, dtype=jnp.int32)
        generated = (lengths - rules.prompt_lengths)[:, None] + depth
        is_early = generated < jnp.asarray(constraints.min_new_tokens)[:, None]
        is_end = jnp.zeros((size,), bool).at[jnp.array(eos_ids)].set(True)
        logits = jnp.where(is_early[:, :, None] & is_end[None, None], -jnp.inf, logits)
    if grammar is not None:
        allowed = jax.vmap(lambda *row: _allowed(grammar, *row))(rules.grammar, tokens, parents)
        # Where a forbidden token was drafted nothing may be left: that place is never reached.
        allowed |= ~jnp.any(allowed, axis=-1, keepdims=True)
        logits = jnp.where(allowed, logits, -jnp.inf)
    return logits


def stops(rules: Rules, tokens: Array, lengths: Array, block: Array) -> Array:
    """Where in `block` `[B, T]`, appended to the text, a stop sequence ends: `[B, T]` bool."""
    if rules.constraints.stop is None:
        return jnp.zeros(block.shape, bool)
    wanted = jnp.asarray(rules.constraints.stop)  # [B, S, M]
    width = wanted.shape[2]
    # The tokens before the block, as far as the longest sequence reaches, then the block.
    back = jnp.arange(1 - width, 0, dtype=jnp.int32)[None, :] + lengths[:, None]
    before = jnp.take_along_axis(tokens, jnp.maximum(back, 0), axis=1)
    before = jnp.where(back >= rules.prompt_lengths[:, None], before, -2)  # no stop has this id
    text = jnp.concatenate([before, block], axis=1)
    ends = jnp.zeros(block.shape, bool)
    for index in range(wanted.shape[1]):
        matched = jnp.ones(block.shape, bool)
        for place in range(width):
            want = wanted[:, index, place][:, None]
            matched &= (want < 0) | (text[:, place : place + block.shape[1]] == want)
        ends |= matched
    return ends


def _penalized(
    constraints: Constraints, in_prompt: Array | None, counts: Array, logits: Array
) -> Array:
    """Logits `[B, T, V]` after penalties for what occurred."""

    def rows(value: ArrayLike) -> Array:
        return jnp.asarray(value)[:, None, None].astype(logits.dtype)

    if constraints.repetition_penalty is not None and in_prompt is not None:
        factor = rows(constraints.repetition_penalty)
        penalized = jnp.where(logits > 0, logits / factor, logits * factor)
        logits = jnp.where((counts > 0) | in_prompt[:, None], penalized, logits)
    if constraints.presence_penalty is not None:
        occurs = (counts > 0).astype(logits.dtype)
        logits = logits - rows(constraints.presence_penalty) * occurs
    if constraints.frequency_penalty is not None:
        logits = logits - rows(constraints.frequency_penalty) * counts.astype(logits.dtype)
    return logits


def _allowed(grammar: Grammar, state: Any, tokens: Array, parents: Array) -> Array:
    """`[K + 1, V]` bool of one row: after the text, and after every draft token."""
    num_tokens = tokens.shape[0]
    states = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (num_tokens + 1, *jnp.shape(leaf))), state
    )

    def move(node: Array, states: Any) -> Any:
        above = jax.tree.map(lambda leaf: leaf[parents[node] + 1], states)
        here = grammar.advance(above, tokens[node])
        return jax.tree.map(lambda leaf, one: leaf.at[node + 1].set(one), states, here)

    if num_tokens:
        states = lax.fori_loop(0, num_tokens, move, states)
    return jax.vmap(grammar.allowed)(states)


def _require(
    name: str, value: ArrayLike, is_valid: Callable[[np.ndarray], Any], wanted: str
) -> None:
    if isinstance(value, Tracer):
        return
    host = np.asarray(value)
    if not np.all(is_valid(host)):
        shown = host if host.size <= 8 else f"array of shape {host.shape}"
        raise ValueError(f"constraints.{name}={shown} must be {wanted}")


def _per_row(name: str, value: ArrayLike, batch_size: int, rank: int, dtype: Any) -> Any:
    """The value with a leading axis of rows; `rank` axes belong to one row."""
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    if array.ndim == rank:
        array = array[None]
        broadcast = jnp if isinstance(array, jax.Array) else np
        array = broadcast.broadcast_to(array, (batch_size, *array.shape[1:]))
    if array.ndim != rank + 1 or array.shape[0] != batch_size:
        axes = ("", "[V]", "[S, M]")[rank]
        raise ValueError(
            f"constraints.{name} has shape {np.shape(value)}; wanted {axes or 'a scalar'} or one "
            f"per row, {batch_size} of them"
        )
    return array.astype(dtype)
