"""How long do passes and rounds take on this device, and of shapes that were not timed?

Timed with random weights: passes of drafts of a few shapes over one and two tokens of every
sequence, passes of the target, and rounds in the decoder's own loop, of every length with the
smallest of the drafts and of a few lengths with larger ones. A round's time

    V(batch, K) + K d(batch, 1) + (d(batch, 2) - d(batch, 1)) + c(batch) N

is that of the target's side of it, V: verifying, sampling, deciding, committing, a table of what
was timed; of the draft's passes, d, by the formula of bytes and layers fitted for each batch and
number of tokens (after a round that accepted all, the draft has two tokens to read, and a loop of
fixed shapes always reads two); and for each of the draft's N parameters a time to fetch it anew
after a pass of the target.
"""

import concurrent.futures
import itertools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

import jaxsd
from jaxsd import costmodel, models
from jaxsd.models import checkpoint

from . import timing
from .circle_plan import Plan, config_of, shape_name
from .circle_study import Study
from .compile_check import shape_of

FORMATS = costmodel.Formats(4.0, 4.0, 4.0)
TARGET = "target"
COMPILERS = 2  # programs that are compiled at a time
# What the formula has to find out of passes of so many tokens. A byte costs what it costs there,
# arithmetic included: the two move together.
DRAFT_ROWS = (1, 2)  # tokens of each row that a draft reads in a pass: of most, of the first
FREE_FIELDS = ("memory_efficiency", "layer_seconds", "fixed_seconds")
_NO_OVERHEADS = costmodel.Stack(0.8, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
# Outside a jit each of these is some hundred small computations, and a report asks thousands.
_FORMULA = jax.jit(costmodel.pass_seconds)
_TABLE = jax.jit(costmodel.TokenTimes.pass_seconds)
_ROUND = jax.jit(costmodel.round_seconds)


class Model(NamedTuple):
    """What is timed."""

    config: models.Config
    params: Any
    model: Any  # the jaxsd.LanguageModel
    name: str = ""


class Error(NamedTuple):
    """How far something is off that was predicted or measured."""

    value: float  # a standard deviation, of its natural logarithm
    degrees: int  # of freedom: how well that is known


class Calibration(NamedTuple):
    """Everything that a prediction needs to know of the device."""

    target: costmodel.TokenTimes  # passes of the target alone
    rounds: dict[int, "BatchTimes"]  # by batch
    stacks: dict[tuple[int, int], costmodel.Stack]  # of drafts, by batch and tokens of each row
    target_stacks: dict[int, costmodel.Stack]  # of the target by batch, for searches by gradient
    chip: costmodel.Chip
    error: Error  # of a predicted round with a draft of whose shape nothing was timed
    context: float


class BatchTimes(NamedTuple):
    """Rounds of one batch, less what the draft takes of them."""

    target_side: costmodel.TokenTimes  # by tokens that are verified, all sequences together
    parameter: float  # seconds of every parameter of the draft in a round that drafts
    replaced: tuple[int, ...] = ()  # draft lengths of which noise left no time, the plain round's


def make_model(config: models.Config, params: Any, name: str = "") -> Model:
    """A model in float32, which is how the study computes."""
    return Model(config, params, models.language_model(config), name)


def random_draft(plan: Plan, vocab_size: int, shape: tuple[int, int]) -> Model:
    """A draft of a shape that nobody has trained."""
    config = config_of(plan, vocab_size, *shape)
    params = models.init_params(config, jax.random.key(plan.seed))
    return make_model(config, params, shape_name(*shape))


class Programs(NamedTuple):
    """What is timed to know the device: passes, and rounds in the decoder's own loop."""

    points: list[tuple[Model, int, int, int]]  # model, batch, rows and context of every pass
    rounds: list[tuple[int, int, Model]]  # batch, length and draft of every round


def list_programs(plan: Plan, target: Model) -> Programs:
    """Passes of the target and of drafts with random weights, and rounds of three of those."""
    drafts = [
        random_draft(plan, target.config.vocab_size, shape) for shape in plan.calibration_shapes
    ]
    points = _points(plan, target, drafts)
    drafts.sort(key=lambda draft: models.num_parameters(draft.config))
    smallest, middle, largest = drafts[0], drafts[len(drafts) // 2], drafts[-1]
    rounds = list(itertools.product(plan.batches, (0, *plan.lengths), (smallest,)))
    rounds += itertools.product(plan.batches, plan.fitted_lengths, (middle, largest))
    return Programs(points, rounds)


def compile_programs(
    plan: Plan,
    study: Study,
    target: Model,
    programs: Programs,
    make: Callable[[Model | None, int], jaxsd.Decoder],
) -> list[timing.Timer]:
    """A timer of every pass, then of every round.

    Args:
      plan: of the study.
      study: for its lines of progress.
      target: the target.
      programs: from `list_programs`.
      make: from `decoder_maker`.
    """
    window = 0.02 if plan.budget == "smoke" else timing.WINDOW_SECONDS
    timers = []
    for number, (model, batch, rows, context) in enumerate(programs.points):
        if number % 20 == 0:
            study.say(f"  compiling pass {number + 1} of {len(programs.points)}")
        loop = timing.make_pass_loop(model.model)
        timers.append(
            timing.make_pass_timer(model.model, loop, model.params, batch, rows, context, window)
        )
    study.say(f"  compiling {len(programs.rounds)} loops")
    # Nothing is timed yet, and a compiler keeps about one core busy.
    with concurrent.futures.ThreadPoolExecutor(COMPILERS) as threads:
        timers += threads.map(
            lambda case: _round_timer(plan, target, case[2], case[0], case[1], make),
            programs.rounds,
        )
    return timers


def calibrate(plan: Plan, study: Study, target: checkpoint.Pretrained) -> dict[str, Any]:
    """Times passes and rounds on the default device; JSON values."""
    whole = make_model(target.config, target.params, TARGET)
    programs = list_programs(plan, whole)
    timers = compile_programs(plan, study, whole, programs, decoder_maker(plan, whole))
    study.say(f"  timing {len(timers)} programs in {plan.repeats} turns")
    seconds = timing.without_pace(timing.in_turns(timers, plan.repeats))
    return {
        **describe(programs, seconds),
        "bytes_per_second": timing.memory_speed(2**24 if plan.budget == "smoke" else 2**28),
        "flops_per_second": timing.product_speed(256 if plan.budget == "smoke" else 2048),
    }


def describe(programs: Programs, seconds: np.ndarray) -> dict[str, Any]:
    """Medians of what was timed, `[turns, programs]` seconds, as JSON values."""
    typical = np.median(seconds, axis=0)
    passes = [
        {
            "model": model.name,
            "shape": jax.tree.map(float, shape_of(model.config))._asdict(),
            "batch": batch,
            "rows": rows,
            "context": context,
            "seconds": float(typical[index]),
            "lowest": float(seconds[:, index].min()),
            "highest": float(seconds[:, index].max()),
        }
        for index, (model, batch, rows, context) in enumerate(programs.points)
    ]
    rounds = [
        {
            "batch": batch,
            "length": length,
            "draft": draft.name,
            "seconds": float(typical[index]),
            "relative_error": timing.median_error(seconds[:, index]),
        }
        for index, (batch, length, draft) in enumerate(programs.rounds, len(passes))
    ]
    return {"passes": passes, "rounds": rounds}


def fit_times(plan: Plan, timed: Mapping[str, Any]) -> Calibration:
    """The tables and stacks that timed passes and rounds follow best.

    Raises:
      ValueError: the passes do not determine them.
    """
    passes = timed["passes"]
    chip = costmodel.Chip(timed["flops_per_second"], 0.0, 0.0, timed["bytes_per_second"], 1e15, 1.0)
    of_target = [one for one in passes if one["model"] == TARGET]
    verified = {
        batch: [one for one in of_target if one["batch"] == batch] for batch in plan.batches
    }
    return Calibration(
        target=costmodel.fit_token_times([_timed_pass(one) for one in of_target]),
        rounds={batch: fit_rounds(timed, batch) for batch in plan.batches},
        stacks=fit_stacks(plan, timed, chip),
        target_stacks={batch: fit_target_stack(ones, chip) for batch, ones in verified.items()},
        chip=chip,
        error=round_error(plan, timed, chip),
        context=plan.context,
    )


def fit_stacks(
    plan: Plan, timed: Mapping[str, Any], chip: costmodel.Chip, without: str = ""
) -> dict[tuple[int, int], costmodel.Stack]:
    """What the software makes of the device in passes of drafts, by batch and tokens of each row.

    Args:
      plan: of the study.
      timed: from `calibrate`.
      chip: the device.
      without: name of a draft whose passes are left out.
    """
    drafts = [one for one in timed["passes"] if one["model"] not in (TARGET, without)]
    return {
        (batch, rows): fit_stack(
            [one for one in drafts if (one["batch"], one["rows"]) == (batch, rows)], chip
        )
        for batch, rows in itertools.product(plan.batches, DRAFT_ROWS)
    }


def fit_stack(passes: Sequence[dict[str, Any]], chip: costmodel.Chip) -> costmodel.Stack:
    """What the software makes of the device in passes of drafts over so many tokens."""
    timed = [_timed_pass(one) for one in passes]
    for free in (FREE_FIELDS, FREE_FIELDS[1:], FREE_FIELDS[1:2]):
        try:
            return costmodel.fit_pass_times(timed, chip, free, _NO_OVERHEADS).result
        except ValueError as error:
            problem = error
    raise ValueError(f"passes of the drafts do not determine their times: {problem}")


def fit_target_stack(passes: Sequence[dict[str, Any]], chip: costmodel.Chip) -> costmodel.Stack:
    """The same of the target: a share of the memory's speed, and a share of the arithmetic's."""
    timed = [_timed_pass(one) for one in passes]
    free = ("memory_efficiency", "compute_efficiency")
    for names in (free, free[:1], free[1:]):
        try:
            return costmodel.fit_pass_times(timed, chip, names, _NO_OVERHEADS).result
        except ValueError as error:
            problem = error
    raise ValueError(f"passes of the target do not determine its times: {problem}")


def round_times(
    calibration: Calibration, shape: costmodel.Shape, batch: int
) -> costmodel.TokenRoundTimes:
    """The times of rounds with a draft of a shape, for `costmodel.round_seconds`."""
    one, two = (draft_seconds(calibration, shape, batch, rows) for rows in DRAFT_ROWS)
    known = calibration.rounds[batch]
    size = float(costmodel.parameters_total(shape))
    return costmodel.TokenRoundTimes(
        known.target_side,
        costmodel.TokenTimes(np.array([float(batch)]), np.array([one])),
        calibration.context,
        switch_seconds=max(two - one, 0.0) + known.parameter * size,
    )


def draft_seconds(calibration: Calibration, shape: costmodel.Shape, batch: int, rows: int) -> float:
    """A pass of a draft of a shape over `rows` tokens of each of `batch` sequences."""
    stack = calibration.stacks[batch, rows]
    return _formula(shape, calibration.chip, stack, batch, rows, calibration.context)


def table_seconds(table: costmodel.TokenTimes, batch: int, rows: int, context: float) -> float:
    """A pass of the table's model."""
    return float(_TABLE(*_float32((table, batch, rows, context))))


def round_seconds(times: costmodel.TokenRoundTimes, batch: int, lengths: ArrayLike) -> np.ndarray:
    """Rounds of a batch by draft length."""
    return np.asarray(_ROUND(*_float32((times, np.full(np.shape(lengths), batch), lengths))))


def held_out_errors(plan: Plan, timed: Mapping[str, Any]) -> dict[str, Any]:
    """Relative errors of passes predicted without them: the target's points, the drafts' shapes."""
    chip = fit_times(plan, timed).chip
    of_target = [one for one in timed["passes"] if one["model"] == TARGET]
    of_drafts = [one for one in timed["passes"] if one["model"] != TARGET]
    found: dict[str, Any] = {"target": [], "draft": []}
    for index, one in enumerate(of_target):
        rest = [_timed_pass(other) for place, other in enumerate(of_target) if place != index]
        tokens = one["batch"] * one["rows"]
        known = [other.batch * other.rows for other in rest]
        if not min(known) <= tokens <= max(known):
            continue
        table = costmodel.fit_token_times(rest)
        seconds = table_seconds(table, one["batch"], one["rows"], one["context"])
        found["target"].append(seconds / one["seconds"] - 1)
    for name in sorted({one["model"] for one in of_drafts}):
        stacks = fit_stacks(plan, timed, chip, without=name)
        for one in of_drafts:
            if one["model"] == name:
                where = one["batch"], one["rows"]
                shape = costmodel.Shape(**one["shape"])
                seconds = _formula(shape, chip, stacks[where], *where, one["context"])
                found["draft"].append(seconds / one["seconds"] - 1)
    return {
        kind: {
            "median_error": float(np.median(np.abs(errors))),
            "worst_error": float(np.max(np.abs(errors))),
            "num_passes": len(errors),
        }
        for kind, errors in found.items()
    }


def _points(
    plan: Plan, target: Model, drafts: Sequence[Model]
) -> list[tuple[Model, int, int, int]]:
    """Model, batch, rows and context of every timed pass."""
    lengths = (0, *plan.lengths)
    points = [
        (target, batch, length + 1, context)
        for context in plan.calibration_contexts
        for batch in plan.batches
        for length in lengths
    ]
    points += [
        (draft, batch, rows, round(plan.context))
        for draft in drafts
        for batch in plan.batches
        for rows in DRAFT_ROWS
    ]
    return points


def _formula(
    shape: costmodel.Shape,
    chip: costmodel.Chip,
    stack: costmodel.Stack,
    batch: int,
    rows: int,
    context: float,
) -> float:
    """Seconds of a pass of a shape."""
    where = _float32((shape, chip, batch, rows, context))
    return float(_FORMULA(*where, formats=_float32(FORMATS), stack=_float32(stack)))


def _float32(tree: Any) -> Any:
    """Numbers of one type: another would compile anew."""
    return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


def _timed_pass(one: dict[str, Any]) -> costmodel.TimedPass:
    """A point as the cost model takes it."""
    shape = costmodel.Shape(**one["shape"])
    where = (one[name] for name in ("seconds", "batch", "rows", "context"))
    return costmodel.TimedPass(shape, *where, formats=FORMATS)


def _round_timer(
    plan: Plan,
    target: Model,
    draft: Model,
    batch: int,
    length: int,
    make: Callable[[Model | None, int], jaxsd.Decoder],
) -> timing.Timer:
    """Seconds of a round in the decoder's own loop; compiled by a first call."""
    decoder = make(draft if length else None, length)
    reader = make(draft if length else None, reading_length(plan, length))
    params = {"target": target.params, "draft": draft.params if length else None}
    # About as many as the study's texts will take: the call itself is a part of what is timed.
    num_rounds = max(2, plan.new_tokens // 2 if length else plan.new_tokens)
    calls = itertools.count()
    vocab_size = target.config.vocab_size

    def start() -> jaxsd.DecodeState:
        call = next(calls)
        prompts = np.random.default_rng([plan.seed, call]).integers(
            0, vocab_size, (batch, plan.prompt_length)
        )
        state = reader.start(
            params,
            prompts.astype(np.int32),
            np.full(batch, plan.prompt_length, np.int32),
            jax.random.key(call),
            sampling=jaxsd.Sampling(plan.temperatures[0]),
            max_new_tokens=plan.max_len - plan.prompt_length,
        )
        return jax.block_until_ready(for_length(state, length))

    def seconds() -> float:
        state = start()
        taken, state = timing.seconds_of(lambda: decoder.run(params, state, np.int32(num_rounds)))
        return taken / int(np.max(np.asarray(state.stats.num_rounds)))

    seconds()
    return seconds


def reading_length(plan: Plan, length: int) -> int:
    """The draft length of the decoder that reads the prompts for one that drafts `length` tokens.

    What is read does not depend on it, but a program of one length is not that of another, and
    takes 0.4 of the time that the loop takes to compile: one of them serves all.
    """
    return max(plan.lengths) if length else 0


def for_length(state: jaxsd.DecodeState, length: int) -> jaxsd.DecodeState:
    """A state in which no round was decoded yet, for a decoder that drafts fewer tokens a round.

    What counts by position has fewer of them. The caches keep their room behind the last token.
    """
    counts = jax.tree.map(
        lambda count: count[:, :length] if count.ndim == 2 else count, state.stats
    )
    return state._replace(stats=counts)


def make_decoder(plan: Plan, target: Model, draft: Model | None, length: int) -> jaxsd.Decoder:
    """Plain decoding without a draft; it does not stop at an end of text."""
    drafter = jaxsd.no_drafter() if draft is None else jaxsd.model_drafter(draft.model, length)
    return jaxsd.speculative(target.model, drafter, jaxsd.rejection_sampling, max_len=plan.max_len)


def decoder_maker(plan: Plan, target: Model) -> Callable[[Model | None, int], jaxsd.Decoder]:
    """`make_decoder` that makes, and so compiles, only one for drafts of equal configuration."""
    made: dict[tuple[models.Config | None, int], jaxsd.Decoder] = {}
    lock = threading.Lock()  # programs are compiled in threads

    def make(draft: Model | None, length: int) -> jaxsd.Decoder:
        key = (draft and draft.config, length)
        with lock:
            if key not in made:
                made[key] = make_decoder(plan, target, draft, length)
            return made[key]

    return make


def fit_rounds(timed: Mapping[str, Any], batch: int, without: str = "") -> BatchTimes:
    """The target's side of rounds of a batch, and what a parameter of the draft costs.

    Rounds of every length were timed with one draft, the first named. What those with another take
    more, beyond what its passes take more, is what its parameters cost; never less than nothing.
    Passes and rounds are timed apart. Where the passes of the draft took as long as the rounds that
    they are a part of, which is noise, the plain round's time stands for what is left.

    Args:
      timed: from `calibrate`.
      batch: which.
      without: name of a draft whose rounds are left out.
    """
    rounds = [one for one in timed["rounds"] if one["batch"] == batch and one["draft"] != without]
    first = rounds[0]["draft"]
    shapes = {one["model"]: costmodel.Shape(**one["shape"]) for one in timed["passes"]}
    sizes = {name: float(costmodel.parameters_total(shape)) for name, shape in shapes.items()}
    left = {}  # of each round, without the passes of its draft
    for one in rounds:
        passes = _draft_passes(timed, one["draft"], batch, one["length"])
        left[one["length"], one["draft"]] = one["seconds"] - passes
    more = np.array(
        [
            [sizes[draft] - sizes[first], seconds - left[length, first]]
            for (length, draft), seconds in left.items()
            if draft != first
        ]
    ).reshape(-1, 2)
    squares = float(np.square(more[:, 0]).sum())
    parameter = max(float(np.prod(more, axis=1).sum()) / squares, 0.0) if squares else 0.0
    lengths = sorted(length for length, draft in left if draft == first)
    plain = left[0, first]
    seconds = [left[k, first] - (parameter * sizes[first] if k else 0.0) for k in lengths]
    replaced = tuple(k for k, value in zip(lengths, seconds, strict=True) if value <= 0)
    return BatchTimes(
        costmodel.TokenTimes(
            np.array([float(batch * (length + 1)) for length in lengths]),
            np.array([value if value > 0 else plain for value in seconds]),
        ),
        parameter,
        replaced,
    )


def round_error(plan: Plan, timed: Mapping[str, Any], chip: costmodel.Chip) -> Error:
    """How far rounds are off with a draft of whose shape nothing was timed.

    Root mean square of ln(predicted / timed), of the draft between the smallest and the largest,
    which is left out of all fits. That the timed rounds are known no better than their readings
    allow is no error of the prediction, and is taken out.
    """
    names = list(dict.fromkeys(one["draft"] for one in timed["rounds"]))
    if len(names) < 3:
        return Error(0.0, 1)
    shapes = {one["model"]: costmodel.Shape(**one["shape"]) for one in timed["passes"]}
    middle = min(names[1:], key=lambda name: float(costmodel.parameters_total(shapes[name])))
    known = Calibration(
        costmodel.TokenTimes(np.ones(1), np.ones(1)),
        {batch: fit_rounds(timed, batch, without=middle) for batch in plan.batches},
        fit_stacks(plan, timed, chip, without=middle),
        {},
        chip,
        Error(0.0, 1),
        plan.context,
    )
    squares = []
    for one in timed["rounds"]:
        if one["draft"] == middle:
            times = round_times(known, shapes[middle], one["batch"])
            seconds = round_seconds(times, one["batch"], one["length"])
            error = math.log(float(seconds) / one["seconds"])
            squares.append(error**2 - one["relative_error"] ** 2)
    return Error(math.sqrt(max(0.0, float(np.mean(squares)))), len(squares))


def _draft_passes(timed: Mapping[str, Any], draft: str, batch: int, length: int) -> float:
    """Seconds of the draft's passes in a round, as they were timed."""
    one, two = (
        next(
            float(each["seconds"])
            for each in timed["passes"]
            if (each["model"], each["batch"], each["rows"]) == (draft, batch, rows)
        )
        for rows in DRAFT_ROWS
    )
    return length * one + max(two - one, 0.0) if length else 0.0
