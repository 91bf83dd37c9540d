"""Which draft do the fitted laws and this device's times ask for, within the family's budget?

A gradient search over width, depth, training tokens and draft length for one sequence, under the
training FLOPs of the family's most expensive member; then whole heads and layers. It knows the
times as a formula of the shape, which can be differentiated; the draft length is then the one that
the calibrated table of rounds makes fastest.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsd import costmodel

from . import circle_times
from .circle_laws import FittedLaws, Row
from .circle_measure import temperature_name
from .circle_plan import Member, Plan, config_of
from .circle_predict import predict_draft, predict_rounds
from .compile_check import shape_of

BATCH = 1


def training_budget(plan: Plan, vocab_size: int, family: Sequence[Row]) -> float:
    """FLOPs of the family's most expensive member."""
    return max(_training_flops(plan, vocab_size, row) for row in family)


def design(
    plan: Plan,
    laws: FittedLaws,
    calibration: circle_times.Calibration,
    target_config: Any,
    target_tokens: float,
    family: Sequence[Row],
) -> dict[str, Any]:
    """Searches, rounds, and says what is predicted of the result; JSON values."""
    name = temperature_name(plan.temperatures[0])
    budget = training_budget(plan, target_config.vocab_size, family)
    hardware = costmodel.Hardware(
        costmodel.Devices(calibration.chip, calibration.target_stacks[BATCH]),
        costmodel.Devices(calibration.chip, calibration.stacks[BATCH, 1]),
    )
    template = costmodel.draft_template(
        shape_of(target_config),
        tokens=max(row["training_tokens"] for row in family),
        d_model=plan.max_width,
        n_layers=2,
        head_dim=plan.head_dim,
        group=plan.max_width // plan.head_dim,  # one key and value head, at any width
        ff_ratio=10 / 3,
        formats=circle_times.FORMATS,
    )
    widths = [row["d_model"] for row in family]
    tokens = [row["training_tokens"] for row in family]
    target = costmodel.Target(shape_of(target_config), target_tokens, circle_times.FORMATS)
    # Without a loss law that knows width from depth, every depth is asked for its own width.
    knows_shapes = (
        isinstance(laws.loss.law, costmodel.ShapeLossLaw)
        or getattr(laws.loss.law, "aspect_exponent", 0.0) > 0
    )
    free = {
        "d_model": (float(min(widths)), float(plan.max_width)),
        "tokens": (float(min(tokens)), 2.0 * max(tokens)),
        "gamma": (1.0, float(max(plan.lengths))),
    }
    depths = [float(plan.max_layers)]
    if knows_shapes:
        free["n_layers"] = (1.0, float(plan.max_layers))
    else:
        depths = [float(depth) for depth in range(1, plan.max_layers + 1)]
    result = costmodel.search(
        target,
        hardware,
        [
            template._replace(shape=template.shape._replace(n_layers=depth))
            for depth in ([2.0] if knows_shapes else depths)
        ],
        free,
        workload=costmodel.Workload(
            batch=BATCH, context=plan.context, prompt=plan.prompt_length, max_context=plan.max_len
        ),
        laws=costmodel.Laws(laws.loss.law, laws.position[name].law),
        limits=costmodel.Limits(training_flops=budget),
        objective="speedup",
        width_multiple=plan.head_dim,
    )
    best = result.best
    found = best.design
    member = designed_member(plan, found)
    row = sizes_of(plan, member, target_config.vocab_size)
    config = member_config(plan, member, target_config.vocab_size)
    predicted = predict_draft(plan, laws, row)
    rounds = predict_rounds(plan, calibration, config)
    speedups = {
        str(batch): (predicted.tokens * rounds[batch]["plain"] / rounds[batch]["seconds"]).tolist()
        for batch in plan.batches
    }
    chosen = int(plan.lengths[int(np.argmax(speedups[str(BATCH)]))])
    return {
        "batch": BATCH,
        "training_flops_limit": budget,
        "training_flops": _training_flops(plan, target_config.vocab_size, row),
        "searched": {key: list(bounds) for key, bounds in free.items()},
        "continuous": best.continuous,
        "formula": {
            "gamma": float(found.gamma),
            "speedup": float(best.estimate.speedup),
            "rounding_loss": best.rounding_loss,
            "at_bound": list(result.at_bound),
            "plain": best.plain,
        },
        "member": member._asdict(),
        "row": row,
        "length": chosen,
        "loss": predicted.loss,
        "perplexity": predicted.perplexity,
        "tokens": predicted.tokens.tolist(),
        "speedups": speedups,
    }


def designed_member(plan: Plan, found: costmodel.Design) -> Member:
    """A shape that can be built, and as many whole steps as the search gave it tokens."""
    width = max(plan.head_dim, round(float(found.shape.d_model) / plan.head_dim) * plan.head_dim)
    layers = max(1, round(float(found.shape.n_layers)))
    per_step = plan.batch_size * plan.sequence_length
    steps = max(2, int(float(found.tokens) // per_step))
    return plan.member(width, layers, steps)._replace(is_held_out=True)


def sizes_of(plan: Plan, member: Member, vocab_size: int) -> dict[str, Any]:
    """What the laws are asked of a draft that is not trained yet."""
    from jaxsd import models

    config = member_config(plan, member, vocab_size)
    total = models.num_parameters(config)
    return {
        "name": member.name,
        "d_model": member.d_model,
        "n_layers": member.n_layers,
        "is_held_out": True,
        "parameters_total": total,
        "parameters_non_embedding": total - vocab_size * member.d_model,
        "training_tokens": member.tokens,
    }


def member_config(plan: Plan, member: Member, vocab_size: int) -> Any:
    """The `models.Config` of a member."""
    return config_of(plan, vocab_size, member.d_model, member.n_layers)


def curve(
    plan: Plan,
    laws: FittedLaws,
    calibration: circle_times.Calibration,
    vocab_size: int,
    tokens: int,
    layers: int,
) -> list[dict[str, float]]:
    """Predicted best speed-up of one sequence by width, at a depth and a number of tokens."""
    points = []
    for width in range(plan.head_dim, plan.max_width + 1, plan.head_dim):
        member = plan.member(width, layers, 2)._replace(tokens=tokens)
        row = sizes_of(plan, member, vocab_size)
        predicted = predict_draft(plan, laws, row)
        rounds = predict_rounds(plan, calibration, member_config(plan, member, vocab_size))
        speedups = predicted.tokens * rounds[BATCH]["plain"] / rounds[BATCH]["seconds"]
        best = int(np.argmax(speedups))
        points.append(
            {
                "d_model": width,
                "parameters_total": row["parameters_total"],
                "speedup": float(speedups[best]),
                "length": plan.lengths[best],
            }
        )
    return points


def _training_flops(plan: Plan, vocab_size: int, row: Row) -> float:
    """As the cost model counts them."""
    config = config_of(plan, vocab_size, row["d_model"], row["n_layers"])
    return float(costmodel.training_flops(shape_of(config), float(row["training_tokens"])))
