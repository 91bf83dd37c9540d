"""Which loss law do trained models follow, and how well is it known?"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from ._inputs import AT_LEAST_ONE, POSITIVE, require
from ._least_squares import Fit, Model, Numbers, host_numbers, range_of, solve, value_and_jacobian
from .laws import KaplanLossLaw, LossLaw, LossRange, ProductLossLaw, ShapeLossLaw

# A loss is off by a tenth of a percent. A combination of parameters that such errors move by all of
# its value was not measured, and a fit that needs it is refused.
_THRESHOLD = 0.001

LossForm = Literal["size", "shape", "kaplan", "product", "product_shape"]
Exponents = Literal["equal", "shape_free", "free"]


def fit_loss(
    parameters: Numbers,
    tokens: Numbers,
    losses: Numbers,
    n_layers: Numbers | None = None,
    d_model: Numbers | None = None,
    form: LossForm = "size",
    exponents: Exponents = "free",
    embeddings_counted: float = 1.0,
    groups: Sequence[Any] | None = None,
) -> Fit:
    """Returns the loss law that trained models follow best.

    Minimises the squares of `loss - law` in nats, from many starts: for a grid of exponents the
    rest of the law is linear and solved for. Coefficients and exponents stay positive and the
    irreducible loss at least 0; only a free exponent of the shape may come out negative, which says
    that the rows do not charge for being wide, and such a law is refused where it is used.

        size    E + A / N^a + B / D^b
        shape   (E + A / N^a + B / D^b) (1 + e R^h),   R = d_model / n_layers
        kaplan  ((N_c / N)^(a / b) + D_c / D)^b
        product        c / (N^a D^b)
        product_shape  c / (N^a D^b) (R / R_0)^h, R_0 the geometric mean of the rows

    Which N matters for the shape: wide shallow models have more of their parameters in the token
    table. With all parameters counted, a shape term may stand for that table's share alone, so fit
    both, and compare with form `size` over parameters outside the table.

    Args:
      parameters: `[n]` N, positive.
      tokens: scalar or `[n]` D, number of training tokens, positive.
      losses: `[n]` measured losses in nats per token, positive.
      n_layers: `[n]` for form `shape`; with `d_model` it also sets the range of the law.
      d_model: `[n]` for form `shape`.
      form: the formula.
      exponents: `free`: all; `shape_free`: a = b, and h; `equal`: a = b = h. For form `kaplan` they
        are free.
      embeddings_counted: what `parameters` are: 1 all, 0 those outside token tables.
      groups: `[n]` labels; the held-out error is of rows predicted without their group, for
        example without models of their size. By default every row is a group.

    Returns:
      The fit, whose `result` is a `LossLaw`, `ShapeLossLaw` (reference aspect ratio 0, as Morph's),
      `KaplanLossLaw` or `ProductLossLaw` with the range of the rows. The errors of coefficients and
      exponents are strongly correlated.

    Raises:
      ValueError: an argument is outside its range, not finite or of the wrong length, form `shape`
        without shapes, there are too few rows, or they do not determine the parameters.

    Example:
      >>> from jaxsd import costmodel
      >>> law = costmodel.LossLaw(1.8, 400.0, 0.34, 2000.0, 0.37)
      >>> n, d = [1e8, 1e8, 1e8, 3e8, 3e8, 1e9, 1e9], [1e9, 1e10, 1e11, 3e9, 6e10, 2e10, 2e11]
      >>> fit = costmodel.fit_loss(n, d, costmodel.loss(law, n, d))
      >>> round(fit.result.irreducible, 3), round(fit.result.parameters_exponent, 3)
      (1.8, 0.34)

    Source: Hoffmann et al., arXiv 2203.15556, eq. 2; Bian et al., arXiv 2501.18107, eq. 5; Kaplan
    et al., arXiv 2001.08361, eq. 1.5.
    """
    if form not in _FIELDS:
        raise ValueError(f"form={form!r} must be one of {', '.join(_FIELDS)}")
    if exponents not in ("equal", "shape_free", "free"):
        raise ValueError(f"exponents={exponents!r} must be one of equal, shape_free, free")
    measured = host_numbers("losses", losses)
    sizes = host_numbers("parameters", parameters, len(measured))
    data = host_numbers("tokens", tokens, len(measured))
    ratio, layers = _aspect_ratio(form, n_layers, d_model, len(measured))
    require("losses", measured, POSITIVE)
    require("parameters", sizes, POSITIVE)
    require("tokens", data, POSITIVE)
    centres = np.array([np.log(x).mean() for x in (sizes, data, ratio)])
    fitted = LossRange(*range_of(sizes), *range_of(data))
    ranges = {"parameters": range_of(sizes), "tokens": range_of(data)}
    if n_layers is not None and d_model is not None:
        fitted = LossRange(*range_of(sizes), *range_of(data), *range_of(ratio), float(layers.min()))
        ranges |= {"aspect_ratio": range_of(ratio), "n_layers": range_of(layers)}

    fields, tied = _ties(form, exponents)
    first = tied.argmax(0)  # of the fields that share an unknown
    kinds = [_KINDS[field] for field in _FIELDS[form]]
    data_and_centres = (centres, sizes, data, ratio)

    def predict(unknowns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The law over the rows."""
        value, jacobian = _LOSSES[form](tied @ unknowns, *data_and_centres)
        return value, jacobian @ tied

    def report(unknowns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The law's own numbers."""
        value, jacobian = _LOSS_NUMBERS[form](tied @ unknowns, centres)
        return value[first], (jacobian @ tied)[first]

    def make_result(unknowns: np.ndarray) -> Any:
        """The law of those numbers and of the range of the rows."""
        numbers = map(float, _LOSS_NUMBERS[form](tied @ unknowns, centres)[0])
        return _loss_law(form, list(numbers), float(np.exp(centres[2])), embeddings_counted, fitted)

    model = Model(
        evaluate=predict,
        measured=measured,
        starts=_loss_starts(form, exponents, measured, *data_and_centres),
        lower=np.array([kinds[i].lower for i in first]),
        upper=np.array([kinds[i].upper for i in first]),
        report=report,
        names=fields,
        is_relative=np.array([kinds[i].is_relative for i in first]),
        advice=_ADVICE,
        threshold=_THRESHOLD,
    )
    return solve(model, make_result, ranges, groups)


class _Kind(NamedTuple):
    """How a number of a loss law is searched."""

    lower: float
    upper: float
    is_relative: bool  # the unknown is a logarithm, of that term at the centre of the rows


_COEFFICIENT = _Kind(-np.inf, np.inf, True)
_EXPONENT = _Kind(1e-3, 10.0, False)
_KINDS = {
    "irreducible": _Kind(0.0, np.inf, False),
    "parameters_coefficient": _COEFFICIENT,
    "parameters_exponent": _EXPONENT,
    "tokens_coefficient": _COEFFICIENT,
    "tokens_exponent": _EXPONENT,
    "coefficient": _COEFFICIENT,
    "exponent": _Kind(-10.0, 10.0, False),
    "parameters_scale": _COEFFICIENT,
    "tokens_scale": _COEFFICIENT,
    "aspect_exponent": _Kind(-10.0, 10.0, False),
}
_FIELDS: dict[str, tuple[str, ...]] = {
    "size": LossLaw._fields[:5],
    "shape": (*LossLaw._fields[:5], "coefficient", "exponent"),
    "kaplan": KaplanLossLaw._fields[:4],
    "product": ProductLossLaw._fields[:3],
    "product_shape": ProductLossLaw._fields[:4],
}
_PRODUCTS = ("product", "product_shape")
_SIZES_ADVICE = "models of other sizes, trained on the same number of tokens"
_TOKENS_ADVICE = "the same models trained on other numbers of tokens"
_SHAPES_ADVICE = "models of the same size with another d_model / n_layers"
_ADVICE = {
    "irreducible": "larger models trained on more tokens",
    "parameters_coefficient": _SIZES_ADVICE,
    "parameters_exponent": _SIZES_ADVICE,
    "parameters_scale": _SIZES_ADVICE,
    "tokens_coefficient": _TOKENS_ADVICE,
    "tokens_exponent": _TOKENS_ADVICE,
    "tokens_scale": _TOKENS_ADVICE,
    "coefficient": _SHAPES_ADVICE,
    "exponent": _SHAPES_ADVICE,
    "aspect_exponent": _SHAPES_ADVICE,
}
_START_EXPONENTS = (0.15, 0.3, 0.5, 0.8)
_NUM_STARTS = 4
# Factor and exponent of the shape at the centre of the rows: wide is worse, or deep is.
_START_SHAPES = ((0.02, 1.2), (0.05, 0.4), (0.02, -1.0))


def _ties(form: str, exponents: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the unknowns, and the matrix from them to the fields of the law."""
    fields = _FIELDS[form]
    share: dict[str, str] = {}
    if form != "kaplan" and exponents != "free":
        share["tokens_exponent"] = "parameters_exponent"
    if exponents == "equal":
        share["exponent"] = "parameters_exponent"
    owners = [share.get(field, field) for field in fields]
    unknowns = list(dict.fromkeys(owners))
    matrix = np.array([[float(owner == name) for name in unknowns] for owner in owners])
    names = [
        " = ".join(field for field, owner in zip(fields, owners, strict=True) if owner == name)
        for name in unknowns
    ]
    return tuple(names), matrix


def _loss_numbers(form: str, unknowns: Array, centres: Array) -> Array:
    """The law's own numbers: coefficients refer to N = 1, the unknowns to the centre of the rows.

    Where no row is, the coefficient would move with the exponent, by many times its value.
    """
    if form == "kaplan":
        size, a, data, b = unknowns
        return jnp.stack([jnp.exp(centres[0] + size / a), a, jnp.exp(centres[1] + data / b), b])
    if form in _PRODUCTS:
        value, a, b = unknowns[:3]
        return jnp.stack([jnp.exp(value + a * centres[0] + b * centres[1]), a, b, *unknowns[3:]])
    irreducible, size, a, data, b = unknowns[:5]
    numbers = [irreducible, jnp.exp(size + a * centres[0]), a, jnp.exp(data + b * centres[1]), b]
    if form == "shape":
        e, h = unknowns[5:]
        numbers += [jnp.exp(e - h * centres[2]), h]
    return jnp.stack(numbers)


def _loss_law(
    form: str, numbers: Any, reference: Any, embeddings_counted: Any, fitted: LossRange
) -> Any:
    """The law of a form from its numbers; the reference aspect ratio is that of products."""
    if form in _PRODUCTS:
        exponent = numbers[3] if form == "product_shape" else 0.0
        coefficient, a, b = numbers[:3]
        return ProductLossLaw(coefficient, a, b, exponent, reference, embeddings_counted, fitted)
    if form == "kaplan":
        return KaplanLossLaw(*numbers, embeddings_counted=embeddings_counted, fitted=fitted)
    law = LossLaw(*numbers[:5], embeddings_counted=embeddings_counted, fitted=fitted)
    if form == "size":
        return law
    coefficient, exponent = numbers[5:]
    return ShapeLossLaw(law, coefficient, exponent, reference_aspect_ratio=0.0, fitted=fitted)


def _losses(
    form: str, unknowns: Array, centres: Array, sizes: Array, data: Array, ratio: Array
) -> Array:
    """The loss of every model."""
    numbers, reference = _loss_numbers(form, unknowns, centres), jnp.exp(centres[2])
    law = _loss_law(form, numbers, reference, 1.0, LossRange())
    return law.predict(sizes, data, ratio)


_LOSSES = {form: value_and_jacobian(functools.partial(_losses, form)) for form in _FIELDS}
_LOSS_NUMBERS = {
    form: value_and_jacobian(functools.partial(_loss_numbers, form)) for form in _FIELDS
}


def _loss_starts(
    form: str,
    exponents: str,
    measured: np.ndarray,
    centres: np.ndarray,
    sizes: np.ndarray,
    data: np.ndarray,
    ratio: np.ndarray,
) -> np.ndarray:
    """[s, p] The best of a grid of exponents, for each of which the other numbers are linear."""
    if form in _PRODUCTS:
        columns = [x - c for x, c in zip(np.log([sizes, data, ratio]), centres, strict=True)]
        used = [np.ones_like(sizes), *columns][: 3 if form == "product" else 4]
        found = np.linalg.lstsq(np.stack(used, 1), np.log(measured), rcond=None)[0]
        # Loss falls with size and data: what noise has rise starts flat.
        found[1:3] = np.maximum(-found[1:3], 0.01)
        return found[None, _ties(form, exponents)[1].argmax(0)]
    if form == "kaplan":
        logs = np.log([0.6 * measured.min(), 0.3 * measured.min()])
        grid = itertools.product((0.05, 0.1, 0.3), (0.05, 0.1, 0.3))
        return np.array([[logs[0], a, logs[1], b] for a, b in grid])
    candidates = []
    size, tokens = np.log(sizes) - centres[0], np.log(data) - centres[1]
    for a, b in itertools.product(_START_EXPONENTS, _START_EXPONENTS):
        if exponents != "free" and a != b:
            continue
        matrix = np.stack([np.ones_like(size), np.exp(-a * size), np.exp(-b * tokens)], 1)
        terms = np.linalg.lstsq(matrix, measured, rcond=None)[0]
        terms = np.maximum(terms, 0.01 * measured.min())  # no term may be absent at the start
        cost = np.square(matrix @ terms - measured).sum()
        candidates.append((cost, [terms[0], np.log(terms[1]), a, np.log(terms[2]), b]))
    candidates.sort(key=lambda pair: pair[0])
    starts = [start for _, start in candidates[:_NUM_STARTS]]
    if form == "shape":
        shapes = [(np.log(e), h) for e, h in _START_SHAPES]
        starts = [[*start, *shape] for start, shape in itertools.product(starts, shapes)]
    # From all fields to the unknowns: those that are tied start from the first one's value.
    first = _ties(form, exponents)[1].argmax(0)
    return np.unique(np.array(starts)[:, first], axis=0)


def _aspect_ratio(
    form: str, n_layers: Numbers | None, d_model: Numbers | None, num_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """[n] d_model / n_layers and n_layers, or ones where none are given nor needed."""
    if n_layers is None or d_model is None:
        if form in ("shape", "product_shape"):
            raise ValueError(f"form={form!r} needs n_layers and d_model of every row")
        return np.ones(num_rows), np.ones(num_rows)
    layers = host_numbers("n_layers", n_layers, num_rows)
    width = host_numbers("d_model", d_model, num_rows)
    require("n_layers", layers, AT_LEAST_ONE)
    require("d_model", width, POSITIVE)
    return width / layers, layers
