"""Which laws do the drafts follow that the plan lets them see, and how well are these known?

A loss law over parameters, training tokens and shape; for every temperature a law from perplexity
to alpha, and one from perplexity to acceptance by position. Of several forms of a law that one is
kept which predicts best the shapes among the fitted members that it has not seen; what it misses
there is its error, and the interval of everything predicted with it. The held-out members have no
say in any of this.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsd import costmodel

from .circle_measure import temperature_name
from .circle_plan import Plan

Row = Mapping[str, Any]

# Form, which exponents are one, and whether token tables count as parameters.
LOSS_FORMS = (
    ("product", "free", 1.0),
    ("product", "free", 0.0),
    ("product_shape", "free", 1.0),
    ("product_shape", "free", 0.0),
    ("size", "equal", 1.0),
    ("size", "equal", 0.0),
    ("size", "free", 1.0),
    ("size", "free", 0.0),
    ("shape", "shape_free", 1.0),
    ("shape", "shape_free", 0.0),
    ("shape", "free", 1.0),
    ("shape", "free", 0.0),
)
ALPHA_FORMS = ("linear", "log", "power")


class Known(NamedTuple):
    """A law, what it was chosen among, and how far it is off for shapes it has not seen."""

    law: Any
    error: float  # root mean square, in the unit that the law's errors have
    candidates: list[dict[str, Any]]


class FittedLaws(NamedTuple):
    """All laws of a study."""

    loss: Known  # error in nats
    alpha: dict[str, Known]  # by temperature; error of alpha
    position: dict[str, Known]  # by temperature; error of ln(tokens of a round), at the largest K
    # [K] by temperature: error of ln(tokens of a round) by length, of shapes not seen, at their
    # measured perplexities.
    token_errors: dict[str, np.ndarray]
    target_perplexity: float
    num_shapes: int  # fitted


def fit_laws(
    plan: Plan, family: Sequence[Row], measured: Mapping[str, Row], target_loss: float
) -> FittedLaws:
    """Fits every law to the members that are not held out.

    Args:
      plan: of the study.
      family: a row per member, as `circle_family.train_member` returns it.
      measured: by name, as `circle_measure.measure_shape` returns it.
      target_loss: of the target on the same windows.

    Raises:
      ValueError: the members do not determine a law in any of its forms.
    """
    rows = [row for row in family if not row["is_held_out"]]
    loss = best_loss_law(rows)
    alpha, position, token_errors = {}, {}, {}
    target_perplexity = math.exp(target_loss)
    for temperature in plan.temperatures:
        name = temperature_name(temperature)
        alphas = [measured[row["name"]]["alpha"][name] for row in rows]
        alpha[name] = best_alpha_law(rows, alphas, target_perplexity)
        shares = np.array([smoothed_shares(measured[row["name"]], name) for row in rows])
        tokens = np.array([measured[row["name"]]["tokens"][name] for row in rows])
        position[name], token_errors[name] = position_law(plan, rows, shares, tokens)
    shapes = {(row["d_model"], row["n_layers"]) for row in rows}
    return FittedLaws(
        loss, alpha, position, token_errors, target_perplexity, num_shapes=len(shapes)
    )


def best_loss_law(rows: Sequence[Row]) -> Known:
    """The form that predicts best the losses of shapes that it was fitted without."""
    candidates: list[dict[str, Any]] = []
    best: tuple[float, Any] | None = None
    for form, exponents, counted in LOSS_FORMS:
        described: dict[str, Any] = {
            "form": form,
            "exponents": exponents,
            "embeddings_counted": counted,
        }

        try:
            whole = fit_loss(rows, form, exponents, counted)
            whole.result.check()  # a shape that should be wide, whatever it costs, is no law
            off = _held_out_error(whole, [row["loss"] for row in rows])
        except ValueError as error:
            candidates.append({**described, "problem": str(error)})
            continue
        candidates.append({**described, "error": off, **_numbers(whole)})
        if best is None or off < best[0]:
            best = off, whole.result
    if best is None:
        reason = min((one["problem"] for one in candidates), key=len)  # of the simplest form
        raise ValueError(f"the family determines no loss law: {reason}")
    return Known(best[1], best[0], candidates)


def fit_loss(rows: Sequence[Row], form: Any, exponents: Any, counted: float) -> costmodel.Fit:
    """One form of the loss law, fitted to members."""
    return costmodel.fit_loss(
        [law_parameters(row, counted) for row in rows],
        [row["training_tokens"] for row in rows],
        [row["loss"] for row in rows],
        n_layers=[row["n_layers"] for row in rows],
        d_model=[row["d_model"] for row in rows],
        form=form,
        exponents=exponents,
        embeddings_counted=counted,
        groups=_shapes(rows),
    )


def predict_loss(law: Any, row: Row) -> float:
    """The loss that a law gives a member, from its sizes and training tokens alone."""
    size = law_parameters(row, float(law.embeddings_counted))
    ratio = row["d_model"] / row["n_layers"]
    return float(costmodel.loss(law, np.float64(size), float(row["training_tokens"]), ratio))


def law_parameters(row: Row, counted: float) -> float:
    """Parameters as a law counts them: with the token table, or without."""
    outside = row["parameters_non_embedding"]
    return outside + counted * (row["parameters_total"] - outside)


def best_alpha_law(rows: Sequence[Row], alphas: Sequence[float], target_perplexity: float) -> Known:
    """The form of alpha by perplexity that predicts best shapes that it was fitted without."""
    candidates: list[dict[str, Any]] = []
    best: tuple[float, Any] | None = None
    for form in ALPHA_FORMS:
        try:
            whole = costmodel.fit_acceptance(
                [row["perplexity"] for row in rows],
                target_perplexity,
                alphas,
                form,
                groups=_shapes(rows),
            )
            off = _held_out_error(whole, alphas)
        except ValueError as error:
            candidates.append({"form": form, "problem": str(error)})
            continue
        candidates.append({"form": form, "error": off, **_numbers(whole)})
        if best is None or off < best[0]:
            best = off, whole.result
    if best is None:
        reason = min((one["problem"] for one in candidates), key=len)
        raise ValueError(f"the family determines no acceptance law: {reason}")
    return Known(best[1], best[0], candidates)


def position_law(
    plan: Plan, rows: Sequence[Row], shares: np.ndarray, tokens: np.ndarray
) -> tuple[Known, np.ndarray]:
    """Acceptance by position from perplexity, and its error in ln(tokens of a round) by length."""
    pairs = [
        {**row, "shares": share, "tokens": count}
        for row, share, count in zip(rows, shares, tokens, strict=True)
    ]

    def fit(some: Sequence[Row]) -> Any:
        return costmodel.fit_position_acceptance(
            [row["perplexity"] for row in some], np.array([row["shares"] for row in some])
        )

    whole = fit(pairs)
    errors = [
        np.log(tokens_of_round(plan, found.result, row["perplexity"])) - np.log(row["tokens"])
        for found, left in _without_each_shape(pairs, fit)
        for row in left
    ]
    by_length = np.sqrt(np.mean(np.square(errors), axis=0))
    candidate = {
        "form": "position",
        "slopes": np.asarray(whole.result.slopes).tolist(),
        "intercepts": np.asarray(whole.result.intercepts).tolist(),
        "error": float(by_length[-1]),
    }
    return Known(whole.result, float(by_length[-1]), [candidate]), by_length


def smoothed_shares(measured: Row, temperature: str) -> np.ndarray:
    """Shares of rounds by position, with half a round more accepted, and half a round more not.

    Of few rounds none, or all, may go on at a place; that this never happens, or always, does not
    follow, and has no logit. Where many rounds were seen it changes nothing.

    >>> smoothed_shares({"shares": {"0": [0.5, 0.0]}, "rounds": {"0": 9.0}}, "0").tolist()
    [0.5, 0.045454545454545456]
    """
    counts = measured["rounds"][temperature] * np.array([1.0, *measured["shares"][temperature]])
    return np.cumprod((counts[1:] + 0.5) / (counts[:-1] + 1))


def tokens_of_round(plan: Plan, law: Any, perplexity: float) -> np.ndarray:
    """`[lengths]` Tokens of a round by the law of acceptance by position."""
    shares = np.asarray(law.shares(*map(np.float64, (perplexity, 1.0))), np.float64)
    return np.array(
        [float(costmodel.expected_tokens_by_position(shares, length)) for length in plan.lengths]
    )


def published_comparison(
    family: Sequence[Row], measured: Mapping[str, Row], target_loss: float, temperature: float
) -> dict[str, Any]:
    """How far the constants of the literature are from what these models do."""
    name = temperature_name(temperature)
    target_perplexity = math.exp(target_loss)
    rows = []
    for row in family:
        alpha = measured[row["name"]]["alpha"][name]
        rows.append(
            {
                "name": row["name"],
                "loss": row["loss"],
                "besiroglu_loss": predict_loss(costmodel.BESIROGLU, row),
                "alpha": alpha,
                "sdsl_alpha": float(
                    costmodel.acceptance(
                        costmodel.SDSL_ACCEPTANCE, row["perplexity"], target_perplexity
                    )
                ),
            }
        )
    return {
        "rows": rows,
        "loss_error": float(
            np.median([abs(row["besiroglu_loss"] / row["loss"] - 1) for row in rows])
        ),
        "alpha_error": float(np.median([abs(row["sdsl_alpha"] - row["alpha"]) for row in rows])),
    }


def independence(plan: Plan, measured: Mapping[str, Row]) -> dict[str, Any]:
    """Are tokens accepted independently? Tokens of a round from one alpha, and from shares.

    Each beside the number that the texts of the target give exactly, by length and temperature.
    """
    found = {}
    for temperature in plan.temperatures:
        name = temperature_name(temperature)
        exact = np.array([one["tokens"][name] for one in measured.values()])
        alphas = np.array([one["alpha"][name] for one in measured.values()])
        shares = np.array([one["shares"][name] for one in measured.values()])
        by_alpha, by_shares = (
            np.stack([np.asarray(expect(x, length)) for length in plan.lengths], 1) / exact - 1
            for expect, x in (
                (costmodel.expected_tokens, alphas),
                (costmodel.expected_tokens_by_position, shares),
            )
        )
        lags = np.array([one["autocorrelation"][name] for one in measured.values()])
        found[name] = {
            "one_alpha_error": np.mean(by_alpha, axis=0).tolist(),
            "by_position_error": np.mean(by_shares, axis=0).tolist(),
            "autocorrelation": dict(zip(("1", "2", "4"), np.mean(lags, 0).tolist(), strict=True)),
        }
    return found


def along_the_way(laws: FittedLaws, family: Sequence[Row]) -> dict[str, Any]:
    """How far losses in the middle of a run lie above those of runs that end there."""
    ratios = []
    for row in family:
        for tokens, loss in row["losses_along_the_way"][:-1]:
            ended = predict_loss(laws.loss.law, {**row, "training_tokens": tokens})
            ratios.append([tokens / row["training_tokens"], loss - ended])
    middle = [excess for share, excess in ratios if 0.25 <= share <= 0.8]
    return {
        "points": ratios,
        "mean_excess_nats": float(np.mean(middle)) if middle else None,
    }


def _shapes(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """A label for each row: rows of one shape are held out together."""
    return [(row["d_model"], row["n_layers"]) for row in rows]


def _held_out_error(fit: costmodel.Fit, measured: Sequence[float]) -> float:
    """Root mean square of what a fit without each shape misses there.

    Raises:
      ValueError: without one of the shapes the rest determines nothing.
    """
    errors = fit.held_out - np.asarray(measured, np.float64)
    if not np.isfinite(errors).all():
        raise ValueError("without one of the shapes the others do not determine it")
    return float(np.sqrt(np.mean(np.square(errors))))


def _without_each_shape(
    rows: Sequence[Row], fit: Callable[[Sequence[Row]], Any]
) -> list[tuple[Any, list[Row]]]:
    """A fit without each shape in turn, and the rows of that shape.

    Raises:
      ValueError: without one of them the rest determines nothing.
    """
    shapes = dict.fromkeys((row["d_model"], row["n_layers"]) for row in rows)
    found = []
    for shape in shapes:
        left = [row for row in rows if (row["d_model"], row["n_layers"]) == shape]
        rest = [row for row in rows if (row["d_model"], row["n_layers"]) != shape]
        found.append((fit(rest), left))
    return found


def _numbers(fit: costmodel.Fit) -> dict[str, Any]:
    """A fit as JSON values."""
    return {
        "parameters": [
            {"name": name, "estimate": float(estimate), "low": float(low), "high": float(high)}
            for name, estimate, (low, high) in zip(
                fit.names, fit.estimates, fit.intervals, strict=True
            )
        ],
        "residual_error": float(fit.residual_error),
        "r_squared": float(fit.r_squared),
    }
