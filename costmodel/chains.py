"""What are the laws of a text's tokens, small enough to be summed over exactly?

Two kinds of chain over V tokens and T positions. In a first-order chain a token's law depends on
the one before it and on the position; in a history chain on all that come before. The draft and the
target of a question are both of one kind, and what is written here once holds for both.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ._inputs import is_traced
from .length_curves import as_one_dtype

_Output = TypeVar("_Output")

# A history chain is a test piece: a table of V^n rows for every position.
_MAX_ROWS = 1 << 20


class Chain(NamedTuple):
    """A first-order chain: every token's law depends on the one before it and on the position."""

    first: ArrayLike  # [V] law of the first token
    kernels: ArrayLike  # [T - 1, V, V]; row x of kernel n: law of token n + 2 after token x


class HistoryChain(NamedTuple):
    """A chain whose tokens depend on everything before them; for few positions and tokens."""

    # T tables [V^n, V], n = 0, ..., T - 1; the row of a history is its number in base V, the first
    # token being the leading digit.
    tables: tuple[ArrayLike, ...]


# Of either kind; the draft and the target of one question are of the same.
AnyChain = Chain | HistoryChain


class Moves(NamedTuple):
    """How a kind of chain goes from one position's states to the next one's."""

    # [..., S, V] weights of a state and a token after it -> [..., S'] weights of the next states.
    merge: Callable[[Array], Array]
    follow: Callable[[Array, Array], Array]  # states and tokens -> the next states, one by one
    branch: Callable[[Array], Array]  # [B, S, V] -> [B', S'], as `merge`, but nothing is added up


# A first-order chain's state is the last token; a history chain's is the history's number.
_LAST_TOKEN = Moves(
    merge=lambda weights: weights.sum(-2),
    follow=lambda state, token: token,
    branch=lambda weights: weights.reshape(-1, weights.shape[-1]),
)


def _append(vocab_size: int) -> Moves:
    """The moves of a history chain."""
    return Moves(
        merge=lambda weights: weights.reshape(*weights.shape[:-2], -1),
        follow=lambda state, token: state * vocab_size + token,
        branch=lambda weights: weights.reshape(weights.shape[0], -1),
    )


def memoryless_chain(probs: ArrayLike, length: int) -> Chain:
    """Returns the chain whose tokens are drawn independently from one law.

    Args:
      probs: `[V]` the law, summing to one.
      length: T, number of positions, a Python integer (it is a shape).

    Returns:
      The chain.

    Raises:
      ValueError: the law does not sum to one, or `length` is below 1.

    Example:
      >>> from jaxsd import costmodel
      >>> chain = costmodel.memoryless_chain([0.5, 0.3, 0.2], 4)
      >>> chain.kernels.shape
      (3, 3, 3)
    """
    (law,) = as_one_dtype(probs)
    _require_shape("probs", law, ("V",))
    _require_distributions("probs", law)
    return stationary_chain(law, jnp.broadcast_to(law, (law.size, law.size)), length)


def stationary_chain(first: ArrayLike, kernel: ArrayLike, length: int) -> Chain:
    """Returns the chain with the same kernel at every position.

    Args:
      first: `[V]` law of the first token, summing to one.
      kernel: `[V, V]`; row x is the law of the token after x.
      length: T, number of positions, a Python integer (it is a shape).

    Returns:
      The chain.

    Raises:
      ValueError: a row is no distribution, a shape is wrong, or `length` is below 1.

    Example:
      >>> from jaxsd import costmodel
      >>> chain = costmodel.stationary_chain([1.0, 0.0], [[0.9, 0.1], [0.2, 0.8]], 5)
      >>> chain.kernels.shape
      (4, 2, 2)
    """
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"length={length!r} must be an integer, at least 1")
    first, kernel = as_one_dtype(first, kernel)
    _require_shape("first", first, ("V",))
    _require_shape("kernel", kernel, (first.size, first.size))
    _require_distributions("first", first)
    _require_distributions("kernel", kernel)
    return Chain(first, jnp.broadcast_to(kernel, (length - 1, *kernel.shape)))


def random_chain(key: Array, length: int, vocab_size: int) -> Chain:
    """Returns a chain of independent random rows: uniform numbers, divided by their sum.

    Args:
      key: a JAX random key.
      length: T, number of positions, a Python integer (it is a shape).
      vocab_size: V, a Python integer (it is a shape).

    Returns:
      The chain, in JAX's default floating type.

    Raises:
      ValueError: `length` or `vocab_size` is below 1.

    Example:
      >>> import jax
      >>> from jaxsd import costmodel
      >>> chain = costmodel.random_chain(jax.random.key(0), length=50, vocab_size=7)
      >>> chain.first.shape, chain.kernels.shape
      ((7,), (49, 7, 7))
    """
    for name, value in (("length", length), ("vocab_size", vocab_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer, at least 1")
    first_key, kernels_key = jax.random.split(key)
    # Not quite from 0 on, so that no row is all zeros.
    first = jax.random.uniform(first_key, (vocab_size,), minval=1e-6)
    shape = (length - 1, vocab_size, vocab_size)
    kernels = jax.random.uniform(kernels_key, shape, minval=1e-6)
    return Chain(first / first.sum(-1, keepdims=True), kernels / kernels.sum(-1, keepdims=True))


def as_history_chain(chain: AnyChain) -> HistoryChain:
    """Returns the same law written as a history chain.

    Its tables grow as V^T; use it to compare a first-order chain with a history chain.

    Args:
      chain: of either kind.

    Returns:
      The history chain.

    Raises:
      ValueError: the chain is none, or its last table would have over a million rows.

    Example:
      >>> from jaxsd import costmodel
      >>> chain = costmodel.memoryless_chain([0.5, 0.5], 3)
      >>> [table.shape for table in costmodel.as_history_chain(chain).tables]
      [(1, 2), (2, 2), (4, 2)]
    """
    (chain,) = check_chains(chain=chain)
    if isinstance(chain, HistoryChain):
        return chain
    first, kernels = map(jnp.asarray, chain)
    vocab_size, length = first.size, kernels.shape[0] + 1
    if vocab_size ** (length - 1) > _MAX_ROWS:
        raise ValueError(
            f"chain of T={length} positions and V={vocab_size} tokens has {vocab_size}^{length - 1}"
            f" histories; at most {_MAX_ROWS} fit a history chain"
        )
    tables = [jnp.tile(kernel, (vocab_size**n, 1)) for n, kernel in enumerate(kernels)]
    return HistoryChain((first[None, :], *tables))


def check_chains(**chains: AnyChain) -> list[AnyChain]:
    """The chains in one floating dtype; ValueError unless they are distributions of one shape."""
    kinds = {type(chain) for chain in chains.values()}
    if not kinds <= {Chain, HistoryChain} or len(kinds) > 1:
        came = ", ".join(f"{name}: {type(chain).__name__}" for name, chain in chains.items())
        raise ValueError(
            f"{came}: must be costmodel.Chain or costmodel.HistoryChain, and of one kind "
            "(costmodel.as_history_chain converts)"
        )
    for name, chain in chains.items():
        if isinstance(chain, HistoryChain) and not chain.tables:
            raise ValueError(f"{name}.tables must hold at least one table [V^n, V]")
    fields = [_fields(chain) for chain in chains.values()]
    floats = iter(as_one_dtype(*(field for group in fields for field in group)))
    checked = [
        HistoryChain(tuple(next(floats) for _ in group))
        if kinds == {HistoryChain}
        else Chain(next(floats), next(floats))
        for group in fields
    ]
    for name, chain in zip(chains, checked, strict=True):
        _check_chain(name, chain)
    sizes = [(length_of(chain), vocab_size_of(chain)) for chain in checked]
    if len(set(sizes)) > 1:
        described = " and ".join(
            f"{name} of T={length}, V={vocab_size}"
            for name, (length, vocab_size) in zip(chains, sizes, strict=True)
        )
        raise ValueError(f"{described} must have the same positions and tokens")
    return checked


def check_laws(draft_probs: ArrayLike, target_probs: ArrayLike) -> tuple[Array, Array]:
    """Two arrays of laws `[..., V]` in one floating dtype; ValueError unless they are a pair."""
    draft, target = as_one_dtype(draft_probs, target_probs)
    if draft.shape != target.shape or draft.ndim < 1 or draft.shape[-1] < 1:
        raise ValueError(
            f"draft_probs of shape {draft.shape} and target_probs of shape {target.shape} must "
            "have one shape [..., V]"
        )
    _require_distributions("draft_probs", draft)
    _require_distributions("target_probs", target)
    return draft, target


def length_of(chain: AnyChain) -> int:
    """T, the number of positions."""
    if isinstance(chain, HistoryChain):
        return len(chain.tables)
    return np.shape(chain.kernels)[0] + 1


def vocab_size_of(chain: AnyChain) -> int:
    """V, the number of tokens."""
    return np.shape(chain.tables[0] if isinstance(chain, HistoryChain) else chain.first)[-1]


def rows_by_position(chain: Chain) -> Array:
    """`[T, V, V]`: the first law as a kernel too, one with equal rows."""
    first = jnp.asarray(chain.first)
    return jnp.concatenate(
        [jnp.broadcast_to(first, (1, first.size, first.size)), jnp.asarray(chain.kernels)]
    )


def moves_of(chain: AnyChain) -> Moves:
    """How states follow each other in this kind of chain."""
    return _append(vocab_size_of(chain)) if isinstance(chain, HistoryChain) else _LAST_TOKEN


def start_of(chain: AnyChain) -> Array:
    """`[S]` weights of the states before the first token: all on one."""
    if isinstance(chain, HistoryChain):
        return jnp.ones(1, jnp.asarray(chain.tables[0]).dtype)
    first = jnp.asarray(chain.first)
    # Which state it is says nothing, for all rows of the first kernel are equal.
    return jnp.zeros(first.size, first.dtype).at[0].set(1)


def sweep(
    step: Callable[[Any, tuple[Array, ...], Moves], tuple[Any, _Output]],
    carry: Any,
    *chains: AnyChain,
) -> _Output:
    """Goes through the positions of chains of one kind; the step's outputs, stacked over T.

    `step(carry, rows, moves)` gets the rows `[S, V]` of every chain at a position. For a
    first-order chain that is one compiled loop.
    """
    moves = moves_of(chains[0])
    if isinstance(chains[0], Chain):
        rows = tuple(rows_by_position(chain) for chain in chains if isinstance(chain, Chain))
        return jax.lax.scan(lambda carry, rows: step(carry, rows, moves), carry, rows)[1]
    outputs = []
    tables = [chain.tables for chain in chains if isinstance(chain, HistoryChain)]
    for rows in zip(*tables, strict=True):
        carry, output = step(carry, tuple(map(jnp.asarray, rows)), moves)
        outputs.append(output)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def _check_chain(name: str, chain: AnyChain) -> None:
    """Raises ValueError unless shapes fit together and every row is a distribution."""
    if isinstance(chain, Chain):
        _require_shape(f"{name}.first", chain.first, ("V",))
        vocab_size = np.shape(chain.first)[0]
        _require_shape(f"{name}.kernels", chain.kernels, ("T - 1", vocab_size, vocab_size))
        _require_distributions(f"{name}.first", chain.first)
        _require_distributions(f"{name}.kernels", chain.kernels)
        return
    _require_shape(f"{name}.tables[0]", chain.tables[0], (1, "V"))
    vocab_size = np.shape(chain.tables[0])[1]
    for n, table in enumerate(chain.tables):
        _require_shape(f"{name}.tables[{n}]", table, (vocab_size**n, vocab_size))
        _require_distributions(f"{name}.tables[{n}]", table)


def _require_shape(name: str, value: ArrayLike, wanted: tuple[int | str, ...]) -> None:
    """Raises ValueError unless the shape is the one wanted; a letter stands for any size."""
    shape = np.shape(value)
    fits = len(shape) == len(wanted) and all(
        isinstance(want, str) or size == want for size, want in zip(shape, wanted, strict=True)
    )
    if not fits:
        described = ", ".join(map(str, wanted))
        raise ValueError(f"{name} of shape {shape} must have shape [{described}]")


def _require_distributions(name: str, value: ArrayLike) -> None:
    """Raises ValueError unless every concrete row sums to one and holds no negative number."""
    if is_traced(value):
        return
    value = jnp.asarray(value)
    numbers = np.asarray(value, dtype=np.float64)
    if not (numbers >= 0).all():  # NaN included
        wrong = numbers[~(numbers >= 0)][0]
        raise ValueError(f"{name} holds {wrong:.9g}; probabilities must be at least 0")
    # Half of the digits: a softmax over many tokens does not sum to one to the last.
    tolerance = float(jnp.finfo(value.dtype).eps) ** 0.5
    sums = numbers.sum(-1)
    wrong = ~(abs(sums - 1) <= tolerance)
    if wrong.any():
        raise ValueError(
            f"{name} has a row that sums to {sums[wrong][0]:.9g}; rows must sum to 1 within "
            f"{tolerance:.1g}"
        )


def _fields(chain: AnyChain) -> list[ArrayLike]:
    """The arrays of a chain, which may still be nested lists: a pytree would take them apart."""
    return list(chain.tables) if isinstance(chain, HistoryChain) else [chain.first, chain.kernels]
