"""The figures of a study, drawn from its report alone."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from . import circle_predict
from .reproduction import COLORS, Figure

Row = Mapping[str, Any]
MARKERS = ("o", "s", "^", "D", "v", "P")


def figures(result: Row) -> list[Figure]:
    """All of them, in the order of the page."""
    share = f"{circle_predict.COVERAGE:.0%}"

    def figure(name: str, caption: str, draw: Any, size: tuple[float, float]) -> Figure:
        return Figure(name, caption, functools.partial(draw, result), size)

    return [
        figure(
            "predicted_and_measured",
            "Measured speed-up of drafts that no law saw, at every draft length and batch, against "
            "its prediction: left from parameters, training tokens and the device's calibration "
            f"alone, right given how the two models agree on texts. Bars: intervals of {share}; "
            "grey: within 10 %.",
            _predicted_and_measured,
            (8.2, 4.0),
        ),
        figure(
            "parts_of_a_round",
            "Where the time of a round goes, as predicted, at the best draft length of each "
            "member trained longest; a mark where the measured round ends.",
            _parts_of_a_round,
            (8.2, 3.4),
        ),
        figure(
            "loss",
            "Held-out loss by parameters and training tokens. Full marks were fitted, open ones "
            "held out; crosses are what the law gives each shape.",
            _loss,
            (7.0, 3.8),
        ),
        figure(
            "acceptance",
            "Acceptance by the draft's perplexity, with the fitted law, by temperature. Open marks "
            "were held out.",
            _acceptance,
            (7.0, 3.8),
        ),
        figure(
            "best_length",
            "Best draft length, predicted from sizes and measured, by batch; each mark is a "
            "member, moved a little apart.",
            _best_length,
            (8.2, 3.2),
        ),
        figure(
            "speedup_by_size",
            "Speed-up of one sequence at its best draft length by the draft's parameters: lines "
            "as predicted for the most training tokens, marks as measured (larger for more "
            "training tokens, open if held out), the star the designed draft; shaded: within 5 % "
            "of the best prediction.",
            _speedup_by_size,
            (7.0, 4.0),
        ),
    ]


def _predicted_and_measured(result: Row, canvas: Any) -> None:
    panels = canvas.subplots(1, 2, sharex=True, sharey=True)
    points = [point for one in result["members"] if one["is_held_out"] for point in one["points"]]
    kinds = (
        ("from_sizes", "from sizes, tokens, calibration"),
        ("given_acceptance", "given acceptance on texts"),
    )
    batches = result["plan"]["batches"]
    ends = [point["measured"] for point in points]
    for kind, _ in kinds:
        ends += [point[kind] for point in points]
    low, high = (min(ends) * 0.93, max(ends) * 1.05) if ends else (0.5, 1.5)
    line = np.linspace(low, high, 2)
    for panel, (kind, title) in zip(panels, kinds, strict=True):
        panel.fill_between(line, line / 1.1, line * 1.1, color=COLORS[5], alpha=0.1, linewidth=0)
        panel.plot(line, line, color=COLORS[5], linewidth=0.8)
        for number, batch in enumerate(batches):
            mine = [point for point in points if point["batch"] == batch]
            if not mine:
                continue
            x = np.array([point[kind] for point in mine])
            y = np.array([point["measured"] for point in mine])
            bars = np.array([point[f"{kind}_interval"] for point in mine]).T
            panel.errorbar(
                x,
                y,
                xerr=np.abs(bars - x),
                fmt=MARKERS[number],
                color=COLORS[number],
                markersize=3.2,
                elinewidth=0.5,
                alpha=0.75,
                label=f"batch {batch}",
            )
        if points:
            error = result["held_out"][kind]["median"]
            panel.set_title(f"{title}: median error {error:.1%}")
        panel.set_xlabel("predicted speed-up")
        panel.set_xlim(low, high)
        panel.set_ylim(low, high)
        panel.set_aspect("equal")
    panels[0].set_ylabel("measured speed-up")
    panels[0].legend(loc="upper left")


def _parts_of_a_round(result: Row, canvas: Any) -> None:
    batches = result["plan"]["batches"]
    panels = np.atleast_1d(canvas.subplots(1, len(batches)))
    longest = max(row["training_tokens"] for row in result["family"])
    rows = sorted(
        (row for row in result["family"] if row["training_tokens"] == longest),
        key=lambda row: row["parameters_total"],
    )
    members = {one["name"]: one for one in result["members"]}
    parts = (
        ("target", "target's pass"),
        ("own", "sampling, deciding"),
        ("draft", "draft's passes"),
        ("switch", "back to the draft"),
    )
    for panel, batch in zip(panels, batches, strict=True):
        for place, row in enumerate(rows):
            mine = [one for one in members[row["name"]]["points"] if one["batch"] == batch]
            point = max(mine, key=lambda one: one["measured"])
            left = 0.0
            for color, (part, label) in zip(COLORS, parts, strict=False):
                width = 1e3 * point["parts"][part]
                panel.barh(place, width, left=left, color=color, label=label if not place else None)
                left += width
            panel.plot(
                1e3 * point["round_seconds"]["measured"],
                place,
                marker="|",
                color="black",
                markersize=10,
                markeredgewidth=1.6,
            )
        panel.set_title(f"batch {batch}")
        panel.set_xlabel("ms")
        panel.set_yticks(range(len(rows)), [_shape(row) for row in rows])
        panel.grid(visible=False, axis="y")
        if panel is not panels[0]:
            panel.set_yticklabels([])
    handles, labels = panels[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=3)


def _loss(result: Row, canvas: Any) -> None:
    axes = canvas.subplots()
    tokens = sorted({row["training_tokens"] for row in result["family"]})
    for color, count in zip(COLORS, tokens, strict=False):
        mine = [row for row in result["family"] if row["training_tokens"] == count]
        for row in mine:
            axes.plot(
                row["parameters_total"],
                row["loss"],
                marker=MARKERS[(row["n_layers"] - 1) % len(MARKERS)],
                color=color,
                markerfacecolor="none" if row["is_held_out"] else color,
                linestyle="",
                markersize=5.5,
            )
        members = [
            one for one in result["members"] if any(one["name"] == row["name"] for row in mine)
        ]
        axes.plot(
            [one["parameters_total"] for one in members],
            [one["loss"]["predicted"] for one in members],
            linestyle="",
            marker="x",
            color=color,
            markersize=4,
            label=f"{count / 1e6:.2f}M tokens",
        )
    depths = sorted({row["n_layers"] for row in result["family"]})
    for depth in depths:
        axes.plot(
            [],
            [],
            marker=MARKERS[(depth - 1) % len(MARKERS)],
            color=COLORS[5],
            linestyle="",
            label=f"{depth} layer{'s' if depth > 1 else ''}",
        )
    axes.set_xscale("log")
    axes.set_xlabel("parameters of the draft")
    axes.set_ylabel("held-out loss, nats per token")
    axes.legend(ncols=2)


def _acceptance(result: Row, canvas: Any) -> None:
    axes = canvas.subplots()
    names = list(result["laws"]["curves"])
    for color, name in zip(COLORS, names, strict=False):
        curve = result["laws"]["curves"][name]
        axes.plot(
            curve["perplexity"], curve["alpha"], color=color, label=f"temperature {name}, law"
        )
        for row in result["family"]:
            axes.plot(
                row["perplexity"],
                result["measured"][row["name"]]["alpha"][name],
                marker="o",
                markersize=4.5,
                linestyle="",
                color=color,
                markerfacecolor="none" if row["is_held_out"] else color,
            )
    axes.set_xscale("log")
    axes.set_xlabel("perplexity of the draft on held-out text")
    axes.set_ylabel("acceptance of a drafted token, alpha")
    axes.legend()


def _best_length(result: Row, canvas: Any) -> None:
    batches = [str(batch) for batch in result["plan"]["batches"]]
    panels = np.atleast_1d(canvas.subplots(1, len(batches), sharey=True))
    lengths = result["plan"]["lengths"]
    random = np.random.default_rng(0)
    for panel, batch in zip(panels, batches, strict=True):
        panel.plot(lengths, lengths, color=COLORS[5], linewidth=0.8)
        for one in result["members"]:
            best = one["best"][batch]
            x, y = np.array([best["predicted"], best["measured"]]) + random.uniform(-0.18, 0.18, 2)
            color = COLORS[1] if one["is_held_out"] else COLORS[0]
            panel.plot(x, y, marker="o", markersize=4.5, color=color, alpha=0.8)
        panel.set_title(f"batch {batch}")
        panel.set_xlabel("predicted best K")
        panel.set_xticks(lengths)
        panel.set_yticks(lengths)
        panel.set_xlim(min(lengths) - 0.5, max(lengths) + 0.5)
        panel.set_ylim(min(lengths) - 0.5, max(lengths) + 0.5)
        panel.set_aspect("equal")
    panels[0].set_ylabel("measured best K")
    for color, label in ((COLORS[0], "fitted"), (COLORS[1], "held out")):
        panels[0].plot([], [], marker="o", linestyle="", color=color, label=label)
    panels[0].legend()


def _speedup_by_size(result: Row, canvas: Any) -> None:
    axes = canvas.subplots()
    batch = str(result["design"]["batch"])
    curves = result["curves"]
    best = max(point["speedup"] for curve in curves.values() for point in curve)
    axes.axhspan(0.95 * best, best, color=COLORS[3], alpha=0.15, linewidth=0)
    for color, (layers, curve) in zip(COLORS, curves.items(), strict=False):
        axes.plot(
            [point["parameters_total"] for point in curve],
            [point["speedup"] for point in curve],
            color=color,
            label=f"{layers} layer{'s' if int(layers) > 1 else ''}, predicted",
        )
    tokens = sorted({row["training_tokens"] for row in result["family"]})
    depths = list(curves)
    for row, member in zip(result["family"], result["members"], strict=True):
        axes.plot(
            row["parameters_total"],
            member["best"][batch]["measured_speedup"],
            marker="o",
            linestyle="",
            color=COLORS[depths.index(str(row["n_layers"])) % len(COLORS)],
            markersize=3.0 + 1.6 * tokens.index(row["training_tokens"]),
            markerfacecolor="none" if row["is_held_out"] else None,
        )
    design = result["design"]
    size = design["row"]["parameters_total"]
    axes.plot(size, design["best_speedup"], marker="*", color="black", markersize=13, linestyle="")
    axes.axhline(1.0, color=COLORS[5], linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_xlabel("parameters of the draft")
    axes.set_ylabel("speed-up over plain decoding, batch 1")
    axes.legend(ncols=2)


def _shape(row: Row) -> str:
    return f"{row['d_model']} x {row['n_layers']}"
