"""How the results of `jaxsd compile` look."""

from typing import Any

import rich.box
import rich.console
import rich.table

from .quantity import format_quantity

GIGABYTE = 1e9


def show_plan(result: dict[str, Any]) -> None:
    """What is compiled, for which devices."""
    console = rich.console.Console(highlight=False)
    mesh = ", ".join(f"{name} {size}" for name, size in result["mesh"].items())
    memory = result["memory_bytes_per_device"]
    console.print(
        f"[bold]{result['topology']}[/bold]: {result['devices']} devices, mesh {mesh}; "
        + ("memory not known" if memory is None else f"{memory / GIGABYTE:.4g} GB each")
    )
    for role, model in result["models"].items():
        parameters = format_quantity(model["parameters"])
        console.print(f"{role}: {model['name']}, {parameters} parameters in {result['dtype']}")
    drafted = (
        f"{result['num_draft_tokens']} drafted a round, " if "draft" in result["models"] else ""
    )
    console.print(
        f"{drafted}batch {result['batch_size']}, context {result['context']}, prompts of "
        f"{result['prompt']} tokens"
    )


def show_progress(name: str, program: dict[str, Any]) -> None:
    """One line as soon as a program is compiled: some take minutes."""
    console = rich.console.Console(highlight=False, stderr=True)
    what = "refused" if program["refusal"] else "compiled"
    console.print(f"[dim]{name}: {what} in {program['compile_seconds']:.0f} s[/dim]")


def show_programs(result: dict[str, Any]) -> None:
    """Memory against capacity; then what the programs do."""
    console = rich.console.Console(highlight=False)
    programs, capacity = result["programs"], result["memory_bytes_per_device"]
    console.print()
    console.print(_memory_table(programs, capacity))
    for name, program in programs.items():
        if program["refusal"]:
            console.print(
                f"[bold red]{name} does not fit[/bold red]: the compiler refuses it. "
                f"{program['refusal']}"
            )
        elif program["fits"] is False:
            total = program["memory"]["total_bytes"]
            console.print(
                f"[bold red]{name} does not fit[/bold red]: every device would hold "
                f"{total / GIGABYTE:.4g} GB, {total / capacity:.3g} times what it can."
            )
    if all(program["refusal"] for program in programs.values()):
        return
    console.print()
    console.print(_work_table(programs))
    if any(program["collectives"] for program in programs.values()):
        console.print()
        console.print(_collectives_table(programs))
    console.print(
        "[dim]All per device. FLOPs and bytes of a program with loops count each loop's body once; "
        "bytes count what is fetched into the chip's own memory and used from there twice. "
        "Milliseconds are the compiler's estimate for one instruction after the other, without "
        "collectives; it has none for a loop. Collectives, copies and moves of the loop are those "
        "inside it.[/dim]"
    )
    _show_copies(console, programs)


def show_comparison(result: dict[str, Any]) -> None:
    """The compiler's seconds beside the cost model's."""
    console = rich.console.Console(highlight=False)
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD, title=f"One chip, context {result['context']}", show_edge=False
    )
    table.title_justify = "left"
    for name in ("chip", "model"):
        table.add_column(name, no_wrap=True)
    for name in ("batch", "rows", "compiler ms", "cost model ms", "ratio", "FLOPs", "bytes"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        table.add_row(
            row["topology"],
            row["model"],
            str(row["batch"]),
            str(row["rows"]),
            _milliseconds(row["compiler_seconds"]),
            _milliseconds(row["costmodel_seconds"]),
            _ratio(row["seconds_ratio"]),
            _ratio(row["flops_ratio"]),
            _ratio(row["bytes_ratio"]),
        )
    console.print(table)
    errors = result["errors"]
    if errors is None:
        console.print("The compiler gave no seconds.")
        return
    console.print(
        f"Cost model ({result['stack']}) against compiler, {errors['num_passes']} passes: median "
        f"ratio {errors['median_ratio']:.2f}, median error {100 * errors['median_error']:.0f} %, "
        f"worst {100 * errors['worst_error']:.0f} % ({errors['worst']}). Left over once the median "
        f"ratio is divided out: median {100 * errors['median_error_scaled']:.0f} %, worst "
        f"{100 * errors['worst_error_scaled']:.0f} %."
    )
    console.print(
        "[dim]Ratios are cost model over compiler. The compiler prices one instruction after the "
        "other and overlaps nothing: weights and caches that it fetches ahead are paid for in the "
        "fetch and again in the product. The cost model counts bytes once, lets arithmetic and "
        "traffic overlap and adds a time per layer. Neither is a measurement.[/dim]"
    )


def _memory_table(programs: dict[str, Any], capacity: float | None) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title="GB on every device", show_edge=False)
    table.title_justify = "left"
    table.add_column("", no_wrap=True)
    names = ("argument", "output", "aliased", "temporary", "program", "total")
    for name in ("arguments", "outputs", "aliased", "temps", "code", "total", "share"):
        table.add_column(name, justify="right")
    for label, program in programs.items():
        if program["memory"] is None:
            table.add_row(label, *("" for _ in names), "[bold red]refused[/bold red]")
            continue
        sizes = [program["memory"][f"{name}_bytes"] for name in names]
        share = "" if capacity is None else f"{100 * sizes[-1] / capacity:.0f} %"
        if program["fits"] is False:
            share = f"[bold red]{share}[/bold red]"
        table.add_row(label, *(f"{size / GIGABYTE:.3f}" for size in sizes), share)
    return table


def _work_table(programs: dict[str, Any]) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, show_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("GFLOPs", "GB moved", "ms", "in place", "copies", "moves", "compiled"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, program in programs.items():
        if program["refusal"]:
            continue
        in_place = f"{program['num_aliased']} of {program['num_caches']}"
        table.add_row(
            label,
            _scaled(program["flops"]),
            _scaled(program["bytes_accessed"]),
            _milliseconds(program["optimal_seconds"]),
            in_place if program["num_caches"] else "",
            str(len(program["cache_copies"])),
            str(len(program["cache_moves"])),
            f"{program['compile_seconds']:.0f} s",
        )
    return table


def _collectives_table(programs: dict[str, Any]) -> rich.table.Table:
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD, title="Collectives, and MB of their results", show_edge=False
    )
    table.title_justify = "left"
    compiled = {name: one for name, one in programs.items() if not one["refusal"]}
    kinds = dict.fromkeys(
        part["kind"] for program in compiled.values() for part in program["collectives"]
    )
    table.add_column("", no_wrap=True)
    for kind in kinds:
        table.add_column(kind, justify="right", no_wrap=True)
    for label, program in compiled.items():
        by_kind = {part["kind"]: part for part in program["collectives"]}
        cells = [
            f"{by_kind[kind]['num']}: {by_kind[kind]['num_bytes'] / 1e6:.3g}"
            if kind in by_kind
            else ""
            for kind in kinds
        ]
        table.add_row(label, *cells)
    return table


def _show_copies(console: rich.console.Console, programs: dict[str, Any]) -> None:
    loop = programs.get("loop")
    if loop is None or loop["refusal"]:
        return
    if loop["num_aliased"] < loop["num_caches"]:
        console.print(
            f"[bold red]{loop['num_caches'] - loop['num_aliased']} of {loop['num_caches']} caches "
            "of the loop are not written in place.[/bold red]"
        )
    if loop["cache_copies"]:
        console.print(
            f"[bold red]The loop copies whole caches {len(loop['cache_copies'])} times a "
            f"round[/bold red], first: {loop['cache_copies'][0][:160]}"
        )
    if loop["num_aliased"] == loop["num_caches"] and not loop["cache_copies"]:
        console.print(
            f"All {loop['num_caches']} caches of the loop are written in place, and none is copied "
            "inside it."
        )


def _scaled(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.4g}"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
