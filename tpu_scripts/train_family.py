"""How good are drafts of many widths and depths for one target? A line of JSON for every draft.

    python tpu_scripts/train_family.py --folder runs/family --widths 64,96,128 --depths 1,2,4

Trains a draft of every width and depth on the same tokens as all others, with the target's
tokenizer, and measures loss and acceptance on held-out text. A run can be killed at any time: the
same command goes on where it was, and drafts that are done are not trained again. The lines are in
`FOLDER/family.jsonl`, the models in `FOLDER/<name>/model`. `FOLDER/acceptance.csv` holds what
`jaxsd fit acceptance` reads, `FOLDER/loss.csv` what `jaxsd fit loss` reads.
"""

import csv
import json
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import shared

from jaxsd import models
from jaxsd.cli import measure, pair
from jaxsd.cli import train as train_lib
from jaxsd.models import checkpoint, corpus

LINES = "family.jsonl"
# Columns of the tables, of those that a line holds.
TABLES = {
    "acceptance.csv": ("name", "draft_perplexity", "target_perplexity", "alpha"),
    "loss.csv": ("name", "parameters_total", "training_tokens", "loss", "n_layers", "d_model"),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains what is not trained yet, writes the lines and returns the document."""
    parser = shared.make_parser(__doc__, repeats=1, quick="two drafts of two steps")
    numbers = shared.whole_numbers(1)
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="of all runs")
    parser.add_argument("--target", metavar="FOLDER", help="by default the embedded target")
    parser.add_argument("--corpus", metavar="FOLDER", help="by default the standard library")
    parser.add_argument("--widths", type=numbers, default=[64, 96, 128], help="d_model")
    parser.add_argument("--depths", type=numbers, default=[1, 2, 4], help="layers")
    parser.add_argument("--head-dim", type=shared.positive, default=32, help="(%(default)s)")
    parser.add_argument("--steps", type=shared.positive, default=1000, help="(%(default)s)")
    parser.add_argument("--batch-size", type=shared.positive, default=16, help="(%(default)s)")
    parser.add_argument("--sequence-length", type=shared.positive, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="(%(default)s)")
    parser.add_argument("--windows", type=shared.positive, default=64, help="held out, measured")
    args = parser.parse_args(argv)
    if args.quick:
        args.widths, args.depths, args.steps = args.widths[:2], args.depths[:1], 2
        args.batch_size, args.sequence_length, args.windows = 2, 16, 2
    for width in args.widths:
        if width % args.head_dim:
            parser.error(f"--widths {width} is no multiple of --head-dim {args.head_dim}")
    folder = args.target or str(pair.EMBEDDED_TARGET)
    target = checkpoint.load_model(folder)
    loaded = shared.make_loaded(
        f"target {args.target or 'embedded'}", target.config, target.params, target.tokenizer
    )
    bandwidth, source = shared.peak_of(None, args.quick)
    card = shared.show_card([loaded], bandwidth, source)
    tokens = args.steps * args.batch_size * args.sequence_length
    shared.say(
        f"to train          {len(args.widths) * len(args.depths)} drafts, {tokens / 1e6:.2f}M "
        "tokens each"
    )
    if args.corpus is None:
        where, suffixes = corpus.standard_library(), (".py",)
        files = corpus.read_files(where, suffixes, exclude=corpus.STANDARD_LIBRARY_EXCLUDE)
    else:
        files = corpus.read_files(args.corpus, train_lib.TEXT_SUFFIXES)
    held_out = corpus.encode_corpus(files, target.tokenizer).held_out
    windows = corpus.held_out_windows(held_out, args.windows, args.sequence_length)
    args.folder.mkdir(parents=True, exist_ok=True)
    lines = []
    shared.say("\ndraft           parameters  tokens   loss   alpha  greedy  seconds")
    for depth in args.depths:
        for width in args.widths:
            line = train_one(args, folder, target, width, depth, tokens, windows)
            lines.append(line)
            write_lines(args.folder, lines)
            shared.say(
                f"{line['name']:<14} {line['parameters_total'] / 1e6:10.3f}M "
                f"{line['training_tokens'] / 1e6:6.2f}M {line['loss']:6.3f} {line['alpha']:7.3f} "
                f"{line['greedy_agreement']:7.3f} {line['seconds']:8.1f}"
            )
            print(json.dumps(line), flush=True)
    return shared.finish("train_family", argv, args.out, card=card, drafts=lines)


def train_one(
    args: Any,
    target_folder: str,
    target: checkpoint.Pretrained,
    width: int,
    depth: int,
    tokens: int,
    windows: np.ndarray,
) -> dict[str, Any]:
    """One draft, trained if it is not yet, and what it is worth to the target."""
    name = f"w{width}-l{depth}"
    began = time.perf_counter()
    trained = train_lib.train(
        str(args.folder / name),
        config="embedded-draft",
        corpus=args.corpus,
        tokenizer=target_folder,
        d_model=width,
        n_layers=depth,
        n_heads=width // args.head_dim,
        n_kv_heads=1,
        head_dim=args.head_dim,
        # The proportion of the embedded draft, in whole tiles.
        d_ff=max(16, round(width * 10 / 3 / 16) * 16),
        steps=args.steps,
        batch_size=args.batch_size,
        sequence_length=args.sequence_length,
        learning_rate=args.learning_rate,
        warmup_steps=min(150, args.steps // 10),
        eval_batches=max(1, args.windows // args.batch_size),
        seed=args.seed,
        progress=False,
    )
    draft = checkpoint.load_model(trained["model"])
    overlap = measure.make_overlap(target, draft)
    inputs = windows[:, :-1].astype(np.int32)
    by_temperature = {
        heat: np.mean([overlap(row[None], heat)[0].mean() for row in inputs]) for heat in (1.0, 0.0)
    }
    losses = [held_out_loss(model, windows) for model in (draft, target)]
    return {
        "name": name,
        "d_model": width,
        "n_layers": depth,
        "d_ff": draft.config.d_ff,
        "parameters_total": models.num_parameters(draft.config),
        "target_parameters_total": models.num_parameters(target.config),
        "training_tokens": tokens,
        "loss": losses[0],
        "target_loss": losses[1],
        "draft_perplexity": math.exp(losses[0]),
        "target_perplexity": math.exp(losses[1]),
        # Teacher-forced on held-out text: the probability that a sampled token is accepted, and
        # how often both prefer the same token.
        "alpha": float(by_temperature[1.0]),
        "greedy_agreement": float(by_temperature[0.0]),
        "train_nats_per_token": trained["train_nats_per_token"],
        "training_seconds": trained["seconds"],
        "seconds": time.perf_counter() - began,
        "model": trained["model"],
    }


def held_out_loss(model: checkpoint.Pretrained, windows: np.ndarray) -> float:
    """Nats per token of held-out windows, a window at a time."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def nats(params: Any, tokens: jax.Array, labels: jax.Array) -> jax.Array:
        logits = models.forward(model.config, params, tokens)
        found = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, :, None], axis=2)
        return -found.mean()

    rows = windows.astype(np.int32)
    return float(np.mean([nats(model.params, row[None, :-1], row[None, 1:]) for row in rows]))


def write_lines(folder: pathlib.Path, lines: Sequence[dict[str, Any]]) -> None:
    """All lines so far, and the tables made of them."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / LINES).write_text(text, encoding="utf-8")
    for name, columns in TABLES.items():
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(lines)


if __name__ == "__main__":
    shared.run(main)
