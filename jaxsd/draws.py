"""How a drafter draws: from the logits of a place to a token and its law, one after the other."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import sampling as sampling_lib
from . import verifiers
from .types import LanguageModel, Params, Sampling

Draw = Callable[[Any, Array, Array | int], tuple[Array, Array, Any]]
"""`(rules, logits [B, V], index)` to a token `[B]`, its law `[B, V]` and the rules after it."""


def drawer(
    keys: Array, sampling: Sampling, lengths: Array, *, shares_noise: bool = False
) -> tuple[Any, Draw]:
    """The rules at the start of a round, and what draws its token number `index`.

    The reported law is the very array that the token was drawn from.

    Args:
      keys: `[B]`, or `[B, K + 1]` of a verifier that shares its noise; consumed.
      sampling: with `[B]` fields, and a guide if the text is constrained.
      lengths: `[B]`, the place of token 0.
      shares_noise: whether to draw with the noise that the verifier draws the target's tokens with.

    Raises:
      ValueError: if `shares_noise` does not fit the keys.
    """
    if shares_noise != (keys.ndim == 2):
        raise ValueError(
            f"shares_noise={shares_noise} of the drafter must fit the verifier: "
            "True for jaxsd.gumbel_coupling, False for others"
        )
    guide = getattr(sampling, "guide", None)

    def draw(rules: Any, logits: Array, index: Array | int) -> tuple[Array, Array, Any]:
        if guide is not None:
            logits = guide.constrain(rules, logits, lengths + index)
        probs = sampling_lib.probabilities(logits, sampling)
        if shares_noise:
            place_keys = jnp.take(keys, index, axis=1)
            token = jax.vmap(verifiers.shared_categorical)(place_keys, probs)
        else:
            step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
            token = jax.vmap(sampling_lib.categorical)(step_keys, probs)
        return token, probs, rules if guide is None else guide.advance(rules, token)

    return None if guide is None else guide.rules, draw


class Chain(NamedTuple):
    """Drafted tokens of every row, as far as they go, and what the next one needs.

    tokens: `[B, K]` int32, zeros beyond.
    probs: `[B, K, V]` float32, the law each was drawn from, zeros beyond.
    last: `[B]` int32, the token that the next one follows.
    cache: of the model that drafts.
    rules: of constraints, or None.
    """

    tokens: Array
    probs: Array
    last: Array
    cache: Any
    rules: Any


Score = Callable[[Any, Array, Array | int], tuple[Array, Any]]
"""`(cache, token [B], index)` to the logits `[B, V]` of drafted token `index`, and the cache."""


def extend_chain(chain: Chain, score: Score, draw: Draw, first: int, last: int | Array) -> Chain:
    """Draws the tokens from number `first` on, up to number `last`, which may be traced."""

    def extend(index: Array | int, chain: Chain) -> Chain:
        logits, cache = score(chain.cache, chain.last, index)
        token, probs, rules = draw(chain.rules, logits, index)
        return Chain(
            tokens=chain.tokens.at[:, index].set(token),
            probs=chain.probs.at[:, index].set(probs),
            last=token,
            cache=cache,
            rules=rules,
        )

    if isinstance(last, int) and last == first + 1:
        return extend(first, chain)  # without a loop around it
    return lax.fori_loop(first, last, extend, chain)


def empty_chain(
    model: LanguageModel,
    params: Params,
    cache: Any,
    tokens: Array,
    lengths: Array,
    num_tokens: int,
    rules: Any,
) -> Chain:
    """A chain of no token yet, after the rows' last one `[B]`."""
    law = law_shape(model, params, cache, tokens, lengths)
    batch_size = len(lengths)
    return Chain(
        tokens=jnp.zeros((batch_size, num_tokens), jnp.int32),
        probs=jnp.zeros((batch_size, num_tokens, law.shape[-1]), law.dtype),
        last=jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0],
        cache=cache,
        rules=rules,
    )


def law_shape(
    model: LanguageModel, params: Params, cache: Any, tokens: Array, lengths: Array
) -> jax.ShapeDtypeStruct:
    """Shape `[B, V]` and type of the laws that a model's logits become."""

    def law(params: Params, cache: Any, tokens: Array, positions: Array) -> Array:
        logits, _ = model.apply(params, tokens, positions, cache)
        return sampling_lib.probabilities(logits[:, 0], Sampling())

    return jax.eval_shape(law, params, cache, tokens[:, :1], lengths[:, None])
