"""How good is a model of a given size, and how often will a target accept its tokens?

Two fitted laws answer, and both are differentiable: a loss law turns parameters, training tokens
and, if it knows about shapes, the aspect ratio into perplexity; an acceptance law turns the two
perplexities into alpha, the probability that one drafted token is accepted. Every law is a
NamedTuple of numbers with the range that it was fitted on; outside it stays smooth and finite, and
`extrapolation` says how far outside a question lies.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ._inputs import AT_LEAST_ONE, FINITE, NON_NEGATIVE, POSITIVE, PROBABILITY, as_floats, require
from .shapes import Number

# Where an acceptance law comes this close to 0 or 1 it is bent. Every acceptance that SDSL's was
# fitted on lies in 0.52 to 0.79, far inside, where the law is left exactly as it is.
CLIP_MARGIN = 0.01

# A perplexity of 5e8. To guess among 200000 tokens with no model at all is 12 nats.
MAX_LOSS_NATS = 20.0


class LossRange(NamedTuple):
    """The models that a loss law was fitted on; the default is any."""

    min_parameters: Number = 1.0
    max_parameters: Number = jnp.inf
    min_tokens: Number = 1.0
    max_tokens: Number = jnp.inf
    min_aspect_ratio: Number = 1e-6  # d_model / n_layers
    max_aspect_ratio: Number = jnp.inf
    min_layers: Number = 1.0


class PerplexityRange(NamedTuple):
    """The perplexities that an acceptance law was fitted on; the default is any."""

    min_draft_perplexity: Number = 1.0
    max_draft_perplexity: Number = jnp.inf
    min_target_perplexity: Number = 1.0
    max_target_perplexity: Number = jnp.inf


class AnyLossLaw(Protocol):
    """What a loss law has to offer; your own is a NamedTuple of numbers with these."""

    @property
    def fitted(self) -> LossRange: ...

    @property
    def embeddings_counted(self) -> ArrayLike: ...

    def predict(self, parameters: Array, tokens: Array, aspect_ratio: Array | None) -> Array:
        """Loss in nats per token, from arrays of one floating dtype and one shape."""
        ...

    def check(self) -> None:
        """Raises ValueError if a number of the law is out of range."""
        ...


class AnyAcceptanceLaw(Protocol):
    """What an acceptance law has to offer; your own is a NamedTuple of numbers with these."""

    @property
    def fitted(self) -> PerplexityRange: ...

    def predict(self, draft_perplexity: Array, target_perplexity: Array) -> Array:
        """Acceptance before it is bent into (0, 1), from arrays of one dtype and one shape."""
        ...

    def check(self) -> None:
        """Raises ValueError if a number of the law is out of range."""
        ...


@runtime_checkable
class AnyPositionLaw(AnyAcceptanceLaw, Protocol):
    """What an acceptance law by position offers besides; its `predict` is the first share."""

    def shares(self, draft_perplexity: Array, target_perplexity: Array) -> Array:
        """`[..., K]` shares of rounds that accept at least 1, 2, ..., K tokens: in [0, 1], falling.

        From arrays of one dtype and one shape.
        """
        ...


class LossLaw(NamedTuple):
    """Loss in nats per token, `irreducible + A / N^a + B / D^b`, of N parameters and D tokens."""

    irreducible: Number  # loss of a model without limits, nats per token
    parameters_coefficient: Number  # A
    parameters_exponent: Number  # a
    tokens_coefficient: Number  # B
    tokens_exponent: Number  # b
    embeddings_counted: Number = 1.0  # which N: 1 all parameters, 0 those outside token tables
    fitted: LossRange = LossRange()

    def predict(self, parameters: Array, tokens: Array, aspect_ratio: Array | None) -> Array:
        """Loss in nats per token; the aspect ratio plays no part."""
        del aspect_ratio
        irreducible, a, a_exponent, b, b_exponent, parameters, tokens = as_floats(
            *self[:5], parameters, tokens
        )
        # One exponential of a difference of logarithms: N^a never exists, so no power over- or
        # underflows and the gradient in log N, which is what a search follows, is well scaled.
        from_size = jnp.exp(jnp.log(a) - a_exponent * jnp.log(parameters))
        from_data = jnp.exp(jnp.log(b) - b_exponent * jnp.log(tokens))
        return irreducible + from_size + from_data

    def check(self) -> None:
        """Raises ValueError unless the terms that fall with size and data are positive powers."""
        require("LossLaw.irreducible", self.irreducible, FINITE)
        for name in self._fields[1:5]:
            require(f"LossLaw.{name}", getattr(self, name), POSITIVE)
        require("LossLaw.embeddings_counted", self.embeddings_counted, NON_NEGATIVE)


class KaplanLossLaw(NamedTuple):
    """Loss in nats per token, `((N_c / N)^(a / b) + D_c / D)^b`: it falls to 0 without limits."""

    parameters_scale: Number  # N_c
    parameters_exponent: Number  # a
    tokens_scale: Number  # D_c
    tokens_exponent: Number  # b
    embeddings_counted: Number = 0.0  # which N: 1 all parameters, 0 those outside token tables
    fitted: LossRange = LossRange()

    def predict(self, parameters: Array, tokens: Array, aspect_ratio: Array | None) -> Array:
        """Loss in nats per token; the aspect ratio plays no part."""
        del aspect_ratio
        scale, a, tokens_scale, b, parameters, tokens = as_floats(*self[:4], parameters, tokens)
        from_size = a / b * (jnp.log(scale) - jnp.log(parameters))
        from_data = jnp.log(tokens_scale) - jnp.log(tokens)
        return jnp.exp(b * jnp.logaddexp(from_size, from_data))

    def check(self) -> None:
        """Raises ValueError unless scales and exponents are positive."""
        for name in self._fields[:4]:
            require(f"KaplanLossLaw.{name}", getattr(self, name), POSITIVE)
        require("KaplanLossLaw.embeddings_counted", self.embeddings_counted, NON_NEGATIVE)


class ProductLossLaw(NamedTuple):
    """Loss in nats per token, `c / (N^a D^b) (R / R_0)^h`, with R = d_model / n_layers.

    Linear in logarithms, so that a handful of small models determines it where they say nothing of
    what no model can learn. For questions among the models that it was fitted on: it falls to 0.
    """

    coefficient: Number  # c
    parameters_exponent: Number  # a
    tokens_exponent: Number  # b
    aspect_exponent: Number = 0.0  # h; above 0 wide is worse
    reference_aspect_ratio: Number = 1.0  # R_0, where the shape plays no part
    embeddings_counted: Number = 1.0  # which N: 1 all parameters, 0 those outside token tables
    fitted: LossRange = LossRange()

    def predict(self, parameters: Array, tokens: Array, aspect_ratio: Array | None) -> Array:
        """Loss in nats per token; without an aspect ratio at the reference."""
        ratio = self.reference_aspect_ratio if aspect_ratio is None else aspect_ratio
        coefficient, a, b, h, reference, parameters, tokens, ratio = as_floats(
            *self[:5], parameters, tokens, ratio
        )
        from_shape = h * (jnp.log(ratio) - jnp.log(reference))
        from_size = a * jnp.log(parameters) + b * jnp.log(tokens)
        return jnp.exp(jnp.log(coefficient) - from_size + from_shape)

    def check(self) -> None:
        """Raises ValueError unless loss falls with size and data."""
        for name in self._fields[:3]:
            require(f"ProductLossLaw.{name}", getattr(self, name), POSITIVE)
        require("ProductLossLaw.aspect_exponent", self.aspect_exponent, FINITE)
        require("ProductLossLaw.reference_aspect_ratio", self.reference_aspect_ratio, POSITIVE)
        require("ProductLossLaw.embeddings_counted", self.embeddings_counted, NON_NEGATIVE)


class ShapeLossLaw(NamedTuple):
    """A loss law times `(1 + e R^h) / (1 + e R_0^h)`, with the aspect ratio R = d_model / n_layers.

    Without a shape, and at the reference R_0, it is the law that it rests on. R_0 = 0 gives that
    law the meaning it has in Morph's fit, loss without the shape's share.
    """

    base: Any  # the loss law of size and tokens
    coefficient: Number  # e
    exponent: Number  # h
    reference_aspect_ratio: Number  # R_0
    fitted: LossRange = LossRange()

    @property
    def embeddings_counted(self) -> ArrayLike:
        """Which N the law rests on: 1 all parameters, 0 those outside token tables."""
        return self.base.embeddings_counted

    def predict(self, parameters: Array, tokens: Array, aspect_ratio: Array | None) -> Array:
        """Loss in nats per token."""
        plain = self.base.predict(parameters, tokens, None)
        if aspect_ratio is None:
            return plain
        plain, coefficient, exponent, reference, ratio = as_floats(
            plain, self.coefficient, self.exponent, self.reference_aspect_ratio, aspect_ratio
        )
        at_reference = jnp.where(
            reference > 0, (jnp.where(reference > 0, reference, 1)) ** exponent, 0
        )
        return plain * (1 + coefficient * ratio**exponent) / (1 + coefficient * at_reference)

    def check(self) -> None:
        """Raises ValueError unless wider than the reference is worse, by a positive power."""
        self.base.check()
        require("ShapeLossLaw.coefficient", self.coefficient, NON_NEGATIVE)
        require("ShapeLossLaw.exponent", self.exponent, POSITIVE)
        require("ShapeLossLaw.reference_aspect_ratio", self.reference_aspect_ratio, NON_NEGATIVE)


class AcceptanceLaw(NamedTuple):
    """Acceptance probability, affine in the perplexities of draft and target, with its errors."""

    draft_slope: Number  # per unit of draft perplexity
    target_slope: Number  # per unit of target perplexity
    intercept: Number
    draft_slope_error: Number = 0.0  # standard error of the fit
    target_slope_error: Number = 0.0
    intercept_error: Number = 0.0
    # Correlations of those errors. Nothing else says how well the law is known where it was
    # fitted: an intercept is far outside the data, and its error is mostly undone by the slopes'.
    draft_target_correlation: Number = 0.0
    draft_intercept_correlation: Number = 0.0
    target_intercept_correlation: Number = 0.0
    residual_error: Number = 0.0  # standard deviation of one pair's alpha around the law
    fitted: PerplexityRange = PerplexityRange()

    def predict(self, draft_perplexity: Array, target_perplexity: Array) -> Array:
        """The affine function."""
        draft_slope, target_slope, intercept, x, y = as_floats(
            *self[:3], draft_perplexity, target_perplexity
        )
        return draft_slope * x + target_slope * y + intercept

    def check(self) -> None:
        """Raises ValueError unless every number is finite."""
        _require_fields(self, FINITE)


class LogAcceptanceLaw(NamedTuple):
    """Acceptance `slope * ln(draft perplexity) + intercept`, of drafts for one target."""

    slope: Number
    intercept: Number
    fitted: PerplexityRange = PerplexityRange()

    def predict(self, draft_perplexity: Array, target_perplexity: Array) -> Array:
        """The logarithm; the target is the one that the law was fitted for."""
        slope, intercept, x, _ = as_floats(*self[:2], draft_perplexity, target_perplexity)
        return slope * jnp.log(x) + intercept

    def check(self) -> None:
        """Raises ValueError unless every number is finite."""
        _require_fields(self, FINITE)


class PowerAcceptanceLaw(NamedTuple):
    """Acceptance `coefficient * draft perplexity^exponent`, of drafts for one target."""

    coefficient: Number
    exponent: Number
    fitted: PerplexityRange = PerplexityRange()

    def predict(self, draft_perplexity: Array, target_perplexity: Array) -> Array:
        """The power; the target is the one that the law was fitted for."""
        coefficient, exponent, x, _ = as_floats(*self[:2], draft_perplexity, target_perplexity)
        return coefficient * jnp.exp(exponent * jnp.log(x))

    def check(self) -> None:
        """Raises ValueError unless every number is finite."""
        _require_fields(self, FINITE)


class MeasuredAcceptance(NamedTuple):
    """An alpha that was measured, for whatever draft and target."""

    alpha: Number
    fitted: PerplexityRange = PerplexityRange()

    def predict(self, draft_perplexity: Array, target_perplexity: Array) -> Array:
        """The constant."""
        return as_floats(self.alpha, draft_perplexity, target_perplexity)[0]

    def check(self) -> None:
        """Raises ValueError unless alpha is a probability."""
        require("MeasuredAcceptance.alpha", self.alpha, PROBABILITY)


class PerplexityScale(NamedTuple):
    """From a loss law's perplexity to a measured one: `ln measured = offset + slope * loss`."""

    offset: Number = 0.0  # nats per token
    slope: Number = 1.0


class Laws(NamedTuple):
    """What the design of a draft rests on; replace any by one fitted to your own models."""

    loss: Any  # a loss law, as `AnyLossLaw`
    acceptance: Any  # an acceptance law, as `AnyAcceptanceLaw`
    # SDSL fitted its acceptance law on perplexities of another text than its loss law's and feeds
    # it the latter unchanged. The default does so too; `calibrate_perplexity` makes a better one.
    perplexity_scale: PerplexityScale = PerplexityScale()


class Extrapolation(NamedTuple):
    """How far outside the fitted range an input lies: 0 inside, else ln(value / nearest bound)."""

    draft_parameters: Array
    draft_tokens: Array
    draft_aspect_ratio: Array
    draft_layers: Array
    target_parameters: Array
    target_tokens: Array
    draft_perplexity: Array
    target_perplexity: Array
    alpha: Array  # 0, or by how much the law's own alpha lies outside [0.01, 0.99]


# Hoffmann et al. trained from 70 million to 16 billion parameters on 5 to 500 billion tokens.
CHINCHILLA_RANGE = LossRange(70e6, 16e9, 5e9, 500e9)
# Besiroglu et al., arXiv 2404.10102: the refit of Hoffmann et al.'s third approach.
BESIROGLU = LossLaw(1.8172, 482.01, 0.3478, 2085.43, 0.3658, fitted=CHINCHILLA_RANGE)
# Hoffmann et al., arXiv 2203.15556, third approach as printed (rounded).
HOFFMANN = LossLaw(1.69, 406.4, 0.34, 410.7, 0.28, fitted=CHINCHILLA_RANGE)
# Kaplan et al., arXiv 2001.08361, table 2 and eq. 1.5.
KAPLAN = KaplanLossLaw(6.4e13, 0.076, 1.8e13, 0.103, fitted=LossRange(768, 1.5e9, 22e6, 23e9))
# The models of Bian et al. (Morph): 35 of them, at one to three token counts each.
MORPH_RANGE = LossRange(77e6, 1.7e9, 1.6e9, 5e10, 17.0, 384.0, 3.0)
# Bian et al. (Morph), arXiv 2501.18107. The paper prints no constants; these come from its public
# losses by `fit_loss`, and a test refits them.
MORPH = ShapeLossLaw(
    LossLaw(2.44751, 5.47544e4, 0.614574, 7.78346e5, 0.614574, fitted=MORPH_RANGE),
    coefficient=1.14621e-3,
    exponent=0.614574,
    reference_aspect_ratio=0.0,
    fitted=MORPH_RANGE,
)
# The same with an exponent of the shape of its own.
MORPH_FREE_EXPONENT = ShapeLossLaw(
    LossLaw(2.46750, 5.08410e4, 0.609582, 7.04733e5, 0.609582, fitted=MORPH_RANGE),
    coefficient=2.35825e-5,
    exponent=1.25607,
    reference_aspect_ratio=0.0,
    fitted=MORPH_RANGE,
)
# Morph's factor on top of Besiroglu's law: absolute losses from the latter, whose models were
# trained long, and the loss of being wide relative to d_model = 64 n_layers from the former.
SHAPE_AWARE = ShapeLossLaw(
    BESIROGLU,
    coefficient=2.35825e-5,
    exponent=1.25607,
    reference_aspect_ratio=64.0,
    fitted=LossRange(70e6, 16e9, 5e9, 500e9, 17.0, 384.0, 3.0),
)
# SDSL, arXiv 2603.11053, table 3: least squares over 130 pairs of 10 drafts and 13 targets. The
# correlations are not printed; they come from the same pairs by `fit_acceptance`, as a test does.
SDSL_ACCEPTANCE = AcceptanceLaw(
    draft_slope=-0.0067,
    target_slope=0.012971,
    intercept=0.642084,
    draft_slope_error=0.000607,
    target_slope_error=0.001545,
    intercept_error=0.021228,
    draft_target_correlation=0.0,  # exactly, for every draft was paired with every target
    draft_intercept_correlation=-0.521706,
    target_intercept_correlation=-0.839871,
    residual_error=0.036257,
    fitted=PerplexityRange(12.588, 29.794, 9.549, 15.585),
)
# The two that SDSL designs drafts with, and the default of `optimal_draft_size`.
SDSL = Laws(loss=BESIROGLU, acceptance=SDSL_ACCEPTANCE)
# The same with a loss law that knows width from depth: the default where shapes are designed.
SHAPE_AWARE_SDSL = Laws(loss=SHAPE_AWARE, acceptance=SDSL_ACCEPTANCE)


def loss(
    law: AnyLossLaw,
    parameters: ArrayLike,
    tokens: ArrayLike,
    aspect_ratio: ArrayLike | None = None,
) -> Array:
    """Returns the training loss that a law predicts for a model size and a number of tokens.

    Falls strictly in parameters and tokens. Differentiable in all arguments and in the law.

        LossLaw        L = E + A / N^a + B / D^b
        KaplanLossLaw  L = ((N_c / N)^(a / b) + D_c / D)^b
        ShapeLossLaw   L = base(N, D) (1 + e R^h) / (1 + e R_0^h)
        ProductLossLaw L = c / (N^a D^b) (R / R_0)^h

    Args:
      law: the constants.
      parameters: number of parameters, positive; the count the law was fitted with
        (`law.embeddings_counted`).
      tokens: number of training tokens, positive; broadcasts against `parameters`.
      aspect_ratio: d_model / n_layers, positive, for a law that depends on it; None is the law's
        reference.

    Returns:
      Loss in nats per token.

    Raises:
      ValueError: an argument or a constant of the law is not positive and finite.

    Example:
      >>> from jaxsd import costmodel
      >>> round(float(costmodel.loss(costmodel.BESIROGLU, 8e9, 15e12)), 4)
      2.0221
      >>> round(float(costmodel.loss(costmodel.SHAPE_AWARE, 8e9, 15e12, aspect_ratio=384)), 4)
      2.0969

    Source: Hoffmann et al., arXiv 2203.15556, eq. 2; Kaplan et al., arXiv 2001.08361, eq. 1.5; Bian
    et al., arXiv 2501.18107, eq. 5.
    """
    law.check()
    require("parameters", parameters, POSITIVE)
    require("tokens", tokens, POSITIVE)
    if aspect_ratio is None:
        size, data = as_floats(parameters, tokens)
        return law.predict(size, data, None)
    require("aspect_ratio", aspect_ratio, POSITIVE)
    size, data, ratio = as_floats(parameters, tokens, aspect_ratio)
    return law.predict(size, data, ratio)


def perplexity(
    law: AnyLossLaw,
    parameters: ArrayLike,
    tokens: ArrayLike,
    aspect_ratio: ArrayLike | None = None,
    scale: PerplexityScale | None = None,
) -> Array:
    """Returns `exp(loss)`, the perplexity that a law predicts.

    Without a scale this is perplexity on the law's own training distribution. The acceptance law of
    SDSL was fitted on perplexities measured on HellaSwag, 1.4 to 2.1 times as high, and is fed
    these nevertheless, by its authors and, by default, here.

        x = exp(offset + slope * L(N, D))

    Args:
      law: the constants.
      parameters: number of parameters, positive.
      tokens: number of training tokens, positive; broadcasts against `parameters`.
      aspect_ratio: d_model / n_layers, for a law that depends on it.
      scale: from `calibrate_perplexity`, where perplexities on another text are wanted.

    Returns:
      Perplexity per token, at least 1. A loss above 20 nats is cut off there, so that even the
      second derivative of whatever is built on this stays finite in float32.

    Raises:
      ValueError: an argument or a constant of the law is not positive and finite.

    Example:
      >>> from jaxsd import costmodel
      >>> round(float(costmodel.perplexity(costmodel.BESIROGLU, 8e9, 15e12)), 3)
      7.554

    Source: SDSL, arXiv 2603.11053, eqs. 7 and 8 (whose printed exponents lack a sign).
    """
    nats = loss(law, parameters, tokens, aspect_ratio)
    if scale is not None:
        require("PerplexityScale.offset", scale.offset, FINITE)
        require("PerplexityScale.slope", scale.slope, POSITIVE)
        nats, offset, slope = as_floats(nats, *scale)
        nats = jnp.maximum(offset + slope * nats, 0)
    return jnp.exp(jnp.minimum(nats, MAX_LOSS_NATS))


def acceptance(
    law: AnyAcceptanceLaw, draft_perplexity: ArrayLike, target_perplexity: ArrayLike
) -> Array:
    """Returns alpha, the probability that the target accepts one drafted token.

    Between 0.01 and 0.99 this is the law to the last bit. Outside, where most laws stop being
    probabilities, it bends smoothly and keeps a gradient that points back inside. SDSL's law does
    not tend to 1 as the draft becomes the target (it stays near 0.68), so a draft of almost the
    target's size is an extrapolation.

        AcceptanceLaw       alpha = draft_slope * x + target_slope * y + intercept
        LogAcceptanceLaw    alpha = slope * ln x + intercept
        PowerAcceptanceLaw  alpha = coefficient * x^exponent
        MeasuredAcceptance  alpha

    A law by position, `PositionAcceptance` or `PositionAcceptanceLaw`, holds probabilities already
    and answers with the first, unbent.

    Args:
      law: the constants; standard errors are not used here.
      draft_perplexity: x, at least 1.
      target_perplexity: y, at least 1; broadcasts against `draft_perplexity`.

    Returns:
      Probability in (0, 1); of a law by position, that at the first position.

    Raises:
      ValueError: a perplexity is below 1, or a number of the law is out of range.

    Example:
      >>> from jaxsd import costmodel
      >>> round(float(costmodel.acceptance(costmodel.SDSL_ACCEPTANCE, 10.0, 7.0)), 6)
      0.665881

    Source: SDSL, arXiv 2603.11053, eq. 5 and tables 3 and 4.
    """
    law.check()
    require("draft_perplexity", draft_perplexity, AT_LEAST_ONE)
    require("target_perplexity", target_perplexity, AT_LEAST_ONE)
    raw = law.predict(*as_floats(draft_perplexity, target_perplexity))
    if isinstance(law, MeasuredAcceptance | AnyPositionLaw):
        return raw  # a probability already, 0 and 1 included
    return _soft_clip(raw)


def distribution_acceptance(target_probs: ArrayLike, draft_probs: ArrayLike) -> Array:
    """Returns the exact probability that a token drawn from the draft's law is accepted.

        sum over tokens of min(target, draft) = 1 - TV(target, draft)

    Its mean over contexts that the target itself writes is alpha.

    Args:
      target_probs: `[..., V]` the target's next-token probabilities.
      draft_probs: `[..., V]` the draft's.

    Returns:
      `[...]` probabilities.

    Raises:
      ValueError: the shapes differ in V, or a probability is not in [0, 1].

    Example:
      >>> from jaxsd import costmodel
      >>> round(float(costmodel.distribution_acceptance([0.2, 0.3, 0.5], [0.5, 0.3, 0.2])), 6)
      0.7

    Source: Leviathan et al., arXiv 2211.17192, theorem 3.5.
    """
    sizes = np.shape(target_probs)[-1:], np.shape(draft_probs)[-1:]
    if sizes[0] != sizes[1] or not sizes[0]:
        raise ValueError(
            f"target_probs of shape {np.shape(target_probs)} and draft_probs of shape "
            f"{np.shape(draft_probs)} must end in the same vocabulary size"
        )
    require("target_probs", target_probs, PROBABILITY)
    require("draft_probs", draft_probs, PROBABILITY)
    target, draft = as_floats(target_probs, draft_probs)
    return jnp.minimum(target, draft).sum(-1)


def calibrate_perplexity(
    law: AnyLossLaw, parameters: ArrayLike, tokens: ArrayLike, perplexities: ArrayLike
) -> PerplexityScale:
    """Returns the scale from a law's perplexity to that measured on your own text.

    One model moves the offset alone; from two models of different predicted loss on, offset and
    slope are their least squares in nats. Differentiable in the measurements.

        ln perplexity = offset + slope * L(N, D)

    Args:
      law: the loss law.
      parameters: scalar or `[n]` sizes of the measured models, positive.
      tokens: scalar or `[n]` numbers of tokens they were trained on, positive.
      perplexities: scalar or `[n]` measured perplexities, at least 1.

    Returns:
      The scale, for `perplexity` and `Laws`.

    Raises:
      ValueError: an argument is outside its range or NaN.

    Example:
      >>> from jaxsd import costmodel
      >>> scale = costmodel.calibrate_perplexity(costmodel.BESIROGLU, 125239296, 180e9, 29.79)
      >>> measured = costmodel.perplexity(costmodel.BESIROGLU, 125239296, 180e9, scale=scale)
      >>> round(float(measured), 2)
      29.79
    """
    require("perplexities", perplexities, AT_LEAST_ONE)
    nats, measured = as_floats(loss(law, parameters, tokens), jnp.log(jnp.asarray(perplexities)))
    centre, measured_centre = nats.mean(), measured.mean()
    spread = jnp.square(nats - centre).sum()
    together = ((nats - centre) * (measured - measured_centre)).sum()
    # Models of the same predicted loss say nothing of a slope.
    known = spread > 1e-8 * (1 + jnp.square(centre))
    slope = jnp.where(known, together / jnp.where(known, spread, 1), 1)
    return PerplexityScale(offset=measured_centre - slope * centre, slope=slope)


def calibrate_acceptance(
    law: Any, draft_perplexity: ArrayLike, target_perplexity: ArrayLike, alpha: ArrayLike
) -> Any:
    """Returns the law moved, its slopes kept, so that it meets measured pairs on average.

    What a law of perplexities alone leaves unexplained differs mostly from target to target: with
    an intercept of its own for every target, SDSL's 130 pairs are explained to 95 % and not 60 %.
    So one measured pair of your target is worth a lot.

        AcceptanceLaw, LogAcceptanceLaw  intercept += mean(alpha - predicted)
        PowerAcceptanceLaw               coefficient *= mean(alpha) / mean(predicted)

    Args:
      law: an affine, logarithmic or power law.
      draft_perplexity: scalar or `[n]`, at least 1.
      target_perplexity: scalar or `[n]`, at least 1.
      alpha: scalar or `[n]` measured acceptance probabilities (from a logged rate by
        `acceptance_rate_to_alpha`).

    Returns:
      A law of the same type.

    Raises:
      ValueError: an argument is outside its range or NaN, or the law has nothing to move.

    Example:
      >>> from jaxsd import costmodel
      >>> law = costmodel.calibrate_acceptance(costmodel.SDSL_ACCEPTANCE, 20.0, 10.0, 0.7)
      >>> round(float(costmodel.acceptance(law, 20.0, 10.0)), 6)
      0.7
    """
    law.check()
    require("alpha", alpha, PROBABILITY)
    require("draft_perplexity", draft_perplexity, AT_LEAST_ONE)
    require("target_perplexity", target_perplexity, AT_LEAST_ONE)
    x, y, measured = as_floats(draft_perplexity, target_perplexity, alpha)
    predicted = law.predict(x, y)
    if isinstance(law, PowerAcceptanceLaw):
        return law._replace(coefficient=law.coefficient * measured.mean() / predicted.mean())
    if isinstance(law, AcceptanceLaw | LogAcceptanceLaw):
        return law._replace(intercept=law.intercept + (measured - predicted).mean())
    name = type(law).__name__
    if isinstance(law, AnyPositionLaw):
        raise ValueError(f"law is a {name}: one alpha does not say how to move every position")
    raise ValueError(f"law is a {name}, which has no intercept to calibrate")


def outside(value: ArrayLike, low: ArrayLike, high: ArrayLike) -> Array:
    """ln(value / nearest bound) outside [low, high], with its sign, and 0 inside."""
    value_, low_, high_ = (jnp.log(x) for x in as_floats(value, low, high))
    return jnp.maximum(value_ - high_, 0) + jnp.minimum(value_ - low_, 0)


def outside_clip(law: AnyAcceptanceLaw, x: Array, y: Array) -> Array:
    """By how much the law's own alpha lies outside the interval in which it is left as it is."""
    raw = law.predict(x, y)
    if isinstance(law, MeasuredAcceptance | AnyPositionLaw):
        return jnp.zeros_like(raw)
    return jnp.maximum(raw - (1 - CLIP_MARGIN), 0) + jnp.minimum(raw - CLIP_MARGIN, 0)


def _require_fields(law: Any, test: Any) -> None:
    """Raises ValueError if a number of a law, its range apart, fails a test."""
    for name in law._fields[:-1]:
        require(f"{type(law).__name__}.{name}", getattr(law, name), test)


def _soft_clip(value: Array) -> Array:
    """Identity in [m, 1 - m], rational tails to 0 and 1 outside, with a continuous slope.

    The tails fall like 1 / distance. Exponential ones would underflow within a few units, and a
    search that starts on a hopeless draft would find no gradient to leave it by.
    """
    m = CLIP_MARGIN
    # The argument is guarded too, or the unused tail could divide by 0.
    below = jnp.minimum(value, m)
    above = jnp.maximum(value, 1 - m)
    low_tail = m**2 / (2 * m - below)
    high_tail = 1 - m**2 / (above - 1 + 2 * m)
    return jnp.where(value < m, low_tail, jnp.where(value > 1 - m, high_tail, value))
