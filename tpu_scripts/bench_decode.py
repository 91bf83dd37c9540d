"""How fast is decoding, plain and speculative, by batch, draft length, context and temperature?

    python tpu_scripts/bench_decode.py --out tpu_scripts/results/bench_decode_cpu.json
    python tpu_scripts/bench_decode.py --target hf:Llama-3.1-8B --draft hf:Llama-3.2-1B \\
        --dtype bfloat16 --chip tpu-v5p --batches 1,8 --contexts 1024,4096

At every batch, context and temperature plain decoding and all draft lengths take turns, each with
its own key, without an end of text, prompts read and programs compiled before. A figure is the
median over turns. Rejection sampling decides.

Stages: drafting and the target's pass are timed by themselves, in loops of their own, in the same
turns; the rest is what a round takes beyond both: sampling, deciding, committing, and finding the
processor's caches full of the other model. Bandwidth is what both models' weights and caches weigh,
over the time of the round.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import shared

import jaxsd
from jaxsd import costmodel
from jaxsd.cli import measure, timing

# Proposals or passes in a timed loop.
NUM_PASSES = 12


class Case(NamedTuple):
    """What is decoded."""

    batch: int
    context: int  # tokens of each prompt
    temperature: float


class Bench(NamedTuple):
    """The same for all cases."""

    target: shared.LoadedModel
    draft: shared.LoadedModel
    lengths: tuple[int, ...]  # from 0, plain decoding
    new: int
    repeats: int
    seed: int
    bandwidth: float

    @property
    def params(self) -> dict[str, Any]:
        """Weights by role."""
        return {"target": self.target.params, "draft": self.draft.params}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Times all cases, prints them and returns the document."""
    parser = shared.make_parser(__doc__, repeats=7, quick="one case, one length, two turns")
    shared.add_models(parser)
    numbers = shared.whole_numbers(1)
    parser.add_argument("--batches", type=numbers, default=[1, 4], help="sequences (1 and 4)")
    parser.add_argument("--lengths", type=numbers, default=[2, 3, 5, 7], help="drafted a round")
    parser.add_argument("--contexts", type=numbers, default=[64, 512], help="tokens of a prompt")
    parser.add_argument("--temperatures", type=shared.temperatures, default=[0.0, 1.0])
    parser.add_argument("--new-tokens", type=shared.positive, default=64, help="(%(default)s)")
    args = parser.parse_args(argv)
    if args.quick:
        args.batches, args.lengths, args.contexts, args.temperatures = [2], [2], [16], [1.0]
        args.new_tokens, args.repeats = 6, 2
    target, draft = shared.load_pair(args)
    bandwidth, source = shared.peak_of(args.chip, args.quick)
    card = shared.show_card([target, draft], bandwidth, source)
    lengths = (0, *args.lengths)
    bench = Bench(target, draft, lengths, args.new_tokens, args.repeats, args.seed, bandwidth)
    results = []
    for batch in args.batches:
        for context in args.contexts:
            programs = Programs(bench, batch, context)
            for temperature in args.temperatures:
                rows = measure_case(bench, programs, Case(batch, context, temperature))
                show(rows)
                results += rows
    return shared.finish(
        "bench_decode",
        argv,
        args.out,
        card=card,
        repeats=args.repeats,
        new_tokens=args.new_tokens,
        results=results,
    )


class Programs:
    """Decoders and timers of one batch and context, compiled as they are first called."""

    def __init__(self, bench: Bench, batch: int, context: int):
        self.max_len = context + bench.new + max(bench.lengths) + 1
        self.prompts = shared.text_prompts(bench.target, batch, context, bench.seed)
        self.decoders = {
            count: shared.no_end(bench.target, count, bench.draft, self.max_len)
            for count in bench.lengths
        }
        target = bench.target.model
        self.passes = {k: measure.make_pass(target, k, NUM_PASSES) for k in bench.lengths}
        self.drafting = {
            k: measure.make_drafting(bench.draft.model, k, self.max_len, NUM_PASSES)
            for k in bench.lengths
            if k
        }

    def start(
        self, bench: Bench, count: int, temperature: float, key: jax.Array
    ) -> jaxsd.DecodeState:
        """Prompts, read."""
        state = self.decoders[count].start(
            bench.params,
            self.prompts,
            None,
            key,
            sampling=jaxsd.Sampling(temperature),
            max_new_tokens=bench.new,
        )
        return jax.block_until_ready(state)


def measure_case(bench: Bench, programs: Programs, case: Case) -> list[dict[str, Any]]:
    """Figures of plain decoding and of every draft length."""
    shared.progress(f"{case}: compiling")
    key = jax.random.key(bench.seed)
    final: dict[int, list[jaxsd.Statistics]] = {count: [] for count in bench.lengths}
    turns = dict.fromkeys(bench.lengths, 0)

    def whole(count: int) -> timing.Timer:
        def run() -> float:
            turns[count] += 1
            turn_key = jax.random.fold_in(key, turns[count])
            state = programs.start(bench, count, case.temperature, turn_key)
            decoder = programs.decoders[count]
            seconds = timing.seconds_of(lambda: decoder.run(bench.params, state, jaxsd.UNTIL_DONE))
            final[count].append(jax.device_get(seconds.value.stats))
            return seconds.seconds

        return run

    def part(timer: measure.Timer) -> timing.Timer:
        def run() -> float:
            return timer(bench.params, programs.start(bench, 0, case.temperature, key))

        return run

    lengths = bench.lengths
    timers = [whole(count) for count in lengths]
    timers += [part(programs.passes[count]) for count in lengths]
    timers += [part(programs.drafting[count]) for count in lengths if count]
    for timer in timers:
        timer()  # compiles
    for found in final.values():
        found.clear()
    seconds = timing.in_turns(timers, bench.repeats)
    # Parts of rounds are near each other in time; whole runs differ by what they accept.
    typical = timing.typical(seconds)
    num = len(lengths)
    drafting = dict(zip([count for count in lengths if count], typical[2 * num :], strict=True))
    rows = []
    for index, count in enumerate(lengths):
        runs = final[count]
        rounds = np.array([int(np.max(np.asarray(stats.num_rounds))) for stats in runs])
        stats = jax.tree.map(lambda *leaves: np.sum(np.stack(leaves), (0, 1)), *runs)
        ratios = seconds[:, 0] / seconds[:, index]
        round_seconds = float(np.median(seconds[:, index] / rounds))
        draft_seconds = count * float(drafting.get(count, 0.0))
        verify_seconds = float(typical[num + index])
        moved = round_bytes(bench, case, count)
        row = {
            **case._asdict(),
            "num_tokens": count,
            "tokens_per_second": case.batch * bench.new / float(np.median(seconds[:, index])),
            "speedup": float(np.median(ratios)),
            "speedup_lowest": float(ratios.min()),
            "speedup_highest": float(ratios.max()),
            "mean_acceptance_length": float(jaxsd.stats.mean_acceptance_length(stats)),
            "acceptance_rate": float(jaxsd.stats.acceptance_rate(stats)) if count else None,
            "acceptance_by_position": np.asarray(
                jaxsd.stats.acceptance_by_position(stats)
            ).tolist(),
            "round_seconds": round_seconds,
            "draft_seconds": draft_seconds,
            "verify_seconds": verify_seconds,
            "rest_seconds": round_seconds - draft_seconds - verify_seconds,
            "bytes_per_round": moved,
            "bytes_per_second": moved / round_seconds,
            "bandwidth_share": moved / round_seconds / bench.bandwidth,
            "model_and_cache_bytes": held_bytes(bench, programs, case, count),
        }
        rows.append(row)
    return rows


def round_bytes(bench: Bench, case: Case, count: int) -> float:
    """What a round reads and writes of weights and caches, by the cost model."""
    context = case.context + bench.new / 2
    total = 0.0
    for one, rows, passes in ((bench.target, count + 1, 1), (bench.draft, 1, count)):
        shape = shared.shape_of(one.config)
        total += passes * float(costmodel.pass_bytes(shape, case.batch, rows, context, one.formats))
    return total


def held_bytes(bench: Bench, programs: Programs, case: Case, count: int) -> int:
    """Weights and caches of the models that take part."""
    total = 0
    for one in (bench.target, bench.draft)[: 2 if count else 1]:
        cache = jax.eval_shape(
            lambda one=one: one.model.init_cache(case.batch, programs.max_len + count)
        )
        total += sum(leaf.nbytes for leaf in jax.tree.leaves(one.params))
        total += sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    return total


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A line per draft length."""
    first = rows[0]
    shared.say(
        f"\nbatch {first['batch']}, context {first['context']}, temperature "
        f"{first['temperature']:g}\n"
        "  K  tokens/s  speed-up lowest highest  tokens  accepted |  round   draft  verify    rest"
        " ms |  GB/s  share  MB held"
    )
    for row in rows:
        rate = row["acceptance_rate"]
        parts = "".join(
            f"{1e3 * row[f'{name}_seconds']:8.3f}" for name in ("round", "draft", "verify", "rest")
        )
        shared.say(
            f"{row['num_tokens']:3} {row['tokens_per_second']:9.1f} {row['speedup']:9.2f} "
            f"{row['speedup_lowest']:6.2f} {row['speedup_highest']:7.2f} "
            f"{row['mean_acceptance_length']:7.2f} {'' if rate is None else format(rate, '.2f'):>9}"
            f" |{parts}    | {row['bytes_per_second'] / 1e9:5.1f} {row['bandwidth_share']:6.1%} "
            f"{row['model_and_cache_bytes'] / 1e6:8.1f}"
        )


if __name__ == "__main__":
    shared.run(main)
