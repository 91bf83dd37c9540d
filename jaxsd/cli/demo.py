"""`jaxsd demo`: what does speculation gain on this machine, and was that predictable?

The order is that of the claim. First everything a prediction needs is measured without
speculating: the seconds of the parts of a round, and how alike draft and target are on text that
the target wrote by itself. The cost model turns them into a prediction for every draft length, and
so into the length to use. Only then is speculation run and timed against plain decoding, the two
taking turns.
"""

import concurrent.futures
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import rich.console
import tyro

import jaxsd

from . import design as design_lib
from . import generate as generate_lib
from . import info as info_lib

# Sampled first: the greedy text of a small model repeats itself, which makes it easy to draft.
TEMPERATURES = (1.0, 0.7, 0.0)
HEADLINE = 1.0
STREAMED = 0.7
# The draft lengths whose verify pass is timed; those between are interpolated.
VERIFIED = (1, 3, 4, 6)
STEP_REPEATS = 7
STEP_ROUNDS = 24
# New tokens per prompt: as many as keep the timed runs within the seconds.
NEW_TOKENS = (64, 48, 32, 16)
TIMED_SECONDS = 40.0
# A target of today, and what SDSL's drafts for it saw: tokens of training.
EXAMPLE = {"target_params": 70553706496.0, "target_tokens": 15e12, "draft_tokens": 180e9}

Folder = Annotated[str | None, tyro.conf.arg(metavar="DIR")]
Number = Annotated[int | None, tyro.conf.arg(metavar="INT")]


def demo(
    target: Folder = None,
    draft: Folder = None,
    prompts: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None,
    num_draft_tokens: Number = None,
    max_new_tokens: Number = None,
    runs: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Decodes real text with and without speculation and compares with the prediction.

    Needs no network, no training and about a minute. Batch 1, prompts that neither model was
    trained on. Beside every measured figure stands what the cost model predicted from figures
    measured without speculating: the seconds of a target step, of a verify pass and of a draft, and
    the overlap of the two models' distributions.

    Args:
      target: folder of another target; needs a draft too.
      draft: folder of another draft.
      prompts: file with other prompts, as `python -m jaxsd.cli.prompts` writes it.
      num_draft_tokens: tokens drafted per round; by default what the cost model says is fastest.
      max_new_tokens: tokens to decode per prompt; by default up to 64, fewer on a slow machine.
      runs: how often plain and speculative decoding take turns.
      seed: of the random choices.

    Returns:
      Everything shown; JSON values.

    Raises:
      ValueError: an argument, a model or the prompts are wrong, in one line.
    """
    for name, value in (
        ("num_draft_tokens", num_draft_tokens),
        ("max_new_tokens", max_new_tokens),
        ("runs", runs),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    key = jax.random.key(seed)

    from . import report

    began = time.perf_counter()
    bench = _load(target, draft, prompts, num_draft_tokens, max_new_tokens)
    with _progress() as step:
        parts = _compile_parts(bench, step)
        plain_texts = _plain_texts(bench, key, step)
        predictions, times = _predict(bench, parts, plain_texts, step)
        if num_draft_tokens is None:
            # The fastest that is speculation at all; whether plain decoding beats it is reported.
            num_draft_tokens = 1 + int(np.argmax(predictions[HEADLINE]["speedups"][1:]))
        speculative = _compile_speculation(bench, num_draft_tokens, step)
    report.show_text(_stream(bench, speculative.decoder, key))
    with _progress() as step:
        new = bench.max_new if max_new_tokens else _affordable(bench, times, runs)
        timed = _time(bench, speculative, key, runs=runs, new=new, step=step)
        results = [
            _result(temperature, timed[temperature], predictions[temperature], num_draft_tokens)
            for temperature in TEMPERATURES
        ]
        differences = _differences(bench, parts.overlap, timed[0.0])

    headline = results[TEMPERATURES.index(HEADLINE)]
    result = {
        "outputs_equal": not differences,
        "plain_tokens_per_second": headline["measured"]["plain_tokens_per_second"],
        "speculative_tokens_per_second": headline["measured"]["speculative_tokens_per_second"],
        "mean_acceptance_length": headline["measured"]["mean_acceptance_length"],
        "speedup": headline["measured"]["speedup"],
        "num_draft_tokens": num_draft_tokens,
        "temperature": HEADLINE,
        "batch_size": 1,
        "device": info_lib.describe_device(),
        "prompts": len(bench.requests),
        "new_tokens_per_prompt": new,
        "runs": runs,
        "differences": differences,
        "temperatures": results,
        "step_times": times._asdict(),
        "compile_seconds": parts.seconds + speculative.seconds,
        "models": bench.description,
        "design": parts.design,
        "seed": seed,
        "seconds": time.perf_counter() - began,
        "versions": info_lib.versions(),
    }
    report.show_result(result)
    return result


class Bench(NamedTuple):
    """What is decoded with."""

    target: Any  # checkpoint.Pretrained
    draft: Any
    target_model: jaxsd.LanguageModel
    draft_model: jaxsd.LanguageModel
    params: dict[str, Any]
    requests: list[Any]  # measure.Request, one per prompt
    prompts: list[Any]  # pair.Prompt
    plain: jaxsd.Decoder
    max_new: int
    max_len: int
    verified: tuple[int, ...]
    description: dict[str, Any]


class Parts(NamedTuple):
    """The compiled programs that a prediction needs."""

    round: Callable[..., float]  # of plain decoding
    passes: dict[int, Callable[..., float]]  # of the target, by draft length
    drafting: Callable[..., float]
    overlap: Callable[[np.ndarray, float], tuple[np.ndarray, np.ndarray]]
    design: dict[str, Any]
    seconds: float  # that compiling took


class Speculation(NamedTuple):
    """The decoder that is measured, compiled."""

    decoder: jaxsd.Decoder
    seconds: float


class Run(NamedTuple):
    """All prompts decoded once in both ways."""

    plain_seconds: float
    speculative_seconds: float
    plain_tokens: np.ndarray  # [N, L]
    speculative_tokens: np.ndarray
    num_tokens: int  # decoded, by each
    stats: jaxsd.Statistics  # [N] rows, of speculation


Step = Callable[[str], None]


def _load(
    target: str | None,
    draft: str | None,
    prompts: str | None,
    num_draft_tokens: int | None,
    max_new_tokens: int | None,
) -> Bench:
    from jaxsd import models

    from . import measure, pair

    target_, draft_ = pair.load_pair(target, draft)
    texts = pair.load_prompts(prompts)
    requests = measure.pad_prompts(
        [target_.tokenizer.encode(prompt.text) for prompt in texts],
    )
    verified = tuple(sorted({*VERIFIED, num_draft_tokens or VERIFIED[0]}))
    max_new = max_new_tokens or NEW_TOKENS[0]
    width = requests[0].tokens.shape[1]
    max_len = width + max(max_new, STEP_ROUNDS) + verified[-1]
    target_model = models.language_model(target_.config)
    # No end of text: every run decodes the same number of tokens.
    plain = jaxsd.speculative(target_model, jaxsd.no_drafter(), max_len=max_len)
    return Bench(
        target=target_,
        draft=draft_,
        target_model=target_model,
        draft_model=models.language_model(draft_.config),
        params={"target": target_.params, "draft": draft_.params},
        requests=requests,
        prompts=texts,
        plain=plain,
        max_new=max_new,
        max_len=max_len,
        verified=verified,
        description={
            "target": {
                "folder": target or "embedded",
                "parameters": models.num_parameters(target_.config),
            },
            "draft": {
                "folder": draft or "embedded",
                "parameters": models.num_parameters(draft_.config),
            },
        },
    )


def _compile_parts(bench: Bench, step: Step) -> Parts:
    """Compiles by calling once, several programs at a time; none of it is timed against another."""
    from . import measure

    params = bench.params
    round_fn = measure.make_round(bench.plain)
    passes = {
        k: measure.make_pass(bench.target_model, k, STEP_ROUNDS) for k in (0, *bench.verified)
    }
    drafting = measure.make_drafting(
        bench.draft_model, bench.verified[-1], bench.max_len, STEP_ROUNDS
    )
    overlap = measure.make_overlap(bench.target, bench.draft)
    key = jax.random.key(0)
    began = time.perf_counter()

    def state() -> jaxsd.DecodeState:
        return bench.requests[0].start(bench.plain, params, key, HEADLINE, STEP_ROUNDS)

    texts = np.zeros((len(bench.requests), bench.max_len), np.int32)
    independent: dict[str, Callable[[], Any]] = {
        "design": lambda: design_lib.solve_size(**EXAMPLE),
        "prefill": state,
        "overlap": lambda: overlap(texts, HEADLINE),
    }
    results = _all(independent, step)
    timers = {"round": round_fn, "drafting": drafting} | {f"pass {k}": passes[k] for k in passes}
    _all({name: lambda run=run: run(params, state()) for name, run in timers.items()}, step)
    seconds = time.perf_counter() - began
    return Parts(round_fn, passes, drafting, overlap, results["design"], seconds)


def _compile_speculation(bench: Bench, num_tokens: int, step: Step) -> Speculation:
    drafter = jaxsd.model_drafter(bench.draft_model, num_tokens)
    # The rule that the prediction is about; the default one accepts a little more.
    rule = jaxsd.rejection_sampling
    decoder = jaxsd.speculative(bench.target_model, drafter, rule, max_len=bench.max_len)
    began = time.perf_counter()
    state = bench.requests[0].start(decoder, bench.params, jax.random.key(0), HEADLINE, 2)
    step("compiling")
    jax.block_until_ready(decoder.run(bench.params, state, jaxsd.UNTIL_DONE))
    return Speculation(decoder, time.perf_counter() - began)


def _plain_texts(bench: Bench, key: jax.Array, step: Step) -> dict[float, np.ndarray]:
    """What the target writes by itself at each temperature, `[N, L]` tokens."""
    texts = {}
    for temperature in TEMPERATURES:
        rows = []
        for index, request in enumerate(bench.requests):
            row_key = jax.random.fold_in(key, index)
            state = request.start(bench.plain, bench.params, row_key, temperature, bench.max_new)
            state = bench.plain.run(bench.params, state, jaxsd.UNTIL_DONE)
            rows.append(np.asarray(state.tokens)[0])
        texts[temperature] = np.stack(rows)
        step("reading what the target writes")
    return texts


def _predict(
    bench: Bench, parts: Parts, texts: Mapping[float, np.ndarray], step: Step
) -> tuple[dict[float, dict[str, Any]], Any]:
    """Alpha, and with the measured step times the prediction for every draft length."""
    from jaxsd import costmodel

    from . import measure

    def make_state() -> jaxsd.DecodeState:
        return bench.requests[0].start(
            bench.plain, bench.params, jax.random.key(0), HEADLINE, STEP_ROUNDS
        )

    times = measure.step_times(
        parts.round, parts.passes, parts.drafting, bench.params, make_state, STEP_REPEATS
    )
    step("timing the parts of a round")
    predictions = {}
    for temperature, tokens in texts.items():
        overlap, _ = parts.overlap(tokens, temperature)
        # Place i is about token i + 1: the tokens that were decoded, of each row.
        places = [
            slice(request.length - 1, request.length - 1 + bench.max_new)
            for request in bench.requests
        ]
        alpha = float(np.mean([overlap[row, place] for row, place in enumerate(places)]))
        prediction = costmodel.best_num_tokens(
            alpha,
            times.target_seconds,
            times.draft_seconds,
            np.array(times.verify_seconds),
        )
        predictions[temperature] = {
            "alpha": alpha,
            "num_tokens": int(prediction.num_tokens),
            "speedups": np.asarray(prediction.speedup).tolist(),
            "tokens_per_second": np.asarray(prediction.tokens_per_second).tolist(),
            "mean_acceptance_length": np.asarray(prediction.mean_acceptance_length).tolist(),
        }
    return predictions, times


def _affordable(bench: Bench, times: Any, runs: int) -> int:
    """New tokens per prompt that keep the timed runs within their share of the time."""
    per_token = 2 * len(bench.requests) * len(TEMPERATURES) * runs * times.target_seconds
    fitting = [new for new in NEW_TOKENS if new * per_token <= TIMED_SECONDS]
    return fitting[0] if fitting else NEW_TOKENS[-1]


def _time(
    bench: Bench, speculative: Speculation, key: jax.Array, *, runs: int, new: int, step: Step
) -> dict[float, list[Run]]:
    """Decodes every prompt in both ways, `runs` times at each temperature, taking turns."""
    decoders = (bench.plain, speculative.decoder)
    timed: dict[float, list[Run]] = {temperature: [] for temperature in TEMPERATURES}
    for number in range(runs):
        run_key = jax.random.fold_in(key, number)
        for temperature in TEMPERATURES:
            seconds = [0.0, 0.0]
            states: list[list[jaxsd.DecodeState]] = [[], []]
            for index, request in enumerate(bench.requests):
                row_key = jax.random.fold_in(run_key, index)
                for way in (0, 1) if (number + index) % 2 else (1, 0):
                    state = request.start(decoders[way], bench.params, row_key, temperature, new)
                    began = time.perf_counter()
                    state = decoders[way].run(bench.params, state, jaxsd.UNTIL_DONE)
                    jax.block_until_ready(state)
                    seconds[way] += time.perf_counter() - began
                    states[way].append(state)
            tokens = [
                np.concatenate([np.asarray(state.tokens) for state in states[way]])
                for way in (0, 1)
            ]
            stats = jax.tree.map(
                lambda *rows: np.concatenate(rows), *(state.stats for state in states[1])
            )
            num_tokens = new * len(bench.requests)
            run = Run(seconds[0], seconds[1], tokens[0], tokens[1], num_tokens, stats)
            timed[temperature].append(run)
            step(f"decoding, run {number + 1} of {runs}")
    return timed


def _result(
    temperature: float, runs: list[Run], prediction: Mapping[str, Any], num_tokens: int
) -> dict[str, Any]:
    """Measured and predicted figures of one temperature."""
    from jaxsd import costmodel

    stats = jax.tree.map(lambda *rows: np.concatenate(rows), *(run.stats for run in runs))
    described = generate_lib.describe_statistics(stats)
    ratios = [run.plain_seconds / run.speculative_seconds for run in runs]
    rate = described["acceptance_rate"]
    alpha = prediction["alpha"]
    return {
        "temperature": temperature,
        "num_draft_tokens": num_tokens,
        "measured": {
            "plain_tokens_per_second": statistics.median(
                run.num_tokens / run.plain_seconds for run in runs
            ),
            "speculative_tokens_per_second": statistics.median(
                run.num_tokens / run.speculative_seconds for run in runs
            ),
            "speedup": statistics.median(ratios),
            "speedup_min": min(ratios),
            "speedup_max": max(ratios),
            "speedup_runs": ratios,
            "mean_acceptance_length": described["mean_acceptance_length"],
            "acceptance_by_position": described["acceptance_by_position"],
            "acceptance_rate": rate,
            # The alpha of the theory that would give this acceptance rate.
            "alpha": float(costmodel.acceptance_rate_to_alpha(rate, num_tokens)),
            "num_rounds": described["num_rounds"],
        },
        "predicted": {
            "plain_tokens_per_second": prediction["tokens_per_second"][0],
            "speculative_tokens_per_second": prediction["tokens_per_second"][num_tokens],
            "speedup": prediction["speedups"][num_tokens],
            "mean_acceptance_length": prediction["mean_acceptance_length"][num_tokens],
            "acceptance_by_position": [alpha ** (place + 1) for place in range(num_tokens)],
            "acceptance_rate": float(costmodel.alpha_to_acceptance_rate(alpha, num_tokens)),
            "alpha": alpha,
        },
        "recommended_num_draft_tokens": prediction["num_tokens"],
        "predicted_speedup_by_num_draft_tokens": prediction["speedups"],
    }


def _differences(
    bench: Bench, overlap: Callable[..., tuple[np.ndarray, np.ndarray]], runs: list[Run]
) -> list[dict[str, Any]]:
    """Where greedy outputs first differ, and how near the target was to choosing otherwise."""
    found = {}
    for run in runs:
        unequal = run.plain_tokens != run.speculative_tokens
        for row in np.flatnonzero(unequal.any(axis=1)).tolist():
            found.setdefault((row, int(np.argmax(unequal[row]))), run)
    differences = []
    for (row, place), run in found.items():
        _, margin = overlap(run.plain_tokens, 0.0)
        differences.append(
            {
                "prompt": row,
                "token": place - bench.requests[row].length,
                "margin_in_logits": float(margin[row, place - 1]),
            }
        )
    return differences


class Sample(NamedTuple):
    """A text as it comes."""

    prompt: Any  # pair.Prompt
    tokenizer: Any
    temperature: float
    num_draft_tokens: int
    rounds: Iterator[jaxsd.StepInfo]


def _stream(bench: Bench, decoder: jaxsd.Decoder, key: jax.Array) -> Sample:
    """The first prompt, decoded round by round."""
    request = bench.requests[0]
    rounds = decoder.stream(
        bench.params,
        request.tokens,
        np.array([request.length], np.int32),
        key,
        sampling=jaxsd.Sampling(STREAMED),
        max_new_tokens=bench.max_new,
    )
    tokenizer = bench.target.tokenizer
    return Sample(bench.prompts[0], tokenizer, STREAMED, decoder.num_tokens, rounds)


def _all(tasks: Mapping[Any, Callable[[], Any]], step: Step) -> dict[Any, Any]:
    """Calls all tasks on as many threads as there are cores; compiling releases Python's lock."""
    pool = concurrent.futures.ThreadPoolExecutor(min(len(tasks), os.cpu_count() or 1))
    try:
        futures = {name: pool.submit(task) for name, task in tasks.items()}
        for _ in concurrent.futures.as_completed(futures.values()):
            step("compiling")
        return {name: future.result() for name, future in futures.items()}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _progress() -> Iterator[Step]:
    """A line on stderr that says what is being done; on a terminal it goes when that is done."""
    console = rich.console.Console(stderr=True, highlight=False)
    began = time.perf_counter()
    last = ""

    def step(what: str) -> None:
        nonlocal last
        status.update(f"{what} ({time.perf_counter() - began:.0f} s)")
        if not console.is_terminal and what != last:
            console.print(f"jaxsd: {what}")
        last = what

    with console.status("") as status:
        step("compiling")
        yield step
