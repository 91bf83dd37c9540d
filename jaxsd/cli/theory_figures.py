"""The figures of the theory drawn again, and two of what it leaves open."""

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


def figures(results: "Results") -> list[Figure]:
    """Figures 2 to 4 of the paper, then random chains, theorem 2 and whole texts."""

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


def _three_panels(canvas: Any) -> Any:
    """Side by side, each with room for its own axis label."""
    canvas.get_layout_engine().set(w_pad=0.09)
    return canvas.subplots(1, 3)


def _room(panel: Any, share: float) -> None:
    """More room above the curves, for the legend."""
    low, high = panel.get_ylim()
    panel.set_ylim(low, high + share * (high - low))
