"""How long is one forward pass, by batch, rows (new tokens) and context? The calibration grid.

    python tpu_scripts/bench_pass.py --out tpu_scripts/results/bench_pass_cpu.json

Passes of the target and of the draft run one after the other in a compiled loop, with a cache of
exactly `context + rows` slots per sequence. All points take turns; a figure is the median over
turns, less what a turn as a whole was slower by. Compiling and a first run of every point come
before. `calibrate.py` fits the cost model to the result.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import shared

from jaxsd import costmodel
from jaxsd.cli import timing


class Point(NamedTuple):
    """What is timed."""

    role: str  # target or draft
    batch: int
    rows: int
    context: int


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Times the grid, prints it and returns the document."""
    parser = shared.make_parser(__doc__, repeats=9, quick="a few points, two turns")
    shared.add_models(parser)
    numbers = shared.whole_numbers(1)
    add_grid(parser)
    parser.add_argument("--draft-rows", type=numbers, default=[1, 2], help="rows of the draft")
    args = parser.parse_args(argv)
    if args.quick:
        args.batches, args.rows, args.contexts, args.repeats = [1, 2], [1, 2], [16], 2
        args.draft_rows = [1]
    target, draft = shared.load_pair(args)
    bandwidth, source = shared.peak_of(args.chip, args.quick)
    card = shared.show_card([target, draft], bandwidth, source)
    points = grid("target", args.batches, args.rows, args.contexts, args.max_tokens)
    points += grid("draft", args.batches, args.draft_rows, args.contexts, args.max_tokens)
    measured = measure(points, target, draft, args.repeats, args.quick)
    for one in measured:
        loaded = {"target": target, "draft": draft}[one["role"]]
        moved = costmodel.pass_bytes(
            shared.shape_of(loaded.config),
            one["batch"],
            one["rows"],
            one["context"],
            loaded.formats,
        )
        one["bytes"] = float(moved)
        one["bytes_per_second"] = float(moved) / one["seconds"]
        one["bandwidth_share"] = one["bytes_per_second"] / bandwidth
    show(measured)
    return shared.finish("bench_pass", argv, args.out, card=card, points=measured)


def add_grid(parser: Any) -> None:
    """Options that span the grid."""
    numbers = shared.whole_numbers(1)
    parser.add_argument("--batches", type=numbers, default=[1, 2, 4, 8], help="sequences")
    parser.add_argument(
        "--rows", type=numbers, default=[*range(1, 10), 16], help="tokens of each in a pass"
    )
    parser.add_argument(
        "--contexts", type=numbers, default=[128, 1024], help="tokens of each in the cache"
    )
    parser.add_argument(
        "--max-tokens",
        type=shared.positive,
        default=40,
        help="points of more tokens, batch times rows, are left out (%(default)s)",
    )


def grid(
    role: str,
    batches: Sequence[int],
    rows: Sequence[int],
    contexts: Sequence[int],
    max_tokens: int,
) -> list[Point]:
    """All points of at most so many tokens.

    Raises:
      ValueError: there is none.
    """
    points = [
        Point(role, batch, count, context)
        for context in contexts
        for batch in batches
        for count in rows
        if batch * count <= max_tokens
    ]
    if not points:
        raise ValueError(f"no point has at most {max_tokens} tokens: raise --max-tokens")
    return points


def make_timers(
    points: Sequence[Point],
    target: shared.LoadedModel,
    draft: shared.LoadedModel,
    quick: bool,
) -> list[timing.Timer]:
    """Compiled and warmed timers of all points."""
    models = {"target": target, "draft": draft}
    loops = {role: timing.make_pass_loop(one.model) for role, one in models.items()}
    timers = []
    for number, point in enumerate(points):
        shared.progress(f"compiling point {number + 1} of {len(points)}: {point}")
        one = models[point.role]
        seconds = 0.001 if quick else timing.WINDOW_SECONDS
        timers.append(
            timing.make_pass_timer(one.model, loops[point.role], one.params, *point[1:], seconds)
        )
    return timers


def measure(
    points: Sequence[Point],
    target: shared.LoadedModel,
    draft: shared.LoadedModel,
    repeats: int,
    quick: bool,
) -> list[dict[str, Any]]:
    """Seconds of every point, with the fastest and the slowest turn."""
    timers = make_timers(points, target, draft, quick)
    seconds = timing.in_turns(timers, repeats, shared.progress)
    return rows_of(points, seconds, timing.typical(seconds))


def rows_of(
    points: Sequence[Point], seconds: np.ndarray, typical: np.ndarray
) -> list[dict[str, Any]]:
    """Points and what was measured of them; JSON values."""
    return [
        {
            **point._asdict(),
            "seconds": float(typical[index]),
            "seconds_lowest": float(seconds[:, index].min()),
            "seconds_highest": float(seconds[:, index].max()),
        }
        for index, point in enumerate(points)
    ]


def show(measured: Sequence[dict[str, Any]]) -> None:
    """A line per point."""
    shared.say("\nmodel    context batch rows         ms  lowest highest     GB/s  share")
    for one in measured:
        times = [1e3 * one[f"seconds{name}"] for name in ("", "_lowest", "_highest")]
        shared.say(
            f"{one['role']:<8} {one['context']:7} {one['batch']:5} {one['rows']:4} "
            f"{times[0]:10.3f} {times[1]:7.3f} {times[2]:7.3f} "
            f"{one['bytes_per_second'] / 1e9:8.2f} {one['bandwidth_share']:6.1%}"
        )


def timed_passes(
    measured: Sequence[dict[str, Any]], role: str, loaded: shared.LoadedModel
) -> list[costmodel.TimedPass]:
    """The points of one model, as the cost model takes them."""
    shape = jax.tree.map(float, shared.shape_of(loaded.config))
    return [
        costmodel.TimedPass(
            shape,
            one["seconds"],
            one["batch"],
            one["rows"],
            one["context"],
            formats=loaded.formats,
        )
        for one in measured
        if one["role"] == role
    ]


if __name__ == "__main__":
    shared.run(main)
