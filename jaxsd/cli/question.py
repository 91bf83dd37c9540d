"""From the words of a command line to what the cost model is asked."""

import math
import pathlib
import typing
from typing import Any, Literal

from . import reproduction
from .quantity import format_quantity

Weights = Literal["bf16", "int8", "int4"]
LossLawName = Literal["besiroglu", "hoffmann", "shape-aware"]


def formats(weights: str) -> Any:
    """Bytes per number, by the name of the weights' format."""
    from jaxsd import costmodel

    return {"bf16": costmodel.BFLOAT16, "int8": costmodel.INT8, "int4": costmodel.INT4}[weights]


def several_formats(names: str) -> dict[str, Any]:
    """Bytes per number by name, of formats separated by commas."""
    known = typing.get_args(Weights)
    given = [name.strip() for name in names.split(",")]
    for name in given:
        if name not in known:
            raise ValueError(f"draft_weights={names!r} must be out of {', '.join(known)}")
    return {name: formats(name) for name in given}


def target(name: str, tokens: float | None, weights: Weights) -> Any:
    """A target of the catalogue. Its training tokens, if none are given, from there as well."""
    from jaxsd import costmodel

    shape = costmodel.named_shape(name)
    if tokens is None:
        tokens = costmodel.training_tokens(name)
        if tokens is None:
            raise ValueError(
                f"how many tokens {name} was trained on is not in the catalogue: "
                "give --target-tokens"
            )
    return costmodel.Target(shape, tokens, formats(weights))


def stack(name: str | None, chip: str, times: str | None) -> Any:
    """The software's efficiencies and overheads: named, fitted, or the usual one of the chip."""
    from jaxsd import costmodel

    if times is not None:
        if name is not None:
            raise ValueError("--stack and --times both say what the software's times are: give one")
        from . import fit

        return fit.read_stack(pathlib.Path(times))
    if name is None:
        name = "xla-tpu" if chip.startswith("tpu") else "torch-compile"
    return costmodel.named_stack(name)


def laws(loss: LossLawName, fitted: str | None) -> Any:
    """The named loss law and SDSL's acceptance law, or what `jaxsd fit` wrote in their place."""
    from jaxsd import costmodel

    named = {
        "besiroglu": costmodel.BESIROGLU,
        "hoffmann": costmodel.HOFFMANN,
        "shape-aware": costmodel.SHAPE_AWARE,
    }
    both = costmodel.SDSL._replace(loss=named[loss])
    if fitted is None:
        return both
    from . import fit

    for file in fitted.split(","):
        both = fit.replace_law(both, pathlib.Path(file))
    return both


def extrapolations(estimate: Any, model_laws: Any) -> list[str]:
    """What lies outside the ranges that the laws were fitted on, in words."""
    models, texts = model_laws.loss.fitted, model_laws.acceptance.fitted
    bounds = {
        "draft_parameters": (
            "the draft's parameters",
            models.min_parameters,
            models.max_parameters,
        ),
        "draft_tokens": ("the draft's training tokens", models.min_tokens, models.max_tokens),
        "draft_aspect_ratio": (
            "the draft's d_model / n_layers",
            models.min_aspect_ratio,
            models.max_aspect_ratio,
        ),
        "draft_layers": ("the draft's layers", models.min_layers, math.inf),
        "target_parameters": (
            "the target's parameters",
            models.min_parameters,
            models.max_parameters,
        ),
        "target_tokens": ("the target's training tokens", models.min_tokens, models.max_tokens),
        "draft_perplexity": (
            "the draft's perplexity",
            texts.min_draft_perplexity,
            texts.max_draft_perplexity,
        ),
        "target_perplexity": (
            "the target's perplexity",
            texts.min_target_perplexity,
            texts.max_target_perplexity,
        ),
    }
    out = []
    for field, (label, low, high) in bounds.items():
        distance = float(getattr(estimate.extrapolation, field))
        if distance == 0:
            continue
        bound = low if distance < 0 else high
        side = "below" if distance < 0 else "above"
        times = math.exp(abs(distance))
        out.append(f"{label}: {times:.3g} times {side} {format_quantity(float(bound))}")
    clipped = float(estimate.extrapolation.alpha)
    if clipped:
        out.append(f"alpha: the law's own value lies {abs(clipped):.3g} outside [0.01, 0.99]")
    return out


def check_plot(plot: str | None) -> None:
    """Raises ValueError if a picture cannot be written, before it is computed."""
    if plot is None:
        return
    path = pathlib.Path(plot)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"plot={plot!r} must end in .png, .pdf or .svg")
    if not path.parent.is_dir():
        raise ValueError(f"plot={plot!r} must be a file in an existing folder")
    reproduction.require_matplotlib("plot")
