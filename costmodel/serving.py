"""How long do requests wait for their answers, by when they arrive and how many tokens are drafted?

A simulation of one server, request by request. It is not differentiable and runs on the host, in
NumPy: what happens next depends on the clock. The same trace and seed give every policy the same
requests and the same luck, so that policies are compared on nothing but what they decide.
"""

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from ._inputs import NON_NEGATIVE, POSITIVE, float64_on_host, is_traced, require
from .length_curves import AnyLengthCurve, acceptance_by_position, accepted_length
from .length_table import LengthTable, lookup_length
from .round_times import AnyRoundTimes, round_seconds

Batching = Literal["run_to_completion", "continuous"]

# Rounds drawn at a time, to keep the memory of large traces in bounds.
_DRAWS = 1 << 22
_MAX_GAMMA = 255  # what a byte holds


class Trace(NamedTuple):
    """Requests, to be served alike by every policy."""

    arrival_seconds: np.ndarray  # [n] float64, in order
    num_tokens: np.ndarray  # [n] int64, tokens to generate for each


class Served(NamedTuple):
    """What became of every request, and what the server did meanwhile."""

    trace: Trace
    start_seconds: np.ndarray  # [n] when it left the queue
    finish_seconds: np.ndarray  # [n] when its answer was there
    busy_seconds: float  # time during which the server worked
    num_rounds: int  # rounds that the server made
    sequence_rounds: int  # the same counted once for every sequence of the batch


class LatencyStatistics(NamedTuple):
    """A served trace in a few numbers."""

    mean_seconds: float  # from arrival to finish
    mean_queue_seconds: float  # from arrival to start
    percentiles_seconds: np.ndarray  # [k] latencies that so many percent do not exceed
    tokens_per_second: float  # generated, from the first arrival to the last finish
    requests_per_second: float
    utilisation: float  # share of that time during which the server worked
    mean_batch: float  # sequences per round


def gamma_trace(
    seed: int,
    num_requests: int,
    interval_seconds: ArrayLike,
    cv: float = 1.0,
    num_tokens: ArrayLike = 128,
) -> Trace:
    """Returns requests that arrive at intervals drawn from a Gamma distribution.

    Its coefficient of variation says how bursty traffic is: 0 a clock, 1 a Poisson process, beyond
    1 bursts and lulls. One seed gives one trace; another mean interval stretches it, so traffic of
    different intensity can be compared.

        interval ~ Gamma(shape = 1 / cv^2, scale = interval_seconds cv^2)

    Args:
      seed: any whole number from 0 on.
      num_requests: n.
      interval_seconds: mean time before each request, positive; scalar or `[n]` for traffic that
        changes.
      cv: standard deviation of the intervals over their mean, at least 0.
      num_tokens: tokens to generate for each, whole numbers from 1 on; scalar or `[n]`.

    Returns:
      The trace.

    Raises:
      ValueError: an argument is outside its range, NaN or of the wrong shape.

    Example:
      >>> import numpy as np
      >>> from jaxsd import costmodel
      >>> trace = costmodel.gamma_trace(0, 10_000, interval_seconds=0.5, cv=2.0)
      >>> intervals = np.diff(trace.arrival_seconds)
      >>> bool(abs(intervals.mean() - 0.5) < 0.05), bool(abs(intervals.std() - 1.0) < 0.1)
      (True, True)

    Source: Su et al., arXiv 2310.18813 (the server, its traffic and its policies).
    """
    require("num_requests", num_requests, (lambda x: x >= 1, "at least 1"))
    require("interval_seconds", interval_seconds, POSITIVE)
    require("cv", cv, NON_NEGATIVE)
    intervals = np.ones(num_requests)
    if cv > 0:
        intervals = np.random.default_rng(seed).gamma(1 / cv**2, cv**2, num_requests)
    means = _per_request("interval_seconds", interval_seconds, num_requests)
    tokens = _per_request("num_tokens", num_tokens, num_requests)
    return _checked(Trace(np.cumsum(intervals * means), tokens))


def simulate_serving(
    trace: Trace,
    curve: AnyLengthCurve,
    times: AnyRoundTimes,
    policy: ArrayLike | LengthTable,
    *,
    max_batch: int = 32,
    batching: Batching = "run_to_completion",
    prefill_seconds: ArrayLike = 0.0,
    is_random: bool = True,
    seed: int = 0,
) -> Served:
    """Returns when every request of a trace is served, under a policy of draft lengths.

    With `run_to_completion` the server takes what has queued, up to `max_batch`, decodes until the
    last of these sequences is done, and only then answers and looks into the queue again; sequences
    that are done earlier go on to take their share of every round. With `continuous`
    batching requests join and leave between any two rounds. In both the time of a round is that of
    the present batch, and requests are served in the order of their arrival.

    A policy is a number of draft tokens for every batch size, of which the server knows nothing
    but the size. Without speculation: `0`; a fixed length: `4`; a table: a `LengthTable`; an
    oracle that knows curve and times: `optimal_integer_gamma_for_batch(curve, times, sizes)` for
    `sizes = np.arange(1, max_batch + 1)`.

    Luck is drawn once for every request and round, and a shorter draft accepts the first tokens of
    what a longer one would: with one seed, differences between policies have little noise.

    Args:
      trace: the requests.
      curve: accepted draft tokens by draft length, for every sequence alike.
      times: seconds per round by batch and draft length.
      policy: draft tokens per round, whole numbers: a scalar, `[max_batch]` for batches of 1, 2,
        ..., or a table.
      max_batch: the most sequences that are decoded together, at least 1.
      batching: when requests may join.
      prefill_seconds: time to read the prompts of 1, 2, ... requests that start together, at least
        0; scalar or `[max_batch]`. Nothing is decoded meanwhile.
      is_random: whether every round of every sequence accepts by chance; if not, each commits the
        mean number of tokens.
      seed: of that chance, any whole number from 0 on.

    Returns:
      Start and finish of every request.

    Raises:
      ValueError: an argument is outside its range, NaN or of the wrong shape.

    Example:
      >>> from jaxsd import costmodel
      >>> trace = costmodel.gamma_trace(0, 1000, interval_seconds=0.4)
      >>> times = costmodel.LinearTimes([1, 32], [0.010, 0.012], [0.0002, 0.003], [0.0005, 0.0006])
      >>> curve = costmodel.GeometricCurve(0.8)
      >>> table = costmodel.build_length_table(curve, times, [1, 2, 4, 8, 16, 32])
      >>> for policy in (0, 4, table):
      ...     served = costmodel.simulate_serving(trace, curve, times, policy)
      ...     print(round(costmodel.latency_statistics(served).mean_seconds, 2))
      1.96
      0.74
      0.7

    Source: Su et al., arXiv 2310.18813 (the server, its traffic and its policies).
    """
    trace = _checked(trace)
    require("max_batch", max_batch, (lambda x: (x >= 1) & (x == np.round(x)), "at least 1"))
    require("prefill_seconds", prefill_seconds, NON_NEGATIVE)
    if batching not in ("run_to_completion", "continuous"):
        raise ValueError(f"batching={batching!r} must be 'run_to_completion' or 'continuous'")
    sizes = np.arange(1, max_batch + 1)
    gammas = _policy(policy, sizes)
    prefill = _per_size("prefill_seconds", prefill_seconds, max_batch)
    with float64_on_host():
        seconds = np.asarray(round_seconds(times, sizes, gammas), np.float64)
    luck = _draw(trace, curve, gammas, is_random, seed, keep=batching == "continuous")
    serve = _serve_continuously if batching == "continuous" else _serve_batches
    return serve(trace, luck, gammas.tolist(), seconds.tolist(), prefill.tolist())


def latency_statistics(
    served: Served, percentiles: Sequence[float] = (50.0, 90.0, 95.0, 99.0)
) -> LatencyStatistics:
    """Returns what is reported of a served trace.

    Args:
      served: the result of `simulate_serving`.
      percentiles: which, in [0, 100].

    Returns:
      Means, percentiles and rates over all of the trace.

    Raises:
      ValueError: a percentile is outside its range or NaN.

    Example:
      >>> import numpy as np
      >>> from jaxsd import costmodel
      >>> trace = costmodel.Trace(np.array([0.0, 0.1]), np.array([10, 10]))
      >>> times = costmodel.LinearTimes([1], [0.1], [0.0], [0.0])
      >>> served = costmodel.simulate_serving(trace, costmodel.GeometricCurve(0.5), times, 0)
      >>> statistics = costmodel.latency_statistics(served)  # one after the other, 1 s each
      >>> round(statistics.mean_seconds, 2), round(statistics.mean_queue_seconds, 2)
      (1.45, 0.45)
    """
    in_range = (lambda x: (x >= 0) & (x <= 100), "in [0, 100]")
    require("percentiles", list(percentiles), in_range)
    arrived, tokens = served.trace
    latency = served.finish_seconds - arrived
    span = float(served.finish_seconds.max() - arrived[0])
    return LatencyStatistics(
        mean_seconds=float(latency.mean()),
        mean_queue_seconds=float((served.start_seconds - arrived).mean()),
        percentiles_seconds=np.percentile(latency, percentiles),
        tokens_per_second=float(tokens.sum() / span),
        requests_per_second=len(tokens) / span,
        utilisation=served.busy_seconds / span,
        mean_batch=served.sequence_rounds / served.num_rounds,
    )


class _Luck(NamedTuple):
    """How fast every request gets on, drawn beforehand."""

    rounds: dict[int, list[int]]  # draft length -> [n] rounds, if it stays the same throughout
    mean_tokens: dict[int, float]  # draft length -> mean tokens per round
    # [n * width + width] draft tokens accepted of the longest draft, by request and round; one more
    # width so that a window never leaves it. Empty where nothing is drawn, or not needed again.
    accepted: np.ndarray
    width: int  # rounds that a request can take at most


def _draw(
    trace: Trace, curve: AnyLengthCurve, gammas: np.ndarray, is_random: bool, seed: int, keep: bool
) -> _Luck:
    """Draws every round of every request, and counts the rounds that each policy's lengths take."""
    tokens = trace.num_tokens
    lengths = np.unique(gammas)
    with float64_on_host():
        means = 1 + np.asarray(accepted_length(curve, lengths), np.float64)
        shares = np.zeros(0, np.float32)
        if lengths[-1] > 0:
            shares = np.asarray(acceptance_by_position(curve, int(lengths[-1])), np.float32)
    mean_tokens = dict(zip(lengths.tolist(), means.tolist(), strict=True))
    count, width = len(tokens), int(tokens.max())
    if not is_random:
        # A hair less, so that a whole quotient stays one.
        rounds = {g: np.ceil(tokens / m * (1 - 1e-12)).astype(int) for g, m in mean_tokens.items()}
        kept = np.zeros(0, np.uint8)
        return _Luck({g: r.tolist() for g, r in rounds.items()}, mean_tokens, kept, width)

    rng = np.random.default_rng(seed)
    kept = np.zeros((count + 1) * width if keep else 0, np.uint8)
    found: dict[int, list[int]] = {int(gamma): [] for gamma in lengths}
    rows = max(_DRAWS // width, 1)
    for start in range(0, count, rows):
        wanted = tokens[start : start + rows]
        draws = rng.random((len(wanted), width), np.float32)
        # At least i tokens are accepted where the draw is below share i, and shares fall.
        accepted = np.zeros(draws.shape, np.uint8)
        for share in shares:
            accepted += draws < share
        if keep:
            kept[start * width : (start + len(wanted)) * width] = accepted.ravel()
        for gamma, rounds in found.items():
            so_far = np.cumsum(1 + np.minimum(accepted, gamma), axis=1, dtype=np.int32)
            rounds += ((so_far < wanted[:, None]).sum(1) + 1).tolist()
    return _Luck(found, mean_tokens, kept, width)


def _serve_batches(
    trace: Trace, luck: _Luck, gammas: list[int], seconds: list[float], prefill: list[float]
) -> Served:
    """Run to completion: drain the queue, decode until the slowest is done, answer, repeat."""
    arrivals, count, max_batch = trace.arrival_seconds.tolist(), len(trace[0]), len(gammas)
    starts, finishes = np.zeros(count), np.zeros(count)
    now, busy, num_rounds, sequence_rounds, first = 0.0, 0.0, 0, 0, 0
    while first < count:
        now = max(now, arrivals[first])
        end = bisect_right(arrivals, now, first, min(first + max_batch, count))
        size = end - first
        rounds = max(luck.rounds[gammas[size - 1]][first:end])
        spent = prefill[size - 1] + rounds * seconds[size - 1]
        starts[first:end] = now
        now += spent
        finishes[first:end] = now
        busy += spent
        num_rounds += rounds
        sequence_rounds += rounds * size
        first = end
    return Served(trace, starts, finishes, busy, num_rounds, sequence_rounds)


@dataclasses.dataclass
class _Sequence:
    """One sequence of the batch."""

    request: int
    done_at: int  # the server's round after which it is done, if the draft length stays
    # As of when the draft length last changed, or the sequence joined:
    since: int  # the server's round
    made: int  # rounds it had made
    left: float  # tokens it had left


def _serve_continuously(
    trace: Trace, luck: _Luck, gammas: list[int], seconds: list[float], prefill: list[float]
) -> Served:
    """Requests join and leave between rounds; from one such change to the next is one step."""
    arrivals: list[float] = trace.arrival_seconds.tolist()
    tokens: list[int] = trace.num_tokens.tolist()
    count, max_batch = len(arrivals), len(gammas)
    starts, finishes = np.zeros(count), np.zeros(count)
    now, busy, num_rounds, sequence_rounds, first = 0.0, 0.0, 0, 0, 0
    batch: list[_Sequence] = []
    gamma = gammas[0]
    while first < count or batch:
        if not batch:
            now = max(now, arrivals[first])
        end = bisect_right(arrivals, now, first, min(first + max_batch - len(batch), count))
        if end > first:
            starts[first:end] = now
            now += prefill[end - first - 1]
            busy += prefill[end - first - 1]
            for i in range(first, end):
                done_at = num_rounds + luck.rounds[gamma][i]
                batch.append(_Sequence(i, done_at, num_rounds, 0, tokens[i]))
            first = end
        size = len(batch)
        if gammas[size - 1] != gamma:
            _change_length(luck, batch, num_rounds, gamma, gammas[size - 1])
            gamma = gammas[size - 1]
        step = min(sequence.done_at for sequence in batch) - num_rounds
        if first < count and size < max_batch:
            until_next = math.ceil((arrivals[first] - now) / seconds[size - 1])
            step = min(step, max(until_next, 1))
        now += step * seconds[size - 1]
        busy += step * seconds[size - 1]
        num_rounds += step
        sequence_rounds += step * size
        for sequence in batch:
            if sequence.done_at == num_rounds:
                finishes[sequence.request] = now
        batch = [sequence for sequence in batch if sequence.done_at > num_rounds]
    return Served(trace, starts, finishes, busy, num_rounds, sequence_rounds)


def _change_length(
    luck: _Luck, batch: list[_Sequence], num_rounds: int, gamma: int, new_gamma: int
) -> None:
    """Counts what the sequences committed so far, and when they will be done from here."""
    for sequence, consumed in zip(batch, _committed(luck, batch, num_rounds, gamma), strict=True):
        sequence.made += num_rounds - sequence.since
        sequence.left -= consumed
        sequence.since = num_rounds
    for sequence, rounds in zip(batch, _rounds_left(luck, batch, new_gamma), strict=True):
        sequence.done_at = num_rounds + rounds


def _committed(luck: _Luck, batch: list[_Sequence], num_rounds: int, gamma: int) -> list[float]:
    """Tokens that each sequence committed since the draft length last changed."""
    passed = [num_rounds - sequence.since for sequence in batch]
    if not luck.accepted.size:
        return [rounds * luck.mean_tokens[gamma] for rounds in passed]
    so_far = _running_tokens(luck, batch, max(passed), gamma)
    return [
        float(row[rounds - 1]) if rounds else 0.0
        for row, rounds in zip(so_far, passed, strict=True)
    ]


def _rounds_left(luck: _Luck, batch: list[_Sequence], gamma: int) -> list[int]:
    """Rounds until each sequence has the tokens that it has left."""
    left = [sequence.left for sequence in batch]
    if not luck.accepted.size:
        return [math.ceil(tokens / luck.mean_tokens[gamma] * (1 - 1e-12)) for tokens in left]
    so_far = _running_tokens(luck, batch, int(max(left)), gamma)
    return ((so_far < np.array(left)[:, None]).sum(1) + 1).tolist()


def _running_tokens(luck: _Luck, batch: list[_Sequence], num_rounds: int, gamma: int) -> np.ndarray:
    """`[b, num_rounds]` tokens committed after each of the rounds to come."""
    starts = np.array([sequence.request * luck.width + sequence.made for sequence in batch])
    accepted = luck.accepted[starts[:, None] + np.arange(num_rounds)]
    return np.cumsum(1 + np.minimum(accepted, gamma), axis=1, dtype=np.int64)


def _policy(policy: ArrayLike | LengthTable, sizes: np.ndarray) -> np.ndarray:
    """`[max_batch]` draft lengths of every batch size."""
    if isinstance(policy, LengthTable):
        policy = np.asarray(lookup_length(policy, sizes))
    is_length = (
        lambda x: (x >= 0) & (x <= _MAX_GAMMA) & (x == np.round(x)),
        f"whole numbers from 0 to {_MAX_GAMMA}",
    )
    require("policy", policy, is_length)
    return _per_size("policy", policy, len(sizes)).astype(np.int64)


def _per_size(name: str, value: ArrayLike, max_batch: int) -> np.ndarray:
    """A number for every batch size."""
    if np.shape(value) not in ((), (max_batch,)):
        raise ValueError(
            f"{name} of shape {np.shape(value)} must be a scalar or have shape [max_batch], "
            f"[{max_batch}]"
        )
    return np.broadcast_to(np.asarray(value, np.float64), (max_batch,))


def _per_request(name: str, value: ArrayLike, num_requests: int) -> np.ndarray:
    """A number for every request."""
    if np.shape(value) not in ((), (num_requests,)):
        raise ValueError(
            f"{name} of shape {np.shape(value)} must be a scalar or have shape [num_requests], "
            f"[{num_requests}]"
        )
    return np.broadcast_to(np.asarray(value, np.float64), (num_requests,))


def _checked(trace: Trace) -> Trace:
    """The trace as arrays of the host, or a ValueError."""
    if is_traced(trace):
        raise ValueError("a trace must be numbers: the simulation looks at them, so not inside jit")
    arrivals, tokens = np.asarray(trace[0], np.float64), np.asarray(trace[1], np.float64)
    if arrivals.ndim != 1 or arrivals.shape != tokens.shape or not len(arrivals):
        raise ValueError(
            f"arrival_seconds of shape {arrivals.shape} and num_tokens of shape {tokens.shape} "
            "must both have shape [n]"
        )
    require("arrival_seconds", arrivals, NON_NEGATIVE)
    require("the time between arrival_seconds", np.diff(arrivals), NON_NEGATIVE)
    is_count = (lambda x: (x >= 1) & (x == np.round(x)), "a whole number, at least 1")
    require("num_tokens", tokens, is_count)
    return Trace(arrivals, tokens.astype(np.int64))
