"""From logits to the distribution a token is drawn from: the one function for all of decoding."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer

from .types import Sampling


def probabilities(logits: Array, sampling: Sampling) -> Array:
    """The distribution that `sampling` makes of `logits`.

    Temperature first, then top-k, then top-p over what top-k left. Exactly `min(k, V)` tokens
    survive top-k, the lower id first among equals, so that `top_k=1` is greedy decoding. Greedy
    rows (temperature 0) put all mass on the first largest logit. Drafting, verifying, the bonus
    token and plain decoding all use this function; that they agree is what makes speculation
    lossless.

    Args:
      logits: `[..., V]`; `-inf` marks a forbidden token.
      sampling: each field a scalar, or an array whose shape is a prefix of `logits.shape[:-1]`
        (`[B]` for logits `[B, V]` or `[B, T, V]`).

    Returns:
      `[..., V]` float32 (float64 for float64 logits), rows summing to 1.

    Raises:
      ValueError: if a field is out of range or its shape does not fit; traced values are not
      checked.

    >>> import jax.numpy as jnp
    >>> logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    >>> [round(float(p), 3) for p in probabilities(logits, Sampling(temperature=1.0, top_k=2))]
    [0.625, 0.375, 0.0]
    >>> probabilities(logits, Sampling(temperature=0.0)).tolist()
    [1.0, 0.0, 0.0]
    """
    check_sampling(sampling)
    dtype = jnp.float64 if logits.dtype == jnp.float64 else jnp.float32
    logits = logits.astype(dtype)
    temperature = _per_row("temperature", sampling.temperature, logits, dtype)
    top_k = _per_row("top_k", sampling.top_k, logits, jnp.int32)
    top_p = _per_row("top_p", sampling.top_p, logits, dtype)

    greedy = temperature <= 0
    largest = jnp.max(logits, axis=-1, keepdims=True)
    index = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    # The first of the largest, by two reductions that vectorise where an argmax does not.
    size = logits.shape[-1]
    first = jnp.min(jnp.where(logits == largest, index, size), axis=-1, keepdims=True)
    # Subtracting the maximum before dividing keeps a small temperature from overflowing.
    scaled = (logits - largest) / jnp.where(greedy, jnp.ones_like(temperature), temperature)
    # Sorting a vocabulary costs as much as a small model's pass: only if some row asks for it.
    filtering = ~greedy & ((top_k > 0) | (top_p < 1))
    keep = lax.cond(
        jnp.any(filtering),
        lambda: _kept(scaled, top_k, top_p) | ~filtering,
        lambda: jnp.ones(scaled.shape, bool),
    )
    probs = jax.nn.softmax(jnp.where(keep, scaled, -jnp.inf), axis=-1)
    return jnp.where(greedy, (index == first).astype(dtype), probs)


def categorical(key: Array, probs: Array) -> Array:
    """A token drawn from each row of probabilities; never one of probability zero.

    Inverts the cumulative distribution in two levels, first among blocks of about sqrt(V) tokens
    and then within one, each with a uniform of its own: two random numbers, where the Gumbel method
    takes V. At V = 2048 on a CPU that is 4 against 91 microseconds, which is a draft model's whole
    pass.

    Args:
      key: consumed.
      probs: `[..., V]`, not negative, rows summing to about 1.

    Returns:
      `[...]` int32, drawn independently.

    >>> import jax, jax.numpy as jnp
    >>> int(categorical(jax.random.key(0), jnp.array([0.0, 1.0, 0.0])))
    1
    """
    *shape, size = probs.shape
    width = 2 ** (size.bit_length() // 2)

    def invert(probs: Array, uniforms: Array) -> Array:
        blocks = jnp.pad(probs, (0, -size % width)).reshape(-1, width)
        for_block, for_token = uniforms
        block = _invert(jnp.sum(blocks, axis=1), for_block)
        return block * width + _invert(blocks[block], for_token)

    uniforms = jax.random.uniform(key, (*shape, 2), probs.dtype)
    for _ in shape:
        invert = jax.vmap(invert)
    return invert(probs, uniforms)


def check_sampling(sampling: Sampling) -> None:
    """Raises ValueError if a concrete field is out of range; traced fields pass."""
    rules = (
        ("temperature", lambda x: (x >= 0) & np.isfinite(x), "finite and at least 0 (0 is greedy)"),
        ("top_k", lambda x: (x >= 0) & (x == np.floor(x)), "an integer of at least 0 (0 is off)"),
        ("top_p", lambda x: (x > 0) & (x <= 1), "above 0 and at most 1 (1 is off)"),
    )
    for name, is_valid, wanted in rules:
        value = getattr(sampling, name)
        if isinstance(value, Tracer):
            continue
        host = np.asarray(value)
        valid = is_valid(host.astype(np.float64))
        if not np.all(valid):
            wrong = host[~valid].ravel()[0] if host.ndim else host[()]
            raise ValueError(f"sampling.{name}={wrong} must be {wanted}")


def _invert(weights: Array, uniform: Array) -> Array:
    """The first index whose cumulative weight exceeds `uniform` of the total, of weight above 0."""
    index = jnp.arange(weights.shape[0], dtype=jnp.int32)
    cumulative = jnp.cumsum(weights)
    is_above = (cumulative > uniform * cumulative[-1]) & (weights > 0)
    first = jnp.min(jnp.where(is_above, index, weights.shape[0]))
    # None is above where the product is rounded up to the total: then it is the last with weight.
    last = jnp.max(jnp.where(weights > 0, index, 0))
    return jnp.minimum(first, last)


def _per_row(name: str, value: object, logits: Array, dtype: object) -> Array:
    """A sampling field with trailing axes added so that it broadcasts against `logits`."""
    array = jnp.asarray(value, dtype)  # pyright: ignore[reportArgumentType]
    if array.shape != logits.shape[:-1][: array.ndim]:
        raise ValueError(
            f"sampling.{name} has shape {array.shape}, which is no prefix of the logits' batch "
            f"shape {logits.shape[:-1]}"
        )
    return array.reshape(array.shape + (1,) * (logits.ndim - array.ndim))


def _kept(scaled: Array, top_k: Array, top_p: Array) -> Array:
    """Which tokens survive top-k and then top-p, `[..., V]` bool; at least one per row."""
    order = jnp.argsort(scaled, axis=-1, stable=True, descending=True)
    ordered = jnp.take_along_axis(scaled, order, axis=-1)
    rank = lax.broadcasted_iota(jnp.int32, scaled.shape, scaled.ndim - 1)
    within_k = (top_k <= 0) | (rank < top_k)
    probs = jax.nn.softmax(jnp.where(within_k, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    within_p = (top_p >= 1) | (before < top_p) | (rank == 0)
    kept = within_k & within_p
    inverse = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(kept, inverse, axis=-1)
