"""`jaxsd circle`: predict drafts before they are trained, train them, measure, and compare."""

import dataclasses
import json
import pathlib
from typing import Annotated, Any, Literal

import jax
import tyro

Folder = Annotated[str | None, tyro.conf.arg(metavar="DIR")]


def circle(
    out: Annotated[str, tyro.conf.arg(metavar="DIR")],
    device_budget: Literal["smoke", "small", "medium", "large"] = "small",
    target: Annotated[str, tyro.conf.arg(metavar="embedded|DIR")] = "embedded",
    corpus: Folder = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains a family of drafts, fits the laws to a part of it, predicts the rest, and designs one.

    Everything is in one folder: times of passes on this device, the trained drafts, what was
    measured of each, the laws, the predictions beside the measurements, the designed draft, and a
    report with figures. It can be killed at any time: the same command goes on where it was.
    Needs the extra `plot` for the figures. On two cores `small` takes about two hours.

    Args:
      out: folder of the study.
      device_budget: smoke (minutes, to see that all works; its figures mean nothing), small (hours
        on two cores, with the package's own target), medium (an accelerator and about an hour; a
        target of 120 million parameters is trained first) or large (many hours of one).
      target: folder of a target, in place of that of the budget.
      corpus: folder of text to train and measure on; by default Python's standard library.
      seed: of all random choices.
      progress: a line for every stage, on stderr.

    Returns:
      The report; JSON values.

    Raises:
      ValueError: an argument is wrong, or the folder holds another study, in one line.
    """
    from .circle_plan import BUDGETS, EMBEDDED
    from .circle_study import Study

    plan = dataclasses.replace(BUDGETS[device_budget], seed=seed)
    if target != EMBEDDED:
        plan = dataclasses.replace(plan, target_config=None, target_steps=0)
    return run(plan, Study(pathlib.Path(out), progress), target, corpus)


def run(plan: Any, study: Any, target: str, corpus: str | None) -> dict[str, Any]:
    """All stages of a plan, those that are done already excepted.

    Raises:
      ValueError: the folder holds a study of another plan, or of another device.
    """
    from jaxsd.models import checkpoint

    from . import (
        circle_design,
        circle_family,
        circle_laws,
        circle_measure,
        circle_plan,
        circle_predict,
        circle_report,
        circle_times,
        info,
        pair,
    )
    from .circle_plan import EMBEDDED, Member
    from .circle_study import PLAN_STAGE

    asked = {"plan": plan.to_dict(), "target": target, "corpus": corpus}
    device = info.describe_device()
    claim(study, asked, device)
    study.stage(
        PLAN_STAGE,
        asked,
        lambda: {
            **asked,
            "device": device,
            "members": [member._asdict() | {"name": member.name} for member in plan.members],
        },
    )
    study.expect(_weights(plan))

    folder = pair.EMBEDDED_TARGET if target == EMBEDDED else pathlib.Path(target)
    if plan.target_config is not None:
        trained = study.stage(
            "target",
            asked,
            lambda: {
                "folder": str(circle_family.train_target(plan, study.folder / "target", corpus))
            },
        )
        folder = pathlib.Path(trained["folder"])
    loaded = checkpoint.load_model(folder)
    text = circle_family.read_text(plan, corpus, loaded.tokenizer)
    base = {**asked, "device": device, "text": text.tokens.fingerprint}
    timed = study.stage("times", base, lambda: circle_times.calibrate(plan, study, loaded))
    about_target = study.stage(
        "texts",
        base,
        lambda: {
            "loss": circle_family.held_out_loss(loaded, text.windows),
            **circle_measure.write_texts(plan, loaded, text.prompts),
        },
    )

    def train(member: Member) -> dict[str, Any]:
        out = study.folder / "family" / member.name
        return study.stage(
            f"family/{member.name}",
            [base, member._asdict()],
            lambda: circle_family.train_member(
                plan, member, out, str(folder), loaded, text, show_progress=False
            ),
        )

    def measure(name: str, members: list[Member]) -> dict[str, Any]:
        rows = {member.name: train(member) for member in members}

        def make() -> dict[str, Any]:
            drafts = {
                one: checkpoint.load_model(study.folder / "family" / one / "model") for one in rows
            }
            found = circle_measure.measure_shape(
                plan, study, loaded, drafts, text.prompts, text.windows, about_target["texts"]
            )
            jax.clear_caches()
            return found

        return study.stage(f"measured/{name}", [base, rows, about_target], make)

    family = [train(member) for member in plan.members]
    by_shape: dict[str, list[Member]] = {}
    for member in plan.members:
        by_shape.setdefault(member.shape_name, []).append(member)
    measured = {
        name: one
        for shape, members in by_shape.items()
        for name, one in measure(shape, members).items()
    }

    calibration = circle_times.fit_times(plan, timed)
    laws = circle_laws.fit_laws(plan, family, measured, about_target["loss"])
    configs = {
        row["name"]: circle_plan.config_of(
            plan, loaded.config.vocab_size, row["d_model"], row["n_layers"]
        )
        for row in family
    }
    compared = [
        circle_predict.compare_member(
            plan, laws, calibration, row, configs[row["name"]], measured[row["name"]]
        )
        for row in family
    ]
    upstream = [base, timed, about_target, family, measured]
    designed = study.stage(
        "design",
        upstream,
        lambda: circle_design.design(
            plan,
            laws,
            calibration,
            loaded.config,
            target_tokens(folder, family),
            family,
        ),
    )
    member = Member(**designed["member"])
    trained = {one.name: one for one in plan.members}
    if member.name in trained:
        own, row = measured[member.name], train(trained[member.name])
    else:
        own, row = measure(f"design-{member.name}", [member])[member.name], train(member)
    config = circle_plan.config_of(plan, loaded.config.vocab_size, *member[:2])
    about_design = circle_predict.compare_member(plan, laws, calibration, row, config, own)
    result = circle_report.assemble(
        plan,
        study,
        asked,
        loaded,
        timed,
        calibration,
        about_target,
        family,
        measured,
        laws,
        compared,
        designed,
        about_design,
    )
    circle_report.write(study.folder, result)
    circle_report.show(result)
    return result


def target_tokens(folder: pathlib.Path, family: Any) -> float:
    """Tokens the target was trained on, as its folder says; it moves no speed-up of this target.

    The law from perplexity to acceptance was fitted to drafts of this one target, so that the
    target's own perplexity plays no part in the search.
    """
    from jaxsd.models import checkpoint

    content = json.loads((folder / checkpoint.CONFIG_FILE).read_text(encoding="utf-8"))
    training = content.get("metadata", {}).get("training", {})
    sizes = [training.get(name) for name in ("steps", "batch_size", "sequence_length")]
    if all(isinstance(size, int) for size in sizes):
        return float(sizes[0] * sizes[1] * sizes[2])
    return float(max(row["training_tokens"] for row in family))


def claim(study: Any, asked: dict[str, Any], device: str) -> None:
    """Refuses a folder that holds another study, or one of another device.

    Raises:
      ValueError: says which.
    """
    from .circle_study import PLAN_STAGE, read

    found = read(study.path(PLAN_STAGE))
    if found is None:
        return
    there = found["result"]
    # As JSON has it: a tuple is a list there.
    wanted = json.loads(json.dumps(asked))
    differing = [name for name in wanted if there.get(name) != wanted[name]]
    if "plan" in differing:
        names = [key for key in wanted["plan"] if there["plan"].get(key) != wanted["plan"][key]]
        differing[differing.index("plan")] = ", ".join(names)
    if differing:
        raise ValueError(
            f"out={str(study.folder)!r} holds a study with another {', '.join(differing)}: "
            "choose another folder, or repeat that study's command"
        )
    if there["device"] != device:
        raise ValueError(
            f"out={str(study.folder)!r} holds a study of {there['device']}, this is {device}: "
            "times of two devices do not mix"
        )


def _weights(plan: Any) -> dict[str, float]:
    """About how long every stage takes, in seconds of two cores; only their ratios matter."""
    weights = {"times": 400.0, "texts": 30.0}
    if plan.target_config is not None:
        weights["target"] = 30.0 * plan.target_steps
    for member in plan.members:
        per_token = 2e-5 + 1.5e-10 * 12 * member.d_model**2 * member.n_layers
        weights[f"family/{member.name}"] = 15 + member.tokens * per_token
        weights[f"measured/{member.shape_name}"] = 300.0
    return weights
