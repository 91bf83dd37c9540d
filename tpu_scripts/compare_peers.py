"""How fast are we beside other packages with the same weights, and do all say the same?

    pip install -e '.[parity]'
    python tpu_scripts/compare_peers.py --out tpu_scripts/results/compare_peers_cpu.json
    pip install -e '.[openvino]'
    python tpu_scripts/compare_peers.py --peers openvino

Models of about 30M and 120M parameters are written by `models.export_hf` and read by transformers
(plain and assisted generation, float32 and bfloat16) or OpenVINO GenAI (plain and speculative,
float32), at batch 1 and 8 (speculation at 1, which is all that assisted generation can). Greedy,
without an end of text, prompts read within the time on all sides. All ways take turns; ratios are
medians over turns of one way's seconds over the other's of the same turn.

Random weights speculate as follows: the draft is the target's first layers, and what the layers
after them write is scaled down, so that both often agree while every pass costs what it did. All
sides draft the same number of tokens a round, and passes of the target are counted on all.
"""

import dataclasses
import pathlib
import tempfile
import time
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import peers
import shared
from peers import Pair, Way

from jaxsd import costmodel, models
from jaxsd.cli import timing


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Times all ways, prints ratios and returns the document."""
    parser = shared.make_parser(__doc__, repeats=10, quick="one pair, short texts, two turns")
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=peers.MODULES,
        default=["transformers"],
        help="packages to compare with (transformers)",
    )
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
    for peer in args.peers:
        peers.check_installed(peer)
    if args.quick:
        args.pairs, args.batches, args.repeats = args.pairs.split(",")[0], [1, 2], 2
        args.prompt_tokens, args.new_tokens, args.draft_layers = 4, 8, 1
    bandwidth, source = shared.peak_of(args.chip, args.quick)
    results = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what others warn of is not ours to mend
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
        peers=peers.versions(args.peers),
        results=results,
    )


def make_pair(name: str, args: Any, folder: pathlib.Path) -> Pair:
    """The pair, and both models in folders that other packages read.

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

    def way(kind: str, batch: int, num_tokens: int) -> Way:
        decoder = shared.no_end(pair.target, num_tokens, pair.draft, max_len)

        def run() -> tuple[np.ndarray, int]:
            out = decoder.generate(
                params, prompts[batch], None, jax.random.key(0), max_new_tokens=args.new_tokens
            )
            tokens = np.asarray(out.tokens)[:, args.prompt_tokens : max_len]
            return tokens, int(np.max(np.asarray(out.stats.num_rounds)))

        return Way("jaxsd", kind, "float32", batch, run)

    ways = [way("plain", batch, 0) for batch in args.batches]
    if 1 in args.batches:
        ways.append(way("speculative", 1, args.num_tokens))
    return ways


def compare(pair: Pair, args: Any, card: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second of every way, ratios of pairs of them, and whether texts are equal."""
    prompts = {
        batch: shared.text_prompts(pair.target, batch, args.prompt_tokens, args.seed)
        for batch in args.batches
    }
    ways = our_ways(pair, args, prompts)
    for peer in args.peers:
        shared.progress(f"{peer} reads {pair.name}")
        ways += peers.ways(peer, pair, args, prompts)
    shared.progress("compiling, and one run of every way that nothing times")
    ran = [way.run() for way in ways]
    seconds = timing.in_turns([timer(way) for way in ways], args.repeats, shared.progress)
    ours = {
        way.batch: tokens
        for way, (tokens, _) in zip(ways, ran, strict=True)
        if (way.package, way.kind) == ("jaxsd", "plain")
    }
    rows = [
        {
            "way": way.name,
            "batch": way.batch,
            "tokens_per_second": way.batch * args.new_tokens / float(np.median(taken)),
            "seconds": taken.tolist(),
            "target_passes": passes,
            "equal_tokens": float(np.mean(tokens == ours[way.batch])),
        }
        for way, (tokens, passes), taken in zip(ways, ran, seconds.T, strict=True)
    ]
    shared.say("\nway                              batch  tokens/s  passes  tokens equal to ours")
    for row in rows:
        shared.say(
            f"{row['way']:<32} {row['batch']:5} {row['tokens_per_second']:9.1f} "
            f"{row['target_passes']:7} {row['equal_tokens']:8.1%}"
        )
    shared.say("\nratio of tokens/s, median over turns (lowest, highest)")
    taken = {
        (way.package, way.kind, way.dtype, way.batch): seconds[:, i] for i, way in enumerate(ways)
    }
    ratios = [
        ratio_of(f"{way.kind} / {way.name}", way.batch, seconds[:, index] / taken[mine])
        for index, way in enumerate(ways)
        if way.package != "jaxsd" and (mine := ("jaxsd", way.kind, "float32", way.batch)) in taken
    ]
    if 1 in args.batches:
        both = (taken["jaxsd", kind, "float32", 1] for kind in ("plain", "speculative"))
        ratios.append(ratio_of("speculative / plain, ours", 1, np.divide(*both)))
    batch = min(args.batches)
    moved = costmodel.pass_bytes(
        shared.shape_of(pair.target.config),
        batch,
        1,
        args.prompt_tokens + args.new_tokens / 2,
        pair.target.formats,
    )
    ceiling = batch * card["bytes_per_second"] / float(moved)
    share = batch * args.new_tokens / float(np.median(taken["jaxsd", "plain", "float32", batch]))
    share /= ceiling
    shared.say(
        f"our plain decoding at batch {batch}: {share:.0%} of the {ceiling:.0f} tokens/s at which "
        "memory would be read once a pass"
    )
    return {
        "ways": rows,
        "ratios": ratios,
        "ceiling_tokens_per_second": ceiling,
        "share_of_ceiling": share,
    }


def timer(way: Way) -> timing.Timer:
    """Seconds of a whole text, after a pause: threads of others spin for a while when done."""

    def run() -> float:
        time.sleep(0.05)
        return timing.seconds_of(way.run).seconds

    return run


def ratio_of(name: str, batch: int, ratios: np.ndarray) -> dict[str, Any]:
    """Prints one ratio; JSON values."""
    shared.say(
        f"batch {batch}: {name:<48} {np.median(ratios):.2f}  "
        f"({ratios.min():.2f}, {ratios.max():.2f})"
    )
    return {
        "name": name,
        "batch": batch,
        "median": float(np.median(ratios)),
        "lowest": float(ratios.min()),
        "highest": float(ratios.max()),
    }


if __name__ == "__main__":
    shared.run(main)
