"""`jaxsd circle`: predict drafts before they are trained, train them, measure, and compare."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import jax
import tyro

if TYPE_CHECKING:
    from .circle_laws import FittedLaws
    from .circle_plan import Member, Plan
    from .circle_study import Study

FAMILY = "family"

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

    Everything is in one folder: times of passes on this device, the trained drafts, the laws, the
    designed draft, what was measured of each, the predictions beside it, and a report with figures.
    It can be killed at any time: the same command goes on where it was. Needs the extra `plot` for
    the figures. `small` is meant for two to three hours of two cores.

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
      ValueError: an argument is wrong, matplotlib is not installed, or the folder holds another
        study, in one line.
    """
    from . import reproduction
    from .circle_plan import BUDGETS, EMBEDDED
    from .circle_study import Study

    reproduction.require_matplotlib()
    plan = dataclasses.replace(BUDGETS[device_budget], seed=seed)
    if target != EMBEDDED:
        plan = dataclasses.replace(plan, target_config=None, target_steps=0)
    return run(plan, Study(pathlib.Path(out), progress), target, corpus)


class Work(NamedTuple):
    """What every stage needs."""

    plan: "Plan"
    study: "Study"
    asked: dict[str, Any]  # plan, target and corpus, as JSON
    folder: pathlib.Path  # of the target
    target: Any  # checkpoint.Pretrained
    text: Any  # circle_family.Text
    base: dict[str, Any]  # what all stages are made from


def run(plan: "Plan", study: "Study", target: str, corpus: str | None) -> dict[str, Any]:
    """All stages of a plan, those that are done already excepted.

    Nothing is decoded with a trained draft before all that is predicted is fixed: the calibration,
    the laws, which take the losses and the acceptance of texts, and the designed draft.

    Raises:
      ValueError: the folder holds a study of another plan, or of another device.
    """
    from . import circle_family, circle_laws, circle_measure, circle_report, circle_times

    work = prepare(plan, study, target, corpus)
    about_target = study.stage(
        "texts",
        work.base,
        lambda: {
            "loss": circle_family.held_out_loss(work.target, work.text.windows),
            **circle_measure.write_texts(plan, work.target, work.text.prompts),
        },
    )
    family = [train(work, member) for member in plan.members]
    read: dict[str, Any] = {}
    for shape in dict.fromkeys(member.shape_name for member in plan.members):
        rows = [row for row in family if row["name"].startswith(f"{shape}-")]
        read |= read_acceptance(work, shape, rows, about_target)
    laws = circle_laws.fit_laws(plan, family, read, about_target["loss"])
    # Not before the hours of training: a device drifts.
    timed = study.stage(
        "times", work.base, lambda: circle_times.calibrate(plan, study, work.target)
    )
    designed, row = design(work, timed, about_target, family, read, laws)
    drafts = list(family)
    if row not in drafts:
        drafts.append(row)
        read |= read_acceptance(work, f"design-{row['name']}", [row], about_target)
    measured, timed_again = measure(work, drafts, read)
    result = circle_report.assemble(
        work, timed, timed_again, about_target, family, read | measured, laws, designed, row
    )
    circle_report.write(study.folder, result)
    circle_report.show(result)
    return result


def prepare(plan: "Plan", study: "Study", target: str, corpus: str | None) -> Work:
    """Claims the folder, and reads or trains the target.

    Raises:
      ValueError: the folder holds another study, or target or corpus cannot be read.
    """
    from jaxsd.models import checkpoint

    from . import circle_family, info, pair
    from .circle_plan import EMBEDDED
    from .circle_study import PLAN_STAGE

    asked = {"plan": plan.to_dict(), "target": target, "corpus": corpus}
    device = info.describe_device()
    claim(study, asked, device)
    study.expect(_weights(plan))
    folder = pair.EMBEDDED_TARGET if target == EMBEDDED else pathlib.Path(target)
    if plan.target_config is not None:
        out = study.folder / "target"
        trained = study.stage(
            "target",
            asked,
            lambda: {"folder": str(circle_family.train_target(plan, out, corpus))},
        )
        folder = pathlib.Path(trained["folder"])
    loaded = checkpoint.load_model(folder)
    text = circle_family.read_text(plan, corpus, loaded.tokenizer)
    # Only now: what cannot be read does not take the folder for itself.
    members = [member._asdict() | {"name": member.name} for member in plan.members]
    study.stage(PLAN_STAGE, asked, lambda: {**asked, "device": device, "members": members})
    base = {**asked, "device": device, "text": text.tokens.fingerprint}
    return Work(plan, study, asked, folder, loaded, text, base)


def train(work: Work, member: "Member") -> dict[str, Any]:
    """A member of the family, as `circle_family.train_member` returns it."""
    from . import circle_family

    out = work.study.folder / FAMILY / member.name
    return work.study.stage(
        f"{FAMILY}/{member.name}",
        [work.base, member._asdict()],
        lambda: circle_family.train_member(
            work.plan, member, out, str(work.folder), work.target, work.text
        ),
    )


def measure(
    work: Work, rows: Sequence[dict[str, Any]], read: dict[str, dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Everything that is known of drafts by their names, and the calibration of the same turns.

    Where not all drafts can take turns there is no such calibration.
    """
    from . import circle_measure
    from .circle_plan import shape_name

    plan, study = work.plan, work.study
    temperature = circle_measure.temperature_name(plan.temperatures[0])
    groups = circle_measure.in_groups(plan, rows)
    if len(groups) > 1:
        study.say(
            f"  a process may not hold the programs of all drafts here: {len(groups)} groups are "
            "measured one after the other; with a larger vm.max_map_count all would take turns"
        )
    found: dict[str, Any] = {}
    timed_again = None
    for group in groups:
        names = [row["name"] for row in group]
        rounds = {
            name: [plan.new_tokens / tokens for tokens in read[name]["tokens"][temperature]]
            for name in names
        }
        drafts = _load(work, group)
        bench = circle_measure.Bench(
            plan, study, work.target, drafts, rounds, work.text.prompts, len(groups) == 1
        )
        made_from = [work.base, group, rounds]
        label = shape_name(group[0]["d_model"], group[0]["n_layers"])
        before, after = ("", "") if len(groups) == 1 else (f"{label}-", f"/{label}")
        turns = [
            study.stage(f"turns/{before}{number}", made_from, functools.partial(bench.turn, number))
            for number in range(bench.num_turns)
        ]
        loops = study.stage(f"loops{after}", made_from, bench.accept)
        speeds, timed_again = circle_measure.summarise_turns(plan, bench, turns)
        found |= {
            name: {**read[name], "speed": speeds[name], "loop": loops[name]} for name in names
        }
        del bench
        jax.clear_caches()  # programs of one group are of no use to the next
    return found, timed_again


def design(
    work: Work,
    timed: dict[str, Any],
    about_target: dict[str, Any],
    family: Sequence[dict[str, Any]],
    read: dict[str, Any],
    laws: "FittedLaws",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The draft that laws and calibration ask for, and what its training gave."""
    from . import circle_design, circle_times
    from .circle_plan import Member

    calibration = circle_times.fit_times(work.plan, timed)
    designed = work.study.stage(
        "design",
        [work.base, timed, about_target, list(family), read],
        lambda: circle_design.design(
            work.plan,
            laws,
            calibration,
            work.target.config,
            target_tokens(work.folder, family),
            family,
        ),
    )
    member = Member(**designed["member"])
    there = [row for row in family if row["name"] == member.name]
    return designed, there[0] if there else train(work, member)


def read_acceptance(
    work: Work, name: str, rows: Sequence[dict[str, Any]], about_target: dict[str, Any]
) -> dict[str, Any]:
    """The acceptance of trained members of one shape, by their names; nothing in it is timed."""
    from . import circle_measure

    def make() -> dict[str, Any]:
        found = circle_measure.read_shape(
            work.plan, work.target, _load(work, rows), work.text.windows, about_target["texts"]
        )
        jax.clear_caches()
        return found

    return work.study.stage(f"acceptance/{name}", [work.base, list(rows), about_target], make)


def _load(work: Work, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Trained members, by their names."""
    from jaxsd.models import checkpoint

    family = work.study.folder / FAMILY
    return {row["name"]: checkpoint.load_model(family / row["name"] / "model") for row in rows}


def target_tokens(folder: pathlib.Path, family: Sequence[dict[str, Any]]) -> float:
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


def claim(study: "Study", asked: dict[str, Any], device: str) -> None:
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


def _weights(plan: "Plan") -> dict[str, float]:
    """About how long every stage takes, in seconds of two cores; only their ratios matter."""
    weights = {"times": 700.0, "texts": 30.0, "design": 60.0, "loops": 240.0}
    weights |= {f"turns/{number}": 200.0 for number in range(plan.repeats)}
    weights["turns/0"] += 1900.0  # compiling
    if plan.target_config is not None:
        weights["target"] = 30.0 * plan.target_steps
    for member in plan.members:
        per_token = 2e-5 + 1.5e-10 * 12 * member.d_model**2 * member.n_layers
        weights[f"family/{member.name}"] = 15 + member.tokens * per_token
        weights[f"acceptance/{member.shape_name}"] = 100.0
    return weights
