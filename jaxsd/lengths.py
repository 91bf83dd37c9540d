"""How many tokens to draft, chosen before every round: fixed, by a table, by cost, or none.

A policy is data. It is passed to `generate` beside the sampling settings, so that one compiled loop
serves all of them, and the length that it chooses is traced, up to the K of the drafter. It is
chosen before any token of the round is drawn, from what is past alone: given the past, the round is
one of that length, whose text has the target's law. A rule that looked at the drafted tokens and
then dropped some because of what they are would be biased, however well it were meant: where it
drops a token, the target's own choice takes its place.

All rows of a round get the same length, since they share the pass. With `cost_aware_length` what
one row accepts has a part in how many tokens another drafts: the law of every row is still its own,
but the very tokens that a key gives may differ with the company (not under `gumbel_coupling`, where
they depend on the key alone).

>>> import jax, jaxsd
>>> from jaxsd import testing
>>> model = testing.MarkovModel(vocab_size=4)
>>> params = {"target": model.init(jax.random.key(0)), "draft": model.init(jax.random.key(1))}
>>> drafter = jaxsd.model_drafter(model, num_tokens=8)
>>> decoder = jaxsd.speculative(model, drafter, max_len=32, draft_lengths=(0, 2, 8))
>>> for policy in (fixed_length(3), fixed_length(0), length_by_active([8, 4, 2, 0])):
...     out = decoder.generate(params, [[1, 2]], None, jax.random.key(2), policy=policy)
...     print(out.stats.num_drafted[0] // out.stats.num_rounds[0])
3
0
8
"""

import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from numpy.typing import ArrayLike


class LengthPolicy(NamedTuple):
    """Chooses the draft length of a round; `fixed_length` and its like make one.

    by_active: the length with 1, 2, ... active rows.
    seconds: of a round with 1, 2, ... active rows and 0, 1, ... drafted tokens.
    is_cost_aware: whether `seconds` decides, and not `by_active`.
    acceptance: what is expected of a place of which nothing is known.
    weight: how many places of evidence that is worth.
    decay: what a round's evidence is worth a round later.
    judged: `[K]`, how often the place was judged; with decay.
    accepted: `[K]`, how often its token stood.
    """

    by_active: Any
    seconds: Any
    is_cost_aware: Any
    acceptance: Any = 0.7
    weight: Any = 4.0
    decay: Any = 0.99
    judged: Any = 0.0
    accepted: Any = 0.0


def fixed_length(num_tokens: int) -> LengthPolicy:
    """Drafts so many tokens in every round; 0 is plain decoding, without a pass of the draft.

    Args:
      num_tokens: in 0..K.

    Raises:
      ValueError: if it is not an integer of at least 0.

    >>> int(fixed_length(3).by_active)
    3
    """
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or num_tokens < 0:
        raise ValueError(f"num_tokens={num_tokens!r} must be an integer of at least 0")
    return LengthPolicy(np.int32(num_tokens), np.float32(1.0), np.bool_(False))


def length_by_active(num_tokens: ArrayLike) -> LengthPolicy:
    """Looks the draft length up by how many rows are still active.

    `jaxsd.costmodel.lookup_length(table, batches)` gives the lengths of a length table. The loop
    computes all rows of its batch, active or not: for the time of its own passes B counts, which
    is one entry of the table; by active rows it is of use where a row that is done makes room, or
    where the time of a pass depends on the rows' contents, as with experts.

    Args:
      num_tokens: `[n]` integers in 0..K, for 1, 2, ..., n active rows; the last stands for more.

    Raises:
      ValueError: if it is not such a sequence.

    References:
      Su et al., 2023, https://arxiv.org/abs/2310.18813, section 4.

    >>> length_by_active([7, 6, 4]).by_active.tolist()
    [7, 6, 4]
    """
    array = np.asarray(num_tokens)
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"num_tokens of shape {array.shape} and type {array.dtype} must be a one-dimensional "
            "sequence of integers, for 1, 2, ... active rows"
        )
    if array.min() < 0:
        raise ValueError(f"num_tokens={array.min()} must be at least 0")
    return LengthPolicy(array.astype(np.int32), np.float32(1.0), np.bool_(False))


def cost_aware_length(
    round_seconds: ArrayLike,
    *,
    acceptance: float = 0.7,
    weight: float = 4.0,
    decay: float = 0.99,
) -> LengthPolicy:
    """Drafts as many tokens as give most text for the time, by what was accepted so far.

        argmax over k of (1 + c_1 + c_1 c_2 + ... + c_1 ... c_k) / seconds(k)
        c_i = (accepted_i + weight r) / (judged_i + weight)
        r = (sum of accepted + weight acceptance) / (sum of judged + weight)

    with judged_i how often place i was proposed and all before it stood, over the active rows of
    the rounds so far, each round worth `decay` times the one after it. Of equals the smallest k is
    taken. Places without evidence are thought to be as good as the others together, and in the
    beginning as `acceptance` says. While nothing is drafted the evidence fades, so that drafting is
    tried again. (With block verification c_i depends somewhat on the length of the block.)

    Args:
      round_seconds: `[K + 1]` predicted or measured seconds of a round that drafts 0, 1, ..., K
        tokens, in any unit; or `[n, K + 1]` with 1, 2, ..., n active rows, the last of which stands
        for more. Infinite where a length is not to be chosen.
        `jaxsd.costmodel.round_seconds(times, batch, gamma)` predicts them.
      acceptance: in [0, 1].
      weight: above 0.
      decay: in [0, 1]; 1 forgets nothing.

    Raises:
      ValueError: an argument is out of its range.

    >>> import jax.numpy as jnp
    >>> policy = cost_aware_length([1.0, 1.2, 1.4, 1.6])
    >>> int(choose(checked(policy, batch_size=1, num_tokens=3), jnp.int32(1)))
    3
    >>> policy = cost_aware_length([1.0, 1.2, 1.4, 1.6], acceptance=0.3)
    >>> int(choose(checked(policy, batch_size=1, num_tokens=3), jnp.int32(1)))
    1
    """
    seconds = np.asarray(round_seconds, np.float32)
    if seconds.ndim not in (1, 2) or 0 in seconds.shape:
        raise ValueError(f"round_seconds has shape {seconds.shape}; wanted [K + 1] or [n, K + 1]")
    if not np.all(seconds > 0) or not np.all(np.any(np.isfinite(seconds), axis=-1)):
        raise ValueError(
            "round_seconds must be positive numbers, of which at least one is finite for every "
            f"number of rows; got {seconds.tolist()}"
        )
    for name, value, low, high in (
        ("acceptance", acceptance, 0.0, 1.0),
        ("weight", weight, np.finfo(np.float32).tiny, float(np.finfo(np.float32).max)),
        ("decay", decay, 0.0, 1.0),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name}={value!r} must be a number from {low:g} to {high:g}")
    return LengthPolicy(
        np.int32(0),
        seconds,
        np.bool_(True),
        np.float32(acceptance),
        np.float32(weight),
        np.float32(decay),
    )


# ---- In the loop


def choose(policy: LengthPolicy, num_active: Array) -> Array:
    """The draft length `[]` of the round to come, with so many active rows `[]`."""
    row = jnp.clip(num_active - 1, 0, policy.by_active.shape[0] - 1)
    total = jnp.sum(policy.judged) + policy.weight
    pooled = (jnp.sum(policy.accepted) + policy.weight * policy.acceptance) / total
    rates = (policy.accepted + policy.weight * pooled) / (policy.judged + policy.weight)
    tokens = 1.0 + jnp.concatenate([jnp.zeros((1,)), jnp.cumsum(jnp.cumprod(rates))])
    fastest = jnp.argmax(tokens / policy.seconds[row]).astype(jnp.int32)
    return jnp.where(policy.is_cost_aware, fastest, policy.by_active[row])


def update(
    policy: LengthPolicy, num_accepted: Array, proposed: Array, active: Array
) -> LengthPolicy:
    """The policy after a round: accepted `[B]`, proposed `[B, K]`, active rows `[B]`."""
    place = jnp.arange(proposed.shape[1], dtype=jnp.int32)[None, :]
    judged = proposed & (place <= num_accepted[:, None]) & active[:, None]
    stood = judged & (place < num_accepted[:, None])
    return policy._replace(
        judged=policy.decay * policy.judged + jnp.sum(judged, axis=0, dtype=jnp.float32),
        accepted=policy.decay * policy.accepted + jnp.sum(stood, axis=0, dtype=jnp.float32),
    )


def checked(policy: LengthPolicy, batch_size: int, num_tokens: int) -> LengthPolicy:
    """The policy with fields of the shapes that this batch and drafter have, whatever it is.

    Raises:
      ValueError: it does not fit them.
    """
    if not isinstance(policy, LengthPolicy):
        raise ValueError(
            f"policy={policy!r} must be made by jaxsd.fixed_length, jaxsd.length_by_active or "
            "jaxsd.cost_aware_length"
        )
    table, seconds = policy.by_active, policy.seconds
    if not isinstance(table, Tracer) and np.max(np.asarray(table)) > num_tokens:
        raise ValueError(
            f"policy asks for {np.max(np.asarray(table))} draft tokens; the drafter's num_tokens "
            f"is {num_tokens}"
        )
    if np.ndim(seconds) and np.shape(seconds)[-1] != num_tokens + 1:
        raise ValueError(
            f"policy has seconds of {np.shape(seconds)[-1]} lengths; wanted those of 0 to "
            f"num_tokens={num_tokens}"
        )
    row = np.arange(batch_size)
    table = jnp.atleast_1d(jnp.asarray(table, jnp.int32))
    seconds = jnp.asarray(seconds, jnp.float32)
    seconds = jnp.broadcast_to(seconds, (*seconds.shape[:-1], num_tokens + 1))
    seconds = jnp.atleast_2d(seconds)
    return LengthPolicy(
        by_active=table[np.minimum(row, len(table) - 1)],
        seconds=seconds[np.minimum(row, len(seconds) - 1)],
        is_cost_aware=jnp.asarray(policy.is_cost_aware, bool),
        acceptance=jnp.asarray(policy.acceptance, jnp.float32),
        weight=jnp.asarray(policy.weight, jnp.float32),
        decay=jnp.asarray(policy.decay, jnp.float32),
        judged=jnp.broadcast_to(jnp.asarray(policy.judged, jnp.float32), (num_tokens,)),
        accepted=jnp.broadcast_to(jnp.asarray(policy.accepted, jnp.float32), (num_tokens,)),
    )


def checked_lengths(draft_lengths: Any, drafter: Any) -> tuple[int, ...]:
    """The lengths whose verification is compiled; ValueError unless they rise to K."""
    try:
        lengths = tuple(draft_lengths)
    except TypeError:
        lengths = ()
    is_integer = all(isinstance(one, int) and not isinstance(one, bool) for one in lengths)
    rises = is_integer and all(a < b for a, b in itertools.pairwise(lengths))
    if not lengths or not rises or lengths[0] < 0 or lengths[-1] != drafter.num_tokens:
        raise ValueError(
            f"draft_lengths={draft_lengths!r} must be integers that rise from 0 or more to the "
            f"drafter's num_tokens, {drafter.num_tokens}"
        )
    if drafter.depth is not None:
        raise ValueError("draft_lengths are for drafters of chains; this one proposes trees")
    return lengths


def shortest_holding(lengths: tuple[int, ...], count: Array) -> Array:
    """The index `[]` of the smallest of these lengths that holds so many tokens `[]`."""
    return jnp.sum(jnp.array(lengths, jnp.int32) < count, dtype=jnp.int32)
