"""How is compiled work timed here? In turns, warm, on states that are ready on the device.

What is compared takes turns, so that another process on the machine slows all of it alike, and the
order changes from turn to turn. `typical` then takes out what a turn as a whole was slower by.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jaxsd

# A timed call makes passes for so long. Decoding makes hundreds of passes of the same weights one
# after the other; the first few after other programs are slower. In calls of 0.02, 0.1 and 0.3 s a
# pass of the 18M target took 3.6, 2.0 and 2.0 ms, and a plain round of it 2.2.
WINDOW_SECONDS = 0.2

Timer = Callable[[], float]
"""Does its work once and returns the seconds that one piece of it took."""


class Timed(NamedTuple):
    """A result and how long it took to be ready."""

    seconds: float
    value: Any


def seconds_of(work: Callable[[], Any]) -> Timed:
    """Does some work, waits until its result is on the device, and says how long that took."""
    began = time.perf_counter()
    value = jax.block_until_ready(work())
    return Timed(time.perf_counter() - began, value)


def in_turns(
    timers: Sequence[Timer], repeats: int, step: Callable[[str], None] = lambda what: None
) -> np.ndarray:
    """Seconds `[repeats, n]` of timers that take turns, each turn begun with another of them."""
    seconds = np.zeros((repeats, len(timers)))
    for repeat in range(repeats):
        step(f"timing, turn {repeat + 1} of {repeats}")
        for place in range(len(timers)):
            index = (place + repeat * 7919) % len(timers)
            seconds[repeat, index] = timers[index]()
    return seconds


def typical(seconds: np.ndarray) -> np.ndarray:
    """Medians `[n]` over turns `[repeats, n]`, without what a whole turn was slower by."""
    return np.median(without_pace(seconds), axis=0)


def without_pace(seconds: np.ndarray) -> np.ndarray:
    """Seconds `[repeats, n]` of turns, without what a whole turn was slower by.

    A turn's pace is the median, over what was timed, of its seconds over the median seconds. On a
    quiet machine every pace is 1 and nothing changes. Paces are scaled to a median of 1.
    """
    paces = np.median(seconds / np.median(seconds, axis=0), axis=1)
    return seconds / (paces / np.median(paces))[:, None]


def median_error(seconds: np.ndarray) -> float:
    """Relative standard error of the median of some readings; 0 of a single one.

    A median is known less well than a mean, by sqrt(pi / 2) of a normal distribution.

    >>> round(median_error(np.array([0.9, 1.0, 1.1])), 3)
    0.073
    """
    if len(seconds) < 2:
        return 0.0
    spread = float(np.std(np.log(seconds), ddof=1))
    return spread * math.sqrt(math.pi / 2 / len(seconds))


def make_pass_loop(model: jaxsd.LanguageModel) -> Callable[..., tuple[Array, Any]]:
    """Compiles passes one after the other, each over the tokens that the one before preferred.

    The function takes params, block `[B, T]`, starts `[B]`, cache (which it consumes) and the
    number of passes, traced, and returns the last block and the cache.
    """

    def passes(
        params: Any, block: Array, starts: Array, cache: Any, num_passes: Array
    ) -> tuple[Array, Any]:
        offsets = jnp.arange(block.shape[1], dtype=jnp.int32)
        positions = starts[:, None] + offsets[None, :]

        def body(_: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
            block, cache = carry
            logits, cache = model.apply(params, block, positions, cache)
            # The next block is made of this one's scores; independent passes could be merged.
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, num_passes, body, (block, cache))

    return jax.jit(passes, donate_argnums=3)


def make_pass_timer(
    model: jaxsd.LanguageModel,
    loop: Callable[..., tuple[Array, Any]],
    params: Any,
    batch: int,
    rows: int,
    context: int,
    min_seconds: float = WINDOW_SECONDS,
) -> Timer:
    """Compiles and warms one pass over `rows` tokens of each row, `context` tokens in every cache.

    The cache has room for `context + rows` tokens and no more. A timed call makes so many passes
    that it takes at least about `min_seconds`.
    """
    held = [jnp.zeros((batch, rows), jnp.int32), model.init_cache(batch, context + rows)]
    starts = jnp.full((batch,), context, jnp.int32)

    def run(num_passes: int) -> float:
        began = time.perf_counter()
        held[:] = jax.block_until_ready(loop(params, *_around(held, starts), np.int32(num_passes)))
        return (time.perf_counter() - began) / num_passes

    run(1)
    num_passes = max(2, int(np.ceil(min_seconds / run(2))))
    return lambda: run(num_passes)


def make_round_timer(
    decoder: jaxsd.Decoder, params: Any, start: Callable[[], jaxsd.DecodeState]
) -> Timer:
    """Seconds of a round in the decoder's own compiled loop, from a fresh state to its end.

    A round lasts as long as its batch does: rounds are those of the row that has most.
    """

    def run() -> float:
        state = start()
        seconds, state = seconds_of(lambda: decoder.run(params, state, jaxsd.UNTIL_DONE))
        return seconds / int(np.max(np.asarray(state.stats.num_rounds)))

    return run


def memory_speed(num_bytes: int = 2**28, repeats: int = 7) -> float:
    """Bytes per second that the default device reads and writes, in a plain update in place."""

    def passes(x: Array, num_passes: Array) -> Array:
        return jax.lax.fori_loop(0, num_passes, lambda _, x: 0.5 * x + 1.0, x)

    update = jax.jit(passes, donate_argnums=0)
    x = jnp.zeros((num_bytes // 4,), jnp.float32)
    x = jax.block_until_ready(update(x, np.int32(1)))
    best = np.inf
    for _ in range(repeats):
        began = time.perf_counter()
        x = jax.block_until_ready(update(x, np.int32(4)))
        best = min(best, (time.perf_counter() - began) / 4)
    return 2 * num_bytes / best


def product_speed(size: int = 2048, repeats: int = 5, dtype: Any = jnp.float32) -> float:
    """FLOPs per second of the default device in products of square matrices."""

    def passes(x: Array, y: Array, num_passes: Array) -> Array:
        def body(_: Array, x: Array) -> Array:
            return (x @ y) * jnp.asarray(1e-3, dtype)

        return jax.lax.fori_loop(0, num_passes, body, x)

    multiply = jax.jit(passes)
    x = jnp.full((size, size), 0.5, dtype)
    jax.block_until_ready(multiply(x, x, np.int32(1)))
    best = np.inf
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(multiply(x, x, np.int32(4)))
        best = min(best, (time.perf_counter() - began) / 4)
    return 2 * size**3 / best


def _around(held: list[Any], starts: Array) -> tuple[Array, Array, Any]:
    """Arguments of a loop of passes: the starts go between what it hands on."""
    return held[0], starts, held[1]
