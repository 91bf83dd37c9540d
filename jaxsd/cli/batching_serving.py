"""Requests served under the policies of the batching paper: simulated, in tables, drawn."""

import functools
from typing import Any, NamedTuple

import numpy as np

from .reproduction import COLORS, Comparison, Figure, Table

NUM_TOKENS = 128  # of every answer, as in the paper
MAX_BATCH = 32
MAX_LENGTH = 8
# Traffic is ours, from a server that idles to one that is overloaded: the paper's is not known.
INTERVALS = (0.04, 0.05, 0.07, 0.1, 0.2, 0.4, 0.8, 1.6)  # seconds
VARIATIONS = (1.0, 4.0)  # coefficients of variation that latency is computed for by interval
BURSTS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0)  # and those at one interval
BURST_INTERVAL = 0.2
PHASES = ((1.0, 90), (0.1, 60), (0.4, 60), (0.045, 40), (1.0, 80))  # (interval, duration) seconds
CALM = 0.1  # seconds: at such intervals and longer plain decoding keeps up, even in bursts
BATCHINGS = ("run_to_completion", "continuous")
BATCHING_NAMES = {
    "run_to_completion": "batches run to completion",
    "continuous": "continuous batching",
}
POLICIES = {
    "none": "no speculation",
    "2": "2 draft tokens",
    "4": "4 draft tokens",
    "8": "8 draft tokens",
    "table": "table by batch",
    "oracle": "best by batch",
}
FIXED = ("2", "4", "8")
STYLES = {
    "none": (COLORS[5], "-", "o"),
    "2": (COLORS[3], "-", "s"),
    "4": (COLORS[2], "-", "^"),
    "8": (COLORS[1], "-", "v"),
    "table": (COLORS[0], "-", "D"),
    "oracle": (COLORS[4], ":", "x"),
}
WINDOW = 10.0  # seconds over which latencies are averaged in the course of time


class Traffic(NamedTuple):
    """One simulated setting."""

    batching: str
    variation: float  # coefficient of variation of the intervals
    interval: float  # mean, seconds


class KnownTimes(NamedTuple):
    """Times of whole batches and lengths, looked up: each simulation asks for them again."""

    seconds: Any  # [32, M + 1] array, a round by batch size and draft length

    def draft(self, batch: Any) -> Any:
        """Nothing: the rounds are whole."""
        return 0 * batch

    def verify(self, batch: Any, gamma: Any) -> Any:
        """The round that is looked up."""
        return self.seconds[(batch - 1).astype(int), gamma.astype(int)]

    def check(self) -> None:
        """They come from checked times."""


class Serving(NamedTuple):
    """Everything that was served."""

    statistics: dict[Traffic, dict[str, Any]]  # policy -> costmodel.LatencyStatistics
    over_time: dict[str, Any]  # policy -> costmodel.Served, traffic of several phases


def settings() -> list[Traffic]:
    """Every traffic that is simulated."""
    by_interval = [(cv, interval) for cv in VARIATIONS for interval in INTERVALS]
    by_burst = [(cv, BURST_INTERVAL) for cv in BURSTS if cv not in VARIATIONS]
    return [Traffic(batching, *rest) for batching in BATCHINGS for rest in by_interval + by_burst]


def compute(
    curve: Any, times: Any, oracles: dict[str, np.ndarray], num_requests: int, advance: Any
) -> Serving:
    """Serves the same requests under every policy.

    Args:
      curve: accepted draft tokens by draft length.
      times: seconds per round.
      oracles: `[32]` best draft lengths by batch size, for every kind of batching.
      num_requests: of every trace.
      advance: called after every simulation.

    Returns:
      Latencies.
    """
    from jaxsd import costmodel

    sizes, lengths = np.arange(1, MAX_BATCH + 1)[:, None], np.arange(MAX_LENGTH + 1)[None]
    known = KnownTimes(costmodel.round_seconds(times, sizes, lengths))

    def serve(trace: Any, batching: Any, policy: str) -> Any:
        given = {"none": 0, "table": costmodel.SU_TABLE, "oracle": oracles[batching]}
        length = given[policy] if policy in given else int(policy)
        done = costmodel.simulate_serving(
            trace, curve, known, length, max_batch=MAX_BATCH, batching=batching
        )
        advance("serving requests")
        return done

    statistics: dict[Traffic, dict[str, Any]] = {}
    for traffic in settings():
        trace = costmodel.gamma_trace(
            0, num_requests, traffic.interval, traffic.variation, NUM_TOKENS
        )
        statistics[traffic] = {
            policy: costmodel.latency_statistics(serve(trace, traffic.batching, policy))
            for policy in POLICIES
        }
    intervals = np.concatenate(
        [np.full(round(duration / interval), interval) for interval, duration in PHASES]
    )
    trace = costmodel.gamma_trace(1, len(intervals), intervals, 1.0, NUM_TOKENS)
    over_time = {policy: serve(trace, "run_to_completion", policy) for policy in POLICIES}
    return Serving(statistics, over_time)


def tables(serving: Serving) -> list[Table]:
    """What speculation, and adapting it, gains over all traffic, and latencies."""
    return [_gains(serving), _latencies(serving)]


def figures(serving: Serving) -> list[Figure]:
    """Latency by interval, by burstiness and in the course of time."""

    def figure(name: str, caption: str, draw: Any, size: tuple[float, float]) -> Figure:
        return Figure(name, caption, functools.partial(draw, serving), size)

    return [
        figure(
            "latency_by_interval",
            "Mean latency by the interval between requests, for steady and for bursty traffic.",
            _by_interval,
            (8.0, 5.8),
        ),
        figure(
            "latency_by_burstiness",
            "Mean latency by the coefficient of variation of the intervals.",
            _by_burst,
            (8.0, 3.5),
        ),
        figure(
            "latency_over_time",
            "Latency in the course of time, under traffic that changes.",
            _over_time,
            (7.6, 4.4),
        ),
    ]


def ratios(serving: Serving, batching: str, over: tuple[str, ...], policy: str) -> np.ndarray:
    """The lowest latency of some policies over that of another, by interval and variation."""
    return np.array(
        [
            min(found[other].mean_seconds for other in over) / found[policy].mean_seconds
            for traffic, found in serving.statistics.items()
            if traffic.batching == batching and traffic.variation in VARIATIONS
        ]
    )


def _gains(serving: Serving) -> Table:
    rows = []
    claim = '; the abstract: "equal or better"'
    for batching, name in BATCHING_NAMES.items():
        is_paper = batching == "run_to_completion"
        intervals = np.array(
            [
                traffic.interval
                for traffic in serving.statistics
                if traffic.batching == batching and traffic.variation in VARIATIONS
            ]
        )
        for over, text, printed in (
            (("none",), "latency without speculation over the table's", 1.94),
            (("2", "4"), "latency of the better of 2 and 4 tokens over the table's", 1.07),
        ):
            found = ratios(serving, batching, over, "table")
            calm = found[intervals >= CALM]
            rows += [
                Comparison(
                    f"{name}: {text}",
                    float(calm.mean()),
                    printed if is_paper else None,
                    note=f"mean over intervals from {CALM:g} s on, {calm.min():.2f} to "
                    f"{calm.max():.2f}; up to {found.max():.2f} below, under overload",
                )
            ]
        oracle = ratios(serving, batching, ("table",), "oracle")
        rows.append(
            Comparison(f"{name}: latency of the table over the best by batch", float(oracle.mean()))
        )
        behind = 1 / ratios(serving, batching, FIXED, "table")
        rows.append(
            Comparison(
                f"{name}: settings where a fixed length beats the table by over 1 %",
                int((behind > 1.01).sum()),
                "0" if is_paper else None,
                note=f"of {len(behind)}; the best fixed length takes at least "
                f"{1 / behind.max():.3f} of the table's time" + claim * is_paper,
            )
        )
    return Table(
        "Requests served: what speculation and adapting it gain",
        rows,
        "Gamma arrivals of 16 intensities and variations, the times of the table read backwards "
        "(to completion). Traffic and seconds are ours, so that only the claim is judged; the "
        "paper's two factors are means over traffic of its own. Prompts take no time.",
    )


def _latencies(serving: Serving) -> Table:
    rows = []
    for traffic, found in serving.statistics.items():
        if traffic.interval not in (min(INTERVALS), BURST_INTERVAL, max(INTERVALS)):
            continue
        if traffic.variation not in VARIATIONS:
            continue
        seconds = {policy: row.mean_seconds for policy, row in found.items()}
        note = ", ".join(f"{policy} {value:.2f}" for policy, value in seconds.items())
        name = BATCHING_NAMES[traffic.batching]
        rows.append(
            Comparison(
                f"{name}, every {traffic.interval:g} s, cv {traffic.variation:g}: seconds",
                seconds["table"],
                note=note,
            )
        )
    return Table(
        "Mean latency under the table, and under every policy",
        rows,
        "Ours. none: no speculation; 2, 4, 8: always so many draft tokens; oracle: the best length "
        "of every batch size.",
    )


def _by_interval(serving: Serving, canvas: Any) -> None:
    panels = canvas.subplots(2, 2, sharex=True, sharey=True)
    letters = iter("abcd")
    for line, batching in zip(panels, BATCHINGS, strict=True):
        for panel, variation in zip(line, VARIATIONS, strict=True):
            along = [Traffic(batching, variation, interval) for interval in INTERVALS]
            _policies(panel, INTERVALS, [serving.statistics[traffic] for traffic in along])
            name = BATCHING_NAMES[batching]
            panel.set_title(f"({next(letters)}) {name}, cv = {variation:g}", loc="left")
            log_axis(panel.xaxis, (0.05, 0.1, 0.2, 0.5, 1))
            log_axis(panel.yaxis, (1, 2, 5, 10, 20, 50))
        line[0].set_ylabel("mean latency (s)")
    for panel in panels[1]:
        panel.set_xlabel("mean interval between requests (s)")
    _legend(canvas, panels[0, 0])


def _by_burst(serving: Serving, canvas: Any) -> None:
    panels = canvas.subplots(1, 2, sharey=True)
    for panel, batching, letter in zip(panels, BATCHINGS, "ab", strict=True):
        along = [Traffic(batching, variation, BURST_INTERVAL) for variation in BURSTS]
        _policies(panel, BURSTS, [serving.statistics[traffic] for traffic in along])
        name = BATCHING_NAMES[batching]
        panel.set_title(f"({letter}) {name}, mean interval {BURST_INTERVAL:g} s", loc="left")
        panel.set_xlabel("coefficient of variation of the intervals, cv")
    panels[0].set_ylabel("mean latency (s)")
    panels[0].set_ylim(0, None)
    _legend(canvas, panels[0])


def _over_time(serving: Serving, canvas: Any) -> None:
    upper, lower = canvas.subplots(2, 1, sharex=True, height_ratios=(1, 2.6))
    arrivals = serving.over_time["none"].trace.arrival_seconds
    edges = np.arange(0, arrivals[-1] + WINDOW, WINDOW)
    counts, _ = np.histogram(arrivals, edges)
    upper.stairs(counts / WINDOW, edges, fill=True, color=COLORS[6])
    upper.set_ylabel("requests\nper second")
    window = np.digitize(arrivals, edges) - 1
    filled = np.unique(window)
    for policy, done in serving.over_time.items():
        if policy != "oracle":  # hardly to be told from the table
            latency = done.finish_seconds - arrivals
            means = [latency[window == i].mean() for i in filled]
            _line(lower, (edges[:-1] + WINDOW / 2)[filled], means, policy)
    log_axis(lower.yaxis, (1, 2, 5, 10, 20, 50))
    lower.set_ylabel(f"latency, mean over {WINDOW:g} s (s)")
    lower.set_xlabel("time of arrival (s)")
    lower.set_xlim(0, edges[-1])
    _legend(canvas, lower)


def _policies(panel: Any, x: tuple[float, ...], along: list[dict[str, Any]]) -> None:
    for policy in POLICIES:
        _line(panel, x, [found[policy].mean_seconds for found in along], policy)


def _line(panel: Any, x: Any, seconds: list[float], policy: str) -> None:
    color, style, marker = STYLES[policy]
    panel.plot(
        x, seconds, style, color=color, marker=marker, ms=4, linewidth=1.2, label=POLICIES[policy]
    )


def _legend(canvas: Any, panel: Any) -> None:
    """One row below all panels."""
    handles, labels = panel.get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=len(labels), columnspacing=1.2)


def log_axis(axis: Any, ticks: tuple[float, ...]) -> None:
    """A logarithmic axis with plain numbers, at these places only."""
    if axis.axis_name == "x":
        axis.axes.set_xscale("log")
    else:
        axis.axes.set_yscale("log")
    axis.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)
