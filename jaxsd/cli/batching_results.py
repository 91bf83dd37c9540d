"""What the reproduction of the batching paper computes before it compares or draws anything."""

import functools
from typing import Any, NamedTuple

import numpy as np
import rich.console
import rich.progress

from . import batching_serving
from .batching_serving import MAX_BATCH, MAX_LENGTH, NUM_TOKENS

# What is measured in the paper: its batch sizes, draft lengths and answers.
BATCHES = np.array([1, 2, 4, 8, 16, 32])
LENGTHS = np.arange(MAX_LENGTH + 1)
EVERY_BATCH = np.arange(1, MAX_BATCH + 1)
# One of its pairs of models. The chip and its software are ours: none are known of the table.
TARGET, DRAFT, CHIP, STACK = "opt-6.7b", "opt-125m", "a100-40gb", "torch-compile"
CONTEXT = 200  # tokens of each sequence in the cache, about the middle of such an answer
# A curve whose rounds are counted until the slowest of a batch is done.
ROUNDS_ALPHA, ROUNDS_LENGTHS = 0.7, (1, 2, 4, 8)
ROUNDS_BATCHES = np.array([1, 2, 4, 8, 16, 32, 64])


class Inversion(NamedTuple):
    """The published table read backwards, with one way to count tokens per round."""

    rounds_per_token: np.ndarray  # [6, 9] by batch and draft length
    low: np.ndarray  # [6] ends of the ratios, time per drafted token over that of a plain step
    high: np.ndarray  # [6]
    ratios: np.ndarray  # [6] rising ones within them
    times: Any  # costmodel.LinearTimes with these ratios
    gammas: np.ndarray  # [6] what is the best with these times
    every_gamma: np.ndarray  # [32] the same for every batch size
    line: tuple[float, float]  # the ratio at batch 0 and its growth, of the best line in the batch
    line_loss: float  # time that the published table loses at worst, were that line the truth
    constant: float  # the best ratio for batches up to 16, were it the same for all
    constant_loss: float


class Roofline(NamedTuple):
    """What shapes and a chip predict for the paper's pair."""

    times: Any  # costmodel.HardwareTimes
    measured: Any  # costmodel.MeasuredTimes: the same at the batches and lengths of the paper
    lines: Any  # costmodel.LinearTimes fitted to these
    gammas: np.ndarray  # [6] best lengths
    continuous: np.ndarray  # [6]
    completion_gammas: np.ndarray  # [6] best lengths where a batch waits for its slowest
    every_gamma: np.ndarray  # [32] best lengths of every batch size
    speedups: np.ndarray  # [2, 6] over no speculation: by round, and until the slowest is done


class Rounds(NamedTuple):
    """Rounds until a whole batch is done."""

    exact: np.ndarray  # [4, 7] by draft length and batch size
    simulated: np.ndarray  # [4, 7]
    standard_errors: np.ndarray  # [4, 7] of the simulated


class Results(NamedTuple):
    """What tables and figures are made of."""

    curve: Any  # costmodel.PowerCurve, as quoted
    geometric: Any  # costmodel.Fit of a geometric curve to it
    powers: dict[float, Any]  # alpha -> costmodel.Fit of a power to a geometric curve
    per_round: Inversion
    to_completion: Inversion
    roofline: Roofline
    rounds: Rounds
    serving: batching_serving.Serving
    reachable: dict[str, np.ndarray]  # of two families of curves, see `_reachable_speedups`


@functools.cache
def compute(num_requests: int) -> Results:
    """Curves, inversions and simulations, so many requests in each."""
    from jaxsd import costmodel

    progress = rich.progress.Progress(
        rich.progress.SpinnerColumn(),
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TimeElapsedColumn(),
        console=rich.console.Console(stderr=True),
        transient=True,
    )
    policies = len(batching_serving.POLICIES) * (len(batching_serving.settings()) + 1)
    total = 4 + len(ROUNDS_LENGTHS) * len(ROUNDS_BATCHES) + policies
    with progress:
        task = progress.add_task("fitting accepted lengths", total=total)

        def advance(description: str) -> None:
            progress.update(task, advance=1, description=description)

        curve = costmodel.PowerCurve(0.9, 0.548)
        drafted = LENGTHS[1:]
        geometric = costmodel.fit_length_curve(
            drafted, np.asarray(costmodel.accepted_length(curve, drafted)), "geometric"
        )
        powers = {
            alpha: costmodel.fit_length_curve(
                drafted,
                np.asarray(costmodel.accepted_length(costmodel.GeometricCurve(alpha), drafted)),
            )
            for alpha in (0.6, 0.7, 0.8, 0.9)
        }
        advance("reading the published table backwards")
        waiting = completion_rounds(curve, EVERY_BATCH) / NUM_TOKENS
        plain = hardware_times()
        by_round = np.broadcast_to(
            1 / (1 + np.asarray(costmodel.accepted_length(curve, LENGTHS))),
            (MAX_BATCH, len(LENGTHS)),
        )
        per_round = invert(by_round, plain)
        # The same by the search that takes a curve and times, in place of a profile.
        per_round = per_round._replace(
            gammas=np.asarray(
                costmodel.build_length_table(curve, per_round.times, BATCHES, MAX_LENGTH).gammas
            )
        )
        advance("reading the published table backwards")
        to_completion = invert(waiting, plain)
        reachable = _reachable_speedups()
        advance("timing passes")
        roofline = _roofline(curve, waiting, plain)
        advance("counting rounds")
        rounds = _rounds(8 * num_requests, advance)
        oracles = {
            "run_to_completion": to_completion.every_gamma,
            "continuous": np.asarray(
                costmodel.optimal_integer_gamma_for_batch(
                    curve, to_completion.times, EVERY_BATCH, MAX_LENGTH
                )
            ),
        }
        serving = batching_serving.compute(
            curve, to_completion.times, oracles, num_requests, advance
        )
    return Results(
        curve=curve,
        geometric=geometric,
        powers=powers,
        per_round=per_round,
        to_completion=to_completion,
        roofline=roofline,
        rounds=rounds,
        serving=serving,
        reachable=reachable,
    )


def hardware_times() -> Any:
    """The paper's pair of models on our chip."""
    from jaxsd import costmodel

    return costmodel.HardwareTimes(
        costmodel.named_shape(TARGET),
        costmodel.named_shape(DRAFT),
        costmodel.named_chip(CHIP),
        costmodel.named_stack(STACK),
        CONTEXT,
    )


def completion_rounds(curve: Any, batches: np.ndarray, max_gamma: int = MAX_LENGTH) -> np.ndarray:
    """`[B, max_gamma + 1]` rounds until the slowest of a batch is done, by draft length."""
    import jax

    from jaxsd import costmodel

    shares = np.asarray(costmodel.acceptance_by_position(curve, max_gamma))
    # A shorter draft is one whose later tokens are never accepted: one shape, one compilation.
    masked = np.tril(np.ones((max_gamma + 1, max_gamma), shares.dtype), -1) * shares
    count = functools.partial(
        costmodel.run_to_completion_rounds, num_tokens=NUM_TOKENS, batch=batches
    )
    return np.asarray(jax.vmap(count)(masked)).T


def invert(rounds_per_token: np.ndarray, plain: Any) -> Inversion:
    """Which times make the published table the best, by `[32, 9]` rounds per token.

    A round's time is taken as a line in the draft length, plain steps as a chip's.
    """
    from jaxsd import costmodel

    published = np.asarray(costmodel.SU_TABLE.gammas)
    chosen = rounds_per_token[BATCHES - 1]
    low, high = (np.zeros(len(BATCHES)) for _ in range(2))
    for i, row in enumerate(chosen):
        curve = costmodel.MeasuredCurve(LENGTHS[1:], 1 / row[1:] - 1)
        found = costmodel.slope_ratio_intervals(curve, MAX_LENGTH)
        low[i], high[i] = (float(end[published[i]]) for end in found)
    ratios = rising_ratios(low, high)
    steps = np.asarray(costmodel.round_seconds(plain, BATCHES, 0.0))
    # What one drafted token costs more at a larger batch is verification, the rest the draft.
    times = costmodel.LinearTimes(
        BATCHES, steps, (ratios - ratios[0]) * steps, np.full(len(steps), ratios[0]) * steps
    )
    tables = {}
    for size, batches in (("table", BATCHES), ("every", EVERY_BATCH)):
        rounds = rounds_per_token[batches - 1]
        seconds = costmodel.round_seconds(times, batches[:, None], LENGTHS[None]) * rounds
        found = costmodel.measured_length_table(batches, LENGTHS, seconds)
        tables[size] = np.asarray(found.gammas)

    starts, growths = np.meshgrid(np.linspace(0, 0.3, 151), np.linspace(0, 0.04, 161))
    starts, growths = starts.ravel(), growths.ravel()
    losses = table_losses(chosen, starts[:, None] + growths[:, None] * BATCHES).max(1)
    best = losses.argmin()
    candidates = np.linspace(0.02, 0.4, 381)
    flat = table_losses(chosen, np.repeat(candidates[:, None], len(BATCHES), 1))
    flat = flat[:, BATCHES <= 16].max(1)
    return Inversion(
        rounds_per_token=chosen,
        low=low,
        high=high,
        ratios=ratios,
        times=times,
        gammas=tables["table"],
        every_gamma=tables["every"],
        line=(float(starts[best]), float(growths[best])),
        line_loss=float(losses[best]),
        constant=float(candidates[flat.argmin()]),
        constant_loss=float(flat.min()),
    )


def rising_ratios(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """One ratio from each interval, none below the one before; outside where there is none.

    >>> rising_ratios(np.array([1.0, 0.5]), np.array([4.0, 9.0])).round(2)
    array([2.  , 4.24])
    """
    ceilings = np.minimum.accumulate(high[::-1])[::-1]
    found: list[float] = []
    for floor, ceiling in zip(low, ceilings, strict=True):
        before = found[-1] if found else 0.0
        found.append(max(before, float(np.sqrt(max(floor, before) * ceiling))))
    return np.array(found)


def table_losses(rounds_per_token: np.ndarray, ratios: np.ndarray) -> np.ndarray:
    """`[N, 6]` relative time that the published lengths lose, by `[N, 6]` ratios."""
    from jaxsd import costmodel

    seconds = (1 + ratios[..., None] * LENGTHS) * rounds_per_token
    taken = seconds[:, np.arange(len(BATCHES)), np.asarray(costmodel.SU_TABLE.gammas)]
    return taken / seconds.min(-1) - 1


def speedups(rounds_per_token: np.ndarray, ratio: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    """Plain steps per token over those of so many drafted tokens, by batch."""
    taken = rounds_per_token[np.arange(len(gamma)), gamma]
    return rounds_per_token[:, 0] / (taken * (1 + ratio * gamma))


def _roofline(curve: Any, waiting: np.ndarray, times: Any) -> Roofline:
    """Best lengths and lines of the chip's times."""
    from jaxsd import costmodel

    rounds, longest = waiting[BATCHES - 1], MAX_LENGTH
    grid = np.asarray(costmodel.round_seconds(times, BATCHES[:, None], LENGTHS[None]))
    draft = np.asarray(times.draft(np.asarray(BATCHES, np.float32)))
    measured = costmodel.MeasuredTimes(BATCHES, LENGTHS, grid - draft[:, None] * LENGTHS, draft)
    by_round = np.asarray(costmodel.token_seconds(curve, times, BATCHES[:, None], LENGTHS[None]))
    until_done = grid * rounds
    return Roofline(
        times=times,
        measured=measured,
        lines=costmodel.fit_linear_times(measured),
        gammas=np.asarray(costmodel.build_length_table(curve, times, BATCHES, longest).gammas),
        continuous=np.asarray(costmodel.optimal_gamma_for_batch(curve, times, BATCHES, longest)),
        completion_gammas=np.asarray(
            costmodel.measured_length_table(BATCHES, LENGTHS, until_done).gammas
        ),
        every_gamma=np.asarray(
            costmodel.optimal_integer_gamma_for_batch(curve, times, EVERY_BATCH, longest)
        ),
        speedups=np.stack([cost[:, 0] / cost.min(1) for cost in (by_round, until_done)]),
    )


def _reachable_speedups() -> dict[str, np.ndarray]:
    """The most that the table's first and last entry allow, for every curve of two families.

    Arrays of one element per curve: for `power` and `geometric` the least and the largest speed-up
    at batch 1 with 7 drafted tokens the best, and the largest at batch 32 with 1.
    """
    import jax

    from jaxsd import costmodel

    def ends(curve: Any) -> Any:
        found = costmodel.slope_ratio_intervals(curve, MAX_LENGTH)
        one, seven = (1 + costmodel.accepted_length(curve, s) for s in (1.0, 7.0))
        least, most = seven / (1 + 7 * found.high[7]), seven / (1 + 7 * found.low[7])
        return least, most, one / (1 + found.low[1])

    coefficients, exponents = np.meshgrid(
        np.linspace(0.3, 1, 71, dtype=np.float32), np.linspace(0.05, 0.95, 91, dtype=np.float32)
    )
    powers = costmodel.PowerCurve(coefficients.ravel(), exponents.ravel())
    alphas = costmodel.GeometricCurve(np.linspace(0.3, 0.95, 651, dtype=np.float32))
    curves = {"power": powers, "geometric": alphas}
    return {
        name: np.stack([np.asarray(end) for end in jax.jit(jax.vmap(ends))(family)])
        for name, family in curves.items()
    }


def _rounds(num_sequences: int, advance: Any) -> Rounds:
    """Exactly, and by the server that the paper describes, all of whose requests are there."""
    from jaxsd import costmodel

    curve = costmodel.GeometricCurve(ROUNDS_ALPHA)
    longest = max(ROUNDS_LENGTHS)
    exact = completion_rounds(curve, ROUNDS_BATCHES, longest).T[list(ROUNDS_LENGTHS)]
    second = costmodel.LinearTimes(np.ones(1), np.ones(1), np.zeros(1), np.zeros(1))
    simulated, errors = np.zeros_like(exact), np.zeros_like(exact)
    for i, gamma in enumerate(ROUNDS_LENGTHS):
        for j, batch in enumerate(ROUNDS_BATCHES.tolist()):
            count = max(num_sequences // batch, 20) * batch
            trace = costmodel.Trace(np.zeros(count), np.full(count, NUM_TOKENS))
            done = costmodel.simulate_serving(
                trace, curve, second, gamma, max_batch=batch, seed=10 * i + j
            )
            # One round is one second: a batch takes as many seconds as rounds.
            taken = (done.finish_seconds - done.start_seconds)[::batch]
            simulated[i, j] = taken.mean()
            errors[i, j] = taken.std(ddof=1) / np.sqrt(len(taken))
            advance("counting rounds")
    return Rounds(exact, simulated, errors)
