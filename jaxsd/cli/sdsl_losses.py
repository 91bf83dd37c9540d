"""Morph, arXiv 2501.18107: does a loss law need the shape of a model?"""

from typing import Any, NamedTuple

import numpy as np

from .reproduction import Comparison, Table

# The sizes of models that its law is fitted on; at the larger number of tokens, the first only.
FITTED_SIZES = ("80M", "116M", "164M", "237M", "313M")
VOCABULARY = 50432  # rows of each of its two token tables


class Losses(NamedTuple):
    """The published losses and the laws fitted to them."""

    rows: list[dict[str, Any]]
    fits: dict[str, Any]  # name -> costmodel.Fit, on the rows that the paper fits
    predictions: dict[str, np.ndarray]  # name -> [n] losses of all rows
    is_fitted: np.ndarray  # [n]
    confound: dict[str, Any]  # name -> costmodel.Fit, on all rows


def compute() -> Losses:
    """All fits."""
    from jaxsd import costmodel

    rows = costmodel.published("morph_losses")
    chosen = is_fitted(rows)
    fits, predictions = {}, {}
    for name, form, exponents in (
        ("without shape", "size", "equal"),
        ("with shape", "shape", "equal"),
        ("with shape, free exponent", "shape", "shape_free"),
    ):
        fits[name] = fit_rows(
            [row for row, c in zip(rows, chosen, strict=True) if c], form, exponents
        )
        n, d, layers, width, _ = columns(rows)
        predictions[name] = np.asarray(
            costmodel.loss(fits[name].result, n, d, width / layers), np.float64
        )
    confound = {
        "all parameters, without shape": fit_rows(rows, "size", "free"),
        "all parameters, with shape": fit_rows(rows, "shape", "free"),
        "non-embedding, without shape": fit_rows(rows, "size", "free", embeddings=False),
        "non-embedding, with shape": fit_rows(rows, "shape", "free", embeddings=False),
    }
    return Losses(rows, fits, predictions, chosen, confound)


def is_fitted(rows: list[dict[str, Any]]) -> np.ndarray:
    """[n] Whether the paper's constants are fitted on a row; all others are held out.

    Those are all models of five sizes at 20 tokens per parameter, and the smallest at 160.
    """
    sizes = [row["name"].partition("_")[0] for row in rows]
    tokens = [row["training_tokens"] for row in rows]
    least = {s: min(t for t, o in zip(tokens, sizes, strict=True) if o == s) for s in set(sizes)}
    multiples = [round(t / least[s]) for t, s in zip(tokens, sizes, strict=True)]
    return np.array(
        [
            (s in FITTED_SIZES and m == 1) or (s == FITTED_SIZES[0] and m == 8)
            for s, m in zip(sizes, multiples, strict=True)
        ]
    )


def columns(rows: list[dict[str, Any]]) -> list[np.ndarray]:
    """Parameters, tokens, layers, widths and losses."""
    names = ("parameters_total", "training_tokens", "n_layers", "d_model", "loss")
    return [np.array([float(row[name]) for row in rows]) for name in names]


def fit_rows(rows: list[dict[str, Any]], form: Any, exponents: Any, embeddings: bool = True) -> Any:
    """The law of some rows, over all parameters or those outside the token tables."""
    from jaxsd import costmodel

    n, d, layers, width, losses = columns(rows)
    if not embeddings:
        n = n - 2 * VOCABULARY * width
    return costmodel.fit_loss(n, d, losses, layers, width, form, exponents, float(embeddings))


def r_squared(predicted: np.ndarray, losses: np.ndarray) -> float:
    """Share of the variance explained."""
    return float(1 - np.square(predicted - losses).sum() / np.square(losses - losses.mean()).sum())


def tables(losses: Losses) -> list[Table]:
    """What the laws explain, and what else could explain it."""
    measured = columns(losses.rows)[-1]
    large = np.array([row["name"].startswith("1B") for row in losses.rows])
    held_out = ~losses.is_fitted
    rows = []
    printed = {"without shape": ("0.9895", "0.0033"), "with shape": ("0.9982", "0.0006")}
    for name, predicted in losses.predictions.items():
        texts = printed.get(name, (None, None))
        error = np.abs(predicted / measured - 1)
        squares = float(np.square(predicted - measured).mean())
        rows += [
            Comparison(f"{name}: R2 over all rows", r_squared(predicted, measured), texts[0]),
            Comparison(f"{name}: mean squared error", squares, texts[1]),
            Comparison(
                f"{name}: mean relative error of held-out rows", float(error[held_out].mean())
            ),
            Comparison(f"{name}: smallest relative error at 1B", float(error[large].min())),
            Comparison(f"{name}: largest relative error at 1B", float(error[large].max())),
        ]
    confound = [Comparison(f"{name}: R2", fit.r_squared) for name, fit in losses.confound.items()]
    for name in ("all parameters, with shape", "non-embedding, with shape"):
        fit = losses.confound[name]
        confound.append(
            Comparison(f"{name}: exponent of d_model / n_layers", float(fit.estimates[-1]))
        )
    return [
        Table(
            "Morph, arXiv 2501.18107: loss by size, tokens and d_model / n_layers",
            rows,
            f"Fitted on {losses.is_fitted.sum()} rows of 80M to 313M, judged over all "
            f"{len(measured)}.",
        ),
        Table(
            "Morph: is it the shape, or the token tables' share of the parameters?",
            confound,
            "Ours, over all rows with free exponents. Counted without the tables, size and tokens "
            "explain as much as the shape did, and the sign of the shape's exponent turns: the "
            "price of being wide is not settled by these data.",
        ),
    ]
