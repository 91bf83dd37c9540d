"""`jaxsd quantise`: what do fewer bits cost a model, and is its quantised copy a good draft for it?

Loss is that on held-out text, in nats per token, with the standard error of its difference: all
forms read the same windows. Acceptance is the real decoder's, over prompts of the package. Times
are taken in turns with the unquantised model's, and only their ratios are shown: another process
slows both alike.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.console
import rich.table
import tyro

import jaxsd

from . import info as info_lib

TEMPERATURES = (0.0, 1.0)
PASS_ROWS = (1, 4)


class Form(NamedTuple):
    """One way to store a model."""

    name: str
    bits: int | None  # of the kernels; None: as they are
    group_size: int | None = None
    embeddings: bool = False
    has_small_cache: bool = False  # int8


class Stored(NamedTuple):
    """A model in a form."""

    form: Form
    model: Any
    params: Any
    num_bytes: int
    cache_bytes_per_token: int


class Drafting(NamedTuple):
    """Texts decoded at one temperature, all prompts together."""

    seconds: float
    stats: jaxsd.Statistics  # sums over prompts
    tokens: list[list[int]]


def quantise(
    target: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None,
    num_draft_tokens: int = 4,
    group_sizes: str = "32,64,128",
    num_windows: int = 64,
    sequence_length: int = 256,
    num_prompts: int = 4,
    max_new_tokens: int = 48,
    repeats: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """Shows loss, acceptance as its own draft, bytes and times of a model in fewer bits.

    Batch 1 and float32 but for what is quantised. The held-out text is that of Python's standard
    library.

    Args:
      target: folder of another model than the package's target.
      num_draft_tokens: tokens that the quantised copy drafts per round.
      group_sizes: weights that share a scale, of the 4-bit forms, separated by commas.
      num_windows: held-out windows to take the loss of.
      sequence_length: tokens of each.
      num_prompts: how many prompts to decode.
      max_new_tokens: tokens to decode per prompt.
      repeats: how often every form takes its turn in what is timed.
      seed: of the random choices.

    Returns:
      Every figure; JSON values.

    Raises:
      ValueError: an argument or a model is wrong, in one line.
    """
    for name, value in (
        ("num_draft_tokens", num_draft_tokens),
        ("num_windows", num_windows),
        ("sequence_length", sequence_length),
        ("num_prompts", num_prompts),
        ("max_new_tokens", max_new_tokens),
        ("repeats", repeats),
    ):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    forms = _forms(_sizes(group_sizes))

    from jaxsd import models
    from jaxsd.models import corpus

    from . import measure, pair

    began = time.perf_counter()
    original = pair.load_target(target)
    stored = [_store(form, original) for form in forms]
    texts = pair.load_prompts(None)[:num_prompts]
    requests = measure.pad_prompts([original.tokenizer.encode(text.text) for text in texts])
    windows = corpus.held_out_windows(
        _held_out_tokens(original.tokenizer), num_windows, sequence_length
    )

    losses = [_losses(one, windows) for one in stored]
    decoded = _decode(stored, requests, num_draft_tokens, max_new_tokens, repeats, seed)
    ratios = {rows: _pass_ratios(stored, rows, 5 * repeats) for rows in PASS_ROWS}
    result = {
        "device": info_lib.describe_device(),
        "parameters": models.num_parameters(original.config),
        "num_draft_tokens": num_draft_tokens,
        "held_out_tokens": windows[:, 1:].size,
        "prompts": len(requests),
        "new_tokens_per_prompt": max_new_tokens,
        "repeats": repeats,
        "forms": [
            {
                "name": one.form.name,
                "bits": one.form.bits,
                "group_size": one.form.group_size,
                "embeddings": one.form.embeddings,
                "int8_cache": one.form.has_small_cache,
                "bytes": one.num_bytes,
                "cache_bytes_per_token": one.cache_bytes_per_token,
                "nats_per_token": float(nats.mean()),
                "nats_more": float((nats - losses[0]).mean()),
                "nats_more_standard_error": _standard_error(nats - losses[0]),
                "pass_time_ratio": {str(rows): ratios[rows][index] for rows in PASS_ROWS},
                "as_draft": [
                    _describe(heat, decoded[index, heat], decoded[-1, heat])
                    for heat in TEMPERATURES
                ],
            }
            for index, (one, nats) in enumerate(zip(stored, losses, strict=True))
        ],
        "seconds": time.perf_counter() - began,
        "versions": info_lib.versions(),
    }
    _show(result)
    return result


def _forms(group_sizes: list[int]) -> list[Form]:
    """The unquantised form first."""
    return [
        Form("float32", None),
        Form("float32, int8 cache", None, has_small_cache=True),
        Form("int8", 8),
        Form("int8, also embeddings", 8, embeddings=True),
        *(Form(f"int4 by {size}", 4, size) for size in sorted(group_sizes)),
        Form("int4 by channel", 4),
    ]


def _sizes(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"group_sizes={text!r} must be whole numbers above 0, separated by commas")
    return sorted({int(part) for part in parts})


def _store(form: Form, original: Any) -> Stored:
    from jaxsd import models

    params = original.params
    if form.bits is not None:
        params = models.quantise(params, form.bits, form.group_size, embeddings=form.embeddings)
    dtype = jnp.int8 if form.has_small_cache else jnp.float32
    model = models.language_model(original.config, dtype)
    cache = jax.eval_shape(lambda: model.init_cache(1, 1))
    return Stored(form, model, params, models.bytes_of(params), models.bytes_of(cache))


def _held_out_tokens(tokenizer: Any) -> np.ndarray:
    """The held-out side of the standard library as one stream."""
    from jaxsd.models import corpus

    files = corpus.read_files(
        corpus.standard_library(), (".py",), exclude=corpus.STANDARD_LIBRARY_EXCLUDE
    )
    _, documents = corpus.split_documents(files.documents)
    encoded = tokenizer.encode_batch([document.text for document in documents])
    return np.concatenate([np.array([*ids, tokenizer.eos_id], np.int32) for ids in encoded])


def _losses(one: Stored, windows: np.ndarray, batch_size: int = 8) -> np.ndarray:
    """Nats per token of every window `[N]`, read through the cache."""
    from jaxsd.models import training

    @jax.jit
    def nats(params: Any, windows: jax.Array, positions: jax.Array) -> jax.Array:
        cache = one.model.init_cache(windows.shape[0], windows.shape[1] - 1)
        logits, _ = one.model.apply(params, windows[:, :-1], positions, cache)
        return training.cross_entropy(logits, windows[:, 1:]).mean(axis=1)

    found = []
    for start in range(0, len(windows), batch_size):
        part = windows[start : start + batch_size]
        positions = np.broadcast_to(np.arange(part.shape[1] - 1, dtype=np.int32), part[:, 1:].shape)
        found.append(np.asarray(nats(one.params, part, positions), np.float64))
    return np.concatenate(found)


def _standard_error(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None


def _decode(
    stored: list[Stored], requests: list[Any], num_tokens: int, new: int, repeats: int, seed: int
) -> dict[tuple[int, float], list[Drafting]]:
    """By form and temperature, one entry per repeat; plain decoding is number -1."""
    from jaxsd import models

    target = stored[0]
    max_len = requests[0].tokens.shape[1] + new + 1
    drafters = {-1: jaxsd.no_drafter()}
    for index, one in enumerate(stored):
        drafters[index] = models.quantised_self(one.model, num_tokens)
    ways = {
        index: (
            jaxsd.speculative(target.model, drafter, max_len=max_len),
            {"target": target.params, "draft": stored[max(index, 0)].params},
        )
        for index, drafter in drafters.items()
    }
    found: dict[tuple[int, float], list[Drafting]] = {}
    for repeat in range(-1, repeats):  # the first time compiles
        for heat in TEMPERATURES:
            for index, (decoder, params) in ways.items():
                done = []
                seconds = 0.0
                for number, request in enumerate(requests if repeat >= 0 else requests[:1]):
                    key = jax.random.fold_in(jax.random.key(seed + max(repeat, 0)), number)
                    state = request.start(decoder, params, key, heat, new)
                    began = time.perf_counter()
                    done.append(jax.block_until_ready(decoder.run(params, state, jaxsd.UNTIL_DONE)))
                    seconds += time.perf_counter() - began
                if repeat < 0:
                    continue
                stats = jax.tree.map(
                    lambda *leaves: np.concatenate(leaves).sum(0),
                    *(jax.device_get(state.stats) for state in done),
                )
                tokens = [np.asarray(state.tokens)[0].tolist() for state in done]
                found.setdefault((index, heat), []).append(Drafting(seconds, stats, tokens))
    return found


def _describe(heat: float, mine: list[Drafting], plain: list[Drafting]) -> dict[str, Any]:
    stats = jax.tree.map(lambda *leaves: np.sum(leaves, axis=0), *(one.stats for one in mine))
    ratios = [base.seconds / one.seconds for base, one in zip(plain, mine, strict=True)]
    equal = [base.tokens == one.tokens for base, one in zip(plain, mine, strict=True)]
    return {
        "temperature": heat,
        "acceptance_rate": float(jaxsd.stats.acceptance_rate(stats)),
        "mean_acceptance_length": float(jaxsd.stats.mean_acceptance_length(stats)),
        "outputs_equal": all(equal) if heat == 0 else None,
        "speedup": statistics.median(ratios),
    }


def _pass_ratios(stored: list[Stored], num_rows: int, repeats: int) -> list[float]:
    """Seconds of a pass over the unquantised model's, each the median of turns side by side."""
    timers = [_pass_timer(one, num_rows) for one in stored]
    turns = [[timer() for timer in timers] for _ in range(repeats)]
    ratios = [[seconds / turn[0] for seconds in turn] for turn in turns]
    return [statistics.median(column) for column in zip(*ratios, strict=True)]


def _pass_timer(
    one: Stored, num_rows: int, num_passes: int = 8, context: int = 128
) -> Callable[[], float]:
    """Seconds of a pass over `num_rows` tokens of one text, in a compiled loop."""

    @jax.jit
    def passes(params: Any, block: jax.Array, cache: Any) -> Any:
        positions = context + jnp.arange(num_rows, dtype=jnp.int32)[None, :]

        def body(_: jax.Array, carry: Any) -> Any:
            block, cache = carry
            logits, cache = one.model.apply(params, block, positions, cache)
            # The next block is made of this one's scores; independent passes could be merged.
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, num_passes, body, (block, cache))

    block = jnp.zeros((1, num_rows), jnp.int32)
    cache = one.model.init_cache(1, context + num_rows)

    def timer() -> float:
        began = time.perf_counter()
        jax.block_until_ready(passes(one.params, block, cache))
        return (time.perf_counter() - began) / num_passes

    timer()
    return timer


def _show(result: dict[str, Any]) -> None:
    console = rich.console.Console(highlight=False)
    columns = ("MB", "nats/token", "more (s.e.)", *(f"pass of {rows}" for rows in PASS_ROWS))
    table = _table(f"{result['parameters']:,} parameters", columns)
    for form in result["forms"]:
        error = form["nats_more_standard_error"]
        table.add_row(
            form["name"],
            f"{form['bytes'] / 1e6:.1f}",
            f"{form['nats_per_token']:.4f}",
            f"{form['nats_more']:+.4f}" + ("" if error is None else f" ({error:.4f})"),
            *(f"{form['pass_time_ratio'][str(rows)]:.2f}" for rows in PASS_ROWS),
        )
    console.print(table)
    for place, heat in enumerate(TEMPERATURES):
        table = _table(f"As the original's draft, T = {heat:g}", ("accepted", "length", "speed-up"))
        for form in result["forms"]:
            draft = form["as_draft"][place]
            table.add_row(
                form["name"],
                f"{draft['acceptance_rate']:.3f}",
                f"{draft['mean_acceptance_length']:.2f}",
                f"{draft['speedup']:.2f}",
            )
        console.print(table)
    is_equal = all(form["as_draft"][0]["outputs_equal"] for form in result["forms"])
    console.print(
        f"{result['device']}; batch 1, K = {result['num_draft_tokens']}, {result['prompts']} "
        f"prompts, {result['new_tokens_per_prompt']} tokens each, {result['repeats']} repeats in "
        f"turns; loss over {result['held_out_tokens']:,} tokens. Speed-up: over plain decoding of "
        "the unquantised model; its greedy text came out "
        f"{'equal' if is_equal else 'DIFFERENT'} with every draft. Pass: seconds over those of the "
        f"first line. Everything took {result['seconds']:.0f} s."
    )


def _table(title: str, columns: Sequence[str]) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title=title)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    return table
