"""Who decides: from a draft and the target's distributions to the tokens that stand."""

import jax
import jax.numpy as jnp
from jax import Array

from . import sampling
from .types import Draft, Verdict


def rejection_sampling(key: Array, target_probs: Array, draft: Draft) -> Verdict:
    """Accepts a draft token with probability min(1, p / q); the output is exactly the target's law.

    With p the target's and q the draft's distribution at a place, the token x drawn from q is kept
    with probability min(1, p(x) / q(x)). At the first rejection the token is recovered from
    max(0, p - q) / sum(max(0, p - q)) and the rest of the draft is dropped. If all K are kept, one
    bonus token is drawn from the target after them. On average a place is kept with probability
    sum(min(p, q)), the most any rule can do that looks at one drawn token at a time.

    Args:
      key: consumed.
      target_probs: `[K + 1, V]`; row i is the target's distribution after i draft tokens.
      draft: tokens `[K]` and the distributions `[K, V]` they were drawn from.

    Returns:
      tokens `[K + 1]`, accepted, then recovered or bonus, then zeros; and how many were accepted.

    References:
      Leviathan et al., 2022, https://arxiv.org/abs/2211.17192, algorithm 1;
      Chen et al., 2023, https://arxiv.org/abs/2302.01318, algorithm 2.

    >>> import jax, jax.numpy as jnp
    >>> target = jnp.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> draft = Draft(tokens=jnp.array([1]), probs=jnp.array([[0.2, 0.8, 0.0]]))
    >>> verdict = rejection_sampling(jax.random.key(0), target, draft)
    >>> verdict.tokens.tolist(), int(verdict.num_accepted)
    ([1, 2], 1)
    """
    accept_key, token_key = jax.random.split(key)
    num_tokens = draft.tokens.shape[0]
    drawn = draft.tokens[:, None]
    target = jnp.take_along_axis(target_probs[:num_tokens], drawn, axis=-1)[:, 0]
    proposal = jnp.take_along_axis(draft.probs, drawn, axis=-1)[:, 0]
    # Where q is zero nothing was drawn, so nothing can be kept; the inner where keeps 0 / 0 out.
    ratio = target / jnp.where(proposal > 0, proposal, jnp.ones_like(proposal))
    accept_probs = jnp.where(proposal > 0, jnp.minimum(ratio, 1.0), 0.0)
    accepted = jax.random.bernoulli(accept_key, accept_probs)
    num_accepted = jnp.sum(jnp.cumprod(accepted.astype(jnp.int32)))

    # A row of zeros after the last draft makes the bonus token the residual of nothing.
    nothing = jnp.zeros((1, target_probs.shape[-1]), draft.probs.dtype)
    draft_probs = jnp.concatenate([draft.probs, nothing])
    residual = _residual(target_probs[num_accepted], draft_probs[num_accepted])
    token = sampling.categorical(token_key, residual)
    return verdict(draft.tokens, num_accepted, token)


def verdict(draft_tokens: Array, num_accepted: Array, token: Array) -> Verdict:
    """Lays out a decision: the first `num_accepted` draft tokens, then `token`, then zeros."""
    place = jnp.arange(draft_tokens.shape[0] + 1)
    padded = jnp.concatenate([draft_tokens, jnp.zeros((1,), draft_tokens.dtype)])
    after = jnp.where(place == num_accepted, token, jnp.zeros_like(token))
    return Verdict(
        tokens=jnp.where(place < num_accepted, padded, after).astype(jnp.int32),
        num_accepted=num_accepted.astype(jnp.int32),
    )


def _residual(target_probs: Array, draft_probs: Array) -> Array:
    """max(0, p - q) normalised `[V]`; p itself where p = q, and nothing is ever rejected."""
    residual = jnp.maximum(target_probs - draft_probs, 0.0)
    total = jnp.sum(residual)
    normalised = residual / jnp.where(total > 0, total, jnp.ones_like(total))
    return jnp.where(total > 0, normalised, target_probs)
