"""Which acceptance law do measured pairs follow, and how well is it known?

Every fit of this package says how well the rows determine its parameters and how well it predicts
rows that it has not seen, and raises ValueError, naming the parameters and the rows to add, where
the rows do not determine them. Fits look at their rows, so they are not for `jax.jit`; they
compute in float64 on the host.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jax import Array

from ._inputs import AT_LEAST_ONE, POSITIVE, require
from ._least_squares import Fit, Model, Numbers, host_numbers, range_of, solve, value_and_jacobian
from .laws import (
    AcceptanceLaw,
    LogAcceptanceLaw,
    MeasuredAcceptance,
    PerplexityRange,
    PowerAcceptanceLaw,
)
from .speculation import expected_tokens

# A measured alpha is off by half a percent. A combination of parameters that such errors move by
# all of its value was not measured, and a fit that needs it is refused.
_THRESHOLD = 0.005
# A regression refuses columns that repeat each other, and no others.
_LINEAR_THRESHOLD = 1e-8

AcceptanceForm = Literal["affine", "linear", "log", "power"]


def fit_acceptance(
    draft_perplexity: Numbers,
    target_perplexity: Numbers,
    alpha: Numbers,
    form: AcceptanceForm | None = None,
    targets: Sequence[str] | None = None,
    groups: Sequence[Any] | None = None,
) -> Fit:
    """Returns the acceptance law that measured pairs of models follow best.

    Minimises the squares of `alpha - law`; forms in which the parameters are linear are ordinary
    least squares. With `targets` every target has an intercept (or coefficient) of its own and all
    share one slope (or exponent), which explains far more than perplexities alone.

        affine  alpha = draft_slope * x + target_slope * y + intercept
        linear  alpha = draft_slope * x + intercept
        log     alpha = slope * ln x + intercept
        power   alpha = coefficient * x^exponent

    Args:
      draft_perplexity: `[n]` x, at least 1.
      target_perplexity: scalar or `[n]` y, at least 1, on the same text.
      alpha: `[n]` measured acceptance probabilities (from a logged rate by
        `acceptance_rate_to_alpha`), above 0.
      form: by default affine, and linear with `targets`.
      targets: `[n]` names of the targets.
      groups: `[n]` labels; the held-out error is of rows predicted without their group. By default
        every row is a group.

    Returns:
      The fit. Its `result` is a law, or with `targets` a dict from names to laws. An affine or
      linear law holds its standard errors, their correlations and the scatter of one pair.

    Raises:
      ValueError: an argument is outside its range, not finite or of the wrong length, there are too
        few rows, or they do not determine the parameters.

    Example:
      >>> from jaxsd import costmodel
      >>> rows = costmodel.published("sdsl_alpha_pairs")
      >>> x, y, alpha = ([row[name] for row in rows]
      ...     for name in ("draft_perplexity", "target_perplexity", "alpha"))
      >>> fit = costmodel.fit_acceptance(x, y, alpha)
      >>> for name, value, error in zip(fit.names, fit.estimates, fit.standard_errors):
      ...     print(f"{name} {value:.6f} +- {error:.6f}")
      draft_slope -0.006700 +- 0.000607
      target_slope 0.012971 +- 0.001545
      intercept 0.642084 +- 0.021228

    Source: SDSL, arXiv 2603.11053, eq. 5 and tables 3 and 4.
    """
    form = form or ("affine" if targets is None else "linear")
    if form not in _SLOPES:
        raise ValueError(f"form={form!r} must be one of {', '.join(_SLOPES)}")
    measured = host_numbers("alpha", alpha)
    x = host_numbers("draft_perplexity", draft_perplexity, len(measured))
    y = host_numbers("target_perplexity", target_perplexity, len(measured))
    require("alpha", measured, (lambda a: (a > 0) & (a <= 1), "above 0 and at most 1"))
    require("draft_perplexity", x, AT_LEAST_ONE)
    require("target_perplexity", y, AT_LEAST_ONE)
    if targets is not None and len(targets) != len(measured):
        raise ValueError(f"targets of length {len(targets)} must name {len(measured)} targets")
    known = ["" for _ in measured[:1]] if targets is None else list(dict.fromkeys(targets))
    index = np.zeros(len(measured), np.int32)
    if targets is not None:
        index = np.array([known.index(name) for name in targets], np.int32)

    slopes, offset = _SLOPES[form]
    offsets = (offset,) if targets is None else tuple(f"{offset}[{name}]" for name in known)
    num = len(slopes) + len(offsets)
    start = np.zeros(num)
    if form == "power":
        start[len(slopes) :] = measured.mean()
    model = Model(
        evaluate=lambda unknowns: _ACCEPTANCES[form](unknowns, x, y, index),
        measured=measured,
        starts=start[None],
        lower=np.full(num, -np.inf),
        upper=np.full(num, np.inf),
        report=lambda unknowns: (unknowns, np.eye(num)),
        names=slopes + offsets,
        is_relative=np.zeros(num, bool),
        advice=_ADVICE,
        threshold=_THRESHOLD,
    )
    ranges = {"draft_perplexity": range_of(x), "target_perplexity": range_of(y)}

    def make_result(unknowns: np.ndarray) -> Any:
        """The laws without their errors, each with the range of its own rows."""
        laws = {}
        for i, name in enumerate(known):
            values = [float(v) for v in (*unknowns[: len(slopes)], unknowns[len(slopes) + i])]
            mine = index == i
            law = _acceptance_law(form, values[:-1], values[-1])
            laws[name] = law._replace(
                fitted=PerplexityRange(*range_of(x[mine]), *range_of(y[mine]))
            )
        return laws

    out = solve(model, make_result, ranges, groups)
    laws = {name: _with_errors(law, out, i) for i, (name, law) in enumerate(out.result.items())}
    return out._replace(result=laws[""] if targets is None else laws)


def fit_alpha(gamma: Numbers, tokens_per_round: Numbers) -> Fit:
    """Returns the one acceptance probability behind tokens per round at several gammas.

    Minimises the squares of `tokens_per_round - expected_tokens(alpha, gamma)`. If tokens are not
    accepted independently of their position, the residuals show it: `predicted` bends away.

    Args:
      gamma: `[n]` numbers of drafted tokens per round, positive.
      tokens_per_round: `[n]` measured mean tokens per round, the target's own one included, from 1
        to gamma + 1 (from a logged rate by `acceptance_rate_to_length`).

    Returns:
      The fit, whose `result` is a `MeasuredAcceptance`.

    Raises:
      ValueError: an argument is outside its range, not finite or of the wrong length, or there are
        fewer than two rows.

    Example:
      >>> from jaxsd import costmodel
      >>> fit = costmodel.fit_alpha([1, 2, 4, 8], [1.71, 2.18, 2.79, 3.21])
      >>> f"{fit.result.alpha:.3f} +- {fit.standard_errors[0]:.3f}"
      '0.702 +- 0.001'

    Source: SDSL, arXiv 2603.11053, section 4.1 and appendix B.
    """
    measured = host_numbers("tokens_per_round", tokens_per_round)
    lengths = host_numbers("gamma", gamma, len(measured))
    require("gamma", lengths, POSITIVE)
    possible = (lambda t: (t >= 1) & (t <= lengths + 1), "from 1 to gamma + 1")
    require("tokens_per_round", measured, possible)
    model = Model(
        evaluate=lambda unknowns: _TOKENS(unknowns, lengths),
        measured=measured,
        starts=np.array([[0.3], [0.7], [0.95]]),
        lower=np.zeros(1),
        upper=np.ones(1),
        report=lambda unknowns: (unknowns, np.eye(1)),
        names=("alpha",),
        is_relative=np.zeros(1, bool),
        advice={},
        threshold=_LINEAR_THRESHOLD,
    )
    return solve(
        model,
        lambda unknowns: MeasuredAcceptance(float(unknowns[0])),
        {"gamma": range_of(lengths)},
        None,
    )


def fit_linear(
    columns: Mapping[str, Numbers],
    values: Numbers,
    intercept: str | None = "intercept",
    robust: bool = False,
    groups: Sequence[Any] | None = None,
) -> Fit:
    """Returns the ordinary least squares of values on named columns.

        values = sum over columns of coefficient * column + intercept

    Args:
      columns: name to `[n]` numbers.
      values: `[n]` numbers.
      intercept: name of the constant; None for none.
      robust: standard errors that let every row have a variance of its own (HC3), where otherwise
        all have the same.
      groups: `[n]` labels; the held-out error is of rows predicted without their group.

    Returns:
      The fit, whose `result` is a dict from names to coefficients. As many rows as coefficients are
      enough unless `robust`, but then nothing says how large the errors are.

    Raises:
      ValueError: an argument is not finite or of the wrong length, there are too few rows, or a
        column is a combination of the others.

    Example:
      >>> from jaxsd import costmodel
      >>> fit = costmodel.fit_linear({"layers": [12, 24, 24, 32]}, [10.06, 14.74, 14.03, 17.55])
      >>> round(fit.result["layers"], 3), round(fit.r_squared, 3)
      (0.373, 0.99)

    Source: MacKinnon and White, J. Econometrics 29 (1985) 305, for HC3.
    """
    measured = host_numbers("values", values)
    named = {k: host_numbers(k, column, len(measured)) for k, column in columns.items()}
    ranges = {name: range_of(column) for name, column in named.items()}
    if intercept is not None:
        named[intercept] = np.ones(len(measured))
    if not named:
        raise ValueError("columns is empty and there is no intercept: there is nothing to fit")
    names, matrix = tuple(named), np.stack(list(named.values()), 1)
    # Columns whose numbers are 1e14 apart are no less independent for it.
    model = Model(
        evaluate=lambda unknowns: (matrix @ unknowns, matrix),
        measured=measured,
        starts=np.zeros((1, len(names))),
        lower=np.full(len(names), -np.inf),
        upper=np.full(len(names), np.inf),
        report=lambda unknowns: (unknowns, np.eye(len(names))),
        names=names,
        is_relative=np.zeros(len(names), bool),
        advice={},
        threshold=_LINEAR_THRESHOLD,
    )

    def make_result(unknowns: np.ndarray) -> dict[str, float]:
        return dict(zip(names, map(float, unknowns), strict=True))

    return solve(model, make_result, ranges, groups, int(robust), robust)


# The names of what all targets share, and of what each may have for itself.
_SLOPES: dict[str, tuple[tuple[str, ...], str]] = {
    "affine": (("draft_slope", "target_slope"), "intercept"),
    "linear": (("draft_slope",), "intercept"),
    "log": (("slope",), "intercept"),
    "power": (("exponent",), "coefficient"),
}
_ADVICE = {
    "draft_slope": "drafts of other perplexities",
    "slope": "drafts of other perplexities",
    "exponent": "drafts of other perplexities",
    "target_slope": "targets of other perplexities",
}


def _acceptance_law(form: str, slopes: Any, offset: Any) -> Any:
    """The law of a form from its numbers."""
    if form == "affine":
        return AcceptanceLaw(slopes[0], slopes[1], offset)
    if form == "linear":
        return AcceptanceLaw(slopes[0], 0.0, offset)
    if form == "log":
        return LogAcceptanceLaw(slopes[0], offset)
    return PowerAcceptanceLaw(coefficient=offset, exponent=slopes[0])


def _with_errors(law: Any, fitted: Fit, target: int) -> Any:
    """An affine law with its errors from the fit, of the target of a number."""
    if not isinstance(law, AcceptanceLaw):
        return law
    num_slopes = sum(not name.startswith("intercept") for name in fitted.names)
    intercept = num_slopes + target
    errors = fitted.standard_errors

    def correlation(i: int, j: int) -> float:
        product = errors[i] * errors[j]  # 0 if the rows lie on a law to the last bit
        return float(fitted.covariance[i, j] / product) if product else 0.0

    law = law._replace(
        draft_slope_error=float(errors[0]),
        intercept_error=float(errors[intercept]),
        draft_intercept_correlation=correlation(0, intercept),
        residual_error=fitted.residual_error,
    )
    if num_slopes == 1:
        return law
    return law._replace(
        target_slope_error=float(errors[1]),
        draft_target_correlation=correlation(0, 1),
        target_intercept_correlation=correlation(1, intercept),
    )


def _acceptance(form: str, unknowns: Array, x: Array, y: Array, index: Array) -> Array:
    """Alpha of every pair."""
    num_slopes = len(_SLOPES[form][0])
    return _acceptance_law(form, unknowns[:num_slopes], unknowns[num_slopes:][index]).predict(x, y)


_ACCEPTANCES = {form: value_and_jacobian(functools.partial(_acceptance, form)) for form in _SLOPES}
_TOKENS = value_and_jacobian(lambda unknowns, gamma: expected_tokens(unknowns[0], gamma))
