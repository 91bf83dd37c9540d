"""What the reproduction of SDSL computes before it compares or draws anything."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import rich.console
import rich.progress

from . import sdsl_losses, sdsl_measurements

# Name in the paper -> name in the catalogue.
TARGETS = {
    "OPT-13B": "opt-13b",
    "OPT-30B": "opt-30b",
    "OPT-66B": "opt-66b",
    "Qwen1.5-14B": "qwen1.5-14b",
    "Qwen1.5-32B": "qwen1.5-32b",
    "Qwen1.5-72B": "qwen1.5-72b",
    "Qwen1.5-110B": "qwen1.5-110b",
    "Qwen2.5-14B": "qwen2.5-14b",
    "Qwen2.5-32B": "qwen2.5-32b",
    "Qwen2.5-72B": "qwen2.5-72b",
    "LLaMa3-70B": "llama-3-70b",
    "LLaMa3.1-70B": "llama-3.1-70b",
    "Seed-OSS-36B": "seed-oss-36b",
}
# Training tokens of the drafts of each family, table 5.
DRAFT_TOKENS = {"OPT": 180e9, "Qwen1.5": 2.4e12, "Qwen2.5": 18e12}
# Of a target whose makers do not say what it was trained on; the best draft hardly depends on it.
ASSUMED_TOKENS = 3e12
# Of the rows of table 5 that are compared: training tokens of the target, then by draft family the
# size and the throughput. The first row is printed with 3e12 tokens and computed with 4e12.
TABLE_5: dict[str, tuple[float, tuple[tuple[float, str], ...]]] = {
    "Qwen1.5-14B": (
        4e12,
        ((124039820.3, "8.947e-11"), (115390938.2, "9.165e-11"), (112685392.4, "9.235e-11")),
    ),
    "Qwen2.5-72B": (
        18e12,
        ((318409631.5, "1.861e-11"), (295409960.3, "1.900e-11"), (288221790.3, "1.912e-11")),
    ),
    "LLaMa3-70B": (
        15e12,
        ((312760391.8, "1.916e-11"), (290182058.1, "1.957e-11"), (283125440.3, "1.970e-11")),
    ),
    "OPT-13B": (
        180e9,
        ((117313808.6, "1.009e-10"), (109171489.6, "1.034e-10"), (106623620.8, "1.043e-10")),
    ),
}
# The grid of table 7, with the training tokens with which tables 8 and 9 come out.
GRID_TARGETS = np.geomspace(13e9, 110e9, 8)
GRID_TOKENS = np.geomspace(1e12, 1e14, 6)
PRINTED_GRID_TOKENS = np.geomspace(1e12, 1e13, 6)
# Targets of the power law beyond the paper's range.
LADDER = np.array([1e9, 3e9, 7e9, 13e9, 30e9, 70e9, 110e9, 175e9, 405e9, 1e12])


class Optima(NamedTuple):
    """The best drafts of many targets, found in one call: arrays of one length."""

    target_parameters: np.ndarray
    target_tokens: np.ndarray
    draft_tokens: np.ndarray
    design: Any  # costmodel.DraftDesign of arrays


class Results(NamedTuple):
    """What tables and figures are made of."""

    pairs: list[dict[str, Any]]
    plane: Any  # costmodel.Fit
    forms: dict[str, dict[str, Any]]  # target -> form -> costmodel.Fit
    by_target: Any  # costmodel.Fit with an intercept per target
    table_5: dict[tuple[str, str], Optima]  # (target, draft family) -> one of each
    grid: Optima
    regressions: tuple[Any, Any]  # costmodel.Fit of equations 10 and 11
    printed_grid: Optima
    printed_regressions: tuple[Any, Any]
    ladder: Optima
    lines: dict[str, Optima]  # of figure 5, by what varies along them
    latencies: list[sdsl_measurements.Latency]
    measured: sdsl_measurements.Measured
    losses: sdsl_losses.Losses


@functools.cache
def compute() -> Results:
    """Fits and searches; the searches, a thousand targets, are one vectorised call."""
    from jaxsd import costmodel

    progress = rich.progress.Progress(
        rich.progress.SpinnerColumn(),
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TimeElapsedColumn(),
        console=rich.console.Console(stderr=True),
        transient=True,
    )
    with progress:
        task = progress.add_task("fitting acceptance", total=4)
        pairs = costmodel.published("sdsl_alpha_pairs")
        names = ("draft_perplexity", "target_perplexity", "alpha")
        x, y, alpha = (np.array([row[name] for row in pairs]) for name in names)
        of = np.array([row["target"] for row in pairs])
        plane = costmodel.fit_acceptance(x, y, alpha)
        by_target = costmodel.fit_acceptance(x, y, alpha, targets=list(of))
        forms = {
            target: {
                form: costmodel.fit_acceptance(
                    x[of == target], y[of == target], alpha[of == target], form
                )
                for form in ("linear", "log", "power")
            }
            for target in TARGETS
        }
        progress.update(task, advance=1, description="searching the best drafts")
        found = _search()
        progress.update(task, advance=1, description="fitting times and losses")
        measured = sdsl_measurements.compute()
        losses = sdsl_losses.compute()
        progress.update(task, advance=1)
        latencies = sdsl_measurements.latencies(
            {family: found[("OPT-13B", family)].design.parameters[0] for family in DRAFT_TOKENS}
        )
    keys = [(target, family) for target in TARGETS for family in DRAFT_TOKENS]
    return Results(
        pairs=pairs,
        plane=plane,
        forms=forms,
        by_target=by_target,
        table_5={key: found[key] for key in keys},
        grid=found["grid"],
        regressions=_regressions(found["grid"]),
        printed_grid=found["printed grid"],
        printed_regressions=_regressions(found["printed grid"]),
        ladder=found["ladder"],
        lines={axis: found[axis] for axis in ("M", "D", "D'")},
        latencies=latencies,
        measured=measured,
        losses=losses,
    )


def _search() -> dict[Any, Optima]:
    """All questions of tables and figures, asked at once: one compilation, one call."""
    from jaxsd import costmodel

    questions = dict(_questions())
    sizes, target_tokens, draft_tokens = (
        np.concatenate(parts) for parts in zip(*questions.values(), strict=True)
    )
    designs = costmodel.optimal_draft_size(sizes, target_tokens, draft_tokens)
    out, start = {}, 0
    for key, question in questions.items():
        rows = slice(start, start + len(question[0]))
        design = costmodel.DraftDesign(*(field[rows] for field in designs))
        out[key] = Optima(*question, design=design)
        start = rows.stop
    return out


def _questions() -> Iterator[tuple[Any, list[np.ndarray]]]:
    """(key, [target parameters, target tokens, draft tokens]), each of one length."""
    from jaxsd import costmodel

    for target, name in TARGETS.items():
        size = float(costmodel.parameters_total(costmodel.named_shape(name)))
        known = TABLE_5[target][0] if target in TABLE_5 else costmodel.training_tokens(name)
        tokens = ASSUMED_TOKENS if known is None else known
        for family, draft_tokens in DRAFT_TOKENS.items():
            yield (target, family), [np.array([float(v)]) for v in (size, tokens, draft_tokens)]
    yield "grid", _product(GRID_TARGETS, GRID_TOKENS, GRID_TOKENS)
    yield "printed grid", _product(GRID_TARGETS, PRINTED_GRID_TOKENS, PRINTED_GRID_TOKENS)
    yield "ladder", _product(LADDER, np.array([1e13]), np.array([1e13]))
    few_tokens, few_targets = np.array([1e12, 1e13, 1e14]), np.array([13e9, 34e9, 70e9, 110e9])
    many = np.geomspace(1e11, 1e14, 13)
    yield "M", _product(np.geomspace(7e9, 110e9, 25), np.array([1e13]), few_tokens)
    yield "D", _product(few_targets, np.array([1e13]), many)
    yield "D'", _product(few_targets, many, np.array([1e13]))


def _product(*axes: np.ndarray) -> list[np.ndarray]:
    return [grid.ravel() for grid in np.meshgrid(*axes, indexing="ij")]


def power_law(found: Optima) -> Any:
    """ln N* as a line in ln M."""
    from jaxsd import costmodel

    return costmodel.fit_linear(
        {"ln M": np.log(found.target_parameters)}, np.log(found.design.parameters)
    )


def _regressions(found: Optima) -> tuple[Any, Any]:
    """Equations 10 and 11 of the paper, least squares with robust errors."""
    from jaxsd import costmodel

    m, n = found.target_parameters, found.design.parameters
    ratio = costmodel.fit_linear(
        {"M0": 1 / m, "g": np.log(found.draft_tokens), "g'": np.log(found.target_tokens)},
        n / m,
        intercept="mu",
        robust=True,
    )
    return ratio, costmodel.fit_linear({"mu": m}, n, intercept="M0", robust=True)
