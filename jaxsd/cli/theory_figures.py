"""The figures of the theory drawn again, and what it leaves open; and a measured front."""

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .reproduction import COLORS, Figure

if TYPE_CHECKING:
    from .theory_results import Results

# Figure 3: by how much the target wants one token more than the draft, what the draft gives it, and
# V / V'.
GAP, DRAFT_PROBS, RATIOS, DRAFTS = 0.3, (0.1, 0.3, 0.5, 0.7), (1.25, 2, 5, 20), (2, 4, 8, 16)
# Of what is measured: colour and marker by the kind of rule.
_LOOKS = {
    "optimal": (COLORS[0], "o"),
    "target": (COLORS[3], "s"),
    "lenience": (COLORS[2], "^"),
    "typical": (COLORS[4], "D"),
}


def figures(results: "Results") -> list[Figure]:
    """Figures 2 to 4 of the paper, then what is ours, at last the measured front."""

    def figure(name: str, caption: str, draw: Any, size: tuple[float, float]) -> Figure:
        return Figure(name, caption, functools.partial(draw, results), size)

    return [
        figure(
            "figure_2",
            "Rejections in generated texts and by the formulas (bands: two standard errors), and "
            "how they fall with more drafts.",
            _figure_2,
            (9.4, 3.3),
        ),
        figure(
            "figure_3",
            "What a batch of drafts saves where it begins: two tokens, and uniform laws.",
            _figure_3,
            (9.4, 3.3),
        ),
        figure(
            "figure_4",
            "Bias against rejections for one token, and along the over-acceptance threshold.",
            _figure_4,
            (9.4, 3.3),
        ),
        figure(
            "random_chains",
            "Rejections of chains whose rows are drawn in three ways, and the paper's.",
            _random_chains,
            (6.4, 3.2),
        ),
        figure(
            "theorem_2",
            "Rejections per token: the bound of theorem 2 and block verification below it.",
            _theorem_2,
            (6.4, 3.4),
        ),
        figure(
            "texts",
            "Bias against rejections for whole texts, and the bound on the bias of a text.",
            _texts,
            (7.6, 3.4),
        ),
        figure("measured_front", _measured_caption(results), _measured_front, (9.4, 3.7)),
    ]


def _figure_2(results: "Results", canvas: Any) -> None:
    found = results.rejections
    one, batch, more = _three_panels(canvas)
    for panel, kinds in ((one, (1,)), (batch, tuple(m for m in found.simulations if m > 1))):
        for color, m in zip(COLORS, kinds, strict=False):
            simulation = found.simulations[m]
            runs = np.arange(1, simulation.rejections.size + 1)
            mean = np.cumsum(simulation.rejections) / runs
            reach = 2 * simulation.rejections.std() / np.sqrt(runs)
            shown = runs >= 100
            name = "" if m == 1 else f", M = {m}"
            panel.fill_between(
                runs[shown],
                (simulation.expected - reach)[shown],
                (simulation.expected + reach)[shown],
                color=color,
                alpha=0.15,
                linewidth=0,
            )
            panel.plot(runs[shown], mean[shown], color=color, label=f"mean of texts{name}")
            panel.axhline(
                simulation.expected,
                color=color,
                linestyle="--",
                linewidth=1,
                label=f"formula: {simulation.expected:.2f}",
            )
        panel.set_xscale("log")
        panel.set_xlim(100, None)
        panel.set_xlabel("texts generated")
        panel.set_ylabel("rejections per text")
    _room(one, 0.35)
    _room(batch, 0.55)
    one.legend(loc="upper right")
    batch.legend(loc="upper right", ncols=1)
    one.set_title("(a) speculative sampling, T = 50")
    batch.set_title("(b) M drafts where a batch begins")
    for color, (length, curve) in zip(COLORS, found.curves.items(), strict=False):
        more.plot(np.arange(1, curve.size + 1), curve, color=color, label=f"T = {length}")
        more.axhline(
            found.limits[length],
            color=color,
            linestyle="--",
            linewidth=1,
            label=f"limit: {found.limits[length]:.1f}",
        )
    more.set_xscale("log")
    more.set_ylim(0, 1.35 * max(curve.max() for curve in found.curves.values()))
    more.set_xlabel("drafts M")
    more.set_ylabel("rejections per text, expected")
    more.set_title("(c) more drafts")
    more.legend(loc="upper right", ncols=2)


def _figure_3(results: "Results", canvas: Any) -> None:
    from jaxsd import costmodel

    del results
    bernoulli, uniform, sizes = _three_panels(canvas)
    drafts = np.arange(1, 31)
    for color, u in zip(COLORS, DRAFT_PROBS, strict=False):
        saved = costmodel.bernoulli_batch_improvement(u, u + GAP, drafts)
        label = f"u = {u:g}, v = {u + GAP:g}"
        bernoulli.plot(drafts, saved, "o-", color=color, markersize=2.5, label=label)
    bernoulli.axhline(GAP, color=COLORS[5], linestyle="--", linewidth=1)
    bernoulli.annotate("|u − v|", (30, GAP), (0, 3), textcoords="offset points", ha="right")
    bernoulli.set_ylim(0, 1.15 * GAP)
    bernoulli.set_title("(a) two tokens: Ber(u) for Ber(v)")
    bernoulli.legend(loc="lower right")
    for color, ratio in zip(COLORS, RATIOS, strict=False):
        saved = costmodel.uniform_batch_improvement(ratio, 1.0, drafts)
        uniform.plot(drafts, saved, "o-", color=color, markersize=2.5, label=f"V / V′ = {ratio:g}")
    uniform.set_ylim(0, 1)
    uniform.set_title("(b) uniform: V tokens for V′")
    uniform.legend(loc="upper left", ncols=2)
    ratios = np.geomspace(1, 100, 300)
    for color, m in zip(COLORS, DRAFTS, strict=False):
        saved = costmodel.uniform_batch_improvement(ratios, 1.0, m)
        sizes.plot(ratios, saved, color=color, label=f"M = {m}")
    sizes.set_xscale("log")
    sizes.set_ylim(0, 1)
    sizes.set_title("(c) the same by size")
    sizes.legend(loc="upper left", ncols=2)
    for panel in (bernoulli, uniform):
        panel.set_xlabel("drafts M")
    bernoulli.set_ylabel("rejections saved per batch")
    sizes.set_xlabel("V / V′")


def _figure_4(results: "Results", canvas: Any) -> None:
    from .theory_results import EPSILONS

    found = results.tradeoff
    plane, along, ways = _three_panels(canvas)
    rejection, optimal, resampling = (np.asarray(part) for part in found.front)
    variation = rejection[0]
    plane.fill_between([0, variation], [variation, 0], color=COLORS[1], alpha=0.12, linewidth=0)
    plane.text(0.3 * variation, 0.22 * variation, "unattainable", color=COLORS[1], ha="center")
    plane.plot(*found.points, ".", color=COLORS[5], alpha=0.25, markersize=2.5, markeredgewidth=0)
    plane.plot([], [], ".", color=COLORS[5], label="random rules")
    plane.plot(rejection, resampling, color=COLORS[3], label="resampling from the target (UNO)")
    plane.plot(rejection, optimal, color=COLORS[0], linewidth=2, label="optimal residual (OPT)")
    plane.set_xlim(0, 1)
    plane.set_ylim(0, 1)
    plane.set_xlabel("rejection probability")
    plane.set_ylabel("bias (total variation)")
    plane.set_title(f"(a) one token, TV = {variation:.3f}")
    plane.legend(loc="upper right", frameon=True, framealpha=0.9, edgecolor="none")
    along.plot(EPSILONS, rejection, color=COLORS[2], label="rejection")
    along.plot(EPSILONS, optimal, color=COLORS[0], label="bias, optimal residual")
    along.plot(
        EPSILONS, rejection + optimal, color=COLORS[5], linestyle="--", linewidth=1, label="sum: TV"
    )
    along.set_ylim(0, 1.45 * variation)
    along.set_ylabel("probability")
    along.set_title("(b) threshold ε")
    ways.plot(EPSILONS, resampling, color=COLORS[3], label="resampling from the target (UNO)")
    ways.plot(EPSILONS, optimal, color=COLORS[0], label="optimal residual (OPT)")
    ways.set_ylim(0, 1.45 * variation)
    ways.set_ylabel("bias (total variation)")
    ways.set_title("(c) two residual laws")
    for panel in (along, ways):
        panel.set_xlim(0, EPSILONS[-1])
        panel.set_xlabel("over-acceptance threshold ε")
        panel.legend(loc="upper left")


def _random_chains(results: "Results", canvas: Any) -> None:
    from .theory_results import LENGTH, NUM_STATES, PAPER_REJECTIONS

    panel = canvas.subplots()
    every = np.concatenate(list(results.rejections.by_law.values()))
    edges = np.linspace(math.floor(every.min()), math.ceil(every.max()), 81)
    names = {
        "uniform numbers": "uniform",
        "exponential numbers": "exponential",
        "exponentials of normal numbers": "exp(normal)",
    }
    for color, (name, totals) in zip(COLORS[::2], results.rejections.by_law.items(), strict=False):
        label = f"{names[name]}: {totals.mean():.2f} ± {totals.std():.2f}"
        panel.hist(totals, edges, color=color, alpha=0.65, label=label)
    paper = float(PAPER_REJECTIONS)
    panel.axvline(paper, color=COLORS[1], label=f"the paper's: {PAPER_REJECTIONS}")
    panel.set_xlabel(f"expected rejections in {LENGTH} tokens of a chain of {NUM_STATES} states")
    panel.set_ylabel("random chains")
    panel.legend(title="numbers behind a row", loc="upper center")


def _theorem_2(results: "Results", canvas: Any) -> None:
    from .theory_results import GAMMAS

    panel = canvas.subplots()
    for color, (name, rules) in zip(COLORS, results.bound.per_token.items(), strict=False):
        panel.plot(GAMMAS, rules["token"], "--", color=color, label=f"{name}: the bound")
        panel.plot(
            GAMMAS, rules["block"], "o-", color=color, markersize=4, label="   block verification"
        )
    panel.set_xscale("log", base=2)
    panel.set_xticks(GAMMAS, [f"{gamma}" for gamma in GAMMAS])
    panel.set_ylim(0, 0.4)
    panel.set_xlabel("drafted tokens a round γ")
    panel.set_ylabel("rejections per token")
    panel.legend(loc="lower left", title="draft for target, no bonus token")


def _texts(results: "Results", canvas: Any) -> None:
    from .theory_results import LENGTH, SHORT_LENGTH, SHORT_STATES

    found = results.tradeoff
    front, bound = canvas.subplots(1, 2)
    text = found.text
    front.plot(
        text.rejection_resampling,
        text.loss_resampling,
        color=COLORS[3],
        label="resampling from the target",
    )
    front.plot(text.rejection, text.loss, color=COLORS[0], linewidth=2, label="optimal residual")
    front.plot(
        [text.rejection[0], text.rejection[-1]],
        [text.loss[0], text.loss[-1]],
        color=COLORS[5],
        linestyle="--",
        linewidth=1,
        label="straight line",
    )
    front.set_xlim(0, None)
    front.set_ylim(0, 1.3 * text.loss.max())
    front.set_xlabel("expected rejections per text")
    front.set_ylabel("sum of the biases of its tokens")
    front.set_title(f"(a) {LENGTH} tokens")
    front.legend(loc="upper right")
    short = found.short
    bound.plot(short.rejection, short.loss, color=COLORS[0], label="sum of the biases: a bound")
    bound.plot(short.rejection, found.short_bias, color=COLORS[2], label="bias of the whole text")
    bound.set_xlim(0, None)
    bound.set_ylim(0, 1.3 * short.loss.max())
    bound.set_xlabel("expected rejections per text")
    bound.set_ylabel("total variation")
    bound.set_title(f"(b) {SHORT_LENGTH} tokens, {SHORT_STATES} states: exact")
    bound.legend(loc="upper right")


def _measured_caption(results: "Results") -> str:
    from .theory_measured import NUM_DRAFT_TOKENS

    found = results.measured
    return (
        "Ours, not the paper's: bias against rejections as measured on the embedded pair "
        f"({found.target_params / 1e6:.1f} M and {found.draft_params / 1e6:.2f} M parameters), "
        f"{NUM_DRAFT_TOKENS} drafted tokens a round, "
        f"{sum(point.num_tokens for point in found.points)} tokens in all; bars are two standard "
        "errors, rings the theory at the places that were judged, curves the theory along the "
        "lossless rule's text."
    )


def _measured_front(results: "Results", canvas: Any) -> None:
    from .theory_measured import NUM_DRAFT_TOKENS

    found = results.measured
    first = found.settings.temperatures[0]
    num_tokens = sum(point.num_tokens for point in found.points)
    canvas.suptitle(
        f"Embedded pair, {found.target_params / 1e6:.1f} M and {found.draft_params / 1e6:.2f} M "
        f"parameters, K = {NUM_DRAFT_TOKENS}, {num_tokens} tokens (ours, not the paper's)",
        fontsize=9,
    )
    plane, shares, speed = _three_panels(canvas)
    curve = found.curves[first]
    for point in found.points:
        color, marker = _LOOKS[point.kind]
        is_first = point.temperature == first
        look: dict[str, Any] = {
            "color": color,
            "marker": marker,
            "markersize": 4,
            "linestyle": "none",
            "markerfacecolor": color if is_first else "white",
        }
        at = np.array([point.rejections, point.loss])
        reach = 2 * point.standard_error
        if is_first:
            if point.kind == "optimal":
                total = point.variation / point.num_places
                plane.plot([total, 0], [0, total], color=color, linewidth=0.7, alpha=0.6)
            if math.isfinite(point.epsilon):
                is_optimal = point.kind == "optimal"
                plane.annotate(
                    f"ε = {point.epsilon:g}",
                    at / point.num_places,
                    (-7, -4) if is_optimal else (5, 5),
                    textcoords="offset points",
                    ha="right" if is_optimal else "left",
                    va="top" if is_optimal else "bottom",
                    color=color,
                    fontsize=7,
                )
            exact = np.array([point.expected_rejections, point.expected_loss]) / point.num_places
            plane.plot(
                *exact, "o", color=color, markersize=8, fillstyle="none", markeredgewidth=0.8
            )
            plane.errorbar(
                *at / point.num_places, xerr=reach / point.num_places, elinewidth=1, **look
            )
        shares.errorbar(*at / point.variation, xerr=reach / point.variation, elinewidth=1, **look)
        speed.plot(point.tokens_per_pass, point.loss / point.num_tokens, **look)

    naive = _LOOKS["target"][0]
    plane.plot([], [], color=COLORS[0], linewidth=0.7, label="R + loss = TV, each text's own")
    plane.plot(
        curve.rejection,
        curve.loss_target,
        "--",
        color=naive,
        linewidth=1,
        label="resampling, lossless text",
    )
    plane.plot(
        [], [], "o", color=COLORS[5], markersize=8, fillstyle="none", label="theory where judged"
    )
    highest = max(curve.loss_target.max(), *(p.loss / p.num_places for p in found.points))
    plane.set_xlim(-0.3 * curve.rejection[0], 1.3 * curve.rejection[0])
    plane.set_ylim(-0.15 * highest, 1.6 * highest)
    plane.set_xlabel("rejections per judged token")
    plane.set_ylabel("loss per judged token (total variation)")
    plane.set_title(f"(a) temperature {first:g}")
    plane.legend(loc="upper right")

    shares.plot([1, 0], [0, 1], color=COLORS[0], linewidth=1, label="R + loss = TV")
    for style, (temperature, found_curve) in zip(("--", ":"), found.curves.items(), strict=False):
        variation = found_curve.rejection[0]
        shares.plot(
            found_curve.rejection / variation,
            found_curve.loss_target / variation,
            style,
            color=naive,
            linewidth=1,
            label=f"resampling, temperature {temperature:g}",
        )
    shares.set_xlim(-0.05, 1.3)
    shares.set_ylim(-0.05, 1.6)
    shares.set_xlabel("rejections over TV")
    shares.set_ylabel("losses over TV")
    shares.set_title("(b) all temperatures, one line")
    shares.legend(loc="upper right")

    labels = {
        "optimal": "optimal residual",
        "target": "resampling from the target",
        "lenience": "lenience",
        "typical": "typical acceptance",
    }
    kinds = {point.kind for point in found.points}
    for kind, (color, marker) in _LOOKS.items():
        if kind in kinds:
            speed.plot([], [], marker, color=color, markersize=4, label=labels[kind])
    for index, temperature in enumerate(found.settings.temperatures):
        face = "white" if index else COLORS[5]
        label = f"temperature {temperature:g}"
        speed.plot([], [], "o", color=COLORS[5], markersize=4, markerfacecolor=face, label=label)
    speed.set_xlim(None, NUM_DRAFT_TOKENS + 1.1)
    _room(speed, 0.75)
    speed.set_xlabel("tokens per pass of the target")
    speed.set_ylabel("loss per decoded token")
    speed.set_title("(c) the speed that is bought")
    speed.legend(loc="upper left")


def _three_panels(canvas: Any) -> Any:
    """Side by side, each with room for its own axis label."""
    canvas.get_layout_engine().set(w_pad=0.09)
    return canvas.subplots(1, 3)


def _room(panel: Any, share: float) -> None:
    """More room above the curves, for the legend."""
    low, high = panel.get_ylim()
    panel.set_ylim(low, high + share * (high - low))
