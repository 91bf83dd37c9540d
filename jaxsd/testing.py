"""Is it lossless? Toy models whose laws are known, and a checker for verifiers and whole decoders."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class MarkovModel(NamedTuple):
    """A language model whose next token depends on the last `order` tokens, read from its cache.

    Small enough that every continuation can be enumerated, and honest about caches: it remembers the
    tokens it was fed by position, so a stale, missing or misplaced entry changes its output. Places
    before the first token count as token 0.

    vocab_size: V.
    order: how many tokens back the law reaches.
    """

    vocab_size: int
    order: int = 2

    def init(self, key: Array, scale: float = 1.0, dtype: object = jnp.float32) -> Array:
        """Random logits `[V, ..., V, V]`, by the `order` last tokens, oldest first."""
        shape = (self.vocab_size,) * (self.order + 1)
        return scale * jax.random.normal(key, shape, dtype)  # pyright: ignore[reportArgumentType]

    def init_cache(self, batch_size: int, max_len: int) -> Array:
        """Tokens by position, `[B, L]`."""
        return jnp.zeros((batch_size, max_len), jnp.int32)

    def apply(
        self, params: Array, tokens: Array, positions: Array, cache: Array
    ) -> tuple[Array, Array]:
        """Logits `[B, T, V]` and the cache with `tokens` in it."""
        rows = jnp.arange(tokens.shape[0])[:, None]
        cache = cache.at[rows, positions].set(tokens, mode="drop")
        history = []
        for back in reversed(range(self.order)):
            place = positions - back
            seen = jnp.take_along_axis(cache, jnp.maximum(place, 0), axis=1)
            history.append(jnp.where(place >= 0, seen, 0))
        return params[tuple(history)], cache
