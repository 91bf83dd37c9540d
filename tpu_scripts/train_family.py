"""How good are drafts of many widths and depths for one target? A line of JSON for every draft.

    python tpu_scripts/train_family.py --folder runs/family --widths 64,96,128 --depths 1,2,4

Trains a draft of every width and depth on the same tokens as all others, with the target's
tokenizer, and measures loss and acceptance on held-out text. A run can be killed at any time: the
same command goes on where it was, and drafts that are done are not trained again. The lines are in
`FOLDER/family.jsonl`, the models in `FOLDER/<name>/model`. `FOLDER/acceptance.csv` holds what
`jaxsd fit acceptance` reads, `FOLDER/loss.csv` what `jaxsd fit loss` reads. `jaxsd circle` trains a
family with the same code, and goes on to measure speeds, fit laws and hold them against each other.
"""

import csv
import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import shared

from jaxsd import models
from jaxsd.cli import circle_family, circle_plan, measure, pair
from jaxsd.models import checkpoint

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
    plan = make_plan(args)
    tokens = plan.members[0].tokens
    shared.say(f"to train          {len(plan.members)} drafts, {tokens / 1e6:.2f}M tokens each")
    text = circle_family.read_text(plan, args.corpus, target.tokenizer)
    args.folder.mkdir(parents=True, exist_ok=True)
    lines = []
    shared.say("\ndraft           parameters  tokens   loss   alpha  greedy  seconds")
    for member in plan.members:
        line = train_one(plan, member, args.folder, folder, target, text)
        lines.append(line)
        write_lines(args.folder, lines)
        shared.say(
            f"{line['name']:<14} {line['parameters_total'] / 1e6:10.3f}M "
            f"{line['training_tokens'] / 1e6:6.2f}M {line['loss']:6.3f} {line['alpha']:7.3f} "
            f"{line['greedy_agreement']:7.3f} {line['seconds']:8.1f}"
        )
        print(json.dumps(line), flush=True)
    return shared.finish("train_family", argv, args.out, card=card, drafts=lines)


def make_plan(args: Any) -> circle_plan.Plan:
    """The plan of a study whose family is the one that the options name."""
    return dataclasses.replace(
        circle_plan.BUDGETS["small"],
        shapes=tuple((width, depth) for depth in args.depths for width in args.widths),
        held_out_shapes=(),
        steps=(args.steps,),
        batch_size=args.batch_size,
        accumulation=1,
        sequence_length=args.sequence_length,
        learning_rate=args.learning_rate,
        head_dim=args.head_dim,
        num_prompts=1,
        prompt_length=1,
        windows=args.windows,
        seed=args.seed,
    )


def train_one(
    plan: circle_plan.Plan,
    member: circle_plan.Member,
    folder: pathlib.Path,
    target_folder: str,
    target: checkpoint.Pretrained,
    text: circle_family.Text,
) -> dict[str, Any]:
    """One draft, trained if it is not yet, and what it is worth to the target."""
    began = time.perf_counter()
    out = folder / member.shape_name
    line = circle_family.train_member(plan, member, out, target_folder, target, text)
    draft = checkpoint.load_model(out / "model")
    overlap = measure.make_overlap(target, draft)
    inputs = text.windows[:, :-1]
    by_temperature = {
        heat: np.mean([overlap(row[None], heat)[0].mean() for row in inputs]) for heat in (1.0, 0.0)
    }
    target_loss = circle_family.held_out_loss(target, text.windows)
    return {
        **line,
        "name": member.shape_name,
        "draft_perplexity": line["perplexity"],
        "target_parameters_total": models.num_parameters(target.config),
        "target_loss": target_loss,
        "target_perplexity": math.exp(target_loss),
        # Teacher-forced on held-out text: the probability that a sampled token is accepted, and
        # how often both prefer the same token.
        "alpha": float(by_temperature[1.0]),
        "greedy_agreement": float(by_temperature[0.0]),
        "seconds": time.perf_counter() - began,
        "model": str(out / "model"),
    }


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
