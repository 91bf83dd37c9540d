"""How much bias buys how much speed, when drafted tokens are accepted more freely than is lossless?

One token is drafted, kept with a probability that may depend on it (the acceptance), and replaced
by a draw from another law (the residual) where it is not kept. Speed is the probability that it is
kept; bias is the total variation between what comes out and the target's law. All laws are arrays
`[..., V]` over the vocabulary, and everything is differentiable in them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ._inputs import NON_NEGATIVE, PROBABILITY, as_floats, is_traced, require
from .chains import AnyChain, Moves, check_chains, start_of, sweep
from .length_curves import as_one_dtype

# Probabilities that were computed in low precision, over a large vocabulary, add up to 1 this well.
_SUM_TOLERANCE = 1e-3
_SUMS_TO_ONE: Any = (
    lambda total: abs(total - 1) <= _SUM_TOLERANCE,
    f"1, up to {_SUM_TOLERANCE:g}",
)


class BiasSpeedFront(NamedTuple):
    """What accepting tokens that the lossless rule would reject gains and costs, per token."""

    rejection: Array  # [..., E] probability that a drafted token is rejected
    loss_optimal: Array  # [..., E] bias with the best residual: total variation - rejection
    loss_target_resampling: Array  # [..., E] bias if rejected tokens are drawn from the target


class SequenceTradeoff(NamedTuple):
    """Rejections and bias, position by position, in sequences that are already biased."""

    rejection: Array  # [T] probability that the drafted token is rejected; the sum counts them
    loss: Array  # [T] bias of the token's law, given those before it
    total_variation: Array  # [T] between the laws of draft and target, given the tokens before


def total_variation(draft_probs: ArrayLike, target_probs: ArrayLike) -> Array:
    """Returns the total variation between two laws: what lossless verification rejects.

    It is one less the acceptance of `distribution_acceptance`, without the cancellation for laws
    that are close.

        TV = 1/2 sum over tokens of |draft - target|

    Args:
      draft_probs: `[..., V]` probabilities of the draft's law.
      target_probs: `[..., V]` those of the target's.

    Returns:
      `[...]` in [0, 1].

    Raises:
      ValueError: a law is not one, or the two do not fit.

    Example:
      >>> from jaxsd import costmodel
      >>> round(float(costmodel.total_variation([0.5, 0.3, 0.2], [0.2, 0.3, 0.5])), 6)
      0.3

    Source: Yin et al., arXiv 2411.00841, theorem 1.
    """
    _check(draft_probs=draft_probs, target_probs=target_probs)
    return _total_variation(*as_floats(draft_probs, target_probs))


def rejection_probability(acceptance: ArrayLike, draft_probs: ArrayLike) -> Array:
    """Returns the probability that a token drawn from the draft's law is not kept.

        R = sum over tokens of (1 - acceptance) draft

    Args:
      acceptance: `[..., V]` probability that each token is kept if it is drafted, in [0, 1].
      draft_probs: `[..., V]` the draft's law.

    Returns:
      `[...]` in [0, 1].

    Raises:
      ValueError: an acceptance is not a probability, the law is not one, or they do not fit.

    Example:
      >>> from jaxsd import costmodel
      >>> round(float(costmodel.rejection_probability([0.5, 1.0], [0.8, 0.2])), 6)
      0.4

    Source: Yin et al., arXiv 2411.00841, section 4.
    """
    _check(acceptance=acceptance, draft_probs=draft_probs)
    return _rejection(*as_floats(acceptance, draft_probs))


def emitted_law(acceptance: ArrayLike, draft_probs: ArrayLike, residual_probs: ArrayLike) -> Array:
    """Returns the law of the token that comes out, kept or replaced.

    With the acceptance of the lossless rule and `optimal_residual` it is the target's law.

        A = acceptance * draft + R * residual,  R as in `rejection_probability`

    Args:
      acceptance: `[..., V]` probability that each token is kept if it is drafted, in [0, 1].
      draft_probs: `[..., V]` the draft's law.
      residual_probs: `[..., V]` the law that a rejected token is replaced from.

    Returns:
      `[..., V]` probabilities.

    Raises:
      ValueError: an acceptance is not a probability, a law is not one, or they do not fit.

    Example:
      >>> from jaxsd import costmodel
      >>> print(costmodel.emitted_law([0.5, 1.0], [0.8, 0.2], [0.25, 0.75]))
      [0.5 0.5]

    Source: Yin et al., arXiv 2411.00841, section 4.
    """
    _check(acceptance=acceptance, draft_probs=draft_probs, residual_probs=residual_probs)
    return _emitted(*as_floats(acceptance, draft_probs, residual_probs))


def residual_loss(acceptance: ArrayLike, draft_probs: ArrayLike, target_probs: ArrayLike) -> Array:
    """Returns the least bias that any residual law can reach with a given acceptance.

    For every acceptance whatever, rejection and this loss add up to the total variation of the two
    laws at least, and to exactly that where no token is accepted less than the lossless rule would,
    `min(1, target / draft)`. So a straight line is all that can be traded.

        Loss = min over laws P of TV(acceptance * draft + R P, target)
             = sum over tokens of max(acceptance * draft - target, 0)

    Args:
      acceptance: `[..., V]` probability that each token is kept if it is drafted, in [0, 1].
      draft_probs: `[..., V]` the draft's law.
      target_probs: `[..., V]` the target's.

    Returns:
      `[...]` total variation between what is emitted and the target's law, in [0, 1].

    Raises:
      ValueError: an acceptance is not a probability, a law is not one, or they do not fit.

    Example:
      >>> from jaxsd import costmodel
      >>> draft, target = [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]
      >>> accept_more = costmodel.over_acceptance(draft, target, 0.1)
      >>> round(float(costmodel.residual_loss(accept_more, draft, target)), 6)
      0.1
      >>> round(float(costmodel.rejection_probability(accept_more, draft)), 6)  # 0.3 together
      0.2

    Source: Yin et al., arXiv 2411.00841, theorems 4 and 5.
    """
    _check(acceptance=acceptance, draft_probs=draft_probs, target_probs=target_probs)
    kept, p, q = as_floats(acceptance, draft_probs, target_probs)
    return jnp.maximum(kept * p - q, 0).sum(-1)


def optimal_residual(
    acceptance: ArrayLike, draft_probs: ArrayLike, target_probs: ArrayLike
) -> Array:
    """Returns a law to replace rejected tokens from that makes the bias as small as it can be.

    It is optimal for every acceptance, be it below or above that of the lossless rule. For all
    acceptances that are nowhere below, it is the same law, that of lossless verification: no
    knob that accepts more needs another residual. Where nothing is missing (up to 1e-19 in
    float32) nothing is rejected, and it is the target's law.

        P = max(target - acceptance * draft, 0) / its sum

    Args:
      acceptance: `[..., V]` probability that each token is kept if it is drafted, in [0, 1].
      draft_probs: `[..., V]` the draft's law.
      target_probs: `[..., V]` the target's.

    Returns:
      `[..., V]` probabilities; `emitted_law` with them is `residual_loss` away from the target's.

    Raises:
      ValueError: an acceptance is not a probability, a law is not one, or they do not fit.

    Example:
      >>> from jaxsd import costmodel
      >>> draft, target = [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]
      >>> print(costmodel.optimal_residual([0.6, 1.0, 1.0], draft, target))
      [0. 0. 1.]

    Source: Yin et al., arXiv 2411.00841, theorem 4, which gives all optimal laws; this is one.
    """
    _check(acceptance=acceptance, draft_probs=draft_probs, target_probs=target_probs)
    return _residual(*as_floats(acceptance, draft_probs, target_probs))


def over_acceptance(draft_probs: ArrayLike, target_probs: ArrayLike, epsilon: ArrayLike) -> Array:
    """Returns the acceptance that forgives a token up to epsilon too much probability.

    At `epsilon=0` the lossless rule; at 1 everything is accepted. Exactly 1 for a token that the
    draft's law does not contain.

        b = min(1, (target + epsilon) / draft)
        rejection = sum of max(draft - target - epsilon, 0)
        loss      = sum of min(max(draft - target, 0), epsilon)   (with `optimal_residual`)

    Args:
      draft_probs: `[..., V]` the draft's law.
      target_probs: `[..., V]` the target's.
      epsilon: `[...]` probability, at least 0.

    Returns:
      `[..., V]` in [0, 1].

    Raises:
      ValueError: epsilon is negative, a law is not one, or they do not fit.

    Example:
      >>> from jaxsd import costmodel
      >>> print(costmodel.over_acceptance([0.5, 0.25, 0.25], [0.125, 0.375, 0.5], 0.125))
      [0.5 1.  1. ]

    Source: Yin et al., arXiv 2411.00841, section 4.
    """
    p, q, allowed = _with_knob("epsilon", epsilon, NON_NEGATIVE, draft_probs, target_probs)
    return _over_acceptance(p, q + allowed)


def blended_acceptance(draft_probs: ArrayLike, target_probs: ArrayLike, weight: ArrayLike) -> Array:
    """Returns the acceptance between the lossless rule and accepting everything.

    The knob is linear: `weight` is the share of the total variation that becomes bias.

        b = b_0 + weight (1 - b_0),  b_0 = min(1, target / draft)
        rejection = (1 - weight) TV
        loss      = weight TV   (with `optimal_residual`)

    Args:
      draft_probs: `[..., V]` the draft's law.
      target_probs: `[..., V]` the target's.
      weight: `[...]` in [0, 1].

    Returns:
      `[..., V]` in [0, 1].

    Raises:
      ValueError: weight is not in [0, 1], a law is not one, or they do not fit.

    Example:
      >>> from jaxsd import costmodel
      >>> print(costmodel.blended_acceptance([0.5, 0.25, 0.25], [0.125, 0.375, 0.5], 0.5))
      [0.625 1.    1.   ]

    Source: ours; as every acceptance that is nowhere below the lossless rule's, it is on the line
    of theorem 5 of Yin et al., arXiv 2411.00841.
    """
    p, q, share = _with_knob("weight", weight, PROBABILITY, draft_probs, target_probs)
    lossless = _over_acceptance(p, q)
    return lossless + share * (1 - lossless)  # in this form it never rounds to more than 1


def bias_speed_front(
    draft_probs: ArrayLike, target_probs: ArrayLike, epsilons: ArrayLike
) -> BiasSpeedFront:
    """Returns rejection and bias along `over_acceptance`, for two ways to replace a token.

    With the optimal residual the points are on the straight line from (TV, 0) to (0, TV), which
    nothing passes. Drawing rejected tokens from the target's law is never better, and biased even
    at `epsilon=0`.

        rejection    = sum of max(draft - target - epsilon, 0)
        loss_optimal = sum of min(max(draft - target, 0), epsilon) = TV - rejection
        loss_target_resampling = TV(min(draft, target + epsilon) + rejection * target, target)

    Args:
      draft_probs: `[..., V]` the draft's law.
      target_probs: `[..., V]` the target's.
      epsilons: `[E]` probabilities, at least 0.

    Returns:
      A `BiasSpeedFront` with fields `[..., E]`.

    Raises:
      ValueError: an epsilon is negative, there is not one axis of them, a law is not one, or the
        two do not fit.

    Example:
      >>> from jaxsd import costmodel
      >>> front = costmodel.bias_speed_front([0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.0, 0.1, 0.3])
      >>> for name, values in zip(front._fields, front):
      ...     print(name, [round(float(value), 4) for value in values])
      rejection [0.3, 0.2, 0.0]
      loss_optimal [0.0, 0.1, 0.3]
      loss_target_resampling [0.15, 0.2, 0.3]

    Source: Yin et al., arXiv 2411.00841, theorem 5 and figure 4; there these are Decoding-OPT and
    Decoding-UNO.
    """
    if np.ndim(epsilons) != 1:
        raise ValueError(f"epsilons of shape {np.shape(epsilons)} must have shape [E]")
    require("epsilons", epsilons, NON_NEGATIVE)
    _check(draft_probs=draft_probs, target_probs=target_probs)
    p, q, allowed = as_one_dtype(draft_probs, target_probs, epsilons)
    p, q, allowed = as_floats(p[..., None, :], q[..., None, :], allowed[:, None])
    excess = jnp.maximum(p - q, 0)
    rejection = jnp.maximum(p - q - allowed, 0).sum(-1)
    emitted = jnp.minimum(p, q + allowed) + rejection[..., None] * q
    return BiasSpeedFront(
        rejection=rejection,
        loss_optimal=jnp.minimum(excess, allowed).sum(-1),
        loss_target_resampling=_total_variation(emitted, q),
    )


def sequence_tradeoff(
    acceptance: AnyChain, draft: AnyChain, target: AnyChain, residual: AnyChain | None = None
) -> SequenceTradeoff:
    """Returns what lossy verification rejects and how biased it is, over a sequence of T tokens.

    Contexts are those that the lossy decoder itself writes, so the bias of a token is on top of
    that of all before it. With the optimal residual, and nowhere accepting less than the lossless
    rule, rejection and loss add up to the total variation at every position; that is itself a mean
    over biased contexts, so the front of whole sequences is only nearly straight. For every
    acceptance and residual the laws of the first n tokens, the emitted and the target's, are no
    further apart than the sum of the first n losses.

        E[rejections] + sum over n of E_A[loss_n] = sum over n of E_A[TV_n]
        TV(A(x_1..x_T), target(x_1..x_T)) <= sum over n of E_A[loss_n]

    Args:
      acceptance: probability that a token is kept if it is drafted, for every token and context, in
        the form of a chain: `jax.tree.map` of `over_acceptance` over both chains is one.
      draft: the draft's chain, of either kind.
      target: the target's, of the same kind and size.
      residual: the laws that rejected tokens are replaced from; None is the optimal one, and the
        target's chain is the paper's Decoding-UNO.

    Returns:
      A `SequenceTradeoff` with fields `[T]`.

    Raises:
      ValueError: an acceptance is not a probability, a row is not a law, or they do not fit.

    Example:
      >>> import jax
      >>> from jaxsd import costmodel
      >>> draft = costmodel.memoryless_chain([0.5, 0.3, 0.2], 4)
      >>> target = costmodel.memoryless_chain([0.2, 0.3, 0.5], 4)
      >>> accept_more = jax.tree.map(
      ...     lambda p, q: costmodel.over_acceptance(p, q, 0.1), draft, target
      ... )
      >>> found = costmodel.sequence_tradeoff(accept_more, draft, target)
      >>> for name, values in zip(found._fields, found):
      ...     print(name, round(float(values.sum()), 4))
      rejection 0.8
      loss 0.4
      total_variation 1.2

    Source: Yin et al., arXiv 2411.00841, section 4, for one token; the sums over a text are ours.
    """
    given = {"draft": draft, "target": target}
    laws = check_chains(**(given if residual is None else given | {"residual": residual}))
    return _sequence_tradeoff(_check_acceptance(acceptance, laws[0]), *laws)


@jax.jit
def _sequence_tradeoff(
    acceptance: AnyChain, draft: AnyChain, target: AnyChain, *residual: AnyChain
) -> SequenceTradeoff:
    """`sequence_tradeoff` of checked chains."""

    def step(
        weights: Array, rows: tuple[Array, ...], moves: Moves
    ) -> tuple[Array, SequenceTradeoff]:
        kept, p, q, *other = rows  # [S, V]
        law = _emitted(kept, p, other[0] if other else _residual(kept, p, q))
        parts = _rejection(kept, p), _total_variation(law, q), _total_variation(p, q)
        next_weights = moves.merge(weights[:, None] * law)
        return next_weights, SequenceTradeoff(*((weights * part).sum() for part in parts))

    return sweep(step, start_of(draft), acceptance, draft, target, *residual)


def _total_variation(draft: Array, target: Array) -> Array:
    """Half the sum of distances."""
    return 0.5 * jnp.abs(draft - target).sum(-1)


def _rejection(acceptance: Array, draft: Array) -> Array:
    """The mass that is not kept."""
    return ((1 - acceptance) * draft).sum(-1)


def _emitted(acceptance: Array, draft: Array, residual: Array) -> Array:
    """What is kept, and what replaces the rest."""
    return acceptance * draft + _rejection(acceptance, draft)[..., None] * residual


def _residual(acceptance: Array, draft: Array, target: Array) -> Array:
    """The missing mass, as a law."""
    missing = jnp.maximum(target - acceptance * draft, 0)
    total = missing.sum(-1, keepdims=True)
    # Rejections are no more than what is missing. Where that is below the square root of the
    # smallest number, the derivative of the quotient would overflow, and no sum can tell.
    some = total > jnp.finfo(total.dtype).tiny ** 0.5
    return jnp.where(some, missing / jnp.where(some, total, 1), target)


def _over_acceptance(draft: Array, allowed: Array) -> Array:
    """min(1, allowed / draft), with derivatives that stay finite where the draft's law is 0."""
    is_kept = draft <= allowed
    smallest = jnp.finfo(draft.dtype).tiny ** 0.5
    # A probability below `smallest` is no part of any sum; its quotient may be anything.
    divisor = jnp.where(is_kept, 1, jnp.maximum(draft, smallest))
    return jnp.where(is_kept, 1, allowed / divisor)


def _with_knob(
    name: str, knob: ArrayLike, test: Any, draft_probs: ArrayLike, target_probs: ArrayLike
) -> list[Array]:
    """Both laws and a knob `[...]`, all checked and broadcast to `[..., V]`."""
    require(name, knob, test)
    _check(draft_probs=draft_probs, target_probs=target_probs)
    shapes = [np.shape(law)[:-1] for law in (draft_probs, target_probs)]
    if not _fit(np.shape(knob), *shapes):
        raise ValueError(
            f"{name} of shape {np.shape(knob)} must have shape [...] and fit laws of shape "
            f"{np.shape(draft_probs)} and {np.shape(target_probs)}"
        )
    p, q, knob = as_one_dtype(draft_probs, target_probs, knob)
    return as_floats(p, q, knob[..., None])


def _check(**arrays: ArrayLike) -> None:
    """Raises ValueError unless these are laws, and an acceptance, over one vocabulary."""
    shapes = [np.shape(array) for array in arrays.values()]
    sizes = {shape[-1] if shape else 0 for shape in shapes}
    if len(sizes) > 1 or 0 in sizes or not _fit(*shapes):
        texts = [f"{name} of shape {np.shape(array)}" for name, array in arrays.items()]
        raise ValueError(f"{', '.join(texts)} must have shape [..., V], for one V")
    for name, array in arrays.items():
        if name == "acceptance":
            require(name, array, PROBABILITY)
            continue
        require(name, array, NON_NEGATIVE)
        if not is_traced(array):
            total = np.asarray(array, np.float64).sum(-1)
            require(f"the sum of {name}", total, _SUMS_TO_ONE)


def _fit(*shapes: tuple[int, ...]) -> bool:
    """Whether arrays of these shapes can be broadcast."""
    try:
        np.broadcast_shapes(*shapes)
    except ValueError:
        return False
    return True


def _check_acceptance(acceptance: AnyChain, draft: AnyChain) -> AnyChain:
    """In the draft's dtype; ValueError unless they are probabilities in the form of its chain."""
    came = [np.shape(leaf) for leaf in jax.tree.leaves(acceptance)]
    wanted = [np.shape(leaf) for leaf in jax.tree.leaves(draft)]
    if jax.tree.structure(acceptance) != jax.tree.structure(draft) or came != wanted:
        raise ValueError(
            f"acceptance: {type(acceptance).__name__} of shapes {came} must be, as draft is, a "
            f"{type(draft).__name__} of shapes {wanted}"
        )
    for leaf in jax.tree.leaves(acceptance):
        require("acceptance", leaf, PROBABILITY)
    return jax.tree.map(lambda b, p: jnp.asarray(b).astype(p.dtype), acceptance, draft)
