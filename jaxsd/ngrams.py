"""What followed the same few tokens in a corpus: n-gram tables, and the drafter that reads them.

A table is made on the host, once, and handed over with the weights. Reading it costs no model pass:
two buckets of a hash table per context length, whatever the size of the corpus.
"""

import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from .draws import drawer
from .types import Drafter, Params, Proposal, Sampling


class NGramTable(NamedTuple):
    """The law of the next token after the last few, as plain arrays: S buckets of W contexts.

    unigram: `[V]` float32, the law without a context; rows of this kind sum to 1.
    contexts: `[S, W, C]` int32, the last tokens that a context asks for, oldest first, -1 in front
      of a shorter one; all -1 where the place is free. Each stands in one of its two buckets.
    successors: `[S, W, M]` int32, the tokens that followed most often.
    probs: `[S, W, M]` float32, what each gets from this context; 0 where there are fewer than M.
    backoff: `[S, W]` float32, 1 - sum(probs): what the context without its oldest token decides.
    """

    unigram: Any
    contexts: Any
    successors: Any
    probs: Any
    backoff: Any


def ngram_table(
    documents: Iterable[ArrayLike],
    vocab_size: int,
    order: int = 4,
    *,
    num_contexts: int | None = 50_000,
    num_successors: int = 16,
    min_count: int = 2,
    novelty: float = 4.0,
) -> NGramTable:
    """Counts what followed what in a corpus; on the host, about a second per million tokens.

    With h a context of up to `order - 1` tokens, h' the same without its oldest, c(h x) how often x
    followed h, N(h) how often anything did and T(h) how many different tokens did,

        p(x | h) = s(x | h) + (1 - sum(s(. | h))) p(x | h')
        s(x | h) = c(h x) / (N(h) + novelty T(h)), 0 but for the `num_successors` most frequent x

    and p(x | h) = p(x | h') for a context that is not kept. Without a context p mixes likewise the
    share of x with an even law. So every token has a chance, and p sums to 1. Contexts do not reach
    from one document into another.

    The defaults are those that agreed most, over orders 2 to 6, with the embedded target on text
    that neither had seen; more contexts agreed no better.

    Args:
      documents: token sequences, each one-dimensional, of integers in 0..V-1.
      vocab_size: V.
      order: n; contexts have 1 to C = n - 1 tokens. At least 2.
      num_contexts: at most so many are kept, the most frequent (of equals the shorter); None is
        all. A context takes about `10 (2 M + C + 1)` bytes.
      num_successors: M.
      min_count: contexts that were met less often are not kept.
      novelty: the weight of what was never met, above 0; 1 is Witten and Bell's.

    Returns:
      An `NGramTable` of JAX arrays, to be passed as `params["ngram"]`.

    Raises:
      ValueError: an argument is out of range, or a document is not a sequence of such integers.

    References:
      Witten and Bell, 1991, "The zero-frequency problem", method C; Chen and Goodman, 1998, "An
      empirical study of smoothing techniques for language modeling", section 2.6; Azar et al.,
      1999, "Balanced allocations" (why one of two buckets is nearly always free).

    >>> table = ngram_table([[1, 2, 3, 1, 2, 3, 1]], vocab_size=4, order=3, novelty=1.0)
    >>> [round(float(p), 4) for p in ngram_law(table, jnp.array([1, 2]))]
    [0.0083, 0.0417, 0.0306, 0.9194]
    """
    _check_table_arguments(vocab_size, order, num_contexts, num_successors, min_count, novelty)
    tokens, places = _joined(documents, vocab_size)
    counts = np.bincount(tokens, minlength=vocab_size)
    unigram = counts / (len(tokens) + novelty * np.count_nonzero(counts))
    unigram += (1.0 - unigram.sum()) / vocab_size

    levels = _levels(
        tokens, places, vocab_size, order - 1, num_contexts, num_successors, min_count, novelty
    )
    contexts, totals, successors, probs = (np.concatenate(parts) for parts in levels)
    kept = _most_frequent(totals, min_count, num_contexts)
    buckets, slots, num_buckets = _allocated(contexts[kept])
    shape = (num_buckets, _WAYS)

    def placed(values: np.ndarray, fill: float, dtype: Any) -> Array:
        out = np.full((*shape, *values.shape[1:]), fill, dtype)
        out[buckets, slots] = values[kept]
        return jnp.asarray(out)

    return NGramTable(
        unigram=jnp.asarray(unigram, jnp.float32),
        contexts=placed(contexts, -1, np.int32),
        successors=placed(successors, 0, np.int32),
        probs=placed(probs, 0, np.float32),
        backoff=placed(1.0 - probs.sum(1, dtype=np.float64), 1, np.float32),
    )


def ngram_law(table: NGramTable, context: Array) -> Array:
    """The law `[V]` of the token after `context` `[C]`, -1 standing for what is not there.

    >>> table = ngram_table([[0, 1, 0, 1]], vocab_size=2, order=2, novelty=1.0)
    >>> [round(float(p), 4) for p in ngram_law(table, jnp.array([0]))]
    [0.1667, 0.8333]
    """
    return _read(table, context)[0]


def ngram_drafter(
    num_tokens: int,
    *,
    chosen: bool = False,
    min_context: int = 0,
    name: str = "ngram",
    shares_noise: bool = False,
) -> Drafter:
    """Proposes what an n-gram table says, without any model; the output keeps the target's law.

    The table's law goes through the same `probabilities` as the target's, so that temperature,
    top-k and top-p shape the draft as they shape the text. Tokens are drawn from what comes out,
    which is reported as it is, or chosen: its most probable token, one-hot, as greedy rows get it
    in any case. Drawing accepts more where the text is sampled: at temperature 1 the embedded
    target, on text it had not seen, would have taken 0.44 of the drawn tokens and 0.21 of the
    chosen ones.

    Args:
      num_tokens: K, at least 1.
      chosen: as above; for rows that sample.
      min_context: proposes only where at least so many of the last tokens are a context of the
        table, and nothing after a place where they are not. 0 proposes always.
      name: the entry of `params` with the `NGramTable`.
      shares_noise: draws with the random numbers that `gumbel_coupling` draws the target's tokens
        with; for that verifier alone.

    Raises:
      ValueError: if an argument is out of its range.

    >>> import jaxsd
    >>> from jaxsd import testing
    >>> model = testing.MarkovModel(vocab_size=4)
    >>> table = ngram_table([[0, 1, 2, 3, 0, 1, 2, 3]], vocab_size=4)
    >>> params = {"target": model.init(jax.random.key(0)), "ngram": table}
    >>> decoder = jaxsd.speculative(model, ngram_drafter(num_tokens=3), max_len=12)
    >>> int(decoder.generate(params, [[0, 1]], None, jax.random.key(1)).lengths[0])
    12
    """
    _check_integer("num_tokens", num_tokens, 1)
    _check_integer("min_context", min_context, 0)

    def init(params: Params, batch_size: int, max_len: int) -> tuple[()]:
        del batch_size, max_len
        _check_table(name, params[name])
        return ()

    def prefill(params: Params, state: tuple[()], prompts: Array, lengths: Array) -> tuple[()]:
        del params, prompts, lengths
        return state

    def propose(
        params: Params,
        state: tuple[()],
        tokens: Array,
        lengths: Array,
        keys: Array,
        sampling: Sampling,
    ) -> Proposal:
        table, settings, noise = params[name], sampling, shares_noise
        if chosen:
            settings = sampling._replace(temperature=jnp.zeros(lengths.shape, jnp.float32))
            noise = keys.ndim == 2  # nothing is drawn: either will do
        rules, draw = drawer(keys, settings, lengths, shares_noise=noise)

        def extend(carry: tuple[Array, Array, Any], index: Array) -> tuple[tuple, tuple]:
            context, is_known, rules = carry
            law, depth = jax.vmap(_read, in_axes=(None, 0))(table, context)
            is_known &= depth >= min_context
            token, probs, rules = draw(rules, jnp.log(law), index)
            context = jnp.concatenate([context[:, 1:], token[:, None]], axis=1)
            return (context, is_known, rules), (token, probs, is_known)

        context = last_tokens(tokens, lengths, table.contexts.shape[-1])
        steps = jnp.arange(num_tokens, dtype=jnp.int32)
        _, (drafted, probs, is_known) = lax.scan(extend, (context, lengths > 0, rules), steps)
        return Proposal(
            tokens=drafted.T,
            probs=probs.swapaxes(0, 1),
            proposed=is_known.T,
            state=state,
        )

    return Drafter(num_tokens, (name,), init, prefill, propose)


def last_tokens(tokens: Array, lengths: Array, count: int) -> Array:
    """The last `count` tokens of every row, `[B, count]`, -1 before its beginning."""
    places = lengths[:, None] - count + jnp.arange(count, dtype=jnp.int32)[None, :]
    found = jnp.take_along_axis(tokens, jnp.maximum(places, 0), axis=1, mode="clip")
    return jnp.where(places >= 0, found, -1)


def save_ngram_table(table: NGramTable, path: str | os.PathLike) -> None:
    """Writes a table to one `.npz` file, whole or not at all.

    Raises:
      ValueError: this is no table.
      OSError: the file cannot be written.

    >>> import tempfile
    >>> table = ngram_table([[0, 1, 0, 1]], vocab_size=2, order=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_ngram_table(table, folder + "/table.npz")
    ...     load_ngram_table(folder + "/table.npz").unigram.shape
    (2,)
    """
    _check_table("table", table)
    path = pathlib.Path(path)
    arrays = {field: np.asarray(getattr(table, field)) for field in NGramTable._fields}
    partial = path.with_name(path.name + ".part")
    with partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    partial.replace(path)


def load_ngram_table(path: str | os.PathLike) -> NGramTable:
    """Reads what `save_ngram_table` wrote, as JAX arrays.

    Raises:
      ValueError: the file is not such a table; what is wrong is named.
      OSError: it cannot be opened.
    """
    try:
        with open(path, "rb") as stream:
            if not zipfile.is_zipfile(stream):
                raise ValueError("it is no .npz file")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as file:
                missing = sorted(set(NGramTable._fields) - set(file.files))
                if missing:
                    raise ValueError(f"it lacks {missing}")
                table = NGramTable(*(file[field] for field in NGramTable._fields))
        _check_table("table", table)
        _check_values(table)
    except (ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"path={str(path)!r} holds no n-gram table: {error}") from error
    return NGramTable(*(jnp.asarray(array) for array in table))


# ---- Reading


# Places of a bucket. A context stands in the emptier of two; with four places each, more than half
# of the table is filled before one does not fit.
_WAYS = 4

_SEEDS = (np.uint32(0x9E3779B9), np.uint32(0x7F4A7C15))


def _read(table: NGramTable, context: Array) -> tuple[Array, Array]:
    """The law `[V]` after `context` `[C]`, and how many of its last tokens are a known context."""
    longest = context.shape[0]
    place = jnp.arange(longest, dtype=jnp.int32)
    # Row d - 1 asks for the last d tokens.
    inside = place[None, :] >= longest - 1 - place[:, None]
    wanted = jnp.where(inside, context[None, :], -1)  # [C, C]
    is_text = jnp.all((wanted >= 0) | ~inside, axis=1)
    buckets = jnp.stack([_bucket(wanted, seed, len(table.contexts)) for seed in _SEEDS], axis=1)
    candidates = table.contexts[buckets]  # [C, 2, W, C]
    is_it = jnp.all(candidates == wanted[:, None, None, :], axis=-1) & is_text[:, None, None]
    is_it = is_it.reshape(longest, -1)
    is_known, at = jnp.any(is_it, axis=1), jnp.argmax(is_it, axis=1)
    bucket = jnp.take_along_axis(buckets, (at // _WAYS)[:, None], axis=1)[:, 0]
    slot = at % _WAYS
    backoff = jnp.where(is_known, table.backoff[bucket, slot], 1.0)
    # What a context decides counts as often as the longer ones leave it to it.
    left = jnp.cumprod(backoff[::-1])[::-1]
    share = jnp.concatenate([left[1:], jnp.ones((1,), left.dtype)])
    probs = jnp.where(is_known, share, 0.0)[:, None] * table.probs[bucket, slot]  # [C, M]
    law = (table.unigram * left[0]).at[table.successors[bucket, slot]].add(probs)
    depth = jnp.max(jnp.where(is_known, place + 1, 0))
    return law, depth


def _bucket(contexts: Any, seed: np.uint32, num_buckets: int) -> Any:
    """A bucket for every context `[..., C]`; the same in numpy and in JAX."""
    words = contexts.astype(np.uint32)
    mixed = words[..., 0] * np.uint32(0) + seed
    for index in range(contexts.shape[-1]):
        mixed = (mixed ^ words[..., index]) * np.uint32(0x85EBCA6B)
        mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0xC2B2AE35)
        mixed = mixed ^ (mixed >> np.uint32(13))
    return (mixed % np.uint32(num_buckets)).astype(np.int32)


# ---- Making


_Level = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _joined(documents: Iterable[ArrayLike], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """All tokens one after the other `[N]` int64, and the place of each in its document."""
    parts, places = [], []
    for index, document in enumerate(documents):
        array = np.asarray(document)
        if array.size == 0:
            continue
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(
                f"documents[{index}] of shape {array.shape} and type {array.dtype} must be a "
                "one-dimensional sequence of integers"
            )
        if array.min() < 0 or array.max() >= vocab_size:
            wrong = array.min() if array.min() < 0 else array.max()
            raise ValueError(f"documents[{index}] has token {wrong}; wanted 0..{vocab_size - 1}")
        parts.append(array.astype(np.int64))
        places.append(np.arange(len(array)))
    if not parts:
        raise ValueError("documents must hold at least one token")
    return np.concatenate(parts), np.concatenate(places)


def _levels(
    tokens: np.ndarray,
    places: np.ndarray,
    vocab_size: int,
    longest: int,
    num_contexts: int | None,
    num_successors: int,
    min_count: int,
    novelty: float,
) -> zip:
    """Of the contexts of 1, 2, ... tokens: the context, its count, its successors, their shares."""
    levels: list[_Level] = []
    number = np.zeros(len(tokens), np.int64)  # of the context that stands before every token
    for length in range(1, longest + 1):
        at = np.flatnonzero(places >= length)
        # The contexts of one length are numbered by those a token shorter: no number overflows.
        keys = number[at] * vocab_size + tokens[at - length]
        _, first, renumbered, totals = np.unique(
            keys, return_index=True, return_inverse=True, return_counts=True
        )
        number[at] = renumbered
        kept = _most_frequent(totals, min_count, num_contexts)
        renumbered_again = np.full(len(totals), -1)
        renumbered_again[kept] = np.arange(len(kept))
        owner = renumbered_again[renumbered]
        pairs = owner * vocab_size + tokens[at]
        pairs, counts = np.unique(pairs[owner >= 0], return_counts=True)
        owners, followers = np.divmod(pairs, vocab_size)
        order = np.lexsort((followers, -counts, owners))
        owners, followers, counts = owners[order], followers[order], counts[order]
        rank = np.arange(len(owners)) - np.searchsorted(owners, np.arange(len(kept)))[owners]
        num_followers = np.bincount(owners, minlength=len(kept))
        among = rank < num_successors
        owners, rank = owners[among], rank[among]
        successors = np.zeros((len(kept), num_successors), np.int32)
        probs = np.zeros((len(kept), num_successors), np.float32)
        successors[owners, rank] = followers[among]
        probs[owners, rank] = counts[among] / (totals[kept] + novelty * num_followers)[owners]
        contexts = np.full((len(kept), longest), -1, np.int32)
        back = at[first[kept]][:, None] + np.arange(-length, 0)[None, :]
        contexts[:, longest - length :] = tokens[back]
        levels.append((contexts, totals[kept], successors, probs))
    return zip(*levels, strict=True)


def _most_frequent(totals: np.ndarray, min_count: int, num_contexts: int | None) -> np.ndarray:
    """Indices of what is kept, the most frequent first, of equals the earlier."""
    kept = np.flatnonzero(totals >= min_count)
    return kept[np.argsort(-totals[kept], kind="stable")][:num_contexts]


def _allocated(contexts: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """A place for every context: buckets `[N]`, places in them `[N]`, and how many buckets."""
    num_buckets = max(-(-2 * len(contexts) // _WAYS), 1)
    while True:
        choices = [_bucket(contexts, seed, num_buckets).tolist() for seed in _SEEDS]
        filled = [0] * num_buckets
        buckets, slots = [], []
        for pair in zip(*choices, strict=True):
            bucket = min(pair, key=filled.__getitem__)
            buckets.append(bucket)
            slots.append(filled[bucket])
            filled[bucket] += 1
        if max(filled) <= _WAYS:
            return np.array(buckets, np.int64), np.array(slots, np.int64), num_buckets
        num_buckets += num_buckets // 4 + 1


def _check_table(name: str, table: Any) -> None:
    """Raises ValueError if these are not the arrays of one table."""
    fields: list[Any] = [getattr(table, field, None) for field in NGramTable._fields]
    shapes = [np.shape(field) for field in fields]
    unigram, contexts, successors, probs, backoff = shapes
    fits = (
        len(unigram) == 1
        and len(contexts) == 3
        and contexts[1] == _WAYS
        and successors == probs
        and len(probs) == 3
        and probs[:2] == contexts[:2] == backoff
        and min(*unigram, *contexts, *probs) > 0
    )
    if not fits:
        raise ValueError(
            f"{name} has shapes {dict(zip(NGramTable._fields, shapes, strict=True))}; wanted those "
            "of jaxsd.ngram_table: [V], [S, W, C], [S, W, M], [S, W, M], [S, W]"
        )
    types = [str(getattr(field, "dtype", type(field).__name__)) for field in fields]
    wanted = ["float32", "int32", "int32", "float32", "float32"]
    if types != wanted:
        raise ValueError(f"{name} has types {types}; wanted {wanted}")


def _check_values(table: NGramTable) -> None:
    """Raises ValueError if a token or a probability is out of range."""
    vocab_size = len(table.unigram)
    for field, low in (("contexts", -1), ("successors", 0)):
        values = getattr(table, field)
        if values.min() < low or values.max() >= vocab_size:
            raise ValueError(f"{field} has tokens outside {low}..{vocab_size - 1}")
    sums = table.probs.sum(-1) + table.backoff
    shares = [table.unigram, table.probs, table.backoff]
    if not all(np.all(part >= 0) for part in shares) or not np.all(np.abs(sums - 1) < 1e-3):
        raise ValueError("its probabilities are negative or do not sum to 1")
    if abs(table.unigram.sum() - 1) > 1e-3:
        raise ValueError("its probabilities are negative or do not sum to 1")


def _check_table_arguments(
    vocab_size: int,
    order: int,
    num_contexts: int | None,
    num_successors: int,
    min_count: int,
    novelty: float,
) -> None:
    _check_integer("vocab_size", vocab_size, 1)
    _check_integer("order", order, 2)
    if num_contexts is not None:
        _check_integer("num_contexts", num_contexts, 1)
    _check_integer("num_successors", num_successors, 1)
    _check_integer("min_count", min_count, 1)
    if not 0 < novelty < np.inf:
        raise ValueError(f"novelty={novelty!r} must be a number above 0")


def _check_integer(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}={value!r} must be an integer of at least {low}")
