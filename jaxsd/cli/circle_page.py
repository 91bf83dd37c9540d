"""The page of a study: its verdict in sentences, tables and figures, made from its report alone."""

from collections.abc import Sequence

from . import circle_predict, reproduction
from .circle_laws import Row
from .circle_measure import temperature_name


def verdict(result: Row) -> list[str]:
    """In sentences: how far predictions are off, and what the designed draft is worth."""
    held, design = result["held_out"], result["design"]
    lines = []
    if held["num_points"]:
        sizes, given = held["from_sizes"], held["given_acceptance"]
        lines.append(
            f"Speed-up of {held['num_members']} drafts that no law saw, {held['num_points']} "
            f"measurements: median error {sizes['median']:.1%} from sizes, training tokens and "
            f"the device's calibration (worst {sizes['worst']:.0%}), {given['median']:.1%} given "
            f"the acceptance of texts (worst {given['worst']:.0%})."
        )
        if result["calibration"]["in_the_same_turns"]:
            early = result["held_out_by_times_before"]
            lines.append(
                "That calibration was timed in the same turns as the drafts. By the earlier one, "
                f"which the design rests on: {early['from_sizes']['median']:.1%} and "
                f"{early['given_acceptance']['median']:.1%}."
            )
        lines.append(
            f"Intervals of {circle_predict.COVERAGE:.0%} hold the measurement in "
            f"{sizes['coverage']:.0%} and {given['coverage']:.0%} of the cases."
        )
    member = design["member"]
    lines.append(
        f"The designed draft, width {member['d_model']} and depth {member['n_layers']} on "
        f"{member['tokens'] / 1e6:.2f}M tokens at K = {design['length']}: predicted "
        f"{design['predicted_speedup']:.2f}, measured {design['measured_speedup']:.2f}; its best "
        f"measured K is {design['best_length']} ({design['best_speedup']:.2f}), and the best of "
        f"the family, {design['best_of_family']}, reaches {design['best_of_family_speedup']:.2f} "
        f"({design['relative_to_family']:+.1%})."
    )
    return lines


def to_markdown(result: Row, figures: Sequence[reproduction.Figure]) -> str:
    """The page."""
    plan, target = result["plan"], result["target"]
    by_name = {figure.name: figure for figure in figures}

    def picture(name: str) -> list[str]:
        return [f"![{by_name[name].caption}]({name}.png)", "", f"*{by_name[name].caption}*", ""]

    seconds = result["seconds"]
    versions = result["versions"] or {}
    lines = [
        "# A study of drafts: predicted, trained, measured",
        "",
        f"`{result['command']}`, on {result['device']}, {(result['date'] or '')[:10]}, JAX "
        f"{versions.get('jax')}, {seconds / 3600:.1f} hours in all. Target: {target['name']}, "
        f"{target['parameters'] / 1e6:.1f}M parameters, held-out perplexity "
        f"{target['perplexity']:.1f}. Family: {len(result['family'])} drafts, "
        f"{len(plan['shapes'])} shapes by {len(plan['steps'])} numbers of training tokens; "
        f"{result['held_out']['num_members']} of them were held out by the plan, before anything "
        "was trained. All in float32.",
        "",
        *(f"- {line}" for line in verdict(result)),
        "",
        *picture("predicted_and_measured"),
        "## The device",
        "",
        *_calibration_lines(result),
        "",
        *picture("parts_of_a_round"),
        "## The family",
        "",
        *_family_table(result),
        "",
        *picture("loss"),
        "## The laws",
        "",
        *_law_lines(result),
        "",
        *picture("acceptance"),
        "### Are tokens accepted independently?",
        "",
        *_independence_lines(result),
        "",
        "## Predictions of what was held out",
        "",
        *_prediction_tables(result),
        "",
        *picture("best_length"),
        "## The designed draft",
        "",
        *_design_lines(result),
        "",
        *picture("speedup_by_size"),
        "## What this cannot show",
        "",
        *_limits(result),
        "",
    ]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, the first column to the left."""
    rule = ["---", *("--:" for _ in header[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def _calibration_lines(result: Row) -> list[str]:
    found = result["calibration"]
    held = found["held_out"]
    lengths = result["plan"]["lengths"]
    twice = ""
    if found["timed_twice"]:
        twice = (
            " The same programs, timed twice in the turns of the measurement, differ in their "
            f"speed-up by {found['timed_twice']['median']:.1%} in the median (worst "
            f"{found['timed_twice']['worst']:.0%}): what is closer than that cannot be told here."
        )
    tables = [("rounds_before", ", earlier")]
    if found["in_the_same_turns"]:
        tables.insert(0, ("rounds", ", in turns"))
    rows = [
        [
            f"{batch}{when}",
            *(f"{1e3 * seconds:.2f}" for seconds in one["target_side"]),
            f"{1e12 * one['parameter']:.0f}",
        ]
        for kind, when in tables
        for batch, one in found[kind].items()
    ]
    replaced = sum(
        len(one["replaced_lengths"]) for kind, _ in tables for one in found[kind].values()
    )
    notes = []
    if replaced:
        notes = [
            "",
            f"{replaced} of these {len(rows) * len(lengths)} times of rounds that draft are those "
            "of plain rounds: the passes of the draft, timed apart, took longer than the whole "
            "round. The device was not quiet.",
        ]
    return [
        f"{found['num_passes']} kinds of passes, and rounds of every draft length, were timed with "
        f"random weights. Memory moves {found['bytes_per_second'] / 1e9:.1f} GB/s, products reach "
        f"{found['flops_per_second'] / 1e9:.0f} GFLOP/s. Passes predicted without themselves: the "
        f"target's by a table of tokens {held['target']['median_error']:.1%} off in the median "
        f"(worst {held['target']['worst_error']:.0%}), drafts of a shape that was not timed by the "
        f"formula {held['draft']['median_error']:.1%} (worst {held['draft']['worst_error']:.0%}). "
        f"Rounds with a draft of whose shape nothing was timed are {found['round_error']:.1%} off "
        "(root mean square, without the noise of the readings that they are held against)."
        f"{twice}",
        "",
        "The target's side of a round (its pass, sampling, deciding) in ms, and what every "
        "parameter of the draft adds to a round, in ps; as timed in a stage before, and, if in "
        "turns, with the drafts:",
        "",
        *_table(
            ["batch", "plain", *(f"K = {length}" for length in lengths), "per parameter"], rows
        ),
        *notes,
    ]


def _family_table(result: Row) -> list[str]:
    name = temperature_name(result["plan"]["temperatures"][0])
    rows = []
    for row, member in zip(result["family"], result["members"], strict=True):
        best = member["best"]
        rows.append(
            [
                f"{row['name']}{' (held out)' if row['is_held_out'] else ''}",
                f"{row['parameters_total'] / 1e6:.3f}M",
                f"{row['training_tokens'] / 1e6:.2f}M",
                f"{row['loss']:.3f}",
                f"{row['perplexity']:.1f}",
                f"{result['measured'][row['name']]['alpha'][name]:.3f}",
                *(f"{one['measured_speedup']:.2f} (K {one['measured']})" for one in best.values()),
            ]
        )
    batches = [f"best at batch {batch}" for batch in result["plan"]["batches"]]
    header = ["draft", "parameters", "tokens", "loss", "perplexity", f"alpha, T = {name}", *batches]
    note = "Speed-up over plain decoding of the same batch, measured, at the best draft length."
    return [*_table(header, rows), "", note]


def _law_lines(result: Row) -> list[str]:
    laws, published = result["laws"], result["published"]
    chosen = min((one for one in laws["loss"]["candidates"] if "error" in one), key=_error)
    numbers = ", ".join(
        f"{one['name']} {one['estimate']:.4g} ({one['low']:.3g} to {one['high']:.3g})"
        for one in chosen["parameters"]
    )
    rows = [
        [
            f"{one['form']}, exponents {one['exponents']}, "
            f"{'all parameters' if one['embeddings_counted'] else 'without the token table'}",
            f"{one['error']:.4f}" if "error" in one else "not determined",
        ]
        for one in laws["loss"]["candidates"]
    ]
    lines = [
        f"Fitted to {len(laws['fitted'])} members. Every law was fitted without each of their "
        "shapes in turn; the form that then predicts that shape best was kept, and its miss is the "
        "error in the intervals. Of the loss:",
        "",
        *_table(["loss law", "off by, nats"], rows),
        "",
        f"Kept: {chosen['form']}, R2 {chosen['r_squared']:.4f}. {numbers}.",
        "",
    ]
    rows = []
    for name, one in laws["alpha"].items():
        best = min((each for each in one["candidates"] if "error" in each), key=_error)
        position = laws["position"][name]
        rows.append(
            [
                name,
                best["form"],
                f"{best['error']:.4f}",
                f"{position['errors_by_length'][0]:.2%}",
                f"{position['errors_by_length'][-1]:.2%}",
            ]
        )
    lengths = result["plan"]["lengths"]
    lines += [
        *_table(
            [
                "temperature",
                "alpha by perplexity",
                "alpha off by",
                f"tokens of a round off by, K = {lengths[0]}",
                f"K = {lengths[-1]}",
            ],
            rows,
        ),
        "",
        f"The constants of the literature on these models: Besiroglu's loss law is "
        f"{published['loss_error']:.0%} off in the median (another tokenizer, other text), SDSL's "
        f"acceptance law by {published['alpha_error']:.2f} of alpha.",
    ]
    excess = result["along_the_way"]["mean_excess_nats"]
    if excess is not None:
        lines += [
            "",
            f"Losses in the middle of a run lie {excess:+.3f} nats from what the law gives runs "
            "that end there, whose learning rate has decayed. No law uses them.",
        ]
    return lines


def _independence_lines(result: Row) -> list[str]:
    lengths = result["plan"]["lengths"]
    rows = []
    for name, one in result["independence"].items():
        for label, kind in (("one alpha", "one_alpha_error"), ("by position", "by_position_error")):
            rows.append([f"{name}, {label}", *(f"{error:+.1%}" for error in one[kind])])
    lags = "; ".join(
        f"T = {name}: " + ", ".join(f"{value:.2f}" for value in one["autocorrelation"].values())
        for name, one in result["independence"].items()
    )
    return [
        "If they were, one alpha would give the tokens of a round at every length. Errors of the "
        "tokens of a round from one alpha, and from acceptance by position at the largest K, "
        "beside what the target's texts give exactly; mean of all members:",
        "",
        *_table(["temperature", *(f"K = {length}" for length in lengths)], rows),
        "",
        f"Autocorrelation of the chance that a token is kept, 1, 2 and 4 places apart: {lags}.",
    ]


def _prediction_tables(result: Row) -> list[str]:
    held, fitted = result["held_out"], result["fitted"]
    if not held["num_points"]:
        return ["Nothing was held out."]
    rows = []
    early = result["held_out_by_times_before"]
    labels = {
        "from_sizes": "speed-up from sizes, tokens and calibration",
        "given_acceptance": "speed-up given the acceptance of texts",
        "by_one_alpha": "the first, tokens by one alpha for all places of a round",
        "by_passes": "the first, rounds as the sum of their passes, timed apart",
    }
    for kind, label in labels.items():
        cells = [
            f"{group[kind][what]:.1%}" for group in (held, fitted) for what in ("median", "worst")
        ]
        share = held[kind].get("coverage")
        rows.append([label, *cells, "" if share is None else f"{share:.0%}"])
    kinds = ("from_sizes", "given_acceptance")
    for kind in kinds if result["calibration"]["in_the_same_turns"] else ():
        cells = [f"{early[kind][what]:.1%}" for what in ("median", "worst")]
        share = f"{early[kind]['coverage']:.0%}"
        rows.append([f"{labels[kind]}, by the earlier times", *cells, "", "", share])
    for kind in ("loss", "perplexity"):
        cells = [
            f"{group[kind][what]:.1%}" for group in (held, fitted) for what in ("median", "worst")
        ]
        rows.append([kind, *cells, ""])
    for kind in held["parts"]:
        cells = [
            f"{group['parts'][kind][what]:.1%}"
            for group in (held, fitted)
            for what in ("median", "worst")
        ]
        rows.append([kind, *cells, ""])
    lines = _table(
        [
            "error of",
            "held out, median",
            "worst",
            "fitted, median",
            "worst",
            f"{circle_predict.COVERAGE:.0%} intervals hold",
        ],
        rows,
    )
    rows = [
        [
            batch,
            f"{one['within_one']:.0%}",
            f"{one['median_loss']:.1%}",
            held["best_member"][batch]["predicted"],
            held["best_member"][batch]["measured"],
            f"{held['best_member'][batch]['loss']:.1%}",
        ]
        for batch, one in held["best_length"].items()
    ]
    return [
        *lines,
        "",
        "One alpha and the sum of passes are simpler models, to compare: the first row knows "
        "acceptance by position, and rounds as they were timed in the decoder's loop.",
        "",
        *_table(
            [
                "batch",
                "best K within one",
                "it loses, median",
                "best draft, predicted",
                "measured",
                "it loses",
            ],
            rows,
        ),
    ]


def _design_lines(result: Row) -> list[str]:
    design = result["design"]
    member, measured = design["member"], design["measured"]
    low, high = design["predicted_interval"]
    free = ", ".join(
        f"{name} {value:.4g}"
        for name, value in design["continuous"].items()
        if name in design["searched"]
    )
    return [
        f"Searched by gradient for one sequence, under the training FLOPs of the family's most "
        f"expensive member ({design['training_flops_limit']:.2e}): {free}. Rounded: width "
        f"{member['d_model']}, depth {member['n_layers']}, {member['tokens'] / 1e6:.2f}M tokens, "
        f"K = {design['length']}."
        + (
            f" The answer leans on {', '.join(design['formula']['at_bound'])}."
            if design["formula"]["at_bound"]
            else ""
        ),
        "",
        *_table(
            ["", "predicted", "measured"],
            [
                ["loss", f"{design['loss']:.3f}", f"{measured['loss']['measured']:.3f}"],
                [
                    f"speed-up at K = {design['length']}",
                    f"{design['predicted_speedup']:.3f} ({low:.2f} to {high:.2f})",
                    f"{design['measured_speedup']:.3f}",
                ],
                [
                    "by the times of the measurement's turns",
                    f"{design['predicted_with_times_of_turns']:.3f}",
                    "",
                ],
                [
                    "best K",
                    str(design["length"]),
                    f"{design['best_length']} ({design['best_speedup']:.3f})",
                ],
                [
                    "best of the family",
                    "",
                    f"{design['best_of_family']}, K = {design['best_of_family_length']} "
                    f"({design['best_of_family_speedup']:.3f})",
                ],
            ],
        ),
    ]


def _limits(result: Row) -> list[str]:
    plan = result["plan"]
    sizes, tokens = (
        [row[name] / 1e6 for row in result["family"]]
        for name in ("parameters_total", "training_tokens")
    )
    return [
        "One target, one tokenizer, one kind of text, one device. The drafts have "
        f"{min(sizes):.2g}M to {max(sizes):.2g}M parameters and saw {min(tokens):.2g}M to "
        f"{max(tokens):.2g}M tokens: laws fitted to them say nothing of drafts a thousand times as "
        "large, only that the method carries from some members of a family to others of the same "
        "kind. One seed per member, so that the scatter between seeds is inside the errors and "
        "not known apart. The target's perplexity does not vary, so no law here knows what it "
        f"does to acceptance. Texts are continued by about {plan['new_tokens']} tokens; long "
        "contexts, where caches outweigh weights, are not here. Decoding is timed at one "
        "temperature.",
    ]


def _error(candidate: Row) -> float:
    return candidate["error"]
