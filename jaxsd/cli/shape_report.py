"""The shape of a draft for real hardware: asked, searched, told and drawn."""

import math
import pathlib
import re
from typing import Any, NamedTuple

import rich.box
import rich.console
import rich.progress
import rich.table

from . import question, reproduction
from .quantity import format_quantity

NUM_ELASTICITIES = 8
NUM_CHOICES = 5
# Where the speed-up is drawn against the draft length.
MAX_DRAWN_GAMMA = 16


class Asked(NamedTuple):
    """A question of the command line, in the cost model's terms."""

    target: str
    chip: str
    target_model: Any
    devices: Any
    chips: int
    apart: bool
    batch: int
    context: int
    free: tuple[str, ...]
    objective: str
    draft_tokens: float | None
    gamma: float | None
    train_flops: float | None
    max_first_token_seconds: float | None
    max_token_seconds: float | None
    served_tokens: float | None
    draft_formats: dict[str, Any]
    laws: Any


def devices(chip: str, stack: Any) -> Any:
    """One chip of the catalogue and its software."""
    from jaxsd import costmodel

    return costmodel.Devices(costmodel.named_chip(chip), stack)


def run(asked: Asked, console: rich.console.Console, plot: str | None) -> dict[str, Any]:
    """Searches, prints, draws and returns the answer as JSON values."""
    from jaxsd import costmodel

    choices = costmodel.hardware_choices(asked.devices, asked.chips, asked.target_model.shape)
    if not asked.apart:
        choices = [choice for choice in choices if not choice.draft_apart]
    workload = costmodel.Workload(
        asked.batch, asked.context, served_tokens=asked.served_tokens or 0.0
    )
    limits = costmodel.Limits(
        training_flops=asked.train_flops or math.inf,
        time_to_first_token_seconds=asked.max_first_token_seconds or math.inf,
        seconds_per_token=asked.max_token_seconds or math.inf,
    )
    templates = [
        costmodel.draft_template(
            asked.target_model.shape,
            tokens=asked.draft_tokens or 1e12,
            gamma=4 if asked.gamma is None else asked.gamma,
            formats=formats,
        )
        for formats in asked.draft_formats.values()
    ]
    errors = rich.console.Console(stderr=True)
    steps = rich.progress.Progress(
        rich.progress.SpinnerColumn(),
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TimeElapsedColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    )
    with steps:
        task = steps.add_task("searching", total=4)
        result = costmodel.search(
            asked.target_model,
            choices,
            templates,
            asked.free,
            workload=workload,
            laws=asked.laws,
            limits=limits,
            objective=asked.objective,
        )
        best = result.best
        told: dict[str, Any] = {"result": result, "regions": [], "front": [], "interval": None}
        asked_of_best = best.design, best.target, best.hardware, best.workload, asked.laws
        if not best.plain:
            steps.update(task, completed=1, description="intervals and elasticities")
            if isinstance(asked.laws.acceptance, costmodel.AcceptanceLaw):
                told["interval"] = costmodel.speedup_interval(*asked_of_best)
            told["elasticities"] = costmodel.elasticities(*asked_of_best, objective="speedup")
            steps.update(task, completed=2, description="the flat region")
            told["regions"] = costmodel.flat_region(result)
            if plot is not None:
                steps.update(task, completed=3, description="the front")
                told["front"] = costmodel.pareto_front(result)
    _show(asked, told, console)
    if plot is not None and not best.plain:
        path = pathlib.Path(plot)
        reproduction.draw(
            lambda canvas: _draw(canvas, asked, told),
            path.with_suffix(""),
            (9.0, 6.6),
            (path.suffix,),
        )
        console.print(f"Drawn to {plot}.")
    return _as_json(asked, told)


def _show(asked: Asked, told: dict[str, Any], console: rich.console.Console) -> None:
    """Prints the answer, what it is made of and what to make of it."""
    result = told["result"]
    best = result.best
    if best.plain:
        console.print(_no_draft(asked, result))
        return
    console.print(_recommendation(asked, told))
    console.print(breakdown(best.estimate, best.design.gamma))
    console.print(_sensitivities(told["elasticities"]))
    console.print(_regions(told["regions"]))
    if len(result.solutions) > 1:
        console.print(_choices(asked, result))
    notes = []
    if result.infeasible:
        # Of placements that differ only in the draft's chips and fail alike, one line is enough.
        reasons = dict.fromkeys(re.sub(r", draft on [^:]*", "", x) for x in result.infeasible)
        notes.append(f"[bold]Rejected[/bold]: {'; '.join(reasons)}.")
    if result.at_bound:
        notes.append(f"[bold]The answer leans on[/bold]: {'; '.join(result.at_bound)}.")
    outside = question.extrapolations(best.estimate, asked.laws)
    if outside:
        notes.append(f"[bold]Extrapolated[/bold]: {'; '.join(outside)}.")
    notes.append(
        "[dim]The intervals hold for the acceptance law alone: for its average, and for one pair "
        "of models, which scatters around it. Times are those of the named stack; calibrate them "
        "with jaxsd fit times, and the laws with jaxsd fit acceptance and jaxsd fit loss.[/dim]"
    )
    for note in notes:
        console.print(note)


def _no_draft(asked: Asked, result: Any) -> str:
    rate = float(result.best.estimate.tokens_per_second)
    return (
        f"No draft makes {asked.target} faster here: decode it plainly, at a predicted "
        f"{rate:.0f} tokens per second."
    )


def _recommendation(asked: Asked, told: dict[str, Any]) -> rich.table.Table:
    from jaxsd import costmodel

    best, result = told["result"].best, told["result"]
    shape, estimate = best.design.shape, best.estimate
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD,
        title=f"A draft for {asked.target} on {asked.chips} x {asked.chip}",
        show_header=False,
        show_edge=False,
    )
    table.title_justify = "left"
    table.add_column("")
    table.add_column("", overflow="fold")
    heads = f"{shape.n_heads} query heads of {shape.head_dim}, {shape.n_kv_heads} for keys"
    table.add_row("shape", f"{shape.n_layers} layers x {shape.d_model}, MLP {shape.d_ff}, {heads}")
    table.add_row("parameters", format_quantity(float(costmodel.parameters_total(shape))))
    flops = f"{float(estimate.training_flops):.3g} FLOPs"
    table.add_row("training", f"{format_quantity(float(best.design.tokens))} tokens, {flops}")
    table.add_row("draft tokens a round", f"{best.design.gamma:g}")
    table.add_row("batch, context", f"{best.workload.batch:g}, {asked.context}")
    table.add_row("placement", _choice(asked, best))
    speedup = f"{float(estimate.speedup):.2f}x"
    if told["interval"]:
        interval = told["interval"]
        speedup += (
            f"  (95 %: {interval.low:.2f} to {interval.high:.2f} for the law, "
            f"{interval.pair_low:.2f} to {interval.pair_high:.2f} for a pair)"
        )
    table.add_row("[bold]predicted speed-up[/bold]", speedup)
    table.add_row(
        "tokens per second",
        f"{float(estimate.tokens_per_second):.4g}, plain "
        f"{float(estimate.plain_tokens_per_second):.4g}",
    )
    table.add_row(
        "tokens a round, alpha",
        f"{float(estimate.tokens_per_round):.2f}, {float(estimate.alpha):.3f}",
    )
    first = 1e3 * float(estimate.time_to_first_token_seconds)
    each = 1e3 * float(estimate.seconds_per_token)
    table.add_row("latency", f"first token {first:.3g} ms, then {each:.3g} ms a token")
    memory = estimate.memory
    held = (float(memory.target_bytes) + float(memory.draft_bytes)) / 1e9
    table.add_row(
        "memory of the fullest chip",
        f"{100 * float(memory.excess_ratio):.0f} % of {float(memory.capacity_bytes) / 1e9:.3g} GB "
        f"usable (target and draft: {held:.3g} GB)",
    )
    table.add_row("binds", costmodel.TERMS[int(estimate.binding)])
    table.add_row("loss from rounding", f"{100 * best.rounding_loss:.2f} % of {result.objective}")
    return table


def placement(hardware: Any) -> str:
    """Where the models sit, in a few words."""
    target, draft = int(hardware.target.tensor_parallel), int(hardware.draft.tensor_parallel)
    of = "of its own" if hardware.draft_apart else "of these"
    plural = "s" if target > 1 else ""
    return f"target on {target} chip{plural}, draft on {draft} {of}"


def breakdown(estimate: Any, gamma: float) -> rich.table.Table:
    """The time of a round by what is done and what it is spent on."""
    parts = estimate.round
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD, title="Milliseconds of a round", show_edge=False
    )
    table.title_justify = "left"
    table.add_column("")
    for name in ("all", "fixed", "layers", "collectives", "compute", "memory"):
        table.add_column(name, justify="right")

    def row(label: str, time: Any, times: float, total: float) -> None:
        fields = (
            time.fixed_seconds,
            time.layers_seconds,
            time.collectives_seconds,
            time.compute_seconds,
            time.memory_seconds,
        )
        cells = [f"{1e3 * times * float(value):.3f}" for value in fields]
        table.add_row(label, f"{1e3 * total:.3f}", *cells)

    if gamma:
        row(f"drafting, {gamma:g} steps", parts.draft_step, gamma, float(parts.draft_seconds))
    row("verifying", parts.verify_pass, 1, float(parts.verify_seconds))
    table.add_row("host", f"{1e3 * float(parts.host_seconds):.3f}")
    table.add_row("transfer", f"{1e3 * float(parts.transfer_seconds):.3f}")
    table.add_row("[bold]a round[/bold]", f"[bold]{1e3 * float(parts.seconds):.3f}[/bold]")
    row("(plain pass)", parts.plain_pass, 1, float(parts.plain_pass.seconds))
    table.caption = "compute and memory overlap: of the two the larger counts"
    return table


def _sensitivities(elasticities: dict[str, float]) -> rich.table.Table:
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD,
        title="One percent more of this changes the speed-up by",
        show_header=False,
        show_edge=False,
    )
    table.title_justify = "left"
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in list(elasticities.items())[:NUM_ELASTICITIES]:
        table.add_row(name, f"{value:+.3f} %")
    return table


def _regions(regions: list[Any]) -> rich.table.Table:
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD, title="Designs nearly as good", show_edge=False
    )
    table.title_justify = "left"
    table.add_column("within")
    table.add_column("designs", justify="right")
    for name in regions[0].ranges:
        table.add_column(name, justify="right")
    for region in regions:
        cells = []
        for name, (low, high) in region.ranges.items():
            more = "+" if name in region.cut_off else ""
            write = format_quantity if high >= 1e5 else "{:g}".format
            cells.append(f"{write(low)} to {write(high)}{more}")
        table.add_row(f"{100 * region.loss:g} %", str(region.num_designs), *cells)
    return table


def _choice(asked: Asked, solution: Any) -> str:
    """The placement, and the format of the draft's weights where there was a choice."""
    where = placement(solution.hardware)
    if len(asked.draft_formats) == 1:
        return where
    held = solution.design.formats.weight_bytes
    names = [name for name, one in asked.draft_formats.items() if one.weight_bytes == held]
    return f"{where}, draft in {names[0]}"


def _choices(asked: Asked, result: Any) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title="The best placements", show_edge=False)
    table.title_justify = "left"
    table.add_column("")
    for name in (result.objective, "speed-up", "layers x width", "gamma"):
        table.add_column(name, justify="right")
    for solution in result.solutions[:NUM_CHOICES]:
        shape = solution.design.shape
        drafted = "plain" if solution.plain else f"{shape.n_layers} x {shape.d_model}"
        table.add_row(
            _choice(asked, solution),
            f"{solution.objective:.4g}",
            f"{float(solution.estimate.speedup):.2f}x",
            drafted,
            f"{solution.design.gamma:g}",
        )
    return table


def _as_json(asked: Asked, told: dict[str, Any]) -> dict[str, Any]:
    from jaxsd import costmodel

    result = told["result"]
    best, estimate = result.best, result.best.estimate
    shape = best.design.shape
    interval = told["interval"]
    return {
        "target": asked.target,
        "chip": asked.chip,
        "chips": asked.chips,
        "speculate": not best.plain,
        "shape": {name: _plain(value) for name, value in shape._asdict().items()},
        "draft_parameters": float(costmodel.parameters_total(shape)),
        "draft_tokens": float(best.design.tokens),
        "gamma": float(best.design.gamma),
        "batch": float(best.workload.batch),
        "context": asked.context,
        "target_tensor_parallel": int(best.hardware.target.tensor_parallel),
        "draft_tensor_parallel": int(best.hardware.draft.tensor_parallel),
        "draft_apart": bool(best.hardware.draft_apart),
        "draft_weight_bytes": float(best.design.formats.weight_bytes),
        "objective": asked.objective,
        "objective_value": best.objective,
        "rounding_loss": best.rounding_loss,
        "continuous": best.continuous,
        "estimate": estimate_json(estimate),
        "interval": interval._asdict() if interval else None,
        "elasticities": told.get("elasticities", {}),
        "flat_region": [region._asdict() for region in told["regions"]],
        "front": [
            {
                "draft_parameters": float(costmodel.parameters_total(point.solution.design.shape)),
                "n_layers": point.solution.design.shape.n_layers,
                "d_model": point.solution.design.shape.d_model,
                "gamma": point.solution.design.gamma,
                "speedup": float(point.solution.estimate.speedup),
            }
            for point in told["front"]
        ],
        "infeasible": list(result.infeasible),
        "at_bound": list(result.at_bound),
        "extrapolated": [] if best.plain else question.extrapolations(estimate, asked.laws),
    }


def estimate_json(estimate: Any) -> dict[str, Any]:
    """Every field of an estimate, by name."""
    from jaxsd import costmodel

    def convert(value: Any) -> Any:
        if hasattr(value, "_asdict"):
            return {name: convert(field) for name, field in value._asdict().items()}
        return float(value)

    return convert(estimate) | {"binding": costmodel.TERMS[int(estimate.binding)]}


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool) else float(value)


def _draw(canvas: Any, asked: Asked, told: dict[str, Any]) -> None:
    """Four panels: length, flat region, time of a round, front."""
    panels = canvas.subplots(2, 2)
    best = told["result"].best
    _draw_lengths(panels[0, 0], asked, best, told["interval"])
    _draw_region(canvas, panels[0, 1], asked, told["result"])
    _draw_round(panels[1, 0], best)
    _draw_front(panels[1, 1], told["front"], best)
    for panel, letter in zip(panels.ravel(), "abcd", strict=True):
        panel.set_title(letter, loc="left", fontweight="bold")


def _draw_lengths(panel: Any, asked: Asked, best: Any, interval: Any) -> None:
    """Speed-up against draft tokens per round, with the law's interval."""
    import numpy as np

    from jaxsd import costmodel

    gammas = np.arange(0, MAX_DRAWN_GAMMA + 1)
    values, lows, highs = [], [], []
    for gamma in gammas:
        design = best.design._replace(gamma=float(gamma))
        asked_here = design, best.target, best.hardware, best.workload, asked.laws
        if interval and gamma:
            here = costmodel.speedup_interval(*asked_here)
            values.append(here.value)
            lows.append(here.low)
            highs.append(here.high)
        else:
            value = float(costmodel.throughput(*asked_here).speedup)
            values.append(value)
            lows.append(value)
            highs.append(value)
    if interval:
        panel.fill_between(
            gammas, lows, highs, alpha=0.18, linewidth=0, label="95 %, acceptance law"
        )
    panel.plot(gammas, values, marker="o", markersize=3, label="predicted")
    panel.plot(
        [best.design.gamma], [float(best.estimate.speedup)], "*", markersize=11, color="black"
    )
    panel.axhline(1, color="grey", linewidth=0.8, linestyle="--", label="plain decoding")
    panel.set_xticks(gammas[::2])
    panel.set_xlabel("draft tokens per round")
    panel.set_ylabel("speed-up")
    panel.legend(loc="lower center", bbox_to_anchor=(0.5, 0.06))


def _draw_region(canvas: Any, panel: Any, asked: Asked, result: Any) -> None:
    """Speed-up over width and depth, with lines where 1 % and 5 % are lost."""
    import numpy as np

    from jaxsd import costmodel

    best, shape = result.best, result.best.design.shape
    step = result.width_multiple
    widths = step * np.unique(np.linspace(1, max(3 * shape.d_model // step, 4), 28).round())
    depths = np.arange(1, max(3 * shape.n_layers, 8) + 1)
    grid = np.meshgrid(widths, depths)
    scale = grid[0] / shape.d_model
    designs = best.design._replace(
        shape=shape._replace(
            d_model=grid[0],
            n_layers=grid[1].astype(float),
            n_heads=shape.n_heads * scale,
            n_kv_heads=np.maximum(shape.n_kv_heads * scale, 1),
            d_ff=shape.d_ff * scale,
        )
    )
    if asked.train_flops:
        flops = np.asarray(costmodel.training_flops(designs.shape, 1.0))
        if asked.draft_tokens is None:
            designs = designs._replace(tokens=np.minimum(asked.train_flops / flops, 1e14))
    gains = np.stack(
        [
            costmodel.throughput(
                designs._replace(gamma=float(gamma)),
                best.target,
                best.hardware,
                best.workload,
                asked.laws,
            ).speedup
            for gamma in range(1, MAX_DRAWN_GAMMA + 1)
        ]
    ).max(axis=0)
    mesh = panel.pcolormesh(widths, depths, gains, cmap="viridis", shading="nearest")
    top = float(best.estimate.speedup)
    lines = panel.contour(
        widths, depths, gains, levels=[top * 0.95, top * 0.99], colors="white", linewidths=1
    )
    panel.clabel(lines, fmt={top * 0.95: "5 %", top * 0.99: "1 %"}, fontsize=7)
    panel.plot([shape.d_model], [shape.n_layers], "*", markersize=11, color="white")
    fitted = asked.laws.loss.fitted
    low, high = float(fitted.min_aspect_ratio), float(fitted.max_aspect_ratio)
    for ratio in (low, high):
        if math.isfinite(ratio) and ratio > 1e-3:
            panel.plot(widths, widths / ratio, color="black", linestyle=":", linewidth=0.9)
    if float(fitted.min_layers) > 1:
        panel.axhline(float(fitted.min_layers), color="black", linestyle=":", linewidth=0.9)
    panel.set_ylim(depths[0] - 0.5, depths[-1] + 0.5)
    panel.set_xlim(widths[0] - step / 2, widths[-1] + step / 2)
    panel.grid(visible=False)
    panel.set_xlabel("width, d_model (dotted: range of the loss law)")
    panel.set_ylabel("layers")
    canvas.colorbar(mesh, ax=panel, label="speed-up at the best length")


def _draw_round(panel: Any, best: Any) -> None:
    """What a round's time is spent on."""
    parts = best.estimate.round
    gamma = float(best.design.gamma)
    rows = {
        "plain\npass": (parts.plain_pass, 1.0),
        "verify": (parts.verify_pass, 1.0),
        f"draft\n{gamma:g} steps": (parts.draft_step, gamma),
    }
    fields = ("roofline_seconds", "layers_seconds", "collectives_seconds", "fixed_seconds")
    labels = ("bytes or FLOPs", "layers", "collectives", "fixed")
    places = range(len(rows))
    left = [0.0] * len(rows)
    for field, label in zip(fields, labels, strict=True):
        values = [1e3 * times * float(getattr(time, field)) for time, times in rows.values()]
        panel.barh(places, values, left=left, height=0.55, label=label)
        left = [a + b for a, b in zip(left, values, strict=True)]
    panel.set_yticks(list(places), list(rows))
    panel.set_xlabel("milliseconds")
    panel.set_xlim(0, max(left) * 1.02)
    panel.set_ylim(-0.5, len(rows) + 0.1)
    panel.grid(visible=False, axis="y")
    panel.legend(loc="upper center", ncols=4, columnspacing=1, handlelength=1.2)


def _draw_front(panel: Any, front: list[Any], best: Any) -> None:
    """Speed-up against the draft's size."""
    import matplotlib.ticker

    from jaxsd import costmodel

    sizes = [float(costmodel.parameters_total(p.solution.design.shape)) / 1e6 for p in front]
    gains = [float(point.solution.estimate.speedup) for point in front]
    panel.plot(sizes, gains, marker="o", markersize=4, drawstyle="steps-post")
    for size, gain, point in zip(sizes, gains, front, strict=True):
        shape = point.solution.design.shape
        panel.annotate(
            f"{shape.n_layers}x{shape.d_model}",
            (size, gain),
            textcoords="offset points",
            xytext=(4, -9),
            fontsize=7,
        )
    size = float(costmodel.parameters_total(best.design.shape)) / 1e6
    panel.plot([size], [float(best.estimate.speedup)], "*", markersize=11, color="black")
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    panel.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    panel.margins(x=0.15, y=0.12)
    panel.set_xlabel("draft parameters, millions")
    panel.set_ylabel("speed-up")
