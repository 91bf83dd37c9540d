"""What every script here does alike: arguments, models by name, the card, the JSON at the end."""

import argparse
import datetime
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxsd
from jaxsd import costmodel, models
from jaxsd.cli import info, pair, timing
from jaxsd.cli.compile_check import shape_of
from jaxsd.models import checkpoint

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class LoadedModel(NamedTuple):
    """A model to be timed."""

    name: str
    config: models.Config
    params: Any
    tokenizer: Any  # None for random weights
    model: Any  # the jaxsd.LanguageModel
    formats: costmodel.Formats  # bytes per number


def make_parser(doc: str, repeats: int, quick: str) -> argparse.ArgumentParser:
    """A parser that shows the module's docstring, with the options that all scripts have."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=positive, default=repeats, help="turns (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (%(default)s)")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="the JSON goes here too")
    parser.add_argument("--quick", action="store_true", help=f"a smoke test: {quick}")
    return parser


def add_models(parser: argparse.ArgumentParser) -> None:
    """Options that name a target and a draft, their type, and the chip they run on."""
    kinds = "embedded, a folder, hf:FOLDER, or random:NAME of models.CONFIGS"
    parser.add_argument("--target", default="embedded", help=f"{kinds} (%(default)s)")
    parser.add_argument("--draft", default="embedded", help=f"{kinds} (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(%(default)s)")
    add_chip(parser)


def add_chip(parser: argparse.ArgumentParser) -> None:
    """The option that says whose peaks are the ceiling."""
    parser.add_argument(
        "--chip",
        choices=costmodel.chip_names(),
        help="whose peaks are the ceiling; by default what a plain update in place reaches here",
    )


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def whole_numbers(low: int) -> Callable[[str], list[int]]:
    """A type of argument: whole numbers of at least `low`, separated by commas."""

    def parse(text: str) -> list[int]:
        try:
            values = [int(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} must be whole numbers separated by commas"
            ) from None
        if min(values) < low:
            raise argparse.ArgumentTypeError(f"{text!r} must be numbers of at least {low}")
        return sorted(set(values))

    return parse


def temperatures(text: str) -> list[float]:
    """A type of argument: numbers of at least 0, separated by commas."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers separated by commas") from None
    if not all(0 <= value < np.inf for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers of at least 0")
    return sorted(set(values))


def load(role: str, name: str, dtype: str, seed: int) -> LoadedModel:
    """A model by the name that an option gave.

    Raises:
      ValueError: there is none, or it cannot be read; one line.
    """
    tokenizer, kind = None, name.split(":")[0]
    if kind == "random":
        known = models.CONFIGS
        if name[7:] not in known:
            raise ValueError(f"--{role} {name}: wanted random:NAME, NAME of {', '.join(known)}")
        config = known[name[7:]]
        params = models.init_params(config, jax.random.key(seed), DTYPES[dtype])
    elif kind == "hf":
        config, params, tokenizer, *_ = models.load_hf(name[3:], DTYPES[dtype])
    else:
        embedded = {"target": pair.EMBEDDED_TARGET, "draft": pair.EMBEDDED_DRAFT}[role]
        folder = embedded if name == "embedded" else pathlib.Path(name)
        config, params, tokenizer, _ = checkpoint.load_model(folder, DTYPES[dtype])
    return make_loaded(f"{role} {name}", config, params, tokenizer)


def make_loaded(name: str, config: models.Config, params: Any, tokenizer: Any) -> LoadedModel:
    """A model from its parts."""
    dtype = params["embedding"].dtype
    size = float(dtype.itemsize)
    model = models.language_model(config, dtype)
    return LoadedModel(name, config, params, tokenizer, model, costmodel.Formats(size, size, size))


def load_pair(args: argparse.Namespace) -> tuple[LoadedModel, LoadedModel]:
    """Target and draft of the options.

    Raises:
      ValueError: as `load`, or they do not have one vocabulary.
    """
    target = load("target", args.target, args.dtype, args.seed)
    draft = load("draft", args.draft, args.dtype, args.seed + 1)
    sizes = target.config.vocab_size, draft.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"--target {args.target} has {sizes[0]} tokens and --draft {args.draft} {sizes[1]}: "
            "a pair has one vocabulary"
        )
    return target, draft


def peak_of(chip: str | None, quick: bool) -> tuple[float, str]:
    """Bytes per second of the ceiling, and where the figure comes from."""
    if chip is not None:
        return costmodel.named_chip(chip).bytes_per_second, f"{chip}, datasheet"
    size = 2**24 if quick else 2**28
    return timing.memory_speed(size), "measured: an update in place, reads and writes"


def describe(one: LoadedModel) -> dict[str, Any]:
    """Sizes of a model; JSON values."""
    return {
        "name": one.name,
        "parameters": models.num_parameters(one.config),
        "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(one.params)),
        "dtype": str(one.params["embedding"].dtype),
        "config": one.config.to_dict(),
    }


def show_card(loaded: Sequence[LoadedModel], bandwidth: float, source: str) -> dict[str, Any]:
    """Prints device, sizes and the ceiling by bandwidth, before anything is timed; the same."""
    card: dict[str, Any] = {
        "device": info.describe_device(),
        "bytes_per_second": bandwidth,
        "bytes_per_second_source": source,
        "models": [describe(one) for one in loaded],
    }
    say(f"device            {card['device']}, jax {jax.__version__}")
    say(f"memory            {bandwidth / 1e9:.1f} GB/s ({source})")
    for one, sizes in zip(loaded, card["models"], strict=True):
        moved = float(costmodel.pass_bytes(shape_of(one.config), 1, 1, 0, one.formats))
        sizes["ceiling_passes_per_second"] = bandwidth / moved
        say(
            f"{one.name:<17} {sizes['parameters'] / 1e6:.2f}M parameters, {sizes['dtype']}, "
            f"{moved / 1e6:.1f} MB a pass: at most {bandwidth / moved:.0f} passes/s"
        )
    return card


def say(text: str) -> None:
    """A line for the reader; flushed, so that a killed run has shown what it knew."""
    print(text, flush=True)


def progress(what: str) -> None:
    """A line for whoever waits."""
    print(f"# {what}", file=sys.stderr, flush=True)


def memory_bytes() -> dict[str, int | None]:
    """Peak memory of the device, where it says so, and of this process."""
    stats = jax.devices()[0].memory_stats() or {}
    try:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    except ImportError:
        process = None
    return {"device_peak": stats.get("peak_bytes_in_use"), "process_peak": process}


def finish(script: str, argv: Sequence[str] | None, out: pathlib.Path | None, **figures: Any):
    """Prints the document as the last line of stdout, and writes it where `--out` says."""
    given = sys.argv[1:] if argv is None else list(argv)
    devices = jax.devices()
    document = {
        "script": script,
        "command": shlex.join(["python", f"tpu_scripts/{script}.py", *given]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": info.describe_device(),
        "platform": devices[0].platform,
        "num_devices": len(devices),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {"python": platform.python_version(), **info.versions()},
        "memory": memory_bytes(),
        **figures,
    }
    text = json.dumps(document)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)
    return document


def run(main: Callable[[], Any]) -> None:
    """Calls a script; what was asked wrongly ends in one line and status 2."""
    try:
        main()
    except ValueError as error:
        sys.exit(_one_line(error))


def _one_line(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def _commit() -> str | None:
    """The commit of this checkout, with a mark if files differ from it; None without git."""
    here = pathlib.Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" and changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def text_prompts(target: LoadedModel, batch: int, length: int, seed: int) -> np.ndarray:
    """`[batch, length]` tokens: the package's held-out prompts one after the other, or random."""
    if target.tokenizer is None:
        tokens = np.random.default_rng(seed).integers(0, target.config.vocab_size, batch * length)
        return tokens.reshape(batch, length).astype(np.int32)
    texts = [target.tokenizer.encode(prompt.text) for prompt in pair.load_prompts(None)]
    rows = []
    for row in range(batch):
        tokens: list[int] = []
        while len(tokens) < length:
            tokens = [*texts[(row + seed) % len(texts)], *tokens]
            seed += 1
        rows.append(tokens[-length:])
    return np.array(rows, np.int32)


def no_end(model: LoadedModel, num_tokens: int, draft: LoadedModel | None, max_len: int) -> Any:
    """A decoder that does not stop at an end of text: every run writes as many tokens."""
    drafter = jaxsd.no_drafter()
    if num_tokens and draft is not None:
        drafter = jaxsd.model_drafter(draft.model, num_tokens)
    return jaxsd.speculative(model.model, drafter, jaxsd.rejection_sampling, max_len=max_len)
