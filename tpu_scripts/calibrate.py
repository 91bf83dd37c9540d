"""Does the cost model, fitted to timed passes, predict times and the best draft length here?

    python tpu_scripts/calibrate.py --out tpu_scripts/results/calibrate_cpu.json
    python tpu_scripts/calibrate.py --passes tpu_scripts/results/bench_pass_cpu.json

Three questions, each answered by a prediction beside a measurement that it has not seen.

1. Pass times. A share of the grid of `bench_pass.py` (measured here, or read from `--passes`) is
held out. Two models are fitted to the rest: `costmodel.fit_pass_times`, the formula of bytes, FLOPs
and overheads, which knows other shapes too, and `costmodel.fit_token_times`, a table over the
number of tokens, which knows the tiles of the kernels.

2. Rounds. What a round takes beyond its passes (sampling, deciding, and finding the processor's
caches full of the other model) is a line in the number of drafted tokens, through rounds of two
lengths, timed in the decoder's own loop. All other lengths are predicted.

3. Speed-up. The target writes texts by itself. From what the draft thinks of them follows how many
rounds speculation takes for exactly these texts. With the predicted rounds that is a speed-up for
every draft length, and a length to choose. Then plain and speculative decoding of all lengths take
turns, and the two are compared.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import bench_pass
import jax
import numpy as np
import shared

import jaxsd
from jaxsd import costmodel
from jaxsd.cli import measure, timing
from jaxsd.models import checkpoint

# Of seconds `[repeats, n]`, by name.
STATISTICS = {"median": timing.typical, "lowest": lambda seconds: seconds.min(0)}


class Workload(NamedTuple):
    """What is decoded."""

    target: shared.LoadedModel
    draft: shared.LoadedModel
    prompts: list[measure.Request]
    new: int  # tokens of each
    max_len: int
    temperature: float
    seed: int

    @property
    def params(self) -> dict[str, Any]:
        """Weights by role."""
        return {"target": self.target.params, "draft": self.draft.params}

    @property
    def context(self) -> float:
        """Tokens in the cache, on average over a text."""
        return float(np.mean([one.length for one in self.prompts])) + self.new / 2


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, fits, predicts, measures again, and returns the document."""
    parser = shared.make_parser(__doc__, repeats=9, quick="few points, two lengths, short texts")
    shared.add_models(parser)
    bench_pass.add_grid(parser)
    parser.add_argument(
        "--passes", metavar="FILE", help="the grid as bench_pass.py wrote it, on this device"
    )
    parser.add_argument(
        "--lengths",
        type=shared.whole_numbers(1),
        default=[*range(1, 9)],
        help="draft lengths whose speed-up is predicted and measured (1 to 8)",
    )
    parser.add_argument(
        "--fitted-lengths",
        type=shared.whole_numbers(1),
        default=[2, 7],
        help="draft lengths whose rounds are timed for the fit (2 and 7)",
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="(%(default)s)")
    parser.add_argument("--num-prompts", type=shared.positive, default=8, help="(%(default)s)")
    parser.add_argument("--new-tokens", type=shared.positive, default=64, help="(%(default)s)")
    parser.add_argument(
        "--statistic",
        choices=STATISTICS,
        default="median",
        help="over turns; the lowest where others use the machine, which only ever adds to a time",
    )
    parser.add_argument("--held-out", type=float, default=0.25, help="share (%(default)s)")
    args = parser.parse_args(argv)
    if not 0 < args.held_out < 1:
        parser.error(f"--held-out {args.held_out} must be above 0 and below 1")
    if args.temperature < 0:
        parser.error(f"--temperature {args.temperature} must be at least 0")
    if len(args.fitted_lengths) < 2:
        parser.error("--fitted-lengths needs two lengths or more: a line goes through them")
    if args.quick:
        args.batches, args.rows, args.contexts, args.repeats = [1], [1, 2, 3], [16, 48], 2
        args.lengths, args.fitted_lengths = [1, 2], [1, 2]
        args.num_prompts, args.new_tokens = 2, 6
    target, draft = shared.load_pair(args)
    bandwidth, source = shared.peak_of(args.chip, args.quick)
    card = shared.show_card([target, draft], bandwidth, source)
    work = make_workload(target, draft, args)

    # One timing of everything that is fitted, in turns: passes of the grid and whole rounds.
    points = [] if args.passes else grid(args)
    timers = bench_pass.make_timers(points, target, draft, args.quick)
    lengths = sorted({0, *args.fitted_lengths})
    decoders = {count: make_decoder(work, count) for count in {0, *lengths, *args.lengths}}
    timers += [round_timer(work, decoders[count]) for count in lengths]
    seconds = timing.in_turns(timers, args.repeats, shared.progress)
    typical = STATISTICS[args.statistic](seconds)
    if args.passes:
        passes = read_passes(args.passes)
    else:
        passes = bench_pass.rows_of(points, seconds[:, : len(points)], typical)
    rounds = dict(zip(lengths, typical[len(points) :].tolist(), strict=True))

    held = predict_passes(passes, target, draft, args, bandwidth)
    tables = {
        role: costmodel.fit_token_times(bench_pass.timed_passes(passes, role, one))
        for role, one in (("target", target), ("draft", draft))
    }
    times = fit_rounds(tables, rounds, work.context)
    predicted = predict(work, decoders, times, args)
    measured = decode_in_turns(work, decoders, args)
    result = compare(predicted, measured, args.fitted_lengths)
    show_lengths(result)
    return shared.finish(
        "calibrate",
        argv,
        args.out,
        card=card,
        repeats=args.repeats,
        statistic=args.statistic,
        temperature=args.temperature,
        new_tokens=args.new_tokens,
        num_prompts=len(work.prompts),
        fitted_lengths=args.fitted_lengths,
        passes=passes,
        held_out=held,
        fitted_round_seconds=rounds,
        tables={role: jax.tree.map(listed, table._asdict()) for role, table in tables.items()},
        round_parts={name: float(getattr(times, name)) for name in times._fields[2:]},
        **result,
    )


def grid(args: Any) -> list[bench_pass.Point]:
    """Points of both models; the draft's passes are over one token, or two after full rounds."""
    points = bench_pass.grid("target", args.batches, args.rows, args.contexts, args.max_tokens)
    draft_rows = [1] if args.quick else [1, 2]
    return points + bench_pass.grid(
        "draft", args.batches, draft_rows, args.contexts, args.max_tokens
    )


def read_passes(path: str) -> list[dict[str, Any]]:
    """The points of a file of `bench_pass.py`.

    Raises:
      ValueError: it is none.
    """
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        return [dict(one) for one in content["points"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--passes {path} was not written by bench_pass.py: {error}") from None


def make_workload(target: shared.LoadedModel, draft: shared.LoadedModel, args: Any) -> Workload:
    """Prompts of 64 tokens, and room for the longest draft behind the last text."""
    length = 16 if args.quick else 64
    tokens = shared.text_prompts(target, args.num_prompts, length, args.seed)
    prompts = [measure.Request(row[None], length) for row in tokens]
    longest = max(*args.lengths, *args.fitted_lengths)
    max_len = length + args.new_tokens + longest + 1
    return Workload(target, draft, prompts, args.new_tokens, max_len, args.temperature, args.seed)


def make_decoder(work: Workload, num_tokens: int) -> jaxsd.Decoder:
    """Plain for 0; compiled here, by a run that nothing times."""
    shared.progress(f"compiling the decoder of {num_tokens} drafted tokens")
    decoder = shared.no_end(work.target, num_tokens, work.draft, work.max_len)
    jax.block_until_ready(decoder.run(work.params, start(work, decoder, 0, 0), jaxsd.UNTIL_DONE))
    return decoder


def start(work: Workload, decoder: jaxsd.Decoder, prompt: int, repeat: int) -> jaxsd.DecodeState:
    """A prompt, read; another key for every prompt and every repeat."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(work.seed), repeat), prompt)
    request = work.prompts[prompt]
    return request.start(decoder, work.params, key, work.temperature, work.new)


def round_timer(work: Workload, decoder: jaxsd.Decoder) -> timing.Timer:
    """Seconds of a round of one length; another prompt and key at every call."""
    calls = iter(range(10**9))

    def next_state() -> jaxsd.DecodeState:
        call = next(calls)
        return start(work, decoder, call % len(work.prompts), 1000 + call)

    return timing.make_round_timer(decoder, work.params, next_state)


def fit_rounds(
    tables: dict[str, costmodel.TokenTimes], rounds: dict[int, float], context: float
) -> costmodel.TokenRoundTimes:
    """What rounds take beyond their passes: a time of plain ones, and a line in what is drafted."""
    bare = costmodel.TokenRoundTimes(tables["target"], tables["draft"], context)
    lengths = np.array([count for count in rounds if count])
    host = rounds[0] - float(costmodel.round_seconds(bare, 1, 0))
    beyond = [
        rounds[count] - float(costmodel.round_seconds(bare, 1, count)) - host for count in lengths
    ]
    slope, switch = np.polyfit(lengths, beyond, 1)
    if slope < 0:  # noise, where sampling costs next to nothing
        slope, switch = 0.0, float(np.mean(beyond))
    return bare._replace(
        host_seconds=max(host, 0.0), switch_seconds=max(switch, 0.0), token_seconds=float(slope)
    )


def predict_passes(
    passes: list[dict[str, Any]],
    target: shared.LoadedModel,
    draft: shared.LoadedModel,
    args: Any,
    bandwidth: float,
) -> dict[str, Any]:
    """Both models of the time of a pass, fitted without the points held out; errors on these."""
    out = choose_held_out(passes, args.held_out, args.seed)
    kept = [one for one, is_out in zip(passes, out, strict=True) if not is_out]
    hidden = [one for one, is_out in zip(passes, out, strict=True) if is_out]
    stack, chip = fit_formula(kept, target, draft, args, bandwidth)
    rows = []
    for one in hidden:
        role = one["role"]
        loaded = {"target": target, "draft": draft}[role]
        table = costmodel.fit_token_times(bench_pass.timed_passes(kept, role, loaded))
        where = one["batch"], one["rows"], one["context"]
        by_formula = None
        if stack is not None:
            by_formula = float(
                costmodel.pass_seconds(
                    shared.shape_of(loaded.config),
                    chip,
                    *where,
                    formats=loaded.formats,
                    stack=stack,
                )
            )
        by_table = float(table.pass_seconds(*map(np.float32, where)))
        rows.append({**one, "formula": by_formula, "table": by_table})
    shared.say(f"\nheld out: {len(hidden)} of {len(passes)} points, predicted from the others")
    shared.say("model    context batch rows   measured ms   table  error  formula  error")
    for one in rows:
        errors = [
            "" if one[kind] is None else f"{1e3 * one[kind]:7.3f} {relative(one, kind):+6.1%}"
            for kind in ("table", "formula")
        ]
        shared.say(
            f"{one['role']:<8} {one['context']:7} {one['batch']:5} {one['rows']:4} "
            f"{1e3 * one['seconds']:13.3f} {'  '.join(errors)}"
        )
    found: dict[str, Any] = {"points": rows, "stack": None if stack is None else stack._asdict()}
    for kind in ("table", "formula"):
        errors = [abs(relative(one, kind)) for one in rows if one[kind] is not None]
        if errors:
            found[kind] = {"median_error": float(np.median(errors)), "worst_error": max(errors)}
            shared.say(f"{kind}: median error {np.median(errors):.1%}, worst {max(errors):.1%}")
    return found


def choose_held_out(passes: list[dict[str, Any]], share: float, seed: int) -> np.ndarray:
    """Which points to hold out, `[n]` bool, drawn at random.

    Of each model the smallest and the largest number of tokens, and two contexts if there are any,
    stay in: what is predicted lies between measurements, as the points of a search would.
    """
    out = np.zeros(len(passes), bool)
    for index in np.random.default_rng(seed).permutation(len(passes)).tolist():
        if out.sum() >= max(1, round(share * len(passes))):
            break
        same = [i for i, one in enumerate(passes) if one["role"] == passes[index]["role"]]
        left = [passes[i] for i in same if not out[i] and i != index]

        def spread(points: list[dict[str, Any]]) -> tuple[int, ...]:
            tokens = [one["batch"] * one["rows"] for one in points] or [0]
            contexts = {one["context"] for one in points}
            return min(tokens), max(tokens), min(len(contexts), 2)

        # One number of tokens more than once leaves a time per cached token to be fitted.
        tokens = [one["batch"] * one["rows"] for one in left]
        fits = len(left) >= len(set(tokens)) + 2 or spread(left)[2] < 2
        out[index] = spread(left) == spread([passes[i] for i in same]) and fits
    return out


def relative(one: dict[str, Any], kind: str) -> float:
    """Predicted over measured, less 1."""
    return one[kind] / one["seconds"] - 1


def fit_formula(
    passes: list[dict[str, Any]],
    target: shared.LoadedModel,
    draft: shared.LoadedModel,
    args: Any,
    bandwidth: float,
) -> tuple[costmodel.Stack | None, costmodel.Chip]:
    """The stack that both models' passes follow best; None where they do not determine one."""
    if args.chip:
        chip = costmodel.named_chip(args.chip)
    else:
        size = 256 if args.quick else 2048
        speed = timing.product_speed(size, dtype=shared.DTYPES[args.dtype])
        chip = costmodel.Chip(speed, 0.0, 0.0, bandwidth, 1e12, 1.0)
    rows = bench_pass.timed_passes(passes, "target", target)
    rows += bench_pass.timed_passes(passes, "draft", draft)
    free = ["memory_efficiency", "compute_efficiency", "layer_seconds"]
    overlap = costmodel.Stack(0.8, 0.7, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    try:
        return costmodel.fit_pass_times(rows, chip, free, overlap).result, chip
    except ValueError as error:
        shared.say(f"no formula: {error}")
        return None, chip


def plain_texts(work: Workload, decoder: jaxsd.Decoder, num_texts: int) -> list[np.ndarray]:
    """What the target writes by itself, `[N, L]` tokens for each of several keys."""
    texts = []
    for repeat in range(num_texts):
        rows = []
        for prompt in range(len(work.prompts)):
            state = start(work, decoder, prompt, 10**6 + repeat)
            state = decoder.run(work.params, state, jaxsd.UNTIL_DONE)
            rows.append(np.asarray(state.tokens)[0])
        texts.append(np.stack(rows))
    return texts


def predict(
    work: Workload, decoders: dict[int, jaxsd.Decoder], times: costmodel.TokenRoundTimes, args: Any
) -> dict[int, dict[str, float]]:
    """Seconds of a round, tokens of a round and the speed-up, by draft length."""
    roles = [
        checkpoint.Pretrained(one.config, one.params, one.tokenizer, {})
        for one in (work.target, work.draft)
    ]
    kept_by_draft = measure.make_kept(*roles)
    shared.progress("reading what the target writes")
    texts = plain_texts(work, decoders[0], 1 if args.temperature == 0 else 4)
    places = [slice(one.length - 1, one.length - 1 + work.new) for one in work.prompts]
    kept = [
        row[place]
        for text in texts
        for row, place in zip(kept_by_draft(text, args.temperature), places, strict=True)
    ]
    plain = float(costmodel.round_seconds(times, 1, 0))
    found = {0: {"round_seconds": plain, "tokens": 1.0, "speedup": 1.0}}
    for count in args.lengths:
        num_rounds = sum(measure.expected_rounds(one, count) for one in kept)
        tokens = len(kept) * work.new / num_rounds
        seconds = float(costmodel.round_seconds(times, 1, count))
        found[count] = {
            "round_seconds": seconds,
            "tokens": tokens,
            "speedup": tokens * plain / seconds,
        }
    return found


def decode_in_turns(
    work: Workload, decoders: dict[int, jaxsd.Decoder], args: Any
) -> dict[int, dict[str, float]]:
    """The same figures as measured; all lengths, and plain decoding, take turns at every prompt."""
    lengths = [0, *args.lengths]
    seconds = np.zeros((args.repeats, len(work.prompts), len(lengths)))
    rounds = np.zeros_like(seconds)
    for repeat in range(args.repeats):
        shared.progress(f"decoding, turn {repeat + 1} of {args.repeats}")
        for prompt in range(len(work.prompts)):
            for place in range(len(lengths)):
                index = (place + repeat + prompt) % len(lengths)
                state = start(work, decoders[lengths[index]], prompt, repeat)
                taken, num_rounds = timed_run(work, decoders[lengths[index]], state)
                seconds[repeat, prompt, index], rounds[repeat, prompt, index] = taken, num_rounds
    # A round lasts as long whatever it accepts; the texts, and their rounds, are averaged over.
    by_round = (seconds / rounds).reshape(-1, len(lengths))
    typical = STATISTICS[args.statistic](by_round)
    tokens = work.new * args.repeats * len(work.prompts) / rounds.sum((0, 1))
    whole = seconds.sum(1)
    found = {}
    for index, count in enumerate(lengths):
        ratios = whole[:, 0] / whole[:, index]
        found[count] = {
            "round_seconds": float(typical[index]),
            "tokens": float(tokens[index]),
            "speedup": float(tokens[index] * typical[0] / typical[index]),
            "speedup_lowest": float(ratios.min()),
            "speedup_highest": float(ratios.max()),
            "speedup_median_of_turns": float(np.median(ratios)),
        }
    return found


def timed_run(
    work: Workload, decoder: jaxsd.Decoder, state: jaxsd.DecodeState
) -> tuple[float, int]:
    """Seconds and rounds of one text."""
    seconds, state = timing.seconds_of(lambda: decoder.run(work.params, state, jaxsd.UNTIL_DONE))
    return seconds, int(np.max(np.asarray(state.stats.num_rounds)))


def compare(
    predicted: dict[int, dict[str, float]],
    measured: dict[int, dict[str, float]],
    fitted: Sequence[int],
) -> dict[str, Any]:
    """Errors by draft length, and what the chosen length loses to the best."""
    lengths = [count for count in predicted if count]
    rows = []
    for count in predicted:
        row: dict[str, Any] = {"num_tokens": count, "is_fitted": count in fitted or count == 0}
        for name, value in predicted[count].items():
            row[f"predicted_{name}"] = value
            row[f"{name}_error"] = value / measured[count][name] - 1
        row |= {f"measured_{name}": value for name, value in measured[count].items()}
        rows.append(row)
    errors = [abs(row["speedup_error"]) for row in rows if row["num_tokens"]]
    unseen = [abs(row["speedup_error"]) for row in rows if not row["is_fitted"]]
    chosen = max(lengths, key=lambda count: predicted[count]["speedup"])
    best = max(lengths, key=lambda count: measured[count]["speedup"])
    return {
        "lengths": rows,
        "speedup_median_error": float(np.median(errors)),
        "speedup_worst_error": max(errors),
        "speedup_median_error_of_unfitted": float(np.median(unseen)) if unseen else None,
        "chosen": chosen,
        "best": best,
        "chosen_loses": 1 - measured[chosen]["speedup"] / measured[best]["speedup"],
    }


def show_lengths(result: dict[str, Any]) -> None:
    """A line per draft length, and what they add up to."""
    shared.say("\n      round, ms             tokens a round        speed-up")
    shared.say("  K   predicted measured    predicted measured    predicted measured  error")
    for row in result["lengths"]:
        cells = [
            f"{scale * row[f'{side}_{name}']:{width}.{digits}f}"
            for name, scale, digits in (
                ("round_seconds", 1e3, 3),
                ("tokens", 1.0, 2),
                ("speedup", 1.0, 3),
            )
            for side, width in (("predicted", 12), ("measured", 9))
        ]
        mark = " (its round was fitted)" if row["is_fitted"] else ""
        shared.say(f"{row['num_tokens']:3} {''.join(cells)} {row['speedup_error']:+6.1%}{mark}")
    unseen = result["speedup_median_error_of_unfitted"]
    shared.say(
        f"speed-up: median error {result['speedup_median_error']:.1%}, worst "
        f"{result['speedup_worst_error']:.1%}"
        + ("" if unseen is None else f"; lengths that were not fitted {unseen:.1%}")
    )
    shared.say(
        f"chosen K = {result['chosen']}, best measured K = {result['best']}: "
        f"{result['chosen_loses']:.1%} slower than the best"
    )


def listed(value: Any) -> Any:
    """An array as a list, a number as a float."""
    array = np.asarray(value, np.float64)
    return array.tolist() if array.ndim else float(array)


if __name__ == "__main__":
    shared.run(main)
