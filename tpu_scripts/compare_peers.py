"""How fast are we beside transformers, with the same weights, and do both say the same?

    pip install -e '.[parity]'
    python tpu_scripts/compare_peers.py --out tpu_scripts/results/compare_peers_cpu.json

Models of about 30M and 120M parameters are written by `models.export_hf` and read by transformers:
plain and assisted generation, in float32 and bfloat16, at batch 1 and 8 (assisted at 1, which is
all it can). Greedy, without an end of text, prompts read within the time on both sides. All ways
take turns; ratios are medians over turns of one way's seconds over the other's of the same turn.

Random weights speculate as follows: the draft is the target's first layers, and what the layers
after them write is scaled down, so that both often agree while every pass costs what it did. Both
sides draft the same number of tokens a round, and rounds are counted on both.
"""

import dataclasses
import importlib.util
import os
import pathlib
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import shared

from jaxsd import costmodel, models
from jaxsd.cli import timing


class Pair(NamedTuple):
    """Target and draft, and where transformers finds them."""

    name: str
    target: shared.LoadedModel
    draft: shared.LoadedModel
    target_folder: pathlib.Path
    draft_folder: pathlib.Path


class Way(NamedTuple):
    """One way of decoding."""

    name: str
    batch: int
    run: Callable[[], tuple[np.ndarray, int]]  # [B, new] tokens, and passes of the target


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Times all ways, prints ratios and returns the document."""
    parser = shared.make_parser(__doc__, repeats=10, quick="one pair, short texts, two turns")
    parser.add_argument(
        "--pairs",
        default="random:30m,random:120m",
        help="separated by commas: random:NAME of models.CONFIGS, or embedded (%(default)s)",
    )
    parser.add_argument("--draft-layers", type=shared.positive, default=2, help="(%(default)s)")
    parser.add_argument(
        "--later-scale",
        type=float,
        default=0.2,
        help="factor of what later layers of a random target write (%(default)s)",
    )
    parser.add_argument("--num-tokens", type=shared.positive, default=4, help="drafted a round")
    parser.add_argument("--batches", type=shared.whole_numbers(1), default=[1, 8])
    parser.add_argument("--prompt-tokens", type=shared.positive, default=32, help="(%(default)s)")
    parser.add_argument("--new-tokens", type=shared.positive, default=64, help="(%(default)s)")
    shared.add_chip(parser)
    args = parser.parse_args(argv)
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(f"{' and '.join(missing)} missing: pip install -e '.[parity]'")
    if args.quick:
        args.pairs, args.batches, args.repeats = args.pairs.split(",")[0], [1, 2], 2
        args.prompt_tokens, args.new_tokens, args.draft_layers = 4, 8, 1
    bandwidth, source = shared.peak_of(args.chip, args.quick)
    results = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers warns of is not ours to mend
        for name in args.pairs.split(","):
            pair = make_pair(name, args, pathlib.Path(folder) / name.replace(":", "-"))
            card = shared.show_card([pair.target, pair.draft], bandwidth, source)
            results.append({"pair": name, "card": card, **compare(pair, args, card)})
    return shared.finish(
        "compare_peers",
        argv,
        args.out,
        repeats=args.repeats,
        num_tokens=args.num_tokens,
        new_tokens=args.new_tokens,
        prompt_tokens=args.prompt_tokens,
        later_scale=args.later_scale,
        draft_layers=args.draft_layers,
        peers=peer_versions(),
        results=results,
    )


def make_pair(name: str, args: Any, folder: pathlib.Path) -> Pair:
    """The pair, and both models in folders that transformers reads.

    Raises:
      ValueError: the name is unknown, or the draft would be no smaller than the target.
    """
    target = shared.load("target", name, "float32", args.seed)
    if name == "embedded":
        draft = shared.load("draft", name, "float32", args.seed)
    else:
        config = target.config
        if args.draft_layers >= config.n_layers:
            raise ValueError(
                f"--draft-layers {args.draft_layers} must be below {config.n_layers}, those of "
                f"{name}"
            )
        params = scale_later(target.params, args.draft_layers, args.later_scale)
        target = shared.make_loaded(target.name, config, params, None)
        first = dataclasses.replace(config, n_layers=args.draft_layers)
        layers = {str(layer): params["layers"][str(layer)] for layer in range(args.draft_layers)}
        draft = shared.make_loaded("its first layers", first, {**params, "layers": layers}, None)
    folders = folder / "target", folder / "draft"
    for where, one in zip(folders, (target, draft), strict=True):
        models.export_hf(where, one.config, jax.device_get(one.params))
    return Pair(name, target, draft, *folders)


def scale_later(params: Any, first: int, scale: float) -> dict[str, Any]:
    """The weights with what layers from `first` on add to the residual stream scaled."""
    layers = {}
    for name, layer in params["layers"].items():
        if int(name) >= first:
            attention = {**layer["attention"], "out": layer["attention"]["out"] * scale}
            layer = {
                **layer,
                "attention": attention,
                "mlp": {**layer["mlp"], "down": layer["mlp"]["down"] * scale},
            }
        layers[name] = layer
    return {**params, "layers": layers}


def our_ways(pair: Pair, args: Any, prompts: dict[int, np.ndarray]) -> list[Way]:
    """Plain decoding at every batch size, and speculation at batch 1."""
    max_len = args.prompt_tokens + args.new_tokens
    params = {"target": pair.target.params, "draft": pair.draft.params}

    def way(name: str, batch: int, num_tokens: int) -> Way:
        decoder = shared.no_end(pair.target, num_tokens, pair.draft, max_len)

        def run() -> tuple[np.ndarray, int]:
            out = decoder.generate(
                params, prompts[batch], None, jax.random.key(0), max_new_tokens=args.new_tokens
            )
            tokens = np.asarray(out.tokens)[:, args.prompt_tokens : max_len]
            return tokens, int(np.max(np.asarray(out.stats.num_rounds)))

        return Way(name, batch, run)

    ways = [way("jaxsd plain", batch, 0) for batch in args.batches]
    if 1 in args.batches:
        ways.append(way("jaxsd speculative", 1, args.num_tokens))
    return ways


def their_ways(pair: Pair, args: Any, prompts: dict[int, np.ndarray], dtype: str) -> list[Way]:
    """The same by transformers, in one type of numbers."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)

    def read(folder: pathlib.Path) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        )
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return model.eval()

    target, draft = read(pair.target_folder), read(pair.draft_folder)
    draft.generation_config.num_assistant_tokens = args.num_tokens
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    passes = [0]

    def count(*_: Any) -> None:
        passes[0] += 1

    target.register_forward_hook(count)

    def way(name: str, batch: int, **options: Any) -> Way:
        tokens = torch.tensor(prompts[batch], dtype=torch.long)
        mask = torch.ones_like(tokens)

        def run() -> tuple[np.ndarray, int]:
            passes[0] = 0
            with torch.inference_mode():
                out = target.generate(
                    tokens,
                    attention_mask=mask,
                    do_sample=False,
                    max_new_tokens=args.new_tokens,
                    min_new_tokens=args.new_tokens,
                    **options,
                )
            return out[:, args.prompt_tokens :].numpy(), passes[0]

        return Way(f"transformers {name} {dtype}", batch, run)

    ways = [way("plain", batch) for batch in args.batches]
    if 1 in args.batches:
        ways.append(way("assisted", 1, assistant_model=draft))
    return ways


def compare(pair: Pair, args: Any, card: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second of every way, ratios of pairs of them, and whether texts are equal."""
    prompts = {
        batch: shared.text_prompts(pair.target, batch, args.prompt_tokens, args.seed)
        for batch in args.batches
    }
    ways = our_ways(pair, args, prompts)
    for dtype in ("float32", "bfloat16"):
        ways += their_ways(pair, args, prompts, dtype)
    shared.progress("compiling, and one run of every way that nothing times")
    texts = {(way.name, way.batch): way.run() for way in ways}

    def timer(way: Way) -> timing.Timer:
        def run() -> float:
            time.sleep(0.05)  # torch's threads spin for a while after they have done
            return timing.seconds_of(way.run).seconds

        return run

    seconds = timing.in_turns([timer(way) for way in ways], args.repeats, shared.progress)
    column = {(way.name, way.batch): seconds[:, index] for index, way in enumerate(ways)}
    rows = []
    for way in ways:
        tokens, passes = texts[way.name, way.batch]
        ours = texts["jaxsd plain", way.batch][0]
        taken = column[way.name, way.batch]
        rows.append(
            {
                "way": way.name,
                "batch": way.batch,
                "tokens_per_second": way.batch * args.new_tokens / float(np.median(taken)),
                "seconds": taken.tolist(),
                "target_passes": passes,
                "equal_tokens": float(np.mean(tokens == ours)),
            }
        )
    floor = float(
        costmodel.pass_bytes(
            shared.shape_of(pair.target.config),
            1,
            1,
            args.prompt_tokens + args.new_tokens / 2,
            pair.target.formats,
        )
    )
    ceiling = card["bytes_per_second"] / floor
    shared.say("\nway                              batch  tokens/s  passes  tokens equal to ours")
    for row in rows:
        shared.say(
            f"{row['way']:<32} {row['batch']:5} {row['tokens_per_second']:9.1f} "
            f"{row['target_passes']:7} {row['equal_tokens']:8.1%}"
        )
    ratios = []
    shared.say("\nratio of tokens/s, median over turns (lowest, highest)")
    for batch in args.batches:
        for ours, theirs in (("plain", "plain"), ("speculative", "assisted")):
            mine = column.get((f"jaxsd {ours}", batch))
            for dtype in ("float32", "bfloat16"):
                other = column.get((f"transformers {theirs} {dtype}", batch))
                if mine is not None and other is not None:
                    ratios.append(ratio_of(f"{ours} / {theirs} {dtype}", batch, other / mine))
        if batch == 1:
            base = column["jaxsd plain", 1]
            ratios.append(
                ratio_of("speculative / plain, ours", 1, base / column["jaxsd speculative", 1])
            )
    share = args.new_tokens / float(np.median(column["jaxsd plain", min(args.batches)]))
    share /= ceiling * min(args.batches)
    shared.say(
        f"our plain decoding at batch {min(args.batches)}: {share:.0%} of the "
        f"{ceiling * min(args.batches):.0f} tokens/s at which memory would be read once a token"
    )
    return {
        "ways": rows,
        "ratios": ratios,
        "ceiling_tokens_per_second": ceiling,
        "share_of_ceiling": share,
    }


def ratio_of(name: str, batch: int, ratios: np.ndarray) -> dict[str, Any]:
    """Prints one ratio; JSON values."""
    shared.say(
        f"batch {batch}: {name:<32} {np.median(ratios):.2f}  "
        f"({ratios.min():.2f}, {ratios.max():.2f})"
    )
    return {
        "name": name,
        "batch": batch,
        "median": float(np.median(ratios)),
        "lowest": float(ratios.min()),
        "highest": float(ratios.max()),
    }


def peer_versions() -> dict[str, str]:
    """Versions of what we are compared with."""
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    shared.run(main)
