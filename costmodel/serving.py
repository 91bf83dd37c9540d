"""How long do requests wait for their answers, by when they arrive and how many tokens are drafted?

A simulation of one server, request by request. It is not differentiable and runs on the host, in
NumPy: what happens next depends on the clock. The same trace and seed give every policy the same
requests and the same luck, so that policies are compared on nothing but what they decide.
"""

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
      >>> from jaxsd import costmodel
      >>> trace = costmodel.gamma_trace(0, 10_000, interval_seconds=0.5, cv=2.0)
      >>> intervals = np.diff(trace.arrival_seconds)
      >>> bool(abs(intervals.mean() - 0.5) < 0.05), bool(abs(intervals.std() - 1.0) < 0.1)
      (True, True)

    Source: Su et al., arXiv 2310.18813, section 5.
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
      2.26
      0.85
      0.8

    Source: Su et al., arXiv 2310.18813, section 5.
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
