"""Verifiers that buy speed with bias, and say how much: lossy on purpose, never by default.

A rule judges every place of a chain by itself. With p the target's and q the draft's distribution
there, it keeps a drafted token x with a chance b(x) that p and q alone decide, and draws the token
that takes a rejected one's place from a law P. So the law A of what comes out is known, and its
bias:

    A = b q + R P,  R = sum((1 - b) q),  loss = TV(A, p) = sum(max(0, A - p))

For every b the least loss is that of P = max(0, p - b q), normalised. With it

    loss = sum(max(0, b q - p)),  R + loss >= TV(q, p)

and equal where b is nowhere below min(1, p / q): a rejection less costs a loss as large, and no
rule gets it for less.

A round's loss is the sum over the places it filled, those of the accepted and of the recovered
tokens, hidden by an end of sequence or not; the bonus token is the target's own. A place's loss is
settled before its token is drawn. So, by the chain rule, the law of a whole text is within the
expected sum of losses of the target's, in total variation; a sum above 1 says nothing of the text,
only of its tokens.

With `max_tv` no row's sum exceeds that number: a place that would take it above is judged by the
lossless rule, `rejection_sampling`, and others go on being judged by theirs. The text's law is
then surely within `max_tv` of the target's, up to rounding. A place that alone costs more than
`max_tv` is never biased: take a rule whose places cost much less.

The target's law is what temperature, top-k and top-p make of its logits: a greedy row's is one-hot.

>>> import jaxsd
>>> from jaxsd import lossy, testing
>>> model = testing.MarkovModel(vocab_size=4)
>>> params = {"target": model.init(jax.random.key(0)), "draft": model.init(jax.random.key(1))}
>>> drafter = jaxsd.model_drafter(model, num_tokens=3)
>>> verifier = lossy.over_acceptance(0.02, max_tv=0.2)
>>> decoder = jaxsd.speculative(model, drafter, verifier, max_len=40)
>>> sampling = jaxsd.Sampling(temperature=1.0)
>>> out = decoder.generate(params, [[1, 2]], None, jax.random.key(2), sampling=sampling)
>>> 0.1 < float(out.stats.loss[0]) <= 0.2
True

References:
  Yin et al., 2024, https://arxiv.org/abs/2411.00841, section 4, theorems 4 and 5, for one place;
  the sums over a text and the budget are ours.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from . import sampling, verifiers
from .types import Draft, LossyVerifier, Verdict

RESIDUALS = ("optimal", "target")
"""What a rejected token's place is filled from; see `over_acceptance`."""

ATYPICAL = ("reject", "lossless")
"""What becomes of a drafted token that is not typical; see `typical_acceptance`."""


def over_acceptance(
    epsilon: float, *, residual: str = "optimal", max_tv: float | None = None
) -> LossyVerifier:
    """Forgives every token up to epsilon too much probability.

    With p the target's and q the draft's distribution at a place,

        b = min(1, (p + epsilon) / q),  R = sum(max(0, q - p - epsilon))
        loss = sum(min(max(0, q - p), epsilon))

    The loss is at most epsilon for every token that is drafted too often, and at most TV(q, p). At
    0 the rule is `rejection_sampling`; at 1 it accepts everything. It may keep a token that the
    target never emits: in a greedy row a wrong one, chosen by the draft, with chance epsilon.

    Args:
      epsilon: in [0, 1].
      residual: "optimal" draws the recovered token from max(0, p - q), normalised, which loses
        least; "target" from p itself, as the paper's naive baseline does. That loses more,

            loss = sum(max(0, min(q, p + epsilon) - (1 - R) p))

        also at `epsilon=0`.
      max_tv: in [0, 1], no row's sum of losses exceeds it; None is no limit.

    Returns:
      A verifier of chains whose verdicts have a `loss`, of the type of `spent`. It raises
      ValueError, when traced, if it is given a tree.

    Raises:
      ValueError: an argument is out of range.

    References:
      Yin et al., 2024, https://arxiv.org/abs/2411.00841, section 4 and theorem 5.

    >>> import jax, jax.numpy as jnp
    >>> target = jnp.array([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    >>> draft = Draft(tokens=jnp.array([0]), probs=jnp.array([[0.5, 0.3, 0.2]]))
    >>> key, spent = jax.random.key(0), jnp.float32(0.0)
    >>> for verifier in (over_acceptance(0.1), over_acceptance(0.1, residual="target")):
    ...     round(float(verifier(key, target, draft, spent).loss), 6)
    0.1
    0.2
    """
    epsilon = _checked("epsilon", epsilon, 0.0, 1.0)
    if residual not in RESIDUALS:
        raise ValueError(f"residual={residual!r} must be one of {RESIDUALS}")
    kept = functools.partial(_over_accepted, epsilon=epsilon)
    return _ChainRule(kept, residual == "target", _checked_limit(max_tv))


def lenience(factor: float, *, max_tv: float | None = None) -> LossyVerifier:
    """Judges every token as if the draft had given it less probability, by a factor.

    With p the target's and q the draft's distribution at a place,

        b = min(1, p / (factor q)),  R = sum(max(0, q - p / factor))
        loss = sum(max(0, min(q, p / factor) - p))

    No token is emitted with more than 1 / factor times the probability that the target gives it, so
    none that the target never emits, and greedy rows stay the target's. The recovered token is
    drawn from max(0, p - q), normalised, which loses least for every factor. At 1 it is
    `rejection_sampling`.

    Args:
      factor: above 0 and at most 1.
      max_tv: in [0, 1], no row's sum of losses exceeds it; None is no limit.

    Returns:
      A verifier of chains whose verdicts have a `loss`, of the type of `spent`. It raises
      ValueError, when traced, if it is given a tree.

    Raises:
      ValueError: an argument is out of range.

    References:
      Leviathan et al., 2022, https://arxiv.org/abs/2211.17192, appendix, on lenience.

    >>> import jax, jax.numpy as jnp
    >>> target = jnp.array([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    >>> draft = Draft(tokens=jnp.array([0]), probs=jnp.array([[0.5, 0.3, 0.2]]))
    >>> verdict = lenience(0.8)(jax.random.key(0), target, draft, jnp.float32(0.0))
    >>> round(float(verdict.loss), 6)
    0.05
    """
    factor = _checked("factor", factor, 0.0, 1.0, is_open=True)
    kept = functools.partial(_leniently_accepted, factor=factor)
    return _ChainRule(kept, False, _checked_limit(max_tv))


def typical_acceptance(
    threshold: float, delta: float, *, atypical: str = "reject", max_tv: float | None = None
) -> LossyVerifier:
    """Accepts every token that the target finds likely enough, by its entropy, and no other.

    With p the target's distribution at a place, a drafted token x is kept, b(x) = 1, if

        p(x) > min(threshold, delta exp(-H)),  H = -sum(p log p)

    and else rejected, b(x) = 0. What was drawn from q too often is lost, what was rejected though
    the lossless rule might have kept it is made up for by the recovered token, which is drawn from
    what is missing, max(0, p - b q), normalised:

        R = sum of q over tokens that are not typical
        loss = sum of max(0, q - p) over typical tokens

    In a greedy row (H = 0) the target's token alone is typical, while threshold or delta is below
    1: the row stays the target's.

    Args:
      threshold: in [0, 1], the probability that always suffices.
      delta: at least 0; what suffices for a target that is spread over exp(H) tokens is delta over
        their number.
      atypical: "reject" as published; "lossless" keeps a token that is not typical with the
        lossless chance min(1, p / q) instead: never fewer accepted, at the same loss, on the line
        R + loss = TV(q, p).
      max_tv: in [0, 1], no row's sum of losses exceeds it; None is no limit.

    Returns:
      A verifier of chains whose verdicts have a `loss`, of the type of `spent`. It raises
      ValueError, when traced, if it is given a tree.

    Raises:
      ValueError: an argument is out of range.

    References:
      Cai et al., 2024, https://arxiv.org/abs/2401.10774, for the rule, there for tokens that were
      chosen; Yin et al., 2024, https://arxiv.org/abs/2411.00841, theorem 4, for the residual.

    >>> import jax, jax.numpy as jnp
    >>> target = jnp.array([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    >>> draft = Draft(tokens=jnp.array([0]), probs=jnp.array([[0.2, 0.6, 0.2]]))
    >>> verdict = typical_acceptance(0.25, 1.0)(jax.random.key(0), target, draft, jnp.float32(0.0))
    >>> round(float(verdict.loss), 6), int(verdict.num_accepted)
    (0.3, 0)
    """
    threshold = _checked("threshold", threshold, 0.0, 1.0)
    delta = _checked("delta", delta, 0.0, math.inf)
    if atypical not in ATYPICAL:
        raise ValueError(f"atypical={atypical!r} must be one of {ATYPICAL}")
    kept = functools.partial(
        _typically_accepted, threshold=threshold, delta=delta, rejects=atypical == "reject"
    )
    return _ChainRule(kept, False, _checked_limit(max_tv))


@dataclasses.dataclass(frozen=True, eq=False)
class _ChainRule:
    """A `LossyVerifier` that judges every place by itself.

    No tuple, of which JAX cannot keep the weak references that its own caches are made of.

    kept: from p and q `[K, V]` the mass b q that is kept, `[K, V]`, between 0 and q. The mass and
      not b: it says without rounding what is too much.
    draws_anew: whether a rejected token's place is filled from p, and not from what is missing.
    max_tv: what no row's sum of losses exceeds, or None.
    """

    kept: Callable[[Array, Array], Array]
    draws_anew: bool
    max_tv: float | None

    is_lossy = True

    def __call__(self, key: Array, target_probs: Array, draft: Draft, spent: Array) -> Verdict:
        """As of `LossyVerifier`."""
        if draft.parents is not None:
            raise ValueError(
                f"draft.parents of shape {draft.parents.shape} must be None: a lossy verifier "
                "judges chains; for trees take a lossless one, such as jaxsd.recursive_rejection"
            )
        accept_key, token_key = jax.random.split(key)
        num_tokens = draft.tokens.shape[0]
        target = target_probs[:num_tokens]
        kept = self.kept(target, draft.probs)
        # Of a token drawn anew p times the kept mass is wanted; else all of p can be made up for.
        wanted = jnp.sum(kept, axis=-1, keepdims=True) * target if self.draws_anew else target
        loss = jnp.sum(jnp.maximum(kept - wanted, 0.0), axis=-1)
        is_biased, lost = self._budget(loss.astype(spent.dtype), spent)
        kept = jnp.where(is_biased[:, None], kept, jnp.minimum(target, draft.probs))

        chance = verifiers._ratio(
            verifiers._at(kept, draft.tokens), verifiers._at(draft.probs, draft.tokens)
        )
        accepted = jax.random.bernoulli(accept_key, chance)
        num_accepted = jnp.sum(jnp.cumprod(accepted.astype(jnp.int32)))
        # A row of zeros after the last draft makes the bonus token the residual of nothing.
        kept = jnp.concatenate([kept, jnp.zeros((1, target_probs.shape[-1]), kept.dtype)])
        law = verifiers._residual(target_probs[num_accepted], kept[num_accepted])
        if self.draws_anew:
            is_biased = jnp.concatenate([is_biased, jnp.zeros((1,), bool)])
            law = jnp.where(is_biased[num_accepted], target_probs[num_accepted], law)
        token = sampling.categorical(token_key, law)
        decided = verifiers.verdict(draft.tokens, num_accepted, token)
        # The recovered token's place counts, too; after K accepted tokens there is none.
        return decided._replace(loss=lost[jnp.minimum(num_accepted + 1, num_tokens)])

    def _budget(self, loss: Array, spent: Array) -> tuple[Array, Array]:
        """Which places the rule may judge, `[K]`, and the sums of losses before each, `[K + 1]`.

        What is decided for a place depends on the tokens before it alone: if its own drafted token
        had a say, the law would be another than the one whose loss is counted.
        """
        lost = [jnp.zeros((), loss.dtype)]
        is_biased = []
        for one in loss:
            after = lost[-1] + one
            allowed = jnp.ones((), bool)
            if self.max_tv is not None:
                # The decoder adds the same two numbers, so that its sum obeys to the last bit.
                allowed = spent + after <= _rounded_down(self.max_tv, loss.dtype)
            is_biased.append(allowed)
            lost.append(jnp.where(allowed, after, lost[-1]))
        return jnp.array(is_biased, bool), jnp.stack(lost)


def _over_accepted(target: Array, draft: Array, *, epsilon: float) -> Array:
    """The mass that `over_acceptance` keeps."""
    return jnp.minimum(draft, target + epsilon)


def _leniently_accepted(target: Array, draft: Array, *, factor: float) -> Array:
    """The mass that `lenience` keeps."""
    # However small the factor is, and be it flushed to 0, what the target never emits is not kept.
    return jnp.where(target > 0, jnp.minimum(draft, target / factor), 0.0)


def _typically_accepted(
    target: Array, draft: Array, *, threshold: float, delta: float, rejects: bool
) -> Array:
    """The mass that `typical_acceptance` keeps."""
    is_possible = target > 0
    log_target = jnp.log(jnp.where(is_possible, target, 1.0))
    entropy = -jnp.sum(target * log_target, axis=-1, keepdims=True)
    is_typical = target > jnp.minimum(threshold, delta * jnp.exp(-entropy))
    others = jnp.zeros_like(draft) if rejects else jnp.minimum(target, draft)
    return jnp.where(is_typical, draft, others)


def _rounded_down(value: float, dtype: np.dtype) -> np.ndarray:
    """The largest number of this type that is not above `value`."""
    rounded = np.asarray(value, dtype)
    return np.nextafter(rounded, np.zeros_like(rounded)) if float(rounded) > value else rounded


def _checked_limit(max_tv: float | None) -> float | None:
    """`max_tv` as a float, or None; ValueError unless it is in [0, 1]."""
    return None if max_tv is None else _checked("max_tv", max_tv, 0.0, 1.0)


def _checked(name: str, value: float, low: float, high: float, *, is_open: bool = False) -> float:
    """The value as a float; ValueError unless it is a finite number in this range."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    number = float(value) if is_number else math.nan
    is_inside = low < number <= high if is_open else low <= number <= high
    if not is_inside or math.isinf(number):
        start = f"above {low:g}" if is_open else f"at least {low:g}"
        wanted = f"{start} and finite" if math.isinf(high) else f"{start} and at most {high:g}"
        raise ValueError(f"{name}={value!r} must be a number {wanted}")
    return number
