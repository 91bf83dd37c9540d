"""How long do the parts of decoding take on this machine, and how alike are draft and target?

Every time is the median of several repeats, in which what is compared takes turns, so that another
process on the machine slows all of it alike. Nothing is timed in the call that compiles it.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jaxsd
from jaxsd import models
from jaxsd.models import checkpoint, transformer

from . import timing


class StepTimes(NamedTuple):
    """Seconds of the parts of a round, batch 1, each measured by itself.

    target_seconds: a round of plain decoding, in the decoder's own loop: pass, sampling, commit.
    pass_seconds: `[K_max + 1]`, the target's pass over K + 1 tokens and nothing else.
    verify_seconds: `[K_max + 1]`, a round that is given its K draft tokens: that pass, and for the
      rest what a plain round takes beyond its own pass.
    draft_seconds: proposing one token, sampling included: a proposal of K_max over K_max.
    measured: the K whose pass was timed; the others lie on the line between their neighbours.
    """

    target_seconds: float
    pass_seconds: list[float]
    verify_seconds: list[float]
    draft_seconds: float
    measured: list[int]


class Request(NamedTuple):
    """One prompt, ready to be decoded."""

    tokens: np.ndarray  # [1, P] int32, padded on the right
    length: int

    def start(
        self,
        decoder: jaxsd.Decoder,
        params: Any,
        key: Array,
        temperature: float,
        new: int,
        **options: Any,
    ) -> jaxsd.DecodeState:
        """The state from which the loop starts, ready on the device; `options` of the decoder."""
        state = decoder.start(
            params,
            self.tokens,
            np.array([self.length], np.int32),
            key,
            sampling=jaxsd.Sampling(temperature),
            max_new_tokens=new,
            **options,
        )
        return jax.block_until_ready(state)


Timer = Callable[[Any, jaxsd.DecodeState], float]
"""Takes the weights and a prefilled state of plain decoding, which it may consume; seconds."""


def make_round(decoder: jaxsd.Decoder) -> Timer:
    """Times a round of plain decoding in the decoder's own compiled loop."""

    def seconds(params: Any, state: jaxsd.DecodeState) -> float:
        began = time.perf_counter()
        state = jax.block_until_ready(decoder.run(params, state, jaxsd.UNTIL_DONE))
        return (time.perf_counter() - began) / int(state.stats.num_rounds[0])

    return seconds


def make_pass(target: jaxsd.LanguageModel, num_draft_tokens: int, num_passes: int) -> Timer:
    """Times the target's pass over the tokens of a block, in a compiled loop."""

    loop = timing.make_pass_loop(target)

    def seconds(params: Any, state: jaxsd.DecodeState) -> float:
        block = jnp.zeros((len(state.lengths), num_draft_tokens + 1), jnp.int32)
        starts = jax.block_until_ready(state.lengths - 1)
        began = time.perf_counter()
        out = loop(params["target"], block, starts, state.target_cache, np.int32(num_passes))
        jax.block_until_ready(out)
        return (time.perf_counter() - began) / num_passes

    return seconds


def make_drafting(
    draft: jaxsd.LanguageModel, num_tokens: int, max_len: int, num_rounds: int
) -> Timer:
    """Times the drafter by itself: seconds per token of a proposal of `num_tokens`."""
    drafter = jaxsd.model_drafter(draft, num_tokens)

    @jax.jit
    def propose(params: Any, cache: Any, state: jaxsd.DecodeState) -> tuple[Any, Array]:
        def body(index: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
            cache, tokens = carry
            keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys, index)
            proposal = drafter.propose(params, cache, tokens, state.lengths, keys, state.sampling)
            # The next proposal follows on this one; independent ones could be computed at once.
            rows = jnp.arange(len(state.lengths))
            return proposal.state, tokens.at[rows, state.lengths - 1].set(proposal.tokens[:, -1])

        return jax.lax.fori_loop(0, num_rounds, body, (cache, state.tokens))

    def seconds(params: Any, state: jaxsd.DecodeState) -> float:
        cache = jax.block_until_ready(drafter.init(params, len(state.lengths), max_len))
        began = time.perf_counter()
        jax.block_until_ready(propose(params, cache, state))
        return (time.perf_counter() - began) / (num_rounds * num_tokens)

    return seconds


def make_overlap(
    target: checkpoint.Pretrained, draft: checkpoint.Pretrained
) -> Callable[[np.ndarray, float], tuple[np.ndarray, np.ndarray]]:
    """A function from texts to how alike the two models are at every place.

    It takes tokens `[B, L]` and a temperature. It returns, both `[B, L]` and at each place about
    the token that comes next, the probability that the target accepts a token of the draft, which
    is sum(min(p, q)), and the target's margin, its largest logit less its second largest.
    """

    compare = _overlap_program(target.config, draft.config)

    def overlap(tokens: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
        return jax.device_get(compare(target.params, draft.params, tokens, np.float32(temperature)))

    return overlap


def make_kept(
    target: checkpoint.Pretrained, draft: checkpoint.Pretrained
) -> Callable[[np.ndarray, float], np.ndarray]:
    """A function from texts of the target to how likely each token would be kept from a draft.

    It takes tokens `[B, L]` and a temperature and returns `[B, L]`, at each place about the token x
    that comes next, min(1, q(x) / p(x)): given that rejection sampling has left x there, the
    probability that the draft had proposed it and it was accepted, if it was drafted at all.
    """

    reading = make_reading(target, draft)
    return lambda tokens, temperature: reading(tokens, [temperature])[1][0]


def make_reading(
    target: checkpoint.Pretrained, draft: checkpoint.Pretrained
) -> Callable[[np.ndarray, Sequence[float]], tuple[np.ndarray, np.ndarray]]:
    """A function from texts and temperatures to what `make_overlap` and `make_kept` find at each.

    It takes tokens `[B, L]` and n temperatures, and returns overlap and kept, both `[n, B, L]`.
    Each model reads every text once.
    """
    read = _reading_program(target.config, draft.config)

    def reading(tokens: np.ndarray, temperatures: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        heats = np.asarray(temperatures, np.float32)
        found = read(target.params, draft.params, tokens, heats)
        overlap, kept = (np.asarray(one, np.float64) for one in found)
        return overlap, kept

    return reading


def expected_rounds(kept: np.ndarray, num_tokens: int) -> float:
    """Rounds in which rejection sampling, K tokens a round, writes one text of the target.

    Exact for that text: whether the token at a place is kept from the draft, if it was drafted,
    depends on no other place, so that the rounds left from a place on are a sum over where the
    round that begins there ends.

        r(s) = 1 + sum over n = 0..K of P(n tokens accepted from s on) r(s + n + 1)

    Args:
      kept: `[n]` of the text's n tokens, from `make_kept`.
      num_tokens: K, at least 0.
    """
    rounds = np.zeros(len(kept) + num_tokens + 2)
    padded = np.concatenate([kept, np.zeros(num_tokens + 1)])
    for start in range(len(kept) - 1, -1, -1):
        reached = np.cumprod(np.concatenate([[1.0], padded[start : start + num_tokens]]))
        ends = reached - np.append(reached[1:], 0.0)  # n accepted and no more
        rounds[start] = 1 + ends @ rounds[start + 1 : start + num_tokens + 2]
    return float(rounds[0])


def step_times(
    round_fn: Timer,
    passes: Mapping[int, Timer],
    drafting: Timer,
    params: Any,
    make_state: Callable[[], jaxsd.DecodeState],
    repeats: int,
) -> StepTimes:
    """Times all parts in turns.

    Args:
      round_fn: from `make_round`.
      passes: by K, from `make_pass`; K = 0 is among them.
      drafting: from `make_drafting`.
      params: of both models.
      make_state: makes a prefilled state of plain decoding.
      repeats: of which the medians are taken.
    """
    timers = [round_fn, drafting, *passes.values()]
    seconds = [[timer(params, make_state()) for timer in timers] for _ in range(repeats)]
    target, draft, *by_length = (statistics.median(column) for column in zip(*seconds, strict=True))
    medians = dict(zip(passes, by_length, strict=True))
    measured = sorted(medians)
    lengths = np.arange(measured[-1] + 1)
    pass_seconds = np.interp(lengths, measured, [medians[k] for k in measured])
    beyond = max(target - pass_seconds[0], 0.0)
    verify_seconds = [target, *(pass_seconds[1:] + beyond).tolist()]
    return StepTimes(target, pass_seconds.tolist(), verify_seconds, draft, measured)


def pad_prompts(token_lists: Sequence[Sequence[int]], multiple: int = 16) -> list[Request]:
    """Prompts padded to one length, so that all of them use one compiled program."""
    width = -(-max(len(tokens) for tokens in token_lists) // multiple) * multiple
    requests = []
    for tokens in token_lists:
        padded = np.zeros((1, width), np.int32)
        padded[0, : len(tokens)] = tokens
        requests.append(Request(padded, len(tokens)))
    return requests


# Models of one shape share a program: weights are among its arguments.
@functools.lru_cache(maxsize=4)
def _overlap_program(target: models.Config, draft: models.Config) -> Callable[..., Any]:
    """Overlap and margin `[B, L]`, of both models' weights, tokens and a temperature."""

    @jax.jit
    def compare(target_params: Any, draft_params: Any, tokens: Array, temperature: Array) -> Any:
        sampling = jaxsd.Sampling(temperature)
        target_logits = transformer.forward(target, target_params, tokens)
        draft_logits = transformer.forward(draft, draft_params, tokens)
        probs = (
            jaxsd.probabilities(target_logits, sampling),
            jaxsd.probabilities(draft_logits, sampling),
        )
        largest, _ = jax.lax.top_k(target_logits, 2)
        return jnp.minimum(*probs).sum(-1), largest[..., 0] - largest[..., 1]

    return compare


@functools.lru_cache(maxsize=4)
def _reading_program(target: models.Config, draft: models.Config) -> Callable[..., Any]:
    """Overlap and chances to be kept `[n, B, L]`, of weights, tokens and n temperatures."""

    @jax.jit
    def read(target_params: Any, draft_params: Any, tokens: Array, temperatures: Array) -> Any:
        logits = [
            transformer.forward(config, params, tokens)
            for config, params in ((target, target_params), (draft, draft_params))
        ]

        following = jnp.roll(tokens, -1, axis=1)[:, :, None]

        def at(temperature: Array) -> tuple[Array, Array]:
            p, q = (jaxsd.probabilities(one, jaxsd.Sampling(temperature)) for one in logits)
            overlap = jnp.minimum(p, q).sum(-1)
            p, q = (jnp.take_along_axis(law, following, axis=2)[:, :, 0] for law in (p, q))
            return overlap, jnp.minimum(q / jnp.maximum(p, jnp.finfo(p.dtype).tiny), 1)

        return jax.lax.map(at, temperatures)

    return read
