"""How the demo's result looks."""

import sys
from typing import Any

import rich.box
import rich.console
import rich.rule
import rich.style
import rich.table
from rich.color import ColorSystem

from . import design, generate, quantity

PROMPT_STYLE = rich.style.Style(dim=True)


def show_text(sample: Any) -> None:
    """One text as it is decoded, tokens of draft and target in two colours."""
    console = rich.console.Console(highlight=False)
    color = console.color_system is not None and not console.no_color
    console.print(rich.rule.Rule(sample.prompt.file, style="dim"))
    legend = "[dim]the prompt[/dim], [green]draft tokens that the target accepted[/green], "
    legend += "[bold magenta]the target's own tokens[/bold magenta]"
    console.print(
        f"{legend}; temperature {sample.temperature:g}, {sample.num_draft_tokens} drafted a round\n"
    )
    text = sample.prompt.text
    if color:
        lines = text.split("\n")
        lines = [PROMPT_STYLE.render(line, color_system=ColorSystem.STANDARD) for line in lines]
        text = "\n".join(lines)
    sys.stdout.write(text)
    writer = generate.Writer(sample.tokenizer, sys.stdout, color)
    num_tokens = num_accepted = 0
    for info in sample.rounds:
        writer.write(info)
        num_tokens += int(info.num_tokens[0])
        num_accepted += min(int(info.num_tokens[0]), int(info.num_accepted[0]))
    writer.finish()
    console.print(f"\n[dim]{num_accepted} of these {num_tokens} tokens are the draft's.[/dim]")


def show_result(result: dict[str, Any]) -> None:
    """The tables, and what they say."""
    console = rich.console.Console(highlight=False)
    console.print(rich.rule.Rule("plain and speculative decoding", style="dim"))
    models = result["models"]
    console.print(
        f"target {quantity.format_quantity(models['target']['parameters'])} parameters, draft "
        f"{quantity.format_quantity(models['draft']['parameters'])}; {result['device']}; batch "
        f"{result['batch_size']}; {result['num_draft_tokens']} drafted a round; "
        f"{result['prompts']} held-out prompts, {result['new_tokens_per_prompt']} tokens each"
    )
    console.print()
    console.print(_figures(result))
    console.print()
    console.print(
        f"[dim]Measured: medians of {result['runs']} runs in which plain and speculative decoding "
        "take turns, prompts read and programs compiled before. Predicted: from step times and "
        "the overlap of the two models' distributions (alpha), both measured without speculating. "
        "Greedy comes last: the greedy text of small models repeats itself, which makes it easy "
        "to draft.[/dim]\n"
    )
    console.print(_equality(result))
    console.print(rich.rule.Rule("how many tokens to draft on this machine", style="dim"))
    console.print(_lengths(result))
    console.print()
    console.print(_recommendation(result))
    console.print(
        f"[dim]Compiling took {result['compile_seconds']:.0f} s, everything "
        f"{result['seconds']:.0f} s.[/dim]"
    )
    console.print(rich.rule.Rule("a draft by design", style="dim"))
    console.print(design.describe(result["design"]))
    console.print(
        f"[dim]Predicted alpha {result['design']['alpha']:.3f}, gamma "
        f"{result['design']['gamma']:.2f}; more with jaxsd design.[/dim]"
    )


def _figures(result: dict[str, Any]) -> rich.table.Table:
    """Figures as rows; measured and predicted side by side at each temperature."""
    # Seven columns in 80 characters.
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("", no_wrap=True)
    for row in result["temperatures"]:
        table.add_column(f"{_name(row['temperature'])}\nmeasured", justify="right", no_wrap=True)
        table.add_column("\npredicted", justify="right", no_wrap=True, style="dim")
    rows = result["temperatures"]

    def add(label: str, key: str, form: str, style: str = "") -> None:
        cells = []
        for row in rows:
            cells += [format(row[side][key], form) for side in ("measured", "predicted")]
        table.add_row(label, *cells, style=style)

    add("plain tokens/s", "plain_tokens_per_second", ".0f")
    add("speculative tokens/s", "speculative_tokens_per_second", ".0f")
    add("speed-up", "speedup", ".2f", "bold")
    for label, key in (("  lowest run", "speedup_min"), ("  highest run", "speedup_max")):
        cells = [(format(row["measured"][key], ".2f"), "") for row in rows]
        table.add_row(label, *(cell for pair in cells for cell in pair))
    add("mean acceptance length", "mean_acceptance_length", ".2f")
    for place in range(result["num_draft_tokens"]):
        cells = []
        for row in rows:
            sides = (row["measured"], row["predicted"])
            cells += [f"{side['acceptance_by_position'][place]:.2f}" for side in sides]
        table.add_row(f"acceptance, position {place + 1}", *cells)
    add("alpha", "alpha", ".2f")
    return table


def _lengths(result: dict[str, Any]) -> rich.table.Table:
    """Step times and predicted speed-ups by draft length."""
    times = result["step_times"]
    lengths = range(len(times["verify_seconds"]))
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("draft tokens a round", no_wrap=True)
    for length in lengths:
        table.add_column(str(length), justify="right")
    drafting = [length * times["draft_seconds"] for length in lengths]
    for label, seconds in (("drafting, ms", drafting), ("verifying, ms", times["verify_seconds"])):
        table.add_row(label, *(f"{1e3 * value:.2f}" for value in seconds))
    for row in result["temperatures"]:
        best = row["recommended_num_draft_tokens"]
        cells = [
            f"[bold green]{gain:.2f}[/bold green]" if length == best else f"{gain:.2f}"
            for length, gain in enumerate(row["predicted_speedup_by_num_draft_tokens"])
        ]
        table.add_row(f"speed-up, {_name(row['temperature'])}", *cells)
    return table


def _recommendation(result: dict[str, Any]) -> str:
    parts = []
    for row in result["temperatures"]:
        best = row["recommended_num_draft_tokens"]
        name = _name(row["temperature"])
        parts.append(f"{best} at {name}" if best else f"0 (plain decoding) at {name}")
    return f"Recommended draft length here: {', '.join(parts)}."


def _equality(result: dict[str, Any]) -> str:
    total = result["prompts"] * result["new_tokens_per_prompt"]
    if result["outputs_equal"]:
        return (
            f"Greedy output with speculation equals plain output token for token: all {total} "
            f"tokens of {result['prompts']} prompts."
        )
    places = "; ".join(
        f"prompt {item['prompt']}, token {item['token']} (the target's two best logits are "
        f"{item['margin_in_logits']:.2g} apart)"
        for item in result["differences"]
    )
    return f"[bold red]Greedy outputs differ[/bold red], first at {places}."


def _name(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"T = {temperature:g}"
