"""What are the drafts of one shape worth to the target: acceptance, tokens of a round, speed-up?

Drafts of one shape differ in their weights alone, so they share every compiled program, and take
turns in it: plain decoding, all lengths and all of these drafts at every prompt.
"""

import concurrent.futures
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxsd
from jaxsd.models import checkpoint

from . import measure, timing
from .circle_plan import Plan
from .circle_study import Study
from .circle_times import COMPILERS, make_decoder, make_model

# Rounds in which a speculative run is shortened or lengthened are counted from a first, unmeasured
# one of so many.
_TRIAL_ROUNDS = 16
_READ_TOGETHER = 8  # texts in a pass
_TEXTS_PER_PROMPT = {True: 1, False: 2}  # by whether the text is greedy, and so always the same
# Groups of prompts that are decoded for one batch: as many as there are, and no more than this,
# again and again until every length has been timed so often.
_MAX_GROUPS, _MIN_TURNS = 12, 9


class Turn(NamedTuple):
    """One timed run of a batch of prompts."""

    seconds: float
    rounds: int
    tokens: np.ndarray  # [B] new ones of every row
    prompts: Sequence[int]  # [B] which


def temperature_name(temperature: float) -> str:
    """The key of a temperature in JSON.

    >>> temperature_name(1.0), temperature_name(0.7)
    ('1', '0.7')
    """
    return f"{temperature:g}"


def write_texts(plan: Plan, target: checkpoint.Pretrained, prompts: np.ndarray) -> dict[str, Any]:
    """What the target writes by itself after every prompt, `[N, L]` tokens for each temperature."""
    model = make_model(target.config, target.params)
    decoder = make_decoder(plan, model, model, 0)
    params = {"target": target.params, "draft": None}
    batch = max(plan.batches)
    texts = {}
    for temperature in plan.temperatures:
        rows = []
        for copy in range(_TEXTS_PER_PROMPT[temperature == 0]):
            for first in range(0, len(prompts), batch):
                group = prompts[first : first + batch]
                state = _start(plan, decoder, params, group, temperature, [copy, first])
                state = decoder.run(params, state, np.int32(plan.new_tokens))
                rows.append(np.asarray(state.tokens)[:, : plan.prompt_length + plan.new_tokens])
        texts[temperature_name(temperature)] = np.concatenate(rows).tolist()
    return {"texts": texts}


def read_shape(
    plan: Plan,
    target: checkpoint.Pretrained,
    drafts: Mapping[str, checkpoint.Pretrained],
    windows: np.ndarray,
    texts: Mapping[str, Any],
) -> dict[str, Any]:
    """The acceptance of the drafts of one shape, by their names, teacher-forced; JSON values.

    Args:
      plan: of the study.
      target: the target.
      drafts: of one shape, by name.
      windows: `[N, T + 1]` held-out text.
      texts: what the target wrote, from `write_texts`.
    """
    return {name: _read(plan, target, draft, windows, texts) for name, draft in drafts.items()}


def measure_shape(
    plan: Plan,
    study: Study,
    target: checkpoint.Pretrained,
    drafts: Mapping[str, checkpoint.Pretrained],
    prompts: np.ndarray,
) -> dict[str, Any]:
    """Speed and accepted tokens of the drafts of one shape in the loop, by name; JSON values.

    Args:
      plan: of the study.
      study: for its lines of progress.
      target: the target.
      drafts: of one shape, by name.
      prompts: `[N, P]` that are continued.
    """
    found: dict[str, dict[str, Any]] = {name: {"speed": {}} for name in drafts}
    some = next(iter(drafts.values()))
    whole, shape = (make_model(one.config, one.params) for one in (target, some))
    decoders = {length: make_decoder(plan, whole, shape, length) for length in (0, *plan.lengths)}
    params = {
        name: {"target": target.params, "draft": draft.params} for name, draft in drafts.items()
    }
    turns = {
        batch: _decode(plan, study, decoders, params, prompts, batch) for batch in plan.batches
    }
    tokens = {
        (length, name): _tokens([one for ones in turns.values() for one in ones[length, name]])
        for length in plan.lengths
        for name in drafts
    }
    for batch, by_case in turns.items():
        seconds = {
            length: _round_seconds([by_case[case] for case in by_case if case[0] == length])
            for length in (0, *plan.lengths)
        }
        for name in drafts:
            found[name]["speed"][str(batch)] = {
                "plain_round_seconds": seconds[0].value,
                "plain_tokens_per_second": batch / seconds[0].value,
                "by_length": [
                    _speed(batch, length, tokens[length, name], seconds[length], seconds[0])
                    for length in plan.lengths
                ],
            }
    loop = _accept(plan, decoders[max(plan.lengths)], params, prompts)
    for name in drafts:
        found[name]["loop"] = loop[name]
    return found


def shares_of_rounds(kept: Sequence[np.ndarray], num_tokens: int) -> tuple[np.ndarray, float]:
    """Shares of rounds that accept at least 1, 2, ..., K tokens, in texts of the target.

    Where rounds begin depends on what those before accepted; a place is counted as often as a round
    is expected to begin there, which follows from the first place on. Rounds that the end of a text
    would cut short are not counted.

    Args:
      kept: of every text `[n]`, from `measure.make_kept`.
      num_tokens: K.

    Returns:
      `[K]` shares, and how many rounds are expected to begin where they are counted.
    """
    counted, total = np.zeros(num_tokens), 0.0
    for row in kept:
        begins = np.zeros(len(row) + num_tokens + 1)
        begins[0] = 1.0
        for place in range(len(row) - num_tokens):
            reached = np.cumprod(row[place : place + num_tokens])
            ends = np.append(1.0, reached) - np.append(reached, 0.0)  # n accepted and no more
            begins[place + 1 : place + num_tokens + 2] += begins[place] * ends
            counted += begins[place] * reached
            total += begins[place]
    return counted / total, total


def autocorrelation(kept: Sequence[np.ndarray], lag: int) -> float:
    """Of the chance that a token is kept, between places so far apart, over all texts; 0 if none.

    >>> round(autocorrelation([np.array([1.0, 0.0, 1.0, 0.0])], 1), 3)
    -1.0
    """
    mean = float(np.mean(np.concatenate(list(kept))))
    pairs = [(row[:-lag] - mean, row[lag:] - mean) for row in kept if len(row) > lag]
    early, late = (np.concatenate(side) for side in zip(*pairs, strict=True))
    scale = math.sqrt(float(np.square(early).mean() * np.square(late).mean()))
    return float((early * late).mean()) / scale if scale else 0.0


def _read(
    plan: Plan,
    target: checkpoint.Pretrained,
    draft: checkpoint.Pretrained,
    windows: np.ndarray,
    texts: Mapping[str, Any],
) -> dict[str, Any]:
    """Acceptance from both models' laws, without a loop: teacher-forced."""
    reading = measure.make_reading(target, draft)
    place = slice(plan.prompt_length - 1, plan.prompt_length - 1 + plan.new_tokens)
    found: dict[str, dict[str, Any]] = {
        name: {}
        for name in ("alpha_of_text", "alpha", "shares", "rounds", "tokens", "autocorrelation")
    }

    def read(rows: np.ndarray, temperatures: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        parts = [
            reading(rows[first : first + _READ_TOGETHER].astype(np.int32), temperatures)
            for first in range(0, len(rows), _READ_TOGETHER)
        ]
        overlap, kept = (np.concatenate(one, axis=1) for one in zip(*parts, strict=True))
        return overlap, kept

    of_text = read(windows[:, :-1], plan.temperatures)[0].mean((1, 2))
    for temperature, alpha in zip(plan.temperatures, of_text.tolist(), strict=True):
        name = temperature_name(temperature)
        found["alpha_of_text"][name] = alpha
        overlap, kept_of_all = read(np.asarray(texts[name]), [temperature])
        found["alpha"][name] = float(overlap[0, :, place].mean())
        kept = list(kept_of_all[0, :, place])
        shares, found["rounds"][name] = shares_of_rounds(kept, max(plan.lengths))
        found["shares"][name] = shares.tolist()
        found["tokens"][name] = [
            len(kept) * plan.new_tokens / sum(measure.expected_rounds(row, k) for row in kept)
            for k in plan.lengths
        ]
        found["autocorrelation"][name] = [autocorrelation(kept, lag) for lag in (1, 2, 4)]
    return found


class Counted(NamedTuple):
    """What was counted or timed, and how well it is known."""

    value: float
    relative_error: float  # its standard error
    num: int


def _decode(
    plan: Plan,
    study: Study,
    decoders: Mapping[int, jaxsd.Decoder],
    params: Mapping[str, Any],
    prompts: np.ndarray,
    batch: int,
) -> dict[tuple[int, str], list[Turn]]:
    """Timed runs by length and draft, which take turns at all groups of prompts.

    A run has so many rounds that a row gets `new_tokens` on average, whatever the length, so that
    all of them are timed over the same stretch of text, and all rows of a batch are busy to its
    end, as they are where the next request takes the place of one that is done. Plain decoding,
    under length 0, comes as often as there are drafts.
    """

    def trial(length: int) -> dict[tuple[int, str], int]:
        found = {}
        for name in params:
            turn = _run(
                plan, decoders[length], params[name], prompts, range(batch), _TRIAL_ROUNDS, [-1]
            )
            mean = float(turn.tokens.mean()) / turn.rounds
            found[length, name] = max(1, round(plan.new_tokens / mean))
        return found

    study.say(f"  batch {batch}: compiling {len(decoders)} loops")
    num_rounds: dict[tuple[int, str], int] = {}
    # Nothing is timed yet, and a compiler keeps about one core busy.
    with concurrent.futures.ThreadPoolExecutor(COMPILERS) as threads:
        for found in threads.map(trial, (0, *plan.lengths)):
            num_rounds |= found
    cases = list(num_rounds)
    starts = range(0, len(prompts), batch)
    chosen = [starts[i * len(starts) // _MAX_GROUPS] for i in range(_MAX_GROUPS)]
    groups = chosen if len(starts) > _MAX_GROUPS else list(starts)
    groups = groups * math.ceil(_MIN_TURNS / (len(groups) * len(params)))
    study.say(f"  batch {batch}: decoding {len(groups)} groups of prompts in {len(cases)} ways")
    turns: dict[tuple[int, str], list[Turn]] = {case: [] for case in cases}
    for number, first in enumerate(groups):
        for place in range(len(cases)):
            case = cases[(place + number * 7) % len(cases)]
            length, name = case
            rows = range(first, first + batch)
            key = [number, batch]
            turns[case].append(
                _run(plan, decoders[length], params[name], prompts, rows, num_rounds[case], key)
            )
    return turns


def _tokens(turns: Sequence[Turn]) -> Counted:
    """Tokens of a round, over all turns of a length and a draft, whatever their batch.

    Rows do not know of each other, so that one alone and one of eight count alike. Texts after the
    same prompt are no independent evidence: the error is that between prompts.
    """
    tokens: dict[int, float] = {}
    rounds: dict[int, int] = {}
    for turn in turns:
        for prompt, count in zip(turn.prompts, turn.tokens.tolist(), strict=True):
            tokens[prompt] = tokens.get(prompt, 0.0) + count
            rounds[prompt] = rounds.get(prompt, 0) + turn.rounds
    means = np.array([tokens[prompt] / rounds[prompt] for prompt in tokens])
    mean = sum(tokens.values()) / sum(rounds.values())
    error = float(np.std(means, ddof=1)) / mean / math.sqrt(len(means)) if len(means) > 1 else 0.0
    return Counted(mean, error, sum(rounds.values()))


def _round_seconds(turns_of_drafts: Sequence[Sequence[Turn]]) -> Counted:
    """Median over turns: what disturbs a machine only ever adds, and not to every turn.

    Of all drafts of a shape: a round does the same work whatever is in their weights.
    """
    seconds = np.array([turn.seconds / turn.rounds for turns in turns_of_drafts for turn in turns])
    # A median is known less well than a mean, by sqrt(pi / 2) of a normal distribution.
    spread = float(np.std(np.log(seconds), ddof=1)) if len(seconds) > 1 else 0.0
    error = spread * math.sqrt(math.pi / 2 / len(seconds))
    return Counted(float(np.median(seconds)), error, len(seconds))


def _speed(
    batch: int, length: int, tokens: Counted, seconds: Counted, plain: Counted
) -> dict[str, Any]:
    """The speed-up: tokens of a round times the time of a plain round over that of a round."""
    errors = (tokens.relative_error, seconds.relative_error, plain.relative_error)
    return {
        "length": length,
        "round_seconds": seconds.value,
        "tokens": tokens.value,
        "tokens_per_second": batch * tokens.value / seconds.value,
        "speedup": tokens.value * plain.value / seconds.value,
        "relative_error": math.hypot(*errors),
        "rounds": tokens.num,
    }


def _accept(
    plan: Plan, decoder: jaxsd.Decoder, params: Mapping[str, Any], prompts: np.ndarray
) -> dict[str, Any]:
    """Acceptance by position as the loop counts it, at every temperature."""
    batch, length = max(plan.batches), max(plan.lengths)
    found: dict[str, Any] = {name: {} for name in params}
    for name, weights in params.items():
        for temperature in plan.temperatures:
            rounds = accepted = drafted = 0
            by_position = np.zeros(length, np.int64)
            for first in range(0, len(prompts), batch):
                group = prompts[first : first + batch]
                state = _start(
                    plan, decoder, weights, group, temperature, [first, 1], plan.new_tokens
                )
                stats = decoder.run(weights, state, jaxsd.UNTIL_DONE).stats
                rounds += int(np.sum(np.asarray(stats.num_rounds)))
                accepted += int(np.sum(np.asarray(stats.num_accepted)))
                drafted += int(np.sum(np.asarray(stats.num_drafted)))
                by_position += np.asarray(stats.accepted_by_position).sum(0)
            found[name][temperature_name(temperature)] = {
                "rounds": rounds,
                "accepted": accepted,
                "drafted": drafted,
                "accepted_by_position": by_position.tolist(),
            }
    return found


def _run(
    plan: Plan,
    decoder: jaxsd.Decoder,
    params: Any,
    prompts: np.ndarray,
    rows: Sequence[int],
    num_rounds: int,
    key: Sequence[int],
) -> Turn:
    """A prefilled batch of some of the prompts, so many rounds, timed."""
    group = prompts[list(rows)]
    state = _start(plan, decoder, params, group, plan.temperatures[0], key)
    taken, state = timing.seconds_of(lambda: decoder.run(params, state, np.int32(num_rounds)))
    rounds = int(np.max(np.asarray(state.stats.num_rounds)))
    return Turn(taken, rounds, np.asarray(state.lengths) - prompts.shape[1], rows)


def _start(
    plan: Plan,
    decoder: jaxsd.Decoder,
    params: Any,
    prompts: np.ndarray,
    temperature: float,
    key: Sequence[int],
    new_tokens: int | None = None,
) -> jaxsd.DecodeState:
    """The state from which the loop starts, ready on the device."""
    seed = int(np.random.default_rng([plan.seed, *(1 + part for part in key)]).integers(2**31))
    return jax.block_until_ready(
        decoder.start(
            params,
            prompts,
            np.full(len(prompts), plan.prompt_length, np.int32),
            jax.random.key(seed),
            sampling=jaxsd.Sampling(temperature),
            max_new_tokens=new_tokens or plan.max_len - plan.prompt_length,
        )
    )
