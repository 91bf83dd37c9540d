"""Who proposes: the parts that suggest the next tokens of every row."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import sampling as sampling_lib
from .types import Drafter, LanguageModel, Params, Proposal, Sampling


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


def model_drafter(model: LanguageModel, num_tokens: int, *, name: str = "draft") -> Drafter:
    """A small language model drafts `num_tokens` tokens, one pass each, as the row's sampling says.

    Its distributions go through the same `probabilities` as the target's, so that with the same
    weights on both sides every token is accepted.

    Args:
      model: the draft model; it shares the target's vocabulary.
      num_tokens: K, at least 1.
      name: the entry of `params` with its weights.

    Raises:
      ValueError: if `num_tokens` is not an integer of at least 1.

    >>> import jax, jaxsd
    >>> from jaxsd import testing
    >>> model = testing.MarkovModel(vocab_size=3)
    >>> jaxsd.model_drafter(model, num_tokens=4).num_tokens
    4
    """
    _check_num_tokens(num_tokens)

    def init(params: Params, batch_size: int, max_len: int) -> object:
        del params
        return model.init_cache(batch_size, max_len + num_tokens)

    def prefill(params: Params, state: object, prompts: Array, lengths: Array) -> object:
        _, cache = model.apply(params[name], prompts, block_positions(prompts, lengths), state)
        return cache

    def propose(
        params: Params,
        state: object,
        tokens: Array,
        lengths: Array,
        keys: Array,
        sampling: Sampling,
    ) -> Proposal:
        def draw(logits: Array, index: Array | int) -> tuple[Array, Array]:
            step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
            probs = sampling_lib.probabilities(logits, sampling)
            return jax.vmap(sampling_lib.categorical)(step_keys, probs), probs

        # When all K tokens of the last round were accepted, the draft has not read the K-th: the
        # first pass takes the last two tokens. Reading a token again at its own place changes
        # nothing.
        starts = jnp.maximum(lengths - 2, 0)
        pair = starts[:, None] + jnp.arange(2, dtype=jnp.int32)[None, :]
        last_two = jnp.take_along_axis(tokens, pair, axis=1, mode="clip")
        logits, cache = model.apply(params[name], last_two, pair, state)
        last = (lengths - 1 - starts)[:, None, None]
        token, probs = draw(jnp.take_along_axis(logits, last, axis=1)[:, 0], 0)

        def extend(carry: tuple[Array, object], index: Array) -> tuple[tuple, tuple]:
            token, cache = carry
            positions = (lengths + index)[:, None]
            logits, cache = model.apply(params[name], token[:, None], positions, cache)
            token, probs = draw(logits[:, 0], index + 1)
            return (token, cache), (token, probs)

        steps = jnp.arange(num_tokens - 1, dtype=jnp.int32)
        (_, cache), (more, more_probs) = lax.scan(extend, (token, cache), steps)
        return Proposal(
            tokens=jnp.concatenate([token[:, None], more.T], axis=1),
            probs=jnp.concatenate([probs[:, None], more_probs.swapaxes(0, 1)], axis=1),
            proposed=None,
            state=cache,
        )

    return Drafter(num_tokens, (name,), init, prefill, propose)


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


def _no_prefill(params: Params, state: object, prompts: Array, lengths: Array) -> object:
    del params, prompts, lengths
    return state


def _check_num_tokens(num_tokens: int) -> None:
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or num_tokens < 1:
        raise ValueError(
            f"num_tokens={num_tokens!r} must be an integer of at least 1; "
            "for plain decoding use no_drafter()"
        )
