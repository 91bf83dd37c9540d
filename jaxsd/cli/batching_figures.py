"""The figures of the reproduction of the batching paper."""

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from . import batching_serving
from .batching_results import (
    BATCHES,
    EVERY_BATCH,
    LENGTHS,
    ROUNDS_ALPHA,
    ROUNDS_BATCHES,
    ROUNDS_LENGTHS,
)
from .batching_serving import log_axis
from .reproduction import COLORS, Figure

if TYPE_CHECKING:
    from .batching_results import Inversion, Results


def figures(results: "Results") -> list[Figure]:
    """Latency by length, accepted lengths, times, best lengths, rounds, and served traffic."""

    def figure(name: str, caption: str, draw: Any, size: tuple[float, float]) -> Figure:
        return Figure(name, caption, functools.partial(draw, results), size)

    return [
        figure(
            "latency_by_length",
            "Time per token by draft length and batch size, a circle at the best length.",
            _latencies,
            (9.6, 3.5),
        ),
        figure(
            "accepted_length",
            "Accepted draft tokens by draft length: a power beside geometric curves.",
            _accepted,
            (7.6, 3.4),
        ),
        figure(
            "verification_times",
            "Verification by draft length with fitted lines, and the slopes of a round's time.",
            _times,
            (8.6, 3.5),
        ),
        figure(
            "best_length",
            "The best draft length by batch size, and the times that the published table implies.",
            _best,
            (8.6, 3.6),
        ),
        figure(
            "rounds_to_completion",
            "Rounds until the slowest sequence of a batch is done, exact and simulated.",
            _rounds,
            (8.0, 3.4),
        ),
        *batching_serving.figures(results.serving),
    ]


def _latencies(results: "Results", canvas: Any) -> None:
    from jaxsd import costmodel

    panels = canvas.subplots(1, 3, sharey=True)
    fine = np.linspace(0, LENGTHS[-1], 161)
    shades = _shades(len(BATCHES))

    def by_round(times: Any, lengths: np.ndarray) -> np.ndarray:
        curve = results.curve
        return np.asarray(
            costmodel.token_seconds(curve, times, BATCHES[:, None], lengths[None])
        )  # [6, n]

    def until_done(times: Any) -> np.ndarray:
        seconds = costmodel.round_seconds(times, BATCHES[:, None], LENGTHS[None])
        return np.asarray(seconds) * results.to_completion.rounds_per_token

    implied, hardware = results.per_round.times, results.roofline.times
    kinds = (
        ("times from the table, per round", fine, by_round(implied, fine)),
        (
            "times from the table, to completion",
            LENGTHS,
            until_done(results.to_completion.times),
        ),
        ("times of an A100, per round", fine, by_round(hardware, fine)),
    )
    for panel, (title, lengths, seconds), letter in zip(panels, kinds, "abc", strict=True):
        whole = np.linspace(0, len(lengths) - 1, len(LENGTHS)).round().astype(int)
        for batch, row, shade in zip(BATCHES, 1e3 * seconds, shades, strict=True):
            panel.plot(lengths, row, color=shade, linewidth=1.2, label=str(batch))
            panel.plot(LENGTHS, row[whole], ".", color=shade, markersize=3)
            best = row[whole].argmin()
            panel.plot(
                best,
                row[whole][best],
                "o",
                color=shade,
                markersize=7,
                markeredgecolor="black",
                markeredgewidth=0.6,
                zorder=3,
            )
        panel.set_xticks(LENGTHS)
        panel.set_xlabel("draft tokens per round, s")
        panel.set_title(f"({letter}) {title}", loc="left", fontsize=9)
    log_axis(panels[0].yaxis, (5, 7, 10, 15, 20))
    panels[0].set_ylabel("time per token of a sequence (ms)")
    handles, labels = panels[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside right center", title="batch")


def _accepted(results: "Results", canvas: Any) -> None:
    from jaxsd import costmodel

    left, right = canvas.subplots(1, 2)
    fine = np.linspace(0, LENGTHS[-1], 401)
    power, geometric = results.curve, results.geometric.result
    left.plot(
        fine,
        np.asarray(costmodel.accepted_length(power, fine)),
        color=COLORS[0],
        label=f"{power.coefficient:g} s^{power.exponent:g}".replace("^", "$^{") + "}$",
    )
    left.plot(
        fine,
        np.asarray(costmodel.accepted_length(geometric, fine)),
        "--",
        color=COLORS[1],
        label=f"nearest geometric, α = {geometric.alpha:.3f}",
    )
    left.plot(
        LENGTHS, np.asarray(costmodel.accepted_length(power, LENGTHS)), "o", color=COLORS[0], ms=4
    )
    left.plot(
        LENGTHS,
        np.asarray(costmodel.accepted_length(geometric, LENGTHS)),
        "s",
        color=COLORS[1],
        ms=3.5,
    )
    left.set_title("(a) the power quoted for the paper", loc="left")
    for (alpha, fit), color in zip(results.powers.items(), COLORS, strict=False):
        curve = costmodel.GeometricCurve(alpha)
        right.plot(
            LENGTHS,
            np.asarray(costmodel.accepted_length(curve, LENGTHS)),
            "o",
            color=color,
            ms=4,
            label=f"{alpha:g}: {fit.result.coefficient:.2f} $s^{{{fit.result.exponent:.2f}}}$",
        )
        right.plot(fine, np.asarray(costmodel.accepted_length(fit.result, fine)), color=color)
    right.set_title("(b) geometric curves and their powers", loc="left")
    right.legend(title="α and the nearest power", loc="upper left")
    left.legend(loc="lower right")
    for panel in (left, right):
        panel.set_xticks(LENGTHS)
        panel.set_xlabel("draft tokens per round, s")
        panel.set_ylim(0, None)
    left.set_ylabel("accepted draft tokens, l(s)")


def _times(results: "Results", canvas: Any) -> None:
    left, right = canvas.subplots(1, 2)
    measured, lines = results.roofline.measured, results.roofline.lines
    shades = _shades(len(BATCHES))
    for i, batch in enumerate(BATCHES):
        left.plot(
            LENGTHS,
            1e3 * measured.verify_seconds[i],
            "o",
            color=shades[i],
            ms=4,
            label=str(batch),
        )
        line = np.asarray(lines.fixed_seconds)[i] + np.asarray(lines.token_seconds)[i] * LENGTHS
        left.plot(LENGTHS, 1e3 * line, "--", color=shades[i], linewidth=1)
    left.set_ylim(0, None)
    left.set_xticks(LENGTHS)
    left.set_xlabel("draft tokens per round, s")
    left.set_ylabel("one verification (ms)")
    left.set_title("(a) times of an A100, points, and lines", loc="left")
    left.legend(title="batch", ncols=3, loc="lower right")

    fixed = np.asarray(lines.fixed_seconds)
    slope = (np.asarray(lines.token_seconds) + np.asarray(lines.draft_seconds)) / fixed
    series = (
        ("implied by the table, per round", results.per_round.ratios, COLORS[1], "s"),
        ("implied by the table, to completion", results.to_completion.ratios, COLORS[0], "D"),
        ("lines fitted to an A100", slope, COLORS[5], "o"),
    )
    for label, ratios, color, marker in series:
        right.plot(BATCHES, ratios, marker + "-", color=color, ms=4, label=label)
    _batch_axis(right)
    right.set_ylim(0, None)
    right.set_ylabel("time per drafted token / plain step")
    right.set_title("(b) slope of a round's time", loc="left")
    right.legend(loc="upper left")


def _best(results: "Results", canvas: Any) -> None:
    from jaxsd import costmodel

    left, right = canvas.subplots(1, 2)
    longest = int(LENGTHS[-1])
    fine = np.geomspace(1, BATCHES[-1], 120)
    published = np.asarray(costmodel.lookup_length(costmodel.SU_TABLE, EVERY_BATCH))
    series = (
        ("implied, per round", results.per_round.times, results.per_round.every_gamma, COLORS[1]),
        ("A100, per round", results.roofline.times, results.roofline.every_gamma, COLORS[5]),
    )
    for name, times, whole, color in series:
        continuous = costmodel.optimal_gamma_for_batch(results.curve, times, fine, longest)
        left.plot(fine, np.asarray(continuous), color=color, label=f"{name}, continuous")
        left.plot(EVERY_BATCH, whole, ".", color=color, ms=5, label=f"{name}, whole")
    left.plot(
        EVERY_BATCH,
        results.to_completion.every_gamma,
        "+",
        color=COLORS[0],
        ms=5,
        label="implied, to completion",
    )
    left.step(
        EVERY_BATCH, published, where="mid", color=COLORS[3], linewidth=1, label="published table"
    )
    left.plot(BATCHES, np.asarray(costmodel.SU_TABLE.gammas), "D", color=COLORS[3], ms=5, zorder=1)
    _batch_axis(left)
    left.set_ylim(0, 9)
    left.set_yticks(np.arange(10))
    left.set_ylabel("best number of draft tokens, s*")
    left.set_title("(a) best length", loc="left")
    handles, labels = left.get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=3)

    for inversion, color, shift, name in (
        (results.per_round, COLORS[1], 0.94, "per round"),
        (results.to_completion, COLORS[0], 1.06, "to completion"),
    ):
        _intervals(right, inversion, color, shift, name)
    _batch_axis(right)
    right.set_yscale("log")
    ticks = (0.05, 0.1, 0.2, 0.5, 1)
    right.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    right.set_yticks([], minor=True)
    right.set_ylabel("time per drafted token / plain step")
    right.set_title("(b) ratios for which the table is the best", loc="left")
    lines, bars = np.split(np.arange(4), 2)
    handles, labels = right.get_legend_handles_labels()  # lines come first
    order = np.stack([bars, lines], axis=1).ravel()
    right.legend([handles[i] for i in order], [labels[i] for i in order], loc="upper left")


def _intervals(panel: Any, inversion: "Inversion", color: str, shift: float, name: str) -> None:
    """What each entry of the table allows, and the line in the batch that costs it least."""
    middle = np.sqrt(inversion.low * inversion.high)
    panel.errorbar(
        BATCHES * shift,
        middle,
        (middle - inversion.low, inversion.high - middle),
        fmt="none",
        color=color,
        linewidth=5,
        alpha=0.45,
        label=f"table, {name}",
    )
    start, growth = inversion.line
    fine = np.geomspace(0.9, 36, 100)
    panel.plot(
        fine,
        start + growth * fine,
        color=color,
        linewidth=1,
        label=f"line {start:.2f} + {growth:.4f} b, loses {100 * inversion.line_loss:.1f} %",
    )


def _rounds(results: "Results", canvas: Any) -> None:
    left, right = canvas.subplots(1, 2)
    found = results.rounds
    for i, (gamma, color) in enumerate(zip(ROUNDS_LENGTHS, COLORS, strict=False)):
        left.plot(ROUNDS_BATCHES, found.exact[i], color=color, label=str(gamma))
        left.errorbar(
            ROUNDS_BATCHES,
            found.simulated[i],
            2 * found.standard_errors[i],
            fmt="o",
            color=color,
            ms=3.5,
            linewidth=1,
        )
        right.plot(
            ROUNDS_BATCHES,
            100 * (found.exact[i] / found.exact[i, 0] - 1),
            "o-",
            ms=3.5,
            color=color,
        )
    for panel in (left, right):
        _batch_axis(panel, ROUNDS_BATCHES)
        panel.set_ylim(0, None)
    left.set_ylabel("rounds for 128 tokens of each")
    left.set_title(f"(a) rounds, α = {ROUNDS_ALPHA:g}; points simulated", loc="left")
    right.set_ylabel("more rounds than one sequence (%)")
    right.set_title("(b) what waiting for the slowest costs", loc="left")
    canvas.legend(
        *left.get_legend_handles_labels(), loc="outside right center", title="draft\ntokens"
    )


def _batch_axis(panel: Any, batches: np.ndarray = BATCHES) -> None:
    """Batch sizes on a logarithmic axis, written as they are."""
    log_axis(panel.xaxis, tuple(batches.tolist()))
    panel.set_xlabel("batch size, b")


def _shades(count: int) -> list[Any]:
    """So many colours from dark to light, of one palette."""
    import matplotlib

    return [matplotlib.colormaps["viridis"](i / (count - 0.5)) for i in range(count)]
