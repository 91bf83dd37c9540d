"""How a drafter draws: from the logits of a place to a token, its law, and the rules after it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from . import sampling as sampling_lib
from . import verifiers
from .types import Sampling

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
