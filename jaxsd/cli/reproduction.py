"""How a reproduced paper looks: its figures beside ours, judged, printed, drawn and written out."""

import csv
import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import rich.box
import rich.console
import rich.markup
import rich.table

COLORS = ("#0b5fa5", "#d1495b", "#2e8b57", "#e09f3e", "#6a4c93", "#3c3c3c", "#7fb7be", "#a0522d")
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
}


class Comparison(NamedTuple):
    """One number of a paper beside ours.

    It is judged, by `agrees`, where `tolerance` is given (relative) or `paper` is a string: then
    ours must round to the digits that are printed.
    """

    name: str
    ours: float
    paper: str | float | None = None  # as printed, as a number, or None where none is printed
    tolerance: float | None = None
    note: str = ""


class Table(NamedTuple):
    """One table of a paper."""

    title: str
    rows: list[Comparison]
    note: str = ""


class Figure(NamedTuple):
    """One figure of a paper, drawn on request."""

    name: str  # of the file, without its ending
    caption: str
    draw: Callable[[Any], None]  # draws on a matplotlib Figure
    size: tuple[float, float] = (6.4, 4.0)  # inches


class Reproduction(NamedTuple):
    """Everything of a paper that was computed again."""

    paper: str
    tables: list[Table]
    figures: list[Figure]
    errata: list[str]  # what in the paper cannot be as printed, or is unknown, and what we did


def agrees(row: Comparison) -> bool | None:
    """Whether ours is the paper's number; None where that is not judged.

    >>> agrees(Comparison("slope", -0.00670008, "-0.0067")), agrees(Comparison("slope", 1.0, "1.1"))
    (True, False)
    >>> agrees(Comparison("size", 1.001, 1.0, tolerance=1e-2)), agrees(Comparison("size", 1.0))
    (True, None)
    """
    if row.paper is None or (row.tolerance is None and not isinstance(row.paper, str)):
        return None
    paper = float(row.paper)
    if row.tolerance is not None:
        return bool(abs(row.ours - paper) <= row.tolerance * abs(paper))
    # Half a unit of the last printed digit, and a hair for the binary form of a tie.
    return bool(abs(row.ours - paper) <= 0.5 * _last_digit(str(row.paper)) * (1 + 1e-9))


def show(reproduction: Reproduction) -> None:
    """Prints tables, errata and the verdict."""
    console = rich.console.Console(highlight=False)
    console.print(f"[bold]{reproduction.paper}[/bold]\n")
    for table in reproduction.tables:
        console.print(_rich_table(table))
        if table.note:
            console.print(f"[dim]{rich.markup.escape(table.note)}[/dim]")
        console.print()
    if reproduction.errata:
        console.print("[bold]Errata and remarks[/bold]")
        for text in reproduction.errata:
            console.print(f"- {rich.markup.escape(text)}")
        console.print()
    judged, agreeing = count(reproduction)
    console.print(f"{agreeing} of {judged} judged figures agree.")


def count(reproduction: Reproduction) -> tuple[int, int]:
    """How many figures are judged, and how many of them agree."""
    verdicts = [agrees(row) for table in reproduction.tables for row in table.rows]
    return sum(verdict is not None for verdict in verdicts), sum(v is True for v in verdicts)


def write(reproduction: Reproduction, folder: pathlib.Path) -> list[str]:
    """Writes every figure as PNG and PDF and the tables as one CSV; returns the files.

    Raises:
      ValueError: matplotlib, the extra `plot`, is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "tables.csv"]
    with files[0].open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["table", "quantity", "ours", "paper", "agrees", "note"])
        for table in reproduction.tables:
            for row in table.rows:
                paper = "" if row.paper is None else row.paper
                verdict = agrees(row)
                cells = [f"{row.ours:.10g}", paper, "" if verdict is None else verdict, row.note]
                writer.writerow([table.title, row.name, *cells])
    for figure in reproduction.figures:
        files += draw(figure.draw, folder / figure.name, figure.size)
    return [str(file) for file in files]


def draw(
    painter: Callable[[Any], None],
    stem: pathlib.Path,
    size: tuple[float, float],
    endings: tuple[str, ...] = (".png", ".pdf"),
) -> list[pathlib.Path]:
    """Draws one figure without a display, in the style of all of them; returns its files.

    Raises:
      ValueError: matplotlib, the extra `plot`, is not installed.
    """
    require_matplotlib()
    import cycler  # comes with matplotlib
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    style: Any = {**STYLE, "axes.prop_cycle": cycler.cycler(color=COLORS)}
    with matplotlib.rc_context(style):
        canvas = Canvas(figsize=size)
        FigureCanvasAgg(canvas)
        painter(canvas)
        files = [stem.with_name(stem.name + ending) for ending in endings]
        for file in files:
            # Without the date of the run the same numbers give the same file.
            metadata = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(file.suffix)
            canvas.savefig(file, metadata=metadata)
    return files


def require_matplotlib(what: str = "drawing") -> None:
    """Raises ValueError if nothing can be drawn; for before hours of work, not after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            f"{what} needs matplotlib, which is not installed: pip install 'jaxsd[plot]'"
        )


def as_json(reproduction: Reproduction) -> dict[str, Any]:
    """Tables, errata and counts as JSON values."""
    judged, agreeing = count(reproduction)
    tables = [
        {
            "title": table.title,
            "rows": [row._asdict() | {"agrees": agrees(row)} for row in table.rows],
            "note": table.note,
        }
        for table in reproduction.tables
    ]
    return {
        "paper": reproduction.paper,
        "judged": judged,
        "agreeing": agreeing,
        "tables": tables,
        "errata": reproduction.errata,
    }


def _last_digit(printed: str) -> float:
    """The value of one unit of the last printed digit.

    >>> _last_digit("-0.0067"), _last_digit("8.947e-11")
    (0.0001, 1e-14)
    """
    digits, _, exponent = printed.lower().partition("e")
    places = len(digits.partition(".")[2])
    return float(f"1e{int(exponent or 0) - places}")


def _rich_table(table: Table) -> rich.table.Table:
    out = rich.table.Table(
        box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title=table.title
    )
    out.title_justify = "left"
    out.add_column("")
    for name in ("ours", "paper", "difference"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("")
    for row in table.rows:
        verdict = agrees(row)
        mark = {True: "[green]=[/green]", False: "[bold red]differs[/bold red]", None: ""}[verdict]
        note = " ".join(
            part for part in (mark, f"[dim]{row.note}[/dim]" if row.note else "") if part
        )
        paper = "" if row.paper is None else _number(row.paper)
        out.add_row(row.name, _ours(row), paper, _difference(row), note)
    return out


def _ours(row: Comparison) -> str:
    """Ours with two digits more than the paper prints, or six."""
    if not isinstance(row.paper, str):
        return f"{row.ours:.6g}"
    digits, _, exponent = row.paper.lower().partition("e")
    places = len(digits.partition(".")[2]) + 2
    return f"{row.ours:.{places}e}" if exponent else f"{row.ours:.{places}f}"


def _number(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def _difference(row: Comparison) -> str:
    """Relative, or absolute where the paper prints zero."""
    if row.paper is None:
        return ""
    paper = float(row.paper)
    return f"{row.ours - paper:+.1e}" if paper == 0 else f"{(row.ours - paper) / paper:+.1e}"
