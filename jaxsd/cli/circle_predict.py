"""What do laws and calibration say of a draft, with which interval, and how far is that off?

Two predictions of every speed-up. From sizes: parameters, shape and training tokens give the
perplexity, this the acceptance by position, and with it the tokens of a round; the calibration
gives its seconds. Given acceptance: the tokens of a round are those that the two models' laws give
over texts of the target, without a speculative loop.

    ln speedup = ln tokens + ln(seconds of a plain round / seconds of the round)

Beside the first stand two that know less: one alpha for all places of a round, and rounds that are
no more than their passes.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsd import costmodel

from . import circle_times
from .circle_laws import FittedLaws, Row, predict_loss, tokens_of_round
from .circle_measure import temperature_name
from .circle_plan import Plan
from .circle_times import Error
from .compile_check import shape_of

COVERAGE = 0.9


class Predicted(NamedTuple):
    """A draft, predicted from its sizes."""

    loss: float
    perplexity: float
    tokens: np.ndarray  # [lengths] of a round
    tokens_by_alpha: np.ndarray  # [lengths] the same, as if accepted independently
    tokens_error: np.ndarray  # [lengths] standard deviation of ln tokens


def predict_draft(plan: Plan, laws: FittedLaws, row: Row) -> Predicted:
    """Perplexity and tokens of a round at the first temperature, from sizes and training tokens."""
    name = temperature_name(plan.temperatures[0])
    loss = predict_loss(laws.loss.law, row)
    position, alpha = laws.position[name].law, laws.alpha[name].law
    tokens = tokens_of_round(plan, position, math.exp(loss))
    # How tokens move with the loss, times how well the loss is known.
    step = max(laws.loss.error, 1e-4)
    ends = [np.log(tokens_of_round(plan, position, math.exp(loss + x))) for x in (-step, step)]
    slope = (ends[1] - ends[0]) / (2 * step)
    one = costmodel.acceptance(alpha, math.exp(loss), laws.target_perplexity)
    by_alpha = [float(costmodel.expected_tokens(one, length)) for length in plan.lengths]
    return Predicted(
        loss=loss,
        perplexity=math.exp(loss),
        tokens=tokens,
        tokens_by_alpha=np.array(by_alpha),
        tokens_error=np.hypot(slope * laws.loss.error, laws.token_errors[name]),
    )


PARTS = ("target", "own", "draft", "switch")
"""Of a round: the target's pass, what the loop does beside passes, the draft's passes over the
tokens it drafts, and what it takes to come back to the draft."""


def predict_rounds(
    plan: Plan, calibration: circle_times.Calibration, config: Any
) -> dict[int, dict[str, Any]]:
    """Seconds of rounds with a draft of a config, by batch: plain, and by length in parts."""
    shape = shape_of(config)
    found: dict[int, dict[str, Any]] = {}
    for batch in plan.batches:
        times = circle_times.round_times(calibration, shape, batch)
        lengths = np.array(plan.lengths, np.float64)
        seconds = circle_times.round_seconds(times, batch, lengths)
        side = np.array(
            [circle_times.table_seconds(times.target_pass, batch, k + 1, 0.0) for k in plan.lengths]
        )
        alone = np.array(
            [
                circle_times.table_seconds(calibration.target, batch, k + 1, plan.context)
                for k in plan.lengths
            ]
        )
        one, two = (
            circle_times.draft_seconds(calibration, shape, batch, rows)
            for rows in circle_times.DRAFT_ROWS
        )
        draft = lengths * one
        found[batch] = {
            "plain": float(circle_times.round_seconds(times, batch, 0.0)),
            "seconds": seconds,
            # Timed apart, and by noise sometimes longer than the round that it is a part of.
            "target": np.minimum(alone, side),
            "own": side - np.minimum(alone, side),
            "draft": draft,
            # A difference of sums in 32 bits, where it takes nothing.
            "switch": np.maximum(seconds - draft - side, 0.0),
            # What a round would take if it were its passes, as they were timed apart.
            "plain_of_passes": circle_times.table_seconds(
                calibration.target, batch, 1, plan.context
            ),
            "seconds_of_passes": alone + draft + max(two - one, 0.0),
        }
    return found


def compare_member(
    plan: Plan,
    laws: FittedLaws,
    calibration: circle_times.Calibration,
    row: Row,
    config: Any,
    measured: Row,
) -> dict[str, Any]:
    """A draft's predictions beside its measurements; JSON values."""
    predicted = predict_draft(plan, laws, row)
    rounds = predict_rounds(plan, calibration, config)
    name = temperature_name(plan.temperatures[0])
    points = []
    for batch in plan.batches:
        speed = measured["speed"][str(batch)]
        for index, length in enumerate(plan.lengths):
            one = speed["by_length"][index]
            known = rounds[batch]
            times = known["plain"] / float(known["seconds"][index])
            by_passes = known["plain_of_passes"] / float(known["seconds_of_passes"][index])
            exact = measured["tokens"][name][index]
            from_sizes = float(predicted.tokens[index] * times)
            # The measurement is off too, and its error is no fault of the prediction.
            known_to = Error(one["relative_error"], one["readings"] - 1)
            errors = [calibration.error, known_to]
            of_laws = Error(float(predicted.tokens_error[index]), laws.num_shapes - 1)
            points.append(
                {
                    "batch": batch,
                    "length": length,
                    "measured": one["speedup"],
                    "measured_error": one["relative_error"],
                    "from_sizes": from_sizes,
                    "from_sizes_interval": interval(from_sizes, [of_laws, *errors]),
                    "given_acceptance": exact * times,
                    "given_acceptance_interval": interval(exact * times, errors),
                    "by_one_alpha": float(predicted.tokens_by_alpha[index] * times),
                    "by_passes": float(predicted.tokens[index] * by_passes),
                    "tokens": {
                        "from_sizes": float(predicted.tokens[index]),
                        "of_texts": exact,
                        "measured": one["tokens"],
                    },
                    "round_seconds": {
                        "predicted": float(known["seconds"][index]),
                        "measured": one["round_seconds"],
                    },
                    "plain_seconds": {
                        "predicted": known["plain"],
                        "measured": speed["plain_round_seconds"],
                    },
                    "parts": {part: float(known[part][index]) for part in PARTS},
                }
            )
    reach = costmodel.t_quantile(0.5 + COVERAGE / 2, laws.num_shapes - 1) * laws.loss.error
    low, high = predicted.loss - reach, predicted.loss + reach
    return {
        "name": row["name"],
        "is_held_out": row["is_held_out"],
        "parameters_total": row["parameters_total"],
        "loss": {"predicted": predicted.loss, "low": low, "high": high, "measured": row["loss"]},
        "perplexity": {
            "predicted": predicted.perplexity,
            "low": math.exp(low),
            "high": math.exp(high),
            "measured": row["perplexity"],
        },
        "points": points,
        "best": {str(batch): _best(points, batch) for batch in plan.batches},
    }


def summarise(members: Sequence[Row]) -> dict[str, Any]:
    """Median and worst errors, coverage of the intervals, and where the errors come from."""
    points = [point for member in members for point in member["points"]]
    found: dict[str, Any] = {"num_members": len(members), "num_points": len(points)}
    if not points:
        return found
    for kind in ("from_sizes", "given_acceptance", "by_one_alpha", "by_passes"):
        errors = np.array([point[kind] / point["measured"] - 1 for point in points])
        found[kind] = _errors(errors)
        if f"{kind}_interval" in points[0]:
            inside = [
                low <= point["measured"] <= high
                for point in points
                for low, high in [point[f"{kind}_interval"]]
            ]
            found[kind]["coverage"] = float(np.mean(inside))
    found["parts"] = {
        "tokens from sizes": _errors(_relative(points, "tokens", "from_sizes")),
        "tokens of texts": _errors(_relative(points, "tokens", "of_texts")),
        "round seconds": _errors(_relative(points, "round_seconds", "predicted")),
        "plain seconds": _errors(_relative(points, "plain_seconds", "predicted")),
    }
    found["loss"] = _errors(
        np.array([one["loss"]["predicted"] / one["loss"]["measured"] - 1 for one in members])
    )
    found["perplexity"] = _errors(
        np.array(
            [one["perplexity"]["predicted"] / one["perplexity"]["measured"] - 1 for one in members]
        )
    )
    batches = list(members[0]["best"])
    found["best_length"] = {
        batch: {
            "within_one": float(
                np.mean(
                    [
                        abs(one["best"][batch]["predicted"] - one["best"][batch]["measured"]) <= 1
                        for one in members
                    ]
                )
            ),
            "median_loss": float(np.median([one["best"][batch]["loss"] for one in members])),
        }
        for batch in batches
    }
    found["best_member"] = {batch: _best_member(members, batch) for batch in batches}
    return found


def _best(points: Sequence[Row], batch: int) -> dict[str, Any]:
    """The best length as predicted from sizes, as measured, and what the first loses."""
    mine = [point for point in points if point["batch"] == batch]
    predicted = max(mine, key=lambda point: point["from_sizes"])
    measured = max(mine, key=lambda point: point["measured"])
    return {
        "predicted": predicted["length"],
        "measured": measured["length"],
        "predicted_speedup": predicted["from_sizes"],
        "predicted_interval": predicted["from_sizes_interval"],
        "measured_speedup": measured["measured"],
        "measured_at_predicted": predicted["measured"],
        "loss": 1 - predicted["measured"] / measured["measured"],
    }


def _best_member(members: Sequence[Row], batch: str) -> dict[str, Any]:
    """Which of some drafts is predicted to be the fastest, which is, and what the choice loses."""
    predicted = max(members, key=lambda one: one["best"][batch]["predicted_speedup"])
    measured = max(members, key=lambda one: one["best"][batch]["measured_speedup"])
    reached = predicted["best"][batch]["measured_at_predicted"]
    return {
        "predicted": predicted["name"],
        "measured": measured["name"],
        "loss": 1 - reached / measured["best"][batch]["measured_speedup"],
    }


def interval(value: float, errors: Sequence[Error]) -> list[float]:
    """Bounds between which a positive value lies with a probability of `COVERAGE`.

    Its logarithm is off by independent errors of zero mean, each with a standard deviation s_i that
    is itself an estimate, of n_i degrees of freedom. Their sum over its estimated deviation follows
    about Student's t of (sum s_i^2)^2 / sum(s_i^4 / n_i) degrees (Welch, Biometrika 34, 1947).

    >>> [round(x, 3) for x in interval(1.0, [Error(0.03, 4), Error(0.04, 10**6)])]
    [0.919, 1.089]
    """
    squares = np.square([error.value for error in errors])
    total = float(squares.sum())
    if total == 0:
        return [value, value]
    spread = float(np.sum(squares**2 / np.array([max(error.degrees, 1) for error in errors])))
    reach = costmodel.t_quantile(0.5 + COVERAGE / 2, int(total**2 / spread)) * math.sqrt(total)
    return [value * math.exp(-reach), value * math.exp(reach)]


def _relative(points: Sequence[Row], quantity: str, kind: str) -> np.ndarray:
    return np.array([point[quantity][kind] / point[quantity]["measured"] - 1 for point in points])


def _errors(errors: np.ndarray) -> dict[str, float]:
    """Of relative errors."""
    return {
        "median": float(np.median(np.abs(errors))),
        "worst": float(np.max(np.abs(errors))),
        "mean": float(np.mean(errors)),
    }
