"""`jaxsd bench`: which drafter and verifier are fastest here, for one pair of models?

Every way of decoding takes its turn at every prompt, temperature and repeat, beside plain decoding,
so that another process on the machine slows all of them alike. Prompts are read and programs are
compiled before anything is timed.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import rich.box
import rich.console
import rich.progress
import rich.table
import tyro

import jaxsd

from . import info as info_lib

Folder = Annotated[str | None, tyro.conf.arg(metavar="DIR")]

PLAIN = "plain"


class Way(NamedTuple):
    """One way of decoding."""

    name: str
    num_tokens: int  # drafted per round
    drafter: jaxsd.Drafter
    verifier: Any
    siblings: int = 1  # independent drafts of the first place; 0: not independent
    draft_lengths: tuple[int, ...] | None = None  # if a policy chooses among them


class Built(NamedTuple):
    """A way, compiled."""

    way: Way
    decoder: jaxsd.Decoder
    compile_seconds: float
    program_bytes: int  # of the compiled loop, as text
    options: dict[str, Any]  # of the decoder's `start`


def bench(
    verifiers: str = "all",
    num_tokens: str = "2,4,8",
    temperatures: str = "0,0.7,1",
    target: Folder = None,
    draft: Folder = None,
    prompts: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None,
    num_prompts: int = 4,
    max_new_tokens: int = 32,
    repeats: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """Times drafters and verifiers against plain decoding and against each other.

    Batch 1, held-out prompts of the package, float32. A figure is the median over repeats in which
    all ways take turns.

    Args:
      verifiers: names separated by commas, or `all`: chain-rejection, chain-block, chain-matching,
        chain-gumbel, cost-block (the draft length chosen in the loop), lookup-block, ngram-block,
        exit-block, cascade-block, batch-recursive, independent-k-seq, distinct-recursive,
        distinct-traversal, mixed-recursive, chosen-matching, confident-matching.
      num_tokens: tokens drafted per round, separated by commas; a tree has so many nodes.
      temperatures: separated by commas; 0 is greedy.
      target: folder of another target; needs a draft too.
      draft: folder of another draft.
      prompts: file with other prompts, as `python -m jaxsd.cli.prompts` writes it.
      num_prompts: how many of them.
      max_new_tokens: tokens to decode per prompt.
      repeats: how often every way decodes every prompt at every temperature.
      seed: of the random choices.

    Returns:
      Every figure; JSON values.

    Raises:
      ValueError: an argument, a model or the prompts are wrong, in one line.
    """
    lengths = sorted({int(value) for value in _numbers("num_tokens", num_tokens, 1)})
    if any(not value.is_integer() for value in _numbers("num_tokens", num_tokens, 1)):
        raise ValueError(f"num_tokens={num_tokens!r} must be whole numbers")
    asked = _names(verifiers)
    heats = _numbers("temperatures", temperatures, 0)
    for name, value in (
        ("num_prompts", num_prompts),
        ("max_new_tokens", max_new_tokens),
        ("repeats", repeats),
    ):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")

    from jaxsd import models

    from . import measure, pair

    began = time.perf_counter()
    target_, draft_ = pair.load_pair(target, draft)
    texts = pair.load_prompts(prompts)[:num_prompts]
    requests = measure.pad_prompts([target_.tokenizer.encode(text.text) for text in texts])
    target_model = models.language_model(target_.config)
    draft_model = models.language_model(draft_.config)
    params: dict[str, Any] = {"target": target_.params, "draft": draft_.params}
    ways = [
        way
        for count in lengths
        for way in _ways(target_model, draft_model, count, lengths)
        if way.name in asked
    ]
    max_len = requests[0].tokens.shape[1] + max_new_tokens + 1
    plain = Way(PLAIN, 0, jaxsd.no_drafter(), jaxsd.block_verification)
    steps = len(ways) + 2 + repeats * len(heats) * len(requests)
    with _progress(steps) as step:
        if any("ngram" in way.drafter.models for way in ways):
            step("counting n-grams of the standard library")
            params["ngram"] = _ngram_table(target_.tokenizer)
        built = []
        for way in [plain, *ways]:
            step(f"compiling {way.name}, {way.num_tokens} tokens")
            built.append(_build(way, target_model, params, requests, max_len, max_new_tokens))
        rows = _measure(built, params, requests, heats, max_new_tokens, repeats, seed, step)
    plain_rows = [rows[0, heat] for heat in heats]
    bounds = _bounds(target_, draft_, requests, rows, heats, lengths)
    result = {
        "device": info_lib.describe_device(),
        "target_parameters": models.num_parameters(target_.config),
        "draft_parameters": models.num_parameters(draft_.config),
        "batch_size": 1,
        "prompts": len(requests),
        "new_tokens_per_prompt": max_new_tokens,
        "repeats": repeats,
        "seed": seed,
        "temperatures": heats,
        "ways": [
            _describe(one, [rows[index, heat] for heat in heats], plain_rows, heats, bounds)
            for index, one in enumerate(built)
        ],
        "seconds": time.perf_counter() - began,
        "versions": info_lib.versions(),
    }
    _show(result)
    return result


NAMES = (
    "chain-rejection",
    "chain-block",
    "chain-matching",
    "chain-gumbel",
    "cost-block",
    "lookup-block",
    "ngram-block",
    "exit-block",
    "cascade-block",
    "batch-recursive",
    "independent-k-seq",
    "distinct-recursive",
    "distinct-traversal",
    "mixed-recursive",
    "chosen-matching",
    "confident-matching",
)


def _ways(target: Any, draft: Any, count: int, lengths: list[int]) -> list[Way]:
    """All ways of drafting `count` tokens a round."""
    from jaxsd import models

    chain = jaxsd.model_drafter(draft, count)
    # The first layers, a quarter of them; nobody trained the target to be read there.
    part = models.exit_early(target, max(target.config.n_layers // 4, 1))
    paths = 2 if count % 2 == 0 else 1
    parallel, spine = jaxsd.trees.parallel(paths, count // paths), _spine(count)

    def tree(siblings: Any, parents: tuple[int, ...] = spine) -> jaxsd.Drafter:
        return jaxsd.tree_drafter(draft, parents, siblings=siblings)

    ways = [
        Way("chain-rejection", count, chain, jaxsd.rejection_sampling),
        Way("chain-block", count, chain, jaxsd.block_verification),
        Way("chain-matching", count, chain, jaxsd.target_matching),
        Way(
            "chain-gumbel",
            count,
            jaxsd.model_drafter(draft, count, shares_noise=True),
            jaxsd.gumbel_coupling,
        ),
        Way("lookup-block", count, jaxsd.prompt_lookup(count), jaxsd.block_verification, 0),
        Way("ngram-block", count, jaxsd.ngram_drafter(count), jaxsd.block_verification, 0),
        Way(
            "exit-block",
            count,
            jaxsd.early_exit_drafter(part, count),
            jaxsd.block_verification,
            0,
        ),
        Way(
            "cascade-block",
            count,
            jaxsd.cascade_drafter(draft, jaxsd.prompt_lookup(min(count, 2)), count),
            jaxsd.block_verification,
        ),
        Way(
            "batch-recursive",
            count,
            tree("independent", parallel),
            jaxsd.recursive_rejection,
            paths,
        ),
        Way("independent-k-seq", count, tree("independent", parallel), jaxsd.k_sequential, paths),
        Way("distinct-recursive", count, tree("distinct"), jaxsd.recursive_rejection, 0),
        Way("distinct-traversal", count, tree("distinct"), jaxsd.traversal_verification, 0),
        Way("mixed-recursive", count, tree("mixed"), jaxsd.recursive_rejection, 0),
        Way("chosen-matching", count, tree("chosen"), jaxsd.target_matching, 0),
    ]
    depth = (count + 1) // 2
    ways.append(
        Way(
            "confident-matching",
            count,
            jaxsd.confident_tree_drafter(draft, count, depth=depth, width=2),
            jaxsd.target_matching,
            0,
        )
    )
    if count == lengths[-1]:
        choice = (0, *lengths)
        ways.append(Way("cost-block", count, chain, jaxsd.block_verification, 1, choice))
    return ways


def _ngram_table(tokenizer: Any) -> jaxsd.NGramTable:
    """Of the standard library's files from which no prompt of the package is taken."""
    from jaxsd.models import corpus

    files = corpus.read_files(
        corpus.standard_library(), (".py",), exclude=corpus.STANDARD_LIBRARY_EXCLUDE
    )
    documents, _ = corpus.split_documents(files.documents)
    texts = tokenizer.encode_batch([document.text for document in documents])
    return jaxsd.ngram_table(texts, tokenizer.vocab_size)


def _policy(
    decoder: jaxsd.Decoder, params: Any, requests: list[Any], new: int
) -> jaxsd.LengthPolicy:
    """For a way that chooses its draft length: what a round of each length takes, in a trial."""
    seconds = []
    for count in range(decoder.num_tokens + 1):
        policy = jaxsd.fixed_length(count)
        each = []
        for request in requests:
            state = request.start(decoder, params, jax.random.key(0), 1.0, new, policy=policy)
            began = time.perf_counter()
            state = jax.block_until_ready(decoder.run(params, state, jaxsd.UNTIL_DONE))
            each.append((time.perf_counter() - began) / int(state.stats.num_rounds[0]))
        seconds.append(statistics.median(each))
    return jaxsd.cost_aware_length(seconds)


def _spine(count: int) -> tuple[int, ...]:
    """A chain of which every node but the last has a sibling, as far as `count` nodes reach."""
    parents: list[int] = []
    last = -1
    while len(parents) < count:
        first = len(parents)
        parents += [last, last][: count - len(parents)]
        last = first
    return tuple(parents)


def _build(
    way: Way, target: Any, params: Any, requests: list[Any], max_len: int, new: int
) -> Built:
    decoder = jaxsd.speculative(
        target, way.drafter, way.verifier, max_len=max_len, draft_lengths=way.draft_lengths
    )
    state = requests[0].start(decoder, params, jax.random.key(0), 1.0, 2)
    began = time.perf_counter()
    compiled = decoder.run.lower(params, state, jaxsd.UNTIL_DONE).compile()
    seconds = time.perf_counter() - began
    text = compiled.as_text()
    jax.block_until_ready(decoder.run(params, state, jaxsd.UNTIL_DONE))
    options = {}
    if way.draft_lengths is not None:
        options = {"policy": _policy(decoder, params, requests, new)}
    return Built(way, decoder, seconds, len(text or ""), options)


class Row(NamedTuple):
    """One way's texts of one repeat at one temperature, all prompts together."""

    seconds: float
    num_tokens: int
    stats: jaxsd.Statistics  # sums over prompts
    tokens: np.ndarray  # [N, L]


def _measure(
    built: list[Built],
    params: Any,
    requests: list[Any],
    heats: list[float],
    new: int,
    repeats: int,
    seed: int,
    step: Callable[[str], None],
) -> dict[tuple[int, float], list[Row]]:
    """By way and temperature: one row per repeat."""
    rows: dict[tuple[int, float], list[Row]] = {}
    for repeat in range(repeats):
        key = jax.random.fold_in(jax.random.key(seed), repeat)
        for heat in heats:
            parts: list[list[tuple[float, Any]]] = [[] for _ in built]
            for number, request in enumerate(requests):
                step(f"decoding, repeat {repeat + 1} of {repeats}")
                row_key = jax.random.fold_in(key, number)
                # Another order every time: no way always follows the same other one.
                for turn in range(len(built)):
                    index = (turn + repeat + number) % len(built)
                    decoder, options = built[index].decoder, built[index].options
                    state = request.start(decoder, params, row_key, heat, new, **options)
                    began = time.perf_counter()
                    state = jax.block_until_ready(decoder.run(params, state, jaxsd.UNTIL_DONE))
                    parts[index].append((time.perf_counter() - began, state))
            for index, done in enumerate(parts):
                stats = jax.tree.map(
                    lambda *leaves: np.concatenate(leaves).sum(0),
                    *(jax.device_get(state.stats) for _, state in done),
                )
                tokens = np.concatenate([np.asarray(state.tokens) for _, state in done])
                seconds = sum(one for one, _ in done)
                row = Row(seconds, new * len(requests), stats, tokens)
                rows.setdefault((index, heat), []).append(row)
    return rows


def _bounds(
    target: Any,
    draft: Any,
    requests: list[Any],
    rows: dict[tuple[int, float], list[Row]],
    heats: list[float],
    lengths: list[int],
) -> dict[tuple[float, int], float]:
    """What optimal transport accepts of one place of k independent drafts, on the plain texts."""
    from jaxsd.models import transformer

    counts = sorted({1, *(2 for length in lengths if length % 2 == 0)})

    @jax.jit
    def bounds(tokens: jax.Array, heat: jax.Array) -> list[jax.Array]:
        sampling = jaxsd.Sampling(heat)
        laws = [
            jaxsd.probabilities(transformer.forward(one.config, one.params, tokens), sampling)
            for one in (target, draft)
        ]
        return [jaxsd.optimal_acceptance(laws[0], laws[1], count) for count in counts]

    found: dict[tuple[float, int], float] = {}
    for heat in heats:
        tokens = rows[0, heat][0].tokens
        by_count = jax.device_get(bounds(tokens, np.float32(heat)))
        new = rows[0, heat][0].num_tokens // len(requests)
        for count, values in zip(counts, by_count, strict=True):
            # Place i is about token i + 1: the tokens that were decoded, of each row.
            places = [
                values[index, request.length - 1 : request.length - 1 + new]
                for index, request in enumerate(requests)
            ]
            found[heat, count] = float(np.mean(places))
    return found


def _describe(
    one: Built,
    rows: list[list[Row]],
    plain: list[list[Row]],
    heats: list[float],
    bounds: dict[tuple[float, int], float],
) -> dict[str, Any]:
    """A way's figures at every temperature."""
    figures = []
    for heat, mine, others in zip(heats, rows, plain, strict=True):
        stats = jax.tree.map(lambda *leaves: np.sum(leaves, axis=0), *(row.stats for row in mine))
        ratios = [base.seconds / row.seconds for base, row in zip(others, mine, strict=True)]
        by_position = jaxsd.stats.acceptance_by_position(stats)
        figures.append(
            {
                "temperature": heat,
                "tokens_per_second": statistics.median(r.num_tokens / r.seconds for r in mine),
                "speedup": statistics.median(ratios),
                "speedup_min": min(ratios),
                "speedup_max": max(ratios),
                "acceptance_rate": float(jaxsd.stats.acceptance_rate(stats)),
                "mean_acceptance_length": float(jaxsd.stats.mean_acceptance_length(stats)),
                "acceptance_by_position": np.asarray(by_position).tolist(),
                "first_place_bound": bounds.get((heat, one.way.siblings)),
                "equals_plain": all(
                    np.array_equal(row.tokens, base.tokens)
                    for row, base in zip(mine, others, strict=True)
                )
                if heat == 0
                else None,
            }
        )
    return {
        "name": one.way.name,
        "num_draft_tokens": one.way.num_tokens,
        "compile_seconds": one.compile_seconds,
        "program_bytes": one.program_bytes,
        "figures": figures,
    }


def _show(result: dict[str, Any]) -> None:
    """A table per temperature, fastest first."""
    console = rich.console.Console(highlight=False)
    for index, heat in enumerate(result["temperatures"]):
        title = "greedy" if heat == 0 else f"temperature {heat:g}"
        table = rich.table.Table(
            box=rich.box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1, 0, 0)
        )
        table.add_column("", no_wrap=True)
        for name in ("K", "tokens/s", "speed-up", "lowest", "highest", "length", "first", "bound"):
            table.add_column(name, justify="right", no_wrap=True)
        ways = sorted(result["ways"], key=lambda way: -way["figures"][index]["tokens_per_second"])
        for way in ways:
            one = way["figures"][index]
            is_plain = way["name"] == PLAIN
            bound = one["first_place_bound"]
            table.add_row(
                way["name"],
                "" if is_plain else str(way["num_draft_tokens"]),
                f"{one['tokens_per_second']:.0f}",
                "1" if is_plain else f"{one['speedup']:.2f}",
                "" if is_plain else f"{one['speedup_min']:.2f}",
                "" if is_plain else f"{one['speedup_max']:.2f}",
                f"{one['mean_acceptance_length']:.2f}",
                "" if is_plain else f"{one['acceptance_by_position'][0]:.2f}",
                "" if is_plain or bound is None else f"{bound:.2f}",
                style="bold" if is_plain else None,
            )
        console.print(table)
    compiling = [way["compile_seconds"] for way in result["ways"]]
    sizes = [way["program_bytes"] / 1e3 for way in result["ways"]]
    console.print(
        f"{result['device']}; batch 1, {result['prompts']} prompts, "
        f"{result['new_tokens_per_prompt']} tokens each, medians of {result['repeats']} repeats in "
        "which all take turns. Length: tokens per target pass. First: share of rounds that accept "
        "a token at all; bound: what optimal transport would accept of independent drafts. "
        f"Compiling a loop took {min(compiling):.0f} to {max(compiling):.0f} s; its text has "
        f"{min(sizes):.0f} to {max(sizes):.0f} kB. Everything took {result['seconds']:.0f} s."
    )


@contextlib.contextmanager
def _progress(steps: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; the function given advances it, saying what comes next."""
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(
        *rich.progress.Progress.get_default_columns(),
        rich.progress.TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task("starting", total=steps)
        done = -1

        def step(what: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=max(done, 0), description=what)

        yield step


def _numbers(name: str, text: str, low: float) -> list[float]:
    """Numbers separated by commas."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{name}={text!r} must be numbers separated by commas") from error
    if not values or any(not math.isfinite(value) or value < low for value in values):
        raise ValueError(f"{name}={text!r} must be at least {low:g}")
    return values


def _names(verifiers: str) -> list[str]:
    """The ways that were asked for."""
    names = [name.strip() for name in verifiers.split(",")]
    if names == ["all"]:
        return list(NAMES)
    if not set(names) <= set(NAMES):
        unknown = [name for name in names if name not in NAMES]
        raise ValueError(f"verifiers has {unknown}; wanted all, or some of {', '.join(NAMES)}")
    return names
