"""How long do passes and rounds take on this device, and of shapes that were not timed?

Three things are timed, all before any draft is trained: passes of the target over every number of
tokens that a round may verify; passes of drafts with random weights, of a few shapes; and rounds of
two draft lengths with the smallest and the largest of them. From these follow the rounds of every
shape, length and batch: the target's passes from a table over tokens, which knows the tiles of the
kernels; the draft's from the formula of bytes and layers, fitted for each batch; what rounds take
beyond from a sum of three terms.
"""

import concurrent.futures
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxsd
from jaxsd import costmodel, models
from jaxsd.models import checkpoint

from . import timing
from .circle_plan import Plan, config_of, shape_name
from .circle_study import Study
from .compile_check import shape_of

FORMATS = costmodel.Formats(4.0, 4.0, 4.0)
TARGET = "target"
# A timed call makes passes for so long. Decoding makes hundreds of passes of the same weights one
# after the other; the first few after other programs are slower. In calls of 0.02, 0.1 and 0.3 s a
# pass of the 18M target took 3.6, 2.0 and 2.0 ms, and a plain round of it 2.2.
_WINDOW_SECONDS = 0.2
COMPILERS = 2  # programs that are compiled at a time
# What the formula has to find out of passes of one batch. A byte costs what it costs there,
# arithmetic included: of one batch the two move together.
FREE_FIELDS = ("memory_efficiency", "layer_seconds", "fixed_seconds")
_NO_OVERHEADS = costmodel.Stack(0.8, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0)


class Model(NamedTuple):
    """What is timed."""

    config: models.Config
    params: Any
    model: Any  # the jaxsd.LanguageModel
    name: str = ""


class Calibration(NamedTuple):
    """Everything that a prediction needs to know of the device."""

    target: costmodel.TokenTimes
    stacks: dict[int, costmodel.Stack]  # of drafts, by batch
    target_stacks: dict[int, costmodel.Stack]  # the same for the target, for searches by gradient
    chip: costmodel.Chip
    beyond: dict[int, "Beyond"]  # what rounds take beside their passes, by batch
    relative_error: float  # of a predicted speed-up, by its times: a standard deviation of ln
    context: float


class Beyond(NamedTuple):
    """Seconds of a round beside its passes."""

    host: float  # of every round: sampling, deciding, committing
    switch: float  # of every round that drafts
    token: float  # of every drafted token of the batch's rows together
    parameter: float  # of every parameter of the draft: after a pass of the target its weights
    # are no longer where the processor is quick to find them, and have to be fetched once a round


def make_model(config: models.Config, params: Any, name: str = "") -> Model:
    """A model in float32, which is how the study computes."""
    return Model(config, params, models.language_model(config), name)


def random_draft(plan: Plan, vocab_size: int, shape: tuple[int, int]) -> Model:
    """A draft of a shape that nobody has trained."""
    config = config_of(plan, vocab_size, *shape)
    params = models.init_params(config, jax.random.key(plan.seed))
    return make_model(config, params, shape_name(*shape))


def calibrate(plan: Plan, study: Study, target: checkpoint.Pretrained) -> dict[str, Any]:
    """Times passes and rounds on the default device; JSON values."""
    whole = make_model(target.config, target.params, TARGET)
    drafts = [
        random_draft(plan, target.config.vocab_size, shape) for shape in plan.calibration_shapes
    ]
    points = _points(plan, whole, drafts)
    window = 0.02 if plan.budget == "smoke" else _WINDOW_SECONDS
    timers = []
    for number, (model, batch, rows, context) in enumerate(points):
        if number % 20 == 0:
            study.say(f"  compiling pass {number + 1} of {len(points)}")
        loop = timing.make_pass_loop(model.model)
        timers.append(
            timing.make_pass_timer(model.model, loop, model.params, batch, rows, context, window)
        )
    drafts.sort(key=lambda draft: models.num_parameters(draft.config))
    rounds = [(batch, 0, drafts[0]) for batch in plan.batches]
    rounds += itertools.product(plan.batches, plan.fitted_lengths, (drafts[0], drafts[-1]))
    study.say(f"  compiling {len(rounds)} loops")
    # Nothing is timed yet, and a compiler keeps about one core busy.
    with concurrent.futures.ThreadPoolExecutor(COMPILERS) as threads:
        timers += threads.map(
            lambda case: _round_timer(plan, whole, case[2], case[0], case[1]), rounds
        )
    study.say(f"  timing {len(timers)} programs in {plan.repeats} turns")
    seconds = timing.in_turns(timers, plan.repeats)
    typical = timing.typical(seconds)
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
        for index, (model, batch, rows, context) in enumerate(points)
    ]
    return {
        "passes": passes,
        "rounds": [
            {"batch": batch, "length": length, "draft": draft.name, "seconds": float(value)}
            for (batch, length, draft), value in zip(rounds, typical[len(points) :], strict=True)
        ],
        "bytes_per_second": timing.memory_speed(2**24 if plan.budget == "smoke" else 2**28),
        "flops_per_second": timing.product_speed(256 if plan.budget == "smoke" else 2048),
    }


def fit_times(plan: Plan, timed: Mapping[str, Any]) -> Calibration:
    """The tables, stacks and lines that timed passes and rounds follow best.

    Raises:
      ValueError: the passes do not determine them.
    """
    passes = timed["passes"]
    chip = costmodel.Chip(timed["flops_per_second"], 0.0, 0.0, timed["bytes_per_second"], 1e15, 1.0)
    of_target = [one for one in passes if one["model"] == TARGET]
    of_drafts = [one for one in passes if one["model"] != TARGET]
    table = costmodel.fit_token_times([_timed_pass(one) for one in of_target])
    stacks, target_stacks = {}, {}
    for batch in plan.batches:
        mine = [one for one in of_drafts if one["batch"] == batch]
        stacks[batch] = fit_stack(mine, chip)
        verified = [one for one in of_target if one["batch"] == batch]
        target_stacks[batch] = fit_target_stack(verified, chip)
    bare = Calibration(table, stacks, target_stacks, chip, {}, 0.0, plan.context)
    rows = {batch: _rounds(timed, bare, batch) for batch in plan.batches}
    return bare._replace(
        beyond={batch: fit_beyond(rows[batch]) for batch in plan.batches},
        relative_error=_speedup_error(rows),
    )


def fit_stack(passes: Sequence[dict[str, Any]], chip: costmodel.Chip) -> costmodel.Stack:
    """What the software makes of the device in passes of drafts, of one batch."""
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
    one, two = (draft_seconds(calibration, shape, batch, rows) for rows in (1, 2))
    beyond = calibration.beyond.get(batch, Beyond(0.0, 0.0, 0.0, 0.0))
    # After a round that accepted all, the draft has two tokens to read; a loop of fixed shapes
    # always reads two.
    switch = beyond.switch + beyond.parameter * float(costmodel.parameters_total(shape))
    return costmodel.TokenRoundTimes(
        calibration.target,
        costmodel.TokenTimes(np.array([float(batch)]), np.array([one])),
        calibration.context,
        host_seconds=beyond.host,
        switch_seconds=switch + max(two - one, 0.0),
        token_seconds=beyond.token * batch,
    )


def draft_seconds(calibration: Calibration, shape: costmodel.Shape, batch: int, rows: int) -> float:
    """A pass of a draft of a shape over `rows` tokens of each of `batch` sequences."""
    return float(
        costmodel.pass_seconds(
            shape,
            calibration.chip,
            batch,
            rows,
            calibration.context,
            formats=FORMATS,
            stack=calibration.stacks[batch],
        )
    )


def table_seconds(table: costmodel.TokenTimes, batch: int, rows: int, context: float) -> float:
    """A pass of the table's model."""
    return float(table.pass_seconds(jnp.float32(batch), jnp.float32(rows), jnp.float32(context)))


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
    inner = {one["model"] for one in of_drafts}
    for name, batch in itertools.product(sorted(inner), plan.batches):
        rest = [one for one in of_drafts if one["model"] != name and one["batch"] == batch]
        stack = fit_stack(rest, chip)
        for one in of_drafts:
            if one["model"] == name and one["batch"] == batch:
                where = one["batch"], one["rows"], one["context"]
                shape = costmodel.Shape(**one["shape"])
                seconds = costmodel.pass_seconds(shape, chip, *where, formats=FORMATS, stack=stack)
                found["draft"].append(float(seconds) / one["seconds"] - 1)
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
    middle = plan.calibration_contexts[len(plan.calibration_contexts) // 2]
    points = [
        (target, batch, length + 1, context)
        for context in plan.calibration_contexts
        for batch in plan.batches
        for length in lengths
    ]
    points += [
        (draft, batch, rows, middle)
        for draft in drafts
        for batch in plan.batches
        for rows in (1, 2)
    ]
    return points


def _timed_pass(one: dict[str, Any]) -> costmodel.TimedPass:
    """A point as the cost model takes it."""
    shape = costmodel.Shape(**one["shape"])
    where = (one[name] for name in ("seconds", "batch", "rows", "context"))
    return costmodel.TimedPass(shape, *where, formats=FORMATS)


def _round_timer(plan: Plan, target: Model, draft: Model, batch: int, length: int) -> timing.Timer:
    """Seconds of a round in the decoder's own loop; compiled by a first call."""
    decoder = make_decoder(plan, target, draft, length)
    params = {"target": target.params, "draft": draft.params}
    # About as many as the study's texts will take: the call itself is a part of what is timed.
    num_rounds = max(2, plan.new_tokens // 2 if length else plan.new_tokens)
    calls = itertools.count()
    vocab_size = target.config.vocab_size

    def start() -> jaxsd.DecodeState:
        call = next(calls)
        prompts = np.random.default_rng([plan.seed, call]).integers(
            0, vocab_size, (batch, plan.prompt_length)
        )
        return jax.block_until_ready(
            decoder.start(
                params,
                prompts.astype(np.int32),
                np.full(batch, plan.prompt_length, np.int32),
                jax.random.key(call),
                sampling=jaxsd.Sampling(plan.temperatures[0]),
                max_new_tokens=plan.max_len - plan.prompt_length,
            )
        )

    def seconds() -> float:
        state = start()
        taken, state = timing.seconds_of(lambda: decoder.run(params, state, np.int32(num_rounds)))
        return taken / int(np.max(np.asarray(state.stats.num_rounds)))

    seconds()
    return seconds


def make_decoder(plan: Plan, target: Model, draft: Model, length: int) -> jaxsd.Decoder:
    """Plain decoding for length 0; it does not stop at an end of text."""
    drafter = jaxsd.model_drafter(draft.model, length) if length else jaxsd.no_drafter()
    return jaxsd.speculative(target.model, drafter, jaxsd.rejection_sampling, max_len=plan.max_len)


class TimedRound(NamedTuple):
    """A timed round, and what its passes alone would take."""

    batch: int
    length: int
    parameters: float  # of its draft
    seconds: float
    pass_seconds: float


def fit_beyond(rows: Sequence[TimedRound]) -> Beyond:
    """What rounds of one batch take beyond their passes.

    Plain rounds give the host's share. The rest is the least squares, no term below 0, of

        seconds - pass_seconds - host = switch + token * batch * length + parameter * parameters

    >>> rows = [TimedRound(1, k, n, 5.0 + k, 4.0) for k, n in ((0, 1e6), (2, 1e6), (6, 1e6))]
    >>> print([round(part, 9) for part in fit_beyond(rows)])
    [1.0, 0.0, 1.0, 0.0]
    """
    host = max(
        float(np.mean([row.seconds - row.pass_seconds for row in rows if not row.length])), 0
    )
    drafting = [row for row in rows if row.length]
    more = np.array([row.seconds - row.pass_seconds - host for row in drafting])
    columns = {
        "switch": np.ones(len(drafting)),
        "token": np.array([float(row.batch * row.length) for row in drafting]),
        "parameter": np.array([row.parameters for row in drafting]),
    }
    if len(np.unique(columns["parameter"])) < 2:
        del columns["parameter"]
    while columns:
        matrix = np.stack(list(columns.values()), 1)
        scale = np.linalg.norm(matrix, axis=0)
        found = np.linalg.lstsq(matrix / scale, more, rcond=None)[0] / scale
        found = np.where(np.abs(found) * scale < 1e-12 * np.abs(more).max(), 0.0, found)
        if (found >= 0).all():
            fitted = dict(zip(columns, found.tolist(), strict=True))
            return Beyond(host, *(fitted.get(name, 0.0) for name in Beyond._fields[1:]))
        del columns[list(columns)[int(np.argmin(found * scale))]]
    return Beyond(host, 0.0, 0.0, 0.0)


def _rounds(timed: Mapping[str, Any], bare: Calibration, batch: int) -> list[TimedRound]:
    """The timed rounds of a batch, with their passes as the calibration has them."""
    shapes = {one["model"]: costmodel.Shape(**one["shape"]) for one in timed["passes"]}
    rows = []
    for one in timed["rounds"]:
        if one["batch"] == batch:
            shape = shapes[one["draft"]]
            passes = costmodel.round_seconds(round_times(bare, shape, batch), batch, one["length"])
            size = float(costmodel.parameters_total(shape))
            rows.append(TimedRound(batch, one["length"], size, one["seconds"], float(passes)))
    return rows


def _speedup_error(rows: dict[int, list[TimedRound]]) -> float:
    """How far the ratio of a drafting round to a plain one is off, each predicted without itself.

    Of rounds, few are timed; every drafting one in turn is left out of the fit of its batch.
    """
    errors = []
    for ones in rows.values():
        for index, left in enumerate(ones):
            if left.length:
                beyond = fit_beyond([*ones[:index], *ones[index + 1 :]])
                predicted = left.pass_seconds + beyond.host + beyond.switch
                predicted += beyond.token * left.batch * left.length
                predicted += beyond.parameter * left.parameters
                errors.append(np.log(predicted / left.seconds))
    return float(np.sqrt(np.mean(np.square(errors))))
