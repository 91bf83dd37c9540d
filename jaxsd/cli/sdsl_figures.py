"""The figures of SDSL drawn again, and three of what its cost leaves out."""

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from . import sdsl_losses
from .reproduction import COLORS, Figure

if TYPE_CHECKING:
    from .sdsl_results import Results

FAMILY_COLORS = {"OPT": COLORS[0], "Qwen1.5": COLORS[1], "Qwen2.5": COLORS[2], "other": COLORS[3]}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def figures(results: "Results") -> list[Figure]:
    """Figures 1 to 5 of the paper, and latency, pass times and losses."""

    def figure(name: str, caption: str, draw: Any, size: tuple[float, float]) -> Figure:
        return Figure(name, caption, functools.partial(draw, results), size)

    return [
        figure("figure_1", "Acceptance of 130 pairs and the fitted plane.", _plane, (6.0, 4.6)),
        figure(
            "figure_2",
            "Throughput by draft size for 13 targets, a star at the best draft.",
            _throughputs,
            (9.0, 4.2),
        ),
        figure(
            "figure_3",
            "Acceptance by the draft's perplexity for two targets, in three forms.",
            _forms,
            (7.2, 3.2),
        ),
        figure(
            "figure_4",
            "Latencies of OPT-13B by the draft's distance from the best size.",
            _distances,
            (8.6, 3.1),
        ),
        figure(
            "figure_5",
            "The best draft, and its share of the target, by target size and training tokens.",
            _scaling,
            (7.2, 8.2),
        ),
        figure(
            "latency_by_depth",
            "Time per token against the distance from the best size, and against depth.",
            _depths,
            (7.2, 5.6),
        ),
        figure(
            "pass_times",
            "gpt-fast on A100s: predicted beside measured tokens per second.",
            _pass_times,
            (7.6, 3.7),
        ),
        figure(
            "morph_losses",
            "Relative error of the loss laws without and with a shape.",
            _losses,
            (7.6, 3.6),
        ),
    ]


def family_of(name: str) -> str:
    """The family of a model, by its name in the paper.

    >>> family_of("Qwen2.5-0.5B"), family_of("LLaMa3-70B")
    ('Qwen2.5', 'other')
    """
    return next((family for family in FAMILY_COLORS if name.startswith(family)), "other")


def _plane(results: "Results", canvas: Any) -> None:
    from jaxsd import costmodel

    axes = canvas.add_subplot(projection="3d")
    law = results.plane.result
    x = np.array([row["draft_perplexity"] for row in results.pairs])
    y = np.array([row["target_perplexity"] for row in results.pairs])
    alpha = np.array([row["alpha"] for row in results.pairs])
    grid_x, grid_y = np.meshgrid(
        np.linspace(x.min(), x.max(), 12), np.linspace(y.min(), y.max(), 12)
    )
    surface = np.asarray(costmodel.acceptance(law, grid_x, grid_y))
    axes.plot_surface(grid_x, grid_y, surface, color=COLORS[6], alpha=0.35, linewidth=0)
    families = np.array([family_of(row["target"]) for row in results.pairs])
    labels = {"other": "LLaMa 3, Seed-OSS targets"}
    for family, color in FAMILY_COLORS.items():
        mine = families == family
        label = labels.get(family, f"{family} targets")
        axes.scatter(
            x[mine], y[mine], alpha[mine], color=color, s=14, label=label, depthshade=False
        )
    axes.set_xlabel("perplexity of the draft", labelpad=2)
    axes.set_ylabel("perplexity of the target", labelpad=2)
    axes.set_zlabel("acceptance probability α", labelpad=4)
    axes.set_xticks([15, 20, 25, 30])
    axes.set_yticks([10, 12, 14, 16])
    axes.tick_params(pad=0)
    axes.view_init(elev=18, azim=-52)
    axes.set_box_aspect((1, 1, 0.75), zoom=1.12)
    canvas.suptitle(
        f"α = −{-law.draft_slope:.4f} x + {law.target_slope:.4f} y + {law.intercept:.3f},  "
        f"R² = {results.plane.r_squared:.3f}"
    )
    canvas.legend(loc="outside lower center", ncols=4, handletextpad=0.1, columnspacing=1.0)


def _throughputs(results: "Results", canvas: Any) -> None:
    from jaxsd import costmodel

    panels = canvas.subplots(1, 3, sharey=True)
    families = list(dict.fromkeys(family for _, family in results.table_5))
    targets = list(dict.fromkeys(target for target, _ in results.table_5))
    largest_first = sorted(
        targets, key=lambda t: -results.table_5[(t, families[0])].target_parameters[0]
    )
    shades = _shades(len(targets))
    for panel, family in zip(panels, families, strict=True):
        for i, target in enumerate(largest_first):
            found = results.table_5[(target, family)]
            size, tokens = found.target_parameters[0], found.target_tokens[0]
            draft = np.geomspace(1e7, 0.2 * size, 200)
            alpha = costmodel.acceptance(
                costmodel.SDSL_ACCEPTANCE,
                costmodel.perplexity(costmodel.BESIROGLU, draft, found.draft_tokens[0]),
                costmodel.perplexity(costmodel.BESIROGLU, size, tokens),
            )
            speed = np.asarray(costmodel.optimal_sdsl_throughput(alpha, draft, size))
            panel.loglog(draft, speed, color=shades[i], linewidth=1.1, label=target)
            panel.plot(
                found.design.parameters,
                found.design.throughput,
                "*",
                color=shades[i],
                markersize=7,
                markeredgecolor="black",
                markeredgewidth=0.4,
            )
        data = results.table_5[(targets[0], family)].draft_tokens[0]
        panel.set_title(f"{family} data: {data / 1e12:g}T tokens")
        panel.set_xlabel("parameters of the draft, N")
        panel.set_xlim(1e7, 3e10)
    panels[0].set_ylabel("throughput, tokens per 2 parameters read")
    canvas.legend(
        *panels[0].get_legend_handles_labels(), loc="outside right center", title="target"
    )


def _forms(results: "Results", canvas: Any) -> None:
    from jaxsd import costmodel

    panels = canvas.subplots(1, 2, sharey=True)
    for panel, target in zip(panels, ("Qwen1.5-110B", "LLaMa3.1-70B"), strict=True):
        mine = [row for row in results.pairs if row["target"] == target]
        x = np.array([row["draft_perplexity"] for row in mine])
        panel.plot(x, [row["alpha"] for row in mine], "o", color=COLORS[5], markersize=4)
        line = np.linspace(0.97 * x.min(), 1.02 * x.max(), 100)
        for (form, fit), color, style in zip(
            results.forms[target].items(), COLORS, ("-", "--", ":"), strict=False
        ):
            curve = np.asarray(costmodel.acceptance(fit.result, line, 10.0))
            label = f"{form}, R² = {fit.r_squared:.3f}"
            panel.plot(line, curve, style, color=color, label=label)
        panel.set_title(target)
        panel.set_xlabel("perplexity of the draft")
        panel.legend()
    panels[0].set_ylabel("acceptance probability α")


def _distances(results: "Results", canvas: Any) -> None:
    panels = canvas.subplots(1, 3)
    from .sdsl_measurements import OPT_13B_PARAMETERS

    kinds = (
        ("first_token", "time to first token (s)"),
        ("all_tokens", "time for 250 tokens (s)"),
        ("per_token", "time per token (s)"),
    )
    for panel, (field, label) in zip(panels, kinds, strict=True):
        for family, marker in zip(("OPT", "Qwen1.5", "Qwen2.5"), MARKERS, strict=False):
            mine = [row for row in results.latencies if row.family == family]
            distance = [abs(row.parameters - row.best) / OPT_13B_PARAMETERS for row in mine]
            value, reach = zip(*(getattr(row, field) for row in mine), strict=True)
            panel.errorbar(
                distance,
                value,
                reach,
                fmt=marker + "-",
                color=FAMILY_COLORS[family],
                markersize=4,
                linewidth=1,
                capsize=2,
                label=f"{family} drafts",
            )
        panel.set_xlabel("|N − N*| / M")
        panel.set_ylabel(label)
    panels[0].set_ylim(0, 0.155)
    _plain_log_ticks(panels[1].yaxis, (2, 5, 10, 20, 50))
    _plain_log_ticks(panels[2].yaxis, (0.01, 0.02, 0.05, 0.1, 0.2))
    panels[0].legend(loc="lower right")


def _scaling(results: "Results", canvas: Any) -> None:
    panels = canvas.subplots(3, 2)
    rows = (
        ("M", "parameters of the target, M", "draft_tokens", "D = {:.0e}"),
        ("D", "training tokens of the draft, D", "target_parameters", "M = {:g}B"),
        ("D'", "training tokens of the target, D'", "target_parameters", "M = {:g}B"),
    )
    fields = {"M": "target_parameters", "D": "draft_tokens", "D'": "target_tokens"}
    letters = iter("abcdef")
    for pair, (axis, label, by, text) in zip(panels, rows, strict=True):
        found = results.lines[axis]
        along, kinds = getattr(found, fields[axis]), getattr(found, by)
        for kind, color in zip(np.unique(kinds), COLORS, strict=False):
            mine = kinds == kind
            order = np.argsort(along[mine])
            size = found.design.parameters[mine][order]
            share = size / found.target_parameters[mine][order]
            name = _tokens(text, kind) if by == "draft_tokens" else text.format(kind / 1e9)
            pair[0].plot(along[mine][order], size / 1e6, color=color, label=name)
            pair[1].plot(along[mine][order], 100 * share, color=color, label=name)
        for panel, quantity in zip(pair, ("N* (millions)", "N* / M (%)"), strict=True):
            panel.set_xscale("log")
            panel.set_xlabel(label)
            panel.set_ylabel(quantity)
            panel.set_title(f"({next(letters)})", loc="left")
        pair[1].legend(loc="upper right", ncols=1 if axis == "M" else 2)
        if axis != "M":  # flat lines need a scale from 0, and room for the legend
            for panel in pair:
                panel.set_ylim(0, 1.35 * panel.get_ylim()[1])


def _tokens(text: str, value: float) -> str:
    """`D = 10^12` from 1e12."""
    return f"{text.partition('=')[0].strip()} = $10^{{{round(np.log10(value))}}}$"


def _depths(results: "Results", canvas: Any) -> None:
    from .sdsl_measurements import latency_fits

    fits = latency_fits(results.latencies)
    panels = canvas.subplots(2, 2)
    for line, (group, lines) in zip(panels, fits.items(), strict=True):
        mine = [row for row in results.latencies if row.family.startswith(group)]
        distances = [abs(row.parameters - row.best) / 1e9 for row in mine]
        columns = {
            "|N - N*|": (distances, 1e9, "|N − N*| (billions)"),
            "layers": ([row.n_layers for row in mine], 1, "layers of the draft"),
        }
        for panel, (name, (values, unit, label)) in zip(line, columns.items(), strict=True):
            fit = lines[name]
            ends = np.array([0.0, 1.08 * max(values)])
            height = fit.result["intercept"] + fit.result[name] * unit * ends
            panel.plot(ends, 1e3 * height, color=COLORS[5], linewidth=1, linestyle="--")
            for family, marker in zip(("OPT", "Qwen1.5", "Qwen2.5"), MARKERS, strict=False):
                chosen = [i for i, row in enumerate(mine) if row.family == family]
                if chosen:
                    panel.plot(
                        [values[i] for i in chosen],
                        [1e3 * mine[i].per_token[0] for i in chosen],
                        marker,
                        color=FAMILY_COLORS[family],
                        label=f"{family} drafts",
                    )
            panel.set_xlabel(label)
            panel.set_ylabel("time per token (ms)")
            panel.set_xlim(-0.03 * ends[1], ends[1])
            panel.set_ylim(0, None)
            panel.set_title(f"R² = {fit.r_squared:.3f}")
            panel.legend(loc="lower right")


def _pass_times(results: "Results", canvas: Any) -> None:
    left, right = canvas.subplots(1, 2)
    for (name, (rows, fit)), color in zip(
        results.measured.gpt_fast.items(), (COLORS[0], COLORS[3], COLORS[1]), strict=True
    ):
        measured = np.array([row["tokens_per_second"] for row in rows])
        left.plot(
            measured,
            1 / fit.predicted,
            "o",
            color=color,
            markersize=4,
            label=f"{name}: {100 * fit.mean_relative_error:.1f} %",
        )
    ends = np.array([12.0, 420.0])
    left.plot(ends, ends, color=COLORS[5], linewidth=0.8)
    for axis in (left.xaxis, left.yaxis):
        _plain_log_ticks(axis, (20, 50, 100, 200, 400))
    left.set_xlabel("measured tokens per second")
    left.set_ylabel("predicted tokens per second")
    left.set_title("all formats")
    left.legend(title="mean relative error")

    rows, fit = results.measured.gpt_fast["bf16"]
    for model, marker, color in zip(
        dict.fromkeys(row["model"] for row in rows), MARKERS, COLORS, strict=False
    ):
        mine = [i for i, row in enumerate(rows) if row["model"] == model]
        degrees = [rows[i]["tensor_parallel"] for i in mine]
        speed = [rows[i]["tokens_per_second"] for i in mine]
        right.plot(degrees, speed, marker, color=color, label=model, markersize=5)
        right.plot(degrees, 1 / fit.predicted[mine], "-", color=color, linewidth=1)
    _plain_log_ticks(right.xaxis, (1, 2, 4, 8))
    _plain_log_ticks(right.yaxis, (20, 50, 100, 200, 400))
    right.set_xlabel("chips")
    right.set_ylabel("tokens per second")
    right.set_title("bf16: points measured, lines predicted")
    right.legend()


def _losses(results: "Results", canvas: Any) -> None:
    losses = results.losses
    n, _, layers, width, measured = sdsl_losses.columns(losses.rows)
    panels = canvas.subplots(1, 2, sharey=True)
    large = n > 1e9
    groups = (
        ("fitted", losses.is_fitted, COLORS[5], "o"),
        ("held out, 80M to 340M", ~losses.is_fitted & ~large, COLORS[0], "o"),
        ("held out, 1B", large, COLORS[1], "s"),
    )
    for panel, name in zip(panels, ("without shape", "with shape"), strict=True):
        predicted = losses.predictions[name]
        error = 100 * (predicted / measured - 1)
        for label, mine, color, marker in groups:
            panel.plot(
                (width / layers)[mine],
                error[mine],
                marker,
                color=color,
                markersize=4,
                alpha=0.85,
                label=label,
            )
        panel.axhline(0, color=COLORS[5], linewidth=0.8)
        panel.set_title(f"{name}: R² = {sdsl_losses.r_squared(predicted, measured):.4f}")
        panel.set_xlabel("d_model / n_layers")
        _plain_log_ticks(panel.xaxis, (20, 50, 100, 200, 400))
    panels[0].set_ylabel("predicted / measured loss − 1 (%)")
    panels[1].legend(loc="lower right")


def _plain_log_ticks(axis: Any, values: tuple[float, ...]) -> None:
    """A logarithmic axis with numbers as they are written, at these places only."""
    if axis.axis_name == "x":
        axis.axes.set_xscale("log")
    else:
        axis.axes.set_yscale("log")
    axis.set_ticks(values, labels=[f"{value:g}" for value in values])
    axis.set_ticks([], minor=True)


def _shades(count: int) -> list[Any]:
    """So many colours from dark to light, of one palette."""
    import matplotlib

    return [matplotlib.colormaps["viridis"](i / (count - 0.5)) for i in range(count)]
