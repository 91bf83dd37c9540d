"""What are drafts worth to the target: acceptance, tokens of a round, speed-up?

Drafts of one shape differ in their weights alone, so they share every compiled program. All
programs of all shapes take turns, plain decoding and the device's calibration among them: what
other work on the machine takes of it, it takes of all alike.
"""

import concurrent.futures
import functools
import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxsd
from jaxsd.models import checkpoint

from . import circle_times, measure, timing
from .circle_plan import Plan, shape_name
from .circle_study import Study
from .circle_times import make_decoder, make_model

PLAIN = "plain"
_READ_TOGETHER = 8  # texts in a pass
_MAP_LIMIT = pathlib.Path("/proc/sys/vm/max_map_count")
_MAPS_PER_LOOP = 800  # of a decoder's loop for one batch: 530 to 770 with jaxlib 0.10
_TEXTS_PER_PROMPT = {True: 1, False: 2}  # by whether the text is greedy, and so always the same


class Case(NamedTuple):
    """What is timed as one: drafts of a shape do the same work. Plain decoding has no shape."""

    shape: str
    batch: int
    length: int


def temperature_name(temperature: float) -> str:
    """The key of a temperature in JSON.

    >>> temperature_name(1.0), temperature_name(0.7)
    ('1', '0.7')
    """
    return f"{temperature:g}"


def write_texts(plan: Plan, target: checkpoint.Pretrained, prompts: np.ndarray) -> dict[str, Any]:
    """What the target writes by itself after every prompt, `[N, L]` tokens for each temperature."""
    model = make_model(target.config, target.params)
    decoder = make_decoder(plan, model, None, 0)
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


class Bench:
    """Everything that takes turns, compiled when the first of them is timed.

    Attributes:
      cases: what is timed beside the calibration's programs.
      programs: those of the calibration.
      members: names of drafts by shape, which take turns in the shape's cases.
      num_turns: that are to be timed; every draft comes in each of its cases.
    """

    def __init__(
        self,
        plan: Plan,
        study: Study,
        target: checkpoint.Pretrained,
        drafts: Mapping[str, checkpoint.Pretrained],
        rounds_per_text: Mapping[str, Sequence[float]],
        prompts: np.ndarray,
        with_calibration: bool = True,
    ) -> None:
        """Lists what there is to do.

        Args:
          plan: of the study.
          study: for its lines of progress.
          target: the target.
          drafts: all of them, by name.
          rounds_per_text: of each of them, by draft length: about how many rounds it takes.
          prompts: `[N, P]` that are continued.
          with_calibration: whether the calibration's programs take their turns too.
        """
        self._plan, self._study, self._prompts = plan, study, prompts
        self._whole = circle_times.make_model(target.config, target.params, circle_times.TARGET)
        self._drafts = {
            name: circle_times.make_model(draft.config, draft.params, name)
            for name, draft in drafts.items()
        }
        self._rounds_per_text = rounds_per_text
        self._make = circle_times.decoder_maker(plan, self._whole)
        self.programs = circle_times.Programs([], [])
        if with_calibration:
            self.programs = circle_times.list_programs(plan, self._whole)
        self.members: dict[str, list[str]] = {}
        for name, draft in self._drafts.items():
            shape = shape_name(draft.config.d_model, draft.config.n_layers)
            self.members.setdefault(shape, []).append(name)
        self.num_turns = max(plan.repeats, *map(len, self.members.values()))
        # Plain decoding comes as often as there are shapes: every speed-up rests on it.
        self.cases = [
            *(Case(PLAIN, batch, 0) for batch in plan.batches for _ in self.members),
            *(
                Case(shape, batch, length)
                for shape in self.members
                for batch in plan.batches
                for length in plan.lengths
            ),
        ]

    @functools.cached_property
    def _timers(self) -> list[timing.Timer]:
        """Of the calibration's programs; all loops of all cases are compiled too."""
        timers = circle_times.compile_programs(
            self._plan, self._study, self._whole, self.programs, self._make
        )
        cases = list(dict.fromkeys(self.cases))
        self._study.say(f"  compiling {len(cases)} loops more")
        # Nothing is timed yet, and a compiler keeps about one core busy.
        with concurrent.futures.ThreadPoolExecutor(circle_times.COMPILERS) as threads:
            list(threads.map(lambda case: self._run(case, 0, 2), cases))
        return timers

    def turn(self, number: int) -> dict[str, Any]:
        """Every program once, in an order of this turn; JSON values."""
        timers = self._timers
        self._study.say(f"  turn {number + 1} of {self.num_turns}")
        seconds = np.zeros(len(timers))
        runs: list[Any] = [None] * len(self.cases)
        order = np.random.default_rng([self._plan.seed, number]).permutation(
            len(timers) + len(self.cases)
        )
        for index in order.tolist():
            if index < len(timers):
                seconds[index] = timers[index]()
            else:
                runs[index - len(timers)] = self._run(self.cases[index - len(timers)], number)
        return {"calibration": seconds.tolist(), "runs": runs}

    def accept(self) -> dict[str, Any]:
        """Acceptance by position as the loop counts it, at every temperature, by draft."""
        plan = self._plan
        batch, length = max(plan.batches), max(plan.lengths)
        found: dict[str, Any] = {}
        for name, draft in self._drafts.items():
            found[name] = {}
            for temperature in plan.temperatures:
                rounds = accepted = drafted = 0
                by_position = np.zeros(length, np.int64)
                for first in range(0, len(self._prompts), batch):
                    state = self._start(
                        draft, length, range(first, first + batch), temperature, [first, 1], True
                    )
                    decoder, params = self._make(draft, length), self._params(draft)
                    stats = decoder.run(params, state, jaxsd.UNTIL_DONE).stats
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

    def _run(self, case: Case, number: int, num_rounds: int | None = None) -> dict[str, Any]:
        """A prefilled batch of some of the prompts and so many rounds, timed; JSON values.

        As many rounds as give a row `new_tokens` on average, whatever the length, so that all are
        timed over the same stretch of text, and all rows of a batch are busy to its end, as they
        are where the next request takes the place of one that is done.
        """
        plan = self._plan
        draft, rounds = None, float(plan.new_tokens)
        drafts_in_turn = 1
        if case.length:
            names = self.members[case.shape]
            drafts_in_turn = len(names)
            name = names[(number + plan.batches.index(case.batch)) % len(names)]
            draft = self._drafts[name]
            rounds = self._rounds_per_text[name][plan.lengths.index(case.length)]
        # Over the turns every draft sees other prompts.
        starts = range(0, len(self._prompts), case.batch)
        first = starts[(5 * number + number // drafts_in_turn) % len(starts)]
        rows = range(first, first + case.batch)
        state = self._start(
            draft, case.length, rows, plan.temperatures[0], [number, case.batch], False
        )
        decoder, params = self._make(draft, case.length), self._params(draft)
        wanted = np.int32(num_rounds or max(2, round(rounds)))
        taken, state = timing.seconds_of(lambda: decoder.run(params, state, wanted))
        done = int(np.max(np.asarray(state.stats.num_rounds)))
        tokens = np.asarray(state.lengths) - plan.prompt_length
        return {
            "draft": None if draft is None else draft.name,
            "seconds": taken / done,  # of a round
            "rounds": done,
            "tokens": tokens.tolist(),
            "prompts": list(rows),
        }

    def _start(
        self,
        draft: circle_times.Model | None,
        length: int,
        rows: Sequence[int],
        temperature: float,
        key: Sequence[int],
        to_its_end: bool,
    ) -> jaxsd.DecodeState:
        """The state from which the loop starts, ready on the device."""
        plan = self._plan
        limit = plan.new_tokens if to_its_end else None
        reader = self._make(draft, circle_times.reading_length(plan, length))
        prompts, params = self._prompts[rows], self._params(draft)
        state = _start(plan, reader, params, prompts, temperature, key, limit)
        return jax.block_until_ready(circle_times.for_length(state, length))

    def _params(self, draft: circle_times.Model | None) -> dict[str, Any]:
        return {"target": self._whole.params, "draft": None if draft is None else draft.params}


def summarise_turns(
    plan: Plan, bench: Bench, turns: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Speeds of drafts by name, and the calibration that was timed in the same turns, if it was.

    Tokens of a round are pooled over batches, seconds over the drafts of a shape. What a whole turn
    was slower by is taken out of all its times.
    """
    seconds = timing.without_pace(
        np.array(
            [[*turn["calibration"], *(run["seconds"] for run in turn["runs"])] for turn in turns]
        )
    )
    num_programs = len(turns[0]["calibration"])
    by_case: dict[Case, list[np.ndarray]] = {}
    for case, column in zip(bench.cases, seconds[:, num_programs:].T, strict=True):
        by_case.setdefault(case, []).append(column)
    known = {case: _seconds(np.stack(columns, 1)) for case, columns in by_case.items()}
    runs: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for turn in turns:
        for case, run in zip(bench.cases, turn["runs"], strict=True):
            if case.length:
                runs.setdefault((run["draft"], case.length), []).append(run)
    tokens = {which: _tokens(some) for which, some in runs.items()}
    speeds: dict[str, Any] = {}
    for shape, names in bench.members.items():
        for name in names:
            speeds[name] = {}
            for batch in plan.batches:
                plain = known[Case(PLAIN, batch, 0)]
                speeds[name][str(batch)] = {
                    "plain_round_seconds": plain.value,
                    "plain_tokens_per_second": batch / plain.value,
                    "by_length": [
                        _speed(batch, k, tokens[name, k], known[Case(shape, batch, k)], plain)
                        for k in plan.lengths
                    ],
                }
    if not num_programs:
        return speeds, None
    return speeds, circle_times.describe(bench.programs, seconds[:, :num_programs])


def in_groups(plan: Plan, rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Drafts whose programs one process can hold at a time, those of a shape together.

    All of them, and the calibration's, wherever that is possible. On a CPU every compiled loop is
    hundreds of pieces of memory, and Linux limits the pieces that a process may map.
    """
    by_shape: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in rows:
        by_shape.setdefault((row["d_model"], row["n_layers"]), []).append(row)
    of_plain, of_shape = len(plan.batches), len(plan.batches) * len(plan.lengths)
    of_calibration = of_plain + of_shape + 2 * len(plan.batches) * len(plan.fitted_lengths)
    capacity = loop_capacity()
    if of_calibration + of_plain + len(by_shape) * of_shape <= capacity:
        return [list(rows)]
    size = max(1, int((capacity - of_plain) // of_shape))
    shapes = list(by_shape.values())
    return [
        list(itertools.chain.from_iterable(shapes[first : first + size]))
        for first in range(0, len(shapes), size)
    ]


def loop_capacity() -> float:
    """How many compiled loops a process can hold; without a known limit infinitely many."""
    if jax.default_backend() != "cpu" or not _MAP_LIMIT.is_file():
        return math.inf
    return 0.9 * int(_MAP_LIMIT.read_text(encoding="utf-8")) / _MAPS_PER_LOOP


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
        # As the loop is timed: no round is cut short by the end of a text.
        found["tokens"][name] = [
            1 + float(shares_of_rounds(kept, length)[0].sum()) for length in plan.lengths
        ]
        found["autocorrelation"][name] = [autocorrelation(kept, lag) for lag in (1, 2, 4)]
    return found


class Counted(NamedTuple):
    """What was counted or timed, and how well it is known."""

    value: float
    relative_error: float  # its standard error
    num: int


def _tokens(runs: Sequence[Mapping[str, Any]]) -> Counted:
    """Tokens of a round, over all runs of a length and a draft, whatever their batch.

    Rows do not know of each other, so that one alone and one of eight count alike. Texts after the
    same prompt are no independent evidence: the error is that between prompts.
    """
    tokens: dict[int, float] = {}
    rounds: dict[int, int] = {}
    for run in runs:
        for prompt, count in zip(run["prompts"], run["tokens"], strict=True):
            tokens[prompt] = tokens.get(prompt, 0.0) + count
            rounds[prompt] = rounds.get(prompt, 0) + run["rounds"]
    means = np.array([tokens[prompt] / rounds[prompt] for prompt in tokens])
    mean = sum(tokens.values()) / sum(rounds.values())
    error = float(np.std(means, ddof=1)) / mean / math.sqrt(len(means)) if len(means) > 1 else 0.0
    return Counted(mean, error, sum(rounds.values()))


def _seconds(seconds: np.ndarray) -> Counted:
    """Median of `[turns, runs]`: what disturbs a machine only ever adds, and not to every turn."""
    every = seconds.ravel()
    return Counted(float(np.median(every)), timing.median_error(every), len(every))


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
        "readings": seconds.num,
    }


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
