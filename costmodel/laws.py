"""How good is a model of a given size, and how often will a target accept its tokens?

Two fitted laws answer, and both are differentiable: a loss law L(N, D) turns parameters and
training tokens into perplexity, an acceptance law turns the two perplexities into alpha, the
probability that one drafted token is accepted.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ._inputs import AT_LEAST_ONE, FINITE, POSITIVE, as_floats, require

# Where the affine law comes this close to 0 or 1 it is bent. Every acceptance that the law was
# fitted on lies in 0.52 to 0.79, far inside, where the law is left exactly as it is.
CLIP_MARGIN = 0.01

# A perplexity of 5e8. To guess among 200000 tokens with no model at all is 12 nats.
MAX_LOSS_NATS = 20.0


class LossLaw(NamedTuple):
    """Loss in nats per token, `irreducible + A / N^a + B / D^b`, of N parameters and D tokens."""

    irreducible: ArrayLike  # loss of a model without limits, nats per token
    parameters_coefficient: ArrayLike  # A
    parameters_exponent: ArrayLike  # a
    tokens_coefficient: ArrayLike  # B
    tokens_exponent: ArrayLike  # b


class AcceptanceLaw(NamedTuple):
    """Acceptance probability, affine in the perplexities of draft and target, with its errors."""

    draft_slope: ArrayLike  # per unit of draft perplexity
    target_slope: ArrayLike  # per unit of target perplexity
    intercept: ArrayLike
    draft_slope_error: ArrayLike = 0.0  # standard error of the fit
    target_slope_error: ArrayLike = 0.0
    intercept_error: ArrayLike = 0.0


class Laws(NamedTuple):
    """What the design of a draft rests on; replace either law by one fitted to your own models."""

    loss: LossLaw
    acceptance: AcceptanceLaw


# Besiroglu et al., arXiv 2404.10102: the refit of Hoffmann et al.'s third approach.
BESIROGLU = LossLaw(1.8172, 482.01, 0.3478, 2085.43, 0.3658)
# Hoffmann et al., arXiv 2203.15556, third approach as printed (rounded).
HOFFMANN = LossLaw(1.69, 406.4, 0.34, 410.7, 0.28)
# SDSL, arXiv 2603.11053, table 3: least squares over 130 pairs of 10 drafts and 13 targets.
SDSL_ACCEPTANCE = AcceptanceLaw(
    draft_slope=-0.0067,
    target_slope=0.012971,
    intercept=0.642084,
    draft_slope_error=0.000607,
    target_slope_error=0.001545,
    intercept_error=0.021228,
)
# The two that SDSL designs drafts with, and the default of every search.
SDSL = Laws(loss=BESIROGLU, acceptance=SDSL_ACCEPTANCE)


def loss(law: LossLaw, parameters: ArrayLike, tokens: ArrayLike) -> Array:
    """Returns the training loss that a law predicts for a model size and a number of tokens.

    Falls strictly in both arguments. Differentiable in them and in the law.

        L(N, D) = E + A / N^a + B / D^b

    Args:
      law: the five constants.
      parameters: number of parameters, positive; the count the law was fitted with (for the
        constants of this module, embeddings included).
      tokens: number of training tokens, positive; broadcasts against `parameters`.

    Returns:
      Loss in nats per token.

    Raises:
      ValueError: `parameters`, `tokens` or a constant of the law is not positive and finite.

    Example:
      >>> from jaxsd import costmodel
      >>> round(float(costmodel.loss(costmodel.BESIROGLU, 8e9, 15e12)), 4)
      2.0221

    Source: Hoffmann et al., arXiv 2203.15556, eq. 2.
    """
    check_loss_law(law)
    require("parameters", parameters, POSITIVE)
    require("tokens", tokens, POSITIVE)
    irreducible, a, a_exponent, b, b_exponent, parameters_, tokens_ = as_floats(
        *law, parameters, tokens
    )
    # One exponential of a difference of logarithms: N^a never exists, so no power over- or
    # underflows and the gradient in log N, which is what a search follows, is well scaled.
    from_size = jnp.exp(jnp.log(a) - a_exponent * jnp.log(parameters_))
    from_data = jnp.exp(jnp.log(b) - b_exponent * jnp.log(tokens_))
    return irreducible + from_size + from_data


def perplexity(law: LossLaw, parameters: ArrayLike, tokens: ArrayLike) -> Array:
    """Returns `exp(loss)`, the perplexity that a law predicts.

    This is perplexity on the law's own training distribution. The acceptance law of SDSL was
    fitted on perplexities measured on HellaSwag, 1.4 to 2.1 times as high, and is fed these
    nevertheless, by its authors and here.

        x = exp(L(N, D))

    Args:
      law: the five constants.
      parameters: number of parameters, positive.
      tokens: number of training tokens, positive; broadcasts against `parameters`.

    Returns:
      Perplexity per token, above 1. A loss above 20 nats is cut off there, so that even the second
      derivative of whatever is built on this stays finite in float32.

    Raises:
      ValueError: `parameters`, `tokens` or a constant of the law is not positive and finite.

    Example:
      >>> from jaxsd import costmodel
      >>> round(float(costmodel.perplexity(costmodel.BESIROGLU, 8e9, 15e12)), 3)
      7.554

    Source: SDSL, arXiv 2603.11053, eqs. 7 and 8 (whose printed exponents lack a sign).
    """
    return jnp.exp(jnp.minimum(loss(law, parameters, tokens), MAX_LOSS_NATS))


def acceptance(
    law: AcceptanceLaw, draft_perplexity: ArrayLike, target_perplexity: ArrayLike
) -> Array:
    """Returns alpha, the probability that the target accepts one drafted token.

    Between 0.01 and 0.99 this is the affine law to the last bit. Outside, where an affine law
    stops being a probability, it bends smoothly and keeps a gradient that points back inside.
    The law does not tend to 1 as the draft becomes the target (SDSL's stays near 0.68), so a
    draft of almost the target's size is an extrapolation.

        alpha = draft_slope * x + target_slope * y + intercept

    Args:
      law: slopes and intercept; its standard errors are not used here.
      draft_perplexity: x, at least 1.
      target_perplexity: y, at least 1; broadcasts against `draft_perplexity`.

    Returns:
      Probability in (0, 1).

    Raises:
      ValueError: a perplexity is below 1, or a number of the law is not finite.

    Example:
      >>> from jaxsd import costmodel
      >>> round(float(costmodel.acceptance(costmodel.SDSL_ACCEPTANCE, 10.0, 7.0)), 6)
      0.665881

    Source: SDSL, arXiv 2603.11053, eq. 5 and table 3.
    """
    check_acceptance_law(law)
    require("draft_perplexity", draft_perplexity, AT_LEAST_ONE)
    require("target_perplexity", target_perplexity, AT_LEAST_ONE)
    draft_slope, target_slope, intercept, x, y = as_floats(
        *law[:3], draft_perplexity, target_perplexity
    )
    return _soft_clip(draft_slope * x + target_slope * y + intercept)


def check_loss_law(law: LossLaw) -> None:
    """Raises ValueError unless the terms that fall with size and data are positive powers."""
    for name, value in law._asdict().items():
        test = FINITE if name == "irreducible" else POSITIVE
        require(f"LossLaw.{name}", value, test)


def check_acceptance_law(law: AcceptanceLaw) -> None:
    """Raises ValueError unless every number is finite."""
    for name, value in law._asdict().items():
        require(f"AcceptanceLaw.{name}", value, FINITE)


def _soft_clip(value: Array) -> Array:
    """Identity in [m, 1 - m], rational tails to 0 and 1 outside, with a continuous slope.

    The tails fall like 1 / distance. Exponential ones would underflow within a few units, and a
    search that starts on a hopeless draft would find no gradient to leave it by.
    """
    m = CLIP_MARGIN
    below = jnp.minimum(
        value, m
    )  # the argument is guarded too, or the unused tail could divide by 0
    above = jnp.maximum(value, 1 - m)
    low_tail = m**2 / (2 * m - below)
    high_tail = 1 - m**2 / (above - 1 + 2 * m)
    return jnp.where(value < m, low_tail, jnp.where(value > 1 - m, high_tail, value))
