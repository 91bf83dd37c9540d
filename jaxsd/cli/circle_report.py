"""What a study found: everything as JSON, and its files."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import rich.console

from jaxsd import costmodel, models

from . import (
    circle_design,
    circle_figures,
    circle_laws,
    circle_page,
    circle_predict,
    circle_times,
    reproduction,
)
from .circle_laws import FittedLaws, Row
from .circle_measure import temperature_name
from .circle_plan import Plan, config_of
from .circle_study import PLAN_STAGE, read
from .circle_study import write as write_json

if TYPE_CHECKING:
    from .circle import Work

REPORT_JSON, REPORT_PAGE = "report.json", "report.md"


def assemble(
    work: "Work",
    timed: Row,
    timed_again: Row | None,
    about_target: Row,
    family: Sequence[Row],
    measured: Mapping[str, Row],
    laws: FittedLaws,
    designed: Row,
    design_row: Row,
) -> dict[str, Any]:
    """The whole report; JSON values, the same whenever it is made of the same stages.

    Args:
      work: plan, folder and target.
      timed: the calibration of the stage `times`.
      timed_again: that of the turns in which drafts were measured, without the device's speeds;
        None if it took no turns, and predictions rest on the first.
      about_target: its loss and texts.
      family: rows of the members.
      measured: all that was measured of them and of the designed draft, by name.
      laws: fitted.
      designed: from `circle_design.design`.
      design_row: of the designed draft.
    """
    plan, study, target = work.plan, work.study, work.target
    last = {**timed, **(timed_again or {})}
    before, calibration = (circle_times.fit_times(plan, one) for one in (timed, last))

    def compare(row: Row, times: circle_times.Calibration) -> dict[str, Any]:
        shape = row["d_model"], row["n_layers"]
        config = config_of(plan, target.config.vocab_size, *shape)
        return circle_predict.compare_member(plan, laws, times, row, config, measured[row["name"]])

    compared = [compare(row, calibration) for row in family]
    early = [compare(row, before) for row in family if row["is_held_out"]]
    first = read(study.path(PLAN_STAGE)) or {}
    held_out = [one for one in compared if one["is_held_out"]]
    fitted = [one for one in compared if not one["is_held_out"]]
    return {
        "command": command(work.asked),
        "device": first.get("device"),
        "date": first.get("date"),
        "versions": first.get("versions"),
        "seconds": study.seconds,
        "plan": plan.to_dict(),
        "target": {
            "name": work.asked["target"] if plan.target_config is None else plan.target_config,
            "parameters": models.num_parameters(target.config),
            "loss": about_target["loss"],
            "perplexity": math.exp(about_target["loss"]),
        },
        "calibration": {
            "bytes_per_second": timed["bytes_per_second"],
            "flops_per_second": timed["flops_per_second"],
            "num_passes": len(timed["passes"]),
            "held_out": circle_times.held_out_errors(plan, last),
            "in_the_same_turns": timed_again is not None,
            "timed_twice": timed_twice(plan, timed_again, measured),
            "round_error": calibration.error.value,
            "rounds": _describe_rounds(calibration),
            "rounds_before": _describe_rounds(before),
            "draft_stacks": [
                {"batch": batch, "rows": rows, **jax.tree.map(float, one._asdict())}
                for (batch, rows), one in calibration.stacks.items()
            ],
        },
        "family": [dict(row) for row in family],
        "measured": {name: _brief(one) for name, one in measured.items()},
        "laws": _describe_laws(plan, laws, family, measured),
        "published": circle_laws.published_comparison(
            family, measured, about_target["loss"], plan.temperatures[0]
        ),
        "independence": circle_laws.independence(
            plan, {row["name"]: measured[row["name"]] for row in family}
        ),
        "along_the_way": circle_laws.along_the_way(laws, family),
        "members": compared,
        "held_out": circle_predict.summarise(held_out),
        "held_out_by_times_before": circle_predict.summarise(early),
        "fitted": circle_predict.summarise(fitted),
        "curves": {
            str(layers): circle_design.curve(
                plan,
                laws,
                calibration,
                target.config.vocab_size,
                max(member.tokens for member in plan.members),
                layers,
            )
            for layers in sorted({layers for _, layers in plan.shapes})
        },
        "design": judge_design(
            compared, designed, compare(design_row, before), compare(design_row, calibration)
        ),
    }


def timed_twice(
    plan: Plan, timed: Row | None, measured: Mapping[str, Row]
) -> dict[str, float | int] | None:
    """What timing alone does to a speed-up: rounds of one program that took their turns twice.

    The calibration's smallest draft and the members of its shape differ in their weights, which
    move no time. None if the family has no such shape, or the calibration took no turns.
    """
    if timed is None:
        return None
    seconds = {
        (one["batch"], one["length"], one["draft"]): one["seconds"] for one in timed["rounds"]
    }
    draft = timed["rounds"][0]["draft"]
    twin = next((name for name in measured if name.startswith(f"{draft}-")), None)
    if twin is None:
        return None
    errors = []
    for batch in plan.batches:
        speed = measured[twin]["speed"][str(batch)]
        for length, one in zip(plan.lengths, speed["by_length"], strict=True):
            there = one["round_seconds"] / speed["plain_round_seconds"]
            here = seconds[batch, length, draft] / seconds[batch, 0, draft]
            errors.append(abs(here / there - 1))
    return {"median": float(np.median(errors)), "worst": max(errors), "num": len(errors)}


def _describe_rounds(calibration: circle_times.Calibration) -> dict[str, Any]:
    """The target's side of rounds, and what every parameter of a draft adds, by batch."""
    return {
        str(batch): {
            "target_side": np.asarray(one.target_side.seconds).tolist(),
            "parameter": one.parameter,
            "replaced_lengths": list(one.replaced),
        }
        for batch, one in calibration.rounds.items()
    }


def command(asked: Mapping[str, Any]) -> str:
    """The command line of the study; its folder is the reader's."""
    plan = asked["plan"]
    parts = ["jaxsd circle --out DIR", f"--device-budget {plan['budget']}"]
    if asked["target"] != "embedded":
        parts.append(f"--target {asked['target']}")
    if asked["corpus"] is not None:
        parts.append(f"--corpus {asked['corpus']}")
    if plan["seed"]:
        parts.append(f"--seed {plan['seed']}")
    return " ".join(parts)


def judge_design(
    compared: Sequence[Row], designed: Row, about_design: Row, with_times_of_turns: Row
) -> dict[str, Any]:
    """The designed draft beside its prediction and beside the best of the family.

    What was predicted is what the calibration by which it was chosen gives; beside it stands what
    the calibration of the measurement's own turns gives.
    """
    batch = str(designed["batch"])
    own = about_design["best"][batch]
    best = max(compared, key=lambda one: one["best"][batch]["measured_speedup"])
    reached = best["best"][batch]["measured_speedup"]
    at_chosen, again = (
        next(
            point
            for point in about["points"]
            if str(point["batch"]) == batch and point["length"] == designed["length"]
        )
        for about in (about_design, with_times_of_turns)
    )
    return {
        **designed,
        "measured": about_design,
        "predicted_speedup": at_chosen["from_sizes"],
        "predicted_interval": at_chosen["from_sizes_interval"],
        "predicted_with_times_of_turns": again["from_sizes"],
        "measured_speedup": at_chosen["measured"],
        "best_length": own["measured"],
        "best_speedup": own["measured_speedup"],
        "best_of_family": best["name"],
        "best_of_family_speedup": reached,
        "best_of_family_length": best["best"][batch]["measured"],
        "relative_to_family": own["measured_speedup"] / reached - 1,
    }


def write(folder: pathlib.Path, result: Row) -> list[pathlib.Path]:
    """Writes report.json, report.md and every figure; returns the files.

    Raises:
      ValueError: matplotlib, the extra `plot`, is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / REPORT_JSON, result)
    files = [folder / REPORT_JSON]
    figures = circle_figures.figures(result)
    for figure in figures:
        files += reproduction.draw(figure.draw, folder / figure.name, figure.size, (".png",))
    page = folder / REPORT_PAGE
    page.write_text(circle_page.to_markdown(result, figures), encoding="utf-8")
    return [*files, page]


def show(result: Row) -> None:
    """The verdict, on the terminal."""
    console = rich.console.Console(highlight=False)
    for line in circle_page.verdict(result):
        console.print(line)


def _brief(one: Row) -> dict[str, Any]:
    """What was measured of a draft, without the timings, which stand beside their predictions."""
    return {name: value for name, value in one.items() if name != "speed"}


def _describe_laws(
    plan: Plan, laws: FittedLaws, family: Sequence[Row], measured: Mapping[str, Row]
) -> dict[str, Any]:
    """The laws, what they were chosen among, and points of their curves for the figures."""
    grid = np.geomspace(
        0.97 * min(row["perplexity"] for row in family),
        1.03 * max(row["perplexity"] for row in family),
        40,
    )
    curves = {}
    for temperature in plan.temperatures:
        name = temperature_name(temperature)
        law = laws.alpha[name].law
        curves[name] = {
            "perplexity": grid.tolist(),
            "alpha": [float(costmodel.acceptance(law, x, laws.target_perplexity)) for x in grid],
            "first_position": [
                float(costmodel.acceptance(laws.position[name].law, x, 1.0)) for x in grid
            ],
        }
    return {
        "fitted": [row["name"] for row in family if not row["is_held_out"]],
        "loss": {
            "error_nats": laws.loss.error,
            "candidates": laws.loss.candidates,
        },
        "alpha": {
            name: {"error": one.error, "candidates": one.candidates}
            for name, one in laws.alpha.items()
        },
        "position": {
            name: {
                **one.candidates[0],
                "errors_by_length": laws.token_errors[name].tolist(),
            }
            for name, one in laws.position.items()
        },
        "curves": curves,
    }


def load(folder: pathlib.Path) -> dict[str, Any]:
    """The report of a folder, as `write` wrote it."""
    return json.loads((folder / REPORT_JSON).read_text(encoding="utf-8"))
