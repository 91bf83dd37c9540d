"""What does it gain to look at a whole drafted block before deciding how much of it to keep?

Block verification keeps more of a round's drafted tokens than the token by token rule, and the text
has the target's law all the same. Exact on chains, by going through every block: `V^gamma` of them
from every place where a round begins.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ._inputs import PROBABILITY, as_floats, require
from .chains import (
    AnyChain,
    Chain,
    HistoryChain,
    Moves,
    check_chains,
    length_of,
    moves_of,
    rows_by_position,
    start_of,
    sweep,
    vocab_size_of,
)
from .markov import ExpectedCalls, as_calls, drafted_places

Rule = Literal["token", "block"]

# Block verification is summed over every block that can be drafted.
_MAX_BLOCKS = 1 << 22


def expected_block_calls(
    draft: AnyChain, target: AnyChain, gamma: int, has_bonus: bool = True
) -> ExpectedCalls:
    """Returns the mean number of target passes and rejections of block verification.

    Block verification looks at all gamma drafted tokens before it decides how many to keep, and
    keeps the first i with probability w_i. The text has exactly the target's law, and no rule that
    keeps a part of one drafted block keeps more. A round that does not keep all of its block draws
    one token in place of the next, and counts as one rejection.

        w_0 = 1,  w_i = min(1, w_(i-1) target(x_i) / draft(x_i))
        P(x drawn after the first i) = draft(x_1 ... x_i) max(w_i target(x) - draft(x), 0)

    Rejections per token lie below `rejection_lower_bound` for gamma from 2 on. That is no
    contradiction: the bound holds for verdicts that depend on the past alone, whereas here a
    token that the token rule would refuse is kept if the tokens after it make up for it. For draft
    (0.5, 0.5) and target (0.8, 0.2) at every position the bound is 0.3 per token, and block
    verification without the bonus token has 0.265, 0.222, 0.192 and 0.171 with 2, 4, 8 and 16
    drafts.

    Args:
      draft: a chain of T positions over V tokens.
      target: another, of the same kind and size.
      gamma: number of tokens drafted per round, a Python integer (it is a shape), at least 1, or 0
        with the bonus token. Every block counts on its own: `V^(gamma + 1)` may be 4 million.
      has_bonus: whether a pass whose drafts are all kept adds a token from the target's law. The
        comparison with the bound is without.

    Returns:
      Passes, tokens per pass (the ratio of the means), rejections, and both by position.

    Raises:
      ValueError: an argument is no chain, a row is no distribution, the two do not match, `gamma`
        is too small, or there are too many blocks.

    Example:
      >>> from jaxsd import costmodel
      >>> draft = costmodel.memoryless_chain([2 / 3, 1 / 3], 300)
      >>> target = costmodel.memoryless_chain([1 / 3, 2 / 3], 300)
      >>> by_block = costmodel.expected_block_calls(draft, target, 4)
      >>> by_token = costmodel.expected_calls(draft, target, 4)
      >>> round(float(by_block.tokens_per_call), 2), round(float(by_token.tokens_per_call), 2)
      (3.03, 2.59)

    Source: Sun et al., arXiv 2403.10444.
    """
    draft, target = check_chains(draft=draft, target=target)
    drafted = drafted_places(gamma, has_bonus, target)
    _require_few_blocks("gamma", gamma + 1, target)
    return as_calls(*_block(draft, target, drafted))


def round_acceptance(draft: AnyChain, target: AnyChain, rule: Rule = "token") -> Array:
    """Returns how many of a round's drafted tokens are accepted: shares by position.

    The round begins where the chains begin and drafts as many tokens as they have positions. The
    shares are what `expected_tokens_by_position` takes, and their sum is the mean number of
    accepted tokens.

        token rule:  E_draft[product over j <= i of min(1, target(x_j) / draft(x_j))]
        block rule:  E_draft[w_i],  w_i = min(1, w_(i-1) target(x_i) / draft(x_i))

    Args:
      draft: a chain of gamma positions over V tokens.
      target: another, of the same kind and size.
      rule: "token" for `rejection_sampling`, "block" for block verification.

    Returns:
      `[gamma]` probability that at least 1, 2, ..., gamma tokens are accepted.

    Raises:
      ValueError: an argument is no chain, a row is no distribution, the two do not match, the rule
        is unknown, or there are over 4 million blocks.

    Example:
      >>> from jaxsd import costmodel
      >>> draft = costmodel.memoryless_chain([2 / 3, 1 / 3], 2)
      >>> target = costmodel.memoryless_chain([1 / 3, 2 / 3], 2)
      >>> shares = costmodel.round_acceptance(draft, target)
      >>> round(float(shares.sum() * 9), 4)  # 10 / 9 tokens
      10.0
      >>> shares = costmodel.round_acceptance(draft, target, "block")
      >>> round(float(shares.sum() * 9), 4)
      11.0

    Source: Leviathan et al., arXiv 2211.17192, algorithm 1; Sun et al., arXiv 2403.10444.
    """
    draft, target = check_chains(draft=draft, target=target)
    if rule == "token":
        return _token_shares(draft, target)
    if rule != "block":
        raise ValueError(f'rule={rule!r} must be "token" or "block"')
    _require_few_blocks("gamma", length_of(target), target)
    return _block_shares(draft, target)


def rejections_per_token(acceptance_by_position: ArrayLike) -> Array:
    """Returns the rejections per token of round after round without the bonus token.

    The long-run ratio where all rounds have the same shares, as for memoryless laws. For the token
    rule it is TV however many tokens are drafted; for block verification it falls with gamma.

        (1 - a_gamma) / (1 + a_1 + ... + a_(gamma - 1))

    Args:
      acceptance_by_position: `[..., gamma]` probability that at least 1, 2, ..., gamma tokens of
        a round are accepted, falling: `round_acceptance`.

    Returns:
      `[...]` in [0, 1].

    Raises:
      ValueError: a share is outside [0, 1] or NaN, or there are none.

    Example:
      >>> from jaxsd import costmodel
      >>> draft = costmodel.memoryless_chain([0.5, 0.5], 4)
      >>> target = costmodel.memoryless_chain([0.8, 0.2], 4)
      >>> for rule in ("token", "block"):
      ...     shares = costmodel.round_acceptance(draft, target, rule)
      ...     print(f"{costmodel.rejections_per_token(shares):.3f}")
      0.300
      0.222
    """
    shape = np.shape(acceptance_by_position)
    if not shape or not shape[-1]:
        raise ValueError(
            f"acceptance_by_position of shape {shape} must have shape [..., gamma], gamma >= 1"
        )
    require("acceptance_by_position", acceptance_by_position, PROBABILITY)
    (shares,) = as_floats(acceptance_by_position)
    return (1 - shares[..., -1]) / (1 + shares[..., :-1].sum(-1))


def _require_few_blocks(name: str, depth: int, chain: AnyChain) -> None:
    """Raises ValueError if the blocks of so many tokens are too many to go through."""
    depth, vocab_size = min(depth, length_of(chain) + 1), vocab_size_of(chain)
    if vocab_size**depth > _MAX_BLOCKS:
        raise ValueError(
            f"{name} of this size and V={vocab_size} tokens make {vocab_size}^{depth} blocks; at "
            f"most {_MAX_BLOCKS} are gone through"
        )


@jax.jit
def _block(draft: AnyChain, target: AnyChain, drafted: Array) -> tuple[Array, Array]:
    """As `_calls`, for block verification: from every place where a round begins, all blocks."""
    if not (isinstance(draft, Chain) and isinstance(target, Chain)):
        return _block_on_histories(draft, target, drafted)
    depth, moves = drafted.size, moves_of(target)

    def ahead(chain: Chain) -> Array:
        """`[T, depth, V, V]` rows of a position and those after it; zeros beyond the end."""
        rows = rows_by_position(chain)
        padded = jnp.concatenate([rows, jnp.zeros((depth, *rows.shape[1:]), rows.dtype)])
        return jnp.stack([padded[i : i + rows.shape[0]] for i in range(depth)], axis=1)

    def step(
        carry: tuple[Array, Array], rows: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        # Of this position and of the next `depth`: where rounds begin, and rejections.
        begun, rejected = carry  # [depth + 1, V], [depth + 1]
        later, refused = _one_round(begun[0], list(rows[0]), list(rows[1]), drafted, moves)
        begun = begun.at[1:].add(jnp.stack(later))
        rejected = rejected.at[:-1].add(jnp.stack(refused))
        output = begun[0].sum(), rejected[0]
        return (_shift(begun), _shift(rejected)), output

    start = start_of(target)
    begun = jnp.zeros((depth + 1, start.size), start.dtype).at[0].set(start)
    rejected = jnp.zeros(depth + 1, start.dtype)
    return jax.lax.scan(step, (begun, rejected), (ahead(draft), ahead(target)))[1]


def _block_on_histories(draft: AnyChain, target: AnyChain, drafted: Array) -> tuple[Array, Array]:
    """`_block` where the number of states grows from position to position."""
    length, moves = length_of(target), moves_of(target)
    dtype, vocab_size = drafted.dtype, vocab_size_of(target)
    begun = [start_of(target)] + [jnp.zeros(vocab_size ** (n + 1), dtype) for n in range(length)]
    rejected = [jnp.zeros((), dtype)] * length
    for n in range(length):
        end = min(n + drafted.size, length)
        draft_rows, target_rows = _rows(draft)[n:end], _rows(target)[n:end]
        later, refused = _one_round(begun[n], draft_rows, target_rows, drafted, moves)
        for i, (weights, refusal) in enumerate(zip(later, refused, strict=True)):
            begun[n + i + 1] = begun[n + i + 1] + weights
            rejected[n + i] = rejected[n + i] + refusal
    return jnp.stack([weights.sum() for weights in begun[:length]]), jnp.stack(rejected)


def _one_round(
    start: Array, draft: list[Array], target: list[Array], drafted: Array, moves: Moves
) -> tuple[list[Array], list[Array]]:
    """One round of block verification from weights `[S]` of the states where it begins.

    Returns the weights of the states in which the next round begins, after 1, 2, ... tokens, and
    those of a rejection at each. Both laws of a path stay unnormalised, so nothing is divided.
    """
    proposed = kept = start[None, :]  # [B, S]: draft(path), and w draft(path)
    later, refused = [], []
    for draft_rows, target_rows, is_drafted in zip(draft, target, drafted, strict=False):
        proposed = proposed[:, :, None] * draft_rows[None]
        wanted = kept[:, :, None] * target_rows[None]  # [B, S, V]
        kept = jnp.minimum(proposed, wanted) * is_drafted
        drawn = (wanted - kept).sum(0)
        later.append(moves.merge(drawn))
        refused.append(drawn.sum() * is_drafted)
        proposed, kept = moves.branch(proposed), moves.branch(kept)
    later[-1] = later[-1] + kept.sum(0)  # a block that was kept whole
    return later, refused


@jax.jit
def _token_shares(draft: AnyChain, target: AnyChain) -> Array:
    """The chance that all tokens so far were accepted."""

    def step(kept: Array, rows: tuple[Array, ...], moves: Moves) -> tuple[Array, Array]:
        kept = moves.merge(kept[:, None] * jnp.minimum(*rows))
        return kept, kept.sum()

    return sweep(step, start_of(target), draft, target)


@jax.jit
def _block_shares(draft: AnyChain, target: AnyChain) -> Array:
    """The mean of w after 1, 2, ... tokens."""
    moves = moves_of(target)
    proposed = kept = start_of(target)[None, :]
    shares = []
    for draft_rows, target_rows in zip(_rows(draft), _rows(target), strict=True):
        proposed = proposed[:, :, None] * draft_rows[None]
        kept = jnp.minimum(proposed, kept[:, :, None] * target_rows[None])
        shares.append(kept.sum())
        proposed, kept = moves.branch(proposed), moves.branch(kept)
    return jnp.stack(shares)


def _rows(chain: AnyChain) -> list[Array]:
    """The rows of every position."""
    if isinstance(chain, HistoryChain):
        return list(map(jnp.asarray, chain.tables))
    return list(rows_by_position(chain))


def _shift(window: Array) -> Array:
    """Drops the first entry and appends a zero."""
    return jnp.concatenate([window[1:], jnp.zeros_like(window[:1])])
